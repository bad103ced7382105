"""The network as a reader goes through it: its weights in the order in which they run, the channels that each reads and makes, and where
channels are tied to one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from structprune.analysis.groups import Groups
from structprune.ir.axes import Atom
from structprune.ir.graph import Graph, source_of
from structprune.ir.operators import operator_name


def outline(graph: Graph, groups: Groups) -> list[dict[str, Any]]:
    """Plain JSON, one entry a step, in the order of the graph; takes time linear in it. Channels are 'g3' for the fourth group, 'f0' for the first
    frozen axis.

    A step is an operator that uses a weight of two axes or more ({"layer", "operator", "at", "reads", "makes"}; channels that pass through it, as
    through a depthwise convolution, are in both), or one that several operands enter with the same channels, such as the addition of a residual
    ({"operator", "at", "ties"}).
    """
    keys = {g.atom: f"g{number}" for number, g in enumerate(groups)} | {f.atom: f"f{number}" for number, f in enumerate(groups.frozen) if f.atom}
    weights = _weights(graph)
    steps: list[dict[str, Any]] = []
    for node in graph.nodes:
        if node.op != "call_function" or node in weights:
            continue
        data = [n for n in node.all_input_nodes if n not in weights]
        made = _known(groups, node, keys)
        entering = [_known(groups, n, keys) for n in data]
        used = [(name, _known(groups, n, keys)) for n in node.all_input_nodes for name in weights.get(n, ()) if len(groups.axes[name]) > 1]
        place = {"operator": operator_name(node), "at": source_of(node)}
        for name, stands in used:
            reads = [key for key in stands if any(key in e for e in entering)]
            makes = [key for key in stands if key in made]
            steps.append({"layer": name, **place, "reads": reads, "makes": makes})
        ties = [key for key in dict.fromkeys(k for e in entering for k in e) if sum(key in e for e in entering) > 1]
        if ties and not used:
            steps.append({**place, "ties": ties})
    return steps


def _weights(graph: Graph) -> Mapping[fx.Node, tuple[str, ...]]:
    """Nodes that are computed from parameters and buffers alone, with the names of these."""
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = graph.aliases.get(str(node.target), ())[:1]
        elif node.op == "call_function" and node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            found[node] = tuple(dict.fromkeys(name for n in node.all_input_nodes for name in found[n]))
    return found


def _known(groups: Groups, node: fx.Node, keys: Mapping[Atom, str]) -> list[str]:
    """The channels in a node's answer that a report names, in the order of its axes."""
    shapes = groups.types.shapes(node)
    return list(dict.fromkeys(keys[a] for shape in shapes for axis in shape for a in groups.types.solver.atoms(axis) if a in keys))
