"""Lowering for TensorRT: standard ONNX operators that its parser takes, strongly typed (no implicit casts).

Attention-24's `nonpad_kv_seqlen` is silently ignored by the parser, so the mask of the cache is always explicit.
"""

from __future__ import annotations

from typing import Any

import torch
from mmopt.exporters.emit import Emitter, Rule
from mmopt.exporters.lower import PLAIN, attention_args, attention_mask, cached_attention_args
from torch.fx import Node

from mmopt.graph import ATTENTION, CACHED_ATTENTION, LINEAR, shape_of


def heads_of(e: Emitter, x: Node, heads: int) -> str:
    """[B, rows, heads * d] -> [B, heads, rows, d]"""
    split = e.op("Reshape", e.value(x), e.ints([0, 0, heads, int(shape_of(x)[-1]) // heads]))
    return e.op("Transpose", split, perm=[0, 2, 1, 3])


def flat(e: Emitter, name: str, width: int) -> str:
    """[B, heads, rows, d] -> [B, rows, heads * d]"""
    return e.op("Reshape", e.op("Transpose", name, perm=[0, 2, 1, 3]), e.ints([0, 0, width]))


def cached_attention(e: Emitter, n: Node) -> tuple:
    """Rows into the caches with TensorScatter, then attention over the whole capacity with a mask."""
    q, k, v, key_cache, value_cache, past, heads, kv_heads, scale = cached_attention_args(n)
    keys, values = (
        e.op("TensorScatter", e.value(cache), heads_of(e, x, kv_heads), e.value(past), axis=-2)
        for cache, x in ((key_cache, k), (value_cache, v))
    )
    rows, capacity = e.op("Range", e.scalar(0), e.scalar(shape_of(q)[1]), e.scalar(1)), int(shape_of(key_cache)[2])
    positions = e.op("Add", e.op("Reshape", e.value(past), e.ints([-1, 1])), rows)
    slots = e.constant(torch.arange(capacity))
    mask = e.op("LessOrEqual", slots, e.op("Unsqueeze", positions, e.ints([1, 3])))  # [B, 1, rows, capacity]
    out = e.op("Attention", heads_of(e, q, heads), keys, values, mask, scale=scale)
    return flat(e, out, int(shape_of(q)[-1])), keys, values


def attention(e: Emitter, n: Node) -> str:
    q, k, v, heads, kv_heads, key_mask, causal, scale = attention_args(n)
    mask = attention_mask(e, q, k, key_mask, causal)
    ins = [heads_of(e, q, heads), heads_of(e, k, kv_heads), heads_of(e, v, kv_heads)]
    out = e.op("Attention", *ins, *([] if mask is None else [mask]), scale=scale)
    return flat(e, out, int(shape_of(q)[-1]))


def linear(e: Emitter, n: Node) -> str:
    x, w, bias = (*n.args, None)[:3]
    turned = e.op("Transpose", e.operand(w, e.dtype(n)), perm=[1, 0])
    made = e.op("MatMul", e.operand(x, e.dtype(n)), turned)
    return made if bias is None else e.op("Add", made, e.operand(bias, e.dtype(n)))


RULES: dict[Any, Rule] = PLAIN | {LINEAR: linear, ATTENTION: attention, CACHED_ATTENTION: cached_attention}
