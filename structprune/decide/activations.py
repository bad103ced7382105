"""Criteria that watch activations on samples: what layers read from each channel.

Convolutions, linear layers and matrix products add up the channels of what they read; a group is watched there, at the inputs of all that
read it, over all samples and positions, in float64. A group that none of them adds up (the input of a recurrent layer, say) is scored by its
L2 magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from structprune.analysis.groups import Groups
from structprune.calibrate.readers import Reader, matrix, reader_of, taps
from structprune.decide.weights import Scores, add_along, entries_of, magnitude
from structprune.ir.axes import Axis, leaves
from structprune.ir.graph import Graph
from structprune.ir.group import Group
from structprune.ir.operators import operator_name
from structprune.ir.samples import Samples, copies
from structprune.ops import RULES, contraction

_BLOCK = 2**20  # entries of an activation that are turned into float64 at one time
_ROOM = 2**26  # entries of covariance matrices that are held at one time: 0.5 GB
_VARIANCE = 0.95  # that the leading principal components have between them


# --- criteria -------------------------------------------------------------------------------------------------------------


def activation_mean(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """E|x| of a channel's activation.

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017; there E[x], behind a ReLU.
    """
    return _per_entry(groups, tensors, graph, samples, lambda seen: seen.absolute / seen.rows)


def activation_rate(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """The share of a channel's activations that are not zero. It tells channels apart behind a ReLU, and hardly behind smooth functions.

    One minus the average percentage of zeros of Hu et al., Network Trimming, 2016.
    """
    return _per_entry(groups, tensors, graph, samples, lambda seen: seen.active / seen.rows)


def activation_variance(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """Σ Var(x_j) · |W_:j|² over all layers that read channel j, W_:j being the weights with which they do: how much their answers vary with it.

    A bias can stand in for what does not vary. An et al., Fluctuation-based Adaptive Structured Pruning (FLAP), 2024. Where a group is only read
    by products of two activations (queries and keys), the variance alone counts.
    """
    where = _places(graph, groups)
    seen = _watched(graph, samples, where)
    scores = dict(magnitude(groups, tensors, power=2))
    for group in groups:
        places = where[group.name]
        weighted = [place for place in places if place.reader is not None]
        if places:
            scores[group.name] = total = np.zeros(group.size)
            for place in weighted or places:
                mean = seen[place].total / seen[place].rows
                variance = (seen[place].squares / seen[place].rows - mean.square()).clamp_min(0)
                add_along(total, place.axis, group.atom, (variance * seen[place].weight).numpy())
    return scores


def activation_energy(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """Σ_i λ_i v_ij² over the leading principal components (λ_i, v_i) of a group's activations, as few as have 95 % of the variance.

    The part of channel j's variance that lies in directions that matter. To choose variables by their weight in principal components is Jolliffe's
    (Discarding Variables in a Principal Component Analysis, 1972), and with Σ v_ij² they are the leverage scores of Mahoney and Drineas (CUR matrix
    decompositions, 2009); the factor λ_i, and the sum of covariances over all that read the group, are ours.

    Time: an eigendecomposition of [channels, channels] for each group. Memory: 0.5 GB of covariances, or one of them if it is larger; wide models
    are run several times.
    """
    where = _places(graph, groups)
    scores = dict(magnitude(groups, tensors, power=2))
    for some in _portions([group for group in groups if where[group.name]]):
        covariances = _covariances(graph, samples, some, where)
        scores |= {name: _leading(covariance).numpy() for name, covariance in covariances.items()}
    return scores


def _per_entry(groups: Groups, tensors: Mapping[str, Tensor], graph: Graph, samples: Samples, statistic: Callable[[_Seen], Tensor]) -> Scores:
    """The mean over all places of a statistic, itself the mean over the entries there that stand on a channel."""
    where = _places(graph, groups)
    seen = _watched(graph, samples, where)
    scores = dict(magnitude(groups, tensors, power=2))
    for group in groups:
        if where[group.name]:
            means = []
            for place in where[group.name]:
                total, number = np.zeros((2, group.size))
                values = statistic(seen[place]).numpy()
                add_along(total, place.axis, group.atom, values)
                add_along(number, place.axis, group.atom, np.ones_like(values))
                means.append(total / number)
            scores[group.name] = np.mean(means, 0)
    return scores


# --- where a group is read ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """An axis of what a node reads, over which the node adds up. `reader`: None for a product of two activations."""

    node: fx.Node
    value: fx.Node
    dim: int
    axis: Axis
    reader: Reader | None


def _places(graph: Graph, groups: Groups) -> dict[str, list[_Place]]:
    """For every group, where its channels are added up; an empty list where they are nowhere."""
    found: dict[str, list[_Place]] = {group.name: [] for group in groups}
    named = {group.atom: group.name for group in groups}
    for reading in groups.types.readings:
        rule = RULES.get(operator_name(reading.node))
        if rule is None or rule.__module__ != contraction.__name__:
            continue
        reader = reader_of(reading.node)
        summed_over = set(groups.types.solver.atoms(reading.axis))
        for value in [reader.input] if reader is not None else _factors(reading.node):
            if value.op == "get_attr" or not _is_float(value):
                continue
            for dim, axis in enumerate(groups.types.shape(value)):
                for atom in dict.fromkeys(leaves(axis)):
                    place = _Place(reading.node, value, dim, axis, reader)
                    if atom in summed_over and atom in named and place not in found[named[atom]]:
                        found[named[atom]].append(place)
    return found


def _factors(node: fx.Node) -> list[fx.Node]:
    """What a product of activations reads and adds up: of attention queries and keys, for the width of values passes through it."""
    factors = node.args[:2] if RULES[operator_name(node)] is contraction.attention else node.all_input_nodes
    return [factor for factor in factors if isinstance(factor, fx.Node)]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


# --- watching -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """Of each entry of an axis, [entries]: sums over `rows` samples and positions, and the sum of the squared weights that read it."""

    rows: int
    absolute: Tensor  # |x|
    total: Tensor  # x
    squares: Tensor  # x²
    active: Tensor  # x ≠ 0
    weight: Tensor  # w²


def _watched(graph: Graph, samples: Samples, where: Mapping[str, Sequence[_Place]]) -> dict[_Place, _Seen]:
    """One pass over all batches."""
    seen: dict[_Place, _Seen] = {}

    def see(place: _Place, value: Tensor, weight: Tensor | None) -> None:
        if place not in seen:
            size = value.shape[place.dim]
            read = _squared_weights(place.reader, weight) if place.reader is not None and weight is not None else torch.ones(size)
            absolute, total, squares, active = torch.zeros(4, size, dtype=torch.float64)
            seen[place] = _Seen(0, absolute, total, squares, active, read.double().cpu())
        sums = seen[place]
        for rows in _rows(value, place.dim):
            sums.rows += len(rows)
            sums.absolute += rows.abs().sum(0)
            sums.total += rows.sum(0)
            sums.squares += rows.square().sum(0)
            sums.active += (rows != 0).sum(0)

    _watch(graph, samples, where, see)
    return seen


def _squared_weights(reader: Reader, weight: Tensor) -> Tensor:
    """[entries] of the axis that is read: Σ w² over all outputs and taps."""
    squares = matrix(reader, weight).double().square().sum(1)  # [groups, inputs · taps]
    return squares.reshape(squares.shape[0], -1, taps(reader, weight)).sum(2).flatten()


def _covariances(graph: Graph, samples: Samples, groups: Sequence[Group], where: Mapping[str, Sequence[_Place]]) -> dict[str, Tensor]:
    """[channels, channels] of each group: the covariance of what is read, summed over all places and entries that stand on its channels."""
    products = {group.name: torch.zeros(group.size, group.size, dtype=torch.float64) for group in groups}
    totals: dict[tuple[str, _Place, int], Tensor] = {}  # of every occurrence of the group at a place: [channels, entries]
    numbers: dict[_Place, int] = {}
    reading: dict[_Place, list[tuple[Group, int, Tensor]]] = {}
    for group in groups:
        for place in where[group.name]:
            for number, entries in enumerate(entries_of(place.axis, group.atom)):
                reading.setdefault(place, []).append((group, number, torch.as_tensor(entries)))
                totals[group.name, place, number] = torch.zeros(entries.shape, dtype=torch.float64)

    def see(place: _Place, value: Tensor, weight: Tensor | None) -> None:
        for rows in _rows(value, place.dim):
            numbers[place] = numbers.get(place, 0) + len(rows)
            for group, number, entries in reading[place]:
                x = rows[:, entries]  # [rows, channels, entries]
                totals[group.name, place, number] += x.sum(0)
                flat = x.transpose(1, 2).reshape(-1, group.size)
                products[group.name] += flat.T @ flat

    _watch(graph, samples, {group.name: where[group.name] for group in groups}, see)
    for (name, place, _), total in totals.items():
        products[name] -= total @ total.T / numbers[place]
    return products


def _leading(covariance: Tensor) -> Tensor:
    """[channels]: what of each channel's variance lies in the leading components. The scale is that of the matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    before = values.cumsum(0) - values
    leading = before < _VARIANCE * values.sum()
    return vectors[:, leading].square() @ values[leading]


def _portions(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """As many groups at one time as there is room for their covariances."""
    portion: list[Group] = []
    for group in groups:
        if portion and sum(g.size**2 for g in [*portion, group]) > _ROOM:
            yield portion
            portion = []
        portion.append(group)
    if portion:
        yield portion


def _rows(value: Tensor, dim: int) -> Iterator[Tensor]:
    """[samples · positions, entries] in float64, some rows at a time."""
    flat = value.movedim(dim, -1).reshape(-1, value.shape[dim])
    for rows in flat.split(max(1, _BLOCK // flat.shape[1])):
        yield rows.double().cpu()


class _Watch(fx.Interpreter):
    """Shows what is read at each place before the node runs. Buffers are copied, for the graph may write to them."""

    def __init__(self, module: fx.GraphModule, places: Sequence[_Place], see: Callable[[_Place, Tensor, Tensor | None], None]):
        super().__init__(module)
        self._places: dict[fx.Node, list[_Place]] = {}
        for place in places:
            self._places.setdefault(place.node, []).append(place)
        self._see = see

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.clone() if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) else value

    def run_node(self, n: fx.Node) -> Any:
        for place in self._places.get(n, ()):
            self._see(place, self.env[place.value], self.env[place.reader.weight] if place.reader is not None else None)
        return super().run_node(n)


@torch.no_grad()
def _watch(graph: Graph, samples: Samples, where: Mapping[str, Sequence[_Place]], see: Callable[[_Place, Tensor, Tensor | None], None]) -> None:
    places = list(dict.fromkeys(place for some in where.values() for place in some))
    for batch in samples.batches:
        run = _Watch(graph.module, places, see)
        run.run(*copies(batch), enable_io_processing=False)
