"""Where a model is deployed: how it is saved for a runtime, how its parts are timed there, and how two models compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from structprune.analysis.groups import Groups
from structprune.backends import eager, kernels, onnx
from structprune.backends.bench_process import BenchProcess
from structprune.backends.benchmark import Comparison, check_provider, environment, place_of
from structprune.backends.kernels import Kernel
from structprune.backends.latency import Attributed, attributed
from structprune.backends.tables import Tables
from structprune.errors import InputError, did_you_mean
from structprune.frontends.program import save_program
from structprune.frontends.trace import program_for_onnx
from structprune.ir.graph import Graph

NAMES = ("onnxruntime", "torch", "torch.compile")


@dataclass(frozen=True)
class Runtime:
    """`name` is one of NAMES; `device` is 'cpu', 'cuda', 'cuda:N', or of ONNX Runtime 'tensorrt'; `threads` those of the processor."""

    name: str
    device: str
    threads: int

    def file(self, folder: Path, stem: str) -> Path:
        """Where `save` writes a model of that name."""
        return folder / f"{stem}{'.onnx' if self.name == 'onnxruntime' else '.pt2'}"


def runtime(name: str, device: str, threads: int | None) -> Runtime:
    """Raises InputError for a runtime or device that is unknown or not there."""
    if name not in NAMES:
        raise InputError(f"unknown runtime {name!r}{did_you_mean(name, NAMES)}; use one of {', '.join(NAMES)}")
    if name != "onnxruntime" and device == "tensorrt":
        raise InputError(f"device 'tensorrt' belongs to the runtime onnxruntime; {name} runs on cpu and cuda")
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")
    place_of(device)
    if name == "onnxruntime":
        check_provider(name, device.partition(":")[0])
    return Runtime(name, device, torch.get_num_threads() if threads is None else threads)


def save_original(where: Runtime, graph: Graph, path: Path) -> dict[str, str]:
    """Write the model that was traced as the runtime reads it. Returns what `kernels_of` needs: which node each part of the file comes from."""
    if where.name != "onnxruntime":
        return save(where, graph.exported, graph, path)
    program, names = program_for_onnx(graph)
    return {part: names.get(node, node) for part, node in save(where, program, graph, path).items()}


def save(where: Runtime, program: ExportedProgram, graph: Graph, path: Path, metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """Write a program that is called as the graph is. Returns which of its nodes each part of the file comes from."""
    if where.name == "onnxruntime":
        sizes = graph.signature.sizes if graph.signature is not None else ()
        return onnx.export(program, path, graph.input_names, graph.output_names, metadata, sizes)
    save_program(program, path, metadata)
    return {}


def kernels_of(where: Runtime, graph: Graph, groups: Groups, path: Path, origins: dict[str, str]) -> Sequence[Attributed]:
    """What the runtime runs of the dense model in `path`, each part with the node that it computes, and the seconds that it takes.

    ONNX Runtime's profiler tells on the CPU. Elsewhere torch is timed operator by operator: the libraries that multiply on a GPU (cuDNN,
    cuBLAS) are the same, and the loop that measures the whole model corrects what differs.
    """
    if _is_profiled(where):
        return attributed(graph, groups, ran(where, graph, path), origins)
    return eager.profile(graph, groups, place_of(where.device), where.threads)


def ran(where: Runtime, graph: Graph, path: Path) -> list[Kernel]:
    """The same of any model, without a word on what its parts compute."""
    if _is_profiled(where):
        inputs = [v.detach().cpu().numpy() for v in graph.given_inputs() if isinstance(v, Tensor)]
        return kernels.profile(path, inputs, where.threads)
    return eager.kernels(graph, place_of(where.device), where.threads)


def tables_of(where: Runtime, say: Callable[[str], None] | None = None, path: Path | None = None) -> Tables:
    """The measured times of contractions that are kept for this machine and runtime."""
    machine = environment()
    place = place_of(where.device)
    processor = f"{machine['cpu']} ({machine['cpu_capability']}, {machine['cores']} cores)"
    if _is_profiled(where):
        library, timer = f"onnxruntime {machine['onnxruntime']} cpu without its profiler", partial(kernels.time_contractions, threads=where.threads)
    else:
        library, timer = f"torch {machine['torch']} {place.type}", partial(eager.time_contractions, place=place, threads=where.threads)
    if place.type == "cuda":
        processor = machine["gpus"][place.index or 0]
    return Tables(f"{processor}, {library}, {where.threads} thread(s)", timer, path, say)


def compare(where: Runtime, dense: Path, small: Path, inputs: Sequence[Tensor], bench: BenchProcess, seconds: float) -> Comparison:
    """Both files side by side, within that time."""
    compiled = where.name == "torch.compile"
    return bench.compare(dense, small, inputs, device=where.device, threads=where.threads, seconds=seconds, compiled=compiled)


def _is_profiled(where: Runtime) -> bool:
    return where.name == "onnxruntime" and where.device == "cpu"
