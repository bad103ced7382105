"""Graph → a type for every axis: the graph is run once, with shapes of axes in the place of tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from structprune.ir.axes import Atom, Shape, Solver, Unsolved
from structprune.ir.graph import Graph, computed_constants, shape_of, size_of, source_of
from structprune.ir.operators import operator_name
from structprune.ops import RULES, creation
from structprune.ops.rules import Equations, Reading, Unsupported, Work

INPUT, OUTPUT = "model input", "model output"


@dataclass(frozen=True)
class Types:
    """What inference found. A node's entry is a Shape, a list of such for several answers, or a number."""

    solver: Solver
    nodes: Mapping[fx.Node, Any]
    work: tuple[Work, ...]
    readings: tuple[Reading, ...]
    constants: frozenset[fx.Node]  # computed from nothing but numbers: they stay as they are, and are cut where others read them

    def shape(self, value: Any) -> Any:
        """The resolved axes of a node's answer; a list of such for several answers."""
        found = self.nodes[value]
        if isinstance(found, list):
            return [self._resolved(part) for part in found]
        return self._resolved(found)

    def shapes(self, node: fx.Node) -> list[Shape]:
        """The axes of every tensor that a node answers."""
        found = self.nodes.get(node)
        return [shape for shape in (found if isinstance(found, list) else [found]) if isinstance(shape, tuple)]

    def atoms(self, node: fx.Node) -> set[Atom]:
        """All atoms in a node's answer, frozen ones too."""
        return {atom for shape in self.shapes(node) for axis in shape for atom in self.solver.atoms(axis)}

    def _resolved(self, shape: Any) -> Any:
        return tuple(map(self.solver.resolve, shape)) if isinstance(shape, tuple) else shape


def infer(graph: Graph) -> Types:
    """Infer the type of every axis. Takes time about linear in the number of nodes.

    The axes of inputs and outputs are frozen, and so are those that an operator without a rule touches.
    """
    solver = Solver()
    types: dict[fx.Node, Any] = {}
    by_tensor: dict[int, Shape] = {}
    work: list[Work] = []
    readings: list[Reading] = []
    computed = frozenset(n for n in computed_constants(graph) if RULES.get(operator_name(n)) is not creation.uniform)
    # what others are computed of is not cut, whoever else reads it
    constants = computed | {n for n in graph.nodes if n.op == "get_attr" and str(n.target) not in graph.aliases and not computed.isdisjoint(n.users)}

    read_aside = graph.read_aside

    def fresh(node: fx.Node) -> Any:
        return _sizes_map(node.meta.get("val"), lambda shape: tuple(solver.fresh(n) for n in shape))

    for node in graph.whole:
        solver.site = source_of(node)
        aside = node.graph is graph.unneeded  # it counts for nothing, and an operator without a rule freezes nothing there
        if node in read_aside:
            types[node] = types[read_aside[node]]
        elif node.op == "placeholder":
            types[node] = fresh(node)
            if not aside:
                solver.site = next((source_of(user) for user in node.users), "")
                _freeze(solver, types[node], INPUT)
        elif node.op == "get_attr":
            tensor = graph.tensor(node)
            if isinstance(tensor, Tensor):  # a tensor under two names, or a module called twice, is one variable
                types[node] = by_tensor.setdefault(id(tensor), tuple(solver.fresh(n) for n in tensor.shape))
            else:  # the body of a region that is not looked into
                types[node] = None
        elif node.op == "output":
            for answer in node.all_input_nodes:
                solver.site = source_of(answer)
                _freeze(solver, types[answer], OUTPUT)
        elif node in constants:  # any entry may go, for nobody else knows of it
            types[node] = fresh(node)
        elif node.target is operator.getitem:
            source, index = node.args
            types[node] = types[source][index]  # type: ignore[index]
        elif aside and operator_name(node) not in RULES and _has_tensor(node.meta.get("val")):
            types[node] = fresh(node)
        else:
            told: tuple[list[Work], list[Reading]] = ([], []) if aside else (work, readings)
            types[node] = _apply(solver, node, types, graph.constant, *told)
    return Types(solver, types, tuple(work), tuple(readings), constants)


def _apply(solver: Solver, node: fx.Node, types: dict[fx.Node, Any], constant: Any, work: list[Work], readings: list[Reading]) -> Any:
    """The type of one operator's answer; an operator without a rule that fits freezes all that it touches."""
    value = node.meta.get("val")
    if not _has_tensor(value):
        return size_of(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else value
    name = operator_name(node)
    sizes = _sizes_map(value, lambda shape: shape)
    args = fx.map_arg(node.args, lambda n: types[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: types[n])
    function = RULES.get(name)
    if function is None:
        why = f"the operator {name} is not known"
    else:
        equations = Equations(solver, node, sizes, constant)
        try:
            result = function(equations, *args, **kwargs)
        except (Unsupported, Unsolved) as error:
            why = f"{name}: {error}"
        except ZeroDivisionError:
            why = f"{name} of an empty tensor"
        else:
            result = list(result) if isinstance(value, (list, tuple)) else result
            if _sizes_of(result) == sizes:
                work.extend(equations.work)
                readings.extend(equations.readings)
                return result
            why = f"the rule of {name} does not fit this call"
    for operand in node.all_input_nodes:
        _freeze(solver, types.get(operand), why)
    result = _sizes_map(value, lambda shape: tuple(solver.fresh(n) for n in shape))
    _freeze(solver, result, why)
    return result


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value))


def _sizes_map(value: Any, function: Any) -> Any:
    """`function` of the shape of a (fake) tensor; a list of results for several tensors."""
    if isinstance(value, Tensor):
        return function(shape_of(value))
    if isinstance(value, (list, tuple)):
        return [function(shape_of(v)) if isinstance(v, Tensor) else v for v in value]
    return size_of(value) if isinstance(value, torch.SymInt) else value


def _sizes_of(result: Any) -> Any:
    if isinstance(result, list):
        return [_sizes_of(part) for part in result]
    return tuple(axis.size for axis in result) if isinstance(result, tuple) else result


def _freeze(solver: Solver, found: Any, why: str) -> None:
    if isinstance(found, list):
        for part in found:
            _freeze(solver, part, why)
    elif isinstance(found, tuple):
        for axis in found:
            solver.freeze(axis, why)
