"""A target and what is known of the channels → Plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from structprune.analysis.groups import Groups
from structprune.decide.allocate import allocate
from structprune.decide.cost import Cost, memory, size
from structprune.decide.plan import plan_of
from structprune.decide.saliency import Saliency, saliency
from structprune.decide.targets import Target, parse_target
from structprune.errors import InputError
from structprune.ir.graph import Graph
from structprune.ir.plan import Plan
from structprune.ir.samples import Samples


def plan(
    graph: Graph,
    groups: Groups,
    target: str,
    criterion: Any = "auto",
    *,
    model: nn.Module | None = None,
    samples: Samples | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    allocation: str = "auto",
) -> Plan:
    """Decide which channels stay: widths from the target, the best channels of each group by the criterion.

    A latency is measured, and so is no target here: see `compress`. allocation: 'auto', 'milp', 'greedy' or 'uniform'.
    Raises InputError for a target or criterion that cannot be read and TargetError for a target that cannot be reached.
    """
    if any(t.key == "latency" for t in parse_target(target)):
        raise InputError("a latency is measured on the whole model: ask compress() for it")
    known = saliency(graph, groups, criterion, model=model, samples=samples, seed=seed)
    return plan_for(graph, groups, target, known, allocation=allocation, ignore=ignore)


def plan_for(graph: Graph, groups: Groups, target: str, known: Saliency, *, allocation: str, ignore: Sequence[str]) -> Plan:
    """The plan for any target that is counted."""
    targets = parse_target(target)
    costs = costs_of(graph, groups, targets)
    widths = allocate(groups, targets, known.scores, costs=costs, losses=known.losses, method=allocation, branches=known.branches).widths
    return plan_of(graph, groups, widths, known.scores, target=target, criterion=known.criterion, ignore=tuple(ignore))


def costs_of(graph: Graph, groups: Groups, targets: Sequence[Target]) -> dict[str, Sequence[Cost]]:
    """What the targets limit that is counted, not measured, and of which the groups alone do not tell."""
    asked = {t.key for t in targets}
    return ({"size": [size(graph, groups)]} if "size" in asked else {}) | ({"memory": memory(graph, groups)} if "memory" in asked else {})
