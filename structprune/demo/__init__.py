"""The built-in demo: a small trained residual network, labelled images to score it on, and unlabelled ones to calibrate with.

    model()        the trained network, ready to compress; 92.0% of the 10,000 test images right
    samples()      500 test images, 50 of each class, and their labels; never seen in training
    calibration()  256 training images without labels
    accuracy(m)    share of the samples that `m` classifies correctly

The images are a part of Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist), Copyright (c) 2017 Zalando SE,
by Zalando Research (Xiao, Rasul and Vollgraf, arXiv:1708.07747), under the MIT licence. `bench/train_demo.py` makes both data files.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from structprune.ir.traced import in_mode

__all__ = ["accuracy", "calibration", "model", "samples"]

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
WEIGHTS = Path(__file__).with_name("weights.safetensors")
SAMPLES = Path(__file__).with_name("samples.npz")


class ConvNorm(nn.Sequential):
    """A convolution that keeps the size (divided by `stride`), and its batch norm."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(channels_out),
        )


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the spatial means of all channels (Hu et al., arXiv:1709.01507)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.excite(self.squeeze(means).relu()).sigmoid()


class PlainBlock(nn.Module):
    """Two 3x3 convolutions around an identity: the input and output channels are one group."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv2(self.conv1(x).relu())).relu()


class GatedBlock(nn.Module):
    """Two 3x3 convolutions and a squeeze-excite gate around a strided projection: input and output channels are free of each other."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels_in, channels_out, 3, stride=2)
        self.conv2 = ConvNorm(channels_out, channels_out, 3)
        self.gate = SqueezeExcite(channels_out, channels_out // 4)
        self.shortcut = ConvNorm(channels_in, channels_out, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.shortcut(x) + self.gate(self.conv2(self.conv1(x).relu()))).relu()


class SeparableBlock(nn.Module):
    """Expand, filter each channel on its own, project back (Sandler et al., arXiv:1801.04381): the depthwise filter ties its two sides."""

    def __init__(self, channels: int, expanded: int) -> None:
        super().__init__()
        self.expand = ConvNorm(channels, expanded, 1)
        self.depthwise = ConvNorm(expanded, expanded, 3, groups=expanded)
        self.project = ConvNorm(expanded, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x).relu()).relu())


class DemoNet(nn.Module):
    """Grey 28x28 images in, ten logits out; one stage of each kind of residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 32, 3)
        self.stage1 = PlainBlock(32)
        self.stage2 = GatedBlock(32, 64)
        self.stage3 = SeparableBlock(64, 192)
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(self.stem(images).relu(), 2)
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(x.mean((2, 3)))


def model() -> nn.Module:
    """The trained network, float32, on the CPU, in evaluation mode."""
    with torch.device("meta"):  # no random initialisation: the caller's random state stays as it is
        network = DemoNet()
    network.to_empty(device="cpu").load_state_dict(load_file(WEIGHTS))
    return network.eval()


def samples() -> tuple[Tensor, Tensor]:
    """The labelled test images, [500, 1, 28, 28] float32 in [0, 1] as the network takes them, and their labels, [500] int64."""
    with np.load(SAMPLES) as arrays:
        return normalise(arrays["images"]), torch.from_numpy(arrays["labels"]).long()


def calibration() -> Tensor:
    """Unlabelled training images, [256, 1, 28, 28] float32 in [0, 1]."""
    with np.load(SAMPLES) as arrays:
        return normalise(arrays["calibration"])


def accuracy(model: nn.Module) -> float:
    """Share of the samples that `model` classifies correctly in evaluation mode; every module's training flag is put back."""
    images, labels = samples()
    like = next(model.parameters(), images)
    with in_mode(model, training=False), torch.inference_mode():
        predicted = model(images.to(like)).argmax(1).cpu()
    return (predicted == labels).double().mean().item()


def normalise(images: np.ndarray) -> Tensor:
    """Bytes of [N, 28, 28] to the network's input, [N, 1, 28, 28] float32 in [0, 1]."""
    return torch.from_numpy(images)[:, None].float() / 255
