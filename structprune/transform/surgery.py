"""Plan → a physically smaller graph: tensors are sliced, and literal sizes in the graph written anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from structprune.analysis.infer import Types
from structprune.errors import PlanError
from structprune.ir.axes import Atom, Axis, Keep, Product, Shape, kept_entries
from structprune.ir.graph import Graph, owners_of
from structprune.ir.operators import functional, has_effect, operator_name
from structprune.ir.plan import Cut
from structprune.ir.traced import TracedModule
from structprune.ops import RESIZERS
from structprune.ops.rules import Literals, Resize
from structprune.transform.branches import Folding, Needed, ending_with_modules, fold, void_nodes, whole_modules

CONSTANT = "constant"  # how a stand-in is called in its module
ORIGINAL = "original"  # in the meta of a small node: the name of the dense one that it is a copy of


@dataclass(frozen=True)
class StandIn:
    """What is left of a branch without channels: the parameter `name`, which the small node `reader` reads in the place of the branch's answer.

    `branch`: the dense node of that answer. `module`: the name of the user's module that gave it; None where some part of it is still needed.
    `exact`: the value before it was rounded to the type of the model, in float64.
    """

    name: str
    branch: fx.Node
    module: str | None
    reader: fx.Node
    exact: Tensor


@dataclass(frozen=True)
class Surgery:
    """The small graph as a module; the small tensors by the identity of the old; which numbers changed where; whose copy a small node is; what
    stands in for branches that are gone; and the user's modules of whose forward nothing is left.
    """

    module: TracedModule
    tensors: Mapping[int, Tensor]
    literals: Literals
    originals: Mapping[fx.Node, fx.Node]
    stand_ins: tuple[StandIn, ...] = ()
    gone: frozenset[str] = frozenset()


def operate(graph: Graph, types: Types, keep: Keep, cuts: Mapping[str, Cut], answers: Mapping[fx.Node, Tensor] | None = None) -> Surgery:
    """Build the small model. Tensors with a name follow `cuts`, constants of the graph their types; nothing of `graph` changes.

    answers: see `branches.fold`. Raises PlanError where a group keeps nothing and some operator cannot do without it.
    """
    fresh, originals = _copied(graph)
    tensors = {str(n.target): graph.tensor(n) for n in graph.nodes if n.op == "get_attr"}
    sliced = _small_tensors(graph, types, keep, cuts)
    held: dict[str, Any] = {name: sliced.get(id(value), value) for name, value in tensors.items()}

    def kept(value: Any) -> Any:
        return _Kept(types.shape(originals[value]), keep)

    def constant(value: Any) -> Tensor | None:
        return graph.constant(originals.get(value))

    def add_constant(before: fx.Node, value: Tensor) -> fx.Node:
        name = f"_constant_{len(held)}"
        held[name] = value
        with fresh.inserting_before(before):
            return fresh.get_attr(name)

    resize = Resize(kept, constant, add_constant)
    void = void_nodes(graph.nodes, types, keep)
    for node in list(fresh.nodes):
        resizer = RESIZERS.get(operator_name(node))
        if (
            resizer is not None
            and originals[node] not in void
            and originals[node] not in types.constants
            and any(not types.atoms(originals[n]).isdisjoint(keep) for n in (node, *node.all_input_nodes) if n in originals)
        ):
            resizer(resize, node)
    for node in [n for n, old in originals.items() if old in types.constants]:
        _cut_for_readers(node, types.shape(originals[node]), keep, [u for u in node.users if originals.get(u) not in types.constants], add_constant)
    try:
        nodes = list(fresh.nodes)
        folding = ending_with_modules(fold(nodes, originals, types, keep, lambda n: held[str(n.target)], answers), nodes, originals)
    except Needed as needed:
        raise PlanError(f"a group keeps no channels, but {needed}") from needed
    gone = whole_modules(graph.nodes, {originals[n] for n in folding.gone if n in originals}) if folding.gone else set()
    literals = {originals[n]: changes for n, changes in resize.literals.items()}
    stand_ins = _fold(fresh, folding, gone, originals, held)
    fresh.eliminate_dead_code(has_effect)
    fresh.lint()
    return Surgery(traced_module(held, fresh), sliced, literals, originals, stand_ins, frozenset(gone))


def _fold(
    graph: fx.Graph, folding: Folding, modules: Collection[str], originals: dict[fx.Node, fx.Node], held: dict[str, Any]
) -> tuple[StandIn, ...]:
    """Put stand-ins in the place of branches, and take out, of the graph and of `held`, what nothing needs any more.

    modules: those that are gone, each of which is to hold the stand-in for its answer.
    """
    found = []
    learns = any(isinstance(p := held[str(n.target)], nn.Parameter) and p.requires_grad for n in folding.gone if n.op == "get_attr")
    for node, values in folding.stand_ins.items():
        if has_effect(node) and node.args[0] in values:  # there is no memory of a branch to write to
            node.target = functional(node.target)  # type: ignore[assignment, arg-type]  # `fold` has seen that there is one
        for operand, value in values.items():
            if value is None:
                node.args = ([n for n in node.args[0] if n is not operand], *node.args[1:])  # type: ignore[union-attr]
                continue
            owners = owners_of(originals[operand])
            module = next((owner for owner in owners if owner in modules), None)
            name, dtype = _free_name(module or next(iter(owners), ""), held), operand.meta["val"].dtype
            held[name] = nn.Parameter(value.to(dtype), learns and dtype.is_floating_point)
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            constant.meta["val"] = held[name].detach()
            node.replace_input_with(operand, constant)
            found.append(StandIn(name, originals[operand], module, node, value))
    names = {str(n.target) for n in folding.gone if n.op == "get_attr"}
    for node in reversed(list(graph.nodes)):
        if node in folding.gone:
            graph.erase_node(node)
            originals.pop(node, None)
    for name in names - {str(n.target) for n in graph.nodes if n.op == "get_attr"}:
        del held[name]
    return tuple(found)


def _free_name(module: str, held: Mapping[str, Any]) -> str:
    """Of a stand-in that the module is to hold."""
    name = f"{module}.{CONSTANT}" if module else CONSTANT
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(1))) if n not in held)


def _cut_for_readers(node: fx.Node, shape: Any, keep: Keep, readers: Sequence[fx.Node], add_constant: Callable[[fx.Node, Tensor], fx.Node]) -> None:
    """What computes a constant stays as it is; who reads it reads the kept entries alone."""
    cut = _cut_of(shape, keep).keep if readers and isinstance(shape, tuple) else {}
    value = node
    for dim, kept in cut.items():
        index = add_constant(value.next, torch.tensor(kept))
        with node.graph.inserting_after(index):
            value = node.graph.call_function(torch.ops.aten.index_select.default, (value, dim, index))
    for reader in readers if cut else ():
        reader.replace_input_with(node, value)


def _copied(graph: Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the traced graph, with its calling convention, and the original of each of its nodes."""
    fresh = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = fresh.graph_copy(graph.module.graph, copies, return_output_node=True)
    assert output is not None
    fresh.output(output[0])
    fresh._codegen = copy.deepcopy(graph.module.graph._codegen)
    for old, new in copies.items():
        new.meta[ORIGINAL] = old.name
    return fresh, {new: old for old, new in copies.items()}


def _small_tensors(graph: Graph, types: Types, keep: Keep, cuts: Mapping[str, Cut]) -> dict[int, Tensor]:
    """The sliced tensors, by the identity of the original ones: a tensor under two names stays one."""
    sliced: dict[int, Tensor] = {}
    for node in graph.whole:
        tensor = graph.tensor(node) if node.op == "get_attr" and node not in types.constants else None
        if isinstance(tensor, Tensor) and id(tensor) not in sliced:
            names = graph.aliases.get(str(node.target))
            sliced[id(tensor)] = _sliced(tensor, cuts.get(names[0]) if names else _cut_of(types.shape(node), keep))
    return sliced


def traced_module(held: Mapping[str, Any], graph: fx.Graph) -> TracedModule:
    """A module that runs `graph` over the tensors in `held`, in evaluation mode."""
    root = nn.Module().eval()
    for name, value in held.items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        elif isinstance(value, Tensor):
            owner.register_buffer(leaf, value)
        else:
            setattr(owner, leaf, value)
    return TracedModule(root, graph).eval()  # type: ignore[return-value]


class _Kept:
    """kept[dim]: the entries that stay of an axis, worked out when asked for."""

    def __init__(self, shape: Any, keep: Keep):
        self._shape, self._keep = shape, keep

    def __getitem__(self, index: int) -> Any:
        if isinstance(self._shape, list):
            return _Kept(self._shape[index], self._keep)
        return kept_entries(self._shape[index], self._keep)

    def __len__(self) -> int:
        return len(self._shape)


def kept_part(value: Tensor, shape: Shape, keep: Keep) -> Tensor:
    """The entries of a dense tensor with these axes that stay."""
    for dim, axis in enumerate(shape):
        if _touched(axis, keep):
            value = value.index_select(dim, torch.as_tensor(kept_entries(axis, keep), device=value.device))
    return value


def _cut_of(shape: Any, keep: Keep) -> Cut:
    return Cut(tuple(a.size for a in shape), {d: tuple(kept_entries(a, keep).tolist()) for d, a in enumerate(shape) if _touched(a, keep)})


def _sliced(tensor: Tensor, cut: Cut | None) -> Tensor:
    """A copy of the kept entries; parameters stay parameters, with their requires_grad."""
    value = tensor.detach()
    for dim, keep in (cut.keep if cut else {}).items():
        value = value.index_select(dim, torch.as_tensor(np.asarray(keep, dtype=np.int64), device=value.device))
    if value.data_ptr() == tensor.data_ptr():
        value = value.clone()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _touched(axis: Axis, keep: Keep) -> bool:
    if isinstance(axis, Atom):
        return axis in keep
    return any(_touched(part, keep) for part in (axis.factors if isinstance(axis, Product) else axis.terms))
