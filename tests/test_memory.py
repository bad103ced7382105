"""What is freed while a model is rebuilt goes back to the system, holes between living tensors too."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# in a process of its own: the heap of one that has run a while has holes, and what fits into them asks the system for nothing
SCRIPT = """
import resource
import torch
from structprune.transform.memory import freed_at_once

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def left_behind(number=64, size=2 << 20):
    blocks = [torch.ones(size // 4) for _ in range(number)]
    before = resident()
    blocks[::2] = [None] * (number // 2)
    return (number // 2) * size - (before - resident())

with freed_at_once([torch.empty(64 << 20)]):
    inside = left_behind()
print(inside >> 20, left_behind() >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="the threshold is glibc's")
def test_holes_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    inside, after = map(int, done.stdout.split())
    assert inside < 4, "MiB of 64 that were freed stay"
    assert after > 32, "afterwards the threshold is back where glibc moves it to, and holes stay"
