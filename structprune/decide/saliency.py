"""`Saliency`: all that a decision goes by, of weights alone or of samples too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from structprune.analysis.groups import Groups
from structprune.calibrate.logits import measured_logits
from structprune.calibrate.moments import moments
from structprune.decide.allocate import importance_losses
from structprune.decide.criteria import Scores
from structprune.decide.plan import scored
from structprune.decide.reconstruction import reconstruction
from structprune.decide.sensitivity import measured_losses
from structprune.errors import InputError
from structprune.ir.axes import Atom
from structprune.ir.graph import Graph
from structprune.ir.samples import Samples
from structprune.transform.branches import branches

RECONSTRUCTION = "reconstruction"
_SEEN = 0.75  # of the samples tell which channels go; the others what that loses, for what is fitted to samples answers them too well


@dataclass(frozen=True)
class Saliency:
    """`scores`: of every channel of every group, the higher ones stay. `losses`: [channels + 1] of every group, how far the model's answer moves
    when so many of its best channels stay, where samples tell. `branches`: what may go whole, where they tell what that loses.
    """

    criterion: str
    scores: Scores
    losses: Mapping[str, np.ndarray] | None = None
    branches: Mapping[Atom, frozenset[Atom]] = field(default_factory=dict)


def saliency(
    graph: Graph,
    groups: Groups,
    criterion: Any = "auto",
    *,
    model: nn.Module | None = None,
    samples: Samples | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Saliency:
    """Score the channels of a model, and, with samples, find out what narrowing each group loses.

    'auto' is 'reconstruction' with samples, and 'l2' without. Groups that no reader sums over (the width of queries and keys) are ordered by 'l2'
    then, and their loss is measured, of queries and keys fitted to their product. Raises InputError for a criterion that is unknown, or wants what
    was not given.
    """
    chosen = (RECONSTRUCTION if samples is not None else "l2") if isinstance(criterion, str) and criterion == "auto" else criterion
    reconstructed = isinstance(chosen, str) and chosen == RECONSTRUCTION
    if reconstructed and samples is None:
        raise InputError("criterion 'reconstruction' looks at what layers read: give samples of the model's inputs as calibration= (--calibration)")
    name, scores = scored(graph, groups, "l2" if reconstructed else chosen, model=model, samples=samples, seed=seed)
    if samples is None:
        return Saliency(name, scores)
    say("moments of what layers read")
    seen, held_out = samples.cut(_SEEN)
    found = moments(graph, seen, seed)
    curves = reconstruction(groups, found) if reconstructed else {}
    logits = measured_logits(graph, groups.types, seen)
    missed = {of_width.atom: of_width.losses() for of_width in logits}
    scores = {g.name: curves[g.name].scores if g.name in curves else scores[g.name] for g in groups}
    shapes = {g.name: curves[g.name].losses if g.name in curves else missed.get(g.atom, importance_losses(scores[g.name])) for g in groups}
    whole = branches(graph, groups)
    losses = measured_losses(graph, groups, scores, shapes, found, logits, held_out, whole, say)
    return Saliency(RECONSTRUCTION if reconstructed else name, scores, losses, whole)
