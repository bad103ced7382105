"""Models that keep something for their next call: in buffers, in attributes, in buffers that the first call makes."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import structprune as sp
from structprune.errors import VerificationError


class Remembers(nn.Module):
    """What is kept is that of no call yet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 8)
        self.register_buffer("number", torch.zeros(()))
        self.calls, self.last = 0, None

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * self.factor(x)

    def factor(self, x: Tensor) -> Tensor | int:
        return 1


class Writes(Remembers):
    def factor(self, x: Tensor) -> Tensor:
        self.number += 1
        return self.number


class Replaces(Remembers):
    def factor(self, x: Tensor) -> Tensor:
        self.number = self.number + 1
        return self.number


class Counts(Remembers):
    def factor(self, x: Tensor) -> int:
        self.calls += 1
        return self.calls


class Compares(Remembers):
    def factor(self, x: Tensor) -> Tensor:
        before, self.last = x if self.last is None else self.last, x
        return 1 + (x - before).square().mean()


class Tables(Remembers):
    """Three tables, and one input; the first call makes them."""

    def factor(self, x: Tensor) -> Tensor:
        for name in ("one", "two", "three"):
            if not hasattr(self, name):
                self.register_buffer(name, torch.full((1,), float(len(name))), persistent=False)
        return self.one * self.two * self.three


class Begins(Remembers):
    """What it has seen is a buffer from the first call on."""

    def factor(self, x: Tensor) -> Tensor:
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(16))
        self.seen = self.seen + x.mean(0)
        return 1 + self.seen.square().mean()


def compressed(kind: type[Remembers]) -> tuple[Remembers, Tensor, sp.Result]:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 16)
    result = sp.compress(model, x, "channels=0.5")
    assert isinstance(result.model, kind), result.report.data["verification"]["module_note"]
    return model, x, result


@pytest.mark.parametrize("kind", [Writes, Replaces, Counts, Compares, Begins, Tables])
def test_the_small_model_goes_on_as_the_original_does(kind: type[Remembers]) -> None:
    model, x, result = compressed(kind)
    with torch.no_grad():
        for layer, gone in ((model.a.weight, 0), (model.a.bias, 0), (model.b.weight, 1)):
            layer.index_fill_(gone, torch.tensor([i for i in range(64) if i not in result.plan.groups[0].keep]), 0)
        for inputs in (x, x.flip(0), x):
            torch.testing.assert_close(result.model(inputs), model(inputs))


@pytest.mark.parametrize("kind", [Writes, Replaces, Counts, Compares, Begins, Tables])
def test_nothing_is_left_of_the_calls_that_compress_makes(kind: type[Remembers], tmp_path: Path) -> None:
    model, _, result = compressed(kind)
    if kind not in (Writes, Replaces):
        result.export_onnx(tmp_path / "small.onnx")
    for module in (model, result.model):
        assert (module.calls, module.last, module.number.item()) == (0, None, 0)
        assert [name for name, _ in module.named_buffers()] == ["number"]


@pytest.mark.parametrize(("kind", "named"), [(Counts, "calls"), (Compares, "last"), (Begins, "seen"), (Tables, ""), (Writes, "")])
def test_the_report_says_what_no_trace_takes_to_the_next_call(kind: type[Remembers], named: str) -> None:
    """Tables change no answer, and what a buffer holds stays in a traced module."""
    notes = compressed(kind)[2].report.data["notes"]
    assert [note for note in notes if "keeps" in note] == ([next(n for n in notes if f"keeps {named} for" in n)] if named else [])


@pytest.mark.parametrize("kind", [Writes, Replaces])
def test_a_file_that_would_forget_is_refused(kind: type[Remembers], tmp_path: Path) -> None:
    result = compressed(kind)[2]
    with pytest.raises(VerificationError, match="keeps number for its next call, and an ONNX file keeps nothing"):
        result.export_onnx(tmp_path / "small.onnx")
    assert result.model.number.item() == 0


def test_buffers_that_the_first_call_makes_are_in_the_file(tmp_path: Path) -> None:
    _, x, result = compressed(Tables)
    result.export_onnx(tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), result.model(x).detach(), rtol=1e-5, atol=1e-5)
