"""What the model's answer loses when one group is narrowed: measured on samples, group by group.

For a few widths of each group the dense model is cut down in that group alone, what reads the group is fitted to the channels that are left (from
the moments of the dense model, see recovery/compensate.py for the formula), and the divergence of the answers is measured. Between the measured
widths a curve follows its shape: that of the criterion's reconstruction losses where there are, else 1/k − 1 of the importance kept. Losses of
several groups are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from structprune import processes
from structprune.analysis.groups import Groups
from structprune.calibrate.damped import factor
from structprune.calibrate.divergence import answers_of, divergence
from structprune.calibrate.logits import Logits, turn_weights, turns
from structprune.calibrate.moments import Moments
from structprune.calibrate.readers import from_matrix, matrix, reader_of, shift_of
from structprune.calibrate.stepping import answer
from structprune.decide.plan import best_channels, cuts
from structprune.ir.axes import Atom, Keep, kept_entries
from structprune.ir.graph import Graph, attribute
from structprune.ir.group import Group
from structprune.ir.samples import Samples, samples_in
from structprune.transform.branches import void_nodes
from structprune.transform.surgery import kept_part, operate

_SHARES = (0.5, 0.75, 0.25)  # of a group's channels
_RUNS = 120  # of narrowed models, about: of a model of many groups fewer widths are measured
_WORK = 1e12  # multiply-accumulates that all measurements together may take
_MOST, _LEAST = 128, 4  # samples
_RIDGE = 1e-3  # of the mean diagonal
_NOISE = 1e-9


@torch.no_grad()
def measured_losses(
    graph: Graph,
    groups: Groups,
    scores: Mapping[str, np.ndarray],
    shapes: Mapping[str, np.ndarray],
    found: Mapping[fx.Node, Moments],
    logits: Sequence[Logits],
    samples: Samples,
    branches: Mapping[Atom, frozenset[Atom]],
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, np.ndarray]:
    """[channels + 1] of every group: the divergence of the answers when that many of its best channels stay. shapes: curves that it
    follows. branches: what may go whole; where none stay, the divergence is that without the branch, in equal parts to the groups that go with
    each other.
    """
    shares = _SHARES[: max(1, _RUNS // len(groups))]
    several = list(dict.fromkeys(branches.values()))
    batches = _some(samples, graph, groups, len(shares) * len(groups) + len(several))
    wanted = _run(graph.module, batches)
    lost = {}
    for number, gone in processes.share_of(enumerate(several)):
        say(f"measure what branch {number + 1} of {len(several)} is worth")
        lost[str(number)] = max(_NOISE, divergence(_run(_without(graph, groups, found, gone), batches), wanted))
    measured = {}
    for number, group in processes.share_of(enumerate(groups)):
        say(f"measure what group {number + 1} of {len(groups)} is worth")
        points = {group.size: 0.0}
        for width in sorted({max(1, round(share * group.size)) for share in shares} - {group.size}, reverse=True):
            keep = best_channels([group], {group.atom: width}, scores)
            points[width] = max(_NOISE, divergence(_run(_narrowed(graph, groups, found, logits, group, keep), batches), wanted))
        measured[group.name] = points
    curves = {name: _curve(points, shapes[name]) for name, points in processes.all_of(measured).items()}
    lost = processes.all_of(lost)
    for group in groups:
        if group.atom in branches:
            whole = branches[group.atom]
            curves[group.name][0] = lost[str(several.index(whole))] / sum(branches.get(atom) == whole for atom in whole)
        elif any(group.atom in gone for gone in several):
            curves[group.name][0] = 0.0  # it goes with another
    return curves


def _some(samples: Samples, graph: Graph, groups: Groups, runs: int) -> Sequence[list[Any]]:
    """As many of the samples as the work allows."""
    example = max(1, groups.macs() // samples_in(graph.given_inputs()))
    return samples.spread(int(min(_MOST, max(_LEAST, _WORK / (runs * example))))).batches


def _run(module: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> list[Tensor]:
    """The answers to all batches, one after the other along the first axis."""
    parts = [answers_of(answer(module, batch)) for batch in batches]
    return [torch.cat(list(same)) if same[0].dim() else torch.stack(list(same)) for same in zip(*parts, strict=True)]


def _narrowed(graph: Graph, groups: Groups, found: Mapping[fx.Node, Moments], logits: Sequence[Logits], group: Group, keep: Keep) -> fx.GraphModule:
    """The model with one group cut, and its readers fitted to what is left; or queries and keys to their product."""
    surgery = operate(graph, groups.types, keep, cuts(groups.axes, keep))
    turn_weights(graph, groups.types, keep, surgery, turns(logits, keep))
    for small, node in surgery.originals.items():
        if node in found:
            _refit(graph, groups, found[node], group.atom, keep, surgery.module, small)
    return surgery.module


def _without(graph: Graph, groups: Groups, found: Mapping[fx.Node, Moments], gone: Iterable[Atom]) -> fx.GraphModule:
    """The model without a branch: what read it answers the mean of what it did."""
    keep = {atom: np.zeros(0, dtype=np.int64) for atom in gone}
    answers, void = {}, void_nodes(graph.nodes, groups.types, keep)
    for node, moments in found.items():
        if moments.reader.input in void:
            weight, bias = graph.tensor(moments.reader.weight).detach(), moments.reader.bias
            mean = (matrix(moments.reader, weight).double() @ moments.mean[..., None]).flatten()
            answers[node] = mean if bias is None else mean + graph.tensor(bias)
    return operate(graph, groups.types, keep, cuts(groups.axes, keep), answers).module


def _refit(graph: Graph, groups: Groups, moments: Moments, atom: Atom, keep: Keep, module: fx.GraphModule, small: fx.Node) -> None:
    reader = moments.reader
    shape = groups.types.shape(reader.weight)
    axis = shape[reader.input_axis]
    if moments.diagonal_only or atom not in set(groups.types.solver.atoms(axis)) or (reader.kind == "transposed" and reader.groups > 1):
        return
    weight = graph.tensor(reader.weight).detach()
    dense = matrix(reader, weight).double()
    window = dense.shape[-1] // axis.size
    stays = torch.as_tensor((kept_entries(axis, keep)[:, None] * window + np.arange(window)).ravel())
    goes = torch.ones(dense.shape[-1], dtype=torch.bool).index_fill(0, stays, False)
    gram = moments.gram[:, stays][:, :, stays]
    cross = (dense[:, :, goes] @ moments.gram[:, goes][:, :, stays]).transpose(1, 2)
    change = torch.cholesky_solve(cross, factor(gram, _RIDGE)).transpose(1, 2)
    fitted = dense.clone()
    fitted[:, :, stays] += change
    mine = reader_of(small)
    assert mine is not None
    held = attribute(module, str(mine.weight.target))
    held.copy_(kept_part(from_matrix(reader, fitted, weight), shape, keep).to(held.dtype))
    if (shift := shift_of(mine, module)) is not None:
        amount = (dense[:, :, goes] @ moments.mean[:, goes, None] - change @ moments.mean[:, stays, None]).flatten()
        shift(kept_part(amount, (groups.types.shape(reader.node)[reader.answer_axis],), keep))


def _curve(points: Mapping[int, float], shape: np.ndarray) -> np.ndarray:
    """The shape, scaled to go through the points: the factor is interpolated between them on a logarithmic scale."""
    size = len(shape) - 1
    base = np.maximum(shape, _NOISE * max(1.0, float(shape.max())))
    widths = sorted(w for w in points if w < size)
    if not widths:
        return np.concatenate([base[:-1], [0.0]])
    factors = np.interp(np.arange(size + 1), widths, [np.log(points[w] / base[w]) for w in widths])
    curve = base * np.exp(factors)
    curve[-1] = 0.0
    return np.maximum.accumulate(curve[::-1])[::-1]
