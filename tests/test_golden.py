"""The text form of groups and plans is stable: one print serves debugging, these tests and the docs.

After a wanted change: `pytest tests/test_golden.py --golden`, and read the diff.
"""

from __future__ import annotations

from pathlib import Path

import models
import pytest

import structprune as sp

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", models.MODELS)
def test_text_form(name: str, request: pytest.FixtureRequest) -> None:
    model, inputs = models.build(name)
    groups = sp.find_groups(sp.trace(model, inputs))
    plan = sp.compress(model, inputs, target="channels=0.5").plan
    text = f"{groups}\n\n{plan}\n"
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--golden"):
        file.write_text(text)
    assert text == file.read_text()
