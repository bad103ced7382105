"""onnx's own node tests, asked of the importer: does its module answer what the standard says?

Each is a model of one operator (or, 'expanded', of the operators that it is defined by), with inputs and the expected outputs. What the importer
takes as sizes is made an initializer, since a file in which sizes depend on the values of inputs is refused.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch.utils import _pytree as pytree

from structprune.errors import InputError, StructpruneError
from structprune.frontends.onnx_in.module import OnnxModule, made_into_sizes
from structprune.frontends.onnx_in.reading import OPSETS, Program, read


@dataclass(frozen=True)
class Outcome:
    name: str
    operators: tuple[str, ...]
    verdict: str  # 'agrees', 'refused' or 'differs'
    why: str = ""


@cache
def cases() -> list[Any]:
    """All node tests of the installed onnx."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(load_model_tests(kind="node"))


def outcomes(named: str = "") -> Iterator[Outcome]:
    """What becomes of the tests whose names begin so."""
    for case in cases():
        if case.name.removeprefix("test_").startswith(named):
            yield outcome(case)


def outcome(case: Any) -> Outcome:
    operators = tuple(sorted({n.op_type for n in case.model.graph.node}))
    inputs, wanted = ([np.asarray(v) if isinstance(v, np.generic) else v for v in values] for values in case.data_sets[0])
    if any(not isinstance(v, np.ndarray) or v.dtype.kind not in "fiub" for v in [*inputs, *wanted]):
        return Outcome(case.name, operators, "refused", "types that torch has not")
    try:
        module, tensors = imported(case.model, inputs)
        with torch.no_grad():
            got = pytree.tree_leaves(module(*tensors))
    except StructpruneError as error:
        if not isinstance(error, InputError):
            return Outcome(case.name, operators, "differs", f"not an InputError: {error}")
        return Outcome(case.name, operators, "refused", str(error))
    except Exception as error:  # anything that is no refusal is a fault of the importer
        return Outcome(case.name, operators, "differs", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}")
    why = next((d for mine, theirs in zip(got, wanted, strict=True) if (d := _difference(mine.detach().numpy(), theirs, case))), "")
    return Outcome(case.name, operators, "differs" if why else "agrees", why)


def _difference(mine: np.ndarray, theirs: np.ndarray, case: Any) -> str:
    if mine.shape != theirs.shape:
        return f"shape {mine.shape}, not {theirs.shape}"
    if mine.dtype != theirs.dtype:
        return f"type {mine.dtype}, not {theirs.dtype}"
    atol = max(case.atol, 1e-3 if theirs.dtype == np.float16 else 1e-6)
    if not np.allclose(mine.astype(np.float64), theirs.astype(np.float64), rtol=case.rtol, atol=atol, equal_nan=True):
        return f"off by {np.nanmax(np.abs(mine.astype(np.float64) - theirs.astype(np.float64))):.2g}"
    return ""


def imported(model: onnx.ModelProto, inputs: list[np.ndarray]) -> tuple[OnnxModule, list[torch.Tensor]]:
    """The module, and the inputs that are left to it."""
    given = dict(zip((i.name for i in model.graph.input), inputs, strict=False))
    program = _program(model)
    sizes = made_into_sizes(program.body)
    fixed = {name: value for name, value in given.items() if name in sizes}
    if fixed:
        program = _program(_with_constants(model, fixed))
    return OnnxModule(program), [torch.from_numpy(np.array(given[p.name])) for p in program.inputs]


def _program(model: onnx.ModelProto) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "node.onnx"
        onnx.save(_of_a_known_opset(model), path)
        return read(path)


def _of_a_known_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The tests are of the newest version of the standard, most of which is as it was; the checker tells what is not."""
    older = onnx.ModelProto()
    older.CopyFrom(model)
    for entry in older.opset_import:
        if not entry.domain:
            entry.version = min(entry.version, OPSETS[-1])
    return older


def _with_constants(model: onnx.ModelProto, values: dict[str, np.ndarray]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for i in reversed(range(len(changed.graph.input))):
        if changed.graph.input[i].name in values:
            del changed.graph.input[i]
    changed.graph.initializer.extend(numpy_helper.from_array(np.array(v), name) for name, v in values.items())
    return changed
