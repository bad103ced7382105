"""`TracedModule`: a graph as an ordinary torch module, which trains, evaluates, copies and moves like any other. Modes and states of any module."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from keyword import iskeyword
from typing import Any

import torch
from torch import fx, nn

from structprune.ir.operators import training_flag

_SWITCHES = "switches with the mode"  # in the meta of a node, which copies keep
_CONTAINERS = (dict, OrderedDict, list, set, tuple)
_PLAIN = (int, float, str, torch.Size, torch.device)
_TORCHS_OWN = frozenset(vars(nn.Module()))  # whether it trains, its tables of tensors and hooks: what a module has in any class


def _reading(base: str, target: str) -> str:
    """Python that reads an attribute, whatever it is called: torch.fx's own is none for a layer called 'class', or with a quote in its name."""
    for name in target.split("."):
        base = f"{base}.{name}" if name.isidentifier() and not iskeyword(name) else f"getattr({base}, {name!r})"
    return base


fx.graph._format_target = _reading  # for good: whoever copies, moves or loads a traced module has torch.fx write its code anew


class TracedModule(fx.GraphModule):
    """A GraphModule on which `train()` and `eval()` switch dropout and batch norm, and `to()` moves what the graph creates."""

    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __init__(self, root: Any, graph: fx.Graph, *names: Any):
        """root: in the mode, training or evaluation, that the flags in the graph stand for."""
        super().__init__(root, graph, *names)
        for node in self.graph.nodes:
            flag = training_flag(node)
            if flag is not None:  # weights standardised by a batch norm are in training always
                node.meta.setdefault(_SWITCHES, node.args[flag] is self.training)

    def train(self, mode: bool = True) -> TracedModule:
        super().train(mode)
        changed = False
        for node in self.graph.nodes:
            flag = training_flag(node)
            if flag is not None and node.meta.get(_SWITCHES) and node.args[flag] is not mode:
                node.update_arg(flag, mode)
                changed = True
        if changed:
            self.recompile()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`to()`, `double()`, `cuda()`: what the graph creates, or converts to the parameters' type, follows them in type and place."""
        before = next(self.parameters(), None)
        was = before.dtype if before is not None else None
        moved = super()._apply(fn, recurse)
        after = next(self.parameters(), None)
        changed = False

        def followed(value: Any) -> Any:
            nonlocal changed
            new = value
            if isinstance(value, torch.device) and after is not None:
                new = after.device
            elif value is not None and value is was and after is not None:
                new = after.dtype
            changed = changed or new != value
            return new

        for node in self.graph.nodes:
            if node.op == "call_function":
                node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), followed)  # type: ignore[assignment]
        if changed:
            self.recompile()
        return moved


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Something of torch's, or of another library's, is another for a while."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or in evaluation, and afterwards each of its modules as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)  # in that mode already, too: classes drop what they keep for later calls then (LeViT its table of biases)
    try:
        yield
    finally:
        if any(mode is not training for _, mode in before):
            for module, mode in before:  # those within others after these
                module.train(mode)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """A model may count its calls: what they write to its buffers is put back."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """What a model keeps for its next call (sizes that it has seen, tables by their sizes, hooks that its first call puts on layers) is what it was.

    Yields what tells, at any time within, which attributes of its modules are others now.
    """
    kept: dict[int, tuple[str, Any, Any]] = {}
    waiting: list[tuple[str, Any]] = [(name, vars(module)) for name, module in model.named_modules()]
    for path, container in waiting:  # grows while it is walked
        if id(container) not in kept:
            kept[id(container)] = path, container, copy.copy(container)
            inside = container.items() if isinstance(container, dict) else enumerate(container)
            waiting.extend((f"{path}.{key}" if path else str(key), value) for key, value in inside if type(value) in _CONTAINERS)

    def changed() -> list[str]:
        return list(dict.fromkeys(name for path, container, before in kept.values() for name in _differing(path, container, before)))

    try:
        yield changed
    finally:
        for _, container, before in kept.values():
            if isinstance(container, list):
                container[:] = before
            elif not isinstance(container, tuple):
                container.clear()
                container.update(before)


def _differing(path: str, container: Any, before: Any) -> list[str]:
    """The entries of a dict that are others than before, by their paths, new buffers among them; of another container its own path, if its are."""
    owner, _, own = path.rpartition(".")
    if own == "_buffers":
        names = [name for name in container if name not in before]  # one that was there before is a buffer in a trace, too
    elif not _TORCHS_OWN.isdisjoint(path.split(".")):
        return []
    elif not isinstance(container, dict):
        return [path] if len(container) != len(before) or any(map(_differ, container, before)) else []
    else:
        owner = path
        names = [name for name in {**before, **container} if name not in _TORCHS_OWN and _differ(container.get(name), before.get(name))]
    return [f"{owner}.{name}" if owner else str(name) for name in names]


def _differ(value: Any, before: Any) -> bool:
    return value is not before and not (type(value) is type(before) and isinstance(value, _PLAIN) and value == before)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """All that a call may leave behind in a model is put back: attributes, as `attributes_kept` tells of them, and what buffers hold."""
    with buffers_kept(model), attributes_kept(model) as changed:
        yield changed
