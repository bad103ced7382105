"""Reductions over whole axes, and what orders the entries along one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structprune.frontends.onnx_in import numbers
from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Sizes, Unsupported


def _reduce(name: str, function: Callable[[Tensor, list[int], bool], Tensor], on_numbers: Callable[..., Any] | None = None) -> None:
    @operator(name, sizes=(1,), numbers=on_numbers)
    def reduce(call: Call, x: Tensor, axes: Sizes | None = None) -> Tensor:
        chosen = numbers.ints(axes) if axes is not None else call.get("axes")
        keep, nothing = bool(call.get("keepdims", 1)), bool(call.get("noop_with_empty_axes", 0))
        chosen = chosen or ([] if nothing else list(range(x.dim())))
        if not chosen:  # of each entry by itself
            return function(x.unsqueeze(0), [0], False)
        return function(x, [int(a) for a in chosen], keep)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    count = numbers.product([x.shape[a] for a in axes])
    return torch.div(x.sum(axes, keepdim=keep, dtype=x.dtype), count, rounding_mode="trunc")


def _amax(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amax(axes, keepdim=keep)


def _amin(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amin(axes, keepdim=keep)


_reduce("ReduceSum", lambda x, a, k: x.sum(a, keepdim=k, dtype=x.dtype), numbers.reduced(sum))
_reduce("ReduceMean", _mean)
_reduce("ReduceMax", _amax, numbers.reduced(max))
_reduce("ReduceMin", _amin, numbers.reduced(min))
_reduce("ReduceProd", _prod, numbers.reduced(numbers.product))
_reduce("ReduceL1", lambda x, a, k: x.abs().sum(a, keepdim=k, dtype=x.dtype))
_reduce("ReduceL2", lambda x, a, k: x.square().sum(a, keepdim=k).sqrt())
_reduce("ReduceSumSquare", lambda x, a, k: x.square().sum(a, keepdim=k, dtype=x.dtype))
_reduce("ReduceLogSum", lambda x, a, k: x.sum(a, keepdim=k).log())
_reduce("ReduceLogSumExp", lambda x, a, k: x.logsumexp(a, keepdim=k))


def _argument(name: str, function: Callable[..., Tensor]) -> None:
    @operator(name)
    def argument(call: Call, x: Tensor) -> Tensor:
        axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
        if call.get("select_last_index", 0):
            return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)
        return function(x, axis, keep)


_argument("ArgMax", torch.argmax)
_argument("ArgMin", torch.argmin)


@operator("TopK", sizes=(1,))
def top_k(call: Call, x: Tensor, k: Sizes | None = None) -> tuple[Tensor, Tensor]:
    number = k.item() if k is not None else call.get("k")
    values, indices = torch.topk(x, number, call.get("axis", -1), bool(call.get("largest", 1)), bool(call.get("sorted", 1)))
    return values, indices


@operator("CumSum", sizes=(1,))
def cumsum(call: Call, x: Tensor, axis: Sizes) -> Tensor:
    dim = axis.item()
    out = x.flip(dim).cumsum(dim, dtype=x.dtype).flip(dim) if call.get("reverse", 0) else x.cumsum(dim, dtype=x.dtype)
    return out - x if call.get("exclusive", 0) else out


def _along(name: str, function: Callable[..., Tensor]) -> None:
    @operator(name)
    def along(call: Call, x: Tensor) -> Tensor:
        """Up to opset 12 over all axes from `axis` on, the second by default."""
        if call.opset >= 13:
            return function(x, call.get("axis", -1))
        axis = call.get("axis", 1) % x.dim()
        if axis == x.dim() - 1 or all(n == 1 for n in x.shape[axis + 1 :]):
            return function(x, axis)
        return function(x.flatten(axis), -1).reshape(x.shape)


_along("Softmax", torch.softmax)
_along("LogSoftmax", torch.log_softmax)


@operator("Hardmax")
def hardmax(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", -1 if call.opset >= 13 else 1)
    if call.opset < 13 and axis % x.dim() != x.dim() - 1:
        raise Unsupported("over several axes")
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)
