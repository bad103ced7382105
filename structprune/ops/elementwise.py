"""Operators that work entry by entry: aligned axes are equal."""

from __future__ import annotations

from typing import Any

from structprune.ir.axes import Shape
from structprune.ops.rules import Equations, axis_index, rule

_WHY_ORDER = "the answer depends on the order of its entries"


@rule(
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bitwise_not", "ceil", "celu", "cos", "cosh", "deg2rad",
    "elu", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "frac", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "isfinite", "isinf", "isnan", "leaky_relu", "lgamma", "log", "log10", "log1p", "log2", "log_sigmoid", "logical_not", "mish",
    "nan_to_num", "neg", "negative", "positive", "reciprocal", "relu", "relu6", "round", "rrelu", "rsqrt", "selu",
    "sigmoid", "sign", "silu", "sin", "sinh", "softplus", "softshrink", "hardshrink", "tanhshrink", "sqrt", "square",
    "tan", "tanh", "threshold", "trunc", "fix", "angle", "conj_physical", "digamma", "i0", "mvlgamma", "signbit", "special_erfcx", "special_i0e",
    "special_i1", "special_i1e", "special_log_ndtr", "special_ndtri",
    # values pass through, in another type, place or memory layout
    "alias", "clone", "contiguous", "cpu", "detach", "detach_copy", "double", "dropout", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout", "float", "half", "lift_fresh", "lift_fresh_copy", "to", "_to_copy",
    "type_as", "bernoulli", "zero", "conj", "resolve_conj", "resolve_neg", "real",
    "zeros_like", "ones_like", "full_like", "empty_like",
)  # fmt: skip
def unary(eq: Equations, x: Shape, *_: Any, **__: Any) -> Shape:
    return x


@rule(
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "floor_divide", "fmod", "remainder", "pow", "maximum",
    "minimum", "fmax", "fmin", "atan2", "hypot", "lerp", "eq", "ne", "gt", "ge", "lt", "le", "not_equal", "greater", "less",
    "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__",
    "clamp", "clip", "clamp_min", "clamp_max", "where", "masked_fill", "addcmul", "addcdiv", "xlogy", "logaddexp", "heaviside",
    "bitwise_left_shift", "bitwise_right_shift", "__lshift__", "__rshift__", "polar", "complex", "copysign", "isclose",
    "expand_as", "gcd", "lcm", "igamma", "igammac", "ldexp", "nextafter", "polygamma", "special_zeta",
)  # fmt: skip
def broadcasting(eq: Equations, *operands: Any, **named: Any) -> Shape:
    return eq.broadcast(*operands, *named.values())


@rule("frexp")
def mantissa_and_exponent(eq: Equations, x: Shape) -> list[Shape]:
    return [x, x]


@rule("copy", "fill")
def assignment(eq: Equations, x: Shape, source: Any = None, *_: Any, **__: Any) -> Shape:
    eq.broadcast(x, source)
    return x


@rule("prelu", "_prelu_kernel")
def prelu(eq: Equations, x: Shape, weight: Shape) -> Shape:
    if len(weight) == 1 and weight[0].size > 1:
        eq.equate(x[1] if len(x) > 1 else x[0], weight[0])
    elif len(weight) > 1:
        eq.broadcast(x, weight)
    return x


@rule("glu")
def glu(eq: Equations, x: Shape, dim: int = -1) -> Shape:
    """One half gates the other: a channel of the answer is two of the input."""
    dim = axis_index(dim, len(x))
    half = x[dim].size // 2
    value, gate = eq.split(x[dim], [half, half])
    eq.equate(value, gate)
    return (*x[:dim], value, *x[dim + 1 :])


@rule("cumsum", "cumprod", "logcumsumexp", "flip", "softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax")
def along_one_axis(eq: Equations, x: Shape, dim: Any, *_: Any, **__: Any) -> Shape:
    """Each entry of the answer depends on all entries along an axis, in a way that no zero is neutral for."""
    for d in dim if isinstance(dim, (list, tuple)) else [dim]:
        if x:
            eq.freeze(f"{eq.node.target._opname} runs along this axis", x[axis_index(d, len(x))])  # type: ignore[union-attr]
    return x


@rule("cummax", "cummin")
def extremum_so_far(eq: Equations, x: Shape, dim: Any) -> list[Shape]:
    out = along_one_axis(eq, x, dim)
    return [out, out]


@rule("tril", "triu")
def triangle(eq: Equations, x: Shape, *_: Any) -> Shape:
    eq.freeze(_WHY_ORDER, *x[-2:])
    return x


@rule("diff")
def diff(eq: Equations, x: Shape, n: int = 1, dim: int = -1, *_: Any) -> Shape:
    dim = axis_index(dim, len(x))
    eq.freeze(_WHY_ORDER, x[dim])
    return (*x[:dim], eq.frozen(eq.out[dim], _WHY_ORDER), *x[dim + 1 :])
