"""One export: load a checkpoint, write each format, compare it with the checkpoint, and publish the files."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import torch

from job import checkpoint, redact, storage
from job.errors import CheckpointError
from job.export import card, equality, images, latency, network, output, torch_program, triton, weights
from job.export.formats import INT8_FILE, LABELS_FILE, ONNX_FILE, PROGRAM_FILE, FormatName, InputKind
from job.export.manifest import Check, ExportManifest, FormatEntry, ModelDescription, Quantization
from job.export.network import ProbabilityNetwork, Run, TrainedModel
from job.monitoring.report.content import ReportContent
from job.monitoring.report.files import read_report
from job.monitoring.report.machine import hardware, versions
from job.predict.predictor import Calibrated, Predictor, load
from job.process import temporary

log = logging.getLogger(__name__)

EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "safetensors")


@dataclass(frozen=True)
class Request:
    """What is exported, and how.

    Attributes:
        checkpoint: a checkpoint file, or a run_dir (its best checkpoint).
        formats: to write.
        input: kind of the networks' input; plain weights always have normalised input.
        data: URI of images to check on and to calibrate with; None: those of the run.
        most_images: images to read of each part.
        most_loss: accuracy that int8 may lose.
        cache: local folder for copies of archives.
        calibrated: whether probabilities are calibrated, as :func:`job.predict.predictor.load` takes it.
    """

    checkpoint: str
    formats: tuple[FormatName, ...]
    input: InputKind
    data: str | None
    most_images: int
    most_loss: float
    cache: Path
    calibrated: Calibrated = "auto"


class Export:
    """Writes the formats of one request into a local folder.

    Args:
        request: what to export.
        folder: local folder of the files.
    """

    def __init__(self, request: Request, folder: Path) -> None:
        self.request, self.folder = request, folder
        uri = checkpoint.resolve(redact.remember(request.checkpoint))
        self.run_dir = run_dir_of(uri)
        predictor = load(uri, device="cpu", calibrated=request.calibrated)
        description = describe(predictor, uri)
        self.model = TrainedModel(
            predictor.net,
            ProbabilityNetwork(predictor.net, predictor.calibrator),
            description,
            predictor.calibrator,
        )
        self.versions = _versions()
        self.images = images.find_images(self.run_dir, request.data, description, request.most_images, request.cache)
        self.pixels = self.images.compared(description.image_size)

    def write(self) -> ExportManifest:
        """Write all files but ``export.json``; returns its content.

        Raises:
            ExportError: a format cannot be written, or differs from the checkpoint.
        """
        model, formats = self.model.description, self.request.formats
        (self.folder / LABELS_FILE).write_text(triton.labels(model.classes), encoding="utf-8")
        entries: list[FormatEntry] = []
        if {"onnx", "int8", "triton"} & set(formats):
            entries += self._onnx_formats()
        if "pt2" in formats:
            path = self.folder / PROGRAM_FILE
            torch_program.write_program(self.model, self.request.input, path)
            entries.append(self._entry("pt2", [path.name], torch_program.runner(path), self.request.input))
        if "weights" in formats:
            files, note = weights.write_weights(self.model, self.folder, self.pixels)
            run = weights.runner(self.folder, model)
            entries.append(self._entry("weights", files, run, "normalised", note=note))
        entries.sort(key=lambda entry: formats.index(entry.format))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        content = ExportManifest(model, entries, [], self._check(), self.versions, created)
        (self.folder / card.FILE).write_text(card.model_card(content, self._report()), encoding="utf-8")
        return msgspec.structs.replace(content, files=output.file_entries(self.folder))

    def _onnx_formats(self) -> list[FormatEntry]:
        # They import the packages of the extra.
        from job.export import int8, onnx_model

        kind, model, entries = self.request.input, self.model.description, []
        float_network = onnx_model.network_graph(self.model)
        graph = onnx_model.complete_graph(float_network, kind, model, self.versions)
        for name, file in (("onnx", ONNX_FILE), ("triton", triton.MODEL)):
            if name in self.request.formats:
                onnx_model.write_graph(graph, self.folder / file)
        if "onnx" in self.request.formats:
            run = onnx_model.runner(self.folder / ONNX_FILE)
            entries.append(self._entry("onnx", [ONNX_FILE], run, kind))
        if "triton" in self.request.formats:
            (self.folder / triton.CONFIG).write_text(triton.config(kind, model), encoding="utf-8")
            (self.folder / triton.LABELS).write_text(triton.labels(model.classes), encoding="utf-8")
            run = onnx_model.runner(self.folder / triton.MODEL)
            entries.append(self._entry("triton", [triton.CONFIG, triton.LABELS, triton.MODEL], run, kind))
        if "int8" in self.request.formats:
            scratch = temporary.folder("int8")
            try:
                small = int8.quantized(float_network, self.model, self.images.train, scratch)
            finally:
                temporary.remove(scratch)
            graph = onnx_model.complete_graph(small, kind, model, self.versions)
            onnx_model.write_graph(graph, self.folder / INT8_FILE)
            run = onnx_model.runner(self.folder / INT8_FILE)
            count = min(len(self.images.train.pixels), int8.CALIBRATION_IMAGES) if self.images.train else 0
            loss = int8.accuracy_loss(run, self.model, kind, self.images.val, count, self.request.most_loss)
            onnx_model.add_metadata(graph, {"quantization": msgspec.json.encode(loss).decode()})
            onnx_model.write_graph(graph, self.folder / INT8_FILE)
            entries.append(self._entry("int8", [INT8_FILE], run, kind, quantization=loss))
        return entries

    def _entry(
        self,
        name: FormatName,
        files: list[str],
        run: Run,
        kind: InputKind,
        *,
        quantization: Quantization | None = None,
        note: str = "",
    ) -> FormatEntry:
        """Compare and time a format."""
        if quantization is None:
            largest = equality.require_equal(run, self.model, kind, self.pixels, name)
        else:
            largest = equality.difference(run, self.model, kind, self.pixels)
        resized, changed = None, None
        if kind == "image" and self.images.files and quantization is None:
            resized, changed = equality.resize_difference(run, self.model, self.images.files)
        speed = latency.measure(run, self.model.input_of(self.pixels[:1], kind))
        log.info("%s: a probability differs from the checkpoint's by at most %.2g", name, largest)
        return FormatEntry(
            format=name,
            files=files,
            input=kind,
            bytes=sum((self.folder / file).stat().st_size for file in files),
            difference=largest,
            tolerance=equality.TOLERANCE if quantization is None else None,
            resize_difference=resized,
            changed_labels=changed,
            milliseconds=speed.milliseconds,
            images_per_second=speed.images_per_second,
            quantization=quantization,
            note=note,
        )

    def _check(self) -> Check:
        def run(batch: network.Array) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            return self.model.probabilities(torch.from_numpy(batch).permute(0, 3, 1, 2))

        speed = latency.measure(run, self.model.input_of(self.pixels[:1], "resized"))
        machine = hardware()
        return Check(
            images=self.images.origin,
            compared=len(self.pixels),
            threads=torch.get_num_threads(),
            processor=machine.cpu,
            batch_size=latency.BATCH_SIZE,
            checkpoint_milliseconds=speed.milliseconds,
            checkpoint_images_per_second=speed.images_per_second,
        )

    def _report(self) -> ReportContent | None:
        if self.run_dir is None:
            return None
        try:
            return read_report(self.run_dir)
        except CheckpointError as error:
            log.warning("the model card has no metrics: %s", error)
            return None


def describe(predictor: Predictor, uri: str) -> ModelDescription:
    """The description of a checkpoint's network."""
    net = predictor.net
    return ModelDescription(
        backbone=net.name,
        hidden=list(net.hidden),
        pooling=net.pooling,
        task=net.task,
        classes=list(net.classes),
        thresholds=list(predictor.thresholds) if net.task == "multilabel" else [],
        image_size=net.image_size,
        resize=predictor.resize,
        mean=_channels(net.mean),
        std=_channels(net.std),
        checkpoint=storage.basename(uri),
        checkpoint_sha256=checkpoint.sha256(uri),
        calibration="none" if predictor.calibrator is None else predictor.calibrator.method,
    )


def run_dir_of(uri: str) -> str | None:
    """The run_dir of a checkpoint file; None where it lies outside of one."""
    folder, _ = storage.split(uri)
    parent, name = storage.split(folder)
    return parent if name == checkpoint.FOLDER else None


def _channels(values: torch.Tensor) -> tuple[float, float, float]:
    red, green, blue = values.flatten().tolist()
    return red, green, blue


def _versions() -> dict[str, str]:
    releases = versions()
    for name in EXPORT_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            releases[name] = metadata.version(name)
    return releases
