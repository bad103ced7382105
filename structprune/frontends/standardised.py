"""Weights that a model's code standardises before it uses them (weight standardisation, in BiT and NF-Nets) become the weights that it uses.

Statistics over a weight's inputs would tie all of these together: without one, every other changes. Folded, as parametrizations are, a weight is a
plain one, whose inputs go as any others.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from structprune.frontends.padding import same_padding
from structprune.ir.graph import Graph, attribute, computed_of, held_by, memo_for, owners_of
from structprune.ir.operators import has_effect, operator_name
from structprune.ops import RULES, contraction

_STATISTICS = frozenset({"batch_norm", "instance_norm", "layer_norm", "mean", "std", "std_mean", "var", "var_mean"})
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_PADDING = frozenset({"pad", "constant_pad_nd"})


@dataclass(frozen=True)
class Folded:
    """A weight as it was, and the axes along which its entries count for each other."""

    raw: nn.Parameter
    axes: tuple[int, ...]


@torch.no_grad()
def fold_standardised(module: fx.GraphModule) -> dict[str, Folded]:
    """Give the graph, in place, each weight as its code computes it of parameters alone and by statistics of them.

    Returns what was folded, by the names in the graph. Weights that are used raw, or in two ways, stay as they are.
    """
    folded: dict[str, Folded] = {}
    for source, weights in _standardised(module.graph).items():
        name = str(source.target)
        raw, inside = attribute(module, name), set[fx.Node]().union(*weights.values())
        if not isinstance(raw, nn.Parameter) or any(user not in inside for user in source.users):
            continue
        value, *others = (_value(module, steps, {source: raw}) for steps in weights.values())  # several where a layer is called several times
        if any(not torch.equal(value, other) for other in others):
            continue
        steps = next(iter(weights.values()))
        tied = (d for d in range(raw.dim()) if _ties(value, _value(module, steps, {source: _without_first(raw, d)}), d))
        folded[name] = Folded(raw, tuple(tied))
        path, _, own = name.rpartition(".")
        setattr(module.get_submodule(path), own, nn.Parameter(value.contiguous(), requires_grad=raw.requires_grad))
        for weight in weights:
            with module.graph.inserting_before(weight):
                plain = module.graph.get_attr(name)
            plain.meta = dict(weight.meta)
            weight.replace_all_uses_with(plain)
    if folded:
        module.graph.eliminate_dead_code(has_effect)
        module.recompile()
    return folded


def _standardised(graph: fx.Graph) -> dict[fx.Node, dict[fx.Node, list[fx.Node]]]:
    """The weights that are computed of a raw one, of its shape, by statistics; and by which steps each of them is."""
    nodes = list(graph.nodes)
    constant = computed_of({n for n in nodes if n.op == "get_attr" and isinstance(n.meta.get("val"), Tensor)}, nodes)
    found: dict[fx.Node, dict[fx.Node, list[fx.Node]]] = {}
    for reader in graph.nodes:
        weighed = RULES.get(operator_name(reader)) in contraction.WEIGHED
        if weighed and (weight := reader.args[1]) in constant and weight.op == "call_function":
            steps = _steps(weight)
            alike = [n for n in steps if n.op == "get_attr" and n.meta["val"].shape == weight.meta["val"].shape]
            if len(alike) == 1 and any(operator_name(n) in _STATISTICS for n in steps):
                found.setdefault(alike[0], {})[weight] = steps
    return found


def with_plain_layers(model: nn.Module, graph: Graph) -> nn.Module:
    """The model with a plain convolution or linear layer, which holds the folded weight, for each layer that standardises its own.

    All tensors are shared with the model and the graph. A layer that does more stays, and no longer fits the graph.
    """
    shared = {id(tensor): tensor for tensor in held_by(model).values()}
    model = copy.deepcopy(model, memo_for(model) | shared)
    made = defaultdict(list)
    for node in graph.nodes:
        for owner in owners_of(node) if node.op == "call_function" else ():
            made[owner].append(node)
    for weight in graph.standardised:
        for name in graph.aliases[weight]:
            path, _, own = name.rpartition(".")
            layer = model.get_submodule(path)
            base = next((kind for kind in _PLAIN if isinstance(layer, kind)), None)
            more = {operator_name(n) for n in made[path] if not _weighs_by(n, weight)}
            if base is None or own != "weight" or (more and not (base is nn.Conv2d and more <= _PADDING)):
                continue
            plain = _plain_layer(layer, PaddedConv2d if more else base, attribute(graph.module, weight))
            if not more or _pads_alike(layer, plain):
                model.set_submodule(path, plain)
    return model


class PaddedConv2d(nn.Conv2d):
    """A convolution that answers ⌈size / stride⌉ positions along each axis, of an input with zeros around it: "SAME" of TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        above, left, below, right = same_padding(x.shape[2:], self.kernel_size, self.stride, self.dilation)
        return super().forward(F.pad(x, (left, right, above, below)))


def _plain_layer(layer: nn.Module, kind: type[nn.Module], weight: Tensor) -> nn.Module:
    """A layer of the given kind, with the settings of another, and a weight that is used as it is."""
    plain = kind.__new__(kind)
    vars(plain).update(vars(layer) | {"_parameters": {"weight": weight, "bias": layer.bias}, "_buffers": {}, "_modules": {}})
    return plain


@torch.no_grad()
def _pads_alike(layer: nn.Module, plain: nn.Module) -> bool:
    """Whether two layers answer the same at sizes that leave a stride every rest that it has."""
    window, stride = (max(getattr(layer, name)) for name in ("kernel_size", "stride"))
    weight = layer.get_parameter("weight")
    channels = weight.shape[1] * int(layer.groups)  # type: ignore[arg-type]
    for size in range(window, window + 2 * stride):
        x = torch.linspace(-9, 9, channels * size * (size + 1), dtype=weight.dtype, device=weight.device).sin().view(1, channels, size, size + 1)
        try:
            one, other = layer(x), plain(x)
        except Exception:  # the user's code may raise anything
            return False
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
            return False
    return True


def _weighs_by(node: fx.Node, weight: str) -> bool:
    return len(node.args) > 1 and isinstance(read := node.args[1], fx.Node) and read.op == "get_attr" and read.target == weight


def _steps(weight: fx.Node) -> list[fx.Node]:
    """What a node is computed of and by, itself at the end."""
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for n in node.all_input_nodes:
            if n not in found:
                visit(n)
        found[node] = None

    visit(weight)
    return list(found)


def _value(module: fx.GraphModule, steps: list[fx.Node], given: dict[fx.Node, Tensor]) -> Tensor:
    run = fx.Interpreter(module)
    for node in steps:
        run.env[node] = given[node] if node in given else run.run_node(node)
    return run.env[steps[-1]]  # type: ignore[no-any-return]


def _without_first(weight: Tensor, axis: int) -> Tensor:
    return weight.index_fill(axis, torch.zeros(1, dtype=torch.int64, device=weight.device), 0)


def _ties(value: Tensor, other: Tensor, axis: int) -> bool:
    """Whether entries beside the first along an axis differ where that was another."""
    return not torch.equal(*(v.narrow(axis, 1, v.shape[axis] - 1) for v in (value, other)))
