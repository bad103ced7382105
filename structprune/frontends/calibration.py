"""What the user names as --calibration → tensors: a folder of pictures, a file of arrays, or a function.

FOLDER             pictures, in the size of the model's input; scaled to [0, 1] and normalised as the model's own configuration or ImageNet says
FILE               .npy (one input), .npz or .safetensors: arrays by the names of inputs, or one of any name; `labels` beside them
module:function    called without arguments: one tensor of many samples, or an iterable of batches
synthetic          made from the model's batch norms: calibrate/synthetic.py
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from structprune.errors import InputError, first_line
from structprune.frontends.archives import check_archive
from structprune.frontends.users_code import called, named_object

SAMPLES = 512  # that are taken where there are more
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_ARRAYS = (".npy", ".npz", ".safetensors")
_LABELS = ("labels", "label", "targets", "target", "y")
_BATCH = 32
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_EXPECTED = f"give a folder of pictures, a file ({', '.join(_ARRAYS)}), module:function, or `synthetic`"


def calibration(
    spec: str, model: nn.Module, args: tuple[Any, ...], samples: int = SAMPLES, seed: int = 0
) -> tuple[Iterable[Any] | Tensor, tuple[str, ...]]:
    """The data that `spec` names, at most so many samples of a folder or file, drawn with the seed; and notes on what was assumed.

    Raises InputError for anything that cannot be used.
    """
    path = Path(spec)
    if path.is_dir():
        return _pictures(path, model, args, samples, seed)
    if path.suffix.lower() in _ARRAYS:
        return _arrays(path, samples, seed), ()
    if ":" in spec and not path.exists():
        found = named_object(spec, f"package.module:function; {_EXPECTED}", "a function that returns batches of inputs")
        return (called(spec, found) if callable(found) else found), ()
    raise InputError(f"--calibration {spec}: {'not a file of arrays' if path.exists() else 'no such file'}; {_EXPECTED}")


def _chosen(number: int, samples: int, seed: int) -> list[int]:
    return np.sort(np.random.default_rng(seed).permutation(number)[:samples]).tolist()  # type: ignore[no-any-return]


def _pictures(folder: Path, model: nn.Module, args: tuple[Any, ...], samples: int, seed: int) -> tuple[list[Tensor], tuple[str, ...]]:
    example = args[0] if len(args) == 1 else None
    if not isinstance(example, Tensor) or example.dim() != 4 or example.shape[1] not in (1, 3):
        raise InputError(
            f"--calibration {folder}: pictures are for a model of one input, batch x 1 or 3 x height x width; give a file or module:function"
        )
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _PICTURES)
    if not files:
        raise InputError(f"--calibration {folder}: it holds no pictures ({', '.join(_PICTURES)})")
    channels, height, width = example.shape[1:]
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, deviation = (config["mean"], config["std"]) if config.get("mean") else _IMAGENET if channels == 3 else ((0.0,), (1.0,))
    pictures = torch.stack([_picture(files[number], channels, height, width) for number in _chosen(len(files), samples, seed)])
    normalised = (pictures - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(deviation).view(-1, 1, 1)
    source = "the model's own" if config.get("mean") else "ImageNet's" if channels == 3 else "none"
    note = f"{len(pictures)} of {len(files)} pictures calibrate, at {height}x{width}; mean and deviation: {source}"
    return list(normalised.split(_BATCH)), (note,)


def _picture(file: Path, channels: int, height: int, width: int) -> Tensor:
    """[channels, height, width] in [0, 1]: scaled until it covers the frame, and the middle cut out."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"--calibration {file} cannot be read as a picture ({error}); remove it from the folder") from error
    scale = max(width / picture.width, height / picture.height)
    scaled = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))))
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    pixels = np.asarray(scaled.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels.reshape(height, width, channels) / 255).permute(2, 0, 1)


def _arrays(path: Path, samples: int, seed: int) -> list[Any]:
    """Batches of the inputs by name (or of the one input), with labels where the file has them."""
    check_archive(path)
    try:
        if path.suffix.lower() == ".safetensors":
            arrays: dict[str, Any] = dict(load_file(path))
        elif path.suffix.lower() == ".npy":
            arrays = {"": np.load(path, allow_pickle=False)}
        else:
            with np.load(path, allow_pickle=False) as opened:
                arrays = {name: opened[name] for name in opened.files}
        tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise InputError(f"--calibration {path} cannot be read ({first_line(error)}); {_EXPECTED}") from error
    labels = next((tensors.pop(name) for name in _LABELS if name in tensors and len(tensors) > 1), None)
    sizes = {len(t) if t.dim() else 0 for t in (*tensors.values(), *([] if labels is None else [labels]))}
    if len(sizes) != 1 or not tensors or not min(sizes):
        raise InputError(f"--calibration {path}: its arrays must have the same number of samples, one at least, on the first axis")
    batches: list[Any] = []
    for part in torch.tensor(_chosen(sizes.pop(), samples, seed)).split(_BATCH):
        named = {name: t[part] for name, t in tensors.items()}
        inputs = tuple(named.values()) if len(named) == 1 else named
        batches.append((inputs, labels[part]) if labels is not None else inputs)
    return batches
