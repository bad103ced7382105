"""Operators that no rule knows and torch defines: channels pass through them as through their definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import structprune as sp
from structprune.frontends.equivalents import equivalent
from structprune.ir.operators import operator_name
from structprune.ops.rules import RULES

DEFINED: dict[str, Callable[[Tensor], Tensor]] = {
    "broadcast_to": lambda x: x.unsqueeze(1).broadcast_to(x.shape[0], 3, 16),
    "hstack": lambda x: torch.hstack([x, x.sin()]),
    "vstack": lambda x: torch.vstack([x, x.sin()]),
    "dstack": lambda x: torch.dstack([x, x.sin()]).flatten(1),
    "column_stack": lambda x: torch.column_stack([x, x.sin()]),
    "hsplit": lambda x: torch.hsplit(x, 2)[0] * torch.hsplit(x, 2)[1],
    "atleast_3d": lambda x: torch.atleast_3d(x).flatten(1),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, torch.ones(3, 1, 16))[0] * x,
    "tensordot": lambda x: torch.tensordot(x, torch.arange(80.0).view(16, 5).sin(), dims=([1], [0])),
    "inner": lambda x: torch.inner(x, torch.arange(80.0).view(5, 16).sin()),
    "chain_matmul": lambda x: torch.chain_matmul(x, torch.arange(80.0).view(16, 5).sin(), torch.ones(5, 8)),
    "pairwise_distance": lambda x: x * F.pairwise_distance(x, 2 * x, eps=0.0).unsqueeze(-1),
    "absolute": torch.absolute,
    "arctan2": lambda x: torch.arctan2(x, x + 1),
    "float_power": lambda x: torch.float_power(x + 1, 2).to(x.dtype),
    "greater_equal": lambda x: torch.greater_equal(x, 0.5) * x,
    "logaddexp2": lambda x: torch.logaddexp2(x, x.sin()),
    "sinc": torch.sinc,
    "cross": lambda x: torch.cross(torch.stack([x, x.sin(), x.cos()], 1), torch.ones(1, 3, 1), dim=1),
    "trapezoid": lambda x: torch.trapezoid(torch.stack([x, x.sin()], 1), dim=1),
    "nanmean": lambda x: torch.nanmean(torch.stack([x, x.sin()], 1), 1),
    "unsafe_chunk": lambda x: torch.unsafe_chunk(x, 2, 1)[0],
    "kron": lambda x: torch.kron(x, torch.tensor([[1.0, 2.0]])),
}


def between(middle: Callable[[Tensor], Any]) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    x, first = torch.randn(4, 8), nn.Linear(8, 16)
    last = nn.Linear(middle(first(x).relu()).shape[-1], 4)
    return models.Of(lambda m, x: m.last(middle(m.first(x).relu())), first=first, last=last).eval(), (x,)


@pytest.mark.parametrize("name", DEFINED)
def test_channels_pass_through_what_torch_defines(name: str) -> None:
    assert name not in RULES, "has a rule of its own: another operator has to show this"
    model, inputs = between(DEFINED[name])
    result = sp.compress(model, inputs, target="channels=0.5")
    assert any(len(group.keep) < group.channels and "first" in group.name for group in result.plan.groups)


def test_an_operator_whose_definition_has_no_rules_stays_as_it_is() -> None:
    model, inputs = between(lambda x: x * torch.special.chebyshev_polynomial_t(x, 3))
    graph = sp.trace(model, inputs)
    assert "special_chebyshev_polynomial_t" in {operator_name(n) for n in graph.nodes if n.op == "call_function"}
    frozen = next(f for f in sp.find_groups(graph).frozen if f.channels == 16)
    assert "the operator special_chebyshev_polynomial_t is not known" in frozen.reason


def test_what_is_frozen_in_a_definition_is_told_with_the_users_line() -> None:
    model, inputs = between(torch.fliplr)
    frozen = {f.channels: f for f in sp.inspect(model, inputs).frozen}
    assert "flip runs along this axis" in frozen[16].reason
    assert frozen[16].at == frozen[8].at == frozen[4].at  # one line computes all


def spectrum(z: Tensor) -> Tensor:
    """[batch, 34, time] → [batch, 17, time], complex."""
    return torch.polar(z[:, :17].exp(), z[:, 17:])


def by_parts(z: Tensor) -> Tensor:
    """Spectra that are laid out anew, gathered, chosen and added up."""
    f = torch.fft.rfft(z)
    left, _, right = f.split([4, 26, 4], 1)
    f = torch.cat([left.unsqueeze(2).expand(-1, -1, 2, -1).sum(2), right[:, torch.tensor([0, 3, 2])], f.unbind(1)[5][:, None].repeat(1, 2, 1)], 1)
    f = torch.where(f.abs() > 1, f, f.select(1, 2)[:, None].expand_as(f)).cumsum(1)
    kept = torch.zeros(len(f), 2, f.shape[2], dtype=torch.int64)
    f = f.scatter(1, kept, f.gather(1, kept + 3)).index_select(1, torch.tensor([4, 0, 1])) ** 2
    number = f.shape[2]
    return torch.fft.irfft(torch.fft.fftshift(torch.cat(f.chunk(2, 1), 1), dim=1) * torch.linspace(1, number, number, dtype=torch.complex64))


TABLE = torch.linspace(-1, 1, 3 * 34 * 20).reshape(3, 34, 20).sin()
COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "a complex number": lambda z: torch.fft.irfft(z[:, :17] * (z[:, 17:].cos() + 1j * z[:, 17:].sin()), 32, dim=1),
    "its exponential": lambda z: torch.istft(z[:, :17] * torch.exp(z[:, 17:] * 1j), 32, 8, window=torch.hann_window(32)),
    "a window inside": lambda z: torch.istft(spectrum(z), 32, 4, 24, torch.hann_window(24), length=60),
    "frames around": lambda z: torch.istft(F.pad(spectrum(z), (2, 2)), 32, 8, window=torch.hann_window(32)),
    "frames again": lambda z: torch.istft(F.pad(spectrum(z), (2, 2), "reflect"), 32, 8, window=torch.hann_window(32)),
    "other frames": lambda z: F.pad(spectrum(z), (0, 1), value=-0.5).angle().cos(),
    "no window": lambda z: torch.istft(spectrum(z), 32, normalized=True),
    "longer than its frames": lambda z: torch.istft(spectrum(z), 32, 8, center=False, length=200),
    "angles": lambda z: torch.stft(z.flatten(1), 32, 8, window=torch.hann_window(32), return_complex=True).angle().cos(),
    "spectra multiplied": lambda z: torch.fft.irfft(torch.einsum("bhl,chl->bchl", torch.fft.rfft(z), torch.fft.rfft(TABLE))),
    "a product of matrices": lambda z: torch.fft.irfft(torch.fft.rfft(z).mT @ torch.fft.rfft(z)),
    "loud frequencies": lambda z: torch.fft.irfft((f := torch.fft.rfft(z)).masked_fill(f.abs() < 1, 0j).masked_fill(f.abs() > 9, 0.5 - 2j)),
    "parts for themselves": by_parts,
    "real ones among them": lambda z: torch.fft.irfft(torch.where((f := torch.fft.rfft(z)).abs() < 2, f.real, f)),
    "a spectrum in part": lambda z: torch.fft.irfft(torch.cat([torch.fft.rfft(z)[..., :4], torch.zeros_like(torch.fft.rfft(z)[..., 4:])], -1)),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_a_vocoder_can_be_written_as_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.Of(lambda m, x: COMPLEX[name](m.last(m.first(x).relu())), first=nn.Conv1d(8, 24, 1), last=nn.Conv1d(24, 34, 1)).eval()
    x, other = torch.randn(2, 2, 8, 20).unbind()
    torch.testing.assert_close(sp.trace(model, (x,)).module(x), model(x))
    result = sp.compress(model, (x,), target="channels=0.5")
    assert result.model.first.out_channels == 12
    assert_onnx_agrees(result, other, tmp_path)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one head": F.scaled_dot_product_attention,
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
    "masked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[..., :1].transpose(1, 2) > q[..., :1].amin()),
    "in windows": lambda q, k, v: windows(F.scaled_dot_product_attention(*map(windows, (q, k, v)), torch.ones(3, 1, 4, 4).tril().log())),
}


def windows(x: Tensor) -> Tensor:
    """[batch, 12, width] → [batch, 3, 2, 4, width / 2] and back."""
    return x.view(x.shape[0], 3, 4, 2, -1).transpose(2, 3) if x.dim() == 3 else x.transpose(2, 3).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_any_rank_can_be_written_as_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.Of(lambda m, x: m.last(ATTENTION[name](*m.first(x).chunk(3, -1))), first=nn.Linear(16, 96), last=nn.Linear(32, 16)).eval()
    result = sp.compress(model, (torch.randn(2, 12, 16),), target="channels=0.5")
    assert result.report.data["macs"]["after"] <= 0.55 * result.report.data["macs"]["before"]
    assert_onnx_agrees(result, torch.randn(3, 12, 16), tmp_path)


def halos(x: Tensor) -> Tensor:
    """[batch, channels, 100] → windows of 4 × 4 of a picture of 10 × 10, every 3."""
    batch, channel, row, _ = x.unflatten(2, (10, 10)).stride()
    return x.unflatten(2, (10, 10)).as_strided((*x.shape[:2], 3, 4, 3, 4), (batch, channel, 3 * row, row, 3, 1)).amax((3, 5)).flatten(2)


def chunks(x: Tensor) -> Tensor:
    """[batch, channels, 100] → chunks of 20 positions that overlap by half, each as one channel behind the other."""
    parts = x.transpose(1, 2).reshape(x.shape[0], 5, 20, -1)
    batch, part, place, channel = parts.stride()
    return parts.as_strided((x.shape[0], 9, 20, x.shape[1]), (batch, part // 2, place, channel)).amax(2).transpose(1, 2)


def every_other(x: Tensor) -> Tensor:
    batch, channel, place = x.stride()
    return x.as_strided((*x.shape[:2], 50), (batch, channel, 2 * place))


@pytest.mark.parametrize("windows", [halos, chunks, every_other])
def test_channels_pass_through_windows_in_memory(windows: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.Of(lambda m, x: m.last(windows(m.first(x).relu())), first=nn.Conv1d(8, 16, 1), last=nn.Conv1d(16, 4, 1)).eval()
    result = sp.compress(model, (torch.randn(2, 8, 100),), target="channels=0.5")
    assert result.model.first.out_channels == 8 and isinstance(result.model, models.Of)
    assert_onnx_agrees(result, torch.randn(3, 8, 100), tmp_path)


@st.composite
def walks(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int]]:
    """A tensor in some order of memory, and sizes and strides within it, mostly along its axes."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    x = torch.arange(math.prod(shape)).view(shape).permute(draw(st.permutations(range(len(shape)))))
    along = draw(st.lists(st.integers(0, x.dim() - 1), min_size=1, max_size=5))
    stride = [x.stride(d) * draw(st.sampled_from([1, 1, 1, 2, 3])) for d in along]
    size = [draw(st.sampled_from([x.shape[d], x.shape[d], *range(1, 7)])) for d in along]
    assume(sum((number - 1) * apart for number, apart in zip(size, stride, strict=True)) < x.numel())
    return x, size, stride


@settings(max_examples=200, deadline=None)
@given(walks())
def test_windows_hold_what_strides_read(walk: tuple[Tensor, list[int], list[int]]) -> None:
    x, size, stride = walk
    windows = equivalent(torch.ops.aten.as_strided.default, walk, {})
    event("in windows" if windows else "as strides")
    if windows is not None:
        assert torch.equal(windows(x), x.as_strided(size, stride))


def test_strides_that_skip_a_part_or_start_elsewhere_are_left_alone() -> None:
    model, inputs = between(lambda x: x.contiguous().view(2, 32).as_strided((2, 16), (32, 1), 16))
    frozen = next(f for f in sp.inspect(model, inputs).frozen if f.channels == 16)
    assert "the operator as_strided is not known" in frozen.reason


@pytest.mark.parametrize("how", [{"align_corners": True}, {"mode": "nearest", "padding_mode": "border", "align_corners": False}])
def test_a_volume_that_is_sampled_can_be_written_as_onnx(how: dict[str, Any], tmp_path: Path) -> None:
    def warped(m: nn.Module, x: Tensor) -> Tensor:
        return F.grid_sample(x, m.last(m.first(x).relu()).permute(0, 2, 3, 4, 1), **how)

    torch.manual_seed(0)
    model = models.Of(warped, first=nn.Conv3d(2, 16, 3, padding=1), last=nn.Conv3d(16, 3, 3, padding=1)).eval()
    result = sp.compress(model, (torch.randn(2, 2, 4, 5, 6),), target="channels=0.5")
    assert_onnx_agrees(result, torch.randn(3, 2, 4, 5, 6), tmp_path)


def test_a_hamming_window_is_torchs_in_onnx(tmp_path: Path) -> None:
    model = models.Of(lambda m, x: m.last(m.first(x).relu() * torch.hamming_window(20)), first=nn.Conv1d(8, 16, 1), last=nn.Conv1d(16, 4, 1))
    result = sp.compress(model.eval(), (torch.randn(2, 8, 20),), target="channels=0.5")
    assert_onnx_agrees(result, torch.randn(3, 8, 20), tmp_path)


def assert_onnx_agrees(result: sp.Result, x: Tensor, folder: Path) -> None:
    """Both files of an output directory, of the small model and of the original."""
    result.save(folder / "out", latency=False)
    for name, model in (("model", result.model), ("original", result.graph.module)):
        session = onnxruntime.InferenceSession(str(folder / f"out/{name}.onnx"))
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        wanted = model(x).detach()
        torch.testing.assert_close(torch.from_numpy(answer), wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=1e-4)
