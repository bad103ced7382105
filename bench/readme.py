"""What the README shows: the table beside peers, from bench/results, and the picture of a report.

    python bench/readme.py --write            # the table
    python bench/readme.py --picture DIR      # docs/images/report.png, of the report in an output directory

The table has no number of its own: it says in a few rows what coverage.py, latency.py and accuracy.py have measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from latency import at_one_latency

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs/images/report.png"
BEGIN, END = "<!-- written by bench/readme.py -->", "<!-- end -->"
NETWORKS = {"resnet20": "ResNet-20", "vgg11_bn": "VGG-11", "mobilenetv2": "MobileNetV2", "vit": "a small ViT"}
SIZE = (1180, 1420)  # pixels


def table() -> str:
    """Markdown, between two marks."""
    coverage, latency, accuracy = (json.loads((ROOT / f"bench/results/{name}.json").read_text()) for name in ("coverage", "latency", "accuracy"))
    tools = ("structprune", "torch-pruning")
    rows = [("", *tools)]
    models = [coverage["rows"][spec] for spec in coverage["models"]]
    rows.append((f"of {len(models)} models, pruned and right", *(f"**{sum(_right(m[t]) for m in models)}**" for t in tools)))
    rows.append(("a wrong answer without a word", *(str(sum(bool(m[t].get("ran")) and not _right(m[t]) for m in models)) for t in tools)))
    ours, theirs = zip(*at_one_latency(latency["rows"]).values(), strict=True)
    rows.append(
        (f"speed-up, as a share of the operations saved, at one latency (median of {len(ours)})", f"{median(ours):.2f}", f"{median(theirs):.2f}")
    )
    for name, words in NETWORKS.items():
        of = accuracy["rows"]
        dense = of[f"{name} · 1 · dense · 0"]["score"][0]
        mine = of[f"{name} · 0.5 · structprune · 0"]["score"][0]
        peer = of[f"{name} · 0.5 · torch-pruning · 0"]["pruners"].values()
        best, bn = max(one["score"][0] for one in peer), max(one["bn"] for one in peer)
        rows.append(
            (f"{words} at half the operations, {100 * dense:.1f} % before", f"**{100 * mine:.1f} %**", f"{100 * best:.1f} % ({100 * bn:.1f} %)")
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|---|---|")
    told = (
        "Nothing was trained: structprune saw a few hundred unlabelled images; of torch-pruning the best of its eight pruners is shown, four of "
        "which saw labels, in brackets with batch norms re-estimated. How it was measured, on what, and where others are better: "
        "[coverage](docs/coverage.md), [latency](docs/latency.md), [accuracy](docs/accuracy.md)."
    )
    return "\n".join([BEGIN, *lines, "", told, END])


def _right(row: dict[str, Any]) -> bool:
    return bool(row.get("ran") and row.get("right"))


def with_table(text: str) -> str:
    """The README with the table of today's results."""
    head, _, rest = text.partition(BEGIN)
    return head + table() + rest.partition(END)[2]


def picture(directory: Path) -> None:
    """The top of a report, as a browser shows it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import Browser

    chromium = Browser()
    try:
        chromium.open(directory / "report.html", SIZE)
        chromium.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 200)))")
        PICTURE.parent.mkdir(exist_ok=True)
        chromium.screenshot(PICTURE, whole=False)
    finally:
        chromium.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--picture", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.picture:
        picture(options.picture)
    if options.write:
        README.write_text(with_table(README.read_text()))
    elif not options.picture:
        print(table())


if __name__ == "__main__":
    main()
