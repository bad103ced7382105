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
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
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
from structprune.frontends.torch_export import called_once, replaced
from structprune.frontends.users_code import NOT_THE_USERS
from structprune.frontends.values import KnownValues, passes, without_not
from structprune.ir.graph import Graph
from structprune.ir.samples import copies
from structprune.ir.source import parsed, statements_at

_TRUTHS = frozenset({Tensor.__bool__, Tensor.item})
_NUMBERS = frozenset({Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__int__, Tensor.__index__})
_POSITIONS = frozenset({"argmax", "argmin", "argsort", "max", "min", "multinomial", "sort", "topk"})  # along the last axis, or that named `dim`
_REARRANGING = frozenset({
    "__getitem__", "chunk", "clone", "contiguous", "cpu", "detach", "expand", "flatten", "int", "long", "permute", "repeat", "reshape", "select",
    "split", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view",
})  # fmt: skip
_MANY = 4096  # parts among which values choose
_SOME = 1 << 30  # the length of what is chosen, where code asks for no more than whether it is nothing
_TOKENS = 8
_ROUNDING = 1e-5  # of the largest answer


class Place(NamedTuple):
    """A line of the user's code."""

    file: str
    line: int


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

        def bool_(condition: torch.SymBool) -> bool:
            try:
                return ask(condition)
            except GuardOnDataDependentSymNode:
                self._something(condition)
                return ask(condition)

        self.assumed.clear()
        self._assuming = True
        try:
            with replaced(torch.SymBool, "__bool__", bool_):
                yield
        finally:
            self._assuming = False

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        value = args[0] if args else None
        if not self._assuming or not isinstance(value, FakeTensor) or self._values.knows(value):
            return function(*args, **kwargs)
        name, place = getattr(function, "__name__", ""), _place()
        if function in _TRUTHS and value.dtype == torch.bool and place.line not in passes(place.file):
            return self._told(place, _way(place))
        if name == "__len__" and free_unbacked_symbols(value.shape[0]) and _asks_for_any(place):
            self._something(value.shape[0])
            return _SOME
        if name in ("tolist", "unbind", "__iter__") and (parts := self._all.get(value)) is not None:
            with _disable_current_modes():
                listed = parts.tolist()
            return self._told(place, listed if name == "tolist" else iter([torch.tensor(part) for part in listed]), len(parts))
        if name == "numpy" and value.dim() == 1 and isinstance(value.shape[0], int):
            return np.array([self.__torch_function__(Tensor.item, types, (number,)) for number in value.unbind()], dtype=object)
        if name == "bincount" and self._below.get(value, _MANY + 1) <= kwargs.get("minlength", 0):
            return (value.unsqueeze(-1) == torch.arange(kwargs["minlength"], device=value.device)).sum(0)
        try:
            answer = function(*args, **kwargs)
        except GuardOnDataDependentSymNode:  # torch itself asks, of whose operators none does anything else on nothing, if it does not refuse that
            for size in (size for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor) for size in v.shape):
                for symbol in free_unbacked_symbols(size) & self._counts.keys():
                    torch._check(self._counts[symbol][0] >= 1)
            answer = function(*args, **kwargs)
        for found in pytree.tree_leaves(answer):
            self._count(found.shape if isinstance(found, FakeTensor) else [found], place)
            if isinstance(found, FakeTensor):
                self._note(found, function, args, kwargs)
        return answer

    def places(self) -> list[str]:
        """The lines assumed, in words."""
        return [f"{'/'.join(Path(file).parts[-2:])}:{line}" for file, line in self.assumed]

    def _told(self, place: Place, answer: Any, parts: int = 1) -> Any:
        self.assumed[place] = parts
        return answer

    def _count(self, sizes: Sequence[Any], place: Place) -> None:
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr in free_unbacked_symbols(size):
                self._counts.setdefault(size.node.expr, (size, place))

    def _something(self, asked: Any) -> None:
        """From here on, all counts of chosen things that something depends on are 1 at least."""
        for symbol in free_unbacked_symbols(asked) & self._counts.keys():
            count, place = self._counts[symbol]
            torch._check(self._told(place, count >= 1))

    def _note(self, answer: Tensor, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Whether the answer is a list of positions or parts."""
        value, name = args[0], function.__name__
        if name in _POSITIONS and answer.dtype == torch.long:
            size = value.shape[kwargs.get("dim", args[1] if len(args) > 1 and name != "topk" else -1)]
            if isinstance(size, int) and size <= _MANY:
                self._below[answer] = size
        elif name in _REARRANGING:
            if (below := self._below.get(value)) is not None:
                self._below[answer] = below
            if (parts := self._all.get(value)) is not None and not any(isinstance(v, Tensor) for v in pytree.tree_leaves((args[1:], kwargs))):
                with _disable_current_modes():
                    self._all[answer] = function(parts, *args[1:], **kwargs)
        elif name == "unique" and (below := self._below.get(value)) is not None:
            with _disable_current_modes():
                self._all[answer] = torch.arange(below)
        elif name in ("nonzero", "where") and len(args) == 1 and all(isinstance(size, int) for size in value.shape) and value.dim() == 1:
            with _disable_current_modes():
                self._all[answer] = torch.arange(value.numel()).reshape((-1, 1)[: answer.dim()])


def must_not_matter(assumed: Mapping[Place, int], model: nn.Module, graph: Graph) -> None:
    """Raise TraceError where the graph, in which something is chosen at all the lines assumed, answers otherwise than the model where nothing is;
    or where no input of few different tokens was seen to choose nothing.
    """
    left = dict(assumed)
    for inputs in _of_few_tokens(graph):
        args, kwargs = graph.called_with(copies(inputs))
        try:
            with _Witness(left):
                wanted = called_once(model, args, kwargs)
        except (RuntimeError, IndexError, ValueError):  # an input that the model is not made for tells nothing
            continue
        got = fx.Interpreter(graph.module).run(*copies(inputs), enable_io_processing=False)
        pairs = zip(_tensors(got), _tensors(wanted), strict=True)
        if not all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=_ROUNDING * _largest(b), equal_nan=True) for a, b in pairs):
            raise TraceError(_in_words(assumed, "does something else there"))
        if not left:
            return
    raise TraceError(_in_words(left, "was never seen to go the other way"))


class _Witness(TorchFunctionMode):
    """Crosses out the lines at which the model, as it runs, finds less chosen than was assumed."""

    def __init__(self, left: dict[Place, int]) -> None:
        super().__init__()
        self._left = left

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        answer = function(*args, **(kwargs or {}))
        if self._left and (parts := self._left.get(place := _place())) is not None:
            if function in _TRUTHS and isinstance(answer, bool):
                less = answer != _way(place)
            elif function in _NUMBERS and parts == 1:
                less = not np.all(np.asarray(answer) >= 1)
            else:
                less = any(_length(found) < parts for found in (answer if type(answer) is tuple else [answer]))
            if less:
                del self._left[place]
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
def _ways(file: str) -> dict[int, bool]:
    """By line of a source file: the truth of the condition there with which nothing is skipped."""
    found: dict[int, bool] = {}
    for statement in ast.walk(parsed(file)):
        if isinstance(statement, ast.If):
            skips = not statement.orelse and isinstance(statement.body[-1], (ast.Continue, ast.Pass, ast.Return, ast.Break))
            condition, truth = without_not(statement.test, not skips)
            found.update(dict.fromkeys(range(statement.lineno, (condition.end_lineno or condition.lineno) + 1), truth))
    return found


def _way(place: Place) -> bool:
    return _ways(place.file).get(place.line, True)


def _asks_for_any(place: Place) -> bool:
    """Whether the condition at a line compares a length with nothing but 0."""
    conditions = [statement.test for statement in statements_at(*place) if isinstance(statement, ast.If)]
    compared = [side for part in ast.walk(conditions[-1]) if isinstance(part, ast.Compare) for side in part.comparators] if conditions else []
    return bool(conditions) and all(isinstance(side, ast.Constant) and side.value == 0 for side in compared)


def _place() -> Place:
    """The innermost line of the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno) if frame is not None else Place("", 0)


def _length(value: Any) -> int:
    if isinstance(value, Tensor):
        return len(value) if value.dim() else _SOME
    return value if type(value) is int else len(value) if isinstance(value, (list, tuple)) else _SOME


def _tensors(answer: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(answer) if isinstance(v, Tensor)]


def _largest(tensor: Tensor) -> float:
    return float(tensor.nan_to_num(0, 0, 0).abs().amax()) if tensor.numel() else 0


def _in_words(places: Mapping[Place, int], what: str) -> str:
    file, line = next(iter(places))
    return (
        f"the model's code asks at {file}:{line} whether values choose anything, and {what}: use torch.where, or let the code do the work on no rows "
        "as on any others"
    )
