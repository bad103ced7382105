"""Attention as one operator (opset 23). As the several operators that most files hold, it needs nothing of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.frontends.onnx_in.table import Call, operator
from structprune.frontends.onnx_in.values import Unsupported


@operator("Attention")
def attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
) -> Tensor:
    """(batch, heads, tokens, width), or (batch, tokens, heads · width) with the numbers of heads as attributes."""
    if past_key is not None or past_value is not None or any(call.wants(i) for i in (1, 2, 3)):
        raise Unsupported("with a cache of keys and values")
    if call.get("softcap", 0.0):
        raise Unsupported("with a softcap")
    flat = query.dim() == 3
    heads, kv_heads, _ = call.get("q_num_heads"), call.get("kv_num_heads"), call.get("qk_matmul_output_mode")  # of an output that nobody reads
    if flat:
        query = query.reshape(query.shape[0], query.shape[1], heads, query.shape[2] // heads).transpose(1, 2)
        key = key.reshape(key.shape[0], key.shape[1], kv_heads, key.shape[2] // kv_heads).transpose(1, 2)
        value = value.reshape(value.shape[0], value.shape[1], kv_heads, value.shape[2] // kv_heads).transpose(1, 2)
    causal = bool(call.get("is_causal", 0))
    if causal and mask is not None:
        raise Unsupported("with both a mask and is_causal")
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=call.get("scale"), enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2) if flat else out


@operator("RotaryEmbedding")
def rotary(call: Call, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None = None) -> Tensor:
    """Pairs of entries are turned by the angles of their position."""
    shape, heads = x.shape, call.get("num_heads", 0)
    x = x.reshape(shape[0], shape[1], heads, shape[2] // heads) if x.dim() == 3 else x.transpose(1, 2)  # (batch, tokens, heads, width)
    turned = call.get("rotary_embedding_dim", 0) or x.shape[-1]
    head, rest = x[..., :turned], x[..., turned:]
    cos, sin = (t[position] if position is not None else t for t in (cos, sin))
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if call.get("interleaved", 0):
        a, b = head[..., 0::2], head[..., 1::2]
        out = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        out = torch.cat([cos * a - sin * b, sin * a + cos * b], -1)
    out = torch.cat([out, rest], -1) if turned != x.shape[-1] else out
    return out.reshape(shape) if len(shape) == 3 else out.transpose(1, 2)
