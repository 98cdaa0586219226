"""What torch.export traced -> canonical form: one spelling for each concept, sizes as expressions, no bookkeeping."""

from __future__ import annotations

import operator
import sys
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from mmopt.ir import ops
from mmopt.ir.graph import ARANGE, ATTENTION, EXPAND, FULL, PERMUTE, SLICE, Builder, aten, shape_of, simplify

IDENTITY = {"contiguous", "clone", "dropout", "detach", "detach_", "alias", "lift_fresh_copy", "lift_fresh", "dropout_"}
RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
FILLS = {"ones": 1, "zeros": 0, "new_ones": 1, "new_zeros": 0, "ones_like": 1, "zeros_like": 0}
NO_EFFECT = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "_assert_async"}


class Lift:
    """Walks one exported graph. `inputs` are the wanted (name, shape) of its user inputs, with named symbols."""

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        inputs: list[tuple[str, tuple]],
        root: str,
        taken: dict[str, torch.Tensor],
    ):
        self.exported, self.inputs, self.root, self.taken = exported, inputs, root, taken
        self.b = Builder()
        self.env: dict[Node, Any] = {}
        self.renamed: dict[Any, Any] = {}
        self.constants: dict[str, torch.Tensor] = {}

    def run(self) -> Graph:
        signature = self.exported.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        stored |= signature.inputs_to_lifted_tensor_constants
        user = iter(self.inputs)
        nodes = list(self.exported.graph.nodes)
        for n in nodes:  # bind the tracer's symbols to ours before any size is read
            if n.op == "placeholder" and n.name not in stored:
                name, shape = next(user)
                for seen, wanted in zip(n.meta["val"].shape, shape, strict=True):
                    if isinstance(wanted, sympy.Symbol):
                        expr = seen.node.expr if isinstance(seen, torch.SymInt) else None
                        if not isinstance(expr, sympy.Symbol):
                            raise ValueError(
                                f"input {name}: the trace fixed size {wanted} to {seen}; it must stay free"
                            )
                        self.renamed[expr] = wanted
        user = iter(self.inputs)
        for n in nodes:
            if n.op == "placeholder":
                if n.name in stored:
                    self.env[n] = self.weight(stored[n.name], n.meta["val"])
                else:
                    name, shape = next(user)
                    self.env[n] = self.b.placeholder(name.replace(".", "_"), shape, n.meta["val"].dtype)
            elif n.op == "output":
                flat = torch.utils._pytree.tree_leaves(n.args[0])
                self.b.output([self.env[a] for a in flat])
            else:
                self.env[n] = self.call(n)
        return self.b.graph

    def weight(self, full_name: str, val: torch.Tensor) -> Node:
        """Parameters keep their names; a constant of the code gets one that no other stage uses for another value."""
        stored = {**self.exported.state_dict, **self.exported.constants}[full_name].detach()
        name = full_name.removeprefix(self.root)
        while name in self.taken and full_name not in self.exported.state_dict:
            old = self.taken[name]
            if old.dtype == stored.dtype and torch.equal(old, stored):
                break
            name += "_"
        self.constants[name] = stored
        return self.b.weight(name, val.shape, val.dtype)

    def size(self, value: Any) -> Any:
        """A number, or the expression of a symbolic size in our symbols."""
        if isinstance(value, torch.SymInt):
            value = value.node.expr
        if not isinstance(value, sympy.Expr):
            return value
        size = simplify(value.xreplace(self.renamed))
        if isinstance(size, sympy.Expr) and size.free_symbols - set(self.renamed.values()):
            raise ValueError(f"size {size} depends on data: only sizes of inputs may stand in a graph")
        return size

    def shape(self, n: Node) -> tuple:
        return tuple(self.size(s) for s in n.meta["val"].shape)

    def value(self, a: Any) -> Any:
        if isinstance(a, Node):
            v = self.env[a]
            return v
        if isinstance(a, list | tuple):
            return tuple(self.value(x) for x in a)
        return a

    def call(self, n: Node) -> Any:
        val = n.meta.get("val")
        if isinstance(val, torch.SymFloat):
            raise ValueError(f"{n.name}: a size is used as a real number, only whole sizes can stay free")
        if isinstance(val, int | float | bool | torch.SymInt | torch.SymBool):
            return self.size(val)
        if n.target is operator.getitem:
            made = self.value(n.args[0])
            if isinstance(made, tuple | list):
                return made[n.args[1]]
            return self.b.item(made, n.args[1], self.shape(n), val.dtype)
        if not isinstance(n.target, torch._ops.OpOverload):
            return None
        space, name = n.target._schema.name.split("::")
        if space == "mmopt" and n.target not in ops.PLAIN:
            raise ValueError(f"{n.name}: operator {n.target} is not defined in mmopt/ir/ops.py")
        bound = self.bind(n)
        if name in NO_EFFECT:
            return None
        rule = getattr(self, f"op_{name}", None)
        random = torch.Tag.nondeterministic_seeded in n.target.tags and rule is None
        if (random or n.target._schema.is_mutable) and name not in IDENTITY:
            raise ValueError(f"{n.name}: {n.target} writes in place or draws at random, which a graph cannot hold")
        if rule is not None:
            return rule(n, bound)
        x: Any = bound.get("self", bound.get("input"))
        if name in IDENTITY or (name in ("to", "_to_copy", "type_as") and val.dtype == x.meta["dtype"]):
            return x
        if name in ("to", "_to_copy", "type_as"):
            return self.b.emit(aten.to.dtype, (x, val.dtype), self.shape(n), val.dtype)
        if name in RESHAPES:
            return self.b.reshape(x, self.shape(n))
        if name in FILLS:
            return self.full(n, FILLS[name])
        drop = {"device", "layout", "pin_memory", "memory_format"}
        args = tuple(v for k, v in bound.items() if k not in drop)
        required = sum(not a.has_default_value() for a in n.target._schema.arguments)
        while len(args) > required and args[-1] is None:
            args = args[:-1]
        kinds = tuple(v.dtype for v in val) if isinstance(val, tuple | list) else val.dtype
        if isinstance(val, tuple | list):
            return self.b.emit(n.target, args, [tuple(self.size(s) for s in v.shape) for v in val], kinds)
        return self.b.emit(n.target, args, self.shape(n), kinds)

    def bind(self, n: Node) -> dict[str, Any]:
        """Arguments by their names in the operator's schema, defaults filled in (alpha of add dropped when 1)."""
        bound = {}
        for i, a in enumerate(n.target._schema.arguments):
            if i < len(n.args):
                given = self.value(n.args[i])
            elif a.name in n.kwargs:
                given = self.value(n.kwargs[a.name])
            else:
                given = a.default_value
            if a.name == "cudnn_enable" or (a.name == "alpha" and given == 1):
                continue
            bound[a.name] = given
        return bound

    def full(self, n: Node, fill: Any) -> Node:
        return self.b.emit(FULL, (self.shape(n), fill), self.shape(n), n.meta["val"].dtype)

    def op_full(self, n: Node, a: dict) -> Node:
        return self.full(n, a["fill_value"])

    op_full_like = op_new_full = op_full

    def op_arange(self, n: Node, a: dict) -> Node:
        if simplify(a.get("step") or 1) != 1:
            raise ValueError(f"{n.name}: arange with a step is not supported")
        bounds = (a.get("start") or 0, a["end"])
        return self.b.emit(ARANGE, bounds, self.shape(n), n.meta["val"].dtype)

    def op_permute(self, n: Node, a: dict) -> Node:
        rank = len(shape_of(a["self"]))
        dims = tuple(d % rank for d in a["dims"])
        return self.b.emit(PERMUTE, (a["self"], dims), self.shape(n), n.meta["val"].dtype)

    def op_transpose(self, n: Node, a: dict) -> Node:
        rank = len(shape_of(a["self"]))
        dims = list(range(rank))
        i, j = a["dim0"] % rank, a["dim1"] % rank
        dims[i], dims[j] = dims[j], dims[i]
        return self.op_permute(n, {"self": a["self"], "dims": dims})

    def op_t(self, n: Node, a: dict) -> Node:
        return self.op_transpose(n, {"self": a["self"], "dim0": 0, "dim1": -1})

    def op_expand(self, n: Node, a: dict) -> Node:
        return self.b.emit(EXPAND, (a["self"], self.shape(n)), self.shape(n), n.meta["val"].dtype)

    op_expand_as = op_expand

    def op_cat(self, n: Node, a: dict) -> Node:
        return self.b.cat(list(a["tensors"]), a["dim"] % len(self.shape(n)))

    def op_slice(self, n: Node, a: dict) -> Node:
        x, dim, step = a["self"], a["dim"] % len(shape_of(a["self"])), a["step"]
        size, lo = shape_of(x)[dim], a["start"] or 0
        if isinstance(lo, int) and lo < 0:
            lo = lo + size
        if step != 1:
            end = size if a["end"] is None or simplify(a["end"]) == sys.maxsize else a["end"]
            return self.b.emit(SLICE, (x, dim, lo, end, step), self.shape(n), n.meta["val"].dtype)
        return self.b.slice(x, dim, simplify(lo), simplify(lo + self.shape(n)[dim]))

    def op_narrow(self, n: Node, a: dict) -> Node:
        return self.op_slice(n, {"self": a["self"], "dim": a["dim"], "start": a["start"], "step": 1})

    def op_select(self, n: Node, a: dict) -> Node:
        x, dim = a["self"], a["dim"] % len(shape_of(a["self"]))
        i = a["index"]
        lo = simplify(i + shape_of(x)[dim]) if isinstance(i, int) and i < 0 else i
        return self.b.reshape(self.b.slice(x, dim, lo, simplify(lo + 1)), self.shape(n))

    def pieces(self, n: Node, a: dict, squeeze: bool) -> tuple:
        x, dim = a["self"], (a.get("dim") or 0) % len(shape_of(a["self"]))
        lo, made = 0, []
        for v in n.meta["val"]:
            shape = tuple(self.size(s) for s in v.shape)
            step = 1 if squeeze else shape[dim]
            piece = self.b.slice(x, dim, lo, simplify(lo + step))
            made.append(self.b.reshape(piece, shape) if squeeze else piece)
            lo = simplify(lo + step)
        return tuple(made)

    def op_chunk(self, n: Node, a: dict) -> tuple:
        return self.pieces(n, a, squeeze=False)

    op_split = op_split_with_sizes = op_chunk

    def op_unbind(self, n: Node, a: dict) -> tuple:
        return self.pieces(n, a, squeeze=True)

    def op_scaled_dot_product_attention(self, n: Node, a: dict) -> Node:
        """aten's attention on [B, heads, rows, d] -> flat rows, lower-right causality, no mask or a plain one."""
        q, k, v = a["query"], a["key"], a["value"]
        (batch, heads, rows, d), kv_heads, keys = shape_of(q), shape_of(k)[1], shape_of(k)[2]
        causal = bool(a["is_causal"])
        if a["attn_mask"] is not None or (causal and rows != keys):
            return self.b.emit(n.target, tuple(a.values()), self.shape(n), n.meta["val"].dtype)  # stays as traced

        def flat(x: Node, heads: Any) -> Node:
            s = shape_of(x)
            x = self.b.emit(PERMUTE, (x, (0, 2, 1, 3)), (s[0], s[2], s[1], s[3]), x.meta["dtype"])
            return self.b.reshape(x, (s[0], s[2], s[1] * s[3]))

        args = (flat(q, heads), flat(k, kv_heads), flat(v, kv_heads), heads, kv_heads, None, causal, a["scale"])
        out = self.b.emit(ATTENTION, args, (batch, rows, heads * d), n.meta["val"].dtype)
        out = self.b.reshape(out, (batch, rows, heads, d))
        return self.b.emit(PERMUTE, (out, (0, 2, 1, 3)), self.shape(n), n.meta["val"].dtype)
