"""Training on XLA's CPU device with virtual chips, as on a TPU host."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import signal
import uuid
from pathlib import Path

import pytest
from harness import sabotage
from support import TINY, assert_same_weights, options, picture_files, run, run_well, scalars

from job import storage
from job.monitoring.accounting import read

pytestmark = [
    pytest.mark.xla,
    pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch-xla is not in this environment"),
]

SETTINGS: dict[str, object] = {
    **TINY,
    "model.milestones": "[1]",  # the head, then the last half: two graphs
    "trainer.max_epochs": 2,
    "trainer.accelerator": "tpu",
    "data.global_batch_size": 12,  # 32 images: two whole batches and one of 8, padded
}
XLA_CPU = {"PJRT_DEVICE": "CPU", "PYTHONPATH": str(Path(__file__).parents[1] / "faults")}


def fit(run_dir: str, colours: str, *, chips: int = 2, **changes: object) -> str:
    """Train on ``chips`` virtual chips; return the output."""
    arguments = options({**SETTINGS, **changes}, data__root=colours, run_dir=run_dir)
    result = run_well("fit", *arguments, CPU_NUM_DEVICES=str(chips), **XLA_CPU)
    return result.stdout + result.stderr


@pytest.fixture
def runs(gcs: str) -> str:
    """A folder in which no earlier try of a test has left a run."""
    return f"{gcs}/xla/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def images(gcs: str) -> str:
    storage.write_many(f"{gcs}/xla-colours", picture_files(["blue", "red"], 20))
    return f"{gcs}/xla-colours"


@pytest.fixture(scope="module")
def on_cpu(gcs: str, images: str) -> str:
    """The same run without XLA."""
    run_dir = f"{gcs}/xla/cpu-{uuid.uuid4().hex}"
    run_well("fit", *options({**SETTINGS, "trainer.accelerator": "cpu"}, data__root=images, run_dir=run_dir))
    return run_dir


@pytest.fixture(scope="module")
def on_xla(gcs: str, images: str) -> str:
    """The run on two chips."""
    run_dir = f"{gcs}/xla/two-{uuid.uuid4().hex}"
    assert "XLA: 2 chip(s) of 1 host(s), CPU, precision 32-true" in fit(run_dir, images)
    return run_dir


def test_two_chips_train_as_the_cpu(on_xla: str, on_cpu: str) -> None:
    """Including the last, smaller batch; torch-xla's batch norm keeps a biased variance, hence 1e-3 at validation."""
    xla, cpu = scalars(on_xla), scalars(on_cpu)
    assert [step for step, _ in xla["train/loss"]] == list(range(6))
    for tag in ("train/loss", "val/loss", "val/accuracy"):
        assert [v for _, v in xla[tag]] == pytest.approx([v for _, v in cpu[tag]], rel=1e-3), tag


@pytest.mark.parametrize("chips", [1, 4])
def test_other_numbers_of_chips(chips: int, runs: str, images: str, on_cpu: str) -> None:
    run_dir = f"{runs}/{chips}"
    fit(run_dir, images, chips=chips)
    xla, cpu = scalars(run_dir), scalars(on_cpu)
    for tag in ("train/loss", "val/loss"):
        assert [v for _, v in xla[tag]] == pytest.approx([v for _, v in cpu[tag]], rel=1e-3), tag


@pytest.mark.parametrize("features", ["never", "always"])
def test_compilations_and_host_waits_do_not_grow_with_steps(
    features: str, runs: str, images: str, tmp_path: Path
) -> None:
    """Epochs of 3 and of 16 steps without logging have equally many compilations and host waits."""
    waits_per_epoch = []
    for size in (12, 2):
        run_dir = f"{runs}/steps-{size}-{features}"
        changes = {"data.global_batch_size": size, "trainer.log_every_n_steps": 1000, "trainer.max_epochs": 6}
        # The progress line looks at the metrics every few seconds: how often depends on the machine's speed.
        changes |= {"trainer.enable_progress_bar": False, "model.milestones": "[9]", "features.use": features}
        changes["data.cache_dir"] = tmp_path / "cache"  # else a run of another test would find the features
        fit(run_dir, images, **changes)
        logged = scalars(run_dir)
        compiled = [value for _, value in logged["xla/compilations"]]
        assert len(compiled) == 6
        assert compiled[4] == compiled[5]  # the last graphs appear in the third or fourth epoch
        waits = [value for _, value in logged["xla/host_waits"]]
        waits_per_epoch.append(waits[5] - waits[4])
    # In validation each batch's results are fetched, five values, here of one batch and of four.
    assert waits_per_epoch[1] - waits_per_epoch[0] == 5 * 3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_head_trains_from_cached_features(precision: str, runs: str, images: str, tmp_path: Path) -> None:
    """With the losses of the run without them; another run finds them, whatever its number of chips."""
    changes: dict[str, object] = {"model.milestones": "[9]", "trainer.max_epochs": 3, "trainer.precision": precision}
    uri, computed = f"{runs}/features-{precision}", "computing the features of the frozen backbone once"
    fit(f"{runs}/images-{precision}", images, **changes, **{"features.use": "never"})
    assert f"{computed}: train 1 of 1 chunks, val 1 of 1 chunks" in fit(
        f"{runs}/cached-{precision}",
        images,
        **changes,
        **{"features.uri": uri, "data.cache_dir": tmp_path / "one"},
    )
    changes |= {"features.uri": uri, "data.cache_dir": tmp_path / "another"}
    assert computed not in fit(f"{runs}/found-{precision}", images, chips=4, **changes)
    expected = scalars(f"{runs}/images-{precision}")
    for name in ("cached", "found"):
        found = scalars(f"{runs}/{name}-{precision}")
        for tag in ("train/loss", "val/loss"):
            assert [v for _, v in found[tag]] == pytest.approx([v for _, v in expected[tag]], rel=1e-5), (name, tag)


def test_a_second_start_finds_every_graph_compiled(runs: str, images: str, on_xla: str) -> None:
    """In the bucket, as on another machine; unlike a TPU, XLA's CPU device cannot load them."""
    run_dir = f"{runs}/again"
    compiled = {file.key: file for file in storage.list_files(f"{on_xla}/xla")}
    assert len(compiled) == scalars(on_xla)["xla/cache_misses"][-1][1]
    storage.write_many(f"{run_dir}/xla", {key: storage.read_bytes(f"{on_xla}/xla/{key}") for key in compiled})
    fit(run_dir, images)
    assert [value for _, value in scalars(run_dir)["xla/cache_misses"]] == [0, 0]
    assert {file.key for file in storage.list_files(f"{run_dir}/xla")} == set(compiled)


def test_stopped_and_resumed_is_bit_equal(runs: str, images: str, on_xla: str, tmp_path: Path) -> None:
    run_dir = f"{runs}/stopped"
    arguments = options(SETTINGS, data__root=images, run_dir=run_dir)
    callback = f"--trainer.callbacks={sabotage(tmp_path / 'struck', step=4)}"
    result = run("fit", *arguments, callback, CPU_NUM_DEVICES="2", **XLA_CPU)
    assert result.returncode == 128 + signal.SIGTERM, result.stdout + result.stderr
    output = fit(run_dir, images)
    resumed = re.search(r"resuming after step (\d+), epoch 1", output)
    assert resumed is not None, output
    assert int(resumed[1]) in (4, 5)
    assert_same_weights(run_dir, on_xla)
    assert scalars(run_dir)["train/loss"] == scalars(on_xla)["train/loss"]
    assert len(read(run_dir)) == 2


def test_a_checkpoint_moves_between_cpu_and_xla(runs: str, images: str, on_cpu: str) -> None:
    """An epoch on the CPU, one on XLA, one on the CPU: as three on the CPU."""
    for name, accelerators in (("crossing", ("cpu", "tpu", "cpu")), ("staying", ("cpu", "cpu", "cpu"))):
        for epochs, accelerator in enumerate(accelerators, 1):
            changes = {"trainer.accelerator": accelerator, "trainer.max_epochs": epochs}
            output = fit(f"{runs}/{name}", images, **changes)
            assert epochs == 1 or f"epoch {epochs - 1}" in output
    crossing, staying = scalars(f"{runs}/crossing"), scalars(f"{runs}/staying")
    for tag in ("train/loss", "val/loss"):
        assert [v for _, v in crossing[tag]] == pytest.approx([v for _, v in staying[tag]], rel=1e-3), tag


def test_a_model_is_validated_alike_on_xla_and_cpu(gcs: str, images: str, on_xla: str) -> None:
    table_on_xla = run_well("validate", "--run_dir", on_xla, CPU_NUM_DEVICES="2", **XLA_CPU).stdout
    table_on_cpu = run_well("validate", "--run_dir", on_xla, "--trainer.accelerator", "cpu").stdout
    values = [
        [float(value) for value in re.findall(r"val/(?:loss|accuracy|auroc)\W+([\d.]+)", output)]
        for output in (table_on_xla, table_on_cpu)
    ]
    assert len(values[0]) == 3
    assert values[0] == pytest.approx(values[1], abs=2e-4)
    output = run_well("predict", "--ckpt", on_xla, "--input", f"{images}/red").stdout
    assert len(re.findall(r"red/\d+\.jpg\W+(?:red|blue)", output)) == 20


def test_a_trace_for_tensorboard(runs: str, images: str) -> None:
    """Steps 5 and on of this start, where TensorBoard's profile plugin looks for them."""
    run_dir = f"{runs}/traced"
    output = fit(run_dir, images, **{"trainer.profiler": "xla", "model.milestones": "[9]"})
    assert "a trace of steps 5 to 10 lies in" in output
    files = {file.key: file for file in storage.list_files(f"{run_dir}/tensorboard/plugins/profile")}
    (trace,) = (key for key in files if key.endswith(".trace.json.gz"))
    events = json.loads(gzip.decompress(storage.read_bytes(f"{run_dir}/tensorboard/plugins/profile/{trace}")))
    assert len(events["traceEvents"]) > 100
    assert scalars(run_dir)["train/loss"]


def test_bf16(runs: str, images: str, on_cpu: str) -> None:
    """Losses are close to float32, and not equal."""
    run_dir = f"{runs}/bf16"
    assert "precision bf16-mixed" in fit(run_dir, images, **{"trainer.precision": "bf16-mixed"})
    xla, cpu = ([value for _, value in scalars(run)["train/loss"]] for run in (run_dir, on_cpu))
    assert xla == pytest.approx(cpu, rel=0.05)
    assert xla != pytest.approx(cpu, rel=1e-5)


def test_a_pod_of_a_tpu_host(runs: str, images: str, on_xla: str) -> None:
    """``launch`` in GKE's environment starts one process."""
    variables = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost", "JOB_COMPLETION_INDEX": "0"}
    run_dir = f"{runs}/launched"
    arguments = options(SETTINGS, data__root=images, run_dir=run_dir)
    result = run_well("launch", "fit", *arguments, CPU_NUM_DEVICES="2", **variables, **XLA_CPU)
    assert "TPU: alone (TPU_WORKER_ID=0" in result.stderr
    assert_same_weights(run_dir, on_xla)


@pytest.mark.parametrize(
    ("changes", "processes", "variables", "message"),
    [
        ({"data.global_batch_size": 9}, 0, {}, "--data.global_batch_size 9 does not divide over 2 chips"),
        ({"trainer.precision": "16-mixed"}, 0, {}, "--trainer.precision 16-mixed does not exist on XLA"),
        ({}, 2, {}, "2 process(es) were started, but XLA counts 1"),
        ({}, 0, {"PJRT_DEVICE": "TPU"}, "this machine has no TPU"),
    ],
)
def test_mistakes_on_xla(
    changes: dict[str, object], processes: int, variables: dict[str, str], message: str, images: str, tmp_path: Path
) -> None:
    arguments = options({**SETTINGS, **changes}, data__root=images, run_dir=tmp_path / "run")
    result = run("fit", *arguments, processes=processes, **{**XLA_CPU, "CPU_NUM_DEVICES": "2", **variables})
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
