"""What batch norms know of their inputs, measured for the weights as they are.

A pruned model's running mean and variance are those of the dense one, and a running average forgets them slowly; averaged weights never had any of
their own. Both are made good by a few batches without gradients (Izmailov et al., Averaging Weights Leads to Wider Optima, arXiv:1803.05407,
section 3.2; Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3). On the demo at half the channels, one epoch of eight steps
gives 85 % with them and 27 % without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ir.operators import operator_name
from structprune.ir.traced import TracedModule

BATCHES = 32  # that are enough: the papers take some thousand samples


def follows_batches(module: TracedModule) -> TracedModule:
    """The same module in evaluation mode, but for batch norms with running statistics, which take each batch's own and write them down."""
    module.eval()
    for node in _norms(module):
        node.update_arg(5, True)
        node.update_arg(6, 1.0)  # all of the new, nothing of the old
    module.recompile()
    return module


@torch.no_grad()
def measure(module: TracedModule, batches: Iterable[list[Any]]) -> None:
    """Write the mean over the batches of each mean and variance into the running statistics of a module that `follows_batches`."""
    tensors = dict(module.named_buffers())
    running = [tensors[str(statistic.target)] for node in _norms(module) for statistic in node.args[3:5] if isinstance(statistic, fx.Node)]
    sums: list[Tensor] = [torch.zeros_like(t) for t in running]
    count = 0
    for inputs in batches:
        module(*inputs)
        count += 1
        for total, value in zip(sums, running, strict=True):
            total += value
    for total, value in zip(sums, running, strict=True):
        value.copy_(total / max(count, 1))


def has_norms(module: TracedModule) -> bool:
    """Whether there is anything to measure."""
    return bool(_norms(module))


def _norms(module: TracedModule) -> list[fx.Node]:
    """Batch norms over activations: those that standardise weights keep no statistics."""
    return [n for n in module.graph.nodes if operator_name(n) == "batch_norm" and isinstance(n.args[3], fx.Node)]
