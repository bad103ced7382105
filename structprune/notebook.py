"""What a notebook shows of a result, a report, a plan or groups: a plain table, which takes the notebook's own look."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_SHOWN = 200  # rows


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """HTML, with all text escaped. A long table is folded, and a very long one ends with the number of its other rows."""
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows[:_SHOWN])
    if len(rows) > _SHOWN:
        body += f'<tr><td colspan="{len(heads)}">and {len(rows) - _SHOWN} more</td></tr>'
    head = "".join(f"<th>{escape(head)}</th>" for head in heads)
    fold = "<details open>" if len(rows) <= 20 else "<details>"
    return f"{fold}<summary>{escape(title)}</summary><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details>"


def standing(members: Sequence[tuple[str, int]], shown: int = 3) -> str:
    """Where channels stand, in short: 'conv.weight[0], bn.weight[0] and 4 more'."""
    rest = f" and {len(members) - shown} more" if len(members) > shown else ""
    return ", ".join(f"{tensor}[{dim}]" for tensor, dim in members[:shown]) + rest
