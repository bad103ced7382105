"""Random networks: chains of steps over a current tensor, in which a step may also read the answer of an earlier one.

A step is a small function `(draw, state) -> Step`: it looks at the current tensor, draws its sizes, and returns layers with a
closure over them. The network is run while it is drawn, so that no step needs to predict a shape.

Tensors come in three kinds: vectors (batch, channels), sequences (batch, tokens, channels) and images (batch, channels, rows, columns).
All activations map zero to zero, so that a channel of zeros stays one up to the next layer with weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from models import Of
from torch import Tensor, nn

VECTOR, SEQUENCE, IMAGE = 2, 3, 4  # a kind is a number of axes


class Step(Of):
    """Layers, and what they make of the current tensor and of the earlier answers at `reads`."""

    def __init__(self, run: Callable[..., Tensor], *, reads: Sequence[int] = (), inexact: bool = False, note: str = "", **layers: Any):
        super().__init__(run, **layers)
        self.reads, self.inexact, self.note = tuple(reads), inexact, note

    def _get_name(self) -> str:
        return self.run.__qualname__.partition(".")[0]  # the function that made the step

    def extra_repr(self) -> str:
        return " ".join([self.note, *(f"reads {i}" for i in self.reads), *(f"{n} {tuple(p.shape)}" for n, p in self.named_parameters(recurse=False))])


class Network(nn.Module):
    """Steps, one after the other. `example` is an input of batch 2."""

    def __init__(self, steps: Sequence[Step], example: Tensor):
        super().__init__()
        self.steps, self.example = nn.ModuleList(steps), example

    @property
    def inexact(self) -> bool:
        """Whether some step takes a mean or norm over channels for which a plain zero mask answers differently."""
        made = [step._get_name() for step in self.steps]
        copied = made.index("copied_channels") if "copied_channels" in made else len(made)
        summed = {"unit_length", "gram_matrix"}.intersection(made[copied:])  # no weight of its own silences one copy
        return any(step.inexact for step in self.steps) or bool(summed)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(values[-1], *(values[i] for i in step.reads)))
        return values[-1]

    def extra_repr(self) -> str:
        return f"input {tuple(self.example.shape)}"


class RmsNorm(nn.Module):
    """x / √mean(x²) · weight over the last axis, written by hand as language models do."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@dataclass
class State:
    """The input and every answer so far, on the example."""

    values: list[Tensor]

    @property
    def x(self) -> Tensor:
        return self.values[-1]

    @property
    def axis(self) -> int:
        """The axis of channels."""
        return 1 if self.x.dim() == IMAGE else self.x.dim() - 1

    @property
    def channels(self) -> int:
        return self.x.shape[self.axis]

    def earlier(self, fits: Callable[[Tensor], bool]) -> list[int]:
        """The earlier answers (not the current one) that a step can read; an input of numbers is none."""
        return [i for i, value in enumerate(self.values[:-1]) if value.is_floating_point() and value.dim() == self.x.dim() and fits(value)]

    def like_x(self) -> list[int]:
        return self.earlier(lambda value: value.shape == self.x.shape)

    def beside_x(self) -> list[int]:
        """Those that agree with the current tensor in all but the number of channels."""
        return self.earlier(lambda value: all(a == b for d, (a, b) in enumerate(zip(value.shape, self.x.shape, strict=True)) if d != self.axis))


Maker = Callable[[st.DrawFn, State], Step]
MAKERS: list[tuple[Maker, tuple[int, ...], Callable[[State], Any]]] = []


def step(*kinds: int, when: Callable[[State], Any] = lambda state: True) -> Callable[[Maker], Maker]:
    """Register a step for tensors of these kinds, where `when` holds."""

    def register(make: Maker) -> Maker:
        MAKERS.append((make, kinds, when))
        return make

    return register


def many(number: int) -> Callable[[State], bool]:
    """There are channels in a multiple of `number`, and more than one such."""
    return lambda state: state.channels % number == 0 and state.channels > number


def small(state: State) -> bool:
    return state.channels <= 16


def divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


WIDTHS = st.sampled_from([4, 6, 8, 12, 16])


def one_of(draw: st.DrawFn, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def layer_to(state: State, out: int, **options: Any) -> nn.Module:
    """A layer that mixes the channels of the current tensor into `out` others."""
    if state.x.dim() == IMAGE:
        return nn.Conv2d(state.channels, out, 3, padding=1, **options)
    return nn.Linear(state.channels, out, **options)


# ------------------------------------------------------------------------------------------------------------ convolutions


@step(IMAGE)
@step(IMAGE)
def convolution(draw: st.DrawFn, state: State) -> Step:
    groups = one_of(draw, *divisors(state.channels))
    out = groups * draw(st.integers(1, max(1, 16 // groups)))
    kernel, dilation, stride = one_of(draw, 1, 3), one_of(draw, 1, 2), one_of(draw, 1, 1, 2)
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(state.channels, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    return Step(lambda m, x: m.conv(x), conv=conv)


@step(IMAGE, when=lambda state: state.channels <= 12)
def depthwise_with_multiplier(draw: st.DrawFn, state: State) -> Step:
    conv = nn.Conv2d(state.channels, state.channels * one_of(draw, 1, 2), 3, padding=1, groups=state.channels)
    return Step(lambda m, x: m.conv(x), conv=conv)


@step(IMAGE, when=lambda state: state.x.shape[-1] <= 8)
def transposed_convolution(draw: st.DrawFn, state: State) -> Step:
    groups = one_of(draw, *divisors(state.channels))
    out = groups * draw(st.integers(1, max(1, 16 // groups)))
    return Step(lambda m, x: m.conv(x), conv=nn.ConvTranspose2d(state.channels, out, 2, 2, groups=groups))


@step(SEQUENCE)
def convolution_in_time(draw: st.DrawFn, state: State) -> Step:
    groups = one_of(draw, *divisors(state.channels))
    conv = nn.Conv1d(state.channels, groups * draw(st.integers(1, max(1, 16 // groups))), 3, padding=1, groups=groups)
    return Step(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), conv=conv)


@step(IMAGE)
def functional_convolution(draw: st.DrawFn, state: State) -> Step:
    weight = nn.Parameter(torch.randn(draw(WIDTHS), state.channels, 1, 1))
    return Step(lambda m, x: F.conv2d(x, m.weight), weight=weight)


# -------------------------------------------------------------------------------------------------------- linear and matrices


@step(SEQUENCE, VECTOR)
def linear(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: m.fc(x), fc=nn.Linear(state.channels, draw(WIDTHS), bias=draw(st.booleans())))


@step(SEQUENCE, VECTOR)
def matrix_product(draw: st.DrawFn, state: State) -> Step:
    weight = nn.Parameter(torch.randn(state.channels, draw(WIDTHS)))
    if draw(st.booleans()):
        return Step(lambda m, x: x @ m.weight, weight=weight)
    return Step(lambda m, x: torch.einsum("...c,cd->...d", x, m.weight), weight=weight)


@step(SEQUENCE, VECTOR)
def tied_weight(draw: st.DrawFn, state: State) -> Step:
    weight = nn.Parameter(torch.randn(draw(WIDTHS), state.channels) / 3)
    return Step(lambda m, x: F.linear(F.gelu(F.linear(x, m.weight)), m.weight.t()), weight=weight)


@step(IMAGE, SEQUENCE, VECTOR, when=small)
def shared_module(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: m.layer(F.relu(m.layer(x))), layer=layer_to(state, state.channels))


@step(SEQUENCE)
def gram_matrix(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: (x @ x.transpose(-1, -2)).softmax(-1) @ x)


# ------------------------------------------------------------------------------------------------------------------- norms


@step(IMAGE)
def batch_norm(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(state.channels, affine=one_of(draw, True, True, False)))


@step(VECTOR)
def batch_norm_of_vectors(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: m.norm(x), norm=nn.BatchNorm1d(state.channels))


@step(IMAGE, when=lambda state: state.x.shape[-1] > 1)
def group_norm(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: m.norm(x), norm=nn.GroupNorm(one_of(draw, *divisors(state.channels)), state.channels))


@step(IMAGE, when=lambda state: state.x.shape[-1] > 1)
def instance_norm(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: m.norm(x), norm=nn.InstanceNorm2d(state.channels, affine=True))


@step(SEQUENCE, VECTOR)
def norm_of_channels(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: m.norm(x), norm=one_of(draw, nn.LayerNorm, nn.RMSNorm, RmsNorm)(state.channels))


@step(SEQUENCE, VECTOR)
def norm_without_affine(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: F.layer_norm(x, x.shape[-1:]), inexact=True)


@step(IMAGE, SEQUENCE, VECTOR, when=lambda state: state.channels > 1)
def norm_by_hand(draw: st.DrawFn, state: State) -> Step:
    """As the networks write it that have a layer norm of their own: by a mean of squares, or by a variance."""
    axis = 1 if state.x.dim() == 4 else -1
    variance = one_of(
        draw,
        lambda x: (x - x.mean(axis, keepdim=True)).pow(2).mean(axis, keepdim=True),
        lambda x: x.var(axis, unbiased=False, keepdim=True),
        lambda x: x.std(axis, correction=0, keepdim=True) ** 2,
        lambda x: torch.var_mean(x, axis, correction=0, keepdim=True)[0],
    )
    return Step(lambda m, x: (x - x.mean(axis, keepdim=True)) / (variance(x) + 1e-5).sqrt(), inexact=True)


@step(IMAGE)
def norm_channels_last(draw: st.DrawFn, state: State) -> Step:
    norm = one_of(draw, nn.LayerNorm, RmsNorm)(state.channels)
    return Step(lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=norm)


@step(SEQUENCE, VECTOR)
def unit_length(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: F.normalize(x, dim=-1))


# -------------------------------------------------------------------------------------------------------- entry by entry

ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh, "leaky_relu": F.leaky_relu, "hardswish": F.hardswish, "elu": F.elu}


@step(IMAGE, SEQUENCE, VECTOR)
def activation(draw: st.DrawFn, state: State) -> Step:
    name = one_of(draw, *ACTIVATIONS)
    return Step(lambda m, x: ACTIVATIONS[name](x), note=name)


@step(IMAGE)
def parametric_relu(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: m.act(x), act=nn.PReLU(one_of(draw, 1, state.channels)))


@step(IMAGE, SEQUENCE, VECTOR)
def scale_and_shift(draw: st.DrawFn, state: State) -> Step:
    shape = [state.channels] + [1, 1] * (state.x.dim() == IMAGE)
    return Step(lambda m, x: x * m.scale + m.shift, scale=nn.Parameter(torch.rand(shape)), shift=nn.Parameter(torch.randn(shape)))


@step(SEQUENCE)
def position_table(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: x + m.table, table=nn.Parameter(torch.randn(1, *state.x.shape[1:])))


@step(SEQUENCE, VECTOR)
def table_in_code(draw: st.DrawFn, state: State) -> Step:
    """Added to removed channels too, where a mask does not silence it."""
    columns = draw(st.booleans())

    def run(m: Step, x: Tensor) -> Tensor:
        table = torch.arange(x.shape[-1]).to(x.dtype).mul(0.3)
        return x + (torch.stack([table.sin(), table.cos()]).sum(0) if columns else table.sin())

    return Step(run, inexact=True)


@step(IMAGE, SEQUENCE, VECTOR)
def in_place(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: F.relu(x * 1.5, inplace=True).add_(0.5).mul_(x))


@step(IMAGE, SEQUENCE, VECTOR, when=lambda state: state.channels > 2)
def assigned_slice(draw: st.DrawFn, state: State) -> Step:
    start = draw(st.integers(0, state.channels - 2))
    where = ((slice(None),) * state.axis, slice(start, draw(st.integers(start + 1, state.channels))))

    def run(m: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[(*where[0], where[1])] = torch.tanh(x[(*where[0], where[1])])
        return y

    return Step(run, note=f"[{where[1].start}:{where[1].stop}]")


# ---------------------------------------------------------------------------------------------- skip connections and branches


@step(IMAGE, SEQUENCE, VECTOR, when=State.like_x)
@step(IMAGE, SEQUENCE, VECTOR, when=State.like_x)
def add_earlier(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x, other: x + other, reads=[one_of(draw, *state.like_x())])


@step(IMAGE, SEQUENCE, VECTOR, when=many(2))
def interleaved_gate(draw: st.DrawFn, state: State) -> Step:
    rest = (slice(None),) * state.axis
    return Step(lambda m, x: x[(*rest, slice(0, None, 2))] * torch.sigmoid(x[(*rest, slice(1, None, 2))]))


@step(IMAGE, SEQUENCE, VECTOR, when=State.like_x)
def multiply_or_maximum_earlier(draw: st.DrawFn, state: State) -> Step:
    join = one_of(draw, torch.mul, torch.maximum)
    return Step(lambda m, x, other: join(x, other), reads=[one_of(draw, *state.like_x())], note=join.__name__)


@step(IMAGE, SEQUENCE, VECTOR, when=lambda state: small(state) and state.beside_x())
@step(IMAGE, SEQUENCE, VECTOR, when=lambda state: small(state) and state.beside_x())
def concatenate_earlier(draw: st.DrawFn, state: State) -> Step:
    axis = state.axis
    return Step(lambda m, x, other: torch.cat([other, x], axis), reads=[one_of(draw, *state.beside_x())])


@step(IMAGE, SEQUENCE, VECTOR)
def residual_block(draw: st.DrawFn, state: State) -> Step:
    hidden = nn.Linear(state.channels, draw(WIDTHS)) if state.x.dim() != IMAGE else nn.Conv2d(state.channels, draw(WIDTHS), 1)
    back = nn.Linear(hidden.weight.shape[0], state.channels) if state.x.dim() != IMAGE else nn.Conv2d(hidden.weight.shape[0], state.channels, 1)
    return Step(lambda m, x: x + m.back(F.gelu(m.hidden(x))), hidden=hidden, back=back)


@step(IMAGE, SEQUENCE, VECTOR)
def concatenated_branches(draw: st.DrawFn, state: State) -> Step:
    axis, a, b = state.axis, draw(st.integers(2, 8)), draw(st.integers(2, 8))
    return Step(lambda m, x: F.relu(torch.cat([m.a(x), m.b(x)], axis)), a=layer_to(state, a), b=layer_to(state, b))


@step(IMAGE, SEQUENCE, VECTOR)
def concatenation_added(draw: st.DrawFn, state: State) -> Step:
    axis, a, b = state.axis, draw(st.integers(2, 8)), draw(st.integers(2, 8))
    layers = {"a": layer_to(state, a), "b": layer_to(state, b), "c": layer_to(state, a + b)}
    return Step(lambda m, x: torch.cat([m.a(x), m.b(x)], axis) + m.c(x), **layers)


@step(IMAGE, SEQUENCE, VECTOR)
def stacked_branches(draw: st.DrawFn, state: State) -> Step:
    out = draw(WIDTHS)

    def run(m: Any, x: Tensor) -> Tensor:
        first, second = torch.stack([m.a(x), m.b(x)], 1).tanh().unbind(1)
        return first - 2 * second

    return Step(run, a=layer_to(state, out), b=layer_to(state, out))


@step(IMAGE, when=small)
def squeeze_and_excite(draw: st.DrawFn, state: State) -> Step:
    hidden = draw(st.integers(2, 6))
    layers = {"squeeze": nn.Conv2d(state.channels, hidden, 1), "excite": nn.Conv2d(hidden, state.channels, 1)}
    return Step(lambda m, x: x * torch.sigmoid(m.excite(F.relu(m.squeeze(x.mean((2, 3), keepdim=True))))), **layers)


@step(IMAGE, when=lambda state: state.channels > 1)
def mean_over_channels(draw: st.DrawFn, state: State) -> Step:
    spread = one_of(draw, lambda gate, x: gate, lambda gate, x: gate.expand_as(x), lambda gate, x: gate.repeat(1, x.shape[1], 1, 1),
                    lambda gate, x: gate.tile(x.shape[1], 1, 1))  # fmt: skip
    return Step(lambda m, x: x * spread(torch.sigmoid(x.mean(1, keepdim=True)), x), inexact=True)


# -------------------------------------------------------------------------------------------------- taking channels apart


@step(IMAGE, SEQUENCE, VECTOR, when=many(2))
def gate(draw: st.DrawFn, state: State) -> Step:
    axis = state.axis

    def run(m: Any, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, axis)
        return value * torch.sigmoid(gate)

    return Step(run) if draw(st.booleans()) else Step(lambda m, x: F.glu(x, axis), note="glu")


@step(IMAGE, SEQUENCE, VECTOR, when=lambda state: state.channels > 3)
def uneven_split(draw: st.DrawFn, state: State) -> Step:
    axis, at = state.axis, sorted(draw(st.sets(st.integers(1, state.channels - 1), min_size=2, max_size=2)))
    sizes = [at[0], at[1] - at[0], state.channels - at[1]]

    def run(m: Any, x: Tensor) -> Tensor:
        a, b, c = x.split(sizes, axis)
        return torch.cat([c, F.relu(a), b], axis)

    return Step(run, note=f"split {sizes}")


@step(IMAGE, when=lambda state: many(2)(state) or many(3)(state))
def channel_shuffle(draw: st.DrawFn, state: State) -> Step:
    groups = one_of(draw, *(d for d in divisors(state.channels) if 1 < d < state.channels))

    def run(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return Step(run, note=f"groups {groups}") if draw(st.booleans()) else Step(lambda m, x: F.channel_shuffle(x, groups), note=f"native {groups}")


@step(IMAGE, SEQUENCE, VECTOR, when=lambda state: state.channels > 2)
def slice_of_channels(draw: st.DrawFn, state: State) -> Step:
    axis, start = state.axis, draw(st.integers(0, state.channels - 2))
    length = draw(st.integers(2, state.channels - start))
    return Step(lambda m, x: x.narrow(axis, start, length), note=f"[{start}:{start + length}]")


@step(IMAGE, SEQUENCE, VECTOR, when=many(2))
def every_other_channel(draw: st.DrawFn, state: State) -> Step:
    rest, start = (slice(None),) * state.axis, draw(st.integers(0, 1))
    return Step(lambda m, x: x[(*rest, slice(start, None, 2))], note=f"[{start}::2]")


@step(IMAGE, SEQUENCE, VECTOR, when=small)
def padded_channels(draw: st.DrawFn, state: State) -> Step:
    padding = [0, 0] * (state.x.dim() - 1 - state.axis) + [draw(st.integers(0, 3)), draw(st.integers(1, 3))]
    return Step(lambda m, x: F.pad(x, padding), note=f"pad {padding}")


@step(IMAGE, SEQUENCE, VECTOR, when=lambda state: state.channels > 3)
def permuted_runs(draw: st.DrawFn, state: State) -> Step:
    axis, at = state.axis, sorted(draw(st.sets(st.integers(1, state.channels - 1), min_size=2, max_size=2)))
    numbers = list(range(state.channels))
    order = torch.tensor(numbers[at[1] :] + numbers[: at[0]] + numbers[at[0] : at[1]])
    rest = (slice(None),) * axis
    return Step(lambda m, x: x[(*rest, m.order)] if axis == 1 else x.index_select(axis, m.order), order=order, note=f"runs cut at {at}")


@step(IMAGE, SEQUENCE, VECTOR, when=many(2))
def rotated_halves(draw: st.DrawFn, state: State) -> Step:
    axis = state.axis

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, axis)
        return 0.8 * x + 0.6 * torch.cat([-b, a], axis)

    return Step(run)


@step(IMAGE, SEQUENCE, VECTOR, when=lambda state: state.channels <= 8)
def copied_channels(draw: st.DrawFn, state: State) -> Step:
    axis, rest = state.axis, state.x.dim() - 1 - state.axis
    if draw(st.booleans()):
        return Step(lambda m, x: x.repeat_interleave(2, axis), note="interleaved")
    return Step(lambda m, x: x.repeat(*[1] * axis, 2, *[1] * rest), note="one after the other")


# ------------------------------------------------------------------------------------------------------------------- space


@step(IMAGE, when=lambda state: state.x.shape[-1] % 2 == 0)
def pool(draw: st.DrawFn, state: State) -> Step:
    pooled = one_of(draw, F.max_pool2d, F.avg_pool2d)
    return Step(lambda m, x: pooled(x, 2))


@step(IMAGE, when=lambda state: state.x.shape[-1] <= 8)
def interpolate(draw: st.DrawFn, state: State) -> Step:
    mode = one_of(draw, "nearest", "bilinear")
    return Step(lambda m, x: F.interpolate(x, scale_factor=2, mode=mode), note=mode)


@step(IMAGE, when=lambda state: state.channels % 4 == 0 and state.x.shape[-1] <= 8)
def pixel_shuffle(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: F.pixel_shuffle(x, 2))


@step(IMAGE, when=lambda state: state.channels <= 4 and state.x.shape[-1] % 2 == 0)
def pixel_unshuffle(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: F.pixel_unshuffle(x, 2))


@step(IMAGE, when=lambda state: state.channels <= 8 and state.x.shape[-1] % 2 == 0)
def patches_by_view(draw: st.DrawFn, state: State) -> Step:
    size = state.x.shape[-1] // 2

    def run(m: Any, x: Tensor) -> Tensor:
        x = x.view(-1, x.shape[1], size, 2, size, 2).permute(0, 2, 4, 3, 5, 1)
        return m.merge(x.flatten(3)).permute(0, 3, 1, 2)

    return Step(run, merge=nn.Linear(4 * state.channels, draw(WIDTHS)))


@step(IMAGE, when=lambda state: state.channels <= 8 and state.x.shape[-1] % 2 == 0)
def patches_by_slices(draw: st.DrawFn, state: State) -> Step:
    def run(m: Any, x: Tensor) -> Tensor:
        corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return m.merge(torch.cat(corners, 1))

    return Step(run, merge=nn.Conv2d(4 * state.channels, draw(WIDTHS), 1))


# ------------------------------------------------------------------------------------------------------- attention, recurrence


@step(SEQUENCE)
@step(SEQUENCE)
def attention(draw: st.DrawFn, state: State) -> Step:
    """Queries, keys and values from one layer, taken apart by a view or by a chunk; products by the fused operator, matmul or einsum."""
    heads, width, tokens = one_of(draw, 1, 2, 3), one_of(draw, 2, 4), state.x.shape[1]
    taken, how, residual = one_of(draw, "view", "chunk"), one_of(draw, "fused", "matmul", "einsum", "biased"), draw(st.booleans())

    def run(m: Any, x: Tensor) -> Tensor:
        if taken == "view":
            q, k, v = m.qkv(x).reshape(-1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.view(x.shape[0], tokens, heads, width).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
        if how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=residual)
        elif how == "biased":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias)
        elif how == "matmul":
            y = (q * width**-0.5 @ k.transpose(-2, -1) + m.bias).softmax(-1) @ v
        else:
            y = torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) / width**0.5).softmax(-1), v)
        y = m.out(y.transpose(1, 2).reshape(-1, tokens, heads * width))
        return x + y if residual else y

    layers = {"qkv": nn.Linear(state.channels, 3 * heads * width), "out": nn.Linear(heads * width, state.channels)}
    if how in ("biased", "matmul"):
        layers["bias"] = nn.Parameter(torch.randn(heads, tokens, tokens))
    return Step(run, note=f"{how} by {taken} heads {heads} width {width}", **layers)


@step(SEQUENCE)
def grouped_query_attention(draw: st.DrawFn, state: State) -> Step:
    """Several heads of queries share one of keys and values; queries and keys are normed."""
    shared, repeats, width, tokens = one_of(draw, 1, 2, 3), 2, one_of(draw, 2, 4), state.x.shape[1]
    heads, how = shared * repeats, one_of(draw, "expand", "interleave", "operator")

    def run(m: Any, x: Tensor) -> Tensor:
        batch = x.shape[0]
        q = m.q_norm(m.q(x).view(batch, tokens, heads, width)).transpose(1, 2)
        k = m.k_norm(m.k(x).view(batch, tokens, shared, width)).transpose(1, 2)
        v = m.v(x).view(batch, tokens, shared, width).transpose(1, 2)
        if how == "expand":
            k, v = (t[:, :, None].expand(batch, shared, repeats, tokens, width).reshape(batch, heads, tokens, width) for t in (k, v))
        elif how == "interleave":
            k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=how == "operator")
        return m.out(y.transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(state.channels, n * width) for name, n in (("q", heads), ("k", shared), ("v", shared))}
    out = nn.Linear(heads * width, state.channels)
    return Step(run, **layers, q_norm=RmsNorm(width), k_norm=RmsNorm(width), out=out, note=f"{how} heads {shared}·{repeats} width {width}")


@step(SEQUENCE, when=many(4))
def torch_attention(draw: st.DrawFn, state: State) -> Step:
    layer = nn.MultiheadAttention(state.channels, one_of(draw, 2, 4), batch_first=True)
    return Step(lambda m, x: x + m.layer(x, x, x, need_weights=False)[0], layer=layer)


@step(SEQUENCE)
def recurrent(draw: st.DrawFn, state: State) -> Step:
    kind = one_of(draw, nn.LSTM, nn.GRU)
    layer = kind(state.channels, draw(st.integers(2, 6)), num_layers=one_of(draw, 1, 2), bidirectional=draw(st.booleans()), batch_first=True)
    return Step(lambda m, x: m.layer(x)[0], layer=layer)


@step(SEQUENCE)
def final_states(draw: st.DrawFn, state: State) -> Step:
    layer = nn.GRU(state.channels, draw(st.integers(2, 6)), num_layers=one_of(draw, 1, 2), bidirectional=draw(st.booleans()), batch_first=True)
    return Step(lambda m, x: m.layer(x)[1].transpose(0, 1).flatten(1), layer=layer)


@step(VECTOR)
def recurrent_cell(draw: st.DrawFn, state: State) -> Step:
    """A cell, called twice with what it gave."""
    hidden, kind = draw(st.integers(2, 6)), one_of(draw, nn.LSTMCell, nn.GRUCell, nn.RNNCell)

    def run(m: Step, x: Tensor) -> Tensor:
        first = m.cell(x)
        second = m.cell(x, first)
        return second[0] if isinstance(second, tuple) else second

    return Step(run, cell=kind(state.channels, hidden))


@step(SEQUENCE)
def spectrum(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: torch.fft.rfft(x, dim=1).abs())


@step(SEQUENCE)
def scattered(draw: st.DrawFn, state: State) -> Step:
    """Tokens change places by a table of numbers."""
    order = torch.randperm(state.x.shape[1])
    return Step(lambda m, x: torch.zeros_like(x).index_add(1, m.order, x), order=order)


@step(SEQUENCE)
def class_token(draw: st.DrawFn, state: State) -> Step:
    token = nn.Parameter(torch.randn(1, 1, state.channels))
    return Step(lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1), token=token)


@step(SEQUENCE, VECTOR)
def experts(draw: st.DrawFn, state: State) -> Step:
    """Every token goes to the expert that its router prefers, by code that skips experts without tokens, or does not ask."""
    number, hidden, asks = one_of(draw, 2, 3, 4), draw(WIDTHS), draw(st.booleans())

    def run(m: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        best, out = m.router(rows).argmax(-1), torch.zeros_like(rows)
        for i, expert in enumerate(m.experts):
            chosen = (best == i).nonzero().squeeze(1)
            if asks and chosen.shape[0] == 0:
                continue
            out[chosen] = expert(rows[chosen])
        return x + out.view(x.shape)

    layers = [nn.Sequential(nn.Linear(state.channels, hidden), nn.GELU(), nn.Linear(hidden, state.channels)) for _ in range(number)]
    return Step(run, router=nn.Linear(state.channels, number), experts=nn.ModuleList(layers), note=f"{number}, {'skipped' * asks}")


# ------------------------------------------------------------------------------------------------------ from kind to kind


@step(IMAGE, when=lambda state: state.x[0].numel() <= 512)
def flatten(draw: st.DrawFn, state: State) -> Step:
    features = state.x[0].numel()
    flat = one_of(draw, lambda x: x.flatten(1), lambda x: x.reshape(x.shape[0], -1), lambda x: x.contiguous().view(-1, features))
    return Step(lambda m, x: m.fc(flat(x)), fc=nn.Linear(features, draw(WIDTHS)))


@step(IMAGE)
def global_pool(draw: st.DrawFn, state: State) -> Step:
    how = one_of(draw, lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda x: x.amax((2, 3)))
    return Step(lambda m, x: how(x))


@step(IMAGE, when=lambda state: state.x.shape[-1] <= 4)
def image_to_sequence(draw: st.DrawFn, state: State) -> Step:
    return Step(lambda m, x: x.flatten(2).transpose(1, 2))


@step(SEQUENCE)
def pool_tokens(draw: st.DrawFn, state: State) -> Step:
    how = one_of(draw, lambda x: x[:, 0], lambda x: x.mean(1), lambda x: x.amax(1))
    return Step(lambda m, x: how(x))


@step(SEQUENCE, when=many(2))
def convolution_over_tokens(draw: st.DrawFn, state: State) -> Step:
    """Of every head alone or of all: the entries of a head are the columns of its picture, along which no window moves."""
    heads, kind = one_of(draw, 1, 2), one_of(draw, nn.Conv2d, nn.ConvTranspose2d)
    conv = kind(heads, heads, (3, 1), padding=(1, 0), groups=one_of(draw, *divisors(heads)))
    return Step(lambda m, x: m.conv(x.unflatten(-1, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2), conv=conv)


# ------------------------------------------------------------------------------------------------------------- networks


def stem(draw: st.DrawFn) -> tuple[Tensor, Step]:
    """An input and a first layer."""
    kind, out = one_of(draw, "image", "image", "sequence", "tokens", "vector"), one_of(draw, 6, 8, 12, 16)
    if kind == "image":
        return torch.randn(2, 3, 8, 8), Step(lambda m, x: m.layer(x), layer=nn.Conv2d(3, out, 3, padding=1))
    if kind == "tokens":
        return torch.randint(0, 10, (2, 5)), Step(lambda m, x: m.layer(x), layer=nn.Embedding(10, out))
    shape = (2, 5, 7) if kind == "sequence" else (2, 7)
    return torch.randn(shape), Step(lambda m, x: m.layer(x), layer=nn.Linear(7, out))


def randomised(step: Step) -> Step:
    """The step in evaluation mode, with statistics and affine terms that are not all alike, so that a wrong slice shows."""
    for parameter in step.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in step.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return step.eval()


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A stem, up to eight steps, and a head."""
    torch.manual_seed(draw(st.integers(0, 999)))
    with torch.no_grad():
        example, first = stem(draw)
        state, steps = State([example]), [first]
        state.values.append(randomised(first)(example))
        for _ in range(draw(st.integers(1, 8))):
            makers = [make for make, kinds, when in MAKERS if state.x.dim() in kinds and when(state)]
            made = randomised(draw(st.sampled_from(makers))(draw, state))
            state.values.append(made(state.x, *(state.values[i] for i in made.reads)))
            steps.append(made)
        steps.append(randomised(Step(lambda m, x: m.layer(x), layer=layer_to(state, 3))))
    return Network(steps, example).eval()
