"""Programs of torch.export as files: one that every Python reads, and back to a module that trains, evaluates and copies like any other."""

from __future__ import annotations

import collections
import copy
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from structprune.errors import InputError
from structprune.frontends.archives import check_program
from structprune.frontends.exported import from_exported
from structprune.ir.graph import Graph
from structprune.ir.traced import TracedModule

_EVERYWHERE = (None, tuple, list, dict, collections.OrderedDict, collections.defaultdict, collections.deque, torch.Size)


def save_program(program: ExportedProgram, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .pt2 file that loads where the classes of the model's answers are not known: they become dicts, or tuples.

    torch.export keeps the name of such a class (the outputs of transformers, dataclasses) and refuses to load a file without it.
    """
    entries = [
        e if e.signature is None else replace(e, signature=replace(e.signature, out_spec=_plain(e.signature.out_spec)))
        for e in program.module_call_graph
    ]
    plain = copy.copy(program)
    plain._module_call_graph = entries
    buffer = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(plain, buffer, extra_files=dict(metadata or {}))
    Path(path).write_bytes(buffer.getbuffer())


def _plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """A class with named fields as a dict, any other as a tuple; what every Python has, as it is."""
    children = [_plain(child) for child in spec.children()]
    if spec.is_leaf() or spec.type in _EVERYWHERE:
        return pytree.TreeSpec(spec.type, spec.context, children)
    for names in (spec.context, spec.context[0] if isinstance(spec.context, (list, tuple)) and spec.context else None):
        if isinstance(names, (list, tuple)) and len(names) == len(children) and all(isinstance(n, str) for n in names):
            return pytree.TreeSpec(dict, list(names), children)
    return pytree.TreeSpec(tuple, None, children)


def load_program(path: str | Path) -> TracedModule:
    """The module that torch.export wrote to `path`, in evaluation mode. Raises InputError for a file that is none."""
    graph = load_graph(path)
    graph.module.training = False  # as it was traced
    traced = TracedModule(graph.module, graph.module.graph)
    traced.example_inputs = (graph.args, dict(graph.kwargs)) if graph.exported.example_inputs else None
    return traced.eval()  # type: ignore[return-value]


def load_graph(path: str | Path) -> Graph:
    """The graph of a program that torch.export wrote to `path`. Raises InputError for a file that is none, or whose loading would run code."""
    if Path(path).is_file():
        check_program(Path(path))
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # torch raises anything from a KeyError to a zip error for a damaged archive
        raise InputError(f"{path}: not a program of torch.export: {type(error).__name__}; write it with torch.export.save") from error
    examples = program.example_inputs
    args, kwargs = (tuple(examples[0]), dict(examples[1])) if examples else ((), {})
    return from_exported(program, args, kwargs)
