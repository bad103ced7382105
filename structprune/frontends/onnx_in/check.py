"""Does the module answer as the file does in ONNX Runtime? Asked of every import, before anything else is done with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.errors import InputError, first_line
from structprune.frontends.example_inputs import described

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest answer
CLEAR = 1e-4  # an error up to which nothing needs to be explained
_NOISE = 30  # times what rounding alone makes of the answer, where that is much
_LEAST = 1e-3
_MOST = 2e-2  # beyond this no rounding is an excuse

Answer = Callable[[Sequence[Any]], list[Tensor]]


def runner(path: Path, *, optimised: bool = True) -> Answer:
    """The file in ONNX Runtime, called with tensors in the order of its inputs. Raises InputError for a file that it does not load."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an exception type for each status, and no common base
        raise InputError(f"{path} cannot be loaded by ONNX Runtime, which imports are checked against: {first_line(error)}") from error
    names = [i.name for i in session.get_inputs()]

    def answer(inputs: Sequence[Any]) -> list[Tensor]:
        feed = {name: v.detach().cpu().numpy() for name, v in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(v)) for v in session.run(None, feed)]

    return answer


def agreement(path: Path, answer: Answer, module: Callable[..., Any], inputs: Sequence[Any], names: Sequence[str]) -> float:
    """Largest difference between ONNX Runtime (`answer`) and the module, as a share of the largest answer of an output.

    A model on whose answer rounding shows (a saturated sigmoid, say) is allowed thirty times of what rounding makes: ONNX Runtime's optimised
    kernels against its plain ones, and weights that move by a bit. Raises InputError, that names the output, where they differ by more: the import is
    wrong.
    """
    wanted, got = answer(inputs), _run(module, inputs)
    worst = 0.0
    for i, (name, mine, theirs) in enumerate(zip(names, got, wanted, strict=True)):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise _wrong(path, name, f"{described([mine])} where ONNX Runtime answers {described([theirs])}")
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                raise _wrong(path, name, f"{int((mine != theirs).sum())} of {mine.numel()} entries differ from ONNX Runtime's")
            continue
        error = apart(mine, theirs)
        if not error <= TOLERANCE[mine.dtype]:
            plain = runner(path, optimised=False)(inputs)[i]
            moved = _run(_moved_by_a_bit(module), inputs)[i] if isinstance(module, nn.Module) else mine
            limit = min(_MOST, TOLERANCE[mine.dtype] + _NOISE * max(apart(plain, theirs), apart(moved, mine)))
            if not error <= limit:
                raise _wrong(path, name, f"it differs from ONNX Runtime's by {error:.2g} of the largest answer, where rounding explains {limit:.1g}")
        worst = max(worst, error)
    return worst


def runs(path: Path, inputs: Sequence[Any]) -> bool:
    """Whether the file runs on inputs of these sizes, and answers with something."""
    try:
        return all(v.numel() for v in runner(path)(inputs))
    except Exception:  # ONNX Runtime has an exception type for each status, and no common base
        return False


def apart(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the largest answer; entries that are not finite must be the same.

    An answer below a thousandth counts as one: ONNX Runtime's sigmoid is right to 1e-7, not to a share of what it answers.
    """
    a, b = mine.double(), theirs.double()
    different = ~((a == b) | (a.isnan() & b.isnan()))
    if not different.any():
        return 0.0
    scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
    return float((a - b)[different].abs().max()) / max(scale, _LEAST)


def _run(module: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
    with torch.no_grad():
        return [v for v in pytree.tree_leaves(module(*inputs)) if isinstance(v, Tensor)]


def _moved_by_a_bit(module: nn.Module) -> nn.Module:
    """A copy whose weights differ by about what rounding would make of them."""
    moved = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.mul_(1 + torch.finfo(weight.dtype).eps * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    return moved


def _wrong(path: Path, name: str, how: str) -> InputError:
    return InputError(f"{path} is not imported right, and is left alone: output {name!r}: {how}; report it with the file")
