"""Hints: what the small model learns inside, of the channels that stay (Romero et al., FitNets: Hints for Thin Deep Nets, arXiv:1412.6550).

A channel of the small model is one of the dense model's, so what a layer reads can be compared entry by entry, with no layer between that would have
to learn to translate.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from structprune.analysis.infer import Types
from structprune.calibrate.readers import readers
from structprune.errors import InputError
from structprune.ir.axes import Keep
from structprune.ir.graph import Graph, has_open_size, is_dynamic
from structprune.recovery.finetune import AUTO, Flat, answers_of, flat
from structprune.transform.surgery import ORIGINAL, kept_part


def dense_teacher(
    graph: Graph, types: Types, keep: Keep, small: fx.GraphModule, features: Sequence[str] | str, place: torch.device
) -> tuple[Flat, dict[str, fx.Node]]:
    """The dense model as a teacher, whose features are what is kept of its own, and by name the nodes of `small` that they are for.

    features: names of modules, whose answers are compared; or AUTO, for what the layers read. Raises InputError for a module that has no answer
    in one of the two models.
    """
    copies = {str(n.meta[ORIGINAL]): n for n in small.graph.nodes if ORIGINAL in n.meta}
    if features == AUTO:
        read = dict.fromkeys(reader.input for reader in readers(graph).values() if reader.input.op == "call_function")
        named = {n.name: n for n in read if n.name in copies and _can_be_compared(n, graph, types, keep)}
    else:
        named = dict(zip(features, answers_of(graph.module, features), strict=True))
        missing = next((name for name, n in named.items() if n.name not in copies), None)
        if missing is not None:
            raise InputError(f"features= names {missing!r}, of which nothing is left in the small model; leave it out")
    dense = flat(graph.module, list(named.values()))
    module = dense if place.type == "cpu" else copy.deepcopy(dense).to(place)

    def teacher(*inputs: Any) -> tuple[Sequence[Any], Sequence[Tensor]]:
        answers, inside = module(*inputs)
        return answers, [kept_part(value, types.shape(n), keep) for value, n in zip(inside, named.values(), strict=True)]

    return teacher, {name: copies[n.name] for name, n in named.items()}


def _can_be_compared(node: fx.Node, graph: Graph, types: Types, keep: Keep) -> bool:
    """Whether samples are its first axis, by which processes share them, and channels are known by their numbers whatever the sizes are."""
    value = node.meta["val"]
    if not value.is_floating_point() or not value.dim() or has_open_size(node) or (graph.dynamic_batch and str(value.shape[0]) != graph.batch):
        return False
    touched = (any(atom in keep for atom in types.solver.atoms(axis)) for axis in types.shape(node))
    return not any(cut and is_dynamic(size) for cut, size in zip(touched, value.shape, strict=True))
