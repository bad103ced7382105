"""What structprune knows of ATen: one file an operator family, each operator a rule and, where it needs one, a resizer."""

from structprune.ops import contraction, creation, elementwise, joining, layout, normalization, recurrent, spatial
from structprune.ops.rules import RESIZERS, RULES

__all__ = ["RESIZERS", "RULES", "contraction", "creation", "elementwise", "joining", "layout", "normalization", "recurrent", "spatial"]
