"""Models on a GPU. There need be none: a tensor that says it lies on one, and refuses to meet one of the CPU, computes on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import structprune as sp


class OnGPU(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device="cuda:0")
        made.held = held.detach()
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if any(not isinstance(v, OnGPU) and v.dim() for v in operands) and "copy" not in function.name():
            raise RuntimeError(f"{function} got tensors of two devices")
        args, kwargs = pytree.tree_map_only(OnGPU, lambda t: t.held, (args, dict(kwargs or {})))
        device = kwargs.get("device")
        answer = function(*args, **(kwargs | ({"device": "cpu"} if device is not None else {})))
        away = device is None or torch.device(device).type == "cuda"
        return pytree.tree_map_only(Tensor, OnGPU, answer) if away else answer


def on_gpu() -> nn.Module:
    """A convolution, a batch norm and a plain tensor, all there."""
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 4, 3)}
    model = Of(lambda m, x: m.b(torch.relu(m.norm(m.a(x))) * m.scale), **layers).eval()
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(OnGPU(parameter)) if parameter is not None else None
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = OnGPU(buffer) if buffer is not None else None
    model.scale = OnGPU(torch.full((1, 1, 1, 1), 2.0))
    return model


def test_a_tensor_that_says_so_lies_on_another_device() -> None:
    model = on_gpu()
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="two devices"):
            model.a(torch.randn(2, 3, 8, 8))
        assert model.a(OnGPU(torch.randn(2, 3, 8, 8))).device.type == "cuda"


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_on_a_gpu_is_compressed_on_the_cpu(calibrated: bool) -> None:
    model, x = on_gpu(), OnGPU(torch.randn(2, 3, 8, 8))
    samples = OnGPU(torch.randn(64, 3, 8, 8)) if calibrated else None
    result = sp.compress(model, x, "channels=0.5", calibration=samples)
    assert len(result.plan.groups[0].keep) == 4
    assert {t.device.type for t in result.model.state_dict().values()} == {"cpu"} and result.model.scale.device.type == "cpu"
    assert result.model(x.held).shape == (2, 4, 4, 4)
    assert {p.device.type for p in model.parameters()} == {"cuda"} and model.a.weight.shape[0] == 8, "the user's own is left as it was"
    assert any("result.model.to('cuda:0')" in note for note in result.report.data["notes"])
    assert len(sp.inspect(model, x)) == 1


def test_an_evaluation_gets_every_model_where_the_users_is_and_so_does_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moved = on_gpu(), []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append((self.a.weight.shape[0], str(device))) or self)
    seen = []
    result = sp.compress(model, torch.randn(2, 3, 8, 8), "channels=0.5", evaluate=lambda m: float(seen.append(m) or len(seen)))
    assert seen[0] is model and seen[1] is not result.model and moved == [(4, "cuda:0")]
    for target, width in (("channels=0.5", 4), ("dead", 7)):
        with torch.no_grad():
            model.a.weight.held[3], model.norm.weight.held[3], model.norm.bias.held[3] = 0, 0, 0
        plan = sp.compress(model, torch.randn(2, 3, 8, 8), target).plan
        moved.clear()
        sp.apply(model, plan)
        assert moved == [(width, "cuda:0")], target


def test_autocast_for_a_gpu_changes_nothing_of_a_model_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has a GPU, where the region is in the trace. For the device that the model is on, it stays an unknown operator."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(m.device, dtype=torch.float16):
            return m.b(m.a(x).relu())

    model, x = Of(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 4)).eval(), torch.randn(2, 6)
    model.device = "cuda"
    result = sp.compress(model, (x,), "channels=0.5")
    assert result.model.a.out_features == 4 and type(result.model) is Of
    model.device = "cpu"
    assert "wrap_with_autocast" in str(sp.inspect(model, (x,)))
