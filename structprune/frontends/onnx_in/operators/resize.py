"""Resize and Upsample: torch's own interpolation where it is the same, else the standard's formula, an axis at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.frontends.onnx_in import numbers
from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Sizes, Unsupported

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@operator("Upsample", sizes=(1,))
def upsample(call: Call, x: Tensor, scales: Sizes | None = None) -> Tensor:
    """Of opset 9, deprecated since: as Resize of opset 10."""
    factors = numbers.ints(scales) if scales is not None else call.get("scales")
    return _resized(call, x, call.get("mode", "nearest"), "asymmetric", "floor", factors, None)


@operator("Resize", sizes=(1, 2, 3))
def resize(call: Call, x: Tensor, roi: Sizes | None = None, scales: Sizes | None = None, sizes: Sizes | None = None) -> Tensor:
    mode = call.get("mode", "nearest")
    if call.opset < 11:  # the second input held the scales
        return _resized(call, x, mode, "asymmetric", "floor", numbers.ints(roi), None)
    where = call.get("coordinate_transformation_mode", "half_pixel")
    if where == "tf_crop_and_resize":
        raise Unsupported("with tf_crop_and_resize")
    axes = [a % x.dim() for a in call.get("axes") or range(x.dim())]
    policy, rounding = call.get("keep_aspect_ratio_policy", "stretch"), call.get("nearest_mode", "round_prefer_floor")
    factors, wanted = numbers.ints(scales) or None, numbers.ints(sizes) or None
    if wanted is not None:
        if policy != "stretch":
            ratio = (min if policy == "not_larger" else max)(w / x.shape[a] for w, a in zip(wanted, axes, strict=True))
            wanted = [math.floor(ratio * x.shape[a] + 0.5) for a in axes]
            factors = _spread([ratio] * len(axes), axes, [1.0] * x.dim())
        return _resized(call, x, mode, where, rounding, factors, _spread(wanted, axes, list(x.shape)))
    if factors is None:
        raise Unsupported("with neither scales nor sizes")
    return _resized(call, x, mode, where, rounding, _spread(factors, axes, [1.0] * x.dim()), None)


def _spread(values: list[Any], axes: list[int], rest: list[Any]) -> list[Any]:
    for axis, value in zip(axes, values, strict=True):
        rest[axis] = value
    return rest


def _resized(call: Call, x: Tensor, mode: str, where: str, rounding: str, scales: list[Any] | None, sizes: list[Any] | None) -> Tensor:
    """scales or sizes: of all axes."""
    for name in ("antialias", "exclude_outside", "cubic_coeff_a", "extrapolation_value"):  # the last is of tf_crop_and_resize
        call.known.add(name)
    changed = [d for d in range(x.dim()) if (scales[d] != 1 if sizes is None else sizes[d] is not x.shape[d] and sizes[d] != x.shape[d])]  # type: ignore[index]
    if not changed:
        return x
    if where == "align_corners" and scales is not None and any(not float(scales[d]).is_integer() and (x.shape[d] * scales[d]) % 1 for d in changed):
        raise Unsupported("with align_corners to a length that is no whole number, of which runtimes think differently")
    torchs = _torchs_mode(call, mode, where, rounding, x, changed, scales, sizes)
    if torchs is not None and changed[0] >= 2 and x.dim() in _LINEAR and x.is_floating_point():
        how: dict[str, Any] = {"align_corners": where == "align_corners"} if torchs not in ("nearest", "nearest-exact") else {}
        if sizes is not None:
            return F.interpolate(x, size=sizes[2:], mode=torchs, **how)
        assert scales is not None
        return F.interpolate(x, scale_factor=[float(s) for s in scales[2:]], mode=torchs, recompute_scale_factor=False, **how)
    for d in changed:
        size = x.shape[d]
        out = sizes[d] if sizes is not None else math.floor(size * scales[d])  # type: ignore[index]
        if not isinstance(size, int) or not isinstance(out, int):
            raise Unsupported(f"with mode={mode!r}, {where}, {rounding} along an axis whose length is free: fix the length with --input")
        scale = scales[d] if scales is not None else out / size
        if mode == "nearest":
            places = [min(max(_rounded(_origin(where, i, size, out, scale), rounding), 0), size - 1) for i in range(out)]
            x = x.index_select(d, torch.tensor(places))
            continue
        weights = _matrix(call, mode, where, size, out, scale)
        x = torch.matmul(x.movedim(d, -1), torch.tensor(weights, dtype=x.dtype if x.is_floating_point() else torch.float32).t()).movedim(-1, d)
    return x


def _torchs_mode(
    call: Call, mode: str, where: str, rounding: str, x: Tensor, changed: list[int], scales: list[Any] | None, sizes: list[Any] | None
) -> str | None:
    """torch's name for the same interpolation; None where it has none."""
    if call.get("antialias", 0) or call.get("exclude_outside", 0) or (scales is not None and sizes is not None):
        return None
    if mode == "nearest":
        factors = [float(scales[d]) for d in changed] if scales is not None else [0.5]
        if where == "asymmetric" and (rounding == "floor" or (rounding == "round_prefer_floor" and set(factors) == {2.0})):
            return "nearest"  # i / 2 rounded, halves down, is i / 2 without its fraction
        halves_up = rounding == "round_prefer_ceil" or (rounding == "round_prefer_floor" and all(f.is_integer() for f in factors))  # there are none
        return "nearest-exact" if where in ("half_pixel", "pytorch_half_pixel") and halves_up else None
    single = [d for d in changed if (sizes[d] if sizes is not None else math.floor(x.shape[d] * scales[d])) == 1]  # type: ignore[index]
    if where not in ("half_pixel", "align_corners") and (where != "pytorch_half_pixel" or single):
        return None
    if mode == "linear":
        return _LINEAR.get(x.dim())
    return "bicubic" if mode == "cubic" and x.dim() == 4 and call.get("cubic_coeff_a", -0.75) == -0.75 else None


def _matrix(call: Call, mode: str, where: str, size: int, out: int, scale: float) -> np.ndarray:
    """(out, size): how much of each entry each entry of the answer takes, by the standard's formulas."""
    matrix = np.zeros((out, size))
    for i in range(out):
        at = _origin(where, i, size, out, scale)
        shrink = min(scale, 1.0) if call.get("antialias", 0) else 1.0
        reach = (2 if mode == "cubic" else 1) / shrink
        first, last = math.floor(at - reach), math.ceil(at + reach)
        places = [n for n in range(first, last + 1) if abs(n - at) < reach]
        kernel = _cubic if mode == "cubic" else _triangle
        weights = np.array([kernel((n - at) * shrink, call.get("cubic_coeff_a", -0.75)) for n in places])
        if call.get("exclude_outside", 0) or call.get("antialias", 0):
            inside = np.array([0 <= n < size for n in places])
            weights = np.where(inside, weights, 0) if call.get("exclude_outside", 0) else weights
        weights = weights / weights.sum()
        for n, weight in zip(places, weights, strict=True):
            matrix[i, min(max(n, 0), size - 1)] += weight
    return matrix


def _origin(where: str, i: int, size: int, out: int, scale: float) -> float:
    """The place in the input that an entry of the answer is made of."""
    if where == "asymmetric":
        return i / scale
    if where == "align_corners":
        return 0.0 if out == 1 else i * (size - 1) / (out - 1)
    if where == "pytorch_half_pixel" and out == 1:
        return 0.0
    if where == "half_pixel_symmetric":
        adjustment = out / (scale * size)
        return size / 2 * (1 - adjustment) + (i + 0.5) / scale - 0.5
    if where in ("half_pixel", "pytorch_half_pixel"):
        return (i + 0.5) / scale - 0.5
    raise Unsupported(f"with coordinate_transformation_mode={where!r}")


def _rounded(at: float, how: str) -> int:
    if how == "floor":
        return math.floor(at)
    if how == "ceil":
        return math.ceil(at)
    return math.ceil(at - 0.5) if how == "round_prefer_floor" else math.floor(at + 0.5)


def _triangle(distance: float, _: float) -> float:
    return max(0.0, 1 - abs(distance))


def _cubic(distance: float, a: float) -> float:
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0
