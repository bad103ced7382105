"""Calls that torch's ONNX exporter cannot translate, or that say nothing of axes, by others that it can, and that do.

On complex numbers, as vocoders and separators of speech have them; attention of other ranks than batch, heads, positions, width; largest and
smallest entries of a whole tensor; windows as strides in memory; entries under a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

aten = torch.ops.aten


def equivalent(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    """What computes the same as this call; None for a call that needs no other, or that nothing here knows."""
    first = args[0] if args else None
    if target is aten.einsum.default:
        return _einsum if len(args[1]) == 2 and all(map(torch.is_complex, args[1])) else None
    if target in _OF_NUMBERS:
        return partial(_made_of_parts, target) if kwargs.get("dtype") in _REAL and not any(isinstance(a, complex) for a in args) else None
    if not isinstance(first, Tensor):
        return None
    if target in _PRODUCTS:
        return partial(_product, target) if first.is_complex() else None
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        return _times if not first.is_complex() and isinstance(args[1], complex) else None
    if target is aten.istft.default:
        return _istft if first.is_complex() and not kwargs.get("return_complex") else None
    if target is aten.scaled_dot_product_attention.default:
        return _attention if first.dim() != 4 and not kwargs.get("enable_gqa") else None
    if target is aten.as_strided.default:
        return _windows(first, *args[1:], **kwargs)
    if target is aten.masked_select.default:
        return _selected
    if target in (aten.amax.default, aten.amin.default):
        return None if args[1:] or kwargs.get("dim") else lambda x, **keepdim: target(x, list(range(x.dim())), **keepdim)
    if target in _OF_EACH_PART:
        return partial(_by_parts, target) if any(isinstance(v, Tensor) and v.is_complex() for v in pytree.tree_leaves((args, kwargs))) else None
    return _OF_COMPLEX.get(target) if first.is_complex() else None


def _selected(x: Tensor, mask: Tensor) -> Tensor:
    x, mask = torch.broadcast_tensors(x, mask)
    return x[mask]


def _times(x: Tensor, number: complex) -> Tensor:
    return torch.complex(x * number.real, x * number.imag)


def _einsum(equation: str, operands: list[Tensor], path: Any = None) -> Tensor:
    return _product(lambda a, b: torch.einsum(equation, a, b), *operands)


def _product(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """What is linear in both, of complex numbers."""
    (a, i), (b, j) = _parts(a), _parts(b)
    return torch.complex(product(a, b) - product(i, j), product(a, j) + product(i, b))


def _parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary."""
    parts = torch.view_as_real(z)
    return parts[..., 0], parts[..., 1]


def _by_parts(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What does the same to the real and the imaginary part, which of a real number is zero; places and masks are what they are."""

    def real(v: Tensor) -> Tensor:
        return _parts(v)[0] if v.is_complex() else v

    def imaginary(v: Tensor) -> Tensor:
        return _parts(v)[1] if v.is_complex() else torch.zeros_like(v) if v.is_floating_point() else v

    def of(part: Callable[[Tensor], Tensor]) -> Any:
        args_of, kwargs_of = pytree.tree_map_only(Tensor, part, (args, kwargs))
        return target(*args_of, **kwargs_of)

    return pytree.tree_map(torch.complex, of(real), of(imaginary))


def _made_of_parts(target: Callable[..., Tensor], *args: Any, dtype: torch.dtype, **kwargs: Any) -> Tensor:
    real = target(*args, dtype=_REAL[dtype], **kwargs)
    return torch.complex(real, torch.zeros_like(real))


def _zeros(z: Tensor, **kwargs: Any) -> Tensor:
    zeros = torch.zeros_like(_parts(z)[0])
    return torch.complex(zeros, zeros)


def _padded(z: Tensor, pad: Sequence[Any], mode: str = "constant", value: float | None = None) -> Tensor:
    real, imaginary = _parts(z)
    around = None if value is None else 0.0  # of the imaginary part; other modes take no value
    return torch.complex(F.pad(real, pad, mode, value), F.pad(imaginary, pad, mode, around))


def _power(z: Tensor, exponent: float) -> Tensor:
    return torch.polar(z.abs() ** exponent, _angle(z) * exponent)


def _masked(z: Tensor, mask: Tensor, value: complex) -> Tensor:
    real, imaginary = _parts(z)
    return torch.complex(real.masked_fill(mask, value.real), imaginary.masked_fill(mask, value.imag))


def _exp(z: Tensor) -> Tensor:
    real, imaginary = _parts(z)
    return torch.polar(real.exp(), imaginary)


def _angle(z: Tensor) -> Tensor:
    real, imaginary = _parts(z)
    return torch.atan2(imaginary, real)


def _istft(
    z: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Tensor:
    """Griffin and Lim, Signal estimation from modified short-time Fourier transform, 1984: Σ w·frame / Σ w², each at its place.

    z: [..., frequencies, frames]. As torch.istft, which checks besides that the windows leave no gap.
    """
    hop, width = hop_length or n_fft // 4, win_length or n_fft
    taper = torch.ones(width, device=z.device) if window is None else window
    taper = F.pad(taper, ((n_fft - width) // 2, n_fft - width - (n_fft - width) // 2))
    frames = torch.fft.irfft(z, n_fft, dim=-2, norm="ortho" if normalized else "backward") * taper[:, None]
    count = z.shape[-1]
    size = n_fft + hop * (count - 1)

    def overlapped(columns: Tensor) -> Tensor:
        return F.fold(columns, (1, size), (1, n_fft), stride=(1, hop)).flatten(1)

    first = n_fft // 2 if center else 0
    last = size - first if length is None else min(first + length, size)
    weights = overlapped(taper.square()[None, :, None].expand(1, -1, count))[:, first:last]
    signal = overlapped(frames.reshape(-1, n_fft, count))[:, first:last] / weights
    if length is not None:
        signal = F.pad(signal, (0, length - (last - first)))
    return signal.reshape(*z.shape[:-2], -1)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """All axes but the last two as heads of one sample."""
    before = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])

    def heads(x: Tensor) -> Tensor:
        return x.expand(*before, *x.shape[-2:]).reshape(1, -1, *x.shape[-2:])

    mask = heads(attn_mask) if attn_mask is not None and attn_mask.dim() > 2 else attn_mask
    answer = F.scaled_dot_product_attention(heads(query), heads(key), heads(value), mask, *args, **kwargs)
    return answer.reshape(*before, *answer.shape[-2:])


def _windows(x: Tensor, size: Sequence[Any], stride: Sequence[Any], storage_offset: Any = None) -> Callable[..., Tensor] | None:
    """What `as_strided` reads, as windows, steps and permutations of the axes of `x` (sliding attention, halos); None where it reads across these.

    Each axis of the answer walks along one of `x`: along all of it; every few entries; or in windows, of which a second axis walks along the inside.
    """
    if storage_offset is not None and not _same(storage_offset, x.storage_offset()):
        return None
    walks: list[list[tuple[int, int, Any]]] = [[] for _ in x.shape]  # along each axis of x: axes of the answer, their steps and sizes
    for out, (number, apart) in enumerate(zip(size, stride, strict=True)):
        if not _same(number, 1):
            steps = {d: step for d in range(x.dim()) if not _same(x.shape[d], 1) and (step := _step(x.stride(d), apart))}
            if not steps:
                return None
            walks[min(steps, key=steps.__getitem__)].append((out, min(steps.values()), number))
    for d, found in enumerate(walks):
        found.sort(key=lambda walk: -walk[1])
        if len(found) > 2 or (len(found) == 2 and found[1][1] != 1):
            return None
        if found and not _lie_on(x.shape[d], found):
            return _flattened(d, x, size, stride)

    def call(x: Tensor, *_: Any, **__: Any) -> Tensor:
        places: list[int | None] = []  # in the answer, of the axes of x, and behind them those inside windows
        inside = []
        for d, found in enumerate(walks):
            places.append(found[0][0] if found else None)
            if not found:
                x = x.narrow(d, 0, 1)
                continue
            step, number = found[0][1:]
            for walk in found[1:]:
                inside.append(walk[0])
                x = x.unfold(d, walk[2], step).narrow(d, 0, number)
            if len(found) == 1 and not _same(number, x.shape[d]):
                x = aten.slice.Tensor(x, d, 0, step * (number - 1) + 1, step)
        places += inside
        x = x.squeeze([d for d, place in enumerate(places) if place is None])
        kept = [place for place in places if place is not None]
        x = x.permute([kept.index(place) for place in sorted(kept)])
        for place in range(len(size)):
            x = x if place in kept else x.unsqueeze(place)
        return x

    return call


def _flattened(d: int, x: Tensor, size: Sequence[Any], stride: Sequence[Any]) -> Callable[..., Tensor] | None:
    """The same, of an axis and the one before it as one, where they are that in memory."""
    if d == 0 or not _same(x.stride(d - 1), x.shape[d] * x.stride(d)):
        return None
    of_one = _windows(x.flatten(d - 1, d), size, stride)
    return None if of_one is None else lambda x, *_, **__: of_one(x.flatten(d - 1, d))


def _lie_on(size: Any, walks: Sequence[tuple[int, int, Any]]) -> bool:
    """Whether all entries on these walks lie on an axis of that size."""
    if len(walks) == 1 and walks[0][1] == 1 and _same(walks[0][2], size):
        return True
    return statically_known_true(sum(step * (number - 1) for _, step, number in walks) < size)


def _step(apart: Any, stride: Any) -> int:
    """How many entries of an axis, `apart` in memory, one step of that stride passes; 0 where it is no whole number."""
    if _same(apart, stride):
        return 1
    whole = isinstance(apart, int) and isinstance(stride, int) and 0 < apart <= stride and stride % apart == 0
    return int(stride // apart) if whole else 0


def _same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


_OF_COMPLEX: dict[Any, Callable[..., Tensor]] = {
    aten.exp.default: _exp,
    aten.angle.default: _angle,
    aten.zeros_like.default: _zeros,
    aten.pad.default: _padded,
    aten.masked_fill.Scalar: _masked,
    aten.pow.Tensor_Scalar: _power,
}
_OF_NUMBERS = (aten.linspace.default, aten.arange.default, aten.arange.start, aten.arange.start_step)
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_OF_EACH_PART = frozenset({
    aten.unsqueeze.default, aten.expand.default, aten.expand_as.default, aten.repeat.default, aten.tile.default, aten.select.int, aten.unbind.int,
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.index.Tensor, aten.index_select.default,
    aten.gather.default, aten.scatter.src, aten.where.self, aten.cumsum.default, aten.fft_fftshift.default, aten.fft_ifftshift.default,
})  # fmt: skip
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
