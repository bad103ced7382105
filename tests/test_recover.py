"""Recovery: what a short training gives back, and that it can be killed, shared and repeated."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import structprune as sp
from structprune import demo, teaching
from structprune.analysis.groups import find_groups
from structprune.decide import atoms_of
from structprune.errors import InputError
from structprune.recovery import checkpoint as checkpoints
from structprune.recovery.distil import correlation, divergence, from_labels, losses, relative_error
from structprune.recovery.finetune import decay, flat, schedule
from structprune.recovery.hints import dense_teacher
from structprune.result import Clock


class Small(nn.Module):
    """Convolutions with batch norm; the second one's channels are free, and so are the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Layer norm and dropout; it answers with two named tensors, of which neither is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stream = self.embed(x)
        hidden = stream + self.narrow(nn.functional.dropout(self.wide(self.norm(stream)).relu(), 0.2, self.training))
        return {"hidden": hidden, "logits": hidden[..., :4]}


@pytest.fixture(scope="module")
def pruned() -> sp.Result:
    """The demo at half of its channels, which answers hardly better than by chance."""
    return sp.compress(demo.model(), demo.samples()[0][:2], "channels=0.5")


@pytest.fixture(scope="module")
def small() -> sp.Result:
    torch.manual_seed(0)
    return sp.compress(Small().double(), noise(4), "channels=0.5")


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labelled(count: int, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(noise(rows, seed), torch.arange(rows) % 5) for seed in range(count)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What it gives back ---------------------------------------------------------------------------------------------------


def test_one_epoch_of_unlabelled_images_gives_most_of_the_accuracy_back(pruned: sp.Result, tmp_path: Path) -> None:
    dense, before = state(pruned.graph.module), state(pruned.model)
    recovered = sp.recover(pruned, demo.calibration(), evaluate=demo.accuracy)
    assert demo.accuracy(pruned.model) < 0.3
    assert demo.accuracy(recovered.model) > 0.8
    assert demo.accuracy(recovered.small) == demo.accuracy(recovered.model)
    assert type(recovered.model) is demo.DemoNet and not recovered.model.training
    assert same(state(pruned.graph.module), dense) and same(state(pruned.model), before)

    record = recovered.report.to_dict()["recovery"]
    assert (record["steps"], record["optimiser"], record["lr"], record["labels"]) == (8, "sgd", 0.02, False)
    assert record["evaluation"]["before"] == demo.accuracy(pruned.model)
    assert record["evaluation"]["after"] == demo.accuracy(recovered.model)
    assert recovered.report.data["accuracy"] == {"pruned": record["evaluation"]["before"], "after": record["evaluation"]["after"]}
    assert "trained for 8 steps" in " ".join(str(recovered.report).split())
    written = recovered.save(tmp_path / "out", latency=False).to_dict()
    assert written["recovery"] == record and written["verification"]["onnx_error"] < 1e-4
    images = demo.samples()[0][:8]
    assert torch.allclose(sp.load(tmp_path / "out")(images), recovered.model(images), atol=1e-5)


def test_rounds_of_pruning_and_recovery(pruned: sp.Result) -> None:
    """The recipe of docs/recovery.md."""
    model, example = demo.model(), demo.samples()[0][:2]
    for share in (0.7, 0.7):
        result = sp.recover(sp.compress(model, example, f"channels={share}"), demo.calibration(), teacher=demo.model())
        model = result.model
    first_pruned = pruned.plan.tensors["stage1.conv1.0.weight"].keep[0]
    assert abs(model.stage1.conv1[0].out_channels - len(first_pruned)) <= 2
    assert demo.accuracy(model) > demo.accuracy(sp.recover(pruned, demo.calibration()).model) - 0.02


def test_labels_are_used_ignored_or_demanded(small: sp.Result) -> None:
    terms = {
        choice: sp.recover(small, labelled(2), labels=choice).report.data["recovery"]["epochs"][0]["losses"].keys()
        for choice in ("auto", True, False)
    }
    assert terms == {"auto": {"logits", "features", "labels"}, True: {"logits", "features", "labels"}, False: {"logits", "features"}}
    assert sp.recover(small, labelled(2), distill=()).report.data["recovery"]["epochs"][0]["losses"].keys() == {"labels"}
    with pytest.raises(InputError, match="batch 0 of epoch 1 has no labels"):
        sp.recover(small, [noise(4)], labels=True)
    with pytest.raises(InputError, match="nothing to learn from"):
        sp.recover(small, labelled(1), distill=(), labels=False)


def test_labels_alone_are_learnt(small: sp.Result) -> None:
    recovered = sp.recover(small, labelled(4) * 10, epochs=3, distill=(), ema=None)
    first, *_, last = recovered.report.data["recovery"]["epochs"]
    assert last["losses"]["labels"] < 0.5 * first["losses"]["labels"]


def test_features_are_learnt(small: sp.Result) -> None:
    """Of the channels that stay; a teacher of the user's own has to have as many."""
    model = Small().double()
    wide = sp.compress(model, noise(4), "channels=0.5", ignore=["second.*"])
    for result, features, teacher in ((wide, ["second"], None), (wide, ["second"], model), (small, ["second"], None), (small, "auto", None)):
        epochs = sp.recover(result, labelled(4), epochs=4, features=features, teacher=teacher).report.data["recovery"]["epochs"]
        assert epochs[-1]["losses"]["features"] < epochs[0]["losses"]["features"]
    assert "features" not in sp.recover(small, labelled(1), features=()).report.data["recovery"]["epochs"][0]["losses"]
    with pytest.raises(InputError, match="'second' is 4x16x6x6 in the teacher and 4x8x6x6 in the small model"):
        sp.recover(small, labelled(1), features=["second"], teacher=Small().double())
    with pytest.raises(InputError, match="'third', which is no module"):
        sp.recover(small, labelled(1), features=["third"])
    with pytest.raises(InputError, match="features= is a list of names of modules, or 'auto', not 'second'"):
        sp.recover(small, labelled(1), features="second")


@pytest.mark.parametrize("batch", [4, 6])
def test_features_are_those_of_the_channels_that_stay(batch: int) -> None:
    """The dense model's own layers, cut down to the same channels, are what the small model reads where nothing was lost before."""
    result = sp.compress(Small().double(), noise(4), "channels=0.5")
    groups = find_groups(result.graph)
    keep = atoms_of(result.plan, groups)
    teacher, inside = dense_teacher(result.graph, groups.types, keep, result.small, "auto", torch.device("cpu"))
    _, wanted = teacher(noise(batch))
    _, found = flat(result.small, list(inside.values()))(noise(batch))
    assert inside and [w.shape for w in wanted] == [f.shape for f in found]
    first = list(inside).index("relu")
    torch.testing.assert_close(found[first], wanted[first])  # its layer reads the input, of which nothing goes


def test_transformers_take_adamw_and_answers_that_are_no_logits_their_error() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, 6)
    result = sp.compress(Tokens(), x, "channels=0.5")
    recovered = sp.recover(result, [{"x": x}] * 5, epochs=4, lr=1e-2)
    record = recovered.report.data["recovery"]
    assert record["optimiser"] == "adamw"
    assert record["epochs"][0]["losses"].keys() == {"mse", "logits", "features"}
    assert record["epochs"][-1]["losses"]["mse"] < 0.5 * record["epochs"][0]["losses"]["mse"]
    answers = recovered.model(x)
    assert torch.allclose(answers["hidden"], recovered.small(x)["hidden"], atol=1e-6)


def test_a_transformer_after_convolutions_takes_adamw_too() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.LayerNorm(16), nn.Flatten(), nn.Linear(128, 4)).double()
    result = sp.compress(stem, noise(4), "channels=0.5")
    assert sp.recover(result, noise(8), epochs=1).report.data["recovery"]["optimiser"] == "adamw"


def test_a_model_that_writes_to_its_inputs_leaves_the_batches_as_they_are() -> None:
    class Writing(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    batches = [noise(4)]
    sp.recover(sp.compress(Writing().double(), noise(4), "channels=0.5"), batches, epochs=2)
    assert torch.equal(batches[0], noise(4))


# The losses -----------------------------------------------------------------------------------------------------------


class Rebuilds(Small):
    """Takes weights that name no version for old ones, and goes back to the layer of old, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        if local_metadata.get("version") is None:
            self.head = nn.Linear(16, 5)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_class_that_rebuilds_itself_for_old_weights_stays_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = sp.compress(Rebuilds(), noise(4).float(), "channels=0.5", calibration=noise(32).float())
    trained = sp.recover(result, [noise(4).float()], distill=("mse",))
    for each in (result, trained):
        assert type(each.model) is Rebuilds and each.model.head.in_features == 8
        x = noise(3, 1).float()
        assert torch.allclose(each.model(x), each.small(x), atol=1e-6)
    with torch.no_grad():
        trained.model.head.bias.add_(1)  # the user trains on, and saves
    assert not torch.allclose(trained.model(x), result.model(x), atol=0.5)
    trained.save(tmp_path / "out")
    assert torch.allclose(sp.load(tmp_path / "out")(x), trained.model(x), atol=1e-5)


def test_losses_are_zero_for_the_teacher_itself_and_follow_their_formulas() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(8, 5), torch.randn(8, 5)
    for loss in (divergence, correlation, relative_error):
        assert abs(loss(b, b)) < 1e-6 < loss(a, b)
    p, q = (b / 3).softmax(1), (a / 3).softmax(1)
    assert torch.isclose(divergence(a, b, temperature=3), 9 * (p * (p / q).log()).sum(1).mean())
    rows = [1 - np.corrcoef(x, y)[0, 1] for x, y in zip(a.softmax(1).numpy(), b.softmax(1).numpy(), strict=True)]
    columns = [1 - np.corrcoef(x, y)[0, 1] for x, y in zip(a.softmax(1).T.numpy(), b.softmax(1).T.numpy(), strict=True)]
    assert abs(correlation(a, b) - np.mean(rows) - np.mean(columns)) < 1e-5
    assert torch.isclose(relative_error(b.mean().expand_as(b), b), torch.tensor(1.0))


def test_what_looks_like_logits() -> None:
    matrix, picture = torch.randn(4, 5), torch.randn(4, 5, 3, 3)
    assert losses([matrix], [matrix], ["output"], distill=["logits", "dist"]).keys() == {"logits", "dist"}
    assert losses([picture], [picture], ["output"], distill=["logits", "dist"]).keys() == {"mse"}
    assert losses([matrix[:, :1]], [matrix[:, :1]], ["output"], distill=["logits"]).keys() == {"mse"}


def test_labels_find_their_axis() -> None:
    torch.manual_seed(0)
    for shape, labels in (((4, 5), (4,)), ((4, 7, 5), (4, 7)), ((4, 5, 7, 6), (4, 7, 6))):
        answer, label = torch.randn(shape), torch.randint(0, 5, labels)
        classes_last = answer if len(shape) < 4 else answer.permute(0, 2, 3, 1)
        picked = classes_last.log_softmax(-1).gather(-1, label[..., None])
        assert torch.isclose(from_labels([answer], label), -picked.mean())
    answer = torch.randn(4, 5)
    assert torch.isclose(from_labels([answer], torch.eye(5)[[0, 1, 2, 3]]), from_labels([answer], torch.arange(4)))
    with pytest.raises(InputError, match="fit no answer"):
        from_labels([answer], torch.arange(3))


def test_schedule_and_running_mean_start_gently_and_end_as_asked() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] < rates[4] < max(rates) == rates[5] == 1 and rates[-1] < 0.01
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert decay(1, 0.999) == 0.1 and decay(10**6, 0.999) == 0.999


# Killed, and gone on --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal would end the process."""


def drawing(epoch: int, end_at: tuple[int, int] | None = None) -> Any:
    """Batches that are drawn from every global generator."""
    for number in range(4):
        if (epoch, number) == end_at:
            raise Killed
        yield noise(4) + torch.rand(1, dtype=torch.float64) + np.random.rand() + random.random()


@pytest.mark.parametrize(
    "options", [{}, {"ema": None}, {"distill": ("dist",), "patience": 2, "evaluate": lambda m: -m.head.weight.abs().sum().item()}]
)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(small: sp.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    monkeypatch.setattr(checkpoints, "_SECONDS", 0.0)
    options = {"epochs": 3, **options}
    before = torch.get_rng_state()
    whole = sp.recover(small, drawing, **options)
    assert torch.equal(torch.get_rng_state(), before)
    for kill in ((1, 2), (2, 0)):
        with pytest.raises(Killed):
            sp.recover(small, lambda epoch, kill=kill: drawing(epoch, kill), checkpoint=tmp_path / "run", **options)
    steps: list[str] = []
    resumed = sp.recover(small, drawing, checkpoint=tmp_path / "run", progress=steps.append, **options)
    assert "go on after step 8 of 12" in steps
    assert same(state(resumed.model), state(whole.model))
    assert resumed.report.data["recovery"] == whole.report.data["recovery"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_dropout_too_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_SECONDS", 0.0)
    torch.manual_seed(0)
    result = sp.compress(Tokens(), torch.randn(4, 7, 6), "channels=0.5")

    def train(epoch: int, kill: bool = False) -> Any:
        for number in range(6):
            if kill and number == 4:
                raise Killed
            yield torch.randn(4, 7, 6)

    whole = sp.recover(result, train)
    with pytest.raises(Killed):
        sp.recover(result, lambda epoch: train(epoch, kill=True), checkpoint=tmp_path / "run")
    assert same(state(sp.recover(result, train, checkpoint=tmp_path / "run").model), state(whole.model))
    assert not same(state(sp.recover(result, train, seed=1).model), state(whole.model))


def test_a_checkpoint_of_another_run_is_refused(small: sp.Result, tmp_path: Path) -> None:
    sp.recover(small, labelled(2), checkpoint=tmp_path / "run")
    with pytest.raises(InputError, match=r"run is the checkpoint of another run: epochs=1 there, 2 now; remove it"):
        sp.recover(small, labelled(2), epochs=2, checkpoint=tmp_path / "run")
    other = sp.compress(Small().double(), noise(4), "channels=0.5")
    with pytest.raises(InputError, match="it started from other weights"):
        sp.recover(other, labelled(2), checkpoint=tmp_path / "run")
    (tmp_path / "run").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no checkpoint of a recovery"):
        sp.recover(small, labelled(2), checkpoint=tmp_path / "run")
    with pytest.raises(InputError, match="cannot be written"):
        sp.recover(small, labelled(2), checkpoint=tmp_path / "run" / "below")


def test_early_stop_returns_the_best_weights(small: sp.Result) -> None:
    scores = iter([0.1, 0.3, 0.9, 0.5, 0.4, 0.95])
    seen: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(state(model))
        return next(scores)

    recovered = sp.recover(small, labelled(2), epochs=9, evaluate=evaluate, patience=2)
    assert recovered.report.data["recovery"]["evaluation"] == {"before": 0.1, "after": 0.9, "epochs": [0.3, 0.9, 0.5, 0.4], "kept_epoch": 2}
    assert same(state(recovered.model), seen[2]) and not same(seen[2], seen[3])

    falling = iter([0.9, 0.8])
    unchanged = sp.recover(small, labelled(2), evaluate=lambda model: next(falling), patience=1)
    assert unchanged.report.data["recovery"]["evaluation"]["kept_epoch"] == 0
    assert same(state(unchanged.model), state(small.model))


# Several processes ----------------------------------------------------------------------------------------------------

_WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import test_recover, structprune as sp
from structprune import processes
torch.manual_seed(0)
result = sp.compress(test_recover.Small().double(), test_recover.noise(4), "channels=0.5")
options = {"evaluate": lambda m: -m.head.bias.sum().item(), "patience": 5}
trained = sp.recover(result, test_recover.uneven(), epochs=2, distill=("logits", "dist", "mse"), **options)
assert trained.report.data["recovery"]["processes"] == 2
torch.save(trained.model.state_dict(), f"{sys.argv[2]}/{processes.rank()}.pt")
"""


def uneven() -> list[tuple[Tensor, Tensor]]:
    """Batches that two processes cannot halve, with a label that does not count."""
    batches = labelled(3, rows=5)
    batches[1][1][0] = -100
    return batches


@contextmanager
def two_processes(program: str, folder: Path) -> Iterator[None]:
    """Run the program, which is told where this file and `folder` are, twice, as torchrun does; at the end both have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder)]
    ranks = [subprocess.Popen(command, env={**os.environ, **place, "RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    yield
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    with two_processes(_WORKER, tmp_path):
        torch.manual_seed(0)
        result = sp.compress(Small().double(), noise(4), "channels=0.5")
        options: dict[str, Any] = {"evaluate": lambda m: -m.head.bias.sum().item(), "patience": 5}
        alone = state(sp.recover(result, uneven(), epochs=2, distill=("logits", "dist", "mse"), **options).model)
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert same(first, second)
    assert max((alone[name] - first[name]).abs().max().item() for name in alone) < 1e-10
    moved = state(result.model)
    assert max((alone[name] - moved[name]).abs().max().item() for name in alone) > 1e-3


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "options", "words"),
    [
        ([], {}, "train= holds no batch"),
        (iter([noise(4)]), {}, "train= is an iterator"),
        (7, {}, "train= is a int"),
        (lambda epoch: [noise(4)] * (1 - epoch), {"epochs": 2}, "train= holds no batch in epoch 2"),
        ([torch.ones(4, 3, 6, 6)], {}, r"batch 0 of epoch 1: x has shape 4x3x6x6, the model takes \*x2x6x6"),
        ([noise(4) * float("nan")], {}, "not finite"),
        ([noise(4)], {"epochs": 0}, "epochs= and patience= start at 1"),
        ([noise(4)], {"lr": -1.0}, "lr= must be above 0"),
        ([noise(4)], {"lr": 1e200}, "the loss is not finite at step 2; give a smaller lr="),
        ([noise(4)] * 2, {"ema": 1.0}, "ema="),
        ([noise(4)], {"labels": "yes"}, "labels= is True, False or 'auto', not 'yes'"),
        ([noise(4)], {"distill": ("kl",)}, "distill= knows no 'kl'; use some of logits, dist, mse"),
        ([noise(4)], {"patience": 1}, "patience= needs evaluate="),
        ([noise(4)], {"device": "tpu"}, "device 'tpu' is unknown"),
        ([noise(4)], {"teacher": lambda x: x}, "the teacher answers with 4x2x6x6, the small model with 4x5"),
        ([noise(4)], {"teacher": lambda x: 1 / 0}, "teacher= failed: ZeroDivisionError"),
        ([noise(4)], {"evaluate": lambda model: 1 / 0}, "evaluate= failed: ZeroDivisionError"),
        ([(noise(4), torch.arange(3))], {}, "labels of type int64 and shape 3 fit no answer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_says_what_to_do(small: sp.Result, train: Any, options: dict[str, Any], words: str) -> None:
    before = state(small.model)
    if "lr" in options and options["lr"] > 1:
        train = train * 4
    with pytest.raises(InputError, match=words) as raised:
        sp.recover(small, train, **options)
    assert "\n" not in str(raised.value)
    assert same(state(small.model), before)


def test_frozen_weights_cannot_train() -> None:
    with pytest.raises(InputError, match="requires gradients"):
        sp.recover(sp.compress(Small().double().requires_grad_(False), noise(4), "channels=0.5"), [noise(4)])


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_whole_directory_again(pruned: sp.Result, run, tmp_path: Path) -> None:
    (tmp_path / "mydata.py").write_text(
        "from structprune import demo\n\ndef batches():\n    return demo.calibration().split(32)\n\n"
        "def shuffled(epoch):\n    return demo.calibration().roll(epoch, 0).split(32)\n"
    )
    pruned.save("small", latency=False)

    status, out, err = run("recover", "small", "--train", "mydata:batches", "--evaluate", "structprune.demo:accuracy", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report == json.loads(Path("small-recovered/report.json").read_text())
    assert report["recovery"]["evaluation"]["after"] > 0.8 > 0.3 > report["recovery"]["evaluation"]["before"]
    assert report["verification"]["onnx_error"] < 1e-4 and report["recovery"]["teacher"] == "original.onnx"
    assert sorted(p.name for p in Path("small-recovered").iterdir()) == sorted(p.name for p in Path("small").iterdir())
    assert Path("small-recovered/original.onnx").read_bytes() == Path("small/original.onnx").read_bytes()
    assert demo.accuracy(sp.load("small-recovered")) == report["recovery"]["evaluation"]["after"]
    assert demo.accuracy(sp.load("small")) < 0.3

    status, out, err = run("verify", "small-recovered")
    assert (status, "verified" in out) == (0, True), err
    status, out, err = run("recover", "small", "--train", "mydata:shuffled", "--out", "small", "--teacher", "demo", "--lr", "0.01")
    assert (status, "trained for 8 steps" in " ".join(out.split())) == (0, True), err
    assert demo.accuracy(sp.load("small")) > 0.75
    recovery = json.loads(Path("small/report.json").read_text())["recovery"]
    assert recovery["teacher"] == "DemoNet" and "features" in recovery["epochs"][0]["losses"]  # it is the model that was pruned

    other = demo.model()
    with torch.no_grad():
        other.head.weight.mul_(1.5)
    result = teaching._result_of(Path("small"), Clock(None))
    assert teaching._beside(demo.model(), result, Path("small/original.onnx")) is not None
    assert teaching._beside(other, result, Path("small/original.onnx")) is None

    for arguments, words in [
        (("nowhere", "--train", "mydata:batches"), "nowhere: original.onnx is missing"),
        (("small", "--train", "mydata:nothing"), "mydata has no 'nothing'"),
        (("small", "--train", "mydata"), "'mydata' is not package.module:function"),
        (("small", "--train", "mydata:batches", "--labels"), "has no labels"),
    ]:
        status, out, err = run("recover", *arguments)
        assert (status, words in err, err.strip().splitlines()[-1].startswith("structprune: ")) == (2, True, True), err


def test_a_result_of_a_traced_model_trains_too(tmp_path: Path) -> None:
    """Where the user's class cannot follow the sizes, the graph trains, and its files hold what it learnt."""
    model, (x,) = models.build("hard_coded")
    result = sp.compress(model, (x,), "channels=0.5")
    assert result.model is result.small
    before = state(result.model)
    recovered = sp.recover(result, [torch.randn_like(x) for _ in range(4)])
    assert recovered.model is recovered.small and same(state(result.model), before) and not same(state(recovered.model), before)
    recovered.save(tmp_path / "out", latency=False)
    torch.testing.assert_close(sp.load(tmp_path / "out")(x), recovered.model(x))


_SHARING = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import test_recover, structprune as sp
from structprune import processes
result = test_recover.compressed(sharded=True)
assert processes.count() == 1, "they have parted again"
torch.save((result.plan.to_dict(), result.model.state_dict()), f"{sys.argv[2]}/{processes.rank()}.pt")
"""


def compressed(sharded: bool) -> sp.Result:
    torch.manual_seed(0)
    samples = torch.cat([noise(4, seed) for seed in range(16)])
    return sp.compress(Small().double(), noise(4), "macs=0.15", calibration=samples, matching=120, sharded=sharded)


def test_two_processes_share_the_samples_and_compress_as_one_does(tmp_path: Path) -> None:
    with two_processes(_SHARING, tmp_path):
        alone = compressed(sharded=False)
    (plan, first), (other_plan, second) = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2))
    assert plan == other_plan == alone.plan.to_dict()
    assert same(first, second)
    mine = state(alone.model)
    assert alone.report.data["matching"]["kept"]
    assert not same(mine, state(sp.apply(Small().double(), alone.plan))), "weights were fitted"
    assert max((mine[name] - first[name]).abs().max().item() for name in mine) < 1e-6


def test_sharing_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(InputError, match="without sharded"):
        sp.compress(Small(), noise(4), "latency=0.5", sharded=True)
