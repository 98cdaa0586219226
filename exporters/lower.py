"""Lowering of the operators that every target spells alike, in plain ONNX."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from mmopt.exporters.emit import Emitter, Rule
from mmopt.ir.graph import (
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
)


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
    shape = e.shape(shape_of(n), shape_of(n.args[0]))
    computed = shape not in e.initializers  # then a size of 0 is 0, it does not stand for the old one
    return e.op("Reshape", e.value(n.args[0]), shape, allowzero=1 if computed else None)


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


def group_norm(e: Emitter, n: Node) -> str:
    """Statistics of each group by InstanceNormalization of the groups as channels, then gain and bias."""
    x, groups, gain, bias, eps = arguments(n, 2, None, None, 1e-5, True)[:5]
    kind, channels = e.dtype(n), int(shape_of(x)[1])
    ones, zeros = (e.constant(torch.full([groups], v, dtype=kind)) for v in (1, 0))
    rows = e.op("Reshape", e.value(x), e.ints([0, groups, -1]))
    out = e.op("InstanceNormalization", rows, ones, zeros, epsilon=eps)
    out = e.op("Reshape", out, e.shape(shape_of(n)))
    for kind_of, by in (("Mul", gain), ("Add", bias)):
        if by is not None:
            column = e.op("Reshape", e.operand(by, kind), e.ints([1, channels] + [1] * (len(shape_of(n)) - 2)))
            out = e.op(kind_of, out, column)
    return out


def upsample(e: Emitter, n: Node) -> str:
    """Nearest neighbours, by whole factors."""
    x = n.args[0]
    factors = [int(a) / int(b) for a, b in zip(shape_of(n)[2:], shape_of(x)[2:], strict=True)]
    given = [f for a in n.args[2:] if a is not None for f in (a if isinstance(a, list | tuple) else [a])]
    if any(f is not None and f != int(f) for f in (*factors, *given)):
        raise e.error(f"only whole factors are supported, found {given or factors}")
    scales = e.constant(torch.tensor([1.0, 1.0, *factors]))
    settings = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    return e.op("Resize", e.value(x), "", scales, **settings)


def pixel_shuffle(e: Emitter, n: Node) -> str:
    return e.op("DepthToSpace", e.value(n.args[0]), blocksize=n.args[1], mode="CRD")


def mean(e: Emitter, n: Node) -> str:
    x, dims, keep = arguments(n, 1, None, False, None)[:3]
    axes = list(range(len(shape_of(x)))) if dims is None else list(dims)
    return e.op("ReduceMean", e.cast(e.value(x), e.dtype(x), e.dtype(n)), e.ints(axes), keepdims=int(keep))


def vector_norm(e: Emitter, n: Node) -> str:
    x, order, dims, keep = arguments(n, 1, 2, None, False, None)[:4]
    if order != 2 or dims is None:
        raise e.error(f"only norms of order 2 along given dimensions are supported, found {order} along {dims}")
    wide = torch.promote_types(e.dtype(n), torch.float32)  # squares overflow in float16
    made = e.op("ReduceL2", e.cast(e.value(x), e.dtype(x), wide), e.ints(dims), keepdims=int(keep))
    return e.cast(made, wide, e.dtype(n))


def reduced(kind: str) -> Rule:
    """Along given dimensions, or all; truth values are counted in the dtype of the sum."""

    def rule(e: Emitter, n: Node) -> str:
        x, dims, keep = arguments(n, 1, None, False, None)[:3]
        axes = list(dims) if dims else list(range(len(shape_of(x))))
        return e.op(kind, e.cast(e.value(x), e.dtype(x), e.dtype(n)), e.ints(axes), keepdims=int(keep))

    return rule


def subtracted_from(e: Emitter, n: Node) -> str:
    if len(n.args) > 2:
        raise e.error("only a subtraction without a factor is supported")
    return e.op("Sub", e.operand(n.args[1], e.dtype(n)), e.operand(n.args[0], e.dtype(n)))


def top_k(e: Emitter, n: Node) -> tuple:
    x, k, dim, largest, in_order = arguments(n, 2, -1, True, True)
    return e.op("TopK", e.value(x), e.size(k), outputs=2, axis=dim, largest=int(largest), sorted=int(in_order))


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


def masked_attention(e: Emitter, n: Node) -> str:
    """Attention of ``[B, heads, rows, d]`` with a mask of its own, left as traced."""
    q, k, v, mask, _, causal, scale, _ = arguments(n, 3, None, 0.0, False, None, False)
    if causal or mask is None:
        raise e.error("attention left as traced needs a mask and no causality")
    scale = int(shape_of(q)[-1]) ** -0.5 if scale is None else float(scale)
    return e.op("Attention", *(e.value(x) for x in (q, k, v, mask)), scale=scale)


def clamp(e: Emitter, n: Node) -> str:
    out, dtype = e.value(n.args[0]), e.dtype(n)
    for kind, bound in zip(("Max", "Min"), n.args[1:], strict=False):
        out = out if bound is None else e.op(kind, out, e.number(bound, dtype))
    return out


def whole_div(e: Emitter, n: Node) -> str:
    """Division of whole numbers that are not negative, rounded down, as ONNX divides them."""
    if n.args[2] != "floor" or e.dtype(n) != torch.int64:
        raise e.error(f"division rounded by {n.args[2]} is supported for whole numbers, down, only")
    return binary("Div")(e, n)


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
    aten.group_norm.default: group_norm,
    aten.upsample_nearest2d.default: upsample,
    aten.upsample_nearest2d.vec: upsample,
    aten.pixel_shuffle.default: pixel_shuffle,
    aten.mean.dim: mean,
    aten.sum.dim_IntList: reduced("ReduceSum"),
    aten.amax.default: reduced("ReduceMax"),
    aten.amin.default: reduced("ReduceMin"),
    aten.topk.default: top_k,
    aten.matmul.default: binary("MatMul"),
    aten.bmm.default: binary("MatMul"),
    aten.minimum.default: binary("Min"),
    aten.maximum.default: binary("Max"),
    aten.rsub.Scalar: subtracted_from,
    aten.rsub.Tensor: subtracted_from,
    aten.where.ScalarOther: where,
    aten.where.ScalarSelf: where,
    aten.linalg_vector_norm.default: vector_norm,
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
    aten.div.Tensor_mode: whole_div,
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
