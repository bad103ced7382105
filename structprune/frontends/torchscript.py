"""TorchScript, files and modules: converted to a program of torch.export, and compared with what it was before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.errors import InputError, one_line
from structprune.frontends.exported import from_exported
from structprune.ir.samples import close, floats
from structprune.ir.traced import TracedModule, in_mode

_SAME = 1e-4  # of the largest answer: the same operators, in float32
_ADVICE = "pass the original module, or a .pt2 from torch.export.save"


def is_torchscript(entries: list[str]) -> bool:
    """Whether a zip archive with these entries is one of torch.jit.save."""
    return any(e.endswith("/constants.pkl") for e in entries) and any("/code/" in e for e in entries)


def load_torchscript(path: Path, args: tuple[Any, ...]) -> TracedModule:
    """The model of a TorchScript file as a graph, in evaluation mode, on these example inputs; its weights keep their names.

    Raises InputError for a file that cannot be read or converted, or whose conversion answers otherwise than the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        try:
            script = torch.jit.load(str(path), map_location="cpu")
        except Exception as error:  # torch raises anything from a RuntimeError to a pickle error for a damaged archive
            raise InputError(f"{path} is damaged or no TorchScript file ({one_line(error)}); {_ADVICE}") from error
    return converted(script, args, str(path))


def converted(script: torch.jit.ScriptModule, args: tuple[Any, ...], name: str) -> TracedModule:
    """A TorchScript module as a graph, in evaluation mode, on these example inputs; its weights keep their names. It is left as it was.

    name: for messages. Raises InputError where it cannot be converted, or what it is converted to answers otherwise.
    """
    from torch._export.converter import TS2EPConverter

    with warnings.catch_warnings(), in_mode(script, training=False), torch.no_grad():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        try:
            wanted = script(*_copied(args))
        except Exception as error:
            raise InputError(f"{name} does not run on these inputs ({one_line(error)}); check their shapes (--input)") from error
        try:
            program = TS2EPConverter(script, args, {}).convert()
            graph = from_exported(program, args, {})
            module = TracedModule(graph.module, graph.module.graph).eval()
            got = module(*_copied(args))
        except Exception as error:  # an operator that the converter does not know, or control flow
            raise InputError(f"{name} is in TorchScript, which cannot be converted ({one_line(error)}); {_ADVICE}") from error
        parameters = list(dict(script.named_parameters()))
    if not close(floats(got), floats(wanted), _SAME):
        raise InputError(f"{name} is in TorchScript, and what it is converted to answers otherwise; {_ADVICE}")
    for parameter in parameters:  # the converter makes buffers of them
        owner, _, leaf = parameter.rpartition(".")
        if parameter in dict(module.named_buffers()):
            holder = module.get_submodule(owner)
            value = holder._buffers.pop(leaf)
            assert value is not None
            holder.register_parameter(leaf, nn.Parameter(value.detach(), value.is_floating_point()))
    module.example_inputs = (args, {})
    return module


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return pytree.tree_map_only(Tensor, torch.clone, args)  # type: ignore[no-any-return]
