"""What a pruned model learns from: the answers of the dense one, features inside it, and labels where there are any.

Every loss is a mean over the batch, and the terms are added as they are. They see the whole batch, on however many processes it was computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from structprune.errors import InputError

TEMPERATURE = 2.0  # of `divergence`: the teacher's second thoughts count, its noise hardly
_LEAST = 1e-12  # beside which a variance counts as none


def losses(
    answers: Sequence[Tensor],
    wanted: Sequence[Tensor],
    names: Sequence[str],
    *,
    distill: Sequence[str],
    labels: Tensor | None = None,
    features: Sequence[tuple[Tensor, Tensor]] = (),
) -> dict[str, Tensor]:
    """The terms of the loss by name, each a scalar. `answers` and `wanted` (the teacher's) are floating-point, the batch on the first axis.

    names: of the answers, as the model calls them. labels: see `from_labels`. features: pairs of the small model's and the teacher's.
    distill: of DISTILL. 'logits' and 'dist' compare distributions over classes and fall back to 'mse' for answers that are none; see `is_logits`.
    """
    terms: dict[str, Tensor] = {}

    def add(name: str, value: Tensor, share: int = 1) -> None:
        terms[name] = terms.get(name, 0) + value / share  # type: ignore[assignment]

    for answer, target, name in zip(answers, wanted, names, strict=True):
        mine, theirs = _precise(answer), _precise(target).to(_precise(answer))
        for kind in dict.fromkeys(kind if is_logits(answer, name) else "mse" for kind in distill):
            add(kind, _LOSSES[kind](mine, theirs), len(answers))
    for mine, theirs in features:
        add("features", relative_error(_precise(mine), _precise(theirs)), len(features))
    if labels is not None:
        add("labels", from_labels(answers, labels))
    return terms


def is_logits(answer: Tensor, name: str) -> bool:
    """Whether an answer is taken for class logits on its last axis: a matrix of two columns or more, or any answer that is called logits.

    Nothing tells a matrix of logits from an embedding or a regression; `distill=("mse",)` says that it is none.
    """
    return answer.dim() >= 2 and answer.shape[-1] >= 2 and (answer.dim() == 2 or "logits" in name.lower())


def divergence(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), over the last axis [..., classes], the mean over all rows.

    T² keeps the gradient's size as T changes (Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2).
    """
    mine, theirs = (functional.log_softmax(z.flatten(0, -2) / temperature, -1) for z in (student, teacher))
    return temperature**2 * functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """DIST: 1 − ρ between the probabilities of each row, plus 1 − ρ between those of each class over the batch; means over rows and classes.

    ρ is Pearson's correlation, and the probabilities are softmax over the last axis [..., classes] at temperature 1 (Huang et al., Knowledge
    Distillation from A Stronger Teacher, arXiv:2205.10536, equations 7 to 10, with β = γ = 1).
    """
    mine, theirs = (functional.softmax(z.flatten(0, -2), -1) for z in (student, teacher))
    between_classes = 1 - _pearson(mine, theirs).mean()
    within_classes = 1 - _pearson(mine.T, theirs.T).mean()
    return between_classes + within_classes


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """E[(student − teacher)²] / Var[teacher], over all entries of the batch: 1 is what the constant mean would score."""
    scale = teacher.var(correction=0).clamp_min(_LEAST)
    return (student - teacher).square().mean() / scale


def from_labels(answers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy with the first answer that the labels fit.

    labels: class indices (whole numbers, −100 for those that do not count), of the answer's shape without its classes, which stand on the last axis
    or, of pictures [N, C, H, W], on the second; or probabilities of the answer's own shape. Raises InputError for labels that fit no answer.
    """
    for answer in map(_precise, answers):
        if labels.is_floating_point() and labels.shape == answer.shape:
            return functional.cross_entropy(answer.flatten(0, -2), labels.to(answer.dtype).flatten(0, -2))
        if not labels.is_floating_point() and answer.dim() >= 2:
            if labels.shape == answer.shape[:-1]:
                return functional.cross_entropy(answer.flatten(0, -2), labels.long().flatten())
            if labels.shape == (answer.shape[0], *answer.shape[2:]):
                return functional.cross_entropy(answer, labels.long())
    given, taken = "x".join(map(str, labels.shape)), ", ".join("x".join(map(str, a.shape)) for a in answers)
    raise InputError(
        f"labels of type {str(labels.dtype).removeprefix('torch.')} and shape {given} fit no answer ({taken}); give class indices, one for each "
        "row of logits, or labels=False to learn from the teacher alone"
    )


_LOSSES = {"logits": divergence, "dist": correlation, "mse": relative_error}
DISTILL = tuple(_LOSSES)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the rows of two matrices: [rows]."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).clamp_min(_LEAST**2).sqrt()


def _precise(value: Tensor) -> Tensor:
    """Losses of half-precision answers are computed in float32."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
