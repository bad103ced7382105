"""Limits that the user sets on a run: seconds, and bytes of memory. Both end it with one line, and leave nothing half written."""

from __future__ import annotations

import re
import resource
import signal
from types import FrameType

from structprune.errors import InputError

_UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
_EXHAUSTED = re.compile(r"allocate memory|bad_alloc|[Nn]ot enough memory|[Oo]ut of memory|MemoryError|failed to allocate|Resource temporarily")


class TimeIsUp(BaseException):
    """The time limit is over. No Exception, so that nobody who expects a model's code to fail takes it for that."""


def limit_time(seconds: float) -> None:
    """Raise TimeIsUp in the main thread after so many seconds. Raises InputError for none."""
    if not seconds > 0:
        raise InputError(f"--time-limit {seconds:g}: give seconds, more than 0")

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise TimeIsUp(f"not done within the {seconds:g} s of --time-limit; give more, a smaller input, or --no-latency")

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def limit_memory(text: str) -> None:
    """Let the process, and those that it starts, have no more memory of their own than '8GB', say. Raises InputError for what is no size."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise InputError(f"--memory-limit {text!r}: write it as 8GB or 500MB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that memory ran out: each library says it in its own way."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or _EXHAUSTED.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
