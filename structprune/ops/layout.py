"""Operators that rearrange axes without touching values: permutations and views.

A view is one equation: the row-major product of the axes before is the product of the axes after.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

from torch import fx

from structprune.ir.axes import UNIT, Shape, product
from structprune.ir.graph import size_of
from structprune.ir.operators import operator_name
from structprune.ops.rules import Equations, Resize, Unsupported, axis_index, resizer, rule

# --- permutations -----------------------------------------------------------------------------------------------------


@rule("permute")
def permute(eq: Equations, x: Shape, dims: list[int]) -> Shape:
    return tuple(x[axis_index(d, len(x))] for d in dims)


@rule("transpose", "swapaxes", "swapdims")
def transpose(eq: Equations, x: Shape, a: int, b: int) -> Shape:
    axes = list(x)
    a, b = axis_index(a, len(x)), axis_index(b, len(x))
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@rule("t", "numpy_T", "mT", "matrix_H", "adjoint")
def t(eq: Equations, x: Shape) -> Shape:
    return (*x[:-2], *reversed(x[-2:])) if eq.node.target._opname in ("mT", "adjoint") else tuple(reversed(x))  # type: ignore[union-attr]


@rule("movedim", "moveaxis")
def movedim(eq: Equations, x: Shape, source: Any, target: Any) -> Shape:
    sources = [axis_index(d, len(x)) for d in (source if isinstance(source, (list, tuple)) else [source])]
    targets = [axis_index(d, len(x)) for d in (target if isinstance(target, (list, tuple)) else [target])]
    rest = iter(i for i in range(len(x)) if i not in sources)
    order = [sources[targets.index(i)] if i in targets else next(rest) for i in range(len(x))]
    return tuple(x[i] for i in order)


@rule("unsqueeze")
def unsqueeze(eq: Equations, x: Shape, dim: int) -> Shape:
    dim = axis_index(dim, len(x) + 1)
    return (*x[:dim], UNIT, *x[dim:])


@rule("squeeze")
def squeeze(eq: Equations, x: Shape, dim: Any = None) -> Shape:
    dims = range(len(x)) if dim is None else [axis_index(d, len(x)) for d in (dim if isinstance(dim, (list, tuple)) else [dim])] if x else []
    return tuple(a for i, a in enumerate(x) if i not in dims or len(eq.out) == len(x) or a.size != 1)


_COMPLEX = "real and imaginary parts"


@rule("view_as_complex", "view_as_complex_copy")
def view_as_complex(eq: Equations, x: Shape) -> Shape:
    eq.freeze(_COMPLEX, x[-1])
    return x[:-1]


@rule("view_as_real", "view_as_real_copy")
def view_as_real(eq: Equations, x: Shape) -> Shape:
    return (*x, eq.frozen(2, _COMPLEX))


@rule("diagonal")
def diagonal(eq: Equations, x: Shape, offset: int = 0, a: int = 0, b: int = 1) -> Shape:
    dims = {axis_index(a, len(x)), axis_index(b, len(x))}
    eq.freeze("a diagonal is taken of this axis", *(x[d] for d in dims))
    return (*(axis for d, axis in enumerate(x) if d not in dims), eq.frozen(eq.out[-1], "entries of a diagonal"))


# --- views ------------------------------------------------------------------------------------------------------------


def _as(eq: Equations, x: Shape) -> Shape:
    """The axes of `x` laid out anew in the sizes of the answer; axes that stand unchanged at both ends pass through."""
    out = tuple(eq.fresh(s) for s in eq.out)
    before, after = ([axis for axis in axes if axis.size] for axes in (x, out))  # rows of which there are none here stand beside the others
    if math.prod(a.size for a in before) != math.prod(a.size for a in after):
        raise Unsupported("a view of an empty tensor")
    eq.equate_products(before, after)
    return out


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy")
def view(eq: Equations, x: Shape, *_: Any, **__: Any) -> Shape:
    return _as(eq, x)


@rule("flatten", "ravel")
def flatten(eq: Equations, x: Shape, start: int = 0, end: int = -1) -> Shape:
    if not x:
        return (UNIT,)
    start, end = axis_index(start, len(x)), axis_index(end, len(x))
    return (*x[:start], product(x[start : end + 1]), *x[end + 1 :])


@rule("unflatten")
def unflatten(eq: Equations, x: Shape, dim: int, sizes: Any) -> Shape:
    return _as(eq, x)


@rule("view_as", "reshape_as")
def view_as(eq: Equations, x: Shape, other: Shape) -> Shape:
    eq.equate_products(x, other)
    return other


@rule("expand")
def expand(eq: Equations, x: Shape, *_: Any, **__: Any) -> Shape:
    """An axis of size 1 becomes a fresh one, of copies."""
    lead = len(eq.out) - len(x)
    return tuple(
        x[i - lead] if i >= lead and x[i - lead].size == size else eq.fresh(size) for i, size in enumerate(eq.out)
    )  # fmt: skip


@rule("repeat", "tile")
def repeat(eq: Equations, x: Shape, repeats: list[Any]) -> Shape:
    """An axis of size 1 becomes a fresh one, of copies. Others become copies · themselves, and the number of copies stays."""
    padded = (*(UNIT,) * (len(eq.out) - len(x)), *x)
    return tuple(
        eq.fresh(size) if axis.size == 1 else product((eq.frozen(size // axis.size, "copies of the same entries"), axis))
        for axis, size in zip(padded, eq.out, strict=True)
    )


@rule("repeat_interleave")
def repeat_interleave(eq: Equations, x: Shape, repeats: Any, dim: int | None = None, **_: Any) -> Shape:
    if not isinstance(repeats, int):
        raise Unsupported("a different number of copies for each entry")
    if dim is None:
        return (product((*x, eq.fresh(repeats))),)
    dim = axis_index(dim, len(x))
    return (*x[:dim], product((x[dim], eq.fresh(repeats))), *x[dim + 1 :])


@resizer("repeat_interleave")
def interleavesize_of(new: Resize, node: fx.Node) -> None:
    dim, x = new.argument(node, "dim"), new.argument(node, "self")
    if dim is not None:
        dim = axis_index(dim, new.rank(x))
        new.set(node, "repeats", new.size(node, dim) // new.size(x, dim))
        if isinstance(new.argument(node, "output_size"), int):
            new.set(node, "output_size", new.size(node, dim))


# --- literal sizes ------------------------------------------------------------------------------------------------------


def _sizes(new: Resize, node: fx.Node, name: str, dims: Iterable[int | None]) -> None:
    """Write the sizes of the answer's axes `dims` into the list argument `name`; where there is None, a number stays.

    A size that is computed (from a dynamic batch, say) is scaled: its dynamic part is not ours to know.
    """
    sizes: list[Any] = []
    shape = node.meta["val"].shape
    for size, dim in zip(new.argument(node, name), dims, strict=True):
        if dim is None:
            sizes.append(size)
            continue
        kept = new.size(node, dim)
        whole = size_of(shape[dim])
        if kept == whole or (size == -1 and not isinstance(size, fx.Node)):
            sizes.append(size)
        elif isinstance(size, fx.Node):
            sizes.append(scaled(new, node, size, kept, whole))
        else:
            sizes.append(kept)
    new.set(node, name, sizes)


def scaled(new: Resize, before: fx.Node, size: fx.Node, kept: int, whole: int) -> fx.Node:
    """A node for size · kept / whole; batch · 12 heads becomes batch · 6. What is read from a tensor that shrinks is that much smaller already."""
    if operator_name(size) in ("sym_size", "size") and len(size.args) == 2:
        source, dim = size.args
        kept, whole = kept * size_of(source.meta["val"].shape[dim]), whole * new.size(source, axis_index(dim, new.rank(source)))  # type: ignore[union-attr, index, arg-type]
        kept, whole = kept // math.gcd(kept, whole), whole // math.gcd(kept, whole)
        if kept == whole:
            return size
    graph = before.graph
    with graph.inserting_before(before):
        if size.target is operator.mul:
            number = next((a for a in size.args if isinstance(a, int) and a * kept % whole == 0), None)
            other = next((a for a in size.args if isinstance(a, fx.Node)), None)
            if number is not None and other is not None:
                new.literals.setdefault(before, []).append((number, number * kept // whole))
                return graph.call_function(operator.mul, (other, number * kept // whole))
        return graph.call_function(operator.floordiv, (graph.call_function(operator.mul, (size, kept)), whole))


@resizer("view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy", "new_zeros", "new_ones", "new_full", "new_empty",
         "zeros", "ones", "full", "empty")  # fmt: skip
def whole_shape(new: Resize, node: fx.Node) -> None:
    _sizes(new, node, "size" if new.has(node, "size") else "shape", range(new.rank(node)))


@resizer("expand")
def shape_from_the_last(new: Resize, node: fx.Node) -> None:
    _sizes(new, node, "size", range(new.rank(node) - len(new.argument(node, "size")), new.rank(node)))


@resizer("repeat", "tile")
def numbers_of_copies(new: Resize, node: fx.Node) -> None:
    """How often an axis of size 1 stands there is the size of the answer's."""
    name, x, rank = "repeats" if new.has(node, "repeats") else "dims", new.argument(node, "self"), new.rank(node)
    repeated = {rank - back: size_of(size) for back, size in enumerate(reversed(x.meta["val"].shape), start=1)}
    _sizes(new, node, name, [dim if repeated.get(dim, 1) == 1 else None for dim in range(rank - len(new.argument(node, name)), rank)])


@resizer("unflatten")
def part_of_shape(new: Resize, node: fx.Node) -> None:
    first = axis_index(new.argument(node, "dim"), new.rank(new.argument(node, "self")))
    _sizes(new, node, "sizes", range(first, first + len(new.argument(node, "sizes"))))
