"""Lowering for TensorRT: standard ONNX operators that its parser takes, strongly typed (no implicit casts).

Attention-24's `nonpad_kv_seqlen` is silently ignored by the parser, so the mask of the cache is always explicit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mmopt.exporters.emit import Emitter, Rule
from mmopt.exporters.lower import PLAIN
from mmopt.exporters.lower_attention import (
    attention_mask,
    cross_attention,
    flat,
    for_each_query,
    heads_first,
    scattered_attention,
    segment_attention,
)
from mmopt.ir.attention_args import Attention, softmax_scale
from mmopt.ir.graph import (
    ATTENTION,
    CACHED_ATTENTION,
    CAT,
    CROSS_ATTENTION,
    LINEAR,
    ROTARY,
    SEGMENT_ATTENTION,
    shape_of,
)


def attention(e: Emitter, n: Node) -> str:
    a = Attention.of(n)
    mask, width = attention_mask(e, a), int(shape_of(a.q)[-1])
    return attend(e, e.value(a.q), e.value(a.k), e.value(a.v), a.heads, a.kv_heads, mask, softmax_scale(a), width)


def attend(
    e: Emitter, q: str, k: str, v: str, heads: int, kv_heads: int, mask: str | None, scale: float, width: int
) -> str:
    """Attention on names of flat rows; `mask` ``[S, 1, 1 or rows, keys]``."""
    d = width // heads
    ins = [heads_first(e, q, heads, d), heads_first(e, k, kv_heads, d), heads_first(e, v, kv_heads, d)]
    masks = [] if mask is None else [for_each_query(e, mask, q)]
    return flat(e, e.op("Attention", *ins, *masks, scale=scale), width)


def linear(e: Emitter, n: Node) -> str:
    x, w, bias = (*n.args, None)[:3]
    turned = e.op("Transpose", e.operand(w, e.dtype(n)), perm=[1, 0])
    made = e.op("MatMul", e.operand(x, e.dtype(n)), turned)
    return made if bias is None else e.op("Add", made, e.operand(bias, e.dtype(n)))


def rotary(e: Emitter, n: Node) -> str:
    """Layers that hold fewer rows than those before them have tables put together for the rows that stay. Without
    images these are the tables of all rows, but caches are still written at other slots, and then the builder orders
    its own kernels wrongly if layers of both kinds read one table (TensorRT for RTX 1.7: "uses before defs", or it
    crashes). The maximum with the lowest number keeps the tables apart and changes no value."""
    x, *tables, heads = n.args
    lowest = e.number(torch.finfo(e.dtype(n)).min, e.dtype(n))
    ins = [e.operand(t, e.dtype(n)) for t in tables]
    ins = [e.op("Max", i, lowest) if t.target is CAT else i for i, t in zip(ins, tables, strict=True)]
    return e.op("RotaryEmbedding", e.value(x), *ins, num_heads=heads)


RULES: dict[Any, Rule] = PLAIN | {
    ROTARY: rotary,
    LINEAR: linear,
    ATTENTION: attention,
    CROSS_ATTENTION: cross_attention(attend),
    SEGMENT_ATTENTION: segment_attention(attend),
    CACHED_ATTENTION: scattered_attention,
}
