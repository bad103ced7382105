"""The weights that a file holds, however they were wrapped, in the names of the model that they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from structprune.errors import InputError

_KEYS = (
    "state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params", "ema", "model_ema", "ema_state_dict",
    "state_dict_ema", "params_ema", "teacher", "student",
)  # fmt: skip
_LARGE = 1 << 30  # bytes that a tensor may be expanded to
_DEPTH = 3  # checkpoints within checkpoints
_PREFIXES = ("_orig_mod.", "module.", "model.", "net.", "network.", "ema_model.")  # of torch.compile, DataParallel, Lightning and own wrappers
_COUNTERS = ("n_averaged",)  # that torch.optim.swa_utils keeps beside the weights


def unwrapped(path: Path, content: Any) -> tuple[nn.Module | dict[str, Tensor], tuple[str, ...]]:
    """The module or state_dict that a file holds, directly or as an entry of a training checkpoint; and a note on where it was.

    Raises InputError that names the keys of a file that holds neither.
    """
    found = _found(content, ())
    if not found:
        keys = f" with the keys {few(map(str, content))}" if isinstance(content, Mapping) and content else ""
        raise InputError(f"{path} holds a {type(content).__name__}{keys}, neither a module nor a state_dict; save model.state_dict() and pass --arch")
    (where, model), *others = found
    if not where:
        return model, ()
    also = f"; it also holds {few(repr('.'.join(w)) for w, _ in others)}" if others else ""
    return model, (f"read from {'.'.join(where)!r} in {path}{also}",)


def _found(content: Any, where: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """Models in a checkpoint, the likeliest first, each with its keys."""
    if _is_model(content):
        return [(where, content)]
    if not isinstance(content, Mapping) or len(where) == _DEPTH:
        return []
    return [each for key in _KEYS if key in content for each in _found(content[key], (*where, key))]


def _is_model(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) or str(k).endswith("_extra_state") for k, v in value.items())


def adapted(state: Mapping[str, Tensor], expected: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The same weights in the names of `expected`, where that takes no more than a prefix or the masks of torch.nn.utils.prune; and notes."""
    state, notes = dict(state), []
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel() * value.element_size() > max(_LARGE, value.untyped_storage().nbytes()):
            raise InputError(f"{path}: {name} claims the shape {_shape(value)}, and holds {value.untyped_storage().nbytes():,} bytes; do not use it")
    for counter in _COUNTERS:
        if counter in state and counter not in expected and len(state) > 1:
            del state[counter]
            notes.append(f"left out {counter!r}, a counter of averaged weights, of {path}")
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state) and not any(k.startswith(p) for k in expected)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        notes.append(f"dropped {prefix!r} from the front of every name in {path}")
    added = next((p for p in _PREFIXES if expected and all(k.startswith(p) for k in expected) and not any(k.startswith(p) for k in state)), None)
    if added is not None:
        state = {added + name: value for name, value in state.items()}
        notes.append(f"added {added!r} to the front of every name in {path}")
    masked = [n.removesuffix("_mask") for n in state if n.endswith("_mask") and n not in expected and n.removesuffix("_mask") + "_orig" in state]
    for name in masked:
        state[name] = state.pop(f"{name}_orig") * state.pop(f"{name}_mask")
    if masked:
        notes.append(f"{len(masked)} masked tensors of {path} multiplied by their masks: {few(masked)}")
    return state, notes


def difference(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> str:
    """What keeps a state_dict out of a model, some names of each kind; empty where names and shapes agree."""
    misshaped = [
        f"{name} ({_shape(state[name])} in the file, {_shape(tensor)} in the model)"
        for name, tensor in expected.items()
        if isinstance(tensor, Tensor) and isinstance(state.get(name), Tensor) and state[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": misshaped,
    }
    return ", ".join(f"{kind}: {few(names, 1 if names is misshaped else 2)}" for kind, names in kinds.items() if names)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def few(names: Iterable[str], count: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
