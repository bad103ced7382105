"""ONNX files that people have: are they imported right, how much goes, and is the small file right and faster?

    pip install --no-deps --target FOLDER silero-vad rapidocr-onnxruntime magika speechmos      (for their .onnx files alone)
    python bench/onnx_in.py --files FOLDER [--write]

--write keeps the rows in bench/results/onnx_in.json and the tables in docs/onnx.md.

*Files* of other frameworks (PaddlePaddle, JAX, TensorFlow, Keras, PyTorch) are compressed to `channels=0.75` on noise; the latency is that of both
files on one thread in ONNX Runtime, interleaved, the small one's as a share of the original's with its 95 % interval. *Import* is the largest
difference between ONNX Runtime on the file and torch on what was imported, as a share of the largest answer; *small* that between ONNX Runtime on
the small file and torch; *reference* that between ONNX Runtime on the original file with the removed weights set to zero and on the small file,
where zeros can tell. *Round trips*: torch models with random weights, exported by torch's two exporters, imported, and compressed to
`channels=0.5`, beside what the same target leaves of the torch model itself. *Node tests* are onnx's own, of every operator of the standard.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import zoo

import structprune as sp
from structprune.backends.directory import verify_directory
from structprune.errors import StructpruneError
from structprune.frontends.load import load
from structprune.frontends.onnx_in import load_onnx
from structprune.frontends.onnx_in.table import OPERATORS

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "bench/results/onnx_in.json", ROOT / "docs/onnx.md"
START, END = "<!-- written by bench/onnx_in.py --write -->\n", "<!-- end -->\n"

FILES: dict[str, tuple[str, ...]] = {
    "silero_vad/data/silero_vad.onnx": ("input=2x576", "state=2x2x128", "sr:=16000"),
    "silero_vad/data/silero_vad_op18_ifless.onnx": ("input=2x576", "sr:=8000"),
    "silero_vad/data/silero_vad_half.onnx": ("input=2x576",),
    "silero_vad/data/silero_vad_16k_sequence.onnx": (),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": ("x=1x3x224x224",),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": ("x=1x3x48x320",),
    "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": ("x=1x3x48x192",),
    "magika/models/standard_v3_3/model.onnx": (),
    "speechmos/dnsmos_models/model_v8.onnx": (),
    "speechmos/dnsmos_models/bak_ovr.onnx": (),
    "speechmos/dnsmos_models/sig_bak_ovr.onnx": (),
    "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx": ("input=1x3x64x160",),
    "speechmos/aecmos_models/Run_1668423760_Stage_0.onnx": ("input=1x3x64x160",),
    "speechmos/plcmos_models/plcmos_v2.onnx": ("degraded_audio=1x1x64x257",),
}
TRIPS = (
    "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:vit_b_16", "architectures:yolo",
    "architectures:detr", "architectures:unet", "architectures:diffusion_unet", "architectures:speech_ctc",
    "architectures:conformer", "architectures:summariser", "architectures:wave",
)  # fmt: skip


def file_row(path: Path, inputs: tuple[str, ...]) -> dict[str, Any]:
    """One real file: compressed, saved, verified from the saved files alone."""
    started = time.perf_counter()
    imported = load_onnx(path, inputs)
    nodes = [n.op for n in imported.model.program.body.every_node()]
    row: dict[str, Any] = {
        "inputs": " ".join(inputs),
        "opset": imported.model.program.opset,
        "nodes": len(nodes),
        "operators": len(set(nodes)),
        "import": imported.error,
    }
    result = sp.compress(imported.model, imported.args, "channels=0.75", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "small"
        report = result.save(out).to_dict()
        found = verify_directory(out)
        row["same names"] = _names(path) == _names(out / "model.onnx")
    latency = report["latency_ms"]["onnxruntime-cpu"]["ratio"]
    masked = found["original_onnx_masked"]
    dims = {name: axes for name, axes in report["verification"]["dynamic_axes"].items() if axes}
    return row | {
        "macs": report["macs"]["after"] / report["macs"]["before"],
        "small": report["verification"]["onnx_error"],
        "reference": masked if isinstance(masked, float) else None,
        "matched": found["tensors_matched_in_original_onnx"],
        "tensors": found["tensors"],
        "latency": [latency["median"], latency["low"], latency["high"]],
        "bytes": [report["onnx_bytes"]["before"], report["onnx_bytes"]["after"]],
        "free": dims,
        "seconds": time.perf_counter() - started,
    }


def _names(path: Path) -> list[list[str]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [[v.name for v in values] for values in (session.get_inputs(), session.get_outputs())]


def trip_rows(spec: str) -> list[dict[str, Any]]:
    """One torch model through both exporters."""
    model, inputs = zoo.build(spec)
    direct = sp.compress(model, inputs, "channels=0.5").report.data["macs"]
    rows = []
    for exporter, options in (("dynamo", {"opset_version": 18, "external_data": False}), ("TorchScript", {"opset_version": 17})):
        row: dict[str, Any] = {"model": spec, "exporter": exporter, "torch": direct["after"] / direct["before"]}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    torch.onnx.export(model, inputs, str(file), dynamo=exporter == "dynamo", verbose=False, **options)
            except Exception as error:  # whatever the exporter raises is its answer
                rows.append(row | {"failed": f"not exported: {type(error).__name__}"})
                continue
            try:
                loaded = load(str(file))
                imported = load_onnx(file)
                macs = sp.compress(loaded.model, loaded.args, "channels=0.5").report.data["macs"]
                rows.append(row | {"nodes": len(onnx.load(file).graph.node), "import": imported.error, "macs": macs["after"] / macs["before"]})
            except StructpruneError as error:
                rows.append(row | {"failed": str(error)[:160]})
    return rows


def node_tests() -> dict[str, Any]:
    """Counts of onnx's own tests by what became of them, and the operators of which at least one agrees."""
    from onnx_nodes import outcomes

    found = list(outcomes())
    return {
        "verdicts": dict(collections.Counter(o.verdict for o in found)),
        "differs": sorted(o.name for o in found if o.verdict == "differs"),
        "operators": sorted(set(OPERATORS) & {name for o in found if o.verdict == "agrees" for name in o.operators}),
    }


def page(results: dict[str, Any]) -> str:
    """The part of docs/onnx.md that this script writes."""
    head = ("file", "opset", "nodes (operators)", "MACs kept", "import", "small", "reference", "latency", "size, kB", "free axes", "s")
    lines = ["### Files", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in FILES:
        row = results["files"][name]
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} |" + " |" * (len(head) - 2))
            continue
        reference = f"{row['reference']:.0e}" if row["reference"] is not None else "–"
        median, low, high = row["latency"]
        before, after = row["bytes"]
        free = ", ".join(f"{n} {axes}" for n, axes in row["free"].items()) or "–"
        given = f" `{row['inputs']}`" if row["inputs"] else ""
        cells = [f"{name}{given}", str(row["opset"]), f"{row['nodes']} ({row['operators']})", f"{row['macs']:.3f}", f"{row['import']:.0e}"]
        cells += [f"{row['small']:.0e}", reference, f"{median:.2f} ({low:.2f}–{high:.2f})", f"{before // 1000} → {after // 1000}", free]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    kept = [row for row in results["files"].values() if "failed" not in row]
    named = sum(row["same names"] for row in kept)
    lines += ["", f"{len(kept)} of {len(results['files'])} files compressed and verified; names of inputs and outputs kept: {named}."]
    head = ("model", "exporter", "nodes", "import", "MACs kept from the file", "from the torch model")
    lines += ["", "### Round trips", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(results["trips"], key=lambda row: TRIPS.index(row["model"])):
        middle = f"{row['failed']} | | " if "failed" in row else f"{row['nodes']} | {row['import']:.0e} | {row['macs']:.3f}"
        lines.append(f"| {row['model']} | {row['exporter']} | {middle} | {row['torch']:.3f} |")
    nodes = results["nodes"]
    counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(nodes["verdicts"].items()))
    differs = ", ".join(nodes["differs"]) or "none"
    lines += [
        "",
        "### Node tests",
        "",
        f"{sum(nodes['verdicts'].values())} tests: {counts}. Those that differ: {differs} (torch leaves the order of equal values open).",
        "Refused are types that torch has not, operators or forms of them that are not imported, and sizes that depend on values.",
        "",
        f"Operators of which a test agrees ({len(nodes['operators'])}): {', '.join(nodes['operators'])}.",
        "",
        results["ran_on"],
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, help="the folder that pip installed the files' packages into")
    parser.add_argument("--write", action="store_true", help="keep the results in bench/results and docs")
    parser.add_argument("--only", metavar="WORD", default="", help="run files and models with this in their names; other rows stay")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if arguments.only else {"files": {}, "trips": []}
    for name, inputs in FILES.items():
        if arguments.only not in name:
            continue
        try:
            results["files"][name] = file_row(arguments.files / name, inputs)
        except StructpruneError as error:
            results["files"][name] = {"failed": str(error).replace(str(arguments.files), "")[:200]}
        print(name, results["files"][name], file=sys.stderr, flush=True)
    for spec in TRIPS:
        if arguments.only not in spec:
            continue
        rows = trip_rows(spec)
        results["trips"] = [row for row in results["trips"] if row["model"] != spec] + rows
        print(*rows, sep="\n", file=sys.stderr, flush=True)
    results["nodes"] = node_tests()
    results["ran_on"] = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
        + ", ".join(f"{n} {version(n).split('+')[0]}" for n in ("torch", "onnx", "onnxruntime", "onnxscript"))
        + "."
    )
    print(page(results))
    if arguments.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(with_tables(PAGE.read_text(), results))


def with_tables(text: str, results: dict[str, Any]) -> str:
    """docs/onnx.md with these results in it."""
    before, _, rest = text.partition(START)
    return before + START + page(results) + END + rest.partition(END)[2]


if __name__ == "__main__":
    main()
