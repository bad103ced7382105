"""Training on several processes that gives what one process would give: the same batches, the same losses, the same gradients.

Every process goes through the same batches and computes its share of each. Losses need the whole batch (a correlation over it, a variance of it), so
all answers are exchanged, and each process takes the gradient of the whole loss with respect to its own answers; the sum of these gradients over the
processes is that of the whole batch. Batch norm takes its statistics over all processes, forward and backward. What is left is rounding, and dropout,
which draws on every process for itself.

Without torch.distributed all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from structprune.errors import InputError
from structprune.ir.samples import samples_in
from structprune.ir.traced import TracedModule
from structprune.processes import count, rank

aten = torch.ops.aten


def share_of(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """This process's rows of a batch's inputs, and how many rows each process has. What is no tensor with a batch axis is everybody's.

    Raises InputError for a batch with fewer rows than there are processes.
    """
    rows = samples_in(values)
    if count() == 1:
        return list(values), [rows]
    if rows < count():
        raise InputError(f"a batch of {rows} cannot be shared by {count()} processes; give larger batches, and leave out what remains at the end")
    sizes = [len(part) for part in torch.arange(rows).tensor_split(count())]
    start = sum(sizes[: rank()])
    return [v[start : start + sizes[rank()]] if isinstance(v, Tensor) and v.dim() else v for v in values], sizes


def gathered(own: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes, of which only this one's lead back to its model: the gradient of a loss of all rows is then this process's part."""
    if count() == 1:
        return own
    if own.dim() == 0 or own.shape[0] != sizes[rank()]:
        raise InputError(f"an answer of shape {'x'.join(map(str, own.shape))} has no batch on its first axis; train in one process, without torchrun")
    parts = []
    for owner, size in enumerate(sizes):
        part = own.detach().contiguous() if owner == rank() else own.new_empty((size, *own.shape[1:]))
        dist.broadcast(part, owner)
        parts.append(own if owner == rank() else part)
    return torch.cat(parts)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Of every parameter that has a gradient, the sum over all processes."""
    if count() > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)


def with_shared_statistics(module: TracedModule) -> TracedModule:
    """The same module, in which batch norms that are in training take their statistics over all processes; itself where there is but one."""
    if count() == 1:
        return module
    for node in module.graph.nodes:
        if node.target is aten.batch_norm.default and node.args[5] is True and isinstance(node.args[3], fx.Node):
            node.target = batch_norm
    module.recompile()
    return module


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    """aten.batch_norm in training, [N, C, ...], with mean and variance over the rows of all processes."""
    axes = [d for d in range(x.dim()) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    rows = _Sum.apply(torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device))
    mean = _Sum.apply(x.sum(axes)) / rows
    centred = x - mean.view(shape)
    var = _Sum.apply(centred.square().sum(axes)) / rows
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (rows / (rows - 1).clamp_min(1))).to(running_var.dtype), momentum)
    normal = centred * (var + eps).rsqrt().view(shape)
    if weight is not None:
        normal = normal * weight.view(shape)
    return normal + bias.view(shape) if bias is not None else normal


class _Sum(torch.autograd.Function):
    """The sum over all processes: every process's loss reads it, so its gradient is their sum too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total
