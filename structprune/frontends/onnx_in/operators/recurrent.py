"""LSTM, GRU and plain recurrent layers: torch's own, on weights whose gates are put in torch's order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Sizes, Unsupported, Value


def _ordered(weight: Tensor, order: list[int]) -> Tensor:
    """(gates · hidden, …) with the gates in another order."""
    if order == sorted(order):
        return weight
    gates = weight.reshape(len(order), weight.shape[0] // len(order), *weight.shape[1:])
    return torch.index_select(gates, 0, torch.tensor(order)).reshape(weight.shape)


def _weights(W: Tensor, R: Tensor, B: Tensor | None, order: list[int]) -> tuple[list[Tensor], bool]:
    """Of each direction: input weights, hidden weights, and their biases where there are any."""
    found = []
    for d in range(W.shape[0]):
        found += [_ordered(W.select(0, d), order), _ordered(R.select(0, d), order)]
        if B is not None:
            rows = W.shape[1]
            found += [_ordered(B.select(0, d).narrow(0, 0, rows), order), _ordered(B.select(0, d).narrow(0, rows, rows), order)]
    return found, B is not None


def _check(call: Call, x: Tensor, lengths: Value | None, activations: list[str], peephole: Any = None) -> None:
    directions = 2 if call.get("direction", "forward") == "bidirectional" else 1
    given = call.get("activations")
    if given and [a.lower() for a in given] != [a.lower() for a in activations * directions]:
        raise Unsupported(f"with activations {', '.join(given)}")
    for name in ("clip", "activation_alpha", "activation_beta"):
        if call.get(name):
            raise Unsupported(f"with {name}")
    if call.get("input_forget", 0) or peephole is not None:
        raise Unsupported("with coupled gates or peepholes")
    time = x.shape[1 if call.get("layout", 0) else 0]
    if lengths is not None and not (isinstance(lengths, Sizes) and all(n == time for n in lengths.list())):
        raise Unsupported("with sequences of different lengths: export it without sequence_lens")


def _run(call: Call, x: Tensor, states: list[Tensor | None], run: Any, hidden: int, directions: int) -> tuple[Tensor, list[Tensor]]:
    """(time, directions, batch, hidden), and the last states (directions, batch, hidden)."""
    batched = bool(call.get("layout", 0))  # (batch, time, …), and states (batch, directions, hidden)
    x = x.transpose(0, 1) if batched else x
    backwards = call.get("direction", "forward") == "reverse"
    x = x.flip(0) if backwards else x
    given = [(s.transpose(0, 1) if batched else s) if s is not None else x.new_zeros(directions, x.shape[1], hidden) for s in states]
    out, *last = run(x, given)
    out = out.flip(0) if backwards else out
    apart = torch.stack([out.narrow(2, 0, hidden), out.narrow(2, hidden, hidden)], 1) if directions == 2 else out.unsqueeze(1)
    if batched:
        return apart.permute(2, 0, 1, 3), [s.transpose(0, 1) for s in last]
    return apart, list(last)


@operator("LSTM", either=(4,))
def lstm(
    call: Call, x: Tensor, W: Tensor, R: Tensor, B: Tensor | None = None, lengths: Value | None = None, h: Tensor | None = None,
    c: Tensor | None = None, P: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gates in the file: input, output, forget, cell; in torch: input, forget, cell, output."""
    _check(call, x, lengths, ["Sigmoid", "Tanh", "Tanh"], P)
    weights, biased = _weights(W, R, B, [0, 2, 3, 1])

    def run(x: Tensor, states: list[Tensor]) -> Any:
        return torch.lstm(x, states, weights, biased, 1, 0.0, False, len(W) == 2, False)

    out, last = _run(call, x, [h, c], run, R.shape[-1], W.shape[0])
    return (out, *last)


@operator("GRU", either=(4,))
def gru(
    call: Call, x: Tensor, W: Tensor, R: Tensor, B: Tensor | None = None, lengths: Value | None = None, h: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gates in the file: update, reset, new; in torch: reset, update, new."""
    _check(call, x, lengths, ["Sigmoid", "Tanh"])
    hidden = R.shape[-1]
    if call.get("linear_before_reset", 0):
        weights, biased = _weights(W, R, B, [1, 0, 2])

        def run(x: Tensor, states: list[Tensor]) -> Any:
            return torch.gru(x, states[0], weights, biased, 1, 0.0, False, len(W) == 2, False)

    else:
        weights, biased = _weights(W, R, B, [0, 1, 2])

        def run(x: Tensor, states: list[Tensor]) -> Any:
            return _reset_before(x, states[0], weights, biased, hidden)

    out, last = _run(call, x, [h], run, hidden, W.shape[0])
    return (out, *last)


def _reset_before(x: Tensor, state: Tensor, weights: list[Tensor], biased: bool, hidden: int) -> tuple[Tensor, Tensor]:
    """The state is reset before it meets its weights, which torch's own layer cannot do: step by step."""
    if not isinstance(x.shape[0], int):
        raise Unsupported("with linear_before_reset=0 over a length that is free: fix the length with --input")
    answers, lasts = [], []
    each = len(weights) // state.shape[0]
    for d in range(state.shape[0]):
        w, r, *biases = weights[d * each : (d + 1) * each]
        now = state.select(0, d)
        rz, rr, rn = r.split(hidden)
        steps: list[Tensor] = [now] * x.shape[0]
        for t in range(x.shape[0]) if d == 0 else reversed(range(x.shape[0])):
            given = x.select(0, t) @ w.t() + (biases[0] if biased else 0)
            gz, gr, gn = given.split(hidden, 1)
            bz, br, bn = biases[1].split(hidden) if biased else (0, 0, 0)
            update, reset = torch.sigmoid(gz + now @ rz.t() + bz), torch.sigmoid(gr + now @ rr.t() + br)
            new = torch.tanh(gn + (reset * now) @ rn.t() + bn)
            now = (1 - update) * new + update * now
            steps[t] = now
        answers.append(torch.stack(steps))
        lasts.append(now)
    return torch.cat(answers, 2), torch.stack(lasts)


@operator("RNN", either=(4,))
def rnn(
    call: Call, x: Tensor, W: Tensor, R: Tensor, B: Tensor | None = None, lengths: Value | None = None, h: Tensor | None = None
) -> tuple[Tensor, ...]:
    name = str((call.get("activations") or ["Tanh"])[0]).lower()
    if name not in ("tanh", "relu"):
        raise Unsupported(f"with the activation {name}")
    _check(call, x, lengths, [name])
    weights, biased = _weights(W, R, B, [0])
    layer = torch.rnn_tanh if name == "tanh" else torch.rnn_relu

    def run(x: Tensor, states: list[Tensor]) -> Any:
        return layer(x, states[0], weights, biased, 1, 0.0, False, len(W) == 2, False)

    out, last = _run(call, x, [h], run, R.shape[-1], W.shape[0])
    return (out, *last)
