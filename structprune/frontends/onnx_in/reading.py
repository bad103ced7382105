"""An ONNX file → plain data: nodes with Python attributes, constants as arrays. The only reader of ONNX files in the frontends.

Nothing is taken on trust: the file is checked by onnx, its tensors must hold as many bytes as they claim, and external data must lie beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.inliner import inline_local_functions
from torch import Tensor

from structprune.errors import InputError, first_line
from structprune.frontends.onnx_in.defects import crashing_operands
from structprune.ir.signature import Signature

OPSETS = range(7, 27)
LARGEST = (2 << 30) - (1 << 20)  # bytes: what one protobuf holds, and so what original.onnx can be
_AI_ONNX = ("", "ai.onnx")
TYPES = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.INT16: torch.int16, TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8, TensorProto.BOOL: torch.bool,
}  # fmt: skip
_QUANTISED = ("Quantize", "QLinear", "QGemm", "QAttention", "Integer", "NBits", "QMoE", "QOrdered", "FpQ4", "BnB4", "Dequantize")


@dataclass(frozen=True)
class Node:
    """One operator, with the names of the values that it reads and makes; '' where an input or output is left out."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]  # tensors among them as torch tensors, graphs as `Body`

    def __str__(self) -> str:
        return f"{self.op} (node {self.name or 'that makes ' + next((o for o in self.outputs if o), '?')!r})"

    def bodies(self) -> Iterator[Body]:
        """The branches of an If, or the body of a loop."""
        for value in self.attributes.values():
            if isinstance(value, Body):
                yield value


@dataclass(frozen=True, eq=False)
class Body:
    """The nodes of a graph or of a branch, in an order in which they can run."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]  # initializers and the values of Constant nodes, by name
    initializers: frozenset[str]

    def every_node(self) -> Iterator[Node]:
        """The nodes of branches too."""
        for node in self.nodes:
            yield node
            for body in node.bodies():
                yield from body.every_node()

    def __deepcopy__(self, memo: Any) -> Body:
        return self  # nothing changes it


@dataclass(frozen=True)
class Port:
    """An input: a size is a number, or a name where any will do."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]


@dataclass(frozen=True)
class Program:
    """What a file holds."""

    path: Path
    digest: str
    opset: int
    inputs: tuple[Port, ...]
    body: Body


def read(path: Path) -> Program:
    """The program in an ONNX file. Raises InputError, in one line, for a file that is damaged, unsafe, quantised, or of another kind."""
    model = _loaded(path)
    for node in _nodes(model.graph):
        if any(word in node.op_type for word in _QUANTISED):
            label = f"{node.op_type} at node {node.name or node.output[0]!r}"
            raise InputError(f"{path} is quantised ({label}): prune first, then quantise; pass the float model that it was made from")
        if node.domain not in _AI_ONNX:
            raise InputError(
                f"{path}: the operator {node.domain}.{node.op_type} of node {node.name or node.output[0]!r} is not of the ONNX standard; "
                "pass the file from before it was optimised for a runtime, or export it without custom operators"
            )
    for node, _ in crashing_operands(model):
        label = f"node {node.name or node.output[0]!r}"
        raise InputError(f"{path}: {label} multiplies a transposed tensor in float16, which ends ONNX Runtime on the CPU; pass the file in float32")
    opset = max((o.version for o in model.opset_import if o.domain in _AI_ONNX), default=0)
    if opset not in OPSETS:
        raise InputError(f"{path} is of opset {opset}; structprune reads {OPSETS[0]} to {OPSETS[-1]}: convert it with onnx.version_converter")
    reader = _Reader(path)
    names = {t.name for t in model.graph.initializer}
    inputs = tuple(reader.port(i) for i in model.graph.input if i.name not in names)
    return Program(path, digest(path), opset, inputs, reader.body(model.graph))


def digest(path: Path) -> str:
    """Of the bytes of a file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error


def read_again(signature: Signature) -> bytes:
    """The file that a model was read from, with its external data in it. Raises InputError where it is another one by now."""
    path = signature.file
    if digest(path) != signature.digest:
        raise InputError(f"{path} has changed since it was read; run it again")
    model = onnx.load(str(path), load_external_data=False)
    if not any(t.data_location == TensorProto.EXTERNAL for t in _tensors(model)):
        return path.read_bytes()
    return _loaded(path).SerializeToString()  # type: ignore[no-any-return]


def _loaded(path: Path) -> ModelProto:
    try:
        size = path.stat().st_size
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
    except Exception as error:  # protobuf has an exception of its own for what it cannot read
        raise InputError(f"{path} is damaged or no ONNX file ({first_line(error)}); export or copy it again") from error
    if not model.graph.node:
        raise InputError(f"{path} is damaged or no ONNX file (it holds no graph); export or copy it again")
    external = [t for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL]
    held = size + sum(_external_bytes(path, t) for t in external)
    for tensor in _tensors(model):
        _check_size(path, tensor, held)
    if held > LARGEST:
        raise InputError(f"{path} with its weights is larger than 2 GB, which one ONNX file cannot hold; pass the model in PyTorch's formats")
    try:
        if external:
            onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
        if model.functions:
            model = inline_local_functions(model)
    except Exception as error:  # onnx raises its own types, RuntimeError and ValueError, for what it does not like
        raise InputError(f"{path} is no valid ONNX model: {first_line(error)}; export it again") from error
    return model


def _external_bytes(path: Path, tensor: TensorProto) -> int:
    """How many bytes of a file beside the model a tensor takes. Raises InputError for one that lies elsewhere, or is too short."""
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    file = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise InputError(f"{path}: the data of {tensor.name!r} lie outside of the model's folder ({location!r}), and are not read")
    if not file.is_file():
        raise InputError(f"{path}: the data of {tensor.name!r} should be in {location!r}, which is not there; copy it beside the model")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    except ValueError as error:
        raise InputError(f"{path}: the place of the data of {tensor.name!r} is no number; export the model again") from error
    end = file.stat().st_size
    length = end - offset if length < 0 else length
    if offset < 0 or offset + length > end or length < 0:
        raise InputError(f"{path}: the data of {tensor.name!r} reach beyond the end of {location!r}; copy both files again")
    return length


def _check_size(path: Path, tensor: TensorProto, held: int) -> None:
    """No tensor is larger than what the file could hold of it: a number takes half a byte at least."""
    if any(d < 0 for d in tensor.dims) or math.prod(tensor.dims) > 2 * held + 16:
        shape = "x".join(map(str, tensor.dims))
        raise InputError(f"{path}: the tensor {tensor.name!r} claims {shape} numbers, more than the file holds; export or copy it again")


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from _nodes(inner)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    def of(graph: GraphProto) -> Iterator[TensorProto]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from in_nodes(graph.node)

    def in_nodes(nodes: Any) -> Iterator[TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                yield from ([attribute.t] if attribute.type == AttributeProto.TENSOR else attribute.tensors)
                for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                    yield from of(inner)

    yield from of(model.graph)
    for function in model.functions:
        yield from in_nodes(function.node)


class _Reader:
    """Protobuf → the classes above."""

    def __init__(self, path: Path):
        self._path = path
        self._unnamed = 0

    def port(self, value: Any) -> Port:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type not in TYPES:
            held = TensorProto.DataType.Name(kind.elem_type).lower() if value.type.HasField("tensor_type") else "no tensor"
            raise InputError(f"{self._path}: the input {value.name!r} is {held}, which torch has no type for")
        if not kind.HasField("shape"):
            raise InputError(f"{self._path}: the file does not say how many axes the input {value.name!r} has; export it with shapes")
        return Port(value.name, TYPES[kind.elem_type], tuple(self._size(value.name, i, d) for i, d in enumerate(kind.shape.dim)))

    def _size(self, name: str, axis: int, size: Any) -> int | str:
        if size.dim_param.strip("? "):
            return str(size.dim_param)
        return int(size.dim_value) if size.dim_value > 0 else f"{name}[{axis}]"

    def body(self, graph: GraphProto) -> Body:
        if graph.sparse_initializer:
            raise InputError(f"{self._path}: sparse weights ({graph.sparse_initializer[0].values.name!r}) cannot be pruned; export dense ones")
        constants = {t.name: self.tensor(t, t.name) for t in graph.initializer}
        initializers = frozenset(constants)
        nodes = []
        for proto in graph.node:
            node = self._node(proto)
            if node.op == "Constant":
                constants[node.outputs[0]] = self._constant(node)
            else:
                nodes.append(node)
        return Body(tuple(nodes), tuple(o.name for o in graph.output), constants, initializers)

    def _node(self, proto: NodeProto) -> Node:
        values = {a.name: self._attribute(proto, a) for a in proto.attribute}
        return Node(proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), values)

    def _attribute(self, node: NodeProto, attribute: AttributeProto) -> Any:
        if attribute.type == AttributeProto.TENSOR:
            return self.tensor(attribute.t, node.output[0] if node.output else node.name)
        if attribute.type == AttributeProto.GRAPH:
            return self.body(attribute.g)
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.STRING:
            return value.decode(errors="replace")
        if attribute.type == AttributeProto.STRINGS:
            return [v.decode(errors="replace") for v in value]
        return list(value) if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS) else value

    def _constant(self, node: Node) -> Tensor:
        (name, value), *_ = node.attributes.items()
        if name == "value":
            return value  # type: ignore[no-any-return]
        if name in ("value_int", "value_ints"):
            return torch.tensor(value, dtype=torch.int64)
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=torch.float32)
        raise InputError(f"{self._path}: the constant {node.outputs[0]!r} holds {name.removeprefix('value_')}, which torch has no type for")

    def tensor(self, proto: TensorProto, name: str) -> Tensor:
        """A copy, which is torch's own."""
        if proto.data_type not in TYPES:
            kind = TensorProto.DataType.Name(proto.data_type).lower()
            advice = "prune first, then quantise" if "int" in kind or "float" in kind else "take it out of the model"
            raise InputError(f"{self._path}: the tensor {name!r} is {kind}, which torch has no type for; {advice}")
        try:
            values = numpy_helper.to_array(proto)
            if proto.data_type == TensorProto.BFLOAT16:
                return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
            return torch.from_numpy(np.array(values))  # a copy, in the machine's byte order
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{self._path}: the tensor {name!r} does not hold what it claims ({first_line(error)}); export or copy it again"
            ) from error
