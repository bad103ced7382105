"""What --calibration and --evaluate may name, and how everything else is refused."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from structprune import demo
from structprune.errors import InputError
from structprune.frontends.calibration import calibration

MODEL = nn.Conv2d(3, 4, 3)
EXAMPLE = (torch.zeros(1, 3, 12, 16),)


def pictures(folder: Path, number: int, colour: tuple[int, int, int] = (255, 0, 51)) -> Path:
    (folder / "below").mkdir(parents=True)
    for i in range(number):
        Image.new("RGB", (40 + i, 30), colour).save(folder / "below" / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    data, notes = calibration(str(pictures(tmp_path / "photos", 5)), MODEL, EXAMPLE)
    (batch,) = data
    assert batch.shape == (5, 3, 12, 16)
    wanted = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(batch, wanted.view(1, 3, 1, 1).expand_as(batch))
    assert "5 of 5 pictures" in notes[0] and "ImageNet" in notes[0]


def test_pictures_follow_the_models_own_configuration(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # type: ignore[assignment]
    data, notes = calibration(str(pictures(tmp_path / "photos", 3)), model, EXAMPLE, samples=2)
    (batch,) = data
    assert batch.shape[0] == 2 and torch.allclose(batch[0, :, 0, 0], torch.tensor([1.0, -1.0, -0.6])) and "the model's own" in notes[0]


def test_the_middle_of_a_picture_is_cut_out(tmp_path: Path) -> None:
    picture = np.zeros((12, 32, 3), np.uint8)
    picture[:, 8:24] = 255  # the middle half is white
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture).save(tmp_path / "photos" / "a.png")
    (batch,) = calibration(str(tmp_path / "photos"), MODEL, EXAMPLE)[0]
    assert batch.min() > 2  # white, normalised


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_files_of_arrays(suffix: str, tmp_path: Path) -> None:
    values = torch.arange(600 * 6).reshape(600, 6).float()
    path = tmp_path / f"data{suffix}"
    if suffix == ".npy":
        np.save(path, values.numpy())
    elif suffix == ".npz":
        np.savez(path, x=values.numpy(), labels=np.arange(600))
    else:
        save_file({"x": values, "labels": torch.arange(600)}, path)
    batches, _ = calibration(str(path), MODEL, (values[:1],), samples=100, seed=3)
    rows = [batch[0] for batch in batches]
    if suffix == ".npy":
        found = torch.cat(rows)
    else:
        found = torch.cat([inputs[0] for inputs in rows])
        assert torch.equal(torch.cat([batch[1] for batch in batches]), (found[:, 0] / 6).long())
    assert found.shape == (100, 6) and len(found[:, 0].unique()) == 100
    again, _ = calibration(str(path), MODEL, (values[:1],), samples=100, seed=3)
    assert all(
        torch.equal(torch.as_tensor(a[0] if suffix == ".npy" else a[0][0]), r if suffix == ".npy" else r[0]) for a, r in zip(again, rows, strict=True)
    )


def _text(path: Path) -> Path:
    path.write_text("nothing of the kind")
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "missing": (lambda d: d / "no.npz", "cannot be read"),
    "missing, of no known kind": (lambda d: d / "no.txt", "no such file"),
    "a text": (lambda d: _text(d / "notes.txt"), "not a file of arrays"),
    "damaged npz": (lambda d: _text(d / "a.npz"), "cannot be read"),
    "damaged npy": (lambda d: _text(d / "a.npy"), "cannot be read"),
    "damaged safetensors": (lambda d: _text(d / "a.safetensors"), "cannot be read"),
    "an empty folder": (lambda d: d, "holds no pictures"),
    "a damaged picture": (lambda d: _text(pictures(d / "p", 1) / "z.jpg").parent, "z.jpg cannot be read as a picture"),
    "no module": (lambda d: "nosuchmodule:batches", "there is no module nosuchmodule"),
    "no function": (lambda d: "structprune.demo:nothing", "has no 'nothing'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as raised:
        list(calibration(str(make(tmp_path)), MODEL, EXAMPLE)[0])
    assert "\n" not in str(raised.value)


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"code": "of whoever wrote it"}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        calibration(str(tmp_path / "a.npy"), MODEL, EXAMPLE)


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3)), y2=np.zeros((5, 3)))
    with pytest.raises(InputError, match="the same number of samples"):
        calibration(str(tmp_path / "a.npz"), MODEL, EXAMPLE)


def test_the_command_takes_both(run, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch\nimport models\n\ndef build():\n    model, inputs = models.build('residual')\n    return model, inputs\n\n"
        "def batches():\n    torch.manual_seed(1)\n    return [torch.randn(8, 3, 8, 8) for _ in range(4)]\n\n"
        "def score(model):\n    return sum(p.numel() for p in model.parameters())\n"
    )

    status, out, err = run(
        "compress", "theirs:build", "--calibration", "theirs:batches", "--evaluate", "theirs:score", "--no-latency", "--json", "--out", "small"
    )
    assert status == 0, err
    report = json.loads(out)
    whole = sum(p.numel() for p in models.build("residual")[0].parameters())
    assert report["accuracy"]["before"] == whole > report["accuracy"]["after"] == report["accuracy"]["pruned"]
    assert (
        report["calibration"] == {"samples": 32, "labels": False, "synthetic": False}
        and report["criterion"] == "reconstruction"
        and report["compensation"]
    )
    assert "fitted to the original's answers on 32 samples" in html.unescape(Path("small/report.html").read_text())
    status, out, err = run("compress", "theirs:build", "--calibration", "theirs:score", "--no-latency", "--out", "other")
    assert (status, err.strip().splitlines()[-1].startswith("structprune: ")) == (2, True) and not Path("other").exists()


def test_the_demo_keeps_its_accuracy() -> None:
    """What the README says."""
    import structprune as sp

    result = sp.compress(demo.model(), demo.samples()[0][:2], "macs=0.5", calibration=demo.calibration(), evaluate=demo.accuracy)
    accuracy = result.report.data["accuracy"]
    assert accuracy["pruned"] < 0.5 and accuracy["after"] > accuracy["before"] - 0.02 == demo.accuracy(demo.model()) - 0.02
