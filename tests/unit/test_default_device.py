"""Networks and metrics are built in host memory, whatever device Lightning makes the default one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytorch_lightning.strategies import Strategy
from support import TINY, options, picture_files, run_here, write_files


@contextlib.contextmanager
def on_another_device(self: Strategy, empty_init: bool | None = None) -> Iterator[None]:
    """As the context in which Lightning calls ``configure_model`` on a GPU, for a device that holds no values."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.task": "multilabel"},
        {"model.backbone": "timm/test_vit", "data.image_size": 160, "model.lora_rank": 2},
    ],
    ids=["classification", "multilabel", "lora"],
)
def test_a_fit_does_not_depend_on_the_default_device(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_files(tmp_path / "images", picture_files(["blue", "red"], 8))
    monkeypatch.setattr(Strategy, "tensor_init_context", on_another_device)
    result = run_here("fit", *options(TINY, data__root=images, run_dir=tmp_path / "run", **changes))
    assert result.returncode == 0, result.output
