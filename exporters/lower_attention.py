"""What both targets spell alike of attention: masks, heads, segments, a cache in standard operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from mmopt.exporters.emit import Emitter, Rule
from mmopt.ir.attention_args import Attention, CachedAttention, CrossAttention, SegmentAttention, softmax_scale
from mmopt.ir.graph import Size, shape_of


def attention_mask(e: Emitter, a: Attention) -> str | None:
    """The mask of attention without a cache, [1 or B, 1, rows or 1, keys], True where a key is seen."""
    mask = None if a.key_mask is None else e.op("Unsqueeze", e.value(a.key_mask), e.ints([1, 2]))
    if a.causal:  # aligned lower right: query i sees key j when j <= i + keys - rows
        rows, keys = shape_of(a.q)[1], shape_of(a.k)[1]
        last = e.op("Range", e.scalar(keys - rows), e.scalar(keys), e.scalar(1))
        seen = e.op("Range", e.scalar(0), e.scalar(keys), e.scalar(1))
        lower = e.op("LessOrEqual", seen, e.op("Reshape", last, e.ints([1, 1, -1, 1])))
        mask = lower if mask is None else e.op("And", mask, lower)
    return mask


def for_each_query(e: Emitter, mask: str, q: str) -> str:
    """A mask ``[S, 1, 1 or rows, keys]`` with a row for each of the flat query rows: ONNX Runtime refuses fewer."""
    rows = e.op("Concat", e.ints([1, 1]), e.op("Shape", q, start=1, end=2), e.ints([1]), axis=0)
    return e.op("Expand", mask, rows)


def heads_of(e: Emitter, x: Node, heads: int) -> str:
    """[B, rows, heads * d] -> [B, heads, rows, d]"""
    return heads_first(e, e.value(x), heads, int(shape_of(x)[-1]) // heads)


def heads_first(e: Emitter, name: str, heads: int, d: int) -> str:
    return e.op("Transpose", e.op("Reshape", name, e.ints([0, 0, heads, d])), perm=[0, 2, 1, 3])


def flat(e: Emitter, name: str, width: int) -> str:
    """[B, heads, rows, d] -> [B, rows, heads * d]"""
    return e.op("Reshape", e.op("Transpose", name, perm=[0, 2, 1, 3]), e.ints([0, 0, width]))


def positions(e: Emitter, past: Node, rows: Size) -> str:
    """Slots of the cache that new rows take ``[B, 1, rows, 1]``."""
    new = e.op("Range", e.scalar(0), e.scalar(rows), e.scalar(1))
    return e.op("Unsqueeze", e.op("Add", e.op("Reshape", e.value(past), e.ints([-1, 1])), new), e.ints([1, 3]))


def alibi(e: Emitter, slopes: Node, slots: str, at: str, kind: torch.dtype) -> str:
    """Slope times distance ``[B, heads, rows, slots]`` for rows `at` these positions. By place of the key alone it
    would be as good for the softmax, but too large for half precision to tell near keys apart."""
    column = e.op("Reshape", e.operand(slopes, kind), e.ints([1, -1, 1, 1]))
    return e.op("Mul", column, e.cast(e.op("Sub", slots, at), torch.int64, kind))


def cross_attention(attend: Callable[..., str]) -> Rule:
    """All rows over all blocks with a dense mask. `attend(e, q, k, v, heads, kv_heads, mask, scale)` on flat rows."""

    def rule(e: Emitter, n: Node) -> str:
        a = CrossAttention.of(n)
        q, k, v, seen = a.q, a.k, a.v, a.seen
        kind, rows = e.dtype(q), int(shape_of(k)[2])
        sees = e.op("ReduceMax", e.cast(e.value(seen), torch.bool, torch.int32), e.ints([-1]), keepdims=1)
        none = e.op("Equal", sees, e.number(0, torch.int32))  # sees no block: all keys weigh the same
        mask = e.op("Unsqueeze", e.op("Or", e.value(seen), none), e.ints([3]))
        wide = e.op("Concat", e.op("Shape", e.value(seen)), e.ints([rows]), axis=0)
        mask = e.op("Unsqueeze", e.op("Reshape", e.op("Expand", mask, wide), e.ints([0, 0, -1])), e.ints([1]))
        plain = e.op("Mul", e.value(q), e.cast(e.op("Not", none), torch.bool, kind))
        keys, values = (e.op("Reshape", e.value(x), e.ints([0, -1, int(shape_of(x)[3])])) for x in (k, v))
        width = int(shape_of(q)[-1])
        out = attend(e, plain, keys, values, a.heads, a.kv_heads, mask, softmax_scale(a), width)
        return e.op("Mul", out, e.cast(e.op("Unsqueeze", e.value(a.attends), e.ints([2])), torch.bool, kind))

    return rule


def segment_attention(attend: Callable[..., str]) -> Rule:
    """Rows gathered into segments, attention over the keys of each, rows gathered back; a row of zeros for the rest."""

    def rule(e: Emitter, n: Node) -> str:
        a = SegmentAttention.of(n)
        width = int(shape_of(a.q)[-1])
        parts = e.op("Gather", e.op("Reshape", e.value(a.q), e.ints([-1, width])), e.value(a.segment_rows))
        mask = None if a.key_mask is None else e.op("Unsqueeze", e.value(a.key_mask), e.ints([1, 2]))
        out = attend(e, parts, e.value(a.k), e.value(a.v), a.heads, a.kv_heads, mask, softmax_scale(a), width)
        zeros = e.constant(torch.zeros(1, width, dtype=e.dtype(n)))
        places = e.op("Concat", e.op("Reshape", out, e.ints([-1, width])), zeros, axis=0)
        return e.op("Gather", places, e.value(a.row_segments))

    return rule


def scattered_attention(e: Emitter, n: Node) -> tuple:
    """Attention with a cache in standard operators: rows into the caches, then over the whole capacity with a mask."""
    a = CachedAttention.of(n)
    keys, values = (
        e.op("TensorScatter", e.value(cache), heads_of(e, x, a.kv_heads), e.value(a.past), axis=-2)
        for cache, x in ((a.key_cache, a.k), (a.value_cache, a.v))
    )
    kind, at, slots = (
        e.dtype(a.q),
        positions(e, a.past, shape_of(a.q)[1]),
        e.constant(torch.arange(int(shape_of(a.key_cache)[2]))),
    )
    mask = e.op("LessOrEqual", slots, at)  # [B, 1, rows, capacity]
    if a.key_mask is not None:  # a slot that is hidden is seen by its own row alone
        shown = e.op("Unsqueeze", e.value(a.key_mask), e.ints([1, 2]))
        mask = e.op("And", mask, e.op("Or", shown, e.op("Equal", slots, at)))
    if a.slopes is not None:
        mask = e.op("Where", mask, alibi(e, a.slopes, slots, at, kind), e.number(torch.finfo(kind).min, kind))
    out = e.op("Attention", heads_of(e, a.q, a.heads), keys, values, mask, scale=softmax_scale(a))
    return flat(e, out, int(shape_of(a.q)[-1])), keys, values
