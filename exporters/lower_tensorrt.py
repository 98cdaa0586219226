"""Lowering for TensorRT: standard ONNX operators that its parser takes, strongly typed (no implicit casts).

Attention-24's `nonpad_kv_seqlen` is silently ignored by the parser, so the mask of the cache is always explicit.
"""

from __future__ import annotations

from typing import Any

from mmopt.exporters.emit import Emitter, Rule
from mmopt.exporters.lower import PLAIN, attention_args, attention_mask, flat, heads_of, scattered_attention
from torch.fx import Node

from mmopt.graph import ATTENTION, CACHED_ATTENTION, LINEAR, shape_of


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


RULES: dict[Any, Rule] = PLAIN | {LINEAR: linear, ATTENTION: attention, CACHED_ATTENTION: scattered_attention}
