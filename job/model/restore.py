"""Restore a LightningModule, with its hyperparameters, from a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from job import checkpoint
from job.checkpoint.state import CLASSIFIER_KEY
from job.errors import CheckpointError, ConfigError
from job.model.classifier import from_spec
from job.model.config import ModelConfig
from job.model.metrics import EvaluationMetrics
from job.model.spec import decode_spec, net_state
from job.storage.tensor_file import printable

if TYPE_CHECKING:
    from job.model.module import TransferLearningModel

Module = TypeVar("Module", bound="TransferLearningModel")


def restore_module(cls: type[Module], uri: str, device: torch.device, overrides: Mapping[str, Any]) -> Module:
    """Implement :meth:`TransferLearningModel.load_from_checkpoint`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    uri = checkpoint.resolve(uri)
    saved = checkpoint.load(uri)
    spec = decode_spec(saved[CLASSIFIER_KEY], uri)
    net = from_spec(saved[CLASSIFIER_KEY], net_state(saved, uri), source=uri, device_type=device.type)
    known = {each.name for each in fields(ModelConfig)} | set(inspect.signature(cls.__init__).parameters)
    hyperparameters = saved.get("hyper_parameters")
    arguments = {**(hyperparameters if isinstance(hyperparameters, Mapping) else {}), **overrides}
    described = {"backbone": spec.backbone, "hidden": spec.hidden, "mean": spec.mean, "std": spec.std}
    try:
        module = cls(**{**{name: value for name, value in arguments.items() if name in known}, **described})
    except (TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"the hyperparameters of {uri} cannot be used: {printable(str(error))}") from error
    module.net = net
    module.resize = spec.resize
    module.metrics = EvaluationMetrics(spec.classes)
    module.train(module.training)
    return module.to(device)
