"""Models on a GPU are analysed, cut and checked on the CPU: in float64, and against copies that a GPU may have no room for."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

Values = TypeVar("Values")


def device_of(model: nn.Module) -> torch.device:
    """Where the first tensor lies that is not on the CPU; the CPU where all are."""
    places = (t.device for t in [*model.parameters(), *model.buffers()])
    return next((place for place in places if place.type not in ("cpu", "meta")), torch.device("cpu"))


def on_cpu(model: nn.Module) -> nn.Module:
    """The model itself, or a copy of it on the CPU, tensors that are plain attributes included, where some are elsewhere or of inference mode."""
    if device_of(model).type == "cpu" and not any(t.is_inference() for t in [*model.parameters(), *model.buffers()] if not is_lazy(t)):
        return model
    memo: dict[int, Any] = {}
    for tensor in pytree.tree_leaves([vars(part) for part in model.modules()]):
        if isinstance(tensor, Tensor):
            there = tensor_on_cpu(tensor).detach()
            memo[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
    return copy.deepcopy(model, memo)


def values_on_cpu(values: Values) -> Values:
    """The same, with every tensor on the CPU."""
    return pytree.tree_map_only(Tensor, tensor_on_cpu, values)  # type: ignore[no-any-return]


def tensor_on_cpu(tensor: Tensor) -> Tensor:
    """Itself or a copy, with which derivatives can be taken: not with what was made in inference mode."""
    there = tensor.cpu()
    return there.clone() if there.is_inference() else there
