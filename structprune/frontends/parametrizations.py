"""Weights that torch computes of others (weight norm, spectral norm, masks of torch.nn.utils.prune) become plain ones."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.utils import parametrize, prune

from structprune.ir.graph import memo_for


def fold_parametrizations(model: nn.Module) -> nn.Module:
    """The model with every parametrized or masked weight replaced by its value; the model itself where there is none.

    Weight norm and spectral norm, new and old, and the masks of torch.nn.utils.prune.
    """
    if not any(parametrize.is_parametrized(m) or any(map(_folds, m._forward_pre_hooks.values())) for m in model.modules()):
        return model
    model = copy.deepcopy(model, memo_for(model))
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # A copy shares the class that holds its parametrized properties, and removing one would break the original.
            module.__class__ = type(type(module).__name__, type(module).__bases__, dict(vars(type(module))))
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        hook: Any
        for hook in [h for h in module._forward_pre_hooks.values() if _folds(h)]:
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            else:
                remove = nn.utils.remove_weight_norm if "WeightNorm" in type(hook).__name__ else nn.utils.remove_spectral_norm
                remove(module, hook.name)
    return model


def _folds(hook: Any) -> bool:
    """Whether a forward pre-hook computes a weight: of torch.nn.utils.weight_norm and spectral_norm of old, or of torch.nn.utils.prune."""
    return hasattr(hook, "compute_weight") or isinstance(hook, prune.BasePruningMethod)
