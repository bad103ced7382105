"""Which channels a criterion keeps, checked against the definition on layers small enough to do by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import structprune as sp
from structprune.decide.criteria import NAMED, above, criterion_of
from structprune.decide.plan import best_channels, named_tensors
from structprune.errors import InputError
from structprune.ir.samples import Samples

RUNNABLE = [name for name, named in NAMED.items() if named.function is not None]
FROM_SAMPLES = [name for name in RUNNABLE if NAMED[name].needs != "nothing"]
FROM_GRADIENTS = ["gradient", "loss_gradient", "taylor", "fisher", "hessian"]
FROM_ACTIVATIONS = [name for name in NAMED if name.startswith("activation_")]


Scorer = Callable[..., dict[str, np.ndarray]]


def scorer(model: nn.Module, inputs: tuple[Tensor, ...]) -> Scorer:
    """criterion, seed, samples -> scores of one model, which is traced once."""
    graph = sp.trace(model, inputs)
    groups = sp.find_groups(graph)

    def score(choice: object, seed: int = 0, samples: Samples | None = None) -> dict[str, np.ndarray]:
        return dict(criterion_of(choice, model, seed, graph, samples)[1](groups, named_tensors(graph)))

    return score


def scores(choice: object, model: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0, samples: Samples | None = None) -> dict[str, np.ndarray]:
    return scorer(model, inputs)(choice, seed, samples)


def two_layers() -> tuple[nn.Sequential, list[Tensor], list[Tensor]]:
    """Seven hidden units, the third of them dead; three batches of inputs, and their labels of four classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0
    batches = [torch.randn(n, 5) for n in (6, 4, 2)]
    return model.eval(), batches, [torch.randint(0, 4, (len(x),)) for x in batches]


def samples_of(batches: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> Samples:
    return Samples([[x] for x in batches], labels)


def per_channel(values: Sequence[Tensor]) -> Tensor:
    """[hidden units] of `two_layers`: a number for each of its parameters, summed over those of each unit. The last bias is in no group."""
    first, bias, second = values[:3]
    return first.sum(1) + bias + second.sum(0)


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_sums_over_every_tensor_of_a_group(name: str, power: int) -> None:
    model, inputs = models.build("residual")
    found = scores(name, model, inputs)
    inner = model.conv1.weight.abs().pow(power).sum((1, 2, 3)) + model.conv2.weight.abs().pow(power).sum((0, 2, 3))
    stream = (
        model.stem.weight.abs().pow(power).sum((1, 2, 3))
        + model.conv1.weight.abs().pow(power).sum((0, 2, 3))
        + model.conv2.weight.abs().pow(power).sum((1, 2, 3))
        + model.head.weight.abs().pow(power).sum(0)
    )
    np.testing.assert_allclose(found["conv1"], inner.pow(1 / power).detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["stem"], stream.pow(1 / power).detach().numpy(), rtol=1e-5)


def test_magnitude_of_heads_and_their_width() -> None:
    model, inputs = models.build("attention")
    found = scores("l2", model, inputs)
    squares = model.qkv.weight.square().sum(1).reshape(3, 4, 8) + model.out.weight.square().sum(0).reshape(1, 4, 8) / 3
    np.testing.assert_allclose(found["qkv"], squares.sum((0, 2)).sqrt().detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["qkv#2"], squares.sum((0, 1)).sqrt().detach().numpy(), rtol=1e-5)


def test_batch_norm_scale() -> None:
    model, inputs = models.build("residual")
    found = scores("bn_scale", model, inputs)
    np.testing.assert_allclose(found["conv1"], model.norm1.weight.abs().detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["stem"], (model.norm0.weight.abs() + model.norm2.weight.abs()).detach().numpy(), rtol=1e-6)


def test_fpgm_sums_distances_of_all_coupled_weights() -> None:
    model, inputs = models.build("residual")
    rows = torch.cat([model.conv1.weight.flatten(1), model.conv2.weight.transpose(0, 1).flatten(1)], 1).detach().double()
    expected = (rows[:, None] - rows[None]).norm(dim=2).sum(1)
    np.testing.assert_allclose(scores("fpgm", model, inputs)["conv1"], expected.numpy(), rtol=1e-6)


def test_fpgm_of_heads() -> None:
    model, inputs = models.build("attention")
    out, into = model.qkv.weight.detach().double().reshape(3, 4, 8, 32), model.out.weight.detach().double().reshape(32, 4, 8)
    rows = torch.cat([out.permute(1, 0, 2, 3).flatten(1), into.permute(1, 0, 2).flatten(1)], 1)
    np.testing.assert_allclose(scores("fpgm", model, inputs)["qkv"], torch.cdist(rows, rows).sum(1).numpy(), rtol=1e-6)


def test_fpgm_gives_up_one_of_two_equals_before_an_outlier() -> None:
    model, batches, _ = two_layers()
    with torch.no_grad():
        for layer in (model[0].weight, model[0].bias, model[2].weight.T):
            layer[1], layer[5] = layer[0], layer[5] * 10
    found = scores("fpgm", model, (batches[0],))["0"]
    assert found.argmax() == 5
    assert found[0] == pytest.approx(found[1])


def test_lamp_by_its_definition() -> None:
    model, inputs = models.build("residual")
    squares = scores("l2", model, inputs)["conv1"] ** 2
    expected = [own / squares[squares >= own].sum() for own in squares]
    np.testing.assert_allclose(scores("lamp", model, inputs)["conv1"], expected, rtol=1e-9)


def test_lamp_of_equal_and_of_zero_channels() -> None:
    model, batches, _ = two_layers()
    nn.init.constant_(model[0].weight, 0)
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([0.0, 0, 1, 1, 1, 1, 2]).expand(4, 7))
    np.testing.assert_allclose(scores("lamp", model, (batches[0],))["0"], [0, 0, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 1])


# --- gradients ------------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model(x)), list(model.parameters())))


def test_gradient_is_of_the_squared_answer_sample_by_sample() -> None:
    model, batches, _ = two_layers()
    one_by_one = [gradients(model, lambda y: y.square().sum(), x[None]) for x in torch.cat(batches)]
    expected = torch.stack([per_channel([g.abs() for g in found]) for found in one_by_one]).mean(0)
    np.testing.assert_allclose(scores("gradient", model, (batches[0],), samples=samples_of(batches))["0"], expected.numpy(), rtol=1e-4)


def test_loss_gradient_and_taylor_take_batches_by_their_size() -> None:
    model, batches, labels = two_layers()
    weights = [p.detach() for p in model.parameters()]
    slopes, changes = torch.zeros(7), torch.zeros(7)
    for x, label in zip(batches, labels, strict=True):
        found = gradients(model, lambda y, label=label: F.cross_entropy(y, label), x)
        slopes += len(x) / 12 * per_channel([g.abs() for g in found])
        changes += len(x) / 12 * per_channel([g * w for g, w in zip(found, weights, strict=True)]).abs()
    score, samples = scorer(model, (batches[0],)), samples_of(batches, labels)
    np.testing.assert_allclose(score("loss_gradient", samples=samples)["0"], slopes.numpy(), rtol=1e-4)
    np.testing.assert_allclose(score("taylor", samples=samples)["0"], changes.numpy(), rtol=1e-4)


def test_taylor_predicts_what_the_loss_loses() -> None:
    """Of a loss that is linear in a channel's weights, the first order is exact; a dead channel changes nothing."""
    model, batches, labels = two_layers()
    model[0].requires_grad_(False)
    found = scores("taylor", model, (batches[0],), samples=samples_of(batches[:1], labels[:1]))["0"]
    assert found[2] == 0 and (np.delete(found, 2) > 0).all()
    scale = torch.ones(7, requires_grad=True)
    loss = F.cross_entropy(model[2](model[1](model[0](batches[0])) * scale), labels[0])
    (slope,) = torch.autograd.grad(loss, scale)
    np.testing.assert_allclose(found, 2 * slope.abs().numpy(), rtol=1e-4)  # what goes into a unit and what comes out scale it alike


def test_fisher_of_labels_and_of_the_models_own_predictions() -> None:
    model, batches, labels = two_layers()
    weights = [p.detach() for p in model.parameters()]

    def expected(chances: Callable[[Tensor, int], Tensor]) -> Tensor:
        """½ Σ w² E g², with the chance of each class, given the answer and the number of the sample."""
        total = torch.zeros(7)
        for number, x in enumerate(torch.cat(batches)):
            for label, chance in enumerate(chances(model(x[None]).detach()[0], number)):
                found = gradients(model, lambda y, label=label: F.cross_entropy(y, torch.tensor([label])), x[None])
                total += chance * per_channel([g.square() * w.square() / 2 for g, w in zip(found, weights, strict=True)]) / 12
        return total

    given = torch.cat(labels)
    score = scorer(model, (batches[0],))
    of_labels = score("fisher", samples=samples_of(batches, labels))["0"]
    np.testing.assert_allclose(of_labels, expected(lambda y, number: F.one_hot(given[number], 4)).numpy(), rtol=1e-4)
    drawn = [score("fisher", seed, samples_of(batches))["0"] for seed in range(60)]
    np.testing.assert_allclose(np.mean(drawn, 0), expected(lambda y, number: y.softmax(0)).numpy(), rtol=0.25, atol=1e-9)


def test_fisher_of_a_regression_is_its_gauss_newton_matrix() -> None:
    """A linear layer's answer has a derivative of x, whatever the label: E g² is 4 E[ε²] x² of a squared error with noise ε."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 1)), torch.randn(64, 3)
    score = scorer(model, (x,))
    found = np.mean([score("fisher", seed, samples_of([x]))["0"] for seed in range(8)], 0)
    hidden, weight, out = model[0](x).detach(), model[0].weight.detach(), model[1].weight.detach()[0]
    curvature = [out.square()[:, None] * x.square().mean(0), out.square(), hidden.square().mean(0)[None]]
    expected = 2 * per_channel([c * w.square() for c, w in zip(curvature, (weight, model[0].bias.detach(), out[None]), strict=True)])
    np.testing.assert_allclose(found, expected.numpy(), rtol=0.3)


def test_hessian_estimates_the_diagonal_of_the_second_derivative() -> None:
    model, batches, labels = two_layers()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, torch.cat(batches)), torch.cat(labels))

    blocks = torch.func.hessian(loss)(parameters)
    diagonal = [blocks[n][n].reshape(p.numel(), -1).diagonal().reshape(p.shape) for n, p in parameters.items()]
    expected = per_channel([h * w.square() / 2 for h, w in zip(diagonal, parameters.values(), strict=True)]).numpy()
    score, samples = scorer(model, (batches[0],)), samples_of(batches, labels)
    found = np.array([score("hessian", seed, samples)["0"] for seed in range(60)])
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - expected) <= 4 * error + 1e-9).all()
    assert error.max() < 0.25 * expected.max() and np.corrcoef(found.mean(0), expected)[0, 1] > 0.9


def test_hessian_is_exact_where_it_is_diagonal() -> None:
    """Of a squared error in which each weight meets a sample of its own, every probe answers alike."""
    torch.manual_seed(0)
    model = models.Of(lambda m, x: m.b(m.a(x).detach()), a=nn.Linear(6, 6, bias=False), b=nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        model.a.weight.copy_(3 * torch.eye(6))
    found = scores("hessian", model, (torch.eye(6),), samples=samples_of([torch.eye(6)], [torch.randn(6, 1)]))["a"]
    np.testing.assert_allclose(found, (3**2 / 6 * model.b.weight[0].detach().square()).numpy(), rtol=1e-5)


class Tied(nn.Module):
    """One layer called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.leave = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.second(torch.tanh(self.first(torch.tanh(self.enter(x)))))))


def test_a_tied_weight_counts_once_with_the_gradient_of_both_uses() -> None:
    torch.manual_seed(0)
    model, x, label = Tied(), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    found = scores("taylor", model, (x,), samples=samples_of([x], [label]))
    F.cross_entropy(model(x), label).backward()
    product = {name: (p * p.grad).detach() for name, p in model.named_parameters()}
    assert set(found) == {"enter"}
    expected = product["enter.weight"].sum(1) + product["enter.bias"] + product["first.weight"].sum(1) + product["first.bias"]
    expected = expected + product["first.weight"].sum(0) + product["leave.weight"].sum(0)
    np.testing.assert_allclose(found["enter"], expected.abs().numpy(), rtol=1e-4, atol=1e-7)


def test_taylor_of_heads() -> None:
    model, inputs = models.build("attention")
    label = torch.randint(0, 3, (2, 5))  # the last axis of the answer is that of the classes
    found = scores("taylor", model, inputs, samples=samples_of(list(inputs), [label]))
    F.cross_entropy(model(*inputs).flatten(0, 1), label.flatten()).backward()
    product = {name: (p * p.grad).detach() for name, p in model.named_parameters()}
    each = (product["qkv.weight"].sum(1) + product["qkv.bias"]).reshape(3, 4, 8).sum(0) + product["out.weight"].sum(0).reshape(4, 8)
    np.testing.assert_allclose(found["qkv"], each.sum(1).abs().numpy(), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["qkv#2"], each.sum(0).abs().numpy(), rtol=1e-3, atol=1e-6)


def test_labels_of_numbers_ask_for_the_squared_error() -> None:
    torch.manual_seed(0)
    model, x, label = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(5, 3), torch.randn(5)
    found = scores("loss_gradient", model, (x,), samples=samples_of([x], [label]))["0"]
    slopes = [g.abs() for g in gradients(model, lambda y: F.mse_loss(y[:, 0], label), x)]
    np.testing.assert_allclose(found, per_channel(slopes).numpy(), rtol=1e-4)


def test_labels_of_every_pixel_and_of_none() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)), torch.randn(2, 3, 4, 4)
    label = torch.randint(0, 4, (2, 4, 4))
    label[:, :2] = -100
    found = scores("loss_gradient", model, (x,), samples=samples_of([x], [label]))["0"]
    slopes = [g.abs().flatten(2).sum(2) if g.dim() > 1 else g.abs() for g in gradients(model, lambda y: F.cross_entropy(y, label), x)]
    np.testing.assert_allclose(found, per_channel(slopes).numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (torch.zeros(6, 2, dtype=torch.int64), "labels of shape 6x2 do not fit the model's answer of shape 6x4"),
        (torch.zeros(6, 3), "labels of shape 6x3 do not fit"),
        (torch.full((6,), 4), "labels from 4 to 4 do not fit the 4 classes"),
    ],
)
def test_labels_that_do_not_fit(label: Tensor, words: str) -> None:
    model, batches, _ = two_layers()
    with pytest.raises(InputError, match=words):
        scores("taylor", model, (batches[0],), samples=samples_of(batches[:1], [label]))


def test_criteria_leave_the_model_as_it_was() -> None:
    """Gradients, and whether they are wanted, buffers that the model writes to, the mode, and the samples."""

    def counts(self: nn.Module, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.b(torch.relu(self.a(x)) * (self.calls > 0))

    torch.manual_seed(0)
    model = models.Of(counts, a=nn.Linear(4, 6), b=nn.Linear(6, 3), calls=torch.zeros(1)).train()
    model.a.weight.requires_grad_(False)
    model.b.weight.grad = torch.ones(3, 6)
    x, label = torch.randn(5, 4), torch.randint(0, 3, (5,))
    score = scorer(model, (x,))
    before, given = {n: t.clone() for n, t in model.state_dict().items()}, x.clone()
    for name in FROM_SAMPLES:
        with torch.no_grad():
            score(name, samples=samples_of([x], [label]))
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()) and torch.equal(x, given), name
        assert [p.requires_grad for p in model.parameters()] == [False, True, True, True], name
        assert [p.grad is not None for p in model.parameters()] == [False, False, True, False] and bool((model.b.weight.grad == 1).all()), name
        assert model.training and not x.requires_grad, name


def test_no_derivative_is_told_in_one_line() -> None:
    def rounds(self: nn.Module, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))).long()

    model, x = models.Of(rounds, a=nn.Linear(4, 6), b=nn.Linear(6, 3)), torch.randn(5, 4)
    score = scorer(model, (x,))
    for name in FROM_GRADIENTS:
        with pytest.raises(InputError, match=r"no floating-point answer; use criterion='l2', or 'reconstruction'$"):
            score(name, samples=samples_of([x], [torch.randint(0, 3, (5,))]))


@pytest.mark.parametrize("operator", ["zeta", "airy_ai"])  # of the first torch says so, the second it takes for a constant
def test_an_operator_without_a_derivative_is_named(operator: str) -> None:
    def special(self: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x)) + 2
        return self.b(torch.special.zeta(hidden, torch.ones_like(hidden)) if operator == "zeta" else torch.special.airy_ai(hidden))

    model, x = models.Of(special, a=nn.Linear(4, 6), b=nn.Linear(6, 3)), torch.randn(5, 4)
    score = scorer(model, (x,))
    for name in FROM_GRADIENTS:
        with pytest.raises(InputError, match=f"derivative for '.*{operator}' is not implemented; use criterion='l2', or 'reconstruction'$"):
            score(name, samples=samples_of([x], [torch.randint(0, 3, (5,))]))


# --- activations ----------------------------------------------------------------------------------------------------------


def test_activation_statistics_of_two_layers() -> None:
    model, batches, _ = two_layers()
    hidden, read = torch.relu(model[0](torch.cat(batches))).detach().double(), model[2].weight.detach().double()
    expected = {
        "activation_mean": hidden.abs().mean(0),
        "activation_rate": (hidden != 0).double().mean(0),
        "activation_variance": hidden.var(0, correction=0) * read.square().sum(0),
    }
    score = scorer(model, (batches[0],))
    for name, values in expected.items():
        np.testing.assert_allclose(score(name, samples=samples_of(batches))["0"], values.numpy(), rtol=1e-5, atol=1e-12)


def test_activation_energy_by_its_definition() -> None:
    model, batches, _ = two_layers()
    hidden = torch.relu(model[0](torch.cat(batches))).detach().double().numpy()
    values, vectors = np.linalg.eigh(np.cov(hidden.T, bias=True) * len(hidden))
    number = 1 + int((np.cumsum(values[::-1]) < 0.95 * values.sum()).sum())
    expected = vectors[:, ::-1][:, :number] ** 2 @ values[::-1][:number]
    found = scores("activation_energy", model, (batches[0],), samples=samples_of(batches))["0"]
    assert 1 < number < 7
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_activations_are_watched_at_all_readers_of_a_stream() -> None:
    """Positions count like samples; each reader's weights count for what it reads; grouped convolutions have a part of the inputs each."""
    torch.manual_seed(0)
    model = models.Of(
        lambda m, x: m.b(h := torch.relu(m.a(x))).mean((2, 3)) + m.c(h.mean((2, 3))),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 3, groups=2), c=nn.Linear(8, 6),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 5, 5)
    hidden = torch.relu(model.a(x)).detach()
    rows, means = hidden.movedim(1, -1).flatten(0, -2), hidden.mean((2, 3))
    read = torch.stack([model.b.weight[:3].square().sum((0, 2, 3)), model.b.weight[3:].square().sum((0, 2, 3))]).flatten().detach()
    score = scorer(model, (x,))
    wanted = {
        "activation_mean": (rows.abs().mean(0) + means.abs().mean(0)) / 2,
        "activation_variance": rows.var(0, correction=0) * read + means.var(0, correction=0) * model.c.weight.square().sum(0).detach(),
    }
    for name, values in wanted.items():  # a channel is one of four in each of the two parts
        parts = values.reshape(2, 4)
        expected = parts.mean(0) if name == "activation_mean" else parts.sum(0)
        np.testing.assert_allclose(score(name, samples=samples_of([x[:1], x[1:]]))["a"], expected.numpy(), rtol=1e-4)


def test_activations_of_heads_and_their_width() -> None:
    """The answer of attention is read by the projection; queries and keys by their product."""
    model, inputs = models.build("attention")
    score = scorer(model, inputs)
    found = {name: score(name, samples=samples_of(list(inputs))) for name in ("activation_mean", "activation_variance")}
    x = model.embed(inputs[0])
    q, k, v = model.qkv(model.norm(x)).reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    answer = F.scaled_dot_product_attention(q, k, v).detach()  # [samples, heads, tokens, width]
    read = model.out.weight.detach().square().sum(0).reshape(4, 8)
    variance = answer.transpose(1, 2).flatten(0, 1).var(0, correction=0) * read
    np.testing.assert_allclose(found["activation_mean"]["qkv"], answer.abs().mean((0, 2, 3)).numpy(), rtol=1e-4)
    np.testing.assert_allclose(found["activation_variance"]["qkv"], variance.sum(1).numpy(), rtol=1e-4)
    np.testing.assert_allclose(found["activation_variance"]["qkv#2"], variance.sum(0).numpy(), rtol=1e-4)
    mean = torch.stack([t.detach().abs().mean((0, 2)) for t in (q, k, answer)])  # [what is read, heads, width]
    np.testing.assert_allclose(found["activation_mean"]["qkv#2"], mean.mean((0, 1)).numpy(), rtol=1e-4)


def test_a_constant_activation_varies_not_at_all() -> None:
    model, batches, _ = two_layers()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 0, 100
    score = scorer(model, (batches[0],))
    for name in ("activation_variance", "activation_energy"):
        found = score(name, samples=samples_of(batches))["0"]
        np.testing.assert_allclose(found[[2, 4]], 0, atol=1e-9)
        assert (np.delete(found, [2, 4]) > 0).all()


def test_a_dead_channel_goes_first() -> None:
    model, batches, _ = two_layers()
    score = scorer(model, (batches[0],))
    for name in FROM_ACTIVATIONS:
        found = score(name, samples=samples_of(batches))["0"]
        assert found[2] == pytest.approx(0, abs=1e-12) and (np.delete(found, 2) > found[2]).all(), name


def test_wide_models_are_watched_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = models.build("residual")
    score = scorer(model, inputs)
    at_once = score("activation_energy", samples=samples_of(list(inputs)))
    monkeypatch.setattr("structprune.decide.activations._ROOM", 1)
    monkeypatch.setattr("structprune.decide.activations._BLOCK", 100)
    apart = score("activation_energy", samples=samples_of(list(inputs)))
    assert all(np.allclose(apart[group], values) for group, values in at_once.items())


# --- all of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", models.MODELS)
def test_any_model_is_scored_and_again_alike(which: str) -> None:
    model, inputs = models.build(which)
    score, samples = scorer(model, inputs), samples_of(list(inputs), [torch.zeros_like(model(*inputs).detach())])
    sizes = {name: values.shape for name, values in score("l2").items()}
    for name in RUNNABLE:
        first, again = (score(name, 3, samples) for _ in range(2))
        assert {group: values.shape for group, values in first.items()} == sizes, name
        assert all(np.isfinite(values).all() and np.array_equal(values, again[group]) for group, values in first.items()), name
        assert any(np.ptp(values) > 0 for values in first.values()) or name == "activation_rate", (
            name
        )  # all is other than zero where there is no ReLU


@pytest.mark.parametrize("name", ["fisher", "hessian"])
def test_what_is_drawn_follows_the_seed(name: str) -> None:
    model, batches, labels = two_layers()
    samples = samples_of(batches, labels if name == "hessian" else None)
    score = scorer(model, (batches[0],))
    first, other = (score(name, seed, samples)["0"] for seed in (0, 1))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name].needs != "nothing"])
def test_what_needs_samples_says_so(name: str) -> None:
    model, batches, _ = two_layers()
    with pytest.raises(InputError, match=f"criterion '{name}' needs samples .*calibration"):
        criterion_of(name, model, 0)
    if NAMED[name].needs == "labels":
        with pytest.raises(InputError, match=f"criterion '{name}' needs samples with labels.*calibration"):
            criterion_of(name, model, 0, samples=samples_of(batches))


def test_auto_goes_by_what_is_given() -> None:
    model = two_layers()[0]
    assert criterion_of("auto", model, 0)[0] == "l2"
    assert NAMED["reconstruction"].needs == "samples"


def test_the_docs_list_every_criterion() -> None:
    text = (Path(__file__).parent.parent / "docs" / "criteria.md").read_text()
    for name, named in NAMED.items():
        assert f"| `{name}` | {named.needs} |" in text


def test_a_threshold_is_a_width() -> None:
    model, batches, _ = two_layers()
    groups = sp.find_groups(sp.trace(model, (batches[0],)))
    values = {"0": np.array([0.5, 0.1, 0.0, 0.9, 0.5, 0.2, 0.7])}
    (atom,) = (g.atom for g in groups)
    assert above(groups, values, 0.5) == {atom: 4}
    assert best_channels(groups, above(groups, values, 0.5), values)[atom].tolist() == [0, 3, 4, 6]
    assert above(groups, values, 2.0) == {atom: 1}  # never none
    assert above(groups, values, -1.0) == {atom: 7}
    with pytest.raises(InputError, match="threshold"):
        above(groups, values, float("nan"))


def test_random_follows_the_seed() -> None:
    model, inputs = models.build("joined")
    first, again, other = (scores("random", model, inputs, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[g], again[g]) for g in first)
    assert any(not np.array_equal(first[g], other[g]) for g in first)


def test_torch_pruning_importance_scores_as_in_torch_pruning() -> None:
    """One convolution feeding another has the same group in both tools, and must get the same scores."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    theirs = importance(tp.DependencyGraph().build_dependency(model, x).get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(8))))
    np.testing.assert_allclose(scores(importance, model, (x,))["0"], theirs.numpy(), rtol=1e-5)


@pytest.mark.parametrize("importance", [tp.importance.TaylorImportance, tp.importance.HessianImportance])
def test_torch_pruning_importances_that_read_gradients(importance: type) -> None:
    """On labelled samples they score as torch_pruning does after backward(); the user's gradients stay what they were."""
    model, batches, labels = two_layers()
    score = scorer(model, (batches[0],))
    with pytest.raises(InputError, match=r"reads gradients: give calibration=.*labels"):
        score(importance(), samples=samples_of(batches))
    found = score(importance(), samples=samples_of(batches[:1], labels[:1]))["0"]
    assert all(p.grad is None for p in model.parameters())
    if importance is tp.importance.TaylorImportance:
        F.cross_entropy(model(batches[0]), labels[0]).backward()
    else:
        each = [gradients(model, lambda y, i=i: F.cross_entropy(y, labels[0][i : i + 1]), batches[0][i : i + 1]) for i in range(6)]
        for parameter, squares in zip(model.parameters(), zip(*each, strict=True), strict=True):
            parameter.grad = torch.stack(squares).square().mean(0)
    theirs = importance()(
        tp.DependencyGraph().build_dependency(model, batches[0]).get_pruning_group(model[0], tp.prune_linear_out_channels, list(range(7)))
    )
    np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(score(importance())["0"], theirs.numpy(), rtol=1e-4, atol=1e-7)  # the user's own gradients


@pytest.mark.parametrize("name", models.MODELS)
def test_a_torch_pruning_importance_compresses_any_model(name: str) -> None:
    model, inputs = models.build(name)
    result = sp.compress(model, inputs, target="channels=0.5", criterion=tp.importance.LAMPImportance())
    assert result.plan.criterion == "LAMPImportance"
    assert result.report.data["params"]["after"] < result.report.data["params"]["before"]


def test_a_callable_decides() -> None:
    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5", criterion=lambda groups, tensors: {g.name: np.arange(g.size) for g in groups})
    assert all(g.keep == tuple(range(g.channels - len(g.keep), g.channels)) for g in result.plan.groups)


@pytest.mark.parametrize("choice", ["best", 7])
def test_what_is_no_criterion(choice: object) -> None:
    model, inputs = models.build("residual")
    with pytest.raises(InputError, match="criterion"):
        sp.compress(model, inputs, target="channels=0.5", criterion=choice)


def test_scores_of_a_wrong_shape_are_refused() -> None:
    model, inputs = models.build("residual")
    with pytest.raises(InputError, match="shape"):
        sp.compress(model, inputs, target="channels=0.5", criterion=lambda groups, tensors: {g.name: np.zeros(3) for g in groups})
