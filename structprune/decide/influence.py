"""Which values depend on the model's inputs, and which values its answer depends on: entry by entry, proved from the weights.

Every operator has an *influence*: a function, linear with coefficients of zero or more, from marks on its operands' entries to marks on its
answer's; an entry of the answer is marked if it can depend on a marked entry of an operand. Forward, from the inputs, it finds what is *unknown*;
what is left is a constant, whose value is worked out on the way. Backward, as a vector-Jacobian product from the answer, it finds what is *needed*.

A coefficient is zero only where the arithmetic says so: a weight that is zero, a factor that is known to be zero. An operator without a
rule lets everything influence everything. Inputs and activations are taken to be finite.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ir.graph import Graph, choices, has_open_size, shape_of, written_to
from structprune.ir.operators import has_effect, is_fresh, is_random, operator_name
from structprune.ops import RULES, contraction, elementwise, joining, layout, normalization, spatial
from structprune.transform.reference import in_double

Marks = Callable[[fx.Node], Tensor]  # of an operand: a float32 tensor of its shape, zero where there is no mark


@dataclass(frozen=True)
class Known:
    """A tensor on the example: `unknown` where it depends on the inputs (None: nowhere), and its value in float64 elsewhere, 0 where unknown."""

    value: Tensor
    unknown: Tensor | None = None

    @property
    def matters(self) -> Tensor:
        """1 where the entry may be other than zero."""
        return ((self.value != 0) if self.unknown is None else (self.value != 0) | self.unknown).float()


@dataclass(frozen=True)
class Influence:
    """`known`: of every node that answers a tensor (a list of such for several). `needed[node, operand]`: which entries of the operand the model's
    answer depends on through that node. `reads`: the operands of a node -> the operators that wrote to them in place before, or themselves. `opaque`:
    nodes whose memory is written to in a way that is not followed; nothing is said of them.
    """

    known: Mapping[fx.Node, Any]
    needed: Mapping[tuple[fx.Node, fx.Node], Tensor]
    reads: Mapping[fx.Node, Mapping[fx.Node, fx.Node]]
    opaque: frozenset[fx.Node]


@torch.no_grad()
def influence(graph: Graph) -> Influence:
    """Both directions over the example inputs. Costs about two forwards and one backward in memory and time."""
    return _Flow(graph).run()


class _Flow:
    def __init__(self, graph: Graph):
        self.graph, self.nodes = graph, graph.nodes
        self.known: dict[fx.Node, Any] = {}
        self.latest: dict[fx.Node, fx.Node] = {}  # a node that was written to in place -> the operator that did
        self.reads: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
        self.opaque = _opaque(self.nodes) | {n for n in self.nodes if has_open_size(n)}  # other values would choose other entries
        self._choices = choices(self.nodes)

    def run(self) -> Influence:
        inputs = iter(self.graph.flat_inputs())
        for node in self.nodes:
            if node.op == "placeholder":
                value = next(inputs)
                self.known[node] = _input(value) if isinstance(value, Tensor) else value
            elif node.op == "get_attr":
                value = self.graph.tensor(node)
                if isinstance(value, Tensor):  # a buffer that the model writes to is another one in the next call
                    self.known[node] = _input(value.detach()) if node in self.opaque else Known(in_double(value.detach()))
                else:
                    self.known[node] = value
            elif node.op == "call_function":
                self.reads[node] = {n: self._current(n) for n in node.all_input_nodes}
                self.known[node] = self._answer(node)
                if has_effect(node) and node.args and isinstance(node.args[0], fx.Node):
                    self.latest[node.args[0]] = node
        return Influence(self.known, self._backward(), self.reads, self.opaque)

    def _current(self, node: fx.Node) -> fx.Node:
        while node in self.latest:
            node = self.latest[node]
        return node

    def of(self, reader: fx.Node, operand: fx.Node) -> Any:
        """What is known of an operand at the time when `reader` reads it."""
        return self.known[self.reads[reader][operand]]

    # --- forward ----------------------------------------------------------------------------------------------------------

    def _answer(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.of(node, node.args[0])[node.args[1]]  # type: ignore[index, arg-type]
        value = self._run(node, lambda n: _value(self.of(node, n)))
        if not _tensors(value):  # a size
            return value
        tensors = [k for n in self.reads[node].values() for k in _leaves(self.known[n])]
        if node in self.opaque or is_random(node):
            return _map(value, lambda v: Known(self._blank(node, v, None), torch.ones_like(v, dtype=torch.bool)))
        if all(k.unknown is None for k in tensors):
            return _map(value, Known)
        marks = _spread(self, node, lambda n: _marks(self.of(node, n)))

        def joined(v: Tensor, mark: Tensor) -> Known:
            unknown = mark.broadcast_to(v.shape) > 0
            return Known(self._blank(node, v, unknown), unknown) if unknown.any() else Known(v)

        if isinstance(value, Tensor):
            return joined(value, marks)
        if isinstance(value, (list, tuple)):
            return [joined(v, m) if isinstance(v, Tensor) else v for v, m in zip(value, marks, strict=True)]
        return value

    def _blank(self, node: fx.Node, value: Tensor, unknown: Tensor | None) -> Tensor:
        """Zeros for what is unknown, but where they would not fit the sizes that such values decide."""
        return value if node in self._choices and not value.is_floating_point() else _zeroed(value, unknown)

    def _run(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        written = node.args[0] if has_effect(node) and node.args else None
        args = fx.map_arg(node.args, lambda n: value(n).clone() if n is written and isinstance(value(n), Tensor) else value(n))
        kwargs = fx.map_arg(node.kwargs, value)
        args, kwargs = fx.node.map_aggregate(args, in_double), fx.node.map_aggregate(kwargs, in_double)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    # --- backward ---------------------------------------------------------------------------------------------------------

    def _backward(self) -> dict[tuple[fx.Node, fx.Node], Tensor]:
        needed: dict[tuple[fx.Node, fx.Node], Tensor] = {}
        total: dict[fx.Node, Any] = {}
        for node in reversed(self.nodes):
            if node.op == "output":
                for n in node.all_input_nodes:
                    total[self._current(n)] = _map(_value(self.known[self._current(n)]), lambda v: torch.ones_like(v, dtype=torch.bool))
            if node.op != "call_function" or not _leaves(self.known[node]):
                continue
            everything = node in self.opaque or (has_effect(node) and not node.users)
            mine = total.pop(node, None)
            if mine is None and not everything:
                continue
            for n, found in self._needed_of(node, mine, everything).items():
                needed[node, n] = found
                total[n] = found if n not in total else _either(total[n], found)
        return needed

    def _needed_of(self, node: fx.Node, mine: Any, everything: bool) -> dict[fx.Node, Any]:
        """For each operand with a tensor, which of its entries matter to the entries of the answer that are needed."""
        operands = [n for n in dict.fromkeys(self.reads[node].values()) if _leaves(self.known[n]) and n.op != "get_attr"]
        if everything:
            return {n: _map(_value(self.known[n]), lambda v: torch.ones_like(v, dtype=torch.bool)) for n in operands}
        if node.target is operator.getitem:
            source, index = operands[0], node.args[1]
            parts = [v if not isinstance(v, Tensor) else torch.zeros_like(v, dtype=torch.bool) for v in _value(self.known[source])]
            parts[index] = mine  # type: ignore[index, call-overload]
            return {source: parts}
        if any(isinstance(self.known[n], list) for n in operands):
            return self._needed_of(node, mine, everything=True)
        with torch.enable_grad():
            marks = {n: torch.zeros(self.known[n].value.shape, requires_grad=True) for n in operands}
            spread = _spread(self, node, lambda n: marks[c] if (c := self.reads[node][n]) in marks else _nothing(self.known[c]))
            pairs = [(s, m) for s, m in zip(_tensors(spread), _tensors(mine), strict=True) if s.requires_grad]
            gradients: list[Tensor | None] = [None] * len(operands)
            if pairs:
                outputs = [s for s, _ in pairs]
                cotangents = [m.float() if s.shape == m.shape else m.float().sum_to_size(s.shape) for s, m in pairs]
                gradients = list(torch.autograd.grad(outputs, list(marks.values()), cotangents, allow_unused=True))
        return {n: torch.zeros_like(self.known[n].value, dtype=torch.bool) if g is None else g > 0 for n, g in zip(operands, gradients, strict=True)}


# --- one operator -----------------------------------------------------------------------------------------------------------------


def _spread(flow: _Flow, node: fx.Node, marks: Marks) -> Any:
    """The influence of a node's operands on its answer: marks that broadcast to the answer's shape, a list for several answers."""
    name, rule = operator_name(node), RULES.get(operator_name(node))
    module = rule.__module__ if rule is not None else ""
    args = node.args

    def known(n: Any) -> Any:
        return flow.of(node, n)

    def mattering(n: Any) -> Tensor:
        return known(n).matters if isinstance(n, fx.Node) else torch.ones(())

    def mark(n: Any) -> Tensor:
        return marks(n) if isinstance(n, fx.Node) and isinstance(known(n), Known) else torch.zeros(())

    def everything() -> Any:
        total = sum((mark(n).sum() for n in node.all_input_nodes), torch.zeros(()))
        return _map(_shapes(node), total.expand)

    numbers = [n for n in node.all_input_nodes if isinstance(known(n), Known) and not known(n).value.is_floating_point()]
    if rule is elementwise.unary:
        return mark(args[0])
    if name in ("mul", "multiply") and len(args) == 2:
        return mark(args[0]) * mattering(args[1]) + mark(args[1]) * mattering(args[0])
    if name in ("div", "divide", "true_divide") and len(args) == 2:
        return mark(args[0]) + mark(args[1]) * mattering(args[0])
    if rule in (elementwise.broadcasting, elementwise.assignment):
        return sum((mark(n) for n in node.all_input_nodes), torch.zeros(()))
    if rule is elementwise.glu:
        dim = args[1] if len(args) > 1 else -1
        (value, gate), (matters, _) = mark(args[0]).chunk(2, dim), mattering(args[0]).chunk(2, dim)  # type: ignore[arg-type]
        return value + gate * matters
    if rule is elementwise.along_one_axis:
        dims = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        return mark(args[0]).sum(dims, keepdim=True).expand(_shapes(node))  # type: ignore[arg-type]
    if rule is joining.embedding:
        table = known(args[0]).value
        same = (table == table[:1]).all(0).logical_not().float()  # columns that tell rows apart
        return mark(args[1])[..., None] * same + mark(args[0]).sum(0)
    if (module in (layout.__name__, joining.__name__) or rule in _REARRANGING) and rule not in _MIXING and name != "scatter_reduce":
        if not all(known(n).unknown is None for n in numbers) or "alpha" in node.kwargs:  # which entries are read depends on the inputs; or a sign
            return everything()
        call = _without_value(node)

        def moved(n: fx.Node) -> Any:
            found = known(n)
            if isinstance(found, list) or not isinstance(found, Known):
                return _value(found)
            return marks(n) if found.value.is_floating_point() else found.value

        return node.target(*fx.map_arg(call[0], moved), **fx.map_arg(call[1], moved))  # type: ignore[operator]
    if rule in (normalization.total, normalization.mean) and not numbers:
        kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}
        return node.target(mark(args[0]), *fx.map_arg(args[1:], lambda n: _value(known(n))), **kwargs)  # type: ignore[operator]
    if rule is not None and rule.__name__ in ("pool", "resample"):  # every position of a channel may tell on every other one
        space = list(range(-int(re.findall(r"(\d)d", name)[0]), 0))
        return _map(_shapes(node), lambda shape: mark(args[0]).sum(space, keepdim=True).expand(shape))
    others = [n for n in node.all_input_nodes if n is not args[0]] if args else []
    if module == normalization.__name__ and any(k.unknown is not None for n in others for k in _leaves(known(n))):
        return everything()  # scales or statistics that depend on the inputs
    if rule is normalization.batch_norm and (len(args) < 6 or args[5] is not True):
        return mark(args[0]) * _per_channel(mattering(args[1]) if len(args) > 1 else torch.ones(1), known(args[0]).value.dim())
    if rule in (normalization.layer_norm, normalization.rms_norm, normalization.group_norm, normalization.instance_norm):
        place = 1 if rule is normalization.instance_norm else 2
        scale = mattering(args[place]) if len(args) > place and isinstance(args[place], fx.Node) else torch.ones(1)
        channels = rule in (normalization.group_norm, normalization.instance_norm)
        return everything() * (_per_channel(scale, known(args[0]).value.dim()) if channels else scale)
    if rule in _PRODUCTS:
        return _PRODUCTS[rule](node, mark, mattering)
    return everything()


def _linear(node: fx.Node, mark: Callable[[Any], Tensor], mattering: Callable[[Any], Tensor]) -> Tensor:
    """A convolution or a linear layer: args are input, weight, bias and how the window moves."""
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")

    def call(a: Tensor, b: Tensor) -> Tensor:
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("bias", "input", "weight")}
        return node.target(a, b, None, *rest[1:], **kwargs)  # type: ignore[operator, no-any-return]

    spread = call(mark(x), mattering(weight))
    weights = mark(weight)
    if weights.requires_grad or bool(weights.any()):
        spread = spread + call(mattering(x), weights)
    offset = mark(bias)
    return spread + (offset if RULES[operator_name(node)] is contraction.linear else _per_channel(offset, spread.dim()) if offset.dim() else offset)


def _matmul(node: fx.Node, mark: Callable[[Any], Tensor], mattering: Callable[[Any], Tensor]) -> Tensor:
    a, b = node.args[-2:] if len(node.args) == 2 else node.args[1:3]
    spread = torch.matmul(mark(a), mattering(b)) + torch.matmul(mattering(a), mark(b))
    return spread + mark(node.args[0]) if len(node.args) > 2 else spread


def _einsum(node: fx.Node, mark: Callable[[Any], Tensor], mattering: Callable[[Any], Tensor]) -> Tensor:
    equation, operands = node.args[:2]
    return sum(  # type: ignore[return-value]
        (torch.einsum(equation, *(mark(o) if o is n else mattering(o) for o in operands)) for n in dict.fromkeys(operands)),  # type: ignore[union-attr, arg-type]
        torch.zeros(()),
    )


def _attention(node: fx.Node, mark: Callable[[Any], Tensor], mattering: Callable[[Any], Tensor]) -> Tensor:
    """softmax(q kᵀ) v: a query's row is moved by whatever moves one of its logits, in every column of v that is not the same for all keys."""
    query, key, value, *rest = node.args
    q, k, v = mark(query), mark(key), mark(value)
    q_matters, k_matters = mattering(query), mattering(key)
    heads = q.shape[-3] if q.dim() > 2 else 1

    def repeated(t: Tensor) -> Tensor:
        return t.repeat_interleave(heads // t.shape[-3], -3) if t.dim() > 2 and t.shape[-3] not in (1, heads) else t

    logits = q @ repeated(k_matters).transpose(-2, -1) + q_matters @ repeated(k).transpose(-2, -1)
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        logits = logits + mark(mask)
    # a query that attends to nothing answers NaN whatever the keys hold: columns count as different unless they are zero
    return logits.sum(-1, keepdim=True) * repeated(mattering(value)).amax(-2, keepdim=True) + repeated(v).sum(-2, keepdim=True)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    contraction.linear: _linear,
    contraction.conv: _linear,
    contraction.conv_transpose: _linear,
    contraction.convolution: _linear,
    contraction.matmul: _matmul,
    contraction.addmm: _matmul,
    contraction.einsum: _einsum,
    contraction.attention: _attention,
}
_REARRANGING = (spatial.pixel_shuffle, spatial.pixel_unshuffle, spatial.channel_shuffle, spatial.im2col, spatial.col2im, spatial.unfold)
_MIXING = (joining.embedding_bag, joining.one_hot, layout.view_as_complex, layout.view_as_real)


def _without_value(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with nothing in what `pad` and `fill` add."""
    if RULES.get(operator_name(node)) is joining.pad:
        keep = 3 if operator_name(node) == "pad" else 2
        return tuple(node.args[:keep]), {k: v for k, v in node.kwargs.items() if k != "value"}
    return node.args, dict(node.kwargs)


def _per_channel(values: Tensor, rank: int) -> Tensor:
    return values.reshape(1, -1, *[1] * (rank - 2)) if rank > 1 else values


# --- values ---------------------------------------------------------------------------------------------------------------------


def _opaque(nodes: list[fx.Node]) -> frozenset[fx.Node]:
    """Nodes whose memory is written to through views, and all that may share it; an operator in place on a whole fresh answer is followed."""
    order = {node: place for place, node in enumerate(nodes)}
    followed: set[fx.Node] = set()

    def is_whole(node: fx.Node) -> bool:
        return is_fresh(node) or node in followed

    for node in nodes:
        written = node.args[0] if node.args else None
        if node.op != "call_function" or not has_effect(node) or not isinstance(written, fx.Node):
            continue
        simple = RULES.get(operator_name(node)) in (elementwise.unary, elementwise.broadcasting)
        if simple and is_whole(written) and all(is_whole(u) for u in written.users if order[u] < order[node]):
            followed.add(node)
    others = [n for n in nodes if n not in followed]
    found = written_to(others).union(n for n in others if n.op == "call_function" and has_effect(n))
    for node in others:
        if node.op == "call_function" and not is_fresh(node) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _input(value: Tensor) -> Known:
    unknown = torch.ones_like(value, dtype=torch.bool)
    return Known(in_double(_zeroed(value, unknown)), unknown)


def _zeroed(value: Tensor, unknown: Tensor | None) -> Tensor:
    """Numbers that index stay: they must be valid."""
    if not value.is_floating_point():
        return value
    return torch.zeros_like(value) if unknown is None else value.masked_fill(unknown, 0)


def _value(known: Any) -> Any:
    return [_value(k) for k in known] if isinstance(known, list) else known.value if isinstance(known, Known) else known


def _marks(known: Any) -> Any:
    return torch.zeros(known.value.shape) if known.unknown is None else known.unknown.float()


def _nothing(known: Any) -> Tensor:
    return torch.zeros(known.value.shape)


def _leaves(known: Any) -> list[Known]:
    return [k for k in (known if isinstance(known, list) else [known]) if isinstance(k, Known)]


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]


def _map(value: Any, function: Callable[..., Any]) -> Any:
    """`function` of a tensor or shape, or of each in a list of answers."""
    if isinstance(value, list) or (isinstance(value, tuple) and value and not isinstance(value[0], int)):
        return [function(v) if isinstance(v, (Tensor, tuple)) else v for v in value]
    return function(value) if isinstance(value, (Tensor, tuple)) else value


def _shapes(node: fx.Node) -> Any:
    """The shape of a node's answer on the example; a list of such for several."""
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):
        return [shape_of(v) if isinstance(v, Tensor) else v for v in value]
    return shape_of(value)


def _either(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return [_either(x, y) for x, y in zip(a, b, strict=True)]
    return a | b if isinstance(a, Tensor) else a
