"""Tables in docs/ are what a script in bench/ wrote, of the models and versions that the project names today."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def bench(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")  # another package is called coverage
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    return bench("coverage")


@pytest.fixture(scope="module")
def results(coverage: ModuleType) -> dict:
    return json.loads(coverage.RESULTS.read_text())


def test_every_model_of_the_list_has_been_run_with_both_tools(coverage: ModuleType, results: dict) -> None:
    assert results["models"] == coverage.zoo.listed()
    missing = [(spec, tool) for spec in results["models"] for tool in coverage.TOOLS if tool not in results["rows"].get(spec, {})]
    assert not missing


def test_the_versions_are_those_of_the_bench_extra(results: dict) -> None:
    pins = dict(re.findall(r'"([\w-]+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert pins.keys() >= {"timm", "torchvision", "transformers", "torch-pruning"}
    assert {name: number.split("+")[0] for name, number in results["versions"].items() if name in pins} == {
        n: v for n, v in pins.items() if n in results["versions"]
    }


def test_the_page_of_coverage_is_what_its_rows_say(coverage: ModuleType, results: dict) -> None:
    assert coverage.PAGE.read_text() == coverage.page(results)


def test_every_model_is_compressed_and_right(coverage: ModuleType, results: dict) -> None:
    """What the README says of the zoo."""
    rows = {spec: row["structprune"] for spec, row in results["rows"].items()}
    assert [spec for spec, row in rows.items() if not (row["ran"] and row["right"])] == []


@pytest.mark.parametrize("name", ["latency", "accuracy"])
def test_the_page_is_what_its_rows_say(name: str) -> None:
    module = bench(name)
    results = json.loads(module.RESULTS.read_text())
    assert (ROOT / f"docs/{name}.md").read_text() == module.page(results)
    assert [key for key, row in results["rows"].items() if not row.get("verified", True)] == []


def test_the_page_of_onnx_files_is_what_its_rows_say() -> None:
    module = bench("onnx_in")
    results = json.loads(module.RESULTS.read_text())
    text = module.PAGE.read_text()
    assert module.with_tables(text, results) == text
    assert set(results["files"]) == set(module.FILES)
    assert [name for name, row in results["files"].items() if "failed" in row or not row["same names"]] == []
