"""Operators that torch's exporter writes wrongly, or not at all, as ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op
from onnxscript import opset20


def _squeeze(x: Any, dims: int | Sequence[int]) -> Any:
    """torch leaves an axis that it cannot squeeze as it is; ONNX refuses the file, and torch's exporter does not look."""
    axes = [dims] if isinstance(dims, int) else list(dims)
    ones = [d for d in axes if len(x.shape) and x.shape[d] == 1]
    return op.Squeeze(x, op.Constant(value_ints=ones)) if ones else op.Identity(x)  # type: ignore[arg-type]


def _same(x: Any) -> Any:
    return op.Identity(x)


def _copy(x: Any, values: Any, non_blocking: bool = False) -> Any:
    """torch's exporter forgets that the values are spread over all of what they overwrite."""
    values = op.CastLike(values, x)
    return values if x.shape is not None and x.shape == values.shape else op.Expand(values, op.Shape(x))


def _grid_sample_3d(x: Any, grid: Any, interpolation: int, padding: int, align_corners: bool) -> Any:
    """Numbers as torch counts them: bilinear, nearest; zeros, border, reflection."""
    modes, paddings = ("linear", "nearest"), ("zeros", "border", "reflection")
    return opset20.GridSample(x, grid, align_corners=int(align_corners), mode=modes[interpolation], padding_mode=paddings[padding])


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float, cudnn: bool) -> Any:
    return op.BatchNormalization(x, weight, bias, mean, variance, epsilon=eps)


def _grouped_mm(x: Any, experts: Any, ends: Any, bias: Any = None, dtype: Any = None) -> Any:
    """Each expert multiplies the rows from the end of the one before to its own; what comes behind the last is 0."""
    if bias is not None:
        raise NotImplementedError("a bias for each expert")
    ends = op.Concat(_ints(0), op.CastLike(ends, _ints(0)), op.Shape(x, start=0, end=1), axis=0)
    number = experts.shape[0]
    end = [op.Slice(ends, _ints(i), _ints(i + 1)) for i in range(number + 2)]
    rows = [op.Slice(x, end[i], end[i + 1], _ints(0)) for i in range(number + 1)]
    weights = [op.Squeeze(op.Slice(experts, _ints(i), _ints(i + 1), _ints(0)), _ints(0)) for i in range(number)]
    return op.Concat(*map(op.MatMul, rows, [*weights, op.Sub(weights[0], weights[0])]), axis=0)


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Of equal entries ONNX puts the first first."""
    return op.TopK(x, op.Gather(op.Shape(x), _ints(dim), axis=0), axis=dim, largest=int(descending), sorted=1)


def _hamming_window(length: int, *_: Any, **__: Any) -> Any:
    """ONNX's has 25/46 where torch has 0.54."""
    return op.Constant(value_floats=torch.hamming_window(length).tolist())


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.batch_norm.default: _batch_norm,  # of evaluation, see lowering.py
    torch.ops.aten.squeeze.dim: _squeeze,
    torch.ops.aten.squeeze.dims: _squeeze,
    torch.ops.prims.view_of.default: _same,
    torch.ops.aten.grid_sampler_3d.default: _grid_sample_3d,
    torch.ops.aten.sort.stable: _sort,
    torch.ops.aten._grouped_mm.default: _grouped_mm,
    torch.ops.aten.hamming_window.default: _hamming_window,
}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Functions of onnxscript by operator; those that a library registers among them, where it has."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return _TRANSLATIONS | ({} if fallback is None else {fallback.default: _grouped_mm})
