"""Graphs in canonical form: how to build them, and along which dimensions each operator works row by row.

A graph is a `torch.fx.Graph` of aten and `mmopt::` operators. Sizes stand in the arguments as numbers or sympy
expressions of named symbols (``nv``, ``nt``, ``B`` ...), never as nodes. Each node carries ``meta["shape"]`` and
``meta["dtype"]``. Weights are `get_attr` nodes that name a tensor of the Program.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

import mmopt.ir.ops  # noqa: F401  registers the operators named below
from mmopt.spec.model_info import ModelInfo

aten = torch.ops.aten

mm = torch.ops.mmopt

Size = Any  # int or sympy.Expr

SLICE, CAT, RESHAPE, PERMUTE, EXPAND = (
    aten.slice.Tensor, aten.cat.default, aten.reshape.default, aten.permute.default, aten.expand.default
)  # fmt: skip

FULL, ARANGE, WHERE = aten.full.default, aten.arange.start, aten.where.self

LINEAR, LAYER_NORM, RMS_NORM = aten.linear.default, aten.layer_norm.default, aten.rms_norm.default

ADD, MUL, EMBEDDING, CONV2D = aten.add.Tensor, aten.mul.Tensor, aten.embedding.default, aten.conv2d.default

ATTENTION, CACHED_ATTENTION, ROTARY = (
    mm.attention.default, mm.cached_attention.default, mm.rotary.default
)  # fmt: skip

CROSS_ATTENTION, SEGMENT_ATTENTION = mm.cross_attention.default, mm.segment_attention.default


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a named size. ``nv`` (visual rows) may be zero, every other size is at least one."""
    return (
        sympy.Symbol(name, integer=True, nonnegative=True)
        if name == "nv"
        else sympy.Symbol(name, integer=True, positive=True)
    )


def simplify(size: Any) -> Size:
    """Numbers as int, expressions in one spelling, so that equal sizes compare equal."""
    if isinstance(size, sympy.Expr):
        size = sympy.expand(size)
        return int(size) if size.is_Integer else size
    return int(size)


def torch_dtype(info: ModelInfo) -> torch.dtype:
    """That of a model's weights."""
    return getattr(torch, info.dtype)


def shape_of(node: Node) -> tuple[Size, ...]:
    return node.meta["shape"]


def several(dtype: Any) -> bool:
    """True for the dtype of an operator with several outputs: then its shape is a list of shapes."""
    return isinstance(dtype, tuple)


class Sizes:
    """Puts numbers in for the symbols of shapes, given by name. ValueError names symbols that have none."""

    def __init__(self, values: dict[str, int]):
        self.values = values
        self.known: dict[sympy.Expr, int] = {}

    def __call__(self, size: Size) -> int:
        if not isinstance(size, sympy.Expr):
            return int(size)
        if size not in self.known:
            numbers: dict[Any, int | None] = {s: self.values.get(str(s)) for s in size.free_symbols}
            if missing := sorted(str(s) for s, x in numbers.items() if x is None):
                raise ValueError(f"size {size}: no number is given for {', '.join(missing)}")
            self.known[size] = int(size.subs(numbers))
        return self.known[size]

    def shape(self, n: Node) -> tuple[int, ...]:
        """Shape of a node; of the first output if it has several."""
        shape: Any = shape_of(n)[0] if several(n.meta["dtype"]) else shape_of(n)
        return tuple(self(s) for s in shape)

    def count(self, n: Node) -> int:
        return math.prod(self.shape(n))


def is_pointwise(op: Any) -> bool:
    return isinstance(op, torch._ops.OpOverload) and (torch.Tag.pointwise in op.tags or op == aten.to.dtype)


def is_const(node: Any) -> bool:
    """True for weights and what is computed from weights and numbers alone."""
    return not isinstance(node, Node) or node.meta.get("const", False)


def _key(args: Any) -> Any:
    if isinstance(args, list | tuple):
        return tuple(_key(a) for a in args)
    if isinstance(args, Node):
        return args
    return (type(args).__name__ in ("bool", "float"), args)


class Builder:
    """Emits nodes into a graph: the same operator on the same arguments is emitted once."""

    def __init__(self) -> None:
        self.graph = Graph()
        self._seen: dict[Any, Node] = {}

    def placeholder(self, name: str, shape: tuple[Size, ...], dtype: torch.dtype) -> Node:
        node = self.graph.placeholder(name)
        node.meta.update(shape=tuple(shape), dtype=dtype, const=False)
        return node

    def weight(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> Node:
        key = ("get_attr", name)
        if key not in self._seen:
            node = self.graph.create_node("get_attr", name)
            node.meta.update(shape=tuple(shape), dtype=dtype, const=True)
            self._seen[key] = node
        return self._seen[key]

    def leaf(self, node: Node) -> Node:
        """An input or a weight of another graph in this one."""
        make = self.placeholder if node.op == "placeholder" else self.weight
        return make(str(node.target), shape_of(node), node.meta["dtype"])

    def emit(self, op: Any, args: tuple, shape: Iterable[Size], dtype: Any, source: Any = None) -> Node:
        """One operator. `source` tags the node of the graph before the rewrite that it is a part of."""
        shape = list(shape) if several(dtype) else tuple(simplify(s) for s in shape)
        if op in (EXPAND, RESHAPE):
            if shape_of(args[0]) == shape:
                return args[0]
            if args[0].target is FULL:
                return self.emit(FULL, (shape, args[0].args[1]), shape, dtype, source)
            if op is RESHAPE and args[0].target is RESHAPE:
                return self.emit(op, (args[0].args[0], *args[1:]), shape, dtype, source)
        if op is SLICE and len(args) == 4:
            lo, hi = simplify(args[2]), simplify(args[3])
            if lo == 0 and hi == shape_of(args[0])[args[1]]:
                return args[0]
            args = (*args[:2], lo, hi)
        if op is CAT and len(args[0]) == 1:
            return args[0][0]
        # `shape` and `dtype` tell apart what arguments alone do not (arange and full of other types)
        key = (op, _key(args), tuple(shape) if op in (EXPAND, RESHAPE, FULL, ARANGE) else None, dtype)
        if key not in self._seen:
            node = self.graph.call_function(op, args)
            operands = node.all_input_nodes
            sizes = [s for s in torch.utils._pytree.tree_leaves((shape, args)) if isinstance(s, sympy.Expr)]
            node.meta.update(shape=shape, dtype=dtype, const=not sizes and all(is_const(a) for a in operands))
            if source is not None:
                node.meta["source"] = source
            self._seen[key] = node
        return self._seen[key]

    def item(self, node: Node, index: int, shape: Iterable[Size], dtype: torch.dtype) -> Node:
        """Output `index` of an operator with several outputs."""
        return self.emit(operator.getitem, (node, index), shape, dtype)

    # the few operators that passes make themselves
    def slice(self, x: Node, dim: int, lo: Size, hi: Size) -> Node:
        s = list(shape_of(x))
        s[dim] = hi - lo
        if x.target is CAT and dim == x.args[1]:  # a slice that is one or more whole parts needs no slice
            start: Size = 0
            parts: list[Node] = []
            for p in x.args[0]:
                if start == lo or parts:
                    parts.append(p)
                start = simplify(start + shape_of(p)[dim])
                if start == hi and parts:
                    return self.cat(parts, dim)
        if x.target is SLICE and x.args[1] == dim and len(x.args) == 4:
            return self.slice(x.args[0], dim, simplify(x.args[2] + lo), simplify(x.args[2] + hi))
        return self.emit(SLICE, (x, dim, lo, hi), s, x.meta["dtype"])

    def cat(self, xs: list[Node], dim: int) -> Node:
        s = list(shape_of(xs[0]))
        s[dim] = sum(shape_of(x)[dim] for x in xs)
        return self.emit(CAT, (tuple(xs), dim), s, xs[0].meta["dtype"])

    def reshape(self, x: Node, shape: Iterable[Size]) -> Node:
        shape = tuple(simplify(s) for s in shape)
        return self.emit(RESHAPE, (x, shape), shape, x.meta["dtype"])

    def copy(self, node: Node, args: tuple, source: Any = None) -> Node:
        """The operator of `node` of another graph on other arguments of the same shapes."""
        return self.emit(node.target, args, shape_of(node), node.meta["dtype"], source)

    def output(self, values: list[Node]) -> None:
        self.graph.output(tuple(values))
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def mapped(args: Any, env: dict[Node, Any]) -> Any:
    """Arguments of a node with what stands for each node put in."""
    if isinstance(args, tuple | list):
        return tuple(mapped(a, env) for a in args)
    return env[args] if isinstance(args, Node) else args


def rebuild(
    graph: Graph,
    visit: Callable[[Builder, Node, tuple], Node | None],
    shapes: dict[Node, tuple[Size, ...]] | None = None,
) -> Graph:
    """Copy a graph node by node; `visit` returns what stands for a node given its new arguments, None to copy it.

    `shapes` gives inputs another shape.
    """
    b = Builder()
    env: dict[Node, Any] = {}
    for n in graph.nodes:
        args = mapped(n.args, env)
        if n.op == "placeholder":
            env[n] = b.placeholder(n.target, (shapes or {}).get(n, shape_of(n)), n.meta["dtype"])
        elif n.op == "get_attr":
            env[n] = b.leaf(n)
        elif n.op == "output":
            b.output(list(args[0]))
        else:
            made = visit(b, n, args)
            env[n] = b.copy(n, args) if made is None else made
    return b.graph
