"""What is valid ONNX, and ends the process of ONNX Runtime on the CPU (1.23 to 1.32 at least) when it is loaded."""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto, TensorProto


def crashing_operands(model: ModelProto) -> list[tuple[NodeProto, int]]:
    """Products in a file in float16, with the place of an operand that is transposed with its first axis into the matrix.

    The runtime takes such a transposition into the product, of which it has no kernel in float16.
    """
    if TensorProto.FLOAT16 not in _types(model.graph):
        return []
    makers = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    return [(node, place) for node in products for place, name in enumerate(node.input) if _takes_first_axis(makers.get(name), makers)]


def _types(graph: GraphProto) -> set[int]:
    """Of what a graph starts from: inputs, weights, and the values and casts that its nodes name."""
    attributes = [a for node in graph.node for a in node.attribute]
    cast_to = {a.i for a in attributes if a.name in ("to", "dtype")}
    tensors = [*graph.initializer, *(a.t for a in attributes if a.HasField("t"))]
    return cast_to | {t.data_type for t in tensors} | {i.type.tensor_type.elem_type for i in graph.input}


def _takes_first_axis(node: NodeProto | None, makers: dict[str, NodeProto]) -> bool:
    if node is not None and node.op_type == "Cast":
        node = makers.get(node.input[0])
    if node is None or node.op_type != "Transpose":
        return False
    order = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
    return len(order) > 2 and order[:-2] == list(range(1, len(order) - 1)) and 0 in order[-2:]
