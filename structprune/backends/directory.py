"""The output directory: everything that a deployment needs, written all or none, and checked again from the files alone."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.utils import _pytree as pytree

from structprune.backends import onnx
from structprune.decide.plan import example_inputs
from structprune.errors import InputError, VerificationError
from structprune.frontends.program import load_program
from structprune.ir.plan import Plan
from structprune.ir.traced import TracedModule
from structprune.transform.precision import call_in_float32, in_float32, type_of

_ATTEMPTS = 100
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_HALF = 2.0**-10  # float16's epsilon
_LEAST_HALF = 2.0**-24  # float16's smallest number
FILES = ("original.onnx", "model.onnx", "model.pt2", "model.safetensors", "plan.json", "report.json", "report.html")

_CHANGED = {
    "recovery": "not comparable: the weights were trained after pruning",
    "compensation": "not comparable: the weights were fitted to samples after pruning",
}


def stamp(plan: Plan) -> dict[str, str]:
    """What the files of a small model say of themselves: who made them, by which plan, for which target."""
    return {"structprune.version": version("structprune"), "structprune.plan": plan.digest, "structprune.target": plan.target}


def check_writable(directory: Path) -> None:
    """Raise InputError, before any work is done, for a directory that could not be written at the end."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; choose another output directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "plan.json").exists():
        raise InputError(f"{directory} holds other files; choose an empty or new output directory")
    place = next(p for p in [directory, *directory.absolute().parents] if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{directory} cannot be written: no permission for {place}")


@contextmanager
def all_or_none(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` to write into; it takes its place when the block ends well, and goes when it does not.

    At no moment, were the process killed, is there a `directory` with some of the files, or with files of two runs; of two runs the later one
    stays. What a killed run left beside goes with the next one. Raises InputError where nothing can be written, or not enough.
    """
    check_writable(directory)
    mine = f".{directory.name}-{platform.node() or 'here'}-"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _sweep(directory.parent, mine)
        work = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=directory.parent))
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror}") from error
    try:
        yield work
        work.chmod(0o755)
        _put_in_place(work, directory)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{directory} cannot be written ({reason}): make room, or choose another directory; nothing was left") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put_in_place(work: Path, directory: Path) -> None:
    """Rename, or exchange with what stands there, which then is in `work`."""
    for _ in range(_ATTEMPTS):
        try:
            work.rename(directory)
            return
        except OSError as error:  # a folder with files in it stands there
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            _exchange(work, directory)
            return
        except FileNotFoundError:  # another run has just taken it away
            continue
    raise InputError(f"{directory} cannot be written: other runs write to it all the time; choose another directory")


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders: at one moment, where the system can (Linux's renameat2); else in two."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_HERE, os.fsencode(one.absolute()), _HERE, os.fsencode(other.absolute()), _EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    aside = Path(tempfile.mkdtemp(prefix=f"{one.name}-", dir=one.parent))
    other.rename(aside / "old")
    one.rename(other)
    shutil.rmtree(aside)


def _sweep(parent: Path, mine: str) -> None:
    """Remove what killed runs on this machine left."""
    for left in parent.glob(f"{glob.escape(mine)}*"):
        number = left.name.removeprefix(mine).partition("-")[0]
        if not number.isdigit():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (OverflowError, PermissionError):
            continue


def save_weights(module: torch.nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """The state_dict as safetensors; a tensor under two names is written twice."""
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}
    path.write_bytes(save(tensors, metadata=dict(metadata or {})))


def load(directory: str | Path) -> TracedModule:
    """The small model of an output directory: a trainable module that needs neither its class nor pickle."""
    directory = Path(directory)
    if not (directory / "model.pt2").is_file():
        raise InputError(f"{directory} is no output directory of structprune: it holds no model.pt2")
    return load_program(directory / "model.pt2")


def verify_directory(directory: str | Path) -> dict[str, Any]:
    """Every check again, from the saved files alone; returns what was found, beside the report's `verification`.

    model.pt2 holds the weights of model.safetensors, in the sizes that plan.json says. model.onnx answers as model.pt2. Where both ONNX files
    name a weight, the small one is the plan's slice of the original; and original.onnx with the removed slices set to zero answers as model.onnx,
    where zeros can tell. Weights that were fitted or trained since are no slices any more: both are then answered in words.

    Raises InputError for a missing or broken file and VerificationError, naming the file, for a difference.
    """
    directory = Path(directory)
    for name in FILES:
        if not (directory / name).is_file():
            raise InputError(f"{directory}: {name} is missing; `structprune compress` writes {', '.join(FILES)}")
    plan = Plan.load(directory / "plan.json")
    module = load(directory)
    _same_weights(module, directory / "model.safetensors")
    _planned_sizes(module, plan)
    args, kwargs = _inputs(module, plan)
    made_by = onnx.metadata(directory / "model.onnx").get("structprune.plan", plan.digest)
    if made_by != plan.digest:
        raise VerificationError(f"model.onnx was made by another plan than plan.json: {made_by[:12]}, not {plan.digest[:12]}")
    if type_of(module) == torch.bfloat16:
        reference, (args, kwargs) = in_float32(module), call_in_float32(args, kwargs)
    else:
        reference = module
    error = onnx.check(directory / "model.onnx", reference, args, kwargs, onnx.TOLERANCE_HALF if type_of(module) == torch.float16 else None)
    report = _json(directory / "report.json")
    changed = next((words for key, words in _CHANGED.items() if report.get(key)), None)
    dead = report.get("dead") or {}
    if changed is None and plan.target == "dead":
        moved = "not comparable: constants or twins were added to other weights" if dead.get("constants") or dead.get("twins") else None
        return {
            **report.get("verification", {}),
            "onnx_error": error,
            "tensors": len(plan.tensors),
            "tensors_matched_in_original_onnx": moved or _same_slices(directory, plan),
            "original_onnx": _apart(directory, directory / "original.onnx", "original.onnx", reference, args, kwargs),
        }
    return {
        **report.get("verification", {}),
        "onnx_error": error,
        "tensors": len(plan.tensors),
        "tensors_matched_in_original_onnx": changed or _same_slices(directory, plan),
        "original_onnx_masked": changed or _masked(directory, plan, reference, args, kwargs),
    }


def _inputs(module: TracedModule, plan: Plan) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return module.example_inputs or example_inputs(plan.inputs)


def _same_weights(module: TracedModule, path: Path) -> None:
    try:
        saved = load_file(str(path))
    except Exception as error:  # safetensors raises its own error type, which it does not export
        raise InputError(f"{path.name} cannot be read: {error}") from error
    mine = module.state_dict()
    if saved.keys() != mine.keys():
        raise VerificationError(f"{path.name} and model.pt2 hold different tensors: {sorted(saved.keys() ^ mine.keys())[0]}")
    for name, tensor in mine.items():
        if tensor.shape != saved[name].shape or not torch.equal(tensor.nan_to_num(), saved[name].nan_to_num()):
            raise VerificationError(f"{name} differs between {path.name} and model.pt2")


def _planned_sizes(module: TracedModule, plan: Plan) -> None:
    tensors = module.state_dict()
    for name, cut in plan.tensors.items():
        wanted = tuple(len(cut.keep.get(dim, range(size))) for dim, size in enumerate(cut.shape))
        if name in tensors and tuple(tensors[name].shape) != wanted:
            raise VerificationError(f"{name} has shape {tuple(tensors[name].shape)}, the plan says {wanted}")


def _same_slices(directory: Path, plan: Plan) -> int:
    """Compare the small weights with the plan's slices of the original ones, by name; returns how many both files name."""
    before, after = onnx.weights(directory / "original.onnx"), onnx.weights(directory / "model.onnx")
    matched = 0
    for name, cut in plan.tensors.items():
        if name in before and name in after and before[name].shape == cut.shape:
            sliced = before[name]
            for dim, keep in cut.keep.items():
                sliced = np.take(sliced, keep, axis=dim)
            if sliced.shape != after[name].shape or not _same(sliced, after[name]):
                raise VerificationError(f"{name} in model.onnx is not the plan's slice of {name} in original.onnx")
            matched += 1
    return matched


def _same(wanted: np.ndarray, got: np.ndarray) -> bool:
    """Equal; in another type, to the rounding of norms that the exporter took into weights."""
    if wanted.dtype == got.dtype:
        return np.array_equal(wanted, got, equal_nan=True)
    largest = float(np.abs(wanted).max(initial=0))
    return np.allclose(got.astype(wanted.dtype), wanted, rtol=4 * _HALF, atol=_HALF * largest + _LEAST_HALF, equal_nan=True)


def _masked(directory: Path, plan: Plan, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | str:
    """Largest relative difference between the masked original.onnx and model.onnx; or in words why zeros cannot tell."""
    inexact = [g for g in plan.groups if not g.exact and len(g.keep) < g.channels]
    if inexact:
        return inexact[0].reason
    removed = {name: {dim: np.setdiff1d(np.arange(cut.shape[dim]), keep) for dim, keep in cut.keep.items()} for name, cut in plan.tensors.items()}
    matrices = {name: dims for name, dims in removed.items() if len(plan.tensors[name].shape) > 1}
    vectors = {name: dims for name, dims in removed.items() if name not in matrices}
    differs: VerificationError | None = None
    for also in ({}, vectors):  # weights that read a vector's channels silence them; where none do (embeddings that are compared), biases must go
        model = onnx.masked(directory / "original.onnx", matrices, also)
        if isinstance(model, str):
            return model
        try:
            return _apart(directory, model, "original.onnx without the removed channels", module, args, kwargs)
        except VerificationError as error:
            differs = differs or error
    assert differs is not None
    raise differs


def _apart(directory: Path, original: Path | bytes, what: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Largest relative difference between the answers of model.onnx, which is `module`, and of `original`, which messages call `what`."""
    flat = pytree.tree_leaves((args, kwargs))
    pairs = list(zip(onnx.run(directory / "model.onnx", flat), onnx.run(original, flat), strict=True))
    for got, want in pairs:
        if want.shape != got.shape:
            raise VerificationError(f"model.onnx answers with shape {got.shape}, original.onnx with {want.shape}")
        if not np.array_equal(np.isfinite(want), np.isfinite(got)):
            raise VerificationError(f"model.onnx answers with NaN or infinities where {what} does not, or the other way round")
    tolerance = onnx.TOLERANCE_HALF if type_of(module) == torch.float16 else onnx.TOLERANCE
    worst = max((onnx.difference(got, want) for got, want in pairs), default=0.0)
    if worst > tolerance and onnx.order_is_open(module, args, kwargs, tolerance):
        worst = max(onnx.difference_in_any_order(got, want) for got, want in pairs)
    if not worst <= tolerance:
        raise VerificationError(f"model.onnx differs from {what} by {worst:.2g} of the largest answer")
    return worst


def _json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is no report: it holds a {type(data).__name__}")
    return data
