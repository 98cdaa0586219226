"""Along which dimensions an operator works part by part, and the operator on one part."""

from __future__ import annotations

from typing import Any

import sympy
from torch.fx import Node

from mmopt.ir.graph import (
    ATTENTION,
    CAT,
    CONV2D,
    CROSS_ATTENTION,
    EMBEDDING,
    EXPAND,
    FULL,
    GROUP_NORM,
    LAYER_NORM,
    LINEAR,
    PERMUTE,
    PIXEL_SHUFFLE,
    REDUCTIONS,
    RESHAPE,
    RMS_NORM,
    ROTARY,
    SLICE,
    UPSAMPLE,
    Builder,
    Size,
    is_pointwise,
    shape_of,
    simplify,
)


# ------------------------------------------------------------------------------------- independence along dimensions
def operand_dims(node: Node, dim: int) -> dict[int, Any] | None:
    """For each tensor argument of `node`: the dimension that output dimension `dim` runs along; None = no rule.

    An argument that is read whole whatever part of `dim` is wanted (a weight, a broadcast operand) is mapped to None.
    For cat, argument 0 maps to the list of its members' dimensions.
    """
    op, args, shape = node.target, node.args, node.meta["shape"]
    if not isinstance(shape, tuple):
        return None
    rank = len(shape)

    def broadcast(x: Any) -> int | None:
        d = dim - (rank - len(shape_of(x)))
        return None if d < 0 or (shape_of(x)[d] == 1 and shape[dim] != 1) else d

    if op is SLICE:
        return {0: dim} if dim != args[1] else None
    if op is CAT:
        return {0: [dim] * len(args[0])} if dim != args[1] else None
    if op is EXPAND:
        return {0: broadcast(args[0])}
    if op is PERMUTE:
        return {0: args[1][dim]}
    if op is RESHAPE:
        return _reshape_dim(shape_of(args[0]), shape, dim)
    if op is LINEAR:
        if dim < rank - 1:
            return {0: dim, 1: None, 2: None}
        return {0: None, 1: 0, 2: 0}
    if op in (LAYER_NORM, RMS_NORM):
        return {0: dim, 2: None, 3: None} if dim < rank - 1 else None
    if op is EMBEDDING:
        return {0: None, 1: dim} if dim < rank - 1 else None
    if op is ROTARY:
        return {0: dim, 1: broadcast(args[1]), 2: broadcast(args[2])} if dim < 2 else None
    if op is ATTENTION:
        if dim == 0:
            return {0: 0, 1: 0, 2: 0, 5: 0}
        causal = len(args) > 6 and args[6]
        return {0: 1, 1: None, 2: None, 5: None} if dim == 1 and not causal else None
    if op is CROSS_ATTENTION:
        rules: dict[int, dict[int, Any]] = {0: {0: 0, 1: 0, 2: 0, 3: 0, 4: 0}, 1: {0: 1, 1: None, 2: None, 3: 1, 4: 1}}
        return rules.get(dim)
    if op is CONV2D:
        return {0: 0, 1: None, 2: None} if dim == 0 else None
    if op in UPSAMPLE:
        return {0: dim} if dim < 2 else None
    if op is GROUP_NORM:
        return {0: 0, 2: None, 3: None} if dim == 0 else None
    if op is PIXEL_SHUFFLE:
        return {0: dim} if dim < rank - 3 else None
    if op in REDUCTIONS:
        whole, place = len(shape_of(args[0])), REDUCTIONS[op]
        gone = {d % whole for d in (args[place] if len(args) > place else None) or range(whole)}
        kept = [d for d in range(whole) if d not in gone or rank == whole]
        return {0: kept[dim]} if kept[dim] not in gone else None
    if op is FULL:
        return {}
    if is_pointwise(op):
        return {i: broadcast(a) for i, a in enumerate(args) if isinstance(a, Node)}
    return None


def _reshape_dim(old: tuple, new: tuple, dim: int) -> dict[int, Any] | None:
    """Dimension `dim` of a reshape survives if what lies before it holds equally many elements in both shapes."""
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


def on_part(b: Builder, node: Node, dim: int, size: Size, args: tuple, source: Any = None) -> Node:
    """`node` again, on arguments of which only a part of output dimension `dim`, `size` long, is wanted."""
    shape = list(shape_of(node))
    shape[dim] = size
    if node.target in (EXPAND, RESHAPE):
        args = (args[0], tuple(simplify(s) for s in shape))
    if node.target is FULL:
        args = (tuple(simplify(s) for s in shape), *args[1:])
    return b.emit(node.target, args, shape, node.meta["dtype"], source)
