"""Charts, as Vega-Lite says them and Vega draws them: in a page, where the page's own colours hold, or as a file.

Text in SVG stays text, and every mark has a label in words (`description`), which a reader of a screen speaks and a page shows as a tip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from structprune.backends.benchmark import Comparison
from structprune.backends.wording import digits
from structprune.errors import InputError

# "Before" is pale and "after" solid, of one blue out of Okabe and Ito's set: the two differ in lightness, which every kind of colour
# vision sees, and so does a black-and-white print. In a page they are the variables of its style sheet, light or dark.
_COLOURS = {"before": "#c9dbe7", "after": "#0072b2", "ink": "#1d2329", "quiet": "#5b6670", "rule": "#e2e5e8"}
_OF_PAGE = {name: f"var(--{name})" for name in _COLOURS}
_FORMATS: dict[str, Callable[..., Any]] = {
    ".svg": lambda spec: vl_convert.vegalite_to_svg(spec).encode(),
    ".png": lambda spec: vl_convert.vegalite_to_png(spec, scale=2),
    ".pdf": vl_convert.vegalite_to_pdf,
    ".jpeg": lambda spec: vl_convert.vegalite_to_jpeg(spec, scale=2),
}
_SIZES = {"wide": 900, "narrow": 330}  # pixels; a page shows the one that its screen has room for
_BARS = 400  # groups of which each gets a bar of its own

Spec = dict[str, Any]


def for_page(chart: Callable[[int], Spec]) -> dict[str, str]:
    """chart: from a width in pixels. SVG at the widths of a desk and of a phone, in the colours of the page that holds it."""
    return {name: vl_convert.vegalite_to_svg(_styled(chart(width), width, _OF_PAGE)) for name, width in _SIZES.items()}


def save(spec: Spec, path: Path) -> None:
    """Write a chart, of the format that the file's name ends in."""
    check(path)
    path.write_bytes(_FORMATS[path.suffix](_styled(spec, 560, _COLOURS | {"background": "white"})))


def check(path: Path) -> None:
    """InputError unless a chart can be such a file: before hours of measuring, not after."""
    if path.suffix not in _FORMATS:
        raise InputError(f"{path}: a chart cannot be a '{path.suffix}' file; use one of {', '.join(sorted(_FORMATS))}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")


def widths(groups: Sequence[Mapping[str, Any]], stages: Sequence[tuple[str, int]], width: int) -> Spec:
    """A bar for each group, first layer to last: channels before behind channels after. Of many groups, one outline.

    stages: what to write below the bars, with the number of bars that it stands for.
    """
    rows = [
        {
            "start": i + 0.06,
            "end": i + 0.94,
            "before": g["channels"],
            "after": g["kept"],
            "is": f"{g['name']}: {g['kept']} of {g['channels']} channels",
        }
        for i, g in enumerate(groups)
    ]
    labels, at = [], 0
    for name, number in stages:
        if number * width / len(groups) > 6.5 * len(name):  # pixels a letter
            labels.append({"at": at + number / 2, "name": name})
        at += number
    scale = {"type": "sqrt", "nice": True}
    x = {"field": "start", "type": "quantitative", "axis": None, "scale": {"domain": [0, len(groups)], "nice": False}}
    y = {"type": "quantitative", "scale": scale, "title": "channels"}
    if len(groups) <= _BARS:
        layers: list[Spec] = [
            {
                "mark": {"type": "rect", "color": f"@{which}", "aria": which == "before"},
                "encoding": {"x": x, "x2": {"field": "end"}, "y": y | {"field": which}, "y2": {"datum": 0}, "description": {"field": "is"}},
            }
            for which in ("before", "after")
        ]
    else:
        layers = [
            {
                "mark": {"type": "area", "interpolate": "step-after", "color": f"@{which}", "aria": False},
                "encoding": {"x": x, "y": y | {"field": which}},
            }
            for which in ("before", "after")
        ]
    below = {
        "data": {"values": labels},
        "mark": {"type": "text", "baseline": "top", "color": "@quiet", "fontSize": 11, "aria": False},
        "encoding": {
            "x": {"field": "at", "type": "quantitative", "axis": None},
            "y": {"value": {"expr": "height + 6"}},
            "text": {"field": "name"},
        },
    }
    return {"data": {"values": rows}, "height": 200, "layer": [*layers, *([below] if labels else [])]}


def operators(rows: Sequence[Mapping[str, Any]], width: int) -> Spec:
    """rows: {"operator", "before", "after"} in milliseconds, the longest first. A pair of bars for each."""
    values = [
        {"operator": r["operator"], "model": model, "ms": r[model], "is": f"{r['operator']} {model}: {digits(r[model])} ms"}
        for r in rows
        for model in ("before", "after")
    ]
    return {
        "data": {"values": values},
        "height": {"step": 12},
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "operator", "type": "nominal", "sort": None, "title": None, "scale": {"paddingInner": 0.3}},
            "yOffset": {"field": "model", "sort": None},
            "x": {"field": "ms", "type": "quantitative", "title": "milliseconds a run", "axis": {"tickCount": max(3, width // 100)}},
            "color": {"field": "model", "scale": {"domain": ["before", "after"], "range": ["@before", "@after"]}, "legend": None},
            "description": {"field": "is"},
        },
    }


def front(rows: Sequence[Mapping[str, Any]], title: str, width: int) -> Spec:
    """Latency (or multiply-accumulates, where it was not measured) against the best measure of quality that all have.

    rows: as of `front.rows_of`. A line joins those that no other beats in both.
    """
    measured = all(row["latency"] for row in rows)
    quality, label = quality_of(rows)
    values = []
    for row in rows:
        ratio = row["latency"] if measured else {"median": row["macs"], "low": row["macs"], "high": row["macs"]}
        words = f"{row['directory']}: {digits(ratio['median'])} of the {'latency' if measured else 'operations'}, {label} {row[quality]:.4g}"
        values.append(
            {"cost": ratio["median"], "low": ratio["low"], "high": ratio["high"], "quality": row[quality], "name": row["target"], "is": words}
        )
    _mark_best(values, up=quality != "predicted_loss")
    cost = f"{'latency' if measured else 'multiply-accumulates'}, share of the original's"
    x = {
        "field": "cost",
        "type": "quantitative",
        "title": cost,
        "scale": {"zero": False, "nice": True, "padding": 12},
        "axis": {"tickCount": max(4, width // 110)},
    }
    y = {"field": "quality", "type": "quantitative", "title": label, "scale": {"zero": False, "nice": True, "padding": 12}}
    spread: list[Spec] = [
        {"mark": {"type": "rule", "color": "@quiet", "aria": False}, "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}, "y": y}}
    ]
    return {
        "title": title,
        "data": {"values": values},
        "height": 260,
        "layer": [
            {
                "transform": [{"filter": "datum.best"}],
                "mark": {"type": "line", "color": "@before", "strokeWidth": 2, "aria": False},
                "encoding": {"x": x, "y": y},
            },
            *(spread if measured else []),
            {"mark": {"type": "circle", "size": 80, "opacity": 1, "color": "@after"}, "encoding": {"x": x, "y": y, "description": {"field": "is"}}},
            {
                "mark": {"type": "text", "dy": -10, "fontSize": 11, "color": "@ink", "aria": False},
                "encoding": {"x": x, "y": y, "text": {"field": "name"}},
            },
        ],
    }


def _mark_best(values: list[dict[str, Any]], up: bool) -> None:
    """Say "best" of each that is better than all that cost no more. up: more quality is better."""
    reached = float("-inf")
    for value in sorted(values, key=lambda v: (v["cost"], -v["quality"] if up else v["quality"])):
        good = value["quality"] if up else -value["quality"]
        value["best"] = good > reached
        reached = max(reached, good)


def quality_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The first of accuracy, predicted loss and importance kept that is known of all: the key and its name."""
    for key, label in (("accuracy", "accuracy"), ("predicted_loss", "predicted loss"), ("importance_kept", "importance kept")):
        if all(row[key] is not None for row in rows):
            return key, label
    return "params", "parameters kept"


def latencies(compared: Mapping[str, Comparison]) -> Spec:
    """compared: by what was the same for all candidates (threads, inputs). A bar for each candidate in each, with its interval of 95 %."""
    values = [
        {
            "setting": setting, "name": m.name, "ms": m.median_ms, "low": m.low_ms, "high": m.high_ms, "ratio": f"{c.ratios[m.name].median:.2f}×",
            "is": f"{m.name}, {setting}: {digits(m.median_ms)} ms a run, {c.ratios[m.name].median:.2f}× the time of the first",
        }
        for setting, c in compared.items()
        for m in c.latencies
    ]  # fmt: skip
    names = list(dict.fromkeys(v["name"] for v in values))
    colours = ["@before", "@after", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"]
    x = {"field": "setting", "type": "nominal", "sort": None, "title": None, "axis": {"labelAngle": 0, "labelExpr": "split(datum.label, '\\n')"}}
    offset = {"field": "name", "sort": names}
    y = {"field": "ms", "type": "quantitative", "title": "milliseconds a run"}
    return {
        "data": {"values": values},
        "height": 280,
        "encoding": {"x": x, "xOffset": offset},
        "layer": [
            {
                "mark": "bar",
                "encoding": {
                    "y": y,
                    "color": {"field": "name", "sort": names, "title": None, "scale": {"range": colours}},
                    "description": {"field": "is"},
                },
            },
            {"mark": {"type": "rule", "color": "@ink", "aria": False}, "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}}},
            {
                "mark": {"type": "text", "dy": -6, "color": "@ink", "aria": False},
                "encoding": {"y": y | {"field": "high"}, "text": {"field": "ratio"}},
            },
        ],
    }


def _styled(spec: Spec, width: int, colours: Mapping[str, str]) -> Spec:
    """With the look that all charts share; '@after' stands for a colour."""

    def coloured(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if key == "data" else coloured(item) for key, item in value.items()}
        if isinstance(value, list):
            return [coloured(item) for item in value]
        return colours.get(value[1:], value) if isinstance(value, str) and value.startswith("@") else value

    look = {
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
        "background": colours.get("background"),
        "view": {"stroke": None},
        "axis": {
            "labelColor": "@quiet", "titleColor": "@quiet", "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11,
            "gridColor": "@rule", "domainColor": "@quiet", "tickColor": "@rule",
        },
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 4, "titlePadding": 12},
        "legend": {"labelColor": "@ink"},
        "title": {"color": "@ink", "anchor": "start", "fontWeight": 600},
    }  # fmt: skip
    return coloured(spec) | {"width": width, "autosize": {"type": "fit", "contains": "padding"}, "config": coloured(look)}
