"""Checks of values in a model's own code: `assert (mask >= 0).all()`, or `if x.isnan().any(): raise ValueError(...)`.

A trace has no values to look at: it takes a check to pass, and whoever traces has to run the model on the example, which raises where it does not.
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Mapping
from functools import cache
from types import FrameType
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode


class PassingChecks(TorchFunctionMode):
    """While it is on, the truth of a tensor without values is the one with which a check that asks for it passes. Other code goes on as it would.

    `met`: whether there was such a check.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if function is Tensor.__bool__ and isinstance(args[0], FakeTensor):
            asking = _asking(sys._getframe())
            passes = _passes(asking.f_code.co_filename).get(asking.f_lineno)
            if passes is not None:
                self.met = True
                return passes
        return function(*args, **(kwargs or {}))


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
