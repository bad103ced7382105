"""Operators that work entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.frontends.onnx_in import numbers
from structprune.frontends.onnx_in.reading import TYPES
from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Sizes, Unsupported, Value, as_tensor, operand

_each = numbers.each


def _unary(name: str, function: Callable[..., Tensor], on_numbers: Callable[..., Any] | None = None) -> None:
    @operator(name, numbers=None if on_numbers is None else _each(on_numbers))
    def unary(call: Call, x: Tensor) -> Tensor:
        return function(x)


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "IsNaN": torch.isnan, "Log": torch.log, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Tan": torch.tan, "Tanh": torch.tanh, "BitwiseNot": torch.bitwise_not,
    "Relu": F.relu, "Softsign": F.softsign, "HardSwish": F.hardswish, "Mish": F.mish,
}  # fmt: skip
for _name, _function in _PLAIN.items():
    _unary(_name, _function)
_unary("Abs", torch.abs, abs)
_unary("Neg", torch.neg, lambda x: -x)
_unary("Floor", torch.floor, lambda x: float(math.floor(x)))
_unary("Ceil", torch.ceil, lambda x: float(math.ceil(x)))
_unary("Sqrt", torch.sqrt, lambda x: x**0.5)
_unary("Reciprocal", torch.reciprocal, lambda x: 1.0 / x)
_unary("Not", torch.logical_not, lambda x: not x)


@operator("IsInf")
def is_inf(call: Call, x: Tensor) -> Tensor:
    return (torch.isposinf(x) if call.get("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)) | (
        torch.isneginf(x) if call.get("detect_negative", 1) else torch.zeros_like(x, dtype=torch.bool)
    )


# --- two operands and more --------------------------------------------------------------------------------------------------


def _pair(a: Value, b: Value) -> tuple[Any, Any]:
    a, b = operand(a, b), operand(b, a)
    return (as_tensor(Sizes.of(a)), b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else (a, b)


def _binary(name: str, function: Callable[[Any, Any], Tensor], on_numbers: Callable[..., Any] | None) -> None:
    @operator(name, either=True, numbers=on_numbers)
    def binary(call: Call, a: Value, b: Value) -> Tensor:
        return function(*_pair(a, b))


_binary("Add", lambda a, b: a + b, _each(lambda a, b: a + b))
_binary("Sub", lambda a, b: a - b, _each(lambda a, b: a - b))
_binary("Mul", lambda a, b: a * b, _each(lambda a, b: a * b))
_binary("Equal", lambda a, b: a == b, _each(lambda a, b: a == b, torch.bool))
_binary("Greater", lambda a, b: a > b, _each(lambda a, b: a > b, torch.bool))
_binary("Less", lambda a, b: a < b, _each(lambda a, b: a < b, torch.bool))
_binary("GreaterOrEqual", lambda a, b: a >= b, _each(lambda a, b: a >= b, torch.bool))
_binary("LessOrEqual", lambda a, b: a <= b, _each(lambda a, b: a <= b, torch.bool))
_binary("And", torch.logical_and, _each(lambda a, b: a and b, torch.bool))
_binary("Or", torch.logical_or, _each(lambda a, b: a or b, torch.bool))
_binary("Xor", torch.logical_xor, _each(lambda a, b: a != b, torch.bool))
_binary("BitwiseAnd", torch.bitwise_and, None)
_binary("BitwiseOr", torch.bitwise_or, None)
_binary("BitwiseXor", torch.bitwise_xor, None)


@operator("Div", either=True, numbers=numbers.divide)
def div(call: Call, a: Value, b: Value) -> Tensor:
    floating = a.dtype.is_floating_point
    left, right = _pair(a, b)
    return left / right if floating else torch.div(left, right, rounding_mode="trunc")


@operator("Mod", either=True, numbers=_each(lambda a, b: a % b))
def mod(call: Call, a: Value, b: Value) -> Tensor:
    """With fmod=1 the sign is the dividend's, else the divisor's."""
    left, right = _pair(a, b)
    return torch.fmod(left, right) if call.get("fmod", 0) else torch.remainder(left, right)


@operator("Pow", either=True, numbers=_each(lambda a, b: a**b))
def power(call: Call, a: Value, b: Value) -> Tensor:
    """Of the type of the base."""
    return torch.pow(*_pair(a, b)).to(a.dtype)


@operator("BitShift")
def bit_shift(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.bitwise_left_shift(a, b) if call.get("direction") == "LEFT" else torch.bitwise_right_shift(a, b)


def _extremum(name: str, function: Callable[..., Tensor], bound: str, on_numbers: Callable[[Any, Any], Any]) -> None:
    @operator(name, either=True, numbers=numbers.many(on_numbers))
    def extremum(call: Call, *operands: Value) -> Tensor:
        tensors = [o for o in operands if isinstance(o, Tensor)]
        answer = tensors[0]
        for other in [o for o in operands if o is not answer]:
            value = operand(other, answer)
            answer = function(answer, value) if isinstance(value, Tensor) else torch.clamp(answer, **{bound: value})
        return answer


_extremum("Max", torch.maximum, "min", torch.sym_max)
_extremum("Min", torch.minimum, "max", torch.sym_min)


@operator("Sum")
def total(call: Call, first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = first + other
    return first


@operator("Mean")
def mean(call: Call, first: Tensor, *others: Tensor) -> Tensor:
    return total(call, first, *others) / (1 + len(others))  # type: ignore[no-any-return]


@operator("Where", either=True, numbers=numbers.where)
def where(call: Call, condition: Value, a: Value, b: Value) -> Tensor:
    return torch.where(as_tensor(condition), as_tensor(a), as_tensor(b))


# --- types --------------------------------------------------------------------------------------------------------------------


def type_of(number: int) -> torch.dtype:
    """torch's type for a number of the standard."""
    for known, dtype in TYPES.items():
        if known == number:
            return dtype
    raise Unsupported(f"to type {number} of the standard, which torch has none for")


def _cast_numbers(call: Call, x: Sizes) -> Sizes:
    return numbers.cast(type_of(call.get("to")), x)


@operator("Cast", numbers=_cast_numbers)
def cast(call: Call, x: Tensor) -> Tensor:
    dtype = type_of(call.get("to"))
    return x if x.dtype is dtype else x.to(dtype)


@operator("CastLike", either=(1,), numbers=lambda call, x, like: numbers.cast(like.dtype, x))
def cast_like(call: Call, x: Tensor, like: Value) -> Tensor:
    return x if x.dtype is like.dtype else x.to(like.dtype)


@operator("Identity", numbers=numbers.same)
def identity(call: Call, x: Tensor) -> Tensor:
    return x


@operator("Dropout", sizes=(1, 2))
def dropout(call: Call, x: Tensor, ratio: Sizes | None = None, training: Sizes | None = None) -> tuple[Tensor | None, ...]:
    if training is not None and training.item():
        raise Unsupported("in training mode: export the model in evaluation mode")
    return (x, torch.ones_like(x, dtype=torch.bool)) if call.wants(1) else (x,)


# --- activations ----------------------------------------------------------------------------------------------------------------


@operator("Clip", either=(1, 2))
def clip(call: Call, x: Tensor, min: Value | None = None, max: Value | None = None) -> Tensor:
    low = call.get("min") if min is None else operand(min, x)
    high = call.get("max") if max is None else operand(max, x)
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) != isinstance(high, Tensor):  # torch takes both as numbers, or both as tensors
        low = low if low is None or isinstance(low, Tensor) else torch.full((), low, dtype=x.dtype)
        high = high if high is None or isinstance(high, Tensor) else torch.full((), high, dtype=x.dtype)
    if low == 0 and high == 6 and x.is_floating_point():
        return F.relu6(x)
    return torch.clamp(x, low, high)


@operator("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.get("alpha", 0.01))


@operator("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.get("alpha", 1.0))


@operator("Celu")
def celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.get("alpha", 1.0))


@operator("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


@operator("Softplus")
def softplus(call: Call, x: Tensor) -> Tensor:
    return F.softplus(x)


@operator("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    alpha, beta = call.get("alpha", 0.2), call.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


@operator("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.get("approximate", "none"))


@operator("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    alpha = call.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return F.threshold(x, call.get("alpha", 1.0), 0.0)


@operator("Shrink")
def shrink(call: Call, x: Tensor) -> Tensor:
    bias, limit = call.get("bias", 0.0), call.get("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, zero))


@operator("PRelu")
def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    channels = x.shape[1] if x.dim() > 1 else 1
    rest = slope.shape[1:] if slope.dim() == x.dim() - 1 else slope.shape[2:] if slope.dim() == x.dim() and slope.shape[0] == 1 else None
    if rest is not None and all(n == 1 for n in rest) and slope.numel() == channels:
        return F.prelu(x, slope.reshape(-1))
    return F.relu(x) - slope * F.relu(-x)
