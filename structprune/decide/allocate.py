"""How many channels each group keeps, under the targets: as a mixed-integer program, greedily, or uniformly.

`milp` and `greedy` minimise a loss. A group that keeps the share k of its importance loses w · (1/k − 1): what is left has to stand in for
what went, and the less is left, the more each further channel costs. The weight w is the root of the share of the model's
multiply-accumulates in which the group takes part, half-way between groups that count alike and groups that count by their work. Of plans
that lose about as much, `milp` prefers the one that keeps more multiply-accumulates: it saves time where time goes into other things.

Compared on trained networks (Kullback-Leibler divergence from the dense model, batch norms re-estimated), this form was better than losses
that are linear or logarithmic in k, and than weights by channels or by work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np

from structprune.analysis.groups import Groups
from structprune.decide.cost import Cost, Term, macs, params
from structprune.decide.criteria import Scores, above
from structprune.decide.milp import Choice, Implication, solve
from structprune.decide.targets import Target
from structprune.decide.uniform import Uniform, Widths, block
from structprune.errors import InputError, TargetError, did_you_mean
from structprune.ir.axes import Atom, kept_size, leaves

METHODS = ("auto", "milp", "greedy", "uniform")

_LEAST = 1 / 8  # of a group's channels: less is offered where the budgets cannot be met otherwise
_OPTIONS = {1: 12, 2: 6, 3: 4}  # widths of each atom, by how many are decided together
_FEW_OPTIONS = 3
_TOGETHER = 4  # atoms, at most: their widths multiply
_SECONDS = 20.0  # for a program, or for all that are solved in its place
_USED = 0.9  # of what a budget allows: widths that stay alike are worth the rest
_LOOSE = 0.1  # shares that uniform widths may lie apart, where those that stay alike come in large steps
_WIDER = 0.02  # by which the share of all others grows, where a group that does much of the work has few channels
_LEVELS = 4  # widths of what is decided first: the program is solved for each
_MANY_OPTIONS = 64  # of an atom, in a model of few groups
_ALL_OPTIONS = 500  # of a model
_WORK = 2.0  # of the loss of half of every group: what it is worth to keep all multiply-accumulates
_UNITS = {"latency": (1e3, " ms"), "memory": (1.0, " B"), "size": (1.0, " B")}  # as people read them
_TRUE_LIMIT = 5  # attempts with a smaller limit, where a term of the program was an approximation


@dataclass(frozen=True)
class Allocation:
    """Widths; `loss`: as above, the weighted mean over groups; `gap`: how far from the best, as a share, where that is known."""

    widths: Widths
    loss: float
    gap: float | None = None


def allocate(
    groups: Groups,
    targets: Sequence[Target],
    scores: Scores,
    *,
    costs: Mapping[str, Sequence[Cost]] | None = None,
    steps: Mapping[Atom, int] | None = None,
    losses: Mapping[str, np.ndarray] | None = None,
    method: str = "auto",
    between: tuple[Widths, Widths] = ({}, {}),
    branches: Mapping[Atom, frozenset[Atom]] = MappingProxyType({}),
) -> Allocation:
    """The widths of the least loss that meet every target.

    `channels=` asks for shares, and gets them to the channel, or nearly, where that keeps alike what was (see `Uniform`); `threshold=` for the
    channels with at least that score, one of each group at least; beside budgets both are the most that a group keeps.
    costs: others than those of the groups themselves, by the target that limits each of them. steps: between widths that are worth having, where
    they were measured; else multiples of 8 or 4, by which runtimes work.
    losses: [channels + 1] of every group by its name, what is lost when so many of its best channels stay; without them, the loss that is told above.
    method: 'auto' is 'milp' where steps or losses were measured, and else 'uniform'.
    between: the least and the most, beside all else, of the groups that they name; milp and greedy keep to them.
    branches: the groups that may keep nothing, by their atoms, and which go with each (see transform/branches.py); milp lets them go where that pays.

    Raises TargetError, with the closest that can be reached, where the least of every group is too much.
    """
    must_be_method(method)
    share = min([t.value for t in targets if t.key == "channels"], default=1.0)
    known = {"macs": [macs(groups)], "params": [params(groups)], **(costs or {})}
    budgets = [budget for t in targets if t.key not in ("channels", "threshold") for budget in _budgets(t, known[t.key])]
    lost = _Lost(groups, scores, losses)
    floors = [above(groups, scores, t.value) for t in targets if t.key == "threshold"]
    most = {atom: min(width, *(floor[atom] for floor in floors)) for atom, width in Uniform(groups).widths(share).items()} if floors else {}
    if floors and (not budgets or all(cost(most) <= limit for cost, limit in budgets)):
        return Allocation(most, lost.mean(most))
    if floors and method == "uniform":
        raise InputError("threshold= beside a budget is for the allocations milp and greedy: uniform ones keep one share everywhere")
    if not budgets or method == "uniform" or (method == "auto" and steps is None and losses is None and not floors):
        widths = _uniform(groups, Uniform(groups, steps=steps), share, []) if not budgets else _within(groups, share, budgets, steps)
        return Allocation(widths, lost.mean(widths))
    most = most or dict(Uniform(groups).widths(share))
    first, clusters = Uniform(groups).parted(_TOGETHER)
    going = {atom: gone for atom, gone in branches.items() if not any(between[0].get(a) for a in gone)}
    for least in (_LEAST, 0.0):
        offered = {g.atom: _widths(g.size, block(g.size) if steps is None else steps.get(g.atom, 1), most[g.atom], least) for g in groups}
        offered = {atom: _inside(widths, between[0].get(atom), between[1].get(atom)) for atom, widths in offered.items()}
        levels = _levels(first, offered)
        solved = [_solved(method, [*clusters, *([atom] for atom in first)], lost, offered | level, budgets, going, len(levels)) for level in levels]
        reached = [found for found in solved if found is not None]
        if reached:
            found = min(reached, key=lambda one: lost.objective(one[0]))
            if method != "greedy" and not floors and not any(between):
                found = _no_worse_than_uniform(groups, lost, found, share, budgets, steps)
            widths, gap = found
            return Allocation(widths, lost.mean(widths), gap)
    raise _unreachable(budgets, {atom: widths[0] for atom, widths in offered.items()})


def must_be_method(method: str) -> None:
    """Raise InputError for a word that is none of METHODS."""
    if method not in METHODS:
        raise InputError(f"unknown allocation {method!r}{did_you_mean(method, METHODS)}; use one of {', '.join(METHODS)}")


def _budgets(target: Target, costs: Sequence[Cost]) -> list[tuple[Cost, float]]:
    """A limit for each of the costs that the dense model exceeds; for the largest, if it exceeds none."""
    dense = [cost() for cost in costs]
    limit = target.limit(max(dense))
    above = [cost for cost, amount in zip(costs, dense, strict=True) if amount > limit]
    return [(cost, limit) for cost in above or [costs[dense.index(max(dense))]]]


def _no_worse_than_uniform(
    groups: Groups,
    lost: _Lost,
    found: tuple[Widths, float | None],
    share: float,
    budgets: Sequence[tuple[Cost, float]],
    steps: Mapping[Atom, int] | None,
) -> tuple[Widths, float | None]:
    """What was found, unless the solver was stopped so early that uniform widths are better."""
    with suppress(TargetError):
        uniform = _uniform(groups, Uniform(groups, True, steps), share, budgets)
        if lost.objective(uniform) < lost.objective(found[0]):
            return uniform, None
    return found


def importance_kept(groups: Groups, widths: Widths, scores: Scores) -> float:
    """The share of its importance that a group keeps in its best channels: the mean over all groups."""
    return float(np.mean([_retained(scores[g.name])[widths.get(g.atom, g.size)] for g in groups]))


def predicted_loss(groups: Groups, widths: Widths, losses: Mapping[str, np.ndarray]) -> float:
    """What narrowing every group alone loses, added up; see decide/sensitivity.py."""
    return float(sum(losses[g.name][widths.get(g.atom, g.size)] for g in groups))


def thinned(values: Sequence[int], number: int) -> list[int]:
    """That many of the values, about evenly spread, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, min(number, len(values))).round().astype(int)
    return [values[p] for p in dict.fromkeys(places.tolist())]


def _retained(scores: np.ndarray) -> np.ndarray:
    """[channels + 1]: the share of the scores that the best n channels have together."""
    values = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    values = values - min(0.0, values[-1])
    total = values.sum()
    shares = np.cumsum(values) / total if total > 0 else np.arange(1, len(values) + 1) / len(values)
    return np.concatenate([[0.0], shares])


def importance_losses(scores: np.ndarray) -> np.ndarray:
    """[channels + 1]: 1/k − 1 for the share k that n channels retain."""
    return 1 / np.maximum(_retained(scores), 1e-9) - 1


def _weights(groups: Groups) -> dict[Atom, float]:
    """The root of the share of the multiply-accumulates that each group takes part in."""
    part: dict[Atom, int] = {g.atom: 0 for g in groups}
    for axes in groups.work:
        volume = math.prod(kept_size(a, groups.batch) for a in axes)
        for atom in {a for axis in axes for a in leaves(axis) if a in part}:
            part[atom] += volume
    return {atom: math.sqrt(max(volume, 1) / max(1, groups.macs())) for atom, volume in part.items()}


class _Lost:
    """What groups lose: `curves`, [channels + 1] of every atom, and `worth`, what it is worth to keep multiply-accumulates, in the same unit.

    Measured losses are taken as they are: what work is worth is in them.
    """

    def __init__(self, groups: Groups, scores: Scores, measured: Mapping[str, np.ndarray] | None):
        weights = _weights(groups) if measured is None else {g.atom: 1.0 for g in groups}
        self.curves = {g.atom: weights[g.atom] * importance_losses(scores[g.name]) if measured is None else measured[g.name] for g in groups}
        self.worth = _worth(groups, _WORK * sum(weights.values())) if measured is None else None
        self._weight = sum(weights.values()) if measured is None else 1.0

    def total(self, widths: Widths) -> float:
        return float(sum(curve[widths.get(atom, atom.size)] for atom, curve in self.curves.items()))

    def objective(self, widths: Widths) -> float:
        return self.total(widths) - (self.worth(widths) if self.worth is not None else 0.0)

    def mean(self, widths: Widths) -> float:
        """The weighted mean over groups; of measured losses, which add up, the sum."""
        return self.total(widths) / self._weight


def _worth(groups: Groups, all_of_it: float) -> Cost:
    work = macs(groups)
    unit = all_of_it / max(1.0, work())
    return Cost("worth", tuple(Term(t.axes, partial(_scaled, t, unit)) for t in work.terms), fixed=work.fixed)


def _scaled(term: Term, unit: float, sizes: np.ndarray) -> np.ndarray:
    return term.value(sizes) * unit


# --- choices ------------------------------------------------------------------------------------------------------------


def _levels(first: Sequence[Atom], offered: Mapping[Atom, Sequence[int]]) -> list[dict[Atom, Sequence[int]]]:
    """A width for each of the atoms that are decided first: all at their narrowest, and so on, up to all at their widest."""
    ladders = {atom: thinned(offered[atom], _LEVELS) for atom in first}
    number = max(map(len, ladders.values()), default=1)
    return [{atom: [widths[min(level, len(widths) - 1)]] for atom, widths in ladders.items()} for level in range(number)]


def _solved(
    method: str,
    clusters: Sequence[Sequence[Atom]],
    lost: _Lost,
    offered: Mapping[Atom, Sequence[int]],
    budgets: Sequence[tuple[Cost, float]],
    branches: Mapping[Atom, frozenset[Atom]],
    among: int,
) -> tuple[Widths, float | None] | None:
    """The widths of the least loss and the gap; None where no widths meet the budgets. among: how many such programs share the time."""
    choices = _choices(clusters, lost.curves, offered)
    if method == "greedy":
        return _greedy(choices, budgets)
    found = _milp(*_with_nothing(choices, lost.curves, branches), budgets, lost.worth, _SECONDS / among)
    return found or _greedy(choices, budgets)  # which needs no approximation


def _choices(clusters: Sequence[Sequence[Atom]], losses: Mapping[Atom, np.ndarray], offered: Mapping[Atom, Sequence[int]]) -> list[Choice]:
    """For each set of atoms, all combinations of some of the widths that they are offered."""
    found = []
    for cluster in clusters:
        room = min(_MANY_OPTIONS, _ALL_OPTIONS // len(clusters)) ** (1 / len(cluster))
        number = max(_OPTIONS.get(len(cluster), _FEW_OPTIONS), int(room))
        widths = [thinned(offered[atom], number) for atom in cluster]
        options = tuple(dict(zip(cluster, chosen, strict=True)) for chosen in itertools.product(*widths))
        found.append(Choice(options, np.array([sum(losses[a][w] for a, w in option.items()) for option in options])))
    return found


def _with_nothing(
    choices: Sequence[Choice], losses: Mapping[Atom, np.ndarray], branches: Mapping[Atom, frozenset[Atom]]
) -> tuple[list[Choice], list[Implication]]:
    """The choices, with one more option, to keep nothing, where they may; and that what goes with a branch is to go with it.

    A group keeps nothing only within a branch that goes whole.
    """
    owner = {atom: number for number, choice in enumerate(choices) for atom in choice.atoms}
    whole = {atom: {owner[a] for a in gone} for atom, gone in branches.items()}
    whole = {atom: several for atom, several in whole.items() if set().union(*(choices[c].atoms for c in several)) == branches[atom]}
    extended: list[Choice] = list(choices)
    implied: list[Implication] = []
    for number in sorted(set().union(*whole.values())):
        loss = sum(losses[a][0] for a in choices[number].atoms if a in branches)
        extended[number] = Choice((*choices[number].options, dict.fromkeys(choices[number].options[0], 0)), np.append(choices[number].losses, loss))
    nothing = {number: (number, len(choices[number].options)) for number in range(len(choices))}
    for number in sorted(set().union(*whole.values())):
        makers = [atom for atom, several in whole.items() if number in several]
        if not any(owner[atom] == number for atom in makers):
            implied.append((nothing[number], [nothing[owner[atom]] for atom in makers]))
    for atom, several in whole.items():
        implied += [(nothing[owner[atom]], [nothing[other]]) for other in sorted(several) if other != owner[atom]]
    return extended, implied


def _widths(size: int, step: int, most: int, least: float) -> list[int]:
    """Multiples of the step, from a share of the size to the most, and the size itself."""
    first = max(1, math.ceil(size * least / step)) * step
    multiples = [w for w in range(first, size, step) if w <= most]
    return [*multiples, size] if most >= size else multiples or [most]


def _inside(widths: Sequence[int], least: int | None, most: int | None) -> list[int]:
    """Those from the least to the most, where there are such, and these two, but for nothing."""
    inside = [w for w in widths if (least is None or w >= least) and (most is None or w <= most)]
    return sorted({*inside, *(bound for bound in (least, most) if bound)}) or list(widths[:1])


def _milp(
    choices: Sequence[Choice], implied: Sequence[Implication], budgets: Sequence[tuple[Cost, float]], worth: Cost | None, seconds: float
) -> tuple[Widths, float | None] | None:
    """The program's answer; with smaller and smaller limits where it exceeds the true ones. None where there is none."""
    limits = [limit for _, limit in budgets]
    for attempt in range(_TRUE_LIMIT):
        solution = solve(choices, [(cost, limit) for (cost, _), limit in zip(budgets, limits, strict=True)], worth, seconds, implied=implied)
        if solution is None:
            return None
        true = [cost(solution.widths) for cost, _ in budgets]
        if all(spent <= limit * (1 + 1e-6) for spent, (_, limit) in zip(true, budgets, strict=True)):
            return solution.widths, solution.gap
        limits = [own * min(1.0, limit / spent) ** 2**attempt for own, spent, (_, limit) in zip(limits, true, budgets, strict=True)]
    return None


def _greedy(choices: Sequence[Choice], budgets: Sequence[tuple[Cost, float]]) -> tuple[Widths, float | None] | None:
    """From the widest options, one step at a time, the one that loses least for what it saves of the budgets that are exceeded."""
    taken = [max(range(len(c.options)), key=lambda o: sum(c.options[o].values())) for c in choices]
    widths: dict[Atom, int] = {}
    for choice, option in zip(choices, taken, strict=True):
        widths |= choice.options[option]
    spent = [cost(widths) for cost, _ in budgets]
    while any(now > limit for now, (_, limit) in zip(spent, budgets, strict=True)):
        best: tuple[float, int, int, list[float]] | None = None
        for number, choice in enumerate(choices):
            for option in _next_narrower(choice, taken[number]):
                after = [now + cost.change(widths, choice.options[option]) for now, (cost, _) in zip(spent, budgets, strict=True)]
                saved = sum(max(0.0, now - then) / limit for now, then, (_, limit) in zip(spent, after, budgets, strict=True) if now > limit)
                price = (choice.losses[option] - choice.losses[taken[number]]) / saved if saved > 0 else math.inf
                if best is None or price < best[0]:
                    best = price, number, option, after
        if best is None or best[0] == math.inf:
            return None
        _, number, option, spent = best
        taken[number] = option
        widths |= choices[number].options[option]
    return widths, None


def _next_narrower(choice: Choice, option: int) -> list[int]:
    """The options in which one atom is at its next smaller width, and the others are as they are."""
    now = choice.options[option]
    found = []
    for atom in now:
        smaller = [
            o for o, widths in enumerate(choice.options) if widths[atom] < now[atom] and all(widths[a] == now[a] for a in now if a is not atom)
        ]
        if smaller:
            found.append(max(smaller, key=lambda o: choice.options[o][atom]))
    return found


# --- uniform ------------------------------------------------------------------------------------------------------------


def _within(groups: Groups, share: float, budgets: Sequence[tuple[Cost, float]], steps: Mapping[Atom, int] | None) -> Widths:
    """The widest uniform allocation that keeps every budget; with less and less kept alike, where that comes in steps that are too large for them."""
    each = _uniform(groups, Uniform(groups, True, steps, alike=False), share, budgets)
    for align, whole in ((True, True), (True, False), (False, False)):
        uniform = Uniform(groups, align, steps, whole=whole)
        if not uniform.holds:
            return each  # there is nothing to keep alike
        try:
            widths = _uniform(groups, uniform, share, budgets)
        except TargetError:  # what stays alike has no widths that are small enough
            continue
        if all(cost(widths) >= _USED * cost(each) for cost, _ in budgets):
            return widths
    return each


def _uniform(groups: Groups, uniform: Uniform, share: float, budgets: Sequence[tuple[Cost, float]]) -> Widths:
    """The widest uniform allocation of at most that share that keeps every budget."""
    smallest = uniform.widths(1e-9)
    total = sum(g.size for g in groups)
    if share < (reached := sum(smallest.values()) / total):
        raise TargetError(f"channels={share:g} cannot be reached: with the least in every group {reached:.3g} of the channels stay")

    def fits(widths: Widths) -> bool:
        return all(cost(widths) <= limit for cost, limit in budgets)

    if fits(widest := uniform.widths(share)):
        return widest
    if not fits(smallest):
        raise _unreachable(budgets, smallest)
    low, high = _highest(0.0, share, lambda middle: fits(uniform.widths(middle)))
    widths = uniform.filled(uniform.widths(low), high, fits)

    def loosened(alike: Widths, least: float, most: float) -> Widths:
        """With the largest share between these of what need not stay alike."""
        share, _ = _highest(least, most, lambda middle: bool(wider := uniform.loosened(alike, middle)) and fits(wider))
        return uniform.loosened(alike, share) if share > least else {}

    found = loosened(widths, high, min(share, high + _LOOSE)) or widths
    if all(cost(found) < _USED * limit for cost, limit in budgets):
        found = loosened(uniform.widths(high), max(0.0, high - _LOOSE), high) or found  # what stays alike one step wider, the rest narrower for it
    while high < share and all(cost(found) < _USED * limit for cost, limit in budgets):  # one more channel of some group is too much
        high = min(share, high + _WIDER)
        found = uniform.filled(found, high, fits)
    return found


def _highest(low: float, high: float, holds: Callable[[float], bool]) -> tuple[float, float]:
    """What is known to hold, and what is not, by bisection, down to less than one channel in any group."""
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def _unreachable(budgets: Sequence[tuple[Cost, float]], smallest: Widths) -> TargetError:
    """For the first budget that the smallest widths exceed, or together with the others cannot be met."""
    cost, limit = next(((c, limit) for c, limit in budgets if c(smallest) > limit), budgets[0])
    scale, unit = _UNITS.get(cost.name, (1.0, ""))
    original, least = scale * cost(), scale * cost(smallest)
    return TargetError(
        f"{cost.name}={scale * limit:.4g}{unit} cannot be reached: with the least in every group {least:,.4g} of {original:,.4g}{unit} {cost.name} "
        f"({least / original:.3g}) stay; `structprune inspect` lists the frozen axes",
        {cost.name: cost(smallest)},
    )
