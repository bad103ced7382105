"""How long does compression itself take, beside torch.export and beside torch-pruning doing the same job?

    python bench/compile_time.py [--write]

--write keeps the rows in bench/results/compile_time.json and the table in docs/compile_time.md.

Each model runs in a process of its own, so that none finds another's caches warm. "ours" is everything but torch.export, ONNX
and benchmarking: inference, plan, surgery, verification in float64 (on one to 32 samples,
as the work allows), and the user's own class rebuilt and compared.
torch-pruning builds its dependency graph and prunes half of the channels of every layer by L2 magnitude; it verifies nothing.
The second table is of a compression to half of the multiply-accumulates with 64 samples without labels: "score" is what each channel and each
width is worth, "compensate" fits the weights that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = ("resnet18", "resnet50", "resnet152", "densenet201", "swin_t", "vit_b_16")
LIMIT = 300  # seconds for one model with one tool
MEMORY = 16 << 30
STAGES = ("infer", "plan", "surgery", "verify", "rebuild")
SAMPLED = ("resnet18", "resnet50", "swin_t")
SAMPLES = 64


def _case(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A torchvision model with random weights, and a batch of 2 at 224 × 224."""
    import torch
    from torchvision import models

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    return models.get_model(name, weights=None).eval(), (torch.randn(2, 3, 224, 224),)


def ours(name: str) -> dict[str, Any]:
    """Seconds of every stage of structprune."""
    from structprune import compress

    model, inputs = _case(name)
    started = time.perf_counter()
    result = compress(model, inputs, target="channels=0.5")
    total = time.perf_counter() - started
    seconds = result.report.data["seconds"]
    return {
        "model": name,
        "nodes": len(result.graph.nodes),
        "export": seconds["trace"],
        **{stage: seconds[stage] for stage in STAGES},
        "ours": total - seconds["trace"],
    }


def sampled(name: str) -> dict[str, Any]:
    """Seconds of the stages that look at samples, and of the whole call."""
    import torch

    from structprune import compress

    model, inputs = _case(name)
    started = time.perf_counter()
    result = compress(model, inputs, target="macs=0.5", calibration=torch.randn(SAMPLES, 3, 224, 224))
    seconds = result.report.data["seconds"]
    return {"model": name, "score": seconds["score"], "compensate": seconds["compensate"], "whole": time.perf_counter() - started}


def torch_pruning(name: str) -> dict[str, Any]:
    """Seconds of torch-pruning's own pruner for the same share of channels, or why it gave up."""
    import torch
    import torch_pruning as tp

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # it has no bound of its own
    model, inputs = _case(name)
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    heads |= {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    started = time.perf_counter()
    try:
        pruner = tp.pruner.BasePruner(
            model, inputs, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[last], num_heads=heads
        )
        pruner.step()
        with torch.no_grad():
            model(*inputs)
    except Exception as error:  # whatever it raises is its answer
        return {"torch_pruning": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"}
    return {"torch_pruning": time.perf_counter() - started}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ("model", "nodes", "torch.export", *STAGES, "ours", "ours / export", "ours, ms a node", "torch-pruning")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        theirs = row["torch_pruning"]
        cells = [row["model"], str(row["nodes"]), f"{row['export']:.2f}", *(f"{row[s]:.2f}" for s in STAGES), f"{row['ours']:.2f}"]
        cells += [f"{row['ours'] / row['export']:.2f}", f"{1000 * row['ours'] / row['nodes']:.2f}"]
        cells.append(f"{theirs:.2f}" if isinstance(theirs, float) else theirs)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_sampled(rows: list[dict[str, Any]]) -> str:
    """The rows with samples as Markdown."""
    lines = [f"| model, {SAMPLES} samples | score | compensate | the whole call |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r['model']} | {r['score']:.0f} | {r['compensate']:.0f} | {r['whole']:.0f} |" for r in rows)])


def _in_process(tool: str, name: str) -> dict[str, Any]:
    try:
        done = subprocess.run([sys.executable, __file__, "--one", tool, name], capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    if tool != "torch_pruning":
        sys.exit(f"{name}: {'no answer' if done is None else done.stderr}")
    return {tool: f"no answer in {LIMIT} s" if done is None else f"died ({done.returncode})"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="keep the results in bench/results and docs")
    arguments = parser.parse_args()
    if arguments.one:
        tool, name = arguments.one
        print(json.dumps({"ours": ours, "sampled": sampled, "torch_pruning": torch_pruning}[tool](name)))
        return
    rows = []
    for name in MODELS:
        rows.append(_in_process("ours", name) | _in_process("torch_pruning", name))
        print(f"{name}: {rows[-1]['ours']:.2f} s", file=sys.stderr)
    with_samples = [_in_process("sampled", name) for name in SAMPLED]
    ran_on = f"Seconds, on {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchvision", "torch-pruning")
    )
    tables = f"{table(rows)}\n\n{table_of_sampled(with_samples)}"
    print(f"{tables}\n\n{ran_on}.")
    if arguments.write:
        root = Path(__file__).parent.parent
        (root / "bench/results").mkdir(exist_ok=True)
        kept = {"ran_on": ran_on, "rows": rows, "with_samples": with_samples}
        (root / "bench/results/compile_time.json").write_text(json.dumps(kept, indent=1) + "\n")
        text = (__doc__ or "").strip().split("\n\n")
        (root / "docs/compile_time.md").write_text(
            f"# What compression itself costs\n\nWritten by `bench/compile_time.py --write`.\n\n{text[-1]}\n\n{tables}\n\n{ran_on}.\n"
        )


if __name__ == "__main__":
    main()
