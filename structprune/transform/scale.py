"""Attention in the user's own class computes 1/√width of the width that it finds, some norms √width; the small model keeps the original scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from structprune.analysis.infer import Types
from structprune.ir.axes import Axis, Keep, kept_size
from structprune.ir.graph import Graph, owners_of
from structprune.ir.operators import operator_name
from structprune.ops import RULES, layout
from structprune.transform.attention import attend

_PRODUCTS = ("matmul", "bmm")
_LAYOUTS = frozenset(name for name, rule in RULES.items() if rule.__module__ == layout.__name__)
_TIMES = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})
_OVER = frozenset({"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"})


@dataclass(frozen=True)
class Scale:
    """1/√width of queries and keys, or √width: of the original's width, and of what is left of it.

    in_code: the code computes it, not the operator alone; of_attention: it is that of attention, or else of a norm.
    """

    width: int
    left: int
    in_code: bool
    of_attention: bool = True

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.width)

    def held(self, number: Any) -> Any:
        """A number that was computed from the width that is left, as the original has it; any other as it is."""
        if self.in_code and isinstance(number, float):
            for power in (-0.5, 0.5):
                if _same(number, self.left**power):
                    return self.width**power
        return number


def changed_scales(graph: Graph, types: Types, keep: Keep) -> dict[str, Scale]:
    """Modules that compute a scale from a width of which some is lost: attention, as a number or by leaving it to the operator, and norms."""
    widths = {atom: len(entries) for atom, entries in keep.items()}
    attention: dict[str, Scale] = {}
    others: dict[str, Scale] = {}
    for node in graph.nodes:
        is_of = _width_of_scale(graph, node)
        if not owners_of(node) or not isinstance(node.meta.get("val"), Tensor) or is_of is None:
            continue  # among others, code that computes with sizes: 0.5 * x.shape[1]
        owner, in_code = owners_of(node)[0], is_of is not _any_width
        for axis in _widths_of_queries(node, types):
            left = kept_size(axis, widths)
            if 0 < left < axis.size and is_of(axis.size):
                attention[owner] = Scale(axis.size, left, in_code or (owner in attention and attention[owner].in_code))
        for axis in types.shape(node) if operator_name(node) in ("mul", "div") else ():
            left = kept_size(axis, widths)
            if 0 < left < axis.size and is_of(axis.size):
                others[owner] = Scale(axis.size, left, in_code=True, of_attention=False)
    return others | attention


def narrowed(model: nn.Module, tensors: Mapping[int, Tensor]) -> dict[str, Scale]:
    """torch's own attention whose heads together are, in the small `tensors`, no longer as wide as what it reads, as its code takes for granted."""

    def small(tensor: Tensor) -> Tensor:
        return tensors.get(id(tensor), tensor)

    found: dict[str, Scale] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            width, heads = small(module.out_proj.weight).shape
            packed = module.in_proj_weight
            queries = len(small(module.q_proj_weight)) if packed is None else len(small(packed)) / 3
            if not heads == queries == width:
                found[name] = Scale(module.head_dim, module.head_dim, in_code=False)
    return found


def _is_scale(factor: float, width: int) -> bool:
    return _same(factor, width**-0.5) or _same(factor, width**0.5)


def _widths_of_queries(node: fx.Node, types: Types) -> Sequence[Axis]:
    """Of queries or keys that a node scales, themselves or in their product."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return ()
    return (operator_name(node) in ("mul", "div") and _contracted(source, types)) or types.shape(source)[-1:]


def _contracted(node: fx.Node, types: Types) -> Sequence[Axis]:
    """What a product sums over, or one that is laid out anew, or one that goes into a sum (scores of content and of position)."""
    name = operator_name(node)
    if name in _PRODUCTS:
        return types.shape(node.args[0])[-1:]
    if name == "einsum":
        answer = types.shape(node)
        return [axis for axis in types.shape(node.args[1][0]) if axis not in answer]  # type: ignore[index, arg-type]
    if name == "sum" and (axes := node.args[1:2]) and isinstance(axes[0], list):  # of products entry by entry
        return [types.shape(node.args[0])[axis] for axis in axes[0]]  # type: ignore[index]
    terms = node.all_input_nodes if name == "add" or name in _LAYOUTS else ()
    return next((found for term in terms if (found := _contracted(term, types))), ())


def _width_of_scale(graph: Graph, node: fx.Node) -> Callable[[int], bool] | None:
    """Whether what a node scales by was computed from a width; None for a node that scales nothing.

    From a number, that is 1/√width or √width; of a tensor, a width that code made one of is all that it was computed from.
    """
    name = operator_name(node)
    if name == "scaled_dot_product_attention":
        scale = node.kwargs.get("scale")
        return partial(_is_scale, scale) if isinstance(scale, float) and scale else _any_width
    if name not in ("mul", "div"):
        return None
    number = node.args[1]
    if isinstance(number, fx.Node):
        numbers = _numbers_behind(graph, number)
        return numbers.__contains__ if numbers else None
    return partial(_is_scale, number) if isinstance(number, float) and number else None


def _any_width(width: int) -> bool:
    """Attention that leaves its scale to the operator has that of whatever width it finds."""
    return True


def _numbers_behind(graph: Graph, node: fx.Node) -> frozenset[float]:
    """The numbers that code made tensors of, where a node is computed of such alone: of `torch.sqrt(torch.tensor(width))` the width."""
    found: set[float] = set()
    reached = [node]
    for source in reached:  # grows while it is walked
        value = source.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() or source.op == "placeholder" or str(source.target) in graph.aliases:
            return frozenset()
        if source.op == "get_attr":
            found.add(graph.tensor(source).item())
        reached.extend(n for n in source.all_input_nodes if n not in reached)
    return frozenset(found)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)


def hold_scales(model: nn.Module, scales: Mapping[str, Scale]) -> dict[str, Held]:
    """Put hooks on `model` under which the attention of these modules takes the scales of the original."""
    return {name: Held(model.get_submodule(name), scale) for name, scale in scales.items()}


class Held:
    """Hooks around a module's forward, which may call itself. `needed`: whether something in it computed a scale from the width, or is torch's own
    attention, which computes all of itself.
    """

    def __init__(self, module: nn.Module, scale: Scale):
        self.needed = False
        self._scale = scale
        self._entered: list[_Scaled] = []
        self._hooks = module.register_forward_pre_hook(self.enter), module.register_forward_hook(self.leave, always_call=True)

    def enter(self, *_: Any) -> None:
        self._entered.append(_Scaled(self, self._scale))
        self._entered[-1].__enter__()

    def leave(self, *_: Any) -> None:
        self._entered.pop().__exit__(None, None, None)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Scaled(TorchFunctionMode):
    def __init__(self, held: Held, scale: Scale):
        super().__init__()
        self._held, self._scale = held, scale

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.multi_head_attention_forward:
            self._held.needed = True
            return attend(self._scale.factor, *args, **kwargs)
        if function is F.scaled_dot_product_attention:
            said = kwargs.get("scale")
            kwargs["scale"] = self._scale.factor if said is None else self._scale.held(said)
            self._held.needed |= kwargs["scale"] != said
        elif function is torch.tensor and self._scale.in_code and args and type(args[0]) in (int, float) and args[0] == self._scale.left:
            self._held.needed = True
            args = (type(args[0])(self._scale.width), *args[1:])  # of which code is about to take the root
        elif getattr(function, "__name__", "") in _TIMES | _OVER:
            held = tuple(map(self._scale.held, args))
            self._held.needed |= any(new is not old for new, old in zip(held, args, strict=True))
            args = held
        return function(*args, **kwargs)
