"""Work on what values choose (the tokens of an expert), which code skips where nothing is chosen: traced if that makes no difference, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import oracle
import pytest
import torch
import torch.nn.functional as F
from models import Of
from torch import Tensor, nn

import structprune as sp

EXPERTS = 4
Route = Callable[[Any, Tensor], Tensor]


def _best(m: Any, x: Tensor, of: int = 2) -> tuple[Tensor, Tensor]:
    weight, best = m.router(x).softmax(-1).topk(of, -1)
    return weight, best


def _under_a_mask(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x, 1)
    out = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        chosen = best[:, 0] == number
        if chosen.any():
            out[chosen] += expert(x[chosen]) * weight[chosen]
    return out


def _of_a_sum(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x)
    out = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        chosen = best == number
        if not chosen.sum():
            continue
        rows, place = torch.where(chosen)
        out[rows] += expert(x[rows]) * weight[rows, place, None]
    return out


def _of_a_shape(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x)
    out = torch.zeros_like(x)
    chosen = F.one_hot(best, EXPERTS).permute(2, 1, 0)
    for number in range(EXPERTS):
        place, rows = torch.where(chosen[number])
        if rows.shape[0] == 0:
            continue
        own = x[None, rows].reshape(-1, x.shape[-1])
        out.index_add_(0, rows, m.experts[number](own) * weight[rows, place, None])
    return out


def _of_a_length(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x)
    out = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        rows, place = (best == number).nonzero(as_tuple=True)
        if len(rows) > 0:
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, place, None])
    return out


def _over_those_hit(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x)
    out = torch.zeros_like(x)
    chosen = F.one_hot(best, EXPERTS).permute(2, 1, 0)
    for number in torch.greater(chosen.sum(dim=(-1, -2)), 0).nonzero():
        place, rows = torch.where(chosen[number].squeeze(0))
        out.index_add_(0, rows, m.experts[number](x[rows]) * weight[rows, place, None])
    return out


def _over_different_ones(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x)
    out = torch.zeros_like(x)
    for number in best.view(-1).unique().tolist():
        rows, place = torch.where(best == number)
        out[rows] += m.experts[number](x[rows]) * weight[rows, place, None]
    return out


def _of_counts(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x)
    order = best.view(-1).argsort()
    rows, start, parts = x[order // best.shape[1]], 0, []
    for expert, number in zip(m.experts, torch.bincount(best.view(-1), minlength=EXPERTS).cpu().numpy(), strict=True):
        end = start + number
        if number == 0:
            continue
        parts.append(expert(rows[start:end]))
        start = end
    sorted_back = torch.empty(order.shape[0], x.shape[-1]).index_put((order,), torch.cat(parts))
    return (sorted_back.view(*best.shape, -1) * weight[..., None]).sum(1)


def _in_parts(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x)
    order = best.view(-1).argsort()
    parts = x[order // best.shape[1]].split(torch.bincount(best.view(-1), minlength=EXPERTS).tolist())
    answers = torch.cat([expert(part) for expert, part in zip(m.experts, parts, strict=True)])
    return torch.zeros_like(x).index_add(0, order // best.shape[1], answers * weight.view(-1)[order, None])


def _by_selected_entries(m: Any, x: Tensor) -> Tensor:
    weight, best = _best(m, x, 1)
    out = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        chosen = (best == number).expand_as(x)
        if chosen.any().item():
            out = out.masked_scatter(chosen, expert(x.masked_select(chosen).view(-1, x.shape[-1])))
    return out * weight


ROUTES = [
    _under_a_mask, _of_a_sum, _of_a_shape, _of_a_length, _over_those_hit, _over_different_ones, _of_counts, _in_parts, _by_selected_entries,
]  # fmt: skip


def _expert(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Mixture(nn.Module):
    """Two layers of experts, each beside a stream."""

    def __init__(self, route: Route, layers: int = 1) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(10, 16), nn.Linear(16, 5)
        blocks = {"router": nn.Linear(16, EXPERTS), "norm": nn.LayerNorm(16)}
        self.layers = nn.ModuleList(Of(route, **blocks, experts=nn.ModuleList(_expert(16, 32) for _ in range(EXPERTS))) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.inp(x).flatten(0, 1)
        for layer in self.layers:
            rows = rows + layer(layer.norm(rows))
        return self.out(rows.view(*x.shape[:2], -1).mean(1))


def mixture(route: Route, layers: int = 1) -> tuple[Mixture, Tensor]:
    torch.manual_seed(0)
    model = Mixture(route, layers)
    assert isinstance(oracle.randomise_norms(model), Mixture)
    return model.eval(), torch.randn(3, 7, 10)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_experts_that_code_skips(route: Route) -> None:
    model, x = mixture(route)
    result = sp.compress(model, (x,), target="channels=0.5")
    assert type(result.model) is Mixture and result.model.layers[0].experts[1][0].out_features == 16
    error, tolerance = oracle.error_of(model, result.model, {name: cut.keep for name, cut in result.plan.tensors.items()}, (x,))
    assert error <= tolerance
    assert len([note for note in result.graph.notes if "skips what nothing chooses (tests/test_chosen.py:" in note]) == (route is not _in_parts)


@pytest.mark.parametrize("route", [_over_those_hit, _by_selected_entries], ids=lambda route: route.__name__)
def test_files_that_answer_where_nothing_is_chosen(route: Route, tmp_path: Path) -> None:
    model, x = mixture(route)
    result = sp.compress(model, (x,), target="channels=0.5")
    result.save(tmp_path / "out")
    session, loaded = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")), sp.load(tmp_path / "out")
    one_token = x[:1, :1].expand(2, 5, 10).contiguous()  # of four experts, two get nothing at least
    for other in (x[:1], torch.cat([x, x]), torch.cat([one_token, one_token[:, :2]], 1)):
        wanted = result.model(other).detach()
        assert np.allclose(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0], wanted, atol=1e-5)
        assert torch.allclose(loaded(other), wanted, atol=1e-5)


def test_a_model_that_counts_its_calls_is_left_as_it_was() -> None:
    def counted(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return _of_a_shape(m, x)

    model, x = mixture(counted)
    model.layers[0].register_buffer("calls", torch.zeros(()))
    sp.trace(model, x)
    assert model.layers[0].calls == 0


def test_the_work_of_experts_counts() -> None:
    model, x = mixture(_of_a_shape)
    before = sp.compress(model, (x,), target="macs=0.5").report.data["macs"]["before"]
    rows = 3 * 7
    assert before == rows * (10 * 16 + 16 * EXPERTS + 2 * 2 * 16 * 32) + 3 * 16 * 5  # two experts for every row


def _fades(m: Any, x: Tensor) -> Tensor:
    out = x
    for number, expert in enumerate(m.experts):
        chosen = m.router(x).argmax(-1) == number
        if chosen.any():
            out = out * 0.9
            out = out.index_put((chosen,), expert(x[chosen]), accumulate=True)
    return out


def _fills(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        chosen = m.router(x).argmax(-1) == number
        if chosen.any():
            out[chosen] += expert(x[chosen])
        else:
            out = out + 0.01
    return out


@pytest.mark.parametrize("route", [_fades, _fills], ids=lambda route: route.__name__)
def test_code_that_does_something_else_where_nothing_is_chosen_is_refused(route: Route) -> None:
    model, x = mixture(route)
    with pytest.raises(sp.StructpruneError, match=r"test_chosen.py:\d+: the code branches on values of tensors, and answers otherwise"):
        sp.trace(model, x)


def _leaves_early(m: Any, x: Tensor) -> Tensor:
    y = m.experts[0](x)
    if y.abs().max() > 1e6:
        return y
    return m.experts[1](y)


def _asks_twice(m: Any, x: Tensor) -> Tensor:
    """The first question is seen to be answered both ways, the second is not."""
    for number, expert in enumerate(m.experts):
        if (m.router(x).argmax(-1) == number).any() and (x.abs() < 1e6).any():
            x = x + 0 * expert(x)
    return x


def _over_all_of_them(m: Any, x: Tensor) -> Tensor:
    """Every expert is hit, whatever the input is: nobody knows what the code does where one is not."""
    for number in torch.greater(F.one_hot(m.router(x).topk(EXPERTS, -1).indices, EXPERTS).sum((0, 1)), 0).nonzero():
        x = x + m.experts[number](x)
    return x


@pytest.mark.parametrize("route", [_leaves_early, _asks_twice, _over_all_of_them], ids=lambda route: route.__name__)
def test_a_way_that_no_input_was_seen_to_go_is_not_guessed(route: Route) -> None:
    model, x = mixture(route)
    with pytest.raises(sp.StructpruneError, match=r"test_chosen.py:\d+: the code branches on values of tensors, and no input was found"):
        sp.trace(model, x)


def _of_large_rows(otherwise: float) -> Route:
    def route(m: Any, x: Tensor) -> Tensor:
        """No input has no such row."""
        out = torch.zeros_like(x)
        rows = (x.sum(-1) > -1e6).nonzero()[:, 0]
        if not rows.shape[0]:
            return out + otherwise
        return out.index_put((rows,), m.experts[0](x[rows]))

    return route


def test_what_code_does_with_nothing_is_tried_where_no_input_chooses_nothing() -> None:
    model, x = mixture(_of_large_rows(0.0))
    result = sp.compress(model, (x,), target="channels=0.5")
    assert type(result.model) is Mixture and result.model.layers[0].experts[0][0].out_features == 16
    model, x = mixture(_of_large_rows(1.0))
    with pytest.raises(sp.StructpruneError, match=r"test_chosen.py:\d+: the code branches on values of tensors, and no input was found"):
        sp.trace(model, x)


def test_code_of_a_notebook_is_asked_as_well() -> None:
    source = """
def fades(m, x):
    for number, expert in enumerate(m.experts):
        rows = (m.router(x).argmax(-1) == number).nonzero()[:, 0]
        if rows.shape[0] == 0:
            x = x * 0.9
        else:
            x = x.index_add(0, rows, expert(x[rows]))
    return x
"""
    space: dict[str, Any] = {}
    exec(compile(source, "<cell 3>", "exec"), space)
    model, x = mixture(space["fades"])
    with pytest.raises(sp.StructpruneError, match=r"<cell 3>:\d+: the code branches on values of tensors, and answers otherwise"):
        sp.trace(model, x)


def test_a_loop_until_values_say_so_is_refused() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while (x > 1).any():
                x = x / 2
            return x

    with pytest.raises(sp.StructpruneError, match="branches on values of tensors"):
        sp.trace(Halves(), 4 * torch.rand(2, 3))


def test_rows_are_compared_with_the_same_tokens() -> None:
    """A narrowed router sends some tokens elsewhere; what is fitted for an expert are the tokens that the dense model sent there."""
    model, x = mixture(_over_those_hit, layers=2)
    samples, others = torch.randn(64, 7, 10), torch.randn(64, 7, 10)
    wanted = model(others).detach()
    errors = []
    for options in ({"compensate": False}, {}, {"matching": 20}):
        small = sp.compress(model, (x,), target="macs=0.6", calibration=samples, **options).model
        errors.append(float((small(others).detach() - wanted).square().mean() / wanted.var(0).mean()))
    assert errors[1] < errors[0] / 4 and errors[2] < errors[0] / 4


def test_experts_that_few_samples_choose_or_none() -> None:
    model, x = mixture(_under_a_mask)
    with torch.no_grad():
        model.layers[0].router.bias[-1] -= 1e3
    samples = torch.randn(2, 7, 10)
    result = sp.compress(model, (x,), target="macs=0.6", calibration=samples)
    wanted = model(samples).detach()
    assert float((result.model(samples).detach() - wanted).square().mean()) < 0.1 * float(wanted.square().mean())


def test_convolutions_of_the_pictures_that_chose_them(tmp_path: Path) -> None:
    """torch itself asks whether there is any picture."""

    def route(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        best, out = m.router(x.mean((2, 3))).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(m.experts):
            chosen = (best == number).nonzero().flatten()
            if len(chosen) == 0:
                continue
            out[chosen] = expert(x[chosen])
        return m.out(out.mean((2, 3)))

    def expert() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))

    torch.manual_seed(0)
    model = Of(
        route, stem=nn.Conv2d(3, 8, 3, padding=1), router=nn.Linear(8, 4), out=nn.Linear(8, 5), experts=nn.ModuleList(expert() for _ in range(4))
    )
    model, x = oracle.randomise_norms(model).eval(), torch.randn(5, 3, 8, 8)
    result = sp.compress(model, (x,), target="channels=0.5", calibration=torch.randn(16, 3, 8, 8))
    assert type(result.model) is Of and result.model.experts[2][0].out_channels == 8
    result.save(tmp_path / "out")
    session, loaded = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")), sp.load(tmp_path / "out")
    for other in (x, x[:1], torch.cat([x, x])):
        wanted = result.model(other).detach()
        assert np.allclose(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0], wanted, atol=1e-4)
        assert torch.allclose(loaded(other), wanted, atol=1e-4)


def test_recovery_of_experts() -> None:
    model, x = mixture(_of_a_shape, layers=2)

    def train(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            yield torch.randn(16, 7, 10, generator=generator), torch.zeros(16, dtype=torch.long)

    result = sp.compress(model, (x,), target="macs=0.5")
    others = torch.randn(64, 7, 10)
    wanted = model(others).detach()
    before = float((result.model(others).detach() - wanted).square().mean())
    recovered = sp.recover(result, train, epochs=8, lr=0.1, labels=False)
    assert float((recovered.model(others).detach() - wanted).square().mean()) < before / 2


class Backbone(nn.Sequential):
    out_channels = 32


def test_a_whole_detector(tmp_path: Path) -> None:
    """Proposals, suppression and a pooler ask how many boxes there are; the second stage works on what is left."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()]
    sizes = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
    anchors, pooled = AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)), MultiScaleRoIAlign(["0"], 3, 2)
    model = FasterRCNN(Backbone(*layers), 4, rpn_anchor_generator=anchors, box_roi_pool=pooled, **sizes)
    model, image = oracle.randomise_norms(model).eval(), torch.rand(3, 64, 64)
    result = sp.compress(model, ([image],), target="channels=0.5")
    assert (
        type(result.model) is FasterRCNN and result.model.roi_heads.box_head.fc6.out_features == 512 and result.model.backbone[3].out_channels == 16
    )
    result.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for other in (image, torch.rand(3, 64, 64)):
        (wanted,) = result.model([other])
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {session.get_inputs()[0].name: other.numpy()}), strict=True))
        assert len(wanted["boxes"]) and np.allclose(found["output_0_boxes"], wanted["boxes"].detach(), atol=1e-3)
        assert np.array_equal(found["output_0_labels"], wanted["labels"])


def test_the_length_of_a_batch_leaves_it_free() -> None:
    model = Of(lambda m, x: m.last(m.first(x).relu().reshape(len(x), -1)), first=nn.Linear(6, 8), last=nn.Linear(24, 2)).eval()
    result = sp.compress(model, (torch.randn(2, 3, 6),), target="channels=0.5")
    assert result.graph.dynamic_batch and type(result.model) is Of and result.small(torch.randn(5, 3, 6))[0].shape == (2,)
    assert len([1, 2]) == 2 and "len" not in globals()
