"""What the user names → a module with example inputs.

    demo                       the model that comes with structprune
    timm:NAME                  timm.create_model
    torchvision:NAME           torchvision.models.get_model
    package.module:function    the user's own constructor
    FILE                       .pt .pth .bin .ckpt .safetensors .pt2 .onnx
    FOLDER                     that transformers saved, with --arch transformers:CLASS

Every refusal is an InputError: one line that names the file or argument and the next step.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import operator
import os
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from structprune.errors import InputError, StructpruneError, did_you_mean
from structprune.frontends.archives import check_archive
from structprune.frontends.torchscript import is_torchscript, load_torchscript
from structprune.frontends.weights import adapted, difference, unwrapped

_CONSTRUCTORS = "demo, timm:NAME, torchvision:NAME or package.module:function"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (*_PICKLES, ".safetensors", ".pt2", ".onnx")

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


@dataclass(frozen=True)
class Loaded:
    """A module that can be called as `model(*args, **kwargs)`, and how it came about."""

    name: str  # as the user wrote it
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was inferred, a line each
    evaluate: Callable[[nn.Module], float] | None = None  # accuracy in [0, 1]; only for `demo`
    calibration: Tensor | None = None  # unlabelled samples; only for `demo`


def load(spec: str, *, arch: str | None = None, inputs: Sequence[str] = (), trust_pickle: bool = False, seed: int = 0) -> Loaded:
    """The module that `spec` names, with example inputs.

    `arch` is the constructor of the model whose weights a state_dict or safetensors file holds. `inputs` are shapes such
    as `1x3x224x224`, `2x16:int64` or `mask=1x16:bool`; without them they are inferred, and `notes` says from what.
    `seed` fixes the random weights of a constructor and the values of the inputs; the global generator is left as it was.
    The current directory joins `sys.path`, as under `python -m`, where the user's own code is needed.

    Raises InputError for anything that cannot be used. A pickled module is refused unless `trust_pickle`: unpickling
    runs code of whoever wrote the file.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        if _is_file(spec):
            if Path(spec).suffix.lower() == ".onnx":
                return _onnx(Path(spec), spec, arch, inputs, seed)
            made = _from_file(Path(spec), arch, trust_pickle, inputs)
        elif _is_constructor(spec):
            if arch is not None:
                raise InputError(f"--arch goes with a state_dict or .safetensors file, and {spec} is complete without: leave out --arch {arch}")
            made = _construct(spec)
            if spec.startswith(("timm:", "torchvision:")):
                made = _noted(made, f"random weights (seed {seed}): to compress trained ones pass their file with --arch {spec}")
        else:
            raise InputError(f"{spec!r} is neither a file nor a constructor; give {_CONSTRUCTORS}, or a file ({', '.join(_SUFFIXES)})")
        return _with_inputs(_traceable(replace(made, name=spec)), inputs, torch.Generator().manual_seed(seed))


def _is_file(spec: str) -> bool:
    return spec != "demo" and (os.path.exists(spec) or (":" not in spec and Path(spec).suffix.lower() in _SUFFIXES))


def _is_constructor(spec: str) -> bool:
    return spec == "demo" or ":" in spec


def _noted(made: Loaded, *notes: str) -> Loaded:
    return replace(made, notes=(*made.notes, *notes))


# Constructors ---------------------------------------------------------------------------------------------------------


def _construct(spec: str) -> Loaded:
    source, _, name = spec.partition(":")
    if spec == "demo":
        from structprune import demo

        notes = ("two of the demo's own samples as input; 256 unlabelled ones calibrate",)
        return Loaded(spec, demo.model(), (demo.samples()[0][:2],), notes=notes, evaluate=demo.accuracy, calibration=demo.calibration())
    if source == "timm":
        return Loaded(spec, _timm(spec, name))
    if source == "torchvision":
        return Loaded(spec, _torchvision(spec, name))
    return _from_function(spec)


def _timm(spec: str, name: str) -> nn.Module:
    timm = _library("timm", spec)
    if not timm.is_model(name):  # also keeps out `hf-hub:...`, which would ask the network
        raise InputError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}; timm.list_models() names them all")
    return called(spec, timm.create_model, name, pretrained=False)


def _torchvision(spec: str, name: str) -> nn.Module:
    models = _library("torchvision.models", spec)
    known = models.list_models()
    if name not in known:
        raise InputError(f"torchvision has no model {name!r}{did_you_mean(name, known)}; torchvision.models.list_models() names them all")
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # would be downloaded
    if name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False  # minutes of scipy.stats.truncnorm for weights that are random anyway
    return called(spec, models.get_model, name, **options)


def _library(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(f"{spec} needs {package}, which cannot be imported ({_reason(error)}): pip install {package}") from error


def named_object(spec: str, form: str, wanted: str) -> Any:
    """What `package.module:name` names, imported with the current directory on the path. form: what it is not, if it has another form, and advice;
    wanted: what the name should be, both for the InputError.
    """
    module_name, _, attribute = spec.partition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", spec):
        raise InputError(f"{spec!r} is not {form}")
    _import_from_current_directory()
    try:
        with torch.random.fork_rng(devices=[]):  # the weights shall not depend on whether this is the first import
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything or end with sys.exit
        if not isinstance(error, ModuleNotFoundError) or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"importing {module_name} failed: {_reason(error)}{_place(error)}; correct that, or name another one") from error
        advice = (
            f"did you mean {module_name[:-3]}:{attribute}?" if module_name.endswith(".py") else "install it, or start in the directory that holds it"
        )
        raise InputError(f"{spec}: there is no module {error.name}; {advice}") from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        close = did_you_mean(attribute, dir(module))
        raise InputError(f"{module_name} has no {attribute!r}{close}; name {wanted}") from error


def _from_function(spec: str) -> Loaded:
    """What `module:function` returns: a module, or (module, args), or (module, args, kwargs); or the module that it is."""
    function = named_object(spec, f"a constructor; give {_CONSTRUCTORS}", "a function of it that returns a torch.nn.Module")
    if isinstance(function, nn.Module):
        return Loaded(spec, function)
    if not callable(function):
        raise InputError(f"{spec} is a {type(function).__name__}; name a function that returns a torch.nn.Module")
    value = called(spec, function)
    model, args, kwargs = value, (), {}
    if isinstance(value, tuple) and len(value) in (2, 3):
        model, args, kwargs = (*value, {})[:3]
    positional = _positional(args)
    if not isinstance(model, nn.Module) or positional is None or not isinstance(kwargs, Mapping):
        what = f"({', '.join(type(v).__name__ for v in value)})" if isinstance(value, tuple) else f"a {type(value).__name__}"
        raise InputError(f"{spec} returned {what}; let it return a torch.nn.Module, or (module, args), or (module, args, kwargs)")
    notes = (f"input {_described(positional, kwargs)} as returned by {spec}",) if positional or kwargs else ()
    return Loaded(spec, model, positional, dict(kwargs), notes)


def _import_from_current_directory() -> None:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def called(spec: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as error:  # a constructor is someone else's code and may raise anything
        raise InputError(f"{spec} failed: {_reason(error)}{_place(error)}; correct that, or name another constructor") from error


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Whatever code of the user's own raises becomes an InputError that names `what` and the line."""
    try:
        yield
    except StructpruneError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} failed: {_reason(error)}{_place(error)}; correct that and run it again") from error


def _positional(value: Any) -> tuple[Any, ...] | None:
    """Positional inputs from a tensor or a tuple or list of inputs; None for anything else."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(value) if isinstance(value, (tuple, list)) else None


# Files ----------------------------------------------------------------------------------------------------------------


def _from_file(path: Path, arch: str | None, trust_pickle: bool, inputs: Sequence[str]) -> Loaded:
    if path.is_dir() and ((path / "config.json").is_file() or (arch or "").startswith("transformers:")):
        from structprune.frontends.transformers_folder import load_folder

        model, example, about = load_folder(path, arch, trust_pickle)
        return Loaded(str(path), model, kwargs=example, notes=about)
    suffix = path.suffix.lower()
    head = _head(path)
    if suffix not in _SUFFIXES:
        raise InputError(f"{path} is not a model file that structprune reads; give {', '.join(_SUFFIXES)}, or a constructor ({_CONSTRUCTORS})")
    if not head:
        raise InputError(f"{path} is empty; save or copy it again")
    if suffix in _PICKLES and is_torchscript(check_archive(path)):
        return _torchscript(path, arch, inputs)
    if suffix == ".safetensors":
        return _with_weights(path, _safetensors(path), arch)
    content, notes = (_program(path), ()) if suffix == ".pt2" else unwrapped(path, _unpickled(path, head, trust_pickle))
    if not isinstance(content, nn.Module):
        return _noted(_with_weights(path, content, arch), *notes)
    if arch is not None:
        raise InputError(f"--arch goes with a state_dict or .safetensors file, and {path} holds a whole module: leave out --arch {arch}")
    return Loaded(str(path), content, notes=notes)


def _onnx(path: Path, spec: str, arch: str | None, inputs: Sequence[str], seed: int) -> Loaded:
    from structprune.frontends.onnx_in import load_onnx

    if arch is not None:
        raise InputError(f"--arch goes with a state_dict or .safetensors file, and {path} holds a whole model: leave out --arch {arch}")
    if not _head(path):
        raise InputError(f"{path} is empty; export or copy it again")
    imported = load_onnx(path, inputs, seed)
    return Loaded(spec, imported.model, imported.args, notes=(*imported.notes, f"input {_described(imported.args)}"))


def _torchscript(path: Path, arch: str | None, inputs: Sequence[str]) -> Loaded:
    if arch is not None:
        raise InputError(f"--arch goes with a state_dict or .safetensors file, and {path} holds a whole module: leave out --arch {arch}")
    args, kwargs = input_tensors(inputs, torch.Generator().manual_seed(0))
    if not args or kwargs:
        raise InputError(f"{path} is a TorchScript archive, which does not tell its inputs; pass each by position, such as --input 1x3x224x224")
    return Loaded(str(path), load_torchscript(path, args), notes=(f"{path} converted from TorchScript, and answers the same",))


def _head(path: Path) -> bytes:
    """The first bytes of a readable file."""
    try:
        with path.open("rb") as file:
            return file.read(4)
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.iterdir() if p.suffix.lower() in _SUFFIXES] if path.parent.is_dir() else []
        raise InputError(f"there is no file {path}{did_you_mean(path.name, siblings)}; check the path") from error
    except IsADirectoryError as error:
        inside = path / "model.pt2"
        raise InputError(f"{path} is a directory; pass a file in it{f', such as {inside}' if inside.exists() else ''}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error


def _program(path: Path) -> nn.Module:
    from structprune.frontends.program import load_program

    try:
        return load_program(path)
    except InputError:
        raise
    except Exception as error:  # torch.export.load raises whatever it meets in a damaged archive
        raise InputError(f"{path} cannot be read as a torch.export program ({_reason(error)}); save it again with torch.export.save") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = _library("safetensors", str(path))
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file ({_reason(error)}); save or copy it again") from error


def _unpickled(path: Path, head: bytes, trust_pickle: bool) -> Any:
    """The object in a file of torch.save, read without running any code of the file unless `trust_pickle`."""
    entries = check_archive(path)
    if any(e.endswith("/archive_format") for e in entries):
        raise InputError(f"{path} holds a torch.export program; rename it to {path.with_suffix('.pt2').name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on how pickles are written, which a refusal need not repeat
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its reader meets: KeyError for text, EOFError, RuntimeError, ...
        # A pickle (at the top, or in torch's zip) that holds more than tensors stops the safe reader with UnpicklingError;
        # so does text whose first letters happen to be opcodes.
        if not isinstance(error, pickle.UnpicklingError) or not (entries or head.startswith(b"\x80")):
            # what ends the reading of text tells nothing ("pop from empty list"), and torch's own word is to switch the safe reader off
            reason = f" ({_reason(error)})" if isinstance(error, (RuntimeError, OSError, EOFError)) else ""
            raise InputError(f"{path} is damaged or was not written by torch.save{reason}; save or copy it again") from error
        if not trust_pickle:
            raise InputError(f"loading a pickled module runs code of whoever wrote it; pass --trust-pickle if you trust {path}") from error
    _import_from_current_directory()
    naming = SimpleNamespace(__name__=__name__, Unpickler=_NamingUnpickler, load=pickle.load)
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=naming)
    except _MissingClass as error:
        raise InputError(
            f"{path} needs the class {error}, which cannot be imported; start in the directory that holds it, or save the "
            "state_dict instead and pass --arch"
        ) from error
    except Exception as error:  # the unpickled classes' own code may raise anything
        raise InputError(f"{path} cannot be unpickled ({_reason(error)}); save it again with torch.save") from error


class _MissingClass(Exception):
    """Names a class that a pickle refers to and that cannot be imported."""


class _NamingUnpickler(pickle.Unpickler):
    """pickle's own error for a missing module does not say which class was wanted from it."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError) as error:
            raise _MissingClass(f"{module}.{name}") from error


def _with_weights(path: Path, state: dict[str, Tensor], arch: str | None) -> Loaded:
    """The model that `arch` constructs, with the weights of a file: all of them, and no others."""
    if arch is None:
        raise InputError(f"{path} holds weights without their model; add its constructor, --arch timm:resnet50 or --arch package.module:function")
    if not _is_constructor(arch):
        raise InputError(f"--arch {arch} is not a constructor; give {_CONSTRUCTORS}")
    made = _construct(arch)
    expected = made.model.state_dict()
    state, notes = adapted(state, expected, path)
    try:
        made.model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = difference(state, expected) or _reason(error)
        raise InputError(f"{path} does not fit --arch {arch}: {reason}; pass the constructor that made these weights") from error
    return _noted(made, *notes)


# Inputs ---------------------------------------------------------------------------------------------------------------


def _traceable(made: Loaded) -> Loaded:
    """The part of a model that torch.export can trace: a detector's boxes are lists whose length depends on the image."""
    model = made.model
    if isinstance(model, nn.DataParallel):
        return _traceable(replace(made, model=model.module))
    backbone = getattr(model, "backbone", None)
    if type(model).__module__.startswith("torchvision.models.detection.") and isinstance(backbone, nn.Module):
        return _noted(replace(made, model=backbone), "a detector: only its backbone and feature pyramid are traced, the heads are left out")
    return made


def _with_inputs(made: Loaded, texts: Sequence[str], generator: torch.Generator) -> Loaded:
    """The same model with the inputs asked for, else its own, else the first invented ones that it accepts."""
    model = made.model
    if texts:
        args, kwargs = input_tensors(texts, generator, _device(model))
        return replace(made, args=args, kwargs=kwargs)
    if made.args or made.kwargs:
        return made
    own = _own_inputs(model)
    if own is not None:
        return _noted(replace(made, args=own[0], kwargs=own[1]), f"input {_described(*own)} from the model's example_inputs")
    failures = []
    for candidate, source in _candidates(model):
        args, _ = input_tensors(candidate, generator, _device(model))
        failure = _failure(model, args)
        if failure is None:
            return _noted(replace(made, args=args), f"input {_described(args)} from {source}")
        failures.append(f"{' and '.join(candidate)} gives {failure}")
    needed = _needed(model)
    if len(needed) > 1:
        why = f"its forward needs {len(needed)} inputs ({', '.join(needed)})"
    else:
        why = failures[0] if failures else "its first layer tells no shape"
    raise InputError(f"the inputs of {made.name} cannot be inferred: {why}; pass --input for each, such as --input 1x3x224x224 or --input 1x16:int64")


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


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _own_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`model.example_inputs`: (args, kwargs), or the positional inputs alone; None where there is nothing usable."""
    value = getattr(model, "example_inputs", None)
    match value:
        case (tuple() | list() as args, Mapping() as kwargs):
            own = (tuple(args), dict(kwargs))
        case _:
            own = (_positional(value) or (), {})
    return own if any(own) else None


def _candidates(model: nn.Module) -> Iterator[tuple[tuple[str, ...], str]]:
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
    if len(_needed(model)) <= 1:
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


def _needed(model: nn.Module) -> list[str]:
    """Names of the inputs without which `forward` cannot be called."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _failure(model: nn.Module, args: tuple[Tensor, ...]) -> str | None:
    """Why the model, in evaluation mode, does not accept `args`; None where it does. Modes are left as they were."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.no_grad():
            model(*args)
    except Exception as error:
        return _reason(error)
    finally:
        for module in training:
            module.training = True
    return None


# Words ----------------------------------------------------------------------------------------------------------------


def _described(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Inputs as they are written for --input: `1x3x8x8, mask=1x16:bool`."""
    return ", ".join([_written(a) for a in args] + [f"{name}={_written(v)}" for name, v in (kwargs or {}).items()])


def _written(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    dtype = "" if value.dtype == torch.float32 else f":{str(value.dtype).removeprefix('torch.')}"
    return ("x".join(map(str, value.shape)) or "scalar") + dtype


def _reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code that an exception passed; empty where it never got there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<") and "torch" not in Path(f.filename).parts]
    own = [f for f in frames if f.filename not in (__file__, importlib.__file__)]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
