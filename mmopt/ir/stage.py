"""A stage: one graph with named inputs and outputs, and how one operator is evaluated."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from mmopt.ir import ops
from mmopt.ir.graph import ARANGE, FULL, is_const, shape_of


@dataclass
class Stage:
    """A graph with named inputs and outputs (in the order of its placeholders and output tuple)."""

    graph: Graph
    inputs: list[str]
    outputs: list[str]
    _constants: dict[Node, Any] = field(default_factory=dict, repr=False)
    _complete: bool = field(default=False, repr=False)  # every constant that is needed again is kept

    def placeholders(self) -> list[Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def input_nodes(self) -> dict[str, Node]:
        return dict(zip(self.inputs, self.placeholders(), strict=True))

    def output_nodes(self) -> dict[str, Node]:
        out = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        return dict(zip(self.outputs, out.args[0], strict=True))

    def weights(self) -> set[str]:
        return {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}

    def replaced(self, graph: Graph) -> Stage:
        return Stage(graph, self.inputs, self.outputs)

    def run(
        self,
        weights: dict[str, Tensor],
        values: dict[str, Tensor],
        keep_constants: bool = True,
        gradients: bool = False,
    ) -> dict[str, Tensor]:
        """Run in plain PyTorch. What depends on weights alone is computed once and kept.

        gradients: outputs can be differentiated by `values`. What was kept by other runs cannot, so a stage is either
        run with them or without.
        """
        sizes: dict[sympy.Symbol, int] = {}
        env: dict[Node, Any] = {}
        for name, node in self.input_nodes().items():
            if name not in values:
                raise KeyError(f"input {name!r} is missing")
            x = values[name]
            env[node] = x
            if x.dim() != len(shape_of(node)):
                raise ValueError(f"input {name}: expected shape {shape_of(node)}, got {tuple(x.shape)}")
            for wanted, got in zip(shape_of(node), x.shape, strict=True):
                if isinstance(wanted, sympy.Symbol):
                    wanted = sizes.setdefault(wanted, got)
                if wanted != got:
                    raise ValueError(f"input {name}: expected shape {shape_of(node)}, got {tuple(x.shape)}")
        last_use = {a: n for n in self.graph.nodes for a in n.all_input_nodes}
        with torch.enable_grad() if gradients else torch.inference_mode():
            for n in self.graph.nodes:
                if n.op == "get_attr":
                    env[n] = weights[str(n.target)]
                elif n.op == "call_function":
                    if n in self._constants:
                        env[n] = self._constants[n]
                    elif not (n.meta["const"] and self._complete):
                        env[n] = evaluate(n, env, sizes, plain=gradients)
                        if n.meta["const"] and keep_constants and any(not u.meta.get("const") for u in n.users):
                            self._constants[n] = env[n]
                elif n.op == "output":
                    self._complete |= keep_constants
                    return dict(zip(self.outputs, (env[a] for a in n.args[0]), strict=True))
                for a in n.all_input_nodes:
                    if last_use[a] is n:
                        env.pop(a, None)
        raise AssertionError("a graph ends with its output")


def evaluate(n: Node, env: dict[Node, Any], sizes: dict[sympy.Symbol, int], plain: bool = False) -> Any:
    """One operator on tensors, sizes put in for their symbols; plain: by definitions that have gradients."""

    def value(a: Any) -> Any:
        if isinstance(a, Node):
            return env[a]
        return int(a.subs(sizes)) if isinstance(a, sympy.Expr) else a

    args = torch.fx.node.map_aggregate(n.args, value)
    if n.target is operator.getitem:
        return args[0][args[1]]
    if n.target in (FULL, ARANGE):
        return n.target(*args, dtype=n.meta["dtype"])
    schema = n.target._schema.arguments  # keyword-only arguments stand in their place among the positional ones
    named = {a.name: v for a, v in zip(schema, args, strict=False) if a.kwarg_only}
    target = ops.PLAIN.get(n.target, n.target) if plain else n.target
    return target(*args[: len(args) - len(named)], **named)


def live_constants(stage: Stage) -> list[Node]:
    """Constant nodes that something not constant reads (or that are outputs): what an engine has to store."""
    return [
        n
        for n in stage.graph.nodes
        if n.op in ("get_attr", "call_function") and is_const(n) and any(not u.meta.get("const") for u in n.users)
    ]
