"""softmax(Q K^T + mask) V = concat_j softmax(Q_j K_j^T) V_j; g * W x = (g W) x: cross-attention without mask and gates.

- softmax(s Q K^T) V written out becomes one attention operator; the scale is its attribute.
- A gate, a constant times a projection, moves into the weight of the projection.
- Which images a text row sees is known from the prompt. Where K and V are made outside (`hoist_invariants`), rows that
  see the same are put beside the keys they see, all segments in one product of equal lengths; rows that see nothing are
  left out, and a decode step reads the keys of its own image alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from mmopt.ir.attention_args import Attention, CrossAttention, SegmentAttention
from mmopt.ir.graph import (
    ATTENTION,
    CROSS_ATTENTION,
    LINEAR,
    MUL,
    PERMUTE,
    RESHAPE,
    SEGMENT_ATTENTION,
    Builder,
    aten,
    mapped,
    rebuild,
    shape_of,
    symbol,
)
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.rewrite.pass_base import Pass, Report

MATMULS = (aten.matmul.default, aten.bmm.default)
HEADS_FIRST = (0, 2, 1, 3)


class FuseCrossAttention(Pass):
    """`segments` False keeps masks as they are."""

    def __init__(self, segments: bool = True):
        self.segments = segments

    def run(self, program: Program, report: Report) -> Program:
        made = super().run(program, report)
        for name, stage in program.stages.items():
            if self.segments and any(n.target is CROSS_ATTENTION for n in stage.graph.nodes):
                cut_masks(made, name, report)
        return made

    def rewrite(self, graph: Graph, stage: str, report: Report) -> Graph:
        attentions = gates = 0

        def visit(b: Builder, n: Node, args: tuple) -> Node | None:
            nonlocal attentions, gates
            if n.target is RESHAPE and (found := written_out(args[0])) is not None:
                if isinstance(found, str):
                    report.skip(stage, f"{n.name}: {found}")
                    return None
                q, k, v, scale = found
                (batch, heads, rows, d), kv_heads = shape_of(q), shape_of(k)[1]
                alike = shape_of(k) == shape_of(v) == (batch, kv_heads, shape_of(k)[2], d)
                if not alike or shape_of(n) != (batch, rows, heads * d):
                    return None
                flat_q, flat_k, flat_v = (flat(b, x) for x in (q, k, v))
                attentions += 1
                fused = Attention(flat_q, flat_k, flat_v, heads, kv_heads, scale=scale)
                return b.emit(ATTENTION, tuple(fused), shape_of(n), n.meta["dtype"])
            if n.target is MUL and (gate := gate_of(n)) is not None:
                projection = n.args[1 - gate]
                if len(projection.users) > 1 or sum(not u.meta.get("const") for u in projection.args[1].users) > 1:
                    report.skip(stage, f"{projection.name} or its weight is read without the gate too")
                    return None
                gates += 1
                x, w, bias = (*args[1 - gate].args, None)[:3]
                g = b.reshape(args[gate], (shape_of(args[gate])[-1] if shape_of(args[gate]) else 1,))
                scaled = b.emit(MUL, (w, b.reshape(g, (shape_of(g)[0], 1))), shape_of(w), w.meta["dtype"])
                new: tuple = (x, scaled)
                if bias is not None:
                    new = (x, scaled, b.emit(MUL, (bias, g), shape_of(bias), bias.meta["dtype"]))
                return b.emit(LINEAR, new, shape_of(n), n.meta["dtype"])
            return None

        made = rebuild(graph, visit)
        if attentions:
            report.did(f"{stage}: {attentions} attentions written out became one operator each")
        if gates:
            report.did(f"{stage}: {gates} gates moved into the weights of their projections")
        if not (attentions or gates or any(n.target is CROSS_ATTENTION for n in graph.nodes)):
            report.skip(stage, "no attention over images outside the text, none written out, no gates")
        return made if attentions or gates else graph


def written_out(n: Node) -> tuple[Node, Node, Node, float] | str | None:
    """(q, k, v, scale), all with heads first, if n is permute(softmax(scale q k^T) v); a reason if there is a mask."""
    if n.target is not PERMUTE or tuple(n.args[1]) != HEADS_FIRST or n.args[0].target not in MATMULS:
        return None
    weights, v = n.args[0].args
    if weights.target is not aten.softmax.int or weights.args[1] not in (-1, 3) or len(shape_of(weights)) != 4:
        return None
    scores, scale = scaled(weights.args[0])
    if scores.target not in MATMULS:
        return "its scores have a mask of their own, which only `cross_attention` can tell apart by images"
    q, keys = scores.args
    q, more = scaled(q)
    if keys.target is not PERMUTE or tuple(keys.args[1]) != (0, 1, 3, 2):
        return None
    return q, keys.args[0], v, scale * more


def scaled(x: Node) -> tuple[Node, float]:
    """x = scale * inner -> (inner, scale), for a number."""
    if x.target is MUL and isinstance(x.args[1], float | int):
        return x.args[0], float(x.args[1])
    if x.target is aten.div.Tensor and isinstance(x.args[1], float | int):
        return x.args[0], 1 / float(x.args[1])
    return x, 1.0


def flat(b: Builder, x: Node) -> Node:
    """[B, heads, rows, d] -> [B, rows, heads * d]"""
    batch, heads, rows, d = shape_of(x)
    if x.target is PERMUTE and tuple(x.args[1]) == HEADS_FIRST:
        return b.reshape(x.args[0], (batch, rows, heads * d))
    return b.reshape(
        b.emit(PERMUTE, (x, HEADS_FIRST), (batch, rows, heads, d), x.meta["dtype"]), (batch, rows, heads * d)
    )


def gate_of(n: Node) -> int | None:
    """Which argument of a product is a constant for each column, or for all of them, of the projection beside it."""
    for gate in (0, 1):
        g, x = n.args[gate], n.args[1 - gate]
        if not (isinstance(g, Node) and isinstance(x, Node) and g.meta["const"] and x.target is LINEAR):
            continue
        same = shape_of(n) == shape_of(x) and n.meta["dtype"] == x.meta["dtype"] == g.meta["dtype"]
        if same and x.args[1].meta["const"] and not x.meta["const"]:
            wide = torch.Size(shape_of(g)).numel()
            if wide in (1, shape_of(x)[-1]) and wide == (shape_of(g)[-1] if shape_of(g) else 1):
                return gate
    return None


# ------------------------------------------------------------------------------------------------------------ segments
def cut_masks(program: Program, name: str, report: Report) -> None:
    """Replace `cross_attention` over all images by `segment_attention`; changes the stage's inputs and the info."""
    stage, cross = program.stages[name], program.info.required_cross
    inputs = {n: k for k, n in stage.input_nodes().items()}
    cut: dict[Node, CrossAttention] = {}
    for n in (n for n in stage.graph.nodes if n.target is CROSS_ATTENTION):
        a = CrossAttention.of(n)
        if not (a.k in inputs and a.v in inputs):
            report.skip(name, f"{n.name}: K and V are made in each call")
        elif (
            inputs.get(a.seen) != "seen"
            or inputs.get(a.attends) != "attends"
            or shape_of(a.q)[1] != shape_of(a.seen)[1]
        ):
            report.skip(name, f"{n.name}: works on a part of the rows")
        else:
            cut[n] = a
    kinds = {a.k: "key" for a in cut.values()} | {
        a.v: "value" for a in cut.values()
    }  # one that is both serves as values do
    kinds = {x: kind for x, kind in kinds.items() if all(u in cut for u in x.users)}
    cut = {n: a for n, a in cut.items() if a.k in kinds and a.v in kinds}
    if not cut:
        return
    batch, rows = shape_of(stage.input_nodes()["seen"])[:2]
    # A row may see more than one block.
    several = cross.tiles > 1 or cross.merge_adjacent or cross.leading_text == "all_images"
    keys: Any = symbol("K") if several else cross.tokens
    b, env, names = Builder(), {}, []

    def add(input_name: str, shape: tuple, dtype: torch.dtype) -> Node:
        names.append(input_name)
        return b.placeholder(input_name.replace(".", "_"), shape, dtype)

    for x, input_name in inputs.items():
        if x in kinds:
            env[x] = add(f"segment.{input_name}", (symbol("S"), keys, shape_of(x)[3]), x.meta["dtype"])
        elif not all(u in cut for u in x.users):
            env[x] = add(input_name, shape_of(x), x.meta["dtype"])
    places = (
        add("segment_rows", (symbol("S"), symbol("L")), torch.int64),
        add("row_segments", (batch, rows), torch.int64),
    )
    mask = add("key_mask", (symbol("S"), keys), torch.bool) if several else None
    for n in stage.graph.nodes:
        if n.op == "get_attr":
            env[n] = b.leaf(n)
        elif n.op == "output":
            b.output([env[a] for a in n.args[0]])
        elif n in cut:
            a = cut[n]
            segments = SegmentAttention(env[a.q], env[a.k], env[a.v], *places, a.heads, a.kv_heads, mask, a.scale)
            env[n] = b.emit(SEGMENT_ATTENTION, tuple(segments), shape_of(n), n.meta["dtype"])
        elif n not in env and n.op != "placeholder":
            env[n] = b.copy(n, mapped(n.args, env))
    program.stages[name] = Stage(b.graph, names, stage.outputs)
    calls = [c for c in program.calls() if c.stage == name]
    chosen = {calls[0].sources(inputs[x])[0]: kind for x, kind in kinds.items()}
    program.info = replace(program.info, cross_kv={**program.info.cross_kv, **chosen})
    report.did(f"{name}: {len(cut)} cross-attentions read the keys that their rows see, without a mask")
