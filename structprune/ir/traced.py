"""`TracedModule`: a graph as an ordinary torch module, which trains, evaluates, copies and moves like any other; and the mode of any module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from structprune.ir.operators import training_flag

_SWITCHES = "switches with the mode"  # in the meta of a node, which copies keep


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
    """A model may count its calls: what they make of its buffers is put back."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    for name, buffer in module.named_buffers():
        buffer.copy_(before[name])
