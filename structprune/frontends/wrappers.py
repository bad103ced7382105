"""What is handed over as a model, and is the model in another form: torch's own wrappers, and programs of torch.export and TorchScript."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from structprune.errors import InputError
from structprune.frontends.torchscript import converted
from structprune.ir.operators import is_guard, training_flag
from structprune.ir.traced import TracedModule

_SHARDED = "FullyShardedDataParallel"


def unwrapped(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """The module within torch.compile or DistributedDataParallel; a program as a graph that trains, evaluates and copies; any other model itself.

    Raises InputError for what is no module, or cannot become one.
    """
    model = within(model)
    if type(model).__name__ == _SHARDED:
        raise InputError(
            f"the model's weights are shared out among processes ({_SHARDED}): give the model with all of them, as before it was wrapped"
        )
    if isinstance(model, torch.jit.ScriptModule):
        if kwargs:
            raise InputError("a model of TorchScript takes its inputs by position: give them as example_inputs")
        return converted(model, args, "the model")
    if isinstance(model, fx.GraphModule) and "train" in vars(model):  # a program's module refuses to change its mode
        return _of_program(model)
    if not isinstance(model, nn.Module):
        advice = "give its .module()" if isinstance(model, torch.export.ExportedProgram) else "give a torch.nn.Module"
        raise InputError(f"the model is a {type(model).__name__}: {advice}")
    return model


def within(model: Any) -> Any:
    """The module that torch.compile or DistributedDataParallel was given; any other model itself."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, torch._dynamo.OptimizedModule)):
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
    return model


def _of_program(module: fx.GraphModule) -> TracedModule:
    graph = copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        if is_guard(node):
            graph.erase_node(node)
    flags = [node.args[flag] for node in graph.nodes if (flag := training_flag(node)) is not None]
    root = copy.copy(module)
    root.training = bool(flags) and all(flags)  # as it was traced, which the module does not tell
    return TracedModule(root, graph).eval()  # type: ignore[return-value]
