"""ExportedProgram → ONNX file: simplified, checked, with the names of the model's inputs and outputs."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnx_ir.passes
import onnxruntime
import onnxscript.optimizer
import onnxscript.rewriter
import onnxslim
import torch
from onnxscript.rewriter.rules.common import _min_max_to_clip, _no_op
from torch import Tensor
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils import _pytree as pytree

from structprune.backends import ties
from structprune.backends.lowering import Lowered
from structprune.backends.onnx_operators import translations
from structprune.errors import StructpruneError, VerificationError, first_line
from structprune.frontends.onnx_in.defects import crashing_operands
from structprune.ir.traced import replaced
from structprune.transform.reference import in_double

_log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the largest answer: ONNX Runtime fuses and reorders float32 arithmetic
TOLERANCE_HALF = 2e-2  # in float16, of which one rounding is 5e-4 and a network has many, in another order
LAYER = "structprune.layer"  # a node's note on which layer of the user's module it comes from
_FIRST_AXIS = "structprune.first_axis"
_LARGE = 2_000_000_000  # bytes: a protocol buffer holds 2 GiB, and larger weights lie in a file beside

# of a file that was ONNX before, every weight stays what it was; runtimes fuse these themselves
_WEIGHT_FUSIONS = ["FusionGelu", *(f"Fusion{conv}{what}" for conv in ("Conv", "ConvTranspose") for what in ("Add", "BN", "Mul"))]
_OWN = 2  # times the difference between float32 and float64 in torch is what ONNX Runtime may differ by, in a model that is so sensitive
_MOST_OWN = 5e-2  # of the largest answer: a model that differs more from itself can be told from nothing
_NUDGES, _NUDGE = 4, 1e-6  # how often, and by how much of itself, every weight is changed to see whether an order hangs on last digits
LEAST = 1e-3  # a smaller answer counts as one of this: ONNX Runtime's sigmoid is right to 1e-7, not to a share of what it answers


class ExportError(StructpruneError):
    """The model has an operator that cannot be written as ONNX."""


def export(
    program: torch.export.ExportedProgram,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, str] | None = None,
    sizes: Sequence[Sequence[int | str]] = (),
    opset: int | None = None,
) -> dict[str, str]:
    """Write `program` to `path`. Axes that are dynamic in the program are dynamic in the file, under the names in `sizes`, of the inputs' axes.

    opset: the version of ONNX's operators; by default that of torch's exporter. Weights of 2 GB and more go to a file beside, `path` with .data.

    Returns where the file's nodes come from: the name of a node, or of a value that it computes -> the name of a node of `program.module()`.
    Raises ExportError, with the operator, for what torch's exporter cannot translate.
    """

    def translated(optimize: bool) -> torch.onnx.ONNXProgram | None:
        return torch.onnx.export(
            Lowered(program),
            (),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            external_data=False,
            optimize=optimize,
            opset_version=opset,
            custom_translation_table=translations(),
        )

    rules = replaced(onnxscript.rewriter, "_DEFAULT_REWRITE_RULES", _harmless_rules())
    with _quiet(), rules, replaced(ONNXRegistry, "from_torchlib", staticmethod(_library)):
        try:
            try:
                exported = translated(optimize=not sizes)
            except onnx_ir.passes.PassError:  # of the optimizer, which does not know a split into parts as large as the batch
                exported = translated(optimize=False)
        except Exception as error:  # the exporter wraps whatever it meets
            raise ExportError(f"the model cannot be written as ONNX: {first_line(error.__cause__ or error)}") from error
        assert exported is not None
        _rename_inner(exported.model)
        if sizes:  # folding what is constant is part of the optimisation that was left out, and changes no weight
            onnxscript.optimizer.fold_constants(exported.model)
        model = exported.model_proto
        origins, layers = _origins(model, exported.exported_program), _layers(model)
        large = model.ByteSize() >= _LARGE
        if not large:
            with contextlib.suppress(onnx.shape_inference.InferenceError):  # simplification is a bonus: the plain file is right too
                model = onnxslim.slim(model, skip_fusion_patterns=_WEIGHT_FUSIONS if sizes else ["FusionGelu"]) or model
    for node in model.graph.node:  # the exporter's own notes are long, and the simplifier drops them
        del node.metadata_props[:]
        layer = next((layers[name] for name in (node.name, *node.output) if name in layers), "")
        if layer:
            node.metadata_props.add(key=LAYER, value=layer)
    _name_sizes(model, sizes)
    _keep_apart(model)
    written = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset is not None and written != opset:
        raise ExportError(f"the model cannot be written in opset {opset}: torch's exporter got as far as {written}; ask for that, or for none")
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    if large:
        onnx.save(model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data", size_threshold=1024)
        onnx.checker.check_model(str(path))
    else:
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
    return origins


def _harmless_rules() -> tuple[Any, ...]:
    """The rules of onnxscript's optimizer without those that do harm.

    It takes what is within 1e-8 of 0 for 0, and what is within 1e-5 of 1 for 1, and drops it: of x / (sum + 1e-12) the file would answer NaN for a
    silent input. Adding a plain 0 costs nothing; runtimes drop it. To the bounds of all clamps of one value it gives the same names. And it compares
    every slice with every other, to make one split of two: 26 of the 43 s that CoaT takes, whose file is the same without.
    """
    rules = onnxscript.rewriter._DEFAULT_REWRITE_RULES
    harmful = [*_no_op.rules, *_min_max_to_clip.rules, *(rule for rule in rules if rule.name == "SlicesSplit")]
    return tuple(rule for rule in rules if not any(rule is other for other in harmful))


def _library(**opset: int) -> ONNXRegistry:
    """torch's translations, which it reads from their sources anew for every file: most of the time that a small one takes.

    A copy, for the exporter puts those of its caller among them.
    """
    library = copy.copy(_read_once(frozenset(torch._C._dispatch_get_all_op_names()), **opset))
    library.functions = {target: list(found) for target, found in library.functions.items()}
    return library


_reading = ONNXRegistry.from_torchlib


@functools.lru_cache(maxsize=4)
def _read_once(operators: frozenset[str], **opset: int) -> ONNXRegistry:
    """operators: all that there are; torch leaves out what translates others, such as those of torchvision before it is imported."""
    return _reading(**opset)


def size(path: Path) -> int:
    """Bytes of a file and of the weights that lie beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def copy_file(source: Path, target: Path) -> None:
    """A file, and the weights that lie beside it, under the name by which the file knows them: `target` has the name of `source`."""
    for path in (source, source.with_name(f"{source.name}.data")):
        if path.exists():
            shutil.copyfile(path, target.with_name(path.name))


def metadata(path: Path) -> dict[str, str]:
    """What was written about the model beside the graph."""
    return {p.key: p.value for p in onnx.load(str(path), load_external_data=False).metadata_props}


def input_names(path: Path) -> list[str]:
    """The names of a file's inputs, in order."""
    model = onnx.load(str(path), load_external_data=False)
    held = {t.name for t in model.graph.initializer}
    return [i.name for i in model.graph.input if i.name not in held]


def _rename_inner(model: onnx_ir.Model) -> None:
    """The exporter calls an answer as it is told, and something inside, such as 'relu', may have that name already: the latter gets another."""
    outputs = {value.name for value in model.graph.outputs}
    values = [value for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph) for value in node.outputs]
    taken = {value.name for value in values} | outputs
    for value in values:
        if value.name in outputs and not any(value is answer for answer in model.graph.outputs):
            while value.name in taken:
                value.name = f"{value.name}_"
            taken.add(value.name)


def _name_sizes(model: onnx.ModelProto, sizes: Sequence[Sequence[int | str]]) -> None:
    """Free sizes of the inputs by the names that they had; the exporter calls them s0 and s1."""
    names: dict[str, str] = {}
    for value, axes in zip(model.graph.input, sizes, strict=False):
        for dim, size in zip(value.type.tensor_type.shape.dim, axes, strict=True):
            if dim.dim_param and isinstance(size, str) and size not in names.values():
                names.setdefault(dim.dim_param, size)
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _keep_apart(model: onnx.ModelProto) -> None:
    """Between a product and what `crashing_operands` finds before it an axis comes and goes, which moves nothing and which no runtime looks past."""
    operands = crashing_operands(model)
    if not operands:
        return
    between: dict[str, list[onnx.NodeProto]] = {}  # before the product that answers this
    for product, place in operands:
        name, apart = product.input[place], f"{product.output[0]}_operand_{place}"
        product.input[place] = apart
        between.setdefault(product.output[0], []).extend([
            onnx.helper.make_node("Unsqueeze", [name, _FIRST_AXIS], [f"{apart}_wider"], f"{apart}_wider"),
            onnx.helper.make_node("Squeeze", [f"{apart}_wider", _FIRST_AXIS], [apart], apart),
        ])  # fmt: skip
    nodes = [each for node in model.graph.node for each in [*between.get(node.output[0] if node.output else "", ()), node]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), _FIRST_AXIS))


def _origins(model: onnx.ModelProto, program: torch.export.ExportedProgram | None) -> dict[str, str]:
    """Through the exporter's note on each node, which begins with '%name :', and the history of that name in the program that it translated."""
    first_names: dict[str, str] = {}
    for node in program.graph.nodes if program is not None else ():
        source = node.meta.get("from_node")
        if isinstance(program, Lowered):  # the exporter left it as it was
            first_names[node.name], source = node.name, None
        while source:
            first_names[node.name] = source[-1].name
            source = source[-1].from_node
    found: dict[str, str] = {}
    for made in model.graph.node:
        note = next((p.value for p in made.metadata_props if p.key == "pkg.torch.onnx.fx_node"), "")
        origin = first_names.get(note.partition(" ")[0].removeprefix("%"))
        if origin:
            found |= dict.fromkeys([made.name, *made.output], origin)
    return found


def _layers(model: onnx.ModelProto) -> dict[str, str]:
    """The name of a node, or of a value that it computes -> the module of the user's that it comes from, by the exporter's note of all around it."""
    found: dict[str, str] = {}
    for made in model.graph.node:
        note = next((p.value for p in made.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = ast.literal_eval(note)[:-1]  # the last is the node itself
        if modules and modules[-1] and not modules[-1].startswith("_empty_nn_module_stack"):
            found |= dict.fromkeys([made.name, *made.output], modules[-1])
    return found


def check(
    path: Path,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tolerance: float | None = None,
    batch_of_one: bool = False,
) -> float:
    """Largest difference between ONNX Runtime and torch, as a share of the largest answer, or of `LEAST` where that is more.

    batch_of_one: a model that squeezes its answer may lose the batch in it; the file keeps it. One that does not run on it is not asked.

    Raises VerificationError where it is more than `tolerance`; by default, than arithmetic in another order explains, in float32 or in float16 as the
    module's answers are; and where more whole numbers are others than ties explain. A model that picks the best of many (boxes, queries) may give
    them in another order for the last digit, see `order_is_open`. And where torch itself differs as much between float32 and float64, the file is as
    right as torch is.
    """
    try:
        wanted = _answers(module, args, kwargs)
    except Exception:  # the user's code may raise anything
        if not batch_of_one:
            raise
        _log.debug("the model does not run on a batch of one", exc_info=True)
        return 0.0
    answers = run(path, pytree.tree_leaves((args, dict(kwargs))))
    if tolerance is None:
        tolerance = TOLERANCE_HALF if any(v.dtype == torch.float16 for v in wanted) else TOLERANCE
    expected = _in_their_shapes(path.name, answers, wanted, batch_of_one)
    if not all(np.isfinite(got[np.isfinite(want)]).all() for got, want in zip(answers, expected, strict=True)):
        raise VerificationError(f"{path.name} answers with NaN or infinities, where the model does not")
    apart, others = _differences(answers, expected, wanted)
    if apart > tolerance and order_is_open(module, args, kwargs, tolerance):
        apart = _differences(answers, expected, wanted, difference_in_any_order)[0]
    if not (apart <= tolerance and others <= ties.SHARE):
        own_apart, own_others = _rounding(module, args, kwargs, wanted)
        if not apart <= max(tolerance, own_apart):
            raise VerificationError(f"{path.name}: ONNX Runtime differs from torch by {apart:.2g} of the largest answer")
        if not others <= max(ties.SHARE, own_others):
            raise VerificationError(f"{path.name}: of the whole numbers in an answer, {others:.1%} are others in ONNX Runtime than in torch")
    return apart


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference between finite entries, as a share of the largest, or of `LEAST`."""
    finite = np.isfinite(want)
    return float(np.abs(got.astype(np.float64) - want)[finite].max(initial=0.0) / _scale(want))


def _scale(want: np.ndarray) -> float:
    return max(float(np.abs(want[np.isfinite(want)]).max(initial=0.0)), LEAST)


def difference_in_any_order(got: np.ndarray, want: np.ndarray) -> float:
    """`difference`, or that of the two with the rows along one axis in another order."""
    return min(difference(got, want), ties.apart_in_any_order(got, want) / _scale(want))


def order_is_open(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tolerance: float) -> bool:
    """Whether the order of a model's answers, and nothing else of them, changes with the last digits of its weights.

    So it does where the best of many are picked (boxes, queries), and two of them are about as good.
    """
    own = _answers(module, args, kwargs)
    expected = [v.detach().double().numpy() if v.is_floating_point() else v.numpy() for v in own]
    for seed in range(_NUDGES):
        generator = torch.Generator().manual_seed(seed)
        nudged = copy.deepcopy(module)
        with torch.no_grad():
            for weight in nudged.parameters():
                if weight.is_floating_point():
                    weight.mul_(1 + _NUDGE * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        answers = [v.detach().numpy() for v in _answers(nudged, args, kwargs)]
        if [v.shape for v in answers] != [v.shape for v in expected]:
            continue
        if _differences(answers, expected, own)[0] > tolerance >= _differences(answers, expected, own, difference_in_any_order)[0]:
            return True
    return False


def _in_their_shapes(file: str, answers: Sequence[np.ndarray], wanted: Sequence[Tensor], batch_of_one: bool) -> list[np.ndarray]:
    """torch's answers as arrays, in the shapes of those of a file."""
    if len(answers) != len(wanted):
        raise VerificationError(f"{file} gives {len(answers)} tensors, the model {len(wanted)}")
    expected = [v.detach().double().numpy() if v.is_floating_point() else v.numpy() for v in wanted]
    for i, (got, want) in enumerate(zip(answers, expected, strict=True)):
        if batch_of_one and [s for s in got.shape if s != 1] == [s for s in want.shape if s != 1]:
            expected[i] = want.reshape(got.shape)
        elif got.shape != want.shape:
            raise VerificationError(f"{file} answers with shape {got.shape}, the model with {want.shape}")
    return expected


def _answers(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))  # the model may write to its inputs
    with torch.no_grad():
        return [v for v in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(v, Tensor)]


def _differences(
    answers: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    wanted: Sequence[Tensor],
    measure: Callable[[np.ndarray, np.ndarray], float] = difference,
) -> tuple[float, float]:
    """The largest `measure` of answers of floating point; and the largest share of entries of any other answer that are not equal."""
    pairs = list(zip(answers, expected, wanted, strict=True))
    apart = max((measure(got, want) for got, want, v in pairs if v.is_floating_point()), default=0.0)
    return apart, max((float((got != want).mean()) for got, want, v in pairs if not v.is_floating_point() and want.size), default=0.0)


def _rounding(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], answers: Sequence[Tensor]) -> tuple[float, float]:
    """The `_differences` from torch's own answers in float32 that torch's in float64 explain; 0 where they cannot be had, or are another answer."""
    try:
        exact = _answers(copy.deepcopy(module).double(), *pytree.tree_map_only(Tensor, in_double, (args, dict(kwargs))))
    except (RuntimeError, TypeError):  # types are written into the model's code
        _log.debug("the model does not run in float64", exc_info=True)
        return 0.0, 0.0
    if [v.shape for v in exact] != [v.shape for v in answers]:
        return 0.0, 0.0
    apart, others = _differences([v.detach().numpy() for v in answers], [v.detach().numpy() for v in exact], answers)
    return _OWN * apart if apart <= _MOST_OWN else 0.0, _OWN * others


def run(model: Path | bytes, flat: Sequence[Any]) -> list[np.ndarray]:
    """The answers of an ONNX file, or of its bytes, to the leaves of a call's arguments, by position."""
    return runner(model)(flat)


def session_of(model: Path | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session on the CPU. Raises ExportError for a file that ONNX Runtime does not take."""
    try:
        return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has a class of its own for every status
        raise ExportError(f"ONNX Runtime does not take {_name_of(model)}: {str(error)[:300]}") from error


def _name_of(model: Path | bytes) -> str:
    return "the model" if isinstance(model, bytes) else model.name


def runner(model: Path | bytes) -> Callable[[Sequence[Any]], list[np.ndarray]]:
    """`run` of one model, for many calls. Raises ExportError for a file that ONNX Runtime does not take, and VerificationError where it fails."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = session_of(model, options)

    def answer(flat: Sequence[Any]) -> list[np.ndarray]:
        values = [(v.float() if v.dtype == torch.bfloat16 else v).detach().cpu().numpy() for v in flat if isinstance(v, Tensor)]
        try:
            return session.run(None, {i.name: v for i, v in zip(session.get_inputs(), values, strict=False)})  # type: ignore[no-any-return]
        except Exception as error:
            raise VerificationError(f"{_name_of(model)} does not run in ONNX Runtime: {str(error)[:300]}") from error

    return answer


def masked(path: Path, removed: Mapping[str, Mapping[int, np.ndarray]], also: Mapping[str, Mapping[int, np.ndarray]]) -> bytes | str:
    """The model of a file with the given entries of its weights, by name and dimension, set to zero; or in words why that would not tell.

    also: the same of weights that the exporter may have taken into others.
    A norm over channels runs over the zeros too, and a weight that the exporter renamed cannot be found.
    """
    if size(path) >= _LARGE:
        return f"{path.name} is too large to be changed in memory"
    model = onnx.load(str(path))
    norms = sorted({node.op_type for node in model.graph.node if node.op_type.endswith("Normalization") and node.op_type != "BatchNormalization"})
    if norms:
        return f"{norms[0]} would run over the zeros"
    found = _named_tensors(model)
    if missing := [name for name in removed if name not in found]:
        return f"{path.name} names no {missing[0]}"
    for name, dims in {**removed, **{name: dims for name, dims in also.items() if name in found}}.items():
        values = onnx.numpy_helper.to_array(found[name]).copy()
        for dim, entries in dims.items():
            values[(slice(None),) * dim + (entries,)] = 0
        found[name].CopyFrom(onnx.numpy_helper.from_array(values, found[name].name))
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter and the simplifier talk on stdout and through warnings; what matters of it comes back as an error."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def weights(path: Path) -> dict[str, np.ndarray]:
    """The named tensors of an ONNX file."""
    return {name: onnx.numpy_helper.to_array(t) for name, t in _named_tensors(onnx.load(str(path))).items()}


def _named_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and the values of Constant nodes."""
    constants = {n.output[0]: a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    return constants | {t.name: t for t in model.graph.initializer}
