"""The user's source code, as Python reads it: the statements of a file, by their lines."""

from __future__ import annotations

import ast
import linecache
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

_OF_NUMBERS = (
    *(ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Tuple, ast.List, ast.Starred),
    *(ast.operator, ast.unaryop, ast.expr_context),
)
_OPERATIONS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.FloorDiv: lambda a, b: a // b if b else 0}


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
def numbers_behind(file: str, line: int) -> Sequence[ast.Assign]:
    """What the function around a line assigned to names of its statement that stand for numbers: `width = self.heads * self.head_dim`.

    Or for several: `shape = (*batch, -1, self.head_dim)`.
    """
    around = statements_at(file, line)
    function = next((s for s in reversed(around[:-1]) if isinstance(s, ast.FunctionDef)), None)
    if function is None or hasattr(around[-1], "body"):
        return ()
    named, found = _names_in(around[-1]), []
    assigned = [s for s in ast.walk(function) if isinstance(s, ast.Assign) and s.lineno < line]
    for assignment in sorted(assigned, key=lambda s: s.lineno, reverse=True):
        if not named.isdisjoint(_names_given(assignment)) and all(isinstance(n, _OF_NUMBERS) for n in ast.walk(assignment.value)):
            found.append(assignment)
            named |= _names_in(assignment.value)
    return found


@dataclass(frozen=True)
class Formula:
    """A number that code computes of several attributes of `self`: `self.width // self.heads`."""

    expression: ast.expr
    names: tuple[str, ...]  # of the attributes: 'width', 'config.heads'

    def __call__(self, held: Mapping[str, int]) -> int:
        """Its value where the attributes hold these numbers; what it divides by nothing is 0."""

        def value(part: ast.expr) -> int:
            if isinstance(part, ast.BinOp):
                return _OPERATIONS[type(part.op)](value(part.left), value(part.right))
            return part.value if isinstance(part, ast.Constant) else held[_path(part)]  # type: ignore[return-value]

        return value(self.expression)


@cache
def formulas_at(file: str, line: int) -> Sequence[Formula]:
    """Those in the statement at a line, and in what it assigned to names of that before."""
    found: list[Formula] = []
    seen: set[ast.AST] = set()
    for statement in (*statements_at(file, line)[-1:], *numbers_behind(file, line)):
        for node in ast.walk(statement):  # what holds others comes before these
            if isinstance(node, ast.BinOp) and node not in seen and (names := _attributes_of(node)):
                seen.update(ast.walk(node))
                found.append(Formula(node, tuple(dict.fromkeys(names))))
    return [formula for formula in found if len(formula.names) > 1]


def _attributes_of(part: ast.expr) -> list[str] | None:
    """The attributes of `self` in an expression of these and of whole numbers; None of any other."""
    if isinstance(part, ast.BinOp) and type(part.op) in _OPERATIONS:
        left, right = _attributes_of(part.left), _attributes_of(part.right)
        return None if left is None or right is None else left + right
    if isinstance(part, ast.Constant) and type(part.value) is int:
        return []
    return [_path(part)] if isinstance(part, ast.Attribute) and ast.unparse(part).startswith("self.") else None


def _path(attribute: ast.expr) -> str:
    return ast.unparse(attribute).removeprefix("self.")


def _names_given(assignment: ast.Assign) -> Iterator[str]:
    """`a = b = 1`, `a, b = 1, 2`."""
    for target in assignment.targets:
        for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
            if isinstance(part, ast.Name):
                yield part.id


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
