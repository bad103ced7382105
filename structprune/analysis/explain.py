"""Why do these layers shrink together, and why does this one not? A path through the user's own source. The only user of networkx."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import networkx as nx

from structprune.analysis.groups import Groups, names_of
from structprune.errors import InputError, did_you_mean
from structprune.ir.axes import Atom
from structprune.ir.graph import Graph, source_of
from structprune.ir.group import Frozen, Group
from structprune.ir.operators import operator_name


def why(graph: Graph, groups: Groups, layer: str, other: str | None = None) -> str:
    """In words: what couples `layer` to `other`; without `other`, each group that the layer takes part in, and each axis that is frozen.

    Layers are module or tensor names, or shell patterns. Raises InputError for one that the model does not have.
    """
    mine = _tensors(groups, layer)
    if other is None:
        return "\n\n".join(_alone(graph, groups, tensor) for tensor in mine)
    theirs = _tensors(groups, other)
    for group in groups:
        ends = [m.tensor for m in group.members]
        a, b = next((t for t in mine if t in ends), None), next((t for t in theirs if t in ends), None)
        if a is not None and b is not None:
            steps = "\n".join(_steps(graph, groups, group.atom, a, b))
            return f"{a} and {b} share the {group.size} channels of group {group.name}:\n{steps}"
    return f"{layer} and {other} share no channels that can be pruned"


def _alone(graph: Graph, groups: Groups, tensor: str) -> str:
    lines = [f"{tensor}  ({' × '.join(map(str, groups.axes[tensor]))})"]
    entries: list[Group | Frozen] = [*groups.groups, *groups.frozen]
    for entry in entries:
        dims = [m.dim for m in entry.members if m.tensor == tensor]
        if dims and isinstance(entry, Group):
            others = dict.fromkeys(m.tensor for m in entry.members if m.tensor != tensor)
            lines.append(f"  axis {dims[0]}: {entry.size} channels of group {entry.name}, shared with {', '.join(others) or 'nothing'}")
        elif dims and isinstance(entry, Frozen):
            lines.append(f"  axis {dims[0]}: {entry.channels} stay: {entry.reason}{f' ({entry.at})' if entry.at else ''}")
    return "\n".join(lines)


def _tensors(groups: Groups, layer: str) -> list[str]:
    found = [name for name in groups.axes if fnmatchcase(name, layer) or fnmatchcase(name, f"{layer}.*")]
    if not found:
        close = did_you_mean(layer, names_of(groups.axes))
        raise InputError(f"{layer!r} is no layer or tensor of the model{close}; names look like {next(iter(groups.axes), '?')!r}")
    return sorted(found, key=lambda name: -len(groups.axes[name]))  # weights before biases


def couplings(graph: Graph, groups: Groups, atom: Atom) -> nx.Graph:
    """The values in which an atom stands, joined where one is computed from the other."""
    coupled = nx.Graph()
    standing = {n for n in graph.whole if atom in groups.types.atoms(n)}
    meant = graph.read_aside
    for node in graph.whole:  # a node that uses the axis up, a contraction, still joins its operands
        coupled.add_edges_from((node, meant.get(operand, operand)) for operand in node.all_input_nodes if operand in standing)
    return coupled


def _steps(graph: Graph, groups: Groups, atom: Atom, first: str, last: str) -> Iterator[str]:
    by_name = {name: node for node in graph.whole if node.op == "get_attr" for name in graph.aliases.get(str(node.target), ())}
    path = nx.shortest_path(couplings(graph, groups, atom), by_name[first], by_name[last])
    for node in path:
        yield f"  {operator_name(node):<20} {source_of(node)}" if node.op == "call_function" else f"  {node.target}"
