"""What ONNX Runtime runs of a model, kernel by kernel, and how long each takes: of a whole file, and of single contractions.

The runtime's own profiler tells the time of every kernel. A contraction is timed as the runtime would run it in a model: written as plain
ONNX, with the activation and the addition that the runtime fused into it there, so that fusion, layout and choice of algorithm are
the runtime's. Many contractions stand side by side in one model and are timed in one session.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from structprune.backends.microbenchmarks import GATES, entries, in_bytes, side_by_side
from structprune.backends.onnx import LAYER, session_of
from structprune.backends.tables import Point

RUNS = 4
BLOCKED = "_nchwc"  # ends the names of kernels that work on channels in blocks, a layout that their neighbours share
_FUSED = "fused "  # begins the names of products into which an activation was fused
_WARM_UP = 1  # the shortest of the runs that follow counts
_SESSIONS = 2
_AT_ONCE = 192 << 20  # bytes of weights and inputs in one session
_OWN = 5e-6  # seconds that the profiler takes of its own within a kernel, at most
_UNNOTICED = 0.02  # of a session's time
_AT_LEAST = 0.2  # of what the profiler told is a kernel's own
_ROOT_OF = re.compile(r"^p(\d+)\.")
_PRODUCTS = ("linear", "matmul")
KINDS = {
    "Conv": ("conv",), "FusedConv": ("conv",), "ConvTranspose": ("conv_transpose",),
    "MatMul": _PRODUCTS, "FusedMatMul": _PRODUCTS, "Gemm": _PRODUCTS, "FusedGemm": _PRODUCTS,
    "LSTM": ("recurrent",), "GRU": ("recurrent",),
}  # fmt: skip
"""The operators that run contractions, and the kinds of these (contractions.ROLES)."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a model: its name, which begins with that of an ONNX node or value; sizes; seconds a run.

    `settings`: of the contraction that it runs (see `signature`), or empty. `layer`: what it computes, in the user's names, where the file tells.
    """

    name: str
    operator: str
    seconds: float
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    settings: Mapping[str, Any]
    layer: str = ""


def signature(kind: str, settings: Mapping[str, Any]) -> str:
    """What a contraction's time depends on beside its sizes, as JSON: the key of measured tables."""
    return json.dumps({"kind": kind, **settings}, sort_keys=True, separators=(",", ":"))


def family(kernel: Kernel) -> Hashable:
    """Kernels whose time depends on channels in one way: of one operator, of one window over one space, or by weights or not."""
    window = tuple(str(kernel.settings.get(name)) for name in ("space", "window", "strides"))
    return kernel.operator, window, len(kernel.inputs[1]) if kernel.settings and len(kernel.inputs) > 1 else 0


def profile(path: Path, inputs: Sequence[np.ndarray], threads: int, runs: int = 2 * RUNS) -> list[Kernel]:
    """The kernels of a file, in the order in which they run; their seconds are the shortest of some runs, in two sessions.

    Whatever disturbs a run makes it longer, and what disturbs a session, such as threads that share a core, all of its runs.
    """
    sessions: list[_Session] = []
    with tempfile.TemporaryDirectory() as work:
        optimized = Path(work) / "optimized.onnx"
        for _ in range(_SESSIONS):
            session = _session(path, threads, work, optimized)
            feeds = dict(zip((i.name for i in session.get_inputs()), inputs, strict=False))
            sessions.append(_run(session, feeds, runs))
        graph = onnx.load(str(optimized), load_external_data=False).graph
    made, weights = {node.name: node for node in graph.node}, {t.name: tuple(t.dims) for t in graph.initializer}
    layer = _layer_finder(path)
    kernels = []
    for event, *seconds in zip(sessions[0].events, *(s.seconds for s in sessions), strict=False):
        name, node = _name(event).removeprefix(_FUSED), made.get(_name(event))
        told = event["args"]["input_type_shape"], event["args"]["output_type_shape"]
        shapes = _shapes(told[0]), _shapes(told[1])
        settings = {"type": next(iter(told[0][0]), "float"), **_settings(node, shapes[0], weights)} if _contracts(node) and shapes[0] else {}
        kernels.append(Kernel(name, event["args"]["op_name"], min(seconds), *shapes, settings, layer(name, bool(settings))))
    return kernels


def time_contractions(points: Sequence[Point], threads: int, runs: int = RUNS) -> Iterator[tuple[int, float]]:
    """points: (signature, sizes of its axes as in contractions.ROLES). Yields (index, seconds), the shortest of some runs."""
    batch: list[int] = []
    size = 0
    for index, (key, sizes) in enumerate(points):
        size += in_bytes(json.loads(key), sizes)
        batch.append(index)
        if size > _AT_ONCE or index == len(points) - 1:
            yield from zip(batch, _times([points[i] for i in batch], threads, runs), strict=True)
            batch, size = [], 0


def _layer_finder(path: Path) -> Callable[[str, bool], str]:
    """For a kernel's name the layer of the user's module whose weight it reads, or that the node of the file comes from, or nothing.

    A contraction bears the name of what was fused into it, so that its own node is looked for among those before.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    named = makers | {node.name: node for node in graph.node}
    weights = {t.name for t in graph.initializer if t.name.endswith(".weight")}

    def layer(name: str, contracts: bool) -> str:
        reached = [named[n] for n in [name.split("/")[0].removesuffix(BLOCKED)] if n in named]
        for node in reached:  # grows while it is walked
            if not contracts or _contracts(node):
                told = [p.value for p in node.metadata_props if p.key == LAYER]
                read = [i.removesuffix(".weight") for i in node.input if i in weights]
                return next(iter([*read, *told] if contracts else [*told, *read]), "")  # a convolution into which a norm was folded came from both
            reached.extend(makers[i] for i in node.input if i in makers and not any(makers[i] is r for r in reached))
        return ""

    return layer


def _times(points: Sequence[Point], threads: int, runs: int) -> list[float]:
    model, feeds = side_by_side(points)
    with tempfile.TemporaryDirectory() as work:
        session = _run(_session(model.SerializeToString(), threads, work), feeds, runs)
    reordering = 0.0
    taken = [0.0] * len(points)
    blocked = [False] * len(points)
    for event, seconds in zip(session.events, session.seconds, strict=True):
        found = _ROOT_OF.match(event["name"])
        if event["args"]["op_name"].startswith("Reorder"):  # between the blocked layout and plain order; inside a model there is none
            reordering += seconds
        elif found:
            taken[int(found[1])] += seconds
            blocked[int(found[1])] |= _name(event).endswith(BLOCKED)
    data = [entries(json.loads(key), sizes) for key, sizes in points]
    rate = reordering / max(1, sum(d for d, inside in zip(data, blocked, strict=True) if inside))
    out_of_step = [json.loads(key).get("blocked", False) and not inside for (key, _), inside in zip(points, blocked, strict=True)]
    return [t + rate * d * out for t, d, out in zip(taken, data, out_of_step, strict=True)]  # its neighbours' layout costs it two reorderings


def _session(model: Path | bytes, threads: int, work: str, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.enable_profiling, options.profile_file_prefix = True, str(Path(work) / "profile")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return session_of(model, options)


@dataclass(frozen=True)
class _Session:
    """The kernels of one run, as the profiler tells of them, and the shortest seconds of each in some runs."""

    events: Sequence[Mapping[str, Any]]
    seconds: Sequence[float]


def _run(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray], runs: int) -> _Session:
    """`runs` runs under the profiler, after some to warm up.

    The profiler takes time of its own within every kernel, 2 to 5 µs where threads share the work: as much as a small kernel takes. As many
    runs without it tell how much that is, in the mean over the kernels. Where these take so long that it is less than runs differ by, it is let be.
    """
    for _ in range(_WARM_UP + runs):
        session.run(None, dict(feeds))
    told = json.loads(Path(session.end_profiling()).read_text())
    events = [e for e in told if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    number = len(events) // (_WARM_UP + runs)
    events = events[number * _WARM_UP :]
    shortest = [min(e["dur"] for e in events[place::number]) * 1e-6 for place in range(number)]
    if number * _OWN < _UNNOTICED * sum(shortest):
        return _Session(events[:number], shortest)
    own = max(0.0, sum(shortest) - min(_seconds(session, feeds) for _ in range(_WARM_UP + runs))) / max(1, number)
    return _Session(events[:number], [max(seconds - own, _AT_LEAST * seconds) for seconds in shortest])


def _seconds(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run(None, dict(feeds))
    return time.perf_counter() - start


def _name(event: Mapping[str, Any]) -> str:
    return event["name"].removesuffix("_kernel_time")


def _shapes(told: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for entry in told for shape in entry.values())


def _contracts(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type in KINDS


def _settings(node: Any, inputs: Sequence[tuple[int, ...]], weights: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a convolution's time, or a recurrent layer's, depends on beside its widths; nothing more for a product of matrices.

    inputs: their shapes, as the profiler tells them: without those that the kernel has taken in. weights: the shapes of all.
    """
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in GATES:
        steps, batch, _ = inputs[0]
        how = {"direction": given.get("direction", b"forward").decode(), "linear_before_reset": given.get("linear_before_reset", 0)}
        return {"operator": node.op_type, "steps": steps, "batch": batch, **how}
    if "Conv" not in node.op_type:
        return {}
    rank = len(inputs[0]) - 2
    kernel = weights[node.input[1]] if node.input[1] in weights else inputs[1]
    return {
        "batch": inputs[0][0],
        "space": list(inputs[0][2:]),
        "window": list(kernel[2:]),
        "strides": list(given.get("strides", [1] * rank)),
        "pads": list(given.get("pads", [0] * 2 * rank)),
        "dilations": list(given.get("dilations", [1] * rank)),
        **({"output_padding": list(given.get("output_padding", [0] * rank))} if node.op_type == "ConvTranspose" else {}),
        "activation": given.get("activation", b"").decode(),
        "sum": len(node.input) > 3 and bool(node.input[3]),
        "blocked": node.name.endswith(BLOCKED),
    }
