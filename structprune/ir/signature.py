"""`Signature`: what the file that a model was read from promises to those who call it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import InputError


@dataclass(frozen=True)
class Signature:
    """The small model answers to the same names, and its free axes are free.

    sizes: of the axes of every input: a number, or a name where any size will do; axes with one name have one size.
    fixed: inputs whose value decides which part of the file runs, and the value that was chosen.
    """

    file: Path
    digest: str  # of the file, when it was read
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: tuple[tuple[int | str, ...], ...]
    fixed: tuple[tuple[str, float], ...] = ()

    def given(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The inputs of a call, in which those that are fixed have their value: to any other the answer tells nothing.

        Raises InputError for another number of inputs than the file has.
        """
        if len(args) != len(self.inputs):
            raise InputError(f"{self.file} has {len(self.inputs)} inputs ({', '.join(self.inputs)}), and {len(args)} are given")
        fixed = dict(self.fixed)
        return tuple(torch.full_like(v, fixed[name]) if name in fixed else v for name, v in zip(self.inputs, args, strict=True))

    def free(self, only: Set[str] | None = None) -> list[set[int]]:
        """The axes of every input that may have any size; with `only`, those of these names."""
        return [{d for d, size in enumerate(axes) if isinstance(size, str) and (only is None or size in only)} for axes in self.sizes]

    def batch(self) -> frozenset[str]:
        """The names of first axes."""
        return frozenset(axes[0] for axes in self.sizes if axes and isinstance(axes[0], str))

    def doubled(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """A batch of one as one of two, for torch.export takes a size of 1 for a constant; as it is where it is more than first axes."""
        elsewhere = {size for axes in self.sizes for size in axes[1:]}
        return tuple(
            torch.cat([v, v]) if isinstance(v, Tensor) and axes and axes[0] in self.batch() - elsewhere and len(v) == 1 else v
            for v, axes in zip(args, self.sizes, strict=True)
        )


def signature_of(model: nn.Module) -> Signature | None:
    """The signature of a model that was read from a file with one."""
    found = getattr(model, "signature", None)
    return found if isinstance(found, Signature) else None
