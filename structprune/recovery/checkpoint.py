"""Where a training run stands, as a file that is replaced as a whole: a process may be killed at any moment."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from structprune.errors import InputError, first_line

_FORMAT = "structprune-recovery/1"
_SECONDS = 60.0  # of work that may be lost


class Checkpoint:
    """`task`: plain data that tell one run from another. Without a path, nothing is read or written."""

    def __init__(self, path: Path | None, task: Mapping[str, Any]):
        self.path, self.task = path, dict(task)
        self._written = time.monotonic()

    def read(self) -> Mapping[str, Any] | None:
        """What was written last; None where nothing was.

        Raises InputError for a file that cannot be read, and for one of another run.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            task, state = saved["task"], saved["state"]
        except Exception as error:  # torch.load raises whatever its reader meets
            raise InputError(f"{self.path} is no checkpoint of a recovery ({type(error).__name__}); remove it, or give another path") from error
        for name, value in self.task.items():
            if task.get(name) != value:
                what = f"{name}={task.get(name)!r} there, {value!r} now" if name != "weights" else "it started from other weights"
                raise InputError(f"{self.path} is the checkpoint of another run: {what}; remove it, or give another path")
        return state  # type: ignore[no-any-return]

    def is_due(self) -> bool:
        """Whether it is a while since it was last written."""
        return self.path is not None and time.monotonic() - self._written >= _SECONDS

    def write(self, state: Mapping[str, Any]) -> None:
        """Written beside, then renamed."""
        if self.path is None:
            return
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()  # torch's own writer ends the process where the disk is full
            torch.save({"format": _FORMAT, "task": self.task, "state": dict(state)}, buffer)
            beside.write_bytes(buffer.getbuffer())
            beside.replace(self.path)
        except OSError as error:
            with suppress(OSError):  # there may be no such folder
                beside.unlink(missing_ok=True)
            raise InputError(f"the checkpoint {self.path} cannot be written: {first_line(error)}; give another path") from error
        self._written = time.monotonic()
