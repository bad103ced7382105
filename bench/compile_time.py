"""How long does compression itself take, beside torch.export and beside torch-pruning doing the same job?

    python bench/compile_time.py [--json bench/results/compile_time.json]

Each model runs in a process of its own, so that none finds another's caches warm. "ours" is everything but torch.export, ONNX
and benchmarking: inference, plan, surgery, verification in float64 on two samples, and the user's own class rebuilt and compared.
torch-pruning builds its dependency graph and prunes half of the channels of every layer by L2 magnitude; it verifies nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

MODELS = ("resnet18", "resnet50", "resnet152", "densenet201", "swin_t", "vit_b_16")
STAGES = ("infer", "plan", "surgery", "verify", "rebuild")


def measured(name: str) -> dict[str, Any]:
    """Seconds of every stage for one torchvision model, batch of 2 at 224 × 224."""
    import torch
    from torchvision import models

    import structprune

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, inputs = models.get_model(name, weights=None).eval(), (torch.randn(2, 3, 224, 224),)
    started = time.perf_counter()
    result = structprune.compress(model, inputs, target="channels=0.5")
    total = time.perf_counter() - started
    seconds = result.report.data["seconds"]
    return {
        "model": name,
        "nodes": len(result.graph.nodes),
        "export": seconds["trace"],
        **{stage: seconds[stage] for stage in STAGES},
        "ours": total - seconds["trace"],
        "torch_pruning": _torch_pruning(model, inputs),
    }


def _torch_pruning(model: Any, inputs: tuple[Any, ...]) -> float | str:
    """Seconds of torch-pruning's own pruner for the same share of channels, or why it gave up."""
    import torch
    import torch_pruning as tp

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
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    return time.perf_counter() - started


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one)))
        return
    rows = []
    for name in MODELS:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['ours']:.2f} s", file=sys.stderr)
    print(table(rows))
    print(f"\nseconds, on {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"cores": os.cpu_count(), "machine": platform.machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
