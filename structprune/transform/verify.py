"""Is the small model the dense one with those channels cut off? Always asked, and answered by a number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from structprune.analysis.infer import Types
from structprune.errors import VerificationError
from structprune.ir.axes import Keep
from structprune.ir.graph import Graph
from structprune.transform.reference import Exact, Masked, in_double

_log = logging.getLogger(__name__)

TOLERANCE = 1e-8  # of what pruning itself changed; one wrong channel among hundreds shows as 1e-5 or more, a wrong epsilon as 1e-7
_ROUNDING = 1e-9  # of the answer: what float64 arithmetic may lose in a deep network
_SINGLE = 1e-3  # of the answer: what float32 may lose


@dataclass(frozen=True)
class Verification:
    """`error`: the largest difference between small model and reference, as a share of what pruning changed."""

    error: float
    tolerance: float
    outputs: int


def verify(graph: Graph, types: Types, keep: Keep, small: fx.GraphModule, inputs: Sequence[Any] | None = None) -> Verification:
    """Compare the small graph with the masked dense one, in float64, on the example inputs or others of their shapes.

    Float64 costs most of the time. Where the batch is dynamic, one sample is compared, and that the small graph gives it the same answer
    within the whole batch is checked in the model's own precision; the whole batch is compared where that is not so.

    Raises VerificationError, with the output and both numbers, when they differ by more than rounding explains.
    """
    flat = graph.flat_inputs() if inputs is None else list(inputs)
    wide = [in_double(v) for v in flat]
    with torch.no_grad():
        if graph.dynamic_batch:
            try:
                answer, found = _compared(graph, types, keep, small, _last(wide))
                if _close(_last(floats(fx.Interpreter(small).run(*flat, enable_io_processing=False))), answer):
                    return found
            except (VerificationError, RuntimeError):
                _log.debug("one sample alone does not agree", exc_info=True)
        return _compared(graph, types, keep, small, wide)[1]


def _compared(graph: Graph, types: Types, keep: Keep, small: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[Tensor], Verification]:
    """The small graph's answers, and how far they are from the reference's."""
    try:
        got = floats(Exact(small).run(*inputs, enable_io_processing=False))
    except (RuntimeError, IndexError, ValueError) as raised:
        raise VerificationError(f"the small model does not run: {str(raised).splitlines()[0]}") from raised
    wanted = floats(Masked(graph, types, keep).run(*inputs, enable_io_processing=False))

    @cache
    def dense() -> list[Tensor]:
        return floats(Exact(graph.module).run(*inputs, enable_io_processing=False))

    error = difference(got, wanted, dense, graph.output_names)
    if not error <= TOLERANCE:
        raise VerificationError(
            f"the small model differs from the reference by {error:.2g} of what pruning changed (rounding explains {TOLERANCE:g})"
        )
    return got, Verification(error, TOLERANCE, len(wanted))


def _close(batch: Sequence[Tensor], alone: Sequence[Tensor]) -> bool:
    """Whether two precisions of one answer agree as float32 (or less) and float64 do."""
    return all(
        a.shape == b.shape
        and torch.allclose(a, b, rtol=0, atol=_SINGLE * float(b.nan_to_num(0, 0, 0).abs().amax()) if b.numel() else 0, equal_nan=True)
        for a, b in zip(batch, alone, strict=True)
    )


def _last(values: Sequence[Any]) -> list[Any]:
    """The last sample of every tensor with a batch."""
    return [v[-1:] if isinstance(v, Tensor) and v.dim() else v for v in values]


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor], dense: Callable[[], Sequence[Tensor]], names: Sequence[str] = ()) -> float:
    """Largest |got − wanted|, as a share of max |wanted − dense|; 0 where nothing but rounding differs.

    `dense` gives the original's answers, and is asked only when there is a difference to put into proportion. Raises
    VerificationError for answers of another number or shape, or that are not finite.
    """
    if len(got) != len(wanted):
        raise VerificationError(f"the small model gives {len(got)} tensors, the original {len(wanted)}")
    worst = 0.0
    for i, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        name = names[i] if i < len(names) else str(i)
        if mine.shape != theirs.shape:
            raise VerificationError(f"output {name} has shape {tuple(mine.shape)}, in the original {tuple(theirs.shape)}")
        if not mine.numel():
            continue
        apart = ~((mine == theirs) | (mine.isnan() & theirs.isnan()))  # equal entries, masks of -inf or 1e38 among them, say nothing of scale
        if not apart.any():
            continue
        mine, theirs = mine[apart], theirs[apart]
        if not (mine.isfinite() & theirs.isfinite()).all():
            raise VerificationError(f"output {name} of the small model is not finite where the original is, or the other way round")
        scale, error = theirs.abs().amax().item(), (mine - theirs).abs().amax().item()
        if error > _ROUNDING * max(scale, 1e-9):
            effect = (theirs - dense()[i].expand_as(apart)[apart]).nan_to_num(0, 0, 0).abs().amax().item()
            worst = max(worst, error / max(effect, 1e-7 * scale, 1e-12))
    return worst


def floats(value: Any) -> list[Tensor]:
    """The tensors of a model's answer, in a fixed order, in float64: numbers, indices, truth values, parts of complex numbers."""
    tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return [(torch.view_as_real(v) if v.is_complex() else v).double() for v in tensors]
