"""An oracle that shares no code with structprune: the original module, with the removed slices set to zero, must answer as the small one.

It reads nothing but the original and, for every tensor that shrank, the kept indices of each dimension; so it judges any pruner. Norms over
a pruned axis (layer, group, RMS norm, and a mean over one axis, which is an RMS norm written by hand) run over the kept entries. A layer that
standardises its weight uses the slices of the standardised one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Kept = Mapping[str, Mapping[int, Sequence[int]]]  # tensor -> dimension -> the indices that stay

TOLERANCE = 1e-6  # of what pruning changes; what float64 leaves is far below, one wrong channel among hundreds above
TOLERANCE_SINGLE = 2e-2  # where the small model runs in float32 only

_WEIGHED = (F.conv1d, F.conv2d, F.conv3d, F.linear)
_STATISTICS = (F.batch_norm, torch.mean, torch.var, torch.std, torch.var_mean, torch.std_mean, Tensor.mean, Tensor.var, Tensor.std)


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every norm statistics and affine terms of its own, so that a wrong slice shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype))
    return model


def masked(
    model: nn.Module, tensors: Kept, *, means: bool = True, dtype: torch.dtype = torch.float64, standardised: Mapping[str, Tensor] | None = None
) -> Masked:
    """The original in float64, or another type, with zeros where `tensors` cuts, to be called like the original.

    means: a mean along one axis runs over the entries that are not zero everywhere, where so many are kept of an axis of that size.
    standardised: see `standardised_weights`.
    """
    model = folded(copy.deepcopy(model).to(dtype).eval())
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    used = {name: weight.to(dtype, copy=True) for name, weight in (standardised or {}).items()}
    held |= used
    kept_of: dict[int, Tensor] = {}
    widths = set()
    for name, keep in tensors.items():
        values = held[name].detach()
        for dim, indices in keep.items():
            kept = torch.tensor(list(indices), dtype=torch.int64)
            assert len(set(indices)) == len(indices) and all(0 <= index < values.shape[dim] for index in indices), (name, dim)
            widths.add((values.shape[dim], len(kept)))
            if values.dim() == 1:
                kept_of[id(held[name])] = kept
            if values.is_floating_point() and not name.endswith("running_var"):
                removed = torch.ones(values.shape[dim], dtype=torch.bool).index_fill(0, kept, False)
                values.index_fill_(dim, removed.nonzero().squeeze(1), 0)
    return Masked(model, _OverKept(kept_of, widths if means else set(), _Layer(model), used))


class Masked:
    def __init__(self, model: nn.Module, mode: _OverKept):
        self.model, self._mode = model, mode

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one fused operator would hide its norms
        try:
            with self._mode:
                return self.model(*args)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def folded(model: nn.Module) -> nn.Module:
    """`model` itself, with its parametrizations (weight norm and such) replaced by the weights that they compute."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            module.__class__ = type(type(module).__name__, type(module).__bases__, dict(vars(type(module))))  # copies share one
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


class _Layer:
    """Which layer with a weight of its own runs: the last that was entered."""

    def __init__(self, model: nn.Module):
        self.name, self.weight = "", torch.zeros(0)
        for name, module in model.named_modules():
            if isinstance(weight := module._parameters.get("weight"), nn.Parameter) and weight.dim() > 1:
                module.register_forward_pre_hook(lambda *_, name=name, weight=weight: self._enter(f"{name}.weight", weight))

    def _enter(self, name: str, weight: Tensor) -> None:
        self.name, self.weight = name, weight


@torch.no_grad()
def standardised_weights(model: nn.Module, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """What layers make of their own weights by statistics over these, and use instead, in the model's own type, by the names of the raw ones."""
    model = folded(copy.deepcopy(model).eval())
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    if not any(isinstance(m, kinds) and type(m).forward not in [kind.forward for kind in kinds] for m in model.modules()):
        return {}
    layer, found, measured = _Layer(model), dict[str, Tensor](), set[str]()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in _STATISTICS and args[0].numel() == layer.weight.numel():
                measured.add(layer.name)
            if function in _WEIGHED and layer.name in measured and args[1] is not layer.weight and args[1].shape == layer.weight.shape:
                found[layer.name] = args[1]
            return function(*args, **(kwargs or {}))

    with Watch():
        model(*(v.clone() if isinstance(v, Tensor) else v for v in inputs))
    return found


class _OverKept(TorchFunctionMode):
    """Runs norms over the kept entries of their axis, and leaves zeros elsewhere; layers that standardise their weights with those of `used`."""

    def __init__(self, kept_of: Mapping[int, Tensor], widths: set[tuple[int, int]], layer: _Layer, used: Mapping[str, Tensor]):
        super().__init__()
        self._kept_of, self._widths, self._layer, self._used = kept_of, widths, layer, used

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _WEIGHED and self._layer.name in self._used:
            args = args[0], self._used[self._layer.name], *args[2:]
        if function in (F.layer_norm, F.rms_norm, F.group_norm):
            call = inspect.signature(function).bind(*args, **kwargs).arguments
            x, weight = call["input"], call.get("weight")
            kept = self._kept_of.get(id(weight))
            if weight is None and function is not F.group_norm:
                kept = self._live(x, x.dim() - 1)
            if kept is not None:
                return self._norm(function, call, x, kept) if len(kept) else torch.zeros_like(x)  # nobody reads it
        out = function(*args, **kwargs)
        if function in (torch.mean, Tensor.mean):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
            if isinstance(dim, int):
                kept = self._live(args[0], dim)
                return out if kept is None else out * (args[0].shape[dim] / len(kept))
        return out

    def _live(self, x: Tensor, dim: int) -> Tensor | None:
        """The entries along an axis that are not zero everywhere, if as many are kept of some axis of its size."""
        live = (x != 0).movedim(dim, 0).unsqueeze(-1).flatten(1).any(1).nonzero().squeeze(1)
        return live if (x.shape[dim], len(live)) in self._widths else None

    def _norm(self, function: Any, call: dict[str, Any], x: Tensor, kept: Tensor) -> Tensor:
        axis = 1 if function is F.group_norm else -1
        small = call | {"input": x.index_select(axis, kept)}
        small |= {name: call[name][kept] for name in ("weight", "bias") if isinstance(call.get(name), Tensor)}
        if function is F.group_norm:
            small["num_groups"] = len({int(k) // (x.shape[1] // call["num_groups"]) for k in kept})
        else:
            small["normalized_shape"] = (len(kept),)
        return torch.zeros_like(x).index_copy(axis, kept, function(**small))


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of an answer, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def error_of(model: nn.Module, small: nn.Module, tensors: Kept, inputs: Sequence[Any]) -> tuple[float, float]:
    """The largest difference between the small model and the masked original, as a share of what pruning changed; and what rounding may explain.

    In float64 where both run in it, else in float32. Raises AssertionError for answers of another number, shape, or that are not finite where the
    original's are.
    """

    def answers(of: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        values = [v.clone() if isinstance(v, Tensor) else v for v in inputs]  # a model may write to its inputs
        return floats(of(*(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)))

    def model_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(module).to(dtype).eval()

    wide, single, used = torch.float64, torch.float32, standardised_weights(model, inputs)
    try:
        wanted, dense = answers(masked(model, tensors, standardised=used), wide), answers(model_in(model, wide), wide)
    except RuntimeError:  # types are written into the original's code
        wide = single
        wanted, dense = answers(masked(model, tensors, dtype=single, standardised=used), single), answers(model_in(model, single), single)
    tolerance = TOLERANCE if wide == torch.float64 else TOLERANCE_SINGLE
    try:
        got = answers(model_in(small, wide), wide)
    except RuntimeError:  # or into the small one's
        got, tolerance = answers(model_in(small, single), single), TOLERANCE_SINGLE
    assert len(got) == len(wanted), f"{len(got)} tensors, the original gives {len(wanted)}"
    worst = 0.0
    for mine, theirs, before in zip(got, wanted, dense, strict=True):
        assert mine.shape == theirs.shape, f"an answer of shape {tuple(mine.shape)}, the original's is {tuple(theirs.shape)}"
        apart = (mine != theirs) & ~(mine.isnan() & theirs.isnan())
        if not apart.any():
            continue
        mine, theirs, before = mine[apart].double(), theirs[apart], before[apart]
        assert mine.isfinite().all(), "an answer that is not finite"
        scale, error = theirs.abs().max().item(), (mine - theirs).abs().max().item()
        if error > 1e-9 * max(scale, 1e-9):
            worst = max(worst, error / max((theirs - before).abs().max().item(), 1e-7 * scale, 1e-12))
    return worst, tolerance
