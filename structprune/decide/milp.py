"""Widths under budgets, as a mixed-integer linear program: the least loss such that every cost stays below its limit.

Groups whose channels stand in one product (heads × width) are decided together: a *choice* is such a set of atoms, and each of its options
gives all of them their widths. One option of every choice is taken (x, binary). A cost is a sum of terms, and a term depends on

    no choice           a number
    one choice          linear in x
    two choices         linear in z_ij = x_i · y_j, which Σ_j z_ij = x_i and Σ_i z_ij = y_j make exact where x and y are 0 or 1
    a concatenation     whose size W is linear in x, and on one choice y beside it: for each option j affine in W, exact for
                        multiply-accumulates; W_j = W · y_j with Σ_j W_j = W and W_j ≤ max W · y_j

What is of no such form is expanded to the first order. Solved by HiGHS, through SciPy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from structprune.decide.cost import Cost, Term
from structprune.ir.axes import Atom, Axis, kept_size, leaves

Spend = Callable[[Sequence[int], Sequence[float]], None]  # (columns, an amount for each)
Options = tuple[Mapping[Atom, int], ...]
Option = tuple[int, int]  # (number of a choice, number of one of its options)
Implication = tuple[Option, Sequence[Option]]

_SAMPLES = 6  # sizes of a concatenation at which a term is taken
_MIDDLE = 0.6  # of the channels: where a term is expanded to the first order


@dataclass(frozen=True)
class Choice:
    """Atoms that are decided together, the widths that they may have, and the loss of each of these."""

    options: Options
    losses: np.ndarray

    @property
    def atoms(self) -> frozenset[Atom]:
        return frozenset(self.options[0])


@dataclass(frozen=True)
class Solution:
    """`gap`: how much less than the value of these widths the best may be, as a share of it."""

    widths: Mapping[Atom, int]
    gap: float


def solve(
    choices: Sequence[Choice],
    budgets: Sequence[tuple[Cost, float]],
    worth: Cost | None = None,
    seconds: float = 20.0,
    gap: float = 0.01,
    implied: Sequence[Implication] = (),
) -> Solution | None:
    """The options that keep every (cost, limit), with the least total loss less what is `worth` keeping; None where there are none.

    implied: (a choice, one of its options) that may be taken only where one of some others is.
    seconds and gap: when to stop; the solution says how far from the best it may be.
    """
    program = _Program(choices)
    for cost, limit in budgets:
        program.add_budget(cost, limit)
    if worth is not None:
        program.add_worth(worth)
    for taken, others in implied:
        program.add_implication(taken, others)
    return program.solve(seconds, gap)


@dataclass
class _Program:
    """Variables: first the options of every choice, then what terms add. Rows as (columns, coefficients, low, high)."""

    choices: Sequence[Choice]
    loss: list[float] = field(default_factory=list)
    rows: list[tuple[list[int], list[float], float, float]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)  # column of each choice's first option
    owner: dict[Atom, int] = field(default_factory=dict)  # of those that have a choice
    settled: dict[Atom, int] = field(default_factory=dict)  # widths of those that have none
    joined: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # columns that several costs share
    parts: dict[tuple[Axis, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, choice in enumerate(self.choices):
            self.first.append(len(self.loss))
            if len(choice.options) > 1:
                self.owner |= dict.fromkeys(choice.atoms, number)
            else:
                self.settled |= choice.options[0]
            columns = self._columns(len(choice.options), choice.losses.tolist())
            self.rows.append((columns, [1.0] * len(columns), 1, 1))
        self.binary = len(self.loss)

    def _columns(self, number: int, losses: Sequence[float] | None = None) -> list[int]:
        start = len(self.loss)
        self.loss.extend(losses or [0.0] * number)
        return list(range(start, start + number))

    def add_budget(self, cost: Cost, limit: float) -> None:
        spent, constant = self._linearised(cost)
        self.rows.append((list(spent), list(spent.values()), -np.inf, limit - constant))

    def add_worth(self, cost: Cost) -> None:
        for column, amount in self._linearised(cost)[0].items():
            self.loss[column] -= amount
        for column in self._of(0):  # one of which is taken: all of the worth, so that a gap is a share of something above zero
            self.loss[column] += cost()

    def add_implication(self, taken: Option, others: Sequence[Option]) -> None:
        columns = [self.first[choice] + option for choice, option in (taken, *others)]
        self.rows.append((columns, [1.0] + [-1.0] * len(others), -np.inf, 0))

    def _linearised(self, cost: Cost) -> tuple[dict[int, float], float]:
        """A cost as Σ amount · column, and a constant."""
        fixed = {**(cost.fixed or {}), **self.settled}
        constant = cost.constant
        spent: dict[int, float] = {}
        pairs: dict[tuple[int, int], np.ndarray] = {}

        def spend(columns: Sequence[int], amounts: Sequence[float]) -> None:
            for column, amount in zip(columns, amounts, strict=True):
                spent[column] = spent.get(column, 0.0) + float(amount)

        for term in cost.terms:
            of_axis = [sorted({self.owner[a] for a in leaves(axis) if a in self.owner}) for axis in term.axes]
            involved = sorted(set(itertools.chain(*of_axis)))
            several = [place for place, choices in enumerate(of_axis) if len(choices) > 1]
            beside = sorted({c for place, choices in enumerate(of_axis) if place not in several for c in choices})
            if not involved:
                constant += term(fixed)
            elif len(involved) == 1:
                spend(self._of(involved[0]), [term({**fixed, **o}) for o in self.choices[involved[0]].options])
            elif len(involved) == 2:
                pair = involved[0], involved[1]
                pairs[pair] = pairs.get(pair, 0.0) + self._table(term, pair, fixed)
            elif len(several) == 1 and len(beside) <= 1:
                constant += self._concatenation(term, several[0], beside, fixed, spend)
            else:
                constant += self._first_order(term, involved, fixed, spend)
        for pair, table in pairs.items():
            spend(self._joined(*pair), table.ravel().tolist())
        return spent, constant

    def _of(self, choice: int) -> list[int]:
        return list(range(self.first[choice], self.first[choice] + len(self.choices[choice].options)))

    def _table(self, term: Term, pair: tuple[int, int], fixed: Mapping[Atom, int]) -> np.ndarray:
        one, other = (self.choices[c].options for c in pair)
        sizes = [[[kept_size(axis, {**fixed, **a, **b}) for axis in term.axes] for b in other] for a in one]
        return np.asarray(term.value(np.array(sizes, dtype=np.float64)))

    def _joined(self, one: int, other: int) -> list[int]:
        """Columns for the product of two choices, option by option."""
        if (one, other) in self.joined:
            return self.joined[one, other]
        rows, columns = self._of(one), self._of(other)
        joint = np.array(self._columns(len(rows) * len(columns))).reshape(len(rows), len(columns))
        for line, option in [*zip(joint, rows, strict=True), *zip(joint.T, columns, strict=True)]:
            self.rows.append(([*line.tolist(), option], [1.0] * len(line) + [-1.0], 0, 0))
        self.joined[one, other] = joint.ravel().tolist()
        return self.joined[one, other]

    def _size(self, axis: Axis, fixed: Mapping[Atom, int]) -> tuple[dict[int, float], float, float, float]:
        """The size of an axis whose parts each depend on one choice: Σ coefficient · column, and what is constant; its least and its most."""
        nothing = {**fixed, **dict.fromkeys(self.owner, 0)}
        rest = least = most = float(kept_size(axis, nothing))
        found: dict[int, float] = {}
        for choice in {self.owner[a] for a in leaves(axis) if a in self.owner}:
            sizes = [kept_size(axis, {**nothing, **o}) - rest for o in self.choices[choice].options]
            found |= dict(zip(self._of(choice), sizes, strict=True))
            least, most = least + min(sizes), most + max(sizes)
        return found, rest, least, most

    def _concatenation(self, term: Term, place: int, beside: Sequence[int], fixed: Mapping[Atom, int], spend: Spend) -> float:
        """The size of the axis at `place`, in turn for each option of the choice beside it. Returns what is constant."""
        size, rest, least, most = self._size(term.axes[place], fixed)
        samples = np.linspace(least, most, _SAMPLES)

        def affine(option: Mapping[Atom, int]) -> tuple[float, float]:
            sizes = np.array([[s if p == place else kept_size(a, {**fixed, **option}) for p, a in enumerate(term.axes)] for s in samples])
            slope, level = np.polyfit(samples, np.asarray(term.value(sizes)), 1)
            return float(slope), float(level)

        if not beside:
            slope, level = affine({})
            spend(list(size), [slope * c for c in size.values()])
            return level + slope * rest
        options = self._of(beside[0])
        fits = [affine(o) for o in self.choices[beside[0]].options]
        parts = self.parts.get((term.axes[place], beside[0]))
        if parts is None:
            parts = self.parts[term.axes[place], beside[0]] = self._columns(len(options))
            self.rows.append(([*parts, *size], [1.0] * len(parts) + [-c for c in size.values()], rest, rest))
            for part, option in zip(parts, options, strict=True):
                self.rows.append(([part, option], [1.0, -most], -np.inf, 0))
                self.rows.append(([part, option], [1.0, -least], 0, np.inf))
        spend(parts, [slope for slope, _ in fits])
        spend(options, [level for _, level in fits])
        return 0.0

    def _first_order(self, term: Term, involved: Sequence[int], fixed: Mapping[Atom, int], spend: Spend) -> float:
        """Around the middle option of every choice."""
        middle: dict[Atom, int] = {}
        for choice in involved:
            options = self.choices[choice].options
            middle |= options[int(len(options) * _MIDDLE)]
        level = term({**fixed, **middle})
        for choice in involved:
            spend(self._of(choice), [term({**fixed, **middle, **o}) - level for o in self.choices[choice].options])
        return level

    def solve(self, seconds: float, gap: float) -> Solution | None:
        entries = [
            (row, column, value) for row, (columns, values, _, _) in enumerate(self.rows) for column, value in zip(columns, values, strict=True)
        ]
        rows, columns, values = map(np.array, zip(*entries, strict=True))
        low, high = np.array([r[2] for r in self.rows]), np.array([r[3] for r in self.rows])
        matrix = coo_array((values, (rows, columns)), shape=(len(self.rows), len(self.loss))).tocsr()
        scale = 1 / np.maximum(abs(matrix).max(axis=1).toarray().ravel(), 1e-30)  # seconds and multiply-accumulates differ by 1e12
        matrix = matrix.multiply(scale[:, None]).tocsr()
        integral = np.arange(len(self.loss)) < self.binary
        found = milp(
            np.array(self.loss),
            constraints=LinearConstraint(matrix, low * scale, high * scale),
            bounds=Bounds(0, np.where(integral, 1, np.inf)),
            integrality=integral.astype(int),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        if found.x is None:
            return None
        widths: dict[Atom, int] = {}
        for number, choice in enumerate(self.choices):
            taken = int(np.argmax(found.x[self._of(number)]))
            widths |= choice.options[taken]
        return Solution(widths, float(found.mip_gap or 0.0))
