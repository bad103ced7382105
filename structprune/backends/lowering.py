"""A program as torch's ONNX exporter wants it, without the exporter's own pass over all operators, which is most of its time.

The exporter traces every program anew (`run_decompositions`), with symbolic sizes, to spell out what it has no translation for and to rid it of
writes in place: 7 of the 10 s that a MobileNetV2 takes. Most networks need little of that: an activation that overwrites what nobody else
holds, a pooling to one pixel, a dropout. What needs more goes through torch's pass as before.
"""

from __future__ import annotations

import copy
import operator
import string
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from structprune.ir.operators import functional, has_effect, is_fresh, named_arguments, operator_name

_aten = torch.ops.aten

# of the operators that torch would spell out, those that its exporter translates as they are
_WHOLE = frozenset({
    "conv1d", "conv2d", "conv3d", "linear", "matmul", "batch_norm", "layer_norm", "group_norm", "softmax", "log_softmax", "max_pool2d", "pad",
    "scaled_dot_product_attention", "flatten", "unflatten", "reshape", "sym_size", "upsample_nearest2d", "upsample_bilinear2d",
    "einsum",
})  # fmt: skip


class Lowered(ExportedProgram):
    """A program of evaluation whose `run_decompositions`, which the exporter calls first, has nothing to do where every operator has a translation.

    original: the program, which stays as it is, and is what torch spells out where one has none.
    """

    def __init__(self, original: ExportedProgram) -> None:
        super().__init__(
            original.graph_module,
            _simplified(original.graph),
            original.graph_signature,
            original.state_dict,
            original.range_constraints,
            original.module_call_graph,
            original.example_inputs,
            original.constants,
            verifiers=original.verifiers,
        )
        self._original = original

    def run_decompositions(self, decomp_table: Mapping[Any, Callable[..., Any]] | None = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        if decomp_table is not None and all(_is_whole(node, decomp_table) for node in self.graph.nodes):
            return self
        spelled_out = self._original.run_decompositions(decomp_table, *args, **kwargs)  # type: ignore[arg-type]
        for node in spelled_out.graph.nodes:
            # a view fails where the exporter's next pass lays out the answer of attention otherwise; a reshape has no translation for complex numbers
            if node.target == _aten.view.default and not node.meta["val"].is_complex():
                node.target = _aten.reshape.default
            _name_all_axes(node)
        return spelled_out


def _simplified(original: fx.Graph) -> fx.Graph:
    """A copy with fewer operators that the exporter would have to spell out."""
    graph = copy.deepcopy(original)
    for node, named in zip(graph.nodes, original.nodes, strict=True):
        node.name = named.name  # the copy calls `input` and `max` otherwise; the signature knows the names
    for node in graph.nodes:
        if node.target == _aten.dropout_.default and not node.args[2]:  # writes nothing
            node.target = _aten.dropout.default
        elif has_effect(node) and (computing := _without_effect(node)) is not None:
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, node=node: node < user)  # who reads it later reads what was written
            node.target = computing
    for node in graph.nodes:
        _simplify(node)
    return graph


def _simplify(node: fx.Node) -> None:
    """Wrong where something is still written to in place, as views would become copies; such a graph is not whole: torch's pass gets the original."""
    given = named_arguments(node, node.args, node.kwargs) if isinstance(node.target, torch._ops.OpOverload) else {}
    if node.target == _aten.dropout.default and not given["train"]:
        node.target, node.args = _aten.clone.default, (given["input"],)
    elif node.target == _aten.contiguous.default:
        node.target, node.kwargs = _aten.clone.default, {"memory_format": torch.contiguous_format}
    elif node.target == _aten.adaptive_avg_pool2d.default and list(given["output_size"]) == [1, 1]:
        node.target, node.args = _aten.mean.dim, (given["self"], [-2, -1], True)
    elif node.target == _aten.chunk.default and isinstance(size := given["self"].meta["val"].shape[given.get("dim", 0)], int):
        node.target, node.args = _aten.split.Tensor, (given["self"], -(-size // given["chunks"]), given.get("dim", 0))
    _name_all_axes(node)


def _name_all_axes(node: fx.Node) -> None:
    """Letters for the '...' of an einsum: ONNX infers a shape that begins with these axes, wherever they stand. Not where they broadcast."""
    if node.target != _aten.einsum.default or "..." not in (equation := str(node.args[0])) or "->" not in equation:
        return
    terms, _, answer = equation.replace(" ", "").partition("->")
    ellipses: list[list[str]] = []
    for term, operand in zip(terms.split(","), node.args[1], strict=True):  # type: ignore[arg-type]
        if "..." in term:
            before, behind = map(len, term.split("..."))
            shape = list(map(str, operand.meta["val"].shape))  # a free size is none that could be compared
            ellipses.append(shape[before : len(shape) - behind])
    if all(axes == ellipses[0] for axes in ellipses):
        letters = "".join(letter for letter in string.ascii_letters if letter not in equation)[: len(ellipses[0])]
        node.args = (f"{terms}->{answer}".replace("...", letters), *node.args[1:])


def _without_effect(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that computes what `node` writes over its first operand, where nobody else holds the memory of that."""
    written, target = node.args[0] if node.args else None, node.target
    if not (isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and isinstance(written, fx.Node) and is_fresh(written)):
        return None  # an operator of somebody else's may answer nothing at all
    if any(user.op == "output" or (user < node and not is_fresh(user)) for user in written.users):
        return None
    held = [operand.meta.get("val") for operand in node.all_input_nodes]
    of_one_type = {v.dtype for v in held if isinstance(v, Tensor)} == {node.meta["val"].dtype}  # else what is written would be converted
    if not (of_one_type and node.meta["val"].is_floating_point() and written.meta["val"].shape == node.meta["val"].shape):
        return None
    return functional(target)


def _is_whole(node: fx.Node, table: Mapping[Any, Any]) -> bool:
    """Whether the exporter translates a node as it is. `table`: what torch would spell out because there is no translation."""
    target = node.target
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == operator.add.__module__  # of sizes
    if target in table or has_effect(node):
        return False
    if target == _aten.batch_norm.default:
        given = named_arguments(node, node.args, node.kwargs)
        return not given["training"] and all(given[name] is not None for name in ("weight", "bias", "running_mean", "running_var"))
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return not composite or operator_name(node) in _WHOLE
