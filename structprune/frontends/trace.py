"""module → Graph, by torch.export."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from structprune.errors import InputError, TraceError, first_line
from structprune.frontends.chosen import ChosenParts, must_not_matter
from structprune.frontends.definitions import is_for_onnx
from structprune.frontends.devices import on_cpu, values_on_cpu
from structprune.frontends.exported import FIXED_BATCH, from_exported, names_in, operators_of, unlifted
from structprune.frontends.parametrizations import fold_parametrizations
from structprune.frontends.torch_export import UNKNOWN_CLASS, called_once, export, unaware
from structprune.frontends.unneeded import of_training
from structprune.frontends.users_code import as_written, users_line
from structprune.frontends.values import KnownValues, may_decide
from structprune.frontends.wrappers import unwrapped
from structprune.ir.graph import Graph, held_by, is_dynamic, repeated, written_to
from structprune.ir.operators import named_arguments, operator_name
from structprune.ir.signature import Signature, signature_of
from structprune.ir.traced import TracedModule, in_mode
from structprune.ops import RULES, contraction

_log = logging.getLogger(__name__)
_CONVOLUTIONS = (contraction.conv, contraction.conv_transpose, contraction.convolution)
_NAMES_OF_GRAPHS = frozenset({*dir(fx.GraphModule), "meta"}) - frozenset(dir(nn.Module))
_PRIME = 1009  # samples, which no code divides into equal parts
_DROPPED = "the model's code drops the first axis of one sample (squeeze)"

Dynamic: TypeAlias = Sequence[int] | Mapping[str, Sequence[int]]
_Call: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]  # arguments, positional and by keyword


def plain(model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """The model as it is traced: on the CPU, out of wrappers, with weights that nothing computes; the model itself where it is so.

    args and kwargs: of a call, by which a model in another form becomes a module. Raises InputError where it cannot.
    """
    return fold_parametrizations(on_cpu(unwrapped(model, _positional(args), kwargs or {})))


def _positional(args: tuple[Any, ...] | Tensor) -> tuple[Any, ...]:
    """One tensor stands for a call with it alone."""
    return (args,) if isinstance(args, Tensor) else tuple(args)


@as_written()
def trace(
    model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None = None, *, dynamic: Dynamic = (), batch: bool = True
) -> Graph:
    """Trace `model` in evaluation mode on example inputs. The model is left as it was.

    The first axis of every tensor input is dynamic where the model allows it (unless `batch` is False), and so are the axes in `dynamic`: of
    every input that has them, or of those that it names. Of a model that was read from a file with a signature the file says which axes are free,
    and what is traced must answer as the file does. Parametrizations (weight norm, spectral norm, ...) are folded into the weights that they
    compute. Work that the code skips where values choose nothing for it is traced as done always, if that makes no difference (chosen.py). Where all
    that fails, code that asks whether it is being traced is told that it is not. Raises TraceError, with the user's source line, for a model that
    torch.export cannot trace.
    """
    try:
        return _traced(model, args, kwargs, dynamic, batch)
    except TraceError:
        with unaware(), suppress(TraceError, InputError):
            return _traced(model, args, kwargs, dynamic, batch)
        raise


def _traced(model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None, dynamic: Dynamic, batch: bool) -> Graph:
    model = plain(model, args, kwargs)
    _must_have_free_names(model)
    promised = signature_of(model)
    args = values_on_cpu(_positional(args))
    args, kwargs = args if promised is None else promised.given(args), values_on_cpu(dict(kwargs or {}))
    wanted = _wanted_axes(model, args, kwargs, dynamic)
    if promised is not None:
        wanted = [tuple(sorted(free.union(asked))) for free, asked in zip(promised.free(), wanted, strict=True)]
    users = args, kwargs
    with in_mode(model, training=False), KnownValues(model) as values, ChosenParts(values) as parts:
        attempts = _attempts(wanted, batch, promised, any(map(may_decide, pytree.tree_leaves(users))))
        lost: dict[bool, list[str]] = {False: [], True: []}  # why sizes are not free; where nothing is assumed, and where something is
        failed: Exception | None = None  # what to tell
        for attempt in attempts:
            try:
                exported, example = _attempted(attempt, model, users, values, parts)
                break
            except Exception as error:  # torch.export raises whatever the model's code meets
                _log.debug("traced with less freedom", exc_info=True)
                if isinstance(error, TraceError) or not (attempt.assume and failed):
                    failed = error
                if not attempt.static:
                    lost[attempt.assume].append(f"{'static sizes' if any(a - {0} for a in attempt.axes) else 'static batch'}: {first_line(error)}")
                    continue
                if attempt is attempts[-1] or not (attempt.hold or attempt.assume or _is_of_values(error)):
                    raise failed if isinstance(failed, (InputError, TraceError)) else _explained(failed) from error
        if values.checked:
            _must_pass_its_checks(model, *users)
    _must_keep(exported, values.held)
    graph = from_exported(exported, *example, model=model, notes=tuple(lost[attempt.assume]), doubled=any(_doubled(users, example)))
    if promised is None:
        graph = _with_heads_of_training(graph, model)
    fixed = [
        f"axis {d} of {n} keeps its size: the model's code needs it"
        for n, w, g in zip(graph.input_names, wanted, graph.dynamic, strict=True)
        for d in w
        if d not in g
    ]
    inputs = tuple(source for source in values.held if isinstance(source, int))
    return replace(graph, held=inputs, notes=(*graph.notes, *_taken_for_granted(graph, values, parts), *fixed))


def _must_have_free_names(model: nn.Module) -> None:
    """Raise TraceError for a tensor, or what holds it, whose name at the top of the model torch.export's own modules have for something else."""
    name = next((top for top in (name.split(".")[0] for name in held_by(model)) if top in _NAMES_OF_GRAPHS), None)
    if name is not None:
        raise TraceError(f"torch.export takes no model with tensors under the name {name!r}: rename that, or put the model in another module")


def _taken_for_granted(graph: Graph, values: KnownValues, parts: ChosenParts) -> list[str]:
    """In words, what the code asked of values, and was told."""
    stays = "{} is taken to stay {}: the model's code asks for its value"
    held = [
        f"{stays.format(graph.input_names[source], what)}; with another the traced module and the ONNX file answer NaN"
        if isinstance(source, int)
        else stays.format(source, what)
        for source, what in values.held.items()
    ]
    instead = "the traced module and the ONNX file work on no rows instead"
    return [*held, *(f"the code skips what nothing chooses ({place}): {instead}" for place in parts.places())]


class _Attempt(NamedTuple):
    """`axes`: those of every input that are free; `free`: whether the batch is. `hold`: small inputs are taken to stay as they are; `assume`:
    something is taken to be chosen wherever code asks.
    """

    free: bool
    axes: list[set[int]]
    hold: bool = False
    assume: bool = False

    @property
    def static(self) -> bool:
        return not any(self.axes)


def _attempted(attempt: _Attempt, model: nn.Module, users: _Call, values: KnownValues, parts: ChosenParts) -> tuple[ExportedProgram, _Call]:
    """The program, and the arguments that it was traced on: the user's, or two samples where they have one.

    Raises InputError or TraceError where the program would not answer as the model does, and whatever torch.export raises.
    """
    promised = signature_of(model)
    example = users
    if attempt.free:
        example = (promised.doubled(users[0]), users[1]) if promised else pytree.tree_map_only(Tensor, _two_samples, users)
    doubled = _doubled(users, example)
    values.held.clear()
    with values.of_inputs(model, *users) if attempt.hold else parts.assuming() if attempt.assume else nullcontext():
        exported = export(model, *example, attempt.axes)
    if promised is not None:
        _check_against_file(promised, exported, example[0], any(doubled))
    elif any(two and not is_dynamic(size) for two, size in zip(doubled, _first_sizes(exported), strict=True)):
        raise InputError(FIXED_BATCH)  # and that to two samples, where the user has one
    elif any(doubled) and _drops_single_axes(exported):
        raise InputError(_DROPPED)
    elif bound := _bound_by_batch(exported):
        raise InputError(bound)
    if parts.assumed:
        must_not_matter(parts.assumed, model, from_exported(exported, *example, model=model))
    return exported, example


def _doubled(users: _Call, example: _Call) -> list[bool]:
    return [two is not one for one, two in zip(pytree.tree_leaves(users), pytree.tree_leaves(example), strict=True)]


def _attempts(wanted: Sequence[Sequence[int]], batch: bool, promised: Signature | None, holds: bool) -> list[_Attempt]:
    """From the most freedom to none; then, as far as the code asks what values are, with more and more that is taken to be so."""
    none: list[set[int]] = [set() for _ in wanted]
    if promised is not None:
        lengths = sorted({s for axes in promised.sizes for s in axes if isinstance(s, str)} - promised.batch())
        fewer = [promised.free(promised.batch() | (set(lengths) - {name})) for name in lengths]
        found = [(True, [set(axes) for axes in wanted]), *((True, axes) for axes in fewer), (True, promised.free(promised.batch())), (False, none)]
    else:
        asked = [set(axes) for axes in wanted]
        found = [(True, [{0, *axes} for axes in asked]), (True, [{0} for _ in asked])] if batch else []
        found += [(False, asked), (False, none)]
    freedoms = [_Attempt(*freedom) for i, freedom in enumerate(found) if freedom[1] not in [axes for _, axes in found[:i]]]
    held = [freedoms[-1]._replace(hold=True)] if holds else []
    return [*freedoms, *held, *(freedom._replace(assume=True) for freedom in freedoms)]


def _check_against_file(promised: Signature, exported: ExportedProgram, args: tuple[Any, ...], doubled: bool) -> None:
    """Raise InputError where the program answers otherwise than the file that it stands for: on the example, and at other sizes of free axes.

    doubled: the batch is not that of the user's example, and so must be free.
    """
    from structprune.frontends.onnx_in.check import agreement, runner

    module = unlifted(exported)
    axes: dict[str, list[tuple[int, int]]] = {}
    for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
        for d, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if is_dynamic(size):
                axes.setdefault(str(size), []).append((i, d))
    if doubled and not any(d == 0 for places in axes.values() for _, d in places):
        raise InputError(FIXED_BATCH)
    answer = runner(promised.file)

    def run(*inputs: Any) -> Any:  # no hook of the program's looks at the sizes
        return fx.Interpreter(module).run(*inputs)

    agreement(promised.file, answer, run, args, promised.outputs)
    for places in axes.values():
        for size in (1, 3) if any(d == 0 for _, d in places) else (args[places[0][0]].shape[places[0][1]] * n // 2 for n in (1, 4)):
            resized = list(args)
            for i, d in places:
                resized[i] = repeated(resized[i], d, max(1, size))
            try:
                nothing = not all(v.numel() for v in answer(resized))
            except Exception:  # a size at which the file itself does not run
                _log.debug("the file does not run at another size", exc_info=True)
                continue
            if nothing:
                continue
            agreement(promised.file, answer, run, resized, promised.outputs)


def retrace(module: nn.Module, graph: Graph) -> Graph:
    """A graph's module, or one that computes the same, traced with the same dynamic axes: to be written to a file."""
    with (
        in_mode(module, training=False),
        torch.no_grad(),
    ):  # a graph no longer says where the model's code writes to its own weights without gradients
        axes = [set(axes) for axes in graph.dynamic]
        try:
            exported = export(module, graph.args, graph.kwargs, axes)
        except Exception as error:
            if not _is_of_values(error):
                raise _explained(error) from error
            exported = _with_something_chosen(module, graph, axes, error)
    return from_exported(exported, graph.args, graph.kwargs, model=module)


def _with_something_chosen(module: nn.Module, graph: Graph, axes: list[set[int]], failed: Exception) -> ExportedProgram:
    """The program, where torch itself asks how many values choose; without what it then asserts of these sizes, for it does as well on none."""
    with KnownValues(module) as values, ChosenParts(values) as parts, parts.assuming():
        try:
            exported = export(module, graph.args, graph.kwargs, axes)
        except Exception as error:
            raise _explained(failed) from error
    for node in reversed(exported.graph.nodes):
        if "_assert" in operator_name(node):
            exported.graph.erase_node(node)
    exported.graph.eliminate_dead_code()
    return exported


def program_for_onnx(graph: Graph) -> tuple[ExportedProgram, Mapping[str, str]]:
    """The traced program in calls that torch's ONNX exporter can translate, and by the names of its nodes those of the graph's, where they differ."""
    if is_for_onnx(graph.exported.graph):
        return graph.exported, {}
    program = retrace(TracedModule(graph.module, copy.deepcopy(graph.module.graph)), graph).exported
    calls = [[n for n in nodes if n.op == "call_function"] for nodes in (program.graph.nodes, graph.nodes)]
    same = len(calls[0]) == len(calls[1]) and all(a.target == b.target for a, b in zip(*calls, strict=True))
    return program, {a.name: b.name for a, b in zip(*calls, strict=True)} if same else {}


def parse_dynamic(options: Sequence[str]) -> Dynamic:
    """Axes as they are written on the command line: '2,3' for every input, or 'NAME=1' for some. Raises InputError for anything else."""
    named: dict[str, tuple[int, ...]] = {}
    for option in options:
        name, _, axes = option.rpartition("=")
        if not re.fullmatch(r"\d+(,\d+)*", axes):
            raise InputError(f"--dynamic {option!r}: write axes as 2,3, or of one input as NAME=1")
        named[name] = tuple(map(int, axes.split(",")))
    if "" in named and len(named) > 1:
        raise InputError("--dynamic: axes of every input, or NAME=AXES for each input; not both")
    return named.get("", named)


def _wanted_axes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Dynamic) -> list[tuple[int, ...]]:
    """For each leaf of the arguments, the axes beside the batch that are asked to be dynamic. Raises InputError for a name that is no input."""
    promised = signature_of(model)
    parameters = list(promised.inputs if promised else inspect.signature(model.forward).parameters) or ["input"]
    named = [*((parameters[min(i, len(parameters) - 1)], value) for i, value in enumerate(args)), *kwargs.items()]
    names = list(dict.fromkeys(name for name, _ in named))
    if isinstance(dynamic, Mapping) and (unknown := set(dynamic) - set(names)):
        raise InputError(f"dynamic axes for {sorted(unknown)[0]!r}, which is no input; the inputs are {', '.join(names)}")

    def axes(name: str, leaf: Any) -> tuple[int, ...]:
        asked = dynamic.get(name, ()) if isinstance(dynamic, Mapping) else dynamic
        return tuple(d for d in asked if isinstance(leaf, Tensor) and 0 < d < leaf.dim())

    return [axes(name, leaf) for name, value in named for leaf in pytree.tree_leaves(value)]


def _with_heads_of_training(graph: Graph, model: nn.Module) -> Graph:
    """The graph, with the layers that training alone reaches set aside, as far as the model runs in training on the example inputs.

    Not of weights that are standardised: of those that are folded, the graph knows the raw ones no more.
    """
    known = {name for names in graph.aliases.values() for name in names}
    unseen = {id(p) for name, p in model.named_parameters() if name not in known}
    if graph.standardised or not unseen:
        return graph
    try:
        with in_mode(model, training=True):
            if not _reaches(model, unseen, graph.args, graph.kwargs):
                return graph
            exported = export(model, graph.args, graph.kwargs, ())
        unneeded, tensors = of_training(graph, operators_of(exported), unseen)
    except Exception:  # training may want labels, or raise anything
        _log.debug("not traced in training", exc_info=True)
        return graph
    for name, tensor in tensors.items():
        setattr(graph.module, name, tensor)
    names = names_in(model)
    aliases = {name: names[id(tensor)] for name, tensor in tensors.items() if id(tensor) in names}
    return replace(graph, unneeded=unneeded, aliases={**graph.aliases, **aliases})


def _reaches(model: nn.Module, parameters: Container[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the model calls a module that holds any of the parameters."""
    called: list[nn.Module] = []
    owners = [m for m in model.modules() if any(id(p) in parameters for p in m.parameters(recurse=False))]
    hooks = [owner.register_forward_pre_hook(lambda module, _: called.append(module)) for owner in owners]
    try:
        called_once(model, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return bool(called)


def _must_pass_its_checks(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise TraceError where the model raises on the user's example."""
    try:
        called_once(model, args, kwargs)
    except Exception as error:  # a check may raise anything
        raise TraceError(
            f"the model raises on the example inputs{users_line(error)}: {first_line(error)}; give inputs that pass its own checks"
        ) from error


def _must_keep(exported: ExportedProgram, held: Container[str]) -> None:
    """Raise TraceError where the model writes to a buffer whose value decided what was traced: its next call would go another way."""
    buffers = exported.graph_signature.inputs_to_buffers
    for node in written_to(list(exported.graph.nodes)):
        if (name := buffers.get(node.name)) in held:
            raise TraceError(f"the model's code asks for the value of {name} and changes it, as at a first call: run the model on an input before")


def _first_sizes(exported: ExportedProgram) -> list[Any]:
    """Of each leaf of the arguments the size of its first axis; None where there is none."""
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    shapes: list[Sequence[Any]] = [getattr(values.get(str(name)), "shape", ()) for name in exported.graph_signature.user_inputs]
    return [shape[0] if shape else None for shape in shapes]


def _drops_single_axes(exported: ExportedProgram) -> bool:
    """Whether an axis that may have any size is dropped where it has one entry, which the trace of more entries does not follow."""
    for node in exported.graph.nodes:
        if operator_name(node) == "squeeze":
            dims = node.args[1] if len(node.args) > 1 else None
            shape = node.args[0].meta["val"].shape
            if any(is_dynamic(shape[d]) for d in (range(len(shape)) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims])):
                return True
    return False


def _bound_by_batch(exported: ExportedProgram) -> str:
    """In words, why the batch, which is free in the program, cannot have any size; empty where it can."""
    batch = next(filter(is_dynamic, _first_sizes(exported)), None)
    if batch is None:
        return ""
    for node in exported.graph.nodes:
        if RULES.get(operator_name(node)) in _CONVOLUTIONS and isinstance(named_arguments(node, node.args, node.kwargs).get("groups"), fx.Node):
            return "each sample is convolved with a kernel of its own, as a group, and ONNX has no free number of groups"
    for guard in batch.node.shape_env.guards:  # what torch found out that the code needs
        if "Mod(" in str(guard.expr) and str(guard.expr.subs(batch.node.expr, _PRIME)) == "False":
            return "the model's code divides the batch into equal parts"
    return ""


def _two_samples(tensor: Tensor) -> Tensor:
    """torch.export takes a size of 1 for a constant: a batch of one is doubled, so that the batch can be dynamic."""
    return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _explained(error: BaseException) -> TraceError:
    """One line: what failed, in which line of the user's code, and what to change."""
    text = str(error)
    if ".numpy()" in text:
        advice = "the code goes on in NumPy, where no trace can follow: compress the part before it (what comes after a network often has a switch)"
    elif _is_of_values(error):
        advice = "the code branches on values of tensors: use torch.where or torch.cond, or compress the part before it"
    elif UNKNOWN_CLASS in text:
        advice = "let the model answer tensors, or a tuple, dict or dataclass of them"
    elif "'NoneType'" in text:
        advice = "give inputs that may be left out (masks, positions) all the same: some code makes none of its own while it is traced"
    elif isinstance(error, (RuntimeError, TypeError, ValueError)) and ("shape" in text or "size" in text or "argument" in text or "channels" in text):
        advice = "check the shapes and number of the example inputs (--input on the command line)"
    else:
        advice = "make that line traceable by torch.export, or pass the submodule that can be traced"
    return TraceError(f"the model cannot be traced{users_line(error)}: {first_line(error)}; {advice}")


def _is_of_values(error: BaseException) -> bool:
    """Whether code asked for what a tensor holds, which torch.export does not know."""
    return "DataDependent" in type(error).__name__ or "data-dependent" in str(error) or ".numpy()" in str(error)
