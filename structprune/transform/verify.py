"""Is the small model the dense one with those channels cut off? Always asked, and answered by a number."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from structprune.analysis.infer import Types
from structprune.errors import TraceError, VerificationError, first_line
from structprune.ir.axes import Keep
from structprune.ir.graph import Graph, memo_for, shape_of
from structprune.ir.operators import operator_name
from structprune.ir.samples import close, copies, floats
from structprune.ir.traced import in_mode, state_kept
from structprune.ops import RULES, contraction
from structprune.transform.precision import type_of
from structprune.transform.reference import Exact, Masked, in_double

_log = logging.getLogger(__name__)

TOLERANCE = 1e-8  # of what pruning itself changed; one wrong channel among hundreds shows as 1e-5 or more, a wrong epsilon as 1e-7
_ROUNDING = 1e-9  # of the answer: what float64 arithmetic may lose in a deep network
_WORK = 3_000_000_000  # multiply-accumulates that float64 may take in one comparison
_MEMORY = 8 << 20  # bytes that the activations of one comparison may take, or as many as the model's own tensors
_LIVE = 4  # activations of the largest size that are alive at one time
_SAMPLES = 32
_LARGE = 96  # pixels: a longer side may become shorter
_STRIDE = 32  # pixels: networks halve a picture five times
_DOES_NOT_RUN = (RuntimeError, IndexError, ValueError)  # what torch raises for sizes that do not fit
_CONSTANTS = 4  # epsilons of the answer: what rounded constants make of it
_SINGLE = 1e-3  # of the answer: what float32 may lose
_ROUNDED = 1e-6  # of the answer: what other kernels for the same sums lose


@dataclass(frozen=True)
class Verification:
    """`error`: the largest difference between small model and reference, as a share of what pruning changed.

    `answers`: the small graph's to the example, in the model's own precision, where they were needed.
    """

    error: float
    tolerance: float
    outputs: int
    answers: Sequence[Tensor] | None = field(default=None, repr=False)


def verify(
    graph: Graph,
    types: Types,
    keep: Keep,
    small: fx.GraphModule,
    inputs: Sequence[Any] | None = None,
    exact: Mapping[str, Tensor] | None = None,
) -> Verification:
    """Compare the small graph with the masked dense one, in float64, on the example inputs or others of their shapes.

    exact: what stands in for branches that are gone, by the name of the tensor, before it was rounded; without it rounding explains as much more.

    Where the batch is dynamic, it is filled up with noise, so that units which the example leaves silent speak; of a heavy model, on which
    float64 costs most of the time, its last samples alone are compared, and that the small graph answers them alike within the whole
    batch is checked in the model's own precision. Of pictures of which a single one is heavy a smaller one is compared. Where a model does not
    run on other batches or sizes, the example is compared as it is.

    Raises VerificationError, with the output and both numbers, when they differ by more than rounding explains.
    """

    def compared(chosen: Sequence[Any]) -> tuple[list[Tensor], Verification]:
        return _compared(graph, types, keep, small, chosen, exact)

    return _on_inputs(graph, types, small, graph.flat_inputs() if inputs is None else list(inputs), compared)


def verify_unchanged(graph: Graph, types: Types, original: fx.GraphModule, small: fx.GraphModule, tolerance: float) -> float:
    """The largest difference between the small graph and the original, as a share of the answer, on the inputs of `verify`.

    Raises VerificationError where it is more than `tolerance`.
    """

    def compared(chosen: Sequence[Any]) -> tuple[list[Tensor], Verification]:
        answers = []
        for module in (small, original):
            with same_noise():
                answers.append(floats(Exact(module).run(*copies(chosen), enable_io_processing=False)))
        got, wanted = answers
        error = difference(got, wanted, lambda: [torch.zeros((), dtype=torch.float64)] * len(wanted), graph.output_names)
        if not error <= tolerance:
            raise VerificationError(f"the small model differs from the original by {error:.2g} of the answer (rounding explains {tolerance:.2g})")
        return got, Verification(error, tolerance, len(wanted))

    return _on_inputs(graph, types, small, graph.flat_inputs(), compared).error


def verify_trace(model: nn.Module, graph: Graph) -> None:
    """Raise TraceError where the graph answers the example otherwise than the model whose trace it is.

    Code that asks whether it is being traced, or looks at values, may go another way then, and torch.export does not look. In the model's own
    precision; where rounding might explain a difference, float64 decides.
    """

    def error(module: nn.Module, run: fx.Interpreter, prepared: Callable[[Any], Any]) -> float:
        def on(inputs: Sequence[Any]) -> float:
            args, kwargs = graph.called_with(list(map(prepared, copies(inputs))))
            with same_noise():
                wanted = floats(module(*args, **kwargs))
            with same_noise():
                got = floats(run.run(*map(prepared, copies(inputs)), enable_io_processing=False))
            return difference(got, wanted, lambda: [torch.zeros((), dtype=torch.float64)] * len(wanted), graph.output_names)

        with torch.no_grad(), in_mode(module, training=False):
            if graph.doubled and graph.dynamic_batch:
                try:
                    return on(graph.given_inputs())  # of two equal samples one tells all
                except _DOES_NOT_RUN:
                    _log.debug("a batch of one does not run", exc_info=True)
            return on(graph.flat_inputs())

    off = error(model, fx.Interpreter(graph.module), lambda value: value)
    in_its_own = off <= _SINGLE  # more is no rounding, unless what is chosen by it (of two boxes about as good) is another
    if off > _ROUNDED and not _as_in_double(
        lambda: error(copy.deepcopy(model, memo_for(model)).double(), Exact(graph.module), in_double), otherwise=in_its_own
    ):
        raise TraceError(
            f"the model answers otherwise than its trace by torch.export, by {off:.2g} of the largest answer: its code goes another way while it is "
            "traced (torch.compiler.is_exporting, a default mask); give all inputs explicitly, masks and positions among them, or change that code"
        )


@torch.no_grad()
def answers_again(model: nn.Module, graph: Graph) -> bool:
    """Whether a model that has answered the example, and then the same with all entries one place on, answers it as the first time."""
    example = graph.given_inputs()
    moved = [v.roll(1, -1) if isinstance(v, Tensor) and v.dim() else v for v in example]

    def answer(inputs: Sequence[Any]) -> list[Tensor]:
        args, kwargs = graph.called_with(copies(inputs))
        with same_noise():
            return copies(floats(model(*args, **kwargs)))

    with in_mode(model, training=False), state_kept(model):
        first = answer(example)
        try:
            answer(moved)
        except Exception:  # the user's code may raise anything
            _log.debug("the model does not run on inputs that are moved", exc_info=True)
        try:
            again = answer(example)
        except Exception:
            _log.debug("the model does not run again", exc_info=True)
            return False
    return close(again, first, _SINGLE)


def _as_in_double(error: Callable[[], float], otherwise: bool) -> bool:
    """otherwise: the answer where types are written into the model's code, and it does not run in float64."""
    try:
        return error() <= _ROUNDED
    except (RuntimeError, TypeError):
        _log.debug("the model does not run in float64", exc_info=True)
        return otherwise


def _on_inputs(
    graph: Graph, types: Types, small: fx.GraphModule, flat: Sequence[Any], compared: Callable[[Sequence[Any]], tuple[list[Tensor], Verification]]
) -> Verification:
    """Compare on inputs that float64 has room for."""
    wide = [in_double(v) for v in flat]

    def own_precision() -> list[Tensor]:
        with same_noise():
            return floats(fx.Interpreter(small).run(*copies(flat), enable_io_processing=False))

    with torch.no_grad():
        batch = next((v.shape[0] for v in wide if isinstance(v, Tensor) and v.dim()), 1)
        room = min(_WORK * batch / max(1, sum(math.prod(axis.size for axis in w.axes) for w in types.work)), _samples_in_memory(graph, batch))
        unsafe = positions(graph)
        if room < 1 and not unsafe:
            try:
                found = compared(_smaller(_last(wide, 1) if graph.dynamic_batch else wide, room))[1]
                return replace(found, answers=own_precision())
            except (*_DOES_NOT_RUN, VerificationError):  # a size that the graph was traced for; the whole picture decides
                _log.debug("smaller pictures do not run", exc_info=True)
        samples = max(1, int(room))
        if graph.dynamic_batch and not (unsafe and samples < batch):
            try:
                chosen = _last(wide, samples) if samples < batch else _with_noise(wide, min(samples, _SAMPLES) // batch - 1, unsafe)
                answer, found = compared(chosen)
                if samples >= batch:
                    return found
                whole = own_precision()
                if close(_last(whole, samples), answer, _SINGLE):
                    return replace(found, answers=whole)
            except _DOES_NOT_RUN:
                _log.debug("the chosen samples do not run", exc_info=True)
        try:
            return compared(wide)[1]
        except _DOES_NOT_RUN as raised:
            raise VerificationError(f"the small model does not run: {first_line(raised)}") from raised


def _compared(
    graph: Graph, types: Types, keep: Keep, small: fx.GraphModule, inputs: Sequence[Any], exact: Mapping[str, Tensor] | None
) -> tuple[list[Tensor], Verification]:
    """The small graph's answers, and how far they are from the reference's."""
    constants = exact is None and any(not len(entries) for entries in keep.values())  # of branches that are gone, rounded to the model's type
    rounding = _CONSTANTS * torch.finfo(type_of(small)).eps if constants else _ROUNDING

    def answers(interpreter: fx.Interpreter) -> list[Tensor]:
        with same_noise():
            return floats(interpreter.run(*copies(inputs), enable_io_processing=False))

    got, wanted = answers(Exact(small, exact or {})), answers(Masked(graph, types, keep))

    @cache
    def dense() -> list[Tensor]:
        return answers(Exact(graph.module))

    error = difference(got, wanted, dense, graph.output_names, rounding)
    if not error <= TOLERANCE:
        raise VerificationError(
            f"the small model differs from the reference by {error:.2g} of what pruning changed (rounding explains {TOLERANCE:g})"
        )
    return got, Verification(error, TOLERANCE, len(wanted))


@contextmanager
def same_noise() -> Iterator[None]:
    """A model that draws random numbers draws the same each time; the user's generator goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _last(values: Sequence[Any], number: int) -> list[Any]:
    """The last samples of every tensor with a batch."""
    return [v[-number:] if isinstance(v, Tensor) and v.dim() else v for v in values]


def _smaller(values: Sequence[Any], share: float) -> list[Any]:
    """The corners of large pictures, of which the work is about that share, but no less than a sixteenth. Raises ValueError where there is none."""
    factor = 0.5 if share >= 1 / 4 else 0.25

    def corner(value: Any) -> Any:
        for d in range(2, value.dim()) if isinstance(value, Tensor) and value.dim() > 3 else ():
            if value.shape[d] >= _LARGE:
                value = value.narrow(d, 0, _STRIDE * max(1, round(value.shape[d] * factor / _STRIDE)))
        return value

    corners = [corner(v) for v in values]
    if all(small is v for small, v in zip(corners, values, strict=True)):
        raise ValueError("no input is a large picture")
    return corners


def _samples_in_memory(graph: Graph, batch: int) -> float:
    values = [n.meta.get("val") for n in graph.nodes if n.op == "call_function"]
    largest = max((8 * math.prod(shape_of(v)) for v in values if isinstance(v, Tensor)), default=0)
    own = sum(t.numel() * t.element_size() for t in graph.module.parameters())
    return max(_MEMORY, own / 2) * batch / max(1, _LIVE * largest)


def positions(graph: Graph) -> set[int]:
    """Which inputs an operator from outside ATen may read as positions (boxes in pictures): it need not check them before it reads memory."""
    reaching: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        outside = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten"
        weighted = RULES.get(operator_name(node)) in contraction.WEIGHED
        if node.op == "call_function" and (outside or (node in reaching and not weighted)):
            reaching.update(node.all_input_nodes)
    return {i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder") if n in reaching}


def _with_noise(values: Sequence[Any], times: int, unsafe: set[int]) -> list[Any]:
    """Every batch, followed by that many batches of noise in its range; numbers that may be positions are repeated instead."""
    generator = torch.Generator().manual_seed(0)

    def filled(value: Tensor, repeated: bool) -> Tensor:
        if repeated or not value.is_floating_point():
            return value.repeat(times + 1, *[1] * (value.dim() - 1))
        noise = torch.randn((times * value.shape[0], *value.shape[1:]), generator=generator, dtype=value.dtype)
        return torch.cat([value, value.mean() + (value.std(correction=0) + 1) * noise.to(value.device)])

    return [filled(v, i in unsafe) if isinstance(v, Tensor) and v.dim() and times > 0 else v for i, v in enumerate(values)]


def difference(
    got: Sequence[Tensor], wanted: Sequence[Tensor], dense: Callable[[], Sequence[Tensor]], names: Sequence[str] = (), rounding: float = _ROUNDING
) -> float:
    """Largest |got − wanted|, as a share of max |wanted − dense|; 0 where nothing but rounding, that share of the answer, differs.

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
        if error > rounding * max(scale, 1e-9):
            effect = (theirs - dense()[i].expand_as(apart)[apart]).nan_to_num(0, 0, 0).abs().amax().item()
            worst = max(worst, error / max(effect, 1e-7 * scale, 1e-12))
    return worst
