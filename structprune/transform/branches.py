"""Branches without channels: what stays of a branch when a group in it keeps nothing, and what goes.

An answer with an axis of no entries is *void*. A layer that reads a void answer has nothing to add up, and answers its bias: a *constant*, one number
for each channel and the same at all positions. What is computed of constants alone (a batch norm, an activation, a scale) is constant too, until
it meets the answer of another branch, as in a residual addition. There a small tensor stands in for the branch, and all that led to it is gone.
From a concatenation a void answer is left out.

Whatever else would read a void answer or a constant (a softmax, a convolution that pads, the model's own answer) needs the channels: `Needed` says
which operator does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from structprune.analysis.groups import Groups
from structprune.analysis.infer import Types
from structprune.ir.axes import Atom, Keep, Shape, kept_size
from structprune.ir.graph import Graph, owners_of, shape_of, source_of, written_to
from structprune.ir.operators import functional, has_effect, is_fresh, is_random, is_view, named_arguments, operator_name
from structprune.ops import RULES, contraction, elementwise, joining, layout, normalization
from structprune.transform.reference import in_double

_SUMS = (contraction.linear, contraction.conv, contraction.conv_transpose, contraction.convolution)
_MOVING = (
    layout.permute, layout.transpose, layout.movedim, layout.unsqueeze, layout.squeeze, layout.view, layout.flatten, layout.unflatten,
    joining.slice_, joining.select, joining.roll,
)  # fmt: skip
_TO_ONE_PIXEL = frozenset({"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"})


class Needed(Exception):
    """An operator that cannot do without the channels; `node` is it."""

    def __init__(self, node: fx.Node):
        super().__init__(f"{operator_name(node) or f'the {node.op}'} needs them ({source_of(node)})")
        self.node = node


@dataclass(frozen=True)
class Folding:
    """`gone`: nodes that nothing needs any more. `stand_ins`: of nodes that stay, by their operands that go, what takes their place; None where
    nothing does, in a concatenation. `constants`: all answers that became constants.
    """

    gone: frozenset[fx.Node]
    stand_ins: Mapping[fx.Node, Mapping[fx.Node, Tensor | None]]
    constants: Mapping[fx.Node, Tensor]


def branches(graph: Graph, groups: Groups) -> dict[Atom, frozenset[Atom]]:
    """For the atom of each group that may keep nothing those that go with it, itself among them: nothing reads them any more.

    All of them may go at once.
    """
    nodes = graph.nodes
    themselves = {n: n for n in nodes}
    standing: dict[Atom, set[fx.Node]] = {g.atom: set() for g in groups}
    for node in nodes:
        for atom in groups.types.atoms(node) if node.op == "call_function" else ():
            if atom in standing:
                standing[atom].add(node)

    def folded(atoms: Iterable[Atom]) -> Folding | None:
        try:
            return fold(nodes, themselves, groups.types, dict.fromkeys(atoms, ()), graph.tensor)  # type: ignore[arg-type]
        except Needed:
            return None

    found: dict[Atom, frozenset[Atom]] = {}
    going: frozenset[Atom] = frozenset()
    for group in groups:
        alone = folded([group.atom])
        if alone is None:
            continue
        together = frozenset(atom for atom, where in standing.items() if where and where <= alone.gone) | {group.atom}
        if together <= going or folded(going | together) is not None:
            found[group.atom] = together
            going |= together
    return found


def fold(
    nodes: Sequence[fx.Node],
    originals: Mapping[fx.Node, fx.Node],
    types: Types,
    keep: Keep,
    tensor: Callable[[fx.Node], Tensor],
    answers: Mapping[fx.Node, Tensor] | None = None,
) -> Folding:
    """What becomes of the nodes of a graph, dense or small, where some atoms keep nothing. Stand-ins are in float64.

    originals: the dense node that each is a copy of, by which its axes are known. tensor: the value of a `get_attr` node.
    answers: what layers without inputs answer, [channels], by their dense node, in the place of their bias.

    Raises Needed where an operator cannot do without them.
    """
    empty_ones = void_nodes(originals.values(), types, keep)
    if not empty_ones:
        return Folding(frozenset(), {}, {})
    shapes, void = _Shapes(originals, types, keep), {n for n in nodes if originals.get(n) in empty_ones}
    live, written = _live(nodes, void), written_to(nodes)
    constants: dict[fx.Node, Tensor] = {}
    stand_ins: dict[fx.Node, Mapping[fx.Node, Tensor | None]] = {}
    for node in nodes:
        if node not in live:
            continue
        empty = [n for n in node.all_input_nodes if n in void]
        fixed = [n for n in node.all_input_nodes if n in constants]
        if not empty and not fixed:
            continue
        function = RULES.get(operator_name(node))
        if function in _SUMS and empty and not fixed:
            constants[node] = _bias(node, shapes, tensor, (answers or {}).get(originals[node]))
        elif function is joining.cat and empty and not fixed:
            stand_ins[node] = dict.fromkeys(empty)
        elif empty or function is None or not _may_be_overwritten(node, constants):
            raise Needed(node)
        elif function in _MOVING or all(n in constants or _is_of_weights(n, written) for n in node.all_input_nodes):
            constants[node] = _computed(node, shapes, constants, tensor)
        elif function is elementwise.broadcasting and any(shapes.of(n) == shapes.of(node) for n in node.all_input_nodes if n not in constants):
            stand_ins[node] = {n: constants[n] for n in fixed}
        else:
            raise Needed(node)
    needed = _live(nodes, void, {**dict.fromkeys(constants, ()), **stand_ins})
    return Folding(frozenset(n for n in nodes if n not in needed and n.op in ("call_function", "get_attr")), stand_ins, constants)


def ending_with_modules(folding: Folding, nodes: Sequence[fx.Node], originals: Mapping[fx.Node, fx.Node]) -> Folding:
    """The same, but where a branch ends in the middle of a module's forward: there its last operators stay, if they work entry by entry, on a
    constant in the place of the last module that is gone whole. The user's class can follow that.
    """
    stand_ins = dict(folding.stand_ins)
    staying: set[fx.Node] = set()
    for reader, values in folding.stand_ins.items():
        for operand in [n for n, value in values.items() if value is not None]:
            last = operand
            chain: list[fx.Node] = []
            while not _ends_a_module(last, nodes, originals, folding.gone - staying - set(chain)):
                before = [n for n in last.all_input_nodes if n in folding.constants]
                if not _works_on_any_size(last) or has_effect(last) or len(before) != 1:
                    break
                chain.append(last)
                last = before[0]
            else:
                if chain:
                    staying |= set(chain)
                    stand_ins[reader] = {n: value for n, value in stand_ins[reader].items() if n is not operand}
                    stand_ins[chain[-1]] = {last: folding.constants[last]}
    if not staying:
        return folding
    read = {n for node in staying for n in node.all_input_nodes if n not in folding.constants}
    while more := {n for node in read for n in node.all_input_nodes} - read:
        read |= more
    return Folding(folding.gone - staying - read, {node: values for node, values in stand_ins.items() if values}, folding.constants)


def _works_on_any_size(node: fx.Node) -> bool:
    """Whether a constant need not be as large as the answer for which it stands."""
    function = RULES.get(operator_name(node))
    if function is joining.slice_:
        return shape_of(node.meta["val"]) == shape_of(node.all_input_nodes[0].meta["val"])  # all of it
    return function in (elementwise.unary, elementwise.broadcasting, layout.unsqueeze)


def _ends_a_module(node: fx.Node, nodes: Iterable[fx.Node], originals: Mapping[fx.Node, fx.Node], gone: Collection[fx.Node]) -> bool:
    whole = whole_modules((originals[n] for n in nodes if n in originals), {originals[n] for n in gone if n in originals})
    return any(owner in whole for owner in owners_of(originals[node]))


def void_nodes(nodes: Iterable[fx.Node], types: Types, keep: Keep) -> set[fx.Node]:
    """Those dense nodes all of whose answers have an axis of which no entries stay."""
    widths = {atom: len(entries) for atom, entries in keep.items()}
    empty = {atom for atom, width in widths.items() if not width}
    if not empty:
        return set()
    resolve = types.solver.resolve
    return {
        n
        for n in nodes
        if not empty.isdisjoint(types.atoms(n)) and all(any(not kept_size(resolve(axis), widths) for axis in shape) for shape in types.shapes(n))
    }


class _Shapes:
    """The small sizes of what nodes answer."""

    def __init__(self, originals: Mapping[fx.Node, fx.Node], types: Types, keep: Keep):
        self._originals, self._types = originals, types
        self._widths = {atom: len(entries) for atom, entries in keep.items()}

    def axes(self, node: fx.Node) -> Shape | None:
        """None for what is no single tensor, or unknown."""
        original = self._originals.get(node)
        found = self._types.shape(original) if original is not None and original in self._types.nodes else None
        return found if isinstance(found, tuple) else None

    def of(self, node: fx.Node) -> tuple[int, ...] | None:
        axes = self.axes(node)
        return None if axes is None else tuple(kept_size(axis, self._widths) for axis in axes)


def _live(nodes: Sequence[fx.Node], void: Collection[fx.Node], cut: Mapping[fx.Node, Collection[fx.Node]] | None = None) -> set[fx.Node]:
    """What the model's answer needs, and what is written where others may read it. cut: operands that nodes no longer read; constants read none."""
    cut = cut or {}
    live: set[fx.Node] = set()
    for node in reversed(nodes):
        if node in void or (node in cut and not cut[node]):
            continue
        is_read = any(u in live and node not in cut.get(u, ()) for u in node.users)
        if is_read or node.op in ("placeholder", "output") or (has_effect(node) and not _is_its_own(node)):
            live.add(node)
    return live


def _is_its_own(node: fx.Node) -> bool:
    """Whether what a node overwrites is an answer that nobody else reads."""
    written = node.args[0] if node.args else None
    while isinstance(written, fx.Node) and written.op == "call_function" and len(written.users) == 1:
        if is_fresh(written):
            return True
        if not (has_effect(written) or is_view(written)):
            return False
        written = written.args[0]
    return False


def _may_be_overwritten(node: fx.Node, constants: Collection[fx.Node]) -> bool:
    """Whether a node that writes in place does so to no constant, or to one that nobody else reads and that need not be written to."""
    if not has_effect(node) or node.args[0] not in constants:
        return True
    return _is_its_own(node) and functional(node.target) is not None  # type: ignore[arg-type]


def _bias(node: fx.Node, shapes: _Shapes, tensor: Callable[[fx.Node], Tensor], answer: Tensor | None) -> Tensor:
    """The answer of a layer that has nothing to read, of size 1 along all axes but the channels."""
    given = named_arguments(node, node.args, node.kwargs)
    axes, weight, bias = shapes.of(node), given["weight"], given.get("bias")
    rank = len(shapes.of(weight) or ())
    if axes is None or rank < 2 or weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
        raise Needed(node)
    channels = len(shapes.of(given["input"]) or ()) - rank + 1
    values = answer if answer is not None else tensor(bias) if bias is not None else None
    if values is None:
        values = torch.zeros(axes[channels], dtype=tensor(weight).dtype, device=tensor(weight).device)
    return values.detach().double().reshape([-1 if d == channels else 1 for d in range(len(axes))])


def _computed(node: fx.Node, shapes: _Shapes, constants: Mapping[fx.Node, Tensor], tensor: Callable[[fx.Node], Tensor]) -> Tensor:
    """What an operator makes of constants, in the same form. Raises Needed where it looks at positions, or is not known to look away from them."""
    function, size = RULES.get(operator_name(node)), shapes.of(node)
    source = node.all_input_nodes[0]
    if size is None or is_random(node):
        raise Needed(node)
    if function in _MOVING:
        return _moved(node, shapes, constants[source])
    args, kwargs = _values((node.args, node.kwargs), lambda n: constants[n] if n in constants else _of_weights(n, tensor))
    if not _looks_away_from_positions(node, function, args, shapes.of(source)):
        raise Needed(node)
    with torch.no_grad():
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    fits = isinstance(value, Tensor) and value.dim() == len(size) and all(v in (1, s) for v, s in zip(value.shape, size, strict=True))
    if not fits or sum(v > 1 for v in value.shape) > 1:
        raise Needed(node)
    return value  # type: ignore[no-any-return]


def _is_of_weights(node: fx.Node, written: Collection[fx.Node]) -> bool:
    """Whether a node is a tensor of the model, or computed of such alone, and not one that the model writes to."""
    if node in written or node.op not in ("get_attr", "call_function"):
        return False
    return node.op == "get_attr" or not (has_effect(node) or is_random(node) or not all(_is_of_weights(n, written) for n in node.all_input_nodes))


def _of_weights(node: fx.Node, tensor: Callable[[fx.Node], Tensor]) -> Tensor:
    if node.op == "get_attr":
        return tensor(node).detach()
    args, kwargs = _values((node.args, node.kwargs), lambda n: _of_weights(n, tensor))
    return node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]


def _values(arguments: Any, of: Callable[[fx.Node], Tensor]) -> Any:
    """Arguments of a call in float64: copies, for it may write to them."""
    return fx.node.map_aggregate(fx.node.map_arg(arguments, lambda n: pytree.tree_map_only(Tensor, Tensor.clone, of(n))), in_double)


def _looks_away_from_positions(node: fx.Node, function: Any, args: Sequence[Any], size: Sequence[int] | None) -> bool:
    """Whether an operator answers to one position what it answers to all, wherever they are equal. size: of its first operand."""
    value: Any = args[0]
    if function in (elementwise.unary, elementwise.broadcasting):
        return operator_name(node) != "empty_like"
    if not isinstance(value, Tensor) or size is None:
        return False
    if function in (normalization.batch_norm, elementwise.prelu):
        return len(size) > 1 and value.shape[1] == size[1]
    if function in (normalization.layer_norm, normalization.rms_norm):
        return len(args[1]) == 1 and value.shape[-1] == size[-1]
    if function is normalization.mean or operator_name(node) in _TO_ONE_PIXEL:
        return True
    if function is contraction.linear:
        return value.shape[-1] == size[-1]
    if function is contraction.conv and value.dim() == args[1].dim():
        given = named_arguments(node, args, {})
        padded = given.get("padding", 0)
        unpadded = padded == "valid" or (not isinstance(padded, str) and not any(padded if isinstance(padded, (list, tuple)) else [padded]))
        return value.shape[1] == size[1] and set(args[1].shape[2:]) <= {1} and unpadded
    return False


def _moved(node: fx.Node, shapes: _Shapes, value: Tensor) -> Tensor:
    """A constant whose positions are arranged anew. Its channels are found again by their type."""
    along = [d for d, size in enumerate(value.shape) if size > 1]
    before, after = shapes.axes(node.all_input_nodes[0]), shapes.axes(node)
    if before is None or after is None:
        raise Needed(node)
    if not along:
        return value.reshape([1] * len(after))
    axis = before[along[0]]
    found = [d for d, other in enumerate(after) if other == axis]
    rolled = RULES.get(operator_name(node)) is joining.roll
    if len(found) != 1 or sum(other == axis for other in before) != 1 or (rolled and not _rolls_beside(node, found[0], len(after))):
        raise Needed(node)
    return value.reshape([-1 if d == found[0] else 1 for d in range(len(after))])


def _rolls_beside(node: fx.Node, axis: int, rank: int) -> bool:
    dims = named_arguments(node, node.args, node.kwargs).get("dims") or ()
    return bool(dims) and axis not in [d % rank for d in dims]


def whole_modules(nodes: Iterable[fx.Node], gone: Collection[fx.Node]) -> set[str]:
    """The modules, by name, of whose forward nothing is left, but for those within another of them."""
    calls = [n for n in nodes if n.op == "call_function"]
    staying = {owner for n in calls if n not in gone for owner in owners_of(n)}
    going = {owner for n in calls if n in gone for owner in owners_of(n)} - staying
    return {owner for owner in going if not any(owner.startswith(f"{other}.") for other in going)}
