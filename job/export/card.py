"""The model card: ``README.md`` with the front matter of Hugging Face, written from the run's report.

The report, the names of classes among it, is data of others: it is bounded, and escaped by :mod:`job.export.markdown`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from job.export import weights
from job.export.formats import INT8_FILE, ONNX_FILE, PROGRAM_FILE, FormatName
from job.export.manifest import Check, ExportManifest, FormatEntry, ModelDescription
from job.export.markdown import escaped
from job.model.backbone import TIMM
from job.monitoring.report.content import CheckpointEntry, ReportContent
from job.monitoring.report.text import METRICS, number, percent, size

FILE = "README.md"
MOST_CLASSES = 100
"""Classes that the card lists."""


def model_card(manifest: ExportManifest, report: ReportContent | None) -> str:
    """The text of the card.

    Args:
        manifest: the export.
        report: of the run; None where there is none.
    """
    checkpoint = measured_checkpoint(manifest.model, report)
    sections = [
        f"# {escaped(_title(manifest.model))}",
        _introduction(manifest),
        _use(manifest),
        _formats(manifest.formats, manifest.check),
        _metrics(checkpoint),
        _classes(manifest.model, report if _is_best(checkpoint, report) else None),
        _training(report),
        _limits(manifest.model),
    ]
    body = "\n\n".join(section for section in sections if section)
    front = yaml.safe_dump(front_matter(manifest, report), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n{body}\n"


def front_matter(manifest: ExportManifest, report: ReportContent | None) -> dict[str, Any]:
    """The metadata that Hugging Face reads (https://huggingface.co/docs/hub/model-cards)."""
    checkpoint = measured_checkpoint(manifest.model, report)
    model, formats = manifest.model, {entry.format for entry in manifest.formats}
    values: dict[str, Any] = {
        "license": "unknown",
        "library_name": _library(model, formats),
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *(["multi-label"] if model.task == "multilabel" else []), *_tags(formats)],
    }
    if base := _base_model(model, report):
        values["base_model"] = base
    metrics = {} if checkpoint is None else _shown(checkpoint)
    if metrics:
        values["metrics"] = ["f1" if model.task == "multilabel" else "accuracy"]
        results = [{"type": name, "value": round(value, 6), "name": name} for name, value in metrics.items()]
        values["model-index"] = [
            {
                "name": _title(model),
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "validation images of the training run", "type": "private"},
                        "metrics": results,
                    }
                ],
            }
        ]
    return values


def measured_checkpoint(model: ModelDescription, report: ReportContent | None) -> CheckpointEntry | None:
    """The report's entry of the exported checkpoint; None where it has none."""
    if report is None or report.checkpoints is None:
        return None
    entries = (report.checkpoints.best, report.checkpoints.last)
    return next((entry for entry in entries if entry.sha256 == model.checkpoint_sha256), None)


def _base_model(model: ModelDescription, report: ReportContent | None) -> str | None:
    """The repository of timm's own pretrained weights, where the run started from them; None for others."""
    options = report.configuration.get("model") if report is not None else None
    if not model.backbone.startswith(TIMM) or not isinstance(options, dict) or options.get("weights") != "DEFAULT":
        return None
    import timm

    pretrained = timm.get_pretrained_cfg(model.backbone.removeprefix(TIMM))
    return pretrained.hf_hub_id if pretrained is not None else None


def _is_best(checkpoint: CheckpointEntry | None, report: ReportContent | None) -> bool:
    return report is not None and report.checkpoints is not None and checkpoint == report.checkpoints.best


def _title(model: ModelDescription) -> str:
    return f"{model.backbone.removeprefix(TIMM)} for {len(model.classes)} classes"


def _library(model: ModelDescription, formats: set[FormatName]) -> str:
    if "weights" in formats and model.backbone.startswith(TIMM):
        return "timm"
    return "onnx" if formats & {"onnx", "int8", "triton"} else "pytorch"


def _tags(formats: set[FormatName]) -> list[str]:
    tags = ["onnx"] if formats & {"onnx", "int8", "triton"} else []
    return [*tags, *(name for name in ("pt2", "int8", "triton") if name in formats)]


def _shown(checkpoint: CheckpointEntry) -> dict[str, float]:
    values = {name: checkpoint.metrics.get(f"val/{name}") for name in METRICS}
    return {name: value for name, value in values.items() if value is not None}


def _introduction(manifest: ExportManifest) -> str:
    model = manifest.model
    kind = "any number of" if model.task == "multilabel" else "exactly one of"
    return (
        f"An image classifier: an image has {kind} the {len(model.classes)} classes below. Architecture "
        f"{escaped(model.backbone)}; input {model.image_size} x {model.image_size} pixels. The output is the "
        f"probability of each class, {_CALIBRATION[model.calibration]}."
    )


_CALIBRATION = {
    "none": "which was not calibrated after training",
    "temperature": "calibrated by temperature scaling on the validation images",
    "platt": "calibrated by Platt scaling of each class on the validation images",
}


def _use(manifest: ExportManifest) -> str:
    model, entries = manifest.model, {entry.format: entry for entry in manifest.formats}
    parts = ["## Use", _preprocessing(model)]
    if entry := entries.get("onnx") or entries.get("int8"):
        name = ONNX_FILE if entry.format == "onnx" else INT8_FILE
        parts.append(_code(_ONNX.format(file=name, image=_image_code(entry, model))))
    if entry := entries.get("pt2"):
        parts.append(_code(_PROGRAM.format(file=PROGRAM_FILE, image=_image_code(entry, model))))
    if entry := entries.get("weights"):
        if model.backbone.startswith(TIMM) and len(entry.files) == 2:
            parts.append(_code(_TIMM))
        else:
            parts.append(f"`{weights.CONFIG}` names the architecture and its arguments.")
        parts.append(f"Weights: {entry.note}.")
    if "triton" in entries:
        parts.append("`tritonserver --model-repository=triton` serves the folder `triton`, with dynamic batching.")
    return "\n\n".join(parts)


def _preprocessing(model: ModelDescription) -> str:
    size = model.image_size
    how = (
        f"resized to {size} x {size} without regard to the aspect ratio"
        if model.resize == "squash"
        else f"resized so that the shorter side has {size} pixels, and cropped to the centre"
    )
    return (
        f"Preprocessing: RGB, upright by EXIF orientation, transparency on white; {how}, bilinear and antialiased (as "
        f"Pillow's `BILINEAR`); scaled to 0..1; mean {_numbers(model.mean)}, standard deviation {_numbers(model.std)}. "
        "An input of kind `image` or `resized` has RGB pixels, uint8, `[batch, height, width, 3]`, and the network "
        "does what follows itself. Labels, thresholds and the kind of each input are in `export.json`."
    )


def _formats(entries: Sequence[FormatEntry], check: Check) -> str:
    rows = [
        [
            entry.format,
            ", ".join(f"`{path}`" for path in entry.files[:4]),
            entry.input,
            size(entry.bytes),
            f"{entry.milliseconds:.1f} ms",
            f"{entry.images_per_second:.0f}",
            f"{entry.difference:.1g}",
        ]
        for entry in entries
    ]
    heading = ["Format", "Files", "Input", "Size", "One image", "Images/s", "Largest difference"]
    lines = [
        "## Formats",
        _table(heading, rows),
        (
            f"Measured on {check.threads} threads of {escaped(check.processor)}, images per second in batches of "
            f"{check.batch_size}. The difference is that of a probability from the checkpoint's, on {check.compared} "
            f"{'generated images' if check.images == 'generated' else 'images'}."
        ),
    ]
    lines += [f"int8: {_loss(entry)}" for entry in entries if entry.format == "int8" and entry.quantization is not None]
    return "\n\n".join(lines)


def _loss(entry: FormatEntry) -> str:
    result = entry.quantization
    assert result is not None
    if result.loss is None:
        return "its loss of accuracy was not measured."
    return (
        f"{result.metric.replace('_', ' ')} {number(result.int8)} on {result.validation_images} validation images, "
        f"where the checkpoint has {number(result.checkpoint)}: a loss of {number(result.loss)}."
    )


def _metrics(checkpoint: CheckpointEntry | None) -> str:
    if checkpoint is None or not (metrics := _shown(checkpoint)):
        return "## Evaluation\n\nThere is no report of this checkpoint's validation."
    rows = [[name, number(value)] for name, value in metrics.items()]
    return "## Evaluation\n\nOn the validation images of the training run:\n\n" + _table(["Metric", "Value"], rows)


def _classes(model: ModelDescription, report: ReportContent | None) -> str:
    by_name = {} if report is None else {entry.name: entry for entry in report.per_class}
    rows = []
    for place, name in enumerate(model.classes[:MOST_CLASSES]):
        entry = by_name.get(name)
        values = [percent(entry.precision), percent(entry.recall), str(entry.support)] if entry else ["–"] * 3
        rows.append([str(place), escaped(name), *values])
    table = _table(["Output", "Class", "Precision", "Recall", "Validation images"], rows)
    more = len(model.classes) - len(rows)
    return f"## Classes\n\n{table}" + (f"\n\nand {more} more, in `labels.txt`." if more > 0 else "")


def _training(report: ReportContent | None) -> str:
    if report is None:
        return ""
    rows = [[f"images in {escaped(part)}", f"{count:,}"] for part, count in list(report.images.items())[:10]]
    rows += [["epochs", str(report.epochs)], ["optimizer steps", f"{report.global_step:,}"]]
    rows += [["processes", str(report.world_size)], ["precision", escaped(report.precision)]]
    return "## Training\n\n" + _table(["", "Value"], rows)


def _limits(model: ModelDescription) -> str:
    return (
        "## Licence and limits\n\nThe licence of this model is not known to the program that wrote this card: it "
        "depends on the training images and on the pretrained weights. Fill in `license`, and `base_model` if the "
        "backbone was pretrained. The classifier answers with one of its classes whatever the image shows."
        f"\n\nWritten by job from the checkpoint with SHA-256 `{model.checkpoint_sha256}`."
    )


def _image_code(entry: FormatEntry, model: ModelDescription) -> str:
    """Python that makes ``images`` from a file."""
    size = model.image_size
    opened = 'image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")'
    if entry.input != "image":
        how = f"image.resize(({size}, {size}), Image.BILINEAR)"
        if model.resize == "crop":
            how = f"ImageOps.fit(image, ({size}, {size}), Image.BILINEAR)"
        opened += f"\nimage = {how}"
    images = "images = np.asarray(image)[None]"
    if entry.input == "normalised":
        images = (
            f"mean, std = np.float32({list(model.mean)}), np.float32({list(model.std)})\n"
            "images = ((np.asarray(image, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]"
        )
    return f"{opened}\n{images}"


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"


_ONNX = """
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

{image}
session = onnxruntime.InferenceSession("{file}")
(probabilities,) = session.run(["probabilities"], {{"images": images}})
label = open("labels.txt", encoding="utf-8").read().split("\\n")[probabilities[0].argmax()]
"""
_PROGRAM = """
import numpy as np
import torch
from PIL import Image, ImageOps

{image}
network = torch.export.load("{file}").module()
probabilities = network(torch.from_numpy(images.copy()))
"""
_TIMM = """
import timm

network = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(network.pretrained_cfg))
"""
