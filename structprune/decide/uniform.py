"""The uniform allocation: every prunable axis keeps about the same share of its entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from structprune.analysis.groups import Groups
from structprune.ir.axes import Atom, Axis, Product, Shape, Sum, kept_size, leaves

Widths = Mapping[Atom, int]

ALIGN = (8, 4)  # ONNX Runtime on x86 works in blocks of channels: a width between two multiples costs as much as the next, or more
_SAME_SHARE = 0.02  # allocations whose worst axis is this much nearer to the target share are told apart
_SAME_COST = 0.01


class Uniform:
    """Every prunable axis keeps about the same share of its entries.

    An axis of several free factors (heads × width, groups × inner) keeps that share overall. Which factor gives? Both
    orders are tried: the outer ones first (whole heads, whole groups), or the inner ones first; the one that comes
    nearest to the share wins, then the one with fewer multiply-accumulates (grouped convolutions: the inner widths, for they
    enter the work twice), then the outer ones (heads: their width, and what depends on it, stays).
    """

    def __init__(self, groups: Groups, align: bool = False, steps: Mapping[Atom, int] | None = None):
        """align: groups that are wide enough get widths that runtimes work in; steps: these, where they were measured."""
        self._align, self._steps = align, steps or {}
        free = {g.atom for g in groups}
        self._products = _products(groups, free)
        self.clusters = _clusters(free, self._products)  # atoms that share a product, from the outermost to the innermost
        self._free = free
        shared = [atom for cluster in self.clusters if len(cluster) > 1 for atom in cluster]
        self._work = {atom: [axes for axes in groups.work if any(atom in leaves(a) for a in axes)] for atom in shared}

    def widths(self, share: float) -> Widths:
        """Channels to keep for every group when each axis keeps `share` of its entries, at least one."""
        widths: dict[Atom, int] = {}
        for cluster in self.clusters:
            if len(cluster) == 1:
                widths[cluster[0]] = self._aligned(cluster[0], share)
            else:
                widths |= self._shared_out(cluster, share)
        return widths

    def parted(self, most: int) -> tuple[list[Atom], list[list[Atom]]]:
        """The atoms to be decided first, so that no more than `most` of the others share a product, transitively; and the clusters of these.

        A rotary embedding's width stands in the heads of all layers, which it alone ties to each other.
        """
        first: list[Atom] = []
        clusters = self.clusters
        while large := [atom for cluster in clusters if len(cluster) > most for atom in cluster]:
            first.append(max(large, key=lambda a: sum(a in leaves(p) for p in self._products)))
            clusters = _clusters(self._free.difference(first), self._products)
        return first, clusters

    def _aligned(self, atom: Atom, share: float) -> int:
        step = self._steps.get(atom, block(atom.size) if self._align else 1)
        return min(atom.size, step * _rounded(atom.size * share / step))

    def _shared_out(self, cluster: Sequence[Atom], share: float) -> Widths:
        products = [p for p in self._products if any(a in cluster for a in leaves(p))]
        outer_first = _fit(cluster, products, share)
        inner_first = _fit(cluster[::-1], products, share)

        def miss(widths: Widths) -> float:
            return max(abs(_share(p, widths) - share) for p in products)

        def cost(widths: Widths) -> int:
            work = {id(axes): axes for atom in cluster for axes in self._work[atom]}
            return sum(math.prod(kept_size(a, widths) for a in axes) for axes in work.values())

        if abs(miss(outer_first) - miss(inner_first)) > _SAME_SHARE:
            return min(outer_first, inner_first, key=miss)
        return inner_first if cost(inner_first) < (1 - _SAME_COST) * cost(outer_first) else outer_first


def block(size: int) -> int:
    """The step between widths of a group of that size, where none was measured."""
    return next((step for step in ALIGN if size >= 4 * step), 1)


def _fit(order: Sequence[Atom], products: Sequence[Product], share: float) -> Widths:
    """Give the atoms their widths in turn: each takes what the axes that it stands in still have to give.

    Atoms that are added, not multiplied (the widths of queries and of values beside each other), take the same share of it.
    """
    widths: dict[Atom, int] = {}
    for i, atom in enumerate(order):
        missing, last = 1.0 if not products else 0.0, True
        for product in (p for p in products if atom in leaves(p)):
            beside = [a for factor in product.factors if atom not in leaves(factor) for a in leaves(factor)]
            missing = max(missing, share / _share(product, {a: widths[a] for a in beside if a in widths}))
            last = last and not any(a in order[i + 1 :] for a in beside)
        wanted = atom.size * min(1.0, missing)
        widths[atom] = _rounded(wanted) if last else max(1, math.ceil(wanted - 1e-9))
    return widths


def _share(axis: Axis, widths: Widths) -> float:
    return kept_size(axis, widths) / axis.size


def _rounded(value: float) -> int:
    return max(1, math.floor(value + 0.5))


def _products(groups: Groups, free: set[Atom]) -> list[Product]:
    """The products with more than one free atom in the axes of the model's tensors."""
    found: dict[Product, None] = {}

    def visit(axis: Axis) -> None:
        if isinstance(axis, Sum):
            for term in axis.terms:
                visit(term)
        elif isinstance(axis, Product) and len(free.intersection(leaves(axis))) > 1:
            found[axis] = None
            for factor in axis.factors:
                visit(factor)

    shapes: list[Shape] = list(groups.axes.values())
    for shape in shapes:
        for axis in shape:
            visit(axis)
    return list(found)


def _clusters(free: set[Atom], products: Sequence[Product]) -> list[list[Atom]]:
    """Atoms that share a product, transitively; each cluster from the outermost to the innermost atom."""
    parent: dict[Atom, Atom] = {a: a for a in free}

    def root(atom: Atom) -> Atom:
        while parent[atom] is not atom:
            atom = parent[atom]
        return atom

    depth: dict[Atom, int] = dict.fromkeys(free, 0)
    for axis in products:
        atoms = [a for a in leaves(axis) if a in free]
        for place, factor in enumerate(axis.factors):
            for atom in leaves(factor):
                if atom in free:
                    depth[atom] = max(depth[atom], place)
        for atom in atoms[1:]:
            parent[root(atom)] = root(atoms[0])
    clusters: dict[Atom, list[Atom]] = {}
    for atom in sorted(free, key=lambda a: a.number):
        clusters.setdefault(root(atom), []).append(atom)
    return [sorted(c, key=lambda a: (depth[a], a.number)) for c in clusters.values()]
