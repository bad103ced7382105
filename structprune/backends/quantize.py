"""model.onnx → model.int8.onnx: ONNX Runtime's static quantisation, calibrated and judged on samples."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.backends import onnx
from structprune.errors import InputError
from structprune.ir.samples import Samples

_SEEN = 0.75  # of the samples calibrate; the others judge
_LEAST = 8  # samples, in all


def quantize(model: Path, target: Path, samples: Samples) -> dict[str, Any]:
    """Write `target`, which computes in 8 bits (QDQ), and say how it answers beside `model` on samples that it has not seen.

    `agreement`: the share of samples with the same largest entry, of an answer of (samples, classes); `error`: root mean squared difference of the
    first floating-point answer as a share of its deviation. Raises InputError for too few samples.
    """
    if len(samples) < _LEAST:
        raise InputError(f"int8 takes at least {_LEAST} calibration samples, not {len(samples)}; give more (--calibration)")
    seen, held_out = samples.cut(_SEEN)
    names = onnx.input_names(model)
    with _quiet():
        quantize_static(
            str(model),
            str(target),
            _Reader(names, seen.batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    return {"calibrated_on": len(seen), "compared_on": len(held_out), **_compared(onnx.runner(model), onnx.runner(target), held_out)}


class OnnxModule(nn.Module):
    """An ONNX file as a module, for an evaluation that takes a model: inputs by position or keyword, in the order of the file's."""

    def __init__(self, path: Path):
        super().__init__()
        self._run = onnx.runner(path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answers = [torch.from_numpy(a) for a in self._run(pytree.tree_leaves((args, kwargs)))]
        return answers[0] if len(answers) == 1 else tuple(answers)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches, by the names of the file's inputs."""

    def __init__(self, names: Sequence[str], batches: Sequence[Sequence[Any]]):
        self._left = iter(
            [{n: v.float().numpy() if v.is_floating_point() else v.numpy() for n, v in zip(names, _tensors(b), strict=True)} for b in batches]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def _array(value: Tensor) -> np.ndarray:
    return (value.float() if value.is_floating_point() else value).detach().cpu().numpy()


def _tensors(batch: Sequence[Any]) -> list[Tensor]:
    return [v for v in batch if isinstance(v, Tensor)]


def _compared(model: Callable[..., list[np.ndarray]], quantized: Callable[..., list[np.ndarray]], samples: Samples) -> dict[str, Any]:
    same, squared, wide, number, total = 0, 0.0, [], 0, 0
    for batch in samples.batches:
        wanted, got = (next(a for a in run(batch) if np.issubdtype(a.dtype, np.floating)).astype(np.float64) for run in (model, quantized))
        squared += float(np.square(got - wanted).sum())
        wide.append(wanted.ravel())
        total += wanted.size
        if wanted.ndim == 2 and wanted.shape[1] > 1:
            same += int((wanted.argmax(1) == got.argmax(1)).sum())
            number += len(wanted)
    deviation = float(np.concatenate(wide).std()) + 1e-12
    return {"agreement": same / number if number else None, "error": float(np.sqrt(squared / max(1, total))) / deviation}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises, on the root logger, to preprocess the file, which is done already."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.setLevel(level)
