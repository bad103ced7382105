"""Saved, and loaded where nothing but structprune is: does every model of a list answer the same, and train?

    python bench/round_trip.py [--models MODELS.txt] [--path FOLDER] [--resume] [--write]

Each model is compressed (channels=0.75) and saved by one process. A second one, in which the libraries and the code that the model came from cannot
be imported, calls `structprune.load` on the folder, compares its answer with the first one's, and takes three steps of SGD. --path is a folder with
the code of models that are named package.module:function. --write keeps the counts in bench/results/round_trip.json.
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
from importlib.metadata import version
from pathlib import Path

import zoo

RESULTS = Path(__file__).parent / "results" / "round_trip.json"
TIMEOUT = 900  # seconds for each of the two processes
ROUNDING = 1e-5  # of the largest answer

LOADER = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import json, torch
import structprune
torch.set_num_threads(1)
model = structprune.load(sys.argv[1])
given = torch.load(sys.argv[2], weights_only=True)
floats = lambda answer: [t for t in torch.utils._pytree.tree_leaves(answer) if torch.is_tensor(t) and t.is_floating_point()]
inputs = given["inputs"]
with torch.no_grad():
    pairs = list(zip(floats(model(*inputs)), given["answers"], strict=True))
error = max(float((a - b).abs().nan_to_num().max() / (b.abs().nan_to_num().max() + 1e-9)) for a, b in pairs)
if not any(p.requires_grad for p in model.parameters()):  # frozen as it came, and so as it was loaded
    model.requires_grad_(True)
model.train()
before = [p.detach().clone() for p in model.parameters()]
optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
for _ in range(3):
    optimiser.zero_grad()
    loss = sum(t.square().mean() for t in floats(model(*inputs)) if t.requires_grad)
    loss.backward()
    optimiser.step()
moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
print(json.dumps({{"error": error, "loss_finite": bool(torch.isfinite(loss)), "moved": moved, "parameters": len(before)}}))
"""


def one(spec: str, folder: Path, path: Path | None) -> None:
    """The first process: everything into `folder`."""
    import torch
    from torch.utils import _pytree as pytree

    import structprune

    torch.set_num_threads(1)
    if path is not None:
        sys.path.insert(0, str(path))
    model, inputs = zoo.build(spec)
    result = structprune.compress(model, inputs, target="channels=0.75")
    result.save(folder / "out", latency=False)
    with torch.no_grad():
        answers = [t for t in pytree.tree_leaves(result.model.eval()(*inputs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    torch.save({"inputs": inputs, "answers": answers}, folder / "given.pt")


def round_trip(spec: str, path: Path | None) -> dict[str, object]:
    """The row of one model."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = [sys.executable, __file__, "--one", spec, "--folder", name, *(["--path", str(path)] if path is not None else [])]
        blocked = sorted({"timm", "torchvision", "transformers", "zoo", spec.partition(":")[0].partition(".")[0]} - {"structprune"})
        second = [sys.executable, "-c", LOADER.format(blocked=blocked), str(folder / "out"), str(folder / "given.pt")]
        answer = ""
        for stage, command in (("compress", first), ("load", second)):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            except subprocess.TimeoutExpired:
                return {"ok": False, "stage": stage, "why": f"more than {TIMEOUT} s"}
            if done.returncode:
                return {"ok": False, "stage": stage, "why": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}
            answer = done.stdout
    row = json.loads(answer.strip().splitlines()[-1])
    return {"ok": row["error"] <= ROUNDING and row["loss_finite"] and row["moved"] > 0, **row, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a list of models, one a line")
    parser.add_argument("--path", type=Path, help="a folder with the code of the models")
    parser.add_argument("--resume", action="store_true", help="keep the good rows that are there")
    parser.add_argument("--write", action="store_true", help="keep the rows in bench/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments.folder, arguments.path)
        return
    specs = zoo.listed(arguments.models) if arguments.models else zoo.listed()
    old = json.loads(RESULTS.read_text())["rows"] if arguments.resume and RESULTS.exists() else {}
    rows = {spec: row for spec, row in old.items() if spec in specs and row["ok"]}
    for spec in specs:
        if spec not in rows:
            rows[spec] = round_trip(spec, arguments.path)
        print(f"{'ok' if rows[spec]['ok'] else 'NO':3s} {spec:48s} {json.dumps(rows[spec])}", flush=True)
        if arguments.write:
            results = {
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
                "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "timm", "torchvision", "transformers")},
                "rows": rows,
            }
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{sum(bool(row['ok']) for row in rows.values())} of {len(rows)} models: loaded without their code, the same answers, trained")


if __name__ == "__main__":
    main()
