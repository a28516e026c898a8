"""A model repository of NVIDIA Triton Inference Server, with dynamic batching.

``config.pbtxt`` names no model, so that the folder of the model may be renamed
(https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html).
"""

from __future__ import annotations

from job.export.formats import INPUT, LABELS_FILE, OUTPUT, InputKind
from job.export.manifest import ModelDescription
from job.process.terminal import escape

FOLDER = "triton/model"
CONFIG = f"{FOLDER}/config.pbtxt"
MODEL = f"{FOLDER}/1/model.onnx"
LABELS = f"{FOLDER}/{LABELS_FILE}"
MOST_BATCH = 64
QUEUE_MICROSECONDS = 2000
"""Time that a request waits for others to share its batch."""


def config(kind: InputKind, model: ModelDescription) -> str:
    """The content of ``config.pbtxt``: only constants and numbers, no name of a class."""
    size = model.image_size
    dims = {"image": [-1, -1, 3], "resized": [size, size, 3], "normalised": [3, size, size]}[kind]
    data_type = "TYPE_FP32" if kind == "normalised" else "TYPE_UINT8"
    return f"""\
backend: "onnxruntime"
max_batch_size: {MOST_BATCH}
input [
  {{
    name: "{INPUT}"
    data_type: {data_type}
    dims: {dims}
  }}
]
output [
  {{
    name: "{OUTPUT}"
    data_type: TYPE_FP32
    dims: [{len(model.classes)}]
    label_filename: "{LABELS_FILE}"
  }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {QUEUE_MICROSECONDS}
}}
"""


def labels(classes: list[str]) -> str:
    """Class names, one a line; line breaks and control characters within them are escaped."""
    return "".join(f"{escape(name)}\n" for name in classes)
