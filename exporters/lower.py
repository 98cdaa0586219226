"""Lowering of the operators that every target spells alike, in plain ONNX."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from mmopt.exporters.emit import Emitter, Rule
from torch.fx import Node

from mmopt.graph import (
    ADD,
    ARANGE,
    CAT,
    CONV2D,
    EMBEDDING,
    EXPAND,
    FULL,
    LAYER_NORM,
    MUL,
    PERMUTE,
    RESHAPE,
    RMS_NORM,
    ROTARY,
    SLICE,
    WHERE,
    aten,
    shape_of,
)  # fmt: skip


def unary(kind: str) -> Rule:
    return lambda e, n: e.op(kind, e.value(n.args[0]))


def binary(kind: str, compares: bool = False) -> Rule:
    def rule(e: Emitter, n: Node) -> str:
        dtype = common_dtype(e, n) if compares else e.dtype(n)
        return e.op(kind, *(e.operand(a, dtype) for a in n.args[:2]))

    return rule


def logical(kind: str) -> Rule:
    def rule(e: Emitter, n: Node) -> str:
        if any(e.dtype(a) != torch.bool for a in n.all_input_nodes):
            raise e.error("only truth values are supported, not bits of numbers")
        return e.op(kind, *(e.operand(a, torch.bool) for a in n.args))

    return rule


def common_dtype(e: Emitter, n: Node) -> torch.dtype:
    """The dtype in which two operands are compared: the wider one; a number takes that of the tensor."""
    kinds = [e.dtype(a) for a in n.args[:2] if isinstance(a, Node)]
    return torch.promote_types(kinds[0], kinds[-1])


def silu(e: Emitter, n: Node) -> str:
    x = e.value(n.args[0])
    return e.op("Mul", x, e.op("Sigmoid", x))


def to(e: Emitter, n: Node) -> str:
    return e.cast(e.value(n.args[0]), e.dtype(n.args[0]), e.dtype(n))


def reshape(e: Emitter, n: Node) -> str:
    return e.op("Reshape", e.value(n.args[0]), e.shape(shape_of(n), shape_of(n.args[0])))


def slice_(e: Emitter, n: Node) -> str:
    x, dim, lo, hi, *step = n.args
    steps = [e.ints(step)] if step else []
    return e.op("Slice", e.value(x), e.size(lo or 0), e.size(hi), e.ints([dim]), *steps)


def arange(e: Emitter, n: Node) -> str:
    lo, hi = n.args[:2]
    counted = e.op("Range", e.scalar(lo), e.scalar(hi), e.scalar(1))
    return e.cast(counted, torch.int64, e.dtype(n))


def full(e: Emitter, n: Node) -> str:
    return e.op("Expand", e.number(n.args[1], e.dtype(n)), e.shape(shape_of(n)))


def where(e: Emitter, n: Node) -> str:
    return e.op("Where", e.value(n.args[0]), e.operand(n.args[1], e.dtype(n)), e.operand(n.args[2], e.dtype(n)))


def arguments(n: Node, required: int, *defaults: Any) -> tuple:
    """The arguments of a node, with defaults for those at the end that are not given."""
    return (*n.args, *defaults[len(n.args) - required :])


def conv2d(e: Emitter, n: Node) -> str:
    x, w, bias, stride, padding, dilation, groups = arguments(n, 2, None, [1, 1], [0, 0], [1, 1], 1)
    ins = [e.value(x), e.value(w)] + ([] if bias is None else [e.value(bias)])
    pads = list(padding) * 2
    return e.op("Conv", *ins, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


def argmax(e: Emitter, n: Node) -> str:
    x, dim, keep = arguments(n, 1, None, False)
    if dim is None:
        raise e.error("argmax over all dimensions is not supported")
    return e.op("ArgMax", e.value(x), axis=dim, keepdims=int(keep))


def layer_norm(e: Emitter, n: Node) -> str:
    x, size, gain, bias, eps = arguments(n, 2, None, None, 1e-5)[:5]
    ins = [e.value(x), gain_of(e, n, gain)] + ([] if bias is None else [e.value(bias)])
    return e.op("LayerNormalization", *ins, axis=-len(size), epsilon=eps)


def gain_of(e: Emitter, n: Node, gain: Any) -> str:
    """The gain of a norm; ones where a pass moved it elsewhere."""
    if gain is not None:
        return e.operand(gain, e.dtype(n))
    return e.constant(torch.ones([int(s) for s in n.args[1]], dtype=e.dtype(n)))


def rms_norm(e: Emitter, n: Node) -> str:
    x, size, gain, eps = arguments(n, 2, None, None)
    eps = torch.finfo(n.meta["dtype"]).eps if eps is None else float(eps)
    return e.op("RMSNormalization", e.value(x), gain_of(e, n, gain), axis=-len(size), epsilon=eps)


def rotary(e: Emitter, n: Node) -> str:
    x, cos, sin, heads = n.args
    return e.op("RotaryEmbedding", e.value(x), e.operand(cos, e.dtype(n)), e.operand(sin, e.dtype(n)), num_heads=heads)


def attention_args(n: Node) -> tuple[Any, ...]:
    """q, k, v, heads, kv_heads, key_mask, causal, scale."""
    q, k, v, heads, kv_heads, key_mask, causal, scale = arguments(n, 5, None, False, None)
    return q, k, v, heads, kv_heads, key_mask, causal, _scale(q, heads, scale)


def cached_attention_args(n: Node) -> tuple[Any, ...]:
    """q, k, v, key_cache, value_cache, past, heads, kv_heads, scale, slopes."""
    q, k, v, key_cache, value_cache, past, heads, kv_heads, scale, slopes = arguments(n, 8, None, None)
    return q, k, v, key_cache, value_cache, past, heads, kv_heads, _scale(q, heads, scale), slopes


def _scale(q: Any, heads: Any, scale: Any) -> float:
    return float(scale) if scale is not None else (int(shape_of(q)[-1]) // heads) ** -0.5


def attention_mask(e: Emitter, q: Node, k: Node, key_mask: Node | None, causal: bool) -> str | None:
    """The mask of attention without a cache, [1 or B, 1, rows or 1, keys], True where a key is seen."""
    mask = None if key_mask is None else e.op("Unsqueeze", e.value(key_mask), e.ints([1, 2]))
    if causal:  # aligned lower right: query i sees key j when j <= i + keys - rows
        rows, keys = shape_of(q)[1], shape_of(k)[1]
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


def column_of_heads(e: Emitter, slopes: Node) -> str:
    """ALiBi's slopes ``[heads]`` as ``[1, heads, 1, 1]``; a softmax does not see what all keys have in common, so slope
    times place of the key does for slope times distance."""
    return e.op("Reshape", e.operand(slopes, e.dtype(slopes)), e.ints([1, -1, 1, 1]))


def cross_attention(attend: Callable[..., str]) -> Rule:
    """All rows over all blocks with a dense mask. `attend(e, q, k, v, heads, kv_heads, mask, scale)` on flat rows."""

    def rule(e: Emitter, n: Node) -> str:
        q, k, v, seen, attends, heads, kv_heads, scale = arguments(n, 7, None)
        kind, rows = e.dtype(q), int(shape_of(k)[2])
        sees = e.op("ReduceMax", e.cast(e.value(seen), torch.bool, torch.int32), e.ints([-1]), keepdims=1)
        none = e.op("Equal", sees, e.number(0, torch.int32))  # sees no block: all keys weigh the same
        mask = e.op("Unsqueeze", e.op("Or", e.value(seen), none), e.ints([3]))
        wide = e.op("Concat", e.op("Shape", e.value(seen)), e.ints([rows]), axis=0)
        mask = e.op("Unsqueeze", e.op("Reshape", e.op("Expand", mask, wide), e.ints([0, 0, -1])), e.ints([1]))
        plain = e.op("Mul", e.value(q), e.cast(e.op("Not", none), torch.bool, kind))
        keys, values = (e.op("Reshape", e.value(x), e.ints([0, -1, int(shape_of(x)[3])])) for x in (k, v))
        width = int(shape_of(q)[-1])
        out = attend(e, plain, keys, values, heads, kv_heads, mask, _scale(q, heads, scale), width)
        return e.op("Mul", out, e.cast(e.op("Unsqueeze", e.value(attends), e.ints([2])), torch.bool, kind))

    return rule


def masked_attention(e: Emitter, n: Node) -> str:
    """Attention of ``[B, heads, rows, d]`` with a mask of its own, left as traced."""
    q, k, v, mask, _, causal, scale, _ = arguments(n, 3, None, 0.0, False, None, False)
    if causal or mask is None:
        raise e.error("attention left as traced needs a mask and no causality")
    return e.op("Attention", *(e.value(x) for x in (q, k, v, mask)), scale=_scale(q, 1, scale))


def segment_attention(attend: Callable[..., str]) -> Rule:
    """Rows gathered into segments, attention over the keys of each, rows gathered back; a row of zeros for the rest."""

    def rule(e: Emitter, n: Node) -> str:
        q, k, v, segment_rows, row_segments, heads, kv_heads, mask, scale = arguments(n, 7, None, None)
        width = int(shape_of(q)[-1])
        parts = e.op("Gather", e.op("Reshape", e.value(q), e.ints([-1, width])), e.value(segment_rows))
        keys = None if mask is None else e.op("Unsqueeze", e.value(mask), e.ints([1, 2]))
        out = attend(e, parts, e.value(k), e.value(v), heads, kv_heads, keys, _scale(q, heads, scale), width)
        zeros = e.constant(torch.zeros(1, width, dtype=e.dtype(n)))
        places = e.op("Concat", e.op("Reshape", out, e.ints([-1, width])), zeros, axis=0)
        return e.op("Gather", places, e.value(row_segments))

    return rule


def scattered_attention(e: Emitter, n: Node) -> tuple:
    """Attention with a cache in standard operators: rows into the caches, then over the whole capacity with a mask."""
    q, k, v, key_cache, value_cache, past, heads, kv_heads, scale, slopes = cached_attention_args(n)
    keys, values = (
        e.op("TensorScatter", e.value(cache), heads_of(e, x, kv_heads), e.value(past), axis=-2)
        for cache, x in ((key_cache, k), (value_cache, v))
    )
    rows, capacity = e.op("Range", e.scalar(0), e.scalar(shape_of(q)[1]), e.scalar(1)), int(shape_of(key_cache)[2])
    positions = e.op("Add", e.op("Reshape", e.value(past), e.ints([-1, 1])), rows)
    slots = e.constant(torch.arange(capacity))
    mask = e.op("LessOrEqual", slots, e.op("Unsqueeze", positions, e.ints([1, 3])))  # [B, 1, rows, capacity]
    if slopes is not None:
        bias = e.op("Mul", column_of_heads(e, slopes), e.cast(slots, torch.int64, e.dtype(n.args[0])))
        mask = e.op("Where", mask, bias, e.number(torch.finfo(e.dtype(n.args[0])).min, e.dtype(n.args[0])))
    out = e.op("Attention", heads_of(e, q, heads), keys, values, mask, scale=scale)
    return flat(e, out, int(shape_of(q)[-1])), keys, values


def clamp(e: Emitter, n: Node) -> str:
    out, dtype = e.value(n.args[0]), e.dtype(n)
    for kind, bound in zip(("Max", "Min"), n.args[1:], strict=False):
        out = out if bound is None else e.op(kind, out, e.number(bound, dtype))
    return out


PLAIN: dict[Any, Rule] = {
    operator.getitem: lambda e, n: e.values[n.args[0]][n.args[1]],
    RESHAPE: reshape,
    PERMUTE: lambda e, n: e.op("Transpose", e.value(n.args[0]), perm=list(n.args[1])),
    EXPAND: lambda e, n: e.op("Expand", e.value(n.args[0]), e.shape(shape_of(n))),
    SLICE: slice_,
    CAT: lambda e, n: e.op("Concat", *(e.operand(a, e.dtype(n)) for a in n.args[0]), axis=n.args[1]),
    FULL: full,
    ARANGE: arange,
    WHERE: where,
    EMBEDDING: lambda e, n: e.op("Gather", e.value(n.args[0]), e.value(n.args[1])),
    CONV2D: conv2d,
    LAYER_NORM: layer_norm,
    RMS_NORM: rms_norm,
    ROTARY: rotary,
    aten.to.dtype: to,
    aten.argmax.default: argmax,
    aten.clamp.default: clamp,
    aten.silu.default: silu,
    aten.scaled_dot_product_attention.default: masked_attention,
    aten.softmax.int: lambda e, n: e.op("Softmax", e.value(n.args[0]), axis=n.args[1]),
    aten.gelu.default: lambda e, n: e.op(
        "Gelu", e.value(n.args[0]), approximate=n.args[1] if len(n.args) > 1 else "none"
    ),
    ADD: binary("Add"),
    MUL: binary("Mul"),
    aten.sub.Tensor: binary("Sub"),
    aten.div.Tensor: binary("Div"),
}
PLAIN |= {
    getattr(aten, name).default: unary(kind)
    for name, kind in {
        "sigmoid": "Sigmoid", "tanh": "Tanh", "cos": "Cos", "sin": "Sin", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
        "neg": "Neg", "abs": "Abs", "relu": "Relu", "erf": "Erf", "reciprocal": "Reciprocal",
    }.items()
}  # fmt: skip
for _name, _kind in {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}.items():
    PLAIN |= {getattr(getattr(aten, _name), o): binary(_kind, compares=True) for o in ("Tensor", "Scalar")}
_LOGICAL = {
    "And": (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor),
    "Or": (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor),
    "Not": (aten.logical_not.default, aten.bitwise_not.default),
}
PLAIN |= {op: logical(kind) for kind, ops in _LOGICAL.items() for op in ops}
