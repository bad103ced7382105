"""What a notebook shows: small, whole, and with nothing that a name could do."""

from __future__ import annotations

from dataclasses import replace

import models
from test_report import Page

import structprune as sp
from structprune import notebook
from structprune.ir.plan import PlannedGroup

HOSTILE = "<script>alert(1)</script>"


def test_result_plan_and_groups() -> None:
    model, inputs = models.build("residual")
    result = sp.compress(model, inputs, target="channels=0.5")
    groups = sp.inspect(model, inputs)
    for shown in (result, result.plan, groups):
        html = shown._repr_html_()
        text = Page(html).text("td")
        assert len(html) < 20_000
        assert all(g.name in text for g in groups)
    assert "multiply-accumulates" in Page(result._repr_html_()).text("td")
    assert "model output" in Page(groups._repr_html_()).text("td")


def test_names_are_text() -> None:
    model, inputs = models.build("residual")
    plan = sp.compress(model, inputs, target="channels=0.5").plan
    hostile = replace(plan, target=HOSTILE, groups=(PlannedGroup(HOSTILE, 4, (0, 1), False, HOSTILE, ((HOSTILE, 0),)),))  # type: ignore[arg-type]
    html = hostile._repr_html_()
    assert "script" not in Page(html).kinds
    assert html.count("&lt;script&gt;") == 4


def test_a_long_table_says_how_much_is_left() -> None:
    html = notebook.table("many", ("a", "b"), [(i, i) for i in range(1000)])
    assert "<details>" in html and html.count("<tr>") == 202
    assert "and 800 more" in Page(html).text("td")
