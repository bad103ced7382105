"""The network as a map, laid out as a compiler draws live ranges: time runs downward, a lane is a group of channels from its first use to its last.

A row is an operator that uses a weight, from the lanes that it reads to those that it makes, or one that ties lanes to themselves, such as
the addition of a residual. Lanes are shared by groups whose ranges do not overlap; the long ones, residual streams, come to lie on the left.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROW, LANE = 22, 26  # pixels


@dataclass(frozen=True)
class Range:
    """Channels from the first to the last row that they are used in, both counted from 0."""

    key: str
    lane: int
    first: int
    last: int


def ranges(steps: Sequence[Mapping[str, Any]]) -> list[Range]:
    """steps: as `analysis.outline` tells them. Linear in their number, but for sorting."""
    live: dict[str, tuple[int, int]] = {}
    for row, step in enumerate(steps):
        for key in uses(step):
            live[key] = (live.get(key, (row, row))[0], row)
    found: list[Range] = []
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (last row, lane)
    for key, (first, last) in sorted(live.items(), key=lambda item: (item[1][0], -item[1][1])):
        while busy and busy[0][0] < first:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (last, lane))
        found.append(Range(key, lane, first, last))
    return found


def uses(step: Mapping[str, Any]) -> list[str]:
    """The channels that take part in a step, each once."""
    return list(dict.fromkeys([*step.get("reads", ()), *step.get("makes", ()), *step.get("ties", ())]))
