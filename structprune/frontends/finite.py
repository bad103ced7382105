"""Numbers that no model computes with, and weights without any: found, and named, before anything is decided by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from structprune.errors import InputError


def must_be_finite(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> None:
    """Raise InputError that names the first weight or input with NaN or an infinity, or the first weight that holds no numbers of its own.

    Infinities in other buffers and -inf in inputs are masks; so is a parameter that is not trained, with nothing but -inf and one other number.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise InputError(f"{name} has no shape yet: its layer is lazy, and has seen no input; run the model on one before")
        if tensor.is_meta and isinstance(tensor, nn.Parameter):
            raise InputError(f"{name} is on the meta device, and has no values: load the weights before")
        if tensor.layout is not torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise InputError(f"{name} is stored as {layout}, whose entries cannot be cut out: make it dense, with .to_dense()")
        statistics = name.rpartition(".")[2] in ("running_mean", "running_var")
        bad = _odd(tensor, infinite=isinstance(tensor, nn.Parameter) or statistics)
        bad = "" if bad and _is_mask(tensor) else bad
        if bad:
            raise InputError(f"{name} holds {bad}: training diverged, or the file is damaged; load an earlier checkpoint")
    for path, value in pytree.tree_flatten_with_path((args, dict(kwargs or {})))[0]:
        bad = _odd(value.masked_fill(value == -torch.inf, 0), infinite=True) if isinstance(value, Tensor) and value.is_floating_point() else ""
        if bad:
            place = "".join(map(str, path[1:])) or "[0]"
            raise InputError(f"example input {place} holds {bad}; give one that the model was made for")


def _is_mask(tensor: Tensor) -> bool:
    if tensor.requires_grad or not tensor.is_floating_point():
        return False
    others = tensor[tensor != -torch.inf]
    return 0 < len(others) < tensor.numel() and bool(others[0].isfinite() & (others == others[0]).all())


def _odd(tensor: Tensor, infinite: bool) -> str:
    """In words, how many entries are NaN or, if asked for, infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta or not tensor.numel():
        return ""
    if bool(torch.stack(torch.view_as_real(tensor).aminmax() if tensor.is_complex() else tensor.aminmax()).isfinite().all()):
        return ""  # NaN is both: one pass, and nothing as large as the tensor
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum()) if infinite else 0
    words = [f"{number} {what}" for number, what in ((nan, "NaN"), (inf, "infinities" if inf > 1 else "infinity")) if number]
    return f"{' and '.join(words)} among {tensor.numel():,} values" if words else ""
