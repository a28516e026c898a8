"""The entries of a checkpoint's state file, checked before any of them is used."""

from __future__ import annotations

import math
from typing import Any, cast

from packaging.version import InvalidVersion, Version
from torch import Tensor

from job.checkpoint.manifest import FORMAT, Manifest, manifest_of
from job.errors import CheckpointError, NewerFormatError

FORMAT_KEY = "format"
"""Key of the version of the entries that this package adds."""
FACTS = "manifest"
"""Key of the :class:`~job.checkpoint.manifest.Manifest` fields, but for those of the files."""
REQUIRED = "resume_requires"
"""Key of the settings, by name, that a run which resumes must share."""
STOPPED = "stopped"
"""Key of whether a callback had ended the training, as EarlyStopping does."""
CALLBACKS = "callback_settings"
"""Key of the settings of the user's callbacks, by callback."""
CONFUSION = "confusion"
"""Key of the confusion matrix on its way to its own file; the state file does not hold it."""

_NO_FILE = {"file": "epoch=000-step=00000000.ckpt", "bytes": 0, "sha256": "0" * 64}


def require_checkpoint(uri: str, checkpoint: Any) -> dict[str, Any]:
    """``checkpoint``, if it has what prediction needs.

    Raises:
        CheckpointError: an entry is missing or of the wrong kind.
        NewerFormatError: a newer version of job wrote it.
    """
    if not isinstance(checkpoint, dict) or "classifier" not in checkpoint:
        raise CheckpointError(f"{uri} is no checkpoint of this job (it says nothing of its classifier).")
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
    if not isinstance(checkpoint["classifier"], dict):
        raise CheckpointError(f"{uri} is damaged: its classifier is not settings by name.")
    return cast("dict[str, Any]", checkpoint)


def require_lightning_version(uri: str, checkpoint: dict[str, Any]) -> None:
    """Check the entry by which Lightning migrates checkpoints of its earlier versions.

    Raises:
        CheckpointError: it is no version from 2 on, which the first checkpoints of this package were written with.
    """
    saved = checkpoint.get("pytorch-lightning_version")
    try:
        usable = isinstance(saved, str) and len(saved) < 100 and Version(saved).major >= 2
    except InvalidVersion:
        usable = False
    if not usable:
        raise CheckpointError(
            f"{uri} is damaged: its pytorch-lightning_version is {saved!r:.50}. Use an older checkpoint."
        )


def require_resumable(uri: str, checkpoint: dict[str, Any], expected_loops: dict[str, Any]) -> None:
    """Check all that a run goes on from, before Lightning restores it.

    Args:
        uri: the checkpoint, for the message.
        checkpoint: its content.
        expected_loops: ``state_dict()`` of this trainer's fit loop, whose structure the saved one must have.

    Raises:
        CheckpointError: an entry is missing, of the wrong kind, out of its range, or contradicts another one.
    """
    problem = _problem(checkpoint, expected_loops)
    if problem:
        raise CheckpointError(f"{uri} is damaged, no run can resume from it: {problem}. Use an older checkpoint.")


def _problem(checkpoint: dict[str, Any], expected_loops: dict[str, Any]) -> str | None:
    kinds: dict[str, type] = {
        "loops": dict,
        "callbacks": dict,
        "optimizer_states": list,
        "lr_schedulers": list,
        "precision": str,
        "global_step": int,
        FACTS: dict,
        REQUIRED: dict,
    }
    for key, kind in kinds.items():
        if not isinstance(checkpoint.get(key), kind):
            return f"its entry {key!r} is missing or no {kind.__name__}"
    optional: dict[str, type] = {STOPPED: bool, CALLBACKS: dict, "training_weights": dict}
    for key, kind in optional.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            return f"its entry {key!r} is no {kind.__name__}"
    if not is_plain(checkpoint[REQUIRED]) or not is_plain(checkpoint.get(CALLBACKS, {})):
        return f"{REQUIRED!r} or {CALLBACKS!r} holds more than numbers and text"
    for name, tensor in checkpoint.get("training_weights", {}).items():
        averaged = checkpoint["state_dict"].get(f"net.{name}")
        if not isinstance(tensor, Tensor) or averaged is None or tensor.shape != averaged.shape:
            return f"the training weights of {name!r:.100} do not fit their average"
    try:
        facts = facts_of(checkpoint)
    except CheckpointError as error:
        return str(error)
    return _problem_of_loops(checkpoint, facts, expected_loops) or _problem_of_optimizers(checkpoint)


def facts_of(checkpoint: dict[str, Any]) -> Manifest:
    """The manifest fields that a checkpoint holds; those of its file are made up.

    Raises:
        CheckpointError: one is missing or out of its range.
    """
    facts = {name: value for name, value in checkpoint[FACTS].items() if name != "confusion_matrix"}
    if set(facts) - {"validation"} != {"epoch", "batch", "global_step", "monitor", "mode", "metrics"}:
        raise CheckpointError(f"{FACTS!r} has the entries {sorted(map(str, checkpoint[FACTS]))}")
    return manifest_of(facts, **_NO_FILE)


def _problem_of_loops(checkpoint: dict[str, Any], facts: Manifest, expected: dict[str, Any]) -> str | None:
    saved = checkpoint["loops"].get("fit_loop")
    if different := difference(expected, saved, ignored=frozenset({"combined_loader"})):
        return f"the progress of its loops: {different}"
    if problem := _out_of_range(saved):
        return f"the progress of its loops: {problem}"
    loaders = saved["state_dict"].get("combined_loader", [])
    if not isinstance(loaders, list) or len(loaders) > 1 or not is_plain(loaders):
        return "the state of its data loader is no list of one entry"
    epochs = saved["epoch_progress"]["current"]["processed"]
    batches = saved["epoch_loop.batch_progress"]["current"]["ready"]
    steps = saved["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if (facts.epoch, facts.global_step, checkpoint["global_step"]) != (epochs, steps, steps):
        return (
            f"its manifest entry says epoch {facts.epoch} and step {facts.global_step}, its loops epoch {epochs} and "
            f"step {steps}"
        )
    if facts.batch not in (0, batches):
        return f"its manifest entry says batch {facts.batch}, its loops batch {batches}"
    for loader in loaders:
        if loader != {} and loader != {"batch": batches}:
            return f"the state of its data loader is {loader!r:.60}, its loops say batch {batches}"
    return None


def _out_of_range(tree: Any) -> str | None:
    """The first number of a tree of dictionaries that is negative or absurdly large."""
    if isinstance(tree, dict):
        return next((problem for value in tree.values() if (problem := _out_of_range(value))), None)
    if isinstance(tree, (int, float)) and not (isinstance(tree, int) and 0 <= tree < 2**48):
        return f"{tree} is no count"
    return None


def _problem_of_optimizers(checkpoint: dict[str, Any]) -> str | None:
    for state in checkpoint["optimizer_states"]:
        if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
            return "an optimizer's state is no dict"
        groups = state.get("param_groups")
        if not isinstance(groups, list) or not all(map(_is_group, groups)):
            return "an optimizer's parameter groups are no list of groups"
        if not all(isinstance(entry, dict) for entry in state["state"].values()):
            return "an optimizer's state of a parameter is no dict"
    if not all(isinstance(state, dict) for state in checkpoint["lr_schedulers"]):
        return "a learning rate scheduler's state is no dict"
    return None


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list)


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
        return next((found for name, one, other in pairs if (found := difference(one, other, name, ignored))), None)
    if isinstance(expected, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(expected):
            return f"{where} is no list of {len(expected)}"
        pairs = ((f"{path}.{n}", *both) for n, both in enumerate(zip(expected, saved, strict=True)))
        return next((found for name, one, other in pairs if (found := difference(one, other, name, ignored))), None)
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
