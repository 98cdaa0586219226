"""A stage in two: what depends on some of its inputs alone, and the rest, which reads what the first made."""

from __future__ import annotations

from typing import NamedTuple

from torch.fx import Node

from mmopt.ir.graph import Builder, mapped, shape_of
from mmopt.ir.op_rules import rule_of
from mmopt.ir.stage import Stage


class Split(NamedTuple):
    """`ahead` makes `values` of the fixed inputs, `rest` reads them and has the outputs of the whole stage."""

    ahead: Stage
    rest: Stage
    values: list[str]


def split_stage(stage: Stage, fixed: set[str], name: str, kind: str = "once") -> Split | None:
    """None if no product depends on the inputs `fixed` alone. The values are called ``{name}.{kind}.0``, ..."""
    frontier = products_of(stage, fixed)
    if not frontier:
        return None
    values = {n: f"{name}.{kind}.{i}" for i, n in enumerate(frontier)}
    ahead = part(stage, {}, {v: n for n, v in values.items()})
    return Split(ahead, part(stage, values, stage.output_nodes()), list(values.values()))


def products_of(stage: Stage, fixed: set[str]) -> list[Node]:
    """The last values that depend on the inputs `fixed` alone, of those that a product goes into."""
    invariant: set[Node] = {n for i, n in stage.input_nodes().items() if i in fixed}
    heavy: set[Node] = set()
    for n in stage.graph.nodes:
        if n.op == "get_attr" or n.meta.get("const"):
            invariant.add(n)
        elif n.op == "call_function" and n.all_input_nodes and all(a in invariant for a in n.all_input_nodes):
            invariant.add(n)
            if rule_of(n.target).heavy or any(a in heavy for a in n.all_input_nodes):
                heavy.add(n)
    outputs = set(stage.output_nodes().values())
    return [
        n
        for n in stage.graph.nodes
        if n in heavy
        and isinstance(shape_of(n), tuple)
        and (n in outputs or any(u not in invariant for u in n.users))
    ]  # fmt: skip


def part(stage: Stage, stop: dict[Node, str], wanted: dict[str, Node]) -> Stage:
    """The stage that computes `wanted`, with the nodes of `stop` as inputs; inputs that it does not read are gone."""
    b, env = Builder(), {}
    inputs = {n: i for i, n in stage.input_nodes().items()} | stop
    for n, name in inputs.items():
        env[n] = b.placeholder(name.replace(".", "_"), shape_of(n), n.meta["dtype"])
    for n in stage.graph.nodes:
        if n not in env and n.op not in ("placeholder", "output"):
            env[n] = b.leaf(n) if n.op == "get_attr" else b.copy(n, mapped(n.args, env))
    b.output([env[n] for n in wanted.values()])
    unused = [n for n in inputs if not env[n].users]
    for n in unused:
        b.graph.erase_node(env[n])
    return Stage(b.graph, [name for n, name in inputs.items() if n not in unused], list(wanted))
