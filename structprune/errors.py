"""Everything that structprune raises on purpose, and the words of what others raise.

StructpruneError              one line for the user; the command line turns it into an exit status
├── InputError         (2)    a file, argument or option that cannot be used
│   ├── TraceError            the model cannot be traced into a graph
│   └── PlanError             a plan that does not belong to this model
├── TargetError        (3)    the target cannot be reached; says how close it came
└── VerificationError  (1)    the small model does not answer as the reference does: our bug, never the user's
"""

import difflib
from collections.abc import Iterable, Mapping

_LONGEST = 200  # characters of someone else's error


class StructpruneError(Exception):
    """Base of all errors that structprune raises on purpose. `exit_status` is what the command line returns."""

    exit_status = 1


class InputError(StructpruneError):
    """Something that the user gave cannot be used."""

    exit_status = 2


class TraceError(InputError):
    """torch.export could not turn the model into a graph."""


class PlanError(InputError):
    """A plan does not fit the model it is applied to."""


class TargetError(StructpruneError):
    """No plan reaches the target. `least`: what the smallest widths cost, by the cost's name, where that was the reason."""

    exit_status = 3

    def __init__(self, text: str, least: Mapping[str, float] | None = None):
        super().__init__(text)
        self.least = dict(least or {})


class VerificationError(StructpruneError):
    """The compressed model answers differently from the reference."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What follows a name that is not known: names that are, and look like it, in brackets; or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first words of an exception, in a line that is not too long; its kind where it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:_LONGEST] for line in lines if line), type(error).__name__)


def one_line(error: BaseException) -> str:
    """The kind of an exception, and its first words."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"
