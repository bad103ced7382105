"""`dead`: what goes contributes nothing, by proof from the weights, and the answer stays the original's."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from networks import Network, networks
from torch import Tensor, nn
from torch.nn.utils import prune

import structprune as sp
from structprune.analysis.groups import Groups, find_groups
from structprune.decide.dead import silence
from structprune.decide.plan import atoms_of
from structprune.frontends.trace import trace
from structprune.ir.graph import Graph
from structprune.transform.surgery import operate
from structprune.transform.verify import verify, verify_unchanged

# ------------------------------------------------------------------------------------------------------------ random networks

counted: Counter[str] = Counter()


def damage(draw: st.DrawFn, network: Network, groups: Groups) -> set[tuple[str, int]]:
    """Silence, scale away, cut off or copy channels at random. Returns those that were silenced in every tensor of their group."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    silenced = set()
    for group in groups:
        kind = draw(st.sampled_from(["nothing", "everywhere", "one tensor", "copied", "scaled"]), label=group.name)
        channel, other = (draw(st.integers(0, group.size - 1)) for _ in range(2))
        members = [m for m in group.members if tensors[m.tensor].is_floating_point() and not m.tensor.endswith("running_var")]
        chosen = [draw(st.sampled_from(members))] if kind == "one tensor" and members else members
        for member in chosen:
            tensor, size = tensors[member.tensor], tensors[member.tensor].shape[member.dim]
            if kind == "nothing" or size != group.size:  # a factor or a summand: its entries are more than one
                continue
            if kind == "copied":
                if member.dim == 0:
                    tensor.select(member.dim, other).copy_(tensor.select(member.dim, channel).clone())
            elif kind != "scaled" or tensor.dim() == 1:
                tensor.select(member.dim, channel).zero_()
        if kind == "everywhere" and all(tensors[m.tensor].shape[m.dim] == group.size for m in members):
            silenced.add((group.name, channel))
    return silenced


def without_dead(network: Network) -> tuple[Graph, Groups, nn.Module, dict[str, list[bool]]]:
    original = trace(network, (network.example,))
    _, module = copy.deepcopy((network, original.module))
    graph = replace(original, module=module)
    groups = find_groups(graph)
    dead = silence(graph, groups)
    plan = dead.plan(graph, groups)
    keep = atoms_of(plan, groups)
    small = operate(graph, groups.types, keep, plan.tensors).module
    verify(graph, groups.types, keep, small)
    verify_unchanged(graph, groups.types, original.module, small, dead.tolerance(torch.finfo(torch.float32).eps))
    counted.update(removed=sum(int(gone.sum()) for gone in dead.channels.values()), edited=int(dead.edited))
    return graph, groups, small, {name: gone.tolist() for name, gone in dead.channels.items()}


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
@given(networks(), st.data())
def test_the_answer_never_changes(network: Network, data: st.DataObject):
    check(network, data)


@torch.no_grad()
def check(network: Network, data: st.DataObject) -> None:
    groups = find_groups(trace(network, (network.example,)))
    note(str(groups))
    silenced = damage(data.draw, network, groups)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    graph, groups, small, dead = without_dead(network)
    x = network.example[[0, 1, 0]] if graph.dynamic_batch else network.example
    x = x.double() if x.is_floating_point() else x
    wanted, got = copy.deepcopy(network).double()(x), copy.deepcopy(small).double()(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item() + 1e-9, equal_nan=True)
    counted.update(silenced=len(silenced), found=sum(dead[name][channel] for name, channel in silenced))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()), "the original was changed"


def test_the_random_networks_had_dead_channels():
    if not counted:
        pytest.skip("counts what the test above has met")
    print(counted)
    assert counted["found"] > 0.5 * counted["silenced"] > 0, counted
