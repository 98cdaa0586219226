"""A Program as stable, readable text: the schedule first, then one line for each node."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from mmopt.ir.stage import Stage
from mmopt.spec.schedule import Call, Loop, Schedules, is_cache


def op_name(n: Node) -> str:
    """Short name of a node's operator: ``linear``, ``mmopt.attention``, ``input``, ``weight``."""
    if n.op != "call_function":
        return {"placeholder": "input", "get_attr": "weight"}.get(n.op, n.op)
    if isinstance(n.target, torch._ops.OpOverload):
        space, name = n.target._schema.name.split("::")
        return name if space == "aten" else f"{space}.{name}"
    return getattr(n.target, "__name__", str(n.target))


def _shape(n: Node) -> str:
    shape = n.meta["shape"]
    if isinstance(shape, list):
        return "(" + ", ".join("[" + ", ".join(map(str, s)) + "]" for s in shape) + ")"
    return "[" + ", ".join(map(str, shape)) + "]"


def stage_text(stage: Stage) -> str:
    names: dict[Node, str] = {}
    lines = []

    def arg(a: Any) -> str:
        if isinstance(a, Node):
            return str(a.target) if a.op == "get_attr" else "%" + names[a]
        if isinstance(a, list | tuple):
            return "[" + ", ".join(arg(x) for x in a) + "]"
        if isinstance(a, sympy.Expr):
            return str(a).replace(" ", "")
        return str(a).removeprefix("torch.")

    for name, n in stage.input_nodes().items():
        names[n] = name

    def write(n: Node) -> None:
        """One line; before it those of the constants that it is the first to read."""
        for a in n.all_input_nodes:
            if a.op == "call_function" and a not in names:
                write(a)
        if n.op == "call_function":
            names[n] = str(len(names))
            const = "const " if n.meta["const"] else ""
            lines.append(f"  %{names[n]} = {const}{op_name(n)}({', '.join(arg(a) for a in n.args)}) -> {_shape(n)}")

    for n in stage.graph.nodes:
        if n.op == "output" or (n.op == "call_function" and not n.meta["const"]):
            write(n)
    ins = ", ".join(f"{name}{_shape(n)}" for name, n in stage.input_nodes().items())
    outs = ", ".join(f"{name}={arg(n)}" for name, n in stage.output_nodes().items())
    return f"({ins}):\n" + "\n".join([*lines, f"  return {outs}"])


def program_text(stages: dict[str, Stage], schedules: Schedules) -> str:
    def call(c: Call) -> str:
        renamed = "".join(f", {k}={v}" for k, v in sorted(c.rename.items()))
        caches = [k for k in c.writes if is_cache(k)]
        written = "".join(f", {k}->{v}" for k, v in sorted(c.writes.items()) if k not in caches)
        return f"call {c.stage}{renamed}{written}" + (
            f", caches->{c.writes[caches[0]].split('.')[0]}" if caches else ""
        )

    lines: list[str] = []
    for title, items in (("schedule", schedules.text), ("painting", schedules.image)):
        lines += [f"{title}:"] if items else []
        for item in items:
            if isinstance(item, Loop):
                head = f"over {item.over}" if item.over else f"{item.trips} times"
                head += f" until {item.until}" if item.until else ""
                lines += [f"  loop {head}:", *(f"    {call(c)}" for c in item.body)]
                lines += [f"    update {item.update[0]} by {item.update[1]}"] if item.update else []
            else:
                lines.append(f"  {call(item)}")
    for name, stage in stages.items():
        lines += ["", f"stage {name}{stage_text(stage)}"]
    return "\n".join(lines)
