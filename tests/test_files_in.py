"""Models as people have them: TorchScript, folders of transformers, checkpoints in checkpoints, masks, weights that are not numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from test_load import Small, refusal, runs
from torch import Tensor, nn
from torch.nn.utils import prune

import structprune as sp
from structprune.errors import InputError
from structprune.frontends.load import load


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# TorchScript


def save_script(model: nn.Module, path: str, traced: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (torch.jit.trace(model, torch.zeros(1, 3, 8, 8)) if traced else torch.jit.script(model)).save(path)


@pytest.mark.parametrize("traced", [True, False])
def test_torchscript_is_converted(traced: bool) -> None:
    model = Small(8).eval()
    save_script(model, "s.pt", traced)
    loaded = load("s.pt", inputs=["2x3x9x9"])
    assert runs(loaded) and any("converted from TorchScript" in n for n in loaded.notes)
    assert {n for n, _ in loaded.model.named_parameters()} == {n for n, _ in model.named_parameters()}
    result = sp.compress(loaded.model, loaded.args, target="channels=0.5")
    assert result.plan.tensors["conv.weight"].shape == (8, 3, 3, 3) and result.model.get_parameter("conv.weight").shape[0] == 4
    assert result.report.data["verification"]["dynamic_batch"]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        while bool(out.sum() > 1.0):
            out = out / 2
        return out


def test_torchscript_that_cannot_be_converted() -> None:
    save_script(Branches(), "b.pt", traced=False)
    assert ".pt2 from torch.export.save" in refusal("b.pt", inputs=["1x3x8x8"])
    save_script(Small().eval(), "s.pt", traced=True)
    assert "does not run on these inputs" in refusal("s.pt", inputs=["1x5x8x8"])
    assert "by position" in refusal("s.pt")
    assert "leave out --arch" in refusal("s.pt", arch="test_load:Small", inputs=["1x3x8x8"])


# Folders of transformers


@pytest.fixture
def folder() -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained("bert")
    return Path("bert")


def test_a_folder_of_transformers(folder: Path, run) -> None:
    loaded = load("bert", arch="transformers:AutoModelForSequenceClassification")
    assert list(loaded.kwargs) == ["input_ids"] and runs(loaded)
    assert load("bert", arch="transformers:BertForSequenceClassification", inputs=["input_ids=2x8:int64"]).kwargs["input_ids"].shape == (2, 8)
    (folder / "model.safetensors").rename(folder / "kept")
    torch.save(loaded.model.state_dict(), folder / "pytorch_model.bin")
    assert "--trust-pickle" in refusal("bert", arch="transformers:AutoModelForSequenceClassification")
    assert runs(load("bert", arch="transformers:AutoModelForSequenceClassification", trust_pickle=True))


def test_a_folder_is_compressed(folder: Path, run) -> None:
    arch = "transformers:AutoModelForSequenceClassification"
    status, _, err = run("compress", str(folder.absolute()), "--arch", arch, "--no-latency", "--out", "o", "--target", "channels=0.75")
    assert status == 0, err
    small = sp.load("o")
    assert small(input_ids=torch.ones(1, 16, dtype=torch.int64))["logits"].shape == (1, 2)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        (None, "--arch transformers:"),
        ("transformers:BertTokenizer", "no model class 'BertTokenizer'"),
        ("transformers:AutoModelForMaskedLM", "missing: "),
        ("transformers:os", "no model class 'os'"),
    ],
)
def test_a_folder_that_does_not_fit(folder: Path, arch: str | None, words: str) -> None:
    assert words in refusal("bert", arch=arch)


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Config"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('mark').touch()\n")
    assert "bert cannot be loaded" in refusal("bert", arch="transformers:AutoModelForSequenceClassification")
    assert not Path("mark").exists()


def test_a_damaged_folder(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "bert cannot be loaded" in refusal("bert", arch="transformers:AutoModelForSequenceClassification")
    (folder / "config.json").write_text("{")
    assert "bert cannot be loaded" in refusal("bert", arch="transformers:AutoModelForSequenceClassification")


# Checkpoints


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda w: {"ema": {"module": w}, "epoch": 1}, "read from 'ema.module'"),
        (lambda w: {"model": {"state_dict": w}, "optimizer": {"state": {}}}, "read from 'model.state_dict'"),
        (lambda w: {"state_dict": w, "state_dict_ema": w}, "it also holds 'state_dict_ema'"),
        (lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}}, "dropped 'model.'"),
        (lambda w: {f"module.model.{k}": v for k, v in w.items()}, "dropped 'model.'"),
        (lambda w: {"n_averaged": torch.ones(()), **{f"module.{k}": v for k, v in w.items()}}, "left out 'n_averaged'"),
    ],
)
def test_checkpoints_in_checkpoints(wrap, note: str) -> None:
    model = Small()
    torch.save(wrap(model.state_dict()), "c.pt")
    loaded = load("c.pt", arch="test_load:Small")
    assert torch.equal(loaded.model.get_parameter("conv.weight"), model.conv.weight)
    assert any(note in line for line in loaded.notes), loaded.notes


def test_a_wrapped_model_takes_bare_weights() -> None:
    Path("wrapping.py").write_text(
        "from torch import nn\nfrom test_load import Small\nclass W(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.model = Small()\n    def forward(self, x):\n        return self.model(x)\n"
    )
    torch.save(Small().state_dict(), "w.pt")
    assert any("added 'model.'" in n for n in load("w.pt", arch="wrapping:W").notes)


def test_masks_are_multiplied() -> None:
    model = Small(8)
    prune.ln_structured(model.conv, "weight", 0.5, n=1, dim=0)
    torch.save(model.state_dict(), "m.pt")
    Path("builders8.py").write_text("from test_load import Small\ndef net(): return Small(8)\n")
    loaded = load("m.pt", arch="builders8:net")
    assert torch.equal(loaded.model.get_parameter("conv.weight"), model.conv.weight)
    assert any("1 masked tensors" in n and "conv.weight" in n for n in loaded.notes)


# Numbers


@pytest.mark.parametrize("target", ["channels=0.5", "dead"])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("conv.weight", float("nan"), "conv.weight holds 1 NaN"),
        ("head.bias", float("inf"), "head.bias holds 1 infinity"),
        ("head.bias", -float("inf"), "head.bias holds 1 infinity"),
        ("input", float("nan"), r"input \[0\] holds 1 NaN"),
    ],
)
def test_what_is_not_finite_is_named(target: str, name: str, value: float, words: str) -> None:
    model, x = Small(), torch.zeros(2, 3, 8, 8)
    with torch.no_grad():
        (x if name == "input" else model.get_parameter(name)).view(-1)[1] = value
    with pytest.raises(InputError, match=words):
        sp.compress(model, (x,), target=target)


@pytest.mark.parametrize("is_parameter", [False, True])
def test_masks_of_minus_infinity_are_fine(is_parameter: bool) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            mask = torch.full((5, 5), -torch.inf).triu(1)
            self.mask = nn.Parameter(mask, requires_grad=False) if is_parameter else nn.Buffer(mask)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(torch.softmax(x @ x.transpose(1, 2) + self.mask + bias, -1) @ x)

    bias = torch.zeros(2, 5, 5)
    bias[:, 3, 2] = -torch.inf
    assert sp.compress(Masked(), (torch.randn(2, 5, 4), bias), target="channels=0.5").plan.tensors
