"""Calibration without data: samples made from what batch norms remember."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structprune as sp
from structprune import demo
from structprune.calibrate import synthetic as module
from structprune.calibrate.arrivals import bytes_of
from structprune.calibrate.synthetic import synthetic
from structprune.errors import InputError


def remembering(seen: Tensor) -> nn.Module:
    """A network whose norms have the statistics of these inputs."""
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(2, 8, 3), "m": nn.BatchNorm2d(8, momentum=None), "b": nn.Conv2d(8, 12, 3), "n": nn.BatchNorm2d(12, momentum=None)}
    model = models.Of(lambda m, x: m.n(m.b(F.relu(m.m(m.a(x))))), **layers).train()
    with torch.no_grad():
        model(seen)
    return model.eval()


def statistics(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """How far the mean, in standard deviations, and the standard deviation, as a ratio, of what the first norm reads are from what it remembers."""
    with torch.no_grad():
        read = model.a(x).transpose(0, 1).flatten(1)
    deviation = model.m.running_var.sqrt()
    return (read.mean(1) - model.m.running_mean).abs() / deviation, read.std(1) / deviation


def test_samples_have_the_statistics_that_norms_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NUMBER", 32)
    seen = 2 + F.interpolate(torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(1)), 12) * torch.tensor([3.0, 0.5])[:, None, None]
    model = remembering(seen)
    graph = sp.trace(model, (seen[:2],))
    samples = synthetic(graph, 1e6)
    (made,) = samples.batches[0]
    noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(2))
    off, spread = statistics(model, made)
    assert off.max() < 0.1 and (spread - 1).abs().max() < 0.1
    off, spread = statistics(model, noise)
    assert off.max() > 0.5 or (spread - 1).abs().max() > 0.5
    assert samples.made and len(samples) == 32 and not made.requires_grad
    assert torch.equal(synthetic(graph, 1e6).batches[0][0], made)


def test_a_large_model_gets_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEPS", 1)
    model, inputs = models.build("residual")
    graph = sp.trace(model, inputs)
    assert len(synthetic(graph, 1.0)) == 256 and len(synthetic(graph, 1e15)) == 4
    monkeypatch.setattr(module, "_WORK", 50e12)
    assert [len(batch[0]) for batch in synthetic(graph, 2e12).batches] == [24, 24]  # the example holds two samples
    monkeypatch.setattr(module, "MEMORY", 1)
    assert {len(batch[0]) for batch in synthetic(graph, 2e12).batches} == {4}


def test_moving_data_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A depthwise convolution takes far longer than its multiply-accumulates tell."""
    monkeypatch.setattr(module, "_STEPS", 1)
    graph = sp.trace(*models.build("residual"))
    held = sum(bytes_of(n) for n in graph.nodes if n.op == "call_function") / 2
    monkeypatch.setattr(module, "_WORK", 20.5 * 60 * held)
    assert len(synthetic(graph, 1.0)) == 20


def test_the_demo_keeps_its_accuracy_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NUMBER", 32)
    monkeypatch.setattr(module, "_STEPS", 120)
    model, x = demo.model(), demo.samples()[0][:2]
    blind = sp.compress(model, x, "macs=0.5")
    result = sp.compress(model, x, "macs=0.5", calibration="synthetic")
    assert demo.accuracy(blind.model) < 0.5 and demo.accuracy(result.model) > 0.75
    assert result.report.data["calibration"] == {"samples": 32, "labels": False, "synthetic": True}
    assert "32 samples made from the statistics in its batch norms" in str(result.report)


@pytest.mark.parametrize(
    ("name", "calibration", "words"),
    [("attention", "synthetic", "batch norms, and this model has none"), ("residual", "pictures", "'synthetic', which makes some")],
)
def test_what_cannot_be_made_is_refused(name: str, calibration: str, words: str) -> None:
    model, inputs = models.build(name)
    with pytest.raises(InputError, match=words):
        sp.compress(model, inputs, calibration=calibration)


def test_numbers_of_words_are_not_made() -> None:
    model = models.Of(lambda m, ids: m.n(m.e(ids).transpose(1, 2)), e=nn.Embedding(10, 6), n=nn.BatchNorm1d(6)).eval()
    with pytest.raises(InputError, match="floating-point tensors"):
        sp.compress(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), calibration="synthetic")
