"""`Samples`: what a model is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def samples_in(batch: Sequence[Any]) -> int:
    """How many samples a batch of inputs holds: the first axis of the first tensor that has one."""
    return next((v.shape[0] for v in batch if isinstance(v, Tensor) and v.dim()), 1)


@dataclass(frozen=True)
class Samples:
    """Batches of inputs. Each is a list in the order of the graph's placeholders, the batch on the first axis of its tensors.

    `labels`: of every batch, where they were given.
    """

    batches: Sequence[list[Any]]
    labels: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        """How many samples there are in all batches together."""
        return sum(map(samples_in, self.batches))

    def first(self, number: int, divisible: bool = True) -> Samples:
        """The first so many of them, in whole batches or, of the first batch, where that is divisible, a part; one batch at least."""
        if number >= len(self):
            return self
        batches, labels, taken = [], [], 0
        for place, batch in enumerate(self.batches):
            size = samples_in(batch)
            if taken + size > number and taken:
                break
            most = min(size, max(1, number - taken)) if divisible else size
            batches.append([v[:most] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v for v in batch])
            labels += [self.labels[place][:most]] if self.labels is not None else []
            taken += most
        return Samples(batches, labels if self.labels is not None else None)
