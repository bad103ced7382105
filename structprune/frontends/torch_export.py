"""torch.export, called so that it goes through where it can, says nothing, and leaves the model as it was."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import fields, is_dataclass
from itertools import dropwhile
from os.path import dirname
from traceback import StackSummary
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import Tracer
from torch.fx.proxy import TracerBase
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from structprune.ir.graph import TORCH, held_by
from structprune.ir.signature import signature_of
from structprune.ir.traced import attributes_kept, replaced

_SPEAKS_OF_TORCH = frozenset({"torch", "nn", "F", "Tensor"})
UNKNOWN_CLASS = "which is not a known type"  # as torch.export says it of what a model answers


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: Sequence[set[int]]) -> ExportedProgram:
    """torch.export, silent; axes: those of each leaf of the arguments that are to be dynamic."""
    shapes: Any = None
    args, kwargs = pytree.tree_map_only(Tensor, _alias, (args, dict(kwargs)))
    if any(axes):
        collection = ShapesCollection()
        for leaf, dims in zip(pytree.tree_leaves((args, kwargs)), axes, strict=True):
            if isinstance(leaf, Tensor) and leaf.dim() and dims:
                collection[leaf] = dict.fromkeys(sorted(dims), Dim.AUTO)
        shapes = collection.dynamic_shapes(model, args, kwargs)
    origins = preserve_node_meta() if signature_of(model) is not None else nullcontext()
    as_it_is = _masks_as_they_are(), _lengths_as_they_are(), _boxes_of_all_classes(), _modules_where_they_are(), _new_buffers_beside(model)
    with ExitStack() as stack:
        # torch.export itself puts attributes back, and takes away tensors that came new, but not the note that they are there
        for context in (_quiet(), attributes_kept(model), *as_it_is, _methods_on_stacks(), _failed_calls_left(), origins):
            stack.enter_context(context)
        try:
            return torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch raises one of its own
            if UNKNOWN_CLASS not in str(error) or not _made_known(called_once(model, args, kwargs)):
                raise
            return torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)


def _made_known(answer: Any) -> bool:
    """Whether there are dataclasses in an answer that torch knew no fields of; now it does, in this process."""
    found = False
    for leaf in pytree.tree_leaves(answer, is_leaf=is_dataclass):
        if is_dataclass(leaf):
            if not isinstance(leaf, type) and type(leaf) not in pytree.SUPPORTED_NODES:
                torch.export.register_dataclass(type(leaf))
                found = True
            found |= any(_made_known(getattr(leaf, field.name)) for field in fields(leaf))
    return found


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor of the same values: torch.export leaves marks on those that it fails with, and would take the same axes for dynamic again."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


@torch.no_grad()
def called_once(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the model answers as it is. It runs on copies of what it may write to: of its parameters, too, in training (codebooks that learn)."""
    copies, named = pytree.tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    own = held_by(model) if model.training else dict(model.named_buffers())
    with attributes_kept(model), torch.random.fork_rng(devices=[]):
        return torch.func.functional_call(model, {name: tensor.detach().clone() for name, tensor in own.items()}, copies, named)


@contextmanager
def unaware() -> Iterator[None]:
    """Code that asks whether it is traced (`torch.compiler.is_compiling()`; then it makes no mask of its own) goes the way that it goes else."""
    with ExitStack() as held:
        for name in ("is_compiling", "is_exporting", "is_dynamo_compiling"):
            held.enter_context(replaced(torch.compiler, name, lambda: False))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints the whole graph where it fails; what matters of it comes back as an error."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _new_buffers_beside(model: nn.Module) -> Iterator[None]:
    """A buffer that code registers in its first call (a table of positions) is a plain attribute meanwhile.

    torch.export would count it among the buffers that it knew, and write it to an input, or raise where there are fewer inputs than such buffers.
    """
    known = set(map(id, model.modules()))
    register = nn.Module.register_buffer

    def registered(module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if id(module) in known and name not in module._buffers:
            vars(module)[name] = tensor
        else:
            register(module, name, tensor, persistent)

    with replaced(nn.Module, "register_buffer", registered):
        yield


@contextmanager
def _methods_on_stacks() -> Iterator[None]:
    """The methods and functions that a forward calls are on the stack of a node: torch notes the lines of forwards alone."""
    filtered = TracerBase._filter_traceback_frames

    def with_methods(tracer: TracerBase, summary: StackSummary) -> StackSummary:
        forwards = filtered(tracer, summary)
        places = {dirname(frame.filename) for frame in forwards if frame.name == "forward" and not frame.filename.startswith(TORCH)}
        kept = set(map(id, forwards))
        frames = dropwhile(lambda frame: id(frame) not in kept, summary)
        return StackSummary.from_list([frame for frame in frames if id(frame) in kept or dirname(frame.filename) in places])

    with replaced(TracerBase, "_filter_traceback_frames", with_methods):
        yield


@contextmanager
def _failed_calls_left() -> Iterator[None]:
    """A call of a layer that raises, and whose caller goes on without (`try: layer(x, lengths) except TypeError: layer(x)`), is left."""
    call = Tracer.call_module

    def call_module(tracer: Tracer, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        depth = len(tracer.module_stack)
        try:
            return call(tracer, module, forward, args, kwargs)
        except BaseException:
            while len(tracer.module_stack) > depth:
                tracer.module_stack.popitem()
            raise

    with replaced(Tracer, "call_module", call_module):
        yield


@contextmanager
def _masks_as_they_are() -> Iterator[None]:
    """torch's own transformer looks at the values of a mask to see whether it is causal, which cannot be traced.

    It does so only to choose a kernel: taken as any other mask, it answers the same.
    """
    with replaced(nn.modules.transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True):
        yield


@contextmanager
def _lengths_as_they_are() -> Iterator[None]:
    """`len(x)`, of which Python makes a plain number, is `x.shape[0]` in all modules that speak of torch: the size of a batch stays free."""
    others = {"torch", "structprune", "sympy"}
    modules = [module for name, module in list(sys.modules.items()) if module is not None and name.partition(".")[0] not in others]
    spaces = [space for space in map(vars, modules) if "len" not in space and any(name in space for name in _SPEAKS_OF_TORCH)]

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, FakeTensor) and value.dim() else len(value)

    for space in spaces:
        space["len"] = length
    try:
        yield
    finally:
        for space in spaces:
            space.pop("len", None)


@contextmanager
def _boxes_of_all_classes() -> Iterator[None]:
    """torchvision looks at the number of boxes to choose how it suppresses those of several classes, and leaves where there are none.

    To move every class out of the way of the others always answers the same.
    """
    boxes_of = sys.modules.get("torchvision.ops.boxes")
    if boxes_of is None:
        yield
        return

    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
        apart = idxs.to(boxes) * (largest + 1)
        return boxes_of.nms(boxes + apart[:, None], scores, iou_threshold)  # type: ignore[no-any-return]

    with replaced(boxes_of, "batched_nms", batched_nms):
        yield


@contextmanager
def _modules_where_they_are() -> Iterator[None]:
    """`self.layer.to(x.device)` in a forward, which torch.export cannot follow, does nothing where all of the layer is there already."""
    move = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        there = all(device in (None, t.device) and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in tensors)
        return module if there else move(module, *args, **kwargs)

    with replaced(nn.Module, "to", to):
        yield
