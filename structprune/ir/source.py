"""The user's source code, as Python reads it: the statements of a file, by their lines."""

from __future__ import annotations

import ast
import linecache
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

_OF_NUMBERS = (ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)


@cache
def parsed(file: str) -> ast.Module:
    """What a file says; nothing, where that is no Python: a cell with a magic command, a template."""
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def statements_at(file: str, line: int) -> Sequence[ast.stmt]:
    """The statements that hold a line, the outermost first."""
    return _by_line(file).get(line, ())


def text_at(file: str, line: int) -> str:
    """All lines of the statement at a line, of one with a body the head: a call over several lines is said to be at its first."""
    around = statements_at(file, line)
    if not around:
        return linecache.getline(file, line)
    body = getattr(around[-1], "body", None)
    last = body[0].lineno - 1 if body else around[-1].end_lineno or line
    return "".join(linecache.getline(file, number) for number in range(around[-1].lineno, max(line, last) + 1))


@cache
def numbers_behind(file: str, line: int) -> str:
    """What the function around a line assigned to those names of its statement that stand for numbers: `width = self.heads * self.head_dim`."""
    around = statements_at(file, line)
    function = next((s for s in reversed(around[:-1]) if isinstance(s, ast.FunctionDef)), None)
    if function is None or hasattr(around[-1], "body"):
        return ""
    named, found = _names_in(around[-1]), []
    assigned = [s for s in ast.walk(function) if isinstance(s, ast.Assign) and s.lineno < line]
    for assignment in sorted(assigned, key=lambda s: s.lineno, reverse=True):
        if not named.isdisjoint(map(ast.unparse, assignment.targets)) and all(isinstance(n, _OF_NUMBERS) for n in ast.walk(assignment.value)):
            found.append(ast.unparse(assignment))
            named |= _names_in(assignment.value)
    return "\n".join(found)


def _names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


@cache
def _by_line(file: str) -> Mapping[int, Sequence[ast.stmt]]:
    found: dict[int, list[ast.stmt]] = defaultdict(list)
    for node in ast.walk(parsed(file)):  # what holds others comes before these
        if isinstance(node, ast.stmt):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                found[line].append(node)
    return found
