"""Groups that keep nothing: the branch that they stand in folds to a constant and disappears; or the plan is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import structprune as sp
from structprune.analysis.groups import Groups
from structprune.decide.allocate import allocate
from structprune.decide.plan import atoms_of, planned
from structprune.decide.saliency import saliency
from structprune.decide.targets import parse_target
from structprune.errors import PlanError, VerificationError
from structprune.frontends.samples import samples_of
from structprune.frontends.trace import trace
from structprune.ir.graph import Graph
from structprune.ir.plan import Plan
from structprune.pipeline import realise
from structprune.recovery.compensate import compensate
from structprune.result import Clock, Result
from structprune.transform.branches import branches
from structprune.transform.own_class import Constant
from structprune.transform.surgery import Surgery, operate
from structprune.transform.verify import verify

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """x + bn(conv(relu(bn(conv x)))), added in place to the branch as torchvision's ResNet does; of half the size where it is told a stride."""

    def __init__(self, width: int, inner: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, stride, padding=1, bias=False)
        self.beside = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.beside(x)
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self, strides: Sequence[int] = (1, 1)):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8, 12, stride) for stride in strides))
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            for norm in [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]:
                for value in (norm.weight, norm.bias, norm.running_mean):
                    value.normal_(0.3, 0.5)
                norm.running_var.uniform_(0.5, 1.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Excited(nn.Module):
    """A residual branch with a squeeze-and-excite inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.project = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.head = nn.Linear(8, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.expand(x).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return self.head((x + self.project(y)).mean((2, 3)))


class Attention(nn.Module):
    """A transformer's block, heads and width free, with scales that are learnt on both branches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale1, self.scale2 = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))
        self.head = nn.Linear(16, 5)
        self.eval()

    def attention(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.scale1 * self.attention(self.norm1(x))
        x = x + self.scale2 * self.fc2(torch.nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x)


class Dense(nn.Module):
    """Layers whose answers are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.grow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.last = nn.Conv2d(14, 4, 3, padding=1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.last(torch.cat([x, self.grow(x)], 1))


class Chain(nn.Module):
    """No branch: who keeps nothing of a layer has no answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def analysed(model: nn.Module, x: Tensor = IMAGE) -> tuple[Graph, Groups]:
    graph = trace(model, (x,))
    return graph, sp.find_groups(graph)


def emptied(groups: Groups, *names: str) -> Plan:
    """The plan by which these groups keep nothing, and all others everything."""
    keep = {groups[name].atom: np.zeros(0, dtype=np.int64) for name in names}
    return planned(groups, keep, inputs={"args": [{"shape": list(IMAGE.shape), "dtype": "float32"}], "kwargs": {}})


def realised(model: nn.Module, *names: str, x: Tensor = IMAGE) -> Result:
    graph, groups = analysed(model, x)
    return realise(model, graph, groups, emptied(groups, *names), Clock(None))


def named(groups: Groups, found: dict[Any, frozenset[Any]]) -> dict[str, set[str]]:
    names = {g.atom: g.name for g in groups}
    return {names[atom]: {names[a] for a in gone} for atom, gone in found.items()}


# ------------------------------------------------------------------------------------------------------------ what may go whole


def test_only_branches_may_go_whole():
    for model, x, wanted in (
        (Residual(), IMAGE, {"blocks.0.conv1": {"blocks.0.conv1"}, "blocks.1.conv1": {"blocks.1.conv1"}}),
        (Excited(), IMAGE, {"expand": {"expand", "squeeze"}, "squeeze": {"squeeze"}}),
        (Attention(), torch.randn(2, 7, 6), {"qkv": {"qkv", "qkv#2"}, "qkv#2": {"qkv", "qkv#2"}, "fc1": {"fc1"}}),
        (Dense(), IMAGE, {"grow": {"grow"}}),
        (Chain(), IMAGE, {}),
    ):
        graph, groups = analysed(model, x)
        assert named(groups, branches(graph, groups)) == wanted, type(model).__name__


def test_the_answer_is_what_the_branch_answers_to_nothing():
    model = Residual()
    small = realised(model, "blocks.1.conv1").model
    block = model.blocks[1]
    with torch.no_grad():
        y = model.blocks[0](model.stem(IMAGE))
        branch = block.bn2(block.conv2.bias.view(1, -1, 1, 1).expand_as(y))
        torch.testing.assert_close(small(IMAGE), model.head((branch + y).relu().mean((2, 3))))


def test_squeezed_channels_leave_a_scale():
    model = Excited()
    small = realised(model, "squeeze").model
    with torch.no_grad():
        x = model.stem(IMAGE)
        y = model.expand(x).relu() * model.excite.bias.sigmoid()[None, :, None, None]
        torch.testing.assert_close(small(IMAGE), model.head((x + model.project(y)).mean((2, 3))))


@pytest.mark.parametrize("names", [("qkv", "qkv#2"), ("fc1",), ("fc1", "qkv", "qkv#2")], ids=str)
def test_blocks_of_a_transformer_vanish(names: tuple[str, ...]):
    model, x = Attention(), torch.randn(2, 7, 6)
    result = realised(model, *names, x=x)
    with torch.no_grad():
        y = model.embed(x)
        attention = model.proj.bias if "qkv" in names else model.attention(model.norm1(y))
        y = y + model.scale1 * attention
        mlp = model.fc2.bias if "fc1" in names else model.fc2(torch.nn.functional.gelu(model.fc1(model.norm2(y))))
        torch.testing.assert_close(result.model(x), model.head(y + model.scale2 * mlp))
    assert result.model(torch.randn(3, 7, 6)).shape == (3, 7, 5)
    assert not any(name.startswith("norm") for name, _ in result.model.named_parameters()) or len(names) < 3


def test_a_concatenation_goes_on_without():
    model = Dense()
    small = realised(model, "grow").model
    with torch.no_grad():
        x = model.stem(IMAGE).relu()
        torch.testing.assert_close(small(IMAGE), nn.functional.conv2d(x, model.last.weight[:, :8], model.last.bias, padding=1))


class Behind(nn.Module):
    """A residual branch of one linear layer, whose answer goes through what is given."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm, self.run = nn.BatchNorm1d(5), run
        self.register_buffer("count", torch.zeros(6))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.run(self, self.b(self.a(x))))


FOLDS = {
    "layer norm": lambda self, y: nn.functional.layer_norm(y, (6,)),
    "another layer": lambda self, y: self.c(y.relu()),
    "positions moved": lambda self, y: y.transpose(1, 2).roll(1, 2).unflatten(2, (5, 1)).flatten(2).transpose(1, 2),
    "a mean over positions": lambda self, y: y.mean(1, keepdim=True).sigmoid() * y,
    "weights of weights": lambda self, y: y * self.c.weight.mean(0),
    "one position of it": lambda self, y: y[:, :1],
}
NEEDS = {
    "a softmax over positions": lambda self, y: y.softmax(1),
    "a sum over positions": lambda self, y: y.sum(1, keepdim=True),
    "channels moved": lambda self, y: y.roll(1, 2),
    "channels halved": lambda self, y: torch.cat(y.chunk(2, 2)[::-1], 2),
    "a norm over positions": lambda self, y: self.norm(y),
    "weights of each position": lambda self, y: y * torch.arange(5.0)[:, None],
    "what the model writes to": lambda self, y: y + self.count.add_(1),
    "a dropout that never stops": lambda self, y: nn.functional.dropout(y, 0.5, True),
}


@pytest.mark.parametrize("how", [*FOLDS, *NEEDS])
def test_what_a_branch_goes_through_before_it_is_added(how: str):
    model, x = Behind({**FOLDS, **NEEDS}[how]), torch.randn(2, 5, 6)
    graph, groups = analysed(model, x)
    assert bool(branches(graph, groups)) == (how in FOLDS)
    if how in FOLDS:
        small = realised(model, "a", x=x).model  # verified
        with torch.no_grad():
            wanted = model.head(x + model.run(model, model.b.bias.expand(2, 5, 6)))
            torch.testing.assert_close(small(x), wanted)
            assert small(torch.randn(3, 5, 6)).shape == (3, 5, 3)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_plan_that_leaves_nothing_of_a_layer_without_another_way_is_refused(name: str):
    with pytest.raises(PlanError, match=r"keeps no channels, but .* needs them"):
        realised(Chain(), name)


# ---------------------------------------------------------------------------------------------------------- the result is a model


def test_the_users_class_comes_back_without_the_branch():
    result = realised(Residual(), "blocks.1.conv1")
    assert type(result.model) is Residual
    assert isinstance(result.model.blocks[1].bn2, Constant)
    assert result.report.data["params"]["after"] == sum(p.numel() for p in result.model.parameters())
    optimiser = torch.optim.SGD(result.model.train().parameters(), 0.1)
    before = result.model.blocks[1].bn2.constant.clone()
    result.model(IMAGE).square().sum().backward()
    optimiser.step()
    assert not torch.equal(result.model.blocks[1].bn2.constant, before)


def test_the_users_class_follows_where_the_branch_made_the_picture_smaller():
    model = Residual((1, 2))
    small = realised(model, "blocks.1.conv1").model
    assert type(small) is Residual
    block = model.blocks[1]
    for side in (7, 8, 13):
        with torch.no_grad():
            y = model.blocks[0](model.stem(x := torch.randn(2, 3, side, side)))
            beside = block.beside(y)
            branch = block.bn2(block.conv2.bias.view(1, -1, 1, 1).expand_as(beside))
            torch.testing.assert_close(small(x), model.head((branch + beside).relu().mean((2, 3))))


def test_what_a_forward_does_to_the_answer_of_a_module_that_is_gone_stays():
    result = realised(Attention(), "fc1", x=torch.randn(2, 7, 6))
    assert type(result.model) is Attention and "scale2" in dict(result.small.named_parameters())
    assert type(realised(Excited(), "squeeze").model) is Excited


def test_a_branch_that_ends_within_a_forward_gives_a_traced_model_and_says_so():
    result = realised(Behind(lambda self, y: y.transpose(1, 2).roll(1, 2).transpose(1, 2)), "a", x=torch.randn(2, 5, 6))
    assert type(result.model) is not Behind
    assert "in the middle of a module's forward" in result.report.data["verification"]["module_note"]


def test_compensation_gives_a_gate_its_mean():
    model, samples = Excited(), torch.randn(64, 3, 8, 8)
    graph, groups = analysed(model)
    plan = emptied(groups, "squeeze")
    keep = atoms_of(plan, groups)
    surgery = operate(graph, groups.types, keep, plan.tensors)
    (stand_in,) = surgery.stand_ins
    compensate(graph, groups.types, keep, surgery, samples_of(samples, graph))
    with torch.no_grad():
        gate = model.excite(model.squeeze(model.expand(model.stem(samples)).relu().mean((2, 3))).relu())
    torch.testing.assert_close(surgery.module.get_parameter(stand_in.name).flatten(), gate.mean(0), rtol=1e-4, atol=1e-5)


def test_files_hold_the_model_without_the_branch(tmp_path: Path):
    result = realised(Residual(), "blocks.0.conv1")
    result.save(tmp_path / "small")
    torch.testing.assert_close(sp.load(tmp_path / "small")(IMAGE), result.model(IMAGE))
    assert Plan.load(tmp_path / "small" / "plan.json").tensors["blocks.0.conv1.weight"].keep[0] == ()
    replayed = sp.apply(Residual(), result.plan)
    torch.testing.assert_close(replayed(IMAGE), result.model(IMAGE))
    sp.verify(Residual(), result.model, result.plan)


def test_verification_notices_another_constant():
    graph, groups = analysed(Residual())
    plan = emptied(groups, "blocks.0.conv1")
    keep = atoms_of(plan, groups)
    surgery = operate(graph, groups.types, keep, plan.tensors)
    (stand_in,) = surgery.stand_ins
    verify(graph, groups.types, keep, surgery.module, exact={stand_in.name: stand_in.exact})
    wrong = stand_in.exact.clone()
    wrong[0, 0] *= 1 + 1e-6
    with pytest.raises(VerificationError):
        verify(graph, groups.types, keep, surgery.module, exact={stand_in.name: wrong})
    surgery.module.get_parameter(stand_in.name).data[0, 0] *= 1 + 1e-4
    with pytest.raises(VerificationError):
        verify(graph, groups.types, keep, surgery.module)


# -------------------------------------------------------------------------------------------------------------------- decisions


def test_what_a_branch_loses_is_measured_with_its_mean_in_its_place():
    model = Residual()
    graph, groups = analysed(model)
    found = saliency(graph, groups, samples=samples_of(torch.randn(32, 3, 8, 8), graph))
    assert set(found.branches) == {groups[f"blocks.{i}.conv1"].atom for i in range(2)}
    for name in ("blocks.0.conv1", "blocks.1.conv1"):
        assert 0 < found.losses[name][0] < np.inf
    silent = copy.deepcopy(model)
    silent.blocks[1].bn2.weight.data.zero_()  # nothing but a constant comes of it
    graph, groups = analysed(silent)
    losses = saliency(graph, groups, samples=samples_of(torch.randn(32, 3, 8, 8), graph)).losses
    assert losses["blocks.1.conv1"][0] < 1e-6 < losses["blocks.0.conv1"][0]


def test_a_branch_goes_where_that_pays_and_only_whole():
    """Against all combinations of widths, in which groups that go together keep nothing together or not at all."""
    graph, groups = analysed(Excited())
    whole = branches(graph, groups)
    atoms = {g.name: g.atom for g in groups}
    scores = {g.name: np.ones(g.size) for g in groups}
    paid = 0
    for seed in range(8):
        random = np.random.default_rng(seed)
        losses = {g.name: np.concatenate([[random.uniform(0, 2)], np.sort(random.uniform(0, 2, g.size))[::-1]]) for g in groups}
        for g in groups:
            losses[g.name][-1] = 0
        steps = {g.atom: g.size // 4 for g in groups}
        found = allocate(groups, parse_target("macs=0.6"), scores, steps=steps, losses=losses, branches=whole)
        nothing = {name for name, atom in atoms.items() if not found.widths[atom]}
        assert nothing <= {"expand", "squeeze"} and ("expand" not in nothing or "squeeze" in nothing)
        options = [[*range(steps[g.atom], g.size + 1, steps[g.atom]), *([0] if g.atom in whole else [])] for g in groups]
        possible = [dict(zip(atoms.values(), widths, strict=True)) for widths in itertools.product(*options)]
        possible = [w for w in possible if (w[atoms["expand"]] or not w[atoms["squeeze"]]) and groups.macs(w) <= 0.6 * groups.macs()]
        best = min(sum(losses[name][w[atom]] for name, atom in atoms.items()) for w in possible)
        assert found.loss <= best * 1.02 + 1e-9
        paid += bool(nothing)
    assert 0 < paid < 8


def test_compensation_gives_the_stand_in_the_mean_of_what_is_missing():
    model, samples = Residual((1,)), torch.randn(64, 3, 8, 8)
    graph, groups = analysed(model)
    plan = emptied(groups, "blocks.0.conv1")
    keep = atoms_of(plan, groups)
    surgery: Surgery = operate(graph, groups.types, keep, plan.tensors)
    (stand_in,) = surgery.stand_ins
    (fitted,) = [f for f in compensate(graph, groups.types, keep, surgery, samples_of(samples, graph)) if f.name == stand_in.name]
    block = model.blocks[0]
    with torch.no_grad():
        answer = block.bn2(block.conv2(block.bn1(block.conv1(model.stem(samples))).relu()))
        torch.testing.assert_close(surgery.module.get_parameter(fitted.name)[0, :, 0, 0], answer.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert fitted.after < fitted.before


def test_compress_lets_a_branch_go_that_does_nothing():
    model = Residual()
    model.blocks[1].bn2.weight.data.zero_()
    result = sp.compress(model, IMAGE, "macs=0.6", calibration=torch.randn(64, 3, 8, 8))
    kept = {g.name: len(g.keep) for g in result.plan.groups}
    assert kept["blocks.1.conv1"] == 0 < kept["blocks.0.conv1"]
    with torch.no_grad():
        assert type(result.model) is Residual
        dense = model(IMAGE)
        assert (result.model(IMAGE) - dense).abs().max() < 0.5 * dense.abs().max()
