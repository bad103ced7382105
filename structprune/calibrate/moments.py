"""What the readers of a dense model read: second moments of their inputs, and how much the model's answer depends on theirs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from structprune import processes
from structprune.calibrate.arrivals import arrivals
from structprune.calibrate.divergence import sampled_loss
from structprune.calibrate.readers import Reader, matrix, places, readers, rows_of_answer, rows_of_input, takes_a_shift
from structprune.calibrate.stepping import Stepping
from structprune.ir.graph import Graph
from structprune.ir.samples import Samples, samples_in

_log = logging.getLogger(__name__)

_ROWS = 40_000  # of one reader, of all samples together
_WIDEST = 5_000  # inputs · taps: of wider readers only the diagonal is known
_GRADIENTS = 64  # samples that are differentiated
_AT_ONCE = 16


@dataclass(frozen=True)
class Moments:
    """Of one reader. `gram`: [groups, n, n], the covariance of what it reads where a constant can be taken up by its bias, else E[x xᵀ]; of a very
    wide reader [groups, n], its diagonal. `mean`: [groups, n]. `weight`: [groups, m, n], each row times the root of how much the answer of the model
    changes with the square of that row's answer, so that |weight · error|² is comparable between readers.
    """

    reader: Reader
    gram: Tensor
    mean: Tensor
    weight: Tensor
    rows: int

    @property
    def diagonal_only(self) -> bool:
        return self.gram.dim() == 2


@torch.no_grad()
def moments(graph: Graph, samples: Samples, seed: int = 0) -> dict[fx.Node, Moments]:
    """Of every reader of the graph, by its node, on as many samples as have room there. Memory: their values, and the moments in float64."""
    known = readers(graph)
    relevance = _relevance(graph, known, samples, seed)
    run, joining = Stepping(graph.module), arrivals(graph, samples)
    found = {}
    while (node := run.upcoming) is not None:
        run.join(one.batch for one in joining.get(node, ()))
        run.step()
        if node in known:
            reader = known[node]
            weight = graph.tensor(reader.weight)
            gram, mean, scale, rows = _sums(run, reader, weight, takes_a_shift(reader))
            importance = relevance.get(node)
            if importance is None:  # an answer counts by its own variance
                importance = (1 / (scale.sum() + 1e-30)).expand_as(scale)
            if rows and gram.isfinite().all() and importance.isfinite().all():  # they are not where masks of -inf are read
                found[node] = Moments(reader, gram, mean, matrix(reader, weight.detach()).double() * importance.sqrt()[..., None], rows)
        run.forget(node)
    return found


def _sums(run: Stepping, reader: Reader, weight: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """The gram matrix and mean of the input, the variance of each answer, and the number of rows."""
    gram = mean = answers = squares = torch.zeros(())
    origin: Tensor | None = None  # from which x is measured: near its mean, little is lost to rounding
    rows = 0
    total = processes.number_of_all(sum(values[reader.node].shape[0] for values in run.values))
    for number, values in enumerate(run.values):
        answer = values[reader.node]
        chosen = places(reader, answer, _ROWS / max(1, total), seed=number)
        x = rows_of_input(reader, values[reader.input], weight.shape[2:], answer.shape[2:] if reader.rank else (), chosen).float()
        if centred:
            origin = processes.same_everywhere(x.mean(1, keepdim=True).nan_to_num()) if origin is None else origin
            x = x - origin
        y = rows_of_answer(reader, answer, chosen).double()
        product = torch.bmm(x.transpose(1, 2), x) if x.shape[2] <= _WIDEST else x.square().sum(1)
        gram, mean, rows = gram + product.double(), mean + x.sum(1).double(), rows + x.shape[1]
        answers, squares = answers + y.sum(1), squares + y.square().sum(1)
    gram, mean, answers, squares = processes.total(gram, mean, answers, squares)
    rows = int(processes.number_of_all(rows))  # none, where no sample chose the layer
    gram, mean = gram / max(1, rows), mean / max(1, rows)
    if centred:
        gram = gram - (mean[..., :, None] * mean[..., None, :] if gram.dim() == 3 else mean.square())
        mean = mean if origin is None else mean + origin[:, 0].double()
    return gram, mean, squares / max(1, rows) - (answers / max(1, rows)).square(), rows


def _relevance(graph: Graph, known: Mapping[fx.Node, Reader], samples: Samples, seed: int) -> dict[fx.Node, Tensor]:
    """For each entry of a reader's answer, [groups, m]: the sum over positions of the squared derivative of the model's answer, on average over
    samples.

    The diagonal of the Gauss–Newton matrix, or of the Fisher matrix for class logits; see `sampled_loss`. Empty where torch has no derivative.
    """
    sums: dict[fx.Node, Tensor] = {}
    number = 0
    generator = torch.Generator().manual_seed(seed)
    for batch in samples.spread(_GRADIENTS).batches:
        for part in _parts(batch) if samples.divisible else [batch]:
            if number >= _GRADIENTS:
                break
            run = Stepping(graph.module, [part])
            answers: dict[fx.Node, Tensor] = {}
            try:
                with torch.enable_grad():
                    output = _differentiable(run, known, answers)
                    loss = sampled_loss(output, generator)
                    gradients = torch.autograd.grad(loss, list(answers.values()), allow_unused=True)
            except (RuntimeError, NotImplementedError):
                _log.debug("no derivatives: readers count by the variance of their answers", exc_info=True)
                return {}
            for node, gradient in zip(answers, gradients, strict=True):
                if gradient is not None:
                    squares = rows_of_answer(known[node], gradient, None).double().square().sum(1)
                    sums[node] = sums.get(node, torch.zeros(())) + squares
            number += samples_in(part)
    return {node: total / max(1, number) for node, total in sums.items()}


def _parts(batch: list[object]) -> list[list[object]]:
    size = samples_in(batch)
    if size <= _AT_ONCE or any(isinstance(v, Tensor) and v.dim() and v.shape[0] != size for v in batch):
        return [batch]
    return [[v[i : i + _AT_ONCE] if isinstance(v, Tensor) and v.dim() else v for v in batch] for i in range(0, size, _AT_ONCE)]


def _differentiable(run: Stepping, known: Mapping[fx.Node, Reader], answers: dict[fx.Node, Tensor]) -> object:
    """Run the graph; `answers` receives those of readers, before anything is written into them."""
    values = run.values[0]
    output: object = None
    while (node := run.upcoming) is not None:
        output = run.step()
        if node in known and values[node].is_floating_point():
            value = values[node] if values[node].requires_grad else values[node].detach().requires_grad_()
            answers[node] = value
            values[node] = value.clone()
        run.forget(node)
    return output
