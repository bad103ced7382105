"""LSTM, GRU and plain recurrent layers, and their cells for one step.

Their weights are gates · hidden units. All layers and directions hand their states over in one tensor (layers, batch, hidden),
so their hidden units are one axis.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from structprune.ir.axes import Axis, Shape, concat, product
from structprune.ops.rules import Equations, Unsupported, rule


def _recurrent(
    eq: Equations, gates: int, x: Shape, states: list[Shape], weights: list[Shape], biases: bool, layers: int, bidirectional: bool
) -> tuple[Shape, Axis]:
    """State the equations of the stacked layers; returns the shape of the sequence of answers, and the hidden axis.

    `weights` holds, for each layer and direction, w_ih (gates·hidden, input), w_hh (gates·hidden, output), then b_ih and
    b_hh, then, where the answer is projected, w_hr (output, hidden). x is (…, input); states are (layers, batch, hidden).
    """
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    projected = each == 2 + 2 * biases + 1
    out = states[0][-1]
    hidden = states[-1][-1] if projected else eq.equate(states[-1][-1], out)
    eq.freeze("layers and directions of a recurrent network", *(state[0] for state in states))
    if projected:  # torch tells a projection by hidden and projected sizes being different: the smaller one may shrink
        eq.freeze("hidden units that are projected", hidden)
    feature = x[-1]
    groups = iter(weights[i : i + each] for i in range(0, len(weights), each))
    for _ in range(layers):
        for _ in range(directions):
            w_ih, w_hh, *rest = next(groups)
            gate = eq.frozen(gates, "gates of a recurrent layer")
            for axis in (w_ih[0], w_hh[0], *(b[0] for b in rest[: 2 * biases])):
                eq.equate(axis, product((gate, hidden)))
            eq.equate(w_ih[1], feature)
            eq.equate(w_hh[1], out)
            eq.macs(*x[:-1], gate, hidden, feature)
            eq.macs(*x[:-1], gate, hidden, out)
            if projected:
                eq.equate(rest[-1][0], out)
                eq.equate(rest[-1][1], hidden)
                eq.macs(*x[:-1], out, hidden)
        feature = concat([out] * directions)
    eq.freeze("time runs along this axis", *x[:-1], *(axis for state in states for axis in state[1:-1]))
    return (*x[:-1], feature), hidden


def products_of_a_layer(node: fx.Node) -> int:
    """How many products `_recurrent` counts of each layer: of each direction one of its input, one of its states, and one where it projects."""
    given: tuple[Any, ...] = node.args
    weights, biases, layers, _dropout, _train, bidirectional = given[2:8]
    directions = 2 if bidirectional else 1
    return directions * (len(weights) // (layers * directions) - (2 if biases else 0))  # type: ignore[no-any-return]


def _unpacked(x: Shape) -> None:
    if len(x) < 2:
        raise Unsupported("a packed sequence")


@rule("lstm")
def lstm(
    eq: Equations,
    x: Shape,
    states: list[Shape],
    weights: list[Shape],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *_: Any,
) -> list[Shape]:
    _unpacked(x)
    out, _hidden = _recurrent(eq, 4, x, states, weights, biases, layers, bidirectional)
    return [out, states[0], states[1]]


@rule("gru")
def gru(
    eq: Equations, x: Shape, state: Shape, weights: list[Shape], biases: bool, layers: int, dropout: float, train: bool, bidirectional: bool, *_: Any
) -> list[Shape]:
    _unpacked(x)
    return [_recurrent(eq, 3, x, [state], weights, biases, layers, bidirectional)[0], state]


@rule("rnn_tanh", "rnn_relu")
def rnn(
    eq: Equations, x: Shape, state: Shape, weights: list[Shape], biases: bool, layers: int, dropout: float, train: bool, bidirectional: bool, *_: Any
) -> list[Shape]:
    _unpacked(x)
    return [_recurrent(eq, 1, x, [state], weights, biases, layers, bidirectional)[0], state]


def _cell(eq: Equations, gates: int, x: Shape, state: Shape, w_ih: Shape, w_hh: Shape, biases: tuple[Shape | None, ...]) -> Shape:
    gate, hidden = eq.frozen(gates, "gates of a recurrent layer"), state[-1]
    for axis in (w_ih[0], w_hh[0], *(b[0] for b in biases if b is not None)):
        eq.equate(axis, product((gate, hidden)))
    eq.equate(w_ih[1], x[-1])
    eq.equate(w_hh[1], hidden)
    eq.sums(w_ih[1], w_hh[1])
    eq.broadcast(x[:-1], state[:-1])
    eq.macs(*x[:-1], gate, hidden, x[-1])
    eq.macs(*x[:-1], gate, hidden, hidden)
    return state


@rule("lstm_cell")
def lstm_cell(eq: Equations, x: Shape, states: list[Shape], w_ih: Shape, w_hh: Shape, *biases: Shape | None) -> list[Shape]:
    eq.broadcast(*states)
    return [_cell(eq, 4, x, states[0], w_ih, w_hh, biases)] * 2


@rule("gru_cell")
def gru_cell(eq: Equations, x: Shape, state: Shape, w_ih: Shape, w_hh: Shape, *biases: Shape | None) -> Shape:
    return _cell(eq, 3, x, state, w_ih, w_hh, biases)


@rule("rnn_tanh_cell", "rnn_relu_cell")
def rnn_cell(eq: Equations, x: Shape, state: Shape, w_ih: Shape, w_hh: Shape, *biases: Shape | None) -> Shape:
    return _cell(eq, 1, x, state, w_ih, w_hh, biases)
