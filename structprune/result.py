"""What `compress` gives back: the small model, and the files that it is deployed as."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.backends import directory as out
from structprune.backends import onnx, profiles, runtimes
from structprune.backends.bench_process import BenchProcess
from structprune.backends.benchmark import Comparison, environment
from structprune.backends.quantize import OnnxModule
from structprune.backends.quantize import quantize as quantized
from structprune.backends.report import Report
from structprune.backends.runtimes import Runtime
from structprune.closed_loop import Built, Found
from structprune.errors import InputError, VerificationError, first_line
from structprune.frontends.exported import from_exported
from structprune.frontends.onnx_in.check import runs as runs_in_onnxruntime
from structprune.frontends.onnx_in.reading import read_again
from structprune.frontends.program import save_program
from structprune.frontends.trace import program_for_onnx, retrace
from structprune.ir.graph import Graph, digest, held_by, resized, source_of
from structprune.ir.operators import is_random, operator_name
from structprune.ir.plan import Plan
from structprune.ir.samples import Samples
from structprune.ir.traced import TracedModule, state_kept
from structprune.transform.own_class import take_values
from structprune.transform.precision import call_in_float32, floated, in_float32, in_half, type_of
from structprune.transform.verify import positions

Progress = Callable[[str], None]
Evaluate = Callable[[nn.Module], float]

_SECONDS = 6.0  # of a comparison, at most


@dataclass(frozen=True)
class Result:
    """A verified small model, with the plan that made it and the report of what was done."""

    model: nn.Module
    plan: Plan
    report: Report
    graph: Graph = field(repr=False)
    small: TracedModule = field(repr=False)  # the same weights as `model`, as a graph
    clock: Clock = field(repr=False)
    runtime: Runtime  # that it is deployed in
    found: Found | None = field(default=None, repr=False)  # what hit a latency: files of this model and of the one before pruning
    samples: Samples | None = field(default=None, repr=False)  # of the model's inputs, where some were given
    evaluate: Evaluate | None = field(default=None, repr=False)

    def _repr_html_(self) -> str:
        return self.report._repr_html_() + self.plan._repr_html_()

    def export_onnx(self, path: str | Path, *, opset: int | None = None) -> float:
        """Write the small model, with its present weights, as ONNX; returns ONNX Runtime's largest relative difference from it."""
        return self._export(*self._form(half=False), Path(path), opset)

    def save(
        self,
        directory: str | Path,
        *,
        latency: bool = True,
        model_name: str = "",
        notes: Sequence[str] = (),
        half: bool = False,
        quantize: str | None = None,
        opset: int | None = None,
        typed: Mapping[str, Any] | None = None,
    ) -> Report:
        """Write the output directory (all files or none) and return the full report.

        latency: measure both models, in the runtime of deployment and as ONNX files in ONNX Runtime.
        half: the small model computes in float16, in all its files; inputs and answers keep their type.
        quantize: 'int8' writes model.int8.onnx beside the others, calibrated and judged on the samples that `compress` was given.
        opset: the version of ONNX's operators; by default that of torch's exporter.
        typed: for the report, the "command" and the "config" file that the user gave.
        Raises InputError for a directory that cannot be written, and VerificationError where ONNX Runtime disagrees with torch.
        """
        check_form(self.small, half, quantize, self.samples is not None)
        data = self.report.to_dict() | {"model": model_name, **(typed or {}), "notes": [*notes, *self.report.data["notes"]]}
        built = self._built(half, opset)
        with out.all_or_none(Path(directory)) as work, BenchProcess() as bench:
            if latency and built is None:
                bench.start()
            data["verification"]["onnx_error"] = self.write_model(work, half=half, opset=opset)
            data["precision"] = "float16" if half else str(type_of(self.small)).removeprefix("torch.")
            self.plan.save(work / "plan.json")
            with self.clock("onnx"):
                if self.graph.signature is not None:
                    (work / "original.onnx").write_bytes(read_again(self.graph.signature))
                elif self.found is not None and self.found.dense.original.suffix == ".onnx":
                    onnx.copy_file(self.found.dense.original, work / "original.onnx")
                else:
                    self._export_original(work / "original.onnx", opset)
            data["onnx_bytes"] = {"before": onnx.size(work / "original.onnx"), "after": onnx.size(work / "model.onnx")}
            if latency:
                with self.clock("benchmark"):
                    data["latency_ms"] = self._latencies(work, bench, built)
                with self.clock("profile"):
                    data["operators"] = self._operators(work)
            if quantize is not None:
                with self.clock("quantize"):
                    data["int8"] = self._quantized(work, bench if latency else None)
                data["notes"] += [note] if (note := data["int8"].pop("note", "")) else []
            data["seconds"] = dict(self.clock.seconds)
            report = Report(data)
            report.save_json(work / "report.json")
            report.save_html(work / "report.html")
        return report

    def write_model(self, folder: Path, *, half: bool = False, opset: int | None = None) -> float:
        """Write the small model as model.pt2, model.safetensors and model.onnx; returns ONNX Runtime's largest relative difference from it."""
        built = self._built(half, opset)
        with self.clock("export"):
            module, graph = self._form(half)
            if built is not None and built.file.suffix == ".pt2":
                shutil.copyfile(built.file, folder / "model.pt2")
            else:
                small = built.small if built is not None else retrace(module, graph)
                save_program(small.exported, folder / "model.pt2", out.stamp(self.plan))
            out.save_weights(module, folder / "model.safetensors", out.stamp(self.plan))
        with self.clock("onnx"):
            if built is None or built.file.suffix != ".onnx":
                return self._export(module, graph, folder / "model.onnx", opset)
            onnx.copy_file(built.file, folder / "model.onnx")
            return _checked(folder / "model.onnx", module, module, graph)

    def _built(self, half: bool, opset: int | None) -> Built | None:
        """What was built to hit a latency, where its file is the one that would be written now: the user may have trained the model since."""
        if self.found is None or half or opset is not None or self.found.built.weights != digest(self._form(half)[0]):
            return None
        return self.found.built

    def _form(self, half: bool) -> tuple[TracedModule, Graph]:
        """The small model with its present weights, as it is or in float16, and how it is called."""
        if self.small is not self.model:  # the user may have trained the model since
            take_values(self.small, held_by(self.model))
        if not half:
            return self.small, self.graph
        bfloat16 = type_of(self.small) == torch.bfloat16
        return in_half(in_float32(self.small) if bfloat16 else self.small), _in_float32(self.graph) if bfloat16 else self.graph

    def _quantized(self, work: Path, bench: BenchProcess | None) -> dict[str, Any]:
        """Write model.int8.onnx; what it loses beside model.onnx, and what it gains."""
        assert self.samples is not None
        target = work / "model.int8.onnx"
        found = quantized(work / "model.onnx", target, self.samples) | {"bytes": target.stat().st_size}
        if self.evaluate is not None:
            try:
                found["accuracy"] = self.evaluate(OnnxModule(target))
            except Exception as error:  # it was written for a module with parameters, which a file has not
                found["note"] = f"int8 has no accuracy: evaluate= does not take an ONNX file: {type(error).__name__} {error}"
        if bench is not None:
            on_cpu = Runtime("onnxruntime", "cpu", self.runtime.threads)
            compared = runtimes.compare(on_cpu, work / "original.onnx", target, self._inputs(on_cpu), bench, _SECONDS)
            found["latency_ms"] = _latency(compared)
        return found

    def _latencies(self, work: Path, bench: BenchProcess, built: Built | None) -> dict[str, Any]:
        """In the runtime of deployment, and in ONNX Runtime on the CPU, and on the GPU where there is one: by runtime."""
        on_cpu = Runtime("onnxruntime", "cpu", self.runtime.threads)
        has_gpu = "CUDAExecutionProvider" in environment()["providers"] and torch.cuda.is_available()
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for where in dict.fromkeys([self.runtime, on_cpu, *([replace(on_cpu, device="cuda")] if has_gpu else [])]):
                if built is not None and where == self.runtime:
                    found[built.compared.latencies[0].runtime] = _latency(built.compared)
                    continue
                original = where.file(work, "original")
                if not original.exists():  # only ONNX stays in the directory
                    original = where.file(Path(folder), "original")
                    runtimes.save_original(where, self.graph, original)
                compared = runtimes.compare(where, original, where.file(work, "model"), self._inputs(where), bench, _SECONDS)
                found[compared.latencies[0].runtime] = _latency(compared)
        return found

    def _export_original(self, path: Path, opset: int | None) -> None:
        graph = self.graph
        if type_of(self.small) == torch.bfloat16:
            graph = _in_float32(graph)
            program = retrace(in_float32(from_exported(self.graph.exported, self.graph.args, self.graph.kwargs).module), graph).exported
        else:
            program, _ = program_for_onnx(graph)
        onnx.export(program, path, graph.input_names, graph.output_names, opset=opset)

    def _operators(self, work: Path) -> dict[str, Any]:
        """Where the time of both files goes in ONNX Runtime on the CPU, by operator."""
        on_cpu = Runtime("onnxruntime", "cpu", self.runtime.threads)
        files = {name: work / f"{name}.onnx" for name in ("original", "model")}
        return profiles.to_dict(profiles.profiles(files, self._inputs(on_cpu), on_cpu.threads))

    def _inputs(self, where: Runtime) -> tuple[Tensor, ...]:
        """The tensors of the example call, as the files for a runtime take them: ONNX files of a model in bfloat16 compute in float32."""
        values = self.graph.given_inputs()
        floats = where.name == "onnxruntime" and type_of(self.small) == torch.bfloat16
        return tuple(v for v in (floated(values) if floats else values) if isinstance(v, Tensor))

    def _export(self, module: TracedModule, graph: Graph, path: Path, opset: int | None) -> float:
        """Of a model in bfloat16, of which ONNX Runtime knows little, the file computes in float32; of one in float16 the answers are compared with
        the small model's own.
        """
        reference = self.small if graph is self.graph else in_float32(self.small)
        if type_of(module) == torch.bfloat16:
            module, graph = in_float32(module), _in_float32(graph)
            reference = module
        sizes = graph.signature.sizes if graph.signature is not None else ()
        onnx.export(retrace(module, graph).exported, path, graph.input_names, graph.output_names, out.stamp(self.plan), sizes, opset)
        return _checked(path, module, reference, graph)


def _checked(path: Path, module: TracedModule, reference: nn.Module, graph: Graph) -> float:
    """`_difference` of the file of `module` from `reference`, or an error that says what the user can do about it."""
    tolerance = onnx.TOLERANCE_HALF if type_of(module) == torch.float16 else None
    try:
        with state_kept(reference):
            return _difference(path, reference, graph, tolerance)
    except VerificationError as differs:
        copied_to = [n.all_input_nodes[0] for n in graph.nodes if n.target is torch.ops.aten.copy_.default]
        written = [str(to.target) for to in copied_to if to.op == "get_attr"]  # the last that a call does with buffers that it changes
        if written:
            kept = f"the model keeps {', '.join(written)} for its next call"
            raise VerificationError(f"{differs}; {kept}, and an ONNX file keeps nothing: make that an input and an output") from differs
        drawn = next((node for node in graph.nodes if is_random(node)), None)
        if drawn is None:
            raise
        where = f"{operator_name(drawn)} at {source_of(drawn) or drawn.name}"
        raise VerificationError(
            f"{differs}; the model draws random numbers ({where}), and no two runtimes the same: make the noise an input"
        ) from differs


def _difference(path: Path, reference: nn.Module, graph: Graph, tolerance: float | None) -> float:
    """Between the file and the model on the example, on a batch of one, and at other sizes, where these are free.

    Boxes in several pictures are none in the first alone.
    """
    error = onnx.check(path, reference, *graph.example(), tolerance)
    if graph.dynamic_batch and not positions(graph):
        values, calling = pytree.tree_flatten(graph.example())
        args, kwargs = pytree.tree_unflatten([v[:1] if own else v for v, own in zip(values, graph.batched, strict=True)], calling)
        error = max(error, onnx.check(path, reference, args, kwargs, tolerance, batch_of_one=True))
    if any(graph.lengths):
        error = max([error, *(onnx.check(path, reference, *example, tolerance) for example in _other_sizes(graph, reference))])
    return error


def check_form(model: nn.Module, half: bool, quantize: str | None, samples: bool) -> None:
    """Raise InputError for a form that a result of this model cannot be saved in."""
    if quantize is not None and quantize != "int8":
        raise InputError(f"quantize={quantize!r} is not known; use 'int8', or leave it out")
    if quantize is not None and half:
        raise InputError("half and quantize exclude each other: int8 starts from the model in float32; leave one out")
    if quantize is not None and type_of(model) == torch.float16:
        raise InputError("int8 starts from a model in float32, and this one is in float16: give it as model.float()")
    if quantize is not None and not samples:
        raise InputError("int8 needs samples of the model's inputs, from which ranges are taken; give some as calibration= (--calibration)")


def _in_float32(graph: Graph) -> Graph:
    """How `in_float32` of a module is called."""
    args, kwargs = call_in_float32(graph.args, graph.kwargs)
    return replace(graph, args=args, kwargs=kwargs)


def _other_sizes(graph: Graph, module: nn.Module) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The example with its dynamic axes at half and at twice their length, where the module runs so.

    Raises VerificationError where it runs at neither. Sizes at which the file that the model was read from does not run say nothing.
    """
    found, refused = [], ""
    for factor in (0.5, 2):
        args, kwargs = graph.called_with(resized(graph.given_inputs(), graph.lengths, factor))
        if graph.signature is not None and not runs_in_onnxruntime(graph.signature.file, args):
            continue
        try:
            with torch.no_grad():
                module(*args, **kwargs)
            found.append((args, kwargs))
        except RuntimeError as error:  # a window, a stride or a table of positions that does not fit
            refused = first_line(error)
    if not found and refused:
        raise VerificationError(f"the small model runs at neither half nor twice the size of the dynamic axes: {refused}")
    return found


class Clock:
    """Seconds of each stage, and word of it to whoever shows progress."""

    def __init__(self, progress: Progress | None = None):
        self.seconds: dict[str, float] = {}
        self.say = progress or (lambda line: None)

    def copy(self) -> Clock:
        """One that has seen the same stages, and goes on alone."""
        clock = Clock(self.say)
        clock.seconds = dict(self.seconds)
        return clock

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.say(stage)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def _latency(compared: Comparison) -> dict[str, Any]:
    """For the report: plain JSON."""
    before, after = compared.latencies
    ratio = compared.ratios[after.name]
    return {
        "before": {"median": before.median_ms, "low": before.low_ms, "high": before.high_ms},
        "after": {"median": after.median_ms, "low": after.low_ms, "high": after.high_ms},
        "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
        "verdict": compared.verdict(after.name),
        "threads": compared.threads,
        "device": compared.device,
        "notes": list(compared.notes),
    }
