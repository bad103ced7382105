"""What is freed while a model is rebuilt goes back to the system, holes between living tensors too; or, where there is much work, at the end."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# in a process of its own: the heap of one that has run a while has holes, and what fits into them asks the system for nothing
SCRIPT = """
import resource
import torch
from structprune.transform.memory import freed_or_kept

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def left_behind(number=64, size=2 << 20):
    blocks = [torch.ones(size // 4) for _ in range(number)]
    before = resident()
    blocks[::2] = [None] * (number // 2)
    return ((number // 2) * size - (before - resident())) >> 20, blocks

tensors = [torch.empty(64 << 20)]
with freed_or_kept(tensors, 1e6):
    light, _ = left_behind()
with freed_or_kept(tensors, 1e12):
    heavy, blocks = left_behind()
    held = resident()
print(light, heavy, (held - resident()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the threshold is glibc's")
def test_holes_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    light, heavy, at_the_end = map(int, done.stdout.split())
    assert light < 4, "MiB of 64 that were freed stay"
    assert heavy > 32, "holes are kept for the next tensors"
    assert at_the_end > 32, "afterwards they are given back"
