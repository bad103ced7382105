"""A local folder of the transformers library (config.json and safetensors) → its model, with inputs that it takes. Nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import InputError, first_line
from structprune.frontends.weights import few

SOURCE = "transformers:"
_TOKENS, _SECOND = 16, 16_000


def load_folder(path: Path, arch: str | None, trust_pickle: bool) -> tuple[nn.Module, dict[str, Tensor], tuple[str, ...]]:
    """The model, its example inputs by name, and notes. arch: 'transformers:' and the class that loads it, such as AutoModel.

    Code that comes with the folder is never run, and weights in pickles only with `trust_pickle`. Raises InputError.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is a directory without config.json; pass a model file, or a folder that transformers saved")
    if arch is None or not arch.startswith(SOURCE):
        raise InputError(f"{path} is a folder of transformers; name the class that loads it: --arch {SOURCE}AutoModelForImageClassification, say")
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(f"{arch} needs transformers, which cannot be imported: pip install transformers") from error
    name = arch.removeprefix(SOURCE)
    maker: Any = getattr(library, name, None)
    if not hasattr(maker, "from_pretrained") or ("Model" not in name and "For" not in name):
        raise InputError(f"transformers has no model class {name!r}; AutoModel, AutoModelForSequenceClassification and BertModel are such")
    safe = any(path.glob("*.safetensors"))
    if not safe and not trust_pickle:
        raise InputError(
            f"{path} holds no .safetensors, and loading pickled weights runs code of whoever wrote them; pass --trust-pickle if you trust them"
        )
    try:
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
        model, info = maker.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, use_safetensors=safe, dtype="auto", output_loading_info=True
        )
    except Exception as error:  # the library raises whatever it meets in a config or a damaged file
        raise InputError(f"{path} cannot be loaded as {name}: {first_line(error)}; check the folder and --arch") from error
    problems = {kind.replace("_keys", ""): list(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)}
    if problems.get("missing") or problems.get("mismatched"):
        told = ", ".join(f"{kind}: {few(map(str, names))}" for kind, names in problems.items())
        raise InputError(f"{path} does not fit --arch {arch}: {told}; name the class that the weights were saved from")
    notes = [f"{few(problems['unexpected'])} of {path} are not part of {name}"] if problems.get("unexpected") else []
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    inputs = _inputs(model)
    return model, inputs, (*notes, f"input {few(f'{k} {list(v.shape)}' for k, v in inputs.items())} from the folder's configuration")


def _inputs(model: Any) -> dict[str, Tensor]:
    """By the name of the model's main input and what its configuration says of sizes."""
    config: Any = model.config
    name = model.main_input_name
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size["height"], size["width"]) if isinstance(size, Mapping) else size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.randn(1, getattr(config, "num_channels", 3), height, width).to(dtype)}
    if name == "input_features":
        return {name: torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions).to(dtype)}
    if name == "input_values":
        return {name: torch.randn(1, _SECOND).to(dtype)}
    return {name: torch.randint(0, min(100, getattr(config, "vocab_size", 100)), (1, _TOKENS))}
