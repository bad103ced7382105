"""What users call their inputs, answers and weights may be the name of an operator, of something of torch's own, or of a field of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import structprune as sp
from structprune.backends.directory import verify_directory
from structprune.errors import TraceError


class Named(nn.Module):
    """Two layers, and between them what has the name: an input, a buffer, and the one that is answered."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inp, self.out, self.called = nn.Linear(4, 8), nn.Linear(8, 3), name
        self.register_buffer(name, torch.arange(8.0))

    def inside(self, x: Tensor) -> Tensor:
        return self.out(self.inp(x).relu() * getattr(self, self.called))


def named(name: str) -> nn.Module:
    """`Named` with an input of that name, and one that nothing reads."""
    made: dict[str, Any] = {}
    exec(f"def forward(self, {name}, unused_{name}):\n    return self.inside({name})", made)
    return type("NamedInput", (Named,), {"forward": made["forward"]})(name).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["clone", "detach", "alias", "mul", "div", "batch_norm", "dropout", "_assert_scalar"])
def test_inputs_and_buffers_may_be_called_as_operators_are(name: str) -> None:
    small = sp.compress(named(name), (torch.randn(2, 4), torch.randn(2)), "channels=0.5").model
    assert isinstance(small, Named) and small.inp.out_features == 4


@pytest.mark.parametrize("name", ["name", "in_spec", "target", "tensor_values", "config"])
def test_programs_are_read_whose_inputs_and_buffers_are_called_as_fields_of_their_file(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 4), torch.randn(2)
    result = sp.compress(named(name), x, "channels=0.5")
    result.save(tmp_path / "out", latency=False)
    assert torch.allclose(sp.load(tmp_path / "out")(*x), result.model(*x), atol=1e-6)


class Answers(Named):
    """Answers under names that the input, a weight and operators have already, and two under one name."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.inside(x)
        return {"relu": y, "linear": y + 1, "x": y + 2, "scale": y + 3, "inp": [y + 4], "inp_0": y + 5}


def test_answers_may_be_called_as_anything_in_the_file(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    result = sp.compress(Answers("scale").eval(), x, "channels=0.5")
    result.save(tmp_path / "out", latency=False)
    verify_directory(tmp_path / "out")
    assert result.graph.output_names == ("relu", "linear", "output_x", "output_scale", "inp_0", "inp_0_")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(list(result.graph.output_names), {"x": x.numpy()})
    for plus, value in enumerate(got):
        np.testing.assert_allclose(value, got[0] + plus, atol=1e-5)
    names = [name for node in onnx.load(tmp_path / "out/model.onnx").graph.node for name in node.output]
    assert len(names) == len(set(names))


class Plain(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


@pytest.mark.parametrize("name", ["graph", "code", "meta"])
def test_names_that_torch_export_has_for_itself_are_told(name: str) -> None:
    model = Plain(name).eval()
    with pytest.raises(TraceError, match=f"under the name '{name}': rename that, or put the model in another module"):
        sp.compress(model, torch.randn(2, 4))
    outer = sp.compress(nn.Sequential(model), torch.randn(2, 4), "channels=0.5").model
    assert isinstance(outer, nn.Sequential) and outer[0].inp.out_features == 4
