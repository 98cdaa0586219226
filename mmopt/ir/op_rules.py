"""What the compiler knows of each operator: one flat table, an entry an operator.

Where an operator works row by row, a rewrite may run it on a part of its rows (`mmopt.rewrite.row_parts`). Pointwise
operators of aten need no entry. Other operators of aten without one are taken to mix all rows and to take no FLOPs;
operators of our own (``torch.ops.mmopt``) must have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from mmopt.ir.attention_args import Attention, CachedAttention, CrossAttention, SegmentAttention
from mmopt.ir.graph import (
    ATTENTION,
    CACHED_ATTENTION,
    CAT,
    CONV2D,
    CROSS_ATTENTION,
    EMBEDDING,
    EXPAND,
    FULL,
    LAYER_NORM,
    LINEAR,
    PERMUTE,
    RESHAPE,
    RMS_NORM,
    ROTARY,
    SEGMENT_ATTENTION,
    SLICE,
    Builder,
    Size,
    Sizes,
    aten,
    is_pointwise,
    shape_of,
    simplify,
)

Dims = dict[int, Any] | None  # see `operand_dims`


@dataclass(frozen=True)
class OpRule:
    """One operator. The defaults are those of an operator that mixes all rows and makes no products.

    dims: (node, output dimension) -> `Dims`. flops: (node, numbers for sizes, rows in the caches) -> FLOPs of one call,
    2 for a multiplication and an addition; cache_bytes: bytes of cached keys and values that it reads, alike.
    heavy: worth hoisting and joining (a product with weights, or attention). needs_rows: kernels refuse operands
    without rows.
    """

    dims: Callable[[Node, int], Dims] = lambda n, dim: None
    flops: Callable[[Node, Sizes, int], int] = lambda n, of, past: 0
    cache_bytes: Callable[[Node, Sizes, int], int] = lambda n, of, past: 0
    heavy: bool = False
    needs_rows: bool = False


def rule_of(op: Any) -> OpRule:
    """LookupError names an operator of ours that has no entry."""
    if op in RULES:
        return RULES[op]
    if getattr(op, "namespace", "") == "mmopt":
        raise LookupError(f"operator {op} has no entry in RULES of mmopt/ir/op_rules.py")
    return POINTWISE if is_pointwise(op) else UNKNOWN


# ------------------------------------------------------------------------------------- independence along dimensions
def operand_dims(node: Node, dim: int) -> Dims:
    """For each tensor argument of `node`: the dimension that output dimension `dim` runs along; None = no rule.

    An argument that is read whole whatever part of `dim` is wanted (a weight, a broadcast operand) is mapped to None.
    For cat, argument 0 maps to the list of its members' dimensions. Example: rows of ``linear(x, w, b)``, dimension 1
    of ``[B, rows, width]``, are ``{0: 1, 1: None, 2: None}``; its columns are ``{0: None, 1: 0, 2: 0}``.
    """
    rule = rule_of(node.target)
    return rule.dims(node, dim) if isinstance(node.meta["shape"], tuple) else None


def on_part(b: Builder, node: Node, dim: int, size: Size, args: tuple, source: Any = None) -> Node:
    """`node` again, on arguments of which only a part of output dimension `dim`, `size` long, is wanted."""
    shape = list(shape_of(node))
    shape[dim] = size
    if node.target in (EXPAND, RESHAPE):
        args = (args[0], tuple(simplify(s) for s in shape))
    if node.target is FULL:
        args = (tuple(simplify(s) for s in shape), *args[1:])
    return b.emit(node.target, args, shape, node.meta["dtype"], source)


def rank(n: Node) -> int:
    return len(shape_of(n))


def broadcast(n: Node, x: Any, dim: int) -> int | None:
    """The dimension of operand `x` that output dimension `dim` runs along; None if it is broadcast along it."""
    d = dim - (rank(n) - rank(x))
    return None if d < 0 or (shape_of(x)[d] == 1 and shape_of(n)[dim] != 1) else d


def along(most: int, *whole: int) -> Callable[[Node, int], Dims]:
    """Dimensions before `most` (from the end if negative) are those of argument 0; arguments `whole` are read whole."""

    def dims(n: Node, dim: int) -> Dims:
        before = most if most > 0 else rank(n) + most
        return {0: dim, **dict.fromkeys(whole)} if dim < before else None

    return dims


def slice_dims(n: Node, dim: int) -> Dims:
    return {0: dim} if dim != n.args[1] else None


def cat_dims(n: Node, dim: int) -> Dims:
    return {0: [dim] * len(n.args[0])} if dim != n.args[1] else None  # type: ignore[arg-type]


def expand_dims(n: Node, dim: int) -> Dims:
    return {0: broadcast(n, n.args[0], dim)}


def permute_dims(n: Node, dim: int) -> Dims:
    return {0: n.args[1][dim]}  # type: ignore[index]


def reshape_dims(n: Node, dim: int) -> Dims:
    """Dimension `dim` of a reshape survives if what lies before it holds equally many elements in both shapes."""
    old, new = shape_of(n.args[0]), shape_of(n)  # type: ignore[arg-type]
    i = j = 0
    while i < len(old) and j < len(new):
        if simplify(sympy.Mul(*old[:i]) - sympy.Mul(*new[:j])) == 0 and old[i] == new[j] and j == dim:
            return {0: i}
        if old[i] == 1 and new[j] != 1:
            i += 1
        elif new[j] == 1 and old[i] != 1:
            j += 1
        elif old[i] == new[j]:
            i, j = i + 1, j + 1
        else:
            break
    i, j = len(old), len(new)  # the same from the right
    while i > 0 and j > 0 and old[i - 1] == new[j - 1]:
        i, j = i - 1, j - 1
        if j == dim:
            return {0: i}
    return None


def linear_dims(n: Node, dim: int) -> Dims:
    return {0: dim, 1: None, 2: None} if dim < rank(n) - 1 else {0: None, 1: 0, 2: 0}


def embedding_dims(n: Node, dim: int) -> Dims:
    return {0: None, 1: dim} if dim < rank(n) - 1 else None


def rotary_dims(n: Node, dim: int) -> Dims:
    return {0: dim, 1: broadcast(n, n.args[1], dim), 2: broadcast(n, n.args[2], dim)} if dim < 2 else None


def attention_dims(n: Node, dim: int) -> Dims:
    if dim == 0:
        return named(Attention, q=0, k=0, v=0, key_mask=0)
    return named(Attention, q=1, k=None, v=None, key_mask=None) if dim == 1 and not Attention.of(n).causal else None


def cross_attention_dims(n: Node, dim: int) -> Dims:
    if dim == 0:
        return named(CrossAttention, q=0, k=0, v=0, seen=0, attends=0)
    return named(CrossAttention, q=1, k=None, v=None, seen=1, attends=1) if dim == 1 else None


def named(view: Any, **dims: int | None) -> dict[int, int | None]:
    """`Dims` by the names of arguments."""
    return {view._fields.index(k): d for k, d in dims.items()}


def reduced_along(place: int) -> Callable[[Node, int], Dims]:
    """For a reduction; argument `place` says along which dimensions, none: along all."""

    def dims(n: Node, dim: int) -> Dims:
        whole = rank(n.args[0])  # type: ignore[arg-type]
        gone = {d % whole for d in (n.args[place] if len(n.args) > place else None) or range(whole)}  # type: ignore[union-attr,operator]
        kept = [d for d in range(whole) if d not in gone or rank(n) == whole]
        return {0: kept[dim]} if kept[dim] not in gone else None

    return dims


def pointwise_dims(n: Node, dim: int) -> Dims:
    return {i: broadcast(n, a, dim) for i, a in enumerate(n.args) if isinstance(a, Node)}


# --------------------------------------------------------------------------------------------------------------- FLOPs
def product_flops(n: Node, of: Sizes, past: int) -> int:
    return 2 * of.count(n) * of.shape(n.args[0])[-1]  # type: ignore[arg-type]


def conv_flops(n: Node, of: Sizes, past: int) -> int:
    return 2 * of.count(n) * math.prod(of.shape(n.args[1])[1:])  # type: ignore[arg-type]


def conv_transpose_flops(n: Node, of: Sizes, past: int) -> int:
    return 2 * of.count(n.args[0]) * math.prod(of.shape(n.args[1])[1:])  # type: ignore[arg-type]


def attention_flops(n: Node, of: Sizes, past: int) -> int:
    a = Attention.of(n)
    (batch, rows, width), keys = of.shape(a.q), of.shape(a.k)[1]
    return 4 * batch * width * (rows * (keys - rows) + rows * (rows + 1) // 2 if a.causal else rows * keys)


def cached_attention_flops(n: Node, of: Sizes, past: int) -> int:
    a = CachedAttention.of(n)
    batch, rows, width = of.shape(a.q)
    if a.key_mask is not None:  # a mask that is not known
        return 4 * batch * width * rows * (past + rows)
    return 4 * batch * width * (rows * past + rows * (rows + 1) // 2)


def cross_attention_flops(n: Node, of: Sizes, past: int) -> int:
    a = CrossAttention.of(n)
    (batch, rows, width), (_, blocks, keys, _) = of.shape(a.q), of.shape(a.k)
    return 4 * batch * width * rows * blocks * keys


def segment_attention_flops(n: Node, of: Sizes, past: int) -> int:
    a = SegmentAttention.of(n)
    (count, keys, _), length = of.shape(a.k), of.shape(a.segment_rows)[1]
    return 4 * count * length * keys * of.shape(a.q)[2]


def traced_attention_flops(n: Node, of: Sizes, past: int) -> int:
    """Attention left as traced has a mask of its own: dense."""
    return 2 * (of.count(n.args[0]) + of.count(n)) * of.shape(n.args[1])[-2]  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- bytes of caches
def cached_bytes(n: Node, of: Sizes, past: int) -> int:
    a = CachedAttention.of(n)
    batch, kv_heads, _, head_dim = of.shape(a.key_cache)
    return 2 * batch * kv_heads * (past + of.shape(a.q)[1]) * head_dim * a.key_cache.meta["dtype"].itemsize


def segment_bytes(n: Node, of: Sizes, past: int) -> int:
    a = SegmentAttention.of(n)
    return sum(of.count(x) * x.meta["dtype"].itemsize for x in (a.k, a.v))


def cross_bytes(n: Node, of: Sizes, past: int) -> int:
    """Keys and values that an earlier call made; those made in this call are no cache."""
    a = CrossAttention.of(n)
    return sum(of.count(x) * x.meta["dtype"].itemsize for x in (a.k, a.v)) if a.k.op == "placeholder" else 0


# ----------------------------------------------------------------------------------------------------------- the table
POINTWISE, UNKNOWN = OpRule(pointwise_dims), OpRule()

RULES: dict[Any, OpRule] = {
    SLICE: OpRule(slice_dims),
    CAT: OpRule(cat_dims),
    EXPAND: OpRule(expand_dims),
    PERMUTE: OpRule(permute_dims),
    RESHAPE: OpRule(reshape_dims),
    FULL: OpRule(lambda n, dim: {}),
    EMBEDDING: OpRule(embedding_dims),
    LINEAR: OpRule(linear_dims, product_flops, heavy=True),
    LAYER_NORM: OpRule(along(-1, 2, 3)),
    RMS_NORM: OpRule(along(-1, 2, 3)),
    ROTARY: OpRule(rotary_dims, needs_rows=True),
    ATTENTION: OpRule(attention_dims, attention_flops, heavy=True, needs_rows=True),
    CROSS_ATTENTION: OpRule(cross_attention_dims, cross_attention_flops, cross_bytes, heavy=True),
    CACHED_ATTENTION: OpRule(flops=cached_attention_flops, cache_bytes=cached_bytes, heavy=True),
    SEGMENT_ATTENTION: OpRule(flops=segment_attention_flops, cache_bytes=segment_bytes, heavy=True),
    CONV2D: OpRule(along(1, 1, 2), conv_flops, heavy=True),
    aten.group_norm.default: OpRule(along(1, 2, 3)),
    aten.upsample_nearest2d.default: OpRule(along(2)),
    aten.upsample_nearest2d.vec: OpRule(along(2)),
    aten.pixel_shuffle.default: OpRule(along(-3)),
    aten.linalg_vector_norm.default: OpRule(reduced_along(2)),
    aten.scaled_dot_product_attention.default: OpRule(flops=traced_attention_flops),
}
for _ops, _rule in {
    (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default): OpRule(reduced_along(1)),
    (aten.matmul.default, aten.mm.default, aten.bmm.default): OpRule(flops=product_flops),
    (aten.conv1d.default, aten.conv1d.padding, aten.conv3d.default, aten.conv3d.padding): OpRule(flops=conv_flops),
    (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input): OpRule(
        flops=conv_transpose_flops
    ),
}.items():
    RULES |= dict.fromkeys(_ops, _rule)
