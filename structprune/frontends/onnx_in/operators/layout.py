"""Operators that rearrange axes, join and take apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.frontends.onnx_in import numbers
from structprune.frontends.onnx_in.operators.elementwise import type_of
from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Sizes, Unsupported, Value, as_tensor

_LARGEST = 1 << 31  # entries of a tensor that is made of one number


@operator("Reshape", sizes=(1,), numbers=numbers.reshape)
def reshape(call: Call, x: Tensor, shape: Sizes | None = None) -> Tensor:
    """A size of 0 is that of the input's axis, of -1 what is left."""
    wanted = list(call.get("shape")) if shape is None else shape.list()
    if not call.get("allowzero", 0):
        wanted = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(numbers.product(list(x.shape[:axis])), numbers.product(list(x.shape[axis:])))


def _axes(call: Call, axes: Sizes | None) -> list[int] | None:
    return [int(a) for a in axes.list()] if axes is not None else call.get("axes")


def _squeeze_numbers(call: Call, x: Sizes, axes: Sizes | None = None) -> Sizes:
    chosen = _axes(call, axes)
    return Sizes(np.squeeze(x.array, None if chosen is None else tuple(chosen)), x.dtype)


@operator("Squeeze", sizes=(1,), numbers=_squeeze_numbers)
def squeeze(call: Call, x: Tensor, axes: Sizes | None = None) -> Tensor:
    chosen = _axes(call, axes)
    if chosen is None:
        chosen = [i for i, n in enumerate(x.shape) if n == 1]
    for axis in chosen:
        if x.shape[axis] != 1:  # torch would leave it
            raise Unsupported(f"of axis {axis}, which has size {x.shape[axis]}")
    for axis in sorted((a % x.dim() for a in chosen), reverse=True):
        x = x.squeeze(axis)
    return x


def _unsqueeze_numbers(call: Call, x: Sizes, axes: Sizes | None = None) -> Sizes:
    return Sizes(np.expand_dims(x.array, tuple(_axes(call, axes) or ())), x.dtype)


@operator("Unsqueeze", sizes=(1,), numbers=_unsqueeze_numbers)
def unsqueeze(call: Call, x: Tensor, axes: Sizes | None = None) -> Tensor:
    chosen = _axes(call, axes) or []
    for axis in sorted(a % (x.dim() + len(chosen)) for a in chosen):
        x = x.unsqueeze(axis)
    return x


def _transpose_numbers(call: Call, x: Sizes) -> Sizes:
    return Sizes(np.transpose(x.array, call.get("perm")), x.dtype)


@operator("Transpose", numbers=_transpose_numbers)
def transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.get("perm") or list(reversed(range(x.dim()))))


@operator("Expand", sizes=(1,), numbers=numbers.expand)
def expand(call: Call, x: Tensor, shape: Sizes) -> Tensor:
    """Broadcast with the shape: an axis of the input that is longer stays."""
    wanted = shape.list()
    own = [1] * (len(wanted) - x.dim()) + list(x.shape)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    sizes = [o if isinstance(w, int) and w == 1 else w for o, w in zip(own, wanted, strict=True)]
    return x if len(sizes) == x.dim() and all(a is b or a == b for a, b in zip(sizes, x.shape, strict=True)) else x.expand(sizes)


@operator("Tile", sizes=(1,))
def tile(call: Call, x: Tensor, repeats: Sizes) -> Tensor:
    return x if all(isinstance(r, int) and r == 1 for r in repeats.list()) else x.repeat(repeats.list())


@operator("Concat", either=True, numbers=numbers.concat)
def concat(call: Call, *parts: Value) -> Tensor:
    tensors, axis = [as_tensor(p) for p in parts], call.get("axis", 1)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def _split_numbers(call: Call, x: Sizes, split: Sizes | None = None) -> tuple[Sizes, ...]:
    axis, parts = call.get("axis", 0), len(call.node.outputs)
    lengths = numbers.ints(split) or call.get("split") or _even(x.array.shape[axis], parts)
    return tuple(Sizes(part, x.dtype) for part in np.split(x.array, np.cumsum(lengths)[:-1].tolist(), axis))


def _even(size: Any, parts: int) -> list[int]:
    """As even as it goes: the last piece is the smaller one."""
    each = -(-size // parts)
    return [each] * (parts - 1) + [size - each * (parts - 1)]


@operator("Split", sizes=(1,), numbers=_split_numbers)
def split(call: Call, x: Tensor, split: Sizes | None = None) -> tuple[Tensor, ...]:
    axis, parts = call.get("axis", 0), call.get("num_outputs") or len(call.node.outputs)
    lengths = numbers.ints(split) or call.get("split")
    if lengths is None:
        lengths = _even(x.shape[axis], parts)
    return tuple(torch.split(x, lengths, axis))


# --- slices -------------------------------------------------------------------------------------------------------------------


def _bounds(call: Call, starts: Sizes | None, ends: Sizes | None, axes: Sizes | None, steps: Sizes | None) -> list[tuple[int, Any, Any, int]]:
    begin, end = numbers.ints(starts) or call.get("starts"), numbers.ints(ends) or call.get("ends")
    along = numbers.ints(axes) or call.get("axes") or list(range(len(begin)))
    by = numbers.ints(steps) or [1] * len(begin)
    return list(zip(along, begin, end, by, strict=True))


def _slice_numbers(
    call: Call, x: Sizes, starts: Sizes | None = None, ends: Sizes | None = None, axes: Sizes | None = None, steps: Sizes | None = None
) -> Sizes:
    array = x.array
    for axis, start, end, step in _bounds(call, starts, ends, axes, steps):
        index: list[Any] = [slice(None)] * array.ndim
        index[axis] = slice(int(start), None if step < 0 and end < -array.shape[axis] else int(end), int(step))
        array = array[tuple(index)]
    return Sizes(array, x.dtype)


@operator("Slice", sizes=(1, 2, 3, 4), numbers=_slice_numbers)
def slice_(
    call: Call, x: Tensor, starts: Sizes | None = None, ends: Sizes | None = None, axes: Sizes | None = None, steps: Sizes | None = None
) -> Tensor:
    for axis, start, end, step in _bounds(call, starts, ends, axes, steps):
        axis = axis % x.dim()
        size = x.shape[axis]
        if step < 0:
            x = x.flip(axis)
            if isinstance(size, int):
                first, last, _ = slice(start, None if end < -size else end, step).indices(size)
                start, end = size - 1 - first, size - 1 - last
            elif start == -1 and end < -(1 << 30):  # all of an axis whose length is free, backwards
                start, end = 0, size
            else:
                raise Unsupported("backwards over a part of an axis whose length is free")
            step = -step
        if isinstance(start, int) and start == 0 and isinstance(end, int) and end >= (1 << 30) and step == 1:
            continue  # all of it
        index: list[Any] = [slice(None)] * x.dim()
        index[axis] = slice(start, size if isinstance(end, int) and end >= (1 << 30) else end, step)
        x = x[tuple(index)]
    return x


# --- padding ------------------------------------------------------------------------------------------------------------------


_PAD = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Pad", sizes=(1, 3), either=(2,))
def pad(call: Call, x: Tensor, pads: Sizes | None = None, value: Value | None = None, axes: Sizes | None = None) -> Tensor:
    amounts = numbers.ints(pads) if pads is not None else list(call.get("pads") or call.get("paddings"))
    assert amounts is not None
    chosen = [int(a) % x.dim() for a in axes.list()] if axes is not None else list(range(x.dim()))
    before, after = dict(zip(chosen, amounts, strict=False)), dict(zip(chosen, amounts[len(chosen) :], strict=True))
    mode = call.get("mode", "constant")
    nothing = {d for d in range(x.dim()) if isinstance(before.get(d, 0), int) and isinstance(after.get(d, 0), int)} - {
        d for d in chosen if before[d] != 0 or after[d] != 0
    }
    padded = [d for d in range(x.dim()) if d not in nothing]
    if not padded:
        return x
    if mode == "constant":
        filled = call.get("value", 0.0) if value is None else value.item() if isinstance(value, Sizes) else None
        if filled is None:
            raise Unsupported("with a value that depends on the model's inputs")
        flat = [n for d in range(x.dim() - 1, padded[0] - 1, -1) for n in (before.get(d, 0), after.get(d, 0))]
        return F.pad(x, flat, value=filled if x.is_floating_point() else int(filled))
    if mode not in _PAD:
        raise Unsupported(f"with mode={mode!r}")
    rank = x.dim() - padded[0]
    if x.dim() in (rank + 1, rank + 2) and rank <= 3 and mode != "wrap":
        flat = [n for d in range(x.dim() - 1, padded[0] - 1, -1) for n in (before.get(d, 0), after.get(d, 0))]
        return F.pad(x, flat, mode=_PAD[mode])
    for d in padded:
        x = x.index_select(d, _around(x.shape[d], before[d], after[d], mode))
    return x


def _around(size: Any, before: Any, after: Any, mode: str) -> Tensor:
    """Which entry stands at each place of a padded axis."""
    at = torch.arange(-before, size + after)
    if mode == "edge":
        return at.clamp(0, size - 1)
    if mode == "wrap":
        return at % size
    folded = at % max(1, 2 * (size - 1))
    return torch.where(folded < size, folded, 2 * (size - 1) - folded)


@operator("CenterCropPad", sizes=(1,))
def center_crop_pad(call: Call, x: Tensor, shape: Sizes) -> Tensor:
    axes = call.get("axes") or list(range(x.dim()))
    for axis, wanted in zip(axes, shape.list(), strict=True):
        axis, size = axis % x.dim(), x.shape[axis]
        if wanted < size:
            x = x.narrow(axis, (size - wanted) // 2, wanted)
        elif wanted > size:
            flat = [0, 0] * (x.dim() - 1 - axis) + [(wanted - size) // 2, (wanted - size) - (wanted - size) // 2]
            x = F.pad(x, flat)
    return x


# --- channels and space -------------------------------------------------------------------------------------------------------


@operator("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    size = call.get("blocksize")
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, size, size, channels // (size * size), height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // (size * size), height * size, width * size)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    size = call.get("blocksize")
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // size, size, width // size, size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * size * size, height // size, width // size)


# --- from nothing -------------------------------------------------------------------------------------------------------------


@operator("Shape", either=(0,))
def shape(call: Call, x: Value) -> Sizes:
    sizes = list(x.array.shape) if isinstance(x, Sizes) else list(x.shape)
    return Sizes.of(sizes[call.get("start", 0) : call.get("end")])


@operator("Size", either=(0,))
def size(call: Call, x: Value) -> Sizes:
    return Sizes.of(math.prod(x.array.shape) if isinstance(x, Sizes) else numbers.product(list(x.shape)))


def _filled_numbers(call: Call, shape: Sizes) -> Any:
    sizes = shape.list()
    value = call.get("value")
    filled, dtype = (0.0, torch.float32) if value is None else (value.item(), value.dtype)
    static = all(isinstance(n, int) for n in sizes)
    if static and math.prod(sizes) > _LARGEST:
        raise Unsupported(f"of {'x'.join(map(str, sizes))} entries, which is absurd")
    if static and len(sizes) <= 1 and math.prod(sizes) <= 64 and not dtype.is_floating_point:
        array = np.empty(tuple(sizes), dtype=object)
        array.fill(filled)
        return Sizes(array, dtype)
    return torch.full(sizes, filled, dtype=dtype)


@operator("ConstantOfShape", sizes=(0,), numbers=_filled_numbers)
def constant_of_shape(call: Call, shape: Sizes) -> Any:
    return _filled_numbers(call, shape)


def _range_numbers(call: Call, start: Sizes, limit: Sizes, delta: Sizes) -> Tensor:
    bounds = (start.item(), limit.item(), delta.item())
    if all(isinstance(n, (int, float)) for n in bounds) and bounds[2] and abs((bounds[1] - bounds[0]) / bounds[2]) > _LARGEST:
        raise Unsupported("of more than 2^31 entries, which is absurd")
    return torch.arange(*bounds, dtype=start.dtype)


@operator("Range", sizes=(0, 1, 2), numbers=_range_numbers)
def range_(call: Call, start: Sizes, limit: Sizes, delta: Sizes) -> Tensor:
    return _range_numbers(call, start, limit, delta)


@operator("Trilu", sizes=(1,))
def trilu(call: Call, x: Tensor, k: Sizes | None = None) -> Tensor:
    diagonal = 0 if k is None else k.item()
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


@operator("EyeLike")
def eye_like(call: Call, x: Tensor) -> Tensor:
    dtype = x.dtype if call.get("dtype") is None else type_of(call.get("dtype"))
    columns = torch.arange(x.shape[1]) - call.get("k", 0)
    return (torch.arange(x.shape[0])[:, None] == columns[None, :]).to(dtype)
