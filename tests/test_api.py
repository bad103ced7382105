"""The API documentation builds from the docstrings, and every public name has one that says what it raises or returns."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import structprune


def test_the_api_documentation_builds(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = [sys.executable, "-m", "pdoc", "--docformat", "markdown", "-o", str(tmp_path), "structprune"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    page = (tmp_path / "structprune.html").read_text()
    missing = [name for name in structprune.__all__ if f'id="{name}"' not in page]
    assert not missing


@pytest.mark.parametrize("name", structprune.__all__)
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(structprune, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isclass(thing):
        for method, function in inspect.getmembers(thing, inspect.isfunction):
            if not method.startswith("_"):
                assert inspect.getdoc(function), f"{name}.{method} has no docstring"


def test_the_changelog_knows_this_version() -> None:
    changes = (Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    assert f"## {structprune.__version__}" in changes
    assert (Path(structprune.__file__).parent / "py.typed").exists()
