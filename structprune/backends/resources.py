"""What a run takes beside time: memory at its peak, and energy, where the machine tells."""

from __future__ import annotations

import ctypes
import gc
import importlib
import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_ENERGY_SECONDS = 1.0  # of runs in a row: counters are read in steps of a millisecond
_POWER = Path("/sys/class/powercap")
_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # written to clear_refs; see proc(5)
_RESET = 1.05  # times the resident set: a peak below this was reset

NO_MEMORY = "peak memory is not measured: this system does not tell the largest resident set of a process (/proc/self/status)"
NO_ENERGY = "energy is not measured: no counter is there, or it may not be read (RAPL in /sys/class/powercap; on a GPU NVML, with nvidia-ml-py)"


@dataclass(frozen=True)
class Resources:
    """`peak_bytes`: by how much memory grows from before a model is loaded to the peak of its first runs; of the process, on a GPU of the device.

    `joules`: for one run, of the whole processor package or GPU, what it takes when idle included. None: the machine does not tell.
    """

    peak_bytes: int | None = None
    joules: float | None = None


def measure(start: Callable[[], Callable[[], float]], place: torch.device) -> Resources:
    """start: loads a model, runs it a few times, and returns what runs it once."""
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(place)
        run = start()
        return Resources(free - torch.cuda.mem_get_info(place)[0], _joules(run, _gpu_meter(place.index or 0)))
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier models left in the heap would hide what this one takes
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    before, peak_before = _resident("VmRSS"), _resident("VmHWM")
    run = start()
    told = before and peak_before and peak_before < _RESET * before  # else the peak is older than the model
    return Resources(max(0, _resident("VmHWM") - before) if told else None, _joules(run, _package_meter()))


def _resident(field: str) -> int:
    """Bytes, from the kernel's word on this process; 0 where there is none."""
    with suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE)
        return int(found[1]) << 10 if found else 0
    return 0


def _joules(run: Callable[[], float], meter: Callable[[], float] | None) -> float | None:
    """The mean over a second of runs in a row."""
    if meter is None:
        return None
    started, before, runs = time.perf_counter(), meter(), 0
    while time.perf_counter() - started < _ENERGY_SECONDS:
        run()
        runs += 1
    return (meter() - before) / runs


def _package_meter() -> Callable[[], float] | None:
    """Joules of all processor packages, as RAPL counts them; None where that is not there or not allowed."""
    packages = sorted(p for p in _POWER.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", p.name))  # AMD's bear this name too
    turns = [0.0] * len(packages)
    last = [-math.inf] * len(packages)

    def read() -> float:
        for number, package in enumerate(packages):
            now = float((package / "energy_uj").read_text())
            if now < last[number]:  # the counter begins anew
                turns[number] += float((package / "max_energy_range_uj").read_text())
            last[number] = now
        return (sum(last) + sum(turns)) * 1e-6

    with suppress(OSError, ValueError):
        if packages and read() >= 0:
            return read
    return None


def _gpu_meter(index: int) -> Callable[[], float] | None:
    """Joules of a GPU, as NVML counts them; None without NVML's bindings, or on a GPU that does not count."""
    with suppress(ImportError):
        nvml: Any = importlib.import_module("pynvml")
        with suppress(nvml.NVMLError):
            nvml.nvmlInit()
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            nvml.nvmlDeviceGetTotalEnergyConsumption(device)
            return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(device)) * 1e-3
    return None
