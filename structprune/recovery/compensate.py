"""Compensation without labels: the weights that are left are fitted so that every layer answers as it does in the dense model.

Both models go through the same samples side by side, node by node. At every reader (a convolution, a linear layer) of the small model whose answer
differs from the dense one's, weights and bias are fitted by ridge regression of the difference r on what the reader reads *in the small model*,
in which all readers before it have been fitted already:

    ΔW = C (G + λI)⁻¹,   Δb = E[r] − ΔW E[x]      G = E[(x − E[x])(x − E[x])ᵀ],   C = E[(r − E[r])(x − E[x])ᵀ]

which is the regression of the dense answer on x, drawn towards the weights as they are. λ is the share of G's mean diagonal, among `_RIDGES`, that
fits one half of the samples best (`samples.held_back`) when it is fitted to the other; where none does better than no change at all, nothing
changes, so that too few samples do not spoil. (The closed form is that of He et al., Channel Pruning for Accelerating Very Deep Neural Networks,
2017, and of Frantar and Alistarh, Optimal Brain Compression, 2022.)

Where the answer is added to another branch (a residual stream), what that branch is off by is part of r: the last layer of each block makes up for
what the stream has lost so far. A convolution without a bias leaves Δb to the running mean of its batch norm. Norms over channels have their scales
and shifts fitted in the same way, channel by channel. Queries and keys are fitted to their product; see calibrate/logits.py. What stands in for a
branch without channels becomes the mean of what is missing where it is added, the regression where it is a factor, and else the branch's mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from structprune import processes
from structprune.analysis.infer import Types
from structprune.calibrate.arrivals import MEMORY, arrivals
from structprune.calibrate.damped import factor
from structprune.calibrate.logits import Turn, turn_weights
from structprune.calibrate.readers import Reader, from_matrix, places, reader_of, readers, rows_of_answer, rows_of_input, shift_of
from structprune.calibrate.stepping import Stepping
from structprune.ir.axes import Keep
from structprune.ir.graph import Graph, attribute, choices
from structprune.ir.operators import operator_name
from structprune.ir.samples import Samples, samples_in
from structprune.transform.surgery import StandIn, Surgery, kept_part

_ROWS = 60_000  # that a reader is fitted to, of all samples together
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # shares of the mean diagonal
_NOTHING = 1e-10  # of the answer's energy: a difference that is rounding
_FLAT = 1e-2  # of the largest scale of a batch norm: a channel scaled by less does not carry corrections


@dataclass(frozen=True)
class Fitted:
    """One reader: the energy of the difference from the dense answer as a share of the answer's variance, before and after."""

    name: str
    before: float
    after: float
    ridge: float


@torch.no_grad()
def compensate(
    graph: Graph,
    types: Types,
    keep: Keep,
    surgery: Surgery,
    samples: Samples,
    progress: Callable[[str], None] = lambda line: None,
    turned: Mapping[fx.Node, Turn] = MappingProxyType({}),
) -> list[Fitted]:
    """Fit the small model's weights, in place, on samples without labels. Returns what was fitted, in the order of the graph.

    turned: the readers, of the dense graph, that answer in another basis, where queries and keys are narrowed; see calibrate/logits.py.
    """
    turn_weights(graph, types, keep, surgery, turned)
    dense, small = Stepping(graph.module), Stepping(surgery.module)
    joining = arrivals(graph, samples, MEMORY / 2)
    joined = int(processes.number_of_all(sum(samples_in(one.batch) for some in joining.values() for one in some)))
    if joined < len(samples):
        progress(f"{joined} of {len(samples)} samples are used: the values of more take over {MEMORY >> 30} GiB")
    firsts: list[float] = []  # of each batch, the share that the ridge is not chosen by
    mine = readers(graph)
    chosen = choices(graph.nodes)
    constants = {stand_in.reader: stand_in for stand_in in surgery.stand_ins}
    fitted = []
    while (node := small.upcoming) is not None:
        original = surgery.originals.get(node)
        if original is not None:
            while dense.upcoming is not None and not dense.holds(original):
                passed = dense.upcoming
                for run in (dense, small):
                    run.join(one.batch for one in joining.get(passed, ()))
                firsts += [one.first for one in joining.get(passed, ())]
                dense.step()
                if passed is not original:
                    dense.forget(passed)
        if original in mine:
            reader = reader_of(node)
            assert reader is not None
            found = _fit(reader, mine[original], graph, types, keep, surgery, dense, small, firsts, turned.get(original))
            if found is not None:
                fitted.append(found)
                progress(f"compensate {len(fitted)} of {len(mine)} layers: {found.name}")
        elif node in constants and (found := _fit_constant(constants[node], graph, types, keep, surgery, dense, small)) is not None:
            fitted.append(found)
        small.step()
        if original in chosen:  # rows that are compared have to be the same tokens' in both
            for wide, narrow in zip(dense.values, small.values, strict=True):
                narrow[node] = pytree.tree_map(_choice, narrow[node], wide[original])
        small.forget(node)
        if original is not None:
            dense.forget(original)
    return fitted


def _choice(own: Any, dense: Any) -> Any:
    return dense if isinstance(own, Tensor) and not own.is_floating_point() and own.shape == dense.shape else own


def _fit(
    reader: Reader,
    dense_reader: Reader,
    graph: Graph,
    types: Types,
    keep: Keep,
    surgery: Surgery,
    dense: Stepping,
    small: Stepping,
    firsts: Sequence[float],
    turn: Turn | None,
) -> Fitted | None:
    node, original = reader.node, dense_reader.node
    module = surgery.module
    weight: Tensor = attribute(module, str(reader.weight.target))
    shape = types.shape(original)
    shift = shift_of(reader, module)
    branch = _branch_of(node, module)
    moments = _Moments(shift is not None)
    total = processes.number_of_all(sum(wide[original].shape[0] for wide in dense.values))
    if not total:  # no sample chose it
        return None
    for number, (wide, narrow, answer) in enumerate(zip(dense.values, small.values, small.compute(node), strict=True)):
        chosen = places(reader, answer, _ROWS / total, seed=number)
        wanted = kept_part(wide[original] if turn is None else turn(wide[original], dense_reader.answer_axis), shape, keep)
        difference = wanted - answer
        if branch is not None and (behind := _behind(branch, surgery, types, keep, wide, narrow)) is not None:
            difference = difference + behind
        space = answer.shape[2:] if reader.rank else ()
        moments.add(
            rows_of_input(reader, narrow[reader.input], weight.shape[2:], space, chosen),
            rows_of_answer(reader, difference, chosen),
            rows_of_answer(reader, wanted, chosen),
            first=firsts[number],
        )
    moments.gather()
    if not moments.energy > _NOTHING * moments.scale or not math.isfinite(moments.energy):  # nothing is off, or masks of -inf are read
        return None
    change, bias, ridge, after = moments.solve()
    weight.copy_((weight + from_matrix(reader, change, weight)).to(weight.dtype))
    if shift is not None:
        shift(bias.flatten())
    return Fitted(graph.aliases[str(dense_reader.weight.target)][0], moments.energy / moments.scale, after / moments.scale, ridge)


def _fit_constant(stand_in: StandIn, graph: Graph, types: Types, keep: Keep, surgery: Surgery, dense: Stepping, small: Stepping) -> Fitted | None:
    """Fit what stands in for a branch to the dense answer where it is added or multiplied, or else to the branch's own answer."""
    node = stand_in.reader
    name, operands = operator_name(node), node.all_input_nodes
    other = next((n for n in operands if n.target != stand_in.name), None)
    joins = name in ("add", "mul") and len(node.args) == 2 and not node.kwargs and other is not None and other.op != "get_attr"
    aimed = surgery.originals[node] if joins else stand_in.branch
    held: Tensor = attribute(surgery.module, stand_in.name)
    parts = []
    for wide, narrow in zip(dense.values, small.values, strict=True):
        wanted = kept_part(wide[aimed], types.shape(aimed), keep).double()
        x = narrow[other].double() if joins and other is not None else torch.zeros_like(wanted)
        aim, factor = (wanted, x) if joins and name == "mul" else (wanted - x, torch.ones_like(x))
        values = (factor * aim, factor.square(), aim.square(), wanted, wanted.square(), torch.ones_like(wanted))
        parts.append(torch.stack([value.sum_to_size(held.shape) for value in values]))
    (sums,) = processes.total(torch.stack(parts).sum(0))
    along, own, energy, mean, square, number = sums
    value = torch.where(own > 0, along / own.clamp_min(1e-30), held.double())
    before, after = (float((energy - 2 * c * along + c.square() * own).sum()) for c in (held.double(), value))
    scale = float((square - mean.square() / number).sum()) + 1e-30
    if not math.isfinite(before + after):
        return None
    held.copy_(value)
    return Fitted(stand_in.name, before / scale, after / scale, 0.0)


def _branch_of(node: fx.Node, module: fx.GraphModule) -> tuple[fx.Node, Tensor] | None:
    """The other operand of the addition that a reader's answer goes into, and the scale of each channel (axis 1, or the last) on the way."""
    scale: Tensor | None = None
    while len(node.users) == 1:
        user = next(iter(node.users))
        name = operator_name(user)
        if name == "batch_norm" and user.args[5] is False:
            weight, variance = user.args[1], user.args[4]
            if not (isinstance(weight, fx.Node) and isinstance(variance, fx.Node)):
                return None
            own = attribute(module, str(weight.target)) / (attribute(module, str(variance.target)) + user.args[7]).sqrt()
            scale = own.view(-1, *[1] * (user.meta["val"].dim() - 2)) * (1 if scale is None else scale)
        elif name == "mul" and isinstance(user.args[1], fx.Node) and user.args[1].op == "get_attr" and user.args[0] is node:
            scale = attribute(module, str(user.args[1].target)) * (1 if scale is None else scale)
        elif name == "add" and not user.kwargs and len(user.args) == 2:
            other = user.args[1] if user.args[0] is node else user.args[0]
            same = isinstance(other, fx.Node) and other is not node and other.meta["val"].shape == node.meta["val"].shape
            return (other, torch.ones(()) if scale is None else scale) if same else None  # type: ignore[return-value]
        elif name not in ("dropout", "clone", "contiguous"):
            return None
        node = user
    return None


def _behind(
    branch: tuple[fx.Node, Tensor], surgery: Surgery, types: Types, keep: Keep, wide: Mapping[fx.Node, Any], narrow: Mapping[fx.Node, Any]
) -> Tensor | None:
    """What the other branch is off by, in units of the reader's answer; None where it is not known yet."""
    other, scale = branch
    original = surgery.originals.get(other)
    if original is None or original not in wide or other not in narrow:
        return None
    off = kept_part(wide[original], types.shape(original), keep) - narrow[other]
    carries = scale.abs() > _FLAT * scale.abs().max()
    return torch.where(carries, off / torch.where(carries, scale, torch.ones_like(scale)), torch.zeros_like(off))


class _Moments:
    """Sums over rows of x, the difference r and their products, in float64, for two halves of the rows."""

    def __init__(self, with_shift: bool):
        self._with_shift = with_shift
        self._origin: Tensor | None = None  # from which x is measured, [groups, 1, n]: near its mean, little is lost to rounding
        self._halves: list[dict[str, Tensor]] = []
        self._number = [0, 0]
        self.energy = 0.0
        self.scale = 0.0

    def add(self, x: Tensor, r: Tensor, wanted: Tensor, first: float) -> None:
        """x: [groups, rows, n]; r and wanted: [groups, rows, m]; first: the share of the rows that is of the first half."""
        x, r = x.float(), r.float()
        if self._with_shift:
            if self._origin is None:
                self._origin = processes.same_everywhere(x.mean(1, keepdim=True).nan_to_num())  # of no rows it is no number
            x = torch.cat([x - self._origin, x.new_ones(*x.shape[:2], 1)], 2)
        middle = round(first * x.shape[1])
        for half, (own, off) in enumerate(((x[:, :middle], r[:, :middle]), (x[:, middle:], r[:, middle:]))):
            found = {
                "xx": torch.bmm(own.transpose(1, 2), own).double(),
                "rx": torch.bmm(off.transpose(1, 2), own).double(),
                "rr": off.double().square().sum((1, 2)),
            }
            self._number[half] += own.shape[1]
            if len(self._halves) <= half:
                self._halves.append(found)
            else:
                for name, value in found.items():
                    self._halves[half][name] += value
        self.energy += float(r.double().square().sum())
        self.scale += float((wanted - wanted.mean(1, keepdim=True)).double().square().sum()) + 1e-30

    def gather(self) -> None:
        """Of all processes that share the work."""
        for half in self._halves:
            half.update(zip(half, processes.total(*half.values()), strict=True))
        self._number = [int(processes.number_of_all(n)) for n in self._number]
        self.energy, self.scale = processes.number_of_all(self.energy), processes.number_of_all(self.scale)

    def solve(self) -> tuple[Tensor, Tensor, float, float]:
        """ΔW [groups, m, n], Δb [groups, m], the ridge, and the energy that is left of the difference."""
        whole = {name: self._halves[0][name] + self._halves[1][name] for name in self._halves[0]}
        number = sum(self._number)
        first, second = self._halves
        ridges = (*_RIDGES, math.inf) if all(self._number) else (math.inf,)
        trials = {ridge: self._left(self._fitted(first, self._number[0], ridge), second) for ridge in ridges}
        ridge = min(trials, key=lambda k: trials[k])
        fitted = self._fitted(whole, number, ridge)
        if trials[ridge] >= float(second["rr"].sum()):  # it fits the noise of its own half
            fitted = torch.zeros_like(fitted)
        left = self._left(fitted, whole)
        if self._origin is None:
            return fitted, fitted[..., 0] * 0, ridge, left
        change = fitted[..., :-1]
        return change, fitted[..., -1] - (change @ self._origin.double().transpose(1, 2))[..., 0], ridge, left

    def _fitted(self, sums: Mapping[str, Tensor], number: int, ridge: float) -> Tensor:
        """[groups, m, n (+ 1)]."""
        xx, rx = sums["xx"] / max(1, number), sums["rx"] / max(1, number)
        if not self._with_shift:
            return torch.zeros_like(rx) if ridge == math.inf else _solved(xx, rx, ridge)
        mean, off = xx[..., :-1, -1], rx[..., -1]
        if ridge == math.inf:
            return torch.cat([torch.zeros_like(rx[..., :-1]), off[..., None]], -1)
        covariance = xx[..., :-1, :-1] - mean[..., :, None] * mean[..., None, :]
        change = _solved(covariance, rx[..., :-1] - off[..., :, None] * mean[..., None, :], ridge)
        return torch.cat([change, (off - (change @ mean[..., None])[..., 0])[..., None]], -1)

    @staticmethod
    def _left(fitted: Tensor, sums: Mapping[str, Tensor]) -> float:
        return float(sums["rr"].sum() - 2 * (fitted * sums["rx"]).sum() + ((fitted @ sums["xx"]) * fitted).sum())


def _solved(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """cross (gram + λI)⁻¹ with λ = ridge · mean diagonal."""
    return torch.cholesky_solve(cross.transpose(-2, -1), factor(gram, ridge)).transpose(-2, -1)
