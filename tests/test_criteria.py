"""Which channels a criterion keeps, checked against the definition on layers small enough to do by hand."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

import structprune as sp
from structprune.decide.criteria import criterion_of
from structprune.decide.plan import named_tensors
from structprune.errors import InputError


def scores(choice: object, model: nn.Module, inputs: tuple[torch.Tensor, ...], seed: int = 0) -> dict[str, np.ndarray]:
    graph = sp.trace(model, inputs)
    return dict(criterion_of(choice, model, seed)[1](sp.find_groups(graph), named_tensors(graph)))


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_sums_over_every_tensor_of_a_group(name: str, power: int) -> None:
    model, inputs = models.build("residual")
    found = scores(name, model, inputs)
    inner = model.conv1.weight.abs().pow(power).sum((1, 2, 3)) + model.conv2.weight.abs().pow(power).sum((0, 2, 3))
    stream = (
        model.stem.weight.abs().pow(power).sum((1, 2, 3))
        + model.conv1.weight.abs().pow(power).sum((0, 2, 3))
        + model.conv2.weight.abs().pow(power).sum((1, 2, 3))
        + model.head.weight.abs().pow(power).sum(0)
    )
    np.testing.assert_allclose(found["conv1"], inner.pow(1 / power).detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["stem"], stream.pow(1 / power).detach().numpy(), rtol=1e-5)


def test_magnitude_of_heads_and_their_width() -> None:
    model, inputs = models.build("attention")
    found = scores("l2", model, inputs)
    squares = model.qkv.weight.square().sum(1).reshape(3, 4, 8) + model.out.weight.square().sum(0).reshape(1, 4, 8) / 3
    np.testing.assert_allclose(found["qkv"], squares.sum((0, 2)).sqrt().detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["qkv#2"], squares.sum((0, 1)).sqrt().detach().numpy(), rtol=1e-5)


def test_batch_norm_scale() -> None:
    model, inputs = models.build("residual")
    found = scores("bn_scale", model, inputs)
    np.testing.assert_allclose(found["conv1"], model.norm1.weight.abs().detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["stem"], (model.norm0.weight.abs() + model.norm2.weight.abs()).detach().numpy(), rtol=1e-6)


def test_random_follows_the_seed() -> None:
    model, inputs = models.build("joined")
    first, again, other = (scores("random", model, inputs, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[g], again[g]) for g in first)
    assert any(not np.array_equal(first[g], other[g]) for g in first)


def test_torch_pruning_importance_scores_as_in_torch_pruning() -> None:
    """One convolution feeding another has the same group in both tools, and must get the same scores."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    theirs = importance(tp.DependencyGraph().build_dependency(model, x).get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(8))))
    np.testing.assert_allclose(scores(importance, model, (x,))["0"], theirs.numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_torch_pruning_importance_compresses_any_model(name: str) -> None:
    model, inputs = models.build(name)
    result = sp.compress(model, inputs, target="channels=0.5", criterion=tp.importance.LAMPImportance())
    assert result.plan.criterion == "LAMPImportance"
    assert result.report.data["params"]["after"] < result.report.data["params"]["before"]


def test_a_callable_decides() -> None:
    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5", criterion=lambda groups, tensors: {g.name: np.arange(g.size) for g in groups})
    assert all(g.keep == tuple(range(g.channels - len(g.keep), g.channels)) for g in result.plan.groups)


@pytest.mark.parametrize("choice", ["best", 7])
def test_what_is_no_criterion(choice: object) -> None:
    model, inputs = models.build("residual")
    with pytest.raises(InputError, match="criterion"):
        sp.compress(model, inputs, target="channels=0.5", criterion=choice)


def test_scores_of_a_wrong_shape_are_refused() -> None:
    model, inputs = models.build("residual")
    with pytest.raises(InputError, match="shape"):
        sp.compress(model, inputs, target="channels=0.5", criterion=lambda groups, tensors: {g.name: np.zeros(3) for g in groups})
