"""How long torch takes for each node of a graph, and for single contractions, on the CPU or on a GPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from structprune.analysis.contractions import contractions
from structprune.analysis.groups import Groups
from structprune.backends.benchmark import steady, stopwatch
from structprune.backends.kernels import RUNS, Kernel
from structprune.backends.latency import Attributed
from structprune.backends.tables import Point
from structprune.ir.graph import Graph
from structprune.ir.operators import named_arguments, operator_name

_WARM_UP = 2
_HOW = {"strides": ("stride", 1), "pads": ("padding", 0), "dilations": ("dilation", 1), "output_padding": ("output_padding", 0)}
"""What is told of a convolution: the name of torch's argument, and its default along each axis."""
_RECURRENT: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": partial(nn.RNN, nonlinearity="relu")}


def profile(graph: Graph, groups: Groups, place: torch.device, threads: int, runs: int = 2 * RUNS) -> list[Attributed]:
    """Every node of the graph that computes, with the shortest of its times in some runs; one of several contractions once for each of these."""
    known = {n.name: several for n, several in contractions(groups).items()}
    nodes = {n.name: n for n in graph.nodes}
    found: list[Attributed] = []
    for kernel in kernels(graph, place, threads, runs):
        several = known.get(kernel.name, [])
        work = [one.volume(groups.batch) for one in several]
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


def time_contractions(points: Sequence[Point], place: torch.device, threads: int, runs: int = RUNS) -> Iterator[tuple[int, float]]:
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
        known = isinstance(n.target, torch._ops.OpOverload)
        self.settings[n.name] = _settings(operator_name(n), named_arguments(n, args, kwargs)) if known else {}
        return answer


def _settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the time of a convolution or a recurrent layer depends on beside its widths; of all else, the type. given: its arguments by name."""
    first = next((v for v in given.values() if isinstance(v, Tensor)), None)
    if first is None:
        return {}
    found = {"type": str(first.dtype).removeprefix("torch.")}
    if name in _RECURRENT and first.dim() > 1:
        return {**found, "operator": name, "rows": list(first.shape[:-1]), **{k: given[k] for k in ("has_biases", "bidirectional", "batch_first")}}
    if not name.startswith("conv") or not isinstance(given.get("weight"), Tensor):
        return found
    rank = given["weight"].dim() - 2
    batch, space = (first.shape[0], first.shape[2:]) if first.dim() == rank + 2 else (1, first.shape[1:])
    how = {key: given.get(argument, [default] * rank) for key, (argument, default) in _HOW.items()}
    return {**found, "batch": batch, "space": list(space), "window": list(given["weight"].shape[2:]), **how}


def _contraction(given: dict[str, Any], sizes: tuple[int, ...], place: torch.device) -> Any:
    """One contraction on noise, ready to run."""
    dtype = getattr(torch, given["type"])

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=place) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype, device=place)

    if given["kind"] in ("conv", "conv_transpose"):
        groups, filters, inputs = sizes
        x, bias = noise(given["batch"], groups * inputs, *given["space"]), noise(groups * filters)
        convolve = getattr(functional, f"{given['kind']}{len(given['window'])}d")
        if given["kind"] == "conv":
            weight = noise(groups * filters, inputs, *given["window"])
            return lambda: convolve(x, weight, bias, given["strides"], given["pads"], given["dilations"], groups)
        weight = noise(groups * inputs, filters, *given["window"])
        return lambda: convolve(x, weight, bias, given["strides"], given["pads"], given["output_padding"], groups, given["dilations"])
    if given["kind"] == "recurrent":
        inputs, hidden = sizes
        how = {"bias": given["has_biases"], "bidirectional": given["bidirectional"], "batch_first": given["batch_first"]}
        layer = _RECURRENT[given["operator"]](inputs, hidden, device=place, dtype=dtype, **how)
        x = noise(*given["rows"], inputs)
        return lambda: layer(x)
    batch, rows, inputs, columns = sizes
    if given["kind"] == "linear":
        x, weight, bias = noise(batch * rows, inputs), noise(columns, inputs), noise(columns)
        return lambda: functional.linear(x, weight, bias)
    x, y = noise(batch, rows, inputs), noise(batch, inputs, columns)
    return lambda: torch.matmul(x, y)


def _moved(values: Sequence[Any], place: torch.device) -> list[Any]:
    return [v.to(place, copy=True) if isinstance(v, Tensor) else v for v in values]
