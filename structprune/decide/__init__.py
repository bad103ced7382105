"""Which channels go: targets, criteria, allocation, and the plan that they make."""

from structprune.decide.plan import atoms_of, example_inputs, plan, planned
from structprune.decide.targets import parse_target

__all__ = ["atoms_of", "example_inputs", "parse_target", "plan", "planned"]
