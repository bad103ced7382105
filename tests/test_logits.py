"""Queries and keys: what matters of them is their product, and a narrower one is fitted to it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import structprune as sp
from structprune.analysis.groups import Groups, find_groups
from structprune.calibrate.logits import Logits, measured_logits, turns
from structprune.decide.plan import cuts
from structprune.frontends.samples import samples_of
from structprune.frontends.trace import trace
from structprune.ir.graph import Graph
from structprune.recovery.compensate import compensate
from structprune.transform.surgery import operate

DIM, HEADS, WIDTH = 24, 4, 6


class Attention(nn.Module):
    """Separate layers; the product written out or fused; several heads of queries to one of keys; with something in between, or elsewhere."""

    def __init__(self, kind: str = "fused", key_heads: int = HEADS):
        super().__init__()
        self.kind, self.key_heads = kind, key_heads
        self.q, self.k = nn.Linear(DIM, HEADS * WIDTH), nn.Linear(DIM, key_heads * WIDTH)
        self.v, self.out = nn.Linear(DIM, key_heads * 5), nn.Linear(HEADS * 5, DIM)
        self.norm = nn.LayerNorm(WIDTH) if kind == "norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        q = self.q(x).view(batch, rows, HEADS, WIDTH).transpose(1, 2)
        k = self.k(self.q(x) if self.kind == "read again" else x).view(batch, rows, self.key_heads, WIDTH).transpose(1, 2)
        v = self.v(x).view(batch, rows, self.key_heads, 5).transpose(1, 2)
        q, k = self.norm(q), (q.clone() if self.kind == "shared" else k)
        repeats = HEADS // self.key_heads
        if self.kind == "fused":
            answer = F.scaled_dot_product_attention(q, k, v, enable_gqa=repeats > 1)
        else:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            answer = ((q * WIDTH**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.out(answer.transpose(1, 2).reshape(batch, rows, -1))


class Packed(nn.Module):
    """Queries, keys and values from one layer, which share one width; by rows, or by pixels."""

    def __init__(self, pixels: bool = False):
        super().__init__()
        self.pixels = pixels
        self.qkv = nn.Conv2d(DIM, 3 * HEADS * WIDTH, 1, bias=False) if pixels else nn.Linear(DIM, 3 * HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        if self.pixels:
            flat = self.qkv(x.transpose(1, 2).unflatten(2, (-1, 2))).flatten(2)
            q, k, v = flat.view(batch, 3, HEADS, WIDTH, rows).transpose(-2, -1).unbind(1)
        else:
            q, k, v = self.qkv(x).view(batch, rows, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def low_rank(layer: nn.Module, first: int, last: int, rank: int) -> None:
    """Each of these heads' vectors lies in a space of its own, of so many dimensions, that no choice of channels spans."""
    weight = layer.weight.data
    for head in range(first, last):
        own = slice(head * WIDTH, (head + 1) * WIDTH)
        basis = torch.linalg.qr(torch.randn(WIDTH, rank))[0]
        weight[own] = (basis @ basis.T @ weight[own].flatten(1)).view_as(weight[own]) * 3
        if layer.bias is not None:
            layer.bias.data[own] = basis @ basis.T @ layer.bias.data[own]


def noise(seed: int, number: int = 64) -> Tensor:
    return torch.randn(number, 8, DIM, generator=torch.Generator().manual_seed(seed))


def found_in(model: nn.Module, x: Tensor) -> tuple[list[Logits], Groups, Graph]:
    graph = trace(model.eval(), (x[:2],))
    groups = find_groups(graph)
    return measured_logits(graph, groups.types, samples_of(x, graph)), groups, graph


MODELS = {
    "fused": Attention,
    "written out": lambda: Attention("plain"),
    "grouped, fused": lambda: Attention(key_heads=2),
    "grouped, written out": lambda: Attention("plain", key_heads=2),
}


def errors_of(model: nn.Module) -> tuple[float, float]:
    """Of the answer to new inputs, as a share of what attention adds to them, with three channels of queries and keys: sliced, and fitted."""
    x, unseen = noise(1), noise(2)
    (logits,), groups, graph = found_in(model, x)
    keep = {logits.atom: np.array([0, 2, 4])}
    surgery = operate(graph, groups.types, keep, cuts(groups.axes, keep))
    with torch.no_grad():
        wanted, sliced = model(unseen), surgery.module(unseen)
        compensate(graph, groups.types, keep, surgery, samples_of(x, graph), turned=turns([logits], keep))
        sliced, fitted = (float((answer - wanted).norm() / (wanted - unseen).norm()) for answer in (sliced, surgery.module(unseen)))
    return sliced, fitted


@pytest.mark.parametrize("name", MODELS)
def test_products_of_low_rank_are_cut_to_it_without_loss(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    low_rank(model.k, 0, model.key_heads, 3)
    sliced, fitted = errors_of(model)
    assert sliced > 0.05 and fitted < 1e-4


@pytest.mark.parametrize("pixels", [False, True])
def test_queries_and_keys_packed_with_values_turn_and_values_do_not(pixels: bool) -> None:
    torch.manual_seed(0)
    model = Packed(pixels).eval()
    low_rank(model.qkv, 0, 2 * HEADS, 3)
    with torch.no_grad():  # only three channels of the values are read
        model.out.weight.view(DIM, HEADS, WIDTH)[:, :, 1::2] = 0
    sliced, fitted = errors_of(model)
    assert sliced > 0.05 and fitted < 1e-4


def test_what_is_missed_is_what_the_formula_says_and_the_least_there_is() -> None:
    torch.manual_seed(0)
    model, x = Attention("plain").eval(), noise(1)
    (logits,), _, _ = found_in(model, x)
    losses = logits.losses()
    assert losses.shape == (WIDTH + 1,) and losses[-1] == 0 and (np.diff(losses) <= 0).all()
    with torch.no_grad():
        q, k = (layer(x).view(-1, 8, HEADS, WIDTH).transpose(1, 2).double() for layer in (model.q, model.k))
        q, k = q * WIDTH**-0.5, k - k.mean(2, keepdim=True)
    missed, missed_of_channels = 0.0, 0.0
    for head in logits.heads:
        (left,), (right,) = head.lefts, head.rights
        number = left.entries[0] // WIDTH
        assert right.entries == left.entries
        rows, keys = q[:, number].flatten(0, 1), k[:, number].flatten(0, 1)
        whole = rows @ keys.T  # every query with every key, of whichever sample
        rank = WIDTH // 2
        missed += float((whole - (rows @ head.left[:, :rank]) @ (keys @ head.right[:, :rank]).T).square().sum())
        chosen = [rows[:, list(c)] @ keys[:, list(c)].T for c in itertools.combinations(range(WIDTH), rank)]
        missed_of_channels += min(float((whole - product).square().sum()) for product in chosen)
    assert missed == pytest.approx(losses[rank], rel=1e-6)
    assert missed < 0.8 * missed_of_channels


@pytest.mark.parametrize("kind", ["norm", "read again", "shared"])
def test_queries_and_keys_that_anything_else_reads_stay_as_they_are(kind: str) -> None:
    torch.manual_seed(0)
    found, groups, _ = found_in(Attention(kind), noise(1))
    assert any(g.size == WIDTH for g in groups)  # they may be cut
    assert not found


def test_a_head_of_keys_serves_its_own_queries() -> None:
    torch.manual_seed(0)
    (logits,), _, _ = found_in(Attention(key_heads=2), noise(1))
    served = {head.rights[0].entries[0] // WIDTH: sorted(v.entries[0] // WIDTH for v in head.lefts) for head in logits.heads}
    assert served == {0: [0, 1], 1: [2, 3]}


def test_compress_fits_them() -> None:
    torch.manual_seed(0)
    model, x, unseen = Attention().eval(), noise(1), noise(2)
    low_rank(model.k, 0, HEADS, 3)
    small = sp.compress(model, x[:2], "channels=0.5", calibration=x, allocation="uniform", ignore=("v", "out")).model
    assert dict(small.named_parameters())["q.weight"].shape[0] == HEADS * 3
    with torch.no_grad():
        assert (small(unseen) - model(unseen)).norm() < 1e-3 * (model(unseen) - unseen).norm()
