"""The table of operator rules, and what a rule may say.

A rule is the type-level twin of an operator: it is called as the operator is, with a `Shape` (a tuple of axes) in the
place of every tensor and plain numbers elsewhere, states equations between axes, and returns the shape of the answer (a list of
shapes for several answers).

    @rule("linear")
    def linear(eq, x, weight, bias=None):
        eq.equate(x[-1], weight[1])
        ...
        return (*x[:-1], weight[0])

A *resizer* is the other half of an operator that has sizes among its arguments: it writes them anew for the smaller
tensors. Operators are found by their exact ATen name; one without a rule freezes the axes that it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from structprune.ir.axes import Axis, Shape, Solver

Rule = Callable[..., Any]
Resizer = Callable[["Resize", fx.Node], None]
Number = int | tuple[int, ...]
Literals = dict[fx.Node, list[tuple[Number, Number]]]  # numbers that changed at a node, and lists of numbers as a whole, as (old, new)

RULES: dict[str, Rule] = {}
RESIZERS: dict[str, Resizer] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of the ATen operators with these names (in-place forms included)."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


def resizer(*names: str) -> Callable[[Resizer], Resizer]:
    """Register how the literal sizes in a call of these operators follow the plan."""

    def register(function: Resizer) -> Resizer:
        for name in names:
            assert name not in RESIZERS, f"two resizers for {name}"
            RESIZERS[name] = function
        return function

    return register


class Unsupported(Exception):
    """Raised by a rule for a form of the operator that it does not cover: the axes that it touches are frozen."""


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one node: the product of the sizes of `axes`."""

    node: fx.Node
    axes: Shape


@dataclass(frozen=True)
class Reading:
    """A node that reads across an axis: `how` is 'sum', 'mean', 'variance' or 'norm'.

    `exact` says that setting the removed channels to zero cannot be told from removing them, norms with an affine aside: those run
    over the kept entries. Of a sum this holds where the removed entries are zero; analysis/silence.py finds out.
    """

    node: fx.Node
    axis: Axis
    how: str
    exact: bool


class Equations:
    """What a rule may say about the node it is called for."""

    def __init__(self, solver: Solver, node: fx.Node, shape: Any, constant: Callable[[Any], Tensor | None]):
        self._solver = solver
        self.node = node
        self.out = shape  # sizes of the answer on the example inputs: a tuple of numbers, or a list of such
        self._constant = constant
        self.work: list[Work] = []
        self.readings: list[Reading] = []
        self.fresh = solver.fresh
        self.equate = solver.equate
        self.equate_products = solver.equate_products
        self.divide = solver.divide
        self.cut = solver.cut
        self.split = solver.split

    def freeze(self, why: str, *axes: Axis) -> None:
        """Keep every entry of these axes."""
        for axis in axes:
            self._solver.freeze(axis, why)

    def frozen(self, size: int, why: str) -> Axis:
        """A fresh axis that keeps every entry."""
        axis = self.fresh(size)
        self.freeze(why, axis)
        return axis

    def macs(self, *axes: Axis) -> None:
        """The node multiplies and accumulates once for every combination of entries of these axes."""
        self.work.append(Work(self.node, axes))

    def over(self, axis: Axis, how: str, *, exact: bool) -> None:
        """The node computes a mean, variance or norm over the kept entries of this axis."""
        self.readings.append(Reading(self.node, axis, how, exact))

    def sums(self, *axes: Axis) -> None:
        """The node adds up the entries of these axes."""
        for axis in axes:
            self.readings.append(Reading(self.node, axis, "sum", exact=True))

    def constant(self, argument: Any) -> Tensor | None:
        """The value of an argument that is a constant of the model, else None."""
        return self._constant(argument)

    def broadcast(self, *shapes: Any) -> Shape:
        """Align shapes from the right; aligned axes are equal, axes of size 1 join nothing. Numbers have no axes."""
        operands = [s for s in shapes if isinstance(s, tuple)]
        result: list[Axis] = []
        for back in range(1, max((len(s) for s in operands), default=0) + 1):
            axes = [s[-back] for s in operands if len(s) >= back]
            known = [a for a in axes if a.size != 1] or axes[:1]
            for other in known[1:]:
                self.equate(known[0], other)
            result.append(known[0])
        return tuple(reversed(result))


def axis_index(dim: int, rank: int) -> int:
    """A dimension number counted from the front."""
    return dim + rank if dim < 0 else dim


class Resize:
    """The small shapes, for a resizer to write into the arguments of a node.

    `kept(node)` gives for each axis of a node's answer the indices that stay.
    """

    def __init__(
        self,
        kept: Callable[[Any], Sequence[Any]],
        constant: Callable[[Any], Tensor | None],
        add_constant: Callable[[fx.Node, Tensor], fx.Node],
    ):
        self._kept = kept
        self.constant = constant
        self.add_constant = add_constant  # (before this node, value) -> the node of a new constant
        self.literals: Literals = {}

    def kept(self, value: Any, dim: int, part: int | None = None) -> np.ndarray:
        """Indices that axis `dim` of a node's answer (or of its part, for several answers) keeps."""
        axes = self._kept(value)
        return (axes if part is None else axes[part])[dim]

    def size(self, value: Any, dim: int, part: int | None = None) -> int:
        return len(self.kept(value, dim, part))

    def rank(self, value: Any) -> int:
        return len(self._kept(value))

    def argument(self, node: fx.Node, name: str) -> Any:
        """An argument of an ATen call by its name in the schema, its default where it is not given."""
        for i, arg in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if arg.name == name:
                return node.args[i] if i < len(node.args) else node.kwargs.get(name, arg.default_value if arg.has_default_value() else None)
        raise KeyError(name)

    def has(self, node: fx.Node, name: str) -> bool:
        return any(arg.name == name for arg in node.target._schema.arguments)  # type: ignore[union-attr]

    def set(self, node: fx.Node, name: str, value: Any) -> None:
        """Write an argument, and remember which numbers changed: the user's own class may hold them as attributes."""
        old = self.argument(node, name)
        numbers = _numbers(old), _numbers(value)
        for before, after in (*zip(*numbers, strict=False), (tuple(numbers[0]), tuple(numbers[1]))):
            if before != after:
                self.literals.setdefault(node, []).append((before, after))
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        index = next(i for i, arg in enumerate(schema) if arg.name == name)
        if schema[index].kwarg_only or name in node.kwargs:
            node.update_kwarg(name, value)
            return
        for missing in range(len(node.args), index):
            node.args = (*node.args, schema[missing].default_value)
        if index < len(node.args):
            node.update_arg(index, value)
        else:
            node.args = (*node.args, value)

    def retarget(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
        """Call another operator instead."""
        node.target, node.args, node.kwargs = target, args, {}


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v if isinstance(v, int) else -1 for v in values]


aten = torch.ops.aten
