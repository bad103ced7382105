"""Which architectures can be pruned, is the answer right, and what stays? structprune beside torch-pruning, over whole zoos.

    python bench/coverage.py [--tool structprune] [--jobs 2] [--resume] [--write]
    python bench/coverage.py --models FILE --results FILE [...]

--write keeps the rows in bench/results/coverage.json and the table in docs/coverage.md; --resume goes on after a run that was cut short;
--tool runs one of the two and leaves the other's rows as they were. The second form is for lists of your own.

Every model runs in a process of its own, with random weights, on one thread, and with limits on time and memory. Half of the channels of
every prunable axis go. One oracle judges both tools: the original model, with the removed slices of its parameters set to zero and its
norms taken over the kept entries, must answer as the small model does (tests/oracle.py; it knows neither tool).
Multiply-accumulates are counted by torch's own flop counter. Seconds are those of the whole call; of structprune's, what torch.export
takes is told apart. Memory is the peak above the loaded model. One forward of the original, on the same inputs, is there for scale: no
check of an answer costs less.

torch-pruning gets more help than its users have: which layers make the model's outputs (it has no means of its own to find out),
and how many heads each attention has. It has no record of which indices it removed, so its random-importance pruner runs twice with
one seed, the second time on weights that hold their own positions.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import zoo

RESULTS = zoo.ROOT / "bench" / "results" / "coverage.json"
PAGE = zoo.ROOT / "docs" / "coverage.md"
TOOLS = ("structprune", "torch-pruning")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
TARGET = 0.5
LIMIT = {"structprune": 1200, "torch-pruning": 150}  # seconds
MEMORY = 11 << 30
PROJECTIONS = ("qkv", "q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj")  # what attention calls its layers
SLOW = 2  # times torch.export's time
LARGE = 1.5  # times the model's size
MUCH = 0.6  # a model that keeps more than this share of its multiply-accumulates owes a reason


# --- one model, one tool --------------------------------------------------------------------------------------------------


def structprune(spec: str) -> dict[str, Any]:
    import torch

    import structprune as sp

    model, inputs = zoo.build(spec)
    forward = _forward(model, inputs)
    marks: dict[str, int] = {}

    def stage(name: str) -> None:
        if name == "infer":  # all before it is torch.export
            marks["export"], marks["traced"] = _peak(), _resident()
            _forget_peak()

    compress = sp.compress  # imported when it is first asked for, once in a process, as torch was before
    loaded = _resident()
    _forget_peak()
    started = time.perf_counter()
    result = compress(model, inputs, f"channels={TARGET}", progress=stage)
    seconds = time.perf_counter() - started
    peak = _peak()
    report = result.report.to_dict()
    tensors = {name: entry["keep"] for name, entry in result.plan.to_dict()["tensors"].items()}
    kept = {name: {int(dim): indices for dim, indices in keep.items()} for name, keep in tensors.items()}
    return _judged(model, result.model, kept, inputs) | {
        **forward,
        "seconds": seconds,
        "export_seconds": report["seconds"]["trace"],
        "peak_mib": max(peak, marks["export"]) - loaded >> 20,
        "own_peak_mib": peak - marks["traced"] >> 20,
        "model_mib": sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) >> 20,
        "own_class": type(result.model) is type(model),
        "module_note": report["verification"]["module_note"],
        "dynamic_batch": report["verification"]["dynamic_batch"],
        "inexact": [g.name for g in result.plan.groups if not g.exact],
        "frozen": _main_reasons(report["frozen"]),
        "nodes": len(result.graph.nodes),
        "threads": torch.get_num_threads(),
    }


def _forward(model: Any, inputs: tuple[Any, ...]) -> dict[str, float]:
    """What the original itself costs: its second forward, for in the first libraries load their kernels."""
    import torch

    def once() -> None:
        with torch.no_grad():
            model(*copy.deepcopy(inputs))

    once()
    ctypes.CDLL(None).malloc_trim(0)
    resident = _resident()
    _forget_peak()
    started = time.perf_counter()
    once()
    found = {"forward_seconds": time.perf_counter() - started, "forward_peak_mib": _peak() - resident >> 20}
    ctypes.CDLL(None).malloc_trim(0)
    return found


def torch_pruning(spec: str) -> dict[str, Any]:
    model, inputs = zoo.build(spec)
    original = copy.deepcopy(model)
    outputs = _output_layers(original, inputs)
    loaded = _resident()
    _forget_peak()
    started = time.perf_counter()
    _their_pruner(model, inputs, outputs)
    seconds = time.perf_counter() - started
    peak = _peak() - loaded
    return _judged(original, model, _their_indices(original, inputs, outputs), inputs) | {"seconds": seconds, "peak_mib": peak >> 20}


def _their_pruner(model: Any, inputs: tuple[Any, ...], outputs: list[str]) -> None:
    """torch-pruning's own pruner, in place."""
    import torch
    import torch_pruning as tp

    heads = {m: m.num_heads for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    for m in model.modules():
        number = getattr(m, "num_heads", getattr(m, "num_attention_heads", None))
        if isinstance(number, int):
            heads |= {
                layer: number
                for name in ("qkv", "q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj")
                if isinstance(layer := getattr(m, name, None), torch.nn.Linear)
            }
    torch.manual_seed(0)
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=1 - TARGET,
        ignored_layers=[model.get_submodule(name) for name in outputs],
        num_heads=heads,
    )
    pruner.step()


def _output_layers(model: Any, inputs: tuple[Any, ...]) -> list[str]:
    """Layers whose filters are channels of the model's answer, by structprune's inspection; the last linear layer where that fails."""
    import torch

    import structprune as sp

    try:
        frozen = sp.inspect(model, inputs).frozen
    except sp.errors.StructpruneError:
        return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)][-1:]
    names = dict.fromkeys(m.tensor.rpartition(".")[0] for f in frozen if f.reason == "model output" for m in f.members if m.dim == 0)
    return [name for name in names if isinstance(model.get_submodule(name), (torch.nn.Linear, torch.nn.modules.conv._ConvNd))]


def _their_indices(original: Any, inputs: tuple[Any, ...], outputs: list[str]) -> dict[str, dict[int, list[int]]]:
    """What torch-pruning kept of each tensor: pruned again from the same seed, where every weight holds its own position."""
    import numpy as np
    import torch

    tagged = copy.deepcopy(original).double()
    shapes = {}
    with torch.no_grad():
        for name, tensor in _tensors(tagged).items():
            if tensor.is_floating_point():
                shapes[name] = tuple(tensor.shape)
                tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape))
    _their_pruner(tagged, tuple(v.double() if v.is_floating_point() else v for v in inputs), outputs)
    kept: dict[str, dict[int, list[int]]] = {}
    for name, tensor in _tensors(tagged).items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            flat = tensor.detach().long().flatten().numpy()
            places = [np.unique(p) for p in np.unravel_index(flat, shapes[name])]
            assert tuple(map(len, places)) == tensor.shape, f"{name}: what stayed is no sub-block of the original"
            kept[name] = {dim: p.tolist() for dim, p in enumerate(places) if len(p) < shapes[name][dim]}
    return kept


def _tensors(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _judged(original: Any, small: Any, kept: Mapping[str, Any], inputs: tuple[Any, ...]) -> dict[str, Any]:
    import torch
    from oracle import error_of
    from torch.utils.flop_counter import FlopCounterMode

    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused operator

    def flops(model: Any) -> int:
        model = copy.deepcopy(model).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*copy.deepcopy(inputs))
        return int(counter.get_total_flops())

    before, after = (sum(p.numel() for p in m.parameters()) for m in (original, small))
    assert after < before, "no parameter was removed"
    row = {"ran": True, "macs_kept": flops(small) / max(1, flops(original)), "params_kept": after / before}
    row["channels_kept"] = sum(_filters(small)) / sum(_filters(original))
    error, tolerance = error_of(original, small, kept, inputs)
    return row | {"error": error, "right": error <= tolerance}


def _filters(model: Any) -> list[int]:
    """How many filters each weight has: entries of the first axis."""
    return [p.shape[0] for p in model.parameters() if p.dim() > 1]


def _main_reasons(frozen: list[dict[str, Any]]) -> list[str]:
    """The commonest reasons for axes that stay, with their number and one place each."""
    reasons: dict[str, list[dict[str, Any]]] = {}
    for f in frozen:
        reasons.setdefault(f["reason"], []).append(f)
    ranked = sorted(reasons.items(), key=lambda item: -sum(f["channels"] for f in item[1]))
    return [f"{why} ({len(where)}, {where[0]['name']} {where[0]['at']})" for why, where in ranked[:4]]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def one(tool: str, spec: str) -> dict[str, Any]:
    """The row of one model; whatever a tool raises is its answer."""
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY * 2, MEMORY * 2))  # address space; about half of it is ever touched
    try:
        return {"structprune": structprune, "torch-pruning": torch_pruning}[tool](spec)
    except Exception as error:
        return {"ran": False, "failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}


def in_process(tool: str, spec: str) -> dict[str, Any]:
    """`one` in a process of its own, which may run out of time or memory."""
    command = [sys.executable, __file__, "--one", tool, spec]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LIMIT[tool] + 60, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    except subprocess.TimeoutExpired:
        return {"ran": False, "failure": f"no answer in {LIMIT[tool]} s"}
    answer = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(answer[-1]) if answer else {"ran": False, "failure": f"died with status {done.returncode}: {done.stderr.strip()[-120:]}"}


# --- the table ------------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | right | MACs kept | s | export, s | peak, MiB | module | torch-pruning: right | MACs kept | s | peak, MiB |",
        "|" + "---|" * 11,
    ]
    for spec in results["models"]:
        ours, theirs = (results["rows"].get(spec, {}).get(tool, {}) for tool in TOOLS)
        own = "" if "own_class" not in ours else "own class" if ours["own_class"] else "graph"
        cells = [
            spec,
            _verdict(ours),
            _number(ours, "macs_kept", 2),
            _number(ours, "seconds"),
            _number(ours, "export_seconds"),
            _number(ours, "peak_mib", 0),
            own,
        ]
        cells += [_verdict(theirs), _number(theirs, "macs_kept", 2), _number(theirs, "seconds"), _number(theirs, "peak_mib", 0)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(row: Mapping[str, Any]) -> str:
    if not row:
        return "not run"
    if not row["ran"]:
        return row["failure"].replace("|", "\\|")[:80]
    return "yes" if row["right"] else f"**no**, off by {row['error']:.2g}"


def _number(row: Mapping[str, Any], key: str, digits: int = 1) -> str:
    return f"{row[key]:.{digits}f}" if key in row else ""


def summary(results: Mapping[str, Any]) -> str:
    """The score of both tools, and what is owed an explanation."""
    lines = []
    rows = {tool: {spec: row[tool] for spec, row in results["rows"].items() if tool in row} for tool in TOOLS}
    for tool, mine in rows.items():
        right = [r for r in mine.values() if r["ran"] and r["right"]]
        if not mine:
            continue
        wrong = sum(r["ran"] and not r["right"] for r in mine.values())
        lines.append(
            f"- **{tool}**: {len(right)} of {len(mine)} models right, {wrong} wrong without a word, {len(mine) - len(right) - wrong} not run"
            + (f"; multiply-accumulates kept, median of the right ones: {median(r['macs_kept'] for r in right):.3f}" if right else "")
        )
    ours = {spec: r for spec, r in rows["structprune"].items() if r["ran"]}
    if ours:
        own = sum(r["own_class"] for r in ours.values())
        lines += [f"- the user's own class comes back for {own} of {len(ours)}; a traced module for the others", _cost(ours), _memory(ours)]
        more = [s for s, r in ours.items() if (t := rows["torch-pruning"].get(s, {})).get("right") and r["macs_kept"] > t["macs_kept"] + 0.03]
        told = [_beside(spec, ours[spec], rows["torch-pruning"][spec]) for spec in more]
        lines.append(f"- keeps more than torch-pruning plus 0.03, where that is right: {', '.join(told) or 'none'}")
        for spec, r in ours.items():
            if r["macs_kept"] > MUCH:
                lines.append(f"- {spec} keeps {r['macs_kept']:.2f}: {'; '.join(r['frozen'])}")
    return "\n".join(lines)


def _beside(spec: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """How much both keep, and of how many channels: one that was asked for half of the channels may remove more."""
    channels = [f"of {r['channels_kept']:.0%} of the channels" for r in (ours, theirs) if "channels_kept" in r]
    return f"{spec} ({ours['macs_kept']:.2f} {channels[0]}, torch-pruning {theirs['macs_kept']:.2f} {channels[1]})" if len(channels) == 2 else spec


def _cost(rows: Mapping[str, Any]) -> str:
    """Own time beside torch.export's; of the models above the bar also what one forward of the original takes."""
    own = {spec: (r["seconds"] - r["export_seconds"]) / r["export_seconds"] for spec, r in rows.items()}
    above = sorted((spec for spec in rows if own[spec] > SLOW), key=lambda spec: -own[spec])
    told = [f"{spec} {own[spec]:.1f} (a forward {rows[spec].get('forward_seconds', 0) / rows[spec]['export_seconds']:.1f})" for spec in above]
    return (
        f"- structprune's own time is {median(own.values()):.2f} of torch.export's in the median; "
        f"above {SLOW} for {len(above)} of {len(rows)}: {', '.join(told) or 'none'}"
    )


def _memory(rows: Mapping[str, Any]) -> str:
    own = {spec: r["own_peak_mib"] / max(1, r["model_mib"]) for spec, r in rows.items()}
    above = [spec for spec in rows if own[spec] > LARGE]
    forward = [spec for spec in above if rows[spec].get("forward_peak_mib", 0) > LARGE * rows[spec]["model_mib"]]
    large = {spec: own[spec] for spec in rows if rows[spec]["model_mib"] >= 100}
    of_large = (
        f", of the {len(large)} models of 100 MiB or more {median(large.values()):.2f} in the median and {max(large.values()):.2f} at most"
        if large
        else ""
    )
    return (
        f"- peak memory above the loaded model, after torch.export: {median(own.values()):.2f} of the model's size in the median{of_large}; "
        f"above {LARGE} for {len(above)} of {len(rows)}, of which {len(forward)} need more than that for one forward of the original"
    )


def page(results: Mapping[str, Any]) -> str:
    description = (__doc__ or "").strip().split("\n\n")
    text = "\n\n".join([description[0].splitlines()[0], *description[3:]])
    ran = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"# Coverage\n\nWritten by `bench/coverage.py --write`.\n\n{text}\n\n{summary(results)}\n\n{table(results)}\n\n"
        f"On {results['machine']}; {ran}.\nLimits: {LIMIT['structprune']} and {LIMIT['torch-pruning']} s, {MEMORY >> 30} GiB.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help="a list of models, one a line")
    parser.add_argument("--results", type=Path, help="where to keep the rows of another list")
    parser.add_argument("--tool", choices=TOOLS, action="append")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there, run what is missing")
    parser.add_argument("--write", action="store_true", help="keep the results in bench/results and docs")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return
    specs = zoo.listed(arguments.models) if arguments.models else zoo.listed()
    kept_in = arguments.results or (RESULTS if arguments.write and not arguments.models else None)
    old = json.loads(kept_in.read_text())["rows"] if kept_in and kept_in.exists() else {}
    results = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
        "models": specs,
        "rows": {spec: old[spec] for spec in specs if spec in old},
    }
    wanted = [(tool, spec) for tool in arguments.tool or TOOLS for spec in specs]
    if arguments.resume:
        wanted = [(tool, spec) for tool, spec in wanted if tool not in results["rows"].get(spec, {})]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (tool, spec), row in zip(wanted, pool.map(lambda case: in_process(*case), wanted), strict=True):
            results["rows"].setdefault(spec, {})[tool] = row
            print(f"{tool:14s} {spec:44s} {_verdict(row)[:70]:24s} {_number(row, 'macs_kept', 2)} {_number(row, 'seconds')}", flush=True)
            if kept_in:
                kept_in.parent.mkdir(exist_ok=True)
                kept_in.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results))
    if kept_in == RESULTS:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
