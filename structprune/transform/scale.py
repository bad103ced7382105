"""Attention in the user's own class computes 1/√width of the width that it finds; the small model keeps the scale of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from structprune.analysis.infer import Types
from structprune.ir.axes import Keep, kept_size
from structprune.ir.graph import Graph, owners_of, shape_of
from structprune.ir.operators import operator_name

_PRODUCTS = ("matmul", "bmm")
_TIMES = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})
_OVER = frozenset({"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"})


@dataclass(frozen=True)
class Scale:
    """1/√width of queries and keys: of the original's width, and of what is left of it. `in_code`: the code computes it, not the operator alone."""

    width: int
    left: int
    in_code: bool

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
    """Modules whose attention loses width and computes its scale from that: by leaving it to the operator, or as a number."""
    widths = {atom: len(entries) for atom, entries in keep.items()}
    found: dict[str, Scale] = {}
    for node in graph.nodes:
        query = _query(node)
        if query is None or not owners_of(node):
            continue
        width, left = shape_of(query.meta["val"])[-1], kept_size(types.shape(query)[-1], widths)
        if not 0 < left < width:
            continue
        in_code = _same(_factor(node), 1 / math.sqrt(width))
        if in_code or not _factor(node):
            owner = owners_of(node)[0]
            found[owner] = Scale(width, left, in_code or (owner in found and found[owner].in_code))
    return found


def _query(node: fx.Node) -> fx.Node | None:
    """The queries or keys that a node may scale, themselves or in their product, the width on the last axis."""
    if operator_name(node) == "scaled_dot_product_attention":
        source = node.args[0]
    else:
        source = node.args[0] if _factor(node) else None
        source = _of_product(source) or source
    return source if isinstance(source, fx.Node) and shape_of(source.meta["val"]) else None


def _of_product(node: Any) -> fx.Node | None:
    """The first factor of a matrix product, or of one that goes into a sum (scores of content and of position)."""
    if isinstance(node, fx.Node) and operator_name(node) in _PRODUCTS:
        return node.args[0]  # type: ignore[return-value]
    terms = node.all_input_nodes if isinstance(node, fx.Node) and operator_name(node) == "add" else ()
    return next((found for term in terms if (found := _of_product(term)) is not None), None)


def _factor(node: fx.Node) -> float:
    """The number that a node multiplies by, or that attention is told to; 0 for any other node."""
    if operator_name(node) == "scaled_dot_product_attention":
        return node.kwargs.get("scale") or 0.0  # type: ignore[return-value]
    if operator_name(node) not in ("mul", "div") or not isinstance(number := node.args[1], float) or not number:
        return 0.0
    return number if operator_name(node) == "mul" else 1 / number


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)


def hold_scales(model: nn.Module, scales: Mapping[str, Scale]) -> dict[str, Held]:
    """Put hooks on `model` under which the attention of these modules takes the scales of the original."""
    return {name: Held(model.get_submodule(name), scale) for name, scale in scales.items()}


class Held:
    """Hooks around a module's forward, which may call itself. `needed`: whether some attention computed its scale from the width."""

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
        if function is F.scaled_dot_product_attention:
            said = kwargs.get("scale")
            kwargs["scale"] = self._scale.factor if said is None else self._scale.held(said)
            self._held.needed |= kwargs["scale"] != said
        elif getattr(function, "__name__", "") in _TIMES | _OVER:
            held = tuple(map(self._scale.held, args))
            self._held.needed |= any(new is not old for new, old in zip(held, args, strict=True))
            args = held
        return function(*args, **kwargs)
