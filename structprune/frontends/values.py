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
        self._numbers = {name: buffer.item() for name, buffer in model.named_buffers() if buffer.numel() == 1}

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if function in _ASKING and isinstance(args[0], FakeTensor):
            name = next((n for n in self._numbers if args[0] is _buffer(self._model, n)), None)
            if name is not None:
                number = self.held[name] = self._numbers[name]
                return number if (type_of := _ASKING[function]) is None else type_of(number)
            if function is Tensor.__bool__:
                asking = _asking(sys._getframe())
                passes = _passes(asking.f_code.co_filename).get(asking.f_lineno)
                if passes is not None:
                    self.checked = True
                    return passes
        if function == _DATA.__get__ and isinstance(args[0], FakeTensor):
            return args[0].detach()
        if function == _DATA.__set__ and isinstance(args[0], FakeTensor) and args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
            with torch.no_grad():
                args[0].copy_(args[1])
            return None
        return function(*args, **(kwargs or {}))


def _buffer(model: nn.Module, name: str) -> Tensor | None:
    """What stands for a buffer while the model is traced."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path)._buffers.get(own)


def _asking(frame: FrameType) -> FrameType:
    """The code that asked, below the modes that heard of it."""
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


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
