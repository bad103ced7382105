"""The way of a model through structprune: `compress` is one line a stage. Read this file first."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from structprune import decide, processes
from structprune.analysis.explain import why
from structprune.analysis.groups import Groups, find_groups
from structprune.analysis.outline import outline
from structprune.backends import runtimes
from structprune.backends.benchmark import environment
from structprune.backends.report import Report
from structprune.backends.runtimes import Runtime
from structprune.calibrate.logits import measured_logits, turns
from structprune.calibrate.stepping import takes_one
from structprune.calibrate.synthetic import SYNTHETIC, synthetic
from structprune.closed_loop import Dense, Found, measure_dense, plan_for_latency
from structprune.decide.cost import Cost, memory
from structprune.decide.saliency import Saliency
from structprune.errors import InputError, TargetError
from structprune.frontends.devices import device_of
from structprune.frontends.finite import must_be_finite
from structprune.frontends.samples import samples_of
from structprune.frontends.trace import Dynamic, plain, trace
from structprune.frontends.users_code import as_written
from structprune.ir.axes import Atom, Keep
from structprune.ir.graph import Graph, memo_for
from structprune.ir.plan import Plan, PlannedGroup
from structprune.ir.samples import Samples
from structprune.ir.traced import buffers_kept, state_kept
from structprune.recovery.compensate import Fitted
from structprune.recovery.compensate import compensate as compensated
from structprune.recovery.matching import Matched, match, must_learn
from structprune.result import Clock, Evaluate, Progress, Result
from structprune.transform.memory import freed_or_kept
from structprune.transform.own_class import came_as_graph, own_class, take_values
from structprune.transform.scale import changed_scales
from structprune.transform.surgery import Surgery, operate
from structprune.transform.verify import Verification, answers_again, positions, verify_trace, verify_unchanged
from structprune.transform.verify import verify as compare

_MOST_SAMPLES = 2048


@as_written()
def compress(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Tensor,
    target: str = "macs=0.5",
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | Tensor | str | None = None,
    compensate: bool = True,
    matching: int = 0,
    evaluate: Evaluate | None = None,
    criterion: Any = "auto",
    ignore: Sequence[str] = (),
    dynamic: Dynamic = (),
    allocation: str = "auto",
    align: int | None = None,
    runtime: str = "onnxruntime",
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    sharded: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make `model` smaller, and prove it: the result has passed verification, or an error is raised.

    model: in any mode, on any device, with any forward that torch.export can trace; it is left untouched. The small one is on the CPU.
    example_inputs: positional inputs of one call, the batch on the first axis; `example_kwargs` the keyword ones.
    target: what must hold: 'latency=0.5', 'latency=4ms', 'channels=0.5', 'macs=2G', 'params=0.3', 'memory=0.5' (activations that are alive
        at one time) or 'size=10MB' (the ONNX file); several, joined by commas, hold together. A latency is that in
        `runtime` on `device`: operators are timed there, the tables kept for the next model, and the whole model is measured against the
        dense one until the target is hit.
    calibration: a few hundred samples of the model's inputs, unlabelled: one tensor, or an iterable of batches; of (inputs, labels) for a
        criterion that needs a loss. They tell which channels the others can stand in for, what narrowing each group loses, and the weights that
        are left are fitted to them. Those that are alike (frames of one video, crops of one picture) belong side by side: what some of them
        teach is held against runs of others. 'synthetic' where there are no data: samples are made from what the model's batch norms remember.
    compensate: False leaves the weights as they are sliced from the original's.
    matching: so many steps follow in which all layers are fitted together, by gradients, to the original's answers inside and out; a few hundred help
        where much is removed. They take the time of a training, and change nothing unless an eighth of the samples, held back, says that it helps.
    evaluate: model -> a score, higher is better; taken of the original, of the pruned and of the compensated model, for the report.
    criterion: which channels matter: 'auto' ('reconstruction' with calibration, else 'l2'), another name of docs/criteria.md, a torch_pruning
        Importance, or a callable (Groups, tensors by name) -> {group name: score of each channel}.
    ignore: names or shell patterns of modules or tensors that keep their channels.
    dynamic: axes beside the batch that may change size after export: (2, 3) of every input, or {'ids': (1,)} of those named.
    allocation: how widths are found: 'milp' and 'greedy' lose as little importance as they can, 'uniform' keeps one share everywhere;
        'auto' is 'milp' for a latency or with calibration, and else 'uniform'.
    align: widths are multiples of this, in the place of the steps that were measured for each group.
    runtime: what the model is deployed in: 'onnxruntime', 'torch' or 'torch.compile'; device: 'cpu', 'cuda', 'cuda:N', or of ONNX Runtime
        'tensorrt'; threads: of the processor, in all measurements; as torch is set if not given.
    sharded: under torchrun, every process makes this same call, and does its share of the work on the samples; all get the same result.

    Raises TraceError, InputError, TargetError or VerificationError; see structprune.errors.
    """
    options = Options(criterion, tuple(ignore), allocation, align, runtime, device, threads, seed, compensate, matching, sharded)
    given = _Given(model, example_inputs, example_kwargs, dynamic, calibration, evaluate)
    if target.strip() == decide.TARGET:
        return _without_dead(given, options, Clock(progress))
    with processes.sharing(sharded):
        return _decide(_prepare(given, [target], options, Clock(progress)), target)


@as_written()
def front(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Tensor,
    target: str = "latency=0.3:0.9:7",
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | Tensor | str | None = None,
    evaluate: Evaluate | None = None,
    dynamic: Dynamic = (),
    progress: Progress | None = None,
    **options: Any,
) -> list[Result]:
    """`compress` to several targets: 'latency=0.3:0.9:7' stands for seven, from 0.3 to 0.9. The model is traced, scored and timed once.

    options: criterion, ignore, allocation, align, runtime, device, threads, seed, compensate, matching and sharded, as of `compress`. Raises as it
    does; a target that cannot be reached is left out, with a word to `progress`, unless none can.
    """
    targets, chosen = decide.spread(target), Options(**options)
    given = _Given(model, example_inputs, example_kwargs, dynamic, calibration, evaluate)
    results: list[Result] = []
    with processes.sharing(chosen.sharded):
        ready = _prepare(given, targets, chosen, Clock(progress))
        for one in targets:
            try:
                results.append(_decide(ready, one))
            except TargetError as unreachable:
                if one == targets[-1] and not results:
                    raise
                ready.clock.say(str(unreachable))
    return results


@dataclass(frozen=True)
class Options:
    """What the user chose; see `compress`."""

    criterion: Any = "auto"
    ignore: tuple[str, ...] = ()
    allocation: str = "auto"
    align: int | None = None
    runtime: str = "onnxruntime"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    compensate: bool = True
    matching: int = 0
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.matching < 0 or (self.matching and not self.compensate):
            raise InputError(f"matching={self.matching}: it is a number of steps that follow compensation, 0 for none")

    def deployed(self) -> Runtime:
        """Raises InputError for a runtime or device that is not there."""
        return runtimes.runtime(self.runtime, self.device, self.threads)


@dataclass(frozen=True)
class _Given:
    """What the user handed over; see `compress`."""

    model: nn.Module
    example_inputs: tuple[Any, ...] | Tensor
    example_kwargs: Mapping[str, Any] | None = None
    dynamic: Dynamic = ()
    calibration: Iterable[Any] | Tensor | str | None = None
    evaluate: Evaluate | None = None

    def traced(self, clock: Clock) -> tuple[nn.Module, Graph]:
        """The model with its parametrizations folded, and its graph. Raises InputError for values that are not finite, and TraceError."""
        with clock("trace"):
            folded = plain(self.model, self.example_inputs, self.example_kwargs)
            must_be_finite(folded, self.example_inputs, self.example_kwargs)
            graph = trace(folded, self.example_inputs, self.example_kwargs, dynamic=self.dynamic)
        device = device_of(self.model)
        if device.type != "cpu":
            graph = replace(graph, notes=(*graph.notes, f"the model came on {device}, the small one is on the CPU: result.model.to('{device}')"))
        return folded, graph

    def samples(self, graph: Graph, groups: Groups, seed: int, clock: Clock) -> Samples | None:
        """Not more than tell something new, evenly spread over all that were given."""
        if self.calibration is None:
            return None
        if isinstance(self.calibration, str):
            if self.calibration != SYNTHETIC:
                raise InputError(f"calibration {self.calibration!r}: give samples of the model's inputs, or {SYNTHETIC!r}, which makes some")
            with clock("make samples"):
                return synthetic(graph, groups.macs(), seed, clock.say)
        given = samples_of(self.calibration, graph)
        if given.divisible and not takes_one(graph.module, given):
            given = replace(given, divisible=False)
        kept = given.spread(_MOST_SAMPLES)
        if len(kept) < len(given):
            clock.say(f"{len(kept)} of {len(given)} samples are used: more take time, and tell little")
        return kept

    @property
    def evaluation(self) -> Evaluate | None:
        """`evaluate`, of models on the device that the user's came on."""
        evaluate, device = self.evaluate, device_of(self.model)
        if evaluate is None or device.type == "cpu":
            return evaluate
        return lambda model: evaluate(copy.deepcopy(model, memo_for(model)).to(device))

    def score(self, clock: Clock) -> float | None:
        """What the user's evaluation says of the model."""
        if self.evaluate is None:
            return None
        with clock("evaluate"):
            return self.evaluate(self.model)


@dataclass(frozen=True)
class _Ready:
    """A model up to the decision: traced, its groups found and scored, and timed where a target asks for that."""

    model: nn.Module
    graph: Graph
    groups: Groups
    samples: Samples | None
    saliency: Saliency
    dense: Dense | None
    evaluate: Evaluate | None
    accuracy: float | None  # what `evaluate` says of the original
    options: Options
    clock: Clock


def _prepare(given: _Given, targets: Sequence[str], options: Options, clock: Clock) -> _Ready:
    """All that one decision shares with another."""
    deployed = options.deployed()  # what is unknown is told before any work is done
    decide.must_be_criterion(options.criterion)
    decide.must_be_method(options.allocation)
    measured = any(t.key == "latency" for target in targets for t in decide.parse_target(target))
    if options.sharded and measured:
        raise InputError("a latency is measured by one process at a time: compress to a latency without sharded, or to macs=")
    if options.matching:
        if given.calibration is None:
            raise InputError(f"matching={options.matching} needs calibration=, samples of the model's inputs")
        must_learn(given.model)
    folded, graph = given.traced(clock)
    with clock("infer"):
        groups = find_groups(graph, options.ignore)
    samples = given.samples(graph, groups, options.seed, clock)
    with clock("score"):
        saliency = decide.saliency(graph, groups, options.criterion, model=folded, samples=samples, seed=options.seed, say=clock.say)
    dense = None
    if measured:
        with clock("time operators"):
            dense = measure_dense(graph, groups, deployed, options.align, clock.say)
    return _Ready(folded, graph, groups, samples, saliency, dense, given.evaluation, given.score(clock), options, clock)


def _decide(ready: _Ready, target: str) -> Result:
    """From the target to the verified small model."""
    graph, groups, options, clock = ready.graph, ready.groups, ready.options, ready.clock.copy()
    saliency = ready.saliency
    found: Found | None = None
    with clock("plan"):
        if ready.dense is not None:
            found = plan_for_latency(graph, groups, ready.dense, target, saliency, options.allocation, options.ignore, clock.say)
            plan = found.plan
        else:
            plan = decide.plan_for(graph, groups, target, saliency, allocation=options.allocation, ignore=options.ignore)
    return realise(ready.model, graph, groups, plan, clock, ready=ready, found=found)


def _without_dead(given: _Given, options: Options, clock: Clock, plan: Plan | None = None) -> Result:
    """The model without the channels that contribute nothing, proved to answer as the original; or without those of them that a plan removes."""
    options.deployed()  # what is unknown is told before any work is done
    folded, original = given.traced(clock)
    silent, module = copy.deepcopy((folded, original.module), memo_for(folded))  # together, so that they go on to share their tensors
    graph = replace(original, module=module)
    with clock("infer"):
        groups = find_groups(graph, options.ignore)
    with clock("dead channels"):
        dead = decide.silence(graph, groups)
        plan = plan if plan is not None else dead.plan(graph, groups, options.ignore)
        dead.must_hold(plan)
    scores = decide.Saliency(decide.TARGET, {name: (~gone).astype(float) for name, gone in dead.channels.items()})
    samples = given.samples(graph, groups, options.seed, clock)
    options = replace(options, criterion=decide.TARGET, compensate=False, matching=0)  # nothing is lost
    ready = _Ready(silent, graph, groups, samples, scores, None, given.evaluation, given.score(clock), options, clock)
    result = realise(silent, graph, groups, plan, clock, ready=ready)
    with clock("verify"):
        own = max((torch.finfo(p.dtype).eps for p in given.model.parameters() if p.is_floating_point()), default=0.0)
        error = verify_unchanged(graph, groups.types, original.module, result.small, dead.tolerance(own))
    found = dead.to_dict() | {"error": error, "tolerance": dead.tolerance(own)}
    data = {**result.report.data, "dead": found, "notes": [*result.report.data["notes"], *dead.notes()]}
    return replace(result, report=Report(data))


@as_written()
def apply(model: nn.Module, plan: Plan, *, progress: Progress | None = None) -> nn.Module:
    """Replay a plan on a fresh instance of the model that it was made for, with every check of `compress`.

    Raises PlanError for a plan of another model.
    """
    args, kwargs = decide.example_inputs(plan.inputs)
    clock = Clock(progress)
    if plan.target == decide.TARGET:
        return _without_dead(_Given(model, args, kwargs), Options(ignore=plan.ignore), clock, plan).model.to(device_of(model))
    with clock("trace"):
        folded = plain(model, args, kwargs)
        graph = _with_positions_near_zero(trace(folded, args, kwargs))
    with clock("infer"):
        groups = find_groups(graph, plan.ignore)
    return realise(folded, graph, groups, plan, clock).model.to(device_of(model))


@as_written()
def verify(model: nn.Module, small: nn.Module, plan: Plan, example_inputs: tuple[Any, ...] | Tensor | None = None) -> Verification:
    """Compare a small model, from wherever it comes, with `model` without the channels that `plan` removes.

    Without example inputs, noise of the shapes in the plan is used. Raises VerificationError where the two differ, and PlanError
    for a plan of another model.
    """
    if example_inputs is not None:
        graph = trace(model, example_inputs)
    else:
        args, kwargs = decide.example_inputs(plan.inputs)
        graph = _with_positions_near_zero(trace(model, args, kwargs))
    groups = find_groups(graph, plan.ignore)
    traced = trace(small, graph.args, graph.kwargs, batch=graph.dynamic_batch)
    return compare(graph, groups.types, decide.atoms_of(plan, groups), traced.module)


def _with_positions_near_zero(graph: Graph) -> Graph:
    """The same, of an example that is noise, with what may be positions between 0 and 1: others would lie outside of what they are positions in."""
    unsafe = positions(graph)

    def near_zero(value: Tensor) -> Tensor:
        return value.frac().abs() if value.is_floating_point() else torch.zeros_like(value)

    inputs = [near_zero(v) if place in unsafe and isinstance(v, Tensor) else v for place, v in enumerate(graph.flat_inputs())]
    args, kwargs = graph.called_with(inputs)
    return replace(graph, args=args, kwargs=kwargs)


@as_written()
def inspect(model: nn.Module, example_inputs: tuple[Any, ...] | Tensor, *, example_kwargs: Mapping[str, Any] | None = None) -> Groups:
    """What can be pruned, what cannot, and why: groups, sizes, costs, frozen axes with reason and source line."""
    return find_groups(trace(model, example_inputs, example_kwargs))


@as_written()
def explain(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Tensor,
    layer: str,
    other: str | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """In words and source lines: what couples two layers; or what one layer is coupled to, and why its other axes stay."""
    graph = trace(model, example_inputs, example_kwargs)
    return why(graph, find_groups(graph), layer, other)


@dataclass(frozen=True)
class _Made:
    """What became of a plan: the small graph, verified, the user's own class where it follows, and what fitting its weights gave."""

    surgery: Surgery
    verification: Verification
    own: nn.Module | None
    note: str  # why it is the user's own class, or is not
    forgotten: Sequence[str]  # attributes that the user's code keeps from one call to the next, and that matter
    fitted: Sequence[Fitted] | None = None
    matched: Matched | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)

    @property
    def small(self) -> nn.Module:
        """What the user gets."""
        return self.own if self.own is not None else self.surgery.module


def realise(
    model: nn.Module, graph: Graph, groups: Groups, plan: Plan, clock: Clock, *, ready: _Ready | None = None, found: Found | None = None
) -> Result:
    """Carry out a plan: surgery, verification, the user's own class where it follows, and compensation where there are samples.

    ready and found: what the plan was decided by, where it was decided here.
    """
    keep = decide.atoms_of(plan, groups)
    made = _cut(model, graph, groups, plan, keep, clock)
    accuracy = _scores_of(ready, "pruned", made.small, clock)
    if ready is not None and ready.samples is not None and ready.options.compensate:
        made = _fit(graph, groups, keep, made, ready.samples, ready.options, clock)
        accuracy |= _scores_of(ready, "after", made.small, clock)
    report = _report(graph, groups, plan, replace(made, accuracy=accuracy), clock, ready, found)
    given = (ready.samples, ready.evaluate) if ready is not None else ()
    deployed = (ready.options if ready is not None else Options()).deployed()
    return Result(made.small, plan, report, graph, made.surgery.module, clock, deployed, found, *given)


def _cut(model: nn.Module, graph: Graph, groups: Groups, plan: Plan, keep: Keep, clock: Clock) -> _Made:
    """The model without what the plan removes, with the weights that it had, and the proof of it."""
    with freed_or_kept(graph.module.state_dict().values(), groups.macs()):
        with clock("surgery"):
            surgery = operate(graph, groups.types, keep, plan.tensors)
        with buffers_kept(surgery.module):
            with clock("verify"):
                verification = compare(graph, groups.types, keep, surgery.module, exact={s.name: s.exact for s in surgery.stand_ins})
            with clock("rebuild"):
                own, note, changed = own_class(model, graph, surgery, changed_scales(graph, groups.types, keep), verification.answers)
            with clock("verify"):
                if own is None and not came_as_graph(model, graph):  # a class that agrees with the graph needs no other proof
                    with state_kept(model):
                        verify_trace(model, graph)
                forgotten = changed if changed and not answers_again(model, graph) else []
    _follow(own, surgery.module)
    return _Made(surgery, verification, own, note, forgotten)


def _fit(graph: Graph, groups: Groups, keep: Keep, made: _Made, samples: Samples, options: Options, clock: Clock) -> _Made:
    """The same with its weights fitted to the samples, in place."""
    surgery, matched = made.surgery, None
    with clock("compensate"):
        turned = turns(measured_logits(graph, groups.types, samples), keep)
        fitted = compensated(graph, groups.types, keep, surgery, samples, clock.say, turned)
    if options.matching:
        with clock("match"), buffers_kept(graph.module), buffers_kept(surgery.module):
            matched = match(graph, groups.types, keep, surgery, samples, options.matching, options.seed, clock.say, turned)
    _follow(made.own, surgery.module)
    return replace(made, fitted=fitted, matched=matched)


def _follow(own: nn.Module | None, module: nn.Module) -> None:
    """The user's class shares the graph's tensors, except for buffers that the graph copied: these get its values."""
    if own is not None:
        take_values(own, module.state_dict())


def _scores_of(ready: _Ready | None, stage: str, model: nn.Module, clock: Clock) -> dict[str, float]:
    """What the user's evaluation says of a model; of the original and this one, where it is the first that is asked."""
    if ready is None or ready.evaluate is None or ready.accuracy is None:
        return {}
    with clock("evaluate"):
        score = ready.evaluate(model)
    return {"after": score} if stage == "after" else {"before": ready.accuracy, stage: score, "after": score}


def _decided(ready: _Ready | None, groups: Groups, widths: Mapping[Atom, int]) -> dict[str, Any]:
    """What the plan was decided by, for the report; a criterion of the user's own by its name."""
    if ready is None:
        return {"seed": 0, "options": None, "calibration": None, "importance_kept": None, "predicted_loss": None}
    samples, saliency = ready.samples, ready.saliency
    options = asdict(replace(ready.options, criterion=str(saliency.criterion)))
    return {
        "seed": ready.options.seed,
        "options": {name: value for name, value in options.items() if value not in (None, ())},
        "calibration": {"samples": len(samples), "labels": samples.labels is not None, "synthetic": samples.made} if samples else None,
        "importance_kept": decide.importance_kept(groups, widths, saliency.scores),
        "predicted_loss": decide.predicted_loss(groups, widths, saliency.losses) if saliency.losses is not None else None,
    }


def _gone(surgery: Surgery) -> list[str]:
    """In words, what is left out as a whole."""
    if not surgery.gone:
        return []
    return [f"{', '.join(sorted(surgery.gone))}: without channels, and gone from the model; a constant stands in for the answer where it is needed"]


def _forgotten(attributes: Sequence[str]) -> list[str]:
    """In words, what no trace takes over from one call to the next."""
    if not attributes:
        return []
    kept = ", ".join(attributes[:3]) + (", ..." if len(attributes) > 3 else "")
    return [f"the model's code keeps {kept} for its next call, which answers otherwise: the traced module and the files answer each as the first"]


def _peak(alive: Sequence[Cost], widths: Mapping[Atom, int]) -> dict[str, float]:
    """The largest of what is alive at one time, before and after."""
    return {"before": max((c() for c in alive), default=0), "after": max((c(widths) for c in alive), default=0)}


def _report(graph: Graph, groups: Groups, plan: Plan, made: _Made, clock: Clock, ready: _Ready | None, found: Found | None) -> Report:
    widths = {g.atom: len(p.keep) for g, p in zip(groups, plan.groups, strict=True)}
    return Report(
        {
            "format": "structprune-report/1",
            "model": "",
            "target": plan.target,
            "criterion": plan.criterion,
            **_decided(ready, groups, widths),
            "params": {"before": groups.params(), "after": sum(p.numel() for p in made.surgery.module.parameters())},
            "macs": {"before": groups.macs(), "after": groups.macs(widths)},
            "activation_bytes": _peak(memory(graph, groups), widths),
            "onnx_bytes": None,
            "latency_ms": {},
            "latency_target": found.to_dict() if found is not None else None,
            "accuracy": dict(made.accuracy) or None,
            "compensation": [asdict(f) for f in made.fitted] if made.fitted is not None else None,
            "matching": asdict(made.matched) if made.matched is not None else None,
            "verification": _verified(graph, plan, made),
            "groups": list(map(_group, plan.groups)),
            "frozen": [{"name": f.name, "channels": f.channels, "reason": f.reason, "at": f.at} for f in plan.frozen],
            "outline": outline(graph, groups),
            "notes": [*graph.notes, *_gone(made.surgery), *_forgotten(made.forgotten)],
            "seconds": dict(clock.seconds),
            "environment": environment(),
        }
    )


def _verified(graph: Graph, plan: Plan, made: _Made) -> dict[str, Any]:
    """What was proved, and of what; for the report."""
    narrowed = [g for g in plan.groups if len(g.keep) < g.channels]
    return {
        "masked_error": made.verification.error,
        "tolerance": made.verification.tolerance,
        "onnx_error": None,
        "exact": all(g.exact for g in narrowed),
        "inexact": [{"name": g.name, "reason": g.reason} for g in narrowed if not g.exact],
        "module": "the user's own class" if made.own is not None else "traced graph",
        "module_note": made.note,
        "dynamic_batch": graph.dynamic_batch,
        "dynamic_axes": {name: list(axes) for name, axes in zip(graph.input_names, graph.dynamic, strict=True)},
    }


def _group(group: PlannedGroup) -> dict[str, Any]:
    """What a group was and is; for the report."""
    return {
        "name": group.name,
        "channels": group.channels,
        "kept": len(group.keep),
        "exact": group.exact,
        "reason": group.reason,
        "members": [f"{m.tensor}[{m.dim}]" for m in group.members],
    }
