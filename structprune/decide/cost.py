"""What a choice of widths costs: a sum of terms, each a function of the sizes of a few axes.

Multiply-accumulates, parameters and measured latency are all of this form, and allocation needs to know no more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from structprune.analysis.groups import Groups
from structprune.ir.axes import Atom, Shape, kept_size, leaves


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


def _volume(sizes: np.ndarray) -> np.ndarray:
    return sizes.prod(axis=-1)


def macs(groups: Groups) -> Cost:
    """Multiply-accumulates of one call on the example inputs."""
    return Cost("macs", tuple(Term(axes, _volume) for axes in groups.work), fixed=groups.batch)


def params(groups: Groups) -> Cost:
    """Number of parameters."""
    return Cost("params", tuple(Term(groups.axes[name], _volume) for name in sorted(groups.parameters)))
