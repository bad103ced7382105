"""`dead`: what goes contributes nothing, by proof from the weights, and the answer stays the original's."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from networks import Network, networks
from torch import Tensor, nn
from torch.nn.utils import prune

import structprune as sp
from structprune.analysis.groups import Groups, find_groups
from structprune.backends.directory import verify_directory
from structprune.decide.dead import silence
from structprune.decide.plan import atoms_of
from structprune.errors import PlanError, VerificationError
from structprune.frontends.trace import trace
from structprune.ir.axes import positions
from structprune.ir.graph import Graph
from structprune.transform.surgery import operate
from structprune.transform.verify import verify, verify_unchanged

# ------------------------------------------------------------------------------------------------------------ random networks

counted: Counter[str] = Counter()


def damage(draw: st.DrawFn, network: Network, groups: Groups) -> set[tuple[str, int]]:
    """Silence, scale away, cut off or copy channels at random. Returns those that were silenced in every tensor of their group."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    silenced = set()
    for group in groups:
        kind = draw(st.sampled_from(["nothing", "everywhere", "one tensor", "copied", "scaled"]), label=group.name)
        channel, other = (draw(st.integers(0, group.size - 1)) for _ in range(2))
        members = [m for m in group.members if tensors[m.tensor].is_floating_point() and not m.tensor.endswith("running_var")]
        for member in [draw(st.sampled_from(members))] if kind == "one tensor" and members else members:
            tensor = tensors[member.tensor].movedim(member.dim, 0)
            for at in positions(groups.axes[member.tensor][member.dim], group.atom):
                entries, others = (torch.as_tensor(np.flatnonzero(at == c)) for c in (channel, other))
                if kind == "copied":
                    if member.dim == 0:  # as outputs, mostly
                        tensor[others] = tensor[entries]
                elif kind != "nothing" and (kind != "scaled" or tensor.dim() == 1):
                    tensor[entries] = 0
        if kind == "everywhere":
            silenced.add((group.name, channel))
    return silenced


def without_dead(network: Network) -> tuple[Graph, Groups, nn.Module, dict[str, list[bool]]]:
    original = trace(network, (network.example,))
    _, module = copy.deepcopy((network, original.module))
    graph = replace(original, module=module)
    groups = find_groups(graph)
    dead = silence(graph, groups)
    plan = dead.plan(graph, groups)
    keep = atoms_of(plan, groups)
    small = operate(graph, groups.types, keep, plan.tensors).module
    verify(graph, groups.types, keep, small)
    verify_unchanged(graph, groups.types, original.module, small, dead.tolerance(torch.finfo(torch.float32).eps))
    counted.update(
        removed=sum(int(gone.sum()) for gone in dead.channels.values()), constants=sum(dead.constants.values()), twins=sum(dead.twins.values())
    )
    return graph, groups, small, {name: gone.tolist() for name, gone in dead.channels.items()}


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
@given(networks(), st.data())
def test_the_answer_never_changes(network: Network, data: st.DataObject):
    check(network, data)


@torch.no_grad()
def check(network: Network, data: st.DataObject) -> None:
    groups = find_groups(trace(network, (network.example,)))
    note(str(groups))
    silenced = damage(data.draw, network, groups)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    graph, groups, small, dead = without_dead(network)
    x = network.example[[0, 1, 0]] if graph.dynamic_batch else network.example
    x = x.double() if x.is_floating_point() else x
    wanted, got = copy.deepcopy(network).double()(x), copy.deepcopy(small).double()(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item() + 1e-9, equal_nan=True)
    counted.update(silenced=len(silenced), found=sum(dead[name][channel] for name, channel in silenced))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()), "the original was changed"


def test_the_random_networks_had_dead_channels():
    if not counted:
        pytest.skip("counts what the test above has met")
    assert counted["found"] > 0.5 * counted["silenced"] > 0 and counted["twins"] > 5 and counted["constants"] > 0, counted


# -------------------------------------------------------------------------------------------------------------- one thing at a time


class Chain(nn.Module):
    """conv, norm, relu; 1x1 conv, norm, relu; 3x3 conv with padding, relu; head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.point, self.norm2 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.wide, self.head = nn.Conv2d(12, 10, 3, padding=1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        x = self.norm2(self.point(x)).relu()
        return self.head(self.wide(x).relu().mean((2, 3)))


@pytest.fixture
def chain() -> Chain:
    torch.manual_seed(0)
    model = Chain().eval()
    for norm in (model.norm, model.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    return model


INPUT = (torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)),)


def dead_of(model: nn.Module, inputs: tuple[Tensor, ...] = INPUT) -> sp.Result:
    """What is left, compared with the original once more, on inputs of its own."""
    other = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        wanted = model(*other)
        result = sp.compress(model, inputs, target="dead")
        torch.testing.assert_close(result.model(*other), wanted, rtol=1e-5, atol=1e-6)
    return result


def kept(result: sp.Result) -> dict[str, int]:
    return {g.name: len(g.keep) for g in result.plan.groups}


def found(result: sp.Result, what: str) -> dict[str, int]:
    return result.report.data["dead"][what]


def test_a_healthy_model_stays_as_it_is(chain: Chain) -> None:
    result = dead_of(chain)
    assert not result.plan.tensors and result.report.data["dead"]["error"] <= 1e-9
    assert kept(result) == {"stem": 8, "point": 12, "wide": 10}


@torch.no_grad()
def test_a_norm_of_scale_zero(chain: Chain) -> None:
    chain.norm.weight[[1, 4]] = 0
    chain.norm.bias[1], chain.norm.bias[4] = -0.3, 0.6  # nothing after the relu; a constant, which the norm behind the 1x1 convolution takes up
    chain.norm2.weight[[0, 7]] = 0
    chain.norm2.bias[0], chain.norm2.bias[7] = -0.1, 0.2  # nothing; a constant that padding cuts off at the border, so it stays
    result = dead_of(chain)
    assert kept(result) == {"stem": 6, "point": 11, "wide": 10}
    assert (found(result, "constants"), found(result, "stuck")) == ({"stem": 1}, {"point": 1})
    assert any("point: 1 channels are constants" in line for line in result.report.data["notes"])


@torch.no_grad()
def test_filters_of_zero_with_a_bias(chain: Chain) -> None:
    chain.wide.weight[[2, 3, 9]] = 0
    chain.wide.bias[2], chain.wide.bias[3], chain.wide.bias[9] = 0.0, -1.0, 1.0
    result = dead_of(chain)
    assert kept(result)["wide"] == 7 and found(result, "constants") == {"wide": 1}
    assert not torch.equal(result.model.head.bias, chain.head.bias)


@torch.no_grad()
def test_channels_that_nobody_reads(chain: Chain) -> None:
    chain.head.weight[:, 5] = 0
    chain.wide.weight[:, 3] = 0
    result = dead_of(chain)
    assert kept(result) == {"stem": 8, "point": 11, "wide": 9} and result.report.data["dead"]["error"] <= 1e-9


@torch.no_grad()
def test_what_only_dead_channels_read_is_dead_too(chain: Chain) -> None:
    chain.head.weight[:, 5] = 0
    chain.wide.weight[torch.arange(10) != 5, 3] = 0  # read by channel 5 alone
    assert kept(dead_of(chain)) == {"stem": 8, "point": 11, "wide": 9}


@torch.no_grad()
def test_equal_filters_become_one(chain: Chain) -> None:
    chain.wide.weight[[4, 6]], chain.wide.bias[[4, 6]] = chain.wide.weight[[1]], chain.wide.bias[[1]]
    chain.stem.weight[2], chain.stem.bias[2] = chain.stem.weight[0], chain.stem.bias[0]  # but their norms differ
    result = dead_of(chain)
    assert kept(result) == {"stem": 8, "point": 12, "wide": 8} and found(result, "twins") == {"wide": 2}
    for tensor in (chain.norm.weight, chain.norm.bias, chain.norm.running_mean, chain.norm.running_var):
        tensor[2] = tensor[0]
    assert kept(dead_of(chain)) == {"stem": 7, "point": 12, "wide": 8}


@torch.no_grad()
def test_a_dead_layer_keeps_one_channel(chain: Chain) -> None:
    chain.wide.weight.zero_()
    result = dead_of(chain)
    assert kept(result) == {"stem": 1, "point": 1, "wide": 1}  # what nobody reads any more goes as well
    assert [line for line in result.report.data["notes"] if line.startswith("wide: all channels are dead, and one stays")]


@torch.no_grad()
def test_an_answer_that_no_input_reaches_is_told(chain: Chain) -> None:
    chain.head.weight.zero_()
    assert any("does not depend on the inputs" in line for line in dead_of(chain).report.data["notes"])
    assert not any("does not depend" in line for line in dead_of(Chain().eval()).report.data["notes"])


def test_what_depends_on_state_noise_or_computed_norms_stays() -> None:
    """Each would be taken for a constant, or for a twin, by a rule that looked at weights alone."""

    class Counts(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.first, self.second = kind, nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("state", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if self.kind == "state":
                self.state.add_(1.0)
                y = y * 0 + y * self.state
            elif self.kind == "norm":
                y = nn.functional.batch_norm(y, torch.zeros(8), torch.ones(8), torch.zeros(8), x.sum().expand(8), False)
            else:
                y = y + torch.rand_like(y)
            return self.second(y)

    for kind in ("state", "norm", "noise"):
        model = Counts(kind).eval()
        with torch.no_grad():
            model.first.weight[3], model.first.bias[3] = model.first.weight[2], model.first.bias[2]
        graph = trace(model, (torch.randn(4, 6),))
        dead = silence(graph, find_groups(graph))
        assert not dead.constants and not dead.constant and sum(dead.twins.values()) == (kind == "norm"), (kind, dead)


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer, self.head = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.outer(self.inner(x).relu()))


@torch.no_grad()
def test_a_residual_stream_dies_only_as_a_whole() -> None:
    model, inputs = Stream(), (torch.randn(4, 6),)
    model.stem.weight[2], model.stem.bias[2] = 0, 0
    assert kept(dead_of(model, inputs))["stem"] == 8  # the branch still writes to it
    model.outer.weight[2], model.outer.bias[2] = 0, 0.5
    result = dead_of(model, inputs)
    # a constant in the head; in the branch nothing reads it as other than zero
    assert kept(result)["stem"] == 7 and found(result, "constants") == {"stem": 1}
    model.outer.weight.zero_()
    model.outer.bias.zero_()
    result = dead_of(model, inputs)
    assert kept(result) == {"stem": 7, "inner": 0}  # the branch is gone
    assert type(result.model) is Stream and not any(name.startswith(("inner", "outer.weight")) for name, _ in result.model.named_parameters())


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8)])
@torch.no_grad()
def test_a_norm_over_channels_counts_them(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 3))
    model[0].weight[2], model[0].bias[2], norm.weight[2], norm.bias[2] = 0, 0, 0, 0
    assert kept(dead_of(model, (torch.randn(4, 6),))) == kept(sp.compress(model, torch.randn(4, 6), "channels=1.0"))


@torch.no_grad()
def test_attention_without_some_heads_and_widths() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = Attention()
    model.v.weight[4:8], model.v.bias[4:8] = 0, 0  # head 1 answers nothing
    for layer in (model.q, model.k):
        layer.weight[3::4] = 0  # width 3 of all heads: queries add a constant to no logit
    model.q.bias[3::4] = 0
    result = dead_of(model, (torch.randn(2, 5, 16),))
    assert sorted(kept(result).values()) == [3, 3, 4]


def test_masks_of_torch_prune(chain: Chain) -> None:
    prune.ln_structured(chain.wide, "weight", 0.4, n=1, dim=0)
    prune.random_structured(chain.point, "weight", 3, dim=0)
    prune.l1_unstructured(chain.stem, "weight", 0.3)
    chain(*INPUT)
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    result = dead_of(chain)
    assert kept(result)["wide"] == 6 and kept(result)["stem"] == 8
    assert "wide.weight" in result.plan.tensors and "wide.weight_orig" in chain.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in chain.state_dict().items())
    torch.testing.assert_close(sp.apply(chain, result.plan)(*INPUT), result.model(*INPUT))


@torch.no_grad()
def test_files_and_replay(chain: Chain, tmp_path: Path) -> None:
    chain.norm.weight[[1, 4]] = 0
    chain.head.weight[:, 5] = 0
    result = dead_of(chain)
    result.save(tmp_path / "out", latency=False)
    torch.testing.assert_close(sp.load(tmp_path / "out")(*INPUT), chain(*INPUT), rtol=1e-5, atol=1e-6)
    checked = verify_directory(tmp_path / "out")
    assert checked["original_onnx"] < 1e-5
    plan = sp.Plan.load(tmp_path / "out/plan.json")
    torch.testing.assert_close(sp.apply(chain, plan)(*INPUT), chain(*INPUT), rtol=1e-5, atol=1e-6)
    chain.norm.weight[1] = 1.0  # another model: what the plan removes is alive in it
    with pytest.raises(PlanError, match="stem: channel 1 is not dead"):
        sp.apply(chain, plan)


@torch.no_grad()
def test_on_the_command_line(run, chain: Chain) -> None:
    Path("builders.py").write_text("import torch\nfrom test_dead import Chain\n")
    chain.wide.weight[2], chain.wide.bias[2] = 0, 0
    torch.save(chain.state_dict(), "w.pt")
    status, _, err = run("compress", "w.pt", "--arch", "test_dead:Chain", "--input", "1x3x8x8", "--dead", "--out", "o", "--no-latency")
    assert status == 0, err
    assert json.loads(Path("o/report.json").read_text())["dead"]["channels"] == {"wide": 1}
    assert run("verify", "o")[0] == 0


@torch.no_grad()
def test_an_answer_that_changes_is_refused(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is not trusted: were it wrong, the comparison with the original would say so."""
    monkeypatch.setattr("structprune.decide.dead._View.removable", lambda self, atom: (np.arange(atom.size) == 3, *(np.zeros(atom.size, bool),) * 2))
    with pytest.raises(VerificationError, match="differs from the original"):
        sp.compress(chain, INPUT, target="dead")
