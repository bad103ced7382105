"""The best of many, in another order: let pass where the order hangs on last digits, and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from torch import nn

import structprune as sp
from structprune.backends import onnx
from structprune.backends.ties import apart_in_any_order
from structprune.errors import VerificationError

ROWS = np.random.default_rng(0).standard_normal((2, 40, 4))


def shuffled(rows: np.ndarray) -> np.ndarray:
    """Every sample's rows in an order of its own."""
    generator = np.random.default_rng(1)
    return np.stack([sample[generator.permutation(len(sample))] for sample in rows])


def test_rows_are_matched_whatever_their_order() -> None:
    assert apart_in_any_order(shuffled(ROWS), ROWS) == 0
    assert apart_in_any_order(shuffled(ROWS) + 1e-3, ROWS) == pytest.approx(1e-3)
    assert apart_in_any_order(shuffled(ROWS)[:, None], ROWS[:, None]) == 0


def test_few_rows_may_be_others_and_no_more() -> None:
    changed = shuffled(ROWS)
    changed[:, :2] += 5
    assert apart_in_any_order(changed, ROWS) == 0
    changed[:, 2] += 5
    assert apart_in_any_order(changed, ROWS) > 1


def test_values_in_other_rows_are_no_other_order() -> None:
    assert apart_in_any_order(np.random.default_rng(1).permutation(ROWS.ravel()).reshape(ROWS.shape), ROWS) > 0.5
    assert apart_in_any_order(ROWS[:1, :1, :1], ROWS[:1, :1, :1] + 1) == np.inf  # nothing to put in order


def picks(spread: float, number: int) -> tuple[nn.Module, torch.Tensor]:
    """A detector's end: of 64 boxes those with the best scores, which lie so far apart, by chance and not because the boxes were alike."""
    torch.manual_seed(0)
    score, box, x = nn.Linear(16, 1, bias=False), nn.Linear(16, 4), torch.randn(2, 64, 16)
    direction = score.weight.detach()[0] / score.weight.detach().norm()
    x = x - (1 - spread) * (x @ direction)[..., None] * direction

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        best = m.score(x).squeeze(-1).topk(number, dim=1).indices
        return m.box(x).gather(1, best[..., None].expand(-1, -1, 4))

    return models.Of(run, score=score, box=box).eval(), x


def written(model: nn.Module, x: torch.Tensor, path: Path) -> Path:
    graph = sp.trace(model, (x,))
    onnx.export(graph.exported, path, graph.input_names, graph.output_names)
    return path


def test_a_file_that_picks_in_another_order_is_right_where_scores_are_about_equal(tmp_path: Path) -> None:
    model, x = picks(spread=1e-7, number=64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.score.weight.mul_(1 + 1e-6 * torch.randn(1, 16))  # type: ignore[union-attr, operator]
    path = written(other, x, tmp_path / "model.onnx")
    assert onnx.difference(onnx.run(path, [x])[0], model(x).detach().double().numpy()) > 0.1
    assert onnx.check(path, model, (x,), {}) < 1e-5


def test_a_file_that_picks_in_another_order_is_wrong_where_scores_lie_apart(tmp_path: Path) -> None:
    model, x = picks(spread=1.0, number=32)
    worst = copy.deepcopy(model)
    with torch.no_grad():
        worst.score.weight.neg_()  # type: ignore[union-attr, operator]
    path = written(worst, x, tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match="differs from torch"):
        onnx.check(path, model, (x,), {})


def test_a_file_with_its_rows_in_another_order_is_wrong(tmp_path: Path) -> None:
    """Whose answers hold the same rows, and which has no reason to change their order."""
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(2, 64, 8)
    path = written(models.Of(lambda m, x: m.inner(x).flip(1), inner=model).eval(), x, tmp_path / "model.onnx")
    assert onnx.difference_in_any_order(onnx.run(path, [x])[0], model(x).detach().double().numpy()) < 1e-5
    with pytest.raises(VerificationError, match="differs from torch"):
        onnx.check(path, model, (x,), {})
