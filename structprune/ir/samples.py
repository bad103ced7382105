"""`Samples`: what a model is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Batches of inputs. Each is a list in the order of the graph's placeholders, the batch on the first axis of its tensors.

    `labels`: of every batch, where they were given.
    """

    batches: Sequence[list[Any]]
    labels: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        """How many samples there are in all batches together."""
        return sum(next((v.shape[0] for v in batch if isinstance(v, Tensor) and v.dim()), 1) for batch in self.batches)
