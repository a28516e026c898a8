"""Reading of files: pretrained weights, and a LightningModule from its checkpoint."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from job import checkpoint, storage
from job.checkpoint.state import CLASSIFIER_KEY
from job.errors import CheckpointError, ConfigError, WeightsError
from job.model.calibrator import read_calibrator
from job.model.classifier import from_spec
from job.model.config import ModelConfig
from job.model.spec import ClassifierSpec, decode_spec, net_state
from job.model.weights import PretrainedWeights
from job.model.weights_config import read_weights_config
from job.storage.tensor_file import load_tensors, printable

if TYPE_CHECKING:
    from job.model.module import TransferLearningModel

log = logging.getLogger(__name__)

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".safetensors")
EMA_SECTIONS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
SECTIONS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "backbone", "weights")
MAX_DEPTH = 4

Module = TypeVar("Module", bound="TransferLearningModel")


def read_pretrained(weights: str) -> str | PretrainedWeights:
    """Read ``--model.weights`` if it is a URI; DEFAULT and none are returned as they are."""
    return weights if weights in ("DEFAULT", "none") else read_weights(weights)


def read_weights(uri: str) -> PretrainedWeights:
    """Read a file of tensors; pickled code is never run.

    Args:
        uri: a .pth, .ckpt or .safetensors file, or a run_dir of this job (its best checkpoint).

    Raises:
        WeightsError: the file holds no state dict of tensors.
        CheckpointError: the run_dir holds no checkpoint, or a damaged one.
        StorageError: it cannot be read.
    """
    file = weights_file(uri)
    if _is_checkpoint(file):
        loaded: Any = checkpoint.load(file)
        classifier = decode_spec(loaded[CLASSIFIER_KEY], uri)
    else:
        config = read_weights_config(file)  # first, since it is small
        if config is not None and config.interpolation not in (None, "bilinear"):
            log.info(
                "%s: the weights were trained with %s interpolation; images are resized by bilinear interpolation",
                printable(config.uri),
                printable(config.interpolation),
            )
        return PretrainedWeights(uri, _state_dict(load_tensors(storage.read_bytes(file), file), file), None, config)
    return PretrainedWeights(uri, _state_dict(loaded, file), classifier)


def saved_spec(file: str) -> ClassifierSpec | None:
    """Description of the network in a file of weights, if it is a checkpoint of this job.

    Raises:
        CheckpointError: it is damaged.
        StorageError: it cannot be read.
    """
    if not _is_checkpoint(file):
        return None
    return decode_spec(checkpoint.load(file)[CLASSIFIER_KEY], file)


def _is_checkpoint(file: str) -> bool:
    return file.endswith(checkpoint.SUFFIX) and storage.exists(checkpoint.manifest_uri(file))


def weights_file(uri: str) -> str:
    """The file that ``--model.weights`` refers to.

    Raises:
        CheckpointError: the run_dir holds no checkpoint.
        StorageError: there is no such file or folder.
    """
    if uri.lower().endswith(FILE_SUFFIXES):
        return uri
    if uri.rstrip("/").endswith((f"/{checkpoint.FOLDER}/best", f"/{checkpoint.FOLDER}/last")):
        return checkpoint.resolve(uri)
    return checkpoint.resolve(uri) if storage.info(uri.rstrip("/")).get("type") == "directory" else uri


def _state_dict(loaded: Any, uri: str) -> dict[str, Tensor]:
    """Find the state dict in the sections of a training script's checkpoint, EMA weights first."""
    path: list[str] = []
    for _ in range(MAX_DEPTH):
        if not isinstance(loaded, Mapping) or not all(isinstance(key, str) for key in loaded):
            break
        sections = [name for name in (*EMA_SECTIONS, *SECTIONS) if _has_tensors(loaded.get(name))]
        if loaded and not sections and all(isinstance(value, Tensor) for value in loaded.values()):
            if path:
                log.info("weights %s: taken from its section %s", uri, ".".join(path))
            return plain_tensors(loaded, uri)
        if not sections:
            break
        if len(sections) > 1:
            chosen = "the EMA weights, " if sections[0] in EMA_SECTIONS else ""
            log.info("weights %s: of the sections %s, %s%s is used", uri, ", ".join(sections), chosen, sections[0])
        path.append(sections[0])
        loaded = loaded[sections[0]]
    where = f" in its section {'.'.join(path)}" if path else ""
    raise WeightsError(
        f"{uri} holds no state dict{where}: a mapping of names to tensors is expected. Save model.state_dict() with "
        "torch.save, or as .safetensors."
    )


def _has_tensors(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a section is a state dict, or contains one."""
    if not isinstance(value, Mapping) or depth == 0:
        return False
    if any(isinstance(tensor, Tensor) for tensor in value.values()):
        return True
    return any(_has_tensors(value.get(name), depth - 1) for name in (*EMA_SECTIONS, *SECTIONS))


def plain_tensors(state: Mapping[str, Tensor], uri: str) -> dict[str, Tensor]:
    """The state dict, whose tensors are dense ones on the CPU.

    Raises:
        WeightsError: one is not.
    """
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise WeightsError(
                f"{uri}: {printable(name)} is no ordinary dense tensor. Save the weights as dense tensors."
            )
    return dict(state)


def restore_module(cls: type[Module], uri: str, device: torch.device, overrides: Mapping[str, Any]) -> Module:
    """Implement :meth:`TransferLearningModel.load_from_checkpoint`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    uri = checkpoint.resolve(uri)
    saved = checkpoint.load(uri)
    spec = decode_spec(saved[CLASSIFIER_KEY], uri)
    net = from_spec(saved[CLASSIFIER_KEY], net_state(saved, uri), source=uri, device_type=device.type)
    parameters = {each.name for each in fields(ModelConfig)} | set(inspect.signature(cls.__init__).parameters)
    hyperparameters = saved.get("hyper_parameters")
    arguments = {**(hyperparameters if isinstance(hyperparameters, Mapping) else {}), **overrides}
    described = {
        "task": spec.task,
        "backbone": spec.backbone,
        "hidden": spec.hidden,
        "pooling": spec.pooling,
        "mean": spec.mean,
        "std": spec.std,
    }
    try:
        module = cls(**{**{name: value for name, value in arguments.items() if name in parameters}, **described})
    except (TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"the hyperparameters of {uri} cannot be used: {printable(str(error))}") from error
    module.net = net
    module.resize = spec.resize
    module.metrics = module.task.make_metrics(spec.classes)
    module.metrics.restore(spec)
    module.metrics.calibrator = read_calibrator(saved, uri, len(spec.classes), spec.task)
    module.train(module.training)
    return module.to(device)
