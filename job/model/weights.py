"""Fitting of pretrained weights to a backbone: state dicts of this job, torchvision, timm and Lightning."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from job.errors import WeightsError
from job.model.spec import ClassifierSpec
from job.model.weights_config import WeightsConfig
from job.storage.tensor_file import printable

log = logging.getLogger(__name__)

WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that torch.compile, FSDP and activation checkpointing insert."""
PREFIXES = re.compile(r"((module|model|net|network|backbone|encoder|student|ema|online)\.)*")
"""Prefixes of a backbone's names: attributes of DDP, Lightning modules and this job."""
COUNTER = ".num_batches_tracked"


TRANSFORMERS_NAMES = re.compile(r"(^|\.)embeddings\.(cls_token|patch_embedding)")
"""Names of vision transformers in Hugging Face's library transformers."""


class PretrainedWeights(NamedTuple):
    """Tensors of a file, and the network that they belong to.

    Attributes:
        uri: the user's ``--model.weights``.
        state: tensors by name.
        classifier: description of the network, where the file is a checkpoint of this job.
        config: the images of the pretraining, where a config.json beside the file describes them.
    """

    uri: str
    state: dict[str, Tensor]
    classifier: ClassifierSpec | None
    config: WeightsConfig | None = None


def load_weights(
    backbone: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    name: str,
    head_prefixes: tuple[str, ...],
    head_keys: Callable[[], Iterable[str]] = tuple,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Load ``state`` strictly into the backbone; only tensors of a head or outside of the backbone may be left over.

    Args:
        backbone: an architecture without its head.
        state: tensors by name; names may have the prefixes of DDP, torch.compile, Lightning modules and this job.
        source: URI, for messages.
        name: name of the architecture, for messages.
        head_prefixes: paths of the architecture's classification layers.
        head_keys: computes the names in the state dict of the architecture with its heads.
        convert: the library's conversion of weights under other names, or of another image size; it is used where
            names or shapes differ.

    Raises:
        WeightsError: names, shapes or dtypes differ; the message lists the first differences.
    """
    expected = backbone.state_dict()
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    prefix = _prefix(state, expected)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    heads = tuple(f"{path}." for path in head_prefixes)
    inside = {key: value for key, value in inside.items() if not key.startswith(heads) and key != "n_averaged"}
    if convert is not None and not _fits(inside, expected):
        inside = _converted(inside, convert, source, name)
        inside = {key: value for key, value in inside.items() if not key.startswith(heads)}
    if unexpected := inside.keys() - expected.keys():
        unexpected &= set(head_keys())
        inside = {key: value for key, value in inside.items() if key not in unexpected}
    # Old and converted state dicts lack counters, which matter only with momentum=None.
    counters = {key: value for key, value in expected.items() if key.endswith(COUNTER) and key not in inside}
    inside |= counters
    problem = f"the weights {source} do not fit the backbone {name}"
    if any(TRANSFORMERS_NAMES.search(key) for key in state):
        problem += (
            " (they have the names of the library transformers: use the model.safetensors of the same model in the "
            "timm organization of the Hugging Face Hub)"
        )
    _require_fit(inside, expected, problem)
    for key, value in inside.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise WeightsError(f"the weights {source} contain values that are not finite, first in {printable(key)}.")
    backbone.load_state_dict(versioned(inside, backbone))
    unused = max(len(state) - len(inside) + len(counters), 0)
    log.info(
        "weights %s: %d tensors loaded%s%s",
        source,
        len(inside) - len(counters),
        f" without the prefix {prefix}" if prefix else "",
        f"; {unused} others, of a head or outside of the backbone, not used" if unused else "",
    )


def versioned(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Add the version numbers of the layers of ``module``, which files do not contain, to ``state``."""
    result = OrderedDict(state)
    result._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    return result


def _prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The prefix with which ``state`` contains most of the expected names."""
    counts = {"": 0}
    for key in state:
        match = PREFIXES.match(key)
        parts = match[0].split(".")[:-1] if match else []
        for end in range(len(parts) + 1):
            prefix = "".join(f"{part}." for part in parts[:end])
            counts[prefix] = counts.get(prefix, 0) + (key[len(prefix) :] in expected)
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))


def _fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` has all tensors that are expected, counters aside, in their shapes."""
    return all(
        key in state and state[key].shape == value.shape for key, value in expected.items() if not key.endswith(COUNTER)
    )


def _converted(
    state: dict[str, Tensor], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], source: str, name: str
) -> dict[str, Tensor]:
    """Convert weights; those that cannot be are returned as they are, and do not fit."""
    try:
        converted = convert(state)
    except Exception as error:  # the library's conversion of arbitrary tensors raises errors of any class
        log.info("weights %s: timm's conversion to %s failed: %s", source, name, printable(str(error)))
        return state
    if not all(isinstance(value, Tensor) for value in converted.values()):
        return state
    if converted.keys() != state.keys():
        log.info("weights %s: tensors were renamed as timm does for %s", source, name)
    resized = [key for key, value in converted.items() if key in state and state[key].shape != value.shape]
    if resized:
        log.info("weights %s: resampled as timm does: %s", source, ", ".join(map(printable, resized[:4])))
    return converted


def _require_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], problem: str) -> None:
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    common = sorted(expected.keys() & state.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in common
        if state[key].shape != expected[key].shape
    ]
    kinds = [
        f"{key} is {state[key].dtype}, expected {expected[key].dtype}"
        for key in common
        if state[key].is_floating_point() != expected[key].is_floating_point() or state[key].is_complex()
    ]
    differences = {
        "missing": missing,
        "not of this architecture": unexpected,
        "of another shape": shapes,
        "of another type": kinds,
    }
    listed = [
        f"{len(names)} {difference}: {', '.join(map(printable, names[:4]))}{', …' if len(names) > 4 else ''}"
        for difference, names in differences.items()
        if names
    ]
    if listed:
        raise WeightsError(f"{problem}; {'; '.join(listed)}.")
