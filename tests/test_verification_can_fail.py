"""A check that cannot fail is no check: small models are spoiled in every place, and each time `verify` must see it.

Some changes cannot be seen because they change nothing (another order of the kept channels, the bias of attention keys): these pass.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Of
from torch import Tensor, fx, nn

import structprune as sp
from structprune.analysis.groups import Groups, find_groups
from structprune.decide.plan import atoms_of, cuts, planned
from structprune.errors import PlanError, VerificationError
from structprune.frontends.trace import trace
from structprune.ir.axes import Keep
from structprune.ir.graph import Graph
from structprune.ir.operators import operator_name
from structprune.ir.plan import Cut, Plan, PlannedGroup
from structprune.ir.traced import TracedModule
from structprune.ops import RULES
from structprune.transform import reference
from structprune.transform import verify as verification
from structprune.transform.surgery import operate
from structprune.transform.verify import Verification, verify

torch.set_num_threads(1)

# ---------------------------------------------------------------------------------------------------------------- models


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def residual() -> tuple[nn.Module, Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.leaky_relu(m.bn1(m.stem(x)), 0.1)
        x = x + m.bn3(m.conv2(F.silu(m.bn2(m.conv1(x)))))
        return m.head(F.max_pool2d(x, 2).flatten(1))

    layers = {"stem": conv(3, 8), "bn1": nn.BatchNorm2d(8), "conv1": conv(8, 6, bias=False), "bn2": nn.BatchNorm2d(6)}
    return Of(run, **layers, conv2=conv(6, 8), bn3=nn.BatchNorm2d(8), head=nn.Linear(8 * 9, 4)), torch.randn(2, 3, 6, 6)


def grouped() -> tuple[nn.Module, Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.grouped(m.stem(x)))
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.head(m.depthwise(x))

    layers = {"stem": conv(3, 12), "grouped": conv(12, 16, groups=4), "norm": nn.GroupNorm(4, 16), "depthwise": conv(16, 16, groups=16)}
    return Of(run, **layers, head=conv(16, 3)), torch.randn(2, 3, 5, 5)


def joined() -> tuple[nn.Module, Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.a(x), m.b(x)], 1)
        first, second, third = F.elu(x).split([3, 5, 4], 1)
        value, gate = m.c(torch.cat([third, first], 1)).chunk(2, 1)
        return m.head(torch.cat([F.pad(value * torch.sigmoid(gate), (0, 0, 0, 0, 0, 2)), second, x[:, 2:7]], 1))

    return Of(run, a=conv(3, 5), b=conv(3, 7), c=conv(7, 12), head=conv(18, 3)), torch.randn(2, 3, 5, 5)


def attention() -> tuple[nn.Module, Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(m.embed(x)).reshape(-1, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return m.head(F.scaled_dot_product_attention(q, k, v, attn_mask=m.table).transpose(1, 2).flatten(2))

    layers = {"embed": nn.Linear(7, 6), "qkv": nn.Linear(6, 36), "head": nn.Linear(12, 3), "table": nn.Parameter(torch.randn(3, 5, 5))}
    return Of(run, **layers), torch.randn(2, 5, 7)


def recurrent() -> tuple[nn.Module, Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.second(m.first(x)[0])[0]))

    first, second = nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True), nn.GRU(8, 6, batch_first=True)
    return Of(run, first=first, second=second, head=nn.Linear(6, 3)), torch.randn(2, 6, 5)


def transformer() -> tuple[nn.Module, Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x) + m.position
        q, k, v = (t.view(-1, 5, 2, 4).transpose(1, 2) for t in (m.q(m.norm1(x)), m.k(m.norm1(x)), m.v(m.norm1(x))))
        weights = (q @ k.transpose(-2, -1) * 4**-0.5).softmax(-1)
        x = x + m.out((weights @ v).transpose(1, 2).reshape(-1, 5, 8))
        return m.head(m.norm2(x + m.down(F.gelu(m.up(m.norm2(x))))).mean(1))

    layers: dict[str, Any] = {name: nn.Linear(6, 8) for name in "qkv"}
    layers |= {"embed": nn.Linear(7, 6), "position": nn.Parameter(torch.randn(1, 5, 6)), "norm1": nn.LayerNorm(6), "norm2": nn.RMSNorm(6)}
    return Of(run, **layers, out=nn.Linear(8, 6), up=nn.Linear(6, 10), down=nn.Linear(10, 6), head=nn.Linear(6, 3)), torch.randn(2, 5, 7)


MODELS = {function.__name__: function for function in (residual, grouped, joined, attention, recurrent, transformer)}


class Case(NamedTuple):
    """A model with a right plan that keeps at least two channels of every group and removes at least one."""

    graph: Graph
    groups: Groups
    keep: Keep
    plan: Plan

    def small(self, tensors: Mapping[str, Cut] | None = None, keep: Keep | None = None) -> TracedModule:
        return operate(self.graph, self.groups.types, keep or self.keep, self.plan.tensors if tensors is None else tensors).module

    def verify(self, small: fx.GraphModule) -> Verification:
        return verify(self.graph, self.groups.types, self.keep, small)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.small().state_dict())


def made(build: Callable[[], tuple[nn.Module, Tensor]]) -> Case:
    torch.manual_seed(0)
    model, inputs = build()
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5) if name.endswith("running_var") else tensor.add_(0.3 * torch.randn_like(tensor))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes")  # torch.export, of the list of weights that a recurrent layer keeps
        graph = trace(model, (inputs,))
    groups = find_groups(graph)
    random = np.random.default_rng(0)
    keep = {g.atom: np.sort(random.choice(g.size, max(2, g.size // 2), replace=False)) for g in groups if g.size > 2}
    return Case(graph, groups, keep, planned(groups, keep))


@cache
def case(name: str) -> Case:
    return made(MODELS[name])


every_model = pytest.mark.parametrize("name", MODELS)


def caught(case: Case, small: fx.GraphModule) -> bool:
    """Whether `verify` refuses a small model."""
    small.graph.lint()
    small.recompile()
    try:
        case.verify(small)
    except VerificationError:
        return True
    return False


@every_model
def test_the_right_small_model_passes(name: str):
    assert case(name).verify(case(name).small()).error < 1e-9


@every_model
def test_every_plan_removes_something_of_every_kind(name: str):
    """The tests below mean nothing for a plan that removes nothing."""
    known = case(name)
    assert all(len(known.keep[group.atom]) < group.size for group in known.groups if group.size > 2)
    assert len(known.keep) >= 2


# ------------------------------------------------------------------------------------------------------- wrong indices

CUTS = [(name, tensor, dim) for name in MODELS for tensor, cut in case(name).plan.tensors.items() for dim in cut.keep]
every_cut = pytest.mark.parametrize(("name", "tensor", "dim"), CUTS)


def unseen(name: str, tensor: str, dim: int, size: int) -> set[int]:
    """The entries that may be anything, for the model does not see them."""
    if (name, tensor) == ("transformer", "k.bias"):  # the bias of keys shifts all scores of a query alike, and a softmax does not see that
        return set(range(size))
    if (name, tensor) == ("attention", "qkv.bias"):
        return set(range(size // 3, 2 * size // 3))
    return {6, 7} if (name, tensor, dim) == ("joined", "head.weight", 1) else set()  # these read the zeros of a pad


def with_kept(cut: Cut, dim: int, kept: list[int]) -> Cut:
    return replace(cut, keep={**cut.keep, dim: tuple(kept)})


@every_cut
def test_a_removed_index_in_the_place_of_a_kept_one_is_caught(name: str, tensor: str, dim: int):
    known = case(name)
    cut = known.plan.tensors[tensor]
    kept = list(cut.keep[dim])
    removed = sorted(set(range(cut.shape[dim])) - set(kept))
    for place, index in enumerate(kept):
        wrong = [*kept[:place], removed[place % len(removed)], *kept[place + 1 :]]
        small = known.small({**known.plan.tensors, tensor: with_kept(cut, dim, wrong)})
        assert caught(known, small) is (index not in unseen(name, tensor, dim, cut.shape[dim])), f"entry {index}"


@every_cut
def test_two_kept_indices_in_the_wrong_order_are_caught(name: str, tensor: str, dim: int):
    known = case(name)
    cut = known.plan.tensors[tensor]
    kept = list(cut.keep[dim])
    for place in range(len(kept) - 1):
        wrong = [*kept[:place], kept[place + 1], kept[place], *kept[place + 2 :]]
        small = known.small({**known.plan.tensors, tensor: with_kept(cut, dim, wrong)})
        seen = {kept[place], kept[place + 1]} - unseen(name, tensor, dim, cut.shape[dim])
        assert caught(known, small) is bool(seen), f"entries {kept[place : place + 2]}"


@every_cut
def test_a_tensor_that_is_not_cut_is_caught(name: str, tensor: str, dim: int):
    known = case(name)
    cut = known.plan.tensors[tensor]
    rest = {d: kept for d, kept in cut.keep.items() if d != dim}
    assert caught(known, known.small({**known.plan.tensors, tensor: replace(cut, keep=rest)}))


@every_model
def test_another_order_of_the_channels_in_all_tensors_alike_changes_nothing(name: str):
    known = case(name)
    backwards = {atom: kept[::-1] for atom, kept in known.keep.items()}
    small = known.small(cuts(known.groups.axes, backwards), backwards)
    assert any(not torch.equal(a, b) for a, b in zip(small.state_dict().values(), known.tensors().values(), strict=True))
    assert known.verify(small).error < 1e-9


# -------------------------------------------------------------------------------------------------------- wrong values

VALUES = [(name, tensor) for name in MODELS for tensor, value in case(name).tensors().items() if value.is_floating_point()]
every_tensor = pytest.mark.parametrize(("name", "tensor"), VALUES)


@every_tensor
def test_a_little_noise_in_one_channel_is_caught(name: str, tensor: str):
    known = case(name)
    small = known.small()
    values = small.state_dict()[tensor]
    values[(0,) * (values.dim() - 1)] += 1e-3 * torch.randn(values.shape[-1], generator=torch.Generator().manual_seed(0))
    assert caught(known, small) is ((name, tensor) != ("transformer", "k.bias"))


@every_tensor
def test_rows_in_another_order_are_caught(name: str, tensor: str):
    known = case(name)
    small = known.small()
    values = small.state_dict()[tensor]
    dim = next(d for d, size in enumerate(values.shape) if size > 1)
    values.copy_(values.roll(1, dim))
    assert caught(known, small) is ((name, tensor) != ("transformer", "k.bias"))


@pytest.mark.parametrize(("name", "tensor"), [(n, t) for n, t in VALUES if "bias" in t or "running" in t])
def test_forgotten_biases_and_statistics_are_caught(name: str, tensor: str):
    known = case(name)
    small = known.small()
    small.state_dict()[tensor].fill_(1 if tensor.endswith("running_var") else 0)
    assert caught(known, small) is ((name, tensor) != ("transformer", "k.bias"))


@every_model
def test_weights_that_are_no_numbers_are_caught(name: str):
    small = case(name).small()
    next(small.parameters()).data.fill_(float("nan"))
    assert caught(case(name), small)


# -------------------------------------------------------------------------------------------------------- wrong graphs
#
# Every literal and every order of operands in every small graph is changed in turn. What survives is named below.


class Edit(NamedTuple):
    """A change of an argument of the node at a place in the graph: which argument, how, and the change itself."""

    place: int
    argument: str
    how: str
    change: Callable[[fx.Node], None]


# What changes nothing: arguments that only training or the device read, operands of a commutative operator, and others as noted.
HARMLESS = {
    "residual": {"batch_norm momentum": 3, "batch_norm cudnn_enabled": 3, "add self ↔ other": 1},
    "grouped": {"group_norm cudnn_enabled": 1},
    "joined": {"mul self ↔ other": 1, "slice dim": 2, "slice end": 1},  # the slice of the whole batch that x[:, 2:7] begins with
    "attention": {},
    "recurrent": {"lstm dropout": 1, "lstm train": 1, "gru dropout": 1, "gru train": 1, "lstm hx": 1},  # both initial states are zeros
    "transformer": {"layer_norm cudnn_enable": 3, "add self ↔ other": 3, "layer_norm bias": 1, "linear bias": 1},  # the biases of keys
}


def other_numbers(value: Any) -> Iterator[Any]:
    """Values near a literal argument."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1)
    elif isinstance(value, float):
        yield 1.5 * value + 1e-2
    elif isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        for i, number in enumerate(value):
            for other in other_numbers(number):
                yield [*value[:i], other, *value[i + 1 :]]
        if len(set(value)) > 1:
            yield list(reversed(value))


def edits(graph: fx.Graph) -> Iterator[Edit]:
    """Every number a little other, every pair of tensors swapped, every list of tensors backwards, every bias and mask left out."""
    for place, node in enumerate(graph.nodes):
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        names = [f"{operator_name(node)} {name}" for name in ([a.name for a in schema.arguments] if schema else ["of", "index"])]
        nodes = [i for i, value in enumerate(node.args) if isinstance(value, fx.Node)]
        for i, j in pairwise(nodes):
            yield Edit(place, f"{names[i]} ↔ {names[j].split()[-1]}", "", partial(swap, i=i, j=j))
        for key, value in [*enumerate(node.args), *node.kwargs.items()]:
            name = names[key] if isinstance(key, int) else f"{operator_name(node)} {key}"
            for other in other_numbers(value):
                yield Edit(place, name, f"{value} → {other}", partial(write, key=key, value=other))
            if isinstance(value, (list, tuple)) and len(set(value)) > 1 and all(isinstance(v, fx.Node) for v in value):
                yield Edit(place, name, "backwards", partial(turn, key=key))
            if isinstance(value, fx.Node) and name.split()[-1] in ("bias", "attn_mask"):
                yield Edit(place, name, "left out", partial(write, key=key, value=None))


def write(node: fx.Node, key: int | str, value: Any) -> None:
    node.update_arg(key, value) if isinstance(key, int) else node.update_kwarg(key, value)


def turn(node: fx.Node, key: int) -> None:
    node.update_arg(key, list(reversed(node.args[key])))


def swap(node: fx.Node, i: int, j: int) -> None:
    args = list(node.args)
    args[i], args[j] = args[j], args[i]
    node.args = tuple(args)


@every_model
def test_every_number_and_every_order_in_the_graph_matters(name: str):
    known = case(name)
    survivors: Counter[str] = Counter()
    every = list(edits(known.small().graph))
    for edit in every:
        small = known.small()
        edit.change(list(small.graph.nodes)[edit.place])
        if not caught(known, small):
            survivors[edit.argument] += 1
    assert len(every) > 25
    assert survivors <= Counter(HARMLESS[name])


# -------------------------------------------------------------------------------------------------------- wrong answers


def test_an_answer_of_another_number_of_tensors_is_caught():
    known = case("residual")
    small = known.small()
    output = next(n for n in small.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], output.args[0][0]),)
    assert caught(known, small)


ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "a second answer": lambda y: (y.new_ones(3), {"y": y}),
    "small beside large": lambda y: torch.cat([y, 1e9 * torch.ones_like(y)], 1),
    "masked by infinity": lambda y: y.masked_fill(torch.arange(5) == 0, -float("inf")),
    "masked by the smallest number": lambda y: y.masked_fill(torch.arange(5) == 0, torch.finfo(torch.float32).min),
    "indices": lambda y: y.topk(3).indices,
    "truth values": lambda y: y > 0,
    "complex numbers": lambda y: torch.complex(y, -y),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_wrong_weights_are_caught_in_answers_of_every_kind(answer: str):
    def build() -> tuple[nn.Module, Tensor]:
        return Of(lambda m, x: ANSWERS[answer](m.b(m.a(x))), a=nn.Linear(7, 8), b=nn.Linear(8, 5)), torch.randn(2, 7)

    known = made(build)
    known.verify(known.small())
    small = known.small()
    for parameter in (small.b.weight, small.b.bias):
        parameter.data.neg_()
    assert caught(known, small)


def test_units_that_only_a_few_samples_excite_are_checked():
    """A rectified unit is silent for half of all samples: what reads it must be compared on many."""

    def build() -> tuple[nn.Module, Tensor]:
        return Of(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(7, 12), b=nn.Linear(12, 3)), torch.randn(64, 7)

    known = made(build)
    for tensor, cut in known.plan.tensors.items():
        for dim, kept in cut.keep.items():
            removed = next(i for i in range(cut.shape[dim]) if i not in kept)
            for place, index in enumerate(kept):
                wrong = [*kept[:place], removed, *kept[place + 1 :]]
                small = known.small({**known.plan.tensors, tensor: with_kept(cut, dim, wrong)})
                assert caught(known, small), f"{tensor}, entry {index} of axis {dim}"


def test_an_operator_that_is_wrongly_taken_not_to_read_across_channels_gives_itself_away(monkeypatch: pytest.MonkeyPatch):
    def build() -> tuple[nn.Module, Tensor]:
        def run(m: Any, x: Tensor) -> Tensor:
            x = F.relu(m.a(x))
            return m.b(x) + x.sum(-1, keepdim=True)

        return Of(run, a=nn.Linear(7, 12), b=nn.Linear(12, 3)), torch.randn(4, 7)

    known = made(build)
    known.verify(known.small())
    monkeypatch.setattr(reference, "_ENTRY_BY_ENTRY", reference._ENTRY_BY_ENTRY | {"sum"})
    assert caught(known, known.small())


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.repeat_interleave(2, 1).transpose(-2, -1)).softmax(-1) @ v.repeat_interleave(2, 1)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("attend", [by_hand, fused])
def test_heads_that_are_left_out_answer_as_heads_that_are_zero(attend: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch):
    """Eight heads of queries, two to each head of keys and values."""

    def build() -> tuple[nn.Module, Tensor]:
        def run(m: Any, x: Tensor) -> Tensor:
            q, k, v = (layer(x).view(2, 5, -1, 3).transpose(1, 2) for layer in (m.q, m.k, m.v))
            return m.head(attend(q, k, v).transpose(1, 2).flatten(2))

        return Of(run, q=nn.Linear(7, 24), k=nn.Linear(7, 12), v=nn.Linear(7, 12), head=nn.Linear(24, 3)), torch.randn(2, 5, 7)

    known = made(build)

    def answer() -> Tensor:
        masked = reference.Masked(known.graph, known.groups.types, known.keep)
        return masked.run(*map(reference.in_double, known.graph.flat_inputs()), enable_io_processing=False)[0]

    alone = reference.Masked._alone
    left_out: list[Mapping[int, Tensor]] = []
    monkeypatch.setattr(reference.Masked, "_alone", lambda self, node: left_out.append(alone(self, node)) or left_out[-1])
    quick = answer()
    assert any(left_out)
    monkeypatch.setattr(reference.Masked, "_alone", lambda self, node: {})
    torch.testing.assert_close(quick, answer(), rtol=1e-12, atol=1e-12)


def test_a_norm_whose_groups_lose_unlike_numbers_of_channels_is_caught(monkeypatch: pytest.MonkeyPatch):
    """With a rule that lets each channel go by itself, the small model norms three channels of one group with one of the other."""

    def wrong(equations: Any, x: Any, num_groups: int, *parameters: Any) -> Any:
        for parameter in parameters[:2]:
            equations.equate(x[1], parameter[0])
        return x

    monkeypatch.setitem(RULES, "group_norm", wrong)
    torch.manual_seed(0)
    model = Of(lambda m, x: m.head(m.norm(m.a(x))), a=conv(3, 8), norm=nn.GroupNorm(2, 8), head=conv(8, 3)).eval()
    with torch.no_grad():
        model.a.weight[[3, 5, 6, 7]] *= 0.01
    with pytest.raises(VerificationError, match="differs from the reference"):
        sp.compress(model, torch.randn(2, 3, 6, 6), "channels=0.5")


@pytest.mark.parametrize(("pool", "sides"), [(nn.AdaptiveAvgPool2d(2), [64]), (nn.AvgPool2d(48), [64, 96])])
def test_of_heavy_pictures_a_smaller_one_is_compared_where_the_model_takes_it(pool: nn.Module, sides: list[int], monkeypatch: pytest.MonkeyPatch):
    def build() -> tuple[nn.Module, Tensor]:
        layers = {"a": conv(3, 6), "pool": pool, "head": nn.Linear(6 * 4, 3)}
        return Of(lambda m, x: m.head(m.pool(F.relu(m.a(x))).flatten(1)), **layers), torch.randn(2, 3, 96, 96)

    compared = []
    original = verification._compared
    monkeypatch.setattr(verification, "_WORK", 1_000_000)
    monkeypatch.setattr(verification, "_compared", lambda *args: compared.append(args[4][0].shape[-1]) or original(*args))
    known = made(build)
    known.verify(known.small())
    assert compared == sides
    for tensor, cut in known.plan.tensors.items():
        for dim, kept in cut.keep.items():
            small = known.small({**known.plan.tensors, tensor: with_kept(cut, dim, [*kept[1:], kept[0]])})
            assert caught(known, small), f"{tensor}, axis {dim}"


# --------------------------------------------------------------------------------------------------------- wrong plans


def of_group(plan: Plan, **changes: Any) -> Plan:
    """The plan with the first group that shrinks changed."""
    return replace(plan, groups=tuple(replace(g, **changes) if g is shrinking(plan) else g for g in plan.groups))


def shrinking(plan: Plan) -> PlannedGroup:
    return next(g for g in plan.groups if len(g.keep) < g.channels)


def of_tensor(plan: Plan, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Plan:
    """The plan with the first indices of its first tensor changed."""
    name, cut = next(iter(plan.tensors.items()))
    dim, kept = next(iter(cut.keep.items()))
    return replace(plan, tensors={**plan.tensors, name: replace(cut, keep={**cut.keep, dim: change(kept)})})


BROKEN: dict[str, tuple[Callable[[Plan, PlannedGroup], Plan], str]] = {
    "an index out of range": (lambda plan, group: of_group(plan, keep=(*group.keep, group.channels)), "keeps no ascending indices"),
    "a negative index": (lambda plan, group: of_group(plan, keep=(-1, *group.keep)), "keeps no ascending indices"),
    "indices that descend": (lambda plan, group: of_group(plan, keep=group.keep[::-1]), "keeps no ascending indices"),
    "an index twice": (lambda plan, group: of_group(plan, keep=(group.keep[0], *group.keep)), "keeps no ascending indices"),
    "no channel left": (lambda plan, group: of_group(plan, keep=()), "do not follow from its groups"),
    "a group of another size": (lambda plan, group: of_group(plan, channels=group.channels + 1), "is not in this model"),
    "a group of another model": (lambda plan, group: of_group(plan, name="elsewhere"), "'elsewhere' .* is not in this model"),
    "a group left out": (lambda plan, group: replace(plan, groups=tuple(g for g in plan.groups if g is not group)), "do not follow from its groups"),
    "a group that keeps more than its tensors": (lambda plan, group: of_group(plan, keep=tuple(range(group.channels))), "do not follow"),
    "a tensor that keeps another index": (lambda plan, group: of_tensor(plan, lambda kept: (*kept[:-1], kept[-1] + 1)), "do not follow"),
    "a tensor in another order": (lambda plan, group: of_tensor(plan, lambda kept: kept[::-1]), "do not follow"),
    "a tensor left out": (lambda plan, group: replace(plan, tensors=dict(list(plan.tensors.items())[1:])), "do not follow"),
    "a tensor of another model": (lambda plan, group: replace(plan, tensors={**plan.tensors, "elsewhere": Cut((2,), {0: (1,)})}), "elsewhere"),
}


@pytest.mark.parametrize("how", BROKEN)
@every_model
def test_plans_that_contradict_themselves_or_the_model_are_refused(name: str, how: str):
    known = case(name)
    spoil, message = BROKEN[how]
    with pytest.raises(PlanError, match=message):
        atoms_of(spoil(known.plan, shrinking(known.plan)), known.groups)


@every_model
def test_right_plans_are_accepted(name: str):
    known = case(name)
    keep = atoms_of(known.plan, known.groups)
    assert {atom: kept.tolist() for atom, kept in keep.items()} == {atom: kept.tolist() for atom, kept in known.keep.items()}
