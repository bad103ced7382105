"""The small model as an instance of the user's own class, where it still runs right.

A copy of the user's module gets the small tensors, and the integers among its attributes that the graph shows to be
sizes (a head count in a reshape, the groups of a convolution) follow. Nothing of this is assumed to work: the copy is compared
with the small graph, and is dropped unless it answers the same.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from structprune.errors import VerificationError
from structprune.ir.graph import Graph, owners_of, source_code_of
from structprune.ir.traced import TracedModule
from structprune.transform.reference import Exact, in_double
from structprune.transform.verify import difference, floats

_log = logging.getLogger(__name__)

Attributes = dict[str, dict[str, Any]]  # module name -> attribute -> new value

_TOLERANCE = 1e-6
_TOLERANCE_SINGLE = 1e-3  # what float32 may lose in a deep network


def rebuild(model: nn.Module, tensors: Mapping[int, Tensor], attributes: Attributes) -> nn.Module:
    """A copy of `model` that holds `tensors` (by the identity of the original ones) and the given attributes.

    What is replaced is never copied: the copy costs the memory of the small model.
    """
    small = copy.deepcopy(model, dict(tensors))
    for name, values in attributes.items():
        module = small.get_submodule(name)
        for attribute, value in values.items():
            setattr(module, attribute, value)
    return small


def attributes_of(model: nn.Module, tensors: Mapping[int, Tensor], literals: Mapping[fx.Node, list[tuple[int, int]]]) -> Attributes:
    """The attributes of the user's modules that hold sizes which changed.

    A number that changed in the graph is looked for in the modules whose forward made the node, the innermost first;
    where several attributes have that value, those that the source line mentions are meant.
    """
    found: Attributes = {}
    for node, changes in literals.items():
        for old, new in changes:
            for owner in owners_of(node):
                try:
                    module = model.get_submodule(owner)
                except AttributeError:
                    continue
                names = [n for n, v in vars(module).items() if _holds(v, old)]
                code = source_code_of(node)
                names = [n for n in names if n in code] or names
                for name in names:
                    value = found.get(owner, {}).get(name, getattr(module, name))
                    found.setdefault(owner, {})[name] = _replaced(value, old, new)
                if names:
                    break
    for name, module in model.named_modules():
        for attribute, value in _described_sizes(module, tensors, found.get(name, {})).items():
            if getattr(module, attribute, value) != value:
                found.setdefault(name, {})[attribute] = value
    return found


def own_class(
    model: nn.Module,
    graph: Graph,
    small: TracedModule,
    tensors: Mapping[int, Tensor],
    attributes: Attributes,
    answers: Sequence[Tensor] | None = None,
) -> tuple[nn.Module | None, str]:
    """The small model in the user's class, or None; and in words what the comparison found.

    answers: the small graph's to the example, where they are known.
    """
    if isinstance(model, fx.GraphModule):
        return None, "the model came as a graph"
    note = ""
    guesses = [attributes]
    for among in ("torch.", ""):  # torch's own layers describe themselves; in others a number may mean something else
        guess = _sizes_by_value(model, tensors, attributes, among)
        guesses += [guess] if guess != guesses[-1] else []
    for guess in guesses:
        try:
            candidate = rebuild(model, tensors, guess).eval()
            error = _compare(candidate, graph, small, answers)
            if _has_unseen_parameters(model, tensors):
                _runs_in_training(candidate, graph)
            return candidate, f"the user's class agrees with the small graph to {error:.1g}"
        except VerificationError as differs:
            note = note or f"the user's class does not follow the new sizes: {differs}"
        except Exception as raised:  # the user's code may raise anything when its sizes change
            _log.debug("the user's class does not run at the new sizes", exc_info=True)
            note = note or f"the user's class does not run at the new sizes: {type(raised).__name__}: {(str(raised).splitlines() or [''])[0][:160]}"
    return None, note


def _sizes_by_value(model: nn.Module, tensors: Mapping[int, Tensor], attributes: Attributes, among: str) -> Attributes:
    """`attributes`, and every other integer of a module that is a size of its tensors, where all tensors of that size changed alike.

    among: how the names of the modules' classes begin. A guess, about which the comparison decides.
    """
    found = {name: dict(values) for name, values in attributes.items()}
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(among):
            continue
        sizes: dict[int, set[int]] = {}
        for tensor in [*module.parameters(), *module.buffers()]:
            for before, after in zip(tensor.shape, tensors.get(id(tensor), tensor).shape, strict=True):
                sizes.setdefault(before, set()).add(after)
        changed = {before: after.pop() for before, after in sizes.items() if len(after) == 1 and after != {before}}
        for attribute, value in vars(module).items():
            if type(value) is int and value in changed and attribute not in found.get(name, {}):
                found.setdefault(name, {})[attribute] = changed[value]
    return found


def _compare(candidate: nn.Module, graph: Graph, small: TracedModule, answers: Sequence[Tensor] | None) -> float:
    """Largest difference between the candidate and the small graph as a share of the answer, in the model's own precision.

    Both hold the same tensors and call the same kernels, mostly in the same order. Where rounding may explain what is left, float64 decides.
    """
    with torch.no_grad():
        args, kwargs = graph.example()
        got = floats(candidate(*args, **kwargs))
        wanted = floats(fx.Interpreter(small).run(*graph.flat_inputs(), enable_io_processing=False)) if answers is None else answers
        error = _apart(got, wanted, graph)
        if _TOLERANCE < error < _TOLERANCE_SINGLE:
            args, kwargs = pytree.tree_map(in_double, graph.example())
            got = floats(copy.deepcopy(candidate).double()(*args, **kwargs))
            error = _apart(got, floats(Exact(small).run(*map(in_double, graph.flat_inputs()), enable_io_processing=False)), graph)
    if not error <= _TOLERANCE:
        raise VerificationError(f"it differs by {error:.2g}")
    return error


def _apart(got: Sequence[Tensor], wanted: Sequence[Tensor], graph: Graph) -> float:
    nothing = [torch.zeros((), dtype=torch.float64)] * len(wanted)
    return difference(got, wanted, lambda: nothing, graph.output_names)


def _runs_in_training(candidate: nn.Module, graph: Graph) -> None:
    """Layers that evaluation never reaches (auxiliary heads) may not fit the small ones: then training would fail."""
    with torch.no_grad():
        args, kwargs = graph.example()
        copy.deepcopy(candidate).train()(*args, **kwargs)


def _has_unseen_parameters(model: nn.Module, tensors: Mapping[int, Tensor]) -> bool:
    return any(id(p) not in tensors for p in model.parameters())


def _holds(value: Any, number: int) -> bool:
    if isinstance(value, (tuple, list)):
        return any(type(v) is int and v == number for v in value)
    return type(value) is int and value == number


def _replaced(value: Any, old: int, new: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(new if v == old else v for v in value)
    return new if value == old else value


def _described_sizes(module: nn.Module, tensors: Mapping[int, Tensor], changed: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's own layers say of their sizes, read off their small tensors."""

    def shape(name: str) -> tuple[int, ...]:
        tensor = getattr(module, name)
        return tuple(tensors.get(id(tensor), tensor).shape)

    if isinstance(module, nn.modules.conv._ConvNd):
        groups = changed.get("groups", module.groups)
        first, second, *_ = shape("weight")
        return (
            {"in_channels": first, "out_channels": second * groups} if module.transposed else {"in_channels": second * groups, "out_channels": first}
        )
    if isinstance(module, nn.Linear):
        return {"out_features": shape("weight")[0], "in_features": shape("weight")[1]}
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and isinstance(module.weight, Tensor):
        return {"num_channels" if isinstance(module, nn.GroupNorm) else "num_features": shape("weight")[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": shape("weight")[0], "embedding_dim": shape("weight")[1]}
    if isinstance(module, nn.RNNBase):
        sizes = {"input_size": shape("weight_ih_l0")[1], "hidden_size": shape("weight_hh_l0")[0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)}
        return sizes | ({"proj_size": shape("weight_hr_l0")[0]} if module.proj_size else {})
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape("weight")[0]}
    if isinstance(module, nn.LayerNorm) and isinstance(module.weight, Tensor):
        return {"normalized_shape": shape("weight")}
    return {}
