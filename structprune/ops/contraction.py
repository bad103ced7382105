"""Operators that multiply and add up: the contracted axes of both operands are equal, the others pass through."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import fx

from structprune.ir.axes import Axis, Shape, product
from structprune.ops.rules import Equations, Resize, Unsupported, axis_index, resizer, rule

_WINDOW = "a convolution window slides along this axis"


@rule("linear")
def linear(eq: Equations, x: Shape, weight: Shape, bias: Shape | None = None) -> Shape:
    out, inner = weight if len(weight) == 2 else (None, weight[0])
    eq.equate(x[-1], inner)
    eq.sums(inner)
    if out is None:
        eq.macs(*x)
        return x[:-1]
    if bias is not None:
        eq.broadcast((out,), bias)
    eq.macs(*x, out)
    return (*x[:-1], out)


@rule("bilinear")
def bilinear(eq: Equations, a: Shape, b: Shape, weight: Shape, bias: Shape | None = None) -> Shape:
    out, left, right = weight
    eq.equate(a[-1], left)
    eq.equate(b[-1], right)
    if bias is not None:
        eq.equate(out, bias[0])
    eq.macs(*a, right, out)
    return (*eq.broadcast(a[:-1], b[:-1]), out)


# --- convolution ----------------------------------------------------------------------------------------------------


def _grouped(eq: Equations, channels: Axis, groups: int, inner: Axis) -> Axis:
    """channels := groups · inner; returns the axis of groups."""
    outer = eq.fresh(groups)
    eq.equate(channels, product((outer, inner)))
    return outer


def _window(eq: Equations, space: Shape, window: Shape, steps: Any, *others: Any) -> Shape:
    """The spatial axes after a sliding window; they pass through where it has one entry, steps by one, and the `others`, paddings, add none."""
    rank = len(space)
    moves = [(axis.size, *(_along(value, rank)[place] for value in (steps, *others))) for place, axis in enumerate(window)]
    passes = [move == (1, 1, *(0 for _ in others)) for move in moves]
    eq.freeze(_WINDOW, *window, *(axis for axis, through in zip(space, passes, strict=True) if not through))
    answer = zip(space, eq.out[-rank:], passes, strict=True)
    return tuple(axis if through else eq.frozen(size, _WINDOW) for axis, size, through in answer)


def _along(value: Any, rank: int) -> list[Any]:
    """A setting of a convolution for each spatial axis; one number is for all of them."""
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    return several * rank if len(several) == 1 else several


@rule("conv1d", "conv2d", "conv3d")
def conv(
    eq: Equations, x: Shape, weight: Shape, bias: Shape | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Shape:
    """x: (batch?, groups·inner, *space); weight: (groups·outer, inner, *window)."""
    rank = len(weight) - 2
    *batch, channels = x[:-rank]
    out, inner, *window = weight
    group = _grouped(eq, channels, groups, inner)
    eq.sums(inner)
    filters = eq.fresh(out.size // groups)
    eq.equate(out, product((group, filters)))
    if bias is not None:
        eq.equate(out, bias[0])
    space = _window(eq, x[-rank:], tuple(window), stride, 0 if padding in ("same", "valid") else padding)
    eq.macs(*batch, group, filters, inner, *window, *space)
    return (*batch, out, *space)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    eq: Equations, x: Shape, weight: Shape, bias: Shape | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Shape:  # fmt: skip
    """x: (batch?, groups·inner, *space); weight: (groups·inner, outer, *window); answer: groups·outer channels."""
    rank = len(weight) - 2
    *batch, channels = x[:-rank]
    own, filters, *window = weight
    eq.equate(channels, own)
    inner = eq.fresh(own.size // groups)
    group = _grouped(eq, own, groups, inner)
    eq.sums(inner)
    out = product((group, filters))
    if bias is not None:
        eq.equate(out, bias[0])
    space = _window(eq, x[-rank:], tuple(window), stride, padding, output_padding)
    eq.macs(*batch, group, filters, inner, *window, *x[-rank:])
    return (*batch, out, *space)


WEIGHED = (linear, conv, conv_transpose)  # each weighs its first argument by its second, channel by channel


@rule("convolution")
def convolution(
    eq: Equations, x: Shape, weight: Shape, bias: Shape | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Shape:  # fmt: skip
    if transposed:
        return conv_transpose(eq, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(eq, x, weight, bias, stride, padding, dilation, groups)


@resizer("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def conv_groups(new: Resize, node: fx.Node) -> None:
    """As many groups as there are kept channels per kept input channel of one group."""
    groups = new.argument(node, "groups")
    if groups == 1:
        return
    weight = new.argument(node, "weight")
    transposed = "transpose" in str(node.target) or (new.has(node, "transposed") and new.argument(node, "transposed"))
    if transposed:
        channels = new.kept(weight, 0)
        per_group = int(weight.meta["val"].shape[0]) // groups
        new.set(node, "groups", len({int(c) // per_group for c in channels}))
    else:
        rank = len(weight.meta["val"].shape) - 2
        x = new.argument(node, "input")
        new.set(node, "groups", new.size(x, new.rank(x) - rank - 1) // new.size(weight, 1))


@rule("torchvision::deform_conv2d")
def deform_conv(eq: Equations, x: Shape, weight: Shape, offset: Shape, mask: Shape, bias: Shape, *settings: Any) -> Shape:
    """A convolution whose window reads at learned offsets, two for each of its entries, and weighs what it reads where there is a mask.

    x: (batch, groups·inner, *space), which is offset groups · channels, too; weight: (groups·outer, inner, *window);
    offset: (batch, offset groups · window · 2, *space); mask: (batch, offset groups · window, *space), or without entries.
    """
    *_, groups, offset_groups, use_mask = settings
    out, inner, *window = weight
    group = _grouped(eq, x[1], groups, inner)
    eq.sums(inner)
    filters = eq.fresh(out.size // groups)
    eq.equate(out, product((group, filters)))
    eq.equate(out, bias[0])
    if offset_groups == groups:
        owner = group
    elif 1 in (groups, offset_groups):
        owner = _grouped(eq, x[1], offset_groups, eq.fresh(x[1].size // offset_groups))
    else:
        raise Unsupported("a deformable convolution in groups of two sizes")
    for learned in (offset, mask) if use_mask else (offset,):
        eq.equate(x[0], learned[0])
        eq.equate(learned[1], product((owner, eq.frozen(learned[1].size // offset_groups, "offsets of a window"))))
        eq.freeze("offsets of a window", *learned[2:])
    eq.freeze(_WINDOW, *window, *x[2:])
    space = tuple(eq.frozen(s, _WINDOW) for s in eq.out[-2:])
    eq.macs(x[0], group, filters, inner, *window, *space)
    return (x[0], out, *space)


@resizer("torchvision::deform_conv2d")
def deform_conv_groups(new: Resize, node: fx.Node) -> None:
    x, weight, offset = (new.argument(node, name) for name in ("input", "weight", "offset"))
    window = math.prod(new.size(weight, dim) for dim in (2, 3))
    new.set(node, "groups", new.size(x, 1) // new.size(weight, 1))
    new.set(node, "offset_groups", new.size(offset, 1) // (2 * window))


# --- matrix products ------------------------------------------------------------------------------------------------


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(eq: Equations, a: Shape, b: Shape) -> Shape:
    inner = b[-2] if len(b) > 1 else b[0]
    eq.equate(a[-1], inner)
    eq.sums(inner)
    batch = eq.broadcast(a[:-2], b[:-2])
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    eq.macs(*batch, *rows, inner, *columns)
    return (*batch, *rows, *columns)


@rule("addmm", "baddbmm", "addmv")
def addmm(eq: Equations, bias: Shape, a: Shape, b: Shape, **_: Any) -> Shape:
    out = matmul(eq, a, b)
    eq.broadcast(out, bias)
    return out


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_matmul(eq: Equations, rows: Shape, experts: Shape, offsets: Shape, bias: Shape | None = None, *_: Any) -> Shape:
    """(rows, inner) and (experts, inner, outer) → (rows, outer): each expert multiplies the rows between two offsets."""
    why = "rows are dealt out to experts"
    if len(rows) != 2 or len(experts) != 3:
        raise Unsupported("an outer product in groups")
    eq.freeze(why, rows[0], experts[0], *offsets)
    eq.equate(rows[-1], experts[-2])
    eq.sums(experts[-2])
    if bias is not None:
        eq.broadcast(experts[-1:], bias[-1:])
    eq.macs(*rows, experts[-1])
    return (*rows[:-1], experts[-1])


@rule("outer", "ger")
def outer(eq: Equations, a: Shape, b: Shape) -> Shape:
    return (*a, *b)


@rule("cosine_similarity")
def cosine_similarity(eq: Equations, a: Shape, b: Shape, dim: int = 1, *_: Any) -> Shape:
    """Σ a·b / (|a|·|b|): a removed entry of zero adds nothing to any of the three."""
    both = eq.broadcast(a, b)
    dim = axis_index(dim, len(both))
    eq.sums(both[dim])
    return (*both[:dim], *both[dim + 1 :])


@rule("cdist")
def cdist(eq: Equations, a: Shape, b: Shape, p: float = 2, *_: Any) -> Shape:
    """(…, rows, features) and (…, columns, features) → distances of all pairs."""
    eq.equate(a[-1], b[-1])
    eq.sums(a[-1])
    if not 0 < p < math.inf:
        eq.freeze("a distance of this order runs along this axis", a[-1])
    return (*eq.broadcast(a[:-2], b[:-2]), a[-2], b[-2])


@rule("einsum")
def einsum(eq: Equations, equation: str, operands: list[Shape], **_: Any) -> Shape:
    """Axes under one letter are equal; '...' broadcasts."""
    terms, _arrow, answer = equation.replace(" ", "").partition("->")
    letters: dict[str, Axis] = {}
    ellipses: list[Shape] = []
    for term, shape in zip(terms.split(","), operands, strict=True):
        names = re.findall(r"\.\.\.|[A-Za-z]", term)
        wild = len(shape) - sum(n != "..." for n in names)
        position = 0
        for name in names:
            if name == "...":
                ellipses.append(shape[position : position + wild])
                position += wild
                continue
            axis = shape[position]
            known = letters.setdefault(name, axis)
            if known.size == 1:
                letters[name] = axis
            elif axis.size != 1:
                eq.equate(known, axis)
            position += 1
    shared = eq.broadcast(*ellipses)
    if not _arrow:
        once = sorted(n for n in letters if terms.count(n) == 1)
        answer = ("..." if ellipses else "") + "".join(once)
    eq.sums(*(axis for name, axis in letters.items() if name not in answer))
    if len(operands) > 1:
        eq.macs(*shared, *letters.values())
    out: list[Axis] = []
    for name in re.findall(r"\.\.\.|[A-Za-z]", answer):
        out.extend(shared if name == "..." else (letters[name],))
    return tuple(out)


# --- attention --------------------------------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def attention(
    eq: Equations, query: Shape, key: Shape, value: Shape, attn_mask: Shape | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Shape:  # fmt: skip
    """softmax(q kᵀ) v over (..., heads, tokens, width). Grouped-query heads: query heads = key heads · repeats."""
    *q_batch, tokens, width = query
    *k_batch, memory, k_width = key
    *v_batch, v_memory, v_width = value
    eq.equate(width, k_width)
    eq.sums(width)
    eq.equate(memory, v_memory)
    eq.freeze("a softmax runs along this axis", memory)
    if is_causal:
        eq.freeze("a causal mask orders this axis", tokens)
    if enable_gqa and q_batch[-1].size != k_batch[-1].size:
        eq.equate(k_batch[-1], v_batch[-1])
        repeats = eq.fresh(q_batch[-1].size // k_batch[-1].size)
        eq.equate(q_batch[-1], product((k_batch[-1], repeats)))
        heads = q_batch[-1]
        batch = (*eq.broadcast(tuple(q_batch[:-1]), tuple(k_batch[:-1]), tuple(v_batch[:-1])), heads)
    else:
        batch = eq.broadcast(tuple(q_batch), tuple(k_batch), tuple(v_batch))
    if isinstance(attn_mask, tuple):
        eq.broadcast((*batch, tokens, memory), attn_mask)
    eq.macs(*batch, tokens, memory, width)
    eq.macs(*batch, tokens, memory, v_width)
    return (*batch, tokens, v_width)


@resizer("scaled_dot_product_attention")
def attention_scale(new: Resize, node: fx.Node) -> None:
    """The scale stays what it was: 1/√width of the original, written out where it was left to the operator."""
    query = new.argument(node, "query")
    width = int(query.meta["val"].shape[-1])
    if new.argument(node, "scale") is None and new.size(query, new.rank(query) - 1) != width:
        new.set(node, "scale", 1 / math.sqrt(width))
