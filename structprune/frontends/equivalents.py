"""Calls that torch's ONNX exporter cannot translate, by others that it can.

On complex numbers, as vocoders and separators of speech have them; attention of other ranks than batch, heads, positions, width; largest and
smallest entries of a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def equivalent(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Tensor] | None:
    """What computes the same as this call; None for a call that can be translated, or that nothing here knows."""
    first = args[0] if args else None
    if target is aten.einsum.default:
        return _einsum if len(args[1]) == 2 and all(map(torch.is_complex, args[1])) else None
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
    if target in (aten.amax.default, aten.amin.default):
        return None if args[1:] or kwargs.get("dim") else lambda x, **keepdim: target(x, list(range(x.dim())), **keepdim)
    return _OF_COMPLEX.get(target) if first.is_complex() else None


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


def _zeros(z: Tensor, **kwargs: Any) -> Tensor:
    zeros = torch.zeros_like(_parts(z)[0])
    return torch.complex(zeros, zeros)


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


_OF_COMPLEX: dict[Any, Callable[..., Tensor]] = {aten.exp.default: _exp, aten.angle.default: _angle, aten.zeros_like.default: _zeros}
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
