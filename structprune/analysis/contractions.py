"""Which nodes multiply and add up, over which axes, in the form in which runtimes run them: as convolutions and matrix products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from structprune.analysis.groups import Groups
from structprune.ir.axes import UNIT, Shape, product
from structprune.ir.graph import shape_of
from structprune.ir.operators import operator_name
from structprune.ops import RULES, contraction

# the axes of a contraction, by its kind; spatial axes and windows of a convolution keep their sizes, and are not among them
ROLES = {
    "conv": ("groups", "filters", "inputs"),  # filters and inputs of one group
    "linear": ("batch", "rows", "inputs", "columns"),  # the second matrix is a constant
    "matmul": ("batch", "rows", "inputs", "columns"),
}


@dataclass(frozen=True)
class Contraction:
    """`axes` as in ROLES."""

    kind: str
    axes: Shape


def contractions(groups: Groups) -> Mapping[fx.Node, list[Contraction]]:
    """Of every node that is one of ROLES, in the order in which it computes them: an attention is two matrix products."""
    found: dict[fx.Node, list[Contraction]] = defaultdict(list)
    for work, axes in zip(groups.types.work, groups.work, strict=True):
        for one in _contractions(work.node, axes, first=work.node not in found):
            found[work.node].append(one)
    return found


def _contractions(node: fx.Node, axes: Shape, first: bool) -> list[Contraction]:
    """At most one, of the axes that the operator's rule multiplies."""
    function = RULES[operator_name(node)]
    if function is contraction.conv or (function is contraction.convolution and not node.args[6]):
        rank = _rank(node.args[1]) - 2
        return [Contraction("conv", axes[-2 * rank - 3 : -2 * rank])]
    if function is contraction.linear and _rank(node.args[1]) == 2:
        return [Contraction("linear", (UNIT, product(axes[:-2]), *axes[-2:]))]
    if function is contraction.attention:
        batch, (tokens, memory, width) = axes[:-3], axes[-3:]
        inputs, columns = (width, memory) if first else (memory, width)
        return [Contraction("matmul", (product(batch), tokens, inputs, columns))]
    if function in (contraction.matmul, contraction.addmm) and len(axes) > 2:
        batch, (rows, inputs, columns) = axes[:-3], axes[-3:]
        last = node.args[2 if function is contraction.addmm else 1]
        if isinstance(last, fx.Node) and last.op == "get_attr":
            return [Contraction("linear", (UNIT, product((*batch, rows)), inputs, columns))]
        return [Contraction("matmul", (product(batch), rows, inputs, columns))]
    return []


def _rank(value: object) -> int:
    assert isinstance(value, fx.Node)
    return len(shape_of(value.meta["val"]))
