"""Lowering for ONNX Runtime: the fused operators that run fastest there, contrib operators included."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mmopt.exporters.emit import CONTRIB, Emitter, Rule
from mmopt.exporters.lower import PLAIN, attention_args, gain_of, rms_norm_args, scale_of
from mmopt.graph import ATTENTION, CACHED_ATTENTION, LINEAR, RMS_NORM, ROTARY, aten, shape_of


def cached_attention(e: Emitter, n: Node) -> tuple:
    """GroupQueryAttention: writes rows to the caches in place when input and output caches are one buffer."""
    q, k, v, key_cache, value_cache, past, heads, kv_heads, *rest = n.args
    if shape_of(q)[1] != shape_of(k)[1]:  # type: ignore[arg-type]
        raise e.error("GroupQueryAttention needs as many query rows as key rows")
    rows = shape_of(q)[1]  # type: ignore[arg-type]
    total = e.op("Add", e.value(past), e.size(rows))
    last = e.op("Cast", e.op("Sub", total, e.ints([1])), to=6)
    longest = e.op("Cast", e.op("ReduceMax", total, keepdims=0), to=6)
    ins = [e.value(x) for x in (q, k, v, key_cache, value_cache)]
    return e.op(
        "GroupQueryAttention", *ins, last, longest, outputs=3, domain=CONTRIB,
        num_heads=heads, kv_num_heads=kv_heads, scale=scale_of(n, q, heads, rest[0] if rest else None), do_rotary=0,  # type: ignore[arg-type]
    )  # fmt: skip


def attention(e: Emitter, n: Node) -> str:
    q, k, v, heads, kv_heads, key_mask, causal, scale = attention_args(n)
    if causal or key_mask is not None:
        raise e.error("masked attention without a cache is not supported")
    return e.op(
        "Attention", *(e.value(x) for x in (q, k, v)), q_num_heads=heads, kv_num_heads=kv_heads,
        scale=scale_of(n, q, heads, scale),
    )  # fmt: skip


def linear(e: Emitter, n: Node) -> str:
    x, w, bias = (*n.args, None)[:3]
    made = e.op("FusedMatMul", e.value(x), e.value(w), domain=CONTRIB, transB=1)
    return made if bias is None else e.op("Add", made, e.value(bias))


def rotary(e: Emitter, n: Node) -> str:
    x, cos, sin, heads = n.args
    return e.op("RotaryEmbedding", e.value(x), e.operand(cos, e.dtype(n)), e.operand(sin, e.dtype(n)), num_heads=heads)


def rms_norm(e: Emitter, n: Node) -> str:
    x, gain, eps = rms_norm_args(n)
    return e.op("RMSNormalization", e.value(x), gain_of(e, n, gain), axis=-1, epsilon=eps)


RULES: dict[Any, Rule] = PLAIN | {
    LINEAR: linear,
    RMS_NORM: rms_norm,
    ROTARY: rotary,
    ATTENTION: attention,
    CACHED_ATTENTION: cached_attention,
    aten.silu.default: lambda e, n: e.op("QuickGelu", e.value(n.args[0]), domain=CONTRIB, alpha=1.0),
}
assert torch
