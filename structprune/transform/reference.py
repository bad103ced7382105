"""The reference: the dense graph, run operator by operator, in which every removed channel counts for nothing.

It knows axis types and which entries of each atom stay, but nothing of a plan's slices, of resized literals or of the small graph:
wherever an operator reads across channels, it reads zeros for the removed ones. Convolutions and linear layers, in which most of the time goes,
leave the zeros out of their sums, and attention leaves out whole heads. Means, variances and norms over a pruned axis are computed from their
definition, over the kept entries.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from structprune.analysis.infer import Types
from structprune.ir.axes import Axis, Keep, kept_entries
from structprune.ir.graph import Graph
from structprune.ir.operators import has_effect, named_arguments, operator_name
from structprune.ir.samples import samples_in
from structprune.ops import RULES, contraction, elementwise, joining, layout, normalization


def in_double(value: Any) -> Any:
    """Floating-point tensors and types, in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if value in (torch.float32, torch.float16, torch.bfloat16) else value


def _laid_out(value: Any) -> Any:
    value = in_double(value)
    return value.contiguous() if isinstance(value, Tensor) else value


class Exact(fx.Interpreter):
    """Runs a graph in float64, whatever types it was traced with. Reads tensors without changing them.

    values: those of tensors, by name, before they were rounded.
    """

    def __init__(self, module: fx.GraphModule, values: Mapping[str, Tensor] = MappingProxyType({})):
        super().__init__(module)
        self._values = values

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self._values[target] if target in self._values else super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor):  # a copy, for the graph may write to its buffers
            return value.double() if value.is_floating_point() and value.dtype != torch.float64 else value.clone()
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        prepared = _laid_out if getattr(target, "_opname", "").endswith("_like") else in_double  # noise is drawn in the order of memory
        args, kwargs = fx.node.map_aggregate(args, prepared), fx.node.map_aggregate(kwargs, prepared)
        return super().call_function(target, args, kwargs)  # type: ignore[arg-type]


class Masked(Exact):
    """`Exact`, in which every operator that reads a removed channel reads zero.

    Operators that work entry by entry, or only rearrange entries, do not read across channels: what they make of a removed
    channel is itself removed, and is ignored by whoever reads it next.
    """

    def __init__(self, graph: Graph, types: Types, keep: Keep):
        super().__init__(graph.module)
        self._types, self._keep = types, keep
        self._batch = samples_in(graph.flat_inputs())
        self._masks: dict[int, tuple[Axis, Tensor | None]] = {}

    def run_node(self, n: fx.Node) -> Any:
        name = operator_name(n)
        if n.op == "get_attr":
            if n.users and all(_weighs(n, user) for user in n.users):  # zeros in their input silence it, and it is large: no copy
                return fx.Interpreter.get_attr(self, n.target, (), {})  # type: ignore[arg-type]
            value = super().run_node(n)
            return value if n in self._types.constants else self._without(value, self._types.nodes.get(n))  # once for all readers
        if n.op != "call_function" or name in _ENTRY_BY_ENTRY or n.target is operator.getitem:
            return super().run_node(n)
        if name in _LINEAR and (answer := self._shorter_sums(n)) is not None:
            return answer
        written = n.args[0] if n.args and has_effect(n) else None  # an operator in place needs the tensor itself
        silenced = n.args[1] if name in _LINEAR else None
        alone = self._alone(n)
        args = fx.map_arg(n.args, lambda a: self.env[a] if a is written or a is silenced else self._read(a, alone))
        kwargs = fx.map_arg(n.kwargs, lambda a: self._read(a, alone))
        operand = n.args[0] if n.args else None
        if name in _OVER_KEPT and isinstance(operand, fx.Node):
            masks = self._masks_of(self._types.nodes[operand], self.env[operand])
            if any(mask is not None for mask in masks):
                given = named_arguments(n, args, kwargs)
                return _OVER_KEPT[name](masks, given.pop(next(iter(given))), **given)
        answer = self.call_function(n.target, args, kwargs)
        for dim, mask in alone.items():
            answer = _with_removed(answer, dim, mask)
        return answer

    def _shorter_sums(self, n: fx.Node) -> Tensor | None:
        """What a linear operator makes of the entries that stay; None where it has groups, or is no plain sum."""
        given = named_arguments(n, n.args, n.kwargs)
        source, bias = given.pop("input"), given.pop("bias", None)
        x, weight = self.env[source], self.env[given.pop("weight")]
        if weight.dim() < 2 or given.get("groups", 1) != 1 or RULES[operator_name(n)] is contraction.conv_transpose:
            return None
        channels = x.dim() - weight.dim() + 1
        read = self._mask(self._types.shape(source)[channels], x.shape[channels])
        made = self._mask(self._types.shape(n)[channels], weight.shape[0])
        if any(mask is not None and not mask.any() for mask in (read, made)):  # torch has no convolutions without channels
            return None
        bias = self._read(bias) if bias is not None else None
        if made is not None:
            stays = made.nonzero()[:, 0]
            weight, bias = (v if v is None else v.index_select(0, stays) for v in (weight, bias))
        if read is not None:
            x, weight = (v.index_select(d, read.nonzero()[:, 0]) for v, d in ((x, channels), (weight, 1)))
        answer = self.call_function(n.target, (x, weight, bias), given)
        return answer if made is None else _with_removed(answer, channels, made)

    def _alone(self, n: fx.Node) -> dict[int, Tensor]:
        """Masks by axis, counted from the last, of heads that a product or a softmax treats each by itself: those that go are left out."""
        name, answer = operator_name(n), n.meta["val"]
        operands = [self.env[a] for a in n.all_input_nodes if isinstance(self.env[a], Tensor)]
        if name in _SOFTMAX and answer.dim():
            along = named_arguments(n, n.args, n.kwargs)["dim"]
            axes = set(range(-answer.dim(), 0)) - {along % answer.dim() - answer.dim()}
        elif name in _OF_MATRICES and all(operand.dim() > 1 for operand in operands):
            axes = set(range(-answer.dim(), -2))
        else:
            return {}
        found: dict[int, Tensor] = {}
        for d in sorted(axes) if answer.is_floating_point() else ():
            mask = self._mask(self._types.nodes[n][d], max(operand.shape[d] for operand in operands if operand.dim() >= -d))
            if mask is not None and mask.any() and not mask.all():
                found[d] = mask
        return found

    def _read(self, node: fx.Node, alone: Collection[int] = ()) -> Any:
        """A node's answer with the entries of removed channels set to zero; along the axes in `alone`, counted from the last, without them."""
        masked = node.op == "get_attr" and node not in self._types.constants and not alone
        return self.env[node] if masked else self._without(self.env[node], self._types.nodes.get(node), alone)

    def _without(self, value: Any, found: Any, alone: Collection[int] = ()) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(found, list):
            return type(value)(self._without(v, f) for v, f in zip(value, found, strict=True))
        if isinstance(value, Tensor) and isinstance(found, tuple):
            for dim, mask in enumerate(self._masks_of(found, value)):
                if mask is not None and dim - value.dim() in alone:
                    value = value.index_select(dim, mask.nonzero()[:, 0])
                elif mask is not None:
                    value = torch.where(mask.view([-1 if d == dim else 1 for d in range(value.dim())]), value, torch.zeros((), dtype=value.dtype))
        return value

    def _masks_of(self, shape: tuple[Axis, ...], value: Tensor) -> list[Tensor | None]:
        """For every axis the truth of 'this entry stays', or None where all do."""
        return [self._mask(axis, size) for axis, size in zip(shape, value.shape, strict=True)]

    def _mask(self, axis: Axis, size: int) -> Tensor | None:
        if id(axis) not in self._masks:
            known = self._types.solver.resolve(axis)
            mask = None
            if any(atom in self._keep for atom in self._types.solver.atoms(known)):
                mask = torch.zeros(known.size, dtype=torch.bool)
                mask[torch.as_tensor(kept_entries(known, self._keep))] = True
            self._masks[id(axis)] = axis, mask  # holds the axis, so that its id stays its own
        mask = self._masks[id(axis)][1]
        return mask if mask is None or len(mask) == size else self._of_another_batch(mask, size)

    def _of_another_batch(self, mask: Tensor, size: int) -> Tensor:
        """Of an axis of batch · channels, when the batch is not the one of the trace. Raises RuntimeError for what is no such axis."""
        one = mask[: len(mask) // self._batch]
        if len(mask) % self._batch or size % len(one) or not torch.equal(one.repeat(self._batch), mask):
            raise RuntimeError(f"an axis of {len(mask)} entries has {size} at another batch")
        return one.repeat(size // len(one))


def _with_removed(answer: Tensor, dim: int, stays: Tensor) -> Tensor:
    """An answer that was computed for the entries that stay alone, with the others in their places.

    These are NaN: an operator that is wrongly taken not to read across channels gives itself away.
    """
    dim %= answer.dim()
    whole = answer.new_full([*answer.shape[:dim], len(stays), *answer.shape[dim + 1 :]], torch.nan)
    return whole.index_copy_(dim, stays.nonzero()[:, 0], answer)


def _weighs(weight: fx.Node, user: fx.Node) -> bool:
    """Whether a node is a linear operator's weight and nothing else to it."""
    return operator_name(user) in _LINEAR and user.args[1] is weight and weight not in (user.args[0], *user.args[2:])


# --- operators whose arithmetic depends on how many entries there are ---------------------------------------------------------


def _weights(masks: list[Tensor | None], x: Tensor, dims: list[int]) -> Tensor:
    """1 for the entries that stay and 0 for the others, in a shape that broadcasts against x."""
    weight = torch.ones([x.shape[d] if d in dims else 1 for d in range(x.dim())], dtype=x.dtype)
    for dim in dims:
        mask = masks[dim]
        if mask is not None:
            weight = weight * mask.to(x.dtype).view([-1 if d == dim else 1 for d in range(x.dim())])
    return weight


def _dims(x: Tensor, dim: Any) -> list[int]:
    """The dimensions that a reduction runs over."""
    return [d % x.dim() for d in (dim if isinstance(dim, (list, tuple)) else [dim])] if dim not in (None, []) else list(range(x.dim()))


def _mean(masks: list[Tensor | None], x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    dims = _dims(x, dim)
    weight = _weights(masks, x, dims)
    return (x * weight).sum(dims, keepdim=keepdim) / weight.sum()


def _variance(
    masks: list[Tensor | None], x: Tensor, dim: Any = None, correction: float | None = None, keepdim: bool = False, unbiased: bool = True
) -> Tensor:
    """Σ(x - mean)² / (entries - correction); correction is 1 where neither it nor `unbiased` is given."""
    dims = _dims(x, dim)
    stays = _weights(masks, x, dims)
    squares = ((x - _mean(masks, x, dims, keepdim=True)).square() * stays).sum(dims, keepdim=keepdim)
    return squares / (stays.sum() - (float(unbiased) if correction is None else correction))


def _deviation(masks: list[Tensor | None], x: Tensor, **given: Any) -> Tensor:
    return _variance(masks, x, **given).sqrt()


def _variance_mean(masks: list[Tensor | None], x: Tensor, dim: Any = None, keepdim: bool = False, **given: Any) -> tuple[Tensor, Tensor]:
    return _variance(masks, x, dim, keepdim=keepdim, **given), _mean(masks, x, dim, keepdim)


def _deviation_mean(masks: list[Tensor | None], x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _variance_mean(masks, x, **given)
    return variance.sqrt(), mean


def _layer_norm(
    masks: list[Tensor | None], x: Tensor, normalized_shape: list[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, **_: Any
) -> Tensor:
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    stays = _weights(masks, x, dims)
    centred = x - (x * stays).sum(dims, keepdim=True) / stays.sum()
    out = centred / ((centred.square() * stays).sum(dims, keepdim=True) / stays.sum() + eps).sqrt()
    return _affine(out, weight, bias)


def _rms_norm(masks: list[Tensor | None], x: Tensor, normalized_shape: list[int], weight: Any = None, eps: float | None = None) -> Tensor:
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    stays = _weights(masks, x, dims)
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x / ((x.square() * stays).sum(dims, keepdim=True) / stays.sum() + floor).sqrt(), weight, None)


def _group_norm(masks: list[Tensor | None], x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, **_: Any) -> Tensor:
    stays = torch.ones(x.shape[1], dtype=x.dtype) if masks[1] is None else masks[1].to(x.dtype)
    split = x.reshape(x.shape[0], num_groups, -1)
    counts = stays.view(num_groups, -1, 1).expand(-1, -1, split.shape[2] // (x.shape[1] // num_groups)).reshape(1, num_groups, -1)
    number = counts.sum(2, keepdim=True).clamp_min(1)  # a removed group has no entries, and no readers
    centred = split - (split * counts).sum(2, keepdim=True) / number
    out = (centred / ((centred.square() * counts).sum(2, keepdim=True) / number + eps).sqrt()).reshape(x.shape)
    one_channel = [1, -1] + [1] * (x.dim() - 2)
    return _affine(out, weight if weight is None else weight.view(one_channel), bias if bias is None else bias.view(one_channel))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_OVER_KEPT: dict[str, Callable[..., Any]] = {
    "mean": _mean,
    "var": _variance,
    "std": _deviation,
    "var_mean": _variance_mean,
    "std_mean": _deviation_mean,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}

_OF_MATRICES = frozenset({"matmul", "bmm", "scaled_dot_product_attention"})

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"})

_LINEAR = frozenset(name for name, function in RULES.items() if function in contraction.WEIGHED)

_ENTRY_BY_ENTRY = frozenset(
    name
    for name, function in RULES.items()
    if function in (elementwise.unary, elementwise.broadcasting, elementwise.assignment, elementwise.prelu, normalization.batch_norm)
    or function.__module__ in (layout.__name__, joining.__name__)
)
