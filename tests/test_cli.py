"""The command line: what people type, what they get back, and what bad input does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

from structprune.backends.directory import FILES
from structprune.backends.kernels import signature
from structprune.backends.runtimes import Runtime, tables_of


def test_compress_demo_then_verify_and_bench(run, tmp_path: Path) -> None:
    status, out, err = run("compress", "demo", "--out", "small", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "small/report.json").read_text())
    for key in ("target", "params", "macs", "onnx_bytes", "latency_ms", "verification", "groups", "frozen", "seconds", "environment"):
        assert key in report
    assert report["macs"]["after"] <= 0.5 * report["macs"]["before"]
    assert report["onnx_bytes"]["after"] < report["onnx_bytes"]["before"]
    assert report["accuracy"]["before"] > 0.9
    assert {"masked_error", "onnx_error", "exact"} <= report["verification"].keys()
    assert report["latency_ms"]["onnxruntime-cpu"]["ratio"]["low"] > 0
    assert "surgery" in err
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == sorted(FILES)

    status, out, err = run("verify", "small")
    assert (status, "small: verified" in out) == (0, True), err
    status, out, err = run("bench", "small", "--seconds", "1", "--profile", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert set(found["ratios"]) == set(found["operators"]) == {"original", "model"}
    assert all(entry["kernels"] > 0 and entry["seconds"] > 0 for entry in found["operators"]["model"].values())
    assert found["operators"]["original"]["Conv"]["kernels"] >= found["operators"]["model"]["Conv"]["kernels"] > 5
    status, out, err = run("bench", "small", "--seconds", "1", "--profile")
    assert (status, "Conv" in out) == (0, True), err


def test_a_front_of_models(run, tmp_path: Path) -> None:
    status, out, err = run("compress", "demo", "--target", "macs=0.5:0.8:2", "--no-latency", "--out", "front")
    assert status == 0, err
    assert out.endswith("written to front/\nopen front/front.html in a browser; print the table again: structprune compare front\n")
    rows = json.loads((tmp_path / "front/front.json").read_text())
    assert [row["target"] for row in rows] == ["macs=0.5", "macs=0.8"]
    assert all(row["macs"] <= asked for row, asked in zip(rows, (0.5, 0.8), strict=True))
    assert rows[0]["predicted_loss"] > rows[1]["predicted_loss"] > 0
    assert all(0 < row["importance_kept"] < 1 for row in rows)
    assert all(sorted(p.name for p in (tmp_path / "front" / row["directory"]).iterdir()) == sorted(FILES) for row in rows)
    assert "accuracy" in (tmp_path / "front/front.svg").read_text()
    assert all(f'href="{row["directory"]}/report.html"' in (tmp_path / "front/front.html").read_text() for row in rows)

    assert run("compress", "models:residual", "--target", "channels=0.75", "--no-latency", "--out", "other/one")[0] == 0
    status, out, err = run("compare", "front", "other/one", "--json")
    assert status == 0, err
    assert [(row["directory"], row["target"]) for row in json.loads(out)] == [
        ("front/macs-0.5", "macs=0.5"), ("front/macs-0.8", "macs=0.8"), ("other/one", "channels=0.75")
    ]  # fmt: skip
    status, out, err = run("compare", "front", "other/one", "--html", "other/compared.html")
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["macs=0.5", "macs=0.8", "channels=0.75"]
    compared = (tmp_path / "other/compared.html").read_text()
    assert 'href="one/report.html"' in compared and 'href="../front/macs-0.5/report.html"' in compared
    assert run("compare", "nowhere")[0] == run("compare", "front", "--html", "nowhere/page.html")[0] == 2


def test_bench_sweeps_threads_and_batches(run, tmp_path: Path) -> None:
    assert run("compress", "models:residual", "--target", "channels=0.5", "--no-latency", "--out", "small")[0] == 0
    status, out, err = run("bench", "small", "--threads", "1,2", "--batch", "1,3", "--seconds", "0.2", "--json", "--chart", "sweep.svg")
    assert status == 0, err
    drawn = (tmp_path / "sweep.svg").read_text()
    assert all(text in drawn for text in ("original", "model", "3×3×8×8", "2 threads", "milliseconds a run"))
    status, _, err = run("bench", "small", "--chart", "sweep.xyz")
    assert status == 2 and "sweep.xyz: a chart cannot be a '.xyz' file" in err
    found = json.loads(out)
    assert [(one["threads"], one["inputs"][0][0]) for one in found] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    status, _, err = run("bench", "small", "--size", "40", "--seconds", "0.2")
    assert status == 2 and "has shape" in err  # the file takes 8 x 8
    assert run("bench", "small", "--threads", "two")[0] == run("bench", "small", "--batch", "0")[0] == 2


def test_deployed_in_torch(run, tmp_path: Path) -> None:
    asked = ("--target", "channels=0.5", "--runtime", "torch", "--threads", "1")
    status, out, err = run("compress", "models:residual", *asked, "--json", "--out", "small")
    assert status == 0, err
    measured = json.loads(out)["latency_ms"]
    assert list(measured) == ["torch-cpu", "onnxruntime-cpu"]
    assert measured["torch-cpu"]["threads"] == 1
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == sorted(FILES)
    status, _, err = run("compress", "demo", "--runtime", "torch", "--device", "tensorrt")
    assert status == 2 and "tensorrt" in err


def test_tables_of_measured_times(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STRUCTPRUNE_CACHE", str(tmp_path / "cache"))
    assert run("bench", "--table", "--json")[:2] == (0, "[]\n")
    tables_of(Runtime("onnxruntime", "cpu", 1)).seconds([(signature("linear", {"type": "float"}), (1, 4, 8, 16))])
    status, out, _ = run("bench", "--table")
    assert status == 0
    assert "1x4x8x16" in out and "linear" in out and "1 thread(s)" in out
    assert run("bench")[0] == run("bench", "small", "--table")[0] == 2


def test_compress_prints_a_summary(run) -> None:
    status, out, _ = run("compress", "demo", "--target", "channels=0.75", "--no-latency")
    assert status == 0
    assert out.endswith(
        "written to structprune-demo/\nopen structprune-demo/report.html in a browser; time both models again: structprune bench structprune-demo\n"
    )
    assert "parameters" in out
    assert "accuracy" in out


def test_inspect(run) -> None:
    status, out, _ = run("inspect", "demo", "--json")
    groups = json.loads(out)
    assert status == 0
    assert {"name", "channels", "exact", "members"} <= groups["groups"][0].keys()
    assert any(f["reason"] == "model output" and f["at"].startswith("demo/__init__.py:") for f in groups["frozen"])
    status, out, _ = run("inspect", "demo")
    assert "what stays, and why" in out


def test_inspect_why(run) -> None:
    status, out, _ = run("inspect", "demo", "--why", "stage2.conv2.0", "--why", "head")
    assert status == 0
    assert out.splitlines()[0] == "stage2.conv2.0.weight and head.weight share the 64 channels of group stage2.shortcut.0:"
    assert any(line.split()[0] == "add" and "demo/__init__.py:" in line for line in out.splitlines()[1:])
    assert run("inspect", "demo", "--why", "stage2.conv2.0", "head")[:2] == (0, out)
    assert run("inspect", "demo", "head")[0] == 2
    status, out, _ = run("inspect", "demo", "--why", "head")
    assert "model output" in out


def test_dynamic_axes(run) -> None:
    given = ("compress", "models:residual", "--target", "channels=0.5", "--no-latency", "--json", "--out", "small")
    status, out, _ = run(*given, "--dynamic", "2,3")
    assert status == 0
    assert json.loads(out)["verification"]["dynamic_axes"] == {"x": [0, 2, 3]}
    status, _, err = run(*given, "--dynamic", "height")
    assert (status, err.strip().splitlines()[-1]) == (2, "structprune: --dynamic 'height': write axes as 2,3, or of one input as NAME=1")
    status, _, err = run(*given, "--dynamic", "y=1")
    assert status == 2 and "no input; the inputs are x" in err


def test_every_kind_of_file(run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import models\ndef build():\n    print('hello from the user')\n    return models.build('residual')\n")
    model, inputs = models.build("residual")
    torch.save(model, "module.pt")
    torch.save(model.state_dict(), "weights.pt")
    torch.export.save(torch.export.export(model, inputs, strict=False), "program.pt2")
    common = ("--target", "channels=0.5", "--no-latency", "--json")
    kept = set()
    for arguments in (
        ("module.pt", "--trust-pickle", "--input", "1x3x8x8"),
        ("weights.pt", "--arch", "mine:build"),
        ("program.pt2",),
        ("mine:build",),
    ):
        status, out, err = run("compress", *arguments, *common, "--out", f"out{len(arguments)}{arguments[0]}")
        assert status == 0, err
        kept.add(json.loads(out)["params"]["after"])
    assert len(kept) == 1, "the same network in four files gives the same small network"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["missing.pt"], 2, "missing.pt"),
        (["truncated.pt"], 2, "truncated.pt"),
        (["text.pt"], 2, "text.pt"),
        (["list.pt"], 2, "list.pt"),
        (["module.pt"], 2, "--trust-pickle"),
        (["weights.pt"], 2, "--arch"),
        (["module.pt", "--trust-pickle", "--input", "1x4x8x8"], 2, "input"),
        (["demo", "--target", "speed=0.5"], 2, "unknown target"),
        (["demo", "--target", "macs"], 2, "key=value"),
        (["demo", "--criterion", "best"], 2, "best"),
        (["demo", "--target", "macs=0.001"], 3, "cannot be reached"),
        (["demo", "--ignore", "nowhere"], 2, "nowhere"),
        (["demo", "--out", "text.pt"], 2, "text.pt"),
        (["demo", "--out", "locked/out"], 2, "locked"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    model, _ = models.build("residual")
    torch.save(model, "module.pt")
    torch.save(model.state_dict(), "weights.pt")
    torch.save([1, 2, 3], "list.pt")
    Path("text.pt").write_text("no model at all")
    Path("truncated.pt").write_bytes(Path("module.pt").read_bytes()[:1000])
    Path("locked").mkdir()
    if os.geteuid() == 0 and "locked/out" in arguments:  # root may write anywhere but below a file
        Path("locked").rmdir()
        Path("locked").write_text("")
    else:
        Path("locked").chmod(0o500)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    got, out, err = run("compress", *arguments)
    last = err.strip().splitlines()[-1]
    assert got == status, err
    assert last.startswith("structprune: ")
    assert words in last
    assert "Traceback" not in err
    assert out == ""
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_an_existing_folder_of_other_files_is_not_replaced(run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    status, _, err = run("compress", "demo", "--out", "mine")
    assert status == 2
    assert "other files" in err
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "structprune", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("compress", "inspect", "bench", "verify"))
