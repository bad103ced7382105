"""`Group`: channels that live or die together; `Frozen`: channels that stay, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from structprune.ir.axes import Atom


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
    members: tuple[Member, ...] = field(default=(), compare=False)  # this and the atom are no part of a stored plan
    atom: Atom | None = field(default=None, compare=False, repr=False)
