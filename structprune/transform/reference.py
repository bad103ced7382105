"""The reference: the dense graph, run operator by operator, in which every removed channel counts for nothing.

It knows axis types and which entries of each atom stay, but nothing of a plan's slices, of resized literals or of the small graph:
wherever an operator reads across channels, it reads zeros for the removed ones. Convolutions and linear layers, in which most of the time goes,
leave the zeros out of their sums, and attention leaves out whole heads. Means, variances and norms over a pruned axis are those of the kept
entries alone.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
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
        if n.op != "call_function" or name in _ENTRY_BY_ENTRY or n.target is operator.getitem or self._row_by_row(n):
            return super().run_node(n)
        if name in _LINEAR and (answer := self._shorter_sums(n)) is not None:
            return answer
        if name in _MEANS | _NORMS and (answer := self._over_kept(n)) is not None:
            return answer
        written = n.args[0] if n.args and has_effect(n) else None  # an operator in place needs the tensor itself
        weight = n.args[1] if name in _LINEAR else None
        silenced = weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None  # by zeros in its input; a computed one may hold NaN
        alone = self._alone(n)
        args = fx.map_arg(n.args, lambda a: self.env[a] if a is written or a is silenced else self._read(a, alone))
        kwargs = fx.map_arg(n.kwargs, lambda a: self._read(a, alone))
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

    def _over_kept(self, n: fx.Node) -> Any:
        """What a mean, a norm, or another operator that counts entries makes of those that stay; None where all do."""
        source, *rest = n.args
        assert isinstance(source, fx.Node)
        given = named_arguments(n, (source, *fx.map_arg(rest, self._read)), fx.map_arg(n.kwargs, self._read))
        del given[next(iter(given))]
        x, shape = self.env[source], self._types.nodes[source]
        dims = _dims_across(operator_name(n), x, given)
        masks = {d: mask for d in dims if (mask := self._mask(shape[d], x.shape[d])) is not None and mask.any()}
        if not masks:
            return None
        if operator_name(n) == "group_norm":
            return self._group_by_group(n, x, masks[1], given)
        scales = [name for name in ("weight", "bias") if given.get(name) is not None]  # of a norm, over the same dimensions
        for d, mask in masks.items():
            kept = mask.nonzero()[:, 0]
            x = x.index_select(d, kept)
            given |= {name: given[name].index_select(d - dims[0], kept) for name in scales}
        if operator_name(n) in _MEANS:
            return self.call_function(n.target, (x,), given)
        answer = self.call_function(n.target, (x,), given | {"normalized_shape": list(x.shape[dims[0] :])})
        for d, mask in masks.items():
            answer = _with_removed(answer, d, mask)
        return answer

    def _group_by_group(self, n: fx.Node, x: Tensor, mask: Tensor, given: Mapping[str, Any]) -> Tensor:
        """A group norm, each of the original's groups by itself: those of the small model may be others by mistake."""
        answers = []
        for kept in mask.nonzero()[:, 0].split(mask.view(given["num_groups"], -1).sum(1).tolist()):
            if len(kept):
                own = {name: given[name].index_select(0, kept) for name in ("weight", "bias") if given.get(name) is not None}
                answers.append(self.call_function(n.target, (x.index_select(1, kept),), {**given, **own, "num_groups": 1}))
        return _with_removed(torch.cat(answers, 1), 1, mask)

    def _row_by_row(self, n: fx.Node) -> bool:
        """Whether this is a softmax along an axis of which all entries stay: each row by itself."""
        if operator_name(n) not in _SOFTMAX:
            return False
        dim = named_arguments(n, n.args, n.kwargs)["dim"]
        return not n.meta["val"].dim() or self._mask(self._types.shape(n)[dim], n.meta["val"].shape[dim]) is None

    def _alone(self, n: fx.Node) -> dict[int, Tensor]:
        """Masks by axis, counted from the last, of heads that a product treats each by itself: those that go are left out."""
        name, answer = operator_name(n), n.meta["val"]
        operands = [self.env[a] for a in n.all_input_nodes if isinstance(self.env[a], Tensor)]
        if name not in _OF_MATRICES or not answer.is_floating_point() or any(operand.dim() < 2 for operand in operands):
            return {}
        found: dict[int, Tensor] = {}
        for d in range(-answer.dim(), -2):
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


def _dims_across(name: str, x: Tensor, given: Mapping[str, Any]) -> list[int]:
    """Which dimensions of its first operand a mean or a norm reads across."""
    if name == "group_norm":
        return [1]
    if name in _NORMS:
        return list(range(x.dim() - len(given["normalized_shape"]), x.dim()))
    dim = given.get("dim")
    return [d % x.dim() for d in (dim if isinstance(dim, (list, tuple)) else [dim])] if dim not in (None, []) else list(range(x.dim()))


_MEANS = frozenset({"mean", "var", "std", "var_mean", "std_mean"})

_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm"})

_OF_MATRICES = frozenset({"matmul", "bmm", "scaled_dot_product_attention"})

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"})

_LINEAR = frozenset(name for name, function in RULES.items() if function in contraction.WEIGHED)

_ENTRY_BY_ENTRY = frozenset(
    name
    for name, function in RULES.items()
    if function in (elementwise.unary, elementwise.broadcasting, elementwise.assignment, elementwise.prelu, normalization.batch_norm)
    or function.__module__ in (layout.__name__, joining.__name__)
)
