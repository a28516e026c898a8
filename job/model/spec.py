"""The description of a network in a checkpoint, validated before memory of the size that it names is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from torch import Tensor

from job import typed
from job.errors import CheckpointError
from job.model.pooling import Pooling
from job.storage.tensor_file import printable

FORMAT = 3
"""Version of the description; 2 added ``task`` and ``thresholds``, 3 ``pooling``. Networks without these are written as
the first version that has what they need, which earlier versions of this program read."""
PREFIX = "net."
"""Prefix of the classifier's tensors in a checkpoint's state dict."""
MAX_IMAGE_SIZE = 4096
MAX_CLASSES = 1_000_000
MAX_HIDDEN = 65_536

ClassName = Annotated[str, Meta(min_length=1, max_length=4096)]
Width = Annotated[int, Meta(ge=1, le=MAX_HIDDEN)]
Channels = tuple[float, float, float]
Threshold = Annotated[float, Meta(ge=0, le=1)]
TaskName = Literal["classification", "multilabel"]


class ClassifierSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Architecture and preprocessing of a :class:`~job.model.classifier.Classifier`.

    Attributes:
        backbone: architecture: a name of torchvision.models, or timm/NAME.
        classes: class names, in the order of labels.
        hidden: widths of the head's hidden layers.
        pooling: of a vision transformer's tokens; "auto" is the architecture's own.
        image_size: height and width of images, in pixels.
        mean: per-channel mean for images in [0, 1].
        std: per-channel standard deviation.
        resize: how images are made square.
        task: "classification" if an image has exactly one class, "multilabel" if any number of them.
        thresholds: for multilabel, the probability of each class from which it is predicted. Empty: 0.5.
        format: version of this description; the first checkpoints lack the field, and have version 1.
    """

    backbone: Annotated[str, Meta(min_length=1, max_length=200)]
    classes: Annotated[list[ClassName], Meta(min_length=1, max_length=MAX_CLASSES)]
    hidden: Annotated[list[Width], Meta(max_length=64)]
    image_size: Annotated[int, Meta(ge=1, le=MAX_IMAGE_SIZE)]
    mean: Channels
    std: Channels
    resize: Literal["squash", "crop"] = "squash"
    task: TaskName = "classification"
    thresholds: Annotated[list[Threshold], Meta(max_length=MAX_CLASSES)] = []
    pooling: Pooling = "auto"
    format: Annotated[int, Meta(ge=1)] = 1

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must be finite, and std above 0")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if self.thresholds and (self.task != "multilabel" or len(self.thresholds) != len(self.classes)):
            raise ValueError("thresholds are not one per class of a multilabel network")


def decode_spec(saved: Any, source: str) -> ClassifierSpec:
    """Validate the description of a network in the checkpoint ``source``.

    Raises:
        CheckpointError: a field is missing, unknown or out of range, or a newer version of this program wrote it.
    """
    version = saved.get("format", 1) if isinstance(saved, Mapping) else 1
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{source} describes its network in format {version}, and this version of job reads formats up to "
            f"{FORMAT}. Install the version that wrote it, or a newer one."
        )
    try:
        return typed.from_builtins(saved, ClassifierSpec)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CheckpointError(
            f"{source} has an invalid description of its network: {printable(str(error))}. Use another checkpoint."
        ) from error


def net_state(saved: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The classifier's tensors in a checkpoint's state dict, by name without the prefix.

    Raises:
        CheckpointError: there is no state dict of tensors.
    """
    state = saved.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{source} holds no state dict of tensors. Use another checkpoint.")
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def require_same_network(saved: Any, current: Mapping[str, Any], optional: Iterable[str]) -> None:
    """Compare the network that a checkpoint describes with that of this run.

    Args:
        saved: the checkpoint's description.
        current: this run's.
        optional: fields that may differ.

    Raises:
        CheckpointError: other fields differ; the message names them.
    """
    before, now = decode_spec(saved, "the checkpoint"), decode_spec(current, "this run")
    different = [
        f"{name} was {getattr(before, name)!r}, is {getattr(now, name)!r}"
        for name in now.__struct_fields__
        if getattr(before, name) != getattr(now, name) and name not in optional
    ]
    if different:
        start = "" if before.backbone != now.backbone else "; --init_from RUN_DIR starts that from these weights"
        raise CheckpointError(
            f"the checkpoint does not fit this run: {'; '.join(different)}. Use the settings it was trained with, "
            f"or another --run_dir{start}."
        )


def require_state(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare names and shapes of a checkpoint's tensors with those of the network it describes.

    Raises:
        CheckpointError: they differ; the message names the first difference.
    """
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{source} holds no state dict of tensors. Use another checkpoint.")
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of the network" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    if problems:
        further = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{source} does not fit the network that it describes: {printable(problems[0])}{further}."
        )
