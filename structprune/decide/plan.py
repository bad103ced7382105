"""Groups, widths and scores → Plan; and the way back, from a stored plan to the model's atoms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.analysis.groups import Groups
from structprune.decide.criteria import Scores, criterion_of
from structprune.decide.uniform import Widths
from structprune.errors import InputError, PlanError
from structprune.ir.axes import Atom, Keep, Shape, kept_entries
from structprune.ir.graph import Graph
from structprune.ir.group import Group
from structprune.ir.plan import Cut, Plan, PlannedGroup
from structprune.ir.samples import Samples

_MANY = 2**32  # entries of one input


def scored(
    graph: Graph, groups: Groups, criterion: Any, *, model: nn.Module | None = None, samples: Samples | None = None, seed: int = 0
) -> tuple[str, Scores]:
    """The criterion's name, and its score of every channel of every group. Raises InputError where there is nothing to score."""
    name, score = criterion_of(criterion, model if model is not None else graph.module, seed, graph, samples)
    if not groups.groups:
        raise InputError("nothing can be pruned: every axis is frozen; `structprune inspect` says why")
    scores = {group: np.asarray(values, dtype=np.float64) for group, values in score(groups, named_tensors(graph)).items()}
    for group in groups:
        if scores[group.name].shape != (group.size,):
            raise InputError(f"the criterion gave {group.name} scores of shape {scores[group.name].shape}; it has {group.size} channels")
    return name, scores


def plan_of(graph: Graph, groups: Groups, widths: Widths, scores: Scores, **origin: Any) -> Plan:
    """The best channels of each group. `origin`: the fields of Plan that say where it comes from."""
    return planned(groups, best_channels(groups, widths, scores), inputs=described_inputs(graph.args, graph.kwargs), **origin)


def named_tensors(graph: Graph) -> dict[str, Tensor]:
    """The model's parameters and buffers under all their names."""
    return {name: graph.tensor(n) for n in graph.whole if n.op == "get_attr" for name in graph.aliases.get(str(n.target), ())}


def best_channels(groups: Iterable[Group], widths: Widths, scores: Scores) -> Keep:
    """The highest-scored channels of each group, in ascending order; of equals the first."""
    keep: dict[Atom, np.ndarray] = {}
    for group in groups:
        order = np.argsort(-scores[group.name], kind="stable")
        keep[group.atom] = np.sort(order[: widths[group.atom]])
    return keep


def planned(groups: Groups, keep: Keep, **origin: Any) -> Plan:
    """Write down what a choice of channels means for every tensor. `origin`: the fields of Plan that say where it comes from."""
    return Plan(
        tensors=cuts(groups.axes, keep),
        groups=tuple(
            PlannedGroup(g.name, g.size, tuple(keep[g.atom].tolist()) if g.atom in keep else tuple(range(g.size)), g.exact, g.reason, g.members)
            for g in groups
        ),
        frozen=groups.frozen,
        **origin,
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
        if (np.diff(entries) <= 0).any() or (len(entries) and (entries[0] < 0 or entries[-1] >= group.channels)):
            raise PlanError(f"the plan's group {group.name!r} keeps no ascending indices below {group.channels}")
        if len(entries) < group.channels:
            keep[known.atom] = entries
    wanted = cuts(groups.axes, keep)
    for name in sorted({*wanted, *plan.tensors}):
        if wanted.get(name) != plan.tensors.get(name):
            raise PlanError(f"the plan's indices for {name} do not follow from its groups")
    return keep


def described_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The example inputs as JSON: shape and dtype in the place of each tensor."""

    def leaf(value: Any) -> Any:
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")} if isinstance(value, Tensor) else value

    return {"args": pytree.tree_map(leaf, list(args)), "kwargs": pytree.tree_map(leaf, dict(kwargs))}


def example_inputs(described: Mapping[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs such as `described_inputs` describes: noise for floating-point tensors, zeros and ones for integers. Raises PlanError for no such."""
    generator = torch.Generator().manual_seed(seed)

    def is_tensor(value: Any) -> bool:
        return isinstance(value, dict) and value.keys() == {"shape", "dtype"}

    def tensor(value: Any) -> Any:
        if not is_tensor(value):
            return value
        dtype, sizes = getattr(torch, str(value["dtype"]), None), value["shape"]
        right = isinstance(sizes, list) and all(type(s) is int and s >= 0 for s in sizes) and math.prod(sizes) <= _MANY
        if not right or not isinstance(dtype, torch.dtype):
            raise PlanError(f"an input of shape {str(sizes)[:60]} and type {str(value['dtype'])[:20]} cannot be made")
        if dtype.is_floating_point:
            return torch.randn(value["shape"], generator=generator).to(dtype)
        return torch.randint(0, 2, value["shape"], generator=generator).to(dtype)

    made = pytree.tree_map(tensor, {"args": described.get("args", []), "kwargs": described.get("kwargs", {})}, is_leaf=is_tensor)
    if not isinstance(made["args"], list) or not isinstance(made["kwargs"], dict):
        raise PlanError("the plan's inputs are no list of arguments and mapping of keywords")
    return tuple(made["args"]), made["kwargs"]
