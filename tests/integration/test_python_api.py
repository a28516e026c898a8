"""The Python API, in scripts and notebooks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import REPOSITORY, TINY, assert_same_weights, environment, picture_files, run_here, write_files

import job
from job.errors import ConfigError, JobError
from job.process.cpus import available_cpus


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return write_files(tmp_path / "colours", picture_files(["blue", "red"], 10))


def config(run_dir: Path, colours: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a tiny run as a mapping; ``a__b`` stands for ``a: {b: …}``."""
    tree: dict[str, Any] = {"run_dir": run_dir}
    overrides = {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in {**TINY, "trainer.max_epochs": 1, "data.root": colours, **overrides}.items():
        *groups, option = name.split(".")
        level = tree
        for group in groups:
            level = level.setdefault(group, {})
        level[option] = json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    return tree


def test_fit_load_and_predict(colours: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    arguments = list(sys.argv)
    report = job.fit(config(tmp_path / "run", colours))
    assert isinstance(report, job.Report)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert sys.argv == arguments
    assert (report.run_dir, report.epochs, report.global_step) == (str(tmp_path / "run"), 1, 2)
    assert report.classes == ("blue", "red")
    assert report.images == {"train": 16, "val": 4}
    assert report.metrics["val/accuracy"] is not None
    assert report.best == report.last
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report.content
    predictor = job.load(report.run_dir)
    image = next(colours.glob("**/*.jpg"))
    (prediction,) = predictor.predict([image])
    assert prediction.label in report.classes
    with image.open("rb") as file, Image.open(image) as opened:
        for same in (image, str(image), image.read_bytes(), file, opened, np.array(opened)):
            assert predictor.predict(same).probabilities == pytest.approx(prediction.probabilities)
        batch = np.array([opened] * 3)
    assert [each.label for each in predictor.predict(batch, batch_size=2)] == [prediction.label] * 3
    assert predictor.predict([]) == []


def test_fit_accepts_a_saved_configuration(colours: Path, tmp_path: Path) -> None:
    """``job.fit`` of a file and the fit command give the same weights."""
    job.fit(config(tmp_path / "run", colours))
    saved = tmp_path / "run" / "config.yaml"
    edited = tmp_path / "again.yaml"
    edited.write_text(saved.read_text().replace(str(tmp_path / "run"), str(tmp_path / "again")))
    job.fit(edited)
    outcome = run_here("fit", "--config", saved, "--run_dir", tmp_path / "verb", threads=torch.get_num_threads())
    assert outcome.returncode == 0, outcome.output
    assert "Finished" in outcome.output
    assert_same_weights(str(tmp_path / "run"), str(tmp_path / "again"))
    assert_same_weights(str(tmp_path / "run"), str(tmp_path / "verb"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__max_epochs": 0}, "max_epochs must be at least 1"),
        ({"checkpoint__keep_last": 0}, "keep_last must be at least 1"),
        ({"data__roots": "x"}, "roots"),
        ({"model__optimizer": {"class_path": "os.system"}}, "os.system is not allowed"),
    ],
)
def test_a_users_mistake_raises_and_does_not_exit(
    changes: dict[str, Any], message: str, colours: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        job.fit(config(tmp_path / "run", colours, **changes))


def test_fit_resumes_in_another_thread(colours: Path, tmp_path: Path) -> None:
    """Outside the main thread no signal handlers are installed; the run resumes the earlier one."""
    job.fit(config(tmp_path / "run", colours))
    reports: list[job.Report] = []
    settings = config(tmp_path / "run", colours, trainer__max_epochs=2)
    thread = threading.Thread(target=lambda: reports.append(job.fit(settings)))
    thread.start()
    thread.join()
    assert [report.epochs for report in reports] == [2]


def test_without_affinity_all_cpus_count(monkeypatch: pytest.MonkeyPatch, colours: Path, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cpus(tmp_path) == os.cpu_count()
    settings = config(tmp_path / "run", colours)
    del settings["data"]["num_workers"]
    assert job.fit(settings).epochs == 1


def script(folder: Path, settings: dict[str, Any], body: str) -> subprocess.Popen[str]:
    """Run a script without an ``if __name__ == "__main__"`` guard, like a notebook."""
    path = folder / "script.py"
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    start = "import json, job\nfrom job import checkpoint\nprint('began', flush=True)\n"
    start += "config = json.load(open('config.json'))\n"
    path.write_text(start + textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(PYTHONPATH=str(REPOSITORY)),
    )


def test_ctrl_c_saves_and_raises_keyboard_interrupt(colours: Path, tmp_path: Path) -> None:
    endless = config(tmp_path / "run", colours, trainer__max_epochs=100000)
    process = script(
        tmp_path,
        endless,
        """
        try:
            job.fit(config)
        except (job.JobError, KeyboardInterrupt) as error:
            print(type(error).__name__, error)
        print(job.load(config["run_dir"]).classes)
        config["trainer"]["max_epochs"] = checkpoint.manifests(config["run_dir"])[-1].epoch + 1
        print(job.fit(config).epochs == config["trainer"]["max_epochs"])
        """,
    )
    deadline = time.monotonic() + 400
    while not list((tmp_path / "run" / "checkpoints").glob("*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    began, preempted, classes, went_on = output.splitlines()
    assert began == "began"
    assert preempted.startswith("Preempted stopped on request after step ")
    assert classes == "('blue', 'red')"
    assert went_on == "True"


def test_loader_processes_do_not_run_the_script_again(colours: Path, tmp_path: Path) -> None:
    augment = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [32, 32]}}
    process = script(
        tmp_path, config(tmp_path / "run", colours, data__augment=augment), "print(job.fit(config).epochs)"
    )
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    assert output.split() == ["began", "1"]


def test_importing_the_package_imports_neither_torch_nor_lightning() -> None:
    code = "import sys, job; print({'torch', 'pytorch_lightning', 'jsonargparse'} & set(sys.modules), dir(job))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout.startswith("set()")
    assert "TransferLearningModel" in result.stdout
    assert issubclass(ConfigError, JobError)


def test_a_second_ctrl_c_raises_at_once(colours: Path, tmp_path: Path) -> None:
    """During a long step, whose end the first Ctrl-C waits for."""
    (tmp_path / "slow.py").write_text(
        "import time\nfrom pytorch_lightning.callbacks import Callback\n"
        "class Slow(Callback):\n"
        "    def on_train_batch_start(self, *args):\n"
        "        print('step', flush=True)\n"
        "        [time.sleep(0.1) for _ in range(6000)]\n"
    )
    process = script(
        tmp_path,
        config(tmp_path / "run", colours, trainer__callbacks=[{"class_path": "slow.Slow"}]),
        """
        try:
            job.fit(config)
        except KeyboardInterrupt as error:
            print("KeyboardInterrupt", error)
        """,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert [process.stdout.readline() for _ in range(2)] == ["began\n", "step\n"]
    process.send_signal(signal.SIGINT)
    while "SIGINT: saving the state" not in (line := process.stderr.readline()):
        assert line, "it has ended"
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert output.startswith("KeyboardInterrupt stopped at once by a second Ctrl-C")
