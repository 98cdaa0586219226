"""The arguments of the attention operators by name, in the order of their schemas.

``CachedAttention.of(node).past`` reads an argument of a node; ``CachedAttention(*args)`` does so for arguments that
have been mapped into another graph, and `given` turns a view into arguments again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Node

from mmopt.ir.graph import shape_of


class Attention(NamedTuple):
    """Arguments of `ops.attention`."""

    q: Node
    k: Node
    v: Node
    heads: int
    kv_heads: int
    key_mask: Node | None = None
    causal: bool = False
    scale: float | None = None

    @classmethod
    def of(cls, node: Node) -> Attention:
        return cls(*node.args)  # type: ignore[arg-type]


class CachedAttention(NamedTuple):
    """Arguments of `ops.cached_attention`."""

    q: Node
    k: Node
    v: Node
    key_cache: Node
    value_cache: Node
    past: Node
    heads: int
    kv_heads: int
    scale: float | None = None
    slopes: Node | None = None
    key_mask: Node | None = None

    @classmethod
    def of(cls, node: Node) -> CachedAttention:
        return cls(*node.args)  # type: ignore[arg-type]


class CrossAttention(NamedTuple):
    """Arguments of `ops.cross_attention`."""

    q: Node
    k: Node
    v: Node
    seen: Node
    attends: Node
    heads: int
    kv_heads: int
    scale: float | None = None

    @classmethod
    def of(cls, node: Node) -> CrossAttention:
        return cls(*node.args)  # type: ignore[arg-type]


class SegmentAttention(NamedTuple):
    """Arguments of `ops.segment_attention`."""

    q: Node
    k: Node
    v: Node
    segment_rows: Node
    row_segments: Node
    heads: int
    kv_heads: int
    key_mask: Node | None = None
    scale: float | None = None

    @classmethod
    def of(cls, node: Node) -> SegmentAttention:
        return cls(*node.args)  # type: ignore[arg-type]


AnyAttention = Attention | CachedAttention | CrossAttention | SegmentAttention


def softmax_scale(a: AnyAttention) -> float:
    """What scores are multiplied by: the scale that is given, else one over the root of a head's width."""
    return float(a.scale) if a.scale is not None else (int(shape_of(a.q)[-1]) // a.heads) ** -0.5


def given(a: AnyAttention) -> tuple[Any, ...]:
    """The arguments without the None at their end, as they stand in a graph that was traced."""
    args = tuple(a)
    while args[-1] is None:
        args = args[:-1]
    return args
