"""``python -m job submit``: what it renders, and what it refuses before anything is applied."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.api_core.exceptions import PermissionDenied
from google.cloud import aiplatform_v1
from google.cloud.aiplatform_v1.types import CustomJob, CustomJobSpec, JobState
from k8s.manifests import (
    COMPLETION_INDEX,
    REPOSITORY,
    Manifest,
    environment_of,
    job_of,
    kustomize,
    of_kind,
    pod_of,
    rendered,
)
from test_manifests import FIELDS, assert_fits, quantity, requests_of, validate

from job import cli
from job.cli.submit import submit
from job.cluster.environment import find_node
from job.cluster.machines import SYSTEM_PODS
from job.errors import ConfigError
from job.submit import bases, overlay, vertex
from job.submit.machine import find_machine, short_name
from job.submit.run import Run
from job.submit.values import NAME_CHARACTERS, require_image, require_name
from job.submit.vertex import VertexError
from k8s import submitted

CLUSTER_CASES = [name for name in submitted.CASES if "vertex" not in name]
VERTEX_CASES = [name for name in submitted.CASES if "vertex" in name]
BASIC = ["cats", *submitted.OPTIONS, "--machine", "l4x8"]

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove pytest's arguments, of which LightningCLI warns."""
    monkeypatch.setattr(sys, "argv", ["job"])


def manifests_of(name: str, run: str = "cats") -> list[Manifest]:
    return list(yaml.safe_load_all(submitted.printed(name, run)))


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> list[Manifest]:
    """Return what ``submit ARGS --dry-run`` prints."""
    submit([*BASIC, "--dry-run", *args] if "--" not in args else _before_the_dashes(args))
    return list(yaml.safe_load_all(capsys.readouterr().out))


def _before_the_dashes(args: tuple[str, ...]) -> list[str]:
    place = args.index("--")
    return [*BASIC, *args[:place], "--dry-run", *args[place:]]


def arguments(manifests: list[Manifest]) -> list[str]:
    return list(pod_of(manifests)["containers"][0]["args"])


def test_every_case_has_a_golden_file() -> None:
    assert {file.stem for file in submitted.GOLDEN.glob("*.yaml")} == set(submitted.CASES)


@pytest.mark.parametrize("name", submitted.CASES)
def test_renders_as_committed(name: str) -> None:
    """Commit the golden files with an intended change: make golden."""
    assert submitted.printed(name) == (submitted.GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", CLUSTER_CASES)
def test_is_valid_and_named_after_the_run(name: str) -> None:
    for manifest in manifests_of(name):
        validate(manifest)
        assert manifest["metadata"]["name"].startswith("cats-")
        assert manifest["metadata"]["namespace"] == "vision"
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "cats"


@pytest.mark.parametrize("name", CLUSTER_CASES)
def test_fits_on_its_machine(name: str) -> None:
    manifests = manifests_of(name)
    machine = find_machine(submitted.CASES[name][submitted.CASES[name].index("--machine") + 1])
    trainjobs = of_kind(manifests, "TrainJob")
    if trainjobs:
        resources = trainjobs[0]["spec"]["trainer"]["resourcesPerNode"]
        pod = {"containers": [{"resources": resources}]}
    else:
        pod = pod_of(manifests)
    assert_fits([requests_of(pod)], machine.allocatable(200), SYSTEM_PODS)
    limits = pod["containers"][0]["resources"]["limits"]
    chips = limits.get("nvidia.com/gpu", 0) + limits.get("google.com/tpu", 0)
    assert chips == machine.accelerators
    volumes = {volume["name"]: volume for volume in overlay._pod(overlay._workload(manifests))["volumes"]}
    sizes = {name: quantity(volume["emptyDir"]["sizeLimit"]) for name, volume in volumes.items() if name != "config"}
    assert sizes["tmp"] + sizes["cache"] <= quantity(limits["ephemeral-storage"])
    assert sizes["shm"] <= quantity(limits["memory"]) / 4
    (config,) = of_kind(manifests, "ConfigMap")
    assert yaml.safe_load(config["data"]["config.yaml"])["data"]["cache_gb"] * 1e9 <= sizes["cache"]


@pytest.mark.parametrize("queues", ["queues", "queues-flex-start"])
def test_a_run_fits_into_the_queue_of_the_guide(queues: str) -> None:
    """Kueue never admits one that requests more than the whole quota."""
    (queue,) = of_kind(rendered(queues), "ClusterQueue")
    (flavor,) = queue["spec"]["resourceGroups"][0]["flavors"]
    quota = {resource["name"]: quantity(resource["nominalQuota"]) for resource in flavor["resources"]}
    manifests = manifests_of("l4x8-kueue")
    requests = pod_of(manifests)["containers"][0]["resources"]["requests"]
    for name, amount in requests.items():
        assert job_of(manifests)["parallelism"] * quantity(amount) <= quota[name], name


@pytest.mark.parametrize("name", [name for name in CLUSTER_CASES if "trainjob" not in name])
def test_all_pods_find_one_another(name: str) -> None:
    """By the launcher's own reading of the variables in the manifest."""
    manifests = manifests_of(name)
    job, pod = job_of(manifests), pod_of(manifests)
    if "google.com/tpu" in pod["containers"][0]["resources"]["limits"]:
        chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"] * job["completions"]
        sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        assert chips == math.prod(map(int, sides))
        return
    fields = FIELDS | {
        "metadata.labels['batch.kubernetes.io/job-name']": "cats-train",
        "metadata.labels['jobset.sigs.k8s.io/jobset-name']": "cats-train",
    }
    is_jobset = bool(of_kind(manifests, "JobSet"))
    nodes = [
        find_node(
            {
                "JOB_COMPLETION_INDEX": str(index),
                **environment_of(pod["containers"][0], {**fields, COMPLETION_INDEX: str(index)}),
            }
        )
        for index in range(job["completions"])
    ]
    assert job["parallelism"] == job["completions"]
    assert [node.node_rank for node in nodes] == list(range(len(nodes)))
    if len(nodes) > 1:
        host = "cats-train-node-0-0" if is_jobset else "cats-train-0"
        assert {node.host for node in nodes} == {f"{host}.cats-train"}
    assert is_jobset or pod["subdomain"] == "cats-train"


@pytest.mark.parametrize("name", ["l4x8-job", "l4x8-jobset", "l4x8-trainjob", "v5ex4-jobset"])
def test_two_runs_share_no_object_and_no_selector(name: str) -> None:
    """What one run's selectors select are that run's pods alone."""
    runs = {run: manifests_of(name, run) for run in ("cats", "dogs")}
    names = {run: {(m["kind"], m["metadata"]["name"]) for m in manifests} for run, manifests in runs.items()}
    assert not names["cats"] & names["dogs"]
    for (run, manifests), other in zip(runs.items(), ("dogs", "cats"), strict=True):
        selectors = list(_selectors(manifests))
        assert selectors
        assert all(selector["app.kubernetes.io/instance"] == run for selector in selectors)
        text = yaml.safe_dump_all(manifests).replace("gs://my-bucket/runs/cats", "")
        assert other not in text


def _selectors(value: Any) -> Iterator[dict[str, str]]:
    if isinstance(value, list):
        for each in value:
            yield from _selectors(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in ("matchLabels", "selector") and isinstance(each, dict):
                yield each.get("matchLabels", each)
            else:
                yield from _selectors(each)


def test_a_spot_run_has_the_pods_of_the_spot_overlay() -> None:
    """Grace, termination, arguments; and the same nodes, by a selector in place of an affinity."""
    run, base = pod_of(manifests_of("l4x8-job-spot")), pod_of(rendered("gpu-spot"))
    assert run["terminationGracePeriodSeconds"] == base["terminationGracePeriodSeconds"]
    assert run["tolerations"] == base["tolerations"]
    assert arguments(manifests_of("l4x8-job-spot"))[:5] == base["containers"][0]["args"][:5]
    (term,) = base["affinity"].pop("nodeAffinity")["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    for expression in term["matchExpressions"]:
        assert [run["nodeSelector"][expression["key"]]] == expression["values"]


def test_options_of_fit_come_last_and_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing is expanded: neither by a shell nor by the kubelet; a recipe stays a name; a file is shipped."""
    (tmp_path / "mine.yaml").write_text("model: {label_smoothing: 0.1}\n")
    text = "a $(LAUNCH_JOB) `id` $HOME; 'x' \"y\" # z: {w}"
    args = ["--", "-c", "head", "--config", str(tmp_path / "mine.yaml"), "--data.columns", "uri=x", "--lr", "0.01"]
    manifests = shown(capsys, *args, "--trainer.max_time", "00:01:00:00")
    assert arguments(manifests)[-5:] == [
        "--config=head",
        "--config=/etc/job/fit-1.yaml",
        "--data.columns=uri=x",
        "--model.lr=0.01",
        "--trainer.max_time=00:01:00:00",
    ]
    (config,) = of_kind(manifests, "ConfigMap")
    assert config["data"]["fit-1.yaml"] == "model: {label_smoothing: 0.1}\n"
    run = Run("cats", require_image("r/job:gpu"), find_machine("l4x8"), "gs://b/r", fit_args=(f"--x={text}",))
    built = overlay.build(run)
    assert overlay.arguments_of(built)[-1] == f"--x={text}"
    # As the kubelet expands: $$ is a dollar sign, and $(NAME) a variable.
    assert arguments(list(built.manifests))[-1].replace("$$", "\0").count("$") == 0


def test_values_may_stand_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One small file outside the repository; the command line takes precedence."""
    values = {
        "name": "cats",
        "image": "registry.example/job:gpu",
        "machine": "l4x8",
        "nodes": 2,
        "spot": True,
        "data": "gs://b/images",
        "run_dir": "gs://b/runs/cats",
        "fit": {"model": {"backbone": "resnet18"}, "trainer": {"max_epochs": 3}},
    }
    file = tmp_path / "cats.yaml"
    file.write_text(yaml.safe_dump(values))
    submit(["--config", str(file), "--nodes", "4", "--dry-run", "--", "--epochs", "7"])
    manifests = list(yaml.safe_load_all(capsys.readouterr().out))
    assert job_of(manifests)["completions"] == 4
    (config,) = of_kind(manifests, "ConfigMap")
    content = yaml.safe_load(config["data"]["config.yaml"])
    assert content["model"] == {"backbone": "resnet18"}
    assert content["run_dir"] == "gs://b/runs/cats"
    assert content["data"]["root"] == "gs://b/images"
    assert "cloud.google.com/gke-spot" in pod_of(manifests)["nodeSelector"]
    file.write_text(yaml.safe_dump({**values, "machines": "l4x8"}))
    with pytest.raises(ConfigError, match="machines"):
        submit(["--config", str(file), "--dry-run"])


@pytest.mark.parametrize("kind", [("job",), ("kueue", "--queue", "gold"), ("jobset",), ("trainjob", "--queue", "gold")])
def test_the_written_folder_renders_to_the_same(
    kind: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And needs nothing outside of it."""
    args = ["--nodes", "2", "--kind", *kind]
    manifests = shown(capsys, *args)
    folder = tmp_path / "cats"
    submit([*BASIC, *args, "--output", str(folder)])
    assert f"kubectl apply -k {folder}" in capsys.readouterr().out
    moved = tmp_path / "elsewhere" / "cats"
    shutil.move(folder, moved.parent / "cats")
    assert list(yaml.safe_load_all(kustomize(moved))) == manifests
    assert not any(path.is_symlink() for path in moved.rglob("*"))
    with pytest.raises(ConfigError, match=r"exists already.*--replace"):
        submit([*BASIC, "--output", str(moved)])
    submit([*BASIC, "--output", str(moved), "--replace"])


@pytest.mark.parametrize(
    "name", ["y", "no", "null", "true", "e1", "o", "a", "x" * NAME_CHARACTERS, "a-1", "inf", "nan", "on"]
)
def test_a_name_stays_text(name: str) -> None:
    """Also where YAML knows another meaning of it."""
    run = Run(require_name(name), require_image("r/job:0o17"), find_machine("l4x8"), "gs://b/r", queue=name, nodes=2)
    built = overlay.build(run)
    for manifest in built.manifests:
        validate(manifest)
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == name
        assert len(manifest["metadata"]["name"]) <= 63
    assert built.workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == name
    assert pod_of(list(built.manifests))["containers"][0]["image"] == "r/job:0o17"
    assert len(f"{name}-train-slice-99-999-abcde") <= 63  # the longest name of a pod


HOSTILE = [
    "a\nb",
    "a b",
    "../a",
    "a;id",
    "$(id)",
    "`id`",
    "a'b",
    'a"b',
    "a: b",
    "{a}",
    "a#b",
    "é",
    "a\x00b",
    "-a",
    "a_b",
    "",
]


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("name", [*HOSTILE, "Cats", "1cats", "cats-", "x" * (NAME_CHARACTERS + 1)], "--name"),
        ("image", [*HOSTILE, "job", "job:", "Job:gpu", "http://x/job:1", "job@sha256:123", "job:gpu\n"], "--image"),
        ("machine", [*HOSTILE, "l4x9", "L4X8"], "--machine"),
        ("namespace", [each for each in HOSTILE if each], "--namespace"),
        ("queue", [each for each in HOSTILE if each], "--queue"),
        (
            "service_account",
            [*(each for each in HOSTILE if each), "train@p.iam.gserviceaccount.com"],
            "--service_account",
        ),
        ("run_dir", ["runs/1", "/runs/1", "file:///runs", "memory://x", "", "gs://b/a\nb: c", "gs:/b"], "run_dir"),
        ("data", ["images", "./images", "file:///images", "gs://b/\x1b[31m"], "data"),
        ("nodes", ["0", "-1", "1001", "two"], "--nodes"),
        ("slices", ["0", "2"], "--slices"),
        ("disk_gb", ["10", "-5", "0"], "--disk_gb"),
        ("kind", ["pod", "Job", ""], "--kind"),
    ],
)
def test_a_wrong_value_is_refused(option: str, values: list[str], message: str) -> None:
    for value in values:
        with pytest.raises(ConfigError) as error:
            submit([*BASIC[option == "name" :], f"--{option}={value}", "--dry-run"])
        assert message in str(error.value), (value, str(error.value))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--machine", "l4x7"], "Did you mean l4x8"),
        (["--machine", "g2-standard-69"], "Did you mean g2-standard-96"),
        (["--epochs", "3"], "--epochs is an option of fit. Give it after --"),
        (["--model.backbone", "resnet18"], "after --"),
        (["--nodess", "3"], "nodes"),
        (["--kind", "kueue"], "--queue"),
        (["--kind", "jobset", "--machine", "e2-standard-4"], "Give --kind job"),
        (["--kind", "trainjob", "--machine", "v5ex8"], "for GPUs"),
        (["--machine", "v5ex8", "--nodes", "2"], "no TPU slice of 2 ct5lp-hightpu-8t"),
        (["--machine", "v5ex4", "--nodes", "3"], "no TPU slice of 3"),
        (["--kind", "jobset", "--machine", "v5ex4", "--nodes", "3", "--slices", "2"], "cannot be divided"),
        (["--kind", "jobset", "--nodes", "2", "--slices", "2"], "several slices need a TPU"),
        (["--dry-run", "--output", "x"], "Give one of them"),
        (["--project", "my-project"], "Give --vertex"),
        (["--vertex", "--namespace", "x"], "--vertex has no cluster"),
        (["--vertex"], "--vertex needs the project"),
        (["--", "--epohcs", "3"], "epochs"),
        (["--", "--trainer.max_epochs", "many"], "max_epochs"),
        (["--", "--model.backbone", "resnet5000"], "resnet5000"),
        (["--", "--run_dir", "gs://b/other"], "--run_dir of fit is --run_dir of submit"),
        (["--", "gs://b/other"], "--run_dir of submit"),
        (["--", "--data.root", "gs://b/other"], "--data of submit"),
        (["--", "--model.weights", str(REPOSITORY / "setup.cfg")], "of this machine"),
        (["--", "--config", "no-such.yaml"], "cannot be read"),
        (["--", "--grace", "29"], "Give at most 28"),
        (["--", "--help"], "Run python -m job fit --help"),
        (["--", "--trainer.devices", "2"], "devices"),
        (["--data", "s3://key:secret@bucket/images"], "holds a credential"),
        (["--", "--model.weights", "https://host/w.safetensors?sig=0123456789abcdef"], "holds a credential"),
    ],
)
def test_a_mistake_is_found_before_anything_is_applied(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a kubectl that renders, and would fail the test if it were called for anything else."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\n[ "$1" = kustomize ] && exec {shutil.which("kubectl")} "$@"\ntouch {tmp_path}/called\nexit 1\n'
    )
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path('/usr/bin')}")
    words = [word for word in BASIC if not (word == "--namespace" or word == "vision")] if "--vertex" in args else BASIC
    with pytest.raises(ConfigError) as error:
        submit([*words, *args])
    assert message in str(error.value)
    assert "secret" not in str(error.value).replace("--secret", "")
    assert "0123456789abcdef" not in str(error.value)
    assert not (tmp_path / "called").exists()


def test_variables_of_this_shell_are_not_the_pods(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build servers set JOB_NAME; JOB_CONFIG configures fit here."""
    monkeypatch.setenv("JOB_NAME", "folder/build 7")
    monkeypatch.setenv("JOB_CONFIG", "no-such-recipe")
    monkeypatch.setenv("JOB_TRAINER__MAX_EPOCHS", "nonsense")
    assert of_kind(shown(capsys), "Job")[0]["metadata"]["name"] == "cats-train"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("job:gpu", ("job", "gpu", "")),
        ("localhost:5000/a/b:1.0_x", ("localhost:5000/a/b", "1.0_x", "")),
        (f"r/job@sha256:{'a' * 64}", ("r/job", "", f"sha256:{'a' * 64}")),
        (f"r/job:gpu@sha256:{'a' * 64}", ("r/job", "gpu", f"sha256:{'a' * 64}")),
    ],
)
def test_images(text: str, parts: tuple[str, str, str]) -> None:
    image = require_image(text)
    assert (image.name, image.tag, image.digest) == parts
    assert str(image) == text
    built = overlay.build(Run("cats", image, find_machine("l4x8"), "gs://b/r"))
    assert pod_of(list(built.manifests))["containers"][0]["image"] == text


def test_short_names_of_machines() -> None:
    assert short_name(find_machine("g2-standard-96")) == "l4x8"
    assert find_machine("h100x8").name == "a3-highgpu-8g"
    assert find_machine("v5ex8").name == "ct5lp-hightpu-8t"
    assert find_machine("v6ex4").name == "ct6e-standard-4t"


def test_the_manifests_are_those_of_the_repository(tmp_path: Path) -> None:
    """By a link in a checkout, and so in an editable installation; a wheel has a copy."""
    assert bases.MANIFESTS.resolve() == REPOSITORY / "k8s"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("job", "k8s"):
        shutil.copytree(
            REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, f"--wheel-dir={tmp_path}", str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    installed = tmp_path / "installed" / "job" / "submit" / "k8s"
    files = {file.relative_to(REPOSITORY / "k8s") for file in (REPOSITORY / "k8s").rglob("*.yaml")}
    assert {file.relative_to(installed) for file in installed.rglob("*.yaml")} == files
    code = (
        "import sys; from job.submit import bases, overlay; from job.submit.run import Run;"
        "from job.submit.values import require_image; from job.submit.machine import find_machine;"
        f"assert str(bases.MANIFESTS).startswith({str(tmp_path)!r}), bases.MANIFESTS;"
        "run = Run('cats', require_image('r/job:gpu'), find_machine('l4x8'), 'gs://b/r');"
        "sys.stdout.write(overlay.build(run).text)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "installed", check=False
    )
    assert result.returncode == 0, result.stderr
    run = Run("cats", require_image("r/job:gpu"), find_machine("l4x8"), "gs://b/r")
    assert result.stdout == overlay.build(run).text


def test_help_answers_without_torch() -> None:
    """And every module of submit is imported without it."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['pytorch_lightning'] = None\n"
        "from job import cli\n"
        "for verb in ('submit', 'status', 'logs', 'stop', 'delete'):\n"
        "    try:\n        cli.run_command(verb, ['--help'])\n"
        "    except SystemExit as end:\n        assert not end.code\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m job submit NAME" in result.stdout
    assert all(f"usage: python -m job {verb} NAME" in result.stdout for verb in ("status", "logs", "stop", "delete"))


@pytest.mark.parametrize("name", VERTEX_CASES)
def test_vertex_ai_accepts_the_spec(name: str) -> None:
    """Google's own types refuse unknown fields and values."""
    spec = yaml.safe_load(submitted.printed(name))
    parsed = CustomJobSpec.from_json(json.dumps(spec))
    machine = find_machine(submitted.CASES[name][submitted.CASES[name].index("--machine") + 1])
    assert {pool.machine_spec.machine_type for pool in parsed.worker_pool_specs} == {machine.name}
    if machine.accelerator.startswith("nvidia"):
        assert parsed.worker_pool_specs[0].machine_spec.accelerator_type.name.startswith("NVIDIA_")
        assert parsed.worker_pool_specs[0].machine_spec.accelerator_count == machine.accelerators
    nodes = int(submitted.CASES[name][submitted.CASES[name].index("--nodes") + 1])
    assert sum(pool.replica_count for pool in parsed.worker_pool_specs) == nodes
    assert parsed.worker_pool_specs[0].replica_count == 1
    assert parsed.scheduling.strategy.name == "SPOT"


class VertexService:
    """The service of Vertex AI, as far as submit uses it."""

    states = (JobState.JOB_STATE_PENDING, JobState.JOB_STATE_RUNNING, JobState.JOB_STATE_SUCCEEDED)
    message = ""
    error: Exception | None = None

    def __init__(self, client_options: dict[str, str]) -> None:
        assert client_options == {"api_endpoint": "europe-west4-aiplatform.googleapis.com"}
        self.remaining = iter(self.states)

    def create_custom_job(self, parent: str, custom_job: CustomJob) -> CustomJob:
        if self.error:
            raise self.error
        assert parent == "projects/my-project/locations/europe-west4"
        assert custom_job.display_name == "cats"
        assert custom_job.job_spec.service_account == "train@my-project.iam.gserviceaccount.com"
        return CustomJob(name=f"{parent}/customJobs/7")

    def get_custom_job(self, name: str) -> CustomJob:
        return CustomJob(name=name, state=next(self.remaining), error={"message": self.message})


@pytest.mark.parametrize(
    ("state", "message", "code"),
    [
        (JobState.JOB_STATE_SUCCEEDED, "", 0),
        (JobState.JOB_STATE_CANCELLED, "", 143),
        (JobState.JOB_STATE_FAILED, "The replica workerpool0-0 exited with a non-zero status of 2.", 2),
        (JobState.JOB_STATE_FAILED, "Internal error", 75),
    ],
)
def test_a_run_on_vertex_ai_ends_with_its_exit_code(
    state: JobState, message: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(VertexService, "states", (JobState.JOB_STATE_RUNNING, JobState.JOB_STATE_RUNNING, state))
    monkeypatch.setattr(VertexService, "message", message)
    monkeypatch.setattr(aiplatform_v1, "JobServiceClient", VertexService)
    monkeypatch.setattr(vertex, "POLL_SECONDS", 0.0)
    options = [option for option in submitted.OPTIONS if option not in ("--namespace", "vision")]
    where = ["--vertex", "--project", "my-project", "--region", "europe-west4"]
    account = ["--service_account", "train@my-project.iam.gserviceaccount.com"]
    args = ["cats", *options, "--machine", "l4x8", *where, *account]
    if code:
        with pytest.raises(SystemExit) as end:
            submit(args)
        assert end.value.code == code
    else:
        submit(args)
    output = capsys.readouterr().out
    assert "customJobs/7" in output
    assert output.count("running") == 1
    monkeypatch.setattr(VertexService, "error", PermissionDenied("no right to create"))
    with pytest.raises(VertexError, match="no right to create") as error:
        submit(args)
    assert error.value.exit_code == 2


def test_the_command_is_known() -> None:
    assert {"submit", "status", "logs", "stop", "delete"} <= set(cli.COMMANDS)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in itertools.chain(submitted.CASES))
