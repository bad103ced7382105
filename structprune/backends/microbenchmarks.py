"""Contractions by themselves, as ONNX, for ONNX Runtime to time: many side by side in one model, on noise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from structprune.backends.tables import Point

GATES = {"LSTM": 4, "GRU": 3}  # of the recurrent operators; plain layers are exported step by step, as products
_CONVOLUTIONS = ("conv", "conv_transpose")
_TYPES = {"float": "float32", "float16": "float16", "double": "float64"}
_NOISE = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)  # repeated: to draw as much as is multiplied takes as long as that
_SECOND_INPUTS = {"Clip": (0.0, 6.0)}


def side_by_side(points: Sequence[Point]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model that runs every point on inputs of its own, and noise for these. The nodes of point N bear names that begin with 'pN.'."""
    draft = _Draft()
    for index, (key, sizes) in enumerate(points):
        given = json.loads(key)
        draft.begin(f"p{index}.", given["type"])
        if given["kind"] in _CONVOLUTIONS:
            _convolution(draft, given, *sizes)
        elif given["kind"] == "recurrent":
            _recurrent(draft, given, *sizes)
        else:
            _product(draft, given, *sizes)
    return draft.model(), draft.feeds


def entries(given: Mapping[str, Any], sizes: Sequence[int]) -> int:
    """Of what a contraction reads and writes, weights aside. given: its signature."""
    if given["kind"] in _CONVOLUTIONS:
        groups, filters, inputs = sizes
        return int(groups * given["batch"] * (inputs * math.prod(given["space"]) + filters * math.prod(_space_after(given))))
    if given["kind"] == "recurrent":
        inputs, hidden = sizes
        return int(given["steps"] * given["batch"] * (inputs + _directions(given) * hidden))
    batch, rows, inputs, columns = sizes
    return batch * rows * (inputs + columns) + (batch * inputs * columns if given["kind"] == "matmul" else 0)


def in_bytes(given: Mapping[str, Any], sizes: Sequence[int]) -> int:
    """Of all that it needs, its weights included, four to a number."""
    weights = 0
    if given["kind"] in _CONVOLUTIONS:
        weights = math.prod(sizes) * math.prod(given["window"])
    elif given["kind"] == "recurrent":
        weights = _directions(given) * GATES[given["operator"]] * sizes[1] * sum(sizes)
    elif given["kind"] == "linear":
        weights = sizes[-2] * sizes[-1]
    return 4 * (weights + entries(given, sizes))


class _Draft:
    """A model as it grows: of one point after the other."""

    def __init__(self) -> None:
        self.feeds: dict[str, np.ndarray] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._answers: dict[str, onnx.ValueInfoProto] = {}  # by point, that of its last operator
        self._root, self._type = "", np.dtype("float32")

    def begin(self, root: str, dtype: str) -> None:
        """root: how the names of a point begin; dtype: as ONNX Runtime's profiler calls it."""
        self._root, self._type = root, np.dtype(_TYPES.get(dtype, "float32"))

    def fed(self, name: str, *shape: int) -> str:
        self.feeds[self._root + name] = self._noise(shape)
        return self._root + name

    def constant(self, name: str, *shape: int, value: float | None = None) -> str:
        self._constants[self._root + name] = self._noise(shape) if value is None else np.asarray(value, self._type)
        return self._root + name

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = self._root + output
        self._nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        self._answers[self._root] = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self._type), None)
        return name

    def model(self) -> onnx.ModelProto:
        declared = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in self.feeds.items()]
        tensors = [onnx.numpy_helper.from_array(value, name) for name, value in self._constants.items()]
        graph = helper.make_graph(self._nodes, "contractions", declared, list(self._answers.values()), tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def _noise(self, shape: Sequence[int]) -> np.ndarray:
        return np.resize(_NOISE, shape).astype(self._type)


def _convolution(draft: _Draft, given: Mapping[str, Any], groups: int, filters: int, inputs: int) -> None:
    """With the addition and the activation that the runtime fused into it."""
    attributes = {"kernel_shape": given["window"], "group": groups} | {k: given[k] for k in ("strides", "pads", "dilations")}
    x = draft.fed("x", given["batch"], groups * inputs, *given["space"])
    if given["kind"] == "conv":
        weight = draft.constant("w", groups * filters, inputs, *given["window"])
        value = draft.add("Conv", [x, weight, draft.constant("b", groups * filters)], "conv", **attributes)
    else:
        weight = draft.constant("w", groups * inputs, filters, *given["window"])
        attributes["output_padding"] = given["output_padding"]
        value = draft.add("ConvTranspose", [x, weight, draft.constant("b", groups * filters)], "conv", **attributes)
    if given["sum"]:
        value = draft.add("Add", [value, draft.fed("r", given["batch"], groups * filters, *_space_after(given))], "sum")
    if given["activation"]:
        limits = [draft.constant(f"limit{i}", value=limit) for i, limit in enumerate(_SECOND_INPUTS.get(given["activation"], ()))]
        draft.add(given["activation"], [value, *limits], "active")


def _recurrent(draft: _Draft, given: Mapping[str, Any], inputs: int, hidden: int) -> None:
    directions, rows = _directions(given), GATES[given["operator"]] * hidden
    x = draft.fed("x", given["steps"], given["batch"], inputs)
    sizes = {"w": (rows, inputs), "r": (rows, hidden), "b": (2 * rows,)}
    weights = [draft.constant(name, directions, *size) for name, size in sizes.items()]
    how = {"linear_before_reset": 1} if given["linear_before_reset"] else {}
    draft.add(given["operator"], [x, *weights], "states", hidden_size=hidden, direction=given["direction"], **how)


def _product(draft: _Draft, given: Mapping[str, Any], batch: int, rows: int, inputs: int, columns: int) -> None:
    x = draft.fed("x", batch, rows, inputs)
    draft.add("MatMul", [x, draft.constant("w", inputs, columns) if given["kind"] == "linear" else draft.fed("w", batch, inputs, columns)], "product")


def _directions(given: Mapping[str, Any]) -> int:
    return 2 if given["direction"] == "bidirectional" else 1


def _space_after(given: Mapping[str, Any]) -> list[int]:
    """The spatial sizes of a convolution's answer."""
    rank = len(given["space"])
    pads = [before + after for before, after in zip(given["pads"][:rank], given["pads"][rank:], strict=True)]
    covered = [dilation * (window - 1) + 1 for dilation, window in zip(given["dilations"], given["window"], strict=True)]
    sizes = zip(given["space"], given["strides"], pads, covered, given.get("output_padding", [0] * rank), strict=True)
    if given["kind"] == "conv_transpose":
        return [(size - 1) * stride - pad + cover + more for size, stride, pad, cover, more in sizes]
    return [(size + pad - cover) // stride + 1 for size, stride, pad, cover, _ in sizes]
