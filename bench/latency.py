"""Is the latency that was asked for the latency of the file, and what does it cost?

    python bench/latency.py [--write] [--models SPEC ...] [--threads N ...] [--targets R ...] [--again]

--write keeps each row in bench/results/latency.json as soon as it is there, and the table in docs/latency.md; rows that are there are not
measured again unless --again.

Every model is compressed by the command line, `structprune compress MODEL --target latency=R --threads N`: for the first target with an
empty cache of tables (cold), for the others with what that left (warm). Then a fresh process, which knows nothing of the loop
that made the file, measures both ONNX files in interleaved rounds: that is *measured*; *predicted* is what the tables
said before the loop's first measurement, beside what that measurement gave. *Efficiency* is the measured speed-up divided by the reduction of
multiply-accumulates. *Importance* is the share of its summed scores that a group keeps, the mean over all groups; beside it that of
uniform pruning with aligned widths at the same measured latency, found by the same loop. torch-pruning prunes by L2 magnitude, with widths in
multiples of 16: 30 % of the channels beside our target 0.5, as usual, and the share that leaves about as many multiply-accumulates as the target
asks for beside the others; its files are measured in the same way. Whoever removes more has less efficiency, for what does not shrink weighs more
then; so each model is compressed once more to the latency of torch-pruning's file of 30 % fewer channels. Weights are random but for
EfficientNet-Lite0.

A virtual machine may change its pace for minutes when a neighbour comes, and two threads' ratios with it. What is measured while the dense model
takes other times than in the loop, by more than 15 %, is measured again, a few times; an asterisk tells of what never met the same pace.
Rows that do not say how many rounds were forgotten for their pace are of before reports kept those: *predicted* and *first measured* may be of a
later round there, of which the others had taught the tables, and flatter the prediction.

Run it on an idle machine; each row notes the machine's load average.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/latency.json"
MODELS = (
    "torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "zoo:efficientnet_lite0", "torchvision:densenet121",
    "torchvision:regnet_y_400mf", "timm:convnext_atto", "timm:vit_tiny_patch16_224", "torchvision:swin_t",
)  # fmt: skip
TARGETS = (0.5, 0.75, 0.35)
UNIFORM_AT = 0.5  # the target at which uniform pruning is compared
USUAL = 0.3  # of the channels: torch-pruning's efficiency at this share is the one to beat
SHARES = {0.75: 0.134, 0.5: USUAL, 0.35: 0.408}  # of the channels that torch-pruning removes beside each target: 1 - sqrt(target)
INPUT = "1x3x224x224"
PACE, WAITS = 1.15, (5, 20, 40)  # another pace of the machine: times the dense model's milliseconds; seconds before the next try


def compressed(spec: str, target: float, threads: int, work: Path, cache: Path, allocation: str = "auto") -> dict[str, Any]:
    """The row of one compression, or why there is none."""
    out = work / "out"
    command = ["structprune", "compress", spec, "--target", f"latency={target}", "--threads", str(threads), "--input", INPUT]
    started = time.perf_counter()
    done = _run([*command, "--allocation", allocation, "--no-latency", "--json", "--out", str(out)], cache)
    seconds = time.perf_counter() - started
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    report = json.loads(done.stdout)
    found, macs = report["latency_target"], report["macs"]
    pace = next(r["dense_ms"] for r in found["rounds"] if r["measured"] == found["measured"] and not r["forgotten"])
    measured = independent(out / "original.onnx", out / "model.onnx", threads, pace)
    kept = macs["after"] / macs["before"]
    first = found["rounds"][0]
    return {
        "measured": measured,
        "dense_ms": pace,
        "predicted": first["predicted"],
        "first_measured": first["measured"],
        "rounds": len(found["rounds"]),
        "forgotten": sum(r["forgotten"] for r in found["rounds"]),
        "gap": first["gap"],
        "macs_kept": kept,
        "efficiency": kept / measured["median"],
        "importance": report["importance_kept"],
        "verified": report["verification"]["masked_error"] <= report["verification"]["tolerance"],
        "seconds": seconds,
    }


def independent(dense: Path, small: Path, threads: int, pace: float | None) -> dict[str, float]:
    """The ratio of the two files' times, from a process that does nothing else, and the dense file's milliseconds. pace: these in the loop."""
    for wait in (*WAITS, None):
        done = _run(["structprune", "bench", str(dense), str(small), "--threads", str(threads), "--input", INPUT, "--seconds", "8", "--json"])
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout)
        measured = found["ratios"][small.name] | {"dense_ms": found["latencies"][0]["median_ms"]}
        if wait is None or not _at_other_pace(measured["dense_ms"], pace):
            break
        time.sleep(wait)
    return measured  # type: ignore[no-any-return]


def _at_other_pace(dense_ms: float | None, pace: float | None) -> bool:
    return dense_ms is not None and pace is not None and not 1 / PACE < dense_ms / pace < PACE


def torch_pruning(spec: str, share: float, threads: int, work: Path, pace: float | None) -> dict[str, Any]:
    """The same figures of torch-pruning's own pruner for a share of the channels, or why it gave up."""
    done = _run([sys.executable, __file__, "--one", spec, str(share), str(work)])
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no answer"])[-1][:80]}
    kept = float(done.stdout.splitlines()[-1])
    measured = independent(work / "dense.onnx", work / "pruned.onnx", threads, pace)
    return {"measured": measured, "macs_kept": kept, "efficiency": kept / measured["median"]}


def export_pruned(spec: str, share: float, work: Path) -> float:
    """Writes both files of torch-pruning's model; returns the share of multiply-accumulates that it keeps, by torch's own counter."""
    import torch
    import torch_pruning as tp
    import zoo
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = zoo.efficientnet_lite0() if spec == "zoo:efficientnet_lite0" else zoo.build(spec)
    inputs = (torch.randn(1, 3, 224, 224),)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
        return int(counter.get_total_flops())

    torch.onnx.export(model, inputs, str(work / "dense.onnx"), dynamo=True, external_data=False, verbose=False)
    before = flops()
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    heads |= {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(model, inputs, importance, pruning_ratio=share, round_to=16, ignored_layers=[last], num_heads=heads)
    pruner.step()
    after = flops()
    torch.onnx.export(model, inputs, str(work / "pruned.onnx"), dynamo=True, external_data=False, verbose=False)
    return after / before


def rows_of(spec: str, threads: int, targets: tuple[float, ...], rows: dict[str, Any], again: bool) -> Iterator[tuple[str, Any]]:
    """Every row of a model under its key, to be put among `rows` before the next is asked for: those that are not there yet, or all of them."""

    def owed(key: str) -> bool:
        return again or key not in rows

    with tempfile.TemporaryDirectory() as folder:
        work, cache = Path(folder), Path(folder) / "cache"
        for target in targets:
            if owed(key := f"{spec} {threads} {target}"):
                cold = not cache.exists()
                yield key, compressed(spec, target, threads, work, cache) | {"cold": cold}
        if owed(key := f"{spec} {threads} uniform") and UNIFORM_AT in targets:
            yield key, compressed(spec, UNIFORM_AT, threads, work, cache, "uniform")
        for share in (SHARES[target] for target in targets if target in SHARES):
            if owed(key := _theirs(spec, threads, share)):
                gave_up = next((row for k, row in rows.items() if k.startswith(f"{spec} ") and "torch-pruning" in k and "failed" in row), None)
                pace = rows.get(f"{spec} {threads} {UNIFORM_AT}", {}).get("dense_ms")
                yield key, gave_up or torch_pruning(spec, share, threads, work, pace)  # what fails does so with any number of threads, and any share
        theirs = rows.get(_theirs(spec, threads, USUAL), {})
        if owed(key := _as_fast(spec, threads)) and "measured" in theirs:
            yield key, compressed(spec, round(theirs["measured"]["median"], 3), threads, work, cache)


def _theirs(spec: str, threads: int | str, share: float) -> str:
    """The key of torch-pruning's row."""
    return f"{spec} {threads} torch-pruning:{share}"


def _as_fast(spec: str, threads: int | str) -> str:
    """The key of ours to the latency of torch-pruning's usual file."""
    return f"{spec} {threads} as-fast"


def _place(row: tuple[str, Any]) -> tuple[str, int, str]:
    """Where a row stands: by threads, then by model."""
    spec, threads, kind = row[0].rsplit(" ", 2)
    return threads, MODELS.index(spec) if spec in MODELS else len(MODELS), kind


def has_target(key: str) -> bool:
    """Whether a row is one of ours to a target of TARGETS."""
    return key.rsplit(" ", 1)[1].replace(".", "", 1).isdigit()


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown, a line for each model, number of threads and target."""
    head = ("model", "threads", "asked", "measured", "95 %", "predicted / first measured", "MACs kept", "efficiency",
            "torch-pruning's (MACs kept)", "importance", "uniform's", "rounds", "s")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    elsewhere = _elsewhere(rows)
    for key, row in rows.items():
        if not has_target(key):
            continue
        spec, threads, target = key.rsplit(" ", 2)
        if "failed" in row:
            lines.append(f"| {spec} | {threads} | {target} | {row['failed']} |" + " |" * (len(head) - 4))
            continue
        theirs = rows.get(_theirs(spec, threads, SHARES.get(float(target), USUAL)), {})
        uniform = rows.get(f"{spec} {threads} uniform", {})
        beaten = f"{theirs['efficiency']:.2f} ({theirs['macs_kept']:.3f})" if "efficiency" in theirs else ""
        measured, mark = row["measured"], "*" if key in elsewhere else ""
        beside = f"{uniform['importance']:.3f} ({uniform['measured']['median']:.3f})" if target == str(UNIFORM_AT) and "importance" in uniform else ""
        lines.append(
            f"| {spec} | {threads} | {target} | {measured['median']:.3f}{mark} | {measured['low']:.3f}–{measured['high']:.3f} "
            f"| {row['predicted']:.3f} / {row['first_measured']:.3f} | {row['macs_kept']:.3f} | {row['efficiency']:.2f} "
            f"| {beaten} | {row['importance']:.3f} | {beside} | {row['rounds']} "
            f"| {row['seconds']:.0f}{' cold' if row['cold'] else ''} |"
        )
    return "\n".join(lines)


def as_fast(rows: dict[str, Any]) -> str:
    """As Markdown, what is left at the latency of torch-pruning's usual file, ours beside theirs."""
    head = ("model", "threads", "torch-pruning's latency", "ours", "MACs kept", "ours", "efficiency", "ours")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, theirs in rows.items():
        spec, threads, kind = key.rsplit(" ", 2)
        mine = rows.get(_as_fast(spec, threads), {})
        if kind == f"torch-pruning:{USUAL}" and "measured" in mine:
            pairs = [(r["measured"]["median"], r["macs_kept"], r["efficiency"]) for r in (theirs, mine)]
            lines.append(f"| {spec} | {threads} | " + " | ".join(f"{a:.3f} | {b:.3f}" for a, b in zip(*pairs, strict=True)) + " |")
    return "\n".join(lines)


def summary(rows: dict[str, Any]) -> str:
    """The medians and the worst."""
    ours = {k: r for k, r in rows.items() if has_target(k)}
    right = {k: r for k, r in ours.items() if "failed" not in r}
    off = {k: abs(r["measured"]["median"] / float(k.rsplit(" ", 1)[1]) - 1) for k, r in right.items()}
    missed = {k: abs(r["predicted"] / r["first_measured"] - 1) for k, r in right.items()}
    efficiency = {k: r["efficiency"] for k, r in right.items()}
    slower = [k for k, r in right.items() if r["measured"]["low"] > 1]
    more = {
        k: r["importance"] / rows[f"{k.rsplit(' ', 1)[0]} uniform"]["importance"]
        for k, r in right.items()
        if k.endswith(f" {UNIFORM_AT}") and "importance" in rows.get(f"{k.rsplit(' ', 1)[0]} uniform", {})
    }
    theirs = {k: r["efficiency"] for k, r in rows.items() if " torch-pruning:" in k and "efficiency" in r}
    usual = [e for k, e in theirs.items() if k.endswith(f":{USUAL}")]
    below = _below(efficiency, dict.fromkeys(SHARES, USUAL), theirs)
    below_beside = _below(efficiency, SHARES, theirs)
    pairs = at_one_latency(rows)
    lines = [
        f"- {len(right)} of {len(ours)} targets reached; off by {median(off.values()):.1%} in the median, {max(off.values()):.1%} at most "
        f"({max(off, key=lambda k: off[k])}); slower than the dense model: {', '.join(slower) or 'none'}",
        f"- measured at another pace of the machine than in the loop: {', '.join(_elsewhere(right)) or 'none'}",
        f"- prediction before the first measurement: off by {median(missed.values()):.1%} in the median, {max(missed.values()):.1%} at most",
        f"- efficiency: {median(efficiency.values()):.2f} in the median, {min(efficiency.values()):.2f} at least "
        f"({min(efficiency, key=lambda k: efficiency[k])}); torch-pruning's at {USUAL:.0%} of the channels "
        f"{median(usual) if usual else float('nan'):.2f} in the median; below it: {', '.join(below) or 'none'}",
        f"- efficiency below that of torch-pruning's file with about as many multiply-accumulates: {', '.join(below_beside) or 'none'}",
        f"- efficiency at the same latency as torch-pruning's file of {USUAL:.0%} fewer channels: better for "
        f"{sum(mine > other for mine, other in pairs.values())} of {len(pairs)}",
        "- importance kept, beside uniform pruning at the same latency: "
        + ", ".join(f"{k.rsplit(' ', 1)[0]} {ratio:.2f}×" for k, ratio in more.items()),
        f"- seconds: cold at most {max((r['seconds'] for r in right.values() if r['cold']), default=0):.0f}, "
        f"warm at most {max((r['seconds'] for r in right.values() if not r['cold']), default=0):.0f}",
        *([f"- {_loads(rows)}"] if any("load" in r for r in rows.values()) else []),
        *(f"- {k}: {r['failed']}" for k, r in rows.items() if "failed" in r),
    ]
    return "\n".join(lines)


def at_one_latency(rows: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The efficiency of ours to the latency of torch-pruning's usual file, and of that file."""
    mine = {key: row["efficiency"] for key, row in rows.items() if key.endswith(" as-fast") and "efficiency" in row}
    return {key: (own, rows[_theirs(*key.split(" ")[:2], USUAL)]["efficiency"]) for key, own in mine.items()}


def _elsewhere(rows: dict[str, Any]) -> list[str]:
    return [key for key, row in rows.items() if _at_other_pace(row.get("measured", {}).get("dense_ms"), row.get("dense_ms"))]


def _below(efficiency: dict[str, float], shares: dict[float, float], theirs: dict[str, float]) -> list[str]:
    """Which of our rows are below torch-pruning's for the share of the channels that belongs to their target."""
    found = []
    for key, mine in efficiency.items():
        spec, threads, target = key.rsplit(" ", 2)
        if mine < theirs.get(_theirs(spec, threads, shares.get(float(target), USUAL)), 0):
            found.append(key)
    return found


def _loads(rows: dict[str, Any]) -> str:
    """How busy the machine was, as its load average of a minute, by number of threads."""
    loads: dict[str, list[float]] = {}
    for key, row in rows.items():
        if "load" in row:
            loads.setdefault(key.split()[1], []).append(row["load"])
    return "load average of the machine, this benchmark's own included: " + "; ".join(
        f"{min(found):.1f} to {max(found):.1f} at {threads} thread{'s' if threads != '1' else ''}" for threads, found in loads.items()
    )


def page(results: dict[str, Any]) -> str:
    description = (__doc__ or "").strip().split("\n\n")
    text = "\n\n".join([description[0], *description[3:5]])
    rows = results["rows"]
    tables = f"{table(rows)}\n\nAs fast as torch-pruning's file of {USUAL:.0%} fewer channels:\n\n{as_fast(rows)}"
    return f"# Latency\n\nWritten by `bench/latency.py --write`.\n\n{text}\n\n{summary(rows)}\n\n{tables}\n\n{results['ran_on']}\n"


def _run(command: list[str], cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if cache is not None:
        environment["STRUCTPRUNE_CACHE"] = str(cache)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "SHARE", "DIR"), help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--write", action="store_true", help="keep the results in bench/results and docs")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    given = parser.parse_args()
    if given.one:
        spec, share, folder = given.one
        print(export_pruned(spec, float(share), Path(folder)))
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if given.write and RESULTS.exists() else {"rows": {}}
    results["ran_on"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "onnxruntime", "torch-pruning")
    )
    known = results["rows"]
    for threads in given.threads:
        for spec in given.models:
            for key, row in rows_of(spec, threads, tuple(given.targets), known, given.again):
                known[key] = row | {"load": os.getloadavg()[0]}
                ordered = sorted(known.items(), key=_place)
                known.clear()  # whoever makes the rows looks into this same mapping
                known.update(ordered)
                print(key, json.dumps(row), file=sys.stderr, flush=True)
                if given.write:
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    (ROOT / "docs/latency.md").write_text(page(results))
    print(f"{summary(results['rows'])}\n\n{table(results['rows'])}\n\n{results['ran_on']}")


if __name__ == "__main__":
    main()
