"""Random networks, random plans: the small model must answer as two oracles do that know nothing of each other.

The first is `verify`, which interprets the traced graph with the axis types that inference found. The second is written down here:
it knows only the eager module and the plan's `tensors`, sets what the plan removes to zero, and runs norms over what the plan keeps.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from networks import Network, RmsNorm, networks
from test_operators import watched
from torch import Tensor, nn

from structprune.analysis.groups import Groups, find_groups
from structprune.decide.plan import atoms_of, planned
from structprune.frontends.trace import trace
from structprune.ir.axes import Atom, Keep
from structprune.ir.graph import Graph
from structprune.ir.operators import operator_name
from structprune.ir.plan import Cut, Plan
from structprune.transform.branches import branches
from structprune.transform.surgery import Surgery, operate
from structprune.transform.verify import verify

torch.set_num_threads(1)

operators_met: Counter[str] = Counter()


@st.composite
def choices(draw: st.DrawFn, graph: Graph, groups: Groups) -> Keep:
    """For every group the channels that stay: at least one, or none of what may go whole."""
    keep: dict[Atom, np.ndarray] = {}
    for group in groups:
        kept = draw(st.sets(st.integers(0, group.size - 1), min_size=1, max_size=group.size), label=group.name)
        keep[group.atom] = np.array(sorted(kept))
    whole = list(dict.fromkeys(branches(graph, groups).values()))
    for number in draw(st.sets(st.sampled_from(range(len(whole)))), label="branches that go") if whole else ():
        keep |= {atom: np.zeros(0, dtype=np.int64) for atom in whole[number]}
    return keep


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export, of the list of weights that a recurrent layer keeps
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
@given(networks(), st.data())
def test_small_models_answer_as_both_oracles(network: Network, data: st.DataObject):
    check(network, data)


def check(network: Network, data: st.DataObject) -> None:
    """Trace a network, prune it by a plan that is drawn, and compare. bench/fuzz.py does this some thousand times."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    graph = trace(network, (network.example,))
    operators_met.update(operator_name(n) for n in graph.nodes if n.op == "call_function")
    assert not watched(graph).wrong
    groups = find_groups(graph)
    types = groups.types
    note(str(groups))
    event(f"{min(len(groups), 5)} groups or more" if len(groups) > 4 else f"{len(groups)} groups")
    keep = data.draw(choices(graph, groups))
    plan = planned(groups, keep)
    without = [atom for atom, kept in keep.items() if not len(kept)]
    event(f"{len(without)} groups keep nothing")

    surgery = operate(graph, types, keep, plan.tensors)
    small = surgery.module
    verify(graph, types, keep, small, exact={s.name: s.exact for s in surgery.stand_ins})

    stored = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert (stored.tensors, stored.groups) == (plan.tensors, plan.groups)
    assert {a: k.tolist() for a, k in atoms_of(stored, groups).items()} == {a: k.tolist() for a, k in keep.items() if len(k) < a.size}
    left, counted = sum(p.numel() for p in small.parameters()), groups.params({atom: len(kept) for atom, kept in keep.items()})
    assert left == counted or (without and left <= counted)
    assert_shapes_follow(plan, network, small)
    if not network.inexact:
        for batch in [network.example] + [network.example[[0, 1, 0]]] * graph.dynamic_batch:
            assert_equals_masked(network, plan.tensors, small, batch)
        if not any(isinstance(module, RmsNorm) for module in network.modules()):
            assert all(group.exact for group in groups)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the original was changed"


def assert_shapes_follow(plan: Plan, network: Network, small: nn.Module) -> None:
    """Every tensor of the small model has the shape that the plan says."""
    sizes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    for name, tensor in network.state_dict().items():
        if name in sizes:
            keep = plan.tensors[name].keep if name in plan.tensors else {}
            assert list(sizes[name]) == [len(keep.get(dim, range(n))) for dim, n in enumerate(tensor.shape)], name


def unrounded(surgery: Surgery) -> nn.Module:
    """The small model in float64, with what stands in for branches as it was before it was rounded."""
    small = copy.deepcopy(surgery.module).double()
    for stand_in in surgery.stand_ins:
        small.get_parameter(stand_in.name).data.copy_(stand_in.exact)
    return small


# ------------------------------------------------------------------------------------------------------- the second oracle


def masked(network: Network, tensors: Mapping[str, Cut]) -> oracle.Masked:
    """The original, in float64, with zeros where the plan cuts, and with its handwritten norms over the kept channels."""
    answer = oracle.masked(network, {name: cut.keep for name, cut in tensors.items()}, means=False)
    for name, module in answer.model.named_modules():
        if isinstance(module, RmsNorm) and f"{name}.weight" in tensors:
            module.forward = partial(_over_kept, module, torch.tensor(tensors[f"{name}.weight"].keep[0], dtype=torch.long))  # type: ignore[method-assign]
    return answer


def _over_kept(norm: RmsNorm, kept: Tensor, x: Tensor) -> Tensor:
    small = copy.deepcopy(norm)
    del small.forward
    small.weight = nn.Parameter(norm.weight[kept])
    return torch.zeros_like(x).index_copy(-1, kept, small(x[..., kept]))


@torch.no_grad()
def assert_equals_masked(network: Network, tensors: Mapping[str, Cut], small: nn.Module, x: Tensor) -> None:
    x = x.double() if x.is_floating_point() else x
    wanted, got = masked(network, tensors)(x), copy.deepcopy(small).double()(x)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item() + 1e-12)


# ---------------------------------------------------------------------------------------------------------------- coverage


def test_the_random_networks_met_many_operators():
    if not operators_met:
        pytest.skip("counts what the test above has met")
    assert len(operators_met) >= 45, sorted(operators_met)
