"""What the user calibrates with → `Samples`: batches in the order of a graph's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.frontends.devices import tensor_on_cpu
from structprune.ir.graph import Graph, is_dynamic, shape_of
from structprune.ir.samples import Samples

_BATCH = 32  # samples that one tensor of many is cut into


def samples_of(calibration: Iterable[Any] | Tensor, graph: Graph) -> Samples:
    """Batches for `graph` from what a user gives: one tensor of many samples, or an iterable of batches.

    A batch is a tensor, a tuple of the model's inputs, a mapping of its inputs by name, or a pair (inputs, labels) of any of these; where the
    model does not take other batches than the example's, each must be of its size.

    Raises InputError for batches that do not fit the model's inputs, for labels with only some of the batches, for data that are not finite,
    and where there are none.
    """
    pieces = calibration.split(batch_size(graph)) if isinstance(calibration, Tensor) else calibration
    batches: list[list[Any]] = []
    labels: list[Tensor] = []
    for number, piece in enumerate(pieces):
        inputs, label = batch_of(piece, graph, f"calibration batch {number}")
        batches.append(inputs)
        labels += [] if label is None else [label]
    if not batches:
        raise InputError("calibration= holds no batch; give an iterable of input batches, or one tensor of many samples")
    if labels and len(labels) != len(batches):
        raise InputError(f"calibration= has labels for {len(labels)} of {len(batches)} batches; give all or none")
    return Samples(batches, labels or None, divisible=graph.dynamic_batch)


def batch_of(piece: Any, graph: Graph, batch: str) -> tuple[list[Any], Tensor | None]:
    """One batch, as `samples_of` understands it: the inputs in the order of the graph's, and the labels where there are any.

    Raises InputError, that calls it `batch`, for one that does not fit the model's inputs.
    """
    inputs, label = _inputs_and_label(piece, len(graph.input_names))
    return _checked(_ordered(inputs, graph, batch), graph, batch), label


def batch_size(graph: Graph) -> int:
    """How many samples of one tensor of many go into a batch."""
    example = next(v for v in graph.flat_inputs() if isinstance(v, Tensor) and v.dim())
    return _BATCH if graph.dynamic_batch else example.shape[0]


def _inputs_and_label(piece: Any, inputs: int) -> tuple[Any, Tensor | None]:
    """A tuple of one entry more than the model has inputs ends with labels, and so does a pair that starts with a tuple or a mapping."""
    if isinstance(piece, (tuple, list)) and len(piece) >= 2:
        nested = len(piece) == 2 and isinstance(piece[0], (tuple, list, Mapping))
        if nested or len(piece) == inputs + 1:
            label = _tensor(piece[-1])
            return (piece[0] if len(piece) == 2 else tuple(piece[:-1])), label
    return piece, None


def _tensor(value: Any) -> Tensor:
    return tensor_on_cpu(value) if isinstance(value, Tensor) else torch.as_tensor(value)


def _ordered(inputs: Any, graph: Graph, batch: str) -> list[Any]:
    names = graph.input_names
    if isinstance(inputs, Mapping):
        missing = [name for name in names if name not in inputs]
        if missing:
            raise InputError(f"{batch} has no input {missing[0]!r}; the model takes {', '.join(names)}")
        return [inputs[name] for name in names]
    values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    if len(values) != len(names):
        raise InputError(f"{batch} has {len(values)} inputs; the model takes {len(names)}: {', '.join(names)}")
    return values


def _checked(values: list[Any], graph: Graph, batch: str) -> list[Any]:
    """The batch with the types of the example. Its sizes must be the example's but for axes that are dynamic."""
    checked = []
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    for value, node, name in zip(values, nodes, graph.input_names, strict=True):
        traced = node.meta.get("val")
        if not isinstance(traced, Tensor):
            checked.append(value)
            continue
        value = _tensor(value)
        wanted = shape_of(traced)
        free = [d for d, size in enumerate(traced.shape) if is_dynamic(size)]
        if value.dim() != len(wanted) or any(value.shape[d] != wanted[d] for d in range(len(wanted)) if d not in free):
            shape = "x".join("*" if d in free else str(size) for d, size in enumerate(wanted))
            raise InputError(f"{batch}: {name} has shape {'x'.join(map(str, value.shape))}, the model takes {shape}")
        value = value.to(traced.dtype)
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{batch}: {name} holds values that are not finite")
        if len(checked) in graph.held and not torch.equal(value, graph.flat_inputs()[len(checked)]):
            raise InputError(f"{batch}: {name} is not the example's, and the model's code decides by its values; give batches with the same")
        checked.append(value)
    return checked
