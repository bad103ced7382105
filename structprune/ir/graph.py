"""`Graph`: a traced model. A torch.fx graph of ATen operators over named tensors, with sizes and source lines."""

from __future__ import annotations

import ast
import hashlib
import io
import operator
import re
import threading
from collections.abc import Collection, Generator, Mapping, MappingView, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from structprune.ir.operators import has_effect, is_random, operator_name
from structprune.ir.signature import Signature
from structprune.ir.source import Formula, formulas_at, numbers_behind, text_at

ORIGIN = "structprune_origin"  # in the notes that torch keeps of a node: what of the user's own file it was made of
TORCH = f"{Path(torch.__file__).parent}/"
_PASSES = "torch/fx/passes/"  # their lines stand in for the user's where a pass of torch's added a node
_CHOSEN = "structprune_chosen"  # on a symbolic size: what it is on the example, where values decide
_NEVER_COPIED = (MappingView, ModuleType, Generator, io.IOBase, type(threading.Lock()))
_HANDING_ON = frozenset({"to", "_to_copy", "detach", "clone", "contiguous", "alias"})


@dataclass(frozen=True)
class Graph:
    """What tracing gives, and what every later stage reads. Nothing changes it.

    `module` holds the user's own tensors, not copies, under their `state_dict` names, but for weights that are standardised: its `get_attr` nodes
    are parameters, buffers and constants, its `placeholder` nodes the model's inputs.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    exported: torch.export.ExportedProgram
    aliases: Mapping[str, tuple[str, ...]]  # a tensor's name in the graph -> all its names in the state_dict
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic: tuple[tuple[int, ...], ...]  # of every input, the axes whose size may be another
    doubled: bool = False  # the example was a batch of one, which tracing would take for a constant: args hold it twice
    unneeded: fx.Graph = field(default_factory=fx.Graph)  # layers whose answer nobody needs: see `whole`
    standardised: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # folded weights, by their names in the graph, and over which axes
    held: tuple[int, ...] = ()  # inputs by whose values the model's code decides: they stay the example's
    signature: Signature | None = None  # of the file that the model was read from
    notes: tuple[str, ...] = ()  # what a user should know about how the model was traced

    @property
    def dynamic_batch(self) -> bool:
        """Whether the first axis of every input may have any size."""
        axes = [d for d, v in zip(self.dynamic, self.flat_inputs(), strict=True) if isinstance(v, Tensor) and v.dim()]
        return bool(axes) and all(0 in d for d in axes)

    @property
    def batched(self) -> tuple[bool, ...]:
        """Of every input, whether its first axis is the batch: free, and of one size with the first that is. Others may be free on their own."""
        return tuple(size is not None and size == self.batch for size in self._first_free)

    @property
    def batch(self) -> str | None:
        """The size of the batch, where it is free, as the sizes of values write it."""
        return next((size for size in self._first_free if size is not None), None)

    @property
    def _first_free(self) -> list[str | None]:
        shapes: list[Sequence[Any]] = [getattr(n.meta.get("val"), "shape", ()) for n in self.nodes if n.op == "placeholder"]
        return [str(shape[0]) if 0 in axes else None for shape, axes in zip(shapes, self.dynamic, strict=True)]

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    @property
    def whole(self) -> list[fx.Node]:
        """The nodes, and behind them those of `unneeded`: a second head, a pooler, which the user's class computes and whose answer no output needs.
        Its layers count for nothing, but have to follow. Its placeholders are answers of the others, by their names.
        """
        return [*self.nodes, *self.unneeded.nodes]

    @property
    def read_aside(self) -> dict[fx.Node, fx.Node]:
        """Of the placeholders of `unneeded`, the nodes whose answers they are."""
        named = {n.name: n for n in self.nodes}
        return {n: named[n.target] for n in self.unneeded.nodes if n.op == "placeholder" and n.target in named}  # type: ignore[index]

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Of every input, the axes that may have any size and are no batch: neither first, nor of one size with a first axis."""
        shapes: list[Sequence[Any]] = [getattr(n.meta.get("val"), "shape", ()) for n in self.nodes if n.op == "placeholder"]
        batches = {str(shape[0]) for shape, axes in zip(shapes, self.dynamic, strict=True) if 0 in axes}
        return tuple(tuple(d for d in axes if d and str(shape[d]) not in batches) for shape, axes in zip(shapes, self.dynamic, strict=True))

    def tensor(self, node: fx.Node) -> Tensor:
        """The parameter, buffer or constant behind a `get_attr` node."""
        return attribute(self.module, str(node.target))

    def constant(self, value: Any) -> Tensor | None:
        """The tensor behind an argument that is a constant of the model, as it stands or copied; None for anything else."""
        while isinstance(value, fx.Node) and operator_name(value) in ("lift_fresh_copy", "detach", "clone", "alias"):
            value = value.args[0]
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        tensor = self.tensor(value)
        return None if isinstance(tensor, torch.nn.Parameter) else tensor

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example's arguments, positional and by keyword: copies, for a model may write to its inputs."""
        return pytree.tree_map_only(Tensor, torch.clone, (self.args, dict(self.kwargs)))  # type: ignore[no-any-return]

    def flat_inputs(self) -> list[Any]:
        """The leaves of the example's arguments, in the order of the placeholders."""
        return pytree.tree_leaves(self.example())

    def called_with(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, positional and by keyword, whose leaves are these."""
        return pytree.tree_unflatten(list(inputs), pytree.tree_structure((self.args, dict(self.kwargs))))  # type: ignore[no-any-return]

    def given_inputs(self) -> list[Any]:
        """`flat_inputs` in the batch of the user's example."""
        return [
            v[:1] if self.doubled and isinstance(v, Tensor) and v.dim() and len(v) == 2 and (0 in axes or self.signature is None) else v
            for v, axes in zip(self.flat_inputs(), self.dynamic, strict=True)
        ]


def resized(values: Sequence[Any], dynamic: Sequence[Sequence[int]], factor: float) -> list[Any]:
    """Inputs of other sizes: dynamic axes but the batch cut short, or repeated, to about `factor` times their length."""

    def along(value: Any, axes: Sequence[int]) -> Any:
        for axis in axes:
            if axis:
                value = repeated(value, axis, max(1, int(value.shape[axis] * factor)))
        return value

    return [along(value, axes) if isinstance(value, Tensor) else value for value, axes in zip(values, dynamic, strict=True)]


def repeated(value: Tensor, axis: int, size: int) -> Tensor:
    """An axis cut short, or its entries repeated, to another size."""
    return value.index_select(axis, torch.arange(size) % value.shape[axis])


def held_by(module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module under all their names, whatever its class makes of its state_dict."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def digest(module: torch.nn.Module) -> str:
    """Of the names, types, shapes and values of all that a module holds."""
    found = hashlib.blake2b()
    for name, tensor in held_by(module).items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def memo_for(module: torch.nn.Module) -> dict[int, Any]:
    """The memo with which `copy.deepcopy` can copy a user's module: what it refuses by itself, by the identity of that.

    What was computed and kept (a masked weight, features of the last call), detached, for torch copies no tensor with its history; and as it is what
    Python cannot copy: the keys of a dictionary, a module of functions, a file, a lock.
    """
    kept = pytree.tree_leaves([vars(part) for part in module.modules()])
    results = {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    return results | {id(thing): thing for thing in kept if isinstance(thing, _NEVER_COPIED)}


def attribute(root: torch.nn.Module, name: str) -> Any:
    """`root.a.b.c` for the name 'a.b.c'."""
    return operator.attrgetter(name)(root)


def computed_constants(graph: Graph) -> frozenset[fx.Node]:
    """Nodes whose value depends on no input, parameter or buffer: a table of sines, a mask of the window. Other constants are not among them.

    Nor is one that is only handed on, in another type or on another device: the user's module holds it, and what it holds can be cut.
    """
    constants = {n for n in graph.nodes if n.op == "get_attr" and str(n.target) not in graph.aliases and isinstance(graph.tensor(n), Tensor)}
    computed = computed_of(constants, graph.nodes) - constants
    for node in reversed(graph.nodes):
        source = node
        while operator_name(source) in _HANDING_ON:
            source = source.args[0]  # type: ignore[assignment]
        if source in constants and computed.isdisjoint(node.users):
            computed.discard(node)
    return frozenset(computed)


def computed_of(tensors: Collection[fx.Node], nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The `get_attr` nodes given, and the nodes that are computed of such alone; not what is drawn at random, or written to in place."""
    written = written_to(nodes)
    found: set[fx.Node] = set()
    for node in nodes:
        computed = node.op == "call_function" and not has_effect(node) and not is_random(node) and all(n in found for n in node.all_input_nodes)
        if (node in tensors or computed) and node not in written:
            found.add(node)
    return found


def written_to(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes whose answer an operator writes to in place, itself or through a view; and what may share memory with these."""
    written: set[fx.Node] = set()
    for node in reversed(nodes):  # a view is written to where its own view is
        if (node.op == "call_function" and has_effect(node)) or node in written:
            written.update(node.all_input_nodes[:1])
    return written


def size_of(value: Any) -> int:
    """A size as a number: a symbolic one by its value on the example inputs."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    return int(getattr(value.node, _CHOSEN, 0) if is_open(value) else value.node.hint or 0)


def note_size(value: Any, size: int) -> None:
    """For `size_of`: what a size is on the example that values decide, and of which torch knows nothing."""
    if is_open(value):
        setattr(value.node, _CHOSEN, size)


def is_open(value: Any) -> TypeGuard[torch.SymInt]:
    """Whether values decide a size: how many tokens choose an expert."""
    return isinstance(value, torch.SymInt) and value.node.hint is None


def sizes_in(value: Any) -> list[Any]:
    """The sizes of all tensors in an answer, and what else there is."""
    return [size for leaf in pytree.tree_leaves(value) for size in (leaf.shape if isinstance(leaf, Tensor) else [leaf])]


def has_open_size(node: fx.Node) -> bool:
    """Whether values decide what an entry of the node's answer belongs to, and another model may have others there."""
    return any(is_open(size) for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor) for size in leaf.shape)


def choices(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes by whose indices and truth values it is decided what is where in an answer with a size that values decide."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if has_open_size(node) or not found.isdisjoint(node.users):
            found.add(node)
    return {n for n in found if any(isinstance(v, Tensor) and not v.is_floating_point() for v in pytree.tree_leaves(n.meta.get("val")))}


def is_dynamic(value: Any) -> bool:
    """Whether a size is symbolic, and not pinned to a number by what the model's code does with it."""
    return isinstance(value, torch.SymInt) and value.node.maybe_as_int() is None


def shape_of(value: Tensor) -> tuple[int, ...]:
    """The shape of a (fake) tensor on the example inputs."""
    return tuple(size_of(s) for s in value.shape)


def source_of(node: fx.Node) -> str:
    """`file.py:line` of the user's code that made a node, or the node of an ONNX file; empty where torch does not know."""
    if ORIGIN in (node.meta.get("custom") or {}):
        return str(node.meta["custom"][ORIGIN])
    best = ""
    for path, line in frames_of(node):
        if not path.startswith(_PASSES) and (not path.startswith(TORCH) or not best):
            best = f"{'/'.join(Path(path).parts[-2:])}:{line}"
    return best


def source_code_of(node: fx.Node) -> str:
    """The statements of the user's code on the way to a node, as text, and those that compute the numbers in them."""
    return "\n".join(text for place in frames_of(node) for text in (text_at(*place), *map(ast.unparse, numbers_behind(*place))) if text)


def formulas_of(node: fx.Node) -> list[Formula]:
    """What the statements on the way to a node compute of attributes of their modules."""
    return [formula for place in frames_of(node) for formula in formulas_at(*place)]


def frames_of(node: fx.Node) -> list[tuple[str, int]]:
    """The files and lines on the way to a node, the innermost last."""
    return [(path, int(line)) for path, line in re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")]


def owners_of(node: fx.Node) -> list[str]:
    """Names of the modules whose forward made a node, the innermost first."""
    return [path for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values())]
