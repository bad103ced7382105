"""Every command of the README and of docs/commands.md does what stands beside it, one after the other, in a folder with the files that they name.

One small network stands for all of them, and for torchvision's ResNet-50: what is tested are the words, not the time that they take.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_docs import _BLOCK, ROOT, commands
from torch import nn
from torch.nn.utils import prune
from torchvision.models._api import BUILTIN_MODELS

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    example_inputs = (torch.zeros(1, 3, 64, 64),)

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net(), (torch.randn(1, 3, 64, 64),)
"""
DATA = """
import torch

torch.manual_seed(0)
batches = [torch.randn(4, 3, 64, 64) for _ in range(4)]
loader = [(x, torch.randint(0, 10, (4,))) for x in batches]


def accuracy(model):
    with torch.no_grad():
        return sum((model(x).argmax(1) == y).float().mean().item() for x, y in loader) / len(loader)
"""


def _write_files(folder: Path) -> None:
    """What the commands name, made as their comments say."""
    import mymodels
    import transformers

    (model, (x,)) = mymodels.build()
    torch.save(model, "model.pt")
    torch.save(model.state_dict(), "weights.pth")
    program = torch.export.export(model.eval(), (x,))
    for name in ("program.pt2", "model.pt2"):
        torch.export.save(program, name)
    torch.onnx.export(model, (x,), "model.onnx", dynamo=True, verbose=False)
    for name in ("conv1", "conv2"):
        prune.ln_structured(getattr(model, name), "weight", 0.5, n=2, dim=0)
        nn.init.zeros_(getattr(model, name).bias)
    torch.save(model, "masked.pt")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).save_pretrained("bert")
    (folder / "photos").mkdir()
    for number in range(20):
        picture = np.random.default_rng(number).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(picture).save(f"photos/{number}.png")


def _shortened(page: str) -> str:
    """A front has two models here, and no more threads run than the smallest machine has cores."""
    return page.replace("latency=0.3:0.9:7", "latency=0.3:0.9:2").replace("threads = 4", "threads = 2")


def test_every_command_of_the_readme_and_of_the_page_of_commands(run, hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("structprune.calibrate.synthetic._NUMBER", 16)
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage/models.py").write_text(MODELS)
    (tmp_path / "mymodels.py").write_text(MODELS)
    (tmp_path / "mydata.py").write_text(DATA)
    ours = ("mymodels", "mydata", "mypackage", "mypackage.models")
    for name in ours:
        sys.modules.pop(name, None)  # another test's
    try:
        import mymodels

        monkeypatch.setitem(BUILTIN_MODELS, "resnet50", lambda **_: mymodels.build()[0])
        _write_files(tmp_path)
        pages = [_shortened((ROOT / name).read_text()) for name in ("README.md", "docs/commands.md")]
        (toml,) = (block for language, _, block in _BLOCK.findall(pages[1]) if language == "toml")
        (tmp_path / "small.toml").write_text(toml)
        for line in dict.fromkeys(shlex.join(words) for page in pages for words in commands(page)):
            status, out, err = run(*shlex.split(line))
            if "cuda" in line and not torch.cuda.is_available():
                assert status == 2 and "finds no CUDA GPU" in err, (line, err)
                continue
            assert status == 0 and out.strip(), (line, err)
            if " --out " in line:
                assert list(Path(line.split(" --out ")[1]).rglob("report.html")), line
    finally:
        for name in ours:
            sys.modules.pop(name, None)
