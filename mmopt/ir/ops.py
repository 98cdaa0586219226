"""Canonical operators: the few concepts that stay one node from trace to export.

Rows are laid out flat, ``[batch, rows, heads * head_dim]``, so that no reshape or transpose stands between a projection
and the operator that reads it. Called from ordinary PyTorch code they run their plain definition (so eager and
``torch.compile`` see nothing special); under ``torch.export`` they stay one node each.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)  # not -1: there may be no rows


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    rows, keys = q.shape[1], k.shape[1]
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal and (rows != keys or mask is not None):
        lower_right = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
        mask, causal = lower_right if mask is None else mask & lower_right, False
    out = F.scaled_dot_product_attention(
        _heads(q, heads),
        _heads(k, kv_heads),
        _heads(v, kv_heads),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return _flat(out)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    x4 = x.view(*x.shape[:2], heads, x.shape[2] // heads)
    first, second = x4.chunk(2, dim=-1)
    cos, sin = cos[:, :, None, :].to(x.dtype), sin[:, :, None, :].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).view(x.shape)


def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    past: Tensor,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    slopes: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[1]
    positions = past[:, None] + torch.arange(rows, device=past.device)
    k, v = _heads(k, kv_heads), _heads(v, kv_heads)
    index = positions[:, None, :, None].expand(k.shape)
    key_cache, value_cache = key_cache.scatter(2, index, k), value_cache.scatter(2, index, v)
    total = int(past.max()) + rows  # the rest of the cache is masked: leave it out of the product
    slots = torch.arange(total, device=past.device)
    mask = slots <= positions[:, None, :, None]
    if key_mask is not None:  # a row that may see nothing sees itself: its output counts for nobody
        mask = mask & (key_mask[:, None, None, :total] | (slots == positions[:, None, :, None]))
    if slopes is not None:  # by distance, not place: small for near keys, whose order half precision would lose else
        bias = slopes.float()[:, None, None] * (slots - positions[:, None, :, None])
        mask = torch.where(mask, bias, float("-inf")).to(q.dtype)
    out = F.scaled_dot_product_attention(
        _heads(q, heads),
        key_cache[:, :, :total],
        value_cache[:, :, :total],
        attn_mask=mask,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return _flat(out), key_cache, value_cache


def _cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    attends: Tensor,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
) -> Tensor:
    batch, blocks, rows, width = k.shape
    mask = seen[:, None, :, :, None].expand(batch, 1, q.shape[1], blocks, rows).flatten(3)
    none = ~seen.any(-1)[:, None, :, None]  # sees no block: all keys weigh the same
    out = F.scaled_dot_product_attention(
        _heads(q, heads) * ~none,
        _heads(k.reshape(batch, blocks * rows, width), kv_heads),
        _heads(v.reshape(batch, blocks * rows, v.shape[3]), kv_heads),
        attn_mask=mask | none,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return _flat(out) * attends[..., None]


def _segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_rows: Tensor,
    row_segments: Tensor,
    heads: int,
    kv_heads: int,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    parts = q.flatten(0, 1)[segment_rows]
    out = _attention(parts, k, v, heads, kv_heads, key_mask, False, scale).flatten(0, 1)
    return torch.cat([out, out.new_zeros(1, out.shape[1])])[row_segments]


# Operator -> its plain definition, which has gradients (the operators have none).
PLAIN: dict[Any, Callable] = {}


def define(plain: Callable, fake: Callable) -> None:
    """Make ``torch.ops.mmopt.NAME`` of a function ``_NAME``. Its annotations are the operator's schema.

    plain: what the operator computes, in PyTorch. fake: the same arguments -> empty tensors of the results' shapes.
    """
    name = plain.__name__.removeprefix("_")
    torch.library.custom_op(f"mmopt::{name}", plain, mutates_args=()).register_fake(fake)
    PLAIN[getattr(torch.ops.mmopt, name).default] = plain


def _like_q(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape)


def _like_q_and_caches(q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, *others: Any) -> tuple:
    return q.new_empty(q.shape), torch.empty_like(key_cache), torch.empty_like(value_cache)


define(_attention, _like_q)
define(_rotary, lambda x, cos, sin, heads: torch.empty_like(x))
define(_cached_attention, _like_q_and_caches)
define(_cross_attention, _like_q)
define(_segment_attention, _like_q)


def attention(q, k, v, heads, kv_heads, key_mask=None, causal=False, scale=None):
    """Scaled dot-product attention of q ``[B, Lq, heads*d]`` over k, v ``[B, Lk, kv_heads*d]`` -> ``[B, Lq, heads*d]``.

    ``causal`` is aligned lower right: query i sees key j when ``j <= i + Lk - Lq``. ``key_mask`` ``[B, Lk]`` is True
    for keys that may be seen. Grouped heads: query head h reads key head ``h // (heads // kv_heads)``.
    """
    f = torch.ops.mmopt.attention if torch.compiler.is_exporting() else _attention
    return f(q, k, v, heads, kv_heads, key_mask, causal, scale)


def rotary(x, cos, sin, heads):
    """Rotate the two halves of each head of x ``[B, S, heads*d]`` by angles given as cos, sin ``[B, S, d/2]``."""
    f = torch.ops.mmopt.rotary if torch.compiler.is_exporting() else _rotary
    return f(x, cos, sin, heads)


def cached_attention(q, k, v, key_cache, value_cache, past, heads, kv_heads, scale=None, slopes=None, key_mask=None):
    """Causal self-attention on top of a cache of fixed capacity; returns ``(out, key_cache, value_cache)``.

    Row i of sample b is written to cache slot ``past[b] + i`` and sees the slots up to it. q ``[B, n, heads*d]``; k, v
    ``[B, n, kv_heads*d]``; caches ``[B, kv_heads, capacity, d]``; past ``[B]`` int64. The caches given are not changed.
    slopes ``[heads]``: ALiBi (Press et al. 2022, arXiv:2108.12409), head h adds ``slopes[h] * (j - i)`` to the score of
    key j for query i. key_mask ``[B, capacity]`` is False for slots that only their own row sees.
    """
    f = torch.ops.mmopt.cached_attention if torch.compiler.is_exporting() else _cached_attention
    return f(q, k, v, key_cache, value_cache, past, heads, kv_heads, scale, slopes, key_mask)


def cross_attention(q, k, v, seen, attends, heads, kv_heads, scale=None):
    """Attention of text rows over blocks of rows that lie outside the text (images, tiles) -> ``[B, n, heads*d]``.

    q ``[B, n, heads*d]``; k, v ``[B, blocks, rows, kv_heads*d]``. seen ``[B, n, blocks]`` is True where a text row sees
    a block; a row that sees none weighs all keys the same (that is what a mask of large negative numbers gives).
    attends ``[B, n]``: rows where it is False get zeros.
    """
    f = torch.ops.mmopt.cross_attention if torch.compiler.is_exporting() else _cross_attention
    return f(q, k, v, seen, attends, heads, kv_heads, scale)


def segment_attention(q, k, v, segment_rows, row_segments, heads, kv_heads, key_mask=None, scale=None):
    """`cross_attention` with each text row put beside the keys that it sees -> ``[B, n, heads*d]``.

    q ``[B, n, heads*d]``; k, v ``[S, keys, kv_heads*d]``: what each of S segments of rows sees; key_mask ``[S, keys]``
    is True for keys that count. segment_rows ``[S, L]``: the rows of each segment, as indices into
    the ``B * n`` rows (any index where a segment is shorter). row_segments ``[B, n]``: where each row went, as an index
    into the ``S * L`` places; S * L itself is for rows that get zeros.
    """
    f = torch.ops.mmopt.segment_attention if torch.compiler.is_exporting() else _segment_attention
    return f(q, k, v, segment_rows, row_segments, heads, kv_heads, key_mask, scale)
