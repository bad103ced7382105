"""Criteria that look at weights alone, and how any number per weight becomes a score per channel.

A criterion is a callable (Groups, tensors by name) -> {group name: score of each channel}; higher scores stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from structprune.analysis.groups import Groups
from structprune.ir.axes import Atom, Axis, positions
from structprune.ir.group import Group

Scores: TypeAlias = Mapping[str, np.ndarray]
Criterion: TypeAlias = Callable[[Groups, Mapping[str, Tensor]], Scores]

_ENTRIES = 1 << 18  # of a tensor, at one time, in whole rows: they stay in the cache, and take no fresh memory
_COLUMNS = 4096  # of a matrix, at one time, where rows are compared in float64


# --- from weights to channels ---------------------------------------------------------------------------------------------


def summed(groups: Groups, values: Mapping[str, Tensor], each: Callable[[Tensor], Tensor] | None = None) -> dict[str, np.ndarray]:
    """For every channel, the sum of `each(value)` over all its weights, in all coupled parameters that `values` has; each tensor counts once.

    values: an array in the shape of each parameter, by the parameter's name. each: works entry by entry, on a few rows at a time.
    """
    members = [[m for m in group.members if m.tensor in groups.parameters and m.tensor in values] for group in groups]
    dims: dict[str, set[int]] = {}
    for member in chain.from_iterable(members):
        dims.setdefault(member.tensor, set()).add(member.dim)
    profiles = {name: _profiles(values[name].detach().to(torch.float32), wanted, each) for name, wanted in dims.items()}
    sums = {}
    for group, mine in zip(groups, members, strict=True):
        sums[group.name] = np.zeros(group.size)
        for member in mine:
            add_along(sums[group.name], groups.axes[member.tensor][member.dim], group.atom, profiles[member.tensor][member.dim])
    return sums


def _profiles(value: Tensor, dims: Collection[int], each: Callable[[Tensor], Tensor] | None) -> dict[int, np.ndarray]:
    """For every one of these dimensions the sums over all others, of a tensor that is read once."""
    sums = {dim: torch.zeros(value.shape[dim], dtype=torch.float64) for dim in dims}
    first = 0
    for rows in value.split(max(1, _ENTRIES // max(1, math.prod(value.shape[1:])))):
        changed = rows if each is None else each(rows)
        for dim, total in sums.items():
            part = total[first : first + len(rows)] if dim == 0 else total
            part += changed.sum([d for d in range(value.dim()) if d != dim]).cpu() if value.dim() > 1 else changed.cpu()
        first += len(rows)
    return {dim: total.numpy() for dim, total in sums.items()}


def add_along(total: np.ndarray, axis: Axis, atom: Atom, values: np.ndarray) -> None:
    """Add the values of an axis's entries to the channels, the entries of the atom, that they stand on. In place."""
    for place in positions(axis, atom):
        mine = place >= 0
        np.add.at(total, place[mine], values[mine])


def entries_of(axis: Axis, atom: Atom) -> list[np.ndarray]:
    """For every occurrence of an atom in an axis: which entries of the axis stand on each channel, [channels, entries], ascending."""
    found = []
    for place in positions(axis, atom):
        mine = np.flatnonzero(place >= 0)
        found.append(mine[np.argsort(place[mine], kind="stable")].reshape(atom.size, -1))
    return found


def _matrices(groups: Groups, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of two or more dimensions: weights, without biases and the scales of norms."""
    return {name: tensor for name, tensor in tensors.items() if name in groups.parameters and tensor.dim() > 1}


# --- criteria -------------------------------------------------------------------------------------------------------------


def magnitude(groups: Groups, tensors: Mapping[str, Tensor], *, power: float) -> Scores:
    """(Σ |w|^p)^(1/p) over all weights of a channel in all coupled parameters of two or more dimensions.

    Li et al., Pruning Filters for Efficient ConvNets, 2017 (p = 1); Fang et al., DepGraph, 2023, for the sum over the group.
    """
    sums = summed(groups, _matrices(groups, tensors), lambda rows: rows.abs().pow_(power))
    return {name: total ** (1 / power) for name, total in sums.items()}


def batch_norm_scale(groups: Groups, tensors: Mapping[str, Tensor]) -> Scores:
    """|γ| of the batch norms on a group's channels; L2 magnitude for a group that none stands on.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017.
    """
    scores = dict(magnitude(groups, tensors, power=2))
    for group in groups:
        scales = [m for m in group.members if m.tensor.endswith("weight") and m.tensor.removesuffix("weight") + "running_var" in tensors]
        if scales:
            total = np.zeros(group.size)
            for member in scales:
                add_along(total, groups.axes[member.tensor][0], group.atom, tensors[member.tensor].detach().abs().double().cpu().numpy())
            scores[group.name] = total
    return scores


def geometric_median(groups: Groups, tensors: Mapping[str, Tensor]) -> Scores:
    """Σ_j |x_i − x_j| over the channels j of the group, where x_i holds all weights of channel i in all coupled parameters of two or more dimensions.

    A channel near the geometric median of the others is the one that they replace best. He et al., Filter Pruning via Geometric Median (FPGM), 2019;
    there of the filters of one convolution. Memory: a few times [channels, channels] in float64.
    """
    matrices = _matrices(groups, tensors)
    return {group.name: _distances(groups, matrices, group).sum(1).cpu().numpy() for group in groups}


def _distances(groups: Groups, matrices: Mapping[str, Tensor], group: Group) -> Tensor:
    """[channels, channels] in float64, from |a − b|² = |a|² + |b|² − 2 a·b with the mean channel taken off, which cancels less."""
    gram = torch.zeros(group.size, group.size, dtype=torch.float64)
    for member in group.members:
        if member.tensor in matrices:
            rows = matrices[member.tensor].detach().movedim(member.dim, 0).flatten(1)
            for entries in entries_of(groups.axes[member.tensor][member.dim], group.atom):
                for columns in rows.split(_COLUMNS, dim=1):
                    x = columns[torch.as_tensor(entries)].flatten(1).double().cpu()
                    x = x - x.mean(0)
                    gram += x @ x.T
    squares = gram.diagonal()
    return (squares[:, None] + squares[None] - 2 * gram).clamp_min_(0).sqrt_()


def layer_adaptive(groups: Groups, tensors: Mapping[str, Tensor]) -> Scores:
    """|x_i|² / Σ_j |x_j|² over the channels j of the group with |x_j| ≥ |x_i|, where |x_i| is a channel's L2 magnitude.

    In the order of L2, on a scale that is the same in all groups: the strongest channel of each has 1. Lee et al., Layer-adaptive sparsity for the
    Magnitude-based Pruning (LAMP), 2021; there of single weights.
    """
    scores = {}
    for name, lengths in magnitude(groups, tensors, power=2).items():
        squares = lengths**2
        ascending = np.sort(squares)
        from_here = np.append(np.cumsum(ascending[::-1])[::-1], 0.0)
        stronger = from_here[np.searchsorted(ascending, squares)]
        scores[name] = np.divide(squares, stronger, out=np.zeros_like(squares), where=stronger > 0)
    return scores


def at_random(groups: Groups, tensors: Mapping[str, Tensor], *, seed: int) -> Scores:
    """Uniform noise: the baseline that every criterion must beat."""
    generator = np.random.default_rng(seed)
    return {group.name: generator.random(group.size) for group in groups}
