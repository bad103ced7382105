"""`exact` says whether a plain zero mask answers as the removal does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import Of
from torch import Tensor, nn

import structprune as sp


def over_linears(run: Callable[[nn.Module, Tensor], Tensor]) -> Of:
    layers = {"q": nn.Linear(6, 8), "k": nn.Linear(6, 8), "a": nn.Linear(8, 4), "b": nn.Linear(6, 3), "c": nn.Linear(12, 4)}
    return Of(run, **layers, gru=nn.GRU(6, 8, batch_first=True))


def _pair(m: nn.Module, x: Tensor) -> Tensor:
    """Of every channel two values, both zero where it is removed."""
    return torch.stack([m.q(x), m.k(x)], -1)  # type: ignore[operator]


ROWS = torch.tensor([0, 2, 2, 1, 0])


def _to_rows(x: Tensor) -> Tensor:
    """As graph networks gather what edges send: the sum of the rows that have the same number."""
    return x.new_zeros(5, x.shape[1]).scatter_add(0, ROWS[:, None].expand_as(x), x)


CASES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "a weight silences what a sigmoid makes loud": (lambda m, x: m.a(m.q(x).sigmoid()), True),
    "a sum of rectified channels": (lambda m, x: m.q(x).relu().sum(-1, keepdim=True) * m.b(x), True),
    "a sum of sigmoids": (lambda m, x: m.q(x).sigmoid().sum(-1, keepdim=True) * m.b(x), False),
    "a norm of channels": (lambda m, x: F.normalize(m.q(x), dim=-1) @ m.a.weight.t(), True),
    "a norm of exponentials": (lambda m, x: m.a(F.normalize(m.q(x).exp(), dim=-1)), False),
    "a deviation from the mean of a sample": (lambda m, x: m.a(m.q(x) / m.q(x).std(-1, keepdim=True)), False),
    "an inner product": (lambda m, x: (m.q(x) * m.k(x)).sum(-1, keepdim=True) * m.b(x), True),
    "one silent factor is enough": (lambda m, x: (m.q(x) * m.k(x).sigmoid()).sum(-1, keepdim=True) * m.b(x), True),
    "linear attention": (lambda m, x: (F.elu(m.q(x)) + 1) @ (F.elu(m.k(x)) + 1).t() @ m.b(x), False),
    "a choice between silent values": (lambda m, x: m.q(x).relu().masked_fill(x[:, :1] > 0, 0).sum(-1, keepdim=True) * m.b(x), True),
    "a choice of something else": (lambda m, x: m.q(x).masked_fill(x[:, :1] > 0, 1).sum(-1, keepdim=True) * m.b(x), False),
    "zeros among channels": (lambda m, x: m.a(F.normalize(F.pad(m.q(x)[:, :6], (0, 2)), dim=-1)), True),
    "zeros beside": (lambda m, x: F.pad(m.q(x)[..., None], (0, 1)).sum((1, 2))[:, None] * m.b(x), True),
    "something else beside": (lambda m, x: F.pad(m.q(x)[..., None], (0, 1), value=1.0).sum((1, 2))[:, None] * m.b(x), False),
    "zeros written": (lambda m, x: _pair(m, x).index_fill(-1, torch.tensor([1]), 0.0).sum((1, 2))[:, None] * m.b(x), True),
    "something else written": (lambda m, x: _pair(m, x).index_fill(-1, torch.tensor([1]), 1.0).sum((1, 2))[:, None] * m.b(x), False),
    "a logarithm of a sum of exponentials": (lambda m, x: _pair(m, x).logsumexp(-1).sum(1, keepdim=True) * m.b(x), False),
    "rows by number": (lambda m, x: m.c(F.embedding(_pair(m, x).argmax(-1), m.c.weight).sum(1)), False),
    "a class by number": (lambda m, x: F.one_hot(_pair(m, x).argmax(-1), 3).sum((1, 2))[:, None] * m.b(x), False),
    "a bucket by number": (lambda m, x: torch.bucketize(m.q(x), torch.tensor([-1.0, 0.5]).to(x)).sum(1)[:, None] * m.b(x), False),
    "the final state of a recurrent layer, from zeros": (lambda m, x: m.a(F.normalize(m.gru(x.unflatten(0, (5, 1)))[1][0], dim=-1)), True),
    "copies": (lambda m, x: m.c(x.repeat_interleave(2, -1)), True),
    "a norm over copies": (lambda m, x: m.c(F.normalize(x.repeat_interleave(2, -1), dim=-1)), False),
    "rows that are added up where their numbers say": (lambda m, x: m.a(F.normalize(_to_rows(m.q(x)), dim=-1)), True),
    "rows that are read by their numbers": (lambda m, x: m.a(F.normalize(m.q(x).gather(0, ROWS[:, None].expand(5, 8)), dim=-1)), True),
    "numbers of rows beside one that is not zero": (lambda m, x: m.a(F.normalize(_to_rows(m.q(x).exp()), dim=-1)), False),
    "numbers that are no rows'": (lambda m, x: m.a(F.normalize(torch.cat([m.q(x), (m.k(x) >= 0).long()], -1)[:, 4:12], dim=-1)), False),
    "what numbers of channels look up": (lambda m, x: m.a(F.normalize(x[:, :2].gather(1, (m.q(x) > 0).long()), dim=-1)), False),
    "attention": (lambda m, x: (m.q(x) @ m.k(x).t()).softmax(-1) @ m.b(x), True),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_means_that_a_zero_mask_agrees(name: str) -> None:
    torch.manual_seed(0)
    run, exact = CASES[name]
    model, x = over_linears(run).double().eval(), torch.randn(5, 6, dtype=torch.float64)
    result = sp.compress(model, (x,), target="channels=0.5")
    assert result.report.data["verification"]["exact"] is exact, [g.reason for g in result.plan.groups]
    state = model.state_dict()
    with torch.no_grad():
        for tensor, cut in result.plan.tensors.items():
            for dim, keep in cut.keep.items():
                gone = torch.tensor([i for i in range(cut.shape[dim]) if i not in keep])
                state[tensor].index_fill_(dim, gone, 0)
        agrees = torch.allclose(model(x), result.model(x), rtol=1e-9)
    assert agrees is exact


def test_a_mean_over_channels_that_are_not_zero_keeps_them() -> None:
    """Rectified channels are zero where they are removed, and their mean is over the kept ones; sigmoids are not."""
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    for run, prunable in (
        (lambda m, x: m.q(x).relu().mean(-1, keepdim=True) * m.b(x), True),
        (lambda m, x: m.q(x).sigmoid().mean(-1, keepdim=True) * m.b(x), False),
    ):
        groups = sp.inspect(over_linears(run).eval(), (x,))
        assert any(m.tensor == "q.weight" and m.dim == 0 for g in groups for m in g.members) is prunable
        reasons = [f.reason for f in groups.frozen if any(m.tensor == "q.weight" and m.dim == 0 for m in f.members)]
        assert reasons == ([] if prunable else ["a mean over these channels, which are not zero where they are removed"])


BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean of squares": lambda x: (x - x.mean(1, keepdim=True)) / ((x - x.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True) + 1e-5).sqrt(),
    "a product": lambda x: _centred(x) * torch.rsqrt((_centred(x) * _centred(x)).mean(1, keepdim=True) + 1e-5),
    "two moments": lambda x: _centred(x) / ((x * x).mean(1, keepdim=True) - x.mean(1, keepdim=True) ** 2 + 1e-5).sqrt(),
    "a variance": lambda x: _centred(x) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "a variance and a mean": lambda x: (x - (both := torch.var_mean(x, 1, correction=0, keepdim=True))[1]) * torch.rsqrt(both[0] + 1e-5),
    "a deviation": lambda x: _centred(x) / (x.std(1, correction=0, keepdim=True) ** 2 + 1e-5).sqrt(),
    "a deviation and a mean": lambda x: (x - (both := torch.std_mean(x, 1, correction=0, keepdim=True))[1]) / (both[0] ** 2 + 1e-5).sqrt(),
}


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _normed_images(norm: Callable[[Tensor], Tensor]) -> Of:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = norm(m.first(x)) * m.scale[:, None, None] + m.shift[:, None, None]
        return m.last((y + m.out(m.into(y).relu())).mean((2, 3)))

    layers = {"first": nn.Conv2d(3, 12, 3), "into": nn.Conv2d(12, 20, 1), "out": nn.Conv2d(20, 12, 1), "last": nn.Linear(12, 5)}
    model = Of(run, **layers)
    model.scale, model.shift = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.randn(12))
    return model.double().eval()


@pytest.mark.parametrize("name", BY_HAND)
def test_a_norm_written_by_hand_is_pruned_as_the_one_in_torch(name: str) -> None:
    """The same network with torch's layer norm is the measure: the same plan, the same small answers."""

    def in_torch(x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = []
    for norm in (BY_HAND[name], in_torch):
        torch.manual_seed(0)
        small.append(sp.compress(_normed_images(norm), (x,), target="channels=0.5"))
    assert small[0].plan.tensors == small[1].plan.tensors and "first.weight" in small[0].plan.tensors
    assert not small[0].report.data["verification"]["exact"]
    torch.testing.assert_close(small[0].model(x), small[1].model(x), rtol=1e-9, atol=1e-12)


def test_a_variance_of_channels_that_are_not_zero_keeps_them() -> None:
    """Of sigmoids no plain mask tells what removing one means, however the variance is written."""
    x = torch.randn(5, 6)
    for variance in (lambda y: y.var(-1, keepdim=True), lambda y: (y - y.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)):
        groups = sp.inspect(over_linears(lambda m, x, of=variance: of(m.q(x).sigmoid()) * m.b(x)).eval(), (x,))
        reasons = [f.reason for f in groups.frozen if any(m.tensor == "q.weight" and m.dim == 0 for m in f.members)]
        assert len(reasons) == 1 and reasons[0].endswith("over these channels, which are not zero where they are removed")
