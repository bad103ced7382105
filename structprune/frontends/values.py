"""Values that a model's own code asks for while it is traced, when there are none to look at.

A check (`assert (mask >= 0).all()`, or `if x.isnan().any(): raise ValueError(...)`) is taken to pass; whoever traces has to run the model on the
example, which raises where it does not. A small buffer (`if not self.initialised: ...`, `for size in self.sizes.tolist()`), and what is computed of
such alone (`if self.step > 3`), is taken to hold what it holds; whoever traces has to see that the code does not change it. What code makes of sizes
and numbers (`torch.ones(2, 3)`, a mask that nobody gave) is known, too, where those sizes are; where nothing else helps, so is a small input (the
grid of a picture). What is done to `weight.data`, as by a layer that keeps its weights within a norm, is done to the weight: torch.export does not
see it otherwise.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from structprune.errors import InputError
from structprune.ir.source import parsed

_DATA: Any = Tensor.data
_ASKING = frozenset({Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__format__})
_SIZED = frozenset({"expand", "interpolate", "narrow", "pad", "permute", "repeat", "reshape", "view"})  # by numbers behind the first argument
_DERIVING = frozenset({
    # of sizes and numbers alone
    "arange", "eye", "full", "full_like", "linspace", "new_full", "new_ones", "new_tensor", "new_zeros", "ones", "ones_like", "tensor", "zeros",
    "zeros_like",
    # of a size that values decide
    "argwhere", "bincount", "masked_select", "nonzero", "repeat_interleave", "unique", "unique_consecutive",
    # of others
    "__getitem__", "select", "unbind", "view", "reshape", "flatten", "squeeze", "unsqueeze", "detach", "clone", "to", "bool", "int", "long", "float",
    "expand", "repeat", "transpose", "permute", "flip", "pad", "cat", "stack", "meshgrid", "split", "chunk", "tril", "triu", "where", "type_as",
    "gather", "index_select", "masked_fill", "roll", "argmax", "argmin",
    "eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "logical_not", "logical_and", "logical_or", "bitwise_not", "bitwise_and", "bitwise_or",
    "__and__", "__or__", "__invert__", "all", "any",
    "add", "sub", "mul", "div", "floor_divide", "remainder", "pow", "neg", "abs", "ceil", "floor", "round", "trunc", "sqrt", "exp", "log", "log2",
    "__rsub__", "__rdiv__", "__floordiv__", "__rfloordiv__", "__rmod__", "__rpow__",
    "sum", "prod", "cumsum", "diff", "max", "min", "maximum", "minimum", "clamp", "interpolate",
})  # fmt: skip
_WRITING = frozenset({"__setitem__", "copy_", "fill_", "masked_fill_", "zero_"})
_FEW = 64  # numbers of a buffer that is looked at
_MANY = 1 << 20  # numbers of what code makes


@dataclass(frozen=True)
class _Value:
    """What a tensor held at a version of it, and of which buffers (by name) and inputs (by number) that was made."""

    value: Tensor
    version: int = 0
    sources: frozenset[str | int] = frozenset()


class KnownValues(TorchFunctionMode):
    """While it is on, a tensor without values answers what is known of it without them. Code that asks for anything else goes on as it would.

    `checked`: whether a check was taken to pass. `held`: what was asked of buffers, by name, and of inputs, by number: all that they hold.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.checked = False
        self.held: dict[str | int, Any] = {}
        self._held: dict[str | int, Tensor] = {}
        self._places: dict[Any, list[tuple[str, Mapping[str, Any], str]]] = defaultdict(list)
        for name, buffer in model.named_buffers():
            if 0 < buffer.numel() <= _FEW and not (buffer.is_meta or buffer.is_sparse):
                self._held[name] = buffer.detach().clone()
                path, _, own = name.rpartition(".")
                self._places[tuple(buffer.shape), buffer.dtype].append((name, model.get_submodule(path)._buffers, own))
        self._derived = WeakTensorKeyDictionary()

    @contextmanager
    def of_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Take small inputs of whole numbers, by which code decides (the grid of a picture, lengths), to hold what they hold.

        The trace answers NaN where one that was asked for holds anything else. Raises InputError where it could not, for none of its answers is
        in floating point.
        """
        self._held |= {i: v.clone() for i, v in enumerate(pytree.tree_leaves((args, dict(kwargs)))) if may_decide(v)}

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            for i, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
                if i in self._held:
                    self._derived[leaf] = _Value(self._held[i], leaf._version, frozenset({i}))

        def leave(_: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
            given, asked = pytree.tree_leaves((args, kwargs)), [source for source in self.held if isinstance(source, int)]
            if not asked:
                return answer
            if not any(map(_is_float, pytree.tree_leaves(answer))):
                raise InputError("the code decides by an input, and no answer could tell that it has changed")
            same = torch.stack([(given[i] == torch.tensor(self.held[i], device=given[i].device)).all() for i in asked]).all()
            return pytree.tree_map(lambda v: torch.where(same, v, torch.nan) if _is_float(v) else v, answer)

        hooks = model.register_forward_pre_hook(enter, with_kwargs=True), model.register_forward_hook(leave, with_kwargs=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        value = args[0] if args else None
        name = getattr(function, "__name__", "")
        if kwargs and kwargs.get("generator", args) is None:  # torch knows no noise of free sizes where that is said
            kwargs = {key: v for key, v in kwargs.items() if key != "generator"}
        if name in _SIZED:
            args, kwargs = (value, *self._numbers(args[1:])), self._numbers(kwargs)
        elif name == "__getitem__" and len(args) == 2:
            args = value, pytree.tree_map(lambda part: self._numbers(part) if isinstance(part, slice) else part, args[1])
        if isinstance(value, FakeTensor):
            if function in _ASKING and (known := self._known(value)) is not None:
                return self._told(function, known, *args[1:])
            if function is Tensor.__bool__ and (truth := _passes_where_asked()) is not None:
                self.checked = True
                return truth
            if name == "__iter__" and value.dim():
                return iter(self.__torch_function__(Tensor.unbind, types, args))
            if function == _DATA.__get__:
                return value.detach()
            if function == _DATA.__set__ and (value.shape, value.dtype) == (args[1].shape, args[1].dtype):
                with torch.no_grad():
                    value.copy_(args[1])
                return None
        written = self._derived.get(value) if name in _WRITING and isinstance(value, FakeTensor) and self._known(value) else None
        answer = function(*args, **(kwargs or {}))
        if name in _DERIVING:
            return self._derive(answer, function, args, kwargs or {})
        if written is not None:
            self._derive(value, function, args, kwargs or {}, written)
        return answer

    def knows(self, value: Tensor) -> bool:
        return self._known(value) is not None

    def _told(self, asking: Any, known: _Value, *how: Any) -> Any:
        self._hold(known.sources)
        with _disable_current_modes():
            return asking(known.value, *how)

    def _hold(self, sources: Iterable[str | int]) -> None:
        self.held |= {source: self._held[source].tolist() for source in sources}

    def _numbers(self, sizes: Any) -> Any:
        """Sizes that were given as tensors, as numbers where those are known."""

        def number(size: Any) -> Any:
            if isinstance(size, slice):
                return slice(number(size.start), number(size.stop), number(size.step))
            known = self._known(size) if isinstance(size, FakeTensor) and not size.dim() and not size.is_floating_point() else None
            return size if known is None else self._told(Tensor.item, known)

        return pytree.tree_map(number, sizes)

    def _derive(self, answer: Any, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], written: _Value | None = None) -> Any:
        """The answer, of which is noted what it holds where all that it was computed of is known. Where values decide its size, a constant instead.

        written: what the first argument held, where that is it.
        """
        answers, of_answers = pytree.tree_flatten(answer)
        given, of_given = pytree.tree_flatten((args, dict(kwargs)))
        if not all(isinstance(v, FakeTensor) and not v.is_inference() for v in answers):
            return answer
        if not all(isinstance(v, Tensor) or _is_plain(v) for v in given):
            return answer
        fixed = all(isinstance(size, int) for v in answers for size in v.shape)
        known = [self._known(v) if isinstance(v, Tensor) else None for v in given]
        with _disable_current_modes():
            if written is not None:
                known[0] = replace(written, value=written.value.clone())
            elif fixed and isinstance(given[0], Tensor) and _is_blank(function.__name__):
                known[0] = _Value(torch.empty(answers[0].shape, dtype=given[0].dtype))
            if any(isinstance(v, Tensor) and k is None for v, k in zip(given, known, strict=True)):
                return answer
            if fixed and sum(v.numel() for v in answers) > _MANY:
                return answer
            moved, named = pytree.tree_unflatten([v if k is None else k.value for v, k in zip(given, known, strict=True)], of_given)
            made = function(*moved, **named)
        values = pytree.tree_leaves(made) if written is None else [moved[0]]
        sources = frozenset[str | int]().union(*(k.sources for k in known if k is not None))
        if not fixed:
            self._hold(sources)
            answers = [torch.tensor(v.tolist(), dtype=v.dtype, device=a.device).view(v.shape) for v, a in zip(values, answers, strict=True)]
        for tensor, value in zip(answers, values, strict=True):
            self._derived[tensor] = _Value(value, tensor._version, sources)
        return pytree.tree_unflatten(answers, of_answers)

    def _known(self, value: Tensor) -> _Value | None:
        """What a tensor holds, where that is known: a small buffer, or one that was computed of such and not written to since."""
        if (name := self._name(value)) is not None:
            return _Value(self._held[name], sources=frozenset({name}))
        found = self._derived.get(value)
        return found if found is not None and value._version == found.version else None

    def _name(self, value: Tensor) -> str | None:
        """The name of the buffer for which a tensor stands while the model is traced."""
        shape = tuple(value.shape)
        alike = self._places.get((shape, value.dtype), ()) if all(isinstance(size, int) for size in shape) else ()
        return next((name for name, buffers, own in alike if buffers.get(own) is value), None)


def may_decide(value: Any) -> bool:
    """Whether an input is a small one of whole numbers or truth values."""
    return isinstance(value, Tensor) and 0 < value.numel() <= _FEW and not (value.is_floating_point() or value.is_complex() or value.is_sparse)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_blank(name: str) -> bool:
    """Whether a function looks at the shape and type of its first argument alone."""
    return name.endswith("_like") or name.startswith("new_")


def _is_plain(value: Any) -> bool:
    """Whether an argument is a number or a setting: none that the sizes of the inputs decide."""
    if isinstance(value, slice):
        return all(_is_plain(part) for part in (value.start, value.stop, value.step))
    return value is None or value is ... or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _passes_where_asked() -> bool | None:
    """The truth with which a check passes, where the code that asks is one."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":  # modes that heard of it, too
        frame = frame.f_back
    return passes(frame.f_code.co_filename).get(frame.f_lineno) if frame is not None else None


@cache
def passes(file: str) -> dict[int, bool]:
    """By line of a source file: with which truth of the tensors in its condition the check on it passes.

    Of a check within `try` nothing is said: what it raises may be caught, and the code go another way.
    """
    module = parsed(file)
    caught = {inside for block in ast.walk(module) if isinstance(block, ast.Try) for s in block.body for inside in ast.walk(s)}
    found: dict[int, bool] = {}
    for statement in ast.walk(module):
        if statement in caught:
            continue
        if isinstance(statement, ast.Assert):
            condition, truth = statement.test, True
        elif isinstance(statement, ast.If) and not statement.orelse and all(isinstance(s, ast.Raise) for s in statement.body):
            condition, truth = statement.test, False
        else:
            continue
        condition, truth = without_not(condition, truth)
        if not has_not(condition):
            found.update(dict.fromkeys(range(statement.lineno, (condition.end_lineno or condition.lineno) + 1), truth))
    return found


def has_not(condition: ast.expr) -> bool:
    """Whether some part of a condition may count the other way round."""
    return any(isinstance(part, (ast.Not, ast.IfExp)) for part in ast.walk(condition))


def without_not(condition: ast.expr, truth: bool) -> tuple[ast.expr, bool]:
    """What stands behind all `not`, and the truth of it with which the condition has the one given."""
    while isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        condition, truth = condition.operand, not truth
    return condition, truth
