"""Keys of a checkpoint's state file, and checks of the entries that prediction and manifests use."""

from __future__ import annotations

import math
from typing import Any, cast

from packaging.version import InvalidVersion, Version
from torch import Tensor

from job.checkpoint.manifest import FORMAT, Manifest, manifest_of
from job.errors import CheckpointError, NewerFormatError

FORMAT_KEY = "format"
"""Version of the entries that this package adds to Lightning's."""
MANIFEST_KEY = "manifest"
"""Fields of the :class:`~job.checkpoint.manifest.Manifest`, but for those of the files."""
COMPATIBILITY_KEY = "resume_requires"
"""Settings, by name, that a run which resumes must share."""
STOPPED_KEY = "stopped"
"""Whether a callback had ended the training, as EarlyStopping does."""
CALLBACKS_KEY = "callback_settings"
"""Settings of the user's callbacks, by callback."""
CLASSIFIER_KEY = "classifier"
"""Description of the network for prediction: :class:`~job.model.spec.ClassifierSpec`."""
PRECISION_KEY = "precision"
"""Precision of the Trainer."""
SKIPPED_STEPS_KEY = "skipped_steps"
"""Optimizer steps that were skipped since their gradients were not finite."""
TRAINING_WEIGHTS_KEY = "training_weights"
"""With an EMA: the weights in training that differ from the averaged ones in ``state_dict``."""
LORA_KEY = "lora"
"""With LoRA: the adapted weights and their adapters, whose sums are in ``state_dict``, by the network's names."""
HISTORY_KEY = "history"
"""Validations so far, as JSON: a list of :class:`~job.monitoring.history.ValidationRecord`."""
CONFUSION_KEY = "confusion"
"""The :class:`~job.checkpoint.confusion.ConfusionMatrix` on its way to its own file, which the state does not hold."""

_NO_FILE = {"file": "epoch=000-step=00000000.ckpt", "bytes": 0, "sha256": "0" * 64}


def require_checkpoint(uri: str, checkpoint: Any) -> dict[str, Any]:
    """``checkpoint``, if it has what prediction needs.

    Raises:
        CheckpointError: an entry is missing or of the wrong kind.
        NewerFormatError: a newer version of job wrote it.
    """
    if not isinstance(checkpoint, dict) or CLASSIFIER_KEY not in checkpoint:
        raise CheckpointError(f"{uri} is not a checkpoint of job: it has no description of the classifier.")
    version = checkpoint.get(FORMAT_KEY, 1)
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{uri} is damaged: its format is {version!r:.50}.")
    if version > FORMAT:
        raise NewerFormatError(
            f"the checkpoint {uri} was written by a newer version of job: it has format {version}, this version reads "
            f"formats up to {FORMAT}. Upgrade job."
        )
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{uri} is damaged: its state_dict is not tensors by name.")
    if not isinstance(checkpoint[CLASSIFIER_KEY], dict):
        raise CheckpointError(f"{uri} is damaged: its classifier is not settings by name.")
    return cast("dict[str, Any]", checkpoint)


def require_lightning_version(uri: str, checkpoint: dict[str, Any]) -> None:
    """Check the entry by which Lightning migrates checkpoints of its earlier versions.

    Raises:
        CheckpointError: it is no version from 2.0 on, with which the first checkpoints of this package were written,
            and from which on Lightning migrates nothing.
    """
    saved = checkpoint.get("pytorch-lightning_version")
    try:
        usable = isinstance(saved, str) and len(saved) < 100 and Version(saved) >= Version("2")
    except InvalidVersion:
        usable = False
    if not usable:
        raise CheckpointError(
            f"{uri} is damaged: its pytorch-lightning_version is {saved!r:.50}. Use an older checkpoint."
        )


def manifest_entry(checkpoint: dict[str, Any]) -> Manifest:
    """The manifest fields that a checkpoint holds, with placeholders for those of its files.

    Raises:
        CheckpointError: one is missing or out of its range.
    """
    fields = {name: value for name, value in checkpoint[MANIFEST_KEY].items() if name != "confusion_matrix"}
    if set(fields) - {"validation"} != {"epoch", "batch", "global_step", "monitor", "mode", "metrics"}:
        raise CheckpointError(f"{MANIFEST_KEY!r} has the entries {sorted(map(str, checkpoint[MANIFEST_KEY]))}")
    return manifest_of(fields, **_NO_FILE)


def difference(expected: Any, saved: Any, path: str = "", ignored: frozenset[str] = frozenset()) -> str | None:
    """The first place in which two trees differ in keys, lengths or kinds of values; None where there is none."""
    where = path or "it"
    if isinstance(expected, dict):
        if not isinstance(saved, dict):
            return f"{where} is no dict"
        if set(expected) - ignored != set(saved) - ignored:
            unknown = sorted(map(str, set(expected) ^ set(saved)))
            return f"{where} misses or adds {', '.join(unknown)[:200]}"
        pairs = ((f"{path}.{key}".strip("."), expected[key], saved[key]) for key in expected if key not in ignored)
        return next((problem for name, one, other in pairs if (problem := difference(one, other, name, ignored))), None)
    if isinstance(expected, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(expected):
            return f"{where} is no list of {len(expected)}"
        pairs = ((f"{path}.{n}", *both) for n, both in enumerate(zip(expected, saved, strict=True)))
        return next((problem for name, one, other in pairs if (problem := difference(one, other, name, ignored))), None)
    return None if _alike(expected, saved) else f"{where} is a {type(saved).__name__}"


def _alike(expected: Any, saved: Any) -> bool:
    if expected is None:
        return is_plain(saved) or isinstance(saved, Tensor)
    if saved is None:
        return isinstance(expected, bool)  # of an optimizer: not chosen
    if isinstance(expected, bool) or isinstance(saved, bool):
        return isinstance(expected, bool) and isinstance(saved, bool)
    if isinstance(expected, (int, float)):
        if isinstance(saved, int):
            return abs(saved) < 2**53
        return isinstance(saved, float) and not math.isnan(saved)
    return isinstance(saved, type(expected))


def is_plain(value: Any, depth: int = 8) -> bool:
    """Whether a value is made of numbers, text and containers of them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and is_plain(v, depth - 1) for k, v in value.items())
    return isinstance(value, (list, tuple)) and all(is_plain(v, depth - 1) for v in value)
