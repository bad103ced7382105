"""module → Graph, by torch.export. The only place that knows torch.export's tracing."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import operator
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._functorch import predispatch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

from structprune.errors import InputError, TraceError
from structprune.frontends.definitions import spell_out
from structprune.frontends.standardised import fold_standardised
from structprune.frontends.unneeded import of_training, set_aside
from structprune.frontends.values import KnownValues, may_decide
from structprune.ir.graph import Graph, attribute, held_by, is_dynamic, repeated, results_in, written_to
from structprune.ir.operators import is_fresh, operator_name
from structprune.ir.signature import Signature, signature_of

_log = logging.getLogger(__name__)
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_FIXED = "the model's code fixes the first axis of an input"
_DROPPED = "the model's code drops the first axis of one sample (squeeze)"


Dynamic: TypeAlias = Sequence[int] | Mapping[str, Sequence[int]]


def trace(
    model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None = None, *, dynamic: Dynamic = (), batch: bool = True
) -> Graph:
    """Trace `model` in evaluation mode on example inputs. The model is left as it was.

    The first axis of every tensor input is dynamic where the model allows it (unless `batch` is False), and so are the axes in `dynamic`: of
    every input that has them, or of those that it names. Of a model that was read from a file with a signature the file says which axes are free,
    and what is traced must answer as the file does. Parametrizations (weight norm, spectral norm, ...) are folded into the weights that they
    compute. Where that fails, code that asks whether it is being traced is told that it is not. Raises TraceError, with the user's source line, for
    a model that torch.export cannot trace.
    """
    try:
        return _traced(model, args, kwargs, dynamic, batch)
    except TraceError:
        with _unaware(), suppress(TraceError, InputError):
            return _traced(model, args, kwargs, dynamic, batch)
        raise


def _traced(model: nn.Module, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None, dynamic: Dynamic, batch: bool) -> Graph:
    model = fold_parametrizations(model)
    promised = signature_of(model)
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    args, kwargs = args if promised is None else promised.given(args), dict(kwargs or {})
    notes: list[str] = []
    given = pytree.tree_leaves((args, kwargs))
    wanted = _wanted_axes(model, args, kwargs, dynamic)
    if promised is not None:
        wanted = [tuple(sorted(free.union(asked))) for free, asked in zip(promised.free(), wanted, strict=True)]
    users = args, kwargs
    with evaluation(model), KnownValues(model) as values:
        attempts = [(*attempt, False) for attempt in _attempts(wanted, batch, promised)]
        if any(map(may_decide, given)):
            attempts.append((*attempts[-1][:2], True))
        for free, axes, hold in attempts:
            example = users
            values.held.clear()
            if free:
                example = (promised.doubled(args), kwargs) if promised else pytree.tree_map_only(Tensor, _two_samples, (args, kwargs))
            doubled = [two is not one for one, two in zip(given, pytree.tree_leaves(example), strict=True)]
            try:
                with values.of_inputs(model, *users) if hold else nullcontext():
                    exported = _export(model, example[0], example[1], axes)
                if promised is not None:
                    _check_against_file(promised, exported, example[0], any(doubled))
                elif any(two and not free for two, free in zip(doubled, _first_axes(exported), strict=True)):
                    raise InputError(_FIXED)  # and that to two samples, where the user has one
                elif any(doubled) and _drops_single_axes(exported):
                    raise InputError(_DROPPED)
                args, kwargs = example
                break
            except Exception as error:  # torch.export raises whatever the model's code meets
                _log.debug("traced with less freedom", exc_info=True)
                if any(axes):
                    notes.append(f"{'static sizes' if any(axes - {0} for axes in axes) else 'static batch'}: {_first_line(error)}")
                elif hold or not (attempts[-1][2] and _is_of_values(error)):
                    raise error if isinstance(error, InputError) else _explained(error) from error
        if values.checked:
            _must_pass_its_checks(model, *users)
    _must_keep(exported, values.held)
    graph = from_exported(exported, args, kwargs, model=model, notes=tuple(notes), doubled=any(doubled))
    if promised is None:
        graph = _with_heads_of_training(graph, model)
    stays = "{} is taken to stay {}: the model's code asks for its value"
    held = [
        f"{stays.format(graph.input_names[source], what)}; with another the traced module and the ONNX file answer NaN"
        if isinstance(source, int)
        else stays.format(source, what)
        for source, what in values.held.items()
    ]
    fixed = [
        f"axis {d} of {n} keeps its size: the model's code needs it"
        for n, w, g in zip(graph.input_names, wanted, graph.dynamic, strict=True)
        for d in w
        if d not in g
    ]
    inputs = tuple(source for source in values.held if isinstance(source, int))
    return replace(graph, held=inputs, notes=(*graph.notes, *held, *fixed))


def _attempts(wanted: Sequence[Sequence[int]], batch: bool, promised: Signature | None) -> list[tuple[bool, list[set[int]]]]:
    """From the most freedom to none: whether the batch is free, and the axes of every input that are."""
    none: list[set[int]] = [set() for _ in wanted]
    if promised is not None:
        lengths = sorted({s for axes in promised.sizes for s in axes if isinstance(s, str)} - promised.batch())
        fewer = [promised.free(promised.batch() | (set(lengths) - {name})) for name in lengths]
        found = [(True, [set(axes) for axes in wanted]), *((True, axes) for axes in fewer), (True, promised.free(promised.batch())), (False, none)]
    else:
        asked = [set(axes) for axes in wanted]
        found = [(True, [{0, *axes} for axes in asked]), (True, [{0} for _ in asked])] if batch else []
        found += [(False, asked), (False, none)]
    return [attempt for i, attempt in enumerate(found) if attempt[1] not in [axes for _, axes in found[:i]]]


def _check_against_file(promised: Signature, exported: ExportedProgram, args: tuple[Any, ...], doubled: bool) -> None:
    """Raise InputError where the program answers otherwise than the file that it stands for: on the example, and at other sizes of free axes.

    doubled: the batch is not that of the user's example, and so must be free.
    """
    from structprune.frontends.onnx_in.check import agreement, runner

    module = _unlifted(exported)
    axes: dict[str, list[tuple[int, int]]] = {}
    for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
        for d, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if is_dynamic(size):
                axes.setdefault(str(size), []).append((i, d))
    if doubled and not any(d == 0 for places in axes.values() for _, d in places):
        raise InputError(_FIXED)
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
    with evaluation(module), torch.no_grad():  # a graph no longer says where the model's code writes to its own weights without gradients
        try:
            exported = _export(module, graph.args, graph.kwargs, [set(axes) for axes in graph.dynamic])
        except Exception as error:
            raise _explained(error) from error
    return from_exported(exported, graph.args, graph.kwargs, model=module)


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


def from_exported(
    exported: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    model: nn.Module | None = None,
    notes: tuple[str, ...] = (),
    doubled: bool = False,
) -> Graph:
    """Graph of a program that torch.export made (here, or loaded from a .pt2 file)."""
    exported = _without_vmap(exported)
    _free_views(exported.graph_module)
    module = _unlifted(exported)
    _inline_regions(module)
    spell_out(module)
    _drop_checks(module)
    unneeded = set_aside(module)
    names = _names_in(model if model is not None else module)
    folded = fold_standardised(module)
    _sink_tensors(module)
    attributes = {str(n.target): n for n in (*module.graph.nodes, *unneeded.nodes) if n.op == "get_attr"}
    tensors = {target: folded[target].raw if target in folded else attribute(module, target) for target in attributes}
    aliases = {target: names[id(tensor)] for target, tensor in tensors.items() if isinstance(tensor, Tensor) and id(tensor) in names}
    promised = signature_of(model) if model is not None else None
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    values = [n.meta.get("val") for n in placeholders]
    dynamic = tuple(tuple(d for d, size in enumerate(v.shape) if is_dynamic(size)) if isinstance(v, Tensor) else () for v in values)
    if not any(0 in axes for axes in dynamic) and not notes and promised is None:
        notes = (f"static batch: {_FIXED}",)
    if folded:
        notes += (f"weights that the model's code standardises are folded, {len(folded)} of them; {next(iter(folded))} is one",)
    return Graph(
        module=module,
        args=args,
        kwargs=kwargs,
        exported=exported,
        aliases=aliases,
        input_names=promised.inputs if promised else tuple(n.name for n in placeholders),
        output_names=promised.outputs if promised else _output_names(exported),
        dynamic=dynamic,
        doubled=doubled,
        unneeded=unneeded,
        standardised={name: of_weight.axes for name, of_weight in folded.items()},
        signature=promised,
        notes=notes,
    )


def _without_vmap(exported: ExportedProgram) -> ExportedProgram:
    """The program with torch.vmap's levels resolved into operators on whole batches; itself where there are none.

    Between the calls that open and close a level, tensors hide an axis, and no node can be run or typed by itself.
    """
    if any(getattr(n.target, "__module__", "") == predispatch.__name__ for n in exported.graph.nodes):
        return exported.run_decompositions({})  # composite operators (linear, attention) stay whole outside the levels
    return exported


def fold_parametrizations(model: nn.Module) -> nn.Module:
    """The model with every parametrized or masked weight replaced by its value; the model itself where there is none.

    Weight norm and spectral norm, new and old, and the masks of torch.nn.utils.prune.
    """
    if not any(parametrize.is_parametrized(m) or any(map(_folds, m._forward_pre_hooks.values())) for m in model.modules()):
        return model
    model = copy.deepcopy(model, results_in(model))
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # A copy shares the class that holds its parametrized properties, and removing one would break the original.
            module.__class__ = type(type(module).__name__, type(module).__bases__, dict(vars(type(module))))
            assert isinstance(module.parametrizations, nn.ModuleDict)
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in [h for h in module._forward_pre_hooks.values() if _folds(h)]:
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            else:
                remove = nn.utils.remove_weight_norm if "WeightNorm" in type(hook).__name__ else nn.utils.remove_spectral_norm
                remove(module, hook.name)
    return model


def _folds(hook: Any) -> bool:
    """Whether a forward pre-hook computes a weight: of torch.nn.utils.weight_norm and spectral_norm of old, or of torch.nn.utils.prune."""
    return hasattr(hook, "compute_weight") or isinstance(hook, prune.BasePruningMethod)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards each of its modules as it was."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, and afterwards each of its modules as it was."""
    before = [(m, m.training) for m in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _with_heads_of_training(graph: Graph, model: nn.Module) -> Graph:
    """The graph, with the layers that training alone reaches set aside, as far as the model runs in training on the example inputs.

    Not of weights that are standardised: of those that are folded, the graph knows the raw ones no more.
    """
    known = {name for names in graph.aliases.values() for name in names}
    unseen = {id(p) for name, p in model.named_parameters() if name not in known}
    try:
        with _training(model):
            if graph.standardised or not unseen or not _reaches(model, unseen, graph.args, graph.kwargs):
                return graph
            module = _unlifted(_export(model, graph.args, graph.kwargs, ()))
        _inline_regions(module)
        spell_out(module)
        unneeded, tensors = of_training(graph, module, unseen)
    except Exception:  # training may want labels, or raise anything
        _log.debug("not traced in training", exc_info=True)
        return graph
    names = _names_in(model)
    for name, tensor in tensors.items():
        setattr(graph.module, name, tensor)
    return replace(graph, unneeded=unneeded, aliases=graph.aliases | {name: names[id(t)] for name, t in tensors.items() if id(t) in names})


def _names_in(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of every tensor, by its identity."""
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in held_by(model).items():
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
    return names


def _reaches(model: nn.Module, parameters: Container[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the model calls a module that holds any of the parameters."""
    called: list[nn.Module] = []
    owners = [m for m in model.modules() if any(id(p) in parameters for p in m.parameters(recurse=False))]
    hooks = [owner.register_forward_pre_hook(lambda module, _: called.append(module)) for owner in owners]
    try:
        _called_once(model, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return bool(called)


@torch.no_grad()
def _called_once(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the model as it is, on copies of what it may write to: in training of its parameters, too (codebooks that learn as they run)."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    own = held_by(model) if model.training else dict(model.named_buffers())
    with _attributes_kept(model), torch.random.fork_rng(devices=[]):
        torch.func.functional_call(model, {name: tensor.detach().clone() for name, tensor in own.items()}, args, kwargs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: Sequence[set[int]]) -> ExportedProgram:
    """torch.export, silent; axes: those of each leaf of the arguments that are to be dynamic."""
    shapes: Any = None
    args, kwargs = pytree.tree_map_only(Tensor, _alias, (args, dict(kwargs)))
    if any(axes):
        collection = ShapesCollection()
        for leaf, dims in zip(pytree.tree_leaves((args, kwargs)), axes, strict=True):
            if isinstance(leaf, Tensor) and leaf.dim() and dims:
                collection[leaf] = dict.fromkeys(sorted(dims), Dim.AUTO)
        shapes = collection.dynamic_shapes(model, args, kwargs)
    origins = preserve_node_meta() if signature_of(model) is not None else nullcontext()
    with _quiet(), _masks_as_they_are(), _modules_where_they_are(), _attributes_kept(model), origins:
        return torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor of the same values: torch.export leaves marks on those that it fails with, and would take the same axes for dynamic again."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _must_pass_its_checks(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise TraceError where the model raises on the user's example."""
    try:
        _called_once(model, args, kwargs)
    except Exception as error:  # a check may raise anything
        raise TraceError(
            f"the model raises on the example inputs{_users_line(error)}: {_first_line(error)}; give inputs that pass its own checks"
        ) from error


def _must_keep(exported: ExportedProgram, held: Container[str]) -> None:
    """Raise TraceError where the model writes to a buffer whose value decided what was traced: its next call would go another way."""
    buffers = exported.graph_signature.inputs_to_buffers
    for node in written_to(list(exported.graph.nodes)):
        if (name := buffers.get(node.name)) in held:
            raise TraceError(f"the model's code asks for the value of {name} and changes it, as at a first call: run the model on an input before")


def _first_axes(exported: ExportedProgram) -> list[bool]:
    """Of each leaf of the arguments, whether its first axis may have another size."""
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    shapes: list[Sequence[Any]] = [getattr(values.get(str(name)), "shape", ()) for name in exported.graph_signature.user_inputs]
    return [bool(shape) and is_dynamic(shape[0]) for shape in shapes]


def _drops_single_axes(exported: ExportedProgram) -> bool:
    """Whether an axis that may have any size is dropped where it has one entry, which the trace of more entries does not follow."""
    for node in exported.graph.nodes:
        if node.op == "call_function" and operator_name(node) == "squeeze":
            dims = node.args[1] if len(node.args) > 1 else None
            shape = node.args[0].meta["val"].shape
            if any(is_dynamic(shape[d]) for d in (range(len(shape)) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims])):
                return True
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints the whole graph where it fails; what matters of it comes back as an error."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """What a model keeps for its next call (sizes that it has seen, tables by their sizes) is afterwards what it was.

    torch.export puts back the attributes that a module had before, and takes away the tensors among those that came new, where the class has the
    default, but not the note that they are there.
    """
    kept: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = [vars(module) for module in model.modules()]
    for container in waiting:  # grows while it is walked
        if id(container) not in kept:
            kept[id(container)] = container, copy.copy(container)
            inside = container.values() if isinstance(container, dict) else container
            waiting.extend(value for value in inside if type(value) in (dict, list, set, tuple))
    try:
        yield
    finally:
        for container, before in kept.values():
            if isinstance(container, list):
                container[:] = before
            elif not isinstance(container, tuple):
                container.clear()
                container.update(before)


@contextmanager
def _masks_as_they_are() -> Iterator[None]:
    """torch's own transformer looks at the values of a mask to see whether it is causal, which cannot be traced.

    It does so only to choose a kernel: taken as any other mask, it answers the same.
    """
    layers = nn.modules.transformer
    detect = layers._detect_is_causal_mask
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        layers._detect_is_causal_mask = detect


@contextmanager
def _unaware() -> Iterator[None]:
    """Code that asks whether it is traced (`torch.compiler.is_compiling()`; then it makes no mask of its own) goes the way that it goes else."""
    asked = {name: getattr(torch.compiler, name) for name in ("is_compiling", "is_exporting", "is_dynamo_compiling")}
    for name in asked:
        setattr(torch.compiler, name, lambda: False)
    try:
        yield
    finally:
        for name, answer in asked.items():
            setattr(torch.compiler, name, answer)


@contextmanager
def _modules_where_they_are() -> Iterator[None]:
    """`self.layer.to(x.device)` in a forward, which torch.export cannot follow, does nothing where all of the layer is there already."""
    move = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        there = all(device in (None, t.device) and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in tensors)
        return module if there else move(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


def _two_samples(tensor: Tensor) -> Tensor:
    """torch.export takes a size of 1 for a constant: a batch of one is doubled, so that the batch can be dynamic."""
    return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == 1 else tensor


def _unlifted(exported: ExportedProgram) -> fx.GraphModule:
    try:
        module = exported.module(check_guards=False)
    except TypeError:  # torch < 2.10 has no guards to leave out
        module = exported.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _inline_regions(module: fx.GraphModule) -> None:
    """Replace regions under torch.no_grad, or with autocast switched off, by their operators.

    A detach keeps gradients out of a region as no_grad did. Regions with autocast on stay as they are, unknown operators.
    """
    graph = module.graph
    for node in [n for n in graph.nodes if n.target in (_GRAD_MODE, _AUTOCAST)]:
        if node.target is _GRAD_MODE:
            enabled, region, *inputs = node.args
            detached = not enabled
        else:
            _device, _dtype, enabled, _cache, region, *inputs = node.args
            detached = False
            if enabled:
                continue
        body = attribute(module, str(region.target)).graph
        mapping = dict(zip([n for n in body.nodes if n.op == "placeholder"], inputs, strict=True))
        with graph.inserting_before(node):
            outputs = graph.graph_copy(body, mapping)
            flat = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
            for i, value in enumerate(flat):
                if detached and isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
                    flat[i] = graph.call_function(torch.ops.aten.detach.default, (value,))
                    flat[i].meta = dict(value.meta)
        for user in list(node.users):
            user.replace_all_uses_with(flat[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not region.users:
            graph.erase_node(region)


def _drop_checks(module: fx.GraphModule) -> None:
    """Remove what computes nothing: the assertions that torch.export leaves in the graph, which hold for the original sizes only, and `x.set_()`,
    which frees the memory of what nobody reads any more (reversible blocks).
    """
    graph = module.graph
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in reversed(list(graph.nodes)):
        name = str(node.target)
        freed = _may_be(node.args[0]) if node.target is torch.ops.aten.set_.default else None
        frees = freed is not None and all(order[user] <= order[node] for same in freed for user in same.users)
        if (node.op == "call_module" and name == "_guards_fn") or (("_assert" in name or frees) and not node.users):
            graph.erase_node(node)


def _may_be(node: Any) -> Iterator[fx.Node]:
    """A node, and those before it whose answer it may hand on as it is."""
    while isinstance(node, fx.Node):
        yield node
        node = node.args[0] if node.args and node.target is not operator.getitem and not is_fresh(node) else None


def _free_views(module: fx.GraphModule) -> None:
    """A view of transposed axes holds only for the memory that the operator before them chose, and fused attention chooses by type and width.

    A reshape is that view wherever there is one.
    """
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.view.default and operator_name(node.args[0]) in ("transpose", "permute", "movedim", "swapaxes"):
            node.target = torch.ops.aten.reshape.default


def _sink_tensors(module: fx.GraphModule) -> None:
    """Fetch every tensor where it is first read: an interpreter that makes copies of them then holds few at a time."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and node.users:
            min(node.users, key=order.__getitem__).prepend(node)
    module.recompile()


def _output_names(exported: ExportedProgram) -> tuple[str, ...]:
    """'output' for a single tensor, else the path in the answer's structure: 'logits', 'features_0'."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(leaves)[0]]
    names = ["_".join(re.sub(r"\W+", "_", str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))))) for k in path) for path in paths]
    return tuple(("output" if not n else f"output_{n}" if n[0].isdigit() else n) for n in names)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _explained(error: BaseException) -> TraceError:
    """One line: what failed, in which line of the user's code, and what to change."""
    text = str(error)
    if _is_of_values(error):
        advice = "the code branches on values of tensors: use torch.where or torch.cond, or compress the part before it"
    elif "'NoneType'" in text:
        advice = "give inputs that may be left out (masks, positions) all the same: some code makes none of its own while it is traced"
    elif isinstance(error, (RuntimeError, TypeError, ValueError)) and ("shape" in text or "size" in text or "argument" in text or "channels" in text):
        advice = "check the shapes and number of the example inputs (--input on the command line)"
    else:
        advice = "make that line traceable by torch.export, or pass the submodule that can be traced"
    return TraceError(f"the model cannot be traced{_users_line(error)}: {_first_line(error)}; {advice}")


def _is_of_values(error: BaseException) -> bool:
    """Whether code asked for what a tensor holds, which torch.export does not know."""
    return "DataDependent" in type(error).__name__ or "data-dependent" in str(error)


def _users_line(error: BaseException) -> str:
    """' at file:line' of the user's code that an error comes from; nothing where there is none."""
    own = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))
    trail = [(frame.filename, frame.lineno) for frame in _frames(error)] + [(f, int(n)) for f, n, _ in own]
    user = [(f, n) for f, n in trail if "/torch/" not in f and "/structprune/" not in f and not f.startswith("<")]
    return f" at {user[-1][0]}:{user[-1][1]}" if user else ""


def _frames(error: BaseException) -> list[Any]:
    import traceback

    return list(traceback.extract_tb(error.__traceback__))
