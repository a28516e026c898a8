"""``<run_dir>/config.yaml``: the resolved configuration of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import Callback

from job import storage
from job.config import bounded_yaml
from job.errors import ConfigError
from job.storage.json_files import replace

log = logging.getLogger(__name__)

FILE = "config.yaml"
CHANGES_SHOWN = 50
VALUE_CHARACTERS = 200
REPAIR_HINT = "Restore it, or give the settings by --config FILE."


class SavedConfig(Callback):
    """Writes the configuration at the start of training, so that a rejected start changes nothing.

    Args:
        text: the configuration, as YAML.
        before_write: called immediately before each write; raises if this job may not write to run_dir.
    """

    def __init__(self, text: str, before_write: Callable[[], None] = storage.unconditionally) -> None:
        self.text = text
        self.before_write = before_write

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it, on rank 0."""
        if trainer.is_global_zero:
            save_config(trainer.default_root_dir, self.text, self.before_write)


def save_config(run_dir: str, text: str, before_write: Callable[[], None] = storage.unconditionally) -> None:
    """Write config.yaml; keep an earlier one that differs or is damaged, and log the difference."""
    uri = storage.join(run_dir, FILE)
    if storage.exists(uri):
        try:
            changed = changes(uri, text)
        except ConfigError as error:
            kept = _keep(run_dir, before_write)
            log.warning("%s This run writes its own settings; the damaged file is kept as %s", error, kept)
        else:
            if changed:
                log.warning("settings changed since the last attempt: %s", listed_changes(changed))
                _keep(run_dir, before_write)
    replace(uri, text.encode(errors="backslashreplace"), before_write)


def changes(uri: str, text: str) -> dict[str, str]:
    """Settings of the configuration ``text`` that differ from those in the file at ``uri``: "old → new" by option.

    Raises:
        ConfigError: the file is damaged or too large.
        StorageError: it cannot be read.
    """
    old, new = _flatten(read_mapping(uri)), _flatten(yaml.safe_load(text))
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return {name: f"{_short(old.get(name))} → {_short(new.get(name))}" for name in changed}


def listed_changes(changed: dict[str, str]) -> str:
    """What :func:`changes` returned, for a message."""
    shown = [f"{name}: {change}" for name, change in list(changed.items())[:CHANGES_SHOWN]]
    more = len(changed) - len(shown)
    return "; ".join(shown) + (f" and {more} more" if more else "")


def read_mapping(uri: str) -> dict[str, Any]:
    """Read a mapping from an untrusted YAML file.

    Raises:
        ConfigError: it is damaged or too large.
        StorageError: it cannot be read.
    """
    size = storage.info(uri).get("size")
    if isinstance(size, int) and size > bounded_yaml.MAX_BYTES:
        raise ConfigError(
            f"{uri} has {size:,} bytes; a configuration has at most {bounded_yaml.MAX_BYTES:,}. {REPAIR_HINT}"
        )
    try:
        tree = bounded_yaml.load(storage.read_bytes(uri).decode())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{uri} is damaged: {' '.join(str(error).split())}. {REPAIR_HINT}") from error
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise ConfigError(f"{uri} is damaged: it holds no options. {REPAIR_HINT}")
    return tree


def _keep(run_dir: str, before_write: Callable[[], None]) -> str:
    """Copy config.yaml unchanged to a free name; returns its URI.

    Names are numbered. The search doubles its steps: many existing names cost few requests.
    """
    below, number = 0, 1
    while storage.exists(_numbered(run_dir, number)):
        below, number = number, number * 2
    while number - below > 1:
        middle = (below + number) // 2
        if storage.exists(_numbered(run_dir, middle)):
            below = middle
        else:
            number = middle
    kept = _numbered(run_dir, number)
    storage.write_bytes(kept, storage.read_bytes(storage.join(run_dir, FILE)), before_write)
    return kept


def _numbered(run_dir: str, number: int) -> str:
    return storage.join(run_dir, f"config.{number}.yaml")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= VALUE_CHARACTERS else f"{text[:VALUE_CHARACTERS]}…"


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{name}".strip(".")).items()}
