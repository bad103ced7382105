"""The pages in a real browser: what people see, do with the keyboard, and read on a phone or in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import DESK, PHONE, Browser
from test_report import DATA, data_with

from structprune.backends import front
from structprune.backends.report import Report

pytestmark = pytest.mark.skipif(not browser.installed(), reason="Chromium is not installed: nothing was seen of the pages (apt-get install chromium)")

HOSTILE = '<script>window.owned = 1</script><img src=x onerror="window.owned = 1">\'"&amp;'
MANY = 3000
VISIBLE = "[...document.querySelector('#table-of-groups').tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[0].textContent)"
SETTLED = "new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))"

FOCUSED = "(e => `${e.localName},${e.getAttribute('aria-label') ?? e.textContent.trim()}`)(document.activeElement)"
FIRST_PAINT = """new Promise(done => new PerformanceObserver(list => {
  const painted = list.getEntriesByName('first-contentful-paint')[0];
  if (painted) done(painted.startTime);
}).observe({type: 'paint', buffered: true}))"""  # milliseconds


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    started = Browser()
    yield started
    started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    Report(DATA).save_html(path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of thousands of layers, on residual streams of forty."""
    names = [f"backbone.stages.{4 * i // MANY}.blocks.{i}.conv" for i in range(MANY)]
    groups = [{"name": n, "channels": 512, "kept": i % 512, "exact": True, "reason": "", "members": [f"{n}.weight[0]"]} for i, n in enumerate(names)]
    steps: list[dict[str, Any]] = []
    for i, name in enumerate(names[:-1]):
        steps.append({"layer": f"{name}.weight", "operator": "conv2d", "at": "net.py:7", "reads": [f"g{i - i % 40}"], "makes": [f"g{i + 1}"]})
        steps.append({"operator": "add", "at": "net.py:9", "ties": [f"g{i - i % 40}"]})
    path = tmp_path_factory.mktemp("page") / "large.html"
    Report(data_with(groups=groups, outline=steps)).save_html(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    reports = {f"run{i}": Report(data_with(target=f"macs=0.{i}", accuracy={"before": 0.9, "after": 0.8 + i / 100})) for i in (3, 5, 7)}
    for name, report in reports.items():
        (folder / name).mkdir()
        report.save_html(folder / name / "report.html")
    front.save(front.rows_of(reports), folder, "a model")
    return folder / "front.html"


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["report", "large", "runs"])
def test_nothing_complains_nothing_is_loaded_nothing_sticks_out(chromium, page, size, scheme, request) -> None:
    path: Path = request.getfixturevalue(page)
    chromium.open(path, size, scheme)
    chromium.run(SETTLED)
    assert chromium.errors == []
    assert [url for url in chromium.requests if not url.startswith("file:")] == [] and len(chromium.requests) == 1
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")
    assert chromium.run(FIRST_PAINT) < 1000
    background, ink = (chromium.run(f"getComputedStyle(document.body).{what}") for what in ("backgroundColor", "color"))
    light = [sum(map(float, colour[4:-1].split(","))) / 3 for colour in (background, ink)]
    assert (light[0] > 200 and light[1] < 80) if scheme == "light" else (light[0] < 80 and light[1] > 200)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_charts_are_drawn_at_the_size_of_the_screen(chromium, report, size) -> None:
    chromium.open(report, size)
    boxes = chromium.run(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect()).filter(b => b.width).map(b => [b.width, b.height])"
    )
    assert len(boxes) == 2
    assert all(200 < width <= size[0] and height > 60 for width, height in boxes)
    seen = "[...document.querySelectorAll('figure [role=graphics-symbol]')].filter(m => m.getBoundingClientRect().width > 1)"
    assert chromium.run(f"{seen}.some(m => m.getAttribute('aria-label') == 'conv1: 32 of 64 channels')")
    colours = chromium.run(f"[...new Set({seen}.map(m => getComputedStyle(m).fill))]")
    assert {"rgb(201, 219, 231)", "rgb(0, 114, 178)"} <= set(colours), "the page's own before and after"


def test_every_picture_has_words(chromium, report) -> None:
    chromium.open(report)
    without = chromium.run(
        "[...document.querySelectorAll('svg')].filter(s => !s.closest('figure[aria-label]') && !s.getAttribute('aria-label')).map(s => s.outerHTML)"
    )
    assert without == []


def test_search_leaves_the_rows_that_have_every_word(chromium, report) -> None:
    chromium.open(report)
    assert len(chromium.run(VISIBLE)) == 3
    chromium.run("document.querySelector('input[type=search]').focus()")
    chromium.type("conv2 NORM")  # 'norm' stands among the members, which are folded
    assert [name.split("not exact")[0] for name in chromium.run(VISIBLE)] == ["layer1.0.conv2"]
    assert chromium.run("document.querySelector('output').textContent") == "1 of 3"


def test_sorting_by_number_and_by_name(chromium, report) -> None:
    chromium.open(report)
    head = "document.querySelectorAll('#table-of-groups thead button')"
    after = "[...document.querySelector('#table-of-groups').tBodies[0].rows].map(r => Number(r.cells[2].textContent))"
    chromium.run(f"{head}[2].click()")
    assert chromium.run(after) == [0, 32, 100]
    chromium.run(f"{head}[2].click()")
    assert chromium.run(after) == [100, 32, 0]
    assert chromium.run("document.querySelector('[aria-sort]').textContent.trim() + document.querySelectorAll('[aria-sort]').length") == "after1"
    chromium.run(f"{head}[0].click()")
    assert chromium.run(after) == [32, 0, 100]


def test_the_keyboard_reaches_everything(chromium, report) -> None:
    chromium.open(report)
    reached = []
    for _ in range(40):
        chromium.press("Tab")
        reached.append(chromium.run(FOCUSED))
    for stop in ("region,Before and after", "summary,The numbers", "button,Zoom in", "button,Fit", "input,", "button,group"):
        kind, name = stop.split(",")
        assert any(r.split(",")[0] == ("div" if kind == "region" else kind) and name in r for r in reached), (stop, reached)
    marks = [r for r in reached if r.startswith(("a,", "g,"))]
    assert len(set(marks)) == 1, "the map is one stop"
    chromium.run("document.querySelector('svg.lanes [tabindex=\"0\"]').focus()")
    chromium.press("ArrowDown")
    said = chromium.run("document.activeElement.getAttribute('aria-label')")
    assert said and said != marks[0].partition(",")[2]
    assert chromium.run("document.getElementById('tip').hidden") is False
    assert chromium.run("document.getElementById('tip').textContent") == said
    chromium.press("Escape")
    assert chromium.run("document.getElementById('tip').hidden") is True


def test_a_lane_leads_to_its_group(chromium, report) -> None:
    chromium.open(report)
    chromium.run("document.querySelector('svg.lanes a[href=\"#g0\"]').focus()")
    chromium.press("Enter")
    assert chromium.run("document.querySelector('tr:target').cells[0].textContent") == "conv1"


def test_a_tip_where_the_pointer_is(chromium, report) -> None:
    chromium.open(report)
    box = "document.querySelector('svg.lanes a.frozen rect')"
    chromium.run(f"{box}.scrollIntoView({{block: 'center'}})")
    x, y = chromium.run(f"(b => [b.x + 1, b.y + 1])({box}.getBoundingClientRect())")
    chromium.move(x, y)
    assert chromium.run("document.getElementById('tip').textContent") == "conv1: its 3 entries stay: model input"


def test_zoom(chromium, report) -> None:
    chromium.open(report)
    width = "document.querySelector('svg.lanes').getBoundingClientRect().width"
    before = chromium.run(width)
    chromium.run("document.querySelector('[data-zoom=\"1.25\"]').click()")
    assert chromium.run(width) == pytest.approx(1.25 * before, rel=0.01)
    chromium.run("document.querySelector('[data-zoom=\"0\"]').click()")
    assert chromium.run(width) <= before * 1.01


def test_hostile_names_are_text(chromium, tmp_path) -> None:
    groups = [{"name": HOSTILE, "channels": 4, "kept": 2, "exact": False, "reason": HOSTILE, "members": [HOSTILE, HOSTILE]}] * 3
    frozen = [{"name": HOSTILE, "channels": 1, "reason": HOSTILE, "at": HOSTILE}]
    data = data_with(model=HOSTILE, command=HOSTILE, notes=[HOSTILE], groups=groups, frozen=frozen, environment={HOSTILE: HOSTILE})
    data["outline"] = [{"layer": HOSTILE, "operator": HOSTILE, "at": HOSTILE, "reads": ["f0"], "makes": ["g0"]}] * 300  # packed, too
    Report(data).save_html(tmp_path / "report.html")
    chromium.open(tmp_path / "report.html")
    chromium.run("document.querySelector('details.packed').open = true")
    chromium.run(SETTLED)
    chromium.run("document.querySelector('svg.lanes a').focus()")
    assert chromium.run("window.owned") is None
    assert chromium.run("document.scripts.length + document.images.length") == 1
    assert HOSTILE in chromium.run("document.getElementById('tip').textContent")
    assert chromium.errors == []


def test_thousands_of_layers_unfold(chromium, large) -> None:
    assert large.stat().st_size < 3_000_000
    chromium.open(large)
    assert chromium.run("document.querySelectorAll('*').length") < 3000
    for fold in (0, 1):
        chromium.run(f"document.querySelectorAll('details.packed')[{fold}].open = true")
    chromium.run("(async () => { while (!document.querySelector('#table-of-groups')) await new Promise(r => setTimeout(r, 20)); })()")
    assert len(chromium.run(VISIBLE)) == MANY
    assert chromium.run("document.querySelectorAll('svg.lanes .row').length") == 2 * (MANY - 1)
    chromium.run("document.querySelector('input[type=search]').focus()")
    chromium.type("blocks.1234")
    assert chromium.run(VISIBLE) == ["backbone.stages.1.blocks.1234.conv"]
    assert chromium.errors == []


def test_a_front_links_its_reports(chromium, runs) -> None:
    chromium.open(runs)
    assert chromium.run("document.querySelectorAll('figure .wide [aria-roledescription=circle], figure .wide [role=graphics-symbol]').length") >= 3
    chromium.follow("document.querySelector('#table-of-runs a')")
    assert chromium.run("document.querySelector('h1').textContent") == "1.83× faster with ONNX Runtime on CPU."


def test_on_paper(chromium, report) -> None:
    chromium.open(report, scheme="dark")
    printed = chromium.printed()
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") >= 2
    assert chromium.run("[...document.querySelectorAll('details:not(table details)')].every(d => d.open)"), "only lists in tables stay folded"
