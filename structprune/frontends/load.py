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

import importlib
import inspect
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import InputError, did_you_mean, one_line
from structprune.frontends.archives import check_archive
from structprune.frontends.devices import device_of
from structprune.frontends.example_inputs import candidates, described, in_tuple, input_tensors, needed_inputs, own_inputs, why_not
from structprune.frontends.torchscript import is_torchscript, load_torchscript
from structprune.frontends.users_code import called, import_from_current_directory, named_object
from structprune.frontends.weights import adapted, difference, unwrapped
from structprune.frontends.wrappers import within

_CONSTRUCTORS = "demo, timm:NAME, torchvision:NAME or package.module:function"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (*_PICKLES, ".safetensors", ".pt2", ".onnx")


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
        raise InputError(f"{spec} needs {package}, which cannot be imported ({one_line(error)}): pip install {package}") from error


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
    positional = in_tuple(args)
    if not isinstance(model, nn.Module) or positional is None or not isinstance(kwargs, Mapping):
        what = f"({', '.join(type(v).__name__ for v in value)})" if isinstance(value, tuple) else f"a {type(value).__name__}"
        raise InputError(f"{spec} returned {what}; let it return a torch.nn.Module, or (module, args), or (module, args, kwargs)")
    notes = (f"input {described(positional, kwargs)} as returned by {spec}",) if positional or kwargs else ()
    return Loaded(spec, model, positional, dict(kwargs), notes)


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
    return Loaded(spec, imported.model, imported.args, notes=(*imported.notes, f"input {described(imported.args)}"))


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
        raise InputError(f"{path} cannot be read as a torch.export program ({one_line(error)}); save it again with torch.export.save") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = _library("safetensors", str(path))
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file ({one_line(error)}); save or copy it again") from error


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
            reason = f" ({one_line(error)})" if isinstance(error, (RuntimeError, OSError, EOFError)) else ""
            raise InputError(f"{path} is damaged or was not written by torch.save{reason}; save or copy it again") from error
        if not trust_pickle:
            raise InputError(f"loading a pickled module runs code of whoever wrote it; pass --trust-pickle if you trust {path}") from error
    import_from_current_directory()
    naming = SimpleNamespace(__name__=__name__, Unpickler=_NamingUnpickler, load=pickle.load)
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=naming)
    except _MissingClass as error:
        raise InputError(
            f"{path} needs the class {error}, which cannot be imported; start in the directory that holds it, or save the "
            "state_dict instead and pass --arch"
        ) from error
    except Exception as error:  # the unpickled classes' own code may raise anything
        raise InputError(f"{path} cannot be unpickled ({one_line(error)}); save it again with torch.save") from error


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
        reason = difference(state, expected) or one_line(error)
        raise InputError(f"{path} does not fit --arch {arch}: {reason}; pass the constructor that made these weights") from error
    return _noted(made, *notes)


# Inputs ---------------------------------------------------------------------------------------------------------------


def _traceable(made: Loaded) -> Loaded:
    """The part of a model that torch.export can trace: a detector's boxes are lists whose length depends on the image."""
    model = within(made.model)
    if isinstance(model, nn.DataParallel):
        return _traceable(replace(made, model=model.module))
    made = replace(made, model=model)
    backbone = getattr(model, "backbone", None)
    if type(model).__module__.startswith("torchvision.models.detection.") and isinstance(backbone, nn.Module):
        return _noted(replace(made, model=backbone), "a detector: only its backbone and feature pyramid are traced, the heads are left out")
    return made


def _with_inputs(made: Loaded, texts: Sequence[str], generator: torch.Generator) -> Loaded:
    """The same model with the inputs asked for, else its own, else the first invented ones that it accepts."""
    model = made.model
    if texts:
        args, kwargs = input_tensors(texts, generator, device_of(model))
        return replace(made, args=args, kwargs=kwargs)
    if made.args or made.kwargs:
        return made
    own = own_inputs(model)
    if own is not None:
        return _noted(replace(made, args=own[0], kwargs=own[1]), f"input {described(*own)} from the model's example_inputs")
    refusals = []
    for candidate, source in candidates(model):
        args, _ = input_tensors(candidate, generator, device_of(model))
        refused = why_not(model, args)
        if refused is None:
            return _noted(replace(made, args=args), f"input {described(args)} from {source}")
        refusals.append(f"{' and '.join(candidate)} gives {refused}")
    needed = needed_inputs(model)
    if len(needed) > 1:
        why = f"its forward needs {len(needed)} inputs ({', '.join(needed)})"
    else:
        why = refusals[0] if refusals else "its first layer tells no shape"
    raise InputError(f"the inputs of {made.name} cannot be inferred: {why}; pass --input for each, such as --input 1x3x224x224 or --input 1x16:int64")
