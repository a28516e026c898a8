"""Commands import only the packages they use: torch and Lightning take seconds of CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, environment, fit_here, picture_files, write_files

HEAVY = (
    "torch",
    "torchvision",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "scipy",
    "timm",
)
LIGHTNING = ("pytorch_lightning", "lightning_fabric", "torchmetrics", "scipy")
SCRIPT = """
import atexit, os, sys
process = os.getpid()
def report():
    if os.getpid() != process:
        return
    packages = sorted({name.split(".")[0] for name in sys.modules})
    print("imported:", *packages, file=sys.stderr, flush=True)
def report_and_end(code, end=os._exit):
    report()
    end(code)
atexit.register(report)
os._exit = report_and_end
sys.argv[0] = "job"
import runpy
runpy.run_module("job", run_name="__main__", alter_sys=True)
"""


def imported(*args: object, code: int, **variables: str) -> set[str]:
    """Top-level packages that a command has imported when it exits with ``code``."""
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment(**variables),
        cwd=REPOSITORY,
    )
    assert process.returncode == code, process.stderr
    assert "imported:" in process.stderr
    return set(process.stderr.rpartition("imported:")[2].split())


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["fti"], 2),
        ([], 2),
        (["index", "--outptu", "x"], 2),
        (["checkpoints", "ls", "x", "--run-dri", "y"], 2),
        (["predict", "--inptu", "x"], 2),
        (["predict", "--help"], 0),
        (["embed", "--help"], 0),
        (["embed", "--inptu", "x"], 2),
        (["sweep", "--help"], 0),
        (["sweep", "--lrr", "x"], 2),
        (["serve", "--help"], 0),
        (["serve", "--prot", "80"], 2),
        (["report", "/nowhere"], 2),
        (["demo", "--help"], 0),
        (["launch", "--help"], 0),
        (["launch", "fti"], 2),
        (["fit", "--help"], 0),
        (["fit", "--data.rot", "x"], 2),
        (["launch", "fit", "--data.rot", "x"], 2),
        (["launch", "fit", "--help"], 0),
        (["tune", "--help"], 0),
        (["validate", "--help"], 0),
        (["test", "--help"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_commands_that_compute_nothing_import_no_torch(args: list[str], code: int) -> None:
    assert not imported(*args, code=code) & set(HEAVY)


def test_index_and_checkpoints_import_no_torch(tmp_path: Path) -> None:
    colours = write_files(tmp_path / "colours", picture_files(["blue", "red"], 2))
    assert not imported("index", colours, code=0) & set(HEAVY)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert not imported("checkpoints", "gc", tmp_path / "run", code=0) & set(HEAVY)


def test_predict_imports_no_lightning(tmp_path: Path) -> None:
    packages = imported("predict", tmp_path, "--input", tmp_path, code=2)
    assert "torch" in packages
    assert not packages & set(LIGHTNING)


def test_serve_imports_no_lightning(tmp_path: Path) -> None:
    packages = imported("serve", tmp_path, "--port=0", code=2)
    assert {"torch", "uvicorn"} <= packages
    assert not packages & set(LIGHTNING)


LOAD = """
import sys, time
began = time.monotonic()
import job
predictor = job.load(sys.argv[1])
loaded = time.monotonic()
print(predictor.predict(sys.argv[2]).label)
print(f"loaded in {loaded - began:.1f} s, predicted in {time.monotonic() - loaded:.2f} s", file=sys.stderr)
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_load_and_predict_import_no_lightning(tmp_path: Path) -> None:
    run_dir = fit_here(tmp_path)
    image = next((tmp_path / "colours").glob("*/*.jpg"))
    process = subprocess.run(
        [sys.executable, "-c", LOAD, run_dir, image],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        check=True,
    )
    label, modules = process.stdout.splitlines()
    assert label in ("blue", "red")
    assert not set(modules.split()) & set(LIGHTNING)


def test_launch_imports_torchrun_alone() -> None:
    packages = imported("launch", "checkpoints", "ls", "/nowhere", code=2, LAUNCH_PROCESSES="1")
    assert "torch" in packages
    assert not packages & {*LIGHTNING, "torchvision", "jsonargparse", "fsspec", "pyarrow"}


def test_the_first_line_comes_before_the_slow_imports(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-v", "-m", "job", "fit", f"--run_dir={tmp_path}"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert process.stderr is not None
    for line in process.stderr:
        assert not line.startswith("import 'torch'"), "torch was imported first"
        if "starting fit" in line:
            break
    else:
        pytest.fail("no first line")
    process.kill()
    process.wait()
