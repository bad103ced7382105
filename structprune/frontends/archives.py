"""What is looked at in a file before a library reads it, so that a hostile one is refused, not run.

Two doors need this. Archives (.pt, .pt2, .npz) may hold more than memory takes, or names that lead out of a folder. And `torch.export.load`
trusts what it reads: it unpickles example inputs, tensors of unusual classes and custom objects, evaluates size expressions with sympy, looks up
operators by any path of attributes from `torch`, and imports modules that a tree specification names. Here each of these is held to the little that
programs need.

docs/safety.md tells what stays open.
"""

from __future__ import annotations

import ast
import io
import json
import math
import operator
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from structprune.errors import InputError

_RATIO = 200  # times that an archive may grow; torch does not compress at all
_SMALL = 64 << 20  # bytes that any archive may grow to
_ENTRIES = 100_000

_FORGED = "is no program that torch.export.save writes"
_NAME = re.compile(r"[\w.]*")
_TENSOR = re.compile(r"[^\"'\\\x00-\x1f\x7f]*")  # no quotes or escapes: torch.fx writes these names, in quotes, into code that it runs
_NAMES = {"name": _NAME, "custom_obj_name": _NAME, "parameter_name": _TENSOR, "buffer_name": _TENSOR, "tensor_constant_name": _TENSOR}
_BY_NAME = frozenset({"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "custom_obj_values", "config"})
_OPERATOR = re.compile(r"torch\.ops\.([A-Za-z]\w*)\.(\w+)(?:\.(\w+))?")
_BARRED_SPACES = frozenset({"prim", "profiler", "c10d", "rpc", "inductor", "static_runtime", "symm_mem", "dist", "cuda", "debugprims"})
_BARRED_OPERATORS = frozenset({"from_file", "save", "load"})
_PLAIN = re.compile(r"(_operator|math)\.([a-z]\w*)|torch\.((?:_?sym_|_check)\w+)")
_BARRED_FUNCTIONS = frozenset({"call", "attrgetter", "itemgetter", "methodcaller"})
_FUNCTIONS = frozenset({
    "Symbol", "Integer", "Float", "Rational", "Max", "Min", "Eq", "Ne", "Le", "Lt", "Ge", "Gt", "And", "Or", "Not", "Abs", "Add", "Mul", "Pow", "Mod",
    "Piecewise", "floor", "ceiling", "sqrt", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity", "oo", "true", "false",
    "Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan",
})  # fmt: skip
_EXPRESSION = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.Load, ast.Tuple,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_POWER = 16


def check_archive(path: Path) -> list[str]:
    """The names in a zip archive; none for any other file. Raises InputError for one that leads out of its folder, or grows beyond reason."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, UnicodeDecodeError):
        return []
    names = [e.filename for e in entries]
    size, packed = sum(e.file_size for e in entries), sum(e.compress_size for e in entries)
    if len(entries) > _ENTRIES or size > max(_SMALL, _RATIO * packed) or packed > path.stat().st_size:
        raise InputError(f"{path} is an archive of {path.stat().st_size:,} bytes that claims to hold {size:,}: it is damaged, or a zip bomb")
    for name in names:
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name or re.match(r"[A-Za-z]:", name):
            raise InputError(f"{path} holds an entry {name!r}, which leads out of its folder; do not use this file")
    if len(set(names)) != len(names):
        raise InputError(f"{path} holds entries of the same name; save it again with torch.save")
    return names


def check_program(path: Path) -> None:
    """Raise InputError for a .pt2 file whose reading would run code, or that is none."""
    names = check_archive(path)
    models = [n for n in names if re.fullmatch(r"[^/]+/models/[^/]+\.json", n)]
    if not models:
        raise InputError(f"{path} {_FORGED}: it holds no model")
    root = models[0].split("/")[0]
    for name in names:
        if name.startswith(f"{root}/data/aotinductor") or name.endswith((".so", ".o", ".dll", ".dylib")):
            raise InputError(f"{path} holds compiled code ({name}), which is not run; pass what torch.export.save wrote")
        if re.fullmatch(r"[^/]+/data/(weights|constants)/([^/]*\.pt|custom_obj_[^/]*|opaque_obj_[^/]*)", name):
            raise InputError(f"{path} holds pickled objects ({name}), whose loading runs code; save the model again with this version of torch")
    with zipfile.ZipFile(path) as archive:
        for name in names:
            try:
                if re.fullmatch(r"[^/]+/data/(weights|constants)/[^/]+_config\.json", name):
                    _check_payload(_json(archive.read(name)))
                elif name in models:
                    _check_model(_json(archive.read(name)))
                elif re.fullmatch(r"[^/]+/data/sample_inputs/[^/]+", name):
                    _check_inputs(archive.read(name))
            except _Forged as reason:
                raise InputError(f"{path} {_FORGED} ({reason}); it is damaged, or does not want to be loaded but run") from reason
            except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as error:
                raise InputError(f"{path} is damaged ({name}: {error}); save or copy it again") from error


class _Forged(Exception):
    """What torch.export never writes."""


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Forged(f"a part is no JSON: {type(error).__name__}") from error


def _check_inputs(content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # whatever the safe reader does not take, torch would unpickle
        raise _Forged("its example inputs are a pickle of more than tensors") from error


def _check_payload(content: Any) -> None:
    for key, value in _pairs(content):
        if key == "use_pickle" and value:
            raise _Forged("it holds a pickled tensor")
        if key == "path_name" and ("/" in str(value) or ".." in str(value)):
            raise _Forged(f"a tensor lies at {value!r}")


def _check_model(content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("graph_module"), dict):
        raise _Forged("it has no graph")
    for key, value in _pairs(content):
        if key == "target" and isinstance(value, str):
            _check_target(value)
        elif key == "expr_str":
            _check_expression(value)
        elif key in ("in_spec", "out_spec") and value is not None:
            _check_structure(value, of_arguments=key == "in_spec")
        elif key in _NAMES and not _NAMES[key].fullmatch(str(value)):
            raise _Forged(f"the name {str(value)[:60]!r}")
        elif key == "forward_arg_names" and not all(_NAME.fullmatch(str(v)) for v in value or ()):
            raise _Forged("names of arguments that are none")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object in a JSON document, with its value. What is kept by name has these names under 'name': an input may be called so."""
    stack = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, dict):
            for key, inner in top.items():
                if key in _BY_NAME and isinstance(inner, dict):
                    yield from (("name", name) for name in inner)
                    stack.extend(inner.values())
                else:
                    yield key, inner
                    stack.append(inner)
        elif isinstance(top, list):
            stack.extend(top)


def _check_target(target: str) -> None:
    """Operators of torch and of libraries that registered some, sizes, and plain arithmetic."""
    found = _OPERATOR.fullmatch(target)
    if found:
        space, name, overload = found.groups()
        if space in _BARRED_SPACES or space.startswith("_") or name in _BARRED_OPERATORS:
            raise _Forged(f"the operator {target[:80]!r}")
        try:
            value: Any = getattr(getattr(torch.ops, space), name)
            value = getattr(value, overload) if overload else value
        except Exception:  # an operator that is not registered here: torch says so
            return
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
            return
    plain = _PLAIN.fullmatch(target)
    if plain and (plain[3] or (plain[2] not in _BARRED_FUNCTIONS and hasattr(operator if plain[1] == "_operator" else math, plain[2]))):
        return
    if not found and re.fullmatch(r"\w+", target):  # the name of what a node answers, not of what it calls
        return
    raise _Forged(f"the operator {target[:80]!r}")


def _check_expression(text: Any) -> None:
    """Sizes: arithmetic on symbols."""
    try:
        tree = ast.parse(str(text), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _Forged(f"the size {str(text)[:60]!r}") from error
    for node in ast.walk(tree):
        wrong = (
            not isinstance(node, _EXPRESSION)
            or (isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS))
            or (isinstance(node, ast.Name) and node.id not in _FUNCTIONS and not re.fullmatch(r"[a-z]{1,3}\d*", node.id))
            or (isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.fullmatch(r"[A-Za-z]\w*", node.value))
            or (isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) > 1 << 70)
            or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _is_small(node.right))
        )
        if wrong:
            raise _Forged(f"the size {str(text)[:60]!r}")


def _is_small(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_small(node.operand)
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and abs(node.value) <= _POWER


def _check_structure(spec: Any, of_arguments: bool) -> None:
    """How arguments and answers are nested: classes that are registered, and nothing that is imported for it.

    of_arguments: of which torch.fx writes the keywords into code that it runs.
    """
    for key, value in _pairs_within(spec):
        if key == "__enum__" or (key == "default_factory_module" and value not in ("builtins", "collections")):
            raise _Forged("a structure of arguments that imports something")
    if of_arguments and not all(isinstance(name, str) and _NAME.fullmatch(name) for name in _keywords(spec)):
        raise _Forged("keywords of arguments that are no names")


def _pairs_within(text: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object in JSON, and in the JSON that is a text in it, with its value."""
    stack = [text]
    while stack:
        top = stack.pop()
        if isinstance(top, str) and re.match(r"\s*[\[{\"]", top):
            try:
                stack.append(json.loads(top))
            except ValueError:  # a text
                continue
            except RecursionError as error:
                raise _Forged("a structure of arguments without end") from error
        elif isinstance(top, dict):
            yield from top.items()
            stack.extend(top.values())
        elif isinstance(top, list):
            stack.extend(top)


def _keywords(spec: Any) -> list[Any]:
    """torch.export writes [1, the tree of a tuple of positional arguments and a dict of those by keyword]."""
    try:
        _, tree = json.loads(spec)
        positional, named = tree["children_spec"]
        found = json.loads(named["context"])
        if (tree["type"], positional["type"], named["type"]) == ("builtins.tuple", "builtins.tuple", "builtins.dict") and isinstance(found, list):
            return found
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Forged("a structure of arguments that is none") from error
    raise _Forged("a structure of arguments that is none")
