"""The same model in another floating-point type."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from structprune.ir.traced import TracedModule

aten = torch.ops.aten


def type_of(module: nn.Module) -> torch.dtype:
    """The floating-point type of a module's first parameter or buffer that has one; float32 where there is none."""
    return next((t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), torch.float32)


def floated(value: Any) -> Any:
    """float16 and bfloat16 tensors among arguments, in float32."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t, value)


def in_float32(module: fx.GraphModule) -> TracedModule:
    """A copy that computes in float32, with inputs and answers of that type."""
    small = copy.deepcopy(module)
    traced = small if isinstance(small, TracedModule) else TracedModule(small, small.graph)
    return traced.eval().float()  # type: ignore[no-any-return]


def in_half(module: TracedModule) -> TracedModule:
    """A copy that computes in float16. Inputs and answers keep their type: it is called as the original is."""
    was = type_of(module)
    small: TracedModule = copy.deepcopy(module).half()
    graph = small.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and _is_of(node, was) and node.users:
            with graph.inserting_after(node):
                cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float16})
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
        elif node.op == "output":

            def back(value: Any, before: fx.Node = node) -> Any:
                if not _is_of(value, was):
                    return value
                with graph.inserting_before(before):
                    return graph.call_function(aten._to_copy.default, (value,), {"dtype": was})

            node.args = fx.map_arg(node.args, back)
    graph.lint()
    small.recompile()
    return small


def _is_of(node: fx.Node, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == dtype


def call_in_float32(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments for `in_float32`."""
    return floated(tuple(args)), floated(dict(kwargs))
