"""The forms that a result is saved in: types of numbers, 8 bits, opsets, large files, and what the files say of themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn

import structprune as sp
from structprune import demo
from structprune.backends import kernels
from structprune.backends.directory import verify_directory
from structprune.backends.onnx import ExportError, _keep_apart, check
from structprune.errors import InputError, StructpruneError, VerificationError
from structprune.frontends.onnx_in.defects import crashing_operands


def answer(path: Path, *inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    x = demo.samples()[0][:4].to(dtype)
    result = sp.compress(demo.model().to(dtype), (x,), target="channels=0.75")
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    report = result.save(tmp_path / "out", latency=False)
    assert report.data["precision"] == str(dtype).removeprefix("torch.")
    loaded = sp.load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {dtype} and loaded(x).dtype == dtype
    assert torch.equal(loaded(x), result.small(x))
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.get_tensor("head.weight").dtype == dtype
    inputs = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx")).get_inputs()
    assert inputs[0].type == ("tensor(float16)" if dtype == torch.float16 else "tensor(float)")  # ONNX Runtime computes little in bfloat16
    checked = verify_directory(tmp_path / "out")
    assert checked["tensors_matched_in_original_onnx"] > 0 and checked["original_onnx_masked"] <= 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_other_types_are_measured(dtype: torch.dtype, tmp_path: Path) -> None:
    model, (x,) = models.build("residual")
    result = sp.compress(model.to(dtype), x.to(dtype), "macs=0.5", calibration=x.repeat(4, 1, 1, 1).to(dtype))
    int8 = "int8" if dtype == torch.bfloat16 else None  # its ONNX files compute in float32
    report = result.save(tmp_path / "out", quantize=int8).data
    compared = [report["latency_ms"]["onnxruntime-cpu"], *([report["int8"]["latency_ms"]] if int8 else [])]
    assert all(one["ratio"]["median"] > 0 for one in compared)
    assert set(report["operators"]["operators"]) == {"original", "model"}
    if not int8:
        with pytest.raises(InputError, match="int8 starts from a model in float32"):
            result.save(tmp_path / "other", quantize="int8")


def test_bfloat16_without_dead_channels(tmp_path: Path) -> None:
    model = demo.model().bfloat16()
    with torch.no_grad():
        model.stage3.depthwise[1].weight[5] = 0
    sp.compress(model, (demo.samples()[0][:4].bfloat16(),), target="dead").save(tmp_path / "out", latency=False)
    assert verify_directory(tmp_path / "out")["original_onnx"] < 0.02


def test_half(tmp_path: Path) -> None:
    x, _ = demo.samples()
    result = sp.compress(demo.model(), (x[:4],), target="channels=0.75")
    report = result.save(tmp_path / "out", half=True, latency=False)
    assert report.data["precision"] == "float16" and 0 < report.data["verification"]["onnx_error"] <= 2e-2
    loaded = sp.load(tmp_path / "out")
    assert {t.dtype for t in loaded.parameters()} == {torch.float16} and loaded(x[:3]).dtype == torch.float32
    wanted = result.model(x[:64]).detach()
    for got in (loaded(x[:64]).detach().numpy(), answer(tmp_path / "out/model.onnx", x[:64])):
        assert np.abs(got - wanted.numpy()).max() <= 2e-2 * wanted.abs().max()
    assert (tmp_path / "out/model.onnx").stat().st_size < 0.6 * (tmp_path / "out/original.onnx").stat().st_size
    verify_directory(tmp_path / "out")


@pytest.mark.parametrize("held", [True, False], ids=["weights", "constants"])
@pytest.mark.parametrize("cast", [False, True], ids=["in float16", "cast to it"])
@pytest.mark.parametrize(
    ("order", "place"), [((1, 0, 2), 0), ((1, 2, 0), 0), ((1, 0, 2), 1), ((1, 2, 0, 3), 0), ((1, 2, 3, 0), 0), ((0, 2, 1), 0), ((2, 0, 1), 1)]
)
def test_transposed_products_in_float16(order: tuple[int, ...], place: int, cast: bool, held: bool) -> None:
    """ONNX Runtime ends the process on those that take the first axis into the matrix; without the step between, this test would end here, too."""
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 6)[: len(order)]).astype(np.float16)
    moved = x.transpose(order)
    weight = np.ones((moved.shape[-1], 2) if place == 0 else (2, moved.shape[-2]), np.float16)
    nodes = [onnx.helper.make_node("Transpose", ["x"], ["moved"], "moved", perm=order)]
    if cast:
        nodes.append(onnx.helper.make_node("Cast", ["moved"], ["half"], "half", to=onnx.TensorProto.FLOAT16))
    operands = [nodes[-1].output[0], "weight"]
    nodes.append(onnx.helper.make_node("MatMul", operands if place == 0 else operands[::-1], ["y"], "product"))
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT if cast else onnx.TensorProto.FLOAT16, x.shape)
    wanted = moved @ weight if place == 0 else weight @ moved
    answer = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, wanted.shape)
    tensor = onnx.numpy_helper.from_array(weight, "weight")
    if not held:
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["weight"], value=tensor))
    graph = onnx.helper.make_graph(nodes, "product", [given], [answer], [tensor] if held else [])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    assert bool(crashing_operands(model)) is (order not in ((0, 2, 1), (2, 0, 1)))
    _keep_apart(model)
    onnx.checker.check_model(model)
    assert not crashing_operands(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.astype(np.float32) if cast else x})
    np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-2)


def test_half_of_sequences_first(tmp_path: Path) -> None:
    """torchvision's vision transformer has torch's own attention, which puts the sequence first."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 24, 48, num_classes=6).eval()
    model.heads[0].weight.data.normal_(std=1.0)  # it begins as zeros, and the biases of its perceptrons as 1e-6, of which float16 holds a digit
    report = sp.compress(model, torch.randn(2, 3, 16, 16), "channels=0.5").save(tmp_path / "out", half=True, latency=False)
    assert verify_directory(tmp_path / "out")["tensors_matched_in_original_onnx"] > 0
    assert report.data["verification"]["onnx_error"] < 2e-2
    assert any("_operand_0" in node.name for node in onnx.load(tmp_path / "out/model.onnx").graph.node)


def test_half_that_overflows_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e6)
    result = sp.compress(model, (torch.randn(2, 4),), target="channels=0.5")
    with pytest.raises(VerificationError):
        result.save(tmp_path / "out", half=True, latency=False)
    assert not list(tmp_path.iterdir())


def test_int8(tmp_path: Path, run) -> None:
    status, out, err = run("compress", "demo", "--target", "channels=0.75", "--quantize", "int8", "--out", "o", "--json")
    assert status == 0, err
    report = json.loads(out)
    int8 = report["int8"]
    assert int8["calibrated_on"] == 192 and int8["compared_on"] == 64
    assert int8["agreement"] > 0.9 and 0 < int8["error"] < 0.3 and int8["accuracy"] > 0.9 * report["accuracy"]["after"]
    assert (
        int8["latency_ms"]["ratio"]["median"] > 0 and int8["bytes"] == Path("o/model.int8.onnx").stat().st_size < 0.5 * report["onnx_bytes"]["after"]
    )
    x, labels = demo.samples()
    predicted = answer(Path("o/model.int8.onnx"), x).argmax(1)
    assert float((predicted == labels.numpy()).mean()) == pytest.approx(int8["accuracy"])
    assert f"on 64 samples it agrees with model.onnx on {100 * int8['agreement']:.1f} %" in Path("o/report.html").read_text()
    assert re.search(r"Beside original.onnx: .+ \(.*95 % interval .+\)\.", Path("o/report.html").read_text())
    assert {n.op_type for n in onnx.load("o/model.int8.onnx").graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


def test_an_evaluation_that_wants_parameters(tmp_path: Path) -> None:
    model, inputs = models.build("residual")

    def score(module: nn.Module) -> float:
        return float(next(module.parameters()).numel() > 0)

    result = sp.compress(model, inputs, target="channels=0.5", calibration=torch.randn(16, 3, 8, 8), evaluate=score)
    report = result.save(tmp_path / "out", latency=False, quantize="int8")
    assert "accuracy" not in report.data["int8"] and any("does not take an ONNX file" in note for note in report.data["notes"])


def test_forms_that_cannot_be(tmp_path: Path, run) -> None:
    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5")
    for options, words in (
        ({"quantize": "int8"}, "--calibration"),
        ({"quantize": "int4"}, "use 'int8'"),
        ({"quantize": "int8", "half": True}, "leave one out"),
    ):
        with pytest.raises(InputError, match=words):
            result.save(tmp_path / "out", latency=False, **options)
    with pytest.raises(StructpruneError, match="opset 3"):
        result.save(tmp_path / "out", latency=False, opset=3)
    assert not (tmp_path / "out").exists()
    Path("net.py").write_text("from models import build\ndef net(): return build('residual')\n")
    status, _, err = run("compress", "net:net", "--quantize", "int8")
    assert status == 2 and "--calibration" in err and len(err.strip().splitlines()[-1:]) == 1


@pytest.mark.parametrize("opset", [18, 22])
def test_opset(opset: int, tmp_path: Path) -> None:
    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5")
    assert result.export_onnx(tmp_path / "m.onnx", opset=opset) <= 1e-3
    assert next(o.version for o in onnx.load(tmp_path / "m.onnx").opset_import if o.domain == "") == opset


class Squeezing(nn.Module):
    """Axes of more than one entry are squeezed, which leaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.second(self.first(x).squeeze(1).relu())
        return y.squeeze((1, 2)), x[:, :1].squeeze(1) + 1, y.squeeze(), y.squeeze(-1) * 2, y[:, :1].squeeze((1, 2))


def test_squeezes_of_axes_that_stay(tmp_path: Path) -> None:
    """torch's exporter writes files that ONNX Runtime refuses, or none."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6)
    result = sp.compress(Squeezing(), x, "channels=0.5")
    result.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for mine, theirs in zip(got, result.model(x), strict=True):
        assert mine.shape == tuple(theirs.shape) and np.allclose(mine, theirs.detach().numpy(), atol=1e-5)


def test_a_file_that_onnx_runtime_refuses_is_told(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Squeeze", ["x", "axes"], ["y"])
    value = onnx.helper.make_tensor_value_info
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [1])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [2, 3])], [value("y", 1, [2])], [axes])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), str(tmp_path / "bad.onnx"))
    with pytest.raises(ExportError, match=r"does not take bad\.onnx.*Squeeze"):
        check(tmp_path / "bad.onnx", nn.Identity(), (torch.ones(2, 3),), {})
    with pytest.raises(ExportError, match=r"does not take bad\.onnx.*Squeeze"):
        kernels.profile(tmp_path / "bad.onnx", [np.ones((2, 3), np.float32)], threads=1)


class Iterated(nn.Module):
    """A map under which what float32 rounds off grows by two each time: chaos, like a choice between queries that are nearly equal."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = 3.9 * x * (1 - x)
        return x


@pytest.mark.parametrize("times", [2, 16, 60])
def test_a_file_may_differ_from_torch_as_torch_differs_from_itself(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Iterated(times), torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    own = float((module(x) - module(x.double())).abs().max() / module(x).max())
    off = {2: 1e-2, 16: own, 60: own}[times]
    monkeypatch.setattr("structprune.backends.onnx.run", lambda path, flat: [(module(x) + off * module(x).max()).numpy()])
    if times == 16:
        assert 1e-3 < own < 5e-2
        assert check(Path("model.onnx"), module, (x,), {}) == pytest.approx(off, rel=1e-3)
    else:  # it is not so sensitive, or so that nothing would be wrong
        with pytest.raises(VerificationError, match="differs from torch"):
            check(Path("model.onnx"), module, (x,), {})


@pytest.mark.parametrize(("share", "right"), [(0.02, True), (0.2, False)])
def test_whole_numbers_of_a_file_are_torchs_but_for_a_few_ties(share: float, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Best(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x.argmax(1)

    x = torch.rand(100, 5, generator=torch.Generator().manual_seed(0))
    others = x.argmax(1)
    others[: int(share * 100)] += 1
    monkeypatch.setattr("structprune.backends.onnx.run", lambda path, flat: [x.numpy(), others.numpy()])
    if right:
        assert check(Path("model.onnx"), Best(), (x,), {}) == 0
    else:
        with pytest.raises(VerificationError, match="20.0% are others"):
            check(Path("model.onnx"), Best(), (x,), {})


class Positions(nn.Module):
    """Tokens of a batch, and positions that all samples share: two first axes that may change, one of which is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.out = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.out((self.tokens(x) + self.places(places)[None]).relu())


def test_inputs_that_all_samples_share_are_no_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = sp.compress(Positions(), (torch.randn(1, 7, 6), torch.randn(7, 3)), "channels=0.5", dynamic={"x": (1,)})
    assert result.graph.dynamic_batch and result.graph.batched == (True, False)
    result.export_onnx(tmp_path / "model.onnx")
    assert answer(tmp_path / "model.onnx", torch.randn(3, 7, 6), torch.randn(7, 3)).shape == (3, 7, 5)


def test_weights_of_more_than_2_gb_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structprune.backends.onnx._LARGE", 20_000)
    x = demo.samples()[0][:4]
    result = sp.compress(demo.model(), (x,), target="channels=0.75")
    report = result.save(tmp_path / "out", latency=False)
    assert (tmp_path / "out/model.onnx.data").stat().st_size > 10_000
    assert report.data["onnx_bytes"]["after"] > (tmp_path / "out/model.onnx").stat().st_size
    np.testing.assert_allclose(answer(tmp_path / "out/model.onnx", x), result.model(x).detach(), atol=1e-3)
    assert "too large" in verify_directory(tmp_path / "out")["original_onnx_masked"]
    (tmp_path / "out").rename(tmp_path / "moved")
    verify_directory(tmp_path / "moved")


def test_files_say_who_made_them(tmp_path: Path) -> None:
    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5")
    result.save(tmp_path / "out", latency=False)
    plan = sp.Plan.load(tmp_path / "out/plan.json")
    wanted = {"structprune.version": sp.__version__, "structprune.plan": plan.digest, "structprune.target": "channels=0.5"}
    assert {p.key: p.value for p in onnx.load(tmp_path / "out/model.onnx").metadata_props} == wanted
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == wanted
    extra = dict.fromkeys(wanted, "")
    torch.export.load(tmp_path / "out/model.pt2", extra_files=extra)
    assert extra == wanted
    other = sp.compress(model, inputs, target="channels=0.75")
    other.plan.save(tmp_path / "out/plan.json")
    with pytest.raises(VerificationError, match=r"plan\.json|the plan says"):
        verify_directory(tmp_path / "out")


@pytest.mark.parametrize("name", ["residual", "joined"])
def test_a_plan_replays_with_numpy_alone(name: str, tmp_path: Path) -> None:
    """The code of docs/plan.md, on the state_dict of the original."""
    model, inputs = models.build(name)
    result = sp.compress(model, inputs, target="channels=0.5")
    result.save(tmp_path / "out", latency=False)
    page = (Path(__file__).parent.parent / "docs/plan.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0].replace("plan.json", str(tmp_path / "out/plan.json"))
    assert "torch" not in code
    namespace: dict[str, object] = {}
    exec(code, namespace)
    small = load_file(tmp_path / "out/model.safetensors")
    matched = 0
    for key, tensor in model.state_dict().items():
        if key in small:
            np.testing.assert_array_equal(namespace["cut"](key, tensor.numpy()), small[key])  # type: ignore[operator]
            matched += 1
    assert matched >= len(result.plan.tensors) > 0
