"""Types → groups: which atoms are free, where they stand, what they are called."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Parameter

from structprune import notebook
from structprune.analysis.infer import Types, infer
from structprune.analysis.silence import read_where_loud
from structprune.errors import InputError, did_you_mean
from structprune.ir.axes import Atom, Reason, Shape, kept_size
from structprune.ir.graph import Graph, owners_of, source_of
from structprune.ir.group import Frozen, Group, Member
from structprune.ir.operators import operator_name

_MUCH = 0.2  # of the multiply-accumulates


@dataclass(frozen=True)
class Groups:
    """All that a decision needs to know of a model: groups, what is frozen, and the model's cost in their widths."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    axes: Mapping[str, Shape]  # the type of every named parameter and buffer
    parameters: frozenset[str]  # which of these names are parameters, each tensor once
    work: tuple[Shape, ...]  # multiply-accumulates: for each operator the axes whose sizes multiply
    batch: Mapping[Atom, int]  # the batch of the user's example, where tracing needed a larger one
    types: Types = field(repr=False)  # what inference found for every node: surgery and verification go by it

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        return next(g for g in self.groups if g.name == name)

    def macs(self, widths: Mapping[Atom, int] | None = None) -> int:
        """Multiply-accumulates of one call on the example inputs, when each atom keeps `widths[atom]` entries."""
        sizes = {**self.batch, **(widths or {})}
        return sum(_volume(axes, sizes) for axes in self.work)

    def params(self, widths: Mapping[Atom, int] | None = None) -> int:
        """Number of parameters, when each atom keeps `widths[atom]` entries."""
        return sum(_volume(self.axes[name], widths or {}) for name in self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "params": self.params(),
            "macs": self.macs(),
            "groups": [
                {"name": g.name, "channels": g.size, "exact": g.exact, "members": [{"tensor": m.tensor, "dim": m.dim} for m in g.members]}
                for g in self.groups
            ],
            "frozen": [{"name": f.name, "channels": f.channels, "reason": f.reason, "at": f.at} for f in self.frozen],
        }

    def _repr_html_(self) -> str:
        title = f"{len(self)} groups of coupled channels; {self.params():,} parameters, {self.macs():,} multiply-accumulates"
        free = notebook.table(title, ("group", "channels", "in"), [(g.name, g.size, notebook.standing(g.members)) for g in self])
        stay = [(f.name, f.channels, f.reason, f.at) for f in self.frozen]
        return free + notebook.table(f"{len(stay)} frozen axes", ("frozen", "channels", "reason", "source"), stay)

    def __str__(self) -> str:
        """The stable text form: every group with its members, then what is frozen."""
        lines = []
        for group in self.groups:
            note = "" if group.exact else f"   inexact: {group.reason}"
            lines.append(f"{group.name}  {group.size}{note}")
            lines.extend(f"    {m.tensor}[{m.dim}] = {self.axes[m.tensor][m.dim]}" for m in group.members)
        lines.extend(f"frozen {f.name}  {f.channels}  {f.reason}" for f in self.frozen)
        return "\n".join(lines)


def find_groups(graph: Graph, ignore: Iterable[str] = ()) -> Groups:
    """Infer axis types and name the groups.

    ignore: names or shell patterns of modules, whose answers keep all channels, or of tensors. Raises InputError for one that
    matches nothing.
    """
    types = infer(graph)
    named = _named_shapes(graph, types)
    for pattern in ignore:
        _ignore(graph, types, named, pattern)
    axes = {name: tuple(map(types.solver.resolve, shape)) for name, shape in named.items()}
    members: dict[Atom, list[Member]] = {}
    for name, shape in axes.items():
        for dim, axis in enumerate(shape):
            for atom in dict.fromkeys(types.solver.atoms(axis)):
                members.setdefault(atom, []).append(Member(name, dim))
    loud = read_where_loud(graph, types)
    inexact = (
        _inexact(types)
        | _standardised(graph, types)
        | {
            atom: f"{operator_name(node)} sums over these channels, and they are not zero where they are removed"
            for atom, node in loud["sum"].items()
        }
    )
    work = tuple(tuple(map(types.solver.resolve, w.axes)) for w in types.work)
    _keep_unread_entries(graph, types, members)
    _keep_unneeded(graph, types)
    _keep_tables(types, work)
    for how in ("mean", "variance"):
        for atom, node in loud[how].items():
            types.solver.freeze(atom, Reason(f"a {how} over these channels, which are not zero where they are removed", source_of(node)))
    names = _Names()
    groups, frozen = [], []
    for atom, where in members.items():
        reason = types.solver.reason(atom)
        if reason is None:
            groups.append(Group(names.of(where), atom, tuple(where), atom not in inexact, inexact.get(atom, "")))
        elif any(m.dim < 2 for m in where):  # kernel windows are no channels
            frozen.append(Frozen(_owner(where), atom.size, reason.why, reason.at, tuple(where), atom))
    return Groups(
        groups=tuple(groups),
        frozen=tuple(frozen),
        axes=axes,
        parameters=frozenset(graph.aliases[str(n.target)][0] for n in graph.nodes if n.op == "get_attr" and isinstance(graph.tensor(n), Parameter)),
        work=work,
        batch=_batch(graph, types) if graph.doubled else {},
        types=types,
    )


def names_of(tensors: Iterable[str]) -> list[str]:
    """The names of tensors and of all modules that they lie in: what a user may have meant."""
    parts = (tensor.split(".") for tensor in tensors)
    return list(dict.fromkeys(".".join(path[:depth]) for path in parts for depth in range(len(path), 0, -1)))


def _ignore(graph: Graph, types: Types, named: Mapping[str, Shape], pattern: str) -> None:
    """Freeze what a module computes, its inputs aside, or the axes of a tensor."""
    shapes = [shape for n in graph.nodes if any(fnmatchcase(o, pattern) for o in owners_of(n)) for shape in types.shapes(n)]
    if not shapes:
        shapes = [shape for name, shape in named.items() if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
    if not shapes:
        close = did_you_mean(pattern, names_of(named))
        raise InputError(f"ignore={pattern!r} matches no module or tensor of the model{close}; names look like {next(iter(named), '?')!r}")
    for shape in shapes:
        for axis in shape:
            types.solver.freeze(axis, Reason("ignored", pattern))


def _keep_unread_entries(graph: Graph, types: Types, members: Mapping[Atom, list[Member]]) -> None:
    """Freeze what stands in one tensor (by whatever names) and is part of no product and no sum: rows of a table of positions beyond the example's
    length.
    """
    first = {name: names[0] for names in graph.aliases.values() for name in names}
    axes = itertools.chain((axis for w in types.work for axis in w.axes), (reading.axis for reading in types.readings))
    read = {atom for axis in axes for atom in types.solver.atoms(axis)}
    for atom, where in members.items():
        if atom not in read and len({(first.get(member.tensor, member.tensor), member.dim) for member in where}) == 1:
            types.solver.freeze(atom, Reason("entries that the example does not reach"))


def _keep_unneeded(graph: Graph, types: Types) -> None:
    """Freeze what stands in layers alone whose answer nobody needs."""
    needed = {atom for node in graph.nodes for atom in types.atoms(node)}
    for node in graph.unneeded.nodes:
        for atom in types.atoms(node) - needed:
            types.solver.freeze(atom, Reason("no output of the model needs these channels", source_of(node)))


def _keep_tables(types: Types, work: Sequence[Shape]) -> None:
    """Freeze what a table that the code computes (sines of positions) stands on, unless much of the model's work depends on it.

    The table of the user's own class keeps its size: to cut it is to give the class up.
    """
    depends: Counter[Atom] = Counter()
    for axes in work:
        depends.update(dict.fromkeys((atom for axis in axes for atom in types.solver.atoms(axis)), _volume(axes, {})))
    much = _MUCH * sum(_volume(axes, {}) for axes in work)
    for node in types.constants:
        if any(user not in types.constants for user in node.users):
            for atom in types.atoms(node):
                if depends[atom] < much:
                    types.solver.freeze(atom, Reason("stands on a table that the code computes", source_of(node)))


def _named_shapes(graph: Graph, types: Types) -> dict[str, Shape]:
    return {
        name: types.nodes[node]
        for node in graph.whole
        if node.op == "get_attr" and node in types.nodes
        for name in graph.aliases.get(str(node.target), ())
    }


def _batch(graph: Graph, types: Types) -> dict[Atom, int]:
    """The atoms of the inputs' first axes, which the example had one entry of."""
    shapes = [types.shape(n) for n in graph.nodes if n.op == "placeholder" and isinstance(types.nodes[n], tuple)]
    return {shape[0]: 1 for shape in shapes if shape and isinstance(shape[0], Atom) and shape[0].size == 2}


def _inexact(types: Types) -> dict[Atom, str]:
    """Atoms over which an operator takes a mean or norm that a zero is not neutral for."""
    found: dict[Atom, str] = {}
    for reading in types.readings:
        if not reading.exact:
            for atom in types.solver.atoms(reading.axis):
                found.setdefault(atom, f"a {reading.how} over these channels runs over the kept ones")
    return found


def _standardised(graph: Graph, types: Types) -> dict[Atom, str]:
    """The axes over which the model's code standardises weights: zeros among the raw weights would change the statistics of the others."""
    over = [types.shape(n)[d] for n in graph.nodes if n.op == "get_attr" for d in graph.standardised.get(str(n.target), ())]
    why = "weights are standardised over these channels, and those of the others stay as they are"
    return {atom: why for axis in over for atom in types.solver.atoms(axis)}


def _owner(members: Iterable[Member]) -> str:
    """The module that makes the channels: the first one with the channels as its outputs."""
    members = list(members)
    maker = next((m for m in members if m.dim == 0), members[0])
    return maker.tensor.rpartition(".")[0] or maker.tensor


class _Names:
    """Gives each group the name of the module that makes its channels; the second of one module is 'name#2'."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def of(self, members: list[Member]) -> str:
        owner = _owner(members)
        number = self._taken[owner] = self._taken.get(owner, 0) + 1
        return owner if number == 1 else f"{owner}#{number}"


def _volume(axes: Shape, widths: Mapping[Atom, int]) -> int:
    total = 1
    for axis in axes:
        total *= kept_size(axis, widths)
    return total
