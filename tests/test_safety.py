"""Hostile files run nothing and write nothing; output is all or nothing whatever happens; limits end a run with one line."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_load import Evil, Small, refusal

import structprune as sp
from structprune.backends.directory import FILES, all_or_none
from structprune.errors import InputError, StructpruneError
from structprune.frontends.calibration import calibration
from structprune.frontends.load import load
from structprune.recovery.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def left() -> set[str]:
    return {p.name for p in Path().iterdir()}


# ------------------------------------------------------------------------------------------------------------------ nothing runs


def rewritten(source: str, target: str, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None) -> None:
    """A copy of an archive with some entries changed, left out (None) or added; '{}' in a name is the archive's own root."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in (extra or {}).items():
            new.writestr(name.replace("{}", root), content)


def in_model(old: str, new: str) -> Callable[[str, bytes], bytes]:
    """Replace text in the program's JSON."""

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("/models/model.json"):
            assert old.encode() in content, old
            return content.replace(old.encode(), new.encode())
        return content

    return change


def evil_pickle(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)
    return buffer.getvalue()


def same(name: str, content: bytes) -> bytes:
    return content


MARK = "mark"
RUN = f"__import__('pathlib').Path('{MARK}').touch()"
FACTORY = 'collections.defaultdict\\\\\\", \\\\\\"default_factory_module\\\\\\": \\\\\\"antigravity'
ENUMERATION = json.dumps(json.dumps('{"\\u005f_enum__": true, "fqn": "antigravity:X", "name": "Y"}'))[1:-1]  # in escapes, within escapes
PROGRAMS: dict[str, Callable[[], tuple[Callable[[str, bytes], bytes | None], dict[str, bytes]]]] = {
    "example inputs": lambda: (lambda n, c: evil_pickle(Path(MARK)) if "sample_inputs" in n else c, {}),
    "old weights": lambda: (same, {"{}/data/weights/model.pt": evil_pickle(Path(MARK))}),
    "custom object": lambda: (same, {"{}/data/constants/opaque_obj_0": pickle.dumps(Evil(Path(MARK)))}),
    "pickled tensor": lambda: (lambda n, c: c.replace(b'"use_pickle": false', b'"use_pickle": true') if n.endswith("config.json") else c, {}),
    "size": lambda: (in_model('"expr_str": "', f'"expr_str": "{RUN} or '), {}),
    "operator": lambda: (in_model("torch.ops.aten.relu.default", "torch.os.system"), {}),
    "library": lambda: (in_model("torch.ops.aten.relu.default", "torch.ops.load_library"), {}),
    "file": lambda: (in_model("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default"), {}),
    "call": lambda: (in_model("torch.ops.aten.relu.default", "_operator.call"), {}),
    "name": lambda: (in_model('"name": "x"', f'"name": "x={RUN}"'), {}),
    "structure": lambda: (in_model("builtins.tuple", FACTORY), {}),
    "enumeration": lambda: (in_model(r"\"context\": \"null\"", rf"\"context\": {ENUMERATION}"), {}),
    "keyword": lambda: (in_model(r"\"context\": \"[]\"", rf"\"context\": \"[\\\"x={RUN}\\\"]\""), {}),
    "quoted name": lambda: (in_model('"parameter_name": "', f'"parameter_name": "x\\"{RUN}'), {}),
    "compiled code": lambda: (same, {"{}/data/aotinductor/model/model.so": b"\x7fELF"}),
    "path": lambda: (same, {"../../outside": b"x"}),
    "absolute path": lambda: (same, {"/tmp/outside": b"x"}),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "good.pt2"
    batch = torch.export.Dim("batch", min=2)
    torch.export.save(torch.export.export(Small().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},)), path)
    return path


@pytest.mark.parametrize("attack", PROGRAMS)
def test_a_program_that_wants_to_run(attack: str, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(str(program))
    rewritten(str(program), "evil.pt2", *PROGRAMS[attack]())
    before = left()
    monkeypatch.setattr(torch.export, "load", lambda *a, **k: pytest.fail("it was handed to torch"))
    assert "evil.pt2" in refusal("evil.pt2")
    assert "evil.pt2" in refusal("evil.pt2", trust_pickle=True)
    assert left() == before and not Path(MARK).exists() and not Path("../../outside").exists()


class Keyed(torch.nn.Module):
    """Layers and answers by names that are no identifiers, or words of Python's."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.inp, self.heads = torch.nn.Linear(3, 8), torch.nn.ModuleDict({name: torch.nn.Linear(8, 2) for name in names})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: head(self.inp(x).relu()) for name, head in self.heads.items()}


@pytest.mark.parametrize("names", [("block4-5", "a:b c"), ("class", "box/xyxy"), ("conv(3)", "50%", "a=b", "[0]", "{x}")])
def test_names_of_modules_and_answers_that_are_no_identifiers(names: tuple[str, ...]) -> None:
    x = torch.randn(2, 3)
    result = sp.compress(Keyed(names).eval(), x, target="channels=0.5")
    result.save("out", latency=False)
    loaded = sp.load("out")
    assert f"heads.{names[0]}.weight" in dict(loaded.named_parameters())
    for module in (loaded, copy.deepcopy(loaded), copy.deepcopy(result.small), result.model):
        answers = module(x)
        assert list(answers) == list(names)
        assert all(torch.allclose(answers[name], result.model(x)[name], atol=1e-6) for name in names)


def test_a_quote_in_a_name_is_no_code() -> None:
    result = sp.compress(Keyed([f"a\" or open('{MARK}', 'w') or \"", "it's"]).eval(), torch.randn(2, 3), target="channels=0.5")
    copy.deepcopy(result.small)(torch.randn(2, 3))
    assert not Path(MARK).exists()


def test_torch_itself_would_run_it(program: Path) -> None:
    """The attack is real: without our look at the file, the pickle does what it says."""
    rewritten(str(program), "evil.pt2", *PROGRAMS["example inputs"]())
    with pytest.raises(Exception):  # noqa: B017 - torch fails on what it has unpickled, in one way or another
        torch.export.load("evil.pt2")
    assert Path(MARK).exists()


@pytest.mark.parametrize("door", ["calibration npy", "calibration npz", "checkpoint", "output directory", "weights"])
def test_no_door_unpickles(door: str, program: Path) -> None:
    mark = Path(MARK).absolute()
    if door == "calibration npy":
        np.save("c.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    elif door == "calibration npz":
        np.savez("c.npz", x=np.array([Evil(mark)], dtype=object))
    elif door == "output directory":
        Path("out").mkdir()
        rewritten(str(program), "out/model.pt2", *PROGRAMS["example inputs"]())
    else:
        torch.save({"task": {}, "state": Evil(mark), "state_dict": Evil(mark)}, "c.pt")
    with pytest.raises(StructpruneError):  # noqa: PT012
        if door.startswith("calibration"):
            calibration(f"c.{door[-3:]}", Small(), (torch.zeros(1, 3, 8, 8),))
        elif door == "checkpoint":
            Checkpoint(Path("c.pt"), {}).read()
        elif door == "output directory":
            sp.load("out")
        else:
            load("c.pt", arch="test_load:Small")
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------------------- absurd sizes


def bomb(path: str, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            with archive.open(name, "w") as entry:
                for _ in range(200):
                    entry.write(bytes(1 << 20))


@pytest.mark.parametrize("suffix", ["pt", "pt2", "npz"])
def test_zip_bombs(suffix: str) -> None:
    bomb(f"b.{suffix}", ["b/data.pkl", "b/data/0", "b/models/model.json", "x.npy"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if suffix == "npz":
        with pytest.raises(InputError, match="zip bomb"):
            calibration("b.npz", Small(), (torch.zeros(1, 3, 8, 8),))
    else:
        assert "zip bomb" in refusal(f"b.{suffix}", arch=None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10  # KiB


@pytest.mark.parametrize("what", ["npy", "safetensors", "expanded", "plan", "option"])
def test_absurd_shapes(what: str) -> None:
    with pytest.raises(StructpruneError):  # noqa: PT012
        if what == "npy":
            header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999999)}"
            Path("a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
            calibration("a.npy", Small(), (torch.zeros(1, 3, 8, 8),))
        elif what == "safetensors":
            text = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}).encode()
            Path("a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
            load("a.safetensors", arch="test_load:Small")
        elif what == "expanded":  # one number under a shape of 10¹² entries
            torch.save({"conv.weight_orig": torch.zeros(1).expand(10**6, 10**6), "conv.weight_mask": torch.zeros(1).expand(10**6, 10**6)}, "a.pt")
            load("a.pt", arch="test_load:Small")
        elif what == "plan":
            plan = sp.compress(Small(8).eval(), (torch.zeros(2, 3, 8, 8),), target="channels=0.5").plan.to_dict()
            plan["inputs"]["args"][0]["shape"] = [10**9, 3, 10**6, 10**6]
            sp.apply(Small(8), sp.Plan.from_dict(plan))
        else:
            load("test_load:Small", inputs=["999999999x3x99999x99999"])


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "null", '"x"', "[" * 100_000, '{"format": "structprune-plan/1"}', '{"format": "structprune-plan/1", "tensors": [], "groups": 3}',
        '{"format":"structprune-plan/1","tensors":{"w":{"shape":[1e999],"keep":{"0":[0]}}},"groups":[],"frozen":[]}',
        '{"format":"structprune-plan/1","tensors":{"w":{"shape":[4],"keep":{"0":[-1]}}},"groups":[],"frozen":[]}',
    ],
)  # fmt: skip
def test_plans_that_are_none(text: str) -> None:
    Path("plan.json").write_text(text)
    with pytest.raises(StructpruneError, match="plan"):
        sp.Plan.load("plan.json")


# ------------------------------------------------------------------------------------------------------------- all or nothing

WRITER = """
import sys
from pathlib import Path
from structprune.backends.directory import FILES, all_or_none
number = int(sys.argv[2]) * 100_000
while True:
    number += 1
    with all_or_none(Path(sys.argv[1])) as work:
        for name in FILES:
            (work / name).write_text(f"{number:09d}" * 2000)
"""


def contents() -> set[str]:
    return {(Path("out") / name).read_text() for name in FILES}


def test_killed_at_any_moment() -> None:
    """50 times: what stands there is whole, of one run; what a killed run left beside goes with the next."""
    generator = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    seen = set()
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, "out", str(n)], env=environment) for n in range(2)]
    try:
        while not Path("out").exists():
            time.sleep(0.05)
        for n in range(2, 50):
            time.sleep(generator.uniform(0.0, 0.15))
            victim = generator.randrange(2)
            processes[victim].send_signal(signal.SIGKILL)
            processes[victim].wait()
            for _ in range(3):  # between two files the other run may put its own in place
                try:
                    found = {p.name: p.read_text() for p in Path("out").iterdir()}
                except FileNotFoundError:
                    continue
                if len(set(found.values())) == 1:
                    break
            processes[victim] = subprocess.Popen([sys.executable, "-c", WRITER, "out", str(n)], env=environment)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(FILES)
    (text,) = contents()
    assert len(text) == 18_000 and text[:9] * 2000 == text
    seen.add(text)
    with all_or_none(Path("out")) as work:
        for name in FILES:
            (work / name).write_text("last")
    assert left() == {"out"} and contents() == {"last"}


def test_without_an_exchange_of_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structprune.backends.directory.ctypes.CDLL", lambda *a, **k: object())
    for text in ("first", "second"):
        with all_or_none(Path("out")) as work:
            for name in FILES:
                (work / name).write_text(text)
        assert contents() == {text} and left() == {"out"}


def test_an_error_leaves_what_was_there() -> None:
    with all_or_none(Path("out")) as work:
        for name in FILES:
            (work / name).write_text("first")
    with pytest.raises(KeyboardInterrupt), all_or_none(Path("out")) as work:  # noqa: PT012
        (work / FILES[0]).write_text("second")
        raise KeyboardInterrupt
    assert contents() == {"first"} and left() == {"out"}


FULL = """
import resource, sys
import torch
import structprune as sp
from structprune import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
cli.main()
"""


@pytest.mark.parametrize("size", [1_000, 60_000])
def test_a_full_disk(size: int) -> None:
    given = ("compress", "demo", "--target", "channels=0.5", "--no-latency", "--no-compensate", "--out", "out")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # Python would not notice that a module's was cut short, and others would read it
    done = subprocess.run([sys.executable, "-c", FULL, str(size), *given], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "out cannot be written" in done.stderr.splitlines()[-1]
    assert left() == set()


def test_a_folder_that_cannot_be_written(run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    for out in ("file", "file/out", "/proc/out"):
        status, _, err = run("compress", "demo", "--out", out)
        assert status == 2 and out in err
    real = os.mkdir

    def read_only(path: object, *arguments: object, **options: object) -> None:
        if ".out-" in str(path):
            raise OSError(30, "Read-only file system")
        real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(InputError, match="Read-only file system"), all_or_none(Path("out")):
        pass
    assert left() == {"file"}


# ------------------------------------------------------------------------------------------------------------------- limits


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "structprune.cli", *arguments], capture_output=True, text=True, env=environment, check=False, timeout=300
    )


def test_a_time_limit() -> None:
    done = command("compress", "demo", "--time-limit", "4", "--out", "out")
    assert done.returncode == 2 and "--time-limit" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert left() == set()


def test_a_memory_limit() -> None:
    done = command("compress", "demo", "--memory-limit", "1GB", "--input", "512x1x512x512", "--out", "out")
    assert done.returncode == 2 and "memory" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
    assert left() == set()


@pytest.mark.parametrize("arguments", [("--time-limit", "0"), ("--memory-limit", "much"), ("--memory-limit", "0GB")])
def test_limits_that_are_none(run, arguments: tuple[str, str]) -> None:
    status, _, err = run("compress", "demo", *arguments)
    assert status == 2 and arguments[0] in err
