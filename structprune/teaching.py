"""Recovery: a `Result`, or the model of an output directory, trained for a short while with the dense model as its teacher."""

from __future__ import annotations

import copy
import inspect
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from structprune import processes
from structprune.analysis.groups import find_groups
from structprune.backends import directory as out
from structprune.backends import onnx
from structprune.backends.benchmark import place_of
from structprune.backends.report import Report
from structprune.backends.runtimes import runtime
from structprune.decide import atoms_of, example_inputs
from structprune.errors import InputError, StructpruneError
from structprune.frontends.program import load_graph
from structprune.frontends.trace import trace
from structprune.frontends.users_code import named_object, users_code
from structprune.ir.graph import memo_for
from structprune.ir.plan import Plan
from structprune.ir.traced import TracedModule
from structprune.recovery.finetune import AUTO, Flat, Recipe, Train, Trained, answers_of, finetune, teacher_of
from structprune.recovery.hints import dense_teacher
from structprune.result import Clock, Evaluate, Progress, Result
from structprune.transform.own_class import take_values
from structprune.transform.surgery import operate

_log = logging.getLogger(__name__)


@torch.inference_mode(False)
@torch.enable_grad()
def recover(
    result: Result,
    train: Train,
    *,
    epochs: int = 1,
    lr: float | None = None,
    teacher: Callable[..., Any] | None = None,
    distill: Sequence[str] = ("logits",),
    labels: bool | str = "auto",
    features: Sequence[str] | str = AUTO,
    ema: float | None = 0.999,
    evaluate: Evaluate | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Train the small model of `result`, with the dense one as its teacher. Returns another result; that and the dense model stay as they are.

    train: batches of the model's inputs, or of (inputs, labels), that can be gone through once for every epoch: a list, a DataLoader, or a
        function of the epoch (from 0) that returns them; or one tensor of many samples.
    epochs: at most so many.
    lr: the highest learning rate: by default 0.02 for SGD, which trains networks with batch norm and without attention or layer norm, and 3e-4 for
        AdamW, which trains all others.
    teacher: a module or function that is called as the model is, in the place of the dense model.
    distill: what of its answers is learnt: 'logits' (distributions over classes), 'dist' (correlations of these), 'mse' (the answers themselves,
        which the others fall back to where answers look like no logits).
    labels: 'auto' learns from labels where batches have them, True demands them, False learns from the teacher alone.
    features: what is learnt inside the model, of the channels that stay: names of modules, for their answers, or 'auto' for what the dense model's
        layers read, unless distill is empty. A teacher of your own has no features but those of modules that keep their widths.
    ema: the share of the running mean of the weights that stays at each step; the mean is what comes out. None for the weights of the last step.
    evaluate: model -> a score, higher is better; asked before and after every epoch, for the report.
    patience: end when so many epochs brought no better score, and return the best weights, were they those before training.
    checkpoint: a file that says, every minute and after every epoch, where the run stands. If it is there at the start, the run goes on from it.
    seed: of the order of samples, of dropout, and of whatever `train` draws from the global generators, which are put back in the end.
    device: 'cpu', 'cuda' or 'cuda:N'. Under torchrun every process takes its share of each batch.

    docs/recovery.md tells of the losses and defaults. Raises InputError for anything that cannot be used.
    """
    if features == AUTO and not distill:
        features = ()
    recipe = Recipe(epochs, lr, tuple(distill), labels, features if isinstance(features, str) else tuple(features), ema, patience, seed)
    if patience is not None and evaluate is None:
        raise InputError("patience= needs evaluate=, a function of the model that returns a score, to know when to end")
    place = place_of(processes.local_device(device))
    clock = Clock(progress)
    clock.seconds = dict(result.clock.seconds)
    say = clock.say if processes.rank() == 0 else lambda line: None
    model, small = copy.deepcopy((result.model, result.small), memo_for(result.model))

    def score(state: Mapping[str, Tensor]) -> float:
        take_values(model, state)
        with users_code("evaluate="):
            assert evaluate is not None
            model.eval()
            return float(evaluate(model))

    path = Path(checkpoint) if checkpoint is not None else None
    with clock("recover"), processes.joined(place):
        student = copy.deepcopy(small)
        taught, inside = _teacher(result, teacher, student, recipe.features, place)
        trained = finetune(
            student,
            taught,
            train,
            result.graph,
            recipe,
            device=place,
            inside=inside,
            score=score if evaluate is not None else None,
            path=path,
            progress=say,
        )
        record = _record(trained, recipe, teacher, place)
    for module in {small, model}:  # they share tensors, except for buffers of the user's class that the graph copied
        take_values(module, trained.state)
        module.eval()
    report = result.report.to_dict() | {"recovery": record, "seconds": dict(clock.seconds)}
    report["accuracy"] = _accuracy(report, record)
    return Result(model, result.plan, Report(report), result.graph, small, clock, result.runtime, result.found)  # type: ignore[arg-type]


def recover_directory(
    directory: str | Path, train: str, target: str | Path, *, teacher: nn.Module | None = None, progress: Progress | None = None, **options: Any
) -> Report:
    """`recover` for the model of an output directory, written to another one (or the same), all files or none; returns the full report.

    train: 'module:function', which returns batches, or is a function of the epoch that does. teacher: by default the directory's original.onnx in
    ONNX Runtime, which has no features; the model that was pruned has. options: as of `recover`. Raises as it does, and VerificationError where
    ONNX Runtime disagrees with the new model.
    """
    source, target = Path(directory), Path(target)
    out.check_writable(target)
    result = _result_of(source, Clock(progress))
    pruned = _beside(teacher, result, source / "original.onnx") if teacher is not None else None
    dense = None if pruned is not None else teacher if teacher is not None else _in_onnxruntime(source / "original.onnx")
    recovered = recover(pruned or result, _train(train), teacher=dense, progress=progress, **options)
    report = recovered.report.to_dict()
    report["recovery"]["teacher"] = type(teacher).__name__ if teacher is not None else "original.onnx"
    if processes.rank() != 0:  # the first process writes
        return Report(report)
    with out.all_or_none(target) as work:
        report["verification"]["onnx_error"] = recovered.write_model(work)
        shutil.copyfile(source / "plan.json", work / "plan.json")
        onnx.copy_file(source / "original.onnx", work / "original.onnx")
        report["onnx_bytes"] = {"before": onnx.size(work / "original.onnx"), "after": onnx.size(work / "model.onnx")}
        report["seconds"] = dict(recovered.clock.seconds)
        full = Report(report)
        full.save_json(work / "report.json")
        full.save_html(work / "report.html")
    return full


def _teacher(
    result: Result, given: Callable[..., Any] | None, student: TracedModule, features: Sequence[str] | str, place: torch.device
) -> tuple[Flat, dict[str, fx.Node]]:
    """The teacher, and by name the student's nodes that its features are for."""
    if given is not None:
        names = [] if features == AUTO else features
        return teacher_of(given, result.graph, names), dict(zip(names, answers_of(student, names), strict=True))
    groups = find_groups(result.graph, result.plan.ignore)
    return dense_teacher(result.graph, groups.types, atoms_of(result.plan, groups), student, features, place)


def _record(trained: Trained, recipe: Recipe, teacher: Any, place: torch.device) -> dict[str, Any]:
    """For the report: plain JSON."""
    return {
        **trained.record,
        "distill": list(recipe.distill),
        "features": recipe.features if recipe.features == AUTO else list(recipe.features),
        "labels": any("labels" in epoch["losses"] for epoch in trained.record["epochs"]),
        "teacher": type(teacher).__name__ if isinstance(teacher, nn.Module) else "the dense model" if teacher is None else "a function",
        "ema": recipe.ema,
        "seed": recipe.seed,
        "device": str(place),
        "processes": processes.count(),
    }


def _accuracy(report: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, float] | None:
    """The report's scores of earlier stages, and the new one as 'after'; without a new one, none is after."""
    scores = {stage: score for stage, score in (report.get("accuracy") or {}).items() if stage != "after"}
    if "evaluation" in record:
        scores.setdefault("pruned" if report.get("compensation") is None else "compensated", record["evaluation"]["before"])
        scores["after"] = record["evaluation"]["after"]
    return scores or None


def _result_of(directory: Path, clock: Clock) -> Result:
    """The model of an output directory as a `Result`, whose graph is the small model's own: of the dense one there is only the ONNX file.

    Raises InputError for what is no output directory.
    """
    for name in out.FILES:
        if not (directory / name).is_file():
            raise InputError(f"{directory}: {name} is missing; give an output directory that `structprune compress` wrote")
    graph, report = load_graph(directory / "model.pt2"), Report.load(directory / "report.json")
    small = out.load(directory)
    clock.seconds = dict(report.data.get("seconds") or {})
    return Result(small, Plan.load(directory / "plan.json"), report, graph, small, clock, runtime("onnxruntime", "cpu", None))


def _beside(dense: nn.Module, result: Result, original: Path) -> Result | None:
    """The model of an output directory as what `compress` made of `dense`; None where that is another model, or answers otherwise than `original`:
    channels of a model with other weights stand for other things.
    """
    args, kwargs = example_inputs(result.plan.inputs)
    lengths = {name: axes for name, axes in zip(result.graph.input_names, result.graph.dynamic, strict=True) if axes}
    try:
        graph = trace(dense, args, kwargs, dynamic=lengths)
        onnx.check(original, graph.module, *graph.example())
        groups = find_groups(graph, result.plan.ignore)
        surgery = operate(graph, groups.types, atoms_of(result.plan, groups), result.plan.tensors)
    except StructpruneError:
        _log.debug("the teacher is not the model that was pruned", exc_info=True)
        return None
    values, small = result.small.state_dict(), surgery.module
    if graph.dynamic != result.graph.dynamic or {n: t.shape for n, t in values.items()} != {n: t.shape for n, t in small.state_dict().items()}:
        return None
    with torch.no_grad():
        take_values(small, values)
    return replace(result, model=small, graph=graph, small=small)


def _train(spec: str) -> Train:
    """What `module:function` stands for: a function that can be called without arguments is."""
    form = "package.module:function; --train names a function that returns batches"
    found = named_object(spec, form, "a function that returns batches, or takes the epoch and returns its batches")
    if not callable(found) or hasattr(found, "__len__"):
        return found  # type: ignore[no-any-return]
    try:
        needed = [p for p in inspect.signature(found).parameters.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    except ValueError:  # written in C
        needed = []
    with users_code(f"--train {spec}"):
        return found if needed else found()  # type: ignore[no-any-return]


def _in_onnxruntime(path: Path) -> Callable[..., list[Tensor]]:
    """original.onnx, as a function that is called as the model is."""
    run = onnx.runner(path)
    return lambda *args, **kwargs: [torch.from_numpy(answer) for answer in run(pytree.tree_leaves((args, kwargs)))]
