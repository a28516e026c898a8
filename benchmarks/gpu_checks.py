"""Checks on a GPU: functions that raise AssertionError, or return a description of the result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_machine import Machine, needs_cuda, read_json
from support import final_weights, scalars

import job

BOUNDS = {"32-true": 1e-3, "bf16-mixed": 5e-2}
"""Largest difference of a validation loss between cached and recomputed features on CUDA, by precision. Kernels, and
their rounding, depend on the batch; on a CPU there is no difference."""
OPTIONS: tuple[dict[str, object], ...] = (
    {"model.task": "multilabel", "model.class_weights": "balanced", "monitoring.projector": 20},
    {"model.mixup": 0.2, "model.cutmix": 0.5, "model.label_smoothing": 0.1, "model.dropout": 0.2},
    {"trainer.accumulate_grad_batches": 2, "trainer.gradient_clip_val": 1.0, "model.class_weights": "balanced"},
    {"trainer.precision": "16-mixed", "monitoring.gradient_norm": "per_group"},
    {"model.nonfinite": "skip", "model.train_bn": "true", "data.sampling": "balanced"},
    {"model.ema": 0.9, "checkpoint.every_n_steps": 3, "trainer.val_check_interval": 2, "model.backbone_lr_factor": 0.1},
    {"model.backbone": "timm/test_vit", "data.image_size": 160, "model.lora_rank": 4, "model.lora_dropout": 0.1},
)
"""Sets of options, each of which is trained once."""
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Makes cuBLAS deterministic (https://docs.nvidia.com/cuda/cublas, results reproducibility)."""
FAULTS = os.pathsep.join(
    filter(None, [str(Path(__file__).parents[1] / "tests" / "faults"), os.environ.get("PYTHONPATH")])
)
"""Import path with the folder of the callback that sends a signal at a step."""


def stages(machine: Machine) -> str:
    """Train head, last layers and all layers at the default precision."""
    changes = {"model.milestones": "[2,4]", "trainer.max_epochs": 6}
    output = machine.run_successfully("fit", *machine.settings(machine.scratch / "stages", **changes))
    for expected in ("training last layers", "training all", "precision"):
        assert expected in output, f"{expected!r} is not in the log"
    losses = [value for _, value in scalars(str(machine.scratch / "stages"))["train/loss"]]
    assert len(losses) == 24, losses  # 4 steps per epoch
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    return next(line.split("precision ")[1] for line in output.splitlines() if "precision " in line)


def cached_features(machine: Machine) -> str:
    """Compare losses with cached and with recomputed features."""
    results = []
    for precision, bound in BOUNDS.items():
        if precision != "32-true" and machine.device == "cpu":
            continue
        losses = []
        for use in ("always", "never"):
            run_dir = machine.scratch / f"features-{use}-{precision}"
            changes = {"features.use": use, "model.milestones": "[9]", "trainer.precision": precision}
            machine.run_successfully("fit", *machine.settings(run_dir, **changes))
            losses.append([value for _, value in scalars(str(run_dir))["val/loss"]])
        worst = max(abs(one - other) for one, other in zip(*losses, strict=True))
        limit = bound if machine.device == "cuda" else 0.0
        assert worst <= limit, f"losses at {precision} differ by {worst:.2g}, more than {limit:.2g}: {losses}"
        results.append(f"{precision}: losses differ by {worst:.1g} (bound {limit:.1g})")
    return "; ".join(results)


def checkpoints_across_devices(machine: Machine) -> str:
    """Continue a run on the CPU, on this device and on the CPU again."""
    run_dir, steps = machine.scratch / "across", []
    for epochs, accelerator in enumerate(("cpu", machine.accelerator, "cpu"), 1):
        changes = {"trainer.accelerator": accelerator, "trainer.max_epochs": epochs, "trainer.precision": "32-true"}
        machine.run_successfully("fit", *machine.settings(run_dir, **changes))
        steps.append(max(step for step, _ in scalars(str(run_dir))["train/loss"]))
    assert steps == [3, 7, 11], steps  # 64 training images in batches of 16, steps counted from 0
    return "12 steps, 4 on each"


def stop_and_resume(machine: Machine) -> str:
    """Stop a run by SIGTERM and resume it; its weights equal those of an uninterrupted run."""
    uninterrupted, stopped = machine.scratch / "whole", machine.scratch / "stopped"
    changes = {"trainer.max_epochs": 6, "trainer.deterministic": "true", "checkpoint.keep_last": 1}
    outcome = machine.run_in_process("fit", *machine.settings(uninterrupted, **changes), **DETERMINISTIC)
    assert outcome.returncode == 0, outcome.output[-2000:]
    callback = {"class_path": "saboteur.Saboteur", "init_args": {"marker": f"{stopped}.marker", "step": 13}}
    settings = machine.settings(stopped, **changes, trainer__callbacks=json.dumps([callback]))
    outcome = machine.run_in_process("fit", *settings, **DETERMINISTIC, PYTHONPATH=FAULTS)
    assert outcome.returncode == 143, f"exit code {outcome.returncode}: {outcome.output[-2000:]}"
    outcome = machine.run_in_process("fit", *machine.settings(stopped, **changes), **DETERMINISTIC)
    assert outcome.returncode == 0, outcome.output[-2000:]
    assert "resuming after step" in outcome.output, outcome.output[-2000:]
    one, other = final_weights(str(uninterrupted)), final_weights(str(stopped))
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, for example {different[0]}"
    return f"{len(one)} tensors equal bit for bit"


def ema(machine: Machine) -> str:
    """Train with EMA, and predict with the EMA weights."""
    run_dir = machine.scratch / "ema"
    machine.run_successfully("fit", *machine.settings(run_dir, model__ema=0.9))
    saved = job.load(str(run_dir), machine.device).predict([str(next(machine.colours.glob("*/*.jpg")))])
    return f"predicts {saved[0].label}"


def tune(machine: Machine) -> str:
    """Train with the batch size that ``tune`` suggests; on CUDA twice that size is refused with a message."""
    run_dir = machine.scratch / "tune"
    settings = machine.speed_settings(run_dir, "resnet50", trainer__limit_val_batches=0)
    machine.run_successfully("tune", *settings, "--lr_finder.steps=20")
    batch = read_json(run_dir / "tune.json")["global_batch_size_at_most"]
    assert isinstance(batch, int)
    assert batch >= 1, batch
    if machine.device == "cpu":
        return f"suggests {batch} images; not tried on a CPU"
    for size, code in ((batch, 0), (2 * batch, 2)):
        outcome = machine.run_here("fit", *_one_step(machine, machine.scratch / f"tuned-{size}", size))
        assert outcome.returncode == code, f"{size} images: exit code {outcome.returncode}: {outcome.output[-1000:]}"
    return f"{batch} images fit, {2 * batch} are refused"


def preflight(machine: Machine) -> str:
    """Check a run before it starts: memory and speed of a step on this device; nothing is written."""
    run_dir = machine.scratch / "preflight"
    output = machine.run_successfully("check", *machine.settings(run_dir), "--json")
    report, _ = json.JSONDecoder().raw_decode(output[output.index("{\n") :])
    found = {finding["check"]: finding for finding in report["findings"]}
    for name in ("device", "memory", "loader", "estimate"):
        assert found[name]["status"] == "ok", found[name]
    assert not run_dir.exists(), list(run_dir.iterdir())
    return str(found["memory"]["message"])


def out_of_memory(machine: Machine) -> str:
    """Exit with 2 and one message if a batch does not fit into memory."""
    needs_cuda(machine, "a CPU's memory is shared with everything else on the machine")
    outcome = machine.run_here("fit", *_one_step(machine, machine.scratch / "too-large", 8192))
    assert outcome.returncode == 2, f"exit code {outcome.returncode}: {outcome.output[-1000:]}"
    assert "need more memory" in outcome.output, outcome.output[-1000:]
    assert "Traceback" not in outcome.output
    return outcome.output.strip().splitlines()[-1][:200]


def options(machine: Machine) -> str:
    """Train, validate, predict and embed with options that compute something of their own on the device."""
    failures, chosen = {}, OPTIONS[: 2 if machine.quick else None]
    for number, changes in enumerate(chosen):
        run_dir = machine.scratch / f"options-{number}"
        outcome = machine.run_here("fit", *machine.settings(run_dir, **changes))
        if outcome.returncode:
            failures[str(changes)] = f"exit code {outcome.returncode}: {outcome.output[-800:]}"
    run_dir = machine.scratch / "options-0"
    images = f"--input={machine.colours}"
    for command in (
        ["validate", run_dir, "--tta=hflip"],
        ["predict", run_dir, images, f"--output={machine.scratch}/options.jsonl", "--tta=hflip"],
        ["embed", run_dir, images, f"--output={machine.scratch}/embedded"],
    ):
        outcome = machine.run_here(*command)
        if outcome.returncode:
            failures[str(command[0])] = f"exit code {outcome.returncode}: {outcome.output[-800:]}"
    assert not failures, failures
    return f"{len(chosen)} sets of options, validate, predict and embed"


def lora(machine: Machine) -> str:
    """Train LoRA adapters of a vision transformer."""
    changes = {"model.backbone": "timm/test_vit", "data.image_size": 160, "model.lora_rank": 4}
    run_dir = machine.scratch / "lora"
    machine.run_successfully("fit", *machine.settings(run_dir, **changes))
    losses = [value for _, value in scalars(str(run_dir))["train/loss"]]
    assert sum(losses[-4:]) < sum(losses[:4]), losses
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def sweep(machine: Machine) -> str:
    """Compare four heads, whose winner is a model that predicts."""
    run_dir = machine.scratch / "sweep"
    settings = machine.frozen_settings(run_dir)
    machine.run_successfully("sweep", *settings, "--lr=1e-2,1e-3", "--hidden=none,8", "--epochs=20")
    saved = job.load(str(run_dir / "sweep"), machine.device).predict([str(next(machine.colours.glob("*/*.jpg")))])
    return f"the winner predicts {saved[0].label}"


def audit(machine: Machine) -> str:
    """Audit the images."""
    run_dir = machine.scratch / "audit"
    machine.run_successfully("audit", *machine.frozen_settings(run_dir))
    return f"report of {(run_dir / 'audit' / 'audit.html').stat().st_size:,} bytes"


def export(machine: Machine) -> str:
    """Export a model that was trained on this device; the command compares its outputs with the job's."""
    run_dir, folder = machine.scratch / "exported", machine.scratch / "export"
    machine.run_successfully("fit", *machine.settings(run_dir))
    machine.run_successfully("export", run_dir, folder, "--format=onnx,pt2,weights")
    return ", ".join(sorted(path.name for path in folder.iterdir()))


def profile(machine: Machine) -> str:
    """Write a trace with the GPU's kernels by ``--profile``."""
    run_dir = machine.scratch / "profile"
    output = machine.run_successfully("fit", *machine.settings(run_dir, trainer__max_epochs=6), "--profile")
    traces = [path for path in (run_dir / "profile").glob("*") if path.stat().st_size]
    assert traces, "no trace in run_dir/profile"
    return next((line for line in output.splitlines() if "forward" in line), f"{len(traces)} trace(s)")[:200]


def predict(machine: Machine) -> str:
    """Compare predictions on this device and on the CPU."""
    run_dir = machine.scratch / "predict"
    machine.run_successfully("fit", *machine.settings(run_dir, trainer__precision="32-true"))
    images = [str(path) for path in sorted(machine.colours.glob("*/*.jpg"))]
    on_device, on_cpu = (job.load(str(run_dir), device).predict(images) for device in (machine.device, "cpu"))
    pairs = zip(on_device, on_cpu, strict=True)
    worst = max(
        abs(one.probabilities[name] - other.probabilities[name]) for one, other in pairs for name in ("blue", "red")
    )
    assert worst <= 1e-2, worst
    machine.run_successfully(
        "predict", f"--run_dir={run_dir}", f"--input={machine.colours}", f"--output={machine.scratch}/rows.jsonl"
    )
    rows = len((machine.scratch / "rows.jsonl").read_text().splitlines())
    assert rows == len(images), rows
    return f"probabilities of {rows} images differ by at most {worst:.1g}"


def no_visible_device(machine: Machine) -> str:
    """Without a GPU, exit with 2 if one is requested, and use the CPU by default."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    settings = machine.settings(machine.scratch / "hidden", trainer__accelerator="gpu", trainer__max_epochs=1)
    outcome = (
        machine.run_in_process("fit", *settings, **hidden)
        if machine.device == "cuda"
        else machine.run_here("fit", *settings)
    )
    assert outcome.returncode == 2, f"exit code {outcome.returncode}: {outcome.output[-1000:]}"
    assert "Traceback" not in outcome.output, outcome.output[-1000:]
    if machine.device == "cuda":
        settings = machine.settings(machine.scratch / "shown", trainer__accelerator="auto", trainer__max_epochs=1)
        for devices, log_text in (("", "CPU thread"), ("0", torch.cuda.get_device_name(0))):
            outcome = machine.run_in_process("fit", *settings, CUDA_VISIBLE_DEVICES=devices)
            assert outcome.returncode == 0, outcome.output[-1000:]
            assert log_text in outcome.output, f"{log_text!r} is not in the log"
    return "refused with 2 where a GPU was demanded"


def two_processes_on_one_gpu(machine: Machine) -> str:
    """Exit with 2 and a message for two processes on one GPU, which NCCL does not support."""
    needs_cuda(machine, "NCCL refuses two processes on one GPU")
    if torch.cuda.device_count() > 1:
        return "this machine has several GPUs"
    settings = machine.settings(machine.scratch / "two", trainer__max_epochs=1)
    outcome = machine.run_in_process("launch", "fit", *settings, LAUNCH_PROCESSES="2")
    assert outcome.returncode == 2, f"exit code {outcome.returncode}: {outcome.output[-1000:]}"
    return next((line for line in outcome.output.splitlines() if "job: error" in line), "")[:200]


def _one_step(machine: Machine, run_dir: Path, batch: int) -> list[str]:
    changes = {"data.global_batch_size": batch, "trainer.limit_train_batches": 1, "trainer.max_epochs": 1}
    return machine.speed_settings(run_dir, "resnet50", **changes)


CHECKS: tuple[Callable[[Machine], str], ...] = (
    stages,
    cached_features,
    checkpoints_across_devices,
    stop_and_resume,
    ema,
    predict,
    options,
    lora,
    sweep,
    audit,
    export,
    profile,
    no_visible_device,
    two_processes_on_one_gpu,
    tune,
    preflight,
    out_of_memory,
)
