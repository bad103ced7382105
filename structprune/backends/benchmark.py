"""Latency side by side: every candidate runs in every round, in random order, and is compared with the first one.

    comparison = benchmark({"dense": dense, "pruned": "pruned.onnx"}, (torch.randn(1, 3, 224, 224),))
    print(comparison)

A machine changes its speed while it is measured (clocks, neighbours, heat). Two measurements one after the other charge
that to the models; a ratio *within a round* does not, so ratios come from paired rounds, and their interval says what is
left. Candidates also disturb each other: idle threads of one runtime that spin take cores from the next candidate. On
two cores that made an interleaved ratio of 0.27 read 0.19, hence `session.force_spinning_stop` and `REST_SECONDS` below.
And a session of a runtime has its luck: where its memory and its threads lie. Two sessions of one file of a millisecond
differed by 5 %, each of them steadily; so sessions are started anew several times, and the interval tells of that too.
"""

import copy
import gc
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from structprune.backends.resources import NO_ENERGY, NO_MEMORY, Resources, measure
from structprune.errors import InputError, first_line
from structprune.ir.graph import memo_for

Runner = Callable[[], float]
"""One run of one candidate, its inputs already in place; returns seconds. A runner ends when the outputs exist."""

MIN_ROUNDS = 5
STARTS = 5  # of every session, where starting takes little beside the time limit
WARMUP_RUNS, WARMUP_SECONDS = 3, 0.1
SHORTEST_TIMING = 2e-3  # seconds; shorter candidates run several times a round, to beat timer noise
REST_SECONDS = 10e-3  # OpenMP threads of torch spin for about 8 ms after a run
RESAMPLES = 2000
_AT_ONCE = 1 << 20  # values that are drawn at once: 8 MiB an array
_UNNOTICED = 0.2  # cores that others may take beside threads on all cores
NOTICEABLE = 1.005  # what shows at the two digits of a verdict; less counts as no difference

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
ONNX_TYPES = {
    torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE", torch.bool: "BOOL",
    torch.int64: "INT64", torch.int32: "INT32", torch.int16: "INT16", torch.int8: "INT8", torch.uint8: "UINT8",
}  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """time(candidate) / time(first candidate): the median over rounds and its bootstrap 95 % interval. Below 1 is faster."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """One candidate on one runtime, in milliseconds a run: the median over rounds and its bootstrap 95 % interval.

    `runtime` is 'onnxruntime-cpu', '-cuda' or '-tensorrt', 'torch-cpu', 'torch-cuda' or 'torch.compile-...'; `samples` is the number of rounds;
    `throughput` is rows of the batch a second; for peak memory and energy of a run see `resources.Resources`.
    """

    name: str
    runtime: str
    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    throughput: float
    peak_bytes: int | None = None
    joules: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All candidates against the first one. `ratios` has every candidate, the first with exactly 1; prints as a table.

    `busy_elsewhere`: how many cores other processes kept busy meanwhile, on average.
    """

    latencies: tuple[Latency, ...]
    ratios: Mapping[str, Ratio]
    device: str
    threads: int
    machine: Mapping[str, Any]
    notes: tuple[str, ...]
    busy_elsewhere: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other processes had cores that the threads needed, by the count of this machine."""
        return _disturb(self.busy_elsewhere, self.threads)

    def verdict(self, name: str) -> str:
        """One candidate in words: faster by how much, no gain, or slower. Faster is claimed only if the whole interval is."""
        baseline, ratio = self.latencies[0].name, self.ratios[name]
        if name == baseline:
            return f"{name}: the baseline"
        if 1 / ratio.high >= NOTICEABLE:
            return f"{name}: {1 / ratio.median:.2f}x faster ({1 / ratio.high:.2f}-{1 / ratio.low:.2f})"
        word = "slower" if ratio.low >= NOTICEABLE else "no gain"
        return f"{name}: {word}: {ratio.median:.2f}x the time of {baseline} ({ratio.low:.2f}-{ratio.high:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the fields, and `verdicts` by name."""
        return {
            "latencies": [asdict(latency) for latency in self.latencies],
            "ratios": {name: asdict(ratio) for name, ratio in self.ratios.items()},
            "verdicts": {name: self.verdict(name) for name in self.ratios},
            "device": self.device,
            "threads": self.threads,
            "machine": dict(self.machine),
            "notes": list(self.notes),
            "busy_elsewhere": self.busy_elsewhere,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Comparison":
        """The inverse of `to_dict`."""
        return Comparison(
            latencies=tuple(Latency(**latency) for latency in data["latencies"]),
            ratios={name: Ratio(**ratio) for name, ratio in data["ratios"].items()},
            device=data["device"],
            threads=data["threads"],
            machine=data["machine"],
            notes=tuple(data["notes"]),
            busy_elsewhere=data["busy_elsewhere"],
        )

    def __str__(self) -> str:
        rows = [("candidate", "runtime", "median ms", "95 % interval", "time ratio", "95 % interval", "rounds", "per s", "peak MB", "mJ")]
        for latency in self.latencies:
            ratio = self.ratios[latency.name]
            rows.append((
                latency.name, latency.runtime,
                f"{latency.median_ms:.3f}", f"{latency.low_ms:.3f}-{latency.high_ms:.3f}",
                f"{ratio.median:.3f}", f"{ratio.low:.3f}-{ratio.high:.3f}", str(latency.samples),
                f"{latency.throughput:.1f}", _shown(latency.peak_bytes, 1e-6), _shown(latency.joules, 1e3),
            ))  # fmt: skip
        rows = list(zip(*(column for column in zip(*rows, strict=True) if any(column[1:])), strict=True))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join([*map(str.ljust, row[:2], widths[:2]), *map(str.rjust, row[2:], widths[2:])]).rstrip() for row in rows]
        processor = self.machine["cpu"] if self.device == "cpu" else ", ".join(self.machine["gpus"])
        plural = "" if self.threads == 1 else "s"
        where = f"on {self.device} ({processor}), {self.threads} thread{plural}"
        return "\n".join([*table, *map(self.verdict, self.ratios), where, *(f"note: {note}" for note in self.notes)])


def benchmark(
    candidates: Mapping[str, nn.Module | str | Path],
    inputs: Sequence[Tensor],
    *,
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 200,
    seconds: float = 10.0,
    seed: int = 0,
    resources: bool = True,
    compiled: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Time every candidate on the same inputs and compare it with the first one, the baseline.

    A candidate is a module (a copy of it runs, in evaluation and inference mode; the original is left untouched), an
    `.onnx` file (or a directory with a `model.onnx`), run by ONNX Runtime, or a `.pt2` file. `inputs` are fed by position.

    `device` is 'cpu', 'cuda', 'cuda:N', or 'tensorrt' (ONNX files only by TensorRT, modules then run on CUDA). `threads`
    holds for both runtimes; as torch is set if not given, and put back afterwards. Timing stops after `rounds` rounds or
    `seconds` seconds, starts and warm-up not counted, but not before 5 rounds. `resources`: peak memory and energy too, where
    the machine tells. `compiled`: modules and `.pt2` files run under torch.compile. `progress` receives a line at each step.

    Raises InputError for a missing or unreadable file, a device or provider that is not there, inputs that do not fit a
    candidate (naming the input), and a candidate that fails on them.
    """
    say = progress or (lambda line: None)
    threads = torch.get_num_threads() if threads is None else threads
    _check_arguments(candidates, inputs, threads)
    device = str(device)
    place = place_of(device)

    names = list(candidates)
    runtimes, starters = zip(*[_starter(name, candidates[name], inputs, device, place, threads, compiled) for name in names], strict=True)
    mixed = len(set(runtimes)) > 1
    rest = REST_SECONDS if mixed and place.type == "cpu" and threads > 1 else 0.0
    with steady(threads), torch.inference_mode():
        used = {name: Resources() for name in names}
        for name, start in zip(names, starters, strict=True) if resources else ():
            say(f"benchmark: memory and energy of {name}")
            used[name] = measure(lambda name=name, start=start: _warmed_up(name, start())[0], place)  # type: ignore[misc]
        cores_busy_elsewhere = _watch_others()
        parts = _time_starts(dict(zip(names, starters, strict=True)), rounds, seconds, rest, seed, say)
        others = cores_busy_elsewhere()

    samples = sum(map(len, parts))
    machine = environment()
    milliseconds = [_bootstrap([part[:, column] * 1e3 for part in parts], seed) for column in range(len(names))]
    batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 1
    notes = _notes(samples, rounds, seconds, threads, machine["cores"], others, mixed)
    if resources:
        notes += tuple(
            note for key, note in (("peak_bytes", NO_MEMORY), ("joules", NO_ENERGY)) if any(getattr(u, key) is None for u in used.values())
        )
    return Comparison(
        latencies=tuple(
            Latency(name, runtime, *interval, samples, batch / interval[0] * 1e3, **asdict(used[name]))
            for name, runtime, interval in zip(names, runtimes, milliseconds, strict=True)
        ),
        ratios={name: Ratio(*_bootstrap([part[:, column] / part[:, 0] for part in parts], seed)) for column, name in enumerate(names)},
        device=device,
        threads=threads,
        machine=machine,
        notes=notes,
        busy_elsewhere=others,
    )


def environment() -> dict[str, Any]:
    """The machine and the runtimes that a measurement holds for; plain JSON, and nothing that identifies user or host.

    `cores` are those this process may use; `providers` are the execution providers ONNX Runtime was built with.
    """
    return {
        "os": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
    }


# ---------------------------------------------------------------------------------------------------- candidates → runners


def place_of(device: str) -> torch.device:
    """Where tensors live for `device`. InputError unless it names a device that PyTorch sees."""
    if device == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"tensorrt|cuda(?::(\d+))?", device)
    if match is None:
        raise InputError(f"device '{device}' is unknown: use 'cpu', 'cuda', 'cuda:N' or 'tensorrt'")
    if not torch.cuda.is_available():
        raise InputError(f"device '{device}': PyTorch {torch.__version__} finds no CUDA GPU; check the driver and that PyTorch is a CUDA build")
    place = torch.device("cuda", int(match[1]) if match[1] else torch.cuda.current_device())
    if place.index >= torch.cuda.device_count():
        raise InputError(f"device '{device}': PyTorch finds only {torch.cuda.device_count()} GPU(s), numbered from 0")
    return place


def check_provider(name: str, kind: str) -> None:
    """InputError unless ONNX Runtime was built for the device 'cpu', 'cuda' or 'tensorrt'."""
    if PROVIDERS[kind] not in onnxruntime.get_available_providers():
        built = f"ONNX Runtime {onnxruntime.__version__} was built without {PROVIDERS[kind]}"
        raise InputError(f"{name}: device '{kind}': {built}; install onnxruntime-gpu")


def _check_arguments(candidates: Mapping[str, Any], inputs: Any, threads: int) -> None:
    if not candidates:
        raise InputError("benchmark: no candidates; give at least a baseline, such as {'dense': model}")
    if not isinstance(inputs, tuple | list) or not all(isinstance(tensor, Tensor) for tensor in inputs):
        raise InputError("benchmark: inputs must be a tuple of tensors; write (x,) for one tensor x")
    if threads < 1:
        raise InputError(f"benchmark: threads must be at least 1, not {threads}")


def _starter(
    name: str, candidate: nn.Module | str | Path, inputs: Sequence[Tensor], device: str, place: torch.device, threads: int, compiled: bool
) -> tuple[str, Callable[[], Runner]]:
    """The runtime's name and what starts the candidate in it. InputError if it cannot be loaded or the inputs do not fit."""
    module: Callable[[], nn.Module]
    if isinstance(candidate, nn.Module):
        module = partial(_evaluation_copy, name, candidate)
    elif not isinstance(candidate, str | Path):
        raise InputError(f"{name}: a module or a path to an .onnx or .pt2 file is needed, not {type(candidate).__name__}")
    else:
        path = Path(candidate)
        if path.is_dir():
            path /= "model.onnx"
        if not path.is_file():
            raise InputError(f"{name}: no such file: {path}")
        if path.suffix == ".onnx":
            kind = device.partition(":")[0]
            check_provider(name, kind)
            return f"onnxruntime-{kind}", lambda: _onnx_runner(name, path, inputs, kind, place, threads)
        if path.suffix != ".pt2":
            raise InputError(f"{name}: {path}: cannot run a '{path.suffix}' file; export it to .onnx, or give the module itself")
        module = partial(_load_exported, name, path, place)
    kind = "torch.compile" if compiled else "torch"
    return f"{kind}-{place.type}", cache(lambda: _torch_runner(module(), inputs, place, compiled))  # torch has no sessions: one start is enough


def _evaluation_copy(name: str, module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, so that the mode, the device and whatever the original caches in forward stay as they are."""
    try:
        duplicate = copy.deepcopy(module, memo_for(module))
    except Exception as error:  # whatever the module's own attributes raise
        raise InputError(f"{name}: the module cannot be copied (copy.deepcopy): {first_line(error)}") from error
    with suppress(NotImplementedError):  # modules of torch.export were traced in one mode and refuse to change it
        duplicate.eval()
    return duplicate


def _load_exported(name: str, path: Path, place: torch.device) -> nn.Module:
    """The module of a .pt2 file. Its graph holds device names too, which `Module.to` would not change."""
    try:
        program = torch.export.load(path)
        return (program if place.type == "cpu" else move_to_device_pass(program, place)).module()
    except Exception as error:  # torch.export.load raises zip, pickle, key and assertion errors alike
        raise InputError(f"{name}: {path}: torch.export cannot load it: {first_line(error)}") from error


def _torch_runner(module: nn.Module, inputs: Sequence[Tensor], place: torch.device, compiled: bool) -> Runner:
    """Run `module`, which becomes the runner's own, on copies of the inputs: it may write into them."""
    module = module.to(place)
    call: Callable[..., Any] = torch.compile(module) if compiled else module
    arguments = [tensor.detach().to(place, copy=True) for tensor in inputs]

    def run() -> float:
        stop = stopwatch(place)
        call(*arguments)
        seconds = stop()
        return seconds()

    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return run


def stopwatch(place: torch.device) -> Callable[[], Callable[[], float]]:
    """Started now; called, it stops, and what it returns tells the seconds. On a GPU those of the device, known when it gets there."""
    if place.type == "cpu":
        start = time.perf_counter_ns()

        def stop_on_cpu() -> Callable[[], float]:
            seconds = (time.perf_counter_ns() - start) * 1e-9
            return lambda: seconds

        return stop_on_cpu

    stream = torch.cuda.current_stream(place)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record(stream)

    def seconds_on_cuda() -> float:
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    def stop_on_cuda() -> Callable[[], float]:
        last.record(stream)
        return seconds_on_cuda

    return stop_on_cuda


def _onnx_runner(name: str, path: Path, inputs: Sequence[Tensor], kind: str, place: torch.device, threads: int) -> Runner:
    """Run the file with ONNX Runtime, inputs and outputs bound on the device, so that no run copies between host and GPU."""
    session = _session(name, path, kind, place.index or 0, threads)
    _check_inputs(name, path, session, inputs)

    tensors = [tensor.detach().to(place).contiguous() for tensor in inputs]
    binding = session.io_binding()
    for node, tensor in zip(session.get_inputs(), tensors, strict=True):
        element = onnx.TensorProto.DataType.Value(ONNX_TYPES[tensor.dtype])
        binding.bind_input(node.name, place.type, place.index or 0, element, tuple(tensor.shape), tensor.data_ptr())
    for node in session.get_outputs():
        binding.bind_output(node.name, place.type, place.index or 0)
    if place.type == "cuda":
        torch.cuda.synchronize(place)

    def run(keep_alive: Sequence[Tensor] = tensors) -> float:  # the binding holds bare addresses
        start = time.perf_counter_ns()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return (time.perf_counter_ns() - start) * 1e-9

    return run


def _session(name: str, path: Path, kind: str, index: int, threads: int) -> Any:
    """An ONNX Runtime session on `kind` ('cpu', 'cuda' or 'tensorrt'). InputError if the file or the provider does not load."""
    provider = PROVIDERS[kind]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Within a run threads spin as by default. Between runs they must not: they would spin on for 30 ms and more, on the
    # cores of the candidate that is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # What TensorRT does not take falls to CUDA, and what CUDA does not take to the CPU, as in any deployment.
    wanted = [provider] + [PROVIDERS["cuda"]] * (kind == "tensorrt")
    providers: list[Any] = [] if kind == "cpu" else [(each, {"device_id": index}) for each in wanted]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[*providers, PROVIDERS["cpu"]])
    except Exception as error:  # the classes of ONNX Runtime have no common base of their own
        raise InputError(f"{name}: {path}: ONNX Runtime cannot load it: {first_line(error)}") from error
    if provider not in session.get_providers():  # ONNX Runtime falls back with a warning only
        raise InputError(f"{name}: device '{kind}': {provider} did not start; its libraries (CUDA, cuDNN, TensorRT) are missing or do not match")
    return session


def _check_inputs(name: str, path: Path, session: Any, inputs: Sequence[Tensor]) -> None:
    """InputError, naming the input, unless number, element type, rank and every fixed size match the file's declaration."""
    nodes = session.get_inputs()
    if len(nodes) != len(inputs):
        listed = ", ".join(f"'{node.name}'" for node in nodes)
        missing = f"; none is left for '{nodes[len(inputs)].name}'" if len(inputs) < len(nodes) else ""
        raise InputError(f"{name}: {path.name} takes {len(nodes)} input(s) ({listed}), {len(inputs)} given{missing}")
    for node, tensor in zip(nodes, inputs, strict=True):
        where = f"{name}: input '{node.name}' of {path.name}"
        given = f"tensor({ONNX_TYPES.get(tensor.dtype, 'unsupported').lower()})"
        if node.type != given:
            raise InputError(f"{where} is {node.type}, the tensor given is {tensor.dtype}")
        if not node.shape:
            continue  # a scalar, or a rank that the file does not declare: ONNX Runtime shows both as []
        declared = "x".join("?" if size is None else str(size) for size in node.shape)
        if len(node.shape) != tensor.dim():
            raise InputError(f"{where} has rank {len(node.shape)} ({declared}), the tensor given has rank {tensor.dim()} {tuple(tensor.shape)}")
        if any(isinstance(size, int) and size != got for size, got in zip(node.shape, tensor.shape, strict=True)):
            raise InputError(f"{where} has shape {declared}, the tensor given has {'x'.join(map(str, tensor.shape))}")


# ----------------------------------------------------------------------------------------------------------------- timing


@contextmanager
def steady(threads: int) -> Iterator[None]:
    """`threads` threads in torch and no garbage collection inside the block; both as before after it."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _warmed_up(name: str, run: Runner) -> tuple[Runner, int]:
    """Run a candidate until allocators, kernels and caches are warm. Returns it, and how many runs take 2 ms or more together."""
    durations: list[float] = []
    started = time.perf_counter()
    try:
        while len(durations) < WARMUP_RUNS or time.perf_counter() - started < WARMUP_SECONDS:
            durations.append(run())
    except Exception as error:  # whatever the candidate's own code raises
        raise InputError(f"{name}: does not run on these inputs: {first_line(error)}") from error
    return run, math.ceil(SHORTEST_TIMING / max(min(durations), 1e-7))


def _time_starts(
    starters: Mapping[str, Callable[[], Runner]], rounds: int, seconds: float, rest: float, seed: int, say: Callable[[str], None]
) -> list[np.ndarray]:
    """`_time_rounds` of several starts of all candidates, within `rounds` and `seconds` together; of one, where starting takes long beside these."""
    parts: list[np.ndarray] = []
    number = 1
    while len(parts) < number:
        started = time.perf_counter()
        warmed_up = []
        for name, start in starters.items():
            if not parts:
                say(f"benchmark: warming up {name}")
            warmed_up.append(_warmed_up(name, start()))
        if not parts:
            say(f"benchmark: timing {len(starters)} candidate(s), at most {rounds} rounds or {seconds:g} s")
            number = max(1, min(STARTS, rounds // MIN_ROUNDS, int(seconds / 2 / (time.perf_counter() - started))))
        limits = (rounds - sum(map(len, parts))) // (number - len(parts)), seconds / number
        runners, repeats = zip(*warmed_up, strict=True)
        parts.append(_time_rounds(runners, repeats, *limits, rest, seed + len(parts), math.ceil(MIN_ROUNDS / number)))
    return parts


def _time_rounds(
    runners: Sequence[Runner], repeats: Sequence[int], rounds: int, seconds: float, rest: float, seed: int, least: int = MIN_ROUNDS
) -> np.ndarray:
    """Seconds a run, [rounds, candidates]. Every candidate has one turn a round, in an order drawn anew for each round.

    A turn is `repeats` runs in a row and counts with their median, so that one interrupted run does not spoil it. `rest`
    seconds of sleep precede every turn. There are `least` rounds, however long they take.
    """
    random = np.random.default_rng(seed)
    started = time.perf_counter()
    times: list[list[float]] = []
    while len(times) < least or (len(times) < rounds and time.perf_counter() - started < seconds):
        row = [0.0] * len(runners)
        for index in random.permutation(len(runners)):
            if rest:
                time.sleep(rest)
            row[index] = median([runners[index]() for _ in range(repeats[index])])
        times.append(row)
    return np.array(times)


def _bootstrap(parts: Sequence[np.ndarray], seed: int) -> tuple[float, float, float]:
    """Median of all values of `parts` [rounds], and the 2.5th and 97.5th percentile of the medians of resamples with replacement.

    This is Efron's percentile bootstrap in two stages: of the starts of the sessions, then of the rounds in each of these. It takes
    both as independent, so slow drift of a machine is not in the interval.
    """
    random = np.random.default_rng(seed)
    lengths = np.array([len(part) for part in parts])
    values = np.full((len(parts), lengths.max()), np.nan)
    for row, part in zip(values, parts, strict=True):
        row[: len(part)] = part

    def medians(resamples: int) -> np.ndarray:
        starts = random.integers(len(parts), size=(resamples, len(parts), 1))
        rounds = random.integers(np.broadcast_to(lengths[starts], (resamples, *values.shape)))
        drawn = np.where(np.arange(values.shape[1]) < lengths[starts], values[starts, rounds], np.nan)
        return np.nanmedian(drawn.reshape(resamples, -1), axis=1)

    at_once = max(1, _AT_ONCE // values.size)
    found = np.concatenate([medians(min(at_once, RESAMPLES - done)) for done in range(0, RESAMPLES, at_once)])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(np.median(np.concatenate(parts))), float(low), float(high)


def _notes(samples: int, rounds: int, seconds: float, threads: int, cores: int, others: float, mixed: bool) -> tuple[str, ...]:
    """What a reader of the numbers should know about how they came about. `others` is how many cores other processes used."""
    remarks = {
        f"stopped after {samples} of {rounds} rounds, at the limit of {seconds:g} s": samples < rounds,
        f"only {samples} rounds: the intervals are rough": samples < 15,
        f"{threads} threads on {cores} core(s): threads wait for each other": threads > cores,
        f"other processes kept {others:.1f} cores of this machine busy: repeat this when it is idle": _disturb(others, threads),
        "the candidates run on different runtimes: a ratio compares the runtimes too, not the models alone": mixed,
    }
    return tuple(remark for remark, holds in remarks.items() if holds)


def _disturb(others: float, threads: int) -> bool:
    """Whether so many cores, busy elsewhere, are missed: a thread that waits for one that was displaced can lose a time slice at every operator."""
    return others + threads > (os.cpu_count() or 1) + _UNNOTICED


def _watch_others() -> Callable[[], float]:
    """Start watching; the answer, called later, is how many cores other processes and guests kept busy since then, on average."""
    started, all_busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    return lambda: (_busy_seconds() - all_busy - (time.process_time() - own)) / (time.perf_counter() - started)


def _busy_seconds() -> float:
    """Processor seconds since boot of all processes and of other guests of the host; 0 where the system does not tell."""
    with suppress(OSError, ValueError):
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _cpu_model() -> str:
    """The processor's name as the system tells it, or its architecture."""
    with suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _shown(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value * scale:.1f}"
