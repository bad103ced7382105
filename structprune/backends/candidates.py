"""What `structprune bench` compares: files and output directories, by name, and inputs that fit them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from structprune.errors import InputError, first_line
from structprune.frontends.example_inputs import input_tensors
from structprune.frontends.program import load_program
from structprune.ir.graph import repeated

_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64, "tensor(int64)": torch.int64,
          "tensor(int32)": torch.int32, "tensor(bool)": torch.bool}  # fmt: skip


def named(candidates: Sequence[str]) -> dict[str, Path]:
    """Names for what is compared. One output directory alone stands for its original and its small model."""
    paths = [Path(c) for c in candidates]
    if len(paths) == 1 and paths[0].is_dir() and (paths[0] / "original.onnx").is_file():
        return {"original": paths[0] / "original.onnx", "model": paths[0] / "model.onnx"}
    files = [p / "model.onnx" if p.is_dir() else p for p in paths]
    for given, file in zip(candidates, files, strict=True):
        if not file.is_file():
            raise InputError(f"{given}: no such file, nor an output directory with a model.onnx")
        if file.suffix not in (".onnx", ".pt2"):
            raise InputError(f"{given}: bench takes .onnx and .pt2 files and output directories")
    names = [p.name for p in paths]
    return {name if names.count(name) == 1 else str(path): file for name, path, file in zip(names, paths, files, strict=True)}


def example_inputs(candidates: Mapping[str, Path], shapes: Sequence[str], seed: int) -> tuple[Tensor, ...]:
    """Inputs of the given shapes; else of the first file's own shapes, with 1 for every dynamic axis."""
    generator = torch.Generator().manual_seed(seed)
    if shapes:
        return input_tensors(shapes, generator)[0]
    for path in candidates.values():
        if path.suffix == ".onnx":
            return tuple(
                _tensor([s if isinstance(s, int) else 1 for s in i.shape], _TYPES.get(i.type, torch.float32), generator) for i in _inputs(path)
            )
    program = load_program(next(iter(candidates.values())))
    if program.example_inputs is None:
        raise InputError("the .pt2 file holds no example inputs; give their shapes with --input")
    return tuple(v for v in torch.utils._pytree.tree_leaves(program.example_inputs) if isinstance(v, Tensor))


def resized(inputs: Sequence[Tensor], batch: int | None, side: int | None) -> tuple[Tensor, ...]:
    """The inputs repeated to another batch, and pictures (rank 4) to another height and width."""
    found = []
    for tensor in inputs:
        if batch is not None and tensor.dim():
            tensor = repeated(tensor, 0, batch)
        if side is not None and tensor.dim() == 4:
            tensor = repeated(repeated(tensor, 2, side), 3, side)
        found.append(tensor)
    return tuple(found)


def _inputs(path: Path) -> list[onnxruntime.NodeArg]:
    try:
        return list(onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs())
    except Exception as error:  # ONNX Runtime has an exception type for each status, and no common base
        raise InputError(f"{path} cannot be loaded by ONNX Runtime: {first_line(error)}") from error


def _tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(list(shape), generator=generator).to(dtype)
    return torch.randint(0, 2, list(shape), generator=generator).to(dtype)
