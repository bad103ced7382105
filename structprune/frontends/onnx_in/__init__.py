"""`.onnx` → a torch module that can be traced, pruned and trained, and is proved to answer as the file does.

    from structprune.frontends.onnx_in import load_onnx

    imported = load_onnx("model.onnx", inputs=("x=1x3x224x224",))
    result = structprune.compress(imported.model, imported.args, "channels=0.75")
    result.save("out")          # model.onnx has the names of the file's inputs and outputs; original.onnx is the file

`reading` turns the file into plain data, `module` runs it, `operators/` has one function for every operator of the standard, and `check` asks ONNX
Runtime. docs/onnx.md says what is imported and what is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from structprune.errors import InputError, first_line
from structprune.frontends.onnx_in import check
from structprune.frontends.onnx_in.example import draws, parse, sizes_for, written
from structprune.frontends.onnx_in.module import OnnxModule
from structprune.frontends.onnx_in.reading import read


@dataclass(frozen=True)
class Imported:
    """A module that answers as the file does on `args`, and what was found out about it."""

    model: OnnxModule
    args: tuple[Tensor, ...]
    error: float  # the largest difference from ONNX Runtime, as a share of the largest answer
    notes: tuple[str, ...]


def load_onnx(path: str | Path, inputs: Sequence[str] = (), seed: int = 0) -> Imported:
    """Import an ONNX file, in any opset from 7 to 26, and compare it with ONNX Runtime on example inputs.

    inputs: shapes of inputs whose sizes the file leaves free, such as '1x3x224x224' or 'x=1x3x224x224'; first axes need none. 'sr:=16000' fixes the
    value of an input that decides which branches run. seed: of the values of the example inputs.

    Raises InputError, in one line with the next step, for a file that is damaged, unsafe, quantised, holds operators that are not imported, needs
    an example, or is found not to be imported right.
    """
    path = Path(path)
    program = read(path)
    shapes, fixed = parse(program, inputs)
    model = OnnxModule(program, fixed)
    answer = check.runner(path)
    sizes = sizes_for(program, shapes, lambda known: _failure(answer, next(draws(program, known, fixed, seed))) is None)
    first, *others = draws(program, sizes, fixed, seed)
    failure = _failure(answer, first)
    if failure is not None:
        tried = ", ".join(written(port, sizes) for port in program.inputs)
        raise InputError(f"{path} does not run in ONNX Runtime on {tried}: {failure}; give other shapes with --input")
    args, error = first, check.agreement(path, answer, model, first, model.signature.outputs)
    for other in others if error > check.CLEAR else ():
        if _failure(answer, other) is None and (less := check.agreement(path, answer, model, other, model.signature.outputs)) < error:
            args, error = other, less
    notes = [f"{sum(1 for _ in program.body.every_node())} nodes of opset {program.opset}, imported; ONNX Runtime differs from them by {error:.1g}"]
    notes += [f"{name} is fixed to {value}: to any other value the small model answers that it is not a number" for name, value in fixed.items()]
    return Imported(model, args, error, tuple(notes))


def _failure(answer: check.Answer, inputs: Sequence[Tensor]) -> str | None:
    """Why the file does not run on some inputs; None where it does."""
    try:
        answer(inputs)
    except Exception as error:  # ONNX Runtime has an exception type for each status, and no common base
        return first_line(error)
    return None


__all__ = ["Imported", "OnnxModule", "load_onnx"]
