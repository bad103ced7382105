"""Which channels the others can stand in for: group-wise optimal brain surgeon on what the readers of a group read.

Removing the channels J of a reader's input x, and fitting what is left to the same answers, costs

    ½ Σ_k W_kJ [(G⁻¹)_JJ]⁻¹ W_kJᵀ,      after which   W ← W − W_J [(G⁻¹)_JJ]⁻¹ (G⁻¹)_J,:   and   G⁻¹ ← G⁻¹ − (G⁻¹)_:,J [(G⁻¹)_JJ]⁻¹ (G⁻¹)_J,:

with G = E[(x − E[x])(x − E[x])ᵀ] + λI (Hassibi and Stork, Optimal Brain Surgeon, 1993; Kurtic et al., ZipLM, 2023, for structures). A channel is
all its taps in a window, in every reader of the group; costs add up over readers, each weighted by how much the model's answer depends on the
reader's. Channels go one after the other, the cheapest first, a few at a time in wide groups: the order is the score, and the sum of costs so far
the loss of every width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from structprune.analysis.groups import Groups
from structprune.calibrate.damped import factor
from structprune.calibrate.moments import Moments
from structprune.decide.weights import entries_of
from structprune.ir.axes import Atom

_RIDGE = 1e-3  # of the mean diagonal, and more where there are few rows
_AT_ONCE = 32  # steps in which half of a wide group's channels go
_COMPACT = 7 / 8  # what is left of the columns when those that are gone are left out


@dataclass(frozen=True)
class Curve:
    """order: channels, the first to go first. losses: [channels + 1], of keeping that many of the last to go."""

    order: np.ndarray
    losses: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """[channels]: what was lost when a channel went, with all that went before it; higher stays."""
        found = np.empty(len(self.order))
        found[self.order] = np.arange(len(self.order)) + 1.0
        return found


def reconstruction(groups: Groups, found: Mapping[fx.Node, Moments]) -> dict[str, Curve]:
    """The curve of every group that a reader sums over; a group that none does is missing."""
    curves = {}
    for group in groups:
        states = [state for m in found.values() if (state := _state(m, groups, group.atom)) is not None]
        if states:
            curves[group.name] = _eliminate(states, group.size)
    return curves


class _State:
    """One reader in which channels of a group go: W [groups, m, n], G⁻¹ [groups, n, n], and the columns of each channel, [channels, b]."""

    def __init__(self, moments: Moments, columns: np.ndarray):
        self.columns = torch.as_tensor(columns)
        self.weight = moments.weight.clone()
        if moments.diagonal_only:
            self._inverse = None
            self._diagonal = moments.gram
            return
        ridge = _RIDGE + 0.1 * moments.gram.shape[-1] / max(1, moments.rows)
        self._inverse = torch.cholesky_inverse(factor(moments.gram, ridge))
        self._stays = torch.ones(moments.gram.shape[-1], dtype=torch.bool)

    def costs(self, channels: Tensor) -> Tensor:
        """[channels]: of removing each of them alone, now."""
        columns = self.columns[channels]
        weight = self.weight[:, :, columns].permute(0, 2, 3, 1)  # [groups, channels, b, m]
        if self._inverse is None:
            return (weight.square() * self._diagonal[:, columns][..., None]).sum((0, 2, 3))
        block = self._inverse[:, columns[:, :, None], columns[:, None, :]]
        return torch.linalg.solve_triangular(factor(block, 0.0), weight, upper=False).square().sum((0, 2, 3))

    def remove(self, channels: Tensor) -> float:
        """Take these channels out; returns what that cost."""
        if self._inverse is None:
            return float(self.costs(channels).sum())
        gone = self.columns[channels].flatten()
        weight, rows = self.weight[:, :, gone], self._inverse[:, gone, :]
        root = factor(rows[:, :, gone], 0.0)
        cost = float(torch.linalg.solve_triangular(root, weight.transpose(1, 2), upper=False).square().sum())
        solved = torch.cholesky_solve(rows, root)
        self.weight.baddbmm_(weight, solved, alpha=-1)
        self._inverse.baddbmm_(rows.transpose(1, 2), solved, alpha=-1)
        self._stays[gone] = False
        if int(self._stays.sum()) < _COMPACT * len(self._stays):
            self._compact()
        return cost

    def _compact(self) -> None:
        """Leave out the columns that are gone: a step takes time and memory in proportion to the square of their number."""
        assert self._inverse is not None
        kept = self._stays.nonzero()[:, 0]
        self.weight = self.weight.index_select(2, kept)
        self._inverse = self._inverse.index_select(1, kept).index_select(2, kept)
        self.columns = (self._stays.cumsum(0) - 1)[self.columns]  # of channels that are gone: nobody asks for them again
        self._stays = torch.ones(len(kept), dtype=torch.bool)


def _state(moments: Moments, groups: Groups, atom: Atom) -> _State | None:
    reader = moments.reader
    axis = groups.types.shape(reader.weight)[reader.input_axis]
    found = entries_of(axis, atom)
    if not found or (reader.kind == "transposed" and reader.groups > 1):
        return None
    window = moments.weight.shape[-1] // axis.size
    columns = np.concatenate([(entries[:, :, None] * window + np.arange(window)).reshape(atom.size, -1) for entries in found], 1)
    if len(np.unique(columns)) < columns.size:  # products of channels with each other go with either
        return None
    return _State(moments, columns)


def _eliminate(states: list[_State], size: int) -> Curve:
    left = torch.arange(size)
    order: list[int] = []
    losses = [0.0]
    while len(left) > 1:
        costs = torch.stack([state.costs(left) for state in states]).sum(0)
        number = max(1, min(len(left) // _AT_ONCE, len(left) - 1))
        going = costs.argsort(stable=True)[:number]
        spent = sum(state.remove(left[going]) for state in states)
        shares = costs[going].cumsum(0) / costs[going].sum().clamp_min(1e-300)
        losses.extend((losses[-1] + spent * shares).tolist())
        order.extend(left[going].tolist())
        staying = torch.ones(len(left), dtype=torch.bool)
        staying[going] = False
        left = left[staying]
    order.extend(left.tolist())
    losses.append(losses[-1] + float(sum(state.costs(left).sum() for state in states)))
    return Curve(np.array(order), np.array(losses[::-1]))
