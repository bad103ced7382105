"""docs/deploy.md, block by block, against the answers of the small model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import structprune as sp
from structprune import demo

PAGE = (Path(__file__).parent.parent / "docs/deploy.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(SCRIPT,) = re.findall(r"```js\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("deploy")
    images = demo.samples()[0][:16]
    sp.compress(demo.model(), (images[:2],), target="channels=0.5").save(where / "small", latency=False)
    np.save(where / "images.npy", images.numpy())
    return where


def wanted(folder: Path, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return sp.load(folder / "small")(images).numpy()


@pytest.mark.parametrize(
    "block", PYTHON, ids=lambda b: " ".join(re.findall(r"(?:import|\.)(?: ?)(onnxruntime|openvino|compile|aoti|structprune)", b)[:2])
)
def test_python(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "openvino" in block:
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    if "aoti" in block and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    monkeypatch.chdir(folder)
    found: dict[str, object] = {}
    exec(block, found)
    images = torch.from_numpy(np.load("images.npy"))
    for name in {"logits", "again"} & found.keys():
        np.testing.assert_allclose(torch.as_tensor(found[name]).detach(), wanted(folder, images), rtol=1e-3, atol=1e-3)
    assert "logits" in found


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_node(package: str, folder: Path, tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node here")
    install = subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", package],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if install.returncode:
        pytest.skip(f"{package} cannot be had from npm: {install.stderr.strip().splitlines()[-1:]}")
    (tmp_path / "run.js").write_text(SCRIPT)
    shutil.copytree(folder / "small", tmp_path / "small")
    done = subprocess.run(
        ["node", "run.js"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "ORT": package}
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["dims"] == [2, 10]
    np.testing.assert_allclose(np.reshape(answer["data"], (2, 10)), wanted(folder, torch.full((2, 1, 28, 28), 0.5)), rtol=1e-3, atol=1e-3)
