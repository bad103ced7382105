"""How far the answers of two models are apart, in one number; and its second derivative, by sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_SAME = 1e-3


def answers_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's answer."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]


def are_logits(answers: Sequence[Tensor]) -> bool:
    """One answer of [samples, classes] that is not already a probability."""
    return len(answers) == 1 and answers[0].dim() == 2 and answers[0].shape[1] > 1 and not bool(((answers[0] >= 0) & (answers[0] <= 1)).all())


def divergence(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Of class logits the mean Kullback–Leibler divergence KL(wanted ‖ got), in nats; else the squared error as a share of the variance of what is
    wanted, on average over the answers."""
    if are_logits(wanted):
        theirs, mine = wanted[0].double().log_softmax(1), got[0].double().log_softmax(1)
        return float((theirs.exp() * (theirs - mine)).sum(1).mean())
    shares = [(g.double() - w.double()).square().mean() / _spread(w.double()) for g, w in zip(got, wanted, strict=True)]
    return float(torch.stack(shares).mean()) if shares else 0.0


def sampled_loss(output: Any, generator: torch.Generator) -> Tensor:
    """A random scalar whose squared derivative by any activation is, in expectation, the diagonal of the second derivative of the divergence.

    Of class logits: Σ log p(class) with classes drawn from the model's own softmax, which gives the Fisher matrix (of KL, up to the factor ½; see
    Martens, New Insights and Perspectives on the Natural Gradient Method, 2020). Else: Σ ±answer with random signs, divided by the root of the
    answer's variance in one sample, which gives the Gauss–Newton matrix of the squared error (Hutchinson's estimate).
    """
    answers = answers_of(output)
    if not answers:
        raise RuntimeError("no floating-point answer")
    if are_logits([a.detach() for a in answers]):
        logs = answers[0].log_softmax(1)
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
        return logs.gather(1, drawn).sum()
    total = answers[0].new_zeros(())
    for answer in answers:
        spread = _spread(answer.detach()) * (answer.numel() / answer.shape[0] if answer.dim() else 1)
        signs = torch.randint(0, 2, answer.shape, generator=generator).to(answer) * 2 - 1
        total = total + (signs * answer).sum() / spread.sqrt()
    return total / len(answers) ** 0.5


def _spread(answer: Tensor) -> Tensor:
    """The variance between samples; and a little of the mean square, for an answer that is the same for all."""
    return (answer - answer.mean(0, keepdim=True)).square().mean() + _SAME * answer.square().mean() + 1e-30
