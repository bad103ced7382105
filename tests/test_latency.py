"""A latency as the target: kernels and what they compute, steps, tables on disk, and the loop that measures and corrects."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import onnx as onnx_library
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structprune as sp
from structprune import closed_loop
from structprune.backends import eager, kernels, latency, onnx, profiles, runtimes
from structprune.backends.bench_process import BenchProcess
from structprune.backends.benchmark import Comparison, Latency, Ratio
from structprune.backends.directory import verify_directory
from structprune.backends.runtimes import Runtime
from structprune.backends.tables import Tables, rows
from structprune.decide.allocate import allocate
from structprune.decide.cost import Cost, Term
from structprune.decide.plan import scored
from structprune.decide.targets import Target
from structprune.errors import InputError, TargetError
from structprune.ir.axes import Atom, kept_size, leaves

ONNX_RUNTIME = Runtime("onnxruntime", "cpu", 1)
TORCH = Runtime("torch", "cpu", 1)


def chain(width: int = 64) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Three convolutions, one with a shortcut, and a classifier."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)])

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.layers[0](x))
        return m.head(F.relu(x + m.layers[2](F.relu(m.layers[1](x)))).mean((2, 3)))

    return models.Of(run, layers=layers, head=nn.Linear(width, 10)).eval(), (torch.randn(2, 3, 16, 16),)


def decoder() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Transposed convolutions: with an activation and no bias, in groups, and with a larger answer than its window asks for."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ConvTranspose2d(32, 32, 4, 2, 1, bias=False), nn.ReLU(),
                           nn.ConvTranspose2d(32, 16, 3, stride=2, output_padding=1, groups=2), nn.ReLU(), nn.Conv2d(16, 4, 1))  # fmt: skip
    return layers.eval(), (torch.randn(2, 3, 10, 10),)


def perceptron() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Linear layers into which ONNX Runtime fuses the activation behind."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval(), (torch.randn(6, 24),)


def windowed() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Attention within windows, which stand on an axis of their own: torch's exporter knows no such call."""
    torch.manual_seed(0)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.qkv(x).reshape(2, 3, 6, 3, 4, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
        return m.head(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, 3, 6, 32))

    return models.Of(run, qkv=nn.Linear(16, 96), head=nn.Linear(32, 10)).eval(), (torch.randn(2, 3, 6, 16),)


def recurrent() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Recurrent layers: two in two directions, and of two kinds."""
    return in_a_row(nn.LSTM(24, 32, 2, bidirectional=True), nn.GRU(64, 16, batch_first=True))


def plain() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Recurrent layers that ONNX is given step by step."""
    return in_a_row(nn.RNN(24, 32, nonlinearity="relu"), nn.RNN(32, 16))


def in_a_row(*layers: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in m.layers:
            x = layer(x)[0]
        return m.head(x)

    return models.Of(run, layers=nn.ModuleList(layers), head=nn.Linear(16, 10)).eval(), (torch.randn(7, 2, 24),)


OF_MINE = {"chain": chain, "perceptron": perceptron, "windowed": windowed, "decoder": decoder, "recurrent": recurrent, "plain": plain}


class Known:
    """Tables that know the time of every contraction: blocks of `filters` and `inputs` of a convolution, plain products of matrices."""

    def __init__(self, filters: int = 16, inputs: int = 4):
        self.filters, self.inputs, self.disturbed = filters, inputs, False

    def seconds(self, points: Sequence[tuple[str, tuple[int, ...]]]) -> list[float]:
        return [self.time(key, sizes) * (3 if self.disturbed and i == 0 else 1) for i, (key, sizes) in enumerate(points)]

    def again(self, points: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        self.disturbed = False

    def time(self, key: str, sizes: tuple[int, ...]) -> float:
        if json.loads(key)["kind"] != "conv":
            return 1e-9 * float(np.prod(sizes))
        groups, filters, inputs = sizes
        return 1e-6 * groups * -(-filters // self.filters) * self.filters * -(-inputs // self.inputs) * self.inputs


def prepared(model: nn.Module, inputs: tuple[Any, ...], folder: Path) -> tuple[Any, Any, Path, dict[str, str]]:
    graph = sp.trace(model, inputs)
    path = folder / "dense.onnx"
    return graph, sp.find_groups(graph), path, runtimes.save_original(ONNX_RUNTIME, graph, path)


def modelled(folder: Path, known: Known, align: int | None = None) -> tuple[Any, Any, latency.LatencyModel]:
    """The chain with its latency in ONNX Runtime, by these tables."""
    graph, groups, path, origins = prepared(*chain(), folder)
    ran = runtimes.kernels_of(ONNX_RUNTIME, graph, groups, path, origins)
    return graph, groups, latency.latency_model(groups, ran, known, align)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["residual", "attention", "joined", "chain", "perceptron", "windowed", "decoder", "recurrent"])
def test_every_contraction_is_found_in_the_kernel_that_runs_it(name: str, tmp_path: Path) -> None:
    graph, groups, path, origins = prepared(*(OF_MINE[name]() if name in OF_MINE else models.build(name)), tmp_path)
    found = kernels.profile(path, [v.numpy() for v in graph.given_inputs()], threads=1)
    claimed = [(k, c) for k, _, c in latency.attributed(graph, groups, found, origins) if c is not None]
    assert len(claimed) == sum(map(len, latency.contractions(groups).values())) > 0
    for kernel, contraction in claimed:
        sizes = [kept_size(a, groups.batch) for a in contraction.axes]
        if contraction.kind in ("conv", "conv_transpose"):
            for told, channels in ((kernel.outputs[0][1], sizes[0] * sizes[1]), (kernel.inputs[0][1], sizes[0] * sizes[2])):
                assert told == channels or (told % 8 == 0 and 0 < told - channels < 16)  # filled up to whole blocks
        elif contraction.kind == "recurrent":
            assert [kernel.inputs[0][-1], kernel.outputs[0][-1]] == sizes
        else:
            assert np.prod(kernel.outputs[0]) == sizes[0] * sizes[1] * sizes[3]
    points = [(kernels.signature(c.kind, k.settings), tuple(kept_size(a, groups.batch) for a in c.axes)) for k, c in claimed]
    assert [index for index, _ in kernels.time_contractions(points, threads=1, runs=1)] == list(range(len(points)))


@pytest.mark.parametrize("where", [ONNX_RUNTIME, TORCH])
def test_transposed_convolutions_and_recurrent_layers_take_time_by_their_tables(where: Runtime, tmp_path: Path) -> None:
    for build, number in ((decoder, 2), (recurrent, 3)):
        graph, groups, path, origins = prepared(*build(), tmp_path)
        model = latency.latency_model(groups, runtimes.kernels_of(where, graph, groups, path, origins), Known(), align=4)  # type: ignore[arg-type]
        half = {g.atom: g.size // 2 for g in groups}
        kept = [
            (term(half) / term({}), np.prod([kept_size(axis, half) / axis.size for axis in term.axes]))
            for term, kernel in zip(model.cost.terms, model.kernels, strict=True)
            if kernel.operator.lower().startswith(("lstm", "gru", "convtranspose", "conv_transpose"))
        ]
        assert len(kept) == number
        assert all(share == pytest.approx(size) and size < 1 for share, size in kept)


def test_a_kernel_knows_what_was_fused_into_it(tmp_path: Path) -> None:
    graph, _, path, _ = prepared(*chain(), tmp_path)
    found = kernels.profile(path, [v.numpy() for v in graph.given_inputs()], threads=1)
    convolutions = [k.settings for k in found if k.operator in ("Conv", "FusedConv")]
    assert [c["activation"] for c in convolutions] == ["Relu"] * 3
    assert [c["window"] for c in convolutions] == [[3, 3], [3, 3], [1, 1]]
    assert [c["batch"] for c in convolutions] == [2] * 3


@pytest.mark.parametrize(
    ("unit", "wall", "seconds"),
    [
        (10, 40e-6, [25e-6, 5e-6, 10e-6]),
        (10, 60e-6, [30e-6, 10e-6, 15e-6]),
        (10, 10e-6, [15e-6, 2e-6, 3e-6]),  # a fifth of a kernel is its own, whatever the mean says
        (1000, 4e-3, [3e-3, 1e-3, 1.5e-3]),  # beside kernels of milliseconds the profiler takes nothing
    ],
)
def test_what_the_profiler_takes_is_taken_off(unit: int, wall: float, seconds: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of 3, 1 and 1.5 units of so many µs under the profiler, in runs that take `wall` without it."""

    class Session:
        runs = 0

        def run(self, *_: Any) -> None:
            self.runs += 1

        def end_profiling(self) -> str:
            told = [
                {"cat": "Node", "name": f"{n}_kernel_time", "dur": d + 9 * (run % 2)}
                for run in range(self.runs)
                for n, d in enumerate((3 * unit, unit, 3 * unit // 2))
            ]
            path = tmp_path / "profile.json"
            path.write_text(json.dumps([{"cat": "Session", "name": "load", "dur": 5}, *told]))
            return str(path)

    monkeypatch.setattr(kernels, "_seconds", lambda *_: wall)
    found = kernels._run(Session(), {}, 4)  # type: ignore[arg-type]
    assert [e["name"] for e in found.events] == ["0_kernel_time", "1_kernel_time", "2_kernel_time"]
    assert found.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_a_kernel_bears_the_name_of_the_users_layer(name: str, tmp_path: Path) -> None:
    """Fused or not, and where the simplifier has folded the weight: those that multiply by a weight are all there, once."""
    graph, groups, path, origins = prepared(*models.build(name), tmp_path)
    found = kernels.profile(path, [v.numpy() for v in graph.given_inputs()], threads=1)
    claimed = [(k.layer, n) for k, n, c in latency.attributed(graph, groups, found, origins) if c is not None and c.kind != "matmul"]
    layers = [weight.removesuffix(".weight") for weight, axes in groups.axes.items() if weight.endswith(".weight") and len(axes) > 1]
    assert sorted(layer for layer, _ in claimed) == sorted(layers)
    theirs = tmp_path / "plain.onnx"  # of another exporter, which tells no layers: the weight's name is the next best
    stripped = onnx_library.load(path)
    for node in stripped.graph.node:
        del node.metadata_props[:]
    onnx_library.save(stripped, theirs)
    plain = kernels.profile(theirs, [v.numpy() for v in graph.given_inputs()], threads=1)
    assert [k.layer for k in plain if "window" in k.settings] == [k.layer for k in found if "window" in k.settings]


def test_the_layers_that_did_not_shrink_are_named(tmp_path: Path) -> None:
    def kernel(name: str, seconds: float, layer: str = "") -> kernels.Kernel:
        return kernels.Kernel(name, "Conv", seconds, (), (), {}, layer)

    before = [kernel("relu_1_nchwc", 1e-3, "layer1.conv"), kernel("relu_2_nchwc", 1e-3, "layer2.conv"), kernel("token_7", 1e-3)]
    after = [kernel("relu_1_nchwc", 1e-3), kernel("relu_2_nchwc", 5e-4), kernel("token_7", 1e-3)]
    text = profiles.to_text({"original": before, "model": after})
    assert "  layer1.conv " in text and "layer2.conv" not in text and "  token_7 " in text
    assert "ONNX Runtime's own" in text
    assert "ONNX Runtime's own" not in profiles.to_text({"original": before[:2], "model": after[:2]})


def test_time_grows_with_work() -> None:
    settings = {"type": "float", "batch": 1, "space": [32, 32], "window": [3, 3], "strides": [1, 1], "pads": [1] * 4, "dilations": [1, 1],
                "activation": "Relu", "sum": True, "blocked": True}  # fmt: skip
    upwards = settings | {"strides": [2, 2], "output_padding": [1, 1], "blocked": False}
    steps = {"type": "float", "operator": "GRU", "steps": 16, "batch": 1, "direction": "bidirectional", "linear_before_reset": 1}
    kinds = {"conv": settings, "linear": settings, "matmul": settings, "conv_transpose": upwards, "recurrent": steps}
    conv, linear, product, transposed, layer = (kernels.signature(kind, given) for kind, given in kinds.items())
    points = [(conv, (1, 16, 16)), (conv, (1, 256, 256)), (linear, (1, 8, 64, 64)), (linear, (1, 512, 512, 512)),
              (product, (4, 16, 16, 16)), (product, (4, 256, 256, 256)), (transposed, (1, 8, 8)), (transposed, (1, 128, 128)),
              (layer, (16, 16)), (layer, (256, 256)), (conv, (64, 1, 1))]  # fmt: skip
    times = dict(kernels.time_contractions(points, threads=1))
    assert sorted(times) == list(range(len(points)))
    assert all(times[large] > 3 * times[small] for small, large in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)))


@pytest.mark.parametrize(("filters", "inputs", "step"), [(16, 16, 16), (8, 8, 8), (16, 4, 4), (4, 16, 4), (1, 1, 2)])
def test_steps_are_found(filters: int, inputs: int, step: int, tmp_path: Path) -> None:
    """A width that is one layer's filters and another's inputs has the finer step of the two; of 64 channels a single one gains less than 3 %."""
    _, groups, model = modelled(tmp_path, Known(filters, inputs))
    assert {model.steps[g.atom] for g in groups} == {step}
    _, _, asked = modelled(tmp_path, Known(filters, inputs), align=12)
    assert set(asked.steps.values()) == {12}


def test_one_count_tells_of_both_passes(tmp_path: Path) -> None:
    """And what is timed again, a few sizes at a time, is no word of progress."""
    told: list[str] = []
    points: list[Any] = [("a", (n,)) for n in range(75)]
    tables = Tables("here", lambda asked: ((i, 1.0) for i in range(len(asked))), tmp_path / "t.sqlite", told.append)
    tables.seconds(points)
    tables.again(points[:3])
    assert told == [f"time operators: {done} of 150 timings" for done in (0, 50, 75, 125)]


@pytest.mark.parametrize("disturbed", [False, True])
def test_the_model_of_latency_is_what_was_measured(disturbed: bool, tmp_path: Path) -> None:
    known = Known()
    known.disturbed = disturbed
    graph, groups, model = modelled(tmp_path, known, align=16)
    again = kernels.profile(tmp_path / "dense.onnx", [v.numpy() for v in graph.given_inputs()], threads=1)
    assert model.cost() == pytest.approx(sum(k.seconds for k in again), rel=0.5)  # another run of the same kernels
    dense, half = {g.atom: g.size for g in groups}, {g.atom: g.size // 2 for g in groups}
    tabled = [t for t, k in zip(model.cost.terms, model.kernels, strict=True) if k.settings and len(t.axes) == 2]
    assert len(tabled) == 2  # of three convolutions the first reads the input, which stays
    assert [t(half) / t(dense) for t in tabled] == pytest.approx([0.25, 0.25])
    for term in tabled:
        assert [term(dense | {atom: 0}) for atom in {a for axis in term.axes for a in leaves(axis)}] == [0, 0]  # it does not run


def test_widths_follow_the_steps(tmp_path: Path) -> None:
    graph, groups, model = modelled(tmp_path, Known())
    scores = scored(graph, groups, "l2")[1]
    found = allocate(groups, [Target("latency", 0.6 * model.cost(), absolute=True)], scores, costs={"latency": [model.cost]}, steps=model.steps)
    assert model.cost(found.widths) <= 0.6 * model.cost() * (1 + 1e-6)
    assert all(w % 16 == 0 for w in found.widths.values())
    assert found.gap is not None and found.gap <= 0.011


# --- what a small model teaches -------------------------------------------------------------------------------------------


def of_two_operators(conv: float = 8.0, norm: float = 4.0) -> tuple[Atom, latency.LatencyModel]:
    """A model of one group of 64 channels, whose two kernels are thought to take time by channel."""
    atom = Atom(64, 0)
    ran = tuple(kernel(operator, seconds) for operator, seconds in (("Conv", conv), ("LayerNormalization", norm)))
    terms = tuple(Term((atom,), lambda sizes, k=k: k.seconds * sizes.prod(axis=-1) / 64) for k in ran)
    return atom, latency.LatencyModel(Cost("latency", terms), {atom: 1}, ran)


def kernel(operator: str, seconds: float, **settings: Any) -> kernels.Kernel:
    return kernels.Kernel("", operator, seconds, (), (), settings)


def test_what_does_not_shrink_is_learned_of_a_small_model() -> None:
    atom, model = of_two_operators()
    assert model.cost({atom: 32}) == 6.0
    taught = model.taught({atom: 32}, [kernel("Conv", 2.0), kernel("LayerNormalization", 4.0)], 6.0)
    conv, norm = taught.cost.terms
    assert [float(conv({atom: n})) for n in (64, 32, 16)] == pytest.approx([8.0, 2.0, 0.5])  # by the square of its prediction, so far
    assert [float(norm({atom: n})) for n in (64, 32, 16, 0)] == [4.0, 4.0, 4.0, 0.0]  # the same, unless it is gone
    assert taught.cost() == model.cost() and taught.steps is model.steps


def test_a_clock_that_runs_otherwise_teaches_nothing() -> None:
    """The kernels' seconds are those of another hour than the dense model's; what counts is the whole as a share of that."""
    atom, model = of_two_operators()
    for pace in (0.5, 1.0, 3.0):
        taught = model.taught({atom: 16}, [kernel("Conv", pace * 2.0), kernel("LayerNormalization", pace * 1.0)], 3.0)
        for width in (64, 48, 8):
            assert taught.cost({atom: width}) == pytest.approx(model.cost({atom: width}))


def test_little_is_learned_of_little() -> None:
    atom, model = of_two_operators()
    nearly_whole = model.taught({atom: 62}, [kernel("Conv", 9.0), kernel("LayerNormalization", 3.0)], 12.0)
    assert nearly_whole.cost({atom: 32}) == model.cost({atom: 32})
    other = model.taught({atom: 32}, [kernel("Conv", 4.0), kernel("Fused", 2.0)], 6.0)  # what became of the norm is not known
    assert other.cost({atom: 16}) == pytest.approx(model.cost({atom: 16}))
    steep, flat = (model.taught({atom: 32}, [kernel("Conv", c), kernel("LayerNormalization", n)], c + n) for c, n in ((0.01, 3.0), (20.0, 3.0)))
    assert steep.cost.terms[0]({atom: 32}) == pytest.approx(2.0)  # not steeper than the square
    assert flat.cost.terms[0]({atom: 32}) == 8.0  # and a wider kernel does not take less


def test_kernels_are_alike_where_their_windows_are() -> None:
    conv = partial(kernel, "Conv", 1.0, strides=[1, 1])
    assert kernels.family(conv(space=[7, 7], window=[1, 1])) != kernels.family(conv(space=[7, 7], window=[3, 3]))
    assert kernels.family(conv(space=[7, 7], window=[1, 1])) != kernels.family(conv(space=[14, 14], window=[1, 1]))
    assert kernels.family(conv(space=[7, 7], window=[1, 1], sum=True)) == kernels.family(conv(space=[7, 7], window=[1, 1]))


@pytest.mark.parametrize("where", [ONNX_RUNTIME, TORCH])
def test_what_a_small_model_runs_is_of_the_dense_models_families(where: Runtime, tmp_path: Path) -> None:
    graph, groups, path, origins = prepared(*chain(), tmp_path)
    model = latency.latency_model(groups, runtimes.kernels_of(where, graph, groups, path, origins), Known())  # type: ignore[arg-type]
    assert model.cost() == pytest.approx(sum(k.seconds for k in model.kernels))
    small, inputs = chain(32)
    other = sp.trace(small, inputs)
    onnx.export(other.exported, tmp_path / "small.onnx", other.input_names, other.output_names)
    ran = runtimes.ran(where, other, tmp_path / "small.onnx")
    assert {kernels.family(k) for k in ran} == {kernels.family(k) for k in model.kernels}
    halves = {g.atom: g.size // 2 for g in groups}
    taken = 0.4 * model.cost()
    assert model.taught(halves, ran, taken).cost(halves) == pytest.approx(taken, rel=0.25)  # families may be at their limits


# --- tables on disk -------------------------------------------------------------------------------------------------------


class Timer:
    """Measuring takes no time: a point's seconds are its first size, times a factor for each pass. `log`: what was measured, pass by pass."""

    def __init__(self, *factors: float):
        self.factors = iter(factors)
        self.log: list[list[Any]] = []

    def __call__(self, points: Sequence[Any]) -> Iterator[tuple[int, float]]:
        self.log.append(list(points))
        factor = next(self.factors, 1.0)
        yield from enumerate(factor * sizes[0] for _, sizes in points)


def test_what_was_measured_once_is_read_from_disk(tmp_path: Path) -> None:
    points, path, timer = [("a", (1, 2)), ("b", (3, 4)), ("a", (1, 2))], tmp_path / "t.sqlite", Timer()
    assert Tables("here", timer, path).seconds(points) == [1.0, 3.0, 1.0]
    assert [sorted(several) for several in timer.log] == [points[:2]] * 2  # in two passes
    timer.log.clear()
    assert Tables("here", timer, path).seconds([*points, ("b", (5, 6))]) == [1.0, 3.0, 1.0, 5.0]
    assert timer.log == [[("b", (5, 6))]] * 2
    timer.log.clear()
    Tables("elsewhere", timer, path).seconds(points)
    assert len(timer.log) == 2
    assert [place for place, *_ in rows(path)] == ["elsewhere"] * 2 + ["here"] * 3


@pytest.mark.parametrize("factors", [(1.0, 2.0, 1.0), (2.0, 1.0, 1.0), (1.7, 2.0, 1.0, 1.0)])
def test_what_disturbs_a_session_does_not_stay_in_the_table(factors: tuple[float, ...], tmp_path: Path) -> None:
    """Sessions that take longer as a whole: sizes are measured until two timings agree."""
    timer, points = Timer(*factors), [("a", (n,)) for n in range(1, 9)]
    assert Tables("here", timer, tmp_path / "t.sqlite").seconds(points) == [float(n) for n in range(1, 9)]
    assert [len(several) for several in timer.log] == [8] * len(factors)
    assert [seconds for *_, seconds in rows(tmp_path / "t.sqlite")] == [float(n) for n in range(1, 9)]


def test_a_point_measured_again_keeps_the_shorter_time(tmp_path: Path) -> None:
    point = ("a", (1,))
    mine = Tables("here", Timer(3.0, 3.0, 2.0, 4.0), tmp_path / "t.sqlite")
    assert mine.seconds([point]) == [3.0]
    for _ in range(2):
        mine.again([point])
        assert mine.seconds([point]) == [2.0]
    assert Tables("here", Timer(), tmp_path / "t.sqlite").seconds([point]) == [2.0]


def test_many_writers_share_one_file(tmp_path: Path) -> None:
    def write(number: int) -> list[float]:
        return Tables("here", Timer(), tmp_path / "t.sqlite").seconds([(f"s{i % 7}", (number, i)) for i in range(40)])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(write, range(16)))
    assert answers == [[float(n)] * 40 for n in range(16)]
    assert len(rows(tmp_path / "t.sqlite")) == 16 * 40


# --- torch as the runtime -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "attention", "joined", *OF_MINE])
def test_torch_is_timed_node_by_node(name: str, tmp_path: Path) -> None:
    graph, groups, path, origins = prepared(*(OF_MINE[name]() if name in OF_MINE else models.build(name)), tmp_path)
    ran = runtimes.kernels_of(TORCH, graph, groups, path, origins)
    assert [c for _, _, c in ran if c is not None] == [c for several in latency.contractions(groups).values() for c in several]
    assert {n.name for _, n, _ in ran} == {n.name for n in graph.nodes if n.op == "call_function"}
    assert all(k.seconds > 0 for k, _, _ in ran)
    for kernel, _, contraction in ran:
        if contraction is not None:
            sizes = [kept_size(a, groups.batch) for a in contraction.axes]
            point = kernels.signature(contraction.kind, kernel.settings), tuple(sizes)
            assert [index for index, _ in eager.time_contractions([point], torch.device("cpu"), threads=1, runs=1)] == [0]


def test_time_in_torch_grows_with_work() -> None:
    conv = kernels.signature("conv", {"type": "float32", "batch": 1, "space": [32, 32], "window": [3, 3], "strides": [1, 1], "pads": "same",
                                      "dilations": [1, 1]})  # fmt: skip
    linear, product = (kernels.signature(kind, {"type": "float32"}) for kind in ("linear", "matmul"))
    points = [(conv, (1, 16, 16)), (conv, (1, 256, 256)), (linear, (1, 8, 64, 64)), (linear, (1, 512, 512, 512)),
              (product, (4, 16, 16, 16)), (product, (4, 256, 256, 256))]  # fmt: skip
    times = dict(eager.time_contractions(points, torch.device("cpu"), threads=1))
    assert sorted(times) == list(range(len(points)))
    assert times[1] > 3 * times[0] and times[3] > 3 * times[2] and times[5] > 3 * times[4]


def test_runtimes_have_tables_of_their_own(tmp_path: Path) -> None:
    places = {runtimes.tables_of(Runtime(name, "cpu", threads)).place for name in runtimes.NAMES for threads in (1, 2)}
    assert len(places) == 4  # what torch.compile multiplies with is what torch does


@pytest.mark.parametrize(
    ("name", "device", "threads", "message"),
    [
        ("tvm", "cpu", 1, "unknown runtime 'tvm'; use one of onnxruntime, torch, torch.compile"),
        ("torch", "tensorrt", 1, "'tensorrt' belongs to the runtime onnxruntime"),
        ("torch", "tpu", 1, "device 'tpu' is unknown"),
        ("onnxruntime", "cpu", 0, "threads must be at least 1, not 0"),
    ],
)
def test_a_runtime_that_is_not_there(name: str, device: str, threads: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sp.compress(*chain(), target="latency=0.5", runtime=name, device=device, threads=threads)


# --- the loop -------------------------------------------------------------------------------------------------------------


def compared(names: tuple[str, str], ratio: float, dense_ms: float = 2.0) -> Comparison:
    times = (dense_ms, dense_ms * ratio)
    return Comparison(
        tuple(Latency(n, "onnxruntime-cpu", t, t, t, 9, 1e3 / t) for n, t in zip(names, times, strict=True)),
        {n: Ratio(r, r, r) for n, r in zip(names, (1.0, ratio), strict=True)}, "cpu", 1, {}, (),
    )  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[float], float]], list[float]]:
    """A machine on which a file takes the time that a function gives for its share of bytes. Returns what was measured, for each file once."""
    log: list[float] = []

    def install(time: Callable[[float], float]) -> list[float]:
        def fake(where: Runtime, original: Path, small: Path, *_: Any) -> Comparison:
            taken = time(small.stat().st_size / original.stat().st_size)
            if taken not in log[-1:]:  # a glance, and the measurement in full
                log.append(taken)
            return compared((original.name, small.name), taken)

        monkeypatch.setattr(runtimes, "compare", fake)
        monkeypatch.setattr(BenchProcess, "start", lambda _: None)
        monkeypatch.setattr(runtimes, "tables_of", lambda *_: Known())
        monkeypatch.setattr(latency.LatencyModel, "taught", lambda model, *_: model)  # what kernels truly take is another matter
        return log

    return install


def test_the_loop_goes_on_where_four_rounds_came_nowhere_near(machine: Any) -> None:
    """Four files that take much less and much more in turn, whatever is in them, and a fifth that takes what was asked for."""
    times, known = iter([0.3, 0.7, 0.32, 0.68, 0.5]), dict[float, float]()
    machine(lambda share: known[share] if share in known else known.setdefault(share, next(times)))
    found = sp.compress(*chain(), target="latency=0.5", align=1).report.data["latency_target"]
    assert [r["measured"] for r in found["rounds"]] == list(known.values()) == [0.3, 0.7, 0.32, 0.68, 0.5]
    assert found["measured"] == 0.5


def test_a_plan_that_is_too_fast_is_better_than_none(machine: Any) -> None:
    """Where all plans are either a tenth slower than what was asked for, or much faster."""
    measured = machine(lambda share: 0.55 if share > 0.6 else 0.3)
    found = sp.compress(*chain(32), target="latency=0.5", align=2).report.data["latency_target"]
    assert found["measured"] == 0.3 and set(measured) == {0.55, 0.3}
    machine(lambda share: 0.55)
    with pytest.raises(TargetError, match="the closest took 0.55 of it"):
        sp.compress(*chain(32), target="latency=0.5", align=2)


def test_where_nothing_lies_between_two_rounds_the_loop_looks_elsewhere(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def allocated(*args: Any, between: Any, **options: Any) -> Any:
        asked.append(any(between))
        if asked[-1]:
            raise TargetError("nothing between")
        return allocate(*args, between=between, **options)

    monkeypatch.setattr(closed_loop.decide, "allocate", allocated)
    monkeypatch.setattr(closed_loop, "_WELL", 1.0)
    machine(lambda share: 0.3 + 0.7 * share)
    found = sp.compress(*chain(), target="latency=0.7", align=2).report.data["latency_target"]
    assert asked[:3] == [False, True, False] and abs(found["measured"] / 0.7 - 1) <= 0.04


def disturbing(monkeypatch: pytest.MonkeyPatch, number: Callable[[int], bool], change: Callable[[Comparison], Comparison]) -> None:
    """Change those measurements of which `number`, from 1, says so."""
    true, counted = runtimes.compare, itertools.count(1)
    monkeypatch.setattr(runtimes, "compare", lambda *given: change(true(*given)) if number(next(counted)) else true(*given))
    monkeypatch.setattr(closed_loop, "_WAITS", (0.0, 0.0, 0.0))


def misread(found: Comparison, **more: Any) -> Comparison:
    return replace(found, ratios={name: Ratio(r.median / 3, r.low / 3, r.high / 3) for name, r in found.ratios.items()}, **more)


@pytest.mark.parametrize("disturbed", [1, 2, 9])
def test_what_others_disturbed_is_measured_again(disturbed: int, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many of the first measurements read a third of what is true; if all do, the last one of four has to do, and says so."""
    machine(lambda share: share)
    disturbing(monkeypatch, lambda n: n <= disturbed, partial(misread, threads=os.cpu_count() or 1, busy_elsewhere=1.5))
    monkeypatch.setattr(closed_loop, "_MOST_ROUNDS", 1)
    said: list[str] = []
    result = sp.compress(*chain(), target="latency=0.7", align=2, progress=said.append)
    assert [line for line in said if "again" in line] == ["round 1: measure again, for other processes kept 1.5 cores busy"] * min(disturbed, 3)
    assert result.found is not None and (result.found.rounds[0].measured > 0.5) == (disturbed < 9)
    assert any("though other processes" in note for note in result.found.built.compared.notes) == (disturbed == 9)


@pytest.mark.parametrize("late", [False, True])
def test_rounds_are_compared_at_one_pace_of_the_machine(late: bool, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At half the pace a measurement reads a third of what is true: a later one is repeated; the first one, if it was that, is forgotten."""
    machine(lambda share: 0.3 + 0.7 * share)

    def slowed(found: Comparison) -> Comparison:
        return misread(found, latencies=tuple(replace(one, median_ms=2 * one.median_ms) for one in found.latencies))

    disturbing(monkeypatch, lambda n: n == (2 if late else 1), slowed)
    said: list[str] = []
    found = sp.compress(*chain(), target="latency=0.7", align=2, progress=said.append).report.data["latency_target"]
    assert [round["dense_ms"] for round in found["rounds"] if round["forgotten"]] == ([] if late else [4.0])
    assert {round["dense_ms"] for round in found["rounds"] if not round["forgotten"]} == {2.0}
    assert abs(found["measured"] / 0.7 - 1) <= 0.04
    assert [line.partition(":")[2] for line in said if "again" in line] == [
        " measure again, for the dense model took 4 ms, and 2 ms in a round before"
    ] * late


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_the_loop_corrects_until_it_is_close(machine: Any, runtime: str) -> None:
    measured = machine(lambda share: 0.3 + 0.7 * share)  # less is saved than the tables say
    result = sp.compress(*chain(), target="latency=0.7", align=2, runtime=runtime)
    found = result.report.data["latency_target"]
    assert found["asked"] == 0.7
    assert len(found["rounds"]) == len(measured) <= 4
    assert abs(found["measured"] / 0.7 - 1) <= max(0.015, min(abs(m / 0.7 - 1) for m in measured) * 2)
    assert found["measured"] in measured
    assert result.report.data["importance_kept"] > 0.5


def test_the_file_that_hit_the_target_is_the_one_that_is_deployed(machine: Any, tmp_path: Path) -> None:
    machine(lambda share: share)
    result = sp.compress(*chain(), target="latency=0.7", align=2)
    assert result.found is not None
    built = result.found.built.file
    report = result.save(tmp_path / "first")
    assert (tmp_path / "first" / "model.onnx").read_bytes() == built.read_bytes()
    assert (tmp_path / "first" / "original.onnx").read_bytes() == result.found.dense.original.read_bytes()
    shown = report.data["latency_ms"]["onnxruntime-cpu"]["ratio"]["median"]
    assert shown == result.found.built.compared.ratios["model.onnx"].median == report.data["latency_target"]["measured"]
    verify_directory(tmp_path / "first")
    weight = next(result.model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3  # the user goes on to train it: the file is another one
    result.save(tmp_path / "second")
    assert (tmp_path / "second" / "model.onnx").read_bytes() != built.read_bytes()
    np.testing.assert_array_equal(onnx.weights(tmp_path / "second" / "model.onnx")["layers.0.weight"], weight.detach())
    assert onnx.metadata(tmp_path / "second" / "model.onnx") == onnx.metadata(built)


def test_a_round_is_close_enough_where_it_is_a_bit_too_fast_after_the_first() -> None:
    def rounds(*measured: float) -> list[closed_loop.Round]:
        return [closed_loop.Round(m, m, m, m, None, 1.0) for m in measured]

    assert [closed_loop._is_close(m, 0) for m in (1.03, 1.01, 0.99, 0.97)] == [False, True, True, False]
    assert [closed_loop._is_close(m, 1) for m in (1.03, 1.01, 0.97, 0.95)] == [False, True, True, False]
    assert closed_loop._is_near(rounds(1.1, 1.03, 1.2, 1.2), 1.0)
    assert not closed_loop._is_near(rounds(1.1, 1.03, 1.2), 1.0) and not closed_loop._is_near(rounds(1.1, 1.05, 1.2, 1.2), 1.0)


def test_the_next_plan_lies_between_the_last_that_was_too_fast_and_the_last_that_was_too_slow() -> None:
    def tried(width: int, measured: float, predicted: float) -> Any:
        return SimpleNamespace(widths={"a": width}, round=closed_loop.Round(predicted, measured, measured, measured, None, 1.0))

    well = [tried(width, width / 100, width / 100) for width in (60, 40, 55, 45)]
    assert closed_loop._between([], 0.5) == ({}, {})
    assert closed_loop._between(well[:1], 0.5) == ({}, {"a": 60})
    assert closed_loop._between(well[:3], 0.5) == ({"a": 40}, {"a": 55})
    assert closed_loop._between(well, 0.5) == ({"a": 45}, {"a": 55})
    ill = tried(50, 0.54, predicted=0.5)
    assert closed_loop._between([*well, ill], 0.5) == ({"a": 45}, {"a": 55})


def test_between_a_round_that_is_too_fast_and_one_that_is_too_slow_lies_the_next() -> None:
    def rounds(*pairs: tuple[float, float]) -> list[closed_loop.Round]:
        return [closed_loop.Round(predicted, measured, measured, measured, None, 1.0) for predicted, measured in pairs]

    assert closed_loop._corrected(rounds((0.5, 0.6)), 0.5) == pytest.approx(0.5 * 0.5 / 0.6)
    assert closed_loop._corrected(rounds((0.5, 0.6), (0.3, 0.4)), 0.5) == pytest.approx(0.4)
    assert closed_loop._corrected(rounds((0.5, 0.6), (0.45, 0.55), (0.2, 0.4), (0.3, 0.45)), 0.5) == pytest.approx(0.375)
    assert closed_loop._beyond(0.4, rounds((0.5, 0.6), (0.4, 0.41)), 1, 0.5) == pytest.approx(0.45)  # the same plan as before, and too fast
    assert closed_loop._beyond(0.4, rounds((0.4, 0.41)), 0, 0.5) == pytest.approx(0.4 * 0.5 / 0.41)


def test_a_latency_that_the_tables_hold_to_be_out_of_reach_is_tried(machine: Any) -> None:
    measured = machine(lambda share: 0.5 * share)  # the file is faster than the tables say
    result = sp.compress(*chain(), target="latency=0.045", align=16)
    assert result.report.data["latency_target"]["measured"] == pytest.approx(0.045, rel=0.08)
    assert len(measured) <= 4
    machine(lambda share: share)
    with pytest.raises(TargetError, match=r"latency=0.045 .* cannot be reached: the closest took 0.08"):
        sp.compress(*chain(), target="latency=0.045", align=16)


def test_a_latency_in_milliseconds(machine: Any) -> None:
    machine(lambda share: share)
    result = sp.compress(*chain(), target="latency=1ms", align=2)  # of 2 ms
    assert result.report.data["latency_target"]["asked"] == pytest.approx(0.5)
    assert result.report.data["latency_target"]["measured"] == pytest.approx(0.5, rel=0.08)


def test_a_latency_out_of_reach_says_how_close_it_came(machine: Any) -> None:
    machine(lambda share: 0.9)
    with pytest.raises(TargetError, match=r"latency=0.5 .* cannot be reached: the closest took 0.9"):
        sp.compress(*chain(), target="latency=0.5")


def test_a_latency_beside_another_budget(machine: Any) -> None:
    machine(lambda share: share)
    result = sp.compress(*chain(), target="latency=0.9,macs=0.4", align=2)
    assert result.report.data["macs"]["after"] <= 0.4 * result.report.data["macs"]["before"]


def test_a_latency_cannot_be_planned_without_measuring() -> None:
    graph = sp.trace(*chain())
    with pytest.raises(InputError, match="measured on the whole model"):
        sp.plan(graph, sp.find_groups(graph), "latency=0.5")


def test_a_process_of_its_own_compares_two_files(tmp_path: Path) -> None:
    graph, _, path, _ = prepared(*chain(16), tmp_path)
    other = tmp_path / "other.onnx"
    other.write_bytes(path.read_bytes())
    inputs = tuple(graph.given_inputs())
    with BenchProcess() as bench:
        found = bench.compare(path, other, inputs, threads=1, seconds=0.5)
        assert list(found.ratios) == ["dense.onnx", "other.onnx"]
        assert found.ratios["dense.onnx"].median == 1.0 < 10 * found.ratios["other.onnx"].median
        assert found.threads == 1
        with pytest.raises(InputError, match="no such file"):
            bench.compare(path, tmp_path / "missing.onnx", inputs, threads=1, seconds=0.5)
        again = bench.compare(other, path, inputs, threads=1, seconds=0.5)  # it goes on after an error
        assert list(again.ratios) == ["other.onnx", "dense.onnx"]
        process = bench.start()
        process.kill()
        process.wait()
        with pytest.raises(InputError, match="the process that measures ended by SIGKILL: it said nothing"):
            bench.compare(path, other, inputs, threads=1, seconds=0.5)
        assert process.stdin is not None and process.stdin.closed  # or the end of the block would fail, as if a disk were full
