"""The reference: the dense graph, run operator by operator, in which every removed channel counts for nothing.

It knows axis types and which entries of each atom stay, but nothing of slicing, of resized literals or of the small graph:
after each operator the entries of removed channels are set to zero, so that whoever reads them ignores them. Means and norms over
a pruned axis are computed from their definition, over the kept entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from structprune.analysis.infer import Types
from structprune.ir.axes import Axis, Keep, kept_entries
from structprune.ir.graph import Graph, operator_name


def in_double(value: Any) -> Any:
    """Floating-point tensors and types, in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if value in (torch.float32, torch.float16, torch.bfloat16) else value


class Exact(fx.Interpreter):
    """Runs a graph in float64, whatever types it was traced with. Reads tensors without changing them."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return in_double(value).clone() if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_aggregate(args, in_double), fx.node.map_aggregate(kwargs, in_double)
        return super().call_function(target, args, kwargs)  # type: ignore[arg-type]


class Masked(Exact):
    """`Exact`, with removed channels counting for nothing."""

    def __init__(self, graph: Graph, types: Types, keep: Keep):
        super().__init__(graph.module)
        self._types, self._keep = types, keep
        self._masks: dict[int, tuple[Axis, Tensor | None]] = {}

    def run_node(self, n: fx.Node) -> Any:
        special = _OVER_KEPT.get(operator_name(n)) if n.op == "call_function" else None
        operand = n.args[0] if n.args else None
        if special is not None and isinstance(operand, fx.Node) and any(m is not None for m in self._masks_of(self._types.nodes[operand])):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            masks = self._masks_of(self._types.nodes[operand])
            schema = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
            named = dict(zip(schema, args, strict=False)) | kwargs
            result = special(masks, *named.values())
        else:
            result = super().run_node(n)
        return self._forget(result, self._types.nodes.get(n))

    def _forget(self, result: Any, found: Any) -> Any:
        """Set the removed entries of an answer to zero, in place where other tensors may share its memory."""
        if isinstance(result, (list, tuple)) and isinstance(found, list):
            return type(result)(self._forget(r, f) for r, f in zip(result, found, strict=True))
        if not isinstance(result, Tensor) or not isinstance(found, tuple) or not (result.is_floating_point() or result.is_complex()):
            return result
        for dim, mask in enumerate(self._masks_of(found)):
            if mask is not None:
                if any(stride == 0 and size > 1 for stride, size in zip(result.stride(), result.shape, strict=True)):
                    result = result.clone()
                result.index_fill_(dim, mask.logical_not().nonzero().flatten(), 0)
        return result

    def _masks_of(self, shape: tuple[Axis, ...]) -> list[Tensor | None]:
        """For every axis the truth of 'this entry stays', or None where all do."""
        return [self._mask(axis) for axis in shape]

    def _mask(self, axis: Axis) -> Tensor | None:
        if id(axis) not in self._masks:
            known = self._types.solver.resolve(axis)
            mask = None
            if any(atom in self._keep for atom in self._types.solver.atoms(known)):
                mask = torch.zeros(known.size, dtype=torch.bool)
                mask[torch.as_tensor(kept_entries(known, self._keep))] = True
            self._masks[id(axis)] = axis, mask  # holds the axis, so that its id stays its own
        return self._masks[id(axis)][1]


# --- operators whose arithmetic depends on how many entries there are ---------------------------------------------------------


def _weights(masks: list[Tensor | None], x: Tensor, dims: list[int]) -> Tensor:
    """1 for the entries that stay and 0 for the others, in a shape that broadcasts against x."""
    weight = torch.ones([x.shape[d] if d in dims else 1 for d in range(x.dim())], dtype=x.dtype)
    for dim in dims:
        mask = masks[dim]
        if mask is not None:
            weight = weight * mask.to(x.dtype).view([-1 if d == dim else 1 for d in range(x.dim())])
    return weight


def _mean(masks: list[Tensor | None], x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    dims = [d % x.dim() for d in (dim if isinstance(dim, (list, tuple)) else [dim])] if dim not in (None, []) else list(range(x.dim()))
    weight = _weights(masks, x, dims)
    return (x * weight).sum(dims, keepdim=keepdim) / weight.sum()


def _layer_norm(masks: list[Tensor | None], x: Tensor, shape: list[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    dims = list(range(x.dim() - len(shape), x.dim()))
    stays = _weights(masks, x, dims)
    centred = x - (x * stays).sum(dims, keepdim=True) / stays.sum()
    out = centred / ((centred.square() * stays).sum(dims, keepdim=True) / stays.sum() + eps).sqrt()
    return _affine(out, weight, bias)


def _rms_norm(masks: list[Tensor | None], x: Tensor, shape: list[int], weight: Any = None, eps: float | None = None, *_: Any) -> Tensor:
    dims = list(range(x.dim() - len(shape), x.dim()))
    stays = _weights(masks, x, dims)
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x / ((x.square() * stays).sum(dims, keepdim=True) / stays.sum() + floor).sqrt(), weight, None)


def _group_norm(masks: list[Tensor | None], x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    stays = torch.ones(x.shape[1], dtype=x.dtype) if masks[1] is None else masks[1].to(x.dtype)
    split = x.reshape(x.shape[0], groups, -1)
    counts = stays.view(groups, -1, 1).expand(-1, -1, split.shape[2] // (x.shape[1] // groups)).reshape(1, groups, -1)
    number = counts.sum(2, keepdim=True).clamp_min(1)  # a removed group has no entries, and no readers
    centred = split - (split * counts).sum(2, keepdim=True) / number
    out = (centred / ((centred.square() * counts).sum(2, keepdim=True) / number + eps).sqrt()).reshape(x.shape)
    one_channel = [1, -1] + [1] * (x.dim() - 2)
    return _affine(out, weight if weight is None else weight.view(one_channel), bias if bias is None else bias.view(one_channel))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_OVER_KEPT: dict[str, Callable[..., Tensor]] = {
    "mean": _mean,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}
