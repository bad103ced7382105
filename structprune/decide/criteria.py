"""Which channels matter: a criterion scores every channel of a coupled group over all the tensors that it stands in.

A criterion is a callable (Groups, tensors by name) -> {group name: score of each channel}; higher scores stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from structprune.analysis.groups import Groups
from structprune.errors import InputError
from structprune.ir.axes import positions
from structprune.ir.group import Group

Scores: TypeAlias = Mapping[str, np.ndarray]
Criterion: TypeAlias = Callable[[Groups, Mapping[str, Tensor]], Scores]


_ROWS = 64  # of a matrix, at one time: they stay in the cache, and a sum over the rows of a large one is twenty times faster


def magnitude(groups: Groups, tensors: Mapping[str, Tensor], *, power: float) -> Scores:
    """(Σ |w|^p)^(1/p) over all weights of a channel in all coupled parameters of two or more dimensions.

    Li et al., Pruning Filters for Efficient ConvNets, 2017 (p = 1); Fang et al., DepGraph, 2023, for the sum over the group.
    """
    profile: dict[tuple[str, int], np.ndarray] = {}

    def along(name: str, dim: int) -> np.ndarray:
        if (name, dim) not in profile:
            weight = tensors[name].detach().to(torch.float32)
            others = [d for d in range(weight.dim()) if d != dim]
            parts = [rows.abs().pow_(power).sum(others) for rows in weight.split(_ROWS)]
            profile[name, dim] = (torch.cat(parts) if dim == 0 else torch.stack(parts).sum(0)).double().numpy()
        return profile[name, dim]

    scores = {}
    for group in groups:
        total = np.zeros(group.size)
        for member in group.members:
            if member.tensor in groups.parameters and tensors[member.tensor].dim() > 1:
                _accumulate(total, groups, group, member.tensor, member.dim, along(member.tensor, member.dim))
        scores[group.name] = total ** (1 / power)
    return scores


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
                _accumulate(total, groups, group, member.tensor, 0, tensors[member.tensor].detach().abs().double().numpy())
            scores[group.name] = total
    return scores


def at_random(groups: Groups, tensors: Mapping[str, Tensor], *, seed: int) -> Scores:
    """Uniform noise: the baseline that every criterion must beat."""
    generator = np.random.default_rng(seed)
    return {group.name: generator.random(group.size) for group in groups}


def _accumulate(total: np.ndarray, groups: Groups, group: Group, tensor: str, dim: int, values: np.ndarray) -> None:
    """Add the values along a tensor's axis to the channels of the group that its entries stand on."""
    for place in positions(groups.axes[tensor][dim], group.atom):
        mine = place >= 0
        np.add.at(total, place[mine], values[mine])


def criterion_of(choice: Any, model: nn.Module, seed: int) -> tuple[str, Criterion]:
    """The criterion that a user asked for, and its name: a name, a torch_pruning Importance, or any callable."""
    named: dict[str, Criterion] = {
        "random": partial(at_random, seed=seed),
        "l1": partial(magnitude, power=1),
        "l2": partial(magnitude, power=2),
        "bn_scale": batch_norm_scale,
    }
    named["auto"] = named["l2"]
    if isinstance(choice, str):
        if choice not in named:
            raise InputError(f"unknown criterion {choice!r}; use one of {', '.join(sorted(named))}")
        return ("l2" if choice == "auto" else choice), named[choice]
    if any(cls.__module__.startswith("torch_pruning") for cls in type(choice).__mro__):
        from structprune.decide.torch_pruning import adapted

        return type(choice).__name__, adapted(choice, model)
    if callable(choice):
        return getattr(choice, "__name__", type(choice).__name__), choice
    raise InputError(f"criterion {choice!r} is neither a name, a torch_pruning Importance, nor a callable")
