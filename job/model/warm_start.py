"""Warm start (``--init_from``): a new run begins with the weights of another one, its head as far as classes agree."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from job import checkpoint, redact
from job.checkpoint.initial import InitialWeights
from job.checkpoint.state import CLASSIFIER_KEY
from job.errors import CheckpointError, ConfigError, WeightsError
from job.model.classifier import Classifier, build_classifier, num_logits
from job.model.config import ModelConfig
from job.model.head import build_head
from job.model.loading import plain_tensors
from job.model.pooling import Pooling
from job.model.spec import ClassifierSpec, decode_spec, net_state, require_state
from job.model.weights import PretrainedWeights
from job.storage.tensor_file import printable

log = logging.getLogger(__name__)

CLASSES_SHOWN = 10
BACKBONE, HEAD = "backbone.", "head."
"""Prefixes of a classifier's tensors."""


class WarmStart(NamedTuple):
    """The weights of another run: with an EMA the averaged ones, with which that run predicts.

    Attributes:
        origin: names the checkpoint.
        spec: description of its network.
        backbone: weights of the backbone.
        head: tensors of the head by name, not yet compared with ``spec``.
    """

    origin: InitialWeights
    spec: ClassifierSpec
    backbone: PretrainedWeights
    head: dict[str, Tensor]


def read_warm_start(uri: str, backbone: str, pooling: Pooling) -> WarmStart:
    """Read the checkpoint of another run; no code in it is run.

    Args:
        uri: its file.
        backbone: architecture of the new run.
        pooling: of the new run's backbone.

    Raises:
        ConfigError: it has another backbone, or another pooling.
        CheckpointError: it is damaged, or no checkpoint of this package.
        StorageError: it cannot be read.
    """
    saved = checkpoint.load(uri)
    spec = decode_spec(saved[CLASSIFIER_KEY], uri)
    if spec.backbone != backbone:
        raise ConfigError(
            f"--init_from {uri} has the backbone {printable(spec.backbone)}, and this run has {backbone}. Use "
            f"--model.backbone={printable(spec.backbone)}."
        )
    if spec.pooling != pooling:
        raise ConfigError(
            f"--init_from {uri} has the pooling {spec.pooling}, and this run has {pooling}. Use "
            f"--model.pooling={spec.pooling}."
        )
    state = plain_tensors(net_state(saved, uri), uri)
    return WarmStart(
        InitialWeights(redact.saved_form(uri), checkpoint.sha256(uri)),
        spec,
        PretrainedWeights(uri, _below(state, BACKBONE), spec),
        _below(state, HEAD),
    )


def build_from(
    warm_start: WarmStart,
    config: ModelConfig,
    *,
    classes: Sequence[str],
    image_size: int,
    resize: str,
    device_type: str,
) -> Classifier:
    """Build the network of a new run from the weights of another one.

    Args:
        warm_start: the other run's weights.
        config: hyperparameters of the new run; its ``weights`` are not used.
        classes: class names, in the order of labels.
        image_size: height and width of images, in pixels.
        resize: how images are made square.
        device_type: type of the device that computes.

    Raises:
        WeightsError: the backbone's weights do not fit, as position embeddings of another image size.
        CheckpointError: the head's weights do not have the shapes that the checkpoint describes.
    """
    spec = warm_start.spec
    if config.weights not in ("DEFAULT", "none"):
        log.info("--model.weights %s is not used: the weights are those of --init_from", config.weights)
    try:
        net = build_classifier(
            config, warm_start.backbone, classes=classes, image_size=image_size, device_type=device_type
        )
    except WeightsError as error:
        if spec.image_size == image_size:
            raise
        raise WeightsError(
            f"{error} They were trained with images of {spec.image_size} pixels, and this run has {image_size}: use "
            f"--data.image_size={spec.image_size}."
        ) from error
    _start_head(warm_start, net)
    _warn_of_other_images(warm_start.origin.uri, net, resize, spec)
    return net


def _start_head(warm_start: WarmStart, net: Classifier) -> None:
    """Set the head of a new network to that of the other run as far as they agree, and log what is taken over.

    Hidden layers are taken over from the first on, as long as they have the same width; the rows of the last layer by
    class name, if all hidden layers were. New classes keep their random rows.
    """
    spec, source = warm_start.spec, warm_start.origin.uri
    head = _checked_head(warm_start, net)
    layers = [layer for layer in net.head if isinstance(layer, nn.Linear)]
    same = 0
    while same < min(len(net.hidden), len(spec.hidden)) and net.hidden[same] == spec.hidden[same]:
        same += 1
    known: list[str] = []
    with torch.no_grad():
        for layer, values in zip(layers[:same], head, strict=False):
            _set(layer, values)
        if list(net.hidden) == spec.hidden:
            known = _take_over_rows(layers[-1], net, head[-1], spec)
    _log_classes(source, net.classes, known, spec)
    if list(net.hidden) != spec.hidden:
        log.info(
            "head: %d of %d hidden layers taken over: their widths are %s, those of %s %s (--model.hidden)",
            same,
            len(net.hidden),
            list(net.hidden),
            source,
            spec.hidden,
        )


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _checked_head(warm_start: WarmStart, net: Classifier) -> list[Tensor]:
    """Weight and bias of each linear layer as one matrix [outputs, inputs + 1], from the first to the last."""
    spec, source = warm_start.spec, warm_start.origin.uri
    first = net.head[0]
    assert isinstance(first, nn.Linear)
    with torch.device("meta"):
        expected = build_head(first.in_features, spec.hidden, num_logits(len(spec.classes), spec.task))
    shapes = {name: tuple(value.shape) for name, value in expected.state_dict().items()}
    require_state(warm_start.head, shapes, f"the head in {source}")
    if not all(value.is_floating_point() and value.isfinite().all() for value in warm_start.head.values()):
        raise CheckpointError(f"the head in {source} has values that are not finite numbers. Use another checkpoint.")
    numbers = [number for number, layer in enumerate(expected) if isinstance(layer, nn.Linear)]
    return [_matrix(warm_start.head[f"{n}.weight"], warm_start.head[f"{n}.bias"]) for n in numbers]


def _matrix(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight.float(), bias.float()[:, None]], dim=1)


def _set(layer: nn.Linear, matrix: Tensor) -> None:
    layer.weight.copy_(matrix[:, :-1])
    layer.bias.copy_(matrix[:, -1])


def _take_over_rows(layer: nn.Linear, net: Classifier, output: Tensor, spec: ClassifierSpec) -> list[str]:
    """Set the rows of the last layer that belong to classes of the other run, and return these classes."""
    rows = dict(zip(spec.classes, _rows_of_classes(output, spec, net.task == "multilabel"), strict=True))
    known = [name for name in net.classes if name in rows]
    matrix = _matrix(layer.weight, layer.bias)
    if net.num_logits == len(net.classes):
        for number, name in enumerate(net.classes):
            matrix[number] = rows.get(name, matrix[number])
    elif len(known) == len(net.classes):
        matrix[0] = rows[net.classes[1]] - rows[net.classes[0]]
    else:
        return []  # one logit tells two classes apart, of which one is new
    _set(layer, matrix)
    return known


def _rows_of_classes(output: Tensor, spec: ClassifierSpec, several_labels: bool) -> Tensor:
    """One row of the last layer per class of the other run.

    The logit z of two classes gives the same probabilities as the softmax of (-z/2, z/2) and the sigmoids of (-z, z).
    """
    if len(output) == len(spec.classes):
        return output
    share = 1.0 if several_labels else 0.5
    return torch.cat([-share * output, share * output])


def _log_classes(source: str, classes: Sequence[str], known: Sequence[str], spec: ClassifierSpec) -> None:
    taken, saved = set(known), set(spec.classes)
    new = [name for name in classes if name not in taken]
    gone = [name for name in spec.classes if name not in set(classes)]
    log.info(
        "weights of %s: head: %d of %d classes taken over%s%s",
        source,
        len(known),
        len(classes),
        f"; new: {_listed(new)}" if new else "",
        f"; not in this run: {_listed(gone)}" if gone else "",
    )
    if not known and saved & set(classes) and len(classes) == 2:
        log.info("two classes share one logit, which is new if one of them is")


def _listed(names: Sequence[str]) -> str:
    further = len(names) - CLASSES_SHOWN
    return ", ".join(map(printable, names[:CLASSES_SHOWN])) + (f" and {further} more" if further > 0 else "")


def _warn_of_other_images(source: str, net: Classifier, resize: str, spec: ClassifierSpec) -> None:
    """Warn of another preprocessing than the weights were trained with: allowed, but perhaps not intended."""
    now = {
        "data.image_size": (spec.image_size, net.image_size),
        "data.resize": (spec.resize, resize),
        "model.mean": _rounded(spec.mean, net.mean),
        "model.std": _rounded(spec.std, net.std),
    }
    different = [f"{name} was {before}, is {after}" for name, (before, after) in now.items() if before != after]
    if different:
        log.warning(
            "%s was trained with other images than this run: %s. The same options keep its accuracy.",
            source,
            "; ".join(different),
        )


def _rounded(before: Sequence[float], after: Tensor) -> tuple[list[float], list[float]]:
    """Both as float32 numbers, which is how a network keeps them, with the digits that these have."""
    return [round(value, 5) for value in before], [round(value, 5) for value in after.flatten().tolist()]
