"""Groups, widths and scores → Plan; and the way back, from a stored plan to the model's atoms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structprune.decide.allocate import Widths, allocate
from structprune.decide.criteria import Scores, criterion_of
from structprune.decide.targets import parse_target
from structprune.errors import InputError, PlanError
from structprune.ir.axes import Atom, Keep, Shape, kept_entries
from structprune.ir.graph import Graph
from structprune.ir.group import Groups
from structprune.ir.plan import Cut, Plan, PlannedGroup


def plan(graph: Graph, groups: Groups, target: str, criterion: Any = "auto", *, model: nn.Module | None = None, seed: int = 0) -> Plan:
    """Decide which channels stay: widths from the target, the best channels of each group by the criterion.

    Raises InputError for a target or criterion that cannot be read and TargetError for a target that cannot be reached.
    """
    targets = parse_target(target)
    name, score = criterion_of(criterion, model if model is not None else graph.module, seed)
    if not groups.groups:
        raise InputError("nothing can be pruned: every axis is frozen; `structprune inspect` says why")
    widths = allocate(groups, targets)
    scores = score(groups, named_tensors(graph))
    keep = best_channels(groups, widths, scores)
    return planned(groups, keep, target=target, criterion=name, inputs=_described(graph))


def named_tensors(graph: Graph) -> dict[str, Tensor]:
    """The model's parameters and buffers under all their names."""
    return {name: graph.tensor(n) for n in graph.nodes if n.op == "get_attr" for name in graph.aliases.get(str(n.target), ())}


def best_channels(groups: Groups, widths: Widths, scores: Scores) -> Keep:
    """The highest-scored channels of each group, in ascending order; of equals the first."""
    keep: dict[Atom, np.ndarray] = {}
    for group in groups:
        score = np.asarray(scores[group.name], dtype=np.float64)
        if score.shape != (group.size,):
            raise InputError(f"the criterion gave {group.name} scores of shape {score.shape}; it has {group.size} channels")
        order = np.argsort(-score, kind="stable")
        keep[group.atom] = np.sort(order[: widths[group.atom]])
    return keep


def planned(groups: Groups, keep: Keep, *, target: str = "", criterion: str = "", inputs: tuple[Any, ...] = ()) -> Plan:
    """Write down what a choice of channels means for every tensor."""
    return Plan(
        tensors=cuts(groups.axes, keep),
        groups=tuple(
            PlannedGroup(g.name, g.size, tuple(keep[g.atom].tolist()) if g.atom in keep else tuple(range(g.size)), g.exact, g.reason, g.members)
            for g in groups
        ),
        frozen=groups.frozen,
        target=target,
        criterion=criterion,
        inputs=inputs,
    )


def cuts(axes: Mapping[str, Shape], keep: Keep) -> dict[str, Cut]:
    """The tensors that shrink, with the kept indices of each dimension that does."""
    found = {}
    for name, shape in axes.items():
        kept = {dim: entries for dim, axis in enumerate(shape) if len(entries := kept_entries(axis, keep)) < axis.size}
        if kept:
            found[name] = Cut(tuple(a.size for a in shape), {dim: tuple(entries.tolist()) for dim, entries in kept.items()})
    return found


def atoms_of(plan: Plan, groups: Groups) -> Keep:
    """The kept entries of each atom that a plan asks for.

    Raises PlanError unless the plan's groups are this model's, and its tensors follow from its groups.
    """
    mine = {g.name: g for g in groups}
    keep: dict[Atom, np.ndarray] = {}
    for group in plan.groups:
        known = mine.get(group.name)
        if known is None or known.size != group.channels:
            raise PlanError(f"the plan's group {group.name!r} of {group.channels} channels is not in this model")
        entries = np.asarray(group.keep, dtype=np.int64)
        if not len(entries) or (np.diff(entries) <= 0).any() or entries[0] < 0 or entries[-1] >= group.channels:
            raise PlanError(f"the plan's group {group.name!r} keeps no ascending indices below {group.channels}")
        if len(entries) < group.channels:
            keep[known.atom] = entries
    wanted = cuts(groups.axes, keep)
    for name in sorted({*wanted, *plan.tensors}):
        if wanted.get(name) != plan.tensors.get(name):
            raise PlanError(f"the plan's indices for {name} do not follow from its groups")
    return keep


def _described(graph: Graph) -> tuple[Any, ...]:
    """Shape and dtype of each example input, so that a plan can be replayed without them."""
    leaves = graph.flat_inputs()
    return tuple({"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")} if isinstance(v, torch.Tensor) else v for v in leaves)
