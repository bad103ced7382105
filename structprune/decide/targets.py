"""Targets as the user writes them: 'macs=0.5', 'params=5M,channels=0.8'."""

from __future__ import annotations

import re
from dataclasses import dataclass

from structprune.errors import InputError, did_you_mean

_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}
_UNITS = {
    "channels": {"": 1.0},
    "macs": _COUNTS,
    "params": _COUNTS,
    "latency": {"": 1.0, "US": 1e-6, "MS": 1e-3, "S": 1.0},
    "memory": {"": 1.0, **_BYTES},
    "size": {"": 1.0, **_BYTES},
    "threshold": {"": 1.0},
}
_MANY = 50  # targets of one front


@dataclass(frozen=True)
class Target:
    """`key` may use at most `value`: a share of the original, or an absolute number where `absolute`.

    Of 'threshold' channels stay whose score is at least `value`, in the criterion's own unit.
    """

    key: str
    value: float
    absolute: bool

    def limit(self, original: float) -> float:
        """The budget in the unit of `original`."""
        return self.value if self.absolute else self.value * original


def parse_target(text: str) -> tuple[Target, ...]:
    """Read 'key=value[,key=value...]'. A value of at most 1 without a unit is a share of the original.

    Raises InputError that names the part that cannot be read.
    """
    targets = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", part)
        if match is None:
            raise InputError(f"target {part.strip()!r}: write it as key=value, such as macs=0.5 or params=5M")
        key, number, unit = match[1], float(match[2]), match[3].upper()
        if key not in _UNITS:
            raise InputError(f"unknown target {key!r}{did_you_mean(key, _UNITS)}; use one of {', '.join(_UNITS)}")
        if unit not in _UNITS[key]:
            raise InputError(f"target {part.strip()!r}: unknown unit {match[3]!r}; {key} takes {', '.join(u for u in _UNITS[key] if u) or 'none'}")
        absolute = bool(unit) or (number > 1 and _UNITS[key] is _COUNTS) or key == "threshold"
        if (number <= 0 and key != "threshold") or (not absolute and number > 1):
            raise InputError(f"target {part.strip()!r}: a share lies above 0 and at most at 1")
        targets.append(Target(key, number * _UNITS[key][unit], absolute))
    return tuple(targets)


def spread(text: str) -> list[str]:
    """The targets of a front: 'latency=0.3:0.9:7' stands for seven, evenly spaced from 0.3 to 0.9; a text without colons for itself.

    Raises InputError for a range that is none, or more than one of them.
    """
    parts = text.split(",")
    ranges = [i for i, part in enumerate(parts) if ":" in part]
    if not ranges:
        return [text]
    match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9.]+):([0-9.]+):([0-9]+)\s*", parts[ranges[0]])
    if match is None or len(ranges) > 1 or not 2 <= int(match[4]) <= _MANY:
        raise InputError(f"target {text!r}: write a front as key=FROM:TO:NUMBER, such as latency=0.3:0.9:7, of 2 to {_MANY} targets")
    try:
        first, last, number = float(match[2]), float(match[3]), int(match[4])
    except ValueError as error:
        raise InputError(f"target {text!r}: {error}") from error
    values = [first + (last - first) * i / (number - 1) for i in range(number)]
    return [",".join([*parts[: ranges[0]], f"{match[1]}={value:.4g}", *parts[ranges[0] + 1 :]]) for value in values]
