"""Normalisations, and reductions over whole axes.

Layer, RMS and group norms over a pruned axis run over the kept entries, and so do a mean and a variance. Reductions for which no
entry is neutral (softmax, maximum) keep the axes that they run over.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from structprune.ir.axes import Shape, product
from structprune.ir.graph import size_of
from structprune.ops.layout import scaled
from structprune.ops.rules import Equations, Resize, axis_index, resizer, rule

_STATISTICS = "a norm takes statistics along this axis"


@rule("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(
    eq: Equations,
    x: Shape,
    weight: Shape | None,
    bias: Shape | None,
    mean: Shape | None = None,
    var: Shape | None = None,
    training: Any = False,
    *_: Any,
) -> Shape:
    for parameter in (weight, bias, mean, var):
        if parameter is not None:
            eq.equate(x[1], parameter[0])
    if training is True:  # weights that are standardised by a batch norm
        eq.freeze(_STATISTICS, x[0], *x[2:])
    return x


@rule("instance_norm")
def instance_norm(
    eq: Equations, x: Shape, weight: Shape | None, bias: Shape | None, mean: Shape | None = None, var: Shape | None = None, own: Any = True, *_: Any
) -> Shape:
    batch_norm(eq, x, weight, bias, mean, var)
    if own:
        eq.freeze(_STATISTICS, *x[2:])
    return x


def _norm_over(eq: Equations, axes: Shape, affine: list[Any], exact: bool) -> None:
    for parameter in affine:
        if isinstance(parameter, tuple):
            eq.broadcast(axes, parameter)
    for axis in axes:
        eq.over(axis, "norm", exact=exact)


@rule("layer_norm")
def layer_norm(eq: Equations, x: Shape, normalized_shape: list[int], weight: Any = None, bias: Any = None, *_: Any) -> Shape:
    _norm_over(eq, x[-len(normalized_shape) :], [weight, bias], exact=isinstance(weight, tuple))
    return x


@rule("rms_norm", "_fused_rms_norm")
def rms_norm(eq: Equations, x: Shape, normalized_shape: list[int], weight: Any = None, *_: Any) -> Shape:
    _norm_over(eq, x[-len(normalized_shape) :], [weight], exact=isinstance(weight, tuple))
    return x


@resizer("layer_norm", "rms_norm", "_fused_rms_norm")
def normalized_shape(new: Resize, node: fx.Node) -> None:
    x, old = new.argument(node, "input"), new.argument(node, "normalized_shape")
    sizes = []
    for dim, size in enumerate(old, new.rank(x) - len(old)):
        kept, whole = new.size(x, dim), size_of(x.meta["val"].shape[dim])
        sizes.append(size if kept == whole else scaled(new, node, size, kept, whole) if isinstance(size, fx.Node) else kept)
    new.set(node, "normalized_shape", sizes)


@rule("group_norm")
def group_norm(eq: Equations, x: Shape, num_groups: int, weight: Any = None, bias: Any = None, *_: Any) -> Shape:
    """The channels are groups · inner, and statistics run over inner and space."""
    for parameter in (weight, bias):
        if isinstance(parameter, tuple):
            eq.equate(x[1], parameter[0])
    groups, inner = eq.fresh(num_groups), eq.fresh(x[1].size // num_groups)
    eq.equate(x[1], product((groups, inner)))
    eq.over(inner, "norm", exact=isinstance(weight, tuple))
    eq.freeze(_STATISTICS, *x[2:])
    return x


@resizer("group_norm")
def num_groups(new: Resize, node: fx.Node) -> None:
    x, groups = new.argument(node, "input"), new.argument(node, "num_groups")
    per_group = int(x.meta["val"].shape[1]) // groups
    new.set(node, "num_groups", len({int(c) // per_group for c in new.kept(x, 1)}))


# --- reductions ----------------------------------------------------------------------------------------------------------


def _reduced(x: Shape, dim: Any, keepdim: bool) -> tuple[list[int], Shape]:
    """The dimensions that a reduction runs over, and the shape of its answer."""
    if dim is None or dim == []:
        dims = list(range(len(x)))
    else:
        dims = sorted(axis_index(d, len(x)) for d in (dim if isinstance(dim, (list, tuple)) else [dim])) if x else []
    one = product(())
    return dims, tuple(one if i in dims else a for i, a in enumerate(x) if keepdim or i not in dims)


@rule("sum", "nansum", "count_nonzero")
def total(eq: Equations, x: Shape, dim: Any = None, keepdim: bool = False, **_: Any) -> Shape:
    dims, out = _reduced(x, dim, keepdim)
    eq.sums(*(x[d] for d in dims))
    return out


@rule("mean")
def mean(eq: Equations, x: Shape, dim: Any = None, keepdim: bool = False, **_: Any) -> Shape:
    dims, out = _reduced(x, dim, keepdim)
    for d in dims:
        eq.over(x[d], "mean", exact=False)
    return out


@rule("linalg_vector_norm")
def vector_norm(eq: Equations, x: Shape, order: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Shape:
    """Σ|x|^p: a removed entry of zero adds nothing."""
    dims, out = _reduced(x, dim, keepdim)
    eq.sums(*(x[d] for d in dims))
    if not isinstance(order, (int, float)) or not 0 < order < float("inf"):
        eq.freeze("a norm of this order runs along this axis", *(x[d] for d in dims))
    return out


@rule("norm")
def norm(eq: Equations, x: Shape, p: Any = 2, dim: Any = None, keepdim: bool = False, *_: Any, **__: Any) -> Shape:
    return vector_norm(eq, x, 2 if p is None else p, dim, keepdim)


@rule("amax", "amin", "prod", "any", "all", "logsumexp", "argmax", "argmin")
def reduction(eq: Equations, x: Shape, dim: Any = None, keepdim: bool = False, **_: Any) -> Shape:
    dims, out = _reduced(x, dim, keepdim)
    eq.freeze(_runs(eq), *(x[d] for d in dims))
    return out


@rule("quantile", "nanquantile")
def quantile(eq: Equations, x: Shape, q: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Shape:
    """Several quantiles stand on an axis of their own, the first of the answer."""
    several = q if isinstance(q, tuple) else ()
    return (*several, *reduction(eq, x, dim, keepdim))


@rule("kthvalue")
def kth_value(eq: Equations, x: Shape, k: int, dim: int = -1, keepdim: bool = False) -> list[Shape]:
    return [reduction(eq, x, dim, keepdim)] * 2


@rule("max", "min", "median", "nanmedian", "mode")
def extremum(eq: Equations, x: Shape, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, tuple):  # torch.max(a, b) is elementwise
        return eq.broadcast(x, dim)
    out = reduction(eq, x, dim, keepdim)
    return out if dim is None else [out, out]


@rule("var", "std", "var_mean", "std_mean")
def variance(eq: Equations, x: Shape, dim: Any = None, *args: Any, keepdim: bool = False, **_: Any) -> Any:
    if isinstance(dim, bool):  # var(x, unbiased)
        dim = None
    keep = keepdim or (len(args) > 1 and bool(args[1]))
    dims, out = _reduced(x, dim, keep)
    for d in dims:
        eq.over(x[d], "variance", exact=False)
    return [out, out] if isinstance(eq.out, list) else out


@rule("topk", "sort", "argsort")
def ordering(eq: Equations, x: Shape, *args: Any, dim: int = -1, **_: Any) -> Any:
    """The entries along an axis change places with the values: nothing on it is named any more."""
    numbers = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    if _opname(eq) == "topk":
        dim = numbers[1] if len(numbers) > 1 else dim
    elif numbers:
        dim = numbers[0]
    at = axis_index(dim, len(x))
    eq.freeze(_runs(eq), x[at])
    sizes = eq.out[0] if isinstance(eq.out, list) else eq.out
    out = (*x[:at], eq.frozen(sizes[at], _runs(eq)), *x[at + 1 :])
    return [out, out] if isinstance(eq.out, list) else out


def _opname(eq: Equations) -> str:
    return str(eq.node.target._opname)  # type: ignore[union-attr]


def _runs(eq: Equations) -> str:
    return f"{_opname(eq)} runs along this axis"
