"""What a check in the user's code says of a size: `assert x.shape[1] == self.channels` names the attribute that has to follow, and what it is now."""

from __future__ import annotations

import ast
import operator
import re
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from structprune.ir.source import statements_at


class Checked(NamedTuple):
    """An attribute of a module, or one of its settings (config.hidden_size), that a check compares with a size, and that size."""

    module: nn.Module
    attribute: str
    size: int


def failed_check(error: BaseException) -> Checked | None:
    """What the check says that raised, in the innermost code of a module: that `self.channels` is another number than a size; None where it does not.

    A check is `assert a == b`, `if a != b: raise ...`, or a call as of torch._assert.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return _said(module, _condition(frame.f_code.co_filename, line), frame.f_locals)
    return None


def _condition(file: str, line: int) -> ast.expr | None:
    """What the check at a line of a source file looks at."""
    *around, statement = (None, *statements_at(file, line))
    if isinstance(statement, ast.Assert):
        return statement.test
    if isinstance(statement, ast.Raise) and isinstance(around[-1], ast.If):
        return around[-1].test
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func).endswith(("assert", "check")):
        return next(iter(statement.value.args), None)
    return None


def _said(module: nn.Module, condition: ast.expr | None, values: Mapping[str, Any]) -> Checked | None:
    for compared in ast.walk(condition) if condition is not None else ():
        if not isinstance(compared, ast.Compare) or len(compared.ops) > 1 or not isinstance(compared.ops[0], (ast.Eq, ast.NotEq)):
            continue
        sides = compared.left, compared.comparators[0]
        for own, other in (sides, sides[::-1]):
            path, size = ast.unparse(own), _value(other, values)
            if re.fullmatch(r"self(\.\w+)+", path) and type(size) is int:
                held = operator.attrgetter(path.removeprefix("self."))(module)
                if type(held) is int and held != size:
                    return Checked(module, path.removeprefix("self."), size)
    return None


def _value(expression: ast.expr, values: Mapping[str, Any]) -> Any:
    """Of a name; of `x.shape[1]`, `x.size(1)` and `x.size()[1]`; None of anything else, for nothing of the user's is called."""
    match expression:
        case ast.Name(id=name):
            return values.get(name)
        case ast.Attribute(value=of, attr="shape") | ast.Call(func=ast.Attribute(value=of, attr="size"), args=[]):
            tensor = _value(of, values)
            return tensor.shape if isinstance(tensor, Tensor) else None
        case ast.Subscript(value=of, slice=ast.Constant(value=int(index)) | ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(index)))):
            shape = _value(of, values)
            index = index if isinstance(expression.slice, ast.Constant) else -index
            return shape[index] if isinstance(shape, tuple) and -len(shape) <= index < len(shape) else None
        case ast.Call(func=ast.Attribute(value=of, attr="size"), args=[argument]):
            shaped = ast.Subscript(ast.Attribute(of, "shape", ast.Load()), argument, ast.Load())
            return _value(shaped, values)
    return None
