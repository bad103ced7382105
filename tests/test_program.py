"""Programs as files: loaded where the model's own classes are not known."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprune.frontends.program import load_program, save_program


@dataclass
class Answer:
    """As the outputs of transformers: torch.export knows the class by its name."""

    hidden: Tensor
    scores: Tensor | None = None


Pair = namedtuple("Pair", ("first", "second"))
torch.export.register_dataclass(Answer, serialized_type_name="tests.Answer")


class Answering(nn.Module):
    def __init__(self, answer: Any):
        super().__init__()
        self.layer, self.answer = nn.Linear(3, 4), answer

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.answer(y)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer, "dict hidden"),
        (lambda y: (Answer(y, y + 1), [y]), "tuple dict hidden scores list"),
        (lambda y: {"own": y, "more": (y, y)}, "dict own more tuple"),
        (lambda y: Pair(y, y), "tuple"),
    ],
)
def test_answers_of_any_class_load_in_another_process(answer: Any, expected: str, tmp_path: Path) -> None:
    model, x = Answering(answer).eval(), torch.randn(2, 3)
    save_program(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save((x, model.layer(x).detach()), tmp_path / "case.pt")
    code = f"""
import torch
from structprune.frontends.program import load_program
x, y = torch.load({str(tmp_path / "case.pt")!r})
def told(value):
    if isinstance(value, torch.Tensor):
        assert (value - y).abs().max() <= 1 + 1e-6
        return ""
    inside = value.items() if isinstance(value, dict) else [("", v) for v in value]
    return " ".join([type(value).__name__, *(f"{{k}} {{told(v)}}" for k, v in inside)])
print(" ".join(told(load_program({str(tmp_path / "model.pt2")!r})(x)).split()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == expected, done.stderr[-500:]


def test_the_program_that_was_saved_stays_as_it_was(tmp_path: Path) -> None:
    model, x = Answering(Answer).eval(), torch.randn(2, 3)
    program = torch.export.export(model, (x,))
    save_program(program, tmp_path / "model.pt2")
    assert isinstance(program.module()(x), Answer)
    assert load_program(tmp_path / "model.pt2")(x)["hidden"].equal(model.layer(x))
