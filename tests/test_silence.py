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


CASES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "a weight silences what a sigmoid makes loud": (lambda m, x: m.a(m.q(x).sigmoid()), True),
    "a sum of rectified channels": (lambda m, x: m.q(x).relu().sum(-1, keepdim=True) * m.b(x), True),
    "a sum of sigmoids": (lambda m, x: m.q(x).sigmoid().sum(-1, keepdim=True) * m.b(x), False),
    "a norm of channels": (lambda m, x: F.normalize(m.q(x), dim=-1) @ m.a.weight.t(), True),
    "a norm of exponentials": (lambda m, x: m.a(F.normalize(m.q(x).exp(), dim=-1)), False),
    "an inner product": (lambda m, x: (m.q(x) * m.k(x)).sum(-1, keepdim=True) * m.b(x), True),
    "one silent factor is enough": (lambda m, x: (m.q(x) * m.k(x).sigmoid()).sum(-1, keepdim=True) * m.b(x), True),
    "linear attention": (lambda m, x: (F.elu(m.q(x)) + 1) @ (F.elu(m.k(x)) + 1).t() @ m.b(x), False),
    "a choice between silent values": (lambda m, x: m.q(x).relu().masked_fill(x[:, :1] > 0, 0).sum(-1, keepdim=True) * m.b(x), True),
    "a choice of something else": (lambda m, x: m.q(x).masked_fill(x[:, :1] > 0, 1).sum(-1, keepdim=True) * m.b(x), False),
    "the final state of a recurrent layer, from zeros": (lambda m, x: m.a(F.normalize(m.gru(x.unflatten(0, (5, 1)))[1][0], dim=-1)), True),
    "copies": (lambda m, x: m.c(x.repeat_interleave(2, -1)), True),
    "a norm over copies": (lambda m, x: m.c(F.normalize(x.repeat_interleave(2, -1), dim=-1)), False),
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
