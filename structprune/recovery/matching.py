"""Matching without labels: steps in which all layers of the small model learn together what `compensate` fitted one by one.

The refit of a layer knows the layers before it, and not what those after it need. Here gradients flow through the whole small model, and every block
has its target: the loss is the mean, over all readers (convolutions, linear layers), of the error of their answer from the entries that stay of the
dense model's, as a share of its variance, plus that of the model's answers. The targets inside keep the model from learning few samples by heart.

Batch norms keep their statistics and nothing is dropped: what learns is the model as it will be deployed. An eighth of the samples takes no
part, and decides: where the loss on it has not fallen in the end, the weights stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune import processes
from structprune.analysis.infer import Types
from structprune.calibrate.arrivals import bytes_of
from structprune.calibrate.logits import Turn
from structprune.calibrate.readers import readers
from structprune.errors import InputError
from structprune.ir.axes import Keep
from structprune.ir.graph import Graph, has_open_size
from structprune.ir.samples import Samples, copies, samples_in
from structprune.recovery.distil import losses
from structprune.recovery.finetune import flat, schedule
from structprune.transform.surgery import Surgery, kept_part

_LR = 3e-4  # of Adam, the highest; at three times of it EfficientNet-Lite0 unlearns more than it learns
_HELD = 1 / 8  # of the samples
_MOST = 64  # samples of a step
_MEMORY = 2 << 30  # bytes of values that a step may keep for its gradient


@dataclass(frozen=True)
class Matched:
    """The loss on the samples held back, before and after, None where it is no number; `kept`: whether the new weights are better, and stay."""

    steps: int
    before: float | None
    after: float | None
    kept: bool


def must_learn(module: nn.Module) -> None:
    """Raises InputError for a model whose weights are too coarse for small steps."""
    coarse = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if coarse:
        raise InputError(f"matching= trains the weights, and {min(coarse)} rounds its steps away; give the model in float32")


def match(
    graph: Graph,
    types: Types,
    keep: Keep,
    surgery: Surgery,
    samples: Samples,
    steps: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    turned: Mapping[fx.Node, Turn] = MappingProxyType({}),
) -> Matched:
    """Train the small model's parameters, in place, on samples without labels; on every process, where several share the work."""
    loss = _loss(graph, types, keep, surgery, turned)
    parameters = [p for p in surgery.module.parameters() if p.is_floating_point()]
    size = _samples_of_a_step(graph) if samples.divisible else 1
    learnt, held = samples.cut(1 - _HELD)
    start = [p.detach().clone() for p in parameters]
    before = _mean(loss, held, size)
    if not math.isfinite(before):  # an answer holds masks of -inf, say: there is no error to make smaller
        return Matched(0, None, None, kept=False)
    optimiser = torch.optim.Adam(parameters, _LR)
    batches = _batches(learnt, size, _order(learnt.count, seed))
    with _learning(parameters):
        for step, batch in zip(range(steps), batches, strict=False):
            optimiser.param_groups[0]["lr"] = _LR * schedule(step, steps)
            optimiser.zero_grad()
            now = loss(batch)
            now.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            progress(f"match {step + 1} of {steps} steps: loss {now.item():.4g}")
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(processes.same_everywhere(parameter))
        after = float(processes.same_everywhere(torch.tensor(_mean(loss, held, size))))
        if not after < before:  # nor where it is not a number
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return Matched(steps, before, after if math.isfinite(after) else None, after < before)


def _loss(graph: Graph, types: Types, keep: Keep, surgery: Surgery, turned: Mapping[fx.Node, Turn]) -> Callable[[Sequence[Any]], Tensor]:
    """How far the small model is from the dense one on a batch, as a scalar to derive by; NaN where there is nothing to compare."""
    small = set(surgery.module.graph.nodes)  # some copies of dense nodes are gone
    counterparts = {old: new for new, old in surgery.originals.items() if new in small}
    mine = readers(graph)
    points = [node for node in mine if node in counterparts and not has_open_size(node)]
    teacher, student = flat(graph.module, points), flat(surgery.module, [counterparts[node] for node in points])

    def loss(batch: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            wanted, inside = teacher(*copies(batch))
        answers, found = student(*copies(batch))
        aims = [turned[n](theirs, mine[n].answer_axis) if n in turned else theirs for n, theirs in zip(points, inside, strict=True)]
        pairs = [(own, kept_part(aim, types.shape(node), keep)) for node, own, aim in zip(points, found, aims, strict=True)]
        compared = [(a, w) for a, w in zip(answers, wanted, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
        terms = losses([a for a, _ in compared], [w for _, w in compared], [""] * len(compared), distill=("mse",), features=pairs)
        return torch.stack(list(terms.values())).sum() if terms else torch.tensor(math.nan)

    return loss


@torch.no_grad()
def _mean(loss: Callable[[Sequence[Any]], Tensor], samples: Samples, size: int) -> float:
    batches = list(_batches(samples, size, iter(range(samples.count))))
    return sum(float(loss(batch)) * samples_in(batch) for batch in batches) / len(samples)


def _samples_of_a_step(graph: Graph) -> int:
    each = sum(map(bytes_of, graph.nodes)) / samples_in(graph.given_inputs())
    return max(1, min(_MOST, int(_MEMORY / max(each, 1))))


def _order(count: int, seed: int) -> Iterator[int]:
    """The numbers below `count` in a random order, and again in another one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _batches(samples: Samples, size: int, order: Iterator[int]) -> Iterator[list[Any]]:
    """Samples of these numbers, so many at a time; or batches as they are, one at a time."""
    while chosen := set(islice(order, size)):
        yield _joined(samples.of(chosen).batches)


def _joined(batches: Sequence[list[Any]]) -> list[Any]:
    """One batch of several; what is no tensor with a batch axis is the first one's."""
    if len(batches) == 1:
        return batches[0]
    rows = samples_in(batches[0])
    parts = zip(*batches, strict=True)
    return [torch.cat(list(p)) if isinstance(p[0], Tensor) and p[0].dim() and p[0].shape[0] == rows else p[0] for p in parts]


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that take gradients; those that did not, do not afterwards."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(False)
