"""Damaged files by the thousand: does any end in a traceback, a crash, a hang, or a file left behind?

    python bench/fuzz_files.py [--variants 2000] [--seed 0] [--kind .pt2] [--write]

Valid files of every kind that is read are damaged at random: bits, blocks, truncation, pieces in other places; of archives also what is within
the entries, and of JSON its values, so that the damage gets past the first check. Each variant is loaded as the command line loads it. It must load
or be refused with an error of our own, within 10 seconds of the processor's time. A batch runs in one process; were it to crash, the next variant
starts another. To add a kind is a line in KINDS.

--write keeps the counts in bench/results/fuzz_files.json.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import zoo

RESULTS = Path(__file__).parent / "results" / "fuzz_files.json"
SECONDS, WAITING = 10, 120  # of the processor, and by the clock: the machine may be busy
BATCH = 50
BUILDER = "models"  # of tests/, which has small ones


def net() -> Any:
    """The model that the files hold."""
    import models

    return models.build("residual")[0]


# --- one valid file of each kind, and how it is read ------------------------------------------------------------------------------


def _pt(path: Path) -> None:
    import torch

    torch.save({"state_dict": net().state_dict(), "epoch": 3}, path)


def _safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in net().state_dict().items()}, path)


def _pt2(path: Path) -> None:
    import torch

    torch.export.save(torch.export.export(net(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)), path)


def _onnx(path: Path) -> None:
    import torch

    torch.onnx.export(net(), (torch.zeros(2, 3, 8, 8),), path, dynamo=True, external_data=False, optimize=False, verbose=False)


def _plan(path: Path) -> None:
    import torch

    import structprune

    structprune.compress(net(), (torch.zeros(2, 3, 8, 8),), target="channels=0.5").plan.save(path)


def _load_weights(path: Path) -> None:
    from structprune.frontends.load import load

    load(str(path), arch="fuzz_files:net", inputs=["2x3x8x8"])


def _load(path: Path) -> None:
    from structprune.frontends.load import load

    load(str(path))


def _load_plan(path: Path) -> None:
    import structprune

    structprune.apply(net(), structprune.Plan.load(path))


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    ".pt": (_pt, _load_weights),
    ".safetensors": (_safetensors, _load_weights),
    ".pt2": (_pt2, _load),
    ".onnx": (_onnx, _load),
    "plan.json": (_plan, _load_plan),
}


# --- damage -----------------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file, changed somewhere."""
    if data[:4] == b"PK\x03\x04" and rng.random() < 0.6:
        return within_archive(data, rng)
    if data[:1] == b"{" and rng.random() < 0.8:
        return within_json(data, rng)
    return in_bytes(data, rng)


def in_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    place = rng.randrange(max(1, len(out)))
    length = min(len(out) - place, 1 + int(rng.expovariate(1 / 40)))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.choice([1, 3, 30])):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 1:
            del out[place:]
        case 2:
            out[place : place + length] = bytes(length)
        case 3:
            out[place : place + length] = rng.randbytes(length)
        case 4:
            out[place:place] = rng.randbytes(length)
        case 5:
            del out[place : place + length]
        case _:
            other = rng.randrange(len(out))
            out[place:place] = out[other : other + length]
    return bytes(out)


def within_archive(data: bytes, rng: random.Random) -> bytes:
    """One entry damaged, left out, or given another's content; the archive itself stays whole."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    chosen = rng.randrange(len(entries))
    weights = [i for i, (name, _) in enumerate(entries) if name.endswith((".json", ".pkl", ".pt"))]
    if weights and rng.random() < 0.6:
        chosen = rng.choice(weights)
    name, content = entries[chosen]
    match rng.randrange(4):
        case 0:
            del entries[chosen]
        case 1:
            entries[chosen] = name, entries[rng.randrange(len(entries))][1]
        case _:
            entries[chosen] = name, (within_json(content, rng) if content[:1] == b"{" and rng.random() < 0.8 else in_bytes(content or b"\0", rng))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


ODD = (None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, "", "x", "../x", "__import__('os')", [], {}, [[]], {"x": 1}, "a" * 10_000)


def within_json(data: bytes, rng: random.Random) -> bytes:
    """One value replaced, left out, or given another's place."""
    try:
        document = json.loads(data)
    except ValueError:
        return in_bytes(data, rng)
    places: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        top = stack.pop()
        for key, value in list(top.items() if isinstance(top, dict) else enumerate(top)):
            places.append((top, key))
            if isinstance(value, (dict, list)):
                stack.append(value)
    if not places:
        return in_bytes(data, rng)
    for _ in range(rng.choice([1, 1, 3])):
        owner, key = rng.choice(places)
        if isinstance(owner, list) and key >= len(owner):
            continue
        match rng.randrange(4):
            case 0:
                owner.pop(key) if isinstance(owner, list) else owner.pop(key, None)
            case 1:
                other, name = rng.choice(places)
                known = other.get(name) if isinstance(other, dict) else other[name] if name < len(other) else None
                owner[key] = copy.deepcopy(known)
            case _:
                owner[key] = rng.choice(ODD)
    try:
        return json.dumps(document).encode()
    except (RecursionError, ValueError):
        return in_bytes(data, rng)


# --- batches ----------------------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    pass


def _end(*_: Any) -> None:
    raise Hang


def batch(kind: str, data: bytes, seeds: list[int], answers: Any) -> None:
    """In a process of its own: (seed, verdict, what is told) for each variant."""
    import logging
    import warnings

    import torch

    from structprune.errors import StructpruneError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - torch talks there until the process ends
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _end)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            path = Path(folder) / (kind if "." in kind[1:] else f"file{kind}")
            path.write_bytes(damaged(data, random.Random(seed)))
            before = path.read_bytes()
            answers.put((seed, "began", ""))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(WAITING)
            try:
                KINDS[kind][1](path)
                verdict, told = "loaded", ""
            except StructpruneError as error:
                verdict, told = ("refused", "") if len(str(error).splitlines()) == 1 else ("several lines", str(error))
            except Hang:
                verdict, told = "hang", ""
            except Exception as error:  # whatever it is, it is what this looks for
                verdict, told = "traceback", "".join(traceback.format_exception(error))[-1500:]
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
            if [p.name for p in Path(folder).iterdir()] != [path.name] or path.read_bytes() != before:
                verdict, told = "file left behind", str(list(Path(folder).iterdir()))
            os.chdir("/")
        answers.put((seed, verdict, told))


def run(kind: str, number: int, first: int) -> tuple[Counter[str], list[str]]:
    """All variants of one kind, and what was wrong with which."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"good{kind}"
        KINDS[kind][0](path)
        data = path.read_bytes()
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    left = list(range(first, first + number))
    context = multiprocessing.get_context("fork")
    while left:
        answers = context.SimpleQueue()
        process = context.Process(target=batch, args=(kind, data, left[:BATCH], answers))
        process.start()
        current = None
        while process.is_alive() or not answers.empty():
            if answers.empty():
                time.sleep(0.01)
                continue
            seed, verdict, told = answers.get()
            if verdict == "began":
                current, since = seed, time.monotonic()
                continue
            counts[verdict] += 1
            left.remove(seed)
            current = None
            if verdict not in ("loaded", "refused"):
                wrong.append(f"{kind} seed {seed}: {verdict} {told}")
        process.join()
        if current is not None:
            counts["crash"] += 1
            left.remove(current)
            wrong.append(f"{kind} seed {current}: the process ended with {process.exitcode} after {time.monotonic() - since:.1f} s")
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of the first variant; the others count on")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these")
    parser.add_argument("--write", action="store_true", help="keep the counts in bench/results")
    arguments = parser.parse_args()
    import structprune.pipeline  # before the processes fork: each then has it

    assert structprune and zoo
    sys.path.insert(0, str(Path(__file__).parent))
    kinds = arguments.kind or list(KINDS)
    rows, wrong = {}, []
    started = time.perf_counter()
    for kind in kinds:
        counts, told = run(kind, arguments.variants // len(kinds), arguments.seed)
        rows[kind] = dict(sorted(counts.items()))
        wrong += told
        print(f"{kind:14s} {json.dumps(rows[kind])}", flush=True)
    print("\n".join(wrong[:20]))
    total = sum(sum(row.values()) for row in rows.values())
    seconds = time.perf_counter() - started
    print(f"{total} damaged files in {seconds:.0f} s: {len(wrong)} wrong")
    if arguments.write:
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        versions = {name: version(name) for name in ("torch", "safetensors", "onnx", "onnxruntime")}
        RESULTS.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows, "wrong": wrong}, indent=1) + "\n")


if __name__ == "__main__":
    main()
