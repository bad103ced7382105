"""Where removed channels are zero, and where they are not.

To set the weights of a channel to zero is not always to remove it: sigmoid(0) is 1/2, and a sum that runs over such a channel without a
weight of its own to silence it takes the 1/2 in. A plan says of its groups whether a plain zero mask would answer the
same (`exact`); this pass finds out. An atom is *loud* in a node's answer if its removed entries may be other than zero there.
Unknown operators are loud.

A statistic taken from channels makes none of them loud: where a norm is written by hand, x - mean(x) is other than zero for a removed channel,
but the variance is over the channels of which the mean was taken, and these are the kept ones.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from structprune.analysis.infer import Types
from structprune.ir.axes import Atom
from structprune.ir.graph import Graph
from structprune.ir.operators import operator_name
from structprune.ops import RULES, contraction, elementwise, joining, layout, normalization, recurrent, spatial

Loud = frozenset[Atom]
_NONE: Loud = frozenset()

_ZERO_AT_ZERO = frozenset({
    "abs", "asin", "asinh", "atan", "atanh", "ceil", "celu", "elu", "erf", "expm1", "floor", "frac", "gelu", "glu", "hardshrink", "hardswish",
    "hardtanh", "leaky_relu", "log1p", "mish", "nan_to_num", "neg", "negative", "positive", "prelu", "relu", "relu6", "round", "rrelu", "selu",
    "sign", "silu", "sin", "sinh", "softshrink", "sqrt", "square", "tan", "tanh", "tanhshrink", "trunc", "zero",
    "alias", "clone", "contiguous", "cpu", "detach", "double", "float", "half", "lift_fresh_copy", "to", "_to_copy", "type_as",
    "dropout", "alpha_dropout", "feature_dropout",
})  # fmt: skip
_ZEROS = frozenset({"zeros", "new_zeros", "zeros_like"})
_FACTORS = frozenset({"mul", "multiply", "logical_and", "__and__", "bitwise_and"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "floor_divide", "fmod", "remainder", "expand_as"})
_ADDENDS = frozenset({"add", "sub", "subtract", "maximum", "minimum"})
_CHOICES = {"where": (1, 2), "masked_fill": (0, 2)}
_FILLING = {"pad": 3, "constant_pad_nd": 2, "index_fill": 3}  # the place of a value that is put beside the others
_WHATEVER = frozenset({"logsumexp", "one_hot", "bucketize", "searchsorted"})  # a zero is to them a value like others
_AFFINE = {"batch_norm": (1, 2), "instance_norm": (1, 2), "layer_norm": (2, 3), "group_norm": (2, 3), "rms_norm": (2, None)}
# zeros stay zeros; of a recurrent layer too, whose gates of zero weights halve the state
_PASSING = frozenset({layout.__name__, joining.__name__, spatial.__name__, recurrent.__name__})
_ENTRIES = {"scaled_dot_product_attention": (2,), "embedding": (0,), "embedding_bag": (0,), "gather": (0,), "take_along_dim": (0,), "index": (0,),
            "_unsafe_index": (0,), "index_select": (0,), "index_put": (0, 2), "masked_scatter": (0, 2), "scatter": (0, 3), "scatter_add": (0, 3),
            "scatter_reduce": (0, 3), "index_add": (0, 3), "index_copy": (0, 3)}  # fmt: skip
_REDUCED = (normalization.total, normalization.mean, normalization.vector_norm, normalization.norm, normalization.reduction, normalization.variance)
_STATISTICS = ("mean", "variance")


def read_where_loud(graph: Graph, types: Types) -> dict[str, dict[Atom, fx.Node]]:
    """For sums, means and variances: the atoms over which an operator takes one of entries that are not zero where they are removed, and the
    operator.
    """
    atoms = {n: _atoms(types, n) for n in graph.nodes}
    statistics = _statistics(graph, types)
    loud: dict[fx.Node, Loud] = {}
    for node in graph.nodes:
        loud[node] = _loud(graph, node, types.constants, atoms, statistics, loud) & atoms[node]
    found: dict[str, dict[Atom, fx.Node]] = {"sum": {}, "mean": {}, "variance": {}}
    for reading in types.readings:
        operands = reading.node.all_input_nodes
        for atom in types.solver.atoms(reading.axis) if reading.how in found else ():
            if all(atom in loud[o] for o in operands if atom in atoms[o]):
                found[reading.how].setdefault(atom, reading.node)
    return found


def _atoms(types: Types, node: fx.Node) -> Loud:
    """The free atoms in a node's answer: frozen ones lose nothing."""
    return frozenset(a for a in types.atoms(node) if types.solver.reason(a) is None)


def _statistics(graph: Graph, types: Types) -> dict[fx.Node, frozenset[Atom]]:
    """The atoms of which a node's answer is a statistic, or an elementwise function of one."""
    found: dict[fx.Node, frozenset[Atom]] = {}
    for reading in types.readings:
        if reading.how in _STATISTICS:
            found[reading.node] = found.get(reading.node, _NONE).union(types.solver.atoms(reading.axis))
    for node in graph.nodes:
        rule = RULES.get(operator_name(node))
        if node.target is operator.getitem or (rule is not None and rule.__module__ in (elementwise.__name__, layout.__name__)):
            found[node] = _NONE.union(*(found.get(o, _NONE) for o in node.all_input_nodes))
    return found


def _loud(
    graph: Graph,
    node: fx.Node,
    constants: frozenset[fx.Node],
    atoms: Mapping[fx.Node, Loud],
    statistics: Mapping[fx.Node, frozenset[Atom]],
    loud: Mapping[fx.Node, Loud],
) -> Loud:
    """What may be loud in a node's answer, from what is in its operands."""
    mine, operands = atoms[node], node.all_input_nodes
    if node.op == "get_attr":  # a parameter's removed entries are the ones that are set to zero
        return _NONE if str(node.target) in graph.aliases and not str(node.target).endswith("running_var") else mine
    name = operator_name(node)
    if name in _ZEROS:
        return _NONE
    if not name or not mine or node in constants or name in _WHATEVER:
        return mine
    if name in _FILLING and not _is_zero(next(iter(node.args[_FILLING[name] :]), 0) or 0):
        return mine
    rule = RULES.get(name)
    if name in _FACTORS:  # one silent factor is enough
        return frozenset(a for a in mine if all(a in loud[o] for o in operands if a in atoms[o]))
    if name in _CHOICES:  # one value or another, each of which must be silent
        values = [node.args[p] for p in _CHOICES[name] if p < len(node.args)]
        chosen = [v for v in values if isinstance(v, fx.Node)]
        outside = any(not _is_zero(v) for v in values if not isinstance(v, fx.Node))
        return mine if outside else frozenset(a for a in mine if any(a in loud[o] or a not in atoms[o] for o in chosen))
    if name in _ADDENDS:  # every addend must be silent, and none may come from outside the channel, its own statistics aside
        outside = len(operands) < 2 and not _is_zero(node.args[1] if len(node.args) > 1 else 0)
        inside = {o: atoms[o] | statistics.get(o, _NONE) for o in operands}
        return mine if outside else frozenset(a for a in mine if any(a in loud[o] or a not in inside[o] for o in operands))
    if name in _ZERO_AT_ZERO or name in _QUOTIENTS or (name == "pow" and _positive(node.args[1])):
        first = operands[0]
        return frozenset(a for a in mine if a in loud[first] or a not in atoms[first])
    if rule in contraction.WEIGHED:
        x, weight, *bias = [a for a in node.args[:3] if isinstance(a, fx.Node)]
        return frozenset(a for a in mine if _loud_output(a, x, weight, bias, atoms, loud))
    if name in _AFFINE:
        return frozenset(a for a in mine if _loud_norm(a, node, _AFFINE[name], atoms, loud))
    if rule in (contraction.matmul, contraction.einsum, contraction.grouped_matmul):
        return frozenset(a for a in mine if all(a in loud[o] for o in operands if a in atoms[o]))
    if name in _ENTRIES or node.target is operator.getitem or rule in _REDUCED or (rule is not None and rule.__module__ in _PASSING):
        taken = _entries(node)
        passed = frozenset(a for a in mine if any(a in loud[o] for o in taken))
        # zeros in an entry silence all of its copies, and no single one; what another operand counts may be any entry; what pads is zero here
        return passed if name in _FILLING else passed.union(mine.difference(*(atoms[o] for o in taken)))
    return mine


def _loud_output(atom: Atom, x: fx.Node, weight: fx.Node, bias: list[fx.Node], atoms: Mapping[fx.Node, Loud], loud: Mapping[fx.Node, Loud]) -> bool:
    if atom in atoms[weight]:
        return atom in loud[weight] or any(atom in loud[b] or atom not in atoms[b] for b in bias)
    return atom in loud[x] or bool(bias)


def _loud_norm(atom: Atom, node: fx.Node, places: tuple[int, int | None], atoms: Mapping[fx.Node, Loud], loud: Mapping[fx.Node, Loud]) -> bool:
    given = [node.args[p] for p in places if p is not None and p < len(node.args)]
    affine: list[Any] = [a for a in given if isinstance(a, fx.Node)]
    return not affine or any(atom in loud[a] or atom not in atoms[a] for a in affine)


def _entries(node: fx.Node) -> list[fx.Node]:
    """The operands that an operator takes entries of: not the scores, nor the numbers of rows, by which it does."""
    places = _ENTRIES.get(operator_name(node), range(len(node.args)))
    found: dict[fx.Node, None] = {}
    fx.map_arg(([a for place, a in enumerate(node.args) if place in places], node.kwargs), found.setdefault)
    return list(found)


def _is_zero(value: Any) -> bool:
    return not isinstance(value, fx.Node) and value == 0


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0
