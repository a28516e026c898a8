"""Training scripts that ``benchmarks/train_peers.py`` runs and reads."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from train_peers import METRIC, PEERS, Peer, Scripts, Task, revision

PRINTING = """
import sys, time
for line in sys.argv[1:]:
    print(line)
    time.sleep(0.05)
"""

TRAINED = "{'loss': '0.69', 'grad_norm': '1.2', 'learning_rate': '0.001', 'epoch': '%d'}"
VALIDATED = "{'eval_loss': '0.7', 'eval_accuracy': '%s', 'eval_runtime': '3.1', 'epoch': '%d'}"
"""Lines of transformers' trainer."""


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "data" / "train" / "cats").mkdir(parents=True)
    for number in range(8):
        (tmp_path / "data" / "train" / "cats" / f"{number}.jpg").touch()
    (tmp_path / "results").mkdir()
    return Task(tmp_path / "data", "resnet18", tmp_path / "resnet18.pth", 2, tmp_path / "results")


def printing(tmp_path: Path, *lines: str, end: str = "", validates_again: bool = False) -> Peer:
    """A script that prints lines of transformers' trainer, and then executes ``end``."""
    (tmp_path / "script.py").write_text(PRINTING + end)
    like = PEERS["huggingface"]
    return Peer(
        "script",
        "script.py",
        lambda script, task: ([sys.executable, str(script), *lines], task.folder, {}),
        like.trained,
        like.validated,
        like.percent,
        validates_again=validates_again,
    )


def test_epochs_are_read_from_what_a_script_prints(tmp_path: Path, task: Task) -> None:
    lines = [TRAINED % 1, VALIDATED % ("0.625", 1), TRAINED % 2, VALIDATED % ("0.75", 2), "{'train_loss': '0.6'}"]
    result = printing(tmp_path, *lines).run(tmp_path, task)
    assert [epoch["accuracy"] for epoch in result["epochs"]] == [0.625, 0.75]
    first, second = (epoch["at"] for epoch in result["epochs"])
    assert 0 < first < second
    assert result["speed"] == 8 / result["epochs"][-1]["trained"]
    assert result["epochs"][-1]["trained"] <= second - first


def test_a_script_that_validates_again_is_stopped_before(tmp_path: Path, task: Task) -> None:
    lines = [TRAINED % 1, VALIDATED % ("0.5", 1), TRAINED % 2, VALIDATED % ("1.0", 2)]
    end = f"time.sleep(60)\nprint({VALIDATED % ('0.1', 2)!r})\nopen('ended', 'w')\n"
    result = printing(tmp_path, *lines, end=end, validates_again=True).run(tmp_path, task)
    assert [epoch["accuracy"] for epoch in result["epochs"]] == [0.5, 1.0]
    assert not (task.folder / "ended").exists()


@pytest.mark.parametrize("batches", [1, 2, 11])
def test_the_last_batch_alone_ends_a_validation_of_timm(batches: int) -> None:
    last = batches - 1
    lines = [
        f"Test: [{number:>4d}/{last}]  Time: 1.236 (1.236)  Loss:   0.010 ( 0.010)  Acc@1: 100.000 ({accuracy:>7.3f})"
        "  Acc@5: 100.000 (100.000)"
        for number, accuracy in ((0, 62.5), (last, 50.0))
    ]
    matches = [re.search(PEERS["timm"].validated, line) for line in lines]
    assert [match["accuracy"] for match in matches if match] == (["62.500", "50.000"] if batches == 1 else ["50.000"])


@pytest.mark.parametrize("end", ["sys.exit('no such option')", "sys.exit()"])
def test_a_script_that_fails_or_ends_early_shows_its_output(tmp_path: Path, task: Task, end: str) -> None:
    peer = printing(tmp_path, TRAINED % 1, VALIDATED % ("0.5", 1), end=end, validates_again=True)
    with pytest.raises(SystemExit, match=r"script failed:\n(.*\n)*.*'eval_accuracy': '0.5'"):
        peer.run(tmp_path, task)


def test_hugging_face_takes_its_metric_from_a_checkout(tmp_path: Path, task: Task) -> None:
    import torch
    from safetensors.torch import load_file

    metric = tmp_path / "evaluate" / METRIC
    metric.mkdir(parents=True)
    (metric / "accuracy.py").write_text("# a metric")
    torch.save({"conv1.weight": torch.ones(2)}, task.weights)
    script = tmp_path / PEERS["huggingface"].script
    script.parent.mkdir(parents=True)
    script.write_text(
        "import os, pathlib, sys\n"
        "options = dict(word.split('=', 1) for word in sys.argv[1:] if '=' in word)\n"
        "assert pathlib.Path('accuracy/accuracy.py').read_text() == '# a metric'\n"
        "assert os.environ['HF_HUB_OFFLINE'] == os.environ['HF_DATASETS_OFFLINE'] == '1'\n"
        "for epoch in range(int(options['--num_train_epochs'])):\n"
        f"    print({TRAINED % 1!r})\n"
        f"    print({VALIDATED % ('0.5', 1)!r})\n"
    )
    scripts = Scripts({"huggingface": tmp_path}, evaluate=tmp_path / "evaluate")
    [(name, result)] = scripts.results(task)
    assert name == PEERS["huggingface"].name
    assert len(result["epochs"]) == 2
    states = load_file(task.folder / "huggingface" / "model" / "model.safetensors")
    assert list(states) == ["conv1.weight"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm/version.py", "__version__ = '1.2.3'\n"),
        ("version.txt", "1.2.3\n"),
        ("src/transformers/__init__.py", 'import sys\n\n__version__ = "1.2.3"\n\nx = "="\n'),
    ],
)
def test_the_version_of_a_checkout_is_that_of_its_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert revision(tmp_path) == "1.2.3"
