"""Files timed in a Python process of its own.

A process that has traced, trained or pruned runs a model up to a third slower than one that only serves it: its memory is in pieces, and
threads of other libraries wait in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from structprune.backends.benchmark import Comparison, benchmark
from structprune.backends.candidates import example_inputs, named
from structprune.errors import InputError


class BenchProcess:
    """A process that times files and does nothing else. It starts when it is first asked, or before that by `start`, and ends with the block:

    with BenchProcess() as bench:
        bench.start()  # takes seconds, beside whatever the caller does next
        comparison = bench.compare(dense, small, inputs)
    """

    def __init__(self) -> None:
        self._held = ExitStack()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    def start(self) -> subprocess.Popen[str]:
        """Start it now, where it is not running yet."""
        if self._process is None:
            self._said = self._held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            command = [sys.executable, "-m", __name__]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True)
            self._process = self._held.enter_context(process)
            self._held.callback(process.kill)  # it may be measuring for a caller who has given up
        return self._process

    def compare(self, baseline: Path, candidate: Path, inputs: Sequence[Tensor], **options: Any) -> Comparison:
        """`benchmark` of two files with these options, on noise of the inputs' shapes, and on single numbers as they are.

        Raises InputError as `benchmark` does.
        """
        shapes = [f"{'x'.join(map(str, t.shape)) or f':={t.item()}'}:{str(t.dtype).removeprefix('torch.')}" for t in inputs]
        asked = {"files": [str(f.absolute()) for f in (baseline, candidate)], "shapes": shapes, "options": options}
        process = self.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
            with suppress(BrokenPipeError):
                process.stdin.close()  # what it never read would be written once more at the end of the block
        if not line:
            raise InputError(f"benchmark: the process that measures {self._last_words(process)}")
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        return Comparison.from_dict(answer)

    def _last_words(self, process: subprocess.Popen[str]) -> str:
        code = process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"ended{f' by {signal.Signals(-code).name}' if code < 0 else ''}: {(lines or ['it said nothing'])[-1]}"


def _serve() -> None:
    """Answer every line of stdin by one line, in JSON."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            files = named(asked["files"])
            answer = benchmark(files, example_inputs(files, asked["shapes"], seed=0), resources=False, **asked["options"]).to_dict()
        except InputError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
