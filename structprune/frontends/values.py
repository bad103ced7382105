"""Values that a model's own code asks for while it is traced, when there are none to look at.

A check (`assert (mask >= 0).all()`, or `if x.isnan().any(): raise ValueError(...)`) is taken to pass; whoever traces has to run the model on the
example, which raises where it does not. A buffer of one number (`if not self.initialised: ...`) is taken to hold what it holds; whoever traces has
to see that the code does not change it. What is done to `weight.data`, as by a layer that keeps its weights within a norm, is done to the weight:
torch.export does not see it otherwise.
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Mapping
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

_DATA: Any = Tensor.data
_ASKING: dict[Any, type | None] = {Tensor.item: None, Tensor.__bool__: bool, Tensor.__int__: int, Tensor.__float__: float, Tensor.__index__: int}


class KnownValues(TorchFunctionMode):
    """While it is on, a tensor without values answers what is known of it without them. Code that asks for anything else goes on as it would.

    `checked`: whether a check was taken to pass. `held`: the buffers of one number that were asked for, by name, and what they hold.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.checked = False
        self.held: dict[str, bool | int | float] = {}
        self._model = model
        self._numbers = {name: buffer.item() for name, buffer in model.named_buffers() if buffer.numel() == 1 and not buffer.is_meta}

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        value = args[0] if args else None
        if not isinstance(value, FakeTensor):
            return function(*args, **(kwargs or {}))
        if function in _ASKING and (name := self._buffer(value)) is not None:
            number = self.held[name] = self._numbers[name]
            return number if (type_of := _ASKING[function]) is None else type_of(number)
        if function is Tensor.__bool__ and (passes := _passes_where_asked()) is not None:
            self.checked = True
            return passes
        if function == _DATA.__get__:
            return value.detach()
        if function == _DATA.__set__ and (value.shape, value.dtype) == (args[1].shape, args[1].dtype):
            with torch.no_grad():
                value.copy_(args[1])
            return None
        return function(*args, **(kwargs or {}))

    def _buffer(self, value: Tensor) -> str | None:
        """The name of the buffer for which a tensor stands while the model is traced."""
        places = ((name, *name.rpartition(".")[::2]) for name in self._numbers)
        return next((name for name, path, own in places if self._model.get_submodule(path)._buffers.get(own) is value), None)


def _passes_where_asked() -> bool | None:
    """The truth with which a check passes, where the code that asks is one."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":  # modes that heard of it, too
        frame = frame.f_back
    return _passes(frame.f_code.co_filename).get(frame.f_lineno) if frame is not None else None


@cache
def _passes(file: str) -> dict[int, bool]:
    """By line of a source file: with which truth of the tensors in its condition the check on it passes.

    Of a check within `try` nothing is said: what it raises may be caught, and the code go another way.
    """
    try:
        module = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:  # no Python: a cell with a magic command, a template
        return {}
    caught = {inside for block in ast.walk(module) if isinstance(block, ast.Try) for s in block.body for inside in ast.walk(s)}
    found: dict[int, bool] = {}
    for statement in ast.walk(module):
        if statement in caught:
            continue
        if isinstance(statement, ast.Assert):
            condition, passes = statement.test, True
        elif isinstance(statement, ast.If) and not statement.orelse and all(isinstance(s, ast.Raise) for s in statement.body):
            condition, passes = statement.test, False
        else:
            continue
        while isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
            condition, passes = condition.operand, not passes
        if not any(isinstance(part, (ast.Not, ast.IfExp)) for part in ast.walk(condition)):  # such a part may count the other way round
            found.update(dict.fromkeys(range(statement.lineno, (condition.end_lineno or condition.lineno) + 1), passes))
    return found
