"""What ``submit --dry-run`` prints for machines of each kind; ``make golden`` rewrites the golden files."""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path

from job.cli.submit import submit
from job.cluster.machines import machines
from job.submit.machine import family, short_name

GOLDEN = Path(__file__).parent / "golden" / "submit"
OPTIONS = [
    *("--image", "europe-west4-docker.pkg.dev/my-project/job/job:gpu", "--namespace", "vision"),
    *("--data", "gs://my-bucket/images", "--run_dir", "gs://my-bucket/runs/cats"),
]
MACHINES = [
    *("e2-standard-4", "g2-standard-12", "g2-standard-96", "a3-highgpu-8g", "a4-highgpu-8g"),
    *("ct5lp-hightpu-4t", "ct5lp-hightpu-8t", "ct6e-standard-4t", "ct6e-standard-8t", "tpu7x-standard-4t"),
]
"""One of each kind in the table."""
FIT = ["--", "--model.backbone", "resnet50", "--epochs", "10"]


def _cases() -> dict[str, list[str]]:
    cases = {}
    for machine in (machines()[name] for name in MACHINES):
        name, chips = short_name(machine), family(machine)
        nodes = {"cpu": "2", "gpu": "2", "tpu": "4" if machine.accelerators == 4 else "1"}[chips]
        several = [*OPTIONS, "--machine", name, "--nodes", nodes]
        cases[f"{name}-job"] = several
        cases[f"{name}-job-1"] = [*OPTIONS, "--machine", name]
        cases[f"{name}-job-spot"] = [*several, "--spot"]
        cases[f"{name}-kueue"] = [*several, "--kind", "kueue", "--queue", "training"]
        if chips == "gpu":
            cases[f"{name}-trainjob"] = [*several, "--kind", "trainjob"]
            cases[f"{name}-trainjob-spot"] = [*several, "--kind", "trainjob", "--spot", "--queue", "training"]
        if chips == "tpu" and machine.accelerators == 4:
            cases[f"{name}-jobset"] = [*OPTIONS, "--machine", name, "--nodes", "8", "--slices", "2", "--kind", "jobset"]
        options = [option for option in OPTIONS if option not in ("--namespace", "vision")]
        vertex_nodes = "1" if chips == "tpu" else "2"
        cases[f"{name}-vertex"] = [*options, "--machine", name, "--nodes", vertex_nodes, "--vertex", "--spot"]
    return cases


CASES = _cases()
"""Arguments of submit, by the name of the golden file."""


@functools.cache
def printed(name: str, run: str = "cats") -> str:
    """Return what ``submit RUN --dry-run`` prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        submit([run, *CASES[name], "--dry-run", *FIT])
    return output.getvalue()


def write() -> None:
    """Write the golden files."""
    GOLDEN.mkdir(exist_ok=True)
    for file in GOLDEN.glob("*.yaml"):
        file.unlink()
    for name in CASES:
        (GOLDEN / f"{name}.yaml").write_text(printed(name))
