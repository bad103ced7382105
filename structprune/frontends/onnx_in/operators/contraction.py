"""Operators that multiply and add up. A weight stays as the file has it, so that the plan speaks of the user's own tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Unsupported, Value, operand
from structprune.frontends.padding import same_padding


@operator("MatMul")
def matmul(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight)


@operator("Gemm", either=(2,))
def gemm(call: Call, x: Tensor, weight: Tensor, bias: Value | None = None) -> Tensor:
    """alpha · x · weight + beta · bias; either factor may be transposed."""
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    if call.get("transA", 0):
        x = x.t()
    columns = weight.shape[0 if call.get("transB", 0) else 1]
    plain = alpha == 1 and (bias is None or (beta == 1 and isinstance(bias, Tensor) and tuple(bias.shape) == (columns,)))
    if plain and call.get("transB", 0):
        return F.linear(x, weight, bias)  # type: ignore[arg-type]
    if plain and bias is not None:
        return torch.addmm(bias, x, weight)  # type: ignore[arg-type]
    out = F.linear(x, weight) if call.get("transB", 0) else torch.matmul(x, weight)
    out = out if alpha == 1 else out * alpha
    if bias is None or beta == 0:
        return out
    added = operand(bias, out)
    return out + (added if beta == 1 else added * beta)


@operator("Einsum")
def einsum(call: Call, *operands: Tensor) -> Tensor:
    return torch.einsum(call.get("equation"), *operands)


# --- convolution ----------------------------------------------------------------------------------------------------------------


def window_of(call: Call, x: Tensor, window: list[int]) -> tuple[list[int], list[int], list[Any]]:
    """Stride, dilation and padding (before every axis, then after) of a window that slides over the axes behind the first two."""
    rank = len(window)
    stride, dilation = list(call.get("strides") or [1] * rank), list(call.get("dilations") or [1] * rank)
    how, given = call.get("auto_pad", "NOTSET"), call.get("pads")
    if how in ("SAME_UPPER", "SAME_LOWER"):
        return stride, dilation, same_padding(x.shape[2:], window, stride, dilation, how == "SAME_UPPER")
    if how not in ("NOTSET", "VALID", ""):
        raise Unsupported(f"with auto_pad={how!r}")
    return stride, dilation, [0] * 2 * rank if how == "VALID" else list(given or [0] * 2 * rank)


def padded(x: Tensor, padding: list[Any], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input, and the padding that is the same before and after each axis; anything else is added to the input."""
    rank = len(padding) // 2
    before, after = padding[:rank], padding[rank:]
    if all(isinstance(n, int) for n in padding) and before == after:
        return x, before
    flat = [n for a, b in zip(reversed(before), reversed(after), strict=True) for n in (a, b)]
    return F.pad(x, flat, value=value), [0] * rank


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv")
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    if rank not in _CONV:
        raise Unsupported(f"over {rank} axes")
    call.refuse_unless("kernel_shape", list(weight.shape[2:]))
    stride, dilation, padding = window_of(call, x, list(weight.shape[2:]))
    x, symmetric = padded(x, padding)
    return _CONV[rank](x, weight, bias, stride, symmetric, dilation, call.get("group", 1))  # type: ignore[no-any-return, operator]


@operator("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Padding is cut off the answer: where it differs before and after, all of the answer is computed and cut by hand."""
    rank = weight.dim() - 2
    if rank not in _CONV_TRANSPOSE:
        raise Unsupported(f"over {rank} axes")
    call.refuse_unless("kernel_shape", list(weight.shape[2:]))
    stride, dilation = list(call.get("strides") or [1] * rank), list(call.get("dilations") or [1] * rank)
    more = list(call.get("output_padding") or [0] * rank)
    how, wanted, given = call.get("auto_pad", "NOTSET"), call.get("output_shape"), call.get("pads")
    whole = [(n - 1) * s + (k - 1) * d + 1 + m for n, s, k, d, m in zip(x.shape[2:], stride, weight.shape[2:], dilation, more, strict=True)]
    if wanted is not None or how in ("SAME_UPPER", "SAME_LOWER"):
        sizes = list(wanted)[-rank:] if wanted is not None else [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
        total = [w - n for w, n in zip(whole, sizes, strict=True)]
        if all(isinstance(t, int) and t < 0 for t in total):
            raise Unsupported("to an output larger than what it computes")
        less, bigger = [t // 2 for t in total], [t - t // 2 for t in total]
        padding = [*less, *bigger] if how == "SAME_UPPER" else [*bigger, *less]
    else:
        padding = [0] * 2 * rank if how == "VALID" else list(given or [0] * 2 * rank)
    before, after = padding[:rank], padding[rank:]
    run = _CONV_TRANSPOSE[rank]
    group = call.get("group", 1)
    if before == after and all(m < max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)):
        return run(x, weight, bias, stride, before, more, group, dilation)  # type: ignore[no-any-return, operator]
    out = run(x, weight, bias, stride, 0, [0] * rank, group, dilation)  # type: ignore[operator]
    flat = [n for i in reversed(range(rank)) for n in (-before[i], more[i] - after[i])]
    if any(m > a for m, a in zip(more, after, strict=True)) and bias is not None:
        raise Unsupported("with an output padding beyond its padding, and a bias")
    return F.pad(out, flat)
