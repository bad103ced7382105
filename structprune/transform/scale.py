"""Attention in the user's own class computes 1/√width of the width that it finds; the small model keeps the scale of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from structprune.analysis.infer import Types
from structprune.ir.axes import Keep, kept_size
from structprune.ir.graph import Graph, operator_name, owners_of, shape_of


def changed_scales(graph: Graph, types: Types, keep: Keep) -> dict[str, float]:
    """Modules whose attention leaves the scale to the operator and loses width: the scale that each had."""
    widths = {atom: len(entries) for atom, entries in keep.items()}
    found = {}
    for node in graph.nodes:
        if operator_name(node) == "scaled_dot_product_attention" and node.kwargs.get("scale") is None and isinstance(query := node.args[0], fx.Node):
            width = shape_of(query.meta["val"])[-1]
            if kept_size(types.shape(query)[-1], widths) < width and owners_of(node):
                found[owners_of(node)[0]] = 1 / math.sqrt(width)
    return found


def hold_scales(model: nn.Module, scales: Mapping[str, float]) -> list[Held]:
    """Put hooks on `model` under which the attention of these modules takes these scales."""
    return [Held(model.get_submodule(name), scale) for name, scale in scales.items()]


class Held:
    """Hooks around a module's forward, which may call itself. `needed`: whether some attention left its scale to be computed."""

    def __init__(self, module: nn.Module, scale: float):
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
    def __init__(self, held: Held, scale: float):
        super().__init__()
        self._held, self._scale = held, scale

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            kwargs["scale"] = self._scale
            self._held.needed = True
        return function(*args, **kwargs)
