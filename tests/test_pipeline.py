"""compress, end to end: what comes back is right, small, trainable, and the input is left alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import models
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import structprune as sp
from structprune.errors import InputError, PlanError, TargetError, TraceError, VerificationError
from structprune.ir.traced import TracedModule
from structprune.transform.reference import Exact
from structprune.transform.verify import same_noise


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", models.MODELS)
def test_small_verified_and_trainable(name: str) -> None:
    model, inputs = models.build(name)
    result = sp.compress(model, inputs, target="channels=0.5")
    assert size(result.model) < 0.7 * size(model)
    assert result.report.data["verification"]["masked_error"] <= 1e-6
    small = copy.deepcopy(result.model).train()
    small(*inputs).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    small.eval()
    optimiser = torch.optim.SGD(small.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = small(*inputs).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(p).all() for p in small.parameters())


def test_the_input_model_is_left_untouched() -> None:
    model, inputs = models.build("residual")
    model.train()
    model.head.eval()
    before, modes = state(model), [m.training for m in model.modules()]
    sp.compress(model, inputs, target="channels=0.3")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


class Remembers(nn.Module):
    """Keeps what depends on the size of its input until another size comes, as detectors do with anchors and transformers with positions."""

    shape: tuple[int, ...] | None = None
    mask = torch.empty(0)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)
        self.tables: dict[int, torch.Tensor] = {}
        self.seen: list[list[int]] = [[]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shape != tuple(x.shape[2:]):
            self.shape, self.mask = tuple(x.shape[2:]), torch.arange(x.shape[3]) % 2 + torch.ones(x.shape[2], 1)
        if x.shape[3] not in self.tables:
            self.tables[x.shape[3]] = torch.linspace(-1, 1, x.shape[3])
            self.seen[0].append(x.shape[3])
        return self.head(self.body(x * self.mask).relu() + self.tables[x.shape[3]])


def test_what_a_model_remembers_of_a_size_is_its_own_and_not_the_traces() -> None:
    torch.manual_seed(0)
    model, x = Remembers().eval(), torch.randn(2, 3, 8, 8)
    sp.trace(model, (x,))
    assert (model.shape, model.mask.numel(), model.tables, model.seen) == (None, 0, {}, [[]])
    result = sp.compress(model, (x,), target="channels=0.5")
    assert type(result.model) is Remembers
    for size in (8, 12):
        other = torch.randn(1, 3, size, size)
        assert model(other).shape == result.model(other).shape == (1, 4, size, size)
    assert type(model.mask) is type(model.tables[8]) is torch.Tensor


def test_the_users_class_comes_back_where_it_follows() -> None:
    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5")
    assert type(result.model) is models.Residual
    assert result.model.conv1.out_channels == 12
    assert result.model.norm1.num_features == 12


def test_an_attribute_of_the_users_class_follows() -> None:
    model, inputs = models.build("attention")
    result = sp.compress(model, inputs, target="channels=0.5")
    assert type(result.model) is models.Attention
    assert (result.model.heads, model.heads) == (2, 4)


def test_attributes_follow_beside_a_child_that_two_modules_share() -> None:
    gate = models.Of(lambda m, x: x.tanh())

    def block() -> nn.Module:
        return models.Of(lambda m, x: m.out(m.gate(m.fc(x)).view(-1, m.width)), gate=gate, fc=nn.Linear(6, 8), out=nn.Linear(8, 6), width=8)

    model = models.Of(lambda m, x: m.second(m.first(x)), first=block(), second=block()).eval()
    small = sp.compress(model, (torch.randn(2, 6),), target="channels=0.5").model
    assert type(small) is models.Of
    assert (small.first.width, small.second.width) == (4, 4)


def test_a_graph_comes_back_where_the_class_cannot_follow() -> None:
    model, inputs = models.build("hard_coded")
    result = sp.compress(model, inputs, target="channels=0.5")
    assert isinstance(result.model, TracedModule)
    assert result.model(torch.randn(5, 1, 8, 8)).shape == (5, 4)


def test_a_graph_switches_between_training_and_evaluation() -> None:
    model, inputs = models.build("residual")
    small = sp.compress(model, inputs, target="channels=0.5").small
    mean = small.norm1.running_mean.clone()
    assert torch.equal(small(*inputs), small(*inputs))
    small.train()
    assert not torch.equal(small(*inputs), small(*inputs)), "dropout is off in training"
    assert not torch.equal(small.norm1.running_mean, mean), "batch statistics do not move in training"
    small.eval()
    assert torch.equal(small(*inputs), small(*inputs))
    assert copy.deepcopy(small).double()(inputs[0].double()).dtype is torch.float64


def test_onnx_keeps_names_and_a_dynamic_batch(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model = models.Structured().eval()
    result = sp.compress(model, (torch.randn(2, 6),), target="channels=0.5", example_kwargs={"extra": torch.randn(2, 4)})
    assert result.export_onnx(tmp_path / "model.onnx") < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "extra"]
    assert [o.name for o in session.get_outputs()] == ["logits", "parts_0", "parts_1_0"]
    x, extra = torch.randn(7, 6), torch.randn(7, 4)
    logits = session.run(["logits"], {"x": x.numpy(), "extra": extra.numpy()})[0]
    assert np.allclose(logits, result.model(x, extra=extra)["logits"].detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("index", [[4, 5, 6, 7, 0, 1], torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])], ids=["a list", "a tensor"])
def test_a_constant_index_is_counted_anew(index: object) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(len(index), 3)  # type: ignore[arg-type]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)[:, index])

    torch.manual_seed(0)
    model = Indexed().eval()
    result = sp.compress(model, (torch.randn(2, 5),), target="channels=0.5")
    assert result.plan.tensors.keys() >= {"a.weight", "b.weight"}
    assert size(result.model) < size(model)


def test_structured_inputs_and_outputs_keep_their_form() -> None:
    torch.manual_seed(0)
    model, x, extra = models.Structured(), torch.randn(2, 6), torch.randn(2, 4)
    result = sp.compress(model, (x,), target="channels=0.5", example_kwargs={"extra": extra})
    for small in (result.model, result.small):
        answer = small(x, extra=extra)
        assert set(answer) == {"logits", "parts"}
        assert answer["parts"][1][0].shape == (2, 3)
    assert result.graph.output_names == ("logits", "parts_0", "parts_1_0")


def test_parametrizations_are_folded_and_stay_on_the_input() -> None:
    """The answer is that of the folded weights with the removed slices set to zero."""
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model)
    before = model(x)
    result = sp.compress(model, (x,), target="channels=0.5")
    assert torch.equal(model(x), before)
    assert torch.equal(other(x), before), "a copy of the input shares its class, and must still work"
    gone = [i for i in range(16) if i not in result.plan.tensors["0.weight"].keep[0]]
    with torch.no_grad():
        hidden = torch.relu(model[0](x))
        hidden[:, gone] = 0
        wanted = model[2](hidden)
    assert torch.allclose(result.model(x), wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)


def test_a_plan_replays_with_numpy_alone(tmp_path: Path) -> None:
    model, inputs = models.build("joined")
    result = sp.compress(model, inputs, target="channels=0.5")
    result.plan.save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    for name, tensor in model.state_dict().items():
        cut = plan["tensors"].get(name, {"keep": {}})
        array = tensor.numpy()
        for dim, keep in cut["keep"].items():
            array = np.take(array, keep, axis=int(dim))
        assert np.array_equal(array, result.small.state_dict()[name].numpy())


def test_a_plan_replays_on_a_fresh_instance(tmp_path: Path) -> None:
    model, inputs = models.build("attention")
    result = sp.compress(model, inputs, target="channels=0.5", ignore=["embed"])
    result.plan.save(tmp_path / "plan.json")
    again = sp.apply(copy.deepcopy(model), sp.Plan.load(tmp_path / "plan.json"))
    assert torch.equal(again(*inputs), result.model(*inputs))
    assert sp.Plan.load(tmp_path / "plan.json") == result.plan


def test_a_plan_of_another_model_is_refused() -> None:
    model, inputs = models.build("joined")
    plan = sp.compress(model, inputs, target="channels=0.5").plan
    other = models.Joined()
    other.a, other.b = nn.Conv2d(3, 24, 1), nn.Conv2d(3, 8, 1)
    with pytest.raises(PlanError, match="group 'a' of 4 channels is not in this model"):
        sp.apply(other, plan)


@pytest.mark.parametrize("name", ["residual", "hard_coded"])
def test_a_small_model_from_anywhere_can_be_verified(name: str) -> None:
    model, inputs = models.build(name)
    result = sp.compress(model, inputs, target="channels=0.5")
    assert sp.verify(model, result.model, result.plan).error <= 1e-8
    assert sp.verify(model, result.model, result.plan, inputs).error <= 1e-8
    with torch.no_grad():
        next(result.model.parameters())[0] += 0.01
    with pytest.raises(sp.StructpruneError, match="differs"):
        sp.verify(model, result.model, result.plan)


def test_ignored_layers_keep_their_channels() -> None:
    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5", ignore=["conv1"])
    assert "stem.weight" in result.plan.tensors
    assert result.plan.tensors["conv1.weight"].keep.keys() == {1}
    with pytest.raises(InputError, match="nowhere"):
        sp.compress(model, inputs, target="channels=0.5", ignore=["nowhere"])


@pytest.mark.parametrize(
    ("target", "key", "share"), [("macs=0.5", "macs", 0.5), ("params=0.4", "params", 0.4), ("macs=0.7,params=0.45", "params", 0.45)]
)
def test_budgets_are_met_and_used(target: str, key: str, share: float) -> None:
    model, inputs = models.build("residual")
    data = sp.compress(model, inputs, target=target).report.data
    kept = data[key]["after"] / data[key]["before"]
    assert 0.6 * share < kept <= share


@pytest.mark.parametrize("batch", [1, 2])
def test_reported_costs_are_those_of_torch(batch: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = models.build("residual")
    inputs = (torch.randn(batch, 3, 8, 8),)
    result = sp.compress(model, inputs, target="channels=0.5")
    for module, when in ((model, "before"), (result.model, "after")):
        with FlopCounterMode(display=False) as counter:
            module.eval()(*inputs)
        assert counter.get_total_flops() == 2 * result.report.data["macs"][when]
        assert size(module) == result.report.data["params"][when]


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("macs=0.0001", TargetError, "cannot be reached"),
        ("channels=0.001", TargetError, "cannot be reached"),
        ("memory=3MACS", InputError, "memory takes B, KB"),
        ("size=1B", TargetError, "cannot be reached"),
        ("speed=2", InputError, "unknown target"),
        ("macs", InputError, "key=value"),
        ("macs=0", InputError, "above 0"),
        ("channels=3", InputError, "above 0"),
        ("macs=5X", InputError, "unit"),
    ],
)
def test_targets_that_cannot_be_used(target: str, error: type[Exception], words: str) -> None:
    model, inputs = models.build("residual")
    with pytest.raises(error, match=words):
        sp.compress(model, inputs, target=target)


def test_a_model_that_cannot_be_traced_is_told_by_its_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(TraceError, match=r"test_pipeline\.py:\d+.*torch\.where"):
        sp.compress(Branches(), (torch.randn(2, 3),))


class Otherwise(nn.Module):
    """Its code goes another way while it is traced."""

    def __init__(self, times: float, size: int) -> None:
        super().__init__()
        self.first, self.second, self.times, self.size = nn.Linear(6, 16), nn.Linear(size, 3), times, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu() * (self.times if torch.compiler.is_exporting() else 1.0)
        return self.second(y.view(-1, self.size))


@pytest.mark.parametrize("size", [8, 16])
def test_a_trace_that_answers_otherwise_than_the_model_is_refused(size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6)
    sp.compress(Otherwise(1.0, size), x, "channels=0.5")
    with pytest.raises(TraceError, match="otherwise than its trace"):
        sp.compress(Otherwise(1.01, size), x, "channels=0.5")
    plan = sp.compress(Otherwise(1.0, size), x, "channels=0.5").plan
    with pytest.raises(TraceError, match="otherwise than its trace"):
        sp.apply(Otherwise(1.01, size), plan)


class Sampler(nn.Module):
    """A variational autoencoder: noise is drawn between encoder and decoder, and codes are repeated to a size that is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))
        self.widen, self.decode = nn.Linear(4, 16), nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_deviation = self.encode(x).chunk(2, -1)
        code = self.widen(mean + torch.randn_like(mean) * log_deviation.exp()).relu()
        return self.decode(code.repeat_interleave(2, dim=-1, output_size=32)), mean


def test_a_model_that_draws_noise_is_verified_on_the_same_noise_and_has_no_onnx_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Sampler(), torch.randn(2, 6)
    state = torch.get_rng_state()
    result = sp.compress(model, x, "channels=0.5")
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(result.model.named_parameters())["widen.weight"].shape == (8, 4)
    with pytest.raises(VerificationError, match=r"draws random numbers \(randn_like at .*test_pipeline\.py:\d+\).*make the noise an input"):
        result.export_onnx(tmp_path / "model.onnx")


def test_noise_does_not_depend_on_the_order_of_memory() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.randn_like.default, (graph.placeholder("x"),)))
    run, x, drawn = Exact(torch.fx.GraphModule(nn.Module(), graph)), torch.zeros(3, 4), []
    for value in (x, x.t().contiguous().t()):
        with same_noise():
            drawn.append(run.run(value))
    assert drawn[0].dtype == torch.float64 and torch.equal(*drawn)


class Viewed(nn.Module):
    """Heads are put side by side by a view, which holds for the memory that fused attention answers in, of float32 and equal widths alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(*x.shape[:2], -1))


@pytest.mark.parametrize("ignore", [(), ("v",)])
def test_views_of_what_fused_attention_answers(ignore: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 24)
    result = sp.compress(Viewed(), x, "channels=0.5", ignore=ignore)
    assert result.model(x).shape == x.shape and result.report.data["macs"]["after"] < 0.8 * result.report.data["macs"]["before"]


def test_a_model_that_writes_to_its_input_is_verified_on_what_was_given(tmp_path: Path) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x.mul_(2)).relu())

    torch.manual_seed(0)
    x = torch.randn(3, 4)
    before = x.clone()
    result = sp.compress(Writes().eval(), (x,), target="channels=0.5")
    assert result.report.data["verification"]["masked_error"] == 0
    assert result.export_onnx(tmp_path / "model.onnx") < 1e-5
    assert torch.equal(x, before), "the user's example was written to"


def test_a_model_that_keeps_the_features_of_its_last_call_comes_back_as_itself() -> None:
    """torch refuses to copy them, with the history that they have where it was called outside of no_grad."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.features = nn.Linear(4, 8), nn.Linear(8, 2), []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.features = [self.a(x).relu()]
            return self.b(self.features[0])

    model, x = Keeps().eval(), torch.randn(3, 4)
    model(x)
    kept = model.features[0]
    result = sp.compress(model, (x,), target="channels=0.5")
    assert isinstance(result.model, Keeps) and result.model.features is not model.features
    assert kept.grad_fn is not None, "the user's own was detached"


def test_what_a_class_keeps_until_its_mode_is_set_is_made_anew() -> None:
    """As the attention of LeViT, EfficientFormer and TinyViT does with its biases."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.index, self.kept = nn.Parameter(torch.randn(8, 5)), torch.randint(0, 5, (16,)), {}
            self.q, self.k, self.head = nn.Conv1d(3, 32, 1), nn.Conv1d(3, 32, 1), nn.Linear(16, 4)

        def train(self, mode: bool = True) -> nn.Module:
            self.kept = {}
            return super().train(mode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                biases = self.bias[:, self.index]
            else:
                if "biases" not in self.kept:
                    self.kept["biases"] = self.bias[:, self.index]
                biases = self.kept["biases"]
            q, k = (layer(x).view(len(x), -1, 4, 16) for layer in (self.q, self.k))
            return self.head(((q * k).sum(2) + biases).relu()).sum(1)

    model, x = Biased().eval(), torch.randn(2, 3, 16)
    with torch.no_grad():
        before = model(x)
    result = sp.compress(model, x, target="channels=0.5")
    assert isinstance(result.model, Biased) and result.model.bias.shape == (4, 5)
    assert torch.equal(model(x), before)


def test_an_epsilon_stays_in_the_onnx_file(tmp_path: Path) -> None:
    """For silence, all of whose channels are zero, the model answers zeros, and a file without the epsilon NaN."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).relu()
            return self.b(y / (y.sum(1, keepdim=True) + 1e-12))

    result = sp.compress(Shares().eval(), (torch.randn(3, 4),), target="channels=0.5")
    result.export_onnx(tmp_path / "model.onnx")
    silence = torch.zeros(2, 4)
    (answer,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": silence.numpy()})
    np.testing.assert_allclose(answer, result.model(silence).detach(), rtol=1e-6)


def test_wrong_example_inputs_are_told() -> None:
    model, _ = models.build("residual")
    with pytest.raises(TraceError, match="example inputs"):
        sp.compress(model, (torch.randn(2, 4, 8, 8),))


def test_a_batch_that_the_model_fixes_is_static_and_said() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).reshape(3, 8))

    data = sp.compress(Fixed(), (torch.randn(3, 4),), target="channels=0.5").report.data
    assert data["verification"]["dynamic_batch"] is False
    assert any("static batch" in note for note in data["notes"])


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "kernels"])
def test_a_batch_that_cannot_have_any_size_is_static_and_said(parts: bool, tmp_path: Path) -> None:
    """What is equal parts of the batch does not run on three samples; a kernel of each sample's own is no convolution of ONNX's."""

    def run(m: models.Of, x: torch.Tensor) -> torch.Tensor:
        y = m.stem(x)
        if parts:
            return m.out((y.view(2, -1, *y.shape[1:]) - 1).view(y.shape))
        kernels = m.kernel(x.mean(2)).reshape(-1, 1, 3)
        return m.out(nn.functional.conv1d(y.reshape(1, -1, 9), kernels, groups=len(kernels)).reshape(len(x), -1, 7))

    layers = {"stem": nn.Conv1d(3, 8, 1), "kernel": nn.Linear(3, 24), "out": nn.Conv1d(8, 2, 1)}
    result = sp.compress(models.Of(run, **layers).eval(), (torch.randn(4, 3, 9),), target="channels=0.5")
    assert any("static batch" in note for note in result.report.data["notes"])
    result.export_onnx(tmp_path / "model.onnx")


def test_a_batch_of_one_that_the_model_fixes_stays_one(tmp_path: Path) -> None:
    """Swin's window_reverse asks for int(windows / number); tracing, which needs two samples for a free batch, fixes it to two there."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            windows = self.a(x).relu().reshape(-1, 3, 8)
            return self.b(windows.reshape(int(windows.shape[0] / (6 / 3)), 6, 8))

    x = torch.randn(1, 6, 4)
    result = sp.compress(Windows(), (x,), target="channels=0.5")
    assert any("static batch" in note for note in result.report.data["notes"])
    assert result.small(x).shape == (1, 6, 2)
    result.export_onnx(tmp_path / "model.onnx")
    (answer,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(answer, result.model(x).detach(), rtol=1e-4, atol=1e-6)


def test_output_directory_round_trip(tmp_path: Path) -> None:
    from structprune.backends.directory import FILES, verify_directory

    model, inputs = models.build("attention")
    result = sp.compress(model, inputs, target="channels=0.5")
    report = result.save(tmp_path / "out", latency=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "something was left beside the directory"
    loaded = sp.load(tmp_path / "out")
    assert torch.equal(loaded(*inputs), result.model(*inputs))
    loaded.train()(*inputs).sum().backward()
    assert report.data["verification"]["onnx_error"] < 1e-3
    found = verify_directory(tmp_path / "out")
    assert found["onnx_error"] < 1e-3
    assert "Normalization" in found["original_onnx_masked"]


def test_the_original_file_without_the_channels_answers_as_the_small_one(tmp_path: Path) -> None:
    from structprune.backends.directory import verify_directory

    model, inputs = models.build("residual")
    sp.compress(model, inputs, target="channels=0.5").save(tmp_path / "out", latency=False)
    assert verify_directory(tmp_path / "out")["original_onnx_masked"] < 1e-5
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv1.weight.mul_(1.5)
    sp.compress(other, inputs, target="channels=0.5").save(tmp_path / "other", latency=False)
    (tmp_path / "other/original.onnx").replace(tmp_path / "out/original.onnx")
    with pytest.raises(sp.StructpruneError, match="original.onnx"):
        verify_directory(tmp_path / "out")


def test_saved_weights_are_the_trained_ones(tmp_path: Path) -> None:
    model, inputs = models.build("attention")
    result = sp.compress(model, inputs, target="channels=0.5")
    with torch.no_grad():
        result.model.head.bias.add_(1.0)
    result.save(tmp_path / "out", latency=False)
    assert torch.equal(sp.load(tmp_path / "out")(*inputs), result.model(*inputs))


@pytest.mark.parametrize("damage", ["weights", "onnx", "plan", "missing"])
def test_verification_of_a_directory_can_fail(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    from structprune.backends.directory import verify_directory

    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5")
    out = tmp_path / "out"
    result.save(out, latency=False)
    if damage == "weights":
        tensors = load_file(out / "model.safetensors")
        tensors["head.bias"][0] += 1
        save_file(tensors, out / "model.safetensors")
    elif damage == "onnx":
        with torch.no_grad():
            result.model.head.weight[0, 0] += 1
        result.export_onnx(out / "model.onnx")
    elif damage == "plan":
        text = json.loads((out / "plan.json").read_text())
        text["tensors"]["head.weight"]["keep"]["1"].pop()
        (out / "plan.json").write_text(json.dumps(text))
    else:
        (out / "model.onnx").unlink()
    with pytest.raises(sp.StructpruneError, match="head|model.onnx"):
        verify_directory(out)


class SizeOfWhatShrinks(nn.Module):
    """Samples and heads on one axis, as in timm's Segment Anything: the mask is expanded to as many as the queries are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.near, self.out = nn.Linear(16, 48), nn.Linear(4, 5), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 4, -1).permute(2, 0, 3, 1, 4).reshape(3, n * 4, length, -1).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.near(q).reshape(-1, length, length))
        return self.out(y.view(n, 4, length, -1).transpose(1, 2).reshape(n, length, -1))


def test_a_size_that_is_read_from_what_shrinks_follows_by_itself():
    result = sp.compress(SizeOfWhatShrinks().eval(), torch.randn(2, 5, 16), "channels=0.5")
    assert any(g.channels == 4 and len(g.keep) == 2 for g in result.plan.groups)
    assert result.model(torch.randn(3, 5, 16)).shape == (3, 5, 16)
