"""Samples made of nothing but the model: inputs whose batch norms see the means and variances that training left in them.

From noise, by Adam on

    Σ over batch norms, mean over channels of  (E[x] − μ)² / (σ² + ε) + (log(Var[x] + ε) − log(σ² + ε))²

with E and Var over a batch and its positions, and μ, σ² the norm's running statistics (Cai et al., ZeroQ, 2020, and Yin et al., DeepInversion, 2020,
with squares that are not relative to σ²).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from structprune.calibrate.arrivals import MEMORY, bytes_of
from structprune.calibrate.stepping import Stepping
from structprune.errors import InputError
from structprune.ir.graph import Graph
from structprune.ir.operators import operator_name
from structprune.ir.samples import Samples, samples_in

SYNTHETIC = "synthetic"
_NUMBER = 256  # samples, and fewer of a large model
_WORK = 5e13  # that making them may take, in multiply-accumulates: about twenty minutes of one core with AVX-512
_BYTE = 60  # multiply-accumulates that take as long as a byte of an answer, forward and backward: depthwise convolutions and norms mostly move data
_TOGETHER, _LEAST = 32, 4  # samples whose statistics are compared, and of how many at least
_STEPS = 200
_RATE = 0.5  # of Adam, annealed to nothing


def synthetic(graph: Graph, macs: float, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Samples:
    """Up to 256 samples like those that the model was trained on, without data. macs: the work of one run on the example.

    Raises InputError for a model without batch norms, or whose inputs are not floating-point tensors with a free batch.
    """
    given = graph.given_inputs()
    norms = {n for n in graph.nodes if operator_name(n) == "batch_norm" and n.args[5] is False}
    if not norms:
        raise InputError(
            f"calibration {SYNTHETIC!r} makes samples from the statistics in batch norms, and this model has none: give some of its inputs"
        )
    if not graph.dynamic_batch or not all(isinstance(v, Tensor) and v.is_floating_point() and v.dim() for v in given):
        raise InputError(f"calibration {SYNTHETIC!r} is for models of floating-point tensors with a free batch: give samples of this model's inputs")
    held = sum(bytes_of(n) for n in graph.nodes if n.op == "call_function") / samples_in(graph.flat_inputs())
    affordable = min(_NUMBER, int(_WORK / (_STEPS * max(1.0, macs / samples_in(given) + _BYTE * held))))
    most = max(_LEAST, min(_TOGETHER, int(MEMORY / max(1.0, held))))
    number = max(1, round(affordable / most))
    together = max(_LEAST, min(most, affordable // number))
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for batch in range(number):
        say(f"make samples: {batch * together} of {number * together}")
        batches.append(_made(graph, norms, [torch.randn((together, *v.shape[1:]), generator=generator).to(v) for v in given]))
    return Samples(batches, made=True)


def _made(graph: Graph, norms: set[fx.Node], inputs: list[Tensor]) -> list[Tensor]:
    for value in inputs:
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(inputs, _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        with torch.enable_grad():
            gradients = torch.autograd.grad(_apart(graph, norms, inputs), inputs, allow_unused=True)
        for value, gradient in zip(inputs, gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        schedule.step()
    return [value.detach() for value in inputs]


def _apart(graph: Graph, norms: set[fx.Node], inputs: list[Tensor]) -> Tensor:
    """How far what the norms see is from what they remember."""
    run = Stepping(graph.module, [inputs])
    total, left = inputs[0].new_zeros(()), len(norms)
    while left and (node := run.upcoming) is not None:
        if node in norms:
            x, mean, variance = (run.values[0][node.args[i]] for i in (0, 3, 4))  # type: ignore[index]
            epsilon = float(node.args[7])  # type: ignore[arg-type]
            axes = [0, *range(2, x.dim())]
            off = (x.mean(axes) - mean).square() / (variance + epsilon)
            spread = (x.var(axes) + epsilon).log() - (variance + epsilon).log()
            total, left = total + (off + spread.square()).mean(), left - 1
        run.step()
        run.forget(node)
    return total
