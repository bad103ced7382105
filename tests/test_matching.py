"""Matching: all layers of the small model fitted together, and only where samples that took no part say that it helps."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import structprune as sp
from structprune import demo
from structprune.backends import wording
from structprune.errors import InputError
from structprune.recovery import matching


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return demo.samples()[0][:128]


@pytest.fixture(scope="module")
def plain(samples: Tensor) -> sp.Result:
    return compressed(samples, 0)


def compressed(samples: Tensor, steps: int, target: str = "macs=0.3", model: nn.Module | None = None) -> sp.Result:
    return sp.compress(model if model is not None else demo.model(), samples[:2], target, calibration=samples, matching=steps)


def off(small: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return (small(inputs) - demo.model()(inputs)).square().mean().item()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def matched(samples: Tensor) -> sp.Result:
    """Of a model whose parameters take no gradients."""
    return compressed(samples, 25, model=demo.model().requires_grad_(False))


def test_it_comes_nearer_to_the_dense_model_on_inputs_it_has_not_seen(samples: Tensor, plain: sp.Result, matched: sp.Result) -> None:
    unseen = demo.samples()[0][128:]
    assert off(matched.model, unseen) < 0.98 * off(plain.model, unseen)
    told = matched.report.data["matching"]
    assert told["kept"] and told["steps"] == 25 and told["after"] < told["before"]
    assert plain.report.data["matching"] is None
    assert type(matched.model) is type(demo.model())
    assert torch.allclose(matched.model(unseen), matched.small(unseen), atol=1e-5)  # the user's class has the trained weights


def test_statistics_and_flags_stay(plain: sp.Result, matched: sp.Result) -> None:
    assert not any(p.requires_grad or p.grad is not None for p in matched.model.parameters())
    for (name, mine), theirs in zip(plain.model.named_buffers(), matched.model.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_steps_repeat(samples: Tensor, matched: sp.Result) -> None:
    assert same(matched.model, compressed(samples, 25).model)


def test_what_does_not_help_changes_nothing(samples: Tensor, plain: sp.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_LR", 30.0)
    after = compressed(samples, 5)
    assert not after.report.data["matching"]["kept"]
    assert same(plain.model, after.model)
    assert "stayed as they were" in wording.fitted(after.report.data)


class Fixed(nn.Module):
    """Takes batches of 4 alone, counts its calls, and answers twice."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(6, 32), nn.Linear(32, 32)
        self.second, self.other = nn.Linear(32, 3), nn.Linear(32, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        hidden = self.middle(self.first(x).reshape(4, -1).relu()).relu()
        return self.second(hidden), self.other(hidden)


def test_batches_of_one_size_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    result = sp.compress(Fixed(), torch.randn(4, 6), "channels=0.5", calibration=[torch.randn(4, 6) for _ in range(64)], matching=100)
    assert not result.graph.dynamic_batch
    assert result.report.data["matching"]["after"] < result.report.data["matching"]["before"]
    assert isinstance(result.model, Fixed) and result.model.calls == 0


def test_what_it_needs(samples: Tensor) -> None:
    with pytest.raises(InputError, match="needs calibration="):
        sp.compress(demo.model(), samples[:2], matching=10)
    with pytest.raises(InputError, match="follow compensation"):
        sp.compress(demo.model(), samples[:2], calibration=samples, compensate=False, matching=10)
    with pytest.raises(InputError, match="number of steps"):
        sp.compress(demo.model(), samples[:2], calibration=samples, matching=-1)
    with pytest.raises(InputError, match="bfloat16 rounds its steps away"):
        sp.compress(demo.model().bfloat16(), samples[:2].bfloat16(), calibration=samples.bfloat16(), matching=10)


class Masked(nn.Module):
    """Some of its answers are -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).masked_fill(torch.arange(4) == 0, -torch.inf)


def test_an_answer_that_is_not_finite_is_no_target() -> None:
    torch.manual_seed(0)
    result = sp.compress(Masked(), torch.randn(4, 6), "channels=0.5", calibration=torch.randn(64, 6), matching=4)
    assert not result.report.data["matching"]["kept"] and result.report.data["matching"]["steps"] == 0
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
    json.loads(json.dumps(result.report.data["matching"], allow_nan=False))


def test_where_nothing_is_lost_nothing_is_matched(samples: Tensor) -> None:
    report = sp.compress(demo.model(), samples[:2], "dead", calibration=samples, matching=10).report.data
    assert report["matching"] is None and report["compensation"] is None
