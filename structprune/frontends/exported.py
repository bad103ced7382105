"""ExportedProgram → Graph: what torch.export wraps around the operators is taken off."""

from __future__ import annotations

import operator
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import predispatch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from structprune.frontends.definitions import spell_out
from structprune.frontends.standardised import fold_standardised
from structprune.frontends.unneeded import set_aside
from structprune.ir.graph import Graph, attribute, held_by, is_dynamic, is_open, note_size, sizes_in
from structprune.ir.operators import is_fresh, is_guard, operator_name
from structprune.ir.samples import copies
from structprune.ir.signature import signature_of
from structprune.ir.traced import buffers_kept

FIXED_BATCH = "the model's code fixes the first axis of an input"
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_SLICE = re.compile(r"slice\((None|-?\d+), (None|-?\d+), (None|-?\d+)\)")


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
    module = operators_of(exported)
    _drop_checks(module)
    if model is not None:
        _name_owners(module, model)
    unneeded = set_aside(module)
    names = names_in(model if model is not None else module)
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
        notes = (f"static batch: {FIXED_BATCH}",)
    if folded:
        notes += (f"weights that the model's code standardises are folded, {len(folded)} of them; {next(iter(folded))} is one",)
    taken = {*(n.name for n in placeholders), *attributes, *chain(*aliases.values())}
    _note_chosen(module, pytree.tree_leaves((args, dict(kwargs))))
    return Graph(
        module=module,
        args=args,
        kwargs=kwargs,
        exported=exported,
        aliases=aliases,
        input_names=promised.inputs if promised else tuple(n.name for n in placeholders),
        output_names=promised.outputs if promised else _output_names(exported, taken),
        dynamic=dynamic,
        doubled=doubled,
        unneeded=unneeded,
        standardised={name: of_weight.axes for name, of_weight in folded.items()},
        signature=promised,
        notes=notes,
    )


class _Noting(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        answer = super().run_node(n)
        for size, number in zip(sizes_in(n.meta.get("val")), sizes_in(answer), strict=False):
            note_size(size, number)
        return answer


def _note_chosen(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Where values decide sizes, see what they are on the example."""
    if any(is_open(size) for n in module.graph.nodes for size in sizes_in(n.meta.get("val"))):
        with torch.no_grad(), buffers_kept(module), torch.random.fork_rng(devices=[]):
            _Noting(module).run(*copies(inputs), enable_io_processing=False)


def operators_of(exported: ExportedProgram) -> fx.GraphModule:
    """The program's module with its tensors in it, and nothing around the operators but what torch.export asserts."""
    module = unlifted(exported)
    _inline_regions(module)
    spell_out(module)
    return module


def unlifted(exported: ExportedProgram) -> fx.GraphModule:
    try:
        module = exported.module(check_guards=False)
    except TypeError:  # torch < 2.10 has no guards to leave out
        module = exported.module()
    assert isinstance(module, fx.GraphModule)
    return module


def names_in(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of every tensor, by its identity."""
    names: dict[int, tuple[str, ...]] = {}
    for name, tensor in held_by(model).items():
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
    return names


def _without_vmap(exported: ExportedProgram) -> ExportedProgram:
    """The program with torch.vmap's levels resolved into operators on whole batches; itself where there are none.

    Between the calls that open and close a level, tensors hide an axis, and no node can be run or typed by itself.
    """
    if any(getattr(n.target, "__module__", "") == predispatch.__name__ for n in exported.graph.nodes):
        return exported.run_decompositions({})  # composite operators (linear, attention) stay whole outside the levels
    return exported


def _inline_regions(module: fx.GraphModule) -> None:
    """Replace regions under torch.no_grad, or with autocast switched off, by their operators.

    A detach keeps gradients out of a region as no_grad did. Regions with autocast on for the device that they run on stay as they are, unknown
    operators; where it is on for another one (for CUDA, of a model on the CPU), it does nothing.
    """
    graph = module.graph
    for node in [n for n in graph.nodes if n.target in (_GRAD_MODE, _AUTOCAST)]:
        if node.target is _GRAD_MODE:
            enabled, region, *inputs = node.args
            detached = not enabled
        else:
            device, _dtype, enabled, _cache, region, *inputs = node.args
            detached = False
        within = attribute(module, str(region.target))
        body = within.graph
        if node.target is _AUTOCAST and enabled and device in _devices(body):
            continue
        _inline_regions(within)
        mapping = dict(zip([n for n in body.nodes if n.op == "placeholder"], inputs, strict=True))
        with graph.inserting_before(node):
            outputs = graph.graph_copy(body, mapping)
            for inner in (n for n in body.nodes if n.op == "get_attr"):
                mapping[inner].target = f"{region.target}.{inner.target}"  # what it holds goes on to lie there
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


def _devices(graph: fx.Graph) -> set[str]:
    """The kinds of devices that the tensors of a graph are on."""
    return {value.device.type for n in graph.nodes if isinstance(value := n.meta.get("val"), Tensor)}


def _drop_checks(module: fx.GraphModule) -> None:
    """Remove what computes nothing: the assertions that torch.export leaves in the graph, which hold for the original sizes only, and `x.set_()`,
    which frees the memory of what nobody reads any more (reversible blocks).
    """
    graph = module.graph
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in reversed(list(graph.nodes)):
        freed = _may_be(node.args[0]) if node.target is torch.ops.aten.set_.default else None
        frees = freed is not None and all(order[user] <= order[node] for same in freed for user in same.users)
        if is_guard(node) or (("_assert" in operator_name(node) or frees) and not node.users):
            graph.erase_node(node)


def _may_be(node: Any) -> Iterator[fx.Node]:
    """A node, and those before it whose answer it may hand on as it is."""
    while isinstance(node, fx.Node):
        yield node
        node = node.args[0] if node.args and node.target is not operator.getitem and not is_fresh(node) else None


def _name_owners(module: fx.GraphModule, model: nn.Module) -> None:
    """Of a model of which one module has two names, torch says 'layers.slice(1, None, None).0' of what its code reached by `self.layers[1:]`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any("slice(" in path for path, _ in stack.values()):
            node.meta["nn_module_stack"] = {key: (_name_in(modules, path), of_class) for key, (path, of_class) in stack.items()}


def _name_in(modules: Mapping[str, nn.Module], path: str) -> str:
    """A module's name, from a path that may go through parts of containers; of such a part, the container's."""
    name: list[str] = []
    part: list[str] | None = None
    for step in path.split("."):
        cut, container = _SLICE.fullmatch(step), modules.get(".".join(name))
        if cut and container is not None:
            keys = part if part is not None else list(container._modules)
            part = keys[slice(*(None if n == "None" else int(n) for n in cut.groups()))]
        else:
            name.append(part[int(step)] if part is not None and isinstance(container, nn.ModuleList) else step)  # a part of a list counts anew
            part = None
    return ".".join(name)


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


def _output_names(exported: ExportedProgram, taken: Container[str]) -> tuple[str, ...]:
    """'output' for a single tensor, else the path in the answer's structure: 'logits', 'features_0'; with 'output_' before it where that is taken."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(leaves)[0]]
    names = ["_".join(re.sub(r"\W+", "_", str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))))) for k in path) for path in paths]
    found: dict[str, None] = {}
    for name in names:
        name = "output" if not name else f"output_{name}" if name[0].isdigit() or name in taken else name
        while name in found or name in taken:
            name += "_"
        found[name] = None
    return tuple(found)
