"""When samples join a graph that is run node by node: few where values are large, more where there is room for them.

Layers with large pictures have many positions and few channels, and learn enough from few samples; layers with many channels come later, where the
values of a sample are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from structprune import processes
from structprune.errors import InputError
from structprune.ir.graph import Graph, shape_of
from structprune.ir.liveness import alive
from structprune.ir.samples import Samples, held_back, samples_in

MEMORY = 2 << 30  # bytes of values that may be alive together
_LEAST = 16  # samples
_TOGETHER = 32  # samples that catch up with the others at one time


@dataclass(frozen=True)
class Arrival:
    """A batch that joins; `first`: the share of its samples that is of the first half of all, on which the ridge is not judged."""

    batch: list[Any]
    first: float


def arrivals(graph: Graph, samples: Samples, memory: float = MEMORY) -> dict[fx.Node, list[Arrival]]:
    """Before which node of the graph which samples join, the first of them before its first node.

    At every time they are evenly spread over all samples, and their values, there and at all nodes that follow, take `memory` bytes at most (those
    of 16 samples may take more). Each time their number doubles at least, or all are there. Where the graph takes no other batches than the
    example's, batches join as they are.

    Of several processes that share the work, each gets its share, and the memory of all makes room. Raises InputError for fewer samples than
    processes.
    """
    count = samples.count
    each = max(1, len(samples) // count)
    if count < (sharers := processes.sharers()):
        parts = "samples" if samples.divisible else "batches"
        raise InputError(f"{count} {parts} cannot be shared by {sharers} processes; give more, or leave out sharded")
    waiting = list(range(count))
    found: dict[fx.Node, list[Arrival]] = {}
    for node, taken in _bytes_ahead(graph):
        here = count - len(waiting)
        room = min(count, max(sharers, sharers * max(_LEAST, int(memory / max(taken, 1.0))) // each))  # nobody stands idle: all add up sums
        if waiting and (room >= 2 * here or room == count):
            places = set(np.linspace(0, len(waiting), room - here, endpoint=False).astype(int).tolist())
            joining = [number for place, number in enumerate(waiting) if place in places]
            waiting = [number for place, number in enumerate(waiting) if place not in places]
            found[node if found else next(iter(graph.nodes))] = [
                Arrival(batch, first) for first, some in _pieces(processes.share_of(joining), count) for batch in samples.of(some).batches
            ]
    return found


def _pieces(numbers: list[int], count: int) -> Iterator[tuple[float, set[int]]]:
    """A few of the numbers at a time, with the share of each that is of the first half."""
    second = held_back(count, 1 / 2)
    halves = [(1.0, [n for n in numbers if n not in second]), (0.0, [n for n in numbers if n in second])] if count > 1 else [(1 / 2, numbers)]
    for first, some in halves:
        yield from ((first, set(some[i : i + _TOGETHER])) for i in range(0, len(some), _TOGETHER))


def _bytes_ahead(graph: Graph) -> list[tuple[fx.Node, float]]:
    """For every node that computes a value the most that is alive of one sample, there or later."""
    size: dict[fx.Node, float] = {}
    found: list[tuple[fx.Node, float]] = []
    example = samples_in(graph.flat_inputs())
    for node, values in alive(graph.nodes):
        size[node] = bytes_of(node) / example
        found.append((node, sum(size[n] for n in values)))
    most = np.maximum.accumulate([taken for _, taken in reversed(found)])[::-1]
    return [(node, float(taken)) for (node, _), taken in zip(found, most, strict=True)]


def bytes_of(node: fx.Node) -> int:
    """Of what a node computes on the example."""
    value = node.meta.get("val")
    return sum(v.element_size() * math.prod(shape_of(v)) for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor))
