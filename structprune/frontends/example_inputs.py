"""Inputs that a model accepts: as the user writes them, and where nobody says, invented from its family or its first layer."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from structprune.errors import InputError, one_line
from structprune.ir.traced import in_mode

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_INPUT = re.compile(
    r"(?:(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>[1-9]\d*(?:x[1-9]\d*)*)|:=(?P<number>-?\d+(?:\.\d+)?(?:e-?\d+)?|True|False))(?::(?P<dtype>\w+))?"
)

# Inputs of the models in torchvision.models, by where their class is defined; the first prefix that fits.
_TORCHVISION_INPUTS = (
    ("video.resnet", ("1x3x16x112x112",)),
    ("video", ("1x3x16x224x224",)),
    ("optical_flow", ("1x3x128x128", "1x3x128x128")),
    ("detection", ("1x3x320x320",)),
    ("inception", ("1x3x299x299",)),
    ("quantization.inception", ("1x3x299x299",)),
    ("", ("1x3x224x224",)),
)


def input_tensors(
    texts: Sequence[str], generator: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword inputs such as '1x3x224x224', '2x16:int64' and 'mask=1x16:bool'; ':=16000:int64' is that number.

    Floating-point ones are normal noise, the others 0 and 1, which are valid as indices. Raises InputError.
    """
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        match = _INPUT.fullmatch(text)
        if match is None or match["dtype"] not in (None, *_DTYPES) or match["name"] in kwargs:
            known = f"dtypes: {', '.join(_DTYPES)}; each keyword once"
            raise InputError(f"--input {text!r} cannot be used; write 1x3x224x224, 2x16:int64 or, for a keyword, mask=1x16:bool ({known})")
        dtype = getattr(torch, match["dtype"] or "float32")
        if match["number"]:
            args.append(torch.tensor(ast.literal_eval(match["number"]), dtype=dtype))
            continue
        shape = [int(size) for size in match["shape"].split("x")]
        try:
            value = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.randint(0, 2, shape, generator=generator)
        except (RuntimeError, TypeError) as error:  # torch's words for sizes beyond memory, and beyond 64 bits
            raise InputError(f"--input {text!r} cannot be allocated; give a smaller shape") from error
        value = value.to(device=device, dtype=dtype)
        if match["name"]:
            kwargs[match["name"]] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def candidates(model: nn.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """Inputs that the model may accept, as the user would write them, and where each comes from; the best known first."""
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), "float32")
    suffix = f":{dtype}" if dtype != "float32" and dtype in _DTYPES else ""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        yield (f"1x{'x'.join(map(str, config['input_size']))}{suffix}",), "the model's pretrained_cfg"
    home = type(model).__module__
    if home.startswith("torchvision.models."):
        texts = next(t for prefix, t in _TORCHVISION_INPUTS if home.removeprefix("torchvision.models.").startswith(prefix))
        yield tuple(f"{text}{suffix}" for text in texts), f"its family in torchvision ({home})"
    if len(needed_inputs(model)) <= 1:
        for name, layer in model.named_modules():
            shapes = _shapes_for(layer)
            if shapes:
                source = f"its first layer, {name or 'itself'} ({type(layer).__name__})"
                yield from (((text if ":" in text else f"{text}{suffix}",), source) for text in shapes)
                return


def _shapes_for(layer: nn.Module) -> list[str]:
    """Inputs of a model that starts with this layer, the usual first; empty for a layer that tells no shape."""
    match layer:
        case LazyModuleMixin():
            return []
        case nn.Conv1d(in_channels=channels):
            return [f"1x{channels}x{n}" for n in (1024, 16000, 512, 256, 128, 100, 64, 32, 28, 16, 10)]
        case nn.Conv2d(in_channels=channels):
            return [f"1x{channels}x{n}x{n}" for n in (224, 32, 28, 10, 64, 96, 128, 256, 299, 384, 48, 16, 8)]
        case nn.Conv3d(in_channels=channels):
            return [f"1x{channels}x{n}" for n in ("16x112x112", "16x224x224", "32x32x32", "16x64x64", "64x64x64", "16x16x16", "8x8x8")]
        case nn.Linear(in_features=features):
            return [f"1x{features}", f"1x16x{features}"]
        case nn.MultiheadAttention(embed_dim=features) | nn.RNNBase(input_size=features):
            return [f"1x16x{features}"]
        case nn.Embedding() | nn.EmbeddingBag():
            return ["1x16:int64", "1x8:int64", "1x4:int64"]
    return []


def own_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`model.example_inputs`: (args, kwargs), or the positional inputs alone; None where there is nothing usable."""
    value = getattr(model, "example_inputs", None)
    match value:
        case (tuple() | list() as args, Mapping() as kwargs):
            own = (tuple(args), dict(kwargs))
        case _:
            own = (in_tuple(value) or (), {})
    return own if any(own) else None


def in_tuple(value: Any) -> tuple[Any, ...] | None:
    """Positional inputs from a tensor or a tuple or list of inputs; None for anything else."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(value) if isinstance(value, (tuple, list)) else None


def needed_inputs(model: nn.Module) -> list[str]:
    """Names of the inputs without which `forward` cannot be called."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def why_not(model: nn.Module, args: tuple[Tensor, ...]) -> str | None:
    """Why the model, in evaluation mode, does not accept `args`; None where it does."""
    try:
        with in_mode(model, training=False), torch.no_grad():
            model(*args)
    except Exception as error:  # whatever the model's code raises
        return one_line(error)
    return None


def described(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Inputs as they are written for --input: `1x3x8x8, mask=1x16:bool`."""
    return ", ".join([_written(a) for a in args] + [f"{name}={_written(v)}" for name, v in (kwargs or {}).items()])


def _written(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    dtype = "" if value.dtype == torch.float32 else f":{str(value.dtype).removeprefix('torch.')}"
    return ("x".join(map(str, value.shape)) or "scalar") + dtype
