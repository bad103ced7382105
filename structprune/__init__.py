"""structprune: a structured channel-pruning compiler. A trained network goes in; a smaller, verified, faster one comes out."""

from structprune.analysis.groups import find_groups
from structprune.backends.benchmark import benchmark
from structprune.backends.directory import load
from structprune.decide import plan
from structprune.errors import StructpruneError
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
