"""Measured times of contractions, kept on disk: by machine, runtime, threads and settings, shared between models and processes."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

Point = tuple[str, tuple[int, ...]]  # a signature (see kernels.py), and the sizes of the axes

Timer = Callable[[Sequence[Point]], Iterable[tuple[int, float]]]

_TOLD = 50  # timings between two words of progress
_SAME = 1.08  # two timings of a size that differ by more than this were not both undisturbed
_PASSES = 4  # over the sizes, at most; the second one over all of them


def default_path() -> Path:
    """Where tables are kept: STRUCTPRUNE_CACHE, or structprune in the user's cache folder."""
    base = os.environ.get("STRUCTPRUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structprune"
    return Path(base) / "tables.sqlite"


class Tables:
    """Seconds of contractions on one machine in one runtime; measured when asked for, once."""

    def __init__(self, place: str, timer: Timer, path: Path | None = None, progress: Callable[[str], None] | None = None):
        """place: the machine, the runtime and its settings in words; timer: yields (index, seconds) of points."""
        self.place = place
        self._timer = timer
        self._path = path or default_path()
        self._say = progress or (lambda line: None)
        self._known: dict[Point, float] = {}

    def seconds(self, points: Sequence[Point]) -> list[float]:
        """Of each point; what is not known yet is measured, and kept."""
        missing = [p for p in dict.fromkeys(points) if p not in self._known]
        if missing:
            with _open(self._path) as store:
                for signature in dict.fromkeys(p[0] for p in missing):
                    rows = store.execute("SELECT sizes, seconds FROM times WHERE place = ? AND signature = ?", (self.place, signature))
                    self._known |= {(signature, _sizes(text)): taken for text, taken in rows}
        self._measure([p for p in missing if p not in self._known])
        return [self._known[p] for p in points]

    def again(self, points: Sequence[Point]) -> None:
        """Measure these once more, for something may have disturbed them; the shorter time counts."""
        self._pass(list(dict.fromkeys(points)))
        self._keep(points)

    def _measure(self, points: Sequence[Point]) -> None:
        """In two passes, so that what disturbs a whole session does not disturb a size both times; where they differ, in more."""
        left, passes = list(points), 0
        while left and passes < _PASSES:
            order = np.random.default_rng(passes).permutation(len(left)).tolist()  # in other company each time
            before = {p: self._known.get(p, math.inf) for p in left}
            now = dict(self._pass([left[i] for i in order], passes))
            left = [p for p in left if max(before[p], now[p]) > _SAME * min(before[p], now[p])]
            passes += 1
        self._keep(points)

    def _pass(self, points: Sequence[Point], number_of_pass: int = 2) -> list[tuple[Point, float]]:
        """One timing of each point; of all its timings the shortest is kept.

        The first two passes, over the same points, are told as one count; of the later ones, which repeat a few, only those that take their time.
        """
        found = []
        before, total = (number_of_pass * len(points), 2 * len(points)) if number_of_pass < 2 else (0, len(points))
        what = "time operators" if number_of_pass < 2 else "time again what was disturbed"
        for number, (index, taken) in enumerate(self._timer(points)):
            if number % _TOLD == 0 and (number_of_pass < 2 or len(points) > _TOLD):
                self._say(f"{what}: {before + number} of {total} timings")
            found.append((points[index], taken))
            self._known[points[index]] = min(taken, self._known.get(points[index], taken))
        return found

    def _keep(self, points: Sequence[Point]) -> None:
        if points:
            with _open(self._path) as store:
                rows = [(self.place, key, _text(sizes), self._known[key, sizes]) for key, sizes in points]
                store.executemany("INSERT OR REPLACE INTO times VALUES (?, ?, ?, ?)", rows)


def rows(path: Path | None = None) -> list[tuple[str, str, str, float]]:
    """All that is kept, of every place: (place, signature, sizes, seconds)."""
    with _open(path or default_path()) as store:
        return list(store.execute("SELECT place, signature, sizes, seconds FROM times ORDER BY place, signature, seconds"))


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=60)) as store, store:
        store.execute(
            "CREATE TABLE IF NOT EXISTS times (place TEXT, signature TEXT, sizes TEXT, seconds REAL, PRIMARY KEY (place, signature, sizes))"
        )
        yield store


def _text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))
