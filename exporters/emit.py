"""Writes the graph of a stage as an ONNX graph, operator by operator, by a lowering table.

A lowering is a dict: canonical operator -> function ``(emitter, node)`` that emits ONNX nodes and returns the name of
the value (a tuple of names for an operator with several outputs). Sizes that are expressions of symbols become Shape,
Add, Mul and Div nodes on the stage's inputs. The same ONNX operator on the same inputs is emitted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx
import sympy
import torch
from onnx import TensorProto, helper
from torch.fx import Node

from mmopt.exporters.weights import ONNX_TYPE, Weights, tensor_proto
from mmopt.ir.graph import Size, is_const, shape_of, simplify
from mmopt.ir.printer import op_name
from mmopt.ir.stage import Stage

OPSET, IR_VERSION = 23, 11
NEWER = {"TensorScatter": (24, 12)}  # operators that need a newer opset and IR version
CONTRIB = "com.microsoft"


class ExportError(ValueError):
    """A program that cannot be exported; the message names stage, node and operator."""


Rule = Callable[["Emitter", Node], Any]


class Emitter:
    """One stage on its way to ONNX. `rules` is the lowering table, `weights` collects the constants of all stages."""

    def __init__(self, name: str, stage: Stage, rules: dict[Any, Rule], weights: Weights):
        self.name, self.stage, self.rules, self.weights = name, stage, rules, weights
        self.current: Node | None = None
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.values: dict[Node, Any] = {}  # names of what is emitted already
        self.symbols: dict[sympy.Symbol, tuple[str, int]] = {}  # which input's which dimension a symbol is
        self._emitted: dict[Any, Any] = {}
        self._count: dict[str, int] = {}
        self.one_sample = False  # whether an operator takes several rows on a cache of one sample only
        for input_name, node in stage.input_nodes().items():
            border = weights.at_border(input_name, node.meta["dtype"])
            self.values[node] = self.cast(input_name, border, self.dtype(node))
            for dim, size in enumerate(shape_of(node)):
                if isinstance(size, sympy.Symbol):
                    self.symbols.setdefault(size, (input_name, dim))

    # ------------------------------------------------------------------------------------------------- for the rules
    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Emit an ONNX operator; returns the name of its output, or a tuple of names if it has several."""
        attributes = {k: v for k, v in attributes.items() if v is not None}
        key = (kind, inputs, outputs, repr(sorted(attributes.items())))
        if key not in self._emitted:
            names = tuple(self._fresh(kind) for _ in range(outputs))
            label = f"{self.current.name}/{names[0]}" if self.current else names[0]
            self.nodes.append(helper.make_node(kind, inputs, names, name=label, domain=domain, **attributes))
            self._emitted[key] = names if outputs > 1 else names[0]
        return self._emitted[key]

    def value(self, x: Any) -> str:
        """The name of an argument that is a tensor: a value emitted before, or a constant."""
        if x in self.values:
            return self.values[x]
        if not is_const(x):
            raise self.error("its argument is not emitted yet")
        name, inline = self.weights.add(x, self.name)
        if inline is not None:
            self.initializers[name] = inline
        self.values[x] = name
        return name

    def operand(self, x: Any, dtype: torch.dtype) -> str:
        """A tensor, number or size, in the given dtype, to stand beside other operands."""
        if isinstance(x, Node):
            return self.cast(self.value(x), self.dtype(x), dtype)
        if isinstance(x, sympy.Expr):
            return self.cast(self.scalar(x), torch.int64, dtype)
        return self.number(x, dtype)

    def dtype(self, x: Node) -> torch.dtype:
        """The dtype `x` has in the exported graph."""
        return self.weights.exported(x.meta["dtype"], self.name)

    def cast(self, name: str, old: torch.dtype, new: torch.dtype) -> str:
        return name if old == new else self.op("Cast", name, to=ONNX_TYPE[new])

    def number(self, value: Any, dtype: torch.dtype) -> str:
        """A constant of no dimension."""
        return self.constant(torch.tensor(value, dtype=dtype))

    def ints(self, values: Iterable[int], dtype: torch.dtype = torch.int64) -> str:
        """A constant of one dimension."""
        return self.constant(torch.tensor(list(values), dtype=dtype))

    def constant(self, x: torch.Tensor) -> str:
        """A small constant, stored in the graph itself."""
        key = ("constant", x.dtype, tuple(x.shape), tuple(x.reshape(-1).tolist()))
        if key not in self._emitted:
            name = self._fresh("constant")
            self.initializers[name] = tensor_proto(name, x)
            self._emitted[key] = name
        return self._emitted[key]

    def size(self, value: Size) -> str:
        """A size as an int64 tensor of shape [1]."""
        value = simplify(value)
        if isinstance(value, int):
            return self.ints([value])
        if isinstance(value, sympy.Symbol):
            if value not in self.symbols:
                raise self.error(f"size {value} is not the size of any input")
            name, dim = self.symbols[value]
            return self.op("Shape", name, start=dim, end=dim + 1)
        part = value.as_coeff_Mul()[0]
        if isinstance(value, sympy.Mul) and part.q != 1:  # the rest can be divided without remainder
            divided = self.op("Div", self.size(value / part), self.ints([int(part.q)]))
            return divided if part.p == 1 else self.op("Mul", divided, self.ints([int(part.p)]))
        if isinstance(value, sympy.Add | sympy.Mul):
            kind = "Add" if isinstance(value, sympy.Add) else "Mul"
            total, *rest = sorted(value.args, key=lambda a: (isinstance(a, sympy.Integer), str(a)))
            name = self.size(total)
            for term in rest:
                name = self.op(kind, name, self.size(term))
            return name
        raise self.error(f"size {value} cannot be written in ONNX")

    def scalar(self, value: Size) -> str:
        """A size as an int64 tensor of no dimension."""
        if isinstance(value, int):
            return self.number(value, torch.int64)
        return self.op("Squeeze", self.size(value), self.ints([0]))

    def shape(self, sizes: Sequence[Size], old: Sequence[Size] = ()) -> str:
        """A shape as an int64 tensor. With `old`, the shape that a Reshape starts from, it is a constant if possible:
        0 stands for the size of old in the same place, -1 for the rest."""
        plain: list[Any] = [0 if i < len(old) and old[i] == s and is_free(s) else s for i, s in enumerate(sizes)]
        free = [i for i, s in enumerate(plain) if is_free(s)]
        never_zero = all(s.is_positive for i, s in enumerate(sizes) if is_free(s) and i not in free)
        if old and len(free) == 1 and never_zero:
            plain[free[0]] = -1
            free = []
        return self.op("Concat", *(self.size(s) for s in sizes), axis=0) if free else self.ints(plain)

    def error(self, why: str) -> ExportError:
        node = f", node {self.current.name}, operator {op_name(self.current)}" if self.current else ""
        return ExportError(f"stage {self.name}{node}: {why}")

    # --------------------------------------------------------------------------------------------------- the whole
    def run(self) -> onnx.ModelProto:
        """Emit all nodes that an output needs; weights are left as references into a file (see `Weights`)."""
        for n in self.stage.graph.nodes:
            if n.op == "call_function" and not n.meta["const"]:
                self.current = n
                if n.target not in self.rules:
                    raise self.error(
                        "this operator has no ONNX spelling for this target: it has no entry in exporters/lower.py or "
                        "the table of the target"
                    )
                self.values[n] = self.rules[n.target](self, n)
        self.current = None
        outputs = self._name_outputs()
        needed = self._needed(set(outputs))
        used = {i for n in needed for i in n.input} | set(outputs)
        graph = helper.make_graph(
            needed,
            self.name,
            [self._info(name, name, node) for name, node in self.stage.input_nodes().items()],
            [self._info(o, k, n) for o, (k, n) in zip(outputs, self.stage.output_nodes().items(), strict=True)],
            [t for name, t in self.initializers.items() if name in used],
        )
        graph.initializer.extend(self.weights.reference(name) for name in self.weights.names() if name in used)
        opset, ir_version = max([(OPSET, IR_VERSION), *(NEWER[n.op_type] for n in needed if n.op_type in NEWER)])
        opsets = [helper.make_opsetid("", opset)]
        if any(n.domain == CONTRIB for n in needed):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="mmopt")

    def _name_outputs(self) -> list[str]:
        """Give the values that are outputs their names."""
        names, renamed = [], {}
        made = {o for n in self.nodes for o in n.output}
        for name, node in self.stage.output_nodes().items():
            wanted = output_name(self.stage, name)
            value = self.cast(self.value(node), self.dtype(node), self.weights.at_border(name, node.meta["dtype"]))
            if value != self.values.get(node):
                made.add(value)
            if value in made and value not in renamed:
                renamed[value] = wanted
            else:  # an input or a constant passed on, or one value under two names
                source = renamed.get(value, value)
                self.nodes.append(helper.make_node("Identity", [source], [wanted], name=wanted))
            names.append(wanted)
        for n in self.nodes:
            n.input[:] = [renamed.get(i, i) for i in n.input]
            n.output[:] = [renamed.get(o, o) for o in n.output]
        return names

    def _needed(self, wanted: set[str]) -> list[onnx.NodeProto]:
        kept = []
        for n in reversed(self.nodes):
            if any(o in wanted for o in n.output):
                kept.append(n)
                wanted |= set(n.input)
        return kept[::-1]

    def _info(self, name: str, value: str, node: Node) -> onnx.ValueInfoProto:
        kind = ONNX_TYPE[self.weights.at_border(value, node.meta["dtype"])]
        return helper.make_tensor_value_info(name, kind, plain_shape(shape_of(node)))

    def _fresh(self, kind: str) -> str:
        kind = kind.lower()
        self._count[kind] = self._count.get(kind, -1) + 1
        return f"{kind}_{self._count[kind]}"


def is_free(size: Size) -> bool:
    """True for a size that is known only when the graph runs."""
    return isinstance(size, sympy.Expr)


def output_name(stage: Stage, name: str) -> str:
    """ONNX needs names to be unique: an output that has the name of an input is called ``new_...``."""
    return f"new_{name}" if name in stage.inputs else name


def plain_shape(shape: Sequence[Size]) -> list[int | str]:
    """Sizes as numbers, or text such as ``nv`` or ``nt + nv``."""
    return [s if isinstance(s, int) else str(s) for s in shape]
