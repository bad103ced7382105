"""How long torch takes for each node of a graph, and for single contractions, on the CPU or on a GPU."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from structprune.analysis.contractions import contractions
from structprune.analysis.groups import Groups
from structprune.backends.benchmark import steady, stopwatch
from structprune.backends.kernels import RUNS, Kernel
from structprune.backends.latency import Attributed
from structprune.ir.axes import kept_size
from structprune.ir.graph import Graph
from structprune.ir.operators import operator_name

_WARM_UP = 2


def profile(graph: Graph, groups: Groups, place: torch.device, threads: int, runs: int = 2 * RUNS) -> list[Attributed]:
    """Every node of the graph that computes, with the shortest of its times in some runs; one of several contractions once for each of these."""
    known = {n.name: several for n, several in contractions(groups).items()}
    nodes = {n.name: n for n in graph.nodes}
    found: list[Attributed] = []
    for kernel in kernels(graph, place, threads, runs):
        several = known.get(kernel.name, [])
        work = [math.prod(kept_size(a, groups.batch) for a in one.axes) for one in several]
        for one, own in zip(several, work, strict=True):  # an attention is one node and two products
            found.append((replace(kernel, seconds=kernel.seconds * own / sum(work)), nodes[kernel.name], one))
        if not several:
            found.append((kernel, nodes[kernel.name], None))
    return found


def kernels(graph: Graph, place: torch.device, threads: int, runs: int = 2 * RUNS) -> list[Kernel]:
    """The same of any graph, without what its nodes multiply."""
    module = copy.deepcopy(graph.module).to(place)
    with steady(threads), torch.inference_mode():
        timers = [_Timer(module, place) for _ in range(_WARM_UP + runs)]
        for timer in timers:
            timer.run(*_moved(graph.given_inputs(), place), enable_io_processing=False)
    nodes = {n.name: n for n in graph.nodes}
    seconds = {name: min(timer.seconds[name]() for timer in timers[_WARM_UP:]) for name in timers[-1].seconds}
    return [Kernel(name, operator_name(nodes[name]), taken, (), (), timers[-1].settings[name]) for name, taken in seconds.items()]


def time_contractions(
    points: Sequence[tuple[str, tuple[int, ...]]], place: torch.device, threads: int, runs: int = RUNS
) -> Iterator[tuple[int, float]]:
    """points: (signature, sizes of its axes as in contractions.ROLES). Yields (index, seconds), the shortest of some runs."""
    with steady(threads), torch.inference_mode():
        for index, (key, sizes) in enumerate(points):
            run = _contraction(json.loads(key), sizes, place)
            times = []
            for _ in range(_WARM_UP + runs):
                stop = stopwatch(place)
                run()
                times.append(stop())
            yield index, min(seconds() for seconds in times[_WARM_UP:])


class _Timer(fx.Interpreter):
    """Runs a graph once. `seconds`: of each node that computes; `settings`: what its time depends on beside sizes of ROLES."""

    def __init__(self, module: fx.GraphModule, place: torch.device):
        super().__init__(module)
        self.place = place
        self.seconds: dict[str, Any] = {}
        self.settings: dict[str, dict[str, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        stop = stopwatch(self.place)
        answer = self.call_function(n.target, args, kwargs)  # type: ignore[arg-type]
        self.seconds[n.name] = stop()
        self.settings[n.name] = _settings(operator_name(n), args)
        return answer


def _settings(name: str, args: Sequence[Any]) -> dict[str, Any]:
    """What a convolution's time depends on beside its channels; of a product of matrices, the type."""
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None:
        return {}
    found = {"type": str(first.dtype).removeprefix("torch.")}
    if not name.startswith("conv") or len(args) < 2 or not isinstance(args[1], Tensor):
        return found
    rank = args[1].dim() - 2
    given = dict(zip(("strides", "pads", "dilations"), args[3:6], strict=False))
    batch, space = (first.shape[0], first.shape[2:]) if first.dim() == rank + 2 else (1, first.shape[1:])
    defaults = {"strides": [1] * rank, "pads": [0] * rank, "dilations": [1] * rank}
    return {**found, "batch": batch, "space": list(space), "window": list(args[1].shape[2:]), **defaults, **given}


def _contraction(given: dict[str, Any], sizes: tuple[int, ...], place: torch.device) -> Any:
    """One contraction on noise, ready to run."""
    dtype = getattr(torch, given["type"])

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=place) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype, device=place)

    if given["kind"] == "conv":
        groups, filters, inputs = sizes
        x = noise(given["batch"], groups * inputs, *given["space"])
        weight, bias = noise(groups * filters, inputs, *given["window"]), noise(groups * filters)
        convolve = getattr(functional, f"conv{len(given['window'])}d")
        return lambda: convolve(x, weight, bias, given["strides"], given["pads"], given["dilations"], groups)
    batch, rows, inputs, columns = sizes
    if given["kind"] == "linear":
        x, weight, bias = noise(batch * rows, inputs), noise(columns, inputs), noise(columns)
        return lambda: functional.linear(x, weight, bias)
    x, y = noise(batch, rows, inputs), noise(batch, inputs, columns)
    return lambda: torch.matmul(x, y)


def _moved(values: Sequence[Any], place: torch.device) -> list[Any]:
    return [v.to(place, copy=True) if isinstance(v, Tensor) else v for v in values]
