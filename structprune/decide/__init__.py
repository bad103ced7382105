"""Which channels go: targets, criteria, allocation, and the plan that they make."""

from structprune.decide.allocate import METHODS, Allocation, allocate, importance_kept, must_be_method, predicted_loss
from structprune.decide.criteria import must_be_criterion
from structprune.decide.dead import TARGET, Dead, silence
from structprune.decide.decision import costs_of, plan, plan_for
from structprune.decide.plan import atoms_of, example_inputs, plan_of, planned, scored
from structprune.decide.saliency import Saliency, saliency
from structprune.decide.targets import Target, parse_target, spread

__all__ = [
    "METHODS", "TARGET", "Allocation", "Dead", "Saliency", "Target", "allocate", "atoms_of", "costs_of", "example_inputs", "importance_kept",
    "must_be_criterion", "must_be_method", "parse_target", "plan", "plan_for", "plan_of", "planned", "predicted_loss", "saliency", "scored",
    "silence", "spread",
]  # fmt: skip
