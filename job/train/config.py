"""``<run_dir>/config.yaml``: the resolved configuration of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import Callback

from job import storage

log = logging.getLogger(__name__)

FILE = "config.yaml"


class SavedConfig(Callback):
    """Writes the configuration once training begins: a start that was refused changes nothing.

    Args:
        text: the configuration, as YAML.
        before_write: called immediately before; raises if this job may not write to run_dir.
    """

    def __init__(self, text: str, before_write: Callable[[], None] = lambda: None) -> None:
        self.text = text
        self.before_write = before_write

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it, on rank 0."""
        if trainer.is_global_zero:
            self.before_write()
            save_config(trainer.default_root_dir, self.text)


def save_config(run_dir: str, text: str) -> None:
    """Write config.yaml; an earlier one that differs is kept beside it, and the difference told."""
    uri = storage.join(run_dir, FILE)
    if storage.exists(uri):
        before = storage.read_bytes(uri).decode()
        old, new = _flatten(yaml.safe_load(before)), _flatten(yaml.safe_load(text))
        changed = [f"{k}: {old.get(k)} → {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if changed:
            log.warning("settings changed since the last start: %s", "; ".join(changed))
            number = 1
            while storage.exists(kept := storage.join(run_dir, f"config.{number}.yaml")):
                number += 1
            storage.write_text(kept, before)
    storage.write_text(uri, text)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{name}".strip(".")).items()}
