"""Which nodes multiply and add up, over which axes, as runtimes run them: in convolutions, matrix products, and layers of recurrent networks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from structprune.analysis.groups import Groups
from structprune.ir.axes import UNIT, Atom, Shape, kept_size, product
from structprune.ir.graph import shape_of
from structprune.ir.operators import operator_name
from structprune.ops import RULES, contraction, recurrent

# the axes of a contraction, by its kind; spatial axes and windows of a convolution keep their sizes, and are not among them
ROLES = {
    "conv": ("groups", "filters", "inputs"),  # filters and inputs of one group
    "conv_transpose": ("groups", "filters", "inputs"),
    "linear": ("batch", "rows", "inputs", "columns"),  # the second matrix is a constant
    "matmul": ("batch", "rows", "inputs", "columns"),
    "recurrent": ("inputs", "hidden"),  # of one layer, in its one or two directions
}


@dataclass(frozen=True)
class Contraction:
    """`axes` as in ROLES."""

    kind: str
    axes: Shape

    def volume(self, widths: Mapping[Atom, int]) -> int:
        """Its multiplications, up to a factor that does not depend on widths: how its time compares with that of others in its node."""
        sizes = [kept_size(axis, widths) for axis in self.axes]
        return sizes[1] * sum(sizes) if self.kind == "recurrent" else math.prod(sizes)


def contractions(groups: Groups) -> Mapping[fx.Node, list[Contraction]]:
    """Of every node that is one of ROLES, in the order in which it computes them: an attention is two matrix products."""
    found: dict[fx.Node, list[Contraction]] = defaultdict(list)
    counted: Counter[fx.Node] = Counter()
    for work, axes in zip(groups.types.work, groups.work, strict=True):
        for one in _contractions(work.node, axes, counted[work.node]):
            found[work.node].append(one)
        counted[work.node] += 1
    return found


def _contractions(node: fx.Node, axes: Shape, place: int) -> list[Contraction]:
    """At most one, of the axes that the operator's rule multiplies; place: how many such products of the node came before."""
    function = RULES[operator_name(node)]
    if function is contraction.conv or (function is contraction.convolution and not node.args[6]):
        rank = _rank(node.args[1]) - 2
        return [Contraction("conv", axes[-2 * rank - 3 : -2 * rank])]
    if function in (contraction.conv_transpose, contraction.convolution):
        rank = _rank(node.args[1]) - 2
        return [Contraction("conv_transpose", axes[-2 * rank - 3 : -2 * rank])]
    if function is contraction.linear and _rank(node.args[1]) == 2:
        return [Contraction("linear", (UNIT, product(axes[:-2]), *axes[-2:]))]
    if function is contraction.attention:
        batch, (tokens, memory, width) = axes[:-3], axes[-3:]
        inputs, columns = (memory, width) if place else (width, memory)
        return [Contraction("matmul", (product(batch), tokens, inputs, columns))]
    if function in (contraction.matmul, contraction.addmm) and len(axes) > 2:
        batch, (rows, inputs, columns) = axes[:-3], axes[-3:]
        last = node.args[2 if function is contraction.addmm else 1]
        if isinstance(last, fx.Node) and last.op == "get_attr":
            return [Contraction("linear", (UNIT, product((*batch, rows)), inputs, columns))]
        return [Contraction("matmul", (product(batch), rows, inputs, columns))]
    if function in (recurrent.lstm, recurrent.gru, recurrent.rnn):
        *_, hidden, inputs = axes
        return [Contraction("recurrent", (inputs, hidden))] if place % recurrent.products_of_a_layer(node) == 0 else []
    return []


def _rank(value: object) -> int:
    assert isinstance(value, fx.Node)
    return len(shape_of(value.meta["val"]))
