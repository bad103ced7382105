"""Shared by all tests."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import closed_loop, result
from structprune.backends import benchmark, tables
from structprune.backends.bench_process import BenchProcess

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
os.environ.setdefault("NO_COLOR", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the golden text forms anew")


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # a million objects of libraries, that every full collection would look through


@pytest.fixture(autouse=True, scope="session")
def process_that_measures() -> Iterator[None]:
    """It takes seconds to start, and measures shortly: the next block gets the one of the last, unless that ended by an error, or the process did."""
    leave = BenchProcess.__exit__
    waiting: list[BenchProcess] = []

    def enter(bench: BenchProcess) -> BenchProcess:
        if waiting:
            vars(bench).update(vars(waiting.pop()))
        return bench

    def keep(bench: BenchProcess, kind: Any, error: Any, trace: Any) -> None:
        if error is None and not waiting and bench._process is not None and bench._process.poll() is None:
            waiting.append(bench)
        else:
            leave(bench, kind, error, trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "_SECONDS", 0.3)  # no test is about how well the saved model was timed
        patch.setattr(BenchProcess, "__enter__", enter)
        patch.setattr(BenchProcess, "__exit__", keep)
        yield
    for bench in waiting:
        leave(bench, None, None, None)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: what is timed is timed so shortly that it is no proof that a latency was reached, and one round is enough."""
    timed = benchmark._time_rounds
    monkeypatch.setattr(benchmark, "_time_rounds", lambda turns, runs, rounds, seconds, *rest: timed(turns, runs, 5, 0.2, *rest))
    monkeypatch.setattr(tables, "_PASSES", 1)
    for name, value in {"_GLANCE": 0.3, "_FULL": 0.3, "_WAITS": (), "_MOST_ROUNDS": 1, "_MISSED": 10.0}.items():
        monkeypatch.setattr(closed_loop, name, value)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Call the command line in this process, in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        from structprune import cli

        monkeypatch.setattr(sys, "argv", ["structprune", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call
