"""Models in other forms than a plain module, and callers in other modes: what torch wraps around a model is taken off, and the rest is told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import structprune as sp
from structprune.errors import InputError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("compiled")


def test_a_compiled_model_is_the_one_within() -> None:
    compiled = torch.compile(net(), backend=never)
    result = sp.compress(compiled, X, "channels=0.5")  # type: ignore[arg-type]
    assert type(result.model) is Net
    assert result.plan.tensors == sp.compress(net(), X, "channels=0.5").plan.tensors
    assert type(sp.apply(compiled, result.plan)) is Net  # type: ignore[arg-type]
    sp.verify(compiled, result.model, result.plan, (X,))  # type: ignore[arg-type]


def test_compiled_parts_run_as_they_are_written() -> None:
    class Parts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.compile(self.a, backend=never)  # type: ignore[assignment]
            self.b.compile(backend=never)
            self.active = torch.compile(torch.relu, backend=never)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.active(self.norm(self.a(x)))).mean((2, 3)))

    result = sp.compress(Parts().eval(), X, "channels=0.5")
    assert type(result.model) is Parts
    with pytest.raises(Exception, match="compiled"):
        result.model(X)  # compiled, as before, where it is used


def test_a_distributed_model_is_the_one_within(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        result = sp.compress(nn.parallel.DistributedDataParallel(net()), X, "channels=0.5")
    finally:
        dist.destroy_process_group()
    assert type(result.model) is Net and "a.weight" in result.plan.tensors


def in_script(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def traced_by_jit(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, X)


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (X,)).module()


@pytest.mark.parametrize("form", [in_script, traced_by_jit, exported])
def test_a_program_is_compressed_as_the_model_that_it_was_made_of(form: Callable[[nn.Module], nn.Module]) -> None:
    """The same channels go; what comes back trains, and drops at random only then."""
    model = form(net())
    before = copy.deepcopy(dict(model.state_dict()))
    result = sp.compress(model, X, "channels=0.5")
    assert result.plan.tensors == sp.compress(net(), X, "channels=0.5").plan.tensors
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(result.model(X), result.model(X))
    result.model.train()
    assert not torch.equal(result.model(X), result.model(X))
    result.model(X).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters()) and any(True for _ in result.model.parameters())


def test_a_program_that_was_exported_in_training_is_compressed_in_evaluation() -> None:
    small = sp.compress(exported(net().train()), X, "channels=0.5").model
    assert torch.equal(small(X), small(X))


class FullyShardedDataParallel(nn.Module):
    """As torch's own is called."""


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net().eval()


def sparse() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (FullyShardedDataParallel, "shared out among processes"),
        (on_meta, "a.weight is on the meta device"),
        (sparse, "0.weight is stored as sparse_coo"),
        (lambda: torch.export.export(net(), (X,)), "ExportedProgram: give its .module()"),
        (lambda: "resnet50", "a str: give a torch.nn.Module"),
        (lambda: Net, "a type: give a torch.nn.Module"),
    ],
)
def test_what_is_no_model_is_told(model: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words.replace(".", r"\.").replace("(", r"\(").replace(")", r"\)")):
        sp.compress(model(), X, "channels=0.5")


@pytest.mark.parametrize("own", [False, True], ids=["the caller's mode", "the model's, too"])
def test_a_caller_in_inference_mode_gets_a_model_that_trains(own: bool) -> None:
    model = net()
    with torch.inference_mode():
        model = net() if own else model
        samples = torch.randn(16, 3, 8, 8)
        result = sp.compress(model, torch.randn(2, 3, 8, 8), "channels=0.5", calibration=samples, criterion="gradient")
    result.model(X).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_caller_who_takes_no_gradients_can_recover(mode: Callable[[], Any]) -> None:
    with mode():
        result = sp.compress(net(), torch.randn(2, 3, 8, 8), "channels=0.5")
        before = [p.clone() for p in result.model.parameters()]
        recovered = sp.recover(result, [(torch.randn(4, 3, 8, 8), torch.randint(4, (4,)))] * 2)
    assert any(not torch.equal(a, b) for a, b in zip(before, recovered.model.parameters(), strict=True))
    recovered.model(X).sum().backward()


def test_a_trace_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        graph = sp.trace(net(), X)
    graph.module(X).sum().backward()
