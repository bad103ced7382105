"""What runs and no output needs, set aside: see `Graph.whole`.

In evaluation: a head that a wrapper drops, a pooler, the sum that the last of some layers would hand to the next. In training alone: auxiliary heads.
They have to follow what they read, or the user's class could not run at the new sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.ir.graph import Graph, attribute, size_of
from structprune.ir.operators import has_effect, operator_name, training_flag
from structprune.ops import RULES

_PARTS = frozenset({"select", "slice", "narrow", "detach", "alias"})  # code that asks a part of a tensor for its size leaves these
_SMALL = 4096  # entries of a constant that is compared by what it holds


def set_aside(module: fx.GraphModule) -> fx.Graph:
    """Take what no output needs out of the graph. Returns of it what reads parameters, what brings several tensors together, and what leads there."""
    graph = module.graph
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if has_effect(node) or node in needed:
            needed.update((node, *node.all_input_nodes))
    parameters = {n for n in graph.nodes if n.op == "get_attr" and isinstance(attribute(module, str(n.target)), nn.Parameter)}
    aside = fx.Graph()

    def matters(node: fx.Node) -> bool:
        if _is_part(node):
            return False
        return not parameters.isdisjoint(node.all_input_nodes) or (operator_name(node) in RULES and sum(map(_has_axes, node.all_input_nodes)) > 1)

    _copy(graph.nodes, aside, matters, lambda node: node.name if node in needed else None)
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    module.recompile()
    return aside


def of_training(graph: Graph, module: fx.GraphModule, unseen: Collection[int]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """`graph.unneeded`, and the layers that read parameters in `unseen` (their identities) where the same model is traced in training, as `module`;
    and what the latter read, by the names that their `get_attr` nodes have for it.

    What they read is what `graph` computes in the same way from the same tensors, but for being in training (value numbering).
    """
    parameters = {n for n in module.graph.nodes if n.op == "get_attr" and id(attribute(module, str(n.target))) in unseen}
    own = {number: node.name for node, number in _numbers(graph.module).items()}
    numbers = _numbers(module)
    aside = fx.Graph()
    aside.graph_copy(graph.unneeded, {})
    before = set(aside.nodes)
    _copy(module.graph.nodes, aside, lambda node: not parameters.isdisjoint(node.all_input_nodes), lambda node: own.get(numbers[node]))
    tensors: dict[str, Tensor] = {}
    for node in aside.nodes:
        if node.op == "get_attr" and node not in before:
            name = f"_in_training_{len(tensors)}"
            tensors[name], node.target = attribute(module, str(node.target)), name
    return aside, tensors


def _is_part(node: fx.Node) -> bool:
    """Whether all that becomes of a node is parts of it."""
    return operator_name(node) in _PARTS and all(map(_is_part, node.users))


def _has_axes(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0


def _copy(nodes: Iterable[fx.Node], into: fx.Graph, matters: Callable[[fx.Node], bool], known: Callable[[fx.Node], str | None]) -> None:
    """Copy what `matters` and is not known, and what leads there from what is known: of that, placeholders with the names."""
    leads: set[fx.Node] = set()
    for node in reversed(list(nodes)):
        if node.op == "call_function" and known(node) is None and (node in leads or matters(node)):
            leads.update((node, *node.all_input_nodes))
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in leads:
            continue
        name = known(node) if node.op != "get_attr" else None
        if name is not None:
            copies[node] = into.create_node("placeholder", name)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = into.node_copy(node, copies.__getitem__)


def _numbers(module: fx.GraphModule) -> dict[fx.Node, str]:
    """For every node in words how its answer comes from inputs and tensors, in training or not; equal for equal answers."""
    found: dict[fx.Node, str] = {}

    def told(operand: fx.Node) -> Any:
        size = operand.meta.get("val")
        return size_of(size) if isinstance(size, (int, torch.SymInt)) else _Word(found[operand])

    for node in module.graph.nodes:
        if node.op == "get_attr":
            words = f"tensor {_identity(attribute(module, str(node.target)))}"
        elif node.op == "call_function":
            flag = training_flag(node)
            args = [argument for place, argument in enumerate(node.args) if place != flag]
            words = f"{operator_name(node)} {fx.map_arg(args, told)} {fx.map_arg(node.kwargs, told)}"
        else:
            words = f"{node.op} {node.target}"
        found[node] = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
    return found


class _Word(str):
    """A string that stands for itself in the text of a list."""

    __repr__ = str.__str__


def _identity(value: Any) -> str:
    """Constants of two traces are the same where they hold the same."""
    small = isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel() <= _SMALL
    return f"{value.dtype} {value.tolist()}" if small else str(id(value))
