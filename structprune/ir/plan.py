"""`Plan`: what to remove, as data. It prints, stores and replays; nothing in it refers to live objects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structprune import notebook
from structprune.errors import PlanError
from structprune.ir.group import Frozen, Member

FORMAT = "structprune-plan/1"


_LARGEST = 2**40  # an index or size


def _numbers(values: Any) -> tuple[int, ...]:
    """Indices or sizes. Raises ValueError for anything else."""
    if not isinstance(values, list) or any(type(v) is not int or not 0 <= v < _LARGEST for v in values):
        raise ValueError(f"{str(values)[:60]} are no indices or sizes")
    return tuple(values)


@dataclass(frozen=True)
class Cut:
    """A tensor's original shape, and for each dimension that shrinks the indices that stay, ascending."""

    shape: tuple[int, ...]
    keep: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class PlannedGroup:
    """A group of coupled channels and which of them stay; none, where a whole branch goes."""

    name: str
    channels: int
    keep: tuple[int, ...]
    exact: bool
    reason: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Plan:
    """Every tensor that changes size, the groups behind the changes, and what stays and why.

    `inputs` describes the example inputs ({"args": ..., "kwargs": ...} with shape and dtype in the place of each tensor) and
    `ignore` what was to stay, so that the plan can be replayed on a fresh instance of the class.
    """

    tensors: Mapping[str, Cut]
    groups: tuple[PlannedGroup, ...]
    frozen: tuple[Frozen, ...]
    target: str = ""
    criterion: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: see the format in docs/plan.md."""
        return {
            "format": FORMAT,
            "target": self.target,
            "criterion": self.criterion,
            "inputs": dict(self.inputs),
            "ignore": list(self.ignore),
            "tensors": {
                name: {"shape": list(cut.shape), "keep": {str(dim): list(keep) for dim, keep in cut.keep.items()}}
                for name, cut in self.tensors.items()
            },
            "groups": [
                {"name": g.name, "channels": g.channels, "keep": list(g.keep), "exact": g.exact}
                | ({"reason": g.reason} if g.reason else {})
                | {"members": [{"tensor": m.tensor, "dim": m.dim} for m in g.members]}
                for g in self.groups
            ],
            "frozen": [{"name": f.name, "channels": f.channels, "reason": f.reason, "at": f.at} for f in self.frozen],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`. Raises PlanError for anything that is no plan."""
        try:
            if data["format"] != FORMAT:
                raise PlanError(f"plan format {data['format']!r} is not {FORMAT!r}")
            return Plan(
                tensors={
                    name: Cut(_numbers(cut["shape"]), {int(dim): _numbers(keep) for dim, keep in cut["keep"].items()})
                    for name, cut in data["tensors"].items()
                },
                groups=tuple(
                    PlannedGroup(
                        str(g["name"]), int(g["channels"]), _numbers(g["keep"]), bool(g["exact"]), str(g.get("reason", "")),
                        tuple(Member(str(m["tensor"]), int(m["dim"])) for m in g["members"]),
                    )
                    for g in data["groups"]
                ),
                frozen=tuple(Frozen(f["name"], f["channels"], f["reason"], f["at"]) for f in data["frozen"]),
                target=str(data.get("target", "")),
                criterion=str(data.get("criterion", "")),
                inputs=dict(data.get("inputs", {})),
                ignore=tuple(map(str, data.get("ignore", ()))),
            )  # fmt: skip
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(f"not a structprune plan: {type(error).__name__} {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the plan as canonical JSON: files that were made by it carry this."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), separators=(",", ":")))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan. Raises PlanError for a missing or broken file."""
        try:
            return Plan.from_dict(json.loads(Path(path).read_text()))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"{path}: cannot be read as a plan: {error}") from error

    def _repr_html_(self) -> str:
        lines = [(g.name, g.channels, f"{len(g.keep)}{'' if g.exact else ' *'}", notebook.standing(g.members), g.reason) for g in self.groups]
        title = f"plan for {self.target or 'no target'}: {len(self.groups)} groups, {len(self.tensors)} tensors shrink"
        return notebook.table(title, ("group", "channels", "kept", "in", "not exact"), lines)

    def __str__(self) -> str:
        """A table: one line a group, its channels before and after, and the tensors that shrink with it."""
        rows = [("group", "channels", "kept", "in")]
        rows += [
            (
                g.name,
                str(g.channels),
                str(len(g.keep)) + ("" if g.exact else "*"),
                ", ".join(f"{m.tensor}[{m.dim}]" for m in g.members[:3]) + (" …" if len(g.members) > 3 else ""),
            )
            for g in self.groups
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
        lines += [f"* {g.name}: {g.reason}" for g in self.groups if not g.exact]
        return "\n".join(lines)
