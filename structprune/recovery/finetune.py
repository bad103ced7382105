"""Short fine-tuning of a small model, with the dense one as its teacher.

One step: the teacher answers a batch, the small model answers it, the losses of `distil.py` compare them, and an optimiser follows the gradient. A
running mean of the weights is what comes out of it. Nothing depends on what came before but the weights, the optimiser and two counters: the learning
rate is a function of the step, and whatever is random is seeded by epoch and step. So a run that was killed goes on from its checkpoint and ends with
the weights, to the last bit, that it would have had.

What trains is the traced graph: it is what is deployed, it has no branches that only training takes, and its inputs and answers are plain lists.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from structprune import processes
from structprune.errors import InputError
from structprune.frontends.devices import tensor_on_cpu
from structprune.frontends.samples import batch_of, batch_size
from structprune.frontends.users_code import users_code
from structprune.ir.graph import Graph, digest, owners_of
from structprune.ir.operators import operator_name
from structprune.ir.samples import copies
from structprune.ir.traced import TracedModule, in_mode
from structprune.recovery import distributed
from structprune.recovery.checkpoint import Checkpoint
from structprune.recovery.distil import DISTILL, losses
from structprune.recovery.statistics import BATCHES, follows_batches, has_norms, measure

Train: TypeAlias = Iterable[Any] | Tensor | Callable[[int], Iterable[Any]]
Flat: TypeAlias = Callable[..., tuple[Sequence[Any], Sequence[Tensor]]]
"""A model as a function of its inputs one by one: all its answers, and the features that are asked for."""

_SGD, _ADAMW = ("sgd", 0.02), ("adamw", 3e-4)  # the optimiser and its highest learning rate
_OF_TRANSFORMERS = {"layer_norm", "rms_norm", "scaled_dot_product_attention"}
_MOMENTUM = 0.9
_WEIGHT_DECAY = {"sgd": 1e-4, "adamw": 0.01}  # of tensors with more than one axis; scales, shifts and biases have one
_WARM_UP = 0.05  # of all steps
_LARGEST_GRADIENT = 5.0  # its norm; a longer one is cut to this
_OF_FEATURES = 4.0  # times what they lose: better than 1 and 16 for ResNet-20 at macs=0.3, on images held out of training
AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """How to train; see `structprune.recover`."""

    epochs: int = 1
    lr: float | None = None
    distill: tuple[str, ...] = ("logits",)
    labels: bool | str = AUTO
    features: tuple[str, ...] | str = AUTO
    ema: float | None = 0.999
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for what no training can do."""
        unknown = [kind for kind in self.distill if kind not in DISTILL]
        if unknown:
            raise InputError(f"distill= knows no {unknown[0]!r}; use some of {', '.join(DISTILL)}")
        if self.epochs < 1 or (self.patience is not None and self.patience < 1):
            raise InputError(f"epochs= and patience= start at 1, not {self.epochs if self.epochs < 1 else self.patience}")
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"lr= must be above 0, not {self.lr}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema= is the share of the running mean that stays at each step, between 0 and 1, or None; not {self.ema}")
        if isinstance(self.features, str) and self.features != AUTO:
            raise InputError(f"features= is a list of names of modules, or {AUTO!r}, not {self.features!r}")
        if self.labels not in (True, False, AUTO):
            raise InputError(f"labels= is True, False or 'auto', not {self.labels!r}")


@dataclass(frozen=True)
class Trained:
    """`state`: the weights and buffers by name, on the CPU; `record`: what happened, as plain JSON."""

    state: Mapping[str, Tensor]
    record: Mapping[str, Any]


@dataclass
class _Run:
    """What changes while it trains: all that a checkpoint holds."""

    student: TracedModule
    mean: TracedModule  # whose weights are the running mean of the student's
    optimiser: torch.optim.Optimizer
    step: int = 0
    batch: int = 0  # of this epoch
    sums: dict[str, float] = field(default_factory=dict)  # of each loss, over this epoch
    epochs: list[dict[str, Any]] = field(default_factory=list)  # those that are over
    scores: list[float] = field(default_factory=list)  # before the first epoch, and after each
    best: dict[str, Tensor] = field(default_factory=dict)  # the weights of the highest score

    def to_dict(self) -> dict[str, Any]:
        held = {name: getattr(self, name).state_dict() for name in self._STATEFUL}
        return held | {name: getattr(self, name) for name in self._PLAIN}

    def restore(self, saved: Mapping[str, Any]) -> None:
        for name in self._STATEFUL:
            getattr(self, name).load_state_dict(saved[name])
        for name in self._PLAIN:
            setattr(self, name, saved[name])

    _STATEFUL = ("student", "mean", "optimiser")
    _PLAIN = ("step", "batch", "sums", "epochs", "scores", "best")


def finetune(
    student: TracedModule,
    teacher: Flat,
    train: Train,
    graph: Graph,
    recipe: Recipe,
    *,
    device: torch.device,
    inside: Mapping[str, fx.Node] = MappingProxyType({}),
    score: Callable[[Mapping[str, Tensor]], float] | None = None,
    path: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train `student`, which is changed, on `device`. The user's own random state stays as it is.

    graph: says what a batch is. inside: nodes of the student's graph that the teacher's features are for, by name, in their order.
    score: weights -> higher is better, asked before and after every epoch. path: of the checkpoint.
    Raises InputError for a batch, a teacher or a checkpoint that does not fit, and for a loss that is not finite.
    """
    if processes.count() > 1 and not graph.dynamic_batch:
        raise InputError("the model takes batches of one size only, which processes cannot share; train in one process, without torchrun")
    mean = follows_batches(copy.deepcopy(flat(student)).to(device))
    student = flat(student, list(inside.values())).to(device).train()  # type: ignore[assignment]
    student = distributed.with_shared_statistics(student)
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("no parameter of the small model requires gradients, so nothing can train; call model.requires_grad_() before compressing")
    name, lr = _optimiser(student, recipe)
    for module in (student, mean):
        processes.equalise(module.state_dict().values())
    run = _Run(student, distributed.with_shared_statistics(mean), _make(name, lr, parameters))
    with _randomness_kept(device):
        batches = _count(train, graph, recipe.seed)
        task = {**asdict(recipe), "optimiser": name, "lr": lr, "batches": batches, "weights": digest(student)}
        keeper = Checkpoint(path if processes.rank() == 0 else None, task)
        saved = processes.from_first(keeper.read())
        if saved is not None:
            run.restore(saved)
            progress(f"go on after step {run.step} of {batches * recipe.epochs}")
        if score is not None and not run.scores:
            _rate(run, score, progress)
        while len(run.epochs) < recipe.epochs and not _is_over(run, recipe.patience):
            for inputs, labels in _batches(train, graph, recipe, len(run.epochs), device, skip=run.batch):
                for group in run.optimiser.param_groups:
                    group["lr"] = lr * schedule(run.step, batches * recipe.epochs)
                _advance(run, _step(run, teacher, inputs, labels, graph, recipe, inside, parameters), recipe.ema)
                if keeper.is_due():
                    keeper.write(run.to_dict())
            _end_epoch(run, recipe, progress)
            if has_norms(mean):
                samples = itertools.islice(_batches(train, graph, recipe, len(run.epochs) - 1, device), BATCHES)
                measure(mean, (distributed.share_of(inputs)[0] for inputs, _ in samples))
            if score is not None:
                _rate(run, score, progress)
            keeper.write(run.to_dict())
    state = run.best if recipe.patience is not None else mean.state_dict()
    return Trained({n: t.detach().cpu().clone() for n, t in state.items()}, _record(run, recipe, name, lr))


def flat(module: fx.GraphModule, features: Sequence[fx.Node] = ()) -> TracedModule:
    """The module as a function of its inputs one by one, which answers (all its answers, features). Tensors are shared, the graph is a copy.

    features: nodes of the module's graph.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    answers = graph.graph_copy(module.graph, copied)
    graph.output((tuple(pytree.tree_leaves(answers)), tuple(copied[node] for node in features)))
    return TracedModule(module, graph)


def answers_of(module: fx.GraphModule, names: Sequence[str]) -> list[fx.Node]:
    """Of each of the named modules, the last tensor that its forward made. Raises InputError for a module that made none."""
    made = [n for n in module.graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_floating_point()]
    found = []
    for name in names:
        nodes = [node for node in made if node.op != "output" and name in owners_of(node)]
        if not nodes:
            raise InputError(f"features= names {name!r}, which is no module that the model's forward calls; `print(model)` lists the modules")
        found.append(nodes[-1])
    return found


def teacher_of(model: Callable[..., Any], graph: Graph, features: Sequence[str] = ()) -> Flat:
    """A teacher of the user's own, called as `graph` is. Raises InputError for features of what is no module, or has no module of such a name."""
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    missing = next((name for name in features if name not in modules), None)
    if missing is not None:
        raise InputError(f"teacher= has no module {missing!r} to take features of; leave out features=, or the teacher")

    def answer(*inputs: Any) -> tuple[Sequence[Any], Sequence[Tensor]]:
        args, kwargs = graph.called_with(inputs)
        seen: dict[str, Tensor] = {}
        hooks = [modules[name].register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output})) for name in features]
        try:
            with users_code("teacher="), in_mode(model, training=False) if isinstance(model, nn.Module) else nullcontext():
                answers = pytree.tree_leaves(model(*args, **kwargs))
        finally:
            for hook in hooks:
                hook.remove()
        return answers, [seen[name] for name in features]

    return answer


def schedule(step: int, steps: int) -> float:
    """The share of the highest learning rate: up in a straight line over the first steps, then down to 0 along half a cosine.

    (Loshchilov and Hutter, SGDR, arXiv:1608.03983, equation 5, without restarts.)
    """
    up = max(1, round(_WARM_UP * steps))
    if step < up:
        return (step + 1) / (up + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - up) / max(1, steps - up))))


def decay(step: int, most: float) -> float:
    """How much of the running mean stays at a step, counted from 1: little at first, since the mean begins with the weights before training."""
    return min(most, step / (step + 9))


# One step -------------------------------------------------------------------------------------------------------------


def _step(
    run: _Run,
    teacher: Flat,
    inputs: list[Any],
    labels: Tensor | None,
    graph: Graph,
    recipe: Recipe,
    inside: Iterable[str],
    parameters: Sequence[nn.Parameter],
) -> dict[str, float]:
    """Follow the gradient of one batch; returns the losses before it."""
    mine, sizes = distributed.share_of(inputs)
    device = parameters[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_seed_of(recipe.seed, run.step, processes.rank() + 1))  # what is dropped does not depend on how often it was drawn before
        with torch.no_grad():
            targets, wanted = teacher(*copies(mine))
        answers, features = run.student(*mine)
        terms = losses(
            *_paired(answers, targets, graph, sizes),
            distill=recipe.distill,
            labels=labels,
            features=_matched(inside, features, wanted, sizes),
        )
        if not terms:
            raise InputError("there is nothing to learn from: no labels, and no distill= or features=; give one of them")
        loss = sum((_OF_FEATURES * term if name == "features" else term for name, term in terms.items()), torch.zeros((), device=device))
        if not loss.isfinite():
            raise InputError(f"the loss is not finite at step {run.step + 1}; give a smaller lr= than {run.optimiser.param_groups[0]['lr']:.2g}")
        run.optimiser.zero_grad()
        loss.backward()
        distributed.sum_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
        run.optimiser.step()
    return {name: term.item() for name, term in terms.items()}


def _paired(answers: Sequence[Any], targets: Sequence[Any], graph: Graph, sizes: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The floating-point answers of all processes, the teacher's, and their names. Raises InputError where the two do not match."""
    mine = [(a, name) for a, name in zip(answers, graph.output_names, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
    theirs = [t for t in targets if isinstance(t, Tensor) and t.is_floating_point()]
    if [a.shape for a, _ in mine] != [t.shape for t in theirs]:
        shapes = [", ".join("x".join(map(str, t.shape)) for t in tensors) for tensors in (theirs, [a for a, _ in mine])]
        raise InputError(f"the teacher answers with {shapes[0]}, the small model with {shapes[1]}; give the model that was pruned as teacher=")
    return (
        [distributed.gathered(a, sizes) for a, _ in mine],
        [distributed.gathered(t.to(a.device), sizes) for t, (a, _) in zip(theirs, mine, strict=True)],
        [name for _, name in mine],
    )


def _matched(names: Iterable[str], mine: Sequence[Tensor], theirs: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Features of all processes in pairs. Raises InputError for those that pruning made narrower."""
    for name, a, b in zip(names, mine, theirs, strict=True):
        if a.shape != b.shape:
            wide, narrow = ("x".join(map(str, t.shape)) for t in (b, a))
            raise InputError(f"features= {name!r} is {wide} in the teacher and {narrow} in the small model; name modules that keep their width")
    return [(distributed.gathered(a, sizes), distributed.gathered(b.to(a.device), sizes)) for a, b in zip(mine, theirs, strict=True)]


def _advance(run: _Run, terms: Mapping[str, float], ema: float | None) -> None:
    """Count the step, and let the running mean follow."""
    run.step += 1
    run.batch += 1
    for name, value in terms.items():
        run.sums[name] = run.sums.get(name, 0.0) + value
    means = run.mean.state_dict()
    for name, value in run.student.state_dict().items():
        if ema is not None and value.is_floating_point():
            means[name].lerp_(value, 1 - decay(run.step, ema))
        else:
            means[name].copy_(value)


def _end_epoch(run: _Run, recipe: Recipe, progress: Callable[[str], None]) -> None:
    number = len(run.epochs) + 1
    if not run.batch:
        raise InputError(f"train= holds no batch in epoch {number}; give a list, a DataLoader, or a function of the epoch")
    means = {term: total / run.batch for term, total in run.sums.items()}
    run.epochs.append({"epoch": number, "batches": run.batch, "losses": means})
    run.sums, run.batch = {}, 0
    progress(f"epoch {number} of {recipe.epochs}: " + ", ".join(f"{term} {mean:.4g}" for term, mean in means.items()))


# What comes out -------------------------------------------------------------------------------------------------------


def _rate(run: _Run, score: Callable[[Mapping[str, Tensor]], float], progress: Callable[[str], None]) -> None:
    """Ask for the score of the weights as they would come out now, on the first process alone, and keep the best."""
    state = run.mean.state_dict()
    found = processes.from_first(score(state) if processes.rank() == 0 else None)
    if not run.scores or found > max(run.scores):
        run.best = {name: value.clone() for name, value in state.items()}
    run.scores.append(found)
    progress(f"evaluation {found:.4g}")


def _record(run: _Run, recipe: Recipe, optimiser: str, lr: float) -> dict[str, Any]:
    record = {"epochs": run.epochs, "steps": run.step, "optimiser": optimiser, "lr": lr}
    if run.scores:
        kept = _best(run.scores) if recipe.patience is not None else len(run.epochs)
        record["evaluation"] = {"before": run.scores[0], "after": run.scores[kept], "epochs": run.scores[1:], "kept_epoch": kept}
    return record


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _is_over(run: _Run, patience: int | None) -> bool:
    """Whether the last epochs, as many as `patience`, were no better than one before them."""
    return patience is not None and len(run.epochs) - _best(run.scores) >= patience


# The optimiser --------------------------------------------------------------------------------------------------------


def _optimiser(student: TracedModule, recipe: Recipe) -> tuple[str, float]:
    """SGD for convolutional networks with batch norms, whose scale of weights hardly matters; AdamW for all others, hybrids too."""
    found = {operator_name(n) for n in student.graph.nodes}
    name, lr = _SGD if "batch_norm" in found and not found & _OF_TRANSFORMERS else _ADAMW
    return name, lr if recipe.lr is None else recipe.lr


def _make(name: str, lr: float, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": _WEIGHT_DECAY[name]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr, momentum=_MOMENTUM, nesterov=True) if name == "sgd" else torch.optim.AdamW(groups, lr)


# Batches --------------------------------------------------------------------------------------------------------------


def _batches(
    train: Train, graph: Graph, recipe: Recipe, epoch: int, device: torch.device, skip: int = 0
) -> Iterator[tuple[list[Any], Tensor | None]]:
    """An epoch's batches on the device, but for the first ones, with labels where they are wanted."""
    _seed(_seed_of(recipe.seed, epoch))
    for number, piece in enumerate(_pieces(train, graph, epoch)):
        if number < skip:
            continue
        inputs, labels = batch_of(piece, graph, f"batch {number} of epoch {epoch + 1}")
        if labels is None and recipe.labels is True:
            raise InputError(f"batch {number} of epoch {epoch + 1} has no labels; give (inputs, labels), or labels=False")
        wanted = tensor_on_cpu(labels).to(device) if labels is not None and recipe.labels is not False else None
        yield [v.to(device, copy=True) if isinstance(v, Tensor) else v for v in inputs], wanted  # a model may write to its inputs


def _pieces(train: Train, graph: Graph, epoch: int) -> Iterator[Any]:
    """What the user gives for an epoch, one by one; of one tensor of many samples, batches in a new order."""
    if isinstance(train, Tensor):
        size = batch_size(graph)
        shuffled = train[torch.randperm(len(train))].split(size)
        yield from shuffled if graph.dynamic_batch else [piece for piece in shuffled if len(piece) == size]
        return
    end = object()
    with users_code("train="):
        pieces = iter(train(epoch) if callable(train) else train)
    while True:
        with users_code("train="):
            piece = next(pieces, end)
        if piece is end:
            return
        yield piece


def _count(train: Train, graph: Graph, seed: int) -> int:
    """Batches of the first epoch, which the learning rate is planned by: what has no length is gone through once.

    Raises InputError for what can be gone through only once, or holds nothing.
    """
    if isinstance(train, Iterator):
        raise InputError("train= is an iterator, which is used up after one epoch; give a list, a DataLoader, or a function of the epoch")
    if not isinstance(train, Tensor) and not callable(train) and not isinstance(train, Iterable):
        raise InputError(f"train= is a {type(train).__name__}; give batches, a tensor of many samples, or a function of the epoch")
    if isinstance(train, Sized) and not isinstance(train, Tensor):
        count = len(train)
    else:
        _seed(_seed_of(seed, 0))
        count = sum(1 for _ in _pieces(train, graph, 0))
    if not count:
        raise InputError("train= holds no batch; give an iterable of batches, or one tensor of many samples")
    return count


# Randomness -----------------------------------------------------------------------------------------------------------


@contextmanager
def _randomness_kept(device: torch.device) -> Iterator[None]:
    """Put the random states that a data pipeline may draw from back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(seed: int) -> None:
    """For whatever the user's batches draw from; the GPU's generators are the model's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def _seed_of(*numbers: int) -> int:
    """A number of 32 bits that looks unrelated for every list of numbers."""
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1)[0])
