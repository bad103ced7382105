"""Train the demo network from scratch and write the two data files of `structprune.demo`: python bench/train_demo.py [DATA]

DATA is a folder with the four files of Fashion-MNIST (default: where Debian's package puts them). One CPU thread and fixed seeds:
the same machine and PyTorch write the same files again. The 60,000 training images train and the 10,000 test images only score;
no epoch is picked by its test accuracy, the last one is kept. About six minutes of CPU time.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from structprune import demo

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GET_DATA = "install Debian's package dataset-fashion-mnist, or fetch the four files from https://github.com/zalandoresearch/fashion-mnist"
SEED, EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY, SPARSITY = 0, 12, 128, 0.15, 5e-4, 1e-3
SAMPLES_PER_CLASS, CALIBRATION_IMAGES = 50, 256

# The norms whose channels live and die together, one row a group.
COUPLED = (
    ("stem.1", "stage1.conv2.1"),
    ("stage1.conv1.1",),
    ("stage2.conv1.1",),
    ("stage2.conv2.1", "stage2.shortcut.1", "stage3.project.1"),
    ("stage3.expand.1", "stage3.depthwise.1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo network and write its weights and samples.")
    parser.add_argument("data", nargs="?", type=Path, default=DEBIAN, help="folder with the four .gz files (default: %(default)s)")
    folder = parser.parse_args().data
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        parser.error(f"no Fashion-MNIST in {folder}: {GET_DATA}")

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    started = time.process_time()
    train_images, train_labels = read(folder, "train")
    test_images, test_labels = read(folder, "t10k")
    network = train(demo.normalise(train_images), torch.from_numpy(train_labels).long())

    demo.WEIGHTS.write_bytes(save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))
    chosen = first_of_each_class(test_labels, SAMPLES_PER_CLASS)
    np.savez_compressed(
        demo.SAMPLES,
        images=test_images[chosen],
        labels=test_labels[chosen],
        calibration=train_images[:CALIBRATION_IMAGES],
    )
    correct = share_correct(network, demo.normalise(test_images), torch.from_numpy(test_labels).long())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters:,} parameters, {demo.WEIGHTS.stat().st_size:,} + {demo.SAMPLES.stat().st_size:,} bytes")
    print(f"test accuracy {correct:.4f}, on the shipped samples {demo.accuracy(demo.model()):.4f}, {time.process_time() - started:.0f} s of CPU time")


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """SGD with Nesterov momentum, a one-cycle rate and a group lasso, so that the network has channels to spare."""
    network = demo.DemoNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=EPOCHS * steps, pct_start=0.2)
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
            loss = functional.cross_entropy(network(augment(images[batch])), labels[batch])
            optimizer.zero_grad()
            (loss + SPARSITY * lasso(network)).backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2} of {EPOCHS}: training loss {total / steps:.4f}", flush=True)
    return network.to(memory_format=torch.contiguous_format).eval()


def lasso(network: nn.Module) -> Tensor:
    """Sum over channels c of sqrt(sum over the coupled norms n of scale[n, c]^2 + shift[n, c]^2): it empties whole channels."""
    groups: list[list[Tensor]] = [[tensor for name in names for tensor in network.get_submodule(name).parameters()] for names in COUPLED]
    return torch.cat([torch.stack(group).norm(dim=0) for group in groups]).sum()


def augment(images: Tensor) -> Tensor:
    """Mirror each image with probability one half, and shift the whole batch by up to two pixels in each direction."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    row, column = torch.randint(0, 5, (2,)).tolist()
    return functional.pad(mirrored, (2, 2, 2, 2))[..., row : row + 28, column : column + 28]


@torch.inference_mode()
def share_correct(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy of `network`, in batches that bound the memory."""
    predicted = torch.cat([network(batch).argmax(1) for batch in images.split(500)])
    return (predicted == labels).double().mean().item()


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first `count` labels of each class, in the order of the file."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one part of the data set, "train" or "t10k"."""
    return read_idx(folder / f"{part}-images-idx3-ubyte.gz"), read_idx(folder / f"{part}-labels-idx1-ubyte.gz")


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: two zeros, the type 8 (uint8), the rank, each size as a big-endian int32, then the bytes."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path}: not an IDX file of unsigned bytes; {GET_DATA}")
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


if __name__ == "__main__":
    main()
