"""Any torch_pruning Importance as a criterion: our groups are handed over in the form that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency import Dependency, Group, Node

from structprune.analysis.groups import Groups
from structprune.decide.criteria import Criterion, magnitude
from structprune.ir import group as ours
from structprune.ir.axes import positions

# for each layer type, what pruning dimension 0 and 1 of its weight is called there
_FUNCTIONS: tuple[tuple[type[nn.Module], tuple[Any, Any]], ...] = (
    (nn.modules.conv._ConvNd, (tp.prune_conv_out_channels, tp.prune_conv_in_channels)),
    (nn.Linear, (tp.prune_linear_out_channels, tp.prune_linear_in_channels)),
    (nn.modules.batchnorm._BatchNorm, (tp.prune_batchnorm_out_channels, None)),
    (nn.LayerNorm, (tp.prune_layernorm_out_channels, None)),
    (nn.GroupNorm, (tp.prune_groupnorm_out_channels, None)),
)


def adapted(importance: Any, model: nn.Module) -> Criterion:
    """Score groups with a torch_pruning Importance.

    It sees the convolutions, linear layers and norms of a group, with the indices of our channels. A group in which
    it finds nothing to score (a bare parameter, a recurrent layer) is scored by L2 magnitude.
    """

    def criterion(groups: Groups, tensors: Mapping[str, Tensor]) -> Mapping[str, np.ndarray]:
        scores = dict(magnitude(groups, tensors, power=2))
        for group in groups:
            handed = _their_group(group, groups, model)
            found = importance(handed) if len(handed) else None
            if found is not None:
                scores[group.name] = found.detach().double().cpu().numpy()
        return scores

    return criterion


def _their_group(group: ours.Group, groups: Groups, model: nn.Module) -> Group:
    handed = Group()
    for member in group.members:
        owner, _, leaf = member.tensor.rpartition(".")
        layer = model.get_submodule(owner)
        functions = next((f for kind, f in _FUNCTIONS if isinstance(layer, kind)), None)
        if leaf != "weight" or functions is None or member.dim > 1:
            continue
        dim = 1 - member.dim if getattr(layer, "transposed", False) else member.dim
        function = functions[dim]
        node = Node(layer, None, owner)
        for place in positions(groups.axes[member.tensor][member.dim], group.atom):
            mine = np.flatnonzero(place >= 0)
            # Where several entries of a layer stand on one channel (the width of a head), each goes into an item of its own:
            # an item speaks of every channel once.
            for entries in mine[np.argsort(place[mine], kind="stable")].reshape(group.size, -1).T:
                item = GroupItem(Dependency(function, function, node, node), entries.tolist())
                item.root_idxs = list(range(group.size))
                handed._group.append(item)
    return handed
