"""structprune: a structured channel-pruning compiler. A trained network goes in; a smaller, verified, faster one comes out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from structprune.errors import StructpruneError

if TYPE_CHECKING:
    from structprune.analysis.groups import find_groups
    from structprune.backends.benchmark import benchmark
    from structprune.backends.directory import load
    from structprune.decide.decision import plan
    from structprune.frontends.trace import trace
    from structprune.ir.plan import Plan
    from structprune.pipeline import apply, compress, front, inspect, verify
    from structprune.result import Result
    from structprune.teaching import recover

__version__ = "0.1.0"
__all__ = [
    "Plan", "Result", "StructpruneError", "apply", "benchmark", "compress", "find_groups", "front", "inspect", "load", "plan", "recover", "trace",
    "verify",
]  # fmt: skip

# imported when first asked for: torch takes seconds, which `structprune --help`, a mistyped flag and completion in a shell do not have
_HOMES = {
    "analysis.groups": ("find_groups",),
    "backends.benchmark": ("benchmark",),
    "backends.directory": ("load",),
    "decide": ("plan",),
    "frontends.trace": ("trace",),
    "ir.plan": ("Plan",),
    "pipeline": ("apply", "compress", "front", "inspect", "verify"),
    "result": ("Result",),
    "teaching": ("recover",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
