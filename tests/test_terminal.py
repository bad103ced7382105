"""What the command line shows: on a terminal, in a pipe, without colour."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import models
import pytest
import torch
from rich.console import Console
from test_report import DATA
from torch import nn

import structprune as sp
from structprune import terminal
from structprune.backends.report import Report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 100 columns with colour."""
    out = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return out


def said_on(console: Console, *stages: str, quiet: bool = False) -> str:
    with terminal.progress(quiet, console) as say:
        for stage in stages:
            say(stage)
            if console.is_terminal and not quiet:
                say.__self__._shown.refresh()  # type: ignore[attr-defined]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_progress_tells_the_time_that_is_left_where_a_stage_counts() -> None:
    console = Console(file=Terminal(), force_terminal=True, width=120, no_color=True)
    text = said_on(console, "trace", "time operators: 0 of 80 sizes", "time operators: 20 of 80 sizes", "time operators: 60 of 80 sizes")
    shown = re.split(r"\r", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert any("trace" in line and "left" not in line and "0:00" in line for line in shown)
    assert any(re.search(r"0:00 time operators: 60 of 80 sizes .*━.* (--|\d\d):(--|\d\d) left", line) for line in shown)


def test_progress_in_a_pipe_is_a_line_a_stage() -> None:
    assert said_on(Console(file=io.StringIO()), "trace", "measure [what] group 1 of 2") == "trace\nmeasure [what] group 1 of 2\n"


def test_progress_in_a_pipe_says_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO())
    with terminal.progress(console=console) as say:
        for number in range(0, 400, 50):
            say(f"time operators: {number} of 400 timings")
            now += 4.0
        for stage in ("onnx", "onnx", "benchmark"):
            say(stage)
    assert isinstance(console.file, io.StringIO)
    counts = [f"time operators: {number} of 400 timings" for number in (0, 150, 300)]
    assert console.file.getvalue().splitlines() == [*counts, "onnx", "benchmark"]


def test_quiet_says_nothing() -> None:
    for console in (Console(file=io.StringIO()), Console(file=Terminal(), force_terminal=True)):
        assert said_on(console, "trace", quiet=True) == ""


def test_summary_on_a_terminal(tty: Terminal) -> None:
    with redirect_stdout(tty):
        terminal.show_report(Report(DATA))
    text = re.sub(r"\x1b\[[0-9;]*m", "", tty.getvalue())
    assert text != tty.getvalue(), "colour on a terminal"
    assert not re.search(r"\x1b\[(1;)?3[12]m", tty.getvalue()), "neither red nor green, which some cannot tell apart"
    assert "1.83× faster with ONNX Runtime on CPU." in text
    assert "✓ Verified:" in text
    assert re.search(r"parameters +25.6 M +12.0 M +47.0 % +██████░░░░░░", text)
    assert max(map(len, text.splitlines())) <= 100


def test_no_color(tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with redirect_stdout(tty):
        terminal.show_report(Report(DATA))
    assert "parameters" in tty.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", tty.getvalue())


def test_summary_in_a_pipe_is_the_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_report(Report(DATA))
    assert capsys.readouterr().out == f"{Report(DATA)}\n"


def test_groups_as_a_tree_of_the_users_names(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_groups(sp.inspect(*models.build("residual")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 groups of coupled channels; ") or "groups of coupled channels" in lines[0]
    conv2 = next(line for line in lines if re.search(r"── conv2  ", line))
    assert re.search(r"\d+×\d+×3×3  axis 0: \S+  axis 1: conv1$", conv2)
    assert any(re.search(r"axis 0: stays", line) for line in lines)
    assert any("model output" in line and re.search(r"\.py:\d+$", line) for line in lines[lines.index("what stays, and why") :])


def test_config_file(run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('target = "channels=0.5"\nno-latency = true\nseed = 3\nignore = ["stem"]\njson = true\n')
    status, out, err = run("compress", "models:residual", "--config", "mine.toml", "--out", "small", "--target", "channels=0.75", "--quiet")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["target"], report["seed"], report["latency_ms"]) == ("channels=0.75", 3, {}), "what is typed wins"
    assert any(f["reason"] == "ignored" for f in report["frozen"])
    assert report["config"] == {"target": "channels=0.5", "no-latency": True, "seed": 3, "ignore": ["stem"], "json": True}
    assert report["command"] == "structprune compress models:residual --config mine.toml --out small --target channels=0.75 --quiet"
    assert "mine.toml --out small" in (tmp_path / "small/report.html").read_text()


class Joined(nn.Module):
    """3 × heads × width in the rows of one weight; that and two layers side by side in the columns of another."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.a, self.b, self.out = nn.Linear(8, 3 * 2 * 4), nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(8 + 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 3, 2, 4).unbind(1)
        mixed = (torch.softmax(q @ k.transpose(1, 2), -1) @ v).reshape(-1, 8)
        return self.out(torch.cat([mixed, self.a(x), self.b(x)], 1))


def test_an_axis_of_several_groups_is_spelled_as_it_is_laid_out(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_groups(sp.inspect(Joined(), (torch.randn(2, 8),)))
    spelled = {line.split()[1]: line.partition("axis 0: ")[2] for line in capsys.readouterr().out.splitlines() if "axis 0: " in line}
    assert spelled["qkv"] == "stays × stays × qkv  axis 1: stays"
    assert spelled["out"] == "stays  axis 1: stays × qkv + a + b"


def test_no_line_of_torchs_own_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A pass of torch's asks for the size of the batch, in a line that the user has not written."""
    terminal.show_groups(sp.inspect(Joined(), (torch.randn(2, 8),)))
    reasons = capsys.readouterr().out.partition("what stays, and why")[2]
    assert "model input" in reasons and "runtime_assert" not in reasons


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('tarqet = "macs=0.5"', "mine.toml: compress has no option 'tarqet' (did you mean target?)"),
        ("target = {macs = 0.5}", "mine.toml: 'target' cannot be {'macs': 0.5}"),
        ("target = ", "mine.toml is no TOML"),
        ('no-latency = "yes"', "'no-latency' cannot be 'yes'"),
    ],
)
def test_config_files_that_cannot_be_used(run, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    status, out, err = run("compress", "demo", "--config", "mine.toml")
    assert (status, out) == (2, "")
    assert err.startswith("structprune: ") and words in err
    assert run("compress", "demo", "--config", "nowhere.toml")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "demo", "--why", "stage2.conv3.0"], "did you mean stage2.conv2.0"),
        (["compress", "demo", "--ignore", "stage9"], "did you mean stage"),
        (["compress", "demo", "--target", "latancy=0.5"], "did you mean latency?"),
        (["compress", "demo", "--criterion", "fischer"], "did you mean fisher?"),
        (["compress", "demo", "--allocation", "mlip", "--target", "macs=0.5"], "did you mean milp?"),
        (["compress", "demo", "--runtime", "onnx-runtime"], "did you mean onnxruntime?"),
        (["inspect", "timm:resnet51"], "did you mean resnet5"),
    ],
)
def test_a_suggestion(run, arguments: list[str], words: str) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert words in err.strip().splitlines()[-1]


@pytest.mark.skipif(os.name != "posix", reason="speaks to the C library by its POSIX name")
def test_what_c_code_prints_is_no_part_of_the_answer() -> None:
    code = """
import ctypes, os
from structprune import terminal
with terminal.progress(quiet=True):
    print("Python")
    os.write(1, b"the system\\n")
    ctypes.CDLL(None).puts(b"C")
print("answer")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "answer\n"
    assert sorted(done.stderr.split("\n")) == ["", "C", "Python", "the system"]


def test_shell_completion() -> None:
    words = {"_STRUCTPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "structprune comp", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'structprune'; from structprune.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["compress", "compare"]
