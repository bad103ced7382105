"""A model's latency as a function of its widths: the kernels that the runtime runs, each with a measured table or its share of data."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import brentq
from torch import fx

from structprune.analysis.contractions import Contraction, contractions
from structprune.analysis.groups import Groups
from structprune.backends.kernels import BLOCKED, KINDS, Kernel, family, signature
from structprune.backends.tables import Point, Tables
from structprune.decide.allocate import thinned
from structprune.decide.cost import Cost, Term
from structprune.ir.axes import Atom, Axis, Sum, kept_size, leaves
from structprune.ir.graph import Graph

Attributed = tuple[Kernel, fx.Node | None, Contraction | None]  # what runs, the node that it computes, and what it multiplies

_GRID = 6  # sizes of an axis in a table; between two of them time is linear
_MATTERS = 0.005  # of the latency: what takes less has no say in a group's step, where something else has
_GAIN = 0.001  # of the latency: less is no gain
_STEPS = (1, 2, 4, 8, 16, 32)
_BELOW = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # widths that are timed to find the step, counted from a multiple of the largest one
_WORTH = 1.03  # a wider size that costs no more than this is free
_PER_OUTLIER = 8  # timings, of which one may be disturbed
_LEAST = 1 / 8  # of an axis: smaller sizes are not in the tables
_TELLS = 0.95  # of a family's time: where more is left, how it shrinks cannot be seen
_STEEPEST = 2.0  # how a time may follow its prediction
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size"})  # of ONNX Runtime: they move no data
_TICK = 1e-6  # seconds that profilers tell apart


@dataclass(frozen=True)
class LatencyModel:
    """`cost`: predicted seconds for widths. `steps`: for each group's atom, the step between widths that are worth having.

    `kernels`: what of the dense model each term of the cost stands for.
    """

    cost: Cost
    steps: Mapping[Atom, int]
    kernels: tuple[Kernel, ...]

    def taught(self, widths: Mapping[Atom, int], ran: Sequence[Kernel], seconds: float) -> LatencyModel:
        """The same after a look at a model of these widths: what it `ran`, and the seconds that the whole took on the dense model's clock.

        Some kernels shrink by less than their data (a norm takes its time by row), others by more (what no longer leaves the cache). The
        share of the dense kernel's time that is predicted is raised to a power, one for each family, at which the family's kernels take what
        they took: from 0, a time that does not depend on widths, to _STEEPEST.
        """
        found = _by_family(ran, [kernel.seconds for kernel in ran])
        clock = seconds / max(sum(map(sum, found.values())), _TICK)
        whole, narrow = self.cost.fixed or {}, {**(self.cost.fixed or {}), **widths}
        dense = [term(whole) for term in self.cost.terms]
        before, after = _by_family(self.kernels, dense), _by_family(self.kernels, [term(narrow) for term in self.cost.terms])
        powers = {key: _power(np.array(before[key]), np.array(after[key]), clock * sum(taken)) for key, taken in found.items() if key in before}
        terms = [
            Term(term.axes, partial(_bent, term.value, own, powers[family(kernel)])) if own and family(kernel) in powers else term
            for term, kernel, own in zip(self.cost.terms, self.kernels, dense, strict=True)
        ]
        return replace(self, cost=replace(self.cost, terms=tuple(terms)))


@dataclass(frozen=True)
class _Timed:
    """A kernel that runs a contraction, and the key of its table."""

    kernel: Kernel
    contraction: Contraction
    key: str


def latency_model(groups: Groups, kernels: Sequence[Attributed], tables: Tables, align: int | None = None) -> LatencyModel:
    """kernels: what the runtime runs of the dense model. align: a step for all groups, in the place of the measured ones."""
    whole = sum(kernel.seconds for kernel, _, _ in kernels)
    free = {g.atom for g in groups}
    timed: list[_Timed] = []
    rest: list[tuple[Kernel, fx.Node]] = []
    fixed: list[Kernel] = []
    for kernel, node, contraction in kernels:
        if contraction is not None and any(free.intersection(leaves(a)) for a in contraction.axes):
            timed.append(_Timed(kernel, contraction, signature(contraction.kind, kernel.settings)))
        elif node is not None and contraction is None and kernel.operator not in _VIEWS and not free.isdisjoint(groups.types.atoms(node)):
            rest.append((kernel, node))
        else:
            fixed.append(kernel)
    steps = dict.fromkeys(free, align) if align else _measured_steps(groups, free, timed, tables, whole)
    launch = min((kernel.seconds for kernel, _, _ in kernels), default=0.0)
    of_data = [_by_data(groups, kernel, node, launch) for kernel, node in rest]
    terms = [*_tabled(groups, timed, tables, steps), *of_data, *(Term((), partial(_always, kernel.seconds)) for kernel in fixed)]
    ran = (*(one.kernel for one in timed), *(kernel for kernel, _ in rest), *fixed)
    return LatencyModel(Cost("latency", tuple(terms), fixed=groups.batch), steps, ran)


def attributed(graph: Graph, groups: Groups, kernels: Sequence[Kernel], origins: Mapping[str, str]) -> list[Attributed]:
    """For each kernel of the dense model's ONNX file the node of the graph that it computes, and its contraction.

    origins: which node of the graph each node of the file comes from (see onnx.export). A kernel without a name that we know belongs to
    the node of the one before it.
    """
    found: list[Attributed] = []
    nodes = {n.name: n for n in graph.nodes}
    left = {node: list(several) for node, several in contractions(groups).items()}
    node: fx.Node | None = None
    for kernel in kernels:
        base = kernel.name.split("/")[0]
        origin = origins.get(base) or origins.get(base.removesuffix(BLOCKED))
        node = nodes.get(origin, node) if origin else node
        contraction = None
        if kernel.settings and node is not None:
            maker = _maker(node, left, KINDS[kernel.operator])
            if maker is not None:
                node, contraction = maker, left[maker].pop(0)
        found.append((kernel, node, contraction))
    return found


def _maker(node: fx.Node, left: Mapping[fx.Node, list[Contraction]], kinds: Collection[str]) -> fx.Node | None:
    """The node itself or the nearest before it with a contraction, of the kinds asked for, that no kernel has claimed.

    A convolution bears the name of what was fused into it.
    """
    reached = [node]
    for candidate in reached:  # grows while it is walked
        if left.get(candidate) and left[candidate][0].kind in kinds:
            return candidate
        if candidate not in left:
            reached.extend(n for n in candidate.all_input_nodes if n not in reached)
    return None


def _measured_steps(groups: Groups, free: Iterable[Atom], timed: Sequence[_Timed], tables: Tables, whole: float) -> dict[Atom, int]:
    """For each atom the largest step such that a width between two multiples gains nothing over the next multiple, in all kernels together.

    whole: the model's latency, beside which a gain may be too small to count.
    """
    found: dict[Atom, tuple[list[int], list[Point]]] = {}
    for atom in free:
        mine = [t for t in timed if any(atom in leaves(axis) for axis in t.contraction.axes)]
        mine = [t for t in mine if t.kernel.seconds > _MATTERS * whole] or mine
        widths = [_top(atom) - below for below in _BELOW if below < _top(atom)]
        found[atom] = widths, [(one.key, _sizes(one.contraction, {**groups.batch, atom: w})) for w in widths for one in mine]
    tables.seconds([p for _, points in found.values() for p in points])  # all that are missing at once
    steps = {}
    for atom, (widths, points) in found.items():
        times = np.array(tables.seconds(points)).reshape(len(widths), len(points) // len(widths)).sum(axis=1)
        steps[atom] = _step(dict(zip(widths, times, strict=True)), _top(atom), whole)
    return steps


def _top(atom: Atom) -> int:
    """The largest multiple of the largest step among an atom's widths."""
    return atom.size - atom.size % _STEPS[-1] or atom.size


def _step(times: Mapping[int, float], top: int, whole: float) -> int:
    """times: seconds by width, from the top downwards."""

    def free(step: int) -> bool:
        ends = {w: min(top, -(-w // step) * step) for w in times}
        extra = {w: times[end] - times[w] for w, end in ends.items() if end in times}
        costly = [w for w in extra if extra[w] > (_WORTH - 1) * times[w] and extra[w] > _GAIN * whole]
        return len(costly) <= len(times) // _PER_OUTLIER

    return next(step for step in reversed(_STEPS) if step == 1 or (2 * step <= top and free(step)))


def _beside(axis: Axis, atom: Atom) -> int:
    """How many entries of an axis stand on one entry of the atom."""
    if isinstance(axis, Atom):
        return 1
    if isinstance(axis, Sum):
        return max(_beside(t, atom) for t in axis.terms if atom in leaves(t))
    inside = next(f for f in axis.factors if atom in leaves(f))
    return _beside(inside, atom) * (axis.size // inside.size)


def _tabled(groups: Groups, timed: Sequence[_Timed], tables: Tables, steps: Mapping[Atom, int]) -> list[Term]:
    """A term for each contraction: its table over a grid of sizes, times what it took within the model and takes alone."""
    grids = [
        [_grid(axis, size, steps) for axis, size in zip(one.contraction.axes, _sizes(one.contraction, groups.batch), strict=True)] for one in timed
    ]
    points = [[(one.key, sizes) for sizes in itertools.product(*grid)] for one, grid in zip(timed, grids, strict=True)]
    tables.seconds([p for several in points for p in several])  # all that are missing at once
    terms = []
    for one, grid, mine in zip(timed, grids, points, strict=True):
        free = [place for place, sizes in enumerate(grid) if len(sizes) > 1]
        shape = [len(grid[p]) for p in free]
        times = np.array(tables.seconds(mine)).reshape(shape)
        disturbed = np.flatnonzero(times > _WORTH * _least_of_the_wider(times))
        if len(disturbed):
            tables.again([mine[d] for d in disturbed])
            times = np.array(tables.seconds(mine)).reshape(shape)
        table = RegularGridInterpolator([grid[p] for p in free], times * (one.kernel.seconds / times.flat[-1]), bounds_error=False, fill_value=None)
        terms.append(Term(tuple(one.contraction.axes[p] for p in free), partial(_unless_gone, table)))
    return terms


def _unless_gone(seconds: Callable[[np.ndarray], np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """What has an axis without entries does not run."""
    return np.where((sizes > 0).all(axis=-1), seconds(sizes), 0.0)


def _least_of_the_wider(times: np.ndarray) -> np.ndarray:
    """For each point of a grid the least time of those that are as wide or wider: more work does not take less time."""
    for axis in range(times.ndim):
        times = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
    return times


def _by_data(groups: Groups, kernel: Kernel, node: fx.Node, launch: float) -> Term:
    """What does not multiply takes time for each entry that it answers, beside what any kernel takes."""
    axes = groups.types.shapes(node)[0]
    axes = tuple(groups.types.solver.resolve(a) for a in axes)
    rate = (kernel.seconds - launch) / math.prod(kept_size(a, groups.batch) for a in axes)
    return Term(axes, partial(_unless_gone, lambda sizes: launch + rate * sizes.prod(axis=-1)))


def _always(seconds: float, sizes: np.ndarray) -> np.ndarray:
    return np.full(sizes.shape[:-1], seconds)


def _by_family(kernels: Sequence[Kernel], seconds: Sequence[float]) -> dict[Hashable, list[float]]:
    found: dict[Hashable, list[float]] = defaultdict(list)
    for kernel, taken in zip(kernels, seconds, strict=True):
        found[family(kernel)].append(taken)
    return found


def _power(dense: np.ndarray, small: np.ndarray, taken: float) -> float:
    """What to raise the predicted shares to, so that kernels that take `dense` seconds each take that long together at the smaller widths."""
    dense, small = dense[small > 0], small[small > 0]
    if small.sum() >= _TELLS * dense.sum():
        return 1.0

    def over(power: float) -> float:
        return float((dense * (small / dense) ** power).sum()) - taken

    if over(0.0) <= 0:
        return 0.0
    return _STEEPEST if over(_STEEPEST) >= 0 else float(brentq(over, 0.0, _STEEPEST))


def _bent(value: Callable[[np.ndarray], np.ndarray], dense: float, power: float, sizes: np.ndarray) -> np.ndarray:
    """A term's value, with its share of what it is for the dense model raised to a power; what is gone takes nothing."""
    share = np.maximum(value(sizes), 0.0) / dense
    return np.where(share > 0, dense * share**power, 0.0)


def _grid(axis: Axis, size: int, steps: Mapping[Atom, int]) -> list[int]:
    """Sizes of an axis for a table: the present one, and some multiples of its atoms' steps, the least included."""
    atoms = [a for a in leaves(axis) if a in steps]
    if not atoms:
        return [size]
    step = max(_beside(axis, a) * steps[a] for a in atoms) if len(atoms) == 1 else max(steps[a] for a in atoms)
    least = max(step, math.ceil(size * _LEAST / step) * step)
    multiples = list(range(least, size, step)) or [max(1, size // 2)]
    return [*thinned(multiples, _GRID - 1), size]


def _sizes(contraction: Contraction, widths: Mapping[Atom, int]) -> tuple[int, ...]:
    return tuple(kept_size(axis, widths) for axis in contraction.axes)
