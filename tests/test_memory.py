"""What is freed while a model is rebuilt goes back to the system, holes between living tensors too."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import pytest
import torch

from structprune.transform.memory import freed_at_once


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def left_behind(number: int = 64, size: int = 1 << 20) -> int:
    """Bytes that stay resident of every second of some tensors, freed while the others live."""
    blocks = [torch.ones(size // 4) for _ in range(number)]
    before = resident()
    blocks[::2] = [None] * (number // 2)  # type: ignore[list-item]
    return (number // 2) * size - (before - resident())


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the threshold is glibc's")
def test_holes_are_given_back() -> None:
    model = torch.empty(256 << 18)  # 256 MiB, never touched
    with freed_at_once([model]):
        inside = left_behind()
    after = left_behind()
    assert inside < 4 << 20
    assert after > 16 << 20, "the threshold is back where glibc moves it to, and holes stay"
