"""Operators that join and take apart: concatenation makes sums of axes, slices cut them.

When channels go, the places of the cuts move: a resizer counts the entries that stay before each cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from structprune.ir.axes import EMPTY, Axis, Shape, concat, product
from structprune.ir.graph import size_of
from structprune.ir.operators import operator_name
from structprune.ops.rules import Equations, Resize, Unsupported, aten, axis_index, resizer, rule

_MANY_RUNS = 64  # a constant index of more consecutive runs than this is taken for a permutation at random
_AT_RUN_TIME = "cut at a place known only at run time"
_COPIES = ("expand", "expand_as", "to", "_to_copy", "contiguous", "clone")


def _replace(x: Shape, dim: int, axis: Axis) -> Shape:
    return (*x[:dim], axis, *x[dim + 1 :])


@rule("cat", "concat", "concatenate")
def cat(eq: Equations, tensors: list[Shape], dim: int = 0) -> Shape:
    tensors = [t for t in tensors if not (len(t) == 1 and t[0].size == 0)] or tensors[:1]  # torch skips tensors of shape (0,)
    dim = axis_index(dim, len(tensors[0]))
    first = tensors[0]
    for other in tensors[1:]:
        for i, (a, b) in enumerate(zip(first, other, strict=True)):
            if i != dim:
                eq.equate(a, b)
    return _replace(first, dim, concat(t[dim] for t in tensors))


@rule("stack")
def stack(eq: Equations, tensors: list[Shape], dim: int = 0) -> Shape:
    first = tensors[0]
    for other in tensors[1:]:
        eq.broadcast(first, other)
    dim = axis_index(dim, len(first) + 1)
    one = product(())
    return (*first[:dim], concat([one] * len(tensors)), *first[dim:])


@rule("split_with_sizes", "split_with_sizes_copy")
def split_with_sizes(eq: Equations, x: Shape, sizes: list[int], dim: int = 0) -> list[Shape]:
    dim = axis_index(dim, len(x))
    return [_replace(x, dim, piece) for piece in eq.split(x[dim], sizes)]


@rule("split", "chunk", "tensor_split", "split_copy")
def split(eq: Equations, x: Shape, _how: Any, dim: int = 0) -> list[Shape]:
    dim = axis_index(dim, len(x))
    return split_with_sizes(eq, x, [shape[dim] for shape in eq.out], dim)


@resizer("split_with_sizes", "split", "chunk", "tensor_split", "split_copy", "split_with_sizes_copy")
def split_sizes(new: Resize, node: fx.Node) -> None:
    """Where the pieces now differ in size, each is written out."""
    x, dim = new.argument(node, "self"), new.argument(node, "dim")
    dim = axis_index(dim, new.rank(x))
    sizes = [new.size(node, dim, part) for part in range(len(node.meta["val"]))]
    old = [size_of(piece.shape[dim]) for piece in node.meta["val"]]
    if sizes == old:
        return
    if node.target is aten.split_with_sizes.default:
        new.set(node, "split_sizes", sizes)
    elif node.target is aten.split.Tensor and len(set(sizes)) == 1:
        new.set(node, "split_size", sizes[0])
    elif node.target is not aten.chunk.default or len(set(sizes)) > 1 or len(set(old)) > 1:
        new.retarget(node, aten.split_with_sizes.default, (x, sizes, dim))


@rule("slice", "narrow")
def slice_(eq: Equations, x: Shape, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Shape:
    dim = axis_index(dim, len(x))
    axis, size = x[dim], x[dim].size
    if any(isinstance(bound, fx.Node) for bound in eq.node.args[2:]):
        eq.freeze(_AT_RUN_TIME, axis)
        return x if eq.out[dim] == size else _replace(x, dim, eq.frozen(eq.out[dim], _AT_RUN_TIME))
    if eq.node.target._opname == "narrow":  # type: ignore[union-attr]
        end = start + end
    start, end, _ = slice(start, end, 1).indices(size)
    if start == 0 and end >= size and step == 1:
        return x
    if eq.out[dim] == 0:
        return _replace(x, dim, EMPTY)
    if step == 1:
        return _replace(x, dim, eq.split(axis, [start, end - start, size - end])[1])
    if size % step or start >= step or end < size - step + 1 + start:
        eq.freeze("a slice with a step", axis)
        return _replace(x, dim, eq.frozen(eq.out[dim], "a slice with a step"))
    outer, inner = eq.divide(axis, step)  # every step-th entry: the axis is outer · step
    eq.freeze("a slice with a step", inner)
    return _replace(x, dim, outer)


@resizer("slice", "narrow")
def slice_bounds(new: Resize, node: fx.Node) -> None:
    x = new.argument(node, "self")
    dim = axis_index(new.argument(node, "dim"), new.rank(x))
    kept, size = new.kept(x, dim), size_of(x.meta["val"].shape[dim])
    if len(kept) == size:
        return
    start = new.argument(node, "start")
    if new.has(node, "length"):
        new.set(node, "length", new.size(node, dim))
        new.set(node, "start", int(np.searchsorted(kept, axis_index(start, size))))
        return
    start, end, _ = slice(start, new.argument(node, "end"), 1).indices(size)
    if new.argument(node, "step") != 1:  # whole blocks of `step` stay: the place within a block is what it was
        if end < size:
            new.set(node, "end", len(kept) - (size - end))
        return
    if start > 0:
        new.set(node, "start", int(np.searchsorted(kept, start)))
    if end < size:
        new.set(node, "end", int(np.searchsorted(kept, end)))


@rule("slice_scatter")
def slice_scatter(eq: Equations, x: Shape, source: Shape, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Shape:
    if step != 1:
        raise Unsupported("a slice with a step")
    start, end, _ = slice(start, end, 1).indices(x[axis_index(dim, len(x))].size)
    dim = axis_index(dim, len(x))
    piece = eq.split(x[dim], [start, end - start, x[dim].size - end])[1]
    eq.broadcast(_replace(x, dim, piece), source)
    eq.freeze("written to by position", x[dim])
    return x


@rule("select", "select_copy")
def select(eq: Equations, x: Shape, dim: int, index: int) -> Shape:
    dim = axis_index(dim, len(x))
    eq.freeze("one entry is picked by its number", x[dim])
    return (*x[:dim], *x[dim + 1 :])


@rule("unbind")
def unbind(eq: Equations, x: Shape, dim: int = 0) -> list[Shape]:
    dim = axis_index(dim, len(x))
    eq.freeze("each entry is taken by itself", x[dim])
    return [(*x[:dim], *x[dim + 1 :])] * x[dim].size


@rule("roll")
def roll(eq: Equations, x: Shape, shifts: Any, dims: Any = ()) -> Shape:
    eq.freeze(
        "rolled by a number of places", *(x[axis_index(d, len(x))] for d in (dims if isinstance(dims, (list, tuple)) else [dims]) or range(len(x)))
    )
    return x


# --- padding --------------------------------------------------------------------------------------------------------------


@rule("pad", "constant_pad_nd")
def pad(eq: Equations, x: Shape, padding: list[int], mode: Any = "constant", value: Any = None) -> Shape:
    """Constant entries before and after an axis are summands of their own; other modes copy entries by position."""
    out = list(x)
    for i in range(len(padding) // 2):
        before, after, dim = padding[2 * i], padding[2 * i + 1], len(x) - 1 - i
        if before == after == 0:
            continue
        if isinstance(mode, str) and mode != "constant":
            eq.freeze(f"padded by {mode}", x[dim])
            out[dim] = eq.frozen(eq.out[dim], f"padded by {mode}")
        elif before < 0 or after < 0:
            eq.freeze("cropped", x[dim])
            out[dim] = eq.frozen(eq.out[dim], "cropped")
        else:
            out[dim] = concat((eq.fresh(before), x[dim], eq.fresh(after)))
    return tuple(out)


@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d")
def pad_by_copy(eq: Equations, x: Shape, padding: list[int]) -> Shape:
    return pad(eq, x, padding, "copying entries")


@resizer("pad", "constant_pad_nd")
def pad_widths(new: Resize, node: fx.Node) -> None:
    x = new.argument(node, "self")
    padding = list(new.argument(node, "pad"))
    for i in range(len(padding) // 2):
        dim = new.rank(x) - 1 - i
        if new.size(node, dim) != size_of(node.meta["val"].shape[dim]):
            before = int(np.searchsorted(new.kept(node, dim), padding[2 * i]))
            padding[2 * i : 2 * i + 2] = [before, new.size(node, dim) - before - new.size(x, dim)]
    new.set(node, "pad", padding)


# --- indices ----------------------------------------------------------------------------------------------------------------


@rule("embedding")
def embedding(eq: Equations, weight: Shape, indices: Shape, *_: Any) -> Shape:
    eq.freeze("rows are looked up by number", weight[0])
    return (*indices, *weight[1:])


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(eq: Equations, weight: Shape, indices: Shape, offsets: Shape, *_: Any, **__: Any) -> list[Shape]:
    """Rows are looked up, and added up by bags; the other answers say which row went where."""
    why = "rows are looked up by number"
    eq.freeze(why, weight[0], *indices, *offsets)
    rest = [tuple(eq.frozen(size, why) for size in shape) for shape in eq.out[1:]]
    return [(eq.frozen(eq.out[0][0], why), weight[1]), *rest]


@rule("index_select")
def index_select(eq: Equations, x: Shape, dim: int, index: Shape) -> Shape:
    dim = axis_index(dim, len(x))
    return _replace(x, dim, _gathered(eq, x[dim], eq.node.args[2], index))


@rule("index", "_unsafe_index")
def index(eq: Equations, x: Shape, indices: list[Any]) -> Shape:
    """x[i, :, j]: indexed axes are read by number, except where one axis is indexed by a constant of consecutive runs."""
    named = [i for i, shape in enumerate(indices) if shape is not None]
    if len(named) == 1 and len(indices[named[0]]) == 1 and not _is_mask(eq.node.args[1][named[0]]):  # type: ignore[index, call-overload]
        dim = named[0]
        return _replace(x, dim, _gathered(eq, x[dim], eq.node.args[1][dim], indices[dim]))  # type: ignore[index, call-overload]
    out = _places(eq, x, indices, eq.out, "read by index")
    if len(out) != len(eq.out):
        raise Unsupported("an index of truth values among others")
    return out


@rule("index_put")
def index_put(eq: Equations, x: Shape, indices: list[Any], values: Shape, *_: Any) -> Shape:
    """x[i, :, j] = values: the axes that are not indexed are written side by side."""
    eq.broadcast(_places(eq, x, indices, [axis.size for axis in values], "written to by index"), values)
    return x


@rule("masked_scatter")
def masked_scatter(eq: Equations, x: Shape, mask: Shape, source: Shape) -> Shape:
    """The entries of source, one after the other, where the mask is true: whole rows, if the mask says one thing of a whole row."""
    why = "written to where truth values say"
    out = eq.broadcast(x, mask)
    if out and source and source[-1].size == out[-1].size and _same_along_rows(eq.node.args[1]):
        eq.equate(out[-1], source[-1])
        eq.freeze(why, *out[:-1], *source[:-1])
    else:
        eq.freeze(why, *out, *source)
    return out


def _same_along_rows(mask: Any) -> bool:
    """Whether a mask has one entry along its last axis, or copies of one."""
    while isinstance(mask, fx.Node) and operator_name(mask) in _COPIES:
        mask = mask.args[0]
    return isinstance(mask, fx.Node) and mask.meta["val"].shape[-1:] == (1,)


def _places(eq: Equations, x: Shape, indices: Sequence[Any], sizes: Sequence[int], why: str) -> Shape:
    """The axes of x[indices], where indexed axes keep all their entries. An index of truth values stands for as many axes as it has, and gives one.

    sizes: of the answer, or of the last axes of it, for how many entries are true is known only at run time.
    """
    named = [i for i, shape in enumerate(indices) if shape is not None]
    if any(_is_mask(eq.node.args[1][i]) for i in named):  # type: ignore[index, call-overload]
        if len(named) > 1:
            raise Unsupported("an index of truth values among others")
        at, mask = named[0], indices[named[0]]
        rest = x[at + len(mask) :]
        eq.freeze(f"{why} of truth values", *x[at : at + len(mask)], *mask)
        number = sizes[-len(rest) - 1] if len(sizes) > len(rest) else 1
        return (*x[:at], eq.frozen(number, f"{why} of truth values"), *rest)
    eq.freeze(why, *(x[i] for i in named))
    shared = eq.broadcast(*(indices[i] for i in named))
    adjacent = named == list(range(named[0], named[-1] + 1))
    others = [axis for i, axis in enumerate(x) if i not in named]
    at = named[0] if adjacent else 0
    return (*others[:at], *shared, *others[at:])


def _is_mask(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.meta["val"].dtype is torch.bool


def _gathered(eq: Equations, axis: Axis, source: Any, index: Shape) -> Axis:
    """The axis of axis[index]: a sum of slices where a constant index consists of a few consecutive runs."""
    values = eq.constant(source)
    if values is None or values.dim() != 1:
        eq.freeze("read by index", axis)
        return index[0] if index else product(())
    eq.freeze("an index: its numbers are counted anew, not removed", index[0])
    numbers = [int(v) % axis.size for v in values.tolist()]
    if not numbers:
        return index[0]
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    if len(breaks) >= _MANY_RUNS:
        eq.freeze("read by a constant index in no regular order", axis)
        return index[0]
    runs = [(numbers[a], numbers[b - 1] + 1) for a, b in zip([0, *breaks], [*breaks, len(numbers)], strict=True)]
    for place in sorted({p for run in runs for p in run}):
        eq.cut(axis, place)
    return concat(eq.split(axis, [a, b - a, axis.size - b])[1] for a, b in runs)


@resizer("index", "_unsafe_index", "index_select")
def constant_index(new: Resize, node: fx.Node) -> None:
    """A constant index speaks of entries by number: count anew which of them stay, and where."""
    x = node.args[0]
    if node.target is aten.index_select.default:
        dim, source = axis_index(node.args[1], new.rank(x)), node.args[2]  # type: ignore[arg-type]
    else:
        named = [i for i, value in enumerate(node.args[1]) if value is not None]  # type: ignore[arg-type]
        if len(named) != 1:
            return
        dim, source = named[0], node.args[1][named[0]]  # type: ignore[index, call-overload]
    if new.size(x, dim) == size_of(x.meta["val"].shape[dim]):  # type: ignore[union-attr]
        return
    old = new.constant(source)
    wanted = old[torch.as_tensor(new.kept(node, dim))] % size_of(x.meta["val"].shape[dim])  # type: ignore[union-attr]
    places = torch.as_tensor(np.searchsorted(new.kept(x, dim), wanted.numpy()))
    replacement = new.add_constant(node, places)
    if node.target is aten.index_select.default:
        node.update_arg(2, replacement)
    else:
        node.update_arg(1, [replacement if i == dim else None for i in range(dim + 1)])


@rule("gather", "take_along_dim")
def gather(eq: Equations, x: Shape, dim: int, index: Shape, **_: Any) -> Shape:
    dim = axis_index(dim, len(x))
    eq.freeze("read by index", x[dim])
    for i, (a, b) in enumerate(zip(x, index, strict=True)):
        if i != dim:
            if a.size == b.size:
                eq.equate(a, b)
            else:
                eq.freeze("read by index", a, b)
    return index


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(eq: Equations, x: Shape, dim: int, index: Shape, source: Any = None, *_: Any, **__: Any) -> Shape:
    """Entries along `dim` are written by number; the other axes are read side by side, where they have one size."""
    dim, why = axis_index(dim, len(x)), "written to by index"
    others = [index] + ([source] if isinstance(source, tuple) and source else [])
    for i, axis in enumerate(x):
        for other in others:
            if i == dim or other[i].size != axis.size:
                eq.freeze(why, axis, other[i])
            else:
                eq.equate(axis, other[i])
    return x


@rule("index_add", "index_copy")
def index_add(eq: Equations, x: Shape, dim: int, index: Shape, source: Shape, **_: Any) -> Shape:
    dim = axis_index(dim, len(x))
    eq.freeze("written to by index", x[dim], source[dim], *index)
    eq.broadcast(_replace(x, dim, source[dim]), source)
    return x


@rule("index_fill")
def index_fill(eq: Equations, x: Shape, dim: int, index: Shape, value: Any) -> Shape:
    eq.freeze("written to by index", x[axis_index(dim, len(x))], *index)
    return x


@rule("bucketize")
def bucketize(eq: Equations, x: Any, bounds: Shape, **_: Any) -> Shape:
    """For each entry the number of its bucket; of a number, a tensor of no axes."""
    eq.freeze("bounds of buckets", *bounds)
    return x if isinstance(x, tuple) else ()


@rule("searchsorted")
def searchsorted(eq: Equations, bounds: Shape, x: Any, **_: Any) -> Shape:
    """The same by rows, where the bounds are more than one row."""
    values = x if isinstance(x, tuple) else ()
    for row, other in zip(bounds[:-1], values, strict=False):
        eq.equate(row, other)
    return bucketize(eq, values, bounds[-1:])


@rule("one_hot")
def one_hot(eq: Equations, x: Shape, *_: Any) -> Shape:
    return (*x, eq.frozen(eq.out[-1], "classes are counted by number"))
