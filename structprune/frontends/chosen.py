"""Work on what values choose, which a model's code skips where nothing is chosen: the tokens of an expert.

    for e, expert in enumerate(self.experts):
        chosen = best == e
        if chosen.any():
            out[chosen] += expert(x[chosen])

A trace goes one way. To work on no rows changes none, so the way that does the work is the general one: while the model is traced, something is taken
to be chosen wherever the code asks. That the answers are the same where nothing is, nobody takes for granted: the model is run on inputs of few
different tokens, most of whose experts get none, until every line that asked was seen with the other answer; and answers as its trace does, or is not
traced.
"""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from structprune.errors import TraceError
from structprune.frontends.torch_export import called_once
from structprune.frontends.users_code import LIBRARIES
from structprune.frontends.values import KnownValues, has_not, passes, without_not
from structprune.ir.graph import Graph, frames_of, sizes_in
from structprune.ir.samples import close, copies, floats
from structprune.ir.source import parsed
from structprune.ir.traced import buffers_kept, replaced

_NUMBERS = frozenset({Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__int__, Tensor.__index__})
_PAIRS = frozenset({"max", "min", "sort", "topk"})  # of values and positions along an axis
_POSITIONS = _PAIRS | {"argmax", "argmin", "argsort", "multinomial"}
_REARRANGING = frozenset({
    "__getitem__", "chunk", "clone", "contiguous", "cpu", "detach", "expand", "flatten", "int", "long", "permute", "repeat", "reshape", "select",
    "split", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view",
})  # fmt: skip
_MANY = 4096  # parts among which values choose
_TOKENS = 8
_ROUNDING = 1e-5  # of the largest answer

_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where the user's code asks: of several questions in one line `part` tells which."""

    file: str
    line: int
    part: Any = None


class ChosenParts(TorchFunctionMode):
    """While it is on, and `assuming`, code that asks whether anything is chosen is told so. `values` are asked before, and to be entered before.

    `assumed`: the lines at which values choose what was asked for, and how many parts they were taken to choose at least.
    """

    def __init__(self, values: KnownValues) -> None:
        super().__init__()
        self.assumed: dict[Place, int] = {}
        self._values = values
        self._assuming = False
        self._below = WeakTensorKeyDictionary()  # of positions along an axis: its size
        self._all = WeakTensorKeyDictionary()  # of a list of the parts that are chosen: that of all parts
        self._counts: dict[Any, tuple[torch.SymInt, Place]] = {}  # by its symbol: how many are chosen, and where that was asked of values

    @contextmanager
    def assuming(self) -> Iterator[None]:
        ask = torch.SymBool.__bool__

        def asked(condition: torch.SymBool) -> bool:
            try:
                return ask(condition)
            except GuardOnDataDependentSymNode:
                self._something([condition], by_torch=_asked_by_torch())
                return ask(condition)

        self.assumed.clear()
        self._assuming = True
        try:
            with replaced(torch.SymBool, "__bool__", asked):
                yield
        finally:
            self._assuming = False

    def places(self) -> list[str]:
        """The lines assumed, in words."""
        return list(dict.fromkeys(f"{'/'.join(Path(file).parts[-2:])}:{line}" for file, line, _ in self.assumed))

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        value = args[0] if args else None
        if not self._assuming or not isinstance(value, FakeTensor) or self._values.knows(value):
            return function(*args, **kwargs)
        name, place = getattr(function, "__name__", ""), _place(function)
        if _asks_for_truth(function, value) and place.line not in passes(place.file) and (way := _way(place)) is not None:
            return self._told(place, way)
        if name in ("tolist", "unbind", "__iter__") and not any(args[1:]) and (parts := self._all.get(value)) is not None:
            with _disable_current_modes():
                listed = parts.tolist()
            tensors = [torch.tensor(part) for part in listed] if name != "tolist" else listed
            return self._told(place, iter(tensors) if name == "__iter__" else tensors, len(listed))
        if name == "numpy" and value.dim() == 1 and isinstance(value.shape[0], int):
            return np.array([self.__torch_function__(Tensor.item, types, (number,)) for number in value.unbind()], dtype=object)
        if name == "bincount" and len(args) == 1 and kwargs.keys() == {"minlength"} and self._below.get(value, _MANY + 1) <= kwargs["minlength"]:
            return (value.unsqueeze(-1) == torch.arange(kwargs["minlength"], device=value.device)).sum(0)
        try:
            answer = function(*args, **kwargs)
        except GuardOnDataDependentSymNode:
            given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
            self._something([size for v in given for size in v.shape], by_torch=True)
            answer = function(*args, **kwargs)
        for found in pytree.tree_leaves(answer):
            for size in found.shape if isinstance(found, FakeTensor) else [found]:
                if isinstance(size, torch.SymInt) and size.node.expr in free_unbacked_symbols(size):
                    self._counts.setdefault(size.node.expr, (size, place))
        self._note(answer, function, args, kwargs)
        return answer

    def _told(self, place: Place, answer: Any, parts: int = 1) -> Any:
        self.assumed[place] = min(parts, self.assumed.get(place, parts))
        return answer

    def _something(self, asked: Sequence[Any], by_torch: bool = False) -> None:
        """From here on, the counts that these sizes are made of are 1 at least.

        by_torch: none of torch's operators does anything else on nothing, if it does not refuse that; so nobody has to see it.
        """
        for symbol in frozenset[Any]().union(*map(free_unbacked_symbols, asked)) & self._counts.keys():
            count, place = self._counts[symbol]
            torch._check(count >= 1 if by_torch else self._told(place, count >= 1))

    def _note(self, answer: Any, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Whether the answer is a list of positions or parts."""
        value, name = args[0], getattr(function, "__name__", "")
        if name in _POSITIONS and (isinstance(answer, tuple) or name not in _PAIRS):
            axis = kwargs.get("dim", _axis(name, args))
            size = value.numel() if axis is None else value.shape[axis]
            if isinstance(size, int) and size <= _MANY:
                self._below[answer[1] if isinstance(answer, tuple) else answer] = size
        elif name == "unique" and isinstance(answer, FakeTensor) and (below := self._below.get(value)) is not None:
            with _disable_current_modes():
                self._all[answer] = torch.arange(below)
        elif name in ("nonzero", "where") and len(args) == 1 and value.dim() == 1 and isinstance(value.shape[0], int):
            for listed in pytree.tree_leaves(answer):
                with _disable_current_modes():
                    self._all[listed] = torch.arange(value.shape[0]).reshape((-1, 1)[: listed.dim()])
        elif name in _REARRANGING:
            below, parts = self._below.get(value), self._all.get(value)
            for found in pytree.tree_leaves(answer):
                if below is not None:
                    self._below[found] = below
                if parts is not None and not any(isinstance(v, Tensor) for v in pytree.tree_leaves((args[1:], kwargs))):
                    with _disable_current_modes():
                        moved = function(parts, *args[1:], **kwargs)
                    if isinstance(moved, Tensor) and moved.dim() and len(moved) == len(parts):
                        self._all[found] = moved


def must_not_matter(assumed: Mapping[Place, int], model: nn.Module, graph: Graph) -> None:
    """Raise TraceError where the graph, in which something is chosen at all the lines assumed, answers otherwise than the model where nothing is;
    or where neither an input of few different tokens chooses nothing, nor the model runs on nothing in the place of what is chosen.
    """
    left = assumed
    for inputs in _of_few_tokens(graph):
        args, kwargs = graph.called_with(copies(inputs))
        try:
            with _Witness(left) as witness:
                wanted = called_once(model, args, kwargs)
        except Exception:  # an input that the model is not made for, or that its own checks refuse, tells nothing
            _log.debug("the model does not run on few different tokens", exc_info=True)
            continue
        if not close(floats(_answer(fx.Interpreter(graph.module), inputs)), floats(wanted), _ROUNDING):
            raise TraceError(_in_words(assumed, "answers otherwise where nothing is chosen"))
        left = {place: parts for place, parts in left.items() if place not in witness.seen}
        if not left:
            return
    left = {place: parts for place, parts in left.items() if not _does_nothing_with_nothing(place, model, graph)}
    if left:
        raise TraceError(_in_words(left, "no input was found that goes the other way"))


@torch.no_grad()
def _answer(run: fx.Interpreter, inputs: Sequence[Any]) -> Any:
    """The graph's, whose buffers are the user's own: what it writes to them is put back."""
    assert isinstance(run.module, nn.Module)
    with buffers_kept(run.module):
        return run.run(*copies(inputs), enable_io_processing=False)


def _does_nothing_with_nothing(place: Place, model: nn.Module, graph: Graph) -> bool:
    """Whether model and graph answer the example alike when nothing is chosen at a place: no input may do that (boxes of an untrained detector)."""
    nodes = {n for n in graph.nodes if _chooses(n) and _line_of(n) == (place.file, place.line)}
    args, kwargs = graph.called_with(copies(graph.flat_inputs()))
    run = _GraphOfNothing(graph.module, nodes)
    try:
        with _Nothing(place) as nothing:
            wanted = called_once(model, args, kwargs)
        got = _answer(run, graph.flat_inputs())
    except Exception:  # what is chosen elsewhere does not fit
        _log.debug("%s does not run on nothing", place, exc_info=True)
        return False
    return nothing.times == run.times > 0 and close(floats(got), floats(wanted), _ROUNDING)


class _Nothing(TorchFunctionMode):
    """What is chosen at a place is nothing."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.times, self._at = 0, place

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        answer = function(*args, **(kwargs or {}))
        if _place(function) != self._at or not any(isinstance(v, Tensor) and v.dim() for v in pytree.tree_leaves(answer)):
            return answer
        self.times += 1
        return _none_of(answer)


class _GraphOfNothing(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(module)
        self.times, self._at = 0, nodes

    def run_node(self, n: fx.Node) -> Any:
        answer = super().run_node(n)
        if n not in self._at:
            return answer
        self.times += 1
        return _none_of(answer)


def _none_of(answer: Any) -> Any:
    return pytree.tree_map(lambda v: v[:0] if isinstance(v, Tensor) and v.dim() else v, answer)


def _chooses(node: fx.Node) -> bool:
    """Whether values decide a size of the answer, and of none that is read."""
    own, read = (_symbols(nodes) for nodes in ([node], node.all_input_nodes))
    return bool(own - read)


def _symbols(nodes: Sequence[fx.Node]) -> frozenset[Any]:
    sizes = [size for n in nodes for size in sizes_in(n.meta.get("val")) if isinstance(size, torch.SymInt)]
    return frozenset[Any]().union(*map(free_unbacked_symbols, sizes))


def _line_of(node: fx.Node) -> tuple[str, int] | None:
    return next((place for place in reversed(frames_of(node)) if not place[0].startswith(LIBRARIES)), None)


class _Witness(TorchFunctionMode):
    """`seen`: the lines at which the model, as it runs, finds less chosen than was assumed."""

    def __init__(self, assumed: Mapping[Place, int]) -> None:
        super().__init__()
        self.seen: set[Place] = set()
        self._assumed = assumed

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        answer = function(*args, **(kwargs or {}))
        if (parts := self._assumed.get(place := _place(function))) is not None:
            if isinstance(answer, bool):
                less = answer != _way(place)
            elif isinstance(answer, (list, tuple)) and parts > 1:  # of parts that a loop goes over
                less = len(answer) < parts
            elif function in _NUMBERS:
                less = not np.all(np.asarray(answer) >= 1)
            else:
                less = any(isinstance(found, Tensor) and found.numel() == 0 for found in pytree.tree_leaves(answer))
            if less:
                self.seen.add(place)
        return answer


def _of_few_tokens(graph: Graph) -> Iterator[list[Any]]:
    """The example, and inputs of its shapes of which all tokens are one of the example's: vectors along the last axis, or the second, or indices."""
    inputs = graph.flat_inputs()
    yield inputs
    for place in range(_TOKENS):
        for axis in (-1, 1):
            yield [_of_one_token(value, place, axis) for value in inputs]


def _of_one_token(value: Any, place: int, axis: int) -> Any:
    if not isinstance(value, Tensor) or value.dtype == torch.bool or not value.numel():
        return value
    if not value.is_floating_point():
        return torch.full_like(value, value.flatten()[place * 7 % value.numel()].item())
    for d in range(value.dim()):
        if d != axis % value.dim():
            value = value.select(d, place % value.shape[d]).unsqueeze(d).expand_as(value)
    return value.clone()


@cache
def _ways(file: str) -> dict[int, bool | None]:
    """By line of a source file: the truth of the condition there with which nothing is skipped; None where that is not plain."""
    found: dict[int, bool | None] = {}
    for statement in ast.walk(parsed(file)):
        if isinstance(statement, (ast.If, ast.While)):
            skips = not statement.orelse and isinstance(statement.body[-1], (ast.Break, ast.Continue, ast.Pass, ast.Raise, ast.Return))
            condition, truth = without_not(statement.test, not skips)
            plain = isinstance(statement, ast.If) and not has_not(condition)
            found.update(dict.fromkeys(range(statement.lineno, (condition.end_lineno or condition.lineno) + 1), truth if plain else None))
    return found


def _way(place: Place) -> bool | None:
    return _ways(place.file).get(place.line, True)


def _asks_for_truth(function: Any, value: Tensor) -> bool:
    return function is Tensor.__bool__ or (function is Tensor.item and value.dtype == torch.bool)


def _asked_by_torch() -> bool:
    """Whether the question whether a size is 0 stands in torch's own code, not in the user's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == torch.__file__:  # SymInt.__bool__
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(LIBRARIES)


def _axis(name: str, args: tuple[Any, ...]) -> int | None:
    """The axis along which an operator answers positions, where it is not named; None for all together."""
    given = args[2 if name == "topk" else 1 :]
    if given and type(given[0]) is int and name != "multinomial":
        return given[0]
    return None if name in ("argmax", "argmin") else -1


def _place(function: Any) -> Place:
    """What the innermost of the user's code is at, that calls a function of torch's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    if frame is None:
        return Place("", 0)
    part: Any = frame.f_lasti
    if function is not Tensor.__bool__ and sys.version_info >= (3, 11):  # a call may be made by one instruction, or by the next
        part = next(islice(frame.f_code.co_positions(), part // 2, None))
    return Place(frame.f_code.co_filename, frame.f_lineno, part)


def _in_words(places: Mapping[Place, int], what: str) -> str:
    place = next(iter(places))
    return (
        f"the model cannot be traced at {place.file}:{place.line}: the code branches on values of tensors, and {what}; use torch.where or "
        "torch.cond, or compress the part before it"
    )
