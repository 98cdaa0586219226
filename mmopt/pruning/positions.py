"""The language model after rows of images were left out: it counts fewer rows, at the positions they had before.

A row of an image carries how far it was moved forward, in two more columns of its own: so images may be cached, stored,
batched and put into prefixes as ever. The host says how many rows were left out before a call
(`position_delta_before`) and after its images (`position_delta`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch.fx import Node

from mmopt.ir.graph import ADD, ARANGE, EMBEDDING, FULL, MUL, Builder, aten, mapped, shape_of, simplify, symbol
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.pruning.propagate import ImageRows, NotApplicable, PrunePropagator
from mmopt.spec.schedule import Call, Cat, Loop

BASE = 128  # a column holds whole numbers below it exactly, in every type
COLUMNS = 2


def count_rows(program: Program, rows: ImageRows) -> None:
    """Images outside the text: blocks of `rows.new` rows. Stages of `program` are replaced."""
    for name in {c.stage for c in program.calls()}:
        stage = program.stages[name]
        given = {}
        for k, n in stage.input_nodes().items():
            if k == "media":
                given[n] = ImageRows(2, 0, rows.count, new=rows.size)
        if given:
            propagator = PrunePropagator(stage.graph, given)
            propagator.b.output(propagator.run())
            program.stages[name] = stage.replaced(propagator.b.graph)
    assert program.info.cross is not None
    program.info = replace(program.info, cross=replace(program.info.cross, tokens=int(rows.size)))


def carry_places(program: Program, b: Builder, image_rows: Node, rows: ImageRows) -> Node:
    """The rows of an image with their columns, emitted into the stage that makes them; the rest of `program` follows.

    NotApplicable if the language model's positions are not slots counted in order.
    """
    info, name = program.info, "language_model"
    gone = int(rows.count - rows.size)
    if info.position_delta:
        raise NotApplicable("rows of images were left out before, at kept positions")
    old = program.stages[name]
    program.stages[name], reach = reposition(old, info.tokens_per_image - gone, gone)
    program.info = replace(
        info,
        tokens_per_image=info.tokens_per_image - gone,
        position_delta=gone,
        image_embed_width=info.hidden_size + COLUMNS,
        positions=reach,
    )
    keep_for_images(program, name, old)
    program.schedules = program.schedules.replaced(
        text=tuple(told(i, name, ("position_delta_before", "position_delta")) for i in program.schedules.text)
    )
    return _with_columns(b, image_rows, rows)


def _with_columns(b: Builder, x: Node, rows: ImageRows) -> Node:
    batch, total, _ = shape_of(x)
    kept = b.emit(ARANGE, (0, rows.size), (rows.size,), torch.int64)
    assert rows.places is not None
    moved = b.emit(aten.sub.Tensor, (rows.places, kept), (batch, rows.size), torch.int64)
    after = simplify(total - rows.lo - rows.size)
    pieces = [(rows.lo, 0), (after, rows.count - rows.size)]
    before, behind = (b.emit(FULL, ((batch, n), v), (batch, n), torch.int64) for n, v in pieces)
    moved = b.cat([v for v in (before, moved, behind) if shape_of(v)[1] != 0], 1)
    shape, kind = shape_of(moved), x.meta["dtype"]
    high = b.emit(aten.div.Tensor_mode, (moved, BASE, "floor"), shape, torch.int64)
    low = b.emit(aten.sub.Tensor, (moved, b.emit(MUL, (high, BASE), shape, torch.int64)), shape, torch.int64)
    columns = [b.emit(aten.to.dtype, (c, kind), shape, kind) for c in (high, low)]
    return b.cat([x, *(b.reshape(c, (*shape, 1)) for c in columns)], 2)


def reposition(stage: Stage, rows: int, gone: int) -> tuple[Stage, int]:
    """A language model whose visual rows carry columns, `rows` of each image of which `gone` were left out; and how
    many positions its tables hold."""
    inputs = stage.input_nodes()
    if "visual" not in inputs or "past" not in inputs:
        raise NotApplicable("the language model does not read rows of images on top of a cache")
    visual = inputs["visual"]
    batch, nv, width = shape_of(visual)
    total = simplify(nv + symbol("nt"))
    counted = [n for n in stage.graph.nodes if n.target is ARANGE and n.args == (0, total)]
    if len(counted) != 1 or not all(_is_position(u, inputs["past"]) for u in counted[0].users):
        raise NotApplicable("the positions of the language model are not slots counted in order")
    tables = [int(shape_of(n.args[0])[0]) for n in _after(counted[0]) if n.target is EMBEDDING]
    b = Builder()
    env: dict[Node, Node] = {}
    told: dict[str, Node] = {}
    given: Node | None = None
    for n in stage.graph.nodes:
        if n is visual:
            given = b.placeholder(n.target, (batch, nv, width + COLUMNS), n.meta["dtype"])
        elif n.op == "placeholder":
            env[n] = b.leaf(n)
    for k in ("position_delta_before", "position_delta"):
        told[k] = b.placeholder(k, (batch,), torch.int64)
    assert given is not None
    env[visual] = b.slice(given, 2, 0, width)
    for n in stage.graph.nodes:
        if n.op == "get_attr":
            env[n] = b.leaf(n)
        elif n.op == "output":
            b.output([env[a] for a in n.args[0]])
        elif n is counted[0]:
            env[n] = _positions(b, given, width, told, rows, gone, nv, total)
        elif n.op == "call_function":
            args = mapped(n.args, env)
            env[n] = b.copy(n, args)
    return Stage(b.graph, [*stage.inputs, *told], stage.outputs), min(tables, default=0)


def _positions(
    b: Builder, given: Node, width: int, told: dict[str, Node], rows: int, gone: int, nv: object, total: object
) -> Node:
    """How far each row of a call ``[B, nv + nt]`` lies behind the first slot, rows that were left out counted."""
    batch = shape_of(given)[0]
    shape = (batch, nv)

    def emit(op: object, *args: object) -> Node:
        return b.emit(op, args, shape, torch.int64)

    columns = [b.reshape(b.slice(given, 2, width + i, width + i + 1), shape) for i in range(COLUMNS)]
    high, low = (emit(aten.to.dtype, c, torch.int64) for c in columns)
    moved = emit(aten.clamp.default, emit(ADD, emit(MUL, high, BASE), low), 0, gone)
    slot = b.emit(ARANGE, (0, nv), (nv,), torch.int64)
    image = b.emit(aten.div.Tensor_mode, (slot, rows, "floor"), (nv,), torch.int64)
    earlier = b.emit(ADD, (slot, b.emit(MUL, (image, gone), (nv,), torch.int64)), (nv,), torch.int64)
    before, after = (b.reshape(told[k], (batch, 1)) for k in ("position_delta_before", "position_delta"))
    visual = emit(ADD, emit(ADD, moved, earlier), before)
    nt = simplify(total - nv)  # type: ignore[operator]
    text = b.emit(ARANGE, (nv, total), (nt,), torch.int64)
    text = b.emit(ADD, (after, text), (batch, nt), torch.int64)
    return b.cat([visual, text], 1)


def _after(n: Node) -> set[Node]:
    found: set[Node] = set()
    todo = [n]
    while todo:
        for u in todo.pop().users:
            if u not in found and u.op == "call_function":
                found.add(u)
                if u.target is not EMBEDDING:
                    todo.append(u)
    return found


def _is_position(n: Node, past: Node) -> bool:
    """Whether a reader of the count of rows adds the filled slots to it."""
    todo, seen = [a for a in n.all_input_nodes], set()
    while todo:
        x = todo.pop()
        if x is past:
            return n.target is ADD
        if x not in seen and x.op == "call_function":
            seen.add(x)
            todo += x.all_input_nodes
    return False


def keep_for_images(program: Program, name: str, old: Stage) -> None:
    """Image generation reads no images: where it called a stage that was changed, it goes on with that as it was."""
    if any(c.stage == name for c in program.schedules.image.calls()):
        program.stages[f"{name}.paint"] = old
        program.schedules = program.schedules.replaced(
            image=tuple(_renamed(i, name, f"{name}.paint") for i in program.schedules.image)
        )


def _renamed(item: Call | Loop, old: str, new: str) -> Call | Loop:
    if isinstance(item, Call):
        return replace(item, stage=new) if item.stage == old else item
    return replace(item, body=tuple(_renamed(c, old, new) for c in item.body))  # type: ignore[misc]


def told(item: Call | Loop, stage: str, names: Iterable[str]) -> Call | Loop:
    """The schedule gives each call of the language model what was left out before and after its images."""
    if isinstance(item, Call):
        return item
    rename: dict[str, str | Cat] = {k: f"chunk.{k}" for k in names} if item.over == "chunks" else {}
    return replace(item, body=tuple(replace(c, rename=c.rename | rename) if c.stage == stage else c for c in item.body))
