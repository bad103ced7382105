"""Pooling and sampling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.frontends.onnx_in.operators.contraction import padded, window_of
from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Unsupported

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _window(call: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[Any]]:
    window = list(call.get("kernel_shape"))
    if len(window) not in _MAX:
        raise Unsupported(f"over {len(window)} axes")
    return (window, *window_of(call, x, window))


@operator("MaxPool")
def max_pool(call: Call, x: Tensor) -> Tensor:
    if call.wants(1):
        raise Unsupported("whose indices are read")
    call.refuse_unless("storage_order", 0)
    window, stride, dilation, padding = _window(call, x)
    whole_windows = all(isinstance(n, int) and 2 * n <= k for n, k in zip(padding, window * 2, strict=True))
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    x, symmetric = padded(x, padding, lowest) if whole_windows else (_padded_by(x, padding, lowest), [0] * len(window))
    return _MAX[len(window)](x, window, stride, symmetric, dilation, bool(call.get("ceil_mode", 0)))


def _padded_by(x: Tensor, padding: list[Any], value: float = 0.0) -> Tensor:
    rank = len(padding) // 2
    return F.pad(x, [n for a, b in zip(reversed(padding[:rank]), reversed(padding[rank:]), strict=True) for n in (a, b)], value=value)


@operator("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """Padding counts only with count_include_pad; where torch cannot leave it out, the sums are divided by what was there."""
    window, stride, dilation, padding = _window(call, x)
    if any(d != 1 for d in dilation):
        raise Unsupported("with dilations")
    rank, ceil, included = len(window), bool(call.get("ceil_mode", 0)), bool(call.get("count_include_pad", 0))
    pool = _AVERAGE[rank]
    symmetric = padding[:rank] == padding[rank:] and all(isinstance(n, int) and 2 * n <= k for n, k in zip(padding[:rank], window, strict=True))
    if symmetric or (all(isinstance(n, int) and n == 0 for n in padding)):
        return pool(x, window, stride, padding[:rank], ceil, included)  # type: ignore[operator, no-any-return]
    if included:
        return pool(_padded_by(x, padding), window, stride, 0, ceil, True)  # type: ignore[operator, no-any-return]
    there = _padded_by(torch.ones_like(x[:1, :1]), padding)
    return pool(_padded_by(x, padding), window, stride, 0, ceil) / pool(there, window, stride, 0, ceil)  # type: ignore[operator, no-any-return]


@operator("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    window, stride, dilation, padding = _window(call, x)
    if any(d != 1 for d in dilation):
        raise Unsupported("with dilations")
    p, count = call.get("p", 2), 1
    for k in window:
        count *= k
    powers = _AVERAGE[len(window)](_padded_by(x.abs().pow(p), padding), window, stride, 0, bool(call.get("ceil_mode", 0)), True)  # type: ignore[operator]
    return (powers * count).pow(1 / p)  # type: ignore[no-any-return]


@operator("GlobalAveragePool")
def global_average(call: Call, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max(call: Call, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, call.get("p", 2), list(range(2, x.dim())), True)


@operator("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}[call.get("mode", "linear")]
    if x.dim() == 5 and mode == "bicubic":
        raise Unsupported("cubic over three axes")
    return F.grid_sample(x, grid, mode, call.get("padding_mode", "zeros"), bool(call.get("align_corners", 0)))
