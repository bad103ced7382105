"""The uniform allocation: every prunable axis keeps about the same share of its entries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

from structprune.analysis.groups import Groups
from structprune.ir.axes import Atom, Axis, Product, Shape, Sum, kept_size, leaves, product

Widths = Mapping[Atom, int]

ALIGN = (8, 4)  # ONNX Runtime on x86 works in blocks of channels: a width between two multiples costs as much as the next, or more
_SAME_SHARE = 0.02  # shares that differ by no more are taken for one
_SAME_COST = 0.01
_NEAR_SHARE = 0.05  # likewise, where widths come in blocks, and that keeps alike what was alike


class Uniform:
    """Every prunable axis keeps about the same share of its entries.

    An axis of several free factors (heads × width, groups × inner) keeps that share overall. Which factor gives? Both
    orders are tried: the outer ones first (whole heads, whole groups), or the inner ones first; the one that comes
    nearest to the share wins, then the one with fewer multiply-accumulates (grouped convolutions: the inner widths, for they
    enter the work twice), then the outer ones (heads: their width, and what depends on it, stays).

    A product that was as large as the axis that it is made of, or that is made of it (heads × width and the stream that they read), stays as large
    as that, where a share close by allows it: much code, that of `nn.MultiheadAttention` too, computes one from the other.
    """

    def __init__(self, groups: Groups, align: bool = False, steps: Mapping[Atom, int] | None = None, alike: bool = True, whole: bool = False):
        """align: groups that are wide enough get widths that runtimes work in; steps: these, where they were measured.

        alike: products stay as large as their streams; whole: by giving up outer factors alone (whole heads), with shares as far off as that takes,
        and where there is no stream, too, if one is near.
        """
        self._align, self._steps, self._whole = align, steps or {}, whole
        self._free = free = {g.atom for g in groups}
        self._products = _products(groups, free)
        self.clusters = _clusters(free, self._products)  # atoms that share a product, from the outermost to the innermost
        self._counterparts = [
            (coarse, fine) for coarse, fine in _counterparts(self._products, _products(groups, free, least=1), free) if fine in free
        ]
        alone = {cluster[0] for cluster in self.clusters if len(cluster) == 1}
        self._work = {atom: [axes for axes in groups.work if any(atom in leaves(a) for a in axes)] for atom in free - alone}
        self._streams = _streams(groups, free, alone) if alike else {}
        self._made = {a for p in self._streams for a in leaves(p) if a in free}
        tied = _clusters(free, [*self._products, *(Product((p, *streams)) for p, streams in self._streams.items())])
        self._units = [[c for c in self.clusters if c[0] in atoms] for atoms in map(set, tied)]  # the clusters of one stream, and the stream itself
        self._parts = _equal_parts(groups)
        self._together = _clusters(free, [*(Product(tuple(atoms)) for atoms in tied), *self._parts])
        together = set(map(frozenset, self._together))
        self._heads = _widths_of_heads(self._streams, free)
        self._loose = [c for c in self.clusters if frozenset(c) in together and not (whole and len(c) > 1)]

    @property
    def holds(self) -> bool:
        """Whether there is anything for products to stay as large as, or to be given up by whole outer factors."""
        return bool(self._streams) or (self._whole and len(self.clusters) < len(self._free))

    def widths(self, share: float) -> Widths:
        """Channels to keep for every group when each axis keeps `share` of its entries, at least one."""
        widths: dict[Atom, int] = {}
        for unit in self._units:
            widths |= self._alike(unit, share) or self._each(unit, share)
        return self._with_equal_parts(widths)

    def filled(self, widths: Widths, share: float, fits: Callable[[Widths], bool]) -> Widths:
        """The widths, and those at a wider share wherever that fits: for all that stays alike, or is split into equal parts, or for none of it."""
        most = self.widths(share)
        for atoms in self._together:
            more = {**widths, **{atom: most[atom] for atom in atoms}}
            widths = more if all(more[a] >= widths[a] for a in atoms) and fits(more) else widths
        return widths

    def loosened(self, widths: Widths, share: float) -> Widths:
        """With that share of what need not stay alike with anything; empty where nothing need, or all."""
        return {**widths, **self._each(self._loose, share)} if len(self._loose) < len(self.clusters) else {}

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

    def _each(self, unit: Sequence[Sequence[Atom]], share: float) -> Widths:
        """The widths of every cluster for itself."""
        widths: dict[Atom, int] = {}
        for cluster in unit:
            widths |= {cluster[0]: self._aligned(cluster[0], share)} if len(cluster) == 1 else self._shared_out(cluster, share)
        return widths

    def _alike(self, unit: Sequence[Sequence[Atom]], share: float) -> Widths:
        """Widths by which every product is as large as its stream, for the nearest share that allows that; empty where none does, or nothing is tied.

        Best with the inner factors as they were: an attention's scale is computed from the width of its heads.
        """
        if not _is_tied(unit):
            return {}
        streams = [cluster[0] for cluster in unit if self._made.isdisjoint(cluster)]
        outer = [cluster[0].size for cluster in unit if not self._made.isdisjoint(cluster)]
        steps = {a: self._heads.get(a) or self._step(a) for a in streams}
        step = max(steps[a] / a.size for a in streams)
        near = _NEAR_SHARE if self._align else _SAME_SHARE
        for whole, reach in ((True, max(near, 1 / (2 * min(outer))) if self._whole else near), (False, near)):
            number = max(1, int(reach / step))
            for away in sorted(range(-number, number + 1), key=abs):
                widths = {a: _stepped(a, share + away * step, steps[a]) for a in streams}
                if any(abs(widths[a] / a.size - share) > max(reach, 0 if a in self._heads else steps[a] / a.size / 2) for a in streams):
                    continue  # whole heads are large steps, which no rounding excuses
                if (found := self._as_wide(unit, widths, whole)) is not None:
                    return found
        return {}

    def _as_wide(self, unit: Sequence[Sequence[Atom]], streams: Widths, whole: bool) -> Widths | None:
        widths = dict(streams)
        for cluster in unit:
            if not self._made.isdisjoint(cluster):
                tied = [(p, stream) for p, its_streams in self._streams.items() if not set(cluster).isdisjoint(leaves(p)) for stream in its_streams]
                sizes = {(p, kept_size(stream, streams)) for p, stream in tied}
                found = _factored(self._outer(cluster), cluster, dict(sizes), whole) if len(sizes) == len(dict(sizes)) else None
                if found is None:
                    return None
                widths |= found
        return widths if all(kept_size(coarse, widths) == widths[fine] for coarse, fine in self._counterparts if fine in widths) else None

    def _outer(self, cluster: Sequence[Atom]) -> list[Atom]:
        """The outermost atom of a cluster, and of the products in which that is not: windows of two shapes have heads of their own, side by side."""
        others = [atoms for p in self._products if cluster[0] not in (atoms := [a for a in leaves(p) if a in self._free])]
        return [cluster[0], *dict.fromkeys(atoms[0] for atoms in others if atoms[0] in cluster)]

    def _with_equal_parts(self, widths: dict[Atom, int]) -> Widths:
        """With what goes its own way as wide as the part beside it that is tied to a stream."""
        loose = {unit[0][0] for unit in self._units if not _is_tied(unit) and len(unit[0]) == 1}
        for parts in self._parts:
            tied = [kept_size(part, widths) for part in parts.factors if part not in loose and self._free.intersection(leaves(part))]
            widths |= {part: min(tied) for part in parts.factors if tied and isinstance(part, Atom) and part in loose}
        return widths

    def _step(self, atom: Atom) -> int:
        return self._steps.get(atom, block(atom.size) if self._align else 1)

    def _aligned(self, atom: Atom, share: float) -> int:
        return _stepped(atom, share, self._step(atom))

    def _shared_out(self, cluster: Sequence[Atom], share: float) -> Widths:
        products = [p for p in self._products if any(a in cluster for a in leaves(p))]
        outer_first = self._evened(_fit(cluster, products, share))
        inner_first = self._evened(_fit(cluster[::-1], products, share))

        def miss(widths: Widths) -> float:
            return max(abs(_share(p, widths) - share) for p in products)

        def cost(widths: Widths) -> float:
            """For every entry that is left of the products: rounding leaves more of one than of the other."""
            work = {id(axes): axes for atom in cluster for axes in self._work[atom]}
            left = sum(_share(p, widths) for p in products)
            return sum(math.prod(kept_size(a, widths) for a in axes) for axes in work.values()) / left

        best = inner_first if cost(inner_first) < (1 - _SAME_COST) * cost(outer_first) else outer_first
        if abs(miss(outer_first) - miss(inner_first)) > _SAME_SHARE:
            best = min(outer_first, inner_first, key=miss)
        whole = {atom: atom.size for atom in cluster} | {cluster[0]: _rounded(cluster[0].size * share)}
        return whole if self._whole and best is outer_first and miss(whole) <= _NEAR_SHARE else best

    def _evened(self, widths: dict[Atom, int]) -> Widths:
        """With factors of one size at one place of like products as wide as each other: code has one number for them."""
        for coarse, fine in self._counterparts:
            if fine in widths:
                widths[fine] = kept_size(coarse, widths)
        return widths


def block(size: int) -> int:
    """The step between widths of a group of that size, where none was measured."""
    return next((step for step in ALIGN if size >= 4 * step), 1)


def _stepped(atom: Atom, share: float, step: int) -> int:
    return min(atom.size, step * _rounded(atom.size * share / step))


def _is_tied(unit: Sequence[Sequence[Atom]]) -> bool:
    """Whether there are streams, and products that are as large as these."""
    return len(unit) > 1


def _factored(outer: Sequence[Atom], cluster: Sequence[Atom], sizes: Mapping[Axis, int], whole: bool) -> Widths | None:
    """Widths that give the products of a cluster these sizes: the fewest of the outermost atoms, and all others in one proportion. None if none do.

    outer: the outermost, in one proportion themselves; whole: the others as they are.
    """
    before, after = next((heads.size, size) for heads, size in sizes.items())
    most = outer[0].size
    for number in range(1, most + 1):
        share = Fraction(number, most)
        widths = {atom: atom.size * (share if atom in outer else Fraction(after, before) / share) for atom in cluster}
        if all(width.denominator == 1 and (atom.size if whole and atom not in outer else 1) <= width <= atom.size for atom, width in widths.items()):
            found = {atom: int(width) for atom, width in widths.items()}
            if all(kept_size(heads, found) == size for heads, size in sizes.items()):
                return found
    return None


def _fit(order: Sequence[Atom], products: Sequence[Product], share: float) -> dict[Atom, int]:
    """Give the atoms their widths in turn: each takes what the axes that it stands in still have to give.

    Atoms that are added, not multiplied (the widths of queries and of values beside each other), take the same share of it.
    """
    widths: dict[Atom, int] = {}
    for i, atom in enumerate(order):
        missing, last = 1.0 if not products else 0.0, True
        for axis in (p for p in products if atom in leaves(p)):
            beside = [a for factor in axis.factors if atom not in leaves(factor) for a in leaves(factor)]
            missing = max(missing, share / _share(axis, {a: widths[a] for a in beside if a in widths}))
            last = last and not any(a in order[i + 1 :] for a in beside)
        wanted = atom.size * min(1.0, missing)
        widths[atom] = _rounded(wanted) if last else max(1, math.ceil(wanted - 1e-9))
    return widths


def _counterparts(products: Sequence[Product], others: Sequence[Product], free: set[Atom]) -> Iterator[tuple[Axis, Atom]]:
    """What stands in one product where an atom of that size stands in another, or beside it: queries of which parts turn, and the values; or
    queries whose width cannot change, for they turn by a table.

    others: products of what cannot change, too. What stands beside each other comes first, for it may stand for an atom in another product.
    """
    for beside in dict.fromkeys(factor for p in products for factor in p.factors if isinstance(factor, Sum)):
        yield from _neighbours(beside)
    for one, other in itertools.product(others, products):
        if one.size != other.size or one == other:
            continue
        for before, fine in enumerate(other.factors):
            behind = other.factors[before + 1 :]
            end = len(one.factors) - len(behind)
            if isinstance(fine, Atom) and before < end and one.factors[:before] + one.factors[end:] == other.factors[:before] + behind:
                instead = one.factors[before:end]
                if len(instead) > 1 or isinstance(instead[0], Sum) or instead[0] not in free:
                    yield Product(instead), fine


def _neighbours(beside: Sum) -> Iterator[tuple[Axis, Atom]]:
    """Parts that follow each other, and an atom that is as large as all of them."""
    for first, last in itertools.combinations(range(len(beside.terms)), 2):
        parts = Sum(beside.terms[first : last + 1])
        for term in (*beside.terms[:first], *beside.terms[last + 1 :]):
            if isinstance(term, Atom) and term.size == parts.size:
                yield parts, term


def _share(axis: Axis, widths: Widths) -> float:
    return kept_size(axis, widths) / axis.size


def _rounded(value: float) -> int:
    return max(1, math.floor(value + 0.5))


def _products(groups: Groups, free: set[Atom], least: int = 2) -> list[Product]:
    """The products of at least so many free atoms in the axes of the model's tensors.

    Channels that a shuffle lays out, each at several positions, make none: what is beside them is no atom.
    """
    found: dict[Product, None] = {}

    def visit(axis: Axis) -> None:
        if isinstance(axis, Sum):
            for term in axis.terms:
                visit(term)
        elif isinstance(axis, Product) and len(free.intersection(leaves(axis))) >= least:
            if sum(any(leaves(factor)) for factor in axis.factors) > 1:
                found[axis] = None
            for factor in axis.factors:
                visit(factor)

    shapes: list[Shape] = list(groups.axes.values())
    for shape in shapes:
        for axis in shape:
            visit(axis)
    return list(found)


def _streams(groups: Groups, free: set[Atom], alone: set[Atom]) -> dict[Axis, tuple[Axis, ...]]:
    """Of what heads are laid out in, what tensors make it of, or make of it, of the same size: axes whose free atoms share no product.

    Several where keys and values are made of other things than queries.
    """
    found: dict[Axis, dict[Axis, None]] = {}
    recurrent = {atom for shape in groups.axes.values() if len(shape) == 2 for atom in set(leaves(shape[0])).intersection(leaves(shape[1]))}
    grouped = {a for shape in groups.axes.values() if len(shape) > 2 and shape[1] in free - alone for a in (shape[1], *leaves(shape[0]))}
    for shape in groups.axes.values():
        for axis in shape:
            for heads in (h for part in (axis.terms if isinstance(axis, Sum) else (axis,)) for h in _heads(part, free)):
                own = free.intersection(leaves(heads))
                if own & grouped or (len(own) == 1 and (len(shape) > 2 or own <= recurrent)):
                    continue  # the groups of a convolution, or channels that it makes for a shuffle, or gates of hidden units: no heads
                like = (a for a in shape if a.size == heads.size and set() < free.intersection(leaves(a)) <= alone.difference(leaves(heads)))
                found.setdefault(heads, {}).update(dict.fromkeys(like))
    read = {a for heads, streams in found.items() if alone.isdisjoint(leaves(heads)) for stream in streams for a in leaves(stream)}
    made = {a for heads, streams in found.items() if streams for a in leaves(heads)} - read
    kept = {heads: tuple(s for s in streams if made.isdisjoint(leaves(s))) for heads, streams in found.items() if read.isdisjoint(leaves(heads))}
    return {heads: streams for heads, streams in kept.items() if streams}


def _heads(axis: Axis, free: set[Atom]) -> Iterator[Axis]:
    """What code may make of a stream, of an axis of several factors: those that can change, of queries, keys and values beside each other one of the
    three; and these with what cannot change behind them, for heads may have a width that stays.
    """
    if isinstance(axis, Product):
        changing = [bool(free.intersection(leaves(factor))) for factor in axis.factors]
        if any(changing):
            behind = product(axis.factors[changing.index(True) :])
            part = product(f for f, changes in zip(axis.factors, changing, strict=True) if changes)
            yield from dict.fromkeys((behind, behind if isinstance(part, Atom) else part))


def _widths_of_heads(streams: Mapping[Axis, Sequence[Axis]], free: set[Atom]) -> dict[Atom, int]:
    """By what such streams can change where the heads that are made of them have a width that stays."""
    found: dict[Atom, int] = {}
    for heads, its_streams in streams.items():
        number = free.intersection(leaves(heads))
        if len(number) == 1 and heads not in number:
            for stream in its_streams:
                if isinstance(stream, Atom):
                    found[stream] = math.lcm(found.get(stream, 1), heads.size // next(iter(number)).size)
    return found


def _equal_parts(groups: Groups) -> list[Product]:
    """What one tensor makes in several parts of one size, which code may get by chunk(), or by one number."""
    made = [shape[0] for shape in groups.axes.values() if len(shape) > 1]
    return [Product(axis.terms) for axis in made if isinstance(axis, Sum) and len({term.size for term in axis.terms}) == 1]


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
