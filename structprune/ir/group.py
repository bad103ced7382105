"""`Group`: channels that live or die together; `Frozen`: channels that stay, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from structprune.ir.axes import Atom, Shape, kept_size


class Member(NamedTuple):
    """A dimension of a parameter or buffer in which a group's channels stand (alone, or as a factor or summand)."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class Group:
    """The coupled channels of one atom. Removing channel i removes entry i of the atom from every member."""

    name: str
    atom: Atom
    members: tuple[Member, ...]
    exact: bool = True
    reason: str = ""  # why removal changes the arithmetic of an operator over the pruned axis, where it does

    @property
    def size(self) -> int:
        return self.atom.size


@dataclass(frozen=True)
class Frozen:
    """Channels that stay: the reason, and the source line that gives it."""

    name: str
    channels: int
    reason: str
    at: str
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Groups:
    """All that a decision needs to know of a model: groups, what is frozen, and the model's cost in their widths."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    axes: Mapping[str, Shape]  # the type of every named parameter and buffer
    parameters: frozenset[str]  # which of these names are parameters, each tensor once
    work: tuple[Shape, ...]  # multiply-accumulates: for each operator the axes whose sizes multiply

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        return next(g for g in self.groups if g.name == name)

    def macs(self, widths: Mapping[Atom, int] | None = None) -> int:
        """Multiply-accumulates of one call on the example inputs, when each atom keeps `widths[atom]` entries."""
        return sum(_volume(axes, widths or {}) for axes in self.work)

    def params(self, widths: Mapping[Atom, int] | None = None) -> int:
        """Number of parameters, when each atom keeps `widths[atom]` entries."""
        return sum(_volume(self.axes[name], widths or {}) for name in self.parameters)

    def __str__(self) -> str:
        """The stable text form: every group with its members, then what is frozen."""
        lines = []
        for group in self.groups:
            note = "" if group.exact else f"   inexact: {group.reason}"
            lines.append(f"{group.name}  {group.size}{note}")
            lines.extend(f"    {m.tensor}[{m.dim}] = {self.axes[m.tensor][m.dim]}" for m in group.members)
        lines.extend(f"frozen {f.name}  {f.channels}  {f.reason}" for f in self.frozen)
        return "\n".join(lines)


def _volume(axes: Shape, widths: Mapping[Atom, int]) -> int:
    total = 1
    for axis in axes:
        total *= kept_size(axis, widths)
    return total
