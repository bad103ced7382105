"""Normalisations. Batch normalisation is torch's own, so that the small model can be trained: statistics move in training mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Unsupported


@operator("BatchNormalization")
def batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The standard's momentum is the share of the old statistics, torch's that of the new."""
    if call.get("training_mode", 0):
        raise Unsupported("in training mode: export the model in evaluation mode")
    call.refuse_unless("spatial", 1)
    return F.batch_norm(x, mean, variance, scale, bias, False, 1 - call.get("momentum", 0.9), call.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Over all axes but the first two. Of three axes it is what group norm is exported as, on (batch, groups, inner · space): written as a layer norm
    over the last axis, of which inner channels may go.
    """
    epsilon = call.get("epsilon", 1e-5)
    if x.dim() == 3:
        return F.layer_norm(x, [x.shape[2]], eps=epsilon) * scale.unsqueeze(1) + bias.unsqueeze(1)
    return torch.instance_norm(x, scale, bias, None, None, True, 0.1, epsilon, False)


@operator("LayerNormalization")
def layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Over the axes from `axis` on. The mean and the inverse deviation are computed where they are read."""
    first = call.get("axis", -1) % x.dim()
    shape, epsilon = list(x.shape[first:]), call.get("epsilon", 1e-5)
    if tuple(scale.shape) == tuple(shape) and (bias is None or bias.shape == scale.shape):
        out = F.layer_norm(x, shape, scale, bias, epsilon)
    else:
        out = F.layer_norm(x, shape, eps=epsilon) * scale
        out = out if bias is None else out + bias
    if not (call.wants(1) or call.wants(2)):
        return (out,)
    axes = list(range(first, x.dim()))
    mean = x.mean(axes, keepdim=True)
    return out, mean, ((x - mean).square().mean(axes, keepdim=True) + epsilon).rsqrt()


@operator("RMSNormalization")
def rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    first = call.get("axis", -1) % x.dim()
    shape, epsilon = list(x.shape[first:]), call.get("epsilon", 1e-5)
    if tuple(scale.shape) == tuple(shape):
        return F.rms_norm(x, shape, scale, epsilon)
    return F.rms_norm(x, shape, eps=epsilon) * scale


@operator("GroupNormalization")
def group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Scale and bias are those of channels; up to opset 20 of groups."""
    groups = call.get("num_groups")
    if call.opset < 21:
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, call.get("epsilon", 1e-5))


@operator("LpNormalization")
def lp_norm(call: Call, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, call.get("p", 2), [call.get("axis", -1)], True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("MeanVarianceNormalization")
def mean_variance(call: Call, x: Tensor) -> Tensor:
    axes = call.get("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("LRN")
def local_response(call: Call, x: Tensor) -> Tensor:
    """x / (bias + alpha / size · Σ x² over `size` neighbouring channels) ^ beta"""
    size = call.get("size")
    squares = F.pad(x.square().unsqueeze(1), [0, 0] * (x.dim() - 2) + [(size - 1) // 2, size // 2])
    channels = x.shape[1]
    around = squares[:, 0, 0:channels]
    for shift in range(1, size):
        around = around + squares[:, 0, shift : shift + channels]
    return x / (call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * around).pow(call.get("beta", 0.75))
