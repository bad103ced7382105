"""`Report`: what a compression achieved, how that was verified, and what was left alone and why.

It is plain JSON with two faces, a summary for the terminal and one HTML page (`page.py`). A part that is missing (no ONNX file, no
latency, no labels) is not an error: both faces say that it is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from structprune import notebook
from structprune.backends import page
from structprune.backends.wording import fitted, headline, int8, notes_of, rows, settings_of, verified
from structprune.errors import InputError

FORMAT = "structprune-report/1"


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
        page.write(page.of_report(self.data), Path(path))

    def _repr_html_(self) -> str:
        lines = [row[:5] for row in rows(self.data)]
        return notebook.table(f"{headline(self.data)}. {settings_of(self.data)}", ("", "before", "after", "kept", ""), lines)

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


def _summary(data: Mapping[str, Any]) -> str:
    """About a dozen aligned lines."""
    table = [("", "before", "after", "kept", ""), *(row[:5] for row in rows(data))]
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = []
    for what, before, after, kept, remark in table:
        numbers = "  ".join(map(str.rjust, (before, after, kept), widths)) if before else "–".rjust(widths[0])
        lines.append(f"{what:<{first}}  {numbers}  {remark}".rstrip())
    reasons = Counter(f["reason"] for f in data.get("frozen") or ())
    remarks = [
        ("frozen", "; ".join(reason if n == 1 else f"{reason} ×{n}" for reason, n in reasons.items()) or "nothing"),
        ("checked", verified(data.get("verification") or {}) + fitted(data)),
        *([("int8", int8(data["int8"]))] if data.get("int8") else ()),
        *(("note", note) for note in notes_of(data)),
    ]
    wrapped = (fill(text, 110, initial_indent=f"{what:<9}", subsequent_indent=" " * 9) for what, text in remarks)
    return "\n".join([settings_of(data), f"{headline(data)}.", "", *lines, "", *wrapped])
