"""Readers: nodes that are linear in what they read, with a weight of the model. Each is y = W x + b at every position.

A convolution reads a window at every position of its answer, a transposed one the entries that reach that position, a matrix product a row.
In one form for all of them:

    x  [groups, rows, inputs · taps]     rows: samples × positions
    y  [groups, rows, outputs]
    W  [groups, outputs, inputs · taps]  inputs and outputs of one group
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ir.graph import Graph, attribute
from structprune.ir.operators import named_arguments, operator_name
from structprune.ops import RULES, contraction


@dataclass(frozen=True)
class Reader:
    """A node, dense or small, and which of its operands are what; of a convolution also how its window moves."""

    node: fx.Node
    kind: str  # 'linear' (W is [outputs, inputs]), 'product' (its transpose), 'conv' or 'transposed'
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # at the beginning of each axis
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def rank(self) -> int:
        """How many axes a window slides along."""
        return len(self.stride)

    @property
    def input_axis(self) -> int:
        """Which axis of the weight is summed over."""
        return 0 if self.kind in ("product", "transposed") else 1

    @property
    def answer_axis(self) -> int:
        """Which axis of the answer its outputs are."""
        return 1 if self.rank else len(self.node.meta["val"].shape) - 1


def readers(graph: Graph) -> dict[fx.Node, Reader]:
    """Every reader whose weight, a parameter, is used by it alone, in the order of the graph."""
    uses = Counter(id(graph.tensor(n)) for n in graph.nodes if n.op == "get_attr" for _ in n.users)
    found = {}
    for node in graph.nodes:
        reader = reader_of(node)
        if reader is None or reader.weight.op != "get_attr" or str(reader.weight.target) not in graph.aliases:
            continue
        if all(n is None or (n.op == "get_attr" and uses[id(graph.tensor(n))] == 1) for n in (reader.weight, reader.bias)):
            found[node] = reader
    return found


def reader_of(node: fx.Node) -> Reader | None:
    """The reader that a node is, wherever its weight comes from; None for any other node."""
    function = RULES.get(operator_name(node))
    given = _arguments(node) if function in _READS else {}
    if function is contraction.linear and _rank(given["weight"]) == 2:
        return _reader(node, "linear", given["input"], given["weight"], given["bias"])
    if function is contraction.matmul and operator_name(node) in ("matmul", "mm"):
        left, right = node.args[:2]
        return _reader(node, "product", left, right, None) if _rank(right) == 2 and _rank(left) >= 2 else None
    if function is contraction.addmm and operator_name(node) == "addmm" and not node.kwargs:
        bias, left, right = node.args
        return _reader(node, "product", left, right, bias) if _rank(bias) == 1 else None
    if function in (contraction.conv, contraction.conv_transpose, contraction.convolution):
        rank = _rank(given["weight"]) - 2
        if _rank(given["input"]) != rank + 2:
            return None
        transposed = function is contraction.conv_transpose or bool(given.get("transposed"))
        stride, dilation = _each(given["stride"], rank), _each(given["dilation"], rank)
        padding = given["padding"]
        if isinstance(padding, str):
            window = given["weight"].meta["val"].shape[2:]
            padding = [d * (int(k) - 1) // 2 if padding == "same" else 0 for d, k in zip(dilation, window, strict=True)]
        kind = "transposed" if transposed else "conv"
        return _reader(node, kind, given["input"], given["weight"], given["bias"], stride, _each(padding, rank), dilation, given["groups"])
    return None


_READS = {contraction.linear, contraction.matmul, contraction.addmm, contraction.conv, contraction.conv_transpose, contraction.convolution}


def _reader(node: fx.Node, kind: str, x: Any, weight: Any, bias: Any, *window: Any) -> Reader | None:
    ours = isinstance(x, fx.Node) and isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return Reader(node, kind, x, weight, bias, *window) if ours else None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by their names in the schema, with defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {a.name: a.default_value if a.has_default_value() else None for a in schema} | named_arguments(node, node.args, node.kwargs)


def _rank(value: Any) -> int:
    return value.meta["val"].dim() if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor) else -1


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return tuple(values * rank if len(values) == 1 else values)


def takes_a_shift(reader: Reader) -> bool:
    """Whether a constant can be added to the answer: to its bias, or to the running mean of the batch norm that alone reads it."""
    if reader.bias is not None:
        return True
    user = next(iter(reader.node.users), None)
    if user is None or len(reader.node.users) > 1 or operator_name(user) != "batch_norm" or user.args[5] is not False:
        return False
    mean = user.args[3]
    return isinstance(mean, fx.Node) and mean.op == "get_attr" and len(mean.users) == 1


def shift_of(reader: Reader, module: fx.GraphModule) -> Callable[[Tensor], None] | None:
    """Adds a constant, [groups · outputs], to the answer of a reader of `module`, in place, where something takes it up."""
    if not takes_a_shift(reader):
        return None
    if reader.bias is not None:
        held, sign = attribute(module, str(reader.bias.target)), 1
    else:
        norm = next(iter(reader.node.users))
        held, sign = attribute(module, str(norm.args[3].target)), -1  # type: ignore[union-attr]

    def shift(amount: Tensor) -> None:
        held.copy_((held + sign * amount).to(held.dtype))

    return shift


# --- the matrix form -------------------------------------------------------------------------------------------------------


def matrix(reader: Reader, weight: Tensor) -> Tensor:
    """W: [groups, outputs, inputs · taps]."""
    if reader.kind in ("linear", "product"):
        return (weight if reader.kind == "linear" else weight.T)[None]
    groups = reader.groups
    if reader.kind == "conv":
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    inputs, outputs = weight.shape[:2]
    return weight.reshape(groups, inputs // groups, outputs, -1).transpose(1, 2).reshape(groups, outputs, -1)


def from_matrix(reader: Reader, values: Tensor, like: Tensor) -> Tensor:
    """The inverse of `matrix`, in the shape of the weight `like`."""
    if reader.kind in ("linear", "product"):
        return values[0] if reader.kind == "linear" else values[0].T
    if reader.kind == "conv":
        return values.reshape(like.shape)
    groups, outputs, inputs = values.shape[0], like.shape[1], like.shape[0] // values.shape[0]
    return values.reshape(groups, outputs, inputs, -1).transpose(1, 2).reshape(like.shape)


def taps(reader: Reader, weight: Tensor) -> int:
    """Entries of one input channel in the window."""
    return math.prod(weight.shape[2:]) if reader.rank else 1


def places(reader: Reader, answer: Tensor, rows: float, seed: int) -> Tensor | None:
    """About that many positions of a sample's answer, drawn at random; None where these are all."""
    positions = math.prod(answer.shape[2:]) if reader.rank else math.prod(answer.shape[1:-1])
    wanted = math.ceil(rows)
    if wanted >= positions:
        return None
    return torch.randperm(positions, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values.to(answer.device)


def rows_of_answer(reader: Reader, answer: Tensor, chosen: Tensor | None) -> Tensor:
    """y: [groups, rows, outputs] at the chosen positions."""
    if not reader.rank:
        return _chosen_rows(answer, chosen)[None]
    flat = answer.flatten(2)
    flat = flat if chosen is None else flat.index_select(2, chosen)
    samples, channels, positions = flat.shape
    split = flat.reshape(samples, reader.groups, channels // reader.groups, positions)
    return split.permute(1, 0, 3, 2).reshape(reader.groups, samples * positions, channels // reader.groups)


def rows_of_input(reader: Reader, x: Tensor, window: Sequence[int], space: Sequence[int], chosen: Tensor | None) -> Tensor:
    """x: [groups, rows, inputs · taps] at the chosen positions. window: sizes of the kernel; space: those of the answer."""
    if not reader.rank:
        return _chosen_rows(x, chosen)[None]
    index = _entries(reader, x.shape[2:], window, space, x.device)
    index = index if chosen is None else index.index_select(0, chosen)
    flat = torch.nn.functional.pad(x.flatten(2), (0, 1))  # the last entry, a zero, is what lies outside
    read = flat[:, :, index]  # [samples, channels, positions, taps]
    samples, channels, positions, number = read.shape
    split = read.reshape(samples, reader.groups, channels // reader.groups, positions, number)
    return split.permute(1, 0, 3, 2, 4).reshape(reader.groups, samples * positions, channels // reader.groups * number)


def _chosen_rows(values: Tensor, chosen: Tensor | None) -> Tensor:
    values = values[None] if values.dim() == 1 else values  # what belongs to all samples is one row
    flat = values.reshape(values.shape[0], math.prod(values.shape[1:-1]), values.shape[-1])
    return (flat if chosen is None else flat.index_select(1, chosen)).reshape(-1, values.shape[-1])


def _entries(reader: Reader, size: Sequence[int], window: Sequence[int], space: Sequence[int], device: torch.device) -> Tensor:
    """[positions, taps]: which entry of the flattened input each tap reads; the number of entries for what lies outside."""
    index, inside = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis in range(reader.rank):
        at = torch.arange(space[axis], device=device)[:, None]
        tap = torch.arange(window[axis], device=device)[None] * reader.dilation[axis]
        if reader.kind == "conv":
            entry = at * reader.stride[axis] - reader.padding[axis] + tap
            valid = torch.ones_like(entry, dtype=torch.bool)
        else:
            reached = at + reader.padding[axis] - tap
            entry, valid = reached // reader.stride[axis], reached % reader.stride[axis] == 0
        valid = valid & (entry >= 0) & (entry < size[axis])
        index = (index[:, None, :, None] * size[axis] + entry[None, :, None, :]).flatten(2).flatten(0, 1)
        inside = (inside[:, None, :, None] & valid[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.where(inside, index, math.prod(size))
