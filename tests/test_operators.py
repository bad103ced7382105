"""What is told of an operator call is what it does: whose memory its answer lies in, whether it draws, whether it has a twin that does not write."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from structprune.decide.influence import influence
from structprune.frontends.trace import trace
from structprune.ir.graph import Graph
from structprune.ir.operators import functional, is_fresh, is_random, is_view

OWN, SHARED, UNTOLD = "memory of its own", "its operand's", "not told"


class _Of(nn.Module):
    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]


class Watched(fx.Interpreter):
    """Runs a graph, and lists the nodes that answer in the memory of an operand although they are said not to."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.wrong: list[str] = []
        self.shared: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        answer = super().run_node(n)
        if n.op == "call_function":
            operands = [t for o in n.all_input_nodes for t in _tensors(self.env[o])]
            held = {t.untyped_storage().data_ptr() for t in operands if t.numel()}
            if any(t.untyped_storage().data_ptr() in held for t in _tensors(answer)):
                self.shared.append(n)
                if is_fresh(n):
                    self.wrong.append(str(n.target))
        return answer


def watched(graph: Graph) -> Watched:
    """The graph after a run; test_random_networks.py watches its networks, too."""
    found = Watched(graph.module)
    found.run(*graph.flat_inputs())
    return found


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda x: x.relu() + 1, OWN),
        (lambda x: torch.matmul(x, x), OWN),
        (lambda x: torch.cat([x]), OWN),
        (lambda x: F.max_pool2d(x, 1), OWN),
        (lambda x: F.adaptive_avg_pool2d(x, 4), OWN),  # as large as before
        (lambda x: F.interpolate(x, scale_factor=1.0), OWN),
        (lambda x: F.pad(x, (0, 0, 0, 0)), UNTOLD),
        (lambda x: x.repeat(1, 1, 1, 1), OWN),
        (lambda x: F.pixel_shuffle(x, 1), OWN),
        (lambda x: x.softmax(-1), OWN),
        (lambda x: x.to(torch.float64), UNTOLD),
        (lambda x: x.reshape(2, -1), SHARED),
        (lambda x: x.transpose(1, 2), SHARED),
        (lambda x: x.chunk(2, 1)[0], SHARED),
        (lambda x: x.unsafe_chunk(2, 1)[0], SHARED),
        (lambda x: torch.einsum("bchw->bwhc", x), SHARED),
        (lambda x: x.type_as(x), SHARED),
        (lambda x: F.dropout(x, 0.5, False), SHARED),
    ],
)
def test_an_answer_is_said_to_be_fresh_only_where_nobody_shares_its_memory(run: Callable[[Tensor], Any], told: str) -> None:
    found = watched(trace(_Of(run).eval(), (torch.randn(2, 4, 4, 4),)))
    assert not found.wrong
    calls = [n for n in found.graph.nodes if n.op == "call_function" and not isinstance(n.meta["val"], (int, torch.SymInt))]
    assert bool(found.shared) == (told == SHARED)
    assert all(is_fresh(n) for n in calls) == (told == OWN)


@pytest.mark.parametrize(
    ("run", "random"),
    [
        (lambda x: F.dropout(x, 0.5, False), False),
        (lambda x: F.dropout(x, 0.5, True), True),
        (lambda x: F.alpha_dropout(x, 0.5, True), True),
        (F.rrelu, False),
        (lambda x: F.rrelu(x, training=True), True),
        (lambda x: F.scaled_dot_product_attention(x, x, x), False),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
        (lambda x: x + torch.rand_like(x), True),
        (lambda x: x + torch.randn(4), True),
        (lambda x: torch.bernoulli(x.sigmoid()), True),
        (lambda x: F.batch_norm(x, None, None, training=True), False),
    ],
)
def test_what_draws_is_known(run: Callable[[Tensor], Any], random: bool) -> None:
    graph = trace(_Of(run).eval(), (torch.randn(2, 4, 4, 4),))
    assert any(is_random(n) for n in graph.nodes) == random


def test_dropout_that_draws_in_evaluation_makes_no_known_answer() -> None:
    """Its answer is no constant although its operand is one."""

    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * F.dropout(self.table, 0.5, True)

    graph = trace(Noise().eval(), (torch.randn(2, 4),))
    dropped = next(n for n in graph.nodes if is_random(n))
    unknown = influence(graph).known[dropped].unknown
    assert unknown is not None
    assert bool(unknown.all())
    assert not is_view(dropped)


def test_what_writes_in_place_has_a_twin_that_does_not() -> None:
    assert functional(torch.ops.aten.add_.Tensor) is torch.ops.aten.add.Tensor
    assert functional(torch.ops.aten.relu_.default) is torch.ops.aten.relu.default
    assert functional(torch.ops.aten.requires_grad_.default) is None
