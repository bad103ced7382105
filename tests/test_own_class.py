"""The user's class comes back, right and trainable: code that is written as much code is, each in its smallest form."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structprune as sp
from structprune.ir.graph import source_of
from structprune.result import Result
from structprune.transform.attention import attend
from structprune.transform.scale import Scale, hold_scales


def in_its_class(model: nn.Module, x: tuple[Any, ...], target: str) -> Result:
    """The result of a compression, of the user's class, and right by an oracle that knows nothing of structprune."""
    result = sp.compress(model.eval(), x, target)
    assert type(result.model) is type(model), result.report.data["verification"]["module_note"]
    error, tolerance = oracle.error_of(model, result.model, {name: cut.keep for name, cut in result.plan.tensors.items()}, x)
    assert error <= tolerance
    return result


# --- attributes -------------------------------------------------------------------------------------------------------------


@dataclass
class Sizes:
    steps: int = 4
    states: int = 8


class InMethod(nn.Module):
    """What settings say is read in a method that the forward calls (Mamba)."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.stem, self.mixed = Sizes(), nn.Linear(6, 20), nn.Linear(8, 3)
        self.steps = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(self.scan(self.stem(x)))

    def scan(self, x: Tensor) -> Tensor:
        steps, left, right = torch.split(x, [self.config.steps, self.config.states, self.config.states], -1)
        return self.steps(steps).sigmoid() * left.tanh() + right


class ByVariables(nn.Module):
    """What settings say is read under the same names, in statements before (LitGPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.stem, self.mixed = Sizes(), nn.Linear(6, 24), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps, states = self.config.steps, self.config.states
        read = self.stem(x)
        left, right = read.split([states, read.shape[-1] - states], -1)
        return self.mixed((left.unsqueeze(-2) * right.view(len(x), steps, -1).sum(-1, keepdim=True)).flatten(1))


class ByOffsets(nn.Module):
    """Where queries end is computed in a statement before, of settings and of an attribute; keys and values count by another attribute (Phi-3)."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.key_heads, self.width = Sizes(), 4, 8
        self.qkv, self.out = nn.Linear(6, 96), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        first = self.config.steps * self.width
        q = y[..., :first]
        k = y[..., first : first + self.key_heads * self.width]
        v = y[..., first + self.key_heads * self.width :]
        q, k, v = (t.view(*x.shape[:2], -1, self.width).transpose(1, 2) for t in (q, k, v))
        q = q * torch.arange(self.width).to(q).cos()
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ByQuotient(nn.Module):
    """How wide a head is follows from two attributes, of which one is the number of heads; a third number is as large as the other, and stays.

    The number of heads is read in a statement before, with another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width, self.most = 4, 32, 32
        self.first, self.values, self.out = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        heads, most = self.heads, self.most
        v = self.values(x).view(*x.shape[:2], heads, self.width // self.heads).transpose(1, 2)
        return self.out((v @ (v.mT @ v).softmax(-1)).transpose(1, 2).flatten(2)) * most


class Sliced(nn.Module):
    """Parts of lists, of a model that holds one module under two names: torch calls what is reached by them otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.act = self.same = nn.GELU()
        self.gates, self.rest = nn.ModuleList([Gate() for _ in range(4)]), nn.Sequential(Gate(), nn.Linear(6, 6), Gate())

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.gates[1:][::2]:
            x = self.act(gate(x))
        for gate in self.gates[:1]:
            x = self.same(gate(x))
        return self.rest[1:](self.rest[:1](x))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = self.most = 10
        self.both, self.out = nn.Linear(6, 20), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(x).split(self.inner, -1)
        return self.out(left.tanh() * right) / self.most


class Making(nn.Module):
    """Two attributes of one number, one after the other in the code: of the last such layer only the first shrinks (NNConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = self.outputs = 16
        self.weights = nn.Linear(4, 256)

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        return (x.unsqueeze(1) @ self.weights(by).view(-1, self.inputs, self.outputs)).squeeze(1)


class Made(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(6, 16), nn.ModuleList([Making(), Making()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for layer in self.layers:
            y = layer(y.relu(), x[:, :4])
        return y


class Attending(nn.Module):
    """As many heads, which a softmax keeps, as they are wide: the number that shrinks is that of the entries of each."""

    def __init__(self, local: nn.Module) -> None:
        super().__init__()
        self.heads, self.local, self.values, self.out = 4, local, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        number, tokens, width = x.shape
        values = self.values(x).view(number, tokens, self.heads, width // self.heads)
        rows = (values * values.sum(-1, keepdim=True).softmax(2)).flatten(2)
        return self.out(rows + self.local(rows.mT).mT)


class Sharing(nn.Module):
    """A convolution that two layers share with who holds them all (CoaT): torch tells it by the name by which its caller has it."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.stem, self.layers = nn.Linear(6, 16), nn.Sequential(Attending(self.local), Attending(self.local), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x).relu())


class Grouped(nn.Module):
    """Of two attributes that hold one number the code mentions one, and computes with both (torchtune)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = self.key_heads = 4
        self.stem, self.q, self.kv, self.out = nn.Linear(6, 32), nn.Linear(32, 64), nn.Linear(32, 128), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, repeats = self.stem(x), self.heads // self.key_heads
        q = self.q(y).view(*x.shape[:2], self.key_heads * repeats, -1).transpose(1, 2)
        k, v = self.kv(y).view(*x.shape[:2], 2, self.key_heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Scaled(nn.Embedding):
    """Rows that are scaled by the width that the class says (Gemma)."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(self.embedding_dim**0.5)


class Rotating(nn.Module):
    """Two layers share a table of 24 positions, of which the example reaches 5."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = Scaled(20, 32), nn.Linear(32, 3)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        table = torch.randn(24, 32)
        for layer in self.layers:
            layer.register_buffer("table", table)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.embed(ids)
        for layer in self.layers:
            y = y + layer(y * layer.table[: ids.shape[1]]).relu()
        return self.out(y)


def test_a_table_that_layers_share_keeps_the_positions_beyond_the_example() -> None:
    result = in_its_class(Rotating(), (torch.randint(0, 20, (2, 5)),), "channels=0.5")
    assert result.model.layers[1].table.shape == (24, 16)
    assert result.model(torch.randint(0, 20, (3, 24))).shape == (3, 24, 3)


class Heads(nn.Module):
    """The number of heads is named in another statement than the one that lays them out."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        number, tokens, heads = *x.shape[:2], self.heads
        queries, *others = self.qkv(x).chunk(3, -1)
        q, k, v = (t.reshape(number, tokens, heads, 8).transpose(1, 2) for t in (queries, *others))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(number, tokens, queries.shape[-1]))


class ByChance(nn.Module):
    """A module further out holds numbers that are as large as those of the heads, and stay (axial attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.dimensions, self.width, self.attention = 4, 32, Heads()

    def forward(self, x: Tensor) -> Tensor:
        assert (x.dim(), x.shape[-1]) == (self.dimensions, self.width)
        return self.attention(x.flatten(1, 2))


class Sines(nn.Module):
    """Computes as many sines as its `width` says, whatever it reads: a child that keeps a number which its parent must change (RF-DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.places, self.out = 32, nn.Linear(32, 5), nn.Linear(32, 5)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        waves = torch.arange(self.width, dtype=x.dtype) * x.mean((1, 2)).unsqueeze(-1)
        return self.places(waves.sin()) + self.out(rows).mean(1)


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.stem, self.score, self.sines = 32, nn.Linear(6, 32), nn.Linear(6, 1), Sines()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.stem(x)
        first = self.score(x).squeeze(-1).topk(2, 1).indices
        return self.sines(x, rows.gather(1, first.unsqueeze(-1).expand(-1, -1, self.width)))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (InMethod(), torch.randn(3, 6)),
        (ByVariables(), torch.randn(3, 6)),
        (ByOffsets(), torch.randn(2, 5, 6)),
        (ByQuotient(), torch.randn(2, 5, 6)),
        (Sliced(), torch.randn(3, 6)),
        (Made(), torch.randn(3, 6)),
        (Sharing(), torch.randn(2, 5, 6)),
        (Grouped(), torch.randn(2, 5, 6)),
        (ByChance(), torch.randn(2, 3, 5, 32)),
        (Chosen(), torch.randn(2, 7, 6)),
    ],
    ids=["method", "variables", "offsets", "quotient", "lists", "turns", "shared", "grouped", "chance", "child"],
)
def test_attributes_follow(model: nn.Module, x: Tensor) -> None:
    in_its_class(model, (x,), "channels=0.5")


def test_an_operator_in_a_method_is_told_with_its_own_line() -> None:
    graph = sp.trace(InMethod().eval(), torch.randn(3, 6))
    split = next(node for node in graph.nodes if "split" in node.name)
    assert source_of(split).endswith(f"test_own_class.py:{InMethod.scan.__code__.co_firstlineno + 1}")


# --- scales -----------------------------------------------------------------------------------------------------------------


def by_root_mean_square(m: models.Of, x: Tensor) -> Tensor:
    """A norm that multiplies by the root of the width that it finds (much code on diffusion)."""
    y = m.stem(x)
    return m.out(F.normalize(y, dim=-1) * m.gain * y.shape[-1] ** 0.5)


def test_the_scale_of_a_norm_stays() -> None:
    layers = {"stem": nn.Linear(6, 32), "gain": nn.Parameter(torch.rand(32) + 0.5), "out": nn.Linear(32, 3)}
    result = in_its_class(models.Of(by_root_mean_square, **layers), (torch.randn(2, 5, 6),), "channels=0.5")
    assert "hooks on 1 modules" in result.report.data["verification"]["module_note"]


SCALINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "root": lambda q, k: q @ k.mT / torch.sqrt(torch.tensor(q.shape[-1])),  # correlations of optical flow (RAFT)
    "in place": lambda q, k: (q @ k.mT).div_(torch.sqrt(torch.tensor(q.shape[-1]).float())),
    "inverse": lambda q, k: q @ k.mT * torch.rsqrt(torch.tensor(float(q.shape[-1]))),
    "several": lambda q, k: q @ (k.mT / torch.sqrt(torch.tensor(q.shape[-1], dtype=torch.float) * 3).to(k.dtype)),  # content and positions (DeBERTa)
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scale_that_code_makes_a_tensor_of_stays(name: str) -> None:
    def attend(m: models.Of, x: Tensor) -> Tensor:
        return m.out(SCALINGS[name](m.q(x), m.k(x)).softmax(-1) @ m.v(x))

    layers = {"q": nn.Linear(6, 32), "k": nn.Linear(6, 32), "v": nn.Linear(6, 32), "out": nn.Linear(32, 3)}
    result = in_its_class(models.Of(attend, **layers), (torch.randn(2, 5, 6),), "channels=0.5")
    assert "hooks on 1 modules" in result.report.data["verification"]["module_note"]


def test_under_a_hook_other_tensors_are_made_as_ever() -> None:
    """By keyword, too, which torch.export does not trace, but what only training reaches may do."""
    model = models.Of(lambda m, x: x * torch.tensor(data=16.0) + torch.tensor([16.0]))
    hold_scales(model, {"": Scale(width=32, left=16, in_code=True)})
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 32.0))


class Compensating(nn.Module):
    """Code that knows the operator's scale and turns it into its own, whatever the width is (x-transformers): nothing has to be held."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.heads, self.stem, self.qkv, self.out = 16**-0.5, 3, nn.Linear(6, 48), nn.Linear(48, 144), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.stem(x)).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        own = self.scale / q.shape[-1] ** -0.5
        return self.out(F.scaled_dot_product_attention(q * own, k, v).transpose(1, 2).flatten(2))


def test_code_that_makes_up_for_the_scale_itself_is_left_to_it() -> None:
    result = in_its_class(Compensating(), (torch.randn(2, 5, 6),), "channels=0.5")
    assert result.model.qkv.out_features // 3 // result.model.heads < 16  # the width of a head
    assert "hooks" not in result.report.data["verification"]["module_note"]


def by_sizes(m: models.Of, x: Tensor) -> Tensor:
    """Numbers that are computed of sizes, which are free, and are no scale of anything."""
    return m.out(m.stem(x).relu() * (x.shape[1] * 0.25)) + x.shape[1] * 0.5


def test_code_that_computes_with_free_sizes_has_no_scale() -> None:
    model = models.Of(by_sizes, stem=nn.Linear(6, 16), out=nn.Linear(16, 3)).eval()
    small = sp.compress(model, (torch.randn(2, 8, 6),), "channels=0.5", dynamic=(1,)).model
    assert isinstance(small, models.Of) and small(torch.randn(3, 5, 6)).shape == (3, 5, 3)


# --- what runs and no output needs --------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The last of the layers hands on a sum that nobody reads (Conv-TasNet); so does a part of what is forecast (N-HiTS)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv1d(3, 16, 1), nn.Conv1d(24, 4, 1)
        self.inner, self.back, self.skip = (nn.ModuleList(nn.Conv1d(a, b, 1) for _ in range(2)) for a, b in ((16, 32), (32, 16), (32, 24)))
        self.pairs = nn.ModuleList(nn.Conv1d(3, 6, 1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, total, forecast, rest = self.stem(x), 0, 0, x
        for inner, back, skip, pair in zip(self.inner, self.back, self.skip, self.pairs, strict=True):
            z = inner(y).relu()
            y, total = y + back(z), total + skip(z)
            seen, told = pair(rest).split([3, 3], 1)
            rest, forecast = rest - seen, forecast + told
        return self.out(total), forecast


def test_sums_that_nobody_reads_still_run() -> None:
    result = in_its_class(Residual(), (torch.randn(2, 3, 9),), "channels=0.5")
    assert result.report.data["macs"]["after"] < 0.4 * result.report.data["macs"]["before"]


def by_kernel(m: models.Of, x: Tensor) -> Tensor:
    """A part of a weight is asked for its size alone."""
    return m.out(m.stem(x).relu() * m.stem.weight[0][0].numel() ** -0.5)


def test_the_size_of_a_part_of_a_weight_ties_nothing() -> None:
    model = models.Of(by_kernel, stem=nn.Conv1d(3, 16, 5), out=nn.Conv1d(16, 4, 1))
    result = in_its_class(model, (torch.randn(2, 3, 9),), "channels=0.5")
    assert result.model.stem.out_channels == 8


# --- torch's own attention ----------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Layers of torch's own over rows that the user gives: what they read keeps its width, and their heads do not."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options), 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("target", ["channels=0.5", "channels=0.8"])  # whole heads, and heads that are narrower
@pytest.mark.parametrize("norm_first", [False, True])
def test_attention_of_torch_narrows_where_its_rows_do_not(target: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    model, x = Encoder(norm_first=norm_first), torch.randn(2, 7, 32)
    small = in_its_class(model, (x,), target).model
    attention = small.layers.layers[0].self_attn
    assert attention.out_proj.weight.shape[1] < 32 == attention.out_proj.weight.shape[0]
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), small(x)) and torch.equal(copy.deepcopy(small)(x), small(x))
    optimiser, losses = torch.optim.AdamW(small.train().parameters(), 1e-3), []
    for _ in range(3):
        torch.manual_seed(1)  # of dropout
        loss = small(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and attention.in_proj_weight.grad.abs().sum() > 0


def masks(kind: str) -> dict[str, Tensor]:
    hidden = torch.zeros(5, 7, dtype=torch.bool)
    hidden[:, 2] = hidden[3, 4] = True
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, -2:] = True
    each = hidden.double().masked_fill(hidden, -torch.inf).expand(8, 5, 7) + torch.randn(8, 1, 1)
    return {"none": {}, "bool": {"attn_mask": hidden}, "each": {"attn_mask": each}, "both": {"attn_mask": hidden, "key_padding_mask": padding}}[kind]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 12, "vdim": 20}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("kind", ["none", "bool", "each", "both"])
@pytest.mark.parametrize("weights", [True, False])
def test_attention_of_any_width_is_torchs_where_that_has_one(options: dict[str, Any], kind: str, weights: bool) -> None:
    torch.manual_seed(0)
    m = nn.MultiheadAttention(32, 4, dtype=torch.float64, **options)
    q, k, v = (torch.randn(n, 2, w, dtype=torch.float64) for n, w in ((5, 32), (7, m.kdim), (7, m.vdim)))
    separate = not m._qkv_same_embed_dim
    given = {"need_weights": weights, "use_separate_proj_weight": separate, **masks(kind)}
    if separate:
        given |= {name: getattr(m, name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")}
    args = (32, 4, m.in_proj_weight, m.in_proj_bias, m.bias_k, m.bias_v, m.add_zero_attn, 0.0, m.out_proj.weight, m.out_proj.bias)
    for average in (True, False):
        wanted = F.multi_head_attention_forward(q, k, v, *args, average_attn_weights=average, **given)
        got = attend(8**-0.5, q, k, v, *args, average_attn_weights=average, **given)
        torch.testing.assert_close(got, wanted)
    if kind == "none":
        alone = attend(8**-0.5, q[:, 0], k[:, 0], v[:, 0], *args, **given)
        torch.testing.assert_close(alone, F.multi_head_attention_forward(q[:, 0], k[:, 0], v[:, 0], *args, **given))


# --- what can be traced -------------------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """The order of axes is a tensor that the code makes (CompressAI)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.cat((torch.tensor([1, 0]), torch.arange(2, x.ndim)))
        return self.out(self.stem(x).permute(*order).contiguous().relu().permute(*order))


class Trying(nn.Module):
    """A layer is called in one way, and in another where it does not know that (SpeechBrain)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            try:
                x = block(x, lengths=None)
            except TypeError:
                x = block(x)
        return x


@pytest.mark.parametrize("model", [Turned(), Trying()], ids=["an order that is a tensor", "calls that fail"])
def test_code_is_traced(model: nn.Module) -> None:
    in_its_class(model, (torch.randn(2, 3, 5, 5),), "channels=0.5")


class Holding(nn.Module):
    """Python refuses to copy what this module keeps (`copy.deepcopy`)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Linear(6, 20), "last": nn.Linear(20, 3)})
        self.steps, self.lock, self.functions = self.layers.keys(), threading.Lock(), {"act": torch.nn.functional}

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = self.functions["act"].gelu(self.layers[step](x))
        return x


def test_what_cannot_be_copied_is_shared() -> None:
    x = torch.randn(4, 6)
    result = sp.compress(Holding().eval(), (x,), "channels=0.5")
    assert type(result.model) is Holding
    recovered = sp.recover(result, [x], epochs=1)
    assert recovered.model.layers["first"].out_features == 10
    assert not torch.equal(recovered.model.layers["first"].weight, result.model.layers["first"].weight)
