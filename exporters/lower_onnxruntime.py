"""Lowering for ONNX Runtime: the operators that run fastest there on a CPU, contrib operators included.

Measured, ONNX Runtime 1.32, float32, 2 threads (the best of many runs):

- linear: FusedMatMul with transB reads the weight as it is stored and keeps one copy in memory; Transpose and MatMul is
  as fast but holds 2.3 times the weights; Gemm needs reshapes and gains nothing, its bias included.
- attention over all keys: MultiHeadAttention 2.3 ms, written out 2.8 ms, Attention-23 4.0 ms (1025 rows, 3 heads).
- norms: RMSNormalization and LayerNormalization are faster than SkipSimplifiedLayerNormalization and
  SkipLayerNormalization together with the addition before them (0.09 and 0.18 ms, 384 rows of 768).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mmopt.exporters.emit import CONTRIB, Emitter, Rule
from mmopt.exporters.lower import PLAIN
from mmopt.exporters.lower_attention import (
    alibi,
    attention_mask,
    cross_attention,
    for_each_query,
    positions,
    scattered_attention,
    segment_attention,
)
from mmopt.ir.attention_args import Attention, CachedAttention, softmax_scale
from mmopt.ir.graph import ATTENTION, CACHED_ATTENTION, CROSS_ATTENTION, LINEAR, MUL, SEGMENT_ATTENTION, aten, shape_of


def cached_attention(e: Emitter, n: Node) -> tuple:
    """GroupQueryAttention; the caches are written in place when the same buffer is bound as input and as output.

    It takes several rows on top of a cache at batch 1 only (engines feed such calls sample by sample); one row, or an
    empty cache, at any batch. Heads must be a multiple of 8 wide, and nothing but causality may hide a slot; else it is
    the standard operators.
    """
    a = CachedAttention.of(n)
    if int(shape_of(a.q)[-1]) // a.heads % 8 or a.key_mask is not None:
        return scattered_attention(e, n)
    e.one_sample = True
    rows, keys = shape_of(a.q)[1], shape_of(a.k)[1]
    if rows != keys:
        raise e.error(f"attention with a cache needs as many query rows as key rows, found {rows} and {keys}")
    total = e.op("Add", e.value(a.past), e.size(rows))  # filled slots of each sample, the new rows included
    last = e.cast(e.op("Sub", total, e.ints([1])), torch.int64, torch.int32)
    longest = e.cast(e.op("ReduceMax", total, keepdims=0), torch.int64, torch.int32)
    ins = [e.value(x) for x in (a.q, a.k, a.v, a.key_cache, a.value_cache)]
    more: list[str] = []
    if a.slopes is not None:
        slots = e.op("Range", e.scalar(0), e.op("ReduceMax", total, keepdims=0), e.scalar(1))
        more = ["", "", "", alibi(e, a.slopes, slots, positions(e, a.past, rows), e.dtype(a.q))]
    sizes = {"num_heads": a.heads, "kv_num_heads": a.kv_heads, "scale": softmax_scale(a), "do_rotary": 0}
    return e.op("GroupQueryAttention", *ins, last, longest, *more, outputs=3, domain=CONTRIB, **sizes)


def attention(e: Emitter, n: Node) -> str:
    a = Attention.of(n)
    mask = attention_mask(e, a)
    return attend(e, e.value(a.q), e.value(a.k), e.value(a.v), a.heads, a.kv_heads, mask, softmax_scale(a))


def attend(
    e: Emitter, q: str, k: str, v: str, heads: int, kv_heads: int, mask: str | None, scale: float, width: int = 0
) -> str:
    """Attention on names of flat rows; `mask` ``[S, 1, 1 or rows, keys]``."""
    if mask is None and heads == kv_heads:
        return e.op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=heads, scale=scale)
    masks = [] if mask is None else [for_each_query(e, mask, q)]
    return e.op("Attention", q, k, v, *masks, q_num_heads=heads, kv_num_heads=kv_heads, scale=scale)


def linear(e: Emitter, n: Node) -> str:
    x, w, bias = (*n.args, None)[:3]
    made = e.op("FusedMatMul", e.operand(x, e.dtype(n)), e.operand(w, e.dtype(n)), domain=CONTRIB, transB=1)
    return made if bias is None else e.op("Add", made, e.operand(bias, e.dtype(n)))


def mul(e: Emitter, n: Node) -> str:
    """x sigmoid(a x) is one operator; what was emitted for the sigmoid is left out if nothing else reads it."""
    for x, gate in (n.args[:2], n.args[1::-1]):
        if isinstance(gate, Node) and gate.target is aten.sigmoid.default:
            inner = gate.args[0]
            if inner is x:
                return e.op("QuickGelu", e.value(x), domain=CONTRIB, alpha=1.0)
            scaled = isinstance(inner, Node) and inner.target is MUL and inner.args[0] is x
            if scaled and isinstance(inner.args[1], float):
                return e.op("QuickGelu", e.value(x), domain=CONTRIB, alpha=inner.args[1])
    return PLAIN[MUL](e, n)


RULES: dict[Any, Rule] = PLAIN | {
    LINEAR: linear,
    MUL: mul,
    ATTENTION: attention,
    CROSS_ATTENTION: cross_attention(attend),
    SEGMENT_ATTENTION: segment_attention(attend),
    CACHED_ATTENTION: cached_attention,
    aten.silu.default: lambda e, n: e.op("QuickGelu", e.value(n.args[0]), domain=CONTRIB, alpha=1.0),
}
