"""A latency as the target: plan by measured tables, build, measure the whole model against the dense one, correct, and plan again."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune import decide
from structprune.analysis.groups import Groups
from structprune.backends import runtimes
from structprune.backends.bench_process import BenchProcess
from structprune.backends.benchmark import Comparison
from structprune.backends.directory import stamp
from structprune.backends.latency import LatencyModel, latency_model
from structprune.backends.runtimes import Runtime
from structprune.decide.uniform import Widths
from structprune.errors import InputError, TargetError
from structprune.frontends.onnx_in.reading import read_again
from structprune.frontends.trace import retrace
from structprune.ir.graph import Graph, digest
from structprune.ir.plan import Plan
from structprune.transform.precision import type_of
from structprune.transform.surgery import operate

_ROUNDS = 4
_MOST_ROUNDS = 7  # where none of the first was near
_GLANCE, _FULL = 2.0, 6.0  # seconds of a measurement; the second where the first is close
_OTHER_PACE = 1.15  # times what the dense model took before: the machine itself is slower than it was
_WAITS = (0.0, 5.0, 15.0)  # seconds, before what was slowed is measured again, in all rounds together
_CLOSE = 0.02  # of the target: what two measurements of one file may differ by
_NEAR = 0.04  # of the target
_WELL = 0.05  # of the measurement: a prediction that is off by less was good
_MISSED = 0.08  # of the target: more than this above it is no success


@dataclass(frozen=True)
class Round:
    """Times as shares of the dense model's: `predicted` by the tables, `measured` in interleaved rounds, with an interval of 95 %.

    `gap`: how far from the best allocation the solver may have stopped. `dense_ms`: what the dense model took meanwhile. `forgotten`: the machine
    was slower then than in all rounds that follow, which are not compared with this one.
    """

    predicted: float
    measured: float
    low: float
    high: float
    gap: float | None
    dense_ms: float
    forgotten: bool = False


@dataclass(frozen=True)
class Dense:
    """The model before pruning in its runtime: its file, as long as `keeper` lives, and its latency as a function of widths."""

    original: Path
    latency: LatencyModel
    runtime: Runtime
    keeper: Any


@dataclass(frozen=True)
class Built:
    """The small model as its runtime reads it: its file, as long as `keeper` lives, its graph, and its time beside the dense model's."""

    file: Path
    weights: str  # digest of those in the file
    keeper: Any
    small: Graph
    compared: Comparison


@dataclass(frozen=True)
class Found:
    """The plan that came nearest to the target, and how."""

    plan: Plan
    share: float  # of the dense model's time that was asked for
    rounds: tuple[Round, ...]
    best: Round  # whose plan it is
    dense: Dense
    built: Built

    def to_dict(self) -> dict[str, Any]:
        """For the report: plain JSON."""
        mine = {"predicted": self.best.predicted, "measured": self.best.measured}
        return {"asked": self.share} | mine | {"rounds": [asdict(r) for r in self.rounds]}


@dataclass(frozen=True)
class _Tried:
    """A plan that was built and measured, and its widths."""

    plan: Plan
    widths: Widths
    round: Round


@dataclass(frozen=True)
class _Search:
    """Where the loop stands. `share`: of the dense model's time that was asked for; `limit`: that the tables may say of the next plan.

    latency: the tables, as the rounds have taught them. between: see `_between`. best: what came nearest to the target, and its file.
    """

    share: float
    limit: float
    latency: LatencyModel
    between: tuple[Widths, Widths] = ({}, {})
    tried: tuple[_Tried, ...] = ()
    forgotten: tuple[Round, ...] = ()
    best: tuple[_Tried, Built] | None = None

    @property
    def rounds(self) -> list[Round]:
        return [t.round for t in self.tried]

    def foretold(self) -> list[Round]:
        """The rounds as they would be predicted now."""
        whole = self.latency.cost()
        return [replace(t.round, predicted=self.latency.cost(t.widths) / whole) for t in self.tried]

    def is_over(self) -> bool:
        """Whether the last round hit the target, or all together are as near as that many can be expected to come."""
        rounds = self.rounds
        return _is_close(rounds[-1].measured / self.share, len(rounds) - 1) or _is_near(rounds, self.share) or len(rounds) == _MOST_ROUNDS


def measure_dense(graph: Graph, groups: Groups, where: Runtime, align: int | None, say: Callable[[str], None]) -> Dense:
    """Save the model as it is for the runtime, and time its operators over the widths that they may have.

    align: a step for all widths, in the place of the measured ones.
    """
    if where.name == "onnxruntime" and type_of(graph.module) == torch.bfloat16:
        raise InputError("ONNX Runtime has no kernels for bfloat16 on the CPU, to be timed: give the model in float32, or --runtime torch")
    keeper = tempfile.TemporaryDirectory(prefix="structprune-")
    original = where.file(Path(keeper.name), "original")
    say("export the dense model")
    origins = runtimes.save_original(where, graph, original)
    kernels = runtimes.kernels_of(where, graph, groups, original, origins)
    if graph.signature is not None and original.suffix == ".onnx":
        original.write_bytes(read_again(graph.signature))  # what the user has now is what must become faster
    return Dense(original, latency_model(groups, kernels, runtimes.tables_of(where, say), align), where, keeper)


def plan_for_latency(
    graph: Graph,
    groups: Groups,
    dense: Dense,
    target: str,
    saliency: decide.Saliency,
    allocation: str,
    ignore: Sequence[str],
    say: Callable[[str], None],
) -> Found:
    """The plan of the least loss whose file takes the asked share of the dense one's time, measured in the runtime.

    Raises TargetError, with the closest that was reached, where that cannot be.
    """
    targets = decide.parse_target(target)
    asked = next(t for t in targets if t.key == "latency")
    costs = decide.costs_of(graph, groups, targets)
    whole = dense.latency.cost()

    def solved(limit: float, latency: LatencyModel, between: tuple[Widths, Widths]) -> decide.Allocation:
        """The best widths of which the tables say that they take `limit` of the dense model's time."""
        return decide.allocate(
            groups,
            [replace(t, value=limit * whole, absolute=True) if t is asked else t for t in targets],
            saliency.scores,
            costs=costs | {"latency": [latency.cost]},
            steps=latency.steps,
            losses=saliency.losses,
            method=allocation,
            between=between,
            branches=saliency.branches,
        )

    share = asked.value / whole if asked.absolute else asked.value
    search = _Search(share, share, dense.latency)
    waits = iter(_WAITS)

    def tell(words: str) -> None:
        say(f"round {len(search.forgotten) + len(search.tried) + 1}: {words}")

    with BenchProcess() as bench:
        bench.start()  # its imports take as long as the first solution
        for _ in range(2 * _MOST_ROUNDS):
            tell(f"solve for {search.limit:.3f} of the dense model's time")
            try:
                found = solved(search.limit, search.latency, search.between)
            except TargetError as unreachable:
                elsewhere = _elsewhere(search, unreachable)
                if elsewhere is None:
                    break
                search = elsewhere
                continue
            plan = decide.plan_of(graph, groups, found.widths, saliency.scores, target=target, criterion=saliency.criterion, ignore=tuple(ignore))
            known = next((number for number, other in enumerate(search.tried) if other.plan.tensors == plan.tensors), None)
            if known is not None:  # the correction was smaller than a step
                search = replace(search, limit=_beyond(search.limit, search.foretold(), known, search.share))
                continue
            file, weights, keeper, small = _build(graph, groups, plan, dense)
            compared, share = _measured(graph, dense, file, bench, asked, search.rounds, waits, tell)
            search = _with_round(replace(search, share=share), plan, found, Built(file, weights, keeper, small, compared))
            if search.is_over():
                break
            taught = dense.latency.taught(found.widths, runtimes.ran(dense.runtime, small, file), search.rounds[-1].measured * whole)
            search = replace(search, latency=taught, between=_between(search.tried, share))
            search = replace(search, limit=_corrected(search.foretold(), share))
    if search.best is None or math.isinf(_miss(search.best[0].round.measured, search.share)):
        closest = f"the closest took {min(r.measured for r in search.rounds):.3g} of it" if search.tried else "no plan was found"
        raise TargetError(f"latency={search.share:.3g} of the dense model's time cannot be reached: {closest}")
    nearest, built = search.best
    return Found(nearest.plan, search.share, (*search.forgotten, *search.rounds), nearest.round, dense, built)


def _elsewhere(search: _Search, unreachable: TargetError) -> _Search | None:
    """Where to look for what the tables have no plan for; None where no plan that they know would be faster than those that were tried.

    Raises `unreachable` where the reason is another than the limit.
    """
    if any(search.between):  # there may be nothing between two rounds
        return replace(search, between=({}, {}))
    least = unreachable.least.get("latency", 0.0) / search.latency.cost()
    beyond = least * (1 + _MISSED)  # so the tables say; the file may be faster
    if search.tried and beyond >= min(r.predicted for r in search.foretold()):
        return None
    if least <= search.limit:
        raise unreachable
    return replace(search, limit=beyond)


def _with_round(search: _Search, plan: Plan, found: decide.Allocation, built: Built) -> _Search:
    """The search after a measurement. Where something slowed all others, that is gone now, they are forgotten."""
    ratio, pace = built.compared.ratios[built.file.name], built.compared.latencies[0].median_ms
    predicted = search.latency.cost(found.widths) / search.latency.cost()
    one = _Tried(plan, found.widths, Round(predicted, ratio.median, ratio.low, ratio.high, found.gap, pace))
    if all(r.dense_ms > _OTHER_PACE * pace for r in search.rounds):
        search = replace(search, tried=(), forgotten=(*search.forgotten, *(replace(r, forgotten=True) for r in search.rounds)))
    search = replace(search, tried=(*search.tried, one))
    nearest = min(search.rounds, key=lambda r: _miss(r.measured, search.share))
    return replace(search, best=(one, built)) if nearest is one.round else search  # the file of the one before goes


def _build(graph: Graph, groups: Groups, plan: Plan, dense: Dense) -> tuple[Path, str, Any, Graph]:
    """What a plan makes of the model, written as it will be deployed: the file, a digest of its weights, what keeps it, and its graph."""
    keeper = tempfile.TemporaryDirectory(prefix="structprune-")
    file = dense.runtime.file(Path(keeper.name), "model")
    surgery = operate(graph, groups.types, decide.atoms_of(plan, groups), plan.tensors)
    small = retrace(surgery.module, graph)
    runtimes.save(dense.runtime, small.exported, graph, file, stamp(plan))
    return file, digest(surgery.module), keeper, small


def _measured(
    graph: Graph,
    dense: Dense,
    file: Path,
    bench: BenchProcess,
    asked: decide.Target,
    before: Sequence[Round],
    waits: Iterator[float],
    say: Callable[[str], None],
) -> tuple[Comparison, float]:
    """A file beside the dense model's, for longer where that is close to what was asked for; and what share of the dense model's time that is.

    What something else on the machine slowed is measured again, as long as there are `waits`: threads that wait for each other make of a slower core
    another ratio, not only longer times.
    """
    inputs = tuple(v for v in graph.given_inputs() if isinstance(v, Tensor))
    say("measure")
    while True:
        compared = runtimes.compare(dense.runtime, dense.original, file, inputs, bench, _GLANCE)
        if _is_close(compared.ratios[file.name].median / _share(asked, compared), len(before)):
            compared = runtimes.compare(dense.runtime, dense.original, file, inputs, bench, _FULL)
        slowed = _slowed(compared, before)
        if not slowed:
            return compared, _share(asked, compared)
        wait = next(waits, None)
        if wait is None:
            told = replace(compared, notes=(*compared.notes, f"measured all the same, though {slowed}"))
            return told, _share(asked, compared)
        say(f"measure again, for {slowed}")
        time.sleep(wait)


def _slowed(compared: Comparison, before: Sequence[Round]) -> str:
    """In words, what something else on the machine did to a measurement; empty where nothing shows."""
    if compared.disturbed:
        return f"other processes kept {compared.busy_elsewhere:.1f} cores busy"
    now, best = compared.latencies[0].median_ms, min((r.dense_ms for r in before), default=math.inf)
    return f"the dense model took {now:.3g} ms, and {best:.3g} ms in a round before" if now > _OTHER_PACE * best else ""


def _share(asked: decide.Target, compared: Comparison) -> float:
    """Of the dense model's time, as it was measured just now where seconds were asked for."""
    return asked.value / (compared.latencies[0].median_ms * 1e-3) if asked.absolute else asked.value


def _is_close(reached: float, before: int) -> bool:
    """Whether a round is what was asked for, by its time as a share of that; after the first, a bit too fast will do."""
    return -_CLOSE * min(before + 1, 2) <= reached - 1 <= _CLOSE


def _is_near(rounds: Sequence[Round], share: float) -> bool:
    """Whether one round is as near as that many can be expected to come."""
    return len(rounds) >= _ROUNDS and min(abs(r.measured / share - 1) for r in rounds) <= _NEAR


def _between(tried: Sequence[_Tried], share: float) -> tuple[Widths, Widths]:
    """The widths of the last round that was too fast, and of the last that was too slow, of those that were well foretold; none where there was none.

    The tables are a little wrong about every kernel, and two plans of one predicted time may have little in common, and differ by 3 % when measured.
    Between two that were measured they can be wrong only about the difference. A plan that they were very wrong about is no good one to stay near.
    """
    good = [t for t in tried if abs(t.round.predicted / t.round.measured - 1) <= _WELL]
    faster = [t.widths for t in good if t.round.measured <= share]
    slower = [t.widths for t in good if t.round.measured > share]
    return faster[-1] if faster else {}, slower[-1] if slower else {}


def _corrected(rounds: Sequence[Round], share: float) -> float:
    """The prediction at which a measurement of `share` is to be expected: between the nearest on both sides, or in proportion to the nearest."""
    faster = max((r for r in rounds if r.measured <= share), key=lambda r: r.measured, default=None)
    slower = min((r for r in rounds if r.measured > share), key=lambda r: r.measured, default=None)
    if faster is not None and slower is not None and faster.predicted < slower.predicted:
        return float(np.interp(share, [faster.measured, slower.measured], [faster.predicted, slower.predicted]))
    nearest = min(rounds, key=lambda r: abs(r.measured / share - 1))
    return nearest.predicted * share / nearest.measured


def _beyond(limit: float, rounds: Sequence[Round], known: int, share: float) -> float:
    """Where to look after the limit led to a plan that was measured: half-way to the nearest prediction on the other side, or further out."""
    mine = rounds[known]
    others = [r.predicted for r in rounds if (r.measured > share) != (mine.measured > share)]
    return (limit + min(others, key=lambda p: abs(p - limit))) / 2 if others else limit * share / mine.measured


def _miss(measured: float, share: float) -> float:
    """How far from the target; to be slower than asked counts twice, and to be much slower is no success, however fast all other plans are."""
    off = measured / share - 1
    return math.inf if off > _MISSED else 2 * off if off > 0 else -off
