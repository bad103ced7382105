"""Imports point downward only: the picture in docs/architecture.md stays true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx

import structprune

ROOT = Path(structprune.__file__).parent

# from the bottom up: a layer may import itself and what stands before it
LAYERS = [
    "errors", "notebook", "limits", "processes",
    "ir", "demo", "ops", "analysis", "frontends", "transform", "calibrate", "decide", "recovery", "backends",
    "closed_loop", "result", "pipeline", "teaching", "settings", "terminal", "cli",
]  # fmt: skip

# foreign libraries behind one door
DOORS = {
    "networkx": {"analysis/explain.py", "calibrate/logits.py"},
    "onnx": {f"backends/{n}.py" for n in ("onnx", "benchmark", "kernels", "microbenchmarks")}
    | {"frontends/onnx_in/defects.py", "frontends/onnx_in/reading.py"},
    "onnxslim": {"backends/onnx.py"},
    "onnxruntime": {f"backends/{n}.py" for n in ("onnx", "benchmark", "candidates", "kernels", "quantize", "tables")}
    | {"frontends/onnx_in/check.py"},
    "torch_pruning": {"decide/torch_pruning.py"},
    "vl_convert": {"backends/charts.py"},
    "jinja2": {"backends/page.py"},
    "markupsafe": {"backends/page.py"},
    "sqlite3": {"backends/tables.py"},
    "typer": {"cli.py", "settings.py"},
    "rich": {"terminal.py"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return [p for p in sorted(ROOT.rglob("*.py")) if layer(p) not in ("__init__", "__main__")]


def test_every_module_has_a_layer() -> None:
    assert {layer(p) for p in sources()} <= set(LAYERS)


def test_imports_point_downward() -> None:
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in imports(path)
        if name.startswith("structprune.") and LAYERS.index(name.split(".")[1]) > LAYERS.index(layer(path))
    ]
    assert not upward


def test_the_picture_of_the_architecture_is_that_of_the_code() -> None:
    among = [(layer(p), name.split(".")[1]) for p in sources() for name in imports(p) if name.startswith("structprune.")]
    actual = nx.transitive_reduction(nx.DiGraph([(a, b) for a, b in among if a != b and b in LAYERS]))
    page = (Path(__file__).parent.parent / "docs/architecture.md").read_text()
    drawn = re.search(r"```mermaid\n(.*?)```", page, re.DOTALL)
    assert drawn is not None
    assert set(re.findall(r"(\w+) --> (\w+)", drawn[1])) == set(actual.edges)


def test_foreign_libraries_stand_behind_one_door() -> None:
    strayed = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in imports(path)
        if (door := DOORS.get(name.split(".")[0])) is not None and str(path.relative_to(ROOT)) not in door
    ]
    assert not strayed


def test_public_names_are_the_contract() -> None:
    assert set(structprune.__all__) == {
        "Plan", "Result", "StructpruneError", "apply", "benchmark", "compress", "find_groups", "front", "inspect", "load", "plan", "recover", "trace",
        "verify",
    }  # fmt: skip
    assert all(hasattr(structprune, name) for name in structprune.__all__)


def test_torch_waits_for_a_command_to_run() -> None:
    """It takes seconds, which --help, a mistyped flag and completion do not have."""
    program = "import structprune.cli, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip() == "False"
