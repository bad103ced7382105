"""The pages that people open: one self-contained file each, which loads nothing, works without scripts, and prints.

Templates are Jinja's, with every value escaped. The page's policy admits its own script by hash and no other, and no request of any kind: a layer
called '<script>' is text, and would be no more if it were not.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from structprune.backends import charts, lanes
from structprune.backends import wording as words

_FOLDED = 250  # rows of a table or of the map: more are folded away at first, and packed
_COLUMNS = {
    "latency": "latency", "macs": "work", "params": "parameters", "accuracy": "accuracy", "predicted_loss": "predicted loss",
    "importance_kept": "importance kept",
}  # fmt: skip
_NAMED = 6  # members that a tip names
_OPERATORS = 8  # bars in the chart of operators, beside one for the rest
_MATTERS = 0.01  # of the time: an operator that takes less gets no bar of its own

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("structprune.backends"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def of_report(data: Mapping[str, Any]) -> str:
    """The page of one compression."""
    groups, frozen = data.get("groups") or (), data.get("frozen")
    return _page(
        "report.html",
        title=f"structprune: {data.get('model') or 'report'}",
        settings=words.settings_of(data),
        headline=words.headline(data),
        verdict=words.verdict(data),
        tiles=_tiles(data),
        rows=words.rows(data),
        widths=_drawn(lambda width: charts.widths(groups, _stages([g["name"] for g in groups]), width)) if groups else None,
        time=_time(data.get("operators") or {}),
        map=_map(data),
        groups=[_group(g) for g in groups],
        frozen=None if frozen is None else _reasons(frozen),
        verification=_verification(data.get("verification") or {}, data.get("int8")),
        reference=words.REFERENCE,
        notes=words.notes_of(data) or ["none"],
        seconds=data.get("seconds") or {},
        environment=_listed(data.get("environment") or {}),
        options=_listed(data.get("options") or {}),
        command=data.get("command") or "",
        config=_listed(data.get("config") or {}),
        folded=_FOLDED,
    )


def of_runs(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The page of several compressions side by side. rows: as of `front.rows_of`; "page" of one is the address of its report."""
    quality = charts.quality_of(rows)
    several = len({row["model"] for row in rows}) > 1
    columns = {key: head for key, head in _COLUMNS.items() if any(row[key] is not None for row in rows)}
    if all(row["predicted_loss"] is not None for row in rows):  # which says more
        columns.pop("importance_kept", None)
    return _page(
        "runs.html",
        title=f"structprune: {title}",
        heading=title,
        rows=rows,
        columns=columns,
        several=several,  # of different models only the accuracy compares
        chart=_drawn(lambda width: charts.front(rows, "", width)) if len(rows) > 1 and (not several or quality[0] == "accuracy") else None,
        quality=quality[1],
    )


def write(text: str, path: Path) -> None:
    """As UTF-8. A path with undecodable bytes, as a model's name, has no such form: that is no reason to lose the page."""
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def _page(template: str, **content: Any) -> str:
    script, style = (_source(name) for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _templates.get_template(template).render(script=Markup(script), style=Markup(style), digest=digest, **content) + "\n"


def _source(name: str) -> str:
    """A file that enters the page as it is, without Jinja."""
    assert _templates.loader is not None
    return _templates.loader.get_source(_templates, name)[0]


def _drawn(chart: Any) -> dict[str, Markup]:
    """SVG of a chart, by the screens that it is for; it comes from a library that escapes all text."""
    return {name: Markup(svg) for name, svg in charts.for_page(chart).items()}


# --- filters ----------------------------------------------------------------------------------------------------------


def _name(text: str) -> Markup:
    """A path or a dotted name, whose lines may end between its parts only."""
    separator = "/" if "/" in text else "."
    return Markup("<code>{}</code>").format(Markup(str(escape(text)).replace(separator, f"{separator}<wbr>")))


def _unbroken(text: str) -> str:
    """Prose in which no line ends between a number and its unit, or inside a number."""
    return re.sub(r"(?<=\d)e-(?=\d)", "e\u2011", re.sub(r"(?<=\d) (?=[%KMGTP]|points)", "\u00a0", text))


def _packed(markup: Markup) -> Markup:
    """What the page's script unpacks when a fold is opened: a network of thousands of layers is ten times smaller so, and no work at first."""
    return Markup(base64.b64encode(gzip.compress(markup.encode("utf-8", "xmlcharrefreplace"), mtime=0)).decode())


def _share(value: float) -> str:
    return f"{100 * min(max(value, 0.0), 1.0):.4g}"


_templates.filters |= {"name": _name, "unbroken": _unbroken, "share": _share, "packed": _packed, "number": words.digits, "percent": words.percent}


# --- what a template is given -----------------------------------------------------------------------------------------


def _tiles(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The verdict in a few large figures: a word for each, the figure, and a remark."""
    found = []
    for runtime, measured in (data.get("latency_ms") or {}).items():
        ratio = (measured.get("ratio") or {}).get("median")
        if ratio:
            claim = words.speed(measured)[0]
            found.append(("speed", f"{1 / ratio:.2f}×", f"{'faster' if 'faster' in claim else claim}, {words.runtime_name(runtime)}"))
    for row in words.rows(data):
        short = {"multiply-accumulates": "work", "parameters": "parameters", "ONNX file": "file", "accuracy": "accuracy"}.get(row.what)
        if short and row.after and row.kept:
            found.append((short, row.kept if short != "accuracy" else row.after, f"{row.before} → {row.after}" if short != "accuracy" else row.kept))
    check = data.get("verification") or {}
    if words.passed(check):
        found.append(("verified", "yes", f"the masked original's answers, off by {words.scientific(check['masked_error'])}"))
    else:
        found.append(("verified", "no", "see below"))
    return found


def _time(operators: Mapping[str, Any]) -> dict[str, Any] | None:
    """The profile of both files: rows by operator, in milliseconds, and the layers that did not shrink.

    `unnamed`: of some only the runtime's own name is known.
    """
    if not operators:
        return None
    before, after = list(operators["operators"].values())[:2]
    rows = [
        {"operator": o, **{which: 1e3 * of.get(o, {}).get("seconds", 0.0) for which, of in (("before", before), ("after", after))}}
        for o in dict.fromkeys([*before, *after])
    ]
    rows.sort(key=lambda row: -max(row["before"], row["after"]))
    least = _MATTERS * sum(row["before"] for row in rows)
    shown = [row for row in rows[:_OPERATORS] if max(row["before"], row["after"]) >= least]
    if rest := rows[len(shown) :]:
        shown.append({"operator": f"{len(rest)} more", **{which: sum(r[which] for r in rest) for which in ("before", "after")}})
    stayed = [{"layer": "", **kernel} for kernel in next(iter(operators.get("not_shrunk", {}).values()), [])]
    return {
        "rows": rows,
        "chart": _drawn(lambda width: charts.operators(shown, width)),
        "stayed": stayed,
        "unnamed": not all(kernel["layer"] for kernel in stayed),
    }


def _map(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Lanes and rows of `lanes.ranges`, with what each says of itself."""
    steps = data.get("outline") or ()
    if not steps:
        return None
    known = _channels(data)
    live = [r for r in lanes.ranges(steps) if r.key in known]
    x = {r.key: lanes.LANE * (r.lane + 0.6) for r in live}
    right = max(x.values(), default=0.0) + 0.6 * lanes.LANE
    rows: list[dict[str, Any]] = []
    for number, step in enumerate(steps):
        at = {part: [x[key] for key in step.get(part, ()) if key in x] for part in ("reads", "makes", "ties")}
        ends = [*at["reads"], *at["makes"], *at["ties"]]
        layer = step.get("layer", "")
        label = layer.removesuffix(".weight") if layer else f"{step['operator']}  {step['at']}"
        verbs = [f"{part} {', '.join(known[k]['name'] for k in step[part] if k in known)}" for part in ("reads", "makes", "ties") if step.get(part)]
        rows.append({
            "y": lanes.ROW * (number + 0.7), "label": label, "layer": bool(layer), "from": min(ends, default=0), "to": max(ends, default=0), **at,
            "is": f"{layer or 'values'}: {step['operator']} at {step['at']}; {'; '.join(verbs)}",
        })  # fmt: skip
    longest = max((len(row["label"]) for row in rows), default=0)
    return {
        "lanes": [
            {"x": x[r.key], "top": lanes.ROW * (r.first + 0.7) - 7, "bottom": lanes.ROW * (r.last + 0.7) + 7, **known[r.key]} for r in live
        ],
        "rows": rows,
        "labels": right,
        "width": round(right + 7.5 * longest + 8),
        "height": lanes.ROW * len(rows) + 10,
    }  # fmt: skip


def _channels(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups and frozen axes, by the keys of the outline: class, link, width of the bar that stays, and what there is to say."""
    found = {}
    for number, g in enumerate(data.get("groups") or ()):
        members = g.get("members") or ()
        shared = ", ".join(members[:_NAMED]) + (f" and {len(members) - _NAMED} more" if len(members) > _NAMED else "")
        note = "" if g.get("exact", True) else f" Not exact: {g.get('reason', '')}."
        found[f"g{number}"] = {
            "name": g["name"],
            "kind": "group",
            "link": f"g{number}",
            "kept": 12 * (g["kept"] / g["channels"] if g["channels"] else 1),
            "is": f"{g['name']}: {g['kept']} of {g['channels']} channels stay. They stand together in {shared}.{note}",
        }
    for number, f in enumerate(data.get("frozen") or ()):
        at = f" ({f['at']})" if f.get("at") else ""
        found[f"f{number}"] = {
            "name": f["name"], "kind": "frozen", "link": "frozen", "kept": 0,
            "is": f"{f['name']}: its {f['channels']} entries stay: {f['reason']}{at}",
        }  # fmt: skip
    return found


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    exact = group.get("exact", True) or group["kept"] == group["channels"]
    return {
        "name": group["name"],
        "channels": group["channels"],
        "kept": group["kept"],
        "share": group["kept"] / group["channels"] if group["channels"] else 1.0,
        "remark": "" if exact else f"not exact: {group.get('reason') or 'no reason recorded'}",
        "members": group.get("members") or ["not recorded"],
    }


def _reasons(frozen: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a reason: the axes that it holds for, and the source lines where it was met."""
    rows = []
    for reason in dict.fromkeys(f["reason"] for f in frozen):
        held = [f for f in frozen if f["reason"] == reason]
        axes = Counter(f"{f['name']} ({f['channels']})" for f in held)
        rows.append({
            "reason": reason,
            "number": len(held),
            "axes": [axis if n == 1 else f"{axis} ×{n}" for axis, n in axes.items()],
            "sources": list(dict.fromkeys(f["at"] for f in held if f.get("at"))),
        })  # fmt: skip
    return rows


def _verification(check: Mapping[str, Any], int8: Mapping[str, Any] | None) -> list[tuple[str, list[str]]]:
    """Names and values; a value of several parts unfolds."""
    recorded = {key: words.shown(check.get(key), words.scientific, "not recorded") for key in ("masked_error", "tolerance")}
    result = "passed" if words.passed(check) else "not passed"
    onnx = words.shown(check.get("onnx_error"), lambda e: f"largest difference {words.scientific(e)}", "not compared")
    exact = words.shown(check.get("exact"), lambda yes: "what a zero mask gives" if yes else "not exact, see below", "not recorded")
    batch = words.shown(check.get("dynamic_batch"), lambda yes: "free" if yes else "as in the example inputs", "not recorded")
    inexact = check.get("inexact") or ()
    return [
        ("against the masked original", [f"{result}: largest difference {recorded['masked_error']}, tolerance {recorded['tolerance']}"]),
        ("ONNX file against the model", [onnx]),
        ("arithmetic", [exact]),
        ("the module you get", [": ".join(filter(None, (check.get("module"), check.get("module_note")))) or "not recorded"]),
        ("batch size", [batch]),
        *([("in 8 bits", [words.int8(int8)])] if int8 else []),
        *((f"not exact: {r}", [e["name"] for e in inexact if e["reason"] == r]) for r in dict.fromkeys(e["reason"] for e in inexact)),
    ]


def _listed(values: Mapping[str, Any]) -> dict[str, str]:
    """Names and values as text."""
    parts = {name: value if isinstance(value, list | tuple) else [value] for name, value in values.items()}
    return {name: ", ".join(v if isinstance(v, str) else json.dumps(v) for v in part) or "none" for name, part in parts.items()}


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
