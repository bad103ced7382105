"""Operators that no rule knows, spelled out by torch's own definition of them in operators that one does; calls that ONNX cannot say, by ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from structprune.frontends.equivalents import equivalent
from structprune.ir.operators import operator_name
from structprune.ops.rules import RULES

_log = logging.getLogger(__name__)


def spell_out(module: fx.GraphModule) -> None:
    """Replace both in place: `hstack` by a concatenation, `tensordot` by a product of matrices, `istft` by the sum of its frames.

    What torch does not define so, or by operators that have no rule either, stays as it is.
    """
    for node in list(module.graph.nodes):
        body = _for_onnx(node)
        if body is None and not _has_rule(node) and not node.target._schema.is_mutable:  # type: ignore[union-attr]
            body = _of_torch(node)
        if body is not None:
            _put_in_place(node, body)


def is_for_onnx(graph: fx.Graph) -> bool:
    """Whether no call in the graph is one that we put another in the place of, for torch's ONNX exporter."""
    return all(n.op != "call_function" or _equivalent(n) is None for n in graph.nodes)


@cache
def _definitions() -> dict[Any, Callable[..., Any]]:
    return dict(core_aten_decompositions().items())


def _has_rule(node: fx.Node) -> bool:
    """Whether a node is understood: its operator has a rule, or it tells a size."""
    return not isinstance(node.target, torch._ops.OpOverload) or operator_name(node) in RULES or operator_name(node) == "sym_size"


def _of_torch(node: fx.Node) -> fx.Graph | None:
    """What torch says that a node does, in operators that have rules; None where it does not."""
    body = _traced(node, node.target, decomposition_table=_definitions())  # type: ignore[arg-type]
    return body if body is not None and all(n.op != "get_attr" and _has_rule(n) for n in body.nodes) else None


def _for_onnx(node: fx.Node) -> fx.Graph | None:
    """What does the same as a node that torch's exporter cannot translate; None for any other."""
    call = _equivalent(node)
    return None if call is None else _traced(node, call, pre_dispatch=True)


def _equivalent(node: fx.Node) -> Callable[..., Any] | None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return equivalent(node.target, args, kwargs)


def _traced(node: fx.Node, function: Callable[..., Any], **how: Any) -> fx.Graph | None:
    """`function`, called as the node's operator is, from the values of `node.all_input_nodes`; None where these are not known, or do not do."""
    values = [source.meta.get("val") for source in node.all_input_nodes]
    if any(value is None for value in values):
        return None

    def call(*values: Any) -> Any:
        known = dict(zip(node.all_input_nodes, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return function(*args, **kwargs)

    env = next((v.fake_mode.shape_env for v in values if isinstance(v, FakeTensor)), None)
    try:
        with env.ignore_fresh_unbacked_symbols() if env is not None else nullcontext():  # the program, in which none is new, goes on with these sizes
            return make_fx(call, **how)(*values).graph  # type: ignore[no-any-return]
    except Exception:  # torch's definitions look at values, which tracing does not have
        _log.debug("%s is not spelled out", node.target, exc_info=True)
        return None


def _put_in_place(node: fx.Node, body: fx.Graph) -> None:
    graph = node.graph
    copies: dict[fx.Node, fx.Node] = dict(zip([n for n in body.nodes if n.op == "placeholder"], node.all_input_nodes, strict=True))
    told = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
    with graph.inserting_before(node):
        answers: Any = graph.graph_copy(body, copies)  # a node, or several in a list
    for old, new in copies.items():
        if old.op != "placeholder":
            new.meta = {**told, **{key: value for key, value in old.meta.items() if key == "val"}}
    if isinstance(answers, (tuple, list)):
        for user in list(node.users):
            number: Any = user.args[1]
            user.replace_all_uses_with(answers[number])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(answers)
    graph.erase_node(node)
