"""What the documentation tells people to type works: tutorials are run, and every command has the options that it is given."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from structprune import cli

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted(p for p in (ROOT / "docs/tutorials").glob("*.md") if p.stem != "README")
_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Of every line that starts with `structprune`, or has torchrun start it, in a block or between backticks; MODEL or =R leave something open."""
    lines = [line for _, _, block in _BLOCK.findall(text) for line in block.splitlines()] + re.findall(r"`(structprune [^`]+)`", text)
    for line in (re.sub("^torchrun .* -m structprune ", "structprune ", line) for line in lines):
        words = shlex.split(line, comments=True) if line.startswith("structprune ") else []
        if len(words) > 2 and not any(re.search(r"(^|=)[A-Z]+$", word) for word in words):
            yield words[1:]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(path: Path, run, hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("STRUCTPRUNE_CACHE", str(tmp_path / "cache"))
    before = set(sys.modules)
    names: dict[str, object] = {}
    try:
        for language, file, block in _BLOCK.findall(path.read_text()):
            if file:
                (tmp_path / file).write_text(block)
            elif language == "python":
                exec(compile(block, f"{path.name}", "exec"), names)
            elif language == "sh":
                for words in commands(f"```sh\n{block}```"):
                    status, _, err = run(*words)
                    assert status == 0, f"{path.name}: structprune {shlex.join(words)}: {err}"
    finally:
        for name in set(sys.modules) - before:
            if (tmp_path / f"{name}.py").exists():
                del sys.modules[name]


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *TUTORIALS], ids=lambda p: p.stem)
def test_commands_have_the_options_that_they_are_given(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for language, _, block in _BLOCK.findall(path.read_text()):
        if language == "toml":
            (tmp_path / "small.toml").write_text(block)
    group = typer.main.get_command(cli.app)
    for words in commands(path.read_text()):
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        command.make_context(words[0], words[1:])


def test_links_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()) + re.findall(r'src="([^":]+)"', path.read_text())
        assert [link for link in links if not (path.parent / link).exists()] == [], path


def test_the_table_of_the_readme_is_what_the_benchmarks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")  # it asks another benchmark what its rows say
    spec = importlib.util.spec_from_file_location("bench_readme", ROOT / "bench/readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text()
    assert text.count(module.BEGIN) == text.count(module.END) == 1
    assert module.with_table(text) == text, "python bench/readme.py --write"


def test_every_tutorial_is_listed() -> None:
    listed = (ROOT / "docs/tutorials/README.md").read_text()
    assert [p.name for p in TUTORIALS if f"({p.name})" not in listed] == []
