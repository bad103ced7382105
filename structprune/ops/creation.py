"""Operators that make tensors from nothing: of one value everywhere, so that any entry may go, or of values by position."""

from __future__ import annotations

from typing import Any

from structprune.ir.axes import Shape
from structprune.ops.rules import Equations, rule


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def uniform(eq: Equations, *_: Any, **__: Any) -> Shape:
    return tuple(eq.fresh(size) for size in eq.out)


@rule("arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices", "hann_window")
def by_position(eq: Equations, *_: Any, **__: Any) -> Shape:
    return tuple(eq.frozen(size, "values by position") for size in eq.out)


@rule("rand_like", "randn_like", "randint_like")
def random_like(eq: Equations, x: Shape, *_: Any, **__: Any) -> Shape:
    return x


@rule("meshgrid")
def meshgrid(eq: Equations, tensors: list[Shape], **_: Any) -> list[Shape]:
    return [tuple(eq.frozen(s, "values by position") for s in shape) for shape in eq.out]
