"""What there is to say about a compression, in words that the terminal, the page and the comparison share.

Every function takes the report's plain JSON, or a part of it, and copes with whatever is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from structprune.backends.benchmark import NOTICEABLE

_RUNTIMES = {"onnxruntime": "ONNX Runtime", "torch": "PyTorch"}
_DEVICES = {"cpu": "CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}
UNKNOWN = "–"
REFERENCE = (
    "The reference is the original network, interpreted operator by operator, in which every reader of a removed channel ignores it. "
    "The difference is a share of what pruning changed, so one wrong channel cannot hide in a large answer."
)


class Row(NamedTuple):
    """One line of the comparison with the original, in words. Without `before` and `after`, `remark` says what is missing."""

    what: str
    before: str = ""
    after: str = ""
    kept: str = ""
    remark: str = ""
    share: float | None = None  # of the original, for a bar
    intervals: tuple[str, str, str] = ("", "", "")  # of before, after and kept


def rows(data: Mapping[str, Any]) -> list[Row]:
    """Everything that has a number before and after."""
    groups = data.get("groups") or ()
    channels = {"before": sum(g["channels"] for g in groups), "after": sum(g["kept"] for g in groups)} if groups else None
    latencies = [_latency(runtime, measured) for runtime, measured in (data.get("latency_ms") or {}).items()]
    return [
        _quantity("parameters", data.get("params"), count, "not counted"),
        _quantity("multiply-accumulates", data.get("macs"), count, "not counted"),
        *([_quantity("peak of activations", data["activation_bytes"], size, "")] if data.get("activation_bytes") else []),
        _quantity("ONNX file", data.get("onnx_bytes"), size, "not exported"),
        _quantity("channels that can be pruned", channels, count, "none found"),
        *(latencies or [Row("latency", remark="not measured")]),
        *_accuracies(data.get("accuracy")),
    ]


def _quantity(what: str, values: Mapping[str, Any] | None, form: Callable[[float], str], missing: str) -> Row:
    before, after = pair(values)
    if before is None and after is None:
        return Row(what, remark=missing)
    share = after / before if before and after is not None else None
    return Row(what, shown(before, form), shown(after, form), shown(share, percent), share=share)


def _latency(runtime: str, measured: Mapping[str, Any]) -> Row:
    """One runtime, with 95 % intervals. What is kept is the time ratio of paired rounds, not that of the two medians."""
    what = f"latency, {runtime_name(runtime)}"
    before, after = pair(measured)
    if not before and not after:
        return Row(what, remark="not measured")
    claim, evidence = speed(measured)
    ratio = measured.get("ratio") or {}
    return Row(
        what,
        shown(before, lambda latency: f"{digits(latency['median'])} ms"),
        shown(after, lambda latency: f"{digits(latency['median'])} ms"),
        shown(ratio.get("median"), percent),
        f"{claim} ({evidence})" if evidence else claim,
        ratio.get("median"),
        (interval(before, digits), interval(after, digits), interval(ratio, lambda share: f"{100 * share:.1f}")),
    )


_STAGES = {"pruned": "as pruned", "compensated": "after compensation"}  # that the last one has come by


def _accuracies(values: Mapping[str, Any] | None) -> list[Row]:
    """What the user's evaluation says, of the result and of the stages on the way to it."""
    before, after = pair(values)
    if values is None or (before is None and after is None):
        return [Row("accuracy", remark="not measured")]
    stages = [_score(f"accuracy {words}", before, values[stage]) for stage, words in _STAGES.items() if values.get(stage) not in (None, after)]
    return [*stages, _score("accuracy", before, after)]


def _score(what: str, before: float | None, after: float | None) -> Row:
    change = "" if before is None or after is None else f"{100 * (after - before):+.2f} points"
    return Row(what, shown(before, lambda v: f"{100 * v:.2f} %"), shown(after, lambda v: f"{100 * v:.2f} %"), change)


def speed(measured: Mapping[str, Any]) -> tuple[str, str]:
    """A claim and its evidence, by the rule of `Comparison.verdict`: faster or slower only if the whole interval is."""
    ratio = measured.get("ratio") or {}
    if not {"median", "low", "high"} <= ratio.keys():
        return measured.get("verdict") or "not compared with the original", ""
    median, low, high = ratio["median"], ratio["low"], ratio["high"]
    if 1 / high >= NOTICEABLE:
        return f"{1 / median:.2f}× faster", f"95 % interval {1 / high:.2f}–{1 / low:.2f}"
    if low >= NOTICEABLE:
        return f"slower: {median:.2f}× the time", f"95 % interval {low:.2f}–{high:.2f}"
    return "no gain", f"{median:.2f}× the time, 95 % interval {low:.2f}–{high:.2f}"


def headline(data: Mapping[str, Any]) -> str:
    """Is it faster? Where, and where not."""
    claims = [f"{speed(measured)[0]} with {runtime_name(runtime)}" for runtime, measured in (data.get("latency_ms") or {}).items()]
    text = "; ".join(claims) or "latency was not measured, so whether it is faster is unknown"
    return text[0].upper() + text[1:]


def verdict(data: Mapping[str, Any]) -> str:
    """What follows the headline: size, work, accuracy, verification."""
    table = {row.what: row for row in rows(data)}
    params, macs, onnx, accuracy = (table[what] for what in ("parameters", "multiply-accumulates", "ONNX file", "accuracy"))
    sentences = [
        f"{params.after} of {params.before} parameters stay ({params.kept})." if params.after else "Parameters were not counted.",
        f"A call takes {macs.after} multiply-accumulates instead of {macs.before} ({macs.kept})." if macs.after else "Operations were not counted.",
        f"The ONNX file takes {onnx.after} instead of {onnx.before} ({onnx.kept})." if onnx.after else "No ONNX file was exported.",
        f"Accuracy goes from {accuracy.before} to {accuracy.after} ({accuracy.kept})." if accuracy.after else "Accuracy was not measured.",
        verified(data.get("verification") or {}) + fitted(data),
    ]
    return " ".join(sentences)


def verified(verification: Mapping[str, Any]) -> str:
    """How far the small model is proved to be the original without those channels."""
    error, tolerance, onnx = (verification.get(key) for key in ("masked_error", "tolerance", "onnx_error"))
    if error is None:
        return "Not verified: no comparison with the masked original is recorded."
    numbers = f"difference {scientific(error)}, tolerance {shown(tolerance, scientific, 'not recorded')}"
    if not passed(verification):
        return f"Not verified: it differs from the original with the removed channels masked ({numbers})."
    exported = "The ONNX file was not compared." if onnx is None else f"The ONNX file agrees with it to {scientific(onnx)}."
    inexact = verification.get("inexact") or ()
    reasons = "; ".join(dict.fromkeys(entry["reason"] for entry in inexact))
    exceptions = f" Groups whose removal is not what a zero mask gives: {len(inexact)} ({reasons})." if inexact else ""
    return f"Verified: it answers as the original with the removed channels masked ({numbers}). {exported}{exceptions}"


def fitted(data: Mapping[str, Any]) -> str:
    """What was done to the weights after that."""
    calibration, layers, recovery = data.get("calibration"), data.get("compensation"), data.get("recovery")
    fitted = trained = ""
    if calibration and layers is not None:
        source = "made from the statistics in its batch norms" if calibration.get("synthetic") else "given"
        fitted = f" Then the weights of {len(layers)} layers were fitted to the original's answers on {calibration['samples']} samples {source}."
    if matching := data.get("matching"):
        losses = f"fell from {matching['before']:.3g} to {matching['after']:.3g}" if matching["kept"] else "did not fall"
        stayed = "" if matching["kept"] else ", so the weights stayed as they were"
        fitted += f" In {matching['steps']} steps of matching all layers together the loss on samples held back {losses}{stayed}."
    if recovery:
        source = "labels and the original's answers" if recovery["labels"] else "the original's answers"
        trained = f" Then it was trained for {recovery['steps']} steps, {len(recovery['epochs'])} epoch(s), on {source}."
    return fitted + trained


def int8(found: Mapping[str, Any]) -> str:
    """How the quantised file answers, and how fast."""
    agreement = f"it agrees with model.onnx on {100 * found['agreement']:.1f} %, and" if found.get("agreement") is not None else "it"
    accuracy = f" Accuracy {100 * found['accuracy']:.2f} %." if found.get("accuracy") is not None else ""
    claim, evidence = speed(found["latency_ms"]) if found.get("latency_ms") else ("", "")
    timed = f"Beside original.onnx: {claim}{f' ({evidence})' if evidence else ''}." if claim else ""
    return (
        f"model.int8.onnx, {size(found['bytes'])}: on {found['compared_on']} samples {agreement} is off by {100 * found['error']:.1f} % of the "
        f"answer's deviation.{accuracy} {timed}"
    ).strip()


def passed(verification: Mapping[str, Any]) -> bool:
    error, tolerance = verification.get("masked_error"), verification.get("tolerance")
    return error is not None and tolerance is not None and error <= tolerance


def notes_of(data: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers should know; those of a benchmark with the runtime they are about."""
    notes = list(data.get("notes") or ())
    for runtime, measured in (data.get("latency_ms") or {}).items():
        notes += [f"latency, {runtime_name(runtime)}: {note}" for note in measured.get("notes") or ()]
    return notes


def interval(measured: Mapping[str, float] | None, form: Callable[[float], str]) -> str:
    return f"{form(measured['low'])}–{form(measured['high'])}" if measured and {"low", "high"} <= measured.keys() else ""


def runtime_name(key: str) -> str:
    """'ONNX Runtime on CPU' for 'onnxruntime-cpu'."""
    runtime, _, device = key.partition("-")
    name = _RUNTIMES.get(runtime, runtime)
    return f"{name} on {_DEVICES.get(device, device)}" if device else name


def pair(values: Mapping[str, Any] | None) -> tuple[Any, Any]:
    return (values or {}).get("before"), (values or {}).get("after")


def count(value: float) -> str:
    """25557032 → '25.6 M'."""
    for unit in ("", "K", "M", "G", "T"):
        if round(abs(value), 1) < 1000:
            return f"{value:.1f} {unit}" if unit else f"{value:g}"
        value /= 1000
    return f"{value:.1f} P"


def size(value: float) -> str:
    number, _, unit = count(value).partition(" ")
    return f"{number} {unit}B"


def digits(value: float) -> str:
    """Three significant digits without an exponent, and no decimals from 100 on."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    return f"{value:.{min(max(decimals, 0), 9)}f}"


def scientific(value: float) -> str:
    """3.2e-07 → '3.2e-7'."""
    return f"{value:.2g}".replace("e-0", "e-")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def shown(value: Any, form: Callable[[Any], str], missing: str = UNKNOWN) -> str:
    return missing if value is None else form(value)


def settings_of(data: Mapping[str, Any]) -> str:
    settings = [f"{key} {data[key]}" for key in ("target", "criterion", "seed") if data.get(key) is not None]
    return " · ".join([str(data.get("model") or "unnamed model"), *settings])
