"""What can be told of one operator call: its name and arguments, whether it writes or draws, and whose memory its answer lies in."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

# of the operators that torch makes of others, those whose answer is never their operand, or a view of it
_COMPUTING = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul", "batch_norm", "instance_norm",
    "layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest2d", "upsample_bilinear2d", "relu6", "selu", "prelu", "square", "multiply",
    "true_divide", "lstm", "gru", "rnn_tanh", "rnn_relu", "scaled_dot_product_attention",
})  # fmt: skip
_TRAINING = ("train", "training")  # what a flag is called that says so
_UNSAFE = ("unsafe_", "_unsafe_", "lift")  # views that keep quiet about it


def operator_name(node: fx.Node) -> str:
    """'conv2d' for aten.conv2d.default, 'add' for aten.add_.Tensor; other callables by their own name; nothing for a node that calls none.

    An input or a weight may be called as an operator is.
    """
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace != "aten":
            return f"{node.target.namespace}::{node.target._opname}"
        name = node.target._opname
        return name if name.startswith("__") else name.removesuffix("_") or name
    return getattr(node.target, "__name__", str(node.target))


def named_arguments(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an ATen call by their names in the schema, as far as they are given: the node's own, or values in their places."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return dict(zip((a.name for a in schema), args, strict=False)) | dict(kwargs)


def has_effect(node: fx.Node) -> bool:
    """Whether a node matters even where nobody reads its answer: inputs, outputs, and operators that write in place."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema is not None and schema.is_mutable)


def functional(overload: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The operator of ATen that answers what one that writes in place does, without writing; None where there is none."""
    packet = getattr(torch.ops.aten, overload._opname.removesuffix("_"), None)
    return getattr(packet, overload._overloadname, None)


def training_flag(node: fx.Node) -> int | None:
    """The position of the argument that says whether the operator behaves as in training; None where none is given."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [a.name for a in node.target._schema.arguments]
    return next((i for i, name in enumerate(names[: len(node.args)]) if name in _TRAINING), None)


def is_guard(node: fx.Node) -> bool:
    """Whether a node asserts, in a program of torch.export, that inputs have the sizes that were traced."""
    return node.op == "call_module" and node.target == "_guards_fn"


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers. What drops at random does so where it is told to, as in training."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    switch = next((a.name for a in node.target._schema.arguments if a.name in (*_TRAINING, "dropout_p")), None)
    return switch is None or bool(named_arguments(node, node.args, node.kwargs).get(switch))


def is_view(node: fx.Node) -> bool:
    """Whether a node's answer lies in the memory of its first operand, or may do so."""
    if node.target is operator.getitem:
        return True
    if operator_name(node).endswith("dropout"):  # answers its operand in evaluation
        return not is_random(node)
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def is_fresh(node: fx.Node) -> bool:
    """Whether a node's answer lies in memory that no other value shares. False for what writes in place, and where that is not known.

    A kernel's schema tells. That of an operator which torch makes of others need not: `einsum` may answer a view, `type_as` its operand.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or is_view(node) or has_effect(node):
        return False
    name, returns = operator_name(node), target._schema.returns
    if returns and not any("Tensor" in str(r.type) for r in returns):  # a size
        return True
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return name in _COMPUTING if composite else not name.startswith(_UNSAFE)
