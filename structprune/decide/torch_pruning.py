"""Any torch_pruning Importance as a criterion: our groups are handed over in the form that it reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency import Dependency, Group, Node

from structprune.analysis.groups import Groups
from structprune.decide.gradients import mean_gradient, mean_squared_gradient
from structprune.decide.weights import Criterion, entries_of, magnitude
from structprune.errors import InputError
from structprune.ir import group as ours
from structprune.ir.graph import Graph
from structprune.ir.samples import Samples

# for each layer type, what pruning dimension 0 and 1 of its weight is called there
_FUNCTIONS: tuple[tuple[type[nn.Module], tuple[Any, Any]], ...] = (
    (nn.modules.conv._ConvNd, (tp.prune_conv_out_channels, tp.prune_conv_in_channels)),
    (nn.Linear, (tp.prune_linear_out_channels, tp.prune_linear_in_channels)),
    (nn.modules.batchnorm._BatchNorm, (tp.prune_batchnorm_out_channels, None)),
    (nn.LayerNorm, (tp.prune_layernorm_out_channels, None)),
    (nn.GroupNorm, (tp.prune_groupnorm_out_channels, None)),
)


# which importances read `.grad` of a layer's tensors, and what they expect there
_GRADIENTS: tuple[tuple[type[tp.importance.Importance], Callable[[Graph, Samples], dict[str, Tensor]]], ...] = (
    (tp.importance.GroupTaylorImportance, mean_gradient),
    (tp.importance.GroupHessianImportance, mean_squared_gradient),
)


def adapted(importance: Any, model: nn.Module, graph: Graph | None = None, samples: Samples | None = None) -> Criterion:
    """Score groups with a torch_pruning Importance.

    It sees the convolutions, linear layers and norms of a group, with the indices of our channels. A group in which
    it finds nothing to score (a bare parameter, a recurrent layer) is scored by L2 magnitude.

    One that reads gradients (Taylor, Hessian) finds those of the loss of labelled samples on copies of the layers; without labels it reads the
    user's own `.grad`. Raises InputError where there is neither.
    """
    wanted = next((found for kind, found in _GRADIENTS if isinstance(importance, kind)), None)
    labelled = graph is not None and samples is not None and samples.labels is not None
    if wanted is not None and not labelled and all(p.grad is None for p in model.parameters()):
        raise InputError(
            f"{type(importance).__name__} reads gradients: give calibration= with batches of (inputs, labels), or call backward() before"
        )

    def criterion(groups: Groups, tensors: Mapping[str, Tensor]) -> Mapping[str, np.ndarray]:
        layer_of = _layers_of(
            model, wanted(graph, samples) if wanted is not None and graph is not None and samples is not None and labelled else None
        )
        scores = dict(magnitude(groups, tensors, power=2))
        for group in groups:
            handed = _their_group(group, groups, layer_of)
            found = importance(handed) if len(handed) else None
            if found is not None:
                scores[group.name] = found.detach().double().cpu().numpy()
        return scores

    return criterion


def _layers_of(model: nn.Module, gradients: Mapping[str, Tensor] | None) -> Callable[[str], nn.Module]:
    """The model's layers by name; with gradients, copies of them, whose tensors share the values and have the gradients, zero where there is none."""
    copies: dict[str, nn.Module] = {}

    def layer_of(name: str) -> nn.Module:
        layer = model.get_submodule(name)
        if gradients is None:
            return layer
        if name not in copies:
            copies[name] = private = copy.copy(layer)
            private._parameters = dict(layer._parameters)
            for leaf, tensor in layer._parameters.items():
                if tensor is not None:
                    private._parameters[leaf] = own = nn.Parameter(tensor.detach(), tensor.is_floating_point())
                    gradient = gradients.get(f"{name}.{leaf}" if name else leaf)
                    own.grad = torch.zeros_like(own) if gradient is None else gradient.to(own.dtype)
        return copies[name]

    return layer_of


def _their_group(group: ours.Group, groups: Groups, layer_of: Callable[[str], nn.Module]) -> Group:
    handed = Group()
    for member in group.members:
        owner, _, leaf = member.tensor.rpartition(".")
        layer = layer_of(owner)
        functions = next((f for kind, f in _FUNCTIONS if isinstance(layer, kind)), None)
        if leaf != "weight" or functions is None or member.dim > 1:
            continue
        dim = 1 - member.dim if getattr(layer, "transposed", False) else member.dim
        function = functions[dim]
        node = Node(layer, None, owner)
        for entries in entries_of(groups.axes[member.tensor][member.dim], group.atom):
            # Where several entries of a layer stand on one channel (the width of a head), each goes into an item of its own:
            # an item speaks of every channel once.
            for each in entries.T:
                item = GroupItem(Dependency(function, function, node, node), each.tolist())
                item.root_idxs = list(range(group.size))
                handed._group.append(item)
    return handed
