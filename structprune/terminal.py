"""What the command line shows: progress on stderr, tables and trees on stdout. The only user of rich.

On a terminal there is colour, unless NO_COLOR is set, and nothing is told by colour alone; in a pipe everything is plain text, and no line is cut.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from structprune.ir.axes import Atom, Axis, Product

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from structprune.analysis.groups import Groups
    from structprune.backends.report import Report

_COUNTED = re.compile(r"(\d+) of (\d+)")
_PACE = 10.0  # seconds between two lines of one count in a pipe
_STAYS = "stays"  # in the place of a group's name
_STDOUT, _STDERR = 1, 2  # as the system knows them
_WIDEST = 10_000  # columns of a pipe: who reads it wants whole lines


class progress:
    """Says on stderr what is being done; libraries' chatter stays out of it.

    On a terminal one line tells the time that has passed, the stage, and, where a stage counts ('3 of 12'), a bar and the time that is left.
    In a pipe each stage is a line, and a count one every few seconds. quiet: nothing is said.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self._quiet = quiet
        self._console = console if console is not None else Console(stderr=True)
        self._live = self._console.is_terminal and not quiet
        self._said: tuple[str, float] = ("", 0.0)  # the last line's stage, and when it was

    def __enter__(self) -> Callable[[str], None]:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        if self._live:
            columns = (SpinnerColumn(), _Passed(), TextColumn("{task.description}", markup=False), _Bar(bar_width=24), _Left(compact=True))
            self._shown = Progress(*columns, console=self._console, transient=True)
            self._stage: tuple[str, int | None] = ("", None)
            self._task = self._shown.add_task("start", total=None)
            self._shown.start()
        self._chatter = _chatter_on_stderr()
        self._chatter.__enter__()
        return self._say

    def _say(self, text: str) -> None:
        if self._live:
            self._show(text)
        elif not self._quiet and self._is_news(text):
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _is_news(self, text: str) -> bool:
        stage, counted = _stage(text)
        now = time.monotonic()
        if stage == self._said[0] and not (counted and now - self._said[1] > _PACE):
            return False
        self._said = (stage, now)
        return True

    def _show(self, text: str) -> None:
        stage, counted = _stage(text)
        done, total = (int(counted[1]), int(counted[2])) if counted else (0, None)
        if (stage, total) != self._stage:  # each has a pace of its own
            self._stage = (stage, total)
            self._shown.remove_task(self._task)
            self._task = self._shown.add_task(text, total=total)
        self._shown.update(self._task, description=text, completed=done)

    def __exit__(self, *_: Any) -> None:
        self._chatter.__exit__(None, None, None)
        if self._live:
            self._shown.stop()


@contextmanager
def _chatter_on_stderr() -> Iterator[None]:
    """Whatever the user's code prints is no part of the answer, nor what C code does: a remark of the solver's would break the JSON of --json."""
    sys.stdout.flush()
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # C has a buffer of its own
        os.dup2(kept, _STDOUT)
        os.close(kept)


def _stage(text: str) -> tuple[str, re.Match[str] | None]:
    """What stands before a count, and the count; of a line without one, all of it."""
    counted = _COUNTED.search(text)
    return text[: counted.start()] if counted else text, counted


class _Passed(ProgressColumn):
    """The time since the command began."""

    def __init__(self) -> None:
        super().__init__()
        self._since = time.monotonic()

    def render(self, task: Task) -> Text:
        minutes, seconds = divmod(int(time.monotonic() - self._since), 60)
        return Text(f"{minutes}:{seconds:02}", style="progress.elapsed")


class _Bar(BarColumn):
    def render(self, task: Task) -> Any:
        return Text("") if task.total is None else super().render(task)


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task) + Text(" left")


def show_report(report: Report) -> None:
    """The summary of a compression: on a terminal its verdict stands out, and what is kept has a bar."""
    from structprune.backends import wording

    console = _console()
    if not console.is_terminal:
        print(report)
        return
    data = report.data
    claim = wording.headline(data)
    console.print(Text(wording.settings_of(data), style="dim"))
    console.print(Text(f"{claim}.", style="bold" if "aster" in claim else "bold yellow"))
    table = Table("", "before", "after", "kept", "", box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:4]:
        column.justify, column.no_wrap = "right", True
    for row in wording.rows(data):
        bar = "" if row.share is None else "█" * round(12 * min(row.share, 1)) + "░" * (12 - round(12 * min(row.share, 1)))
        remark = row.remark or bar
        table.add_row(row.what, row.before or "–", Text(row.after, style="bold"), row.kept, Text(remark, style="dim" if row.remark else "cyan"))
    console.print(table)
    verification = data.get("verification") or {}
    mark = "✓" if wording.passed(verification) else "✗"
    console.print(Text(f"{mark} {wording.verified(verification)}{wording.fitted(data)}"))
    for note in wording.notes_of(data):
        console.print(Text(f"note: {note}", style="dim"))


def show_groups(groups: Groups) -> None:
    """A tree of the user's module names: each weight with its axes, which group each belongs to, or that it stays; then why."""
    console = _console()
    names = {group.atom: group.name for group in groups} | {frozen.atom: _STAYS for frozen in groups.frozen if frozen.atom is not None}
    standing = {(m.tensor, m.dim) for one in (*groups, *groups.frozen) for m in one.members}
    console.print(
        Text(f"{len(groups)} groups of coupled channels; {groups.params():,} parameters, {groups.macs():,} multiply-accumulates", style="bold")
    )
    tree = Tree(Text("model"), guide_style="dim")
    branches: dict[str, Tree] = {"": tree}
    for name, axes in groups.axes.items():
        where = [(dim, _spelled(axis, names)) for dim, axis in enumerate(axes) if (name, dim) in standing]
        if len(axes) < 2 or not where:  # vectors follow the weights of their module
            continue
        said = Text.assemble((f"  {'×'.join(str(axis.size) for axis in axes)}", "dim"))
        for dim, spelled in where:
            said.append(f"  axis {dim}: ", style="dim").append(spelled, style="dim" if spelled == _STAYS else "cyan")
        _branch(branches, name.removesuffix(".weight")).label += said  # type: ignore[operator]
    console.print(tree)
    console.print(Text("\nwhat stays, and why", style="bold"))
    reasons = Counter((f.reason, f.at) for f in groups.frozen)
    for (reason, at), number in reasons.items():
        held = [f"{f.name} ({f.channels})" for f in groups.frozen if (f.reason, f.at) == (reason, at)]
        shown = ", ".join(held[:3]) + (f" and {number - 3} more" if number > 3 else "")
        console.print(Text(f"  {shown}: ").append(reason, style="bold").append(f"  {at}" if at else "", style="dim"))
    for group in groups:
        if not group.exact:
            console.print(Text(f"  {group.name} may shrink, but is not exact: {group.reason}"))


def _spelled(axis: Axis, names: Mapping[Atom, str]) -> str:
    """An axis by the names of its groups: × between factors, the outermost first, + between what is joined. What stays as a whole is one word."""
    if isinstance(axis, Atom):
        return names.get(axis, _STAYS)
    parts = [_spelled(part, names) for part in (axis.factors if isinstance(axis, Product) else axis.terms)]
    if all(part == _STAYS for part in parts):
        return _STAYS
    return " × ".join(f"({p})" if " + " in p else p for p in parts) if isinstance(axis, Product) else " + ".join(parts)


def _branch(branches: dict[str, Tree], path: str) -> Tree:
    """The branch of a dotted name, which is made where there is none."""
    if path not in branches:
        parent, _, last = path.rpartition(".")
        branches[path] = _branch(branches, parent).add(Text(last))
    return branches[path]


def _console() -> Console:
    """Of stdout as it is now."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDEST
    return console
