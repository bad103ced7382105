"""What a choice of widths costs: a sum of terms, each a function of the sizes of a few axes.

Multiply-accumulates, parameters, the bytes of the file, what is in memory at one time, and measured latency are all of this form, and
allocation needs to know no more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from torch import Tensor, fx

from structprune.analysis.groups import Groups
from structprune.ir.axes import Atom, Shape, kept_size, leaves
from structprune.ir.graph import Graph
from structprune.ir.liveness import alive

_DESCRIBED = 200  # bytes of the file for each node of the graph


@dataclass(frozen=True)
class Term:
    """`value` of sizes [..., axes] is the cost [...] when the axes have these sizes."""

    axes: Shape
    value: Callable[[np.ndarray], np.ndarray]

    def __call__(self, widths: Mapping[Atom, int]) -> float:
        return float(self.value(np.array([[kept_size(axis, widths) for axis in self.axes]], dtype=np.float64))[0])


@dataclass(frozen=True)
class Cost:
    """`name`: of the target that limits it. `fixed`: widths of atoms that nobody chooses, the batch of the user's example."""

    name: str
    terms: tuple[Term, ...]
    constant: float = 0.0
    fixed: Mapping[Atom, int] | None = None

    def __call__(self, widths: Mapping[Atom, int] | None = None) -> float:
        sizes = {**(self.fixed or {}), **(widths or {})}
        return self.constant + sum(term(sizes) for term in self.terms)

    def change(self, widths: Mapping[Atom, int], to: Mapping[Atom, int]) -> float:
        """What it adds to the cost to give some atoms other widths."""
        before = {**(self.fixed or {}), **widths}
        after = {**before, **to}
        touched = {place for atom in to if before.get(atom) != to[atom] for place in self._places.get(atom, ())}
        return sum(self.terms[place](after) - self.terms[place](before) for place in sorted(touched))

    @cached_property
    def _places(self) -> Mapping[Atom, list[int]]:
        """In which terms an atom stands."""
        found: dict[Atom, list[int]] = {}
        for place, term in enumerate(self.terms):
            for atom in {a for axis in term.axes for a in leaves(axis)}:
                found.setdefault(atom, []).append(place)
        return found


def _volume(sizes: np.ndarray, unit: float = 1.0) -> np.ndarray:
    return sizes.prod(axis=-1) * unit


def macs(groups: Groups) -> Cost:
    """Multiply-accumulates of one call on the example inputs."""
    return Cost("macs", tuple(Term(axes, _volume) for axes in groups.work), fixed=groups.batch)


def params(groups: Groups) -> Cost:
    """Number of parameters."""
    return Cost("params", tuple(Term(groups.axes[name], _volume) for name in sorted(groups.parameters)))


def size(graph: Graph, groups: Groups) -> Cost:
    """Bytes of the ONNX file, from above: all tensors of the model as if none were folded into others, and what describes the graph."""
    tensors = {str(n.target): graph.tensor(n) for n in graph.nodes if n.op == "get_attr" and str(n.target) in graph.aliases}
    terms = [Term(groups.axes[graph.aliases[name][0]], partial(_volume, unit=t.element_size())) for name, t in tensors.items()]
    return Cost("size", tuple(terms), constant=float(_DESCRIBED * len(graph.nodes)))


def memory(graph: Graph, groups: Groups) -> tuple[Cost, ...]:
    """Bytes of activations that are alive at one time, for every node that computes one: their peak is the largest of these costs."""
    terms: dict[fx.Node, list[Term]] = {}
    found = []
    for node, together in alive(graph.nodes):
        terms[node] = _activation(groups, node)
        found.append(Cost("memory", tuple(t for n in together for t in terms[n]), fixed=groups.batch))
    return tuple(found)


def _activation(groups: Groups, node: fx.Node) -> list[Term]:
    values = node.meta.get("val")
    sizes = [v.element_size() for v in (values if isinstance(values, (list, tuple)) else [values]) if isinstance(v, Tensor)]
    resolve = groups.types.solver.resolve
    shapes = groups.types.shapes(node)
    return [Term(tuple(map(resolve, shape)), partial(_volume, unit=s)) for shape, s in zip(shapes, sizes, strict=False)]
