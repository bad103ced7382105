"""The small model as an instance of the user's own class, where it still runs right.

A copy of the user's module gets the small tensors, and the integers among its attributes that the graph shows to be
sizes (a head count in a reshape, the groups of a convolution) follow. Nothing of this is assumed to work: the copy is compared
with the small graph, and is dropped unless it answers the same.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from structprune.errors import VerificationError, one_line
from structprune.frontends.standardised import with_plain_layers
from structprune.ir.graph import Graph, attribute, held_by, memo_for, owners_of, repeated, shape_of
from structprune.ir.samples import copies, floats, samples_in
from structprune.ir.traced import buffers_kept, state_kept
from structprune.transform.attributes import Attributes, follow, guesses
from structprune.transform.checks import failed_check
from structprune.transform.reference import Exact, in_double
from structprune.transform.scale import Held, Scale, hold_scales, narrowed
from structprune.transform.surgery import Surgery
from structprune.transform.verify import difference, positions, same_noise

_log = logging.getLogger(__name__)

_TOLERANCE = 1e-8  # of the answer; a constant that the class computes from the width that is left may change it by as little as 1e-7
_SINGLE = 1e-3  # of the answer: what float32 may lose in a deep network


def came_as_graph(model: nn.Module, graph: Graph) -> bool:
    """Whether the model has no class of the user's: a program or an ONNX file, which is what was traced."""
    return isinstance(model, fx.GraphModule) or graph.signature is not None


class Gone(nn.Module):
    """What stands for a module whose answer nobody needs: it hands on what it is given, so that what comes behind has something of the right size.

    steps: of each axis, how far apart the positions are that the module kept.
    """

    def __init__(self, steps: Sequence[int] = ()):
        super().__init__()
        self.steps = tuple(steps)

    def forward(self, x: Any = None, *_: Any, **__: Any) -> Any:
        return self.fewer(x).clone() if isinstance(x, Tensor) else x  # memory of its own, for code may write to it in place

    def fewer(self, x: Tensor) -> Tensor:
        return x[tuple(slice(None, None, step) for step in self.steps)] if x.dim() == len(self.steps) else x


class Constant(Gone):
    """What stands for a module whose answer no longer depends on anything: `constant`, at every position that the module kept."""

    def __init__(self, constant: nn.Parameter, steps: Sequence[int] = ()):
        super().__init__(steps)
        self.constant = constant

    def forward(self, x: Any = None, *_: Any, **__: Any) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() != self.constant.dim():
            return self.constant
        positions = [theirs if own == 1 else own for theirs, own in zip(self.fewer(x).shape, self.constant.shape, strict=True)]
        return self.constant.expand(positions).clone()


def rebuild(model: nn.Module, tensors: Mapping[int, Tensor], attributes: Attributes, instead: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """A copy of `model`, in evaluation mode, that holds `tensors` (by the identity of the original ones) and the given attributes.

    instead: what stands in the place of some of its modules.

    What is replaced is never copied: the copy costs the memory of the small model.
    """
    small = copy.deepcopy(model, memo_for(model) | dict(tensors))
    for name, values in attributes.items():
        follow(small.get_submodule(name), model.get_submodule(name), values)
    for name, module in (instead or {}).items():
        small.set_submodule(name, module)
    small.eval()  # for itself: a class that freezes some of its layers has a train() that need not return the module
    return small


@torch.no_grad()
def take_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the tensors of a module the values of those names; others stay.

    Not by its load_state_dict, where a class may do what it likes: torchvision's MNASNet takes weights without a version for old ones, and rebuilds
    its first layers.
    """
    for name, tensor in held_by(module).items():
        if name in values and values[name].data_ptr() != tensor.data_ptr():
            tensor.copy_(values[name])


def own_class(
    model: nn.Module, graph: Graph, surgery: Surgery, scales: Mapping[str, Scale], answers: Sequence[Tensor] | None = None
) -> tuple[nn.Module | None, str, list[str]]:
    """The small model in the user's class, or None; in words what the comparison found; and the attributes that a call of it changes.

    scales: those that the attention of some modules had before it lost width. answers: the small graph's to the example, where they are known.
    """
    if came_as_graph(model, graph):
        return None, "the model came as a graph", []
    if graph.standardised:
        model = with_plain_layers(model, graph)
    instead = _instead(graph, surgery)
    if instead is None:
        return None, "a branch without channels ends in the middle of a module's forward, which the user's class cannot leave out", []
    scales = narrowed(model, surgery.tensors) | dict(scales)
    scales = {name: scale for name, scale in scales.items() if not any(name == other or name.startswith(f"{other}.") for other in instead)}
    judge = _Judge(graph, surgery, answers)
    note = ""
    doubtful: list[tuple[float, Attributes]] = []  # guesses with their errors, of which rounding may explain what is left: float64 decides

    def candidates(double: bool) -> Iterable[Attributes]:
        found = guesses(model, surgery.tensors, surgery.literals)
        return [attributes for _, attributes in sorted(doubtful, key=lambda one: one[0])] if double else found

    for double in (False, True):
        for attributes in candidates(double):
            try:
                candidate = rebuild(model, surgery.tensors, attributes, instead)
                judged = copy.deepcopy(candidate, memo_for(candidate)).double() if double else candidate
                error, attributes, hooks = _with_its_scales(judge, judged, model, attributes, scales, double)
                if _TOLERANCE < error < _SINGLE and not double:
                    doubtful.append((error, attributes))
                if not error <= _TOLERANCE:
                    raise VerificationError(f"it differs by {error:.2g}")
                _remove(hooks)
                needed = {name: scales[name] for name, hook in hooks.items() if hook.needed}  # other modules say their scale themselves
                hold_scales(candidate, needed)
                if _has_unseen_parameters(model, surgery.tensors):
                    _runs_in_training(candidate, graph)
                held = f"; hooks on {len(needed)} modules keep the original's scale" if needed else ""
                return candidate, f"the user's class agrees with the small graph to {error:.1g}{held}", judge.changed
            except VerificationError as differs:
                note = note or f"the user's class does not follow the new sizes: {differs}"
            except Exception as raised:  # the user's code may raise anything when its sizes change
                _log.debug("the user's class does not run at the new sizes", exc_info=True)
                note = note or f"the user's class does not run at the new sizes: {one_line(raised)}"
    return None, note, judge.changed


def _with_its_scales(
    judge: _Judge, candidate: nn.Module, model: nn.Module, attributes: Attributes, scales: Mapping[str, Scale], double: bool
) -> tuple[float, Attributes, dict[str, Held]]:
    """The error of a candidate, its attributes, and the hooks under which it is that small: on attention, on norms too, or none, for code may make up
    for a lost width itself.
    """
    attention = {name: scale for name, scale in scales.items() if scale.of_attention}
    ways = [attention, dict(scales), {}]
    for number, held in enumerate(ways):
        if held not in ways[:number]:
            hooks = hold_scales(candidate, held)
            error, attributes = _by_its_checks(judge, candidate, model, attributes, double)
            if error <= _SINGLE:
                break
            _remove(hooks)
    return error, attributes, hooks


def _remove(hooks: Mapping[str, Held]) -> None:
    for hook in hooks.values():
        hook.remove()


def _by_its_checks(judge: _Judge, candidate: nn.Module, model: nn.Module, attributes: Attributes, double: bool) -> tuple[float, Attributes]:
    """The error of a candidate, and its attributes: some check in its code may say that one more is another size now, and that follows."""
    names = {module: name for name, module in candidate.named_modules()}
    told: set[tuple[str, str]] = set()
    while True:
        try:
            return judge.error_of(candidate, double), attributes
        except Exception as raised:  # the user's code may raise anything when its sizes change
            check = failed_check(raised)
            if check is None or check.module not in names or (place := (names[check.module], check.attribute)) in told:
                raise
            told.add(place)
            name = names[check.module]
            attributes = attributes | {name: attributes.get(name, {}) | {check.attribute: check.size}}
            follow(check.module, model.get_submodule(name), {check.attribute: check.size})


def _instead(graph: Graph, surgery: Surgery) -> dict[str, nn.Module] | None:
    """What takes the place of modules that belonged to branches without channels; None where a stand-in belongs to no such module alone."""
    constants = {s.module: attribute(surgery.module, s.name) for s in surgery.stand_ins if s.module is not None}
    if len(constants) < len(surgery.stand_ins):
        return None
    instead: dict[str, nn.Module] = {}
    for name in sorted(surgery.gone):
        steps = _steps([n for n in graph.nodes if name in owners_of(n)])
        instead[name] = Constant(constants[name], steps) if name in constants else Gone(steps)
    return instead


def _steps(nodes: Sequence[fx.Node]) -> list[int]:
    """Of each axis but the first two, how many positions of what these nodes read make one of what they answer; none where that is not plain."""
    inside = set(nodes)
    read = [n.meta.get("val") for node in nodes for n in node.all_input_nodes if n not in inside and n.op != "get_attr"]
    answered = [node.meta.get("val") for node in nodes if any(user not in inside for user in node.users)]
    if not read or not answered or not (isinstance(read[0], Tensor) and isinstance(answered[-1], Tensor)) or read[0].dim() != answered[-1].dim():
        return []
    sizes = list(zip(shape_of(read[0]), shape_of(answered[-1]), strict=True))
    return [1, 1, *(-(-before // max(1, after)) for before, after in sizes[2:])]


class _Judge:
    """How far the answers of a candidate are from the small graph's, in the model's own precision or in float64."""

    def __init__(self, graph: Graph, surgery: Surgery, answers: Sequence[Tensor] | None):
        """answers: the small graph's to the example, where they are known: of a heavy model."""
        self.graph, self.small, self.batches, self.heavy = graph, surgery.module, _batches(graph), answers is not None
        self.changed: list[str] = []  # attributes that the last call of a candidate left as others
        self._wanted: dict[tuple[int, bool], Sequence[Tensor]] = {}  # the same for all candidates
        if answers and not graph.doubled:
            self._wanted[0, False] = answers

    def error_of(self, candidate: nn.Module, double: bool) -> float:
        """As a share of the answer: on the example, and on one sample of it; of a heavy model, on one sample alone.

        Code may treat a single sample in its own way (squeeze): then on the example, and on one sample more or less.
        """
        if len(self.batches) == 1:
            return self._on(0, candidate, double)
        single = self._on_one_sample(candidate, double) if self.heavy else None
        if single is not None and single <= _TOLERANCE:
            return single
        error = self._on(0, candidate, double)
        if not error <= _TOLERANCE:
            return error
        if single is None:
            single = self._on_one_sample(candidate, double)
        return max(error, single if single <= _TOLERANCE else self._on(2, candidate, double))

    def _on_one_sample(self, candidate: nn.Module, double: bool) -> float:
        try:
            return self._on(1, candidate, double)
        except Exception:  # the user's code may raise anything
            _log.debug("the user's class does not run on one sample", exc_info=True)
            return math.inf

    def _on(self, number: int, candidate: nn.Module, double: bool) -> float:
        """Both hold the same tensors and call the same kernels, mostly in the same order."""
        wanted = self._answers(number, double)
        args, kwargs = self.graph.called_with(_typed(self.batches[number], double))
        with torch.no_grad(), same_noise(), _numbers_made(double), _InDouble() if double else nullcontext(), state_kept(candidate) as changed:
            try:
                got = floats(candidate(*args, **kwargs))
            finally:
                self.changed = changed()
        nothing = [torch.zeros((), dtype=torch.float64)] * len(wanted)
        return difference(got, wanted, lambda: nothing, self.graph.output_names)

    def _answers(self, number: int, double: bool) -> Sequence[Tensor]:
        if (number, double) not in self._wanted:
            run = Exact(self.small) if double else fx.Interpreter(self.small)
            with torch.no_grad(), same_noise(), _numbers_made(double), buffers_kept(self.small):
                self._wanted[number, double] = floats(run.run(*_typed(self.batches[number], double), enable_io_processing=False))
        return self._wanted[number, double]


def _batches(graph: Graph) -> list[list[Any]]:
    """The user's example; and where that has several samples, one of them alone, and one more or less; or only more, where boxes may lie in any.

    What should have followed the new sizes may hide in one batch: two samples of 48 channels are also one of 96. A single sample hides nothing.
    """
    given = graph.given_inputs()
    if graph.doubled or not graph.dynamic_batch:
        return [given]
    number = samples_in(given)

    def of(samples: int) -> list[Any]:
        return [repeated(v, 0, samples) if batched else v for v, batched in zip(given, graph.batched, strict=True)]

    others = (number + 1, number + 2) if positions(graph) else (1, number - 1 if number > 2 else number + 1)
    return [given, *map(of, others)]


def _typed(inputs: Sequence[Any], double: bool) -> list[Any]:
    return [in_double(v) if double else v for v in copies(inputs)]


@contextmanager
def _numbers_made(double: bool) -> Iterator[None]:
    """Tensors that code makes (a window, a table of positions) without saying of what type are in float64 if the others are."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else default)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class _InDouble(TorchDispatchMode):
    """Runs code in float64 where it asks for less by name: much code computes a part of a model in float32."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(in_double, (args, kwargs or {}))
        return _grouped_mm(*args, **kwargs) if function is torch.ops.aten._grouped_mm.default else function(*args, **kwargs)


def _grouped_mm(rows: Tensor, matrices: Tensor, offs: Tensor, *_: Any) -> Tensor:
    """Each group of rows, up to where it ends, times the matrix of its own (mixtures of experts): torch has no kernel for float64."""
    ends = offs.tolist()
    parts = [rows[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, matrices, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], matrices.shape[-1])])


def _runs_in_training(candidate: nn.Module, graph: Graph) -> None:
    """Layers that evaluation never reaches (auxiliary heads) may not fit the small ones: then training would fail."""
    with torch.no_grad():
        args, kwargs = graph.example()
        training = copy.deepcopy(candidate, memo_for(candidate))
        training.train()
        training(*args, **kwargs)


def _has_unseen_parameters(model: nn.Module, tensors: Mapping[int, Tensor]) -> bool:
    return any(id(p) not in tensors for p in model.parameters())
