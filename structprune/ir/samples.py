"""`Samples`: what a model is calibrated on; and what it answers to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_RUNS = 8  # of samples that are neighbours, of which some are held back


def samples_in(batch: Sequence[Any]) -> int:
    """How many samples a batch of inputs holds: the first axis of the first tensor that has one."""
    return next((v.shape[0] for v in batch if isinstance(v, Tensor) and v.dim()), 1)


def held_back(count: int, share: float) -> set[int]:
    """The numbers of about that share of samples, on which what the others teach is judged.

    Samples that are alike (frames of a video, parts of a picture) tend to be neighbours: those held back are runs, which tell what is new, spread
    over all, for those at the end may be of another kind.
    """
    runs = min(count, _RUNS)
    held = max(1, round(share * runs))
    run = np.arange(count) * runs // count  # of each
    return set(np.flatnonzero((run + 1) * held // runs > run * held // runs).tolist())


def copies(batch: Iterable[Any]) -> list[Any]:
    """For a model that writes to its inputs."""
    return [v.clone() if isinstance(v, Tensor) else v for v in batch]


def floats(value: Any) -> list[Tensor]:
    """The tensors of a model's answer, in a fixed order, in float64: numbers, indices, truth values, parts of complex numbers."""
    tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return [(torch.view_as_real(v) if v.is_complex() else v).double() for v in tensors]


def close(got: Sequence[Tensor], wanted: Sequence[Tensor], share: float) -> bool:
    """Whether answers, as of `floats`, are as many, and differ by no more than that share of the largest of each."""
    return len(got) == len(wanted) and all(
        a.shape == b.shape
        and torch.allclose(a, b, rtol=0, atol=share * float(b.nan_to_num(0, 0, 0).abs().amax()) if b.numel() else 0, equal_nan=True)
        for a, b in zip(got, wanted, strict=True)
    )


@dataclass(frozen=True)
class Samples:
    """Batches of inputs. Each is a list in the order of the graph's placeholders, the batch on the first axis of its tensors.

    `labels`: of every batch, where they were given. `made`: from the model itself, not by the user. `divisible`: whether the model takes other
    batches than these, of one sample, say; where it does not, batches count instead of samples.
    """

    batches: Sequence[list[Any]]
    labels: Sequence[Tensor] | None = None
    made: bool = False
    divisible: bool = True

    def __len__(self) -> int:
        """How many samples there are in all batches together."""
        return sum(map(samples_in, self.batches))

    @property
    def count(self) -> int:
        """How many samples there are, or batches where those are not divisible."""
        return len(self) if self.divisible else len(self.batches)

    def spread(self, number: int) -> Samples:
        """So many of them, evenly spread over all, for neighbours may be alike; whole batches where those are not divisible; one at least."""
        if number >= len(self):
            return self
        places = np.linspace(0, self.count, max(1, number * self.count // len(self)), endpoint=False).astype(int)
        return self.of(set(places.tolist()))

    def cut(self, share: float) -> tuple[Samples, Samples]:
        """About that share of them, and the rest, see `held_back`; all of them twice where one batch is all and is not divisible."""
        if self.count < 2:
            return self, self
        rest = held_back(self.count, 1 - share)
        return self.of(set(range(self.count)) - rest), self.of(rest)

    def of(self, chosen: Set[int]) -> Samples:
        """The samples, or batches, of these numbers."""
        batches, labels, first = [], [], 0
        for place, batch in enumerate(self.batches):
            size = samples_in(batch)
            own = torch.tensor([n for n in range(size) if (first + n if self.divisible else place) in chosen], dtype=torch.int64)
            first += size
            if not len(own):
                continue
            batches.append([v[own.to(v.device)] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v for v in batch])
            if self.labels is not None:
                labels.append(self.labels[place] if len(own) == size else self.labels[place][own])
        return replace(self, batches=batches, labels=labels if self.labels is not None else None)
