"""Where the time of ONNX files goes, side by side: by operator, and the kernels that hardly became faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.backends.kernels import Kernel, profile

_LIKE_BEFORE = 0.9  # of the baseline's time: a kernel that still takes more did not shrink
_MATTERS = 0.01  # of the baseline's whole time
_SHOWN = 10
_NO_LAYER = "(a name that is no layer's is ONNX Runtime's own for what it runs as one)"


def profiles(candidates: Mapping[str, Path], inputs: Sequence[Tensor], threads: int) -> dict[str, list[Kernel]]:
    """The kernels of every ONNX file among the candidates, in ONNX Runtime on the CPU."""
    arrays = [t.detach().cpu().numpy() for t in inputs]
    return {name: profile(path, arrays, threads) for name, path in candidates.items() if path.suffix == ".onnx"}


def to_dict(found: Mapping[str, Sequence[Kernel]]) -> dict[str, Any]:
    """Plain JSON: seconds and number of kernels by operator, for every candidate; and the baseline's kernels that did not shrink."""
    return {
        "operators": {name: _by_operator(kernels) for name, kernels in found.items()},
        "not_shrunk": {name: _not_shrunk(found, name) for name in list(found)[1:]},
    }


def to_text(found: Mapping[str, Sequence[Kernel]]) -> str:
    """The same as tables."""
    names = list(found)
    totals = {name: _by_operator(found[name]) for name in names}
    operators = sorted({o for t in totals.values() for o in t}, key=lambda o: -max(t.get(o, {}).get("seconds", 0.0) for t in totals.values()))
    width = max([8, *map(len, operators)])
    lines = ["", f"{'operator':<{width}}" + "".join(f"  {name[-24:]:>24}" for name in names)]
    for operator in operators:
        cells = [totals[name].get(operator, {"kernels": 0, "seconds": 0.0}) for name in names]
        lines.append(f"{operator:<{width}}" + "".join(f"  {c['kernels']:>8} × {1e3 * c['seconds']:>10.3f} ms" for c in cells))
    for name in names[1:]:
        kept = _not_shrunk(found, name)
        if kept:
            lines += ["", f"layers of {name} that take more than {_LIKE_BEFORE:.0%} of the baseline's time:"]
            lines += [f"  {k['layer'] or k['name']:<40} {k['operator']:<20} {1e3 * k['before']:.3f} → {1e3 * k['after']:.3f} ms" for k in kept]
            if not all(k["layer"] for k in kept):
                lines.append(_NO_LAYER)
    return "\n".join(lines)


def _by_operator(kernels: Sequence[Kernel]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        entry = found.setdefault(kernel.operator, {"kernels": 0, "seconds": 0.0})
        entry["kernels"] += 1
        entry["seconds"] += kernel.seconds
    return found


def _not_shrunk(found: Mapping[str, Sequence[Kernel]], name: str) -> list[dict[str, Any]]:
    """By name, where both files have one kernel of it; the slowest first."""
    baseline = next(iter(found.values()))
    whole = sum(k.seconds for k in baseline)
    after = {k.name: k for k in found[name]}
    rows: list[dict[str, Any]] = [
        {"name": k.name, "layer": k.layer or after[k.name].layer, "operator": k.operator, "before": k.seconds, "after": after[k.name].seconds}
        for k in baseline
        if k.name in after and k.seconds > _MATTERS * whole and after[k.name].seconds > _LIKE_BEFORE * k.seconds
    ]
    return sorted(rows, key=lambda row: -row["after"])[:_SHOWN]
