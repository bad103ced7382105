"""A .pt2 file → a module that trains, evaluates and copies like any other."""

from __future__ import annotations

from pathlib import Path

import torch

from structprune.errors import InputError
from structprune.frontends.trace import from_exported
from structprune.ir.traced import TracedModule


def load_program(path: str | Path) -> TracedModule:
    """The module that torch.export wrote to `path`, in evaluation mode. Raises InputError for a file that is none."""
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # torch raises anything from a KeyError to a zip error for a damaged archive
        raise InputError(f"{path}: not a program of torch.export: {type(error).__name__}; write it with torch.export.save") from error
    examples = program.example_inputs
    args, kwargs = (tuple(examples[0]), dict(examples[1])) if examples else ((), {})
    module = from_exported(program, args, kwargs).module
    module.training = False  # as it was traced
    traced = TracedModule(module, module.graph)
    traced.example_inputs = (args, kwargs) if examples else None
    return traced.eval()  # type: ignore[return-value]
