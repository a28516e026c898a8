"""The network: normalisation, backbone and head; from images to logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from job.errors import CheckpointError, ConfigError
from job.model.backbone import build_backbone, build_skeleton, feature_width
from job.model.head import build_head
from job.model.memory_format import memory_format
from job.model.normalisation import complete_normalisation
from job.model.pooling import Pooling
from job.model.spec import FORMAT, ClassifierSpec, TaskName, decode_spec, require_state
from job.model.sync_batchnorm import restore_norms, special_norms
from job.model.weights import PretrainedWeights, versioned

if TYPE_CHECKING:
    # It imports Lightning, which prediction does without.
    from job.model.config import ModelConfig

TTA = Literal["none", "hflip"]
"""Test-time augmentation: none, or the mean over an image and its horizontal flip."""


class Classifier(nn.Module):
    """A backbone with a new head for ``classes``.

    Two classes share one logit (binary cross-entropy; the probability of the second class), more have one logit each,
    and so have those of multi-label classification.

    Args:
        backbone: from normalised images to features.
        name: the backbone's architecture.
        classes: class names, in the order of labels.
        hidden: widths of the head's hidden layers, each followed by ReLU.
        image_size: height and width of images, in pixels.
        mean: per-channel mean of the pretraining images, in [0, 1].
        std: per-channel standard deviation of the pretraining images.
        features: width of the backbone's output. Default: measured by running the backbone.
        device_type: type of the device that computes, which the memory layout depends on.
        task: "multilabel" if an image may have several classes.
        pooling: that of the backbone.
        dropout: of the inputs of each of the head's linear layers, in training.

    Raises:
        ConfigError: the backbone does not take images of this size.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        classes: Sequence[str],
        hidden: Sequence[int],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        features: int | None = None,
        device_type: str = "cpu",
        task: TaskName = "classification",
        dropout: float = 0.0,
        pooling: Pooling = "auto",
    ) -> None:
        super().__init__()
        self.name = name
        self.task = task
        self.pooling = pooling
        self.classes = tuple(classes)
        self.hidden = tuple(hidden)
        self.image_size = image_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(list(mean)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(3, 1, 1))
        try:
            decode_spec(self.spec(), "this run")  # a checkpoint of this network must be loadable
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        self.memory_format = memory_format(name, backbone, device_type)
        self._special_norms = special_norms(backbone)
        self.backbone = backbone.to(memory_format=self.memory_format)
        if features is None:
            features = feature_width(backbone, image_size)
        self.head = build_head(features, hidden, self.num_logits, dropout)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Set a child module; torch's conversion to SyncBatchNorm calls this, and its result is corrected."""
        super().add_module(
            name, restore_norms(module, self._special_norms) if name == "backbone" and module else module
        )

    @property
    def num_logits(self) -> int:
        """Width of the output: 1 for two classes of which an image has one."""
        return num_logits(len(self.classes), self.task)

    @property
    def backbone_trains(self) -> bool:
        """Whether any parameter of the backbone requires a gradient."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to logits, float [B, num_logits]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to features [B, F], with a graph only if a part of the backbone trains."""
        normalised = (images.float() / 255 - self.mean) / self.std
        with torch.set_grad_enabled(self.backbone_trains and torch.is_grad_enabled()):
            features: Tensor = self.backbone(normalised.contiguous(memory_format=self.memory_format))
        return features

    def spec(self) -> dict[str, Any]:
        """Describe this network by plain values, from which :func:`from_spec` builds it again."""
        task: dict[str, Any] = {"task": self.task} if self.task != "classification" else {}
        pooling = {"pooling": self.pooling} if self.pooling != "auto" else {}
        return {
            "format": FORMAT if pooling else 2 if task else 1,  # so that earlier versions read what they know
            "backbone": self.name,
            "classes": list(self.classes),
            "hidden": list(self.hidden),
            "image_size": self.image_size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            **task,
            **pooling,
        }


def build_classifier(
    config: ModelConfig,
    weights: str | PretrainedWeights,
    *,
    classes: Sequence[str],
    image_size: int,
    device_type: str,
) -> Classifier:
    """Build the network of a run.

    Args:
        config: the hyperparameters.
        weights: pretrained weights, as for :func:`~job.model.backbone.build_backbone`.
        classes: class names, in the order of labels.
        image_size: height and width of images, in pixels.
        device_type: type of the device that computes.

    Raises:
        ConfigError: there is no such backbone, or it does not take images of this size.
        WeightsError: the weights cannot be downloaded, or belong to another architecture.
    """
    # In host memory, by the host's generator: initial weights do not depend on the accelerator.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_backbone(config.backbone, weights, image_size, config.pooling)
        mean, std = complete_normalisation(config.mean, config.std, config.backbone, weights)
        return Classifier(
            backbone,
            name=config.backbone,
            classes=classes,
            hidden=config.hidden,
            image_size=image_size,
            mean=mean,
            std=std,
            device_type=device_type,
            task=config.task,
            dropout=config.dropout,
            pooling=config.pooling,
        )


def from_spec(
    saved: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
    *,
    source: str = "the checkpoint",
    device_type: str = "cpu",
) -> Classifier:
    """Build the network that :meth:`Classifier.spec` describes.

    Args:
        saved: the description, untrusted.
        state: state dict, compared with the description before memory is allocated. Default: random weights.
        source: URI of the checkpoint, for messages.
        device_type: type of the device that computes.

    Raises:
        CheckpointError: the description is damaged, or ``state`` belongs to another network.
    """
    spec = decode_spec(saved, source)
    try:
        skeleton = build_skeleton(spec.backbone, spec.image_size, spec.pooling)
        features = None
        if state is not None:
            features = _width_without_memory(skeleton, spec.image_size)
            require_state(state, _shapes(skeleton, spec, features or _head_input(state)), source)
        net = Classifier(
            build_backbone(spec.backbone, image_size=spec.image_size, pooling=spec.pooling),
            name=spec.backbone,
            classes=spec.classes,
            hidden=spec.hidden,
            image_size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
            features=features,
            device_type=device_type,
            task=spec.task,
            pooling=spec.pooling,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if state is not None:
        require_state(state, {name: tuple(value.shape) for name, value in net.state_dict().items()}, source)
        try:
            net.load_state_dict(versioned(state, net))
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"the tensors of {source} cannot be used: {reason}") from error
    return net


def _width_without_memory(skeleton: nn.Module, image_size: int) -> int | None:
    """Features per image; None if the architecture does not run on the meta device, or not with this size."""
    try:
        return feature_width(skeleton, image_size)
    except ConfigError:
        return None


def _head_input(state: Mapping[str, Tensor]) -> int:
    """Features per image that the head in a state dict expects."""
    first = state.get("head.0.weight")
    return int(first.shape[1]) if isinstance(first, Tensor) and first.ndim == 2 else 1


def _shapes(skeleton: nn.Module, spec: ClassifierSpec, features: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a classifier's state dict."""
    with torch.device("meta"):
        head = build_head(features, spec.hidden, logits=num_logits(len(spec.classes), spec.task))
    parts = {"backbone.": skeleton.state_dict(), "head.": head.state_dict()}
    shapes = {prefix + name: tuple(value.shape) for prefix, part in parts.items() for name, value in part.items()}
    return {"mean": (3, 1, 1), "std": (3, 1, 1), **shapes}


def num_logits(classes: int, task: TaskName) -> int:
    """Width of the output: 1 for two classes of which an image has one."""
    return 1 if classes == 2 and task == "classification" else classes


def mean_over_flips(net: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, num_logits] of images [B, 3, S, S], averaged over horizontal flips."""
    logits: Tensor = (net(images) + net(images.flip(-1))) / 2
    return logits
