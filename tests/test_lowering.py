"""The ONNX file says what torch says; the exporter's pass over all operators is left out, and only where that is safe."""

from pathlib import Path

import architectures
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.onnx._internal.exporter._registration import ONNXRegistry

import structprune as sp
from structprune.backends.lowering import Lowered
from structprune.backends.onnx import _library, _read_once, export, run
from structprune.frontends.trace import trace


class _Net(nn.Module):
    """A convolution, a norm, and what a test does with the two."""

    def __init__(self, channels: int = 8, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels, affine=affine)
        self.head = nn.Linear(channels, 4)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        self.norm.running_var.uniform_(1, 2)  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.norm(self.conv(image))


class ActivationsInPlace(_Net):
    def forward(self, image: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.conv(image)))
        x = F.hardtanh_(x + 0.1, 0.0, 6.0)
        x += self.conv(image)
        return self.head(F.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1), 0.5, self.training, inplace=True))


class ReadBeforeAndAfter(_Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        before = x.mean((2, 3), keepdim=True)
        x.mul_(2.0)
        return x.relu_() + before + x


class UnevenChunks(_Net):
    def forward(self, image: Tensor) -> Tensor:
        parts = self.conv(image).chunk(3, dim=1)  # 3, 3 and 2 channels
        return torch.cat([parts[2], parts[0], parts[1]], 1)


class Shuffled(_Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        return x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).contiguous().view(len(x), 8, *x.shape[2:])


class ViewOfTheWritten(_Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        view = x.flatten(2)
        F.relu_(x)
        return view + 1


class WrittenThroughAView(_Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        x[:, :2].mul_(3.0)
        return F.relu_(x)


class WrittenBehindADropout(_Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        F.relu_(F.dropout(x, 0.5, self.training))  # in evaluation the dropout is x itself
        return x + 1


class WrittenBehindContiguous(_Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        F.relu_(x.transpose(2, 3).contiguous())  # a copy
        return x + 1


class WrittenToTheInput(_Net):
    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image.clamp_(-1, 1)) + image.mean()


class ReturnsTheWritten(_Net):
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(image)
        return x, F.relu_(x) + 1


class OfAnotherType(_Net):
    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).mul_(self.head.weight.double().mean())  # stays float32


class NamesOfPython(_Net):
    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input).clamp(max=0.5)


class ClampedBySeveral(_Net):
    """Each clamp has bounds of its own, which are tensors, as those of a model that was trained for a quantised one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor([-0.9, -0.5, -0.1]))
        self.register_buffer("high", torch.tensor([0.1, 0.5, 0.9]))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(image)
        return tuple(x.clamp(low, high) for low, high in zip(self.low, self.high, strict=True))


class AxesBetween(_Net):
    """Axes of the sum that have no names, in front, between others and behind, and such of two operands that broadcast."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x, w = self.conv(image), self.head.weight
        y = torch.einsum("nc...,kc->k...n", x, w)
        return y, torch.einsum("...n,kc->c...nk", y, w), torch.einsum("...h,...w->...hw", x.mean(3), x[:1].mean(2))


class PooledToMore(_Net):
    def forward(self, image: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.conv(image), 2)


_LEFT_OUT = [ActivationsInPlace, ReadBeforeAndAfter, UnevenChunks, Shuffled, ReturnsTheWritten, NamesOfPython, ClampedBySeveral, AxesBetween]
_NEEDED = [ViewOfTheWritten, WrittenThroughAView, WrittenBehindADropout, WrittenBehindContiguous, WrittenToTheInput, OfAnotherType, PooledToMore]


@pytest.mark.parametrize("net", [*(c() for c in _LEFT_OUT), *(c() for c in _NEEDED), _Net(), _Net(affine=False)], ids=lambda n: type(n).__name__)
def test_the_file_answers_as_the_model(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[ExportedProgram] = []
    monkeypatch.setattr(Lowered, "run_decompositions", _recorded(Lowered.run_decompositions, ran))
    torch.manual_seed(0)
    image = torch.randn(2, 3, 8, 8)
    graph = trace(net.eval(), (image,))
    names = [f"y{i}" for i in range(len(graph.output_names))]
    origins = export(graph.exported, tmp_path / "net.onnx", ["image"], names)
    wanted = net(image.clone())
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for got, want in zip(run(tmp_path / "net.onnx", [image]), wanted, strict=True):
        assert got.dtype == want.detach().numpy().dtype
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)
    whole = isinstance(ran[0], Lowered)
    assert whole == (type(net) in _LEFT_OUT or (type(net) is _Net and net.norm.affine))
    assert set(origins.values()) <= {n.name for n in graph.nodes}


def test_the_program_stays_as_it_is() -> None:
    program = trace(ActivationsInPlace().eval(), (torch.randn(2, 3, 8, 8),)).exported
    before = str(program.graph)
    lowered = Lowered(program)
    assert "relu_" in before and "relu_." not in str(lowered.graph)
    assert str(program.graph) == before


@torch.library.custom_op("structprune_tests::halve", mutates_args={"x"})
def halve(x: Tensor) -> None:
    x.mul_(0.5)


class WrittenBySomebodyElses(_Net):
    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        halve(x)
        return F.relu_(x)


def test_an_operator_that_writes_and_answers_nothing_stays() -> None:
    program = trace(WrittenBySomebodyElses().eval(), (torch.randn(2, 3, 8, 8),)).exported
    nodes = Lowered(program).graph.nodes
    halved, written = (next(n for n in nodes if name in str(n.target)) for name in ("halve", "relu_"))
    assert halved.args == written.args
    assert halved < written


def test_an_in_place_activation_is_the_same_operator_in_the_file(tmp_path: Path) -> None:
    graph = trace(ActivationsInPlace().eval(), (torch.randn(2, 3, 8, 8),))
    export(graph.exported, tmp_path / "net.onnx", ["image"], ["y"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("Relu") == 1 and kinds.count("Clip") == 1 and "Dropout" not in kinds


def _recorded(method, answers):  # type: ignore[no-untyped-def]
    def recorded(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        answers.append(method(self, *args, **kwargs))
        return answers[-1]

    return recorded


class RelativePositions(nn.Module):
    """Attention as T5's. The kernel answers in the order that the reshape wants, which becomes a view; the exporter lays attention out otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.near = nn.Linear(16, 48), nn.Linear(16, 16), nn.Embedding(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(len(x), -1, 4, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        near = self.near(torch.arange(7)[:, None] - torch.arange(7) + 7).permute(2, 0, 1)[None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=1.0).transpose(1, 2).reshape(len(x), 7, -1))


class Spectrogram(nn.Module):
    """All channels go through one transform, whose complex answer is taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.deep, self.head = nn.Conv1d(3, 8, 1), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        waves = torch.stft(x.flatten(0, 1), 16, window=torch.hann_window(16), return_complex=True)
        return self.head(self.deep(waves.view(len(x), x.shape[1], *waves.shape[1:]).abs().mean((2, 3))).relu())


class HeadsInTheBatch(nn.Module):
    """Heads are put one after the other along the batch, and taken apart by its size."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.cat(self.deep(x).split(8, -1), 0)
        return self.head(torch.cat((heads @ heads.transpose(1, 2) @ heads).split(len(x)), -1))


class BesideAxesWithoutNames(nn.Module):
    """A sum that answers with an axis before those without names, beside what has such axes where they are (hyper-connections)."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.mix, self.head = nn.Linear(8, 16), nn.Parameter(torch.randn(1, 16, 3)), nn.Linear(19, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(x)
        return self.head(torch.cat((torch.einsum("...a,bac->b...c", x, self.mix), x[None]), -1))


class RowsOverAll(nn.Module):
    """A table that is filled part by part, each with less than it overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.deep, self.head = nn.Parameter(torch.randn(5, 3)), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(len(x), 5, 8)
        table[..., :3] = self.near
        table[..., 3:].copy_(torch.ones(5, dtype=torch.int64))
        return self.head(self.deep(x + table).relu())


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (RelativePositions, (2, 7, 16)),  # attention that is laid out in two ways
        (Spectrogram, (2, 3, 64)),  # complex numbers
        (HeadsInTheBatch, (2, 5, 8)),  # the exporter's optimizer fails at it
        (BesideAxesWithoutNames, (2, 5, 3, 8)),  # a shape that ONNX infers otherwise
        (RowsOverAll, (2, 5, 8)),  # values are spread over what they overwrite
    ],
)
def test_a_pruned_model_answers_in_its_file_as_in_torch(net: type[nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = sp.compress(net().eval(), torch.randn(shape), "channels=0.5")
    assert result.export_onnx(tmp_path / "model.onnx") < 1e-5


def test_experts_that_multiply_their_rows_in_one_operator(tmp_path: Path) -> None:
    """Of any number of rows, and where an expert has none."""
    torch.manual_seed(0)
    model, inputs = architectures.grouped_experts()
    with torch.no_grad():
        model.router.bias[1] = -100  # type: ignore[union-attr, operator]
    result = sp.compress(model.eval(), inputs, target="channels=0.5")
    path = tmp_path / "model.onnx"
    assert result.export_onnx(path) < 1e-5
    x = torch.randn(5, 6, 10)
    (answer,) = run(path, [x])
    assert np.allclose(answer, result.model(x).detach().numpy(), atol=1e-5)


def test_what_is_read_once_stays_as_torch_reads_it(tmp_path: Path) -> None:
    """The exporter puts the project's translations among torch's own: into a copy."""

    def known(library: ONNXRegistry) -> dict[str, list[bool]]:
        return {str(target): [one.is_custom for one in found] for target, found in library.functions.items()}

    program = torch.export.export(_Net().eval(), (torch.randn(1, 3, 8, 8),))
    for _ in range(2):
        export(program, tmp_path / "model.onnx", ["x"], ["y"])
    opset = onnx.load(tmp_path / "model.onnx").opset_import[0].version
    fresh = known(ONNXRegistry.from_torchlib(opset_version=opset))
    assert known(_library(opset_version=opset)) == fresh and not any(map(any, fresh.values()))
    before = _read_once.cache_info().misses
    export(program, tmp_path / "model.onnx", ["x"], ["y"])
    assert _read_once.cache_info().misses == before
    torch.library.define("structprune_tests::comes_later", "(Tensor x) -> Tensor")  # as a library's operators do, which torch may translate
    export(program, tmp_path / "model.onnx", ["x"], ["y"])
    assert _read_once.cache_info().misses == before + 1
    export(program, tmp_path / "older.onnx", ["x"], ["y"], opset=opset - 2)  # each version of the operators has a library of its own
    assert onnx.load(tmp_path / "older.onnx").opset_import[0].version == opset - 2
