"""``config.json`` beside a file of weights, as timm writes it to the Hugging Face Hub: images of the pretraining."""

from __future__ import annotations

import logging
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from job import storage, typed
from job.errors import DataError, StorageError, StorageOutage, WeightsError
from job.model.spec import MAX_IMAGE_SIZE, Channels
from job.storage.format_version import MALFORMED
from job.storage.tensor_file import printable

log = logging.getLogger(__name__)

FILE = "config.json"
SUFFIXES = (".safetensors", ".bin")
"""Suffixes of weights that have a config.json on the Hugging Face Hub."""
MAX_BYTES = 16 << 20
"""Those with the names and descriptions of 21,841 classes have 3 MB."""

Mean = Annotated[float, Meta(ge=0, le=1)]
Std = Annotated[float, Meta(gt=0, le=10)]
Side = Annotated[int, Meta(ge=1, le=MAX_IMAGE_SIZE)]
Name = Annotated[str, Meta(max_length=200)]


class WeightsConfig(NamedTuple):
    """The images that weights were trained with; None where the file does not say.

    Attributes:
        uri: the file.
        architecture: timm's name, without the tag of the weights.
        mean: per channel, of images in [0, 1].
        std: per channel.
        image_size: height and width, in pixels.
        interpolation: of resizing, for example "bicubic".
    """

    uri: str
    architecture: str | None
    mean: Channels | None
    std: Channels | None
    image_size: int | None
    interpolation: str | None

    def belongs_to(self, backbone: str) -> bool:
        """Whether it describes weights of this architecture (a name of torchvision.models, or timm/NAME)."""
        if self.architecture is None:
            return True
        return backbone.rpartition("/")[2].partition(".")[0] == self.architecture.partition(".")[0]


class _Images(msgspec.Struct, frozen=True):
    """``pretrained_cfg`` of timm, or ``preprocessing`` of an export of a torchvision network."""

    mean: tuple[Mean, Mean, Mean] | None = None
    std: tuple[Std, Std, Std] | None = None
    input_size: tuple[Side, Side, Side] | None = None
    image_size: Side | None = None
    interpolation: Name | None = None


class _Nested(msgspec.Struct, frozen=True):
    architecture: Name | None = None
    pretrained_cfg: _Images | None = None
    preprocessing: _Images | None = None


def read_weights_config(weights: str) -> WeightsConfig | None:
    """Read the config.json beside a file of weights.

    Args:
        weights: URI of the file.

    Returns:
        None if there is none that describes images, or if it cannot be read.

    Raises:
        WeightsError: it is damaged, or a value is out of its range.
        StorageOutage: the bucket is in trouble.
    """
    if not weights.lower().endswith(SUFFIXES):
        return None
    uri = storage.join(storage.split(weights)[0], FILE)
    try:
        content = storage.read_bounded(uri, MAX_BYTES)
    except storage.NotFound:
        return None
    except StorageOutage:
        raise
    except (StorageError, DataError) as error:
        log.warning("%s is not used: %s", uri, error)
        return None
    try:
        return _decode(uri, content)
    except MALFORMED as error:
        raise WeightsError(
            f"{uri}, beside the weights, is invalid: {printable(str(error))}. Correct or remove the file."
        ) from error


def _decode(uri: str, content: bytes) -> WeightsConfig | None:
    nested = typed.from_json(content, _Nested)
    images = nested.pretrained_cfg or nested.preprocessing
    if images is None:
        if nested.architecture is None:  # of another library: a field with one of these names may mean something else
            return None
        images = typed.from_json(content, _Images)  # the format of early versions of timm
    size = images.image_size
    if images.input_size is not None and images.input_size[1] == images.input_size[2]:
        size = images.input_size[1]
    return WeightsConfig(uri, nested.architecture, images.mean, images.std, size, images.interpolation)
