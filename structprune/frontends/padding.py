"""How much padding a window needs to answer ⌈size / stride⌉ positions: "SAME" of TensorFlow, SAME_UPPER of ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def same_padding(space: Any, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], upper: bool = True) -> list[Any]:
    """Zeros before every axis, then after every axis; of an odd number one more after it, or before it where not `upper`."""
    total = [
        torch.sym_max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in zip(space, window, stride, dilation, strict=True)
    ]  # fmt: skip
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return [*less, *more] if upper else [*more, *less]
