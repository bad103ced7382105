"""Which channels matter: the criteria by name, and what a user may give in the place of a name.

A criterion scores every channel of a coupled group over all the tensors that it stands in: (Groups, tensors by name) -> {group name: score of each
channel}; higher scores stay. What each of them computes, and whose it is, stands in its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from structprune.analysis.groups import Groups
from structprune.decide.activations import activation_energy, activation_mean, activation_rate, activation_variance
from structprune.decide.gradients import fisher, hessian, loss_gradient, output_gradient, taylor
from structprune.decide.weights import Criterion, Scores, at_random, batch_norm_scale, geometric_median, layer_adaptive, magnitude
from structprune.errors import InputError, did_you_mean
from structprune.ir.axes import Atom
from structprune.ir.graph import Graph
from structprune.ir.samples import Samples

__all__ = ["NAMED", "Criterion", "Named", "Scores", "above", "criterion_of", "magnitude"]

NOTHING, SAMPLES, LABELS = "nothing", "samples", "labels"


@dataclass(frozen=True)
class Named:
    """A criterion that has a name. needs: 'nothing', 'samples', or 'labels', which are samples with labels. says: what it looks at, in a few words.

    function: takes groups and tensors, and what `takes` lists by keyword. None for one that does more than score: decide/saliency.py knows it.
    """

    function: Callable[..., Scores] | None
    needs: str
    says: str
    takes: tuple[str, ...] = ()


def _of_samples(function: Callable[..., Scores], needs: str, says: str) -> Named:
    return Named(function, needs, says, ("graph", "samples", "seed"))


NAMED = {
    "random": Named(at_random, NOTHING, "noise, the baseline", ("seed",)),
    "l1": Named(partial(magnitude, power=1), NOTHING, "sum of the absolute weights"),
    "l2": Named(partial(magnitude, power=2), NOTHING, "length of the weights"),
    "bn_scale": Named(batch_norm_scale, NOTHING, "scales of the batch norms"),
    "fpgm": Named(geometric_median, NOTHING, "distance to the other channels' weights"),
    "lamp": Named(layer_adaptive, NOTHING, "squared weights as a share of those of stronger channels"),
    "reconstruction": Named(None, SAMPLES, "what the other channels cannot stand in for", ("graph", "samples", "seed")),
    "activation_mean": _of_samples(activation_mean, SAMPLES, "mean absolute activation"),
    "activation_rate": _of_samples(activation_rate, SAMPLES, "share of activations that are not zero"),
    "activation_variance": _of_samples(activation_variance, SAMPLES, "variance of the activation times the weights that read it"),
    "activation_energy": _of_samples(activation_energy, SAMPLES, "variance in the leading principal components"),
    "gradient": _of_samples(output_gradient, SAMPLES, "gradient of the answer"),
    "fisher": _of_samples(fisher, SAMPLES, "squared gradient of the loss, of labels or of the model's own predictions, times squared weights"),
    "loss_gradient": _of_samples(loss_gradient, LABELS, "gradient of the loss"),
    "taylor": _of_samples(taylor, LABELS, "change of the loss, to first order"),
    "hessian": _of_samples(hessian, LABELS, "change of the loss, by its diagonal second derivative"),
}


def criterion_of(choice: Any, model: nn.Module, seed: int, graph: Graph | None = None, samples: Samples | None = None) -> tuple[str, Criterion]:
    """The criterion that a user asked for, and its name: a name, a torch_pruning Importance, or any callable.

    'auto' is 'reconstruction' with samples, and 'l2' without. Raises InputError for one that is unknown, or needs what was not given.
    """
    if isinstance(choice, str):
        name = ("l2" if samples is None else "reconstruction") if choice == "auto" else choice
        return name, _named(name, seed, graph, samples)
    if any(cls.__module__.startswith("torch_pruning") for cls in type(choice).__mro__):
        from structprune.decide.torch_pruning import adapted

        return type(choice).__name__, adapted(choice, model, graph, samples)
    if callable(choice):
        return getattr(choice, "__name__", type(choice).__name__), choice
    raise InputError(f"criterion {choice!r} is neither a name, a torch_pruning Importance, nor a callable")


def must_be_criterion(choice: Any) -> None:
    """Raise InputError for a name that is no criterion's."""
    if isinstance(choice, str) and choice not in ("auto", *NAMED):
        raise InputError(f"unknown criterion {choice!r}{did_you_mean(choice, NAMED)}; use one of {', '.join(['auto', *sorted(NAMED)])}")


def _named(name: str, seed: int, graph: Graph | None, samples: Samples | None) -> Criterion:
    must_be_criterion(name)
    chosen = NAMED[name]
    if chosen.needs == LABELS and (samples is None or samples.labels is None):
        raise InputError(f"criterion {name!r} needs samples with labels: give calibration= (--calibration) with batches of (inputs, labels)")
    if chosen.needs == SAMPLES and samples is None:
        raise InputError(f"criterion {name!r} needs samples of the model's inputs: give them as calibration= (--calibration)")
    if chosen.function is None:
        raise InputError(f"criterion {name!r} does not only score channels: ask compress() or plan() for it")
    given = {"seed": seed, "graph": graph, "samples": samples}
    return partial(chosen.function, **{key: given[key] for key in chosen.takes})


def above(groups: Groups, scores: Scores, threshold: float) -> dict[Atom, int]:
    """Widths by an absolute threshold, in the criterion's own unit: how many channels of each group have at least that score; one where none has."""
    if math.isnan(threshold):
        raise InputError("threshold= is no number")
    return {group.atom: max(1, int((np.asarray(scores[group.name]) >= threshold).sum())) for group in groups}
