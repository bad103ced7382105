"""Measured times of contractions, kept on disk: by machine, runtime, threads and settings, shared between models and processes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import onnxruntime

from structprune.backends.benchmark import environment
from structprune.backends.kernels import time_contractions

Point = tuple[str, tuple[int, ...]]  # a signature (see kernels.py), and the sizes of the axes

_TOLD = 50  # sizes between two words of progress


def default_path() -> Path:
    """Where tables are kept: STRUCTPRUNE_CACHE, or structprune in the user's cache folder."""
    base = os.environ.get("STRUCTPRUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structprune"
    return Path(base) / "tables.sqlite"


class Tables:
    """Seconds of contractions on this machine in one runtime with some number of threads; measured when asked for, once."""

    def __init__(self, threads: int, path: Path | None = None, progress: Callable[[str], None] | None = None):
        machine = environment()
        processor = f"{machine['cpu']} ({machine['cpu_capability']}, {machine['cores']} cores)"
        self.place = f"{processor}, onnxruntime {onnxruntime.__version__} cpu, {threads} thread(s)"
        self.threads = threads
        self._path = path or default_path()
        self._say = progress or (lambda line: None)
        self._known: dict[Point, float] = {}

    def seconds(self, points: Sequence[Point]) -> list[float]:
        """Of each point; what is not known yet is measured, and kept."""
        missing = [p for p in dict.fromkeys(points) if p not in self._known]
        if missing:
            with self._open() as store:
                for signature in dict.fromkeys(p[0] for p in missing):
                    rows = store.execute("SELECT sizes, seconds FROM times WHERE place = ? AND signature = ?", (self.place, signature))
                    self._known |= {(signature, _sizes(text)): taken for text, taken in rows}
        self._measure([p for p in missing if p not in self._known])
        return [self._known[p] for p in points]

    def again(self, points: Sequence[Point]) -> None:
        """Measure these once more, for something may have disturbed them; the shorter time counts."""
        self._measure(list(dict.fromkeys(points)))

    def _measure(self, points: Sequence[Point]) -> None:
        fresh = []
        for number, (index, taken) in enumerate(time_contractions(points, self.threads)):
            if number % _TOLD == 0:
                self._say(f"time operators: {number} of {len(points)} sizes")
            point = points[index]
            self._known[point] = min(taken, self._known.get(point, taken))
            fresh.append((self.place, point[0], _text(point[1]), self._known[point]))
        if fresh:
            with self._open() as store:
                store.executemany("INSERT OR REPLACE INTO times VALUES (?, ?, ?, ?)", fresh)

    def rows(self) -> list[tuple[str, str, str, float]]:
        """All that is kept, of other places too: (place, signature, sizes, seconds)."""
        with self._open() as store:
            return list(store.execute("SELECT place, signature, sizes, seconds FROM times ORDER BY place, signature, seconds"))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path, timeout=60)) as store, store:
            store.execute(
                "CREATE TABLE IF NOT EXISTS times (place TEXT, signature TEXT, sizes TEXT, seconds REAL, PRIMARY KEY (place, signature, sizes))"
            )
            yield store


def _text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))
