"""torch's own multi-head attention, of heads that together are narrower than what it reads, or wider in their queries than in their values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    scale: float, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor,
    out_proj_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, average_attn_weights: bool = True, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What `F.multi_head_attention_forward` answers to these arguments, by this scale, and with heads of the widths that the weights have.

    query: (tokens, batch, width), or (tokens, width) of a single sample; the answer is alike. The second answer: (batch, tokens, keys) of weights,
    over all heads, or of each.
    """
    if single := query.dim() == 2:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    tokens, batch, _width = query.shape
    inner = out_proj_weight.shape[1]
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        assert in_proj_weight is not None
        queries = (len(in_proj_weight) - inner) // 2
        weights = list(in_proj_weight.split([queries, queries, inner]))
    biases = [None] * 3 if in_proj_bias is None else in_proj_bias.split([len(w) for w in weights])  # type: ignore[arg-type]
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))  # type: ignore[arg-type]
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, more.expand(-1, batch, -1)]) for x, more in ((k, bias_k), (v, bias_v)))
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _mask(attn_mask, key_padding_mask, (batch, num_heads, tokens), k.shape[-2], q.dtype)
    dropout = dropout_p if training else 0.0
    if need_weights:
        scores = (q * scale) @ k.transpose(-2, -1)
        shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        heads = shares @ v
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    answer = F.linear(heads.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    told = (shares.mean(1) if average_attn_weights else shares) if need_weights else None
    return (answer.squeeze(1), told if told is None else told.squeeze(0)) if single else (answer, told)


def _mask(of_queries: Tensor | None, of_keys: Tensor | None, shape: tuple[int, int, int], keys: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one that is added to the scores, (batch, heads, tokens, keys) or what broadcasts to that; all see the keys that were added."""
    masks = []
    if of_queries is not None:
        masks.append(of_queries.unflatten(0, shape[:2]) if of_queries.dim() == 3 else of_queries[None, None])
    if of_keys is not None:
        masks.append(of_keys[:, None, None, :])
    added = [torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype) for m in masks]
    padded = [F.pad(m, (0, keys - m.shape[-1])) for m in added]
    return sum(padded[1:], padded[0]) if padded else None
