"""Readers in one form, moments, losses of widths, and weights fitted to samples: each against what plain torch computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structprune as sp
from structprune import processes
from structprune.calibrate.arrivals import arrivals
from structprune.calibrate.divergence import divergence
from structprune.calibrate.moments import moments
from structprune.calibrate.readers import from_matrix, matrix, readers, rows_of_answer, rows_of_input
from structprune.calibrate.stepping import Stepping
from structprune.decide.reconstruction import reconstruction
from structprune.decide.saliency import saliency
from structprune.errors import InputError
from structprune.frontends.samples import samples_of
from structprune.ir.samples import Samples, held_back

READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (3, 4, 11)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (3, 4), padding="same", bias=False), (2, 4, 6, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 4, 3, groups=4, stride=(2, 1), padding=(1, 0)), (2, 8, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 4, 3)),
    "transposed grouped": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2, dilation=2), (2, 4, 5)),
    "product": (lambda: models.Of(lambda m, x: x @ m.w + m.b, w=nn.Parameter(torch.randn(6, 5)), b=nn.Parameter(torch.zeros(5))), (4, 3, 6)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_is_its_matrix_times_its_rows(name: str) -> None:
    torch.manual_seed(0)
    make, shape = READERS[name]
    model, x = make().eval(), torch.randn(shape)
    graph = sp.trace(model, (x,))
    (reader,) = readers(graph).values()
    run = Stepping(graph.module, [graph.flat_inputs()])
    with torch.no_grad():
        while run.upcoming is not None and run.upcoming is not reader.node:
            run.step()
        (answer,) = run.compute(reader.node)
        weight = graph.tensor(reader.weight)
        read = rows_of_input(reader, run.values[0][reader.input], weight.shape[2:], answer.shape[2:] if reader.rank else (), None)
        product = read @ matrix(reader, weight).transpose(1, 2)
        bias = 0 if reader.bias is None else graph.tensor(reader.bias).reshape(reader.groups, 1, -1)
        torch.testing.assert_close(product + bias, rows_of_answer(reader, answer, None), rtol=1e-4, atol=1e-5)
    assert torch.equal(from_matrix(reader, matrix(reader, weight), weight), weight)


def test_tied_weights_are_no_readers() -> None:
    shared = nn.Linear(4, 4)
    model = models.Of(lambda m, x: m.c(m.a(m.a(x))), a=shared, c=nn.Linear(4, 2))
    graph = sp.trace(model, (torch.randn(2, 4),))
    assert [graph.aliases[str(r.weight.target)][0] for r in readers(graph).values()] == ["c.weight"]


# --- compensation ------------------------------------------------------------------------------------------------------------


class Redundant(nn.Module):
    """Twelve hidden channels of which any four give the other eight, by fixed mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 3, padding=1)
        with torch.no_grad():
            basis = torch.randn(4, 3, 1, 1)
            self.a.weight.copy_(torch.einsum("ij,jkyx->ikyx", torch.randn(12, 4), basis))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_channels_that_others_can_stand_in_for_go_without_a_loss() -> None:
    torch.manual_seed(0)
    model, x = Redundant().eval(), torch.randn(64, 3, 6, 6)
    pruned = sp.compress(model, (x[:2],), "channels=0.34", calibration=x, compensate=False)
    fitted = sp.compress(model, (x[:2],), "channels=0.34", calibration=x)
    fresh = torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        wanted = model(fresh)
        off = [float((r.model(fresh) - wanted).square().mean() / wanted.var()) for r in (pruned, fitted)]
    assert fitted.model.a.weight.shape[0] == 4
    assert off[0] > 0.05 and off[1] < 1e-4
    assert pruned.plan.tensors == fitted.plan.tensors
    assert fitted.report.data["verification"]["masked_error"] <= 1e-8  # of the weights as they were sliced


@pytest.mark.parametrize("name", ["residual", "hard_coded", "attention", "joined"])
def test_fitted_models_are_nearer_to_the_dense_one(name: str) -> None:
    model, inputs = models.build(name)
    torch.manual_seed(1)
    samples, fresh = (torch.randn(256, *inputs[0].shape[1:]) for _ in range(2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned, fitted = (sp.compress(model, inputs, "channels=0.6", calibration=samples, compensate=c) for c in (False, True))
    with torch.no_grad():
        wanted = model(fresh)
        worse, better = (float((r.model(fresh) - wanted).square().mean()) for r in (pruned, fitted))
    assert better < 0.7 * worse
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.allclose(fitted.small(fresh), fitted.model(fresh), atol=1e-5)  # the user's class has the fitted weights too
    layers = fitted.report.data["compensation"]
    assert layers and all(layer["after"] <= layer["before"] * (1 + 1e-6) for layer in layers)


def test_the_fit_of_one_layer_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    model = models.Of(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3)).eval()
    x = torch.randn(4000, 4)
    result = sp.compress(model, (x[:2],), "channels=0.5", calibration=x, criterion="l2")
    keep = list(result.plan.groups[0].keep)
    with torch.no_grad():
        hidden = F.relu(model.a(x))
        read = torch.cat([hidden[:, keep], torch.ones(len(x), 1)], 1).double()
        best = torch.linalg.lstsq(read, model(x).double()).solution
        left = (read @ best - model(x)).square().mean()
        mine = (result.model(x).double() - model(x)).square().mean()
    assert float(left) <= float(mine) <= 1.01 * float(left)


def test_buffers_that_the_model_writes_to_stay_as_they_are() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return m.b(F.relu(m.a(x)) + 0 * m.calls)

    torch.manual_seed(0)
    model, x = models.Of(run, a=nn.Linear(6, 16), b=nn.Linear(16, 3), calls=torch.zeros(1)).eval(), torch.randn(64, 6)
    result = sp.compress(model, (x[:2],), "channels=0.5", calibration=x)
    assert float(model.calls) == 0 == float(result.small.calls)


def test_too_few_samples_do_no_harm() -> None:
    """Eight rows of noise for a layer of 64 inputs: fitted exactly, they would spoil it."""
    torch.manual_seed(0)
    model = models.Of(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=nn.Linear(16, 64), b=nn.Linear(64, 64), c=nn.Linear(64, 8)).eval()
    x, fresh = torch.randn(8, 16), torch.randn(2000, 16)
    pruned, fitted = (sp.compress(model, (x[:2],), "channels=0.7", calibration=x, criterion="l2", compensate=c) for c in (False, True))
    with torch.no_grad():
        worse, better = (float((r.model(fresh) - model(fresh)).square().mean()) for r in (pruned, fitted))
    assert better < 1.3 * worse


@pytest.mark.parametrize(("later", "weight"), [(1.0, 1.5), (-0.2, 1.0)])
def test_what_one_half_of_the_samples_teaches_must_hold_in_the_other(later: float, weight: float) -> None:
    """Of two channels the one that goes is `later` times the other in the half that is held back, and equal to it in the rest."""
    model = models.Of(lambda m, x: m.b(m.a(x)), a=nn.Linear(2, 2, bias=False), b=nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model.a.weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        model.b.weight.fill_(1.0)
    held = held_back(512, 1 / 2)
    t = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([t, t * torch.tensor([[later if n in held else 1.0] for n in range(512)])], 1)
    result = sp.compress(model, (x[:2],), "channels=0.5", calibration=x, criterion="l2")
    assert result.plan.groups[0].keep == (0,)
    assert result.model.b.weight.item() == pytest.approx(weight, abs=1e-3)


def test_a_convolution_without_a_bias_leaves_the_constant_to_its_batch_norm() -> None:
    model, inputs = models.build("residual")
    torch.manual_seed(1)
    samples = torch.randn(128, 3, 8, 8) + 1
    pruned, fitted = (sp.compress(model, inputs, "channels=0.5", calibration=samples, compensate=c) for c in (False, True))
    moved = fitted.model.norm1.running_mean - pruned.model.norm1.running_mean
    assert moved.abs().max() > 1e-3
    assert torch.equal(fitted.model.norm1.running_var, pruned.model.norm1.running_var)


# --- which channels, and how many ----------------------------------------------------------------------------------------------


def test_the_order_of_channels_and_its_losses_are_those_of_optimal_brain_surgeon() -> None:
    """Against the definition: least squares over what is left, channel by channel."""
    torch.manual_seed(0)
    model = models.Of(lambda m, x: m.b(m.a(x)), a=nn.Linear(10, 6), b=nn.Linear(6, 2)).eval()
    x = torch.randn(2000, 10)
    graph = sp.trace(model, (x[:2],))
    groups = sp.find_groups(graph)
    found = moments(graph, samples_of(x, graph))
    curve = reconstruction(groups, found)["a"]
    (wanted,) = [m for m in found.values() if m.weight.shape[-1] == 6]
    gram, weight = wanted.gram[0], wanted.weight[0]

    def loss(kept: list[int]) -> float:
        gone = [i for i in range(6) if i not in kept]
        rest = gram[gone][:, gone] - gram[gone][:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept][:, gone]) if kept else gram
        return float(torch.trace(weight[:, gone] @ rest @ weight[:, gone].T))

    kept = list(range(6))
    for number in range(5):
        cheapest = min(kept, key=lambda c: loss([k for k in kept if k != c]))
        assert curve.order[number] == cheapest
        kept.remove(cheapest)
        np.testing.assert_allclose(curve.losses[len(kept)], loss(kept), rtol=0.05)
    assert curve.losses[6] == 0 and (np.diff(curve.losses) <= 0).all()


def test_a_channel_that_repeats_another_goes_first() -> None:
    torch.manual_seed(0)
    model = models.Of(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        model.a.weight[5], model.a.bias[5] = 3 * model.a.weight[2], 3 * model.a.bias[2]
    x = torch.randn(64, 3, 9, 9)
    result = sp.compress(model, (x[:2],), "channels=0.875", calibration=x)
    assert not {2, 5} <= set(result.plan.groups[0].keep) and len(result.plan.groups[0].keep) == 7


def test_samples_are_spread_over_all_and_cut_between_neighbours() -> None:
    samples = Samples([[torch.arange(first, first + size), 7] for first, size in ((0, 5), (5, 1), (6, 6))], [torch.zeros(n) for n in (5, 1, 6)])

    def numbers(of: Samples) -> list[int]:
        assert of.labels is not None and [len(label) for label in of.labels] == [len(batch[0]) for batch in of.batches]
        return [int(n) for batch in of.batches for n in batch[0]]

    whole = replace(samples, divisible=False)
    assert numbers(samples.spread(4)) == [0, 3, 6, 9] and numbers(samples.spread(0)) == [0] and samples.spread(12) is samples
    assert numbers(whole.spread(7)) == numbers(samples)[:5] and samples.spread(3).batches[0][1] == 7
    seen, held_out = samples.cut(0.75)
    assert (numbers(seen), numbers(held_out)) == ([0, 1, 2, 3, 4, 6, 7, 8, 9, 10], [5, 11])
    many = Samples([[torch.arange(64)]])
    assert many.cut(0.75)[1].batches[0][0].tolist() == [*range(24, 32), *range(56, 64)]
    assert [len(part.batches) for part in whole.cut(0.75)] == [2, 1]
    alone = Samples([[torch.zeros(4)]], divisible=False)
    assert alone.cut(0.75) == (alone, alone)


def narrowing() -> tuple[nn.Module, Tensor]:
    """Large pictures of few channels first, small ones of more channels later; 100 samples."""
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 8, 3, stride=2), "b": nn.Conv2d(8, 16, 3, stride=2), "c": nn.Conv2d(16, 24, 3, stride=2), "d": nn.Linear(24, 5)}
    model = models.Of(lambda m, x: m.d(F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))).mean((2, 3))), **layers).eval()
    return model, torch.randn(100, 3, 31, 31)


def test_no_process_that_shares_the_work_starts_without_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.Of(lambda m, x: m.a(x).reshape(40, -1), a=nn.Linear(8, 4)).eval()
    graph = sp.trace(model, (torch.randn(40, 8),))
    assert not graph.dynamic_batch
    samples = Samples([[torch.full((40, 8), float(n))] for n in range(5)], divisible=False)
    monkeypatch.setattr(processes, "sharers", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        joining = arrivals(graph, samples, memory=1.0)  # room for less than one batch
        assert joining[next(iter(graph.nodes))], "it would wait for sums that the others never add up"
        seen += [one.batch[0][0, 0].item() for some in joining.values() for one in some]
    assert len(set(seen)) == len(seen) >= 2


def test_samples_join_where_there_is_room_for_their_values() -> None:
    model, x = narrowing()
    graph = sp.trace(model, (x[:2],))
    samples, limit = samples_of(torch.arange(100.0)[:, None, None, None].expand_as(x), graph), 20.0 * 4 * 8 * 15 * 15 * 2
    joining = arrivals(graph, samples, limit)
    places, numbers, firsts = [], [], []
    for node, some in joining.items():
        places.append(list(graph.nodes).index(node))
        numbers.append(sorted(int(n) for one in some for n in one.batch[0][:, 0, 0, 0]))
        firsts += [(one.first, int(n)) for one in some for n in one.batch[0][:, 0, 0, 0]]
    assert places[0] == 0 and places == sorted(places) and len(places) > 1
    assert 16 <= len(numbers[0]) <= 32 and max(b - a for a, b in pairwise(numbers[0])) <= 8  # evenly spread
    assert sorted(n for some in numbers for n in some) == list(range(100))  # each once
    assert all(first == (number not in held_back(100, 1 / 2)) for first, number in firsts)

    run, most = Stepping(graph.module), 0
    while (node := run.upcoming) is not None:
        late = joining.get(node, [])
        run.join(one.batch for one in late)
        run.step()
        held = {v.untyped_storage().data_ptr(): v.nbytes for values in run.values for n, v in values.items() if n.op == "call_function"}
        most = max(most, sum(held.values()))
        run.forget(node)
    assert 0.5 * limit < most <= limit


@pytest.mark.parametrize("joins", [1, 4, 7])
def test_batches_that_join_late_see_what_the_others_saw(joins: int) -> None:
    model, x = narrowing()
    graph = sp.trace(model, (x[:2],))
    run, place, answer = Stepping(graph.module, [[x[:3]]]), 0, None
    with torch.no_grad():
        while (node := run.upcoming) is not None:
            if place == joins:
                run.join([[x[3:9]]])
            answer = run.step()
            run.forget(node)
            place += 1
        torch.testing.assert_close(answer[0], model(x[3:9]))


def test_few_samples_at_a_time_fit_a_model_as_all_at_once_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = narrowing()
    fresh = torch.randn(64, 3, 31, 31)

    def off(**options: Any) -> float:
        with torch.no_grad():
            return float((sp.compress(model, (x[:2],), "channels=0.5", calibration=x, **options).model(fresh) - model(fresh)).square().mean())

    all_at_once, sliced = off(), off(compensate=False)
    monkeypatch.setattr("structprune.recovery.compensate.MEMORY", 20.0 * 4 * 8 * 15 * 15 * 2)
    assert all_at_once < off() < 0.5 * (all_at_once + sliced)


def test_widths_go_where_the_samples_say_that_little_is_lost() -> None:
    """Two branches of the same shape; the answer hardly depends on one of them."""
    torch.manual_seed(0)

    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(F.relu(m.a(x))) + 0.01 * m.d(F.relu(m.b(x)))

    layers = {name: nn.Linear(16, 64) for name in "ab"} | {name: nn.Linear(64, 8) for name in "cd"}
    model, x = models.Of(run, **layers).eval(), torch.randn(512, 16)
    kept = {g.name: len(g.keep) for g in sp.compress(model, (x[:2],), "macs=0.6", calibration=x).plan.groups}
    assert kept["a"] == 64 and kept["b"] < 20
    blind = {g.name: len(g.keep) for g in sp.compress(model, (x[:2],), "macs=0.6", allocation="milp").plan.groups}
    assert abs(blind["a"] - blind["b"]) <= 16


def test_measured_losses_fall_with_the_width_and_end_at_nothing() -> None:
    model, inputs = models.build("attention")
    torch.manual_seed(1)
    graph = sp.trace(model, inputs)
    groups = sp.find_groups(graph)
    known = saliency(graph, groups, samples=samples_of(torch.randn(64, 5, 12), graph))
    assert known.losses is not None and known.losses.keys() == {g.name for g in groups}
    for group in groups:
        curve = known.losses[group.name]
        assert curve.shape == (group.size + 1,) and curve[-1] == 0 and np.isfinite(curve).all()
        assert (np.diff(curve[1:]) <= 0).all() and (curve[0] > 0 or group.atom not in known.branches)  # none may be better than few


def test_divergence_of_logits_and_of_other_answers() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 7), torch.randn(50, 7)
    wanted = F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean")
    assert divergence([b], [a]) == pytest.approx(float(wanted), rel=1e-5)
    assert divergence([a[:, None] + 1], [a[:, None]]) == pytest.approx(float(1 / (a - a.mean(0)).square().mean()), rel=1e-2)
    assert divergence([a], [a]) == 0


# --- what the user hands over ---------------------------------------------------------------------------------------------------


def test_forms_of_calibration_data() -> None:
    model, (x,) = models.build("residual")
    graph = sp.trace(model, (x,))
    labels = torch.tensor([0, 1])
    assert len(samples_of(torch.randn(70, 3, 8, 8), graph)) == 70
    assert len(samples_of([x, (x,), {graph.input_names[0]: x}], graph)) == 3 * len(x)
    for batch in ((x, labels), ((x,), labels), ({graph.input_names[0]: x}, labels)):
        found = samples_of([batch], graph)
        assert found.labels is not None and torch.equal(found.labels[0], labels) and torch.equal(found.batches[0][0], x)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no batch"),
        ([torch.randn(2, 3, 9, 8)], "x has shape 2x3x9x8, the model takes \\*x3x8x8"),
        ([torch.full((2, 3, 8, 8), float("nan"))], "not finite"),
        ([{"y": torch.randn(2, 3, 8, 8)}], "no input 'x'"),
        ([torch.randn(2, 3, 8, 8), (torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))], "labels for 1 of 2"),
        ([(torch.randn(2, 3, 8, 8),) * 3], "3 inputs"),
    ],
)
def test_bad_calibration_data_is_refused(data: list[Any], words: str) -> None:
    model, inputs = models.build("residual")
    with pytest.raises(InputError, match=words):
        sp.compress(model, inputs, calibration=data)


NODES = torch.randn(10, 6), torch.tensor([[0, 3, 9, 5, 9, 1], [1, 9, 2, 4, 8, 0]])


def messages(m: models.Of, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """A graph: its nodes are no samples, and what is told of all of them together is one row."""
    sent = m.message(x[edges[0]]).relu()
    received = torch.zeros(len(x), sent.shape[1]).index_add(0, edges[1], sent)
    return m.out(received), m.of_all(m.pooled(received.sum(0)).relu())


def covariance(m: models.Of, x: Tensor) -> Tensor:
    """Products of channels with each other (bilinear pooling)."""
    y = m.stem(x)
    return m.out((y @ y.transpose(1, 2)).flatten(1))


def on_a_grid(m: models.Of, x: Tensor) -> Tensor:
    """A list of constants, as `meshgrid` answers, behind a branch that may go whole."""
    y = m.stem(x)
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    return m.out(y + (m.up(m.down(y).relu()) + (rows + columns).flatten().view(1, 1, -1)))


def told_apart(m: models.Of, x: Tensor) -> Tensor:
    """Each sample beside the mean of its half of the batch (StyleGAN's discriminator): no batch of three will do."""
    y = m.stem(x).relu()
    return m.out((y.view(2, -1, *y.shape[1:]) - y.view(2, -1, *y.shape[1:]).mean(1, keepdim=True)).view(y.shape).mean(2))


ODD = {
    messages: ({"message": nn.Linear(6, 16), "out": nn.Linear(16, 3), "pooled": nn.Linear(16, 8), "of_all": nn.Linear(8, 2)}, NODES),
    covariance: ({"stem": nn.Conv1d(3, 8, 1), "out": nn.Linear(64, 4)}, (torch.randn(4, 3, 12),)),
    on_a_grid: ({n: nn.Conv1d(*w, 1) for n, w in {"stem": (3, 8), "down": (8, 8), "up": (8, 8), "out": (8, 4)}.items()}, (torch.randn(4, 3, 12),)),
    told_apart: ({"stem": nn.Conv1d(3, 16, 3), "out": nn.Linear(16, 4)}, (torch.randn(4, 3, 12),)),
}


@pytest.mark.parametrize("run", ODD, ids=lambda run: run.__name__)
def test_what_is_no_picture_calibrates_too(run: Callable[..., Any]) -> None:
    layers, inputs = ODD[run]
    batches = [inputs, *((torch.randn_like(inputs[0]), *inputs[1:]) for _ in range(3))]
    result = sp.compress(models.Of(run, **layers).eval(), inputs, "macs=0.6", calibration=batches)
    assert result.report.data["macs"]["after"] <= 0.6 * result.report.data["macs"]["before"]
    assert result.report.data["calibration"]["samples"] > len(batches)


def test_reconstruction_asks_for_samples() -> None:
    model, inputs = models.build("residual")
    with pytest.raises(InputError, match="--calibration"):
        sp.compress(model, inputs, criterion="reconstruction")


def test_evaluation_of_every_stage_is_in_the_report() -> None:
    model, inputs = models.build("residual")
    torch.manual_seed(1)
    asked: list[nn.Module] = []

    def evaluate(m: nn.Module) -> float:
        asked.append(m)
        return float(len(asked))

    result = sp.compress(model, inputs, "channels=0.5", calibration=torch.randn(64, 3, 8, 8), evaluate=evaluate)
    assert result.report.data["accuracy"] == {"before": 1.0, "pruned": 2.0, "after": 3.0}
    assert asked[0] is model and asked[2] is result.model
