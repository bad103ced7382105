"""What is in memory together while a graph runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from structprune.ir.operators import is_view


def alive(nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """For every node that computes a value of its own, the nodes whose values are in memory then, its own the last of them.

    A value lives from the node that computes it to the last one that reads it, or a view of it. Weights are not counted.
    """
    storage: dict[fx.Node, fx.Node] = {}  # a view, or what is written in place, and the node whose memory it is
    last: dict[fx.Node, int] = {}
    order = [n for n in nodes if n.op in ("placeholder", "call_function")]
    births = {node: place for place, node in enumerate(order)}
    for node, place in births.items():
        storage[node] = next((storage[s] for s in node.all_input_nodes[:1] if s in storage), node) if is_view(node) else node
        for read in (node, *node.all_input_nodes):
            if read in storage:
                last[storage[read]] = place
    found: list[fx.Node] = []
    for now in order:
        if storage[now] is now:
            found = [n for n in found if last[n] >= births[now]] + [now]
            yield now, found
