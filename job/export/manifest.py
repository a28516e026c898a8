"""``export.json``: what an export contains and how it was checked. It is written last, and makes the export whole."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from job import typed
from job.errors import CheckpointError
from job.export.formats import FormatName, InputKind
from job.model.pooling import Pooling
from job.model.spec import Channels, ClassName, TaskName
from job.storage.format_version import MALFORMED

FILE = "export.json"
FORMAT = 1

Count = Annotated[int, Meta(ge=0, lt=2**53)]
Text = Annotated[str, Meta(max_length=65_536)]
RelativePath = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*){0,4}\Z")]
"""Path of a file below the export's folder; no part of it begins with a dot."""


class ModelDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The exported model: labels, preprocessing and origin.

    Attributes:
        backbone: architecture: a name of torchvision.models, or timm/NAME.
        hidden: widths of the head's hidden layers.
        task: "classification" if an image has exactly one class, "multilabel" if any number of them.
        classes: class names, in the order of the output.
        thresholds: of a multilabel network: probability of each class from which it is predicted.
        image_size: height and width that the network sees, in pixels.
        resize: how images are made square: "squash" ignores the aspect ratio, "crop" resizes the shorter side and takes
            the centre. Bilinear, antialiased.
        mean: per channel, of images in [0, 1].
        std: per channel.
        checkpoint: file name of the checkpoint.
        checkpoint_sha256: its SHA-256, in hexadecimal.
        calibration: how probabilities are calibrated: by a temperature, by Platt scaling of each class, or not at all.
            Thresholds are those of the calibrated probabilities.
        pooling: of a vision transformer's tokens; "auto" is the architecture's own.
    """

    backbone: Text
    hidden: list[int]
    task: TaskName
    classes: list[ClassName]
    thresholds: list[float]
    image_size: int
    resize: Literal["squash", "crop"]
    mean: Channels
    std: Channels
    checkpoint: Text
    checkpoint_sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    calibration: Literal["none", "temperature", "platt"] = "none"
    pooling: Pooling = "auto"


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the export.

    Attributes:
        path: below the export's folder.
        bytes: size.
        sha256: SHA-256, in hexadecimal.
    """

    path: RelativePath
    bytes: Count
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Accuracy of an int8 network against that of the checkpoint, on the same validation images.

    Attributes:
        calibration_images: training images from which the ranges of activations were taken.
        validation_images: validation images with a label; 0: the loss was not measured.
        metric: "accuracy", or "micro_f1" for multilabel.
        checkpoint: value of the checkpoint's network; None without validation images.
        int8: value of the int8 network.
        loss: difference of both.
        limit: largest loss that the export accepts.
    """

    calibration_images: Count
    validation_images: Count
    metric: Literal["accuracy", "micro_f1"]
    checkpoint: float | None
    int8: float | None
    loss: float | None
    limit: float


class FormatEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One format of the export, measured on the machine that exported.

    Attributes:
        format: its name.
        files: paths below the export's folder.
        input: kind of the input.
        bytes: size of the files.
        difference: largest difference between its probabilities and the checkpoint's, for the same resized pixels.
        tolerance: largest difference that the export accepts; None for int8, see ``quantization``.
        resize_difference: the same for whole images that the format resizes itself, decoded in full; None where it does
            not resize, or where there are no image files.
        changed_labels: share of those images whose most probable class changes.
        milliseconds: median time of one image that is resized already.
        images_per_second: in batches of ``batch_size``.
        quantization: accuracy of int8.
        note: what a user of the files has to know.
    """

    format: FormatName
    files: list[RelativePath]
    input: InputKind
    bytes: Count
    difference: float
    tolerance: float | None
    resize_difference: float | None
    changed_labels: float | None
    milliseconds: float
    images_per_second: float
    quantization: Quantization | None = None
    note: Text = ""


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the formats were compared with the checkpoint and timed.

    Attributes:
        images: origin of the images: of the run, from ``--data``, or generated where there were none.
        compared: images that the outputs were compared on.
        threads: CPU threads.
        processor: model of the CPU.
        batch_size: images per batch of ``images_per_second``.
        checkpoint_milliseconds: median time of one image, of the checkpoint's network in PyTorch.
        checkpoint_images_per_second: in batches.
    """

    images: Literal["run", "data", "generated"]
    compared: Count
    threads: Count
    processor: Text
    batch_size: Count
    checkpoint_milliseconds: float
    checkpoint_images_per_second: float


class ExportManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``export.json``.

    Attributes:
        model: labels, preprocessing and origin.
        formats: one entry per format.
        files: all other files of the export.
        check: how the formats were compared and timed.
        versions: of packages.
        created: ISO 8601 time.
        format: version of this format.
    """

    model: ModelDescription
    formats: list[FormatEntry]
    files: list[FileEntry]
    check: Check
    versions: dict[Text, Text]
    created: Text
    format: Annotated[int, Meta(ge=1)] = FORMAT


class _Listed(msgspec.Struct):
    """The part of any version of ``export.json`` from which an overwrite learns the earlier files."""

    files: Annotated[list[FileEntry], Meta(max_length=10_000)]


def listed_files(uri: str, content: bytes) -> list[str]:
    """Paths of the files that the ``export.json`` at ``uri`` lists.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return [entry.path for entry in typed.from_json(content, _Listed).files]
    except MALFORMED as error:
        raise CheckpointError(f"{uri} is damaged: {error}. Choose another --output.") from error
