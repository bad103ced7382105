"""Criteria that differentiate the traced model on samples: how its answer, or a loss, depends on the weights.

All of them look at every parameter of a channel, biases and the scales of norms too. The model runs in evaluation mode, over leaves that share memory
with the user's parameters and are not them: nobody's `.grad` or `requires_grad` is touched, and what the model writes into is a copy.

The loss, given labels, of the first floating-point answer: cross-entropy in nats for integer labels, the mean squared error for floating-point ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from structprune.analysis.groups import Groups
from structprune.calibrate.divergence import answers_of, are_logits
from structprune.decide.weights import Scores, summed
from structprune.errors import InputError, first_line
from structprune.ir.graph import Graph
from structprune.ir.operators import operator_name
from structprune.ir.samples import Samples, copies, samples_in
from structprune.ops import RULES

_ONE_BY_ONE = 64  # samples that are differentiated one by one, where the square or the size of a gradient is asked for
_PROBES = 16  # of the second derivative, at the least
_IGNORED = -100  # the label that torch's cross-entropy passes over


# --- criteria -------------------------------------------------------------------------------------------------------------


def output_gradient(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """Σ_w E|∂ |f(x)|² / ∂w| over all weights of a channel; f: all floating-point answers; E: over samples, one by one, 64 at most.

    Aljundi et al., Memory Aware Synapses (MAS), 2018. Of a model whose batch is fixed, the gradient of a whole batch takes the place of a sample's.
    """

    def squared_norm(output: Any, label: Tensor | None) -> Tensor:
        return torch.stack([answer.float().square().sum() for answer in _answers(output)]).sum()

    return _finite(summed(groups, _averaged(graph, _one_by_one(samples), squared_norm, torch.abs)))


def loss_gradient(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """Σ_w E|∂ loss / ∂w| over all weights of a channel; E: over batches.

    The sensitivity of Mozer and Smolensky, Skeletonization, 1989, taken of weights instead of units.
    """
    return _finite(summed(groups, _averaged(graph, _batches(samples), loss_of, torch.abs)))


def taylor(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """E|Σ_w w · ∂ loss / ∂w|, the sum over all weights of a channel, E over batches: how much the loss changes, to first order, without the channel.

    Molchanov et al., Importance Estimation for Neural Network Pruning, 2019: its group form (Σ g w)², of which this is the root in every batch.
    The sum runs over the whole coupled group, before the absolute value is taken.
    """
    totals = {group.name: np.zeros(group.size) for group in groups}
    number = 0
    for size, gradients in _gradients(graph, _batches(samples), loss_of):
        products = {name: gradient * tensors[name].detach() for name, gradient in gradients.items() if name in groups.parameters}
        for name, change in summed(groups, products).items():
            totals[name] += size * np.abs(change)
        number += size
    return _finite({name: total / number for name, total in totals.items()})


def fisher(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """½ Σ_w E[g²] w² over all weights of a channel; g: the gradient of one sample's loss; E: over samples, one by one, 64 at most.

    The diagonal of the empirical Fisher matrix in the place of the Hessian of optimal brain damage: Theis et al., Faster gaze prediction with
    dense networks and Fisher pruning, 2018. Without labels they are drawn from what the model itself predicts, which gives the true Fisher
    matrix, up to a constant: classes from its softmax, or where it does not answer with class logits, its answer plus normal noise. Of a model
    whose batch is fixed, the gradient of a whole batch takes the place of a sample's.
    """
    means = _mean_squares(graph, samples, seed)
    return _finite(_second_order(groups, tensors, means))


def hessian(groups: Groups, tensors: Mapping[str, Tensor], *, graph: Graph, samples: Samples, seed: int = 0) -> Scores:
    """½ Σ_w h w² over all weights of a channel; h: the diagonal of the second derivative of the loss, as the mean of v · (H v) over random signs v.

    LeCun et al., Optimal Brain Damage, 1990; Bekas et al., An estimator for the diagonal of a matrix, 2007, after Hutchinson, 1990. 16 probes at the
    least, and one a batch. A score may be negative, where the loss curves downward, or by the noise of the estimate.
    """
    parts = list(_batches(samples))
    probes = math.ceil(_PROBES / len(parts))
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    for batch, label in parts:
        with _derivatives(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            leaves, names = _leaves(graph)
            loss = loss_of(_run(graph, leaves, batch), label)
            gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
            for probe in range(probes):
                signs = [torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1 for leaf in leaves.values()]
                along = [(g * v).sum() for g, v in zip(gradients, signs, strict=True) if g is not None and g.requires_grad]
                if not along:  # the gradient is the same everywhere
                    continue
                products = torch.autograd.grad(torch.stack(along).sum(), list(leaves.values()), retain_graph=probe + 1 < probes, allow_unused=True)
                share = samples_in(batch) / (probes * len(samples))
                for key, product, v in zip(leaves, products, signs, strict=True):
                    if product is not None:
                        for name in names[key]:
                            sums[name] = sums.get(name, torch.zeros(())) + share * (v * product).float()
    return _finite(_second_order(groups, tensors, sums))


# --- gradients by the names of tensors, for whoever reads them ----------------------------------------------------------------


def mean_gradient(graph: Graph, samples: Samples) -> dict[str, Tensor]:
    """∂ loss / ∂w of every parameter that the loss depends on, under all its names: the mean over all samples. Labels are needed."""
    return _averaged(graph, _batches(samples), loss_of, torch.clone)


def mean_squared_gradient(graph: Graph, samples: Samples) -> dict[str, Tensor]:
    """E[(∂ loss / ∂w)²] of the same, over samples one by one, 64 at most."""
    return _mean_squares(graph, samples, seed=0)


def _mean_squares(graph: Graph, samples: Samples, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with _derivatives(), torch.no_grad():
        classes = are_logits(_answers(_run(graph, {}, samples.batches[0])))

    def loss(output: Any, label: Tensor | None) -> Tensor:
        return loss_of(output, label if label is not None else _drawn(_answers(output)[0].detach().float().cpu(), classes, generator))

    return _averaged(graph, _one_by_one(samples), loss, torch.square)


def _second_order(groups: Groups, tensors: Mapping[str, Tensor], curvature: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return summed(groups, {n: c * tensors[n].detach().float().square() / 2 for n, c in curvature.items() if n in groups.parameters})


def _averaged(
    graph: Graph, parts: Iterator[tuple[list[Any], Tensor | None]], loss: Callable[[Any, Tensor | None], Tensor], each: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The mean of `each(gradient)` over the parts, which count by their samples."""
    sums: dict[str, Tensor] = {}
    number = 0
    for size, gradients in _gradients(graph, parts, loss):
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, torch.zeros(())) + size * each(gradient.float())
        number += size
    return {name: total / number for name, total in sums.items()}


# --- losses ---------------------------------------------------------------------------------------------------------------


def loss_of(output: Any, label: Tensor | None) -> Tensor:
    """The loss of the model's first floating-point answer: the mean over samples, and over the positions that have a label.

    Integer labels are classes, of the axis of the answer, 1 or else the last, without which it has the labels' shape; −100 is passed over.
    Floating-point labels have the answer's shape, axes of one aside. Raises InputError for labels that do not fit.
    """
    assert label is not None
    first = _answers(output)[0]
    answer, label = first.float(), label.to(first.device)
    shapes = f"labels of shape {_shape(label)} do not fit the model's answer of shape {_shape(answer)}"
    if label.is_floating_point():
        if [s for s in label.shape if s != 1] != [s for s in answer.shape if s != 1]:
            raise InputError(f"{shapes}; floating-point labels have the answer's shape")
        return F.mse_loss(answer, label.reshape(answer.shape).float())
    axes = [d for d in (1, answer.dim() - 1) if answer.dim() > 1 and answer.shape[d] > 1 and answer.shape[:d] + answer.shape[d + 1 :] == label.shape]
    if not axes:
        raise InputError(f"{shapes}; integer labels are classes, and have that shape without its axis of classes, 1 or the last")
    classes, counted = answer.shape[axes[0]], label != _IGNORED
    if bool((counted & ((label < 0) | (label >= classes))).any()):
        raise InputError(f"labels from {int(label.min())} to {int(label.max())} do not fit the {classes} classes of the model's answer")
    total = F.cross_entropy(answer.movedim(axes[0], 1), label.long(), ignore_index=_IGNORED, reduction="sum")
    return total / counted.sum().clamp_min(1)


def _drawn(answer: Tensor, classes: bool, generator: torch.Generator) -> Tensor:
    """A label that the model itself might give: a class from its softmax, or its answer with normal noise of variance 1."""
    if classes:
        return torch.multinomial(answer.softmax(1), 1, generator=generator)[:, 0]
    return answer + torch.randn(answer.shape, generator=generator)


def _answers(output: Any) -> list[Tensor]:
    answers = answers_of(output)
    if not answers:
        raise InputError("the model cannot be differentiated: it has no floating-point answer; use criterion='l2', or 'reconstruction'")
    return answers


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "()"


# --- running and differentiating --------------------------------------------------------------------------------------------


def _gradients(
    graph: Graph, parts: Iterator[tuple[list[Any], Tensor | None]], loss: Callable[[Any, Tensor | None], Tensor]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """For every part its number of samples and the gradient of its loss by every parameter that it depends on, under all names of each."""
    with _derivatives():
        leaves, names = _leaves(graph)
    for batch, label in parts:
        with _derivatives():
            value = loss(_run(graph, leaves, batch), label)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        yield samples_in(batch), {name: g for key, g in zip(leaves, found, strict=True) if g is not None for name in names[key]}


def _leaves(graph: Graph) -> tuple[dict[int, Tensor], dict[int, list[str]]]:
    """What is differentiated by, in the place of every parameter, by the identity of the parameter; and its names. A tied weight is one leaf."""
    leaves: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for node in graph.nodes:
        tensor = graph.tensor(node) if node.op == "get_attr" else None
        if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            if id(tensor) not in leaves:
                leaves[id(tensor)] = tensor.detach().requires_grad_()
            known = names.setdefault(id(tensor), [])
            known += [name for name in graph.aliases.get(str(node.target), ()) if name not in known]
    return leaves, names


class _Run(fx.Interpreter):
    """Runs a graph over other tensors than the parameters that it holds; of any other tensor over a copy, for it may write to it."""

    def __init__(self, module: fx.GraphModule, leaves: Mapping[int, Tensor]):
        super().__init__(module)
        self._leaves = leaves

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, Tensor):
            return value
        return self._leaves[id(value)] if id(value) in self._leaves else value.clone()

    def run_node(self, n: fx.Node) -> Any:
        """Raises NotImplementedError for an operator, of those that we know nothing of, that silently passes no derivative on."""
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
            depends = any(isinstance(v, Tensor) and v.requires_grad for v in (self.env[o] for o in n.all_input_nodes))
            if depends and torch.is_grad_enabled() and operator_name(n) not in RULES:
                raise NotImplementedError(f"the derivative for '{operator_name(n)}' is not implemented.")
        return value


def _run(graph: Graph, leaves: Mapping[int, Tensor], batch: Sequence[Any]) -> Any:
    return _Run(graph.module, leaves).run(*copies(batch), enable_io_processing=False)


@contextmanager
def _derivatives() -> Iterator[None]:
    """Derivatives are on, whatever the caller has switched off; where there is none, an InputError repeats torch's word, which names the operator."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"the model cannot be differentiated: {first_line(error).removesuffix('.')}; use criterion='l2', or 'reconstruction'"
        ) from error


def _batches(samples: Samples) -> Iterator[tuple[list[Any], Tensor | None]]:
    labels: Sequence[Tensor | None] = samples.labels if samples.labels is not None else [None] * len(samples.batches)
    yield from zip(samples.batches, labels, strict=True)


def _one_by_one(samples: Samples) -> Iterator[tuple[list[Any], Tensor | None]]:
    """Some samples as batches of one; whole batches where the model takes no others, or labels are not one for each sample."""
    each_has_its_label = (label is None or (label.dim() and len(label) == samples_in(batch)) for batch, label in _batches(samples))
    apart = samples.divisible and all(each_has_its_label)
    for batch, label in _batches(replace(samples, divisible=apart).spread(_ONE_BY_ONE)):
        for part in [slice(n, n + 1) for n in range(samples_in(batch))] if apart else [slice(None)]:
            yield (
                [v[part] if isinstance(v, Tensor) and v.dim() else v for v in batch],
                None if label is None else label[part] if label.dim() else label,
            )


def _finite(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not all(np.isfinite(values).all() for values in scores.values()):
        raise InputError("the model's derivatives on these samples are not finite; use criterion='l2', or 'reconstruction'")
    return scores
