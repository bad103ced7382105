"""A graph run node by node over many batches at once, so that two graphs can go side by side and one be changed on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from structprune.ir.graph import written_to
from structprune.ir.samples import Samples, copies, samples_in

_log = logging.getLogger(__name__)


class Stepping:
    """`values[batch][node]` holds every answer that is still to be read. Inputs, and buffers that the graph writes to, are copied."""

    def __init__(self, module: fx.GraphModule, batches: Iterable[Sequence[Any]] = ()):
        self.nodes = list(module.graph.nodes)
        self._module = module
        self._runs: list[fx.Interpreter] = []
        self._dead = _last_readers(self.nodes)
        self._written = written_to(self.nodes)
        self._next = 0
        self.join(batches)

    def join(self, batches: Iterable[Sequence[Any]]) -> None:
        """Batches go on with the others. They catch up one after the other, through the module as it is now, every node that was run forgotten."""
        for batch in batches:
            run = fx.Interpreter(self._module, garbage_collect_values=False)
            run.args_iter = iter(copies(batch))
            for node in self.nodes[: self._next]:
                self._run(run, node)
                self._forget(run, node)
            self._runs.append(run)

    @property
    def values(self) -> list[dict[fx.Node, Any]]:
        return [run.env for run in self._runs]

    def holds(self, node: fx.Node) -> bool:
        """Whether its answers are there."""
        return bool(self._runs) and node in self._runs[0].env

    def compute(self, node: fx.Node) -> Iterable[Any]:
        """The node's answer to each batch, one after the other; nothing is kept."""
        return (run.run_node(node) for run in self._runs)

    def step(self) -> Any:
        """Run the next node on all batches; returns its answer to the last of them."""
        node = self.nodes[self._next]
        for run in self._runs:
            self._run(run, node)
        self._next += 1
        return self._runs[-1].env[node]

    def forget(self, node: fx.Node) -> None:
        """Let go of what was last read by this node."""
        for run in self._runs:
            self._forget(run, node)

    def _run(self, run: fx.Interpreter, node: fx.Node) -> None:
        value = run.run_node(node)
        run.env[node] = value.clone() if node.op == "get_attr" and node in self._written else value

    def _forget(self, run: fx.Interpreter, node: fx.Node) -> None:
        for value in self._dead.get(node, ()):
            run.env.pop(value, None)

    @property
    def upcoming(self) -> fx.Node | None:
        return self.nodes[self._next] if self._next < len(self.nodes) else None


def answer(module: fx.GraphModule, batch: Sequence[Any]) -> Any:
    """The module's answer to one batch; its inputs, and buffers that it writes to, stay as they are."""
    run = Stepping(module, [batch])
    value: Any = None
    while (node := run.upcoming) is not None:
        value = run.step()
        run.forget(node)
    return value


@torch.no_grad()
def takes_one(module: fx.GraphModule, samples: Samples) -> bool:
    """Whether the module takes one sample of a batch. The nodes of a graph, which its edges speak of by number, are no samples."""
    batch = next((batch for batch in samples.batches if samples_in(batch) > 1), None)
    if batch is None:
        return True
    try:
        answer(module, Samples([batch]).of({0}).batches[0])
    except (RuntimeError, IndexError, ValueError):
        _log.debug("the model does not take one sample", exc_info=True)
        return False
    return True


def _last_readers(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nobody reads after it."""
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(nodes):
        for value in node.all_input_nodes:
            if value not in seen:
                seen.add(value)
                last.setdefault(node, []).append(value)
        if node not in seen:
            seen.add(node)
            if node.op != "output":
                last.setdefault(node, []).append(node)
    return last
