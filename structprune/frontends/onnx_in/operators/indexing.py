"""Operators that read or write entries by their numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structprune.frontends.onnx_in import numbers
from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Sizes, Unsupported, Value, as_tensor


@operator("Gather", either=(1,), numbers=numbers.gather)
def gather(call: Call, x: Tensor, index: Value) -> Tensor:
    """A known number selects, known neighbours are a slice, and rows of a table of weights are an embedding."""
    axis = call.get("axis", 0) % x.dim()
    if isinstance(index, Sizes):
        numbers_ = index.list()
        if index.array.ndim == 0:
            return x.select(axis, index.item())
        if index.array.ndim == 1 and numbers_ and numbers.is_static(numbers_):
            first = numbers_[0]
            if first >= 0 and numbers_ == list(range(first, first + len(numbers_))):
                return x.narrow(axis, first, len(numbers_))
        index = index.tensor()
    if axis == 0 and x.dim() == 2 and isinstance(x, nn.Parameter):
        return F.embedding(index, x)
    return x[(slice(None),) * axis + (index,)]


@operator("GatherElements")
def gather_elements(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return torch.gather(x, axis, _counted(index, x.shape[axis]))


@operator("GatherND")
def gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    batch = call.get("batch_dims", 0)
    named = [index[..., i] for i in range(index.shape[-1])]
    if batch == 0:
        return x[tuple(named)]
    rows = [torch.arange(x.shape[d]).view([-1 if i == d else 1 for i in range(index.dim() - 1)]) for d in range(batch)]
    at = (*rows, *named)
    return x[at]


@operator("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis, how = call.get("axis", 0), call.get("reduction", "none")
    index = _counted(index, x.shape[axis])
    if how == "none":
        return x.scatter(axis, index, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, index, updates, names[how], include_self=True)


@operator("ScatterND")
def scatter_nd(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    how = call.get("reduction", "none")
    if how not in ("none", "add"):
        raise Unsupported(f"with reduction={how!r}")
    named = tuple(index[..., i] for i in range(index.shape[-1]))
    return torch.index_put(x, named, updates, accumulate=how == "add")


def _counted(index: Tensor, size: Any) -> Tensor:
    """Numbers from the end as numbers from the front."""
    return torch.where(index < 0, index + size, index)


@operator("OneHot", sizes=(1,), either=(2,))
def one_hot(call: Call, index: Tensor, depth: Sizes, values: Value) -> Tensor:
    number = int(depth.item())
    off, on = as_tensor(values).unbind(0)
    axis = call.get("axis", -1)
    axis = axis + index.dim() + 1 if axis < 0 else axis
    at = torch.where(index < 0, index + number, index).unsqueeze(axis)
    classes = torch.arange(number, dtype=index.dtype).view([-1 if d == axis else 1 for d in range(index.dim() + 1)])
    return torch.where(at == classes, on, off)


@operator("ReverseSequence")
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    batch, time = call.get("batch_axis", 1), call.get("time_axis", 0)
    steps = torch.arange(x.shape[time])
    at = torch.where(steps[None] < lengths[:, None], lengths[:, None] - 1 - steps[None], steps[None])  # (batch, time)
    at = at if batch < time else at.t()
    shape = [x.shape[d] if d in (batch, time) else 1 for d in range(x.dim())]
    return torch.gather(x, time, at.reshape(shape).expand(x.shape))
