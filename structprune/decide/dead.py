"""Channels that contribute nothing, and how they are taken out so that the answer stays the same.

A group's channel may go if, wherever an operator reads across the group, what it reads of that channel is known to be zero, or does not matter to the
answer (`decide/influence.py` proves both from the weights), or can be moved elsewhere first:

    constants   a channel that is the same number everywhere: a layer without padding that reads it adds it to its bias, or takes it from the running
                mean of the batch norm that follows
    twins       two channels that are always equal: the layers that read them add the weights of one to those of the other

Both change weights, so this works on a copy. It is repeated until nothing is found any more: a layer without readers leaves its own inputs
without readers. A channel that is dead in one layer of a residual stream and alive in another stays. Means and norms over channels count them,
so their channels stay; and so do hidden units of recurrent layers. A branch all of whose channels are dead goes whole (transform/branches.py).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from structprune.analysis.groups import Groups
from structprune.calibrate.readers import Reader, readers, shift_of, takes_a_shift
from structprune.decide.influence import Influence, Known, influence
from structprune.decide.plan import described_inputs, planned
from structprune.errors import PlanError
from structprune.ir.axes import Atom, Axis, Shape, positions
from structprune.ir.graph import Graph, attribute
from structprune.ir.operators import is_random, operator_name
from structprune.ir.plan import Plan
from structprune.ops import RULES, contraction, elementwise, joining, layout, normalization, recurrent, spatial
from structprune.transform.branches import branches

TARGET = "dead"
_ROUNDS = 20
_EXACT = 1e-9  # of the answer: sums in another order, in float64
_ROUNDED, _COARSE = 64, 0.02  # epsilons of the weights' type, and never more than this
_SUMS = (
    contraction.linear, contraction.conv, contraction.conv_transpose, contraction.convolution, contraction.matmul, contraction.addmm,
    contraction.einsum, contraction.attention, normalization.total,
)  # fmt: skip
_KEEPING = frozenset({layout.__name__, joining.__name__, elementwise.__name__, spatial.__name__})  # none reads across an axis that may be pruned
_SAME = 1e-12  # of the largest: constants that differ by rounding


@dataclass
class Dead:
    """`channels`: of each group, true where a channel contributes nothing. How many were moved first, by the group's name: `constants`, `twins`.

    `stuck`: of each group how many channels are constants that cannot be moved, behind a convolution with padding say, and so stay.
    `whole`: the groups that keep nothing, for what they stand in is a branch; of others the first channel stays.
    """

    channels: dict[str, np.ndarray]
    constants: dict[str, int] = field(default_factory=dict)
    twins: dict[str, int] = field(default_factory=dict)
    stuck: dict[str, int] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    constant: bool = False  # the whole answer is: no weight on the way to it lets the inputs through

    @property
    def edited(self) -> bool:
        """Whether weights were changed before channels went."""
        return bool(self.constants or self.twins)

    def plan(self, graph: Graph, groups: Groups, ignore: Sequence[str] = ()) -> Plan:
        """Every group keeps what is alive; where nothing is, and it is no branch that can go whole, the first channel."""
        keep = {g.atom: np.flatnonzero(~self.channels[g.name]) for g in groups}
        keep |= {g.atom: np.zeros(1, dtype=np.int64) for g in groups if not len(keep[g.atom]) and g.name not in self.whole}
        return planned(groups, keep, inputs=described_inputs(graph.args, graph.kwargs), target=TARGET, criterion=TARGET, ignore=tuple(ignore))

    def must_hold(self, plan: Plan) -> None:
        """Raise PlanError where a plan removes a channel that is alive."""
        for group in plan.groups:
            alive = np.flatnonzero(~self.channels[group.name]).tolist() if group.name in self.channels else []
            lost = sorted(set(alive).difference(group.keep))
            if lost:
                raise PlanError(
                    f"{group.name}: channel {lost[0]} is not dead in this model; it has other weights than the one that the plan was made for"
                )

    def tolerance(self, eps: float) -> float:
        """How far the answer may be from the original's, as a share of it. eps: of the type in which changed weights, or what stands in for branches,
        were rounded.
        """
        return min(_ROUNDED * eps, _COARSE) if self.edited or self.whole else _EXACT

    def notes(self) -> list[str]:
        """What a user should know about channels that stay."""
        empty = [name for name, channels in self.channels.items() if channels.all() and name not in self.whole]
        return [
            *(["the answer does not depend on the inputs: some layer lets nothing through; are these the trained weights?"] if self.constant else []),
            *(f"{name}: all channels are dead, and one stays" for name in empty),
            *(
                f"{name}: {number} channels are constants, and stay: a layer that reads them cannot take them up"
                for name, number in self.stuck.items()
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for the report."""
        removed = {name: int(channels.sum()) - bool(channels.all() and name not in self.whole) for name, channels in self.channels.items()}
        return {"channels": {n: k for n, k in removed.items() if k}, "constants": self.constants, "twins": self.twins, "stuck": self.stuck}


@torch.no_grad()
def silence(graph: Graph, groups: Groups) -> Dead:
    """Find the dead channels of `graph`, and edit its weights, in place, until they contribute nothing. Its answer stays the same to rounding."""
    dead = Dead({g.name: np.zeros(g.size, dtype=bool) for g in groups})
    for _ in range(_ROUNDS):
        view = _View(graph, groups)
        dead.constant = view.answers_alike()
        changed = False
        found: dict[Atom, np.ndarray] = {}
        for group in groups:
            free, movable, stuck = view.removable(group.atom)
            changed |= bool((free & ~dead.channels[group.name]).any()) or bool(movable.any())
            dead.channels[group.name] = free | movable
            found[group.atom] = free | movable
            _count(dead.constants, group.name, movable)
            dead.stuck.pop(group.name, None)
            _count(dead.stuck, group.name, stuck)
        view.fold_constants(found)
        for group in groups:
            twins = view.merge_twins(group.atom, found[group.atom])
            changed |= bool(twins.any())
            _count(dead.twins, group.name, twins)
        if not changed:
            break
    going = branches(graph, groups)
    dead.whole = frozenset(g.name for g in groups if g.atom in going and dead.channels[g.name].all())
    return dead


def _count(counts: dict[str, int], name: str, channels: np.ndarray) -> None:
    if channels.any():
        counts[name] = counts.get(name, 0) + int(channels.sum())


@dataclass(frozen=True)
class _Edge:
    """A node that reads across an atom of one operand."""

    node: fx.Node
    operand: fx.Node


class _View:
    """One round: what the weights, as they are now, say of every group."""

    def __init__(self, graph: Graph, groups: Groups):
        self.graph, self.types = graph, groups.types
        self.flow: Influence = influence(graph)
        self.readers: Mapping[fx.Node, Reader] = readers(graph)
        self.shapes: dict[fx.Node, list[Shape]] = {
            n: [tuple(map(self.types.solver.resolve, shape)) for shape in self.types.shapes(n)] for n in graph.nodes
        }
        self.reads: dict[fx.Node, set[Atom]] = {}
        self.edges: dict[Atom, list[_Edge]] = {}
        self.barred: set[Atom] = set()  # read in a way that is not looked into
        for reading in self.types.readings:
            atoms = set(self.types.solver.atoms(reading.axis))
            self.reads.setdefault(reading.node, set()).update(atoms)
            if reading.how != "sum":
                self.barred |= atoms
        for node in graph.nodes:
            self._look_at(node)

    def _look_at(self, node: fx.Node) -> None:
        if node in self.flow.opaque:
            self.barred |= self.types.atoms(node)
        if node.op != "call_function" or not self.shapes[node]:
            return
        rule = RULES.get(operator_name(node))
        mine, read = self.types.atoms(node), self.reads.get(node, set())
        given: set[Atom] = set().union(*(self.types.atoms(n) for n in node.all_input_nodes))
        if node.target is not operator.getitem and (rule is None or rule.__module__ not in _KEEPING):
            self.barred |= given - mine - read
        if rule not in _SUMS:
            self.barred |= read & mine
        if rule is not None and rule.__module__ == recurrent.__name__:
            self.barred |= mine
        for atom in read:
            self._add_edges(node, atom)

    def _add_edges(self, node: fx.Node, atom: Atom) -> None:
        rule = RULES.get(operator_name(node))
        operands = [n for n in node.all_input_nodes if atom in self.types.atoms(n)]
        if rule in _SUMS:  # a product is nothing where one factor is: the other counts in what is needed of the first
            first = operands[0] if rule is contraction.einsum else node.args[1 if rule is contraction.addmm else 0]
            operands = [n for n in operands if n is first]
            parameters = [n for n in operands if n.op == "get_attr"]
        else:
            parameters = [n for n in operands if n.op == "get_attr" and rule is not None and rule.__module__ != recurrent.__name__]
        if not operands or parameters:
            self.barred.add(atom)
        self.edges.setdefault(atom, []).extend(_Edge(node, self.flow.reads[node][n]) for n in operands if n.op != "get_attr")

    def answers_alike(self) -> bool:
        """Whether the model's answer is the same for all inputs."""
        answers = [n for node in self.graph.nodes if node.op == "output" for n in node.all_input_nodes]
        known = [k for n in answers for k in (self.flow.known[n] if isinstance(self.flow.known[n], list) else [self.flow.known[n]])]
        return all(k.unknown is None for k in known if isinstance(k, Known))

    # --- what may go ----------------------------------------------------------------------------------------------------------

    def removable(self, atom: Atom) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which channels contribute nothing; which others would not, were they added to biases; and which are constants that cannot be."""
        alive, constant, fixed = (np.zeros(atom.size, dtype=bool) for _ in range(3))
        if atom in self.barred:
            return alive, constant, fixed
        for edge in self.edges.get(atom, ()):
            needed = self.flow.needed.get((edge.node, edge.operand))
            if needed is None:
                continue
            known: Known = self.flow.known[edge.operand]
            shape = self.shapes[edge.operand][0]
            if known.unknown is not None:
                alive |= _any(needed & known.unknown, shape, atom)
                needed = needed & ~known.unknown
            loud = _any(needed & (known.value != 0), shape, atom)
            constant |= loud
            if loud.any():
                fixed |= loud & ~self._movable(edge, known, shape, atom)
        return ~alive & ~constant, ~alive & constant & ~fixed, ~alive & fixed

    def _movable(self, edge: _Edge, known: Known, shape: Shape, atom: Atom) -> np.ndarray:
        """Of which channels a reader can take the constant into its bias: one number at every position, and none outside."""
        reader = self.readers.get(edge.node)
        nothing = np.zeros(atom.size, dtype=bool)
        if reader is None or reader.kind == "transposed" or any(reader.padding) or not takes_a_shift(reader):
            return nothing
        axis = _channel_axis(reader, len(shape))
        if any(positions(a, atom) for d, a in enumerate(shape) if d != axis):
            return nothing
        values = known.value.movedim(axis, 0).flatten(1)
        varies = values.amax(1) - values.amin(1) > _SAME * values.abs().amax(1)
        if known.unknown is not None:
            varies |= known.unknown.movedim(axis, 0).flatten(1).any(1)
        return ~_gathered(varies, shape[axis], atom)

    # --- moving ---------------------------------------------------------------------------------------------------------------

    def fold_constants(self, dead: Mapping[Atom, np.ndarray]) -> None:
        """Give each reader what its dead inputs add to its answer as a bias, and weights of zero for them."""
        for reader in self.readers.values():
            operand = self.flow.reads[reader.node][reader.input]
            shape, weight_axis = self.shapes[operand][0], self.shapes[reader.weight][0][reader.input_axis]
            axis = _channel_axis(reader, len(shape))
            gone, columns = _marked(shape[axis], dead), _marked(weight_axis, dead)
            if not columns.any():
                continue
            weight: Tensor = attribute(self.graph.module, str(reader.weight.target))
            known: Known = self.flow.known[operand]
            needed = self.flow.needed.get((reader.node, operand))
            if needed is not None and needed.numel():
                constant = torch.as_tensor(gone) & (needed & (known.value != 0)).movedim(axis, 0).flatten(1).any(1)
                values = torch.where(constant, known.value.movedim(axis, 0).flatten(1)[:, 0], 0.0)
                if values.any():
                    shift = shift_of(reader, self.graph.module)
                    assert shift is not None
                    shift(_response(reader, weight, values))
            weight.index_fill_(reader.input_axis, torch.as_tensor(np.flatnonzero(columns)), 0)

    def merge_twins(self, atom: Atom, dead: np.ndarray) -> np.ndarray:
        """Let one of several equal channels speak for all: readers add up their weights. Which channels have become silent by that."""
        silent = np.zeros(atom.size, dtype=bool)
        edges = self.edges.get(atom, ())
        own = [self.readers.get(e.node) for e in edges]
        if atom in self.barred or not edges or any(r is None or r.kind == "transposed" for r in own):
            return silent
        labels = self._labels(atom)
        if labels is None:
            return silent
        twins: dict[int, list[int]] = {}
        for channel in np.flatnonzero(~dead):
            twins.setdefault(int(labels[channel]), []).append(int(channel))
        pairs = [(first, other) for first, *others in twins.values() for other in others]
        if not pairs:
            return silent
        for reader in own:
            assert reader is not None
            (at,) = positions(self.shapes[reader.weight][0][reader.input_axis], atom)
            weight: Tensor = attribute(self.graph.module, str(reader.weight.target))
            columns = weight.double().movedim(reader.input_axis, 0)
            for first, other in pairs:
                mine, theirs = torch.as_tensor(np.flatnonzero(at == first)), torch.as_tensor(np.flatnonzero(at == other))
                columns[mine] += columns[theirs]
                columns[theirs] = 0
            weight.copy_(columns.movedim(0, reader.input_axis).to(weight.dtype))
        silent[[other for _, other in pairs]] = True
        return silent

    def _labels(self, atom: Atom) -> np.ndarray | None:
        """Equal numbers for channels that are equal in every answer that has them; None where that is not known."""
        labels: dict[fx.Node, np.ndarray] = {}
        for node in self.graph.nodes:
            if atom not in self.types.atoms(node):
                continue
            twice = any(sum(len(positions(axis, atom)) for axis in shape) > 1 for shape in self.shapes[node])
            if twice or atom in self.reads.get(node, ()) or is_random(node):
                return None
            known = self.flow.known[node]
            if isinstance(known, Known) and known.unknown is None:
                labels[node] = _labelled(known.value, self.shapes[node][0], atom)
                continue
            operands = [n for n in node.all_input_nodes if n in labels]
            if operands:
                labels[node] = _combined([labels[n] for n in operands])
            elif RULES.get(operator_name(node)) is layout.expand:
                labels[node] = np.zeros(atom.size, dtype=np.int64)
            else:
                return None
        answers = [found for node, found in labels.items() if node.op == "call_function"]
        return _combined(answers) if answers else None


# --- axes and entries -----------------------------------------------------------------------------------------------------------


def _channel_axis(reader: Reader, rank: int) -> int:
    """Of a reader's input."""
    return rank - 1 - reader.rank


def _gathered(along: Tensor, axis: Axis, atom: Atom) -> np.ndarray:
    """Marks on the entries of an axis -> the channels of an atom that stand on one of them."""
    found = np.zeros(atom.size, dtype=bool)
    for at in positions(axis, atom):
        inside = at >= 0
        np.logical_or.at(found, at[inside], along.numpy()[inside])
    return found


def _any(marks: Tensor, shape: Sequence[Axis], atom: Atom) -> np.ndarray:
    """The channels of an atom with a mark on any entry of theirs."""
    found = np.zeros(atom.size, dtype=bool)
    for dim, axis in enumerate(shape):
        if positions(axis, atom):
            found |= _gathered(marks.movedim(dim, 0).flatten(1).any(1), axis, atom)
    return found


def _marked(axis: Axis, channels: Mapping[Atom, np.ndarray]) -> np.ndarray:
    """The entries of an axis that stand on a marked channel of some atom."""
    found = np.zeros(axis.size, dtype=bool)
    for atom, marked in channels.items():
        for at in positions(axis, atom) if marked.any() else ():
            found |= (at >= 0) & marked[at]
    return found


def _response(reader: Reader, weight: Tensor, values: Tensor) -> Tensor:
    """What a reader adds to each of its outputs for inputs that are the same numbers at every position: [groups · outputs]."""
    wide = weight.double().flatten(2).sum(2) if reader.rank else weight.double() if reader.kind == "linear" else weight.double().T
    if reader.groups == 1:
        return wide @ values
    return torch.einsum("goi,gi->go", wide.reshape(reader.groups, -1, wide.shape[1]), values.reshape(reader.groups, -1)).flatten()


def _labelled(value: Tensor, shape: Sequence[Axis], atom: Atom) -> np.ndarray:
    """Equal numbers for equal slices."""
    dim, at = next((d, found[0]) for d, axis in enumerate(shape) if (found := positions(axis, atom)))
    slices = value.movedim(dim, 0)
    seen: dict[bytes, int] = {}
    rows = (slices[torch.as_tensor(np.flatnonzero(at == channel))].contiguous().numpy().tobytes() for channel in range(atom.size))
    return np.array([seen.setdefault(row, len(seen)) for row in rows])


def _combined(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Equal numbers where all of several are equal."""
    return np.unique(np.stack(labels), axis=1, return_inverse=True)[1].ravel()  # type: ignore[no-any-return]
