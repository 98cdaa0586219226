"""FLOPs, bytes of weights and rows of caches of one call, counted from shapes. Rules: `mmopt.ir.op_rules`."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from mmopt.ir.graph import EMBEDDING, SLICE, Sizes
from mmopt.ir.op_rules import rule_of
from mmopt.ir.printer import op_name
from mmopt.ir.stage import Stage, live_constants


@dataclasses.dataclass
class Work:
    """What one call of a stage costs. `flops` include `attention_flops`; `cache_bytes` are cache rows read."""

    flops: int = 0
    attention_flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0


def count_work(stage: Stage, sizes: dict[str, int], past: int = 0) -> Work:
    """Cost of one call with numbers for the symbols (``{"B": 1, "nv": 0, "nt": 1}``) and `past` rows in the caches.

    Raises ValueError if a symbol of the stage has no number.
    """
    of, work = Sizes(sizes), Work()
    for n in stage.graph.nodes:
        if n.op != "call_function" or n.meta["const"]:
            continue
        rule = rule_of(n.target)
        flops = rule.flops(n, of, past)
        work.flops += flops
        work.attention_flops += flops if "attention" in op_name(n) else 0
        work.cache_bytes += rule.cache_bytes(n, of, past)
    work.weight_bytes = sum(_bytes_read(c, of) for c in live_constants(stage))
    return work


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
