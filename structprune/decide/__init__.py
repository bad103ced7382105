"""Which channels go: targets, criteria, allocation, and the plan that they make."""

from structprune.decide.allocate import METHODS, Allocation, allocate, importance_kept
from structprune.decide.plan import atoms_of, costs_of, example_inputs, plan, plan_of, planned, scored
from structprune.decide.targets import Target, parse_target, spread

__all__ = [
    "METHODS", "Allocation", "Target", "allocate", "atoms_of", "costs_of", "example_inputs", "importance_kept", "parse_target", "plan", "plan_of",
    "planned", "scored", "spread",
]  # fmt: skip
