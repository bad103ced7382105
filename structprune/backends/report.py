"""`Report`: what a compression achieved, how that was verified, and what was left alone and why.

It is plain JSON with two faces, a summary for the terminal and one HTML page that needs no network. A part that is
missing (no ONNX file, no latency, no labels) is not an error: both faces say that it is missing.

The HTML is built from `tag` alone. Plain text that goes into a tag is escaped and only `Html` passes as it is, so a
layer called '<script>' cannot become one, and tags balance by construction.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby, zip_longest
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from structprune.backends.benchmark import NOTICEABLE
from structprune.errors import InputError

FORMAT = "structprune-report/1"

_RUNTIMES = {"onnxruntime": "ONNX Runtime", "torch": "PyTorch"}
_DEVICES = {"cpu": "CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
_UNKNOWN = "–"
_REFERENCE = (
    "The reference is the original network, interpreted operator by operator, in which every reader of a removed channel ignores it. "
    "The difference is a share of what pruning changed, so one wrong channel cannot hide in a large answer."
)


@dataclass(frozen=True)
class Report:
    """The outcome of one compression, as `pipeline` puts it together in plain JSON; prints as a summary."""

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A copy of the data that shares nothing with the report."""
        return json.loads(json.dumps(dict(self.data)))

    def save_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(dict(self.data), indent=1), encoding="utf-8")

    def save_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that loads nothing else."""
        # A path with undecodable bytes, as a model's name, has no UTF-8 form: that is no reason to lose the report.
        Path(path).write_text(_page(self.data), encoding="utf-8", errors="xmlcharrefreplace")

    @staticmethod
    def load(path: str | Path) -> Report:
        """Read a report.json. Raises InputError for a missing or broken file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a report: {error}") from error
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise InputError(f"{path}: not a structprune report: format {found!r} is not {FORMAT!r}")
        return Report(data)

    def __str__(self) -> str:
        return _summary(self.data)


# --- what there is to say, in words that both faces share -------------------------------------------------------------


class _Row(NamedTuple):
    """One line of the comparison with the original, in words. Without `before` and `after`, `remark` says what is missing."""

    what: str
    before: str = ""
    after: str = ""
    kept: str = ""
    remark: str = ""
    share: float | None = None  # of the original, for a bar
    intervals: tuple[str, str, str] = ("", "", "")  # of before, after and kept


def _rows(data: Mapping[str, Any]) -> list[_Row]:
    """Everything that has a number before and after."""
    groups = data.get("groups") or ()
    channels = {"before": sum(g["channels"] for g in groups), "after": sum(g["kept"] for g in groups)} if groups else None
    latencies = [_latency(runtime, measured) for runtime, measured in (data.get("latency_ms") or {}).items()]
    return [
        _quantity("parameters", data.get("params"), _count, "not counted"),
        _quantity("multiply-accumulates", data.get("macs"), _count, "not counted"),
        *([_quantity("peak of activations", data["activation_bytes"], _bytes, "")] if data.get("activation_bytes") else []),
        _quantity("ONNX file", data.get("onnx_bytes"), _bytes, "not exported"),
        _quantity("channels that can be pruned", channels, _count, "none found"),
        *(latencies or [_Row("latency", remark="not measured")]),
        *_accuracies(data.get("accuracy")),
    ]


def _quantity(what: str, values: Mapping[str, Any] | None, form: Callable[[float], str], missing: str) -> _Row:
    before, after = _pair(values)
    if before is None and after is None:
        return _Row(what, remark=missing)
    share = after / before if before and after is not None else None
    return _Row(what, _shown(before, form), _shown(after, form), _shown(share, _percent), share=share)


def _latency(runtime: str, measured: Mapping[str, Any]) -> _Row:
    """One runtime, with 95 % intervals. What is kept is the time ratio of paired rounds, not that of the two medians."""
    what = f"latency, {_runtime(runtime)}"
    before, after = _pair(measured)
    if not before and not after:
        return _Row(what, remark="not measured")
    claim, evidence = _speed(measured)
    ratio = measured.get("ratio") or {}
    return _Row(
        what,
        _shown(before, lambda latency: f"{_digits(latency['median'])} ms"),
        _shown(after, lambda latency: f"{_digits(latency['median'])} ms"),
        _shown(ratio.get("median"), _percent),
        f"{claim} ({evidence})" if evidence else claim,
        ratio.get("median"),
        (_interval(before, _digits), _interval(after, _digits), _interval(ratio, lambda share: f"{100 * share:.1f}")),
    )


_STAGES = {"pruned": "as pruned", "compensated": "after compensation"}  # that the last one has come by


def _accuracies(values: Mapping[str, Any] | None) -> list[_Row]:
    """What the user's evaluation says, of the result and of the stages on the way to it."""
    before, after = _pair(values)
    if values is None or (before is None and after is None):
        return [_Row("accuracy", remark="not measured")]
    stages = [_score(f"accuracy {words}", before, values[stage]) for stage, words in _STAGES.items() if values.get(stage) not in (None, after)]
    return [*stages, _score("accuracy", before, after)]


def _score(what: str, before: float | None, after: float | None) -> _Row:
    change = "" if before is None or after is None else f"{100 * (after - before):+.2f} points"
    return _Row(what, _shown(before, lambda v: f"{100 * v:.2f} %"), _shown(after, lambda v: f"{100 * v:.2f} %"), change)


def _speed(measured: Mapping[str, Any]) -> tuple[str, str]:
    """A claim and its evidence, by the rule of `Comparison.verdict`: faster or slower only if the whole interval is."""
    ratio = measured.get("ratio") or {}
    if not {"median", "low", "high"} <= ratio.keys():
        return measured.get("verdict") or "not compared with the original", ""
    median, low, high = ratio["median"], ratio["low"], ratio["high"]
    if 1 / high >= NOTICEABLE:
        return f"{1 / median:.2f}× faster", f"95 % interval {1 / high:.2f}–{1 / low:.2f}"
    if low >= NOTICEABLE:
        return f"slower: {median:.2f}× the time", f"95 % interval {low:.2f}–{high:.2f}"
    return "no gain", f"{median:.2f}× the time, 95 % interval {low:.2f}–{high:.2f}"


def _headline(data: Mapping[str, Any]) -> str:
    """Is it faster? Where, and where not."""
    claims = [f"{_speed(measured)[0]} with {_runtime(runtime)}" for runtime, measured in (data.get("latency_ms") or {}).items()]
    text = "; ".join(claims) or "latency was not measured, so whether it is faster is unknown"
    return text[0].upper() + text[1:]


def _verdict(data: Mapping[str, Any]) -> str:
    """What follows the headline: size, work, accuracy, verification."""
    rows = {row.what: row for row in _rows(data)}
    params, macs, onnx, accuracy = (rows[what] for what in ("parameters", "multiply-accumulates", "ONNX file", "accuracy"))
    sentences = [
        f"{params.after} of {params.before} parameters stay ({params.kept})." if params.after else "Parameters were not counted.",
        f"A call takes {macs.after} multiply-accumulates instead of {macs.before} ({macs.kept})." if macs.after else "Operations were not counted.",
        f"The ONNX file takes {onnx.after} instead of {onnx.before} ({onnx.kept})." if onnx.after else "No ONNX file was exported.",
        f"Accuracy goes from {accuracy.before} to {accuracy.after} ({accuracy.kept})." if accuracy.after else "Accuracy was not measured.",
        _verified(data.get("verification") or {}) + _fitted(data),
    ]
    return " ".join(sentences)


def _verified(verification: Mapping[str, Any]) -> str:
    """How far the small model is proved to be the original without those channels."""
    error, tolerance, onnx = (verification.get(key) for key in ("masked_error", "tolerance", "onnx_error"))
    if error is None:
        return "Not verified: no comparison with the masked original is recorded."
    numbers = f"difference {_scientific(error)}, tolerance {_shown(tolerance, _scientific, 'not recorded')}"
    if not _passed(verification):
        return f"Not verified: it differs from the original with the removed channels masked ({numbers})."
    exported = "The ONNX file was not compared." if onnx is None else f"The ONNX file agrees with it to {_scientific(onnx)}."
    inexact = verification.get("inexact") or ()
    reasons = "; ".join(dict.fromkeys(entry["reason"] for entry in inexact))
    exceptions = f" Groups whose removal is not what a zero mask gives: {len(inexact)} ({reasons})." if inexact else ""
    return f"Verified: it answers as the original with the removed channels masked ({numbers}). {exported}{exceptions}"


def _fitted(data: Mapping[str, Any]) -> str:
    """What was done to the weights after that."""
    calibration, layers, recovery = data.get("calibration"), data.get("compensation"), data.get("recovery")
    fitted = trained = ""
    if calibration and layers is not None:
        fitted = f" Then the weights of {len(layers)} layers were fitted to the original's answers on {calibration['samples']} samples."
    if recovery:
        source = "labels and the original's answers" if recovery["labels"] else "the original's answers"
        trained = f" Then it was trained for {recovery['steps']} steps, {len(recovery['epochs'])} epoch(s), on {source}."
    return fitted + trained


def _int8(found: Mapping[str, Any]) -> str:
    """How the quantised file answers, and how fast."""
    agreement = f"it agrees with model.onnx on {100 * found['agreement']:.1f} %, and" if found.get("agreement") is not None else "it"
    accuracy = f" Accuracy {100 * found['accuracy']:.2f} %." if found.get("accuracy") is not None else ""
    speed = " ".join(filter(None, _speed(found["latency_ms"]))) + " beside original.onnx." if found.get("latency_ms") else ""
    return (
        f"model.int8.onnx, {_bytes(found['bytes'])}: on {found['compared_on']} samples {agreement} is off by {100 * found['error']:.1f} % of the "
        f"answer's deviation.{accuracy} {speed}"
    ).strip()


def _passed(verification: Mapping[str, Any]) -> bool:
    error, tolerance = verification.get("masked_error"), verification.get("tolerance")
    return error is not None and tolerance is not None and error <= tolerance


def _notes(data: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers should know; those of a benchmark with the runtime they are about."""
    notes = list(data.get("notes") or ())
    for runtime, measured in (data.get("latency_ms") or {}).items():
        notes += [f"latency, {_runtime(runtime)}: {note}" for note in measured.get("notes") or ()]
    return notes


def _interval(measured: Mapping[str, float] | None, form: Callable[[float], str]) -> str:
    return f"{form(measured['low'])}–{form(measured['high'])}" if measured and {"low", "high"} <= measured.keys() else ""


def _runtime(key: str) -> str:
    """'ONNX Runtime on CPU' for 'onnxruntime-cpu'."""
    runtime, _, device = key.partition("-")
    name = _RUNTIMES.get(runtime, runtime)
    return f"{name} on {_DEVICES.get(device, device)}" if device else name


def _pair(values: Mapping[str, Any] | None) -> tuple[Any, Any]:
    return (values or {}).get("before"), (values or {}).get("after")


def _count(value: float) -> str:
    """25557032 → '25.6 M'."""
    for unit in ("", "K", "M", "G", "T"):
        if round(abs(value), 1) < 1000:
            return f"{value:.1f} {unit}" if unit else f"{value:g}"
        value /= 1000
    return f"{value:.1f} P"


def _bytes(value: float) -> str:
    number, _, unit = _count(value).partition(" ")
    return f"{number} {unit}B"


def _digits(value: float) -> str:
    """Three significant digits without an exponent, and no decimals from 100 on."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    return f"{value:.{min(max(decimals, 0), 9)}f}"


def _scientific(value: float) -> str:
    """3.2e-07 → '3.2e-7'."""
    return f"{value:.2g}".replace("e-0", "e-")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _shown(value: Any, form: Callable[[Any], str], missing: str = _UNKNOWN) -> str:
    return missing if value is None else form(value)


# --- the summary for a terminal ---------------------------------------------------------------------------------------


def _summary(data: Mapping[str, Any]) -> str:
    """About a dozen aligned lines."""
    table = [("", "before", "after", "kept", ""), *(row[:5] for row in _rows(data))]
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = []
    for what, before, after, kept, remark in table:
        numbers = "  ".join(map(str.rjust, (before, after, kept), widths)) if before else "–".rjust(widths[0])
        lines.append(f"{what:<{first}}  {numbers}  {remark}".rstrip())
    reasons = Counter(f["reason"] for f in data.get("frozen") or ())
    remarks = [
        ("frozen", "; ".join(reason if n == 1 else f"{reason} ×{n}" for reason, n in reasons.items()) or "nothing"),
        ("checked", _verified(data.get("verification") or {}) + _fitted(data)),
        *([("int8", _int8(data["int8"]))] if data.get("int8") else ()),
        *(("note", note) for note in _notes(data)),
    ]
    wrapped = (fill(text, 110, initial_indent=f"{what:<9}", subsequent_indent=" " * 9) for what, text in remarks)
    return "\n".join([_settings(data), f"{_headline(data)}.", "", *lines, "", *wrapped])


def _settings(data: Mapping[str, Any]) -> str:
    settings = [f"{key} {data[key]}" for key in ("target", "criterion", "seed") if data.get(key) is not None]
    return " · ".join([str(data.get("model") or "unnamed model"), *settings])


# --- HTML by construction ---------------------------------------------------------------------------------------------


class Html(str):
    """Markup. Any other string is text, and is escaped where it enters a tag."""


def tag(name: str, *content: str, **attributes: object) -> Html:
    """`<name attributes>content</name>`. An attribute `class_` is written `class`, `aria_label` is `aria-label`."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(c if isinstance(c, Html) else escape(c) for c in content)}</{name}>")


# The policy forbids what the page does not need anyway: scripts, and requests of any kind.
_META = Html(
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
)


def _page(data: Mapping[str, Any]) -> str:
    """The whole document."""
    sections = [
        ("Before and after", _comparison(data)),
        ("Widths along the network", _chart(data.get("groups") or ())),
        ("Groups", _groups(data.get("groups") or ())),
        ("What stays, and why", _frozen(data.get("frozen"))),
        ("Verification", _verification(data.get("verification") or {})),
        ("Notes", tag("ul", *(tag("li", note) for note in _notes(data) or ["none"]))),
        ("Seconds per stage", _seconds(data.get("seconds") or {})),
        ("Environment", _environment(data.get("environment") or {})),
    ]
    style = Html(files("structprune.backends").joinpath("report.css").read_text(encoding="utf-8"))
    head = tag("head", _META, tag("title", f"structprune: {data.get('model') or 'report'}"), tag("style", style))
    header = tag("header", tag("p", _settings(data), class_="quiet"), tag("h1", f"{_headline(data)}."), tag("p", _unbroken(_verdict(data))))
    body = tag("body", header, *(tag("section", tag("h2", title), content) for title, content in sections))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


_NUMBERS = ("before", "after", "kept", "axes")  # columns whose heads stand to the right, as numbers do


def _unbroken(text: str) -> str:
    """Prose in which no line ends between a number and its unit, or inside a number."""
    return re.sub(r"(?<=\d)e-(?=\d)", "e\u2011", re.sub(r"(?<=\d) (?=[%KMGTP]|points)", "\u00a0", text))


def _table(heads: Sequence[str], rows: Iterable[Html], style: str) -> Html:
    """A table in a box of its own that scrolls; one line of source a row."""
    cells = (tag("th", head, scope="col", class_="number" if head in _NUMBERS else "text") for head in heads)
    head = (tag("thead", tag("tr", *cells)),) if heads else ()
    return tag("div", tag("table", *head, tag("tbody", Html("\n".join(rows)))), class_=f"scroll {style}")


def _facts(facts: Iterable[tuple[str, str]]) -> Html:
    """Names and values."""
    return _table((), (tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in facts), "facts")


def _name(text: str) -> Html:
    """A path or a dotted name, whose lines may end between its parts only."""
    separator = "/" if "/" in text else "."
    return tag("code", Html(escape(text).replace(separator, f"{separator}<wbr>")))


def _meter(share: float) -> Html:
    return tag("span", tag("span", style=f"width:{100 * min(max(share, 0.0), 1.0):.4g}%"), class_="meter")


def _shortened(items: Sequence[str], shown: int = 2) -> Html:
    """The first items; where there are more, the full list to unfold."""
    start = Html(", ".join(map(_name, items[:shown])))
    if len(items) <= shown:
        return start
    return tag("details", tag("summary", start, f" +\u00a0{len(items) - shown}\u00a0more"), tag("div", "\n".join(items), class_="all"))


def _comparison(data: Mapping[str, Any]) -> Html:
    rows = []
    for row in _rows(data):
        if not row.before:
            rows.append(tag("tr", tag("th", row.what, scope="row"), tag("td", row.remark, colspan=4, class_="quiet")))
            continue
        name = tag("th", row.what, *([tag("small", row.remark)] if row.remark else []), scope="row")
        cells = [
            tag("td", value, *([tag("small", interval)] if interval else []), class_="number")
            for value, interval in zip_longest((row.before, row.after, row.kept), row.intervals)
        ]
        rows.append(tag("tr", name, *cells, tag("td", *([] if row.share is None else [_meter(row.share)]))))
    return _table(("", "before", "after", "kept", ""), rows, "comparison")


def _chart(groups: Sequence[Mapping[str, Any]]) -> Html:
    """One thin bar a group, in network order, channels before behind channels after; the numbers are in tooltips.

    The drawing is stretched to the page's width, hence all text stands outside of it.
    """
    if not groups:
        return tag("p", "There is no group of channels that can be pruned.")
    top = max(1, *(g["channels"] for g in groups))
    bars = []
    for i, g in enumerate(groups):
        width, kept = g["channels"], g["kept"]
        bars.append(tag(
            "g", tag("title", f"{g['name']}: {kept} of {width} channels"),
            tag("rect", x=i, width=1, height=top),
            tag("rect", x=f"{i + 0.1:g}", y=top - width, width=0.8, height=width, class_="before"),
            tag("rect", x=f"{i + 0.1:g}", y=top - kept, width=0.8, height=kept, class_="after"),
        ))  # fmt: skip
    grid = (tag("line", x2=len(groups), y1=y, y2=y) for y in (0, top / 2))
    drawing = tag(
        "svg", *grid, Html("\n".join(bars)),
        viewBox=f"0 0 {len(groups)} {top}", preserveAspectRatio="none", role="img", aria_label="channels of each group before and after pruning",
    )  # fmt: skip
    stages = (tag("span", tag("small", name), title=name, style=f"flex-grow:{n}") for name, n in _stages([g["name"] for g in groups]))
    ticks = (tag("span", f"{value:g}") for value in (top, top / 2, 0))
    plot = tag("div", drawing, tag("div", *stages, class_="stages"), style=f"min-width:{3 * len(groups)}px")
    return tag(
        "figure",
        tag("div", tag("div", *ticks, class_="axis quiet"), tag("div", plot, class_="plot"), class_="chart"),
        tag("figcaption", tag("span", class_="key before"), "channels before", tag("span", class_="key after"), "after, first layer to last"),
    )


def _stages(names: Sequence[str]) -> list[tuple[str, int]]:
    """Runs of neighbours whose names begin alike, at the first depth with more than two runs: what to write below the bars."""
    paths = [name.split(".") for name in names]
    while len({path[0] for path in paths}) == 1 and min(map(len, paths)) > 1:
        paths = [path[1:] for path in paths]
    runs: list[tuple[str, int]] = []
    for depth in range(1, 1 + max(map(len, paths))):
        runs = [(prefix, len(list(run))) for prefix, run in groupby(".".join(path[:depth]) for path in paths)]
        if len(runs) > 2:
            break
    return runs


def _groups(groups: Sequence[Mapping[str, Any]]) -> Html:
    if not groups:
        return tag("p", "None.")
    rows = []
    for g in groups:
        exact = g.get("exact", True) or g["kept"] == g["channels"]
        remark = [] if exact else [tag("small", f"not exact: {g.get('reason') or 'no reason recorded'}")]
        share = g["kept"] / g["channels"] if g["channels"] else 1.0
        rows.append(tag(
            "tr",
            tag("th", _name(g["name"]), *remark, scope="row"),
            *(tag("td", f"{g[key]}", class_="number") for key in ("channels", "kept")),
            tag("td", _meter(share)),
            tag("td", _shortened(g.get("members") or ["not recorded"], shown=1)),
        ))  # fmt: skip
    return _table(("group", "before", "after", "share", "shrinks together"), rows, "tall")


def _frozen(frozen: Sequence[Mapping[str, Any]] | None) -> Html:
    """One row a reason: the axes that it holds for, and the source lines where it was met."""
    if not frozen:
        return tag("p", "Not recorded." if frozen is None else "Nothing: every axis can be pruned.")
    rows = []
    for reason in dict.fromkeys(f["reason"] for f in frozen):
        held = [f for f in frozen if f["reason"] == reason]
        axes = Counter(f"{f['name']} ({f['channels']})" for f in held)
        sources = list(dict.fromkeys(f["at"] for f in held if f.get("at")))
        rows.append(tag(
            "tr",
            tag("th", reason, scope="row"),
            tag("td", f"{len(held)}", class_="number"),
            tag("td", _shortened([axis if n == 1 else f"{axis} ×{n}" for axis, n in axes.items()])),
            tag("td", _shortened(sources) if sources else _UNKNOWN),
        ))  # fmt: skip
    return _table(("reason", "axes", "where", "source"), rows, "frozen")


def _verification(verification: Mapping[str, Any]) -> Html:
    recorded = {key: _shown(verification.get(key), _scientific, "not recorded") for key in ("masked_error", "tolerance")}
    result = "passed" if _passed(verification) else "not passed"
    inexact = verification.get("inexact") or ()
    facts = [
        ("against the masked original", f"{result}: largest difference {recorded['masked_error']}, tolerance {recorded['tolerance']}"),
        ("ONNX file against the model", _shown(verification.get("onnx_error"), lambda e: f"largest difference {_scientific(e)}", "not compared")),
        ("arithmetic", _shown(verification.get("exact"), lambda yes: "what a zero mask gives" if yes else "not exact, see below", "not recorded")),
        ("the module you get", ": ".join(filter(None, (verification.get("module"), verification.get("module_note")))) or "not recorded"),
        ("batch size", _shown(verification.get("dynamic_batch"), lambda yes: "free" if yes else "as in the example inputs", "not recorded")),
    ]
    for reason in dict.fromkeys(entry["reason"] for entry in inexact):
        facts.append((f"not exact: {reason}", _shortened([entry["name"] for entry in inexact if entry["reason"] == reason])))
    return Html(tag("p", _REFERENCE, class_="quiet") + _facts(facts))


def _seconds(seconds: Mapping[str, float]) -> Html:
    if not seconds:
        return tag("p", "Not recorded.")
    total = sum(seconds.values())
    cells = [(stage, f"{taken:.2f}", _meter(taken / total if total else 0.0)) for stage, taken in seconds.items()]
    cells.append(("total", f"{total:.2f}", Html()))
    rows = (tag("tr", tag("th", stage, scope="row"), tag("td", taken, class_="number"), tag("td", bar)) for stage, taken, bar in cells)
    return _table((), rows, "facts")


def _environment(environment: Mapping[str, Any]) -> Html:
    if not environment:
        return tag("p", "Not recorded.")
    listed = {name: value if isinstance(value, list | tuple) else [value] for name, value in environment.items()}
    return _facts((name, ", ".join(map(str, values)) or "none") for name, values in listed.items())
