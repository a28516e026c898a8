"""Preprocessing as an ONNX graph: from one kind of input to normalised images.

torch's own export of a resize leaves ONNX Runtime to weigh the border with pixels outside of the image, and changes
pixels there by up to 18 levels of 255. ``exclude_outside=1`` makes them equal to Pillow's and torchvision's: of
photographs all but 0.2 to 0.5 % of values are, and the rest differ by one level. Of images that are enlarged about 5 %
differ, by up to two levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from job.export.formats import INPUT, InputKind
from job.export.manifest import ModelDescription

OPSET = 18
"""The first with ``Resize(antialias=1)``."""
NORMALISED = "preprocessing/normalised"
"""Name of the value between preprocessing and network."""


def preprocessing_graph(kind: InputKind, model: ModelDescription, ir_version: int) -> onnx.ModelProto:
    """A graph from the input :data:`INPUT` to :data:`NORMALISED`, float [batch, 3, S, S].

    Args:
        kind: of the input.
        model: image size, resizing and normalisation.
        ir_version: of the graph that it will be joined to.
    """
    size = model.image_size
    nodes = _Nodes()
    constants: dict[str, npt.ArrayLike] = {}
    shape: list[str | int | None]
    if kind == "normalised":
        value_type, shape = TensorProto.FLOAT, ["batch", 3, size, size]
        nodes.add("Identity", [INPUT], NORMALISED)
    else:
        value_type, shape = TensorProto.UINT8, ["batch", "height", "width", 3]
        if kind == "resized":
            shape[1:3] = [size, size]
        pixels = nodes.add("Transpose", [INPUT], "channels_first", perm=[0, 3, 1, 2])
        if kind == "image":
            pixels = _resized(nodes, constants, pixels, model)
        constants["scale"] = np.float32(255)
        constants["mean"] = np.array(model.mean, np.float32).reshape(3, 1, 1)
        constants["std"] = np.array(model.std, np.float32).reshape(3, 1, 1)
        floats = nodes.add("Cast", [pixels], "floats", to=TensorProto.FLOAT)
        scaled = nodes.add("Div", [floats, _named("scale")], "scaled")
        centred = nodes.add("Sub", [scaled, _named("mean")], "centred")
        nodes.add("Div", [centred, _named("std")], NORMALISED)
    graph = helper.make_graph(
        nodes,
        "preprocessing",
        [helper.make_tensor_value_info(INPUT, value_type, shape)],
        [helper.make_tensor_value_info(NORMALISED, TensorProto.FLOAT, ["batch", 3, size, size])],
        [numpy_helper.from_array(np.asarray(value), _named(name)) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=ir_version)


class _Nodes(list[NodeProto]):
    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node; returns the name of its output."""
        name = output if output == NORMALISED else _named(output)
        self.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name


def _resized(nodes: _Nodes, constants: dict[str, npt.ArrayLike], pixels: str, model: ModelDescription) -> str:
    batch = nodes.add("Shape", [pixels], "batch_and_channels", start=0, end=2)
    constants["size"] = np.array([model.image_size] * 2, np.int64)
    target = _named("size")
    if model.resize == "crop":
        sides = nodes.add("Shape", [pixels], "sides", start=2, end=4)
        shorter = nodes.add("ReduceMin", [sides], "shorter", keepdims=1)
        product = nodes.add("Mul", [sides, _named("size")], "product")
        target = nodes.add("Div", [product, shorter], "resized_sides")
    sizes = nodes.add("Concat", [batch, target], "sizes", axis=0)
    resized = nodes.add(
        "Resize",
        [pixels, "", "", sizes],
        "resized",
        mode="linear",
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
    )
    if model.resize == "squash":
        return resized
    # The margin is halved half to even, as in torchvision's center_crop.
    constants["two"], constants["axes"] = np.array([2], np.int64), np.array([2, 3], np.int64)
    margin = nodes.add("Sub", [target, _named("size")], "margin")
    half = nodes.add("Div", [margin, _named("two")], "half")
    is_odd = nodes.add("Mod", [margin, _named("two")], "is_odd")
    half_is_odd = nodes.add("Mod", [half, _named("two")], "half_is_odd")
    rounding = nodes.add("Mul", [is_odd, half_is_odd], "rounding")
    start = nodes.add("Add", [half, rounding], "start")
    end = nodes.add("Add", [start, _named("size")], "end")
    return nodes.add("Slice", [resized, start, end, _named("axes")], "cropped")


def _named(name: str) -> str:
    return f"preprocessing/{name}"
