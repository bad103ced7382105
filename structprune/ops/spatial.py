"""Pooling, interpolation, and the operators that trade channels for space."""

from __future__ import annotations

from typing import Any

from torch import fx

from structprune.ir.axes import Shape, product
from structprune.ops.rules import Equations, Resize, axis_index, resizer, rule

_WINDOW = "a window slides along this axis"
_RESAMPLED = "resampled along this axis"


def _spatial(eq: Equations, x: Shape, rank: int, why: str) -> Any:
    """The last `rank` axes are read by position; what stands before them passes through."""
    eq.freeze(why, *x[-rank:])
    sizes = eq.out[0] if isinstance(eq.out, list) else eq.out
    out = (*x[:-rank], *(eq.frozen(s, why) for s in sizes[-rank:]))
    return [out] * len(eq.out) if isinstance(eq.out, list) else out


def _pool(rank: int, *names: str) -> None:
    @rule(*names)
    def pool(eq: Equations, x: Shape, *_: Any, **__: Any) -> Any:
        return _spatial(eq, x, rank, _WINDOW)


def _resample(rank: int, *names: str) -> None:
    @rule(*names)
    def resample(eq: Equations, x: Shape, *_: Any, **__: Any) -> Any:
        return _spatial(eq, x, rank, _RESAMPLED)


for _rank in (1, 2, 3):
    _pool(_rank, *(f"{kind}_pool{_rank}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")), f"max_pool{_rank}d_with_indices")
    _resample(_rank, f"upsample_nearest{_rank}d", f"_upsample_nearest_exact{_rank}d")
_resample(1, "upsample_linear1d")
_resample(2, "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
_resample(3, "upsample_trilinear3d")


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(eq: Equations, x: Shape, grid: Shape, *_: Any, **__: Any) -> Shape:
    eq.freeze(_RESAMPLED, *x[2:], grid[-1])
    eq.equate(x[0], grid[0])
    return (*x[:2], *grid[1:-1])


@rule("pixel_shuffle")
def pixel_shuffle(eq: Equations, x: Shape, factor: int) -> Shape:
    """Channels are kept channels · factor²; the factors become rows and columns."""
    channels, block = eq.divide(x[-3], factor * factor)
    eq.freeze("channels become pixels", block, *x[-2:])
    return (*x[:-3], channels, *(eq.frozen(s, "channels become pixels") for s in eq.out[-2:]))


@rule("pixel_unshuffle")
def pixel_unshuffle(eq: Equations, x: Shape, factor: int) -> Shape:
    eq.freeze("pixels become channels", *x[-2:])
    block = eq.frozen(factor * factor, "pixels become channels")
    return (*x[:-3], product((x[-3], block)), *(eq.frozen(s, "pixels become channels") for s in eq.out[-2:]))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(eq: Equations, x: Shape, groups: int) -> Shape:
    outer, inner = eq.divide(x[1], x[1].size // groups)
    return (x[0], product((inner, outer)), *x[2:])


@resizer("channel_shuffle", "native_channel_shuffle")
def shuffle_groups(new: Resize, node: fx.Node) -> None:
    x, groups = new.argument(node, "self"), new.argument(node, "groups")
    per_group = int(x.meta["val"].shape[1]) // groups
    new.set(node, "groups", len({int(c) // per_group for c in new.kept(x, 1)}))


@rule("im2col")
def im2col(eq: Equations, x: Shape, kernel: list[int], *_: Any) -> Shape:
    eq.freeze(_WINDOW, *x[-2:])
    window = eq.frozen(kernel[0] * kernel[1], _WINDOW)
    return (*x[:-3], product((x[-3], window)), eq.frozen(eq.out[-1], _WINDOW))


@rule("col2im")
def col2im(eq: Equations, x: Shape, output_size: Any, kernel: list[int], *_: Any) -> Shape:
    channels, window = eq.divide(x[-2], kernel[0] * kernel[1])
    eq.freeze(_WINDOW, window, x[-1])
    return (*x[:-2], channels, *(eq.frozen(s, _WINDOW) for s in eq.out[-2:]))


@rule("unfold")
def unfold(eq: Equations, x: Shape, dim: int, size: int, step: int) -> Shape:
    dim = axis_index(dim, len(x))
    eq.freeze(_WINDOW, x[dim])
    return (*x[:dim], eq.frozen(eq.out[dim], _WINDOW), *x[dim + 1 :], eq.frozen(size, _WINDOW))


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(eq: Equations, x: Shape, boxes: Shape, *_: Any) -> Any:
    """Each box, (number in the batch, 4 corners), becomes a small map of the same channels."""
    eq.freeze("boxes are positions", *boxes)
    eq.freeze(_RESAMPLED, x[0], *x[-2:])
    sizes = eq.out[0] if isinstance(eq.out, list) else eq.out
    out = (boxes[0], x[1], *(eq.frozen(s, _RESAMPLED) for s in sizes[-2:]))
    return [out] * len(eq.out) if isinstance(eq.out, list) else out


@rule("max_unpool2d", "max_unpool3d")
def unpool(eq: Equations, x: Shape, indices: Shape, *_: Any) -> Shape:
    eq.broadcast(x, indices)
    return _spatial(eq, x, len(x) - 2, _WINDOW)  # type: ignore[no-any-return]


@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def spectrum(eq: Equations, x: Shape, n: Any = None, dim: int = -1, *_: Any) -> Shape:
    return spectra(eq, x, n, [dim])


@rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn")
def spectra(eq: Equations, x: Shape, n: Any = None, dim: Any = None, *_: Any) -> Shape:
    """A transform mixes all entries along its axes; the others pass through."""
    pair = eq.node.target._opname.endswith("2")  # type: ignore[union-attr]
    dims = dim if dim is not None else (-2, -1) if pair else range(-len(n), 0) if n is not None else range(len(x))
    out = list(x)
    for d in dims:
        eq.freeze("a Fourier transform runs along this axis", x[d])
        out[d] = eq.frozen(eq.out[d], "a Fourier transform runs along this axis")
    return tuple(out)
