"""What operators do with `Sizes`: NumPy on arrays of Python numbers, some of them symbolic."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.frontends.onnx_in.values import Sizes, Unsupported


def each(function: Callable[..., Any], dtype: torch.dtype | None = None) -> Callable[..., Sizes]:
    """An operator that works entry by entry; dtype: of the answer, if not that of the first operand."""
    vector = np.frompyfunc(function, len(inspect.signature(function).parameters), 1)

    def apply(_call: Any, *operands: Sizes) -> Sizes:
        answer = vector(*(o.array for o in operands))
        return Sizes(_array(answer), dtype or operands[0].dtype)

    return apply


def _array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    array = np.empty((), dtype=object)
    array[()] = value
    return array


def many(function: Callable[[Any, Any], Any]) -> Callable[..., Sizes]:
    """One of any number of operands, two at a time."""
    pair = each(function)

    def apply(call: Any, first: Sizes, *others: Sizes) -> Sizes:
        for other in others:
            first = pair(call, first, other)
        return first

    return apply


def divide(call: Any, a: Sizes, b: Sizes) -> Sizes:
    """Of integers, towards zero: as the standard has it, and C."""
    if a.dtype.is_floating_point:
        return each(lambda x, y: x / y)(call, a, b)
    return each(lambda x, y: x // y if isinstance(x, torch.SymInt) or isinstance(y, torch.SymInt) or x * y >= 0 else -(-x // y))(call, a, b)


def cast(dtype: torch.dtype, x: Sizes) -> Sizes:
    if dtype.is_floating_point:
        return each(lambda v: float(v) if isinstance(v, (bool, int)) else v, dtype)(None, x)
    if dtype is torch.bool:
        return each(lambda v: v != 0, dtype)(None, x)
    return each(lambda v: math.trunc(v) if isinstance(v, float) else int(v) if isinstance(v, bool) else v, dtype)(None, x)


def where(_call: Any, condition: Sizes, a: Sizes, b: Sizes) -> Sizes:
    picked = np.frompyfunc(lambda c, x, y: x if c else y, 3, 1)(condition.array, a.array, b.array)
    return Sizes(_array(picked), a.dtype)


def concat(call: Any, *parts: Sizes) -> Sizes:
    return Sizes(np.concatenate([p.array for p in parts], axis=call.get("axis", 1)), parts[0].dtype)


def gather(call: Any, x: Sizes, index: Sizes) -> Sizes:
    return Sizes(_array(np.take(x.array, index.array.astype(np.int64), axis=call.get("axis", 0))), x.dtype)


def reshape(call: Any, x: Sizes, shape: Sizes | None = None) -> Sizes:
    wanted = call.get("shape") if shape is None else shape.list()
    if not call.get("allowzero", 0):
        wanted = [x.array.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return Sizes(x.array.reshape(wanted), x.dtype)


def expand(_call: Any, x: Sizes, shape: Sizes) -> Sizes:
    if not all(isinstance(n, int) for n in shape.list()):
        raise Unsupported("of sizes to a symbolic length")
    return Sizes(np.broadcast_to(x.array, np.broadcast_shapes(x.array.shape, tuple(shape.list()))), x.dtype)


def reduced(function: Callable[[list[Any]], Any]) -> Callable[..., Sizes]:
    """A reduction of all entries of a vector."""

    def apply(call: Any, x: Sizes, axes: Sizes | None = None) -> Sizes:
        if call.get("noop_with_empty_axes", 0) and not (call.get("axes") or (axes is not None and axes.list())):
            return x
        if x.array.ndim > 1:
            raise Unsupported("of a table of sizes")
        array = np.empty((1,) * x.array.ndim if call.get("keepdims", 1) else (), dtype=object)
        array[...] = function(x.list())
        return Sizes(array, x.dtype)

    return apply


def product(values: list[Any]) -> Any:
    total = 1
    for value in values:
        total = total * value
    return total


def same(_call: Any, x: Sizes, *_: Any) -> Sizes:
    return x


def is_static(values: Any) -> bool:
    return all(isinstance(v, (bool, int, float)) for v in values) if isinstance(values, list) else isinstance(values, (bool, int, float))


def ints(value: Sizes | Tensor | None) -> list[Any] | None:
    """A vector of sizes as a list; None where it is left out."""
    return None if value is None else value.list() if isinstance(value, Sizes) else value.tolist()
