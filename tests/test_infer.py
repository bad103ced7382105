"""What inference finds in single constructs: which axes are free, how they are coupled, and the widths that follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import oracle
import pytest
import torch
import torch.nn.functional as F
from models import Of
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

import structprune as sp
from structprune.ir.operators import operator_name


def pruned(model: nn.Module, inputs: Sequence[Tensor], **options: object) -> dict[str, tuple[int, ...]]:
    """Half of everything goes and the oracle agrees; returns the new shapes."""
    result = sp.compress(oracle.randomise_norms(model.eval()), tuple(inputs), target="channels=0.5", **options)  # type: ignore[arg-type]
    error, tolerance = oracle.error_of(model, result.model, {name: cut.keep for name, cut in result.plan.tensors.items()}, inputs)
    assert error <= tolerance
    return {name: tuple(t.shape) for name, t in result.small.state_dict().items()}


def frozen(model: nn.Module, inputs: Sequence[Tensor], tensor: str, dim: int) -> list[str]:
    groups = sp.inspect(model.eval(), tuple(inputs))
    return [f.reason for f in groups.frozen if any((m.tensor, m.dim) == (tensor, dim) for m in f.members)]


def test_a_stream_under_sines_that_the_code_computes_can_shrink() -> None:
    def run(m: Of, x: Tensor) -> Tensor:
        rate = torch.exp(torch.arange(0, 32, 2) * -0.3)
        angle = torch.arange(x.shape[1])[:, None] * rate
        return m.b(F.relu(m.a(x) + torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(x.dtype)))

    torch.manual_seed(0)
    shapes = pruned(Of(run, a=nn.Linear(6, 32), b=nn.Linear(32, 4)), [torch.randn(2, 5, 6)])
    assert shapes["a.weight"] == (16, 6)


def test_a_table_on_which_little_depends_keeps_its_size() -> None:
    model = Of(
        lambda m, x, t: m.c(F.relu(m.a(torch.sin(t[:, None] * torch.arange(1, 9))) + m.b(x))),
        a=nn.Linear(8, 64),
        b=nn.Linear(512, 64),
        c=nn.Linear(64, 4),
    )
    inputs = [torch.randn(2, 512), torch.randn(2)]
    assert frozen(model, inputs, "a.weight", 1) == ["stands on a table that the code computes"]
    assert type(sp.compress(model, tuple(inputs), target="channels=0.5").model) is Of


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_what_no_window_moves_along_can_shrink(kind: type[nn.Module]) -> None:
    """A convolution over tokens, to which their entries are the columns of a picture (the values of Nystromformer)."""
    torch.manual_seed(0)

    def model(**settings: Any) -> Of:
        window = kind(1, 1, **settings)
        columns = window(torch.zeros(1, 7, 8)).shape[-1]
        return Of(lambda m, x: m.c(m.b(m.a(x)[:, None])[:, 0]), a=nn.Linear(6, 8), b=window, c=nn.Linear(columns, 3))

    x = torch.randn(2, 7, 6)
    assert pruned(model(kernel_size=(5, 1), padding=(2, 0), stride=(2, 1)), [x])["a.weight"] == (4, 6)
    for moving in ({"kernel_size": (5, 3), "padding": (0, 1)}, {"kernel_size": (5, 1), "padding": (0, 1)}, {"kernel_size": (5, 1), "stride": (1, 2)}):
        assert frozen(model(**moving), [x], "a.weight", 0) == ["a convolution window slides along this axis"]


def test_an_empty_part_freezes_nothing() -> None:
    def run(m: Of, x: Tensor) -> Tensor:
        q = m.a(x)
        return m.b(torch.cat([q[:, :0], q[:, 0:] * 2], 1))

    torch.manual_seed(0)
    assert pruned(Of(run, a=nn.Linear(6, 8), b=nn.Linear(8, 4)), [torch.randn(2, 5, 6)])["a.weight"] == (4, 6)


def test_rows_that_the_example_does_not_reach_stay() -> None:
    model = Of(lambda m, x: m.b(m.a(x) + m.table[: x.shape[1]]), a=nn.Linear(6, 8), b=nn.Linear(8, 4), table=nn.Parameter(torch.randn(50, 8)))
    assert pruned(model, [torch.randn(2, 5, 6)])["table"] == (50, 4)


def test_a_place_known_only_at_run_time_keeps_the_axis() -> None:
    model = Of(lambda m, x: m.b(m.a(x) + m.table[: x.shape[1]]), a=nn.Linear(6, 8), b=nn.Linear(8, 4), table=nn.Parameter(torch.randn(50, 8)))
    result = sp.compress(model, (torch.randn(2, 5, 6),), target="channels=0.5", dynamic=(1,))
    assert result.model(torch.randn(3, 40, 6)).shape == (3, 40, 4) == result.small(torch.randn(3, 40, 6)).shape


def test_a_constant_that_is_read_and_computed_with() -> None:
    """A codebook that the class keeps as a plain tensor: its rows are looked up, and distances to it measured (Mimi). Who reads it reads the kept
    entries; what is computed of it sees all.
    """
    table = torch.randn(20, 8)

    def forward(m: Of, x: Tensor) -> Tensor:
        nearest = torch.cdist(m.a(x), (table * 2.0)[None]).argmin(-1)
        return m.c(m.b(F.embedding(nearest, table)).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Of(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 40), c=nn.Linear(40, 4)).eval()
    result = sp.compress(model, (torch.randn(2, 5, 6),), target="channels=0.5")
    assert result.plan.tensors.keys() == {"b.weight", "b.bias", "c.weight"} and result.plan.tensors["b.weight"].keep.keys() == {0, 1}


class Standardised(nn.Conv2d):
    """As in NF-Nets, with a gain for each output; or by mean and deviation, as it was published."""

    def __init__(self, *sizes: int, by_norm: bool = True, **options: Any):
        super().__init__(*sizes, **options)
        self.by_norm, self.gain = by_norm, nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_norm:
            gain, flat = self.gain.view(-1), self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, gain, training=True, eps=1e-6).reshape_as(self.weight)
        else:
            variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
            weight = self.gain * (self.weight - mean) / (variance + 1e-6).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("by_norm", [True, False])
def test_standardised_weights_are_folded(by_norm: bool) -> None:
    """What is pruned answers as the dense model does without those channels; the statistics of the others do not change."""

    def network(first: nn.Module, second: nn.Module, third: nn.Module) -> Of:
        def run(m: Of, x: Tensor) -> Tensor:
            return m.head(F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))).mean((2, 3)))  # type: ignore[no-any-return]

        return Of(run, a=first, b=second, c=third, head=nn.Linear(12, 4)).eval()

    torch.manual_seed(0)
    first, second = Standardised(3, 8, 3, by_norm=by_norm), Standardised(8, 8, 3, groups=8, padding=1, by_norm=by_norm)
    model, x = network(first, second, Standardised(8, 12, 1, by_norm=by_norm)), torch.randn(2, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = sp.compress(model, (x,), target="channels=0.5")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and type(model.a) is Standardised
    assert type(result.model) is Of and type(result.model.a) is nn.Conv2d and not hasattr(result.model.a, "gain")
    assert [tuple(m.weight.shape) for m in (result.model.a, result.model.b, result.model.c)] == [(4, 3, 3, 3), (4, 1, 3, 3), (6, 4, 1, 1)]
    assert {g["name"]: g["exact"] for g in result.plan.to_dict()["groups"]} == {"a": False, "c": True}

    plain = network(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 12, 1))
    with torch.no_grad():
        for layer, mine in zip((model.a, model.b, model.c), (plain.a, plain.b, plain.c), strict=True):
            flat = layer.weight.flatten(1)
            deviation = (flat.var(1, keepdim=True, correction=int(not by_norm)) + 1e-6).sqrt()
            mine.weight.copy_((layer.gain.flatten(1) * (flat - flat.mean(1, keepdim=True)) / deviation).view_as(layer.weight))
            mine.bias.copy_(layer.bias)
        plain.head.load_state_dict(model.head.state_dict())
    assert torch.allclose(plain(x), model(x), atol=1e-6)
    keep = {name: cut.keep for name, cut in result.plan.tensors.items()}
    assert oracle.error_of(plain, result.model, keep, (x,))[0] < 1e-5
    assert oracle.error_of(model, result.model, keep, (x,))[0] <= oracle.TOLERANCE
    assert torch.equal(sp.apply(model, result.plan)(x), result.model(x))


def test_a_layer_that_is_called_twice_is_folded_once() -> None:
    """A head over several levels of a pyramid."""
    torch.manual_seed(0)

    def run(m: Of, x: Tensor) -> Tensor:
        return m.last(F.relu(m.head(F.relu(m.first(x)))).mean((2, 3)) + F.relu(m.head(F.relu(m.first(x[:, :, ::2, ::2])))).mean((2, 3)))  # type: ignore[no-any-return]

    model = Of(run, first=nn.Conv2d(3, 8, 3), head=Standardised(8, 12, 3, padding=1), last=nn.Linear(12, 4)).eval()
    result = sp.compress(model, (torch.randn(2, 3, 12, 12),), target="channels=0.5")
    assert type(result.model) is Of and result.model.head.weight.shape == (6, 4, 3, 3)


def test_a_weight_that_is_used_raw_as_well_is_not_folded() -> None:
    def run(m: Of, x: Tensor) -> Tensor:
        return m.last(F.linear(x, m.w - m.w.mean(1, keepdim=True)) + F.linear(x, m.w))  # type: ignore[no-any-return]

    model = Of(run, w=nn.Parameter(torch.randn(8, 6)), last=nn.Linear(8, 2))
    assert not sp.trace(model, torch.randn(3, 6)).standardised


class Padding(Standardised):
    """Pads its input by as much as its size asks for (the NF-Nets of DeepMind, hybrids of ResNet and ViT), or always by the same."""

    def __init__(self, *sizes: int, by_size: bool, **options: Any):
        super().__init__(*sizes, **options)
        self.by_size = by_size

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in x.shape[:1:-1] if self.by_size else ():
            short = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
            pads += [short // 2, short - short // 2]
        return super().forward(F.pad(x, pads or (0, 1, 0, 1)))


@pytest.mark.parametrize("by_size", [True, False])
def test_a_layer_that_pads_before_a_standardised_weight(by_size: bool) -> None:
    torch.manual_seed(0)
    layer = Padding(3, 8, 3, stride=2, by_size=by_size)
    model = Of(lambda m, x: m.b(F.relu(m.a(x)).mean((2, 3))), a=layer, b=nn.Linear(8, 4)).eval()
    result = sp.compress(model, (torch.randn(2, 3, 6, 6),), target="channels=0.5")
    assert isinstance(result.model, Of) == by_size  # pads of 0 and 1 are right for the example, and not for other sizes
    if by_size:
        wide = copy.deepcopy(model)
        kept = result.plan.tensors["b.weight"].keep[1]
        wide.b.weight.data = torch.zeros(4, 8).index_copy(1, torch.tensor(kept), model.b.weight.data[:, kept])
        other = torch.randn(5, 3, 9, 11)
        torch.testing.assert_close(result.model(other), wide(other))


def test_widths_beside_each_other_take_the_same_share() -> None:
    """Three heads; queries, keys and values of 32 each stand in one projection."""

    def run(m: Of, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = m.qkv(x).view(b, n, 3, 96).split(32, -1)
        weight = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return m.out(torch.einsum("bhij,bjhd->bihd", weight, v).reshape(b, n, 96))

    groups = sp.inspect(Of(run, qkv=nn.Linear(16, 288), out=nn.Linear(96, 4)).eval(), (torch.randn(2, 5, 16),))
    widths = sp.plan(sp.trace(Of(run, qkv=nn.Linear(16, 288), out=nn.Linear(96, 4)), torch.randn(2, 5, 16)), groups, "channels=0.5")
    kept = sorted((g.channels, len(g.keep)) for g in widths.groups)
    assert [k for c, k in kept if c == 32] in ([16, 16], [24, 24])


@pytest.mark.parametrize(
    ("run", "shape"),
    [
        (lambda m, x: F.cosine_similarity(m.a(x), m.b(x), dim=-1), (8, 6)),
        (lambda m, x: torch.cdist(m.a(x), m.b(x)), (8, 6)),
        (lambda m, x: torch.view_as_real(torch.view_as_complex(m.a(x).view(2, 5, 8, 2)) * 1j).flatten(2) @ m.b.weight, (8, 6)),
        (lambda m, x: torch.fft.fft2(m.a(x), dim=(0, 1)).real @ m.b.weight, (8, 6)),
        (lambda m, x: torch.zeros_like(m.a(x)).scatter(1, torch.zeros(2, 5, 16, dtype=torch.long), m.a(x)) @ m.b.weight, (8, 6)),
    ],
)
def test_single_operators(run: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert pruned(Of(run, a=nn.Linear(6, 16), b=nn.Linear(6, 16)), [torch.randn(2, 5, 6)])["a.weight"] == shape


def test_embeddings_by_bags() -> None:
    torch.manual_seed(0)
    model = Of(lambda m, ids, offsets: m.b(m.e(ids, offsets)), e=nn.EmbeddingBag(20, 8, mode="sum"), b=nn.Linear(8, 3))
    groups = sp.inspect(model.eval(), (torch.tensor([1, 2, 4, 5]), torch.tensor([0, 2])))
    assert [[(m.tensor, m.dim) for m in g.members] for g in groups] == [[("e.weight", 1), ("b.weight", 1)]]


@pytest.mark.parametrize("rows", [True, False])
def test_scattered_rows_keep_their_width_free_and_scattered_entries_do_not(rows: bool) -> None:
    def run(m: nn.Module, ids: Tensor, x: Tensor) -> Tensor:
        text = m.e(ids)
        mask = (ids == 3).unsqueeze(-1).expand_as(text) if rows else (text > 0) & (ids == 3).unsqueeze(-1)
        return m.b(text.masked_scatter(mask, m.a(x)))

    torch.manual_seed(0)
    model = Of(run, e=nn.Embedding(5, 8), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    groups = sp.inspect(model.eval(), (torch.tensor([[1, 3, 3], [3, 3, 2]]), torch.randn(4, 4)))
    coupled = [("e.weight", 1), ("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]
    assert [{(m.tensor, m.dim) for m in g.members} for g in groups] == ([set(coupled)] if rows else [])


def test_deformable_convolution_and_regions() -> None:
    torch.manual_seed(0)
    model = Of(
        lambda m, x: m.c(deform_conv2d(m.a(x), m.o(m.a(x)), m.w, padding=1)), a=nn.Conv2d(3, 8, 3), o=nn.Conv2d(8, 18, 3, padding=1),
        w=nn.Parameter(torch.randn(12, 8, 3, 3)), c=nn.Conv2d(12, 4, 1),
    )  # fmt: skip
    assert pruned(model, [torch.randn(2, 3, 8, 8)])["w"] == (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("groups", "offset_groups", "smaller"),
    [(1, 4, (6, 8, 3, 3)), (4, 1, (6, 4, 3, 3)), (4, 4, (6, 4, 3, 3))],
    ids=["offsets in groups", "weights in groups", "both in groups"],
)
def test_deformable_convolution_in_groups(groups: int, offset_groups: int, smaller: tuple[int, ...]) -> None:
    """Whole groups go, with their channels; of offsets in groups what learns these too, and what learns the weights of what is read."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.c(m.d(x, m.o(x), m.m(x).sigmoid()))

    torch.manual_seed(0)
    model = Of(
        run, a=nn.Conv2d(3, 16, 3), o=nn.Conv2d(16, 18 * offset_groups, 3, padding=1), m=nn.Conv2d(16, 9 * offset_groups, 3, padding=1),
        d=DeformConv2d(16, 12, 3, padding=1, groups=groups), c=nn.Conv2d(12, 4, 1),
    )  # fmt: skip
    small = pruned(model, [torch.randn(2, 3, 8, 8)])
    assert small["d.weight"] == smaller
    left = max(1, offset_groups // 2)
    assert small["o.weight"][0] == 18 * left and small["m.weight"][0] == 9 * left


def test_deformable_convolution_in_groups_of_two_sizes_stays() -> None:
    layers = {
        "a": nn.Conv2d(3, 16, 1),
        "o": nn.Conv2d(3, 72, 3, padding=1),
        "d": DeformConv2d(16, 12, 3, padding=1, groups=2),
        "c": nn.Conv2d(12, 4, 1),
    }
    reasons = frozen(Of(lambda m, x: m.c(m.d(m.a(x), m.o(x))), **layers), [torch.randn(2, 3, 8, 8)], "d.weight", 1)
    assert any("a deformable convolution in groups of two sizes" in reason for reason in reasons)


def test_what_an_unchecked_operator_reads_as_positions_is_not_made_noise() -> None:
    """Out of the image or the batch, such an operator would read memory that is not its own."""
    from architectures import detector

    from structprune.transform.verify import _with_noise, positions

    model, inputs = detector()
    graph = sp.trace(model, inputs)
    assert positions(graph) == {1}
    image, boxes = _with_noise(graph.flat_inputs(), 3, positions(graph))
    assert torch.equal(boxes, inputs[1].repeat(4, 1)) and len(image.unique(dim=0)) == 8


def test_a_failing_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(sp.StructpruneError, match="branches on values of tensors"):
        sp.trace(Branches(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


def test_code_that_goes_on_in_numpy_is_told_so() -> None:
    model = Of(lambda m, x: torch.from_numpy(np.maximum(m.a(x).detach().numpy(), 0)), a=nn.Linear(3, 8))
    with pytest.raises(sp.StructpruneError, match=r"test_infer.py:\d+: .*the code goes on in NumPy"):
        sp.trace(model, torch.randn(2, 3))


class Checked(nn.Module):
    """Code that looks at values, and only to see that they are as they should be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert (x.abs() < 100).all(), "out of range"
        if torch.isnan(x).any() or torch.isinf(x).any():
            raise ValueError("not finite")
        if not torch.all(
            x.std(0) >= 0,
        ):
            raise ValueError("no spread")
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


def test_checks_of_values_do_not_keep_a_model_from_being_traced() -> None:
    model, x = Checked(), torch.randn(3, 6)
    result = sp.compress(model, (x,))
    assert type(result.model) is Checked and result.model.first.out_features == 8
    assert not {"all", "any", "isnan"} & {operator_name(n) for n in result.graph.nodes}
    with pytest.raises(AssertionError, match="out of range"):
        result.model(1e3 * x)


def test_what_a_check_among_other_code_decides_is_not_guessed() -> None:
    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = x + 1
                if not x.sum() > 0 and not x.sum() < 1:
                    raise ValueError
            return x

    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0 and not x.sum() > 1:
                raise ValueError
            return x

    for model in (Chooses(), Nested()):
        with pytest.raises(sp.StructpruneError, match="branches on values of tensors"):
            sp.trace(model, torch.randn(2, 3))


def test_a_check_that_the_example_fails_is_not_passed_over() -> None:
    with pytest.raises(sp.StructpruneError, match=r"raises on the example inputs at .*test_infer.py:\d+: out of range"):
        sp.compress(Checked(), (torch.full((3, 6), 1e3),))


def test_a_check_whose_error_is_caught_is_a_branch() -> None:
    class Caught(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            try:
                if (x < 0).any():
                    raise ValueError
            except ValueError:
                return x.abs()
            return x + 1

    with pytest.raises(sp.StructpruneError, match="branches on values of tensors"):
        sp.trace(Caught(), torch.rand(2, 3))


class StartsItself(nn.Module):
    """As activation norms, codebooks and observers do, whose first call fills their buffers. It goes on with them once `started`."""

    def __init__(self, started: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)
        self.register_buffer("scale", torch.full((6,), 2.0))
        self.register_buffer("started", torch.tensor(started))
        self.register_buffer("rounds", torch.tensor([3]))

    def forward(self, x: Tensor) -> Tensor:
        if not self.started:
            self.scale = x.std(0)
            self.started.fill_(True)  # type: ignore[operator]
        for _ in range(self.rounds.item() - 1):  # type: ignore[operator]
            x = x / self.scale
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


def test_a_buffer_of_one_number_holds_what_it_holds() -> None:
    model, x = StartsItself(True), torch.randn(3, 6)
    result = sp.compress(model, (x,))
    assert type(result.model) is StartsItself and result.model.first.out_features == 8
    assert sum(operator_name(n) == "div" for n in result.graph.nodes) == 2
    assert {n for n in result.graph.notes if "asks for its value" in n} == {
        "started is taken to stay True: the model's code asks for its value",
        "rounds is taken to stay [3]: the model's code asks for its value",
    }


class Scheduled(nn.Module):
    """Its code asks for what it computes of small buffers, `written` to on the way or not."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.first, self.last, self.written = nn.Linear(6, 16), nn.Linear(16, 2), written
        self.register_buffer("step", torch.tensor(5))
        self.register_buffer("sizes", torch.tensor([[2, 3], [1, 6]]))
        self.register_buffer("flags", torch.tensor([False, True]))

    def forward(self, x: Tensor) -> Tensor:
        late = self.step - 2
        if self.written:
            late.mul_(x.shape[-1])
        if late > 2 and self.flags[1] and not self.flags.all():
            x = x * 2
        for rows, columns in self.sizes.tolist():
            x = x.view(-1, rows, columns).flip(1)
        return self.last(self.first(x.reshape(-1, 6)).relu())  # type: ignore[no-any-return]


def test_what_is_computed_of_small_buffers_is_known() -> None:
    model, x = Scheduled(False), torch.randn(4, 6)
    result = sp.compress(model, (x,))
    assert type(result.model) is Scheduled and result.model.first.out_features == 8
    assert sum(operator_name(n) == "mul" for n in result.graph.nodes) == 1 and sum(operator_name(n) == "flip" for n in result.graph.nodes) == 2
    assert sum("is taken to stay" in note for note in result.graph.notes) == 3


def test_what_was_written_to_since_is_not_known() -> None:
    with pytest.raises(sp.StructpruneError, match="branches on values of tensors"):
        sp.trace(Scheduled(True), torch.randn(4, 6))


class Windowed(nn.Module):
    """Its code makes a mask of sizes alone, and asks what is in it (Longformer); it pads by what it computes of a buffer (EnCodec)."""

    def __init__(self, of_batch: bool, by_data: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.of_batch, self.by_data = nn.Linear(6, 16), nn.Linear(16, 2), of_batch, by_data
        self.register_buffer("stride", torch.tensor(4))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0] if self.of_batch else 1, x.shape[1])
        if self.by_data:
            mask[x[:, :, 0] > 0] = 0
        mask[:, 2:] = 0
        hidden = torch.where(mask == 0, torch.zeros_like(mask), -1.0)
        if hidden.flatten().any().item() and not (mask > 1).any():
            x = x * mask[..., None]
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stride))[:, : 2 * self.stride]
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("of_batch", [False, True])
def test_what_code_makes_of_sizes_is_known(of_batch: bool) -> None:
    """Where the batch is among those sizes, it is fixed."""
    model, x = Windowed(of_batch), torch.randn(2, 5, 6)
    result = sp.compress(model, (x,))
    assert type(result.model) is Windowed and result.model.first.out_features == 8 and result.small(x).shape == (2, 8, 2)
    assert result.graph.dynamic_batch is not of_batch and "stride is taken to stay 4: the model's code asks for its value" in result.graph.notes
    assert torch.equal(result.small(x)[:, 2:], result.small(torch.zeros_like(x))[:, 2:])


def test_what_data_went_into_is_not_known() -> None:
    with pytest.raises(sp.StructpruneError, match="branches on values of tensors"):
        sp.trace(Windowed(True, by_data=True), torch.randn(2, 5, 6))


def test_an_attempt_with_fewer_free_sizes_is_one() -> None:
    """torch.export leaves marks on the inputs of an attempt that fails, by which the next would find the same axes free."""
    model = Of(lambda m, x: m.b(m.a(x).relu()) + len(range(hash(x.shape[0]))), a=nn.Linear(6, 16), b=nn.Linear(16, 4)).eval()
    x = torch.randn(2, 6)
    graph = sp.trace(model, x)
    assert not graph.dynamic_batch and not vars(x)


def test_noise_without_a_generator_leaves_the_batch_free() -> None:
    model = Of(lambda m, x: m.b(m.a(x).relu()) + torch.randn((x.shape[0], 4), generator=None), a=nn.Linear(6, 16), b=nn.Linear(16, 4)).eval()
    assert sp.trace(model, torch.randn(2, 6)).dynamic_batch


def test_code_that_cannot_be_traced_when_it_knows_of_it_is_not_told() -> None:
    """T5 of transformers makes no mask of its own then, and some of its kin read it all the same."""

    def forward(m: Of, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones(x.shape[:2])
        return m.b(m.a(x).relu() * mask[:, :, None])  # type: ignore[index, no-any-return]

    model, x = Of(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 4)).eval(), torch.randn(3, 5, 6)
    result = sp.compress(model, (x,), target="channels=0.5")
    assert type(result.model) is Of and result.graph.dynamic_batch and not torch.compiler.is_compiling()


def test_an_answer_of_a_class_of_the_users_own() -> None:
    @dataclass
    class Answer:
        logits: Tensor
        pair: tuple[Tensor, float]

    class Plain:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Answers(nn.Module):
        def __init__(self, plain: bool) -> None:
            super().__init__()
            self.first, self.last, self.plain = nn.Linear(6, 16), nn.Linear(16, 4), plain

        def forward(self, x: Tensor) -> Any:
            logits = self.last(self.first(x).relu())
            return Plain(logits) if self.plain else Answer(logits, (logits.softmax(-1), 2.0))

    x = torch.randn(3, 6)
    result = sp.compress(Answers(False), (x,))
    answer = result.model(x)
    assert type(answer) is Answer and result.model.first.out_features == 8 and result.graph.output_names == ("logits", "pair_0", "pair_1")
    assert torch.allclose(answer.logits.softmax(-1), answer.pair[0])
    with pytest.raises(sp.StructpruneError, match="let the model answer tensors, or a tuple, dict or dataclass of them"):
        sp.trace(Answers(True), x)


def test_layers_without_shapes_are_told() -> None:
    with pytest.raises(
        sp.StructpruneError, match=r"^0.weight has no shape yet: its layer is lazy, and has seen no input; run the model on one before"
    ):
        sp.compress(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(3, 6),))


def test_vmap_is_resolved() -> None:
    """Masks of transformers are made so, and losses by sample. Between the calls that open and close it no node runs by itself."""

    def forward(m: Of, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        mask = torch.vmap(torch.vmap(lambda i, j: i >= j, in_dims=(None, 0)), in_dims=(0, None))(places, places)
        hidden = m.a(x)
        score = (hidden @ hidden.mT).masked_fill(~mask, float("-inf")).softmax(-1)
        return m.b(score @ hidden) + torch.vmap(lambda sample: (2 * sample).sum(-1))(hidden)[..., None]  # type: ignore[no-any-return]

    model, x = Of(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 4)).eval(), torch.randn(3, 5, 6)
    result = sp.compress(model, (x,), target="channels=0.5")
    assert type(result.model) is Of and result.model.a.out_features == 8 and result.graph.dynamic_batch
    assert torch.allclose(result.model(x[:1]), result.small(x)[:1], atol=1e-5)


@pytest.mark.parametrize("deep", [1, 2, 3])
def test_regions_within_regions(deep: int) -> None:
    """Gradients or autocast switched off, as deep as code likes: a region's own regions bear names that others have outside of it."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.a(x)
        with torch.autocast("cpu", enabled=False):
            x = x.relu()
        with ExitStack() as stack:
            for number in range(deep):
                stack.enter_context(torch.autocast("cpu", enabled=False) if number % 2 else torch.no_grad())
                x = m.b(x) if number == deep - 1 else x + 1
        return m.c(x)

    model = Of(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 3)).eval()
    result = sp.compress(model, (torch.randn(2, 6),), "channels=0.5")
    assert type(result.model) is Of and result.model.b.weight.shape == (8, 8)


def test_memory_that_is_freed_is_no_operator() -> None:
    """Reversible blocks empty what they have read; a tensor that is read after it was emptied stays as the code has it."""

    def forward(m: Of, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, 1)
        left, right = left.contiguous(), right.contiguous()
        first = left + m.b(right)
        right.set_()
        both = torch.cat([first, left], 1)
        left.set_()
        return m.c(both)  # type: ignore[no-any-return]

    model, x = Of(forward, a=nn.Linear(6, 16), b=nn.Linear(8, 8), c=nn.Linear(16, 4)).eval(), torch.randn(3, 6)
    with torch.no_grad():
        result = sp.compress(model, (x,), target="channels=0.5")
        assert type(result.model) is Of and result.model.b.in_features == 4 and not any("set_" in str(n.target) for n in result.graph.nodes)

    def emptied(m: Of, x: Tensor) -> Tensor:
        hidden = m.a(x)
        hidden.contiguous().set_()  # the same tensor
        return m.b(m.a(x)) * (torch.ones_like(hidden).sum() + 1)  # type: ignore[no-any-return]

    read = Of(emptied, a=nn.Linear(6, 16), b=nn.Linear(16, 4)).eval()
    with torch.no_grad():
        assert torch.equal(sp.trace(read, (x,)).module(x), read(x))


class Packed(nn.Module):
    """Pictures of several sizes in one row of patches, attention within each (Qwen-VL): its code asks for their `grid`."""

    def __init__(self, decided: bool = False) -> None:
        super().__init__()
        self.first, self.mix, self.last, self.decided = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2), decided

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        sizes = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
        ends = F.pad(sizes.cumsum(0), (1, 0))
        rows = torch.cat([torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")[0].flatten().repeat(t) for t, h, w in grid.tolist()])
        x = self.first(x) + rows[rows >= 0][:, None]
        parts = [part.softmax(0) * part for part in x.split((ends[1:] - ends[:-1]).tolist())]
        answer = self.last(self.mix(torch.cat(parts)).relu())
        return answer.argmax(1) if self.decided else answer  # type: ignore[no-any-return]


def test_an_input_by_which_the_code_decides_stays_what_it_is(tmp_path: Path) -> None:
    """The user's class goes on with any other; the traced module and the ONNX file, which cannot, answer NaN."""
    model, x, grid = Packed().eval(), torch.randn(10, 6), torch.tensor([[1, 2, 3], [2, 1, 2]])
    result = sp.compress(model, (x, grid), target="channels=0.5")
    assert type(result.model) is Packed and result.model.first.out_features == 8
    assert any(note.startswith("grid is taken to stay [[1, 2, 3], [2, 1, 2]]") for note in result.graph.notes)
    other = torch.tensor([[1, 2, 2], [2, 1, 3]])
    assert torch.allclose(result.small(x, grid), result.model(x, grid), atol=1e-6)
    assert result.small(x, other).isnan().all() and not result.model(x, other).isnan().any()
    with pytest.raises(sp.StructpruneError, match="grid is not the example's, and the model's code decides by its values"):
        sp.compress(model, (x, grid), calibration=[(x, grid), (x, other)])
    assert result.export_onnx(tmp_path / "model.onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    names = [i.name for i in session.get_inputs()]
    for given, missing in ((grid, False), (other, True)):
        (answer,) = session.run(None, dict(zip(names, (x.numpy(), given.numpy()), strict=True)))
        assert torch.from_numpy(answer).isnan().all().item() is missing


def test_an_input_by_which_the_code_decides_must_be_told_of() -> None:
    with pytest.raises(sp.StructpruneError, match="no answer could tell that it has changed"):
        sp.trace(Packed(decided=True), (torch.randn(10, 6), torch.tensor([[1, 2, 3], [2, 1, 2]])))


def test_a_buffer_that_decides_and_is_changed_is_not_taken_to_stay() -> None:
    with pytest.raises(sp.StructpruneError, match="asks for the value of started and changes it"):
        sp.trace(StartsItself(False), torch.randn(3, 6))
    ran = StartsItself(False)
    ran(torch.randn(3, 6))
    assert type(sp.compress(ran, (torch.randn(3, 6),)).model) is StartsItself


class Recording(nn.Module):
    """The first call puts hooks on the layers, which keep what these answer (as transformers does for hidden states)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), nn.Linear(12, 3)
        self.hooked, self.seen = False, []

    def record(self, module: nn.Module, args: Any, answer: Tensor) -> None:
        self.seen.append(answer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            for layer in self.layers:
                layer.register_forward_hook(self.record)
            self.hooked = True
        self.seen = []
        for layer in self.layers:
            x = layer(x).relu()
        return self.last(torch.cat(self.seen, -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("ran", [False, True], ids=["never called", "called before"])
def test_hooks_that_a_first_call_puts_on_layers_are_there_once(ran: bool) -> None:
    model, x = Recording().eval(), torch.randn(2, 6)
    if ran:
        model(x)
    result = sp.compress(model, x, "channels=0.5")
    assert [len(layer._forward_hooks) for layer in model.layers] == [int(model.hooked)] * 2
    assert model(x).shape == (2, 3) and result.small(x).shape == (2, 3)


def test_a_single_sample_whose_axis_is_dropped_is_traced_as_it_is(tmp_path: Path) -> None:
    """Of two samples the trace would have another axis; of two of the user's it is followed."""
    model = Of(lambda m, x: m.b(F.relu(m.a(x).squeeze())).unsqueeze(0), a=nn.Linear(6, 16), b=nn.Linear(16, 4)).eval()
    for number, shape, free in ((1, (1, 4), False), (2, (1, 2, 4), True)):
        x = torch.randn(number, 6)
        result = sp.compress(model, (x,), target="channels=0.5")
        assert result.small(x).shape == result.model(x).shape == shape and result.graph.dynamic_batch is free
    result = sp.compress(model, (torch.randn(1, 6),), target="channels=0.5")
    assert result.export_onnx(tmp_path / "model.onnx") < 1e-5
    assert any("drops the first axis" in note for note in result.graph.notes)


def test_a_layer_that_is_moved_to_where_it_is() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last.to(x)(self.first.to(device=x.device, dtype=torch.float32)(x).relu())  # type: ignore[no-any-return]

    moves = nn.Module.to
    result = sp.compress(Moved(), (torch.randn(3, 6),))
    assert type(result.model) is Moved and result.model.first.out_features == 8
    assert nn.Module.to is moves
    with pytest.raises(sp.StructpruneError, match="cannot be traced at .*test_infer.py"):
        sp.trace(Moved(), torch.randn(3, 6, dtype=torch.float64))


class OfBoundedNorm(nn.Linear):
    """As the convolutions of many networks for EEG."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class NotNegative(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(min=0)
        return super().forward(x)


class NotNegativeWithoutGradients(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(min=0)
        return super().forward(x)


@pytest.mark.parametrize("layer", [OfBoundedNorm, NotNegative, NotNegativeWithoutGradients])
def test_layers_that_put_their_weights_right(layer: type[nn.Linear], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(6, 16), nn.ReLU(), layer(16, 2)).eval()
    before = [p.clone() for p in model.parameters()]
    result = sp.compress(model, (torch.randn(3, 6),))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert type(result.model[0]) is layer and result.model[0].out_features == 8
    assert result.export_onnx(tmp_path / "model.onnx") < 1e-5
    small = result.model(torch.randn(3, 6))  # writes to its weights
    assert small.shape == (3, 2)
    assert (result.model[0].weight.norm(dim=1) <= 0.5001).all() if layer is OfBoundedNorm else (result.model[0].weight >= 0).all()


BETWEEN_LINEARS: dict[str, Callable[[Tensor], Tensor]] = {  # of [batch, 5 tokens, channels]
    "quantile": lambda x: x.quantile(torch.tensor([0.25, 0.75], dtype=x.dtype), dim=1).diff(dim=0)[0],
    "nanquantile": lambda x: x.nanquantile(0.3, dim=1),
    "kthvalue": lambda x: x.kthvalue(2, dim=1).values,
    "nanmedian": lambda x: x.nanmedian(dim=1).values,
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([-0.5, 0.1, 0.7], dtype=x.dtype)),
    "searchsorted": lambda x: x * torch.searchsorted(torch.tensor([-0.5, 0.1, 0.7], dtype=x.dtype), x),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([0, 2]), 1.5),
    "frexp": lambda x: torch.frexp(x).mantissa,
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(2)),
    "polygamma": lambda x: torch.polygamma(1, x.abs() + 1),
    "angle": lambda x: x.angle() + x,
    "special_i0e": torch.special.i0e,
}


@pytest.mark.parametrize("name", BETWEEN_LINEARS)
def test_channels_pass_through(name: str) -> None:
    torch.manual_seed(0)
    model = Of(lambda m, x: m.b(BETWEEN_LINEARS[name](m.a(x))), a=nn.Linear(6, 16), b=nn.Linear(16, 4))
    inputs = [torch.randn(2, 5, 6)]
    assert name in {operator_name(n) for n in sp.trace(model.eval(), inputs[0]).nodes}
    assert pruned(model, inputs)["a.weight"] == (8, 6)
