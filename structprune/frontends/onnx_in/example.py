"""Example inputs for an ONNX file: what it leaves free is asked of the user, but for the batch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.frontends.onnx_in.reading import Port, Program

_TEXT = re.compile(r"(?P<shape>[1-9]\d*(?:x[1-9]\d*)*)?(?::(?P<dtype>\w+))?")
_PROBES = (224, 32, 64, 16, 128, 48, 8, 256, 320, 512, 4, 640, 1024, 2, 576, 4096, 16000)  # lengths that models may run at


def parse(program: Program, texts: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """Shapes, and fixed values, by the names of inputs: '1x3x224x224' by position, 'x=1x3x224x224', and 'sr:=16000' for a value.

    Raises InputError for a name that is no input, or a shape or type that is not the file's.
    """
    ports = {p.name: p for p in program.inputs}
    shapes: dict[str, tuple[int, ...]] = {}
    fixed: dict[str, float] = {}
    for text in texts:
        name, assigned, value = _named(text, ports)
        if assigned == ":=":
            fixed[name] = _number(text, ports[name], value)
            continue
        if not assigned:
            name = next((p.name for p in program.inputs if p.name not in shapes and p.name not in fixed), "")
            if not name:
                raise InputError(f"--input {text!r}: {program.path} has {len(ports)} inputs: {', '.join(ports)}")
        shapes[name] = _shape(program, text, ports[name], value)
    return shapes, fixed


def _named(text: str, ports: Mapping[str, Port]) -> tuple[str, str, str]:
    """The input that a text speaks of, how, and what it says; names of ONNX may hold anything, so the longest that fits is meant."""
    for name in sorted(ports, key=len, reverse=True):
        for sign in (":=", "="):
            if text.startswith(name + sign):
                return name, sign, text[len(name) + len(sign) :]
    if "=" in text:
        raise InputError(f"--input {text!r} names no input of the file; they are {', '.join(ports)}")
    return "", "", text


def _number(text: str, port: Port, value: str) -> float:
    if port.sizes or (port.dtype is torch.bool and value not in ("0", "1")):
        raise InputError(f"--input {text!r}: only a single number can be fixed, and {port.name!r} has {len(port.sizes)} axes")
    try:
        return float(value) if port.dtype.is_floating_point else int(value)
    except ValueError as error:
        raise InputError(f"--input {text!r}: {value!r} is no number; write {port.name}:=16000") from error


def _shape(program: Program, text: str, port: Port, value: str) -> tuple[int, ...]:
    match = _TEXT.fullmatch(value)
    if match is None:
        raise InputError(f"--input {text!r} cannot be used; write {written(port, _guess(port, 16))}, or NAME:=VALUE to fix a number")
    dtype = str(port.dtype).removeprefix("torch.")
    if match["dtype"] not in (None, dtype):
        raise InputError(f"--input {text!r}: {port.name!r} is {dtype} in {program.path}")
    shape = tuple(map(int, (match["shape"] or "").split("x"))) if match["shape"] else ()
    if len(shape) != len(port.sizes) or any(isinstance(w, int) and w != n for n, w in zip(shape, port.sizes, strict=True)):
        raise InputError(f"--input {text!r}: in {program.path} {port.name!r} is {'x'.join(map(str, port.sizes)) or 'a single number'}")
    return shape


def sizes_for(program: Program, shapes: Mapping[str, tuple[int, ...]], accepts: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """A number for every size that the file leaves free. First axes are batches, of one or two; every other comes from `shapes`.

    accepts: whether the file runs at some sizes; asked for some to propose. Raises InputError that names what is missing, with a command that works.
    """
    known: dict[str, int] = {}
    for port in program.inputs:
        for size, number in zip(port.sizes, shapes.get(port.name, port.sizes), strict=True):
            if isinstance(size, str) and isinstance(number, int) and known.setdefault(size, number) != number:
                raise InputError(f"{program.path}: {size!r} is {known[size]} in one input and {number} in {port.name!r}; it is one size")
    elsewhere = {size for port in program.inputs for size in port.sizes[1:]}
    for port in program.inputs:
        if port.sizes and isinstance(port.sizes[0], str):
            known.setdefault(port.sizes[0], 2 if port.sizes[0] in elsewhere else 1)  # tracing makes two of one where it stands first
    free = {s: p.name for p in program.inputs for s in p.sizes if isinstance(s, str) and s not in known}
    if not free:
        return known
    missing = ", ".join(f"{size!r} of {name!r}" if not size.startswith(f"{name}[") else repr(size) for size, name in free.items())
    proposal = next((k for k in _proposals(free, known) if accepts(k)), None)
    command = " ".join(f"--input {written(p, proposal or _guess(p, 16) | known)}" for p in program.inputs if any(s in free for s in p.sizes))
    lead = "for example" if proposal else "such as"
    raise InputError(f"{program.path} leaves the size {missing} free: give an example, {lead} {command}")


def _proposals(free: Mapping[str, str], known: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes to try, squares first."""
    names = list(free)
    same = [dict.fromkeys(names, n) for n in _PROBES]
    apart = [dict(zip(names, ns, strict=True)) for ns in itertools.product((32, 48, 224, 320), repeat=len(names))] if 1 < len(names) < 4 else []
    alone = [dict.fromkeys(names, 1) | {name: n} for n in _PROBES for name in names] if len(names) > 1 else []
    return [{**known, **sizes} for sizes in same + apart + alone]


def _guess(port: Port, number: int) -> dict[str, int]:
    return {s: number if i else 1 for i, s in enumerate(port.sizes) if isinstance(s, str)}


def written(port: Port, known: Mapping[str, int]) -> str:
    """An input as it is written on the command line."""
    shape = "x".join(str(s if isinstance(s, int) else known[s]) for s in port.sizes)
    text = f"{port.name}={shape}"
    return text if re.fullmatch(r"[\w=.\-/]+", text) else f"'{text}'"


def draws(program: Program, known: Mapping[str, int], fixed: Mapping[str, float], seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Inputs in the file's order: normal noise, and 0 and 1 for integers, which are valid as indices; then numbers from 0 to 1, and to 255.

    On one of them a model may answer with almost nothing, of which rounding is much.
    """
    yield _tensors(program, known, fixed, seed, torch.randn, 2)
    yield _tensors(program, known, fixed, seed, torch.rand, 256)


def _tensors(
    program: Program, known: Mapping[str, int], fixed: Mapping[str, float], seed: int, floats: Callable[..., Tensor], integers: int
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for port in program.inputs:
        shape = [s if isinstance(s, int) else known[s] for s in port.sizes]
        try:
            if port.name in fixed:
                found.append(torch.tensor(fixed[port.name], dtype=port.dtype))
            elif port.dtype.is_floating_point:
                found.append(floats(shape, generator=generator).to(port.dtype))
            else:
                found.append(torch.randint(0, 2 if port.dtype is torch.bool else integers, shape, generator=generator).to(port.dtype))
        except (RuntimeError, TypeError) as error:  # torch's words for sizes beyond memory, and beyond 64 bits
            raise InputError(f"{program.path}: an input {port.name!r} of {shape} cannot be allocated; give a smaller one with --input") from error
    return tuple(found)
