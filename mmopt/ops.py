"""Canonical operators: the few concepts that stay one node from trace to export.

Rows are laid out flat, ``[batch, rows, heads * head_dim]``, so that no reshape or transpose stands between a projection
and the operator that reads it. Called from ordinary PyTorch code they run their plain definition (so eager and
``torch.compile`` see nothing special); under ``torch.export`` they stay one node each.
"""

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
) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[1]
    positions = past[:, None] + torch.arange(rows, device=past.device)
    k, v = _heads(k, kv_heads), _heads(v, kv_heads)
    index = positions[:, None, :, None].expand(k.shape)
    key_cache, value_cache = key_cache.scatter(2, index, k), value_cache.scatter(2, index, v)
    total = int(past.max()) + rows  # the rest of the cache is masked: leave it out of the product
    mask = torch.arange(total, device=past.device) <= positions[:, None, :, None]
    out = F.scaled_dot_product_attention(
        _heads(q, heads),
        key_cache[:, :, :total],
        value_cache[:, :, :total],
        attn_mask=mask,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return _flat(out), key_cache, value_cache


_attention_op = torch.library.custom_op("mmopt::attention", _attention, mutates_args=())
_rotary_op = torch.library.custom_op("mmopt::rotary", _rotary, mutates_args=())
_cached_attention_op = torch.library.custom_op("mmopt::cached_attention", _cached_attention, mutates_args=())


@_attention_op.register_fake
def _(q, k, v, heads, kv_heads, key_mask=None, causal=False, scale=None):
    return q.new_empty(q.shape)


@_rotary_op.register_fake
def _(x, cos, sin, heads):
    return torch.empty_like(x)


@_cached_attention_op.register_fake
def _(q, k, v, key_cache, value_cache, past, heads, kv_heads, scale=None):
    return q.new_empty(q.shape), torch.empty_like(key_cache), torch.empty_like(value_cache)


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


def cached_attention(q, k, v, key_cache, value_cache, past, heads, kv_heads, scale=None):
    """Causal self-attention on top of a cache of fixed capacity; returns ``(out, key_cache, value_cache)``.

    Row i of sample b is written to cache slot ``past[b] + i`` and sees the slots up to it. q ``[B, n, heads*d]``; k, v
    ``[B, n, kv_heads*d]``; caches ``[B, kv_heads, capacity, d]``; past ``[B]`` int64. The caches given are not changed.
    """
    f = torch.ops.mmopt.cached_attention if torch.compiler.is_exporting() else _cached_attention
    return f(q, k, v, key_cache, value_cache, past, heads, kv_heads, scale)
