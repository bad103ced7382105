"""Peak memory and energy: what is told is what was taken, and what cannot be told is said to be unknown."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from structprune.backends import resources
from structprune.backends.benchmark import benchmark
from structprune.backends.resources import measure

CPU = torch.device("cpu")
MEGABYTE = 1 << 20
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the kernel's word on resident sets")


class Hungry(nn.Module):
    """Needs some megabytes while it runs."""

    def __init__(self, megabytes: int):
        super().__init__()
        self.megabytes = megabytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(self.megabytes * MEGABYTE // 4).mean()


PEAKS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_resources import Hungry, benchmark

result = benchmark({m: Hungry(int(m)) for m in sys.argv[2:]}, (torch.ones(1),), threads=1, rounds=5)
print(*(latency.peak_bytes for latency in result.latencies))
"""


@linux
@pytest.mark.parametrize("order", [(64, 256), (256, 64)])
def test_peak_memory_is_what_a_model_takes_whatever_ran_before_it(order: tuple[int, int]) -> None:
    """In a process of its own: one that has run a thousand tests holds, and gives back meanwhile, what belongs to none of the two."""
    command = [sys.executable, "-c", PEAKS, str(Path(__file__).parent), *map(str, order)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    for megabytes, peak in zip(order, map(int, ran.stdout.split()), strict=True):
        assert peak == pytest.approx(megabytes * MEGABYTE, abs=24 * MEGABYTE)


def test_a_system_that_does_not_tell_is_said_not_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "_PROCESS", tmp_path)
    monkeypatch.setattr(resources, "_POWER", tmp_path)
    result = benchmark({"a": nn.Identity()}, (torch.ones(3, 2),), rounds=5)
    assert (result.latencies[0].peak_bytes, result.latencies[0].joules) == (None, None)
    assert resources.NO_MEMORY in result.notes and resources.NO_ENERGY in result.notes
    assert result.latencies[0].throughput == pytest.approx(3 / result.latencies[0].median_ms * 1e3)
    silent = benchmark({"a": nn.Identity()}, (torch.ones(3, 2),), rounds=5, resources=False)
    assert not {resources.NO_MEMORY, resources.NO_ENERGY} & set(silent.notes)


def test_energy_is_the_difference_of_the_counters_of_all_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two packages of two joules a run together; one of the counters begins anew on the way. A part of a package counts no second time."""
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("10000000")
    runs = itertools.count(0)

    def run() -> float:
        count = next(runs)
        for name, start in (("intel-rapl:0", 0), ("intel-rapl:1", 9_500_000), ("intel-rapl:0:0", 0)):
            (tmp_path / name / "energy_uj").write_text(str((start + count * 1_000_000) % 10_000_000))
        time.sleep(0.005)
        return 0.005

    run()
    monkeypatch.setattr(resources, "_POWER", tmp_path)
    monkeypatch.setattr(resources, "_ENERGY_SECONDS", 0.04)  # less than the ten runs after which a counter stands where it stood
    assert measure(lambda: run, CPU).joules == pytest.approx(2.0)


def test_a_counter_that_may_not_be_read_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()
    monkeypatch.setattr(resources, "_POWER", tmp_path)
    assert measure(lambda: lambda: 0.0, CPU).joules is None
