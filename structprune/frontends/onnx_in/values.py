"""Two kinds of values: torch tensors, and `Sizes`: numbers that are known while the model is traced, from which sizes are made.

A file computes shapes with the operators that it computes activations with: Shape → Gather → Concat → Reshape. On tensors that would
hide the sizes from torch.export; on numbers, some of them symbolic, a dynamic batch survives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from structprune.errors import StructpruneError


class Unsupported(StructpruneError):
    """An operator, or a form of one, that is not imported; the message goes on after the operator's name: 'with a clip' ..."""


@dataclass(frozen=True)
class Sizes:
    """An array of Python numbers, truth values and symbolic sizes, and the type that it has in the file."""

    array: np.ndarray  # of objects
    dtype: torch.dtype

    @staticmethod
    def of(values: Any, dtype: torch.dtype = torch.int64) -> Sizes:
        """values: a number, or nested sequences of numbers."""
        if isinstance(values, np.ndarray):
            return Sizes(values.astype(object), dtype)
        if not isinstance(values, Sequence):
            return Sizes(_objects(values, ()), dtype)
        array: np.ndarray = np.empty(len(values), dtype=object)  # never through np.array, which would ask a symbolic size for its value
        array[:] = list(values)
        return Sizes(array, dtype)

    def list(self) -> list[Any]:
        return list(self.array.reshape(-1))

    def item(self) -> Any:
        return self.array.reshape(-1)[0]

    def tensor(self) -> Tensor:
        """As a constant of the graph, or as one that is made of its symbolic sizes."""
        numbers = self.list()
        if all(isinstance(n, (bool, int, float)) for n in numbers):
            return torch.tensor(numbers, dtype=self.dtype).reshape(self.array.shape)
        return torch.stack([torch.scalar_tensor(n, dtype=self.dtype) for n in numbers]).reshape(self.array.shape)


Value: TypeAlias = Tensor | Sizes


def sizes_of(tensor: Tensor) -> Sizes:
    return Sizes(_objects(tensor.tolist(), tuple(tensor.shape)), tensor.dtype)


def _objects(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    array: np.ndarray = np.empty(shape, dtype=object)
    if shape == ():
        array[()] = values
    elif array.size:
        array[...] = np.array(values, dtype=object).reshape(shape)
    return array


def as_tensor(value: Value) -> Tensor:
    return value.tensor() if isinstance(value, Sizes) else value


def operand(value: Value, beside: Value) -> Any:
    """What stands in an operator that works entry by entry: a plain number where it has no axes that would broadcast."""
    if isinstance(value, Sizes):
        rank = beside.dim() if isinstance(beside, Tensor) else 0
        if value.array.size == 1 and value.array.ndim <= rank:
            return value.item()
        return value.tensor()
    return value
