"""The table of operators: a name of the ONNX standard → a plain function on torch tensors.

    @operator("Gemm")
    def gemm(call, x, weight, bias=None):
        ...

The function gets the operator's inputs in the standard's order, None for one that is left out, and its attributes through `call`; it returns a
tensor, or a tuple for several outputs. What it calls is what torch.export will see: ordinary ATen operators, for which structprune has rules.
Its parameters' names become those of weights that the file gives none.

sizes: inputs that are sizes, indices or bounds: the function gets `Sizes`, and a model in which they depend on the values of its inputs is refused.
either: inputs that may be tensors or `Sizes`; True for all.
numbers: what the operator does with `Sizes` alone, so that the answer is one of `Sizes` too.

An attribute that a function never asks for is one that it does not know: the node is refused, not run without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from structprune.frontends.onnx_in.reading import Node
from structprune.frontends.onnx_in.values import Sizes, Unsupported, Value, as_tensor


@dataclass(frozen=True)
class Operator:
    function: Callable[..., Any]
    sizes: tuple[int, ...]
    either: tuple[int, ...] | bool
    numbers: Callable[..., Any] | None
    parameters: tuple[str, ...]

    def takes_sizes(self, index: int) -> bool:
        return index in self.sizes or (self.sizes[-1:] == (-1,) and index >= self.sizes[0])


OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Call:
    """One use of an operator: its attributes, and the version of the standard."""

    node: Node
    opset: int
    known: set[str] = field(default_factory=set)  # attributes that were asked for

    def get(self, name: str, default: Any = None) -> Any:
        self.known.add(name)
        return self.node.attributes.get(name, default)

    def refuse_unless(self, name: str, *values: Any) -> None:
        """Raise Unsupported where an attribute is there and has none of these values."""
        self.known.add(name)
        if name in self.node.attributes and self.get(name) not in values:
            raise Unsupported(f"with {name}={self.get(name)!r}")

    def wants(self, index: int) -> bool:
        """Whether anybody may read this output."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index])


def operator(
    *names: str,
    sizes: Sequence[int] = (),
    either: Sequence[int] | bool = (),
    numbers: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = tuple(p.name for p in list(inspect.signature(function).parameters.values())[1:] if p.kind is not p.VAR_POSITIONAL)
        for name in names:
            assert name not in OPERATORS, f"{name} is registered twice"
            OPERATORS[name] = Operator(function, tuple(sizes), either if isinstance(either, bool) else tuple(either), numbers, parameters)
        return function

    return register


def run(entry: Operator, call: Call, inputs: Sequence[Value | None]) -> tuple[Value | None, ...]:
    """The answers of one node. Raises Unsupported."""
    if entry.numbers is not None and inputs and all(isinstance(v, Sizes) or v is None for v in inputs):
        answer = entry.numbers(call, *inputs)
        return answer if isinstance(answer, tuple) else (answer,)
    answer = entry.function(call, *(_given(entry, i, v) for i, v in enumerate(inputs)))
    unknown = set(call.node.attributes) - call.known - _WITHOUT_EFFECT
    if unknown:
        name = sorted(unknown)[0]
        raise Unsupported(f"with {name}={call.get(name)!r}")
    return answer if isinstance(answer, tuple) else (answer,)


# precision of intermediate results, hints to allocators, what training alone reads, and what the shapes of weights say again
_WITHOUT_EFFECT = frozenset({"stash_type", "softmax_precision", "consumed_inputs", "hidden_size", "seed", "ratio", "saturate", "round_mode"})


def _given(entry: Operator, index: int, value: Value | None) -> Value | None:
    if value is None or entry.either is True:
        return value
    if index in entry.sizes:
        if isinstance(value, Tensor):
            name = entry.parameters[index] if index < len(entry.parameters) else f"input {index}"
            raise Unsupported(f"whose {name} depends on the values of the model's inputs")
        return value
    return value if index in entry.either else as_tensor(value)  # type: ignore[operator]
