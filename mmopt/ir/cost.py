"""FLOPs, bytes of weights and rows of caches of one call, counted from shapes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import sympy
from torch.fx import Node

from mmopt.ir.graph import (
    ATTENTION,
    CACHED_ATTENTION,
    CONV2D,
    CROSS_ATTENTION,
    EMBEDDING,
    LINEAR,
    SEGMENT_ATTENTION,
    SLICE,
    aten,
    several,
    shape_of,
)
from mmopt.ir.printer import op_name
from mmopt.ir.stage import Stage, live_constants

MATMULS = {aten.matmul.default, aten.mm.default, aten.bmm.default}


@dataclasses.dataclass
class Work:
    """What one call of a stage costs. `flops` include `attention_flops`; `cache_bytes` are cache rows read."""

    flops: int = 0
    attention_flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0


class Sizes:
    """Puts numbers in for the symbols of shapes."""

    def __init__(self, values: dict[str, int]):
        self.values, self.known = values, {}  # type: ignore[var-annotated]

    def __call__(self, size: Any) -> int:
        if not isinstance(size, sympy.Expr):
            return int(size)
        if size not in self.known:
            if missing := {s.name for s in size.free_symbols} - set(self.values):  # type: ignore[attr-defined]
                raise ValueError(f"size {size}: no number is given for {', '.join(sorted(missing))}")
            self.known[size] = int(size.subs({s: self.values[s.name] for s in size.free_symbols}))  # type: ignore[attr-defined]
        return self.known[size]

    def shape(self, n: Node) -> tuple[int, ...]:
        """Shape of a node; of the first output if it has several."""
        shape = shape_of(n)
        return tuple(self(s) for s in (shape[0] if several(n.meta["dtype"]) else shape))  # type: ignore[union-attr]

    def count(self, n: Node) -> int:
        return math.prod(self.shape(n))


def count_work(stage: Stage, sizes: dict[str, int], past: int = 0) -> Work:
    """Cost of one call with numbers for the symbols (``{"B": 1, "nv": 0, "nt": 1}``) and `past` rows in the caches.

    Raises ValueError if a symbol of the stage has no number.
    """
    of, work = Sizes(sizes), Work()
    for n in stage.graph.nodes:
        if n.op != "call_function" or n.meta["const"]:
            continue
        flops = _flops(n, of, past)
        work.flops += flops
        if "attention" in op_name(n):
            work.attention_flops += flops
        if n.target is SEGMENT_ATTENTION or (n.target is CROSS_ATTENTION and n.args[1].op == "placeholder"):  # type: ignore[union-attr]
            work.cache_bytes += sum(of.count(x) * x.meta["dtype"].itemsize for x in n.args[1:3])  # type: ignore[union-attr,misc,arg-type]
        if n.target is CACHED_ATTENTION:
            batch, kv_heads, _, head_dim = of.shape(n.args[3])  # type: ignore[arg-type]
            seen = past + of.shape(n.args[0])[1]  # type: ignore[arg-type]
            work.cache_bytes += 2 * batch * kv_heads * seen * head_dim * n.args[3].meta["dtype"].itemsize  # type: ignore[union-attr]
    work.weight_bytes = sum(_bytes_read(c, of) for c in live_constants(stage))
    return work


def _flops(n: Node, of: Sizes, past: int) -> int:
    op, args = n.target, n.args
    if op is LINEAR or op in MATMULS:
        return 2 * of.count(n) * of.shape(args[0])[-1]  # type: ignore[arg-type]
    if op is CONV2D or op_name(n) in ("conv1d", "conv3d"):
        return 2 * of.count(n) * math.prod(of.shape(args[1])[1:])  # type: ignore[arg-type]
    if op_name(n).startswith("conv_transpose"):
        return 2 * of.count(args[0]) * math.prod(of.shape(args[1])[1:])  # type: ignore[arg-type]
    if op is CACHED_ATTENTION:
        batch, rows, width = of.shape(args[0])  # type: ignore[arg-type]
        if len(args) > 10 and args[10] is not None:  # a mask that is not known
            return 4 * batch * width * rows * (past + rows)
        return 4 * batch * width * (rows * past + rows * (rows + 1) // 2)
    if op is CROSS_ATTENTION:
        (batch, rows, width), (_, blocks, keys, _) = of.shape(args[0]), of.shape(args[1])  # type: ignore[arg-type]
        return 4 * batch * width * rows * blocks * keys
    if op is SEGMENT_ATTENTION:
        (count, keys, _), length = of.shape(args[1]), of.shape(args[3])[1]  # type: ignore[arg-type]
        return 4 * count * length * keys * of.shape(args[0])[2]  # type: ignore[arg-type]
    if op is ATTENTION:
        (batch, rows, width), keys = of.shape(args[0]), of.shape(args[1])[1]  # type: ignore[arg-type]
        causal = len(args) > 6 and args[6]
        pairs = rows * (keys - rows) + rows * (rows + 1) // 2 if causal else rows * keys
        return 4 * batch * width * pairs
    if "scaled_dot_product" in op_name(n):  # left as traced, so it has a mask of its own: dense
        return 2 * (of.count(args[0]) + of.count(n)) * of.shape(args[1])[-2]  # type: ignore[arg-type]
    return 0


def _bytes_read(constant: Node, of: Sizes) -> int:
    """Bytes of a live constant that one call reads: look-ups and slices read their rows, other nodes all of it."""
    whole, most = of.count(constant), 0
    for user in constant.users:
        if user.op == "output":
            most = whole
        elif not user.meta["const"] and of.count(user):
            few = user.target in (EMBEDDING, SLICE) and user.args[0] is constant
            most = max(most, min(whole, of.count(user)) if few else whole)
    return most * constant.meta["dtype"].itemsize
