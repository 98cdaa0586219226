"""Stages as plain torch code of fixed sizes, as one would write it by hand: what an engine is measured against.

Sizes and the number of rows in the caches are numbers here, so the code gets every advantage of static shapes: caches
are written in place, a single row needs no mask, what depends on weights or sizes alone is computed beforehand. A
selection between two branches by row (`where` on a mask that the sizes determine) is run in one of two ways:

- ``"routed"``: as reference implementations of multiway modules do, compare + nonzero + gather + branch + scatter;
- ``"known"``: the rows of each branch are known: each branch runs on a slice of the rows; decode is one branch alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mmopt.ir import ops
from mmopt.ir.attention_args import CachedAttention
from mmopt.ir.graph import (
    ADD,
    ATTENTION,
    CACHED_ATTENTION,
    CAT,
    CROSS_ATTENTION,
    EXPAND,
    LAYER_NORM,
    LINEAR,
    MUL,
    PERMUTE,
    RESHAPE,
    RMS_NORM,
    ROTARY,
    SEGMENT_ATTENTION,
    SLICE,
    WHERE,
    aten,
    shape_of,
)
from mmopt.ir.stage import Stage, evaluate

ROUTINGS = ("routed", "known")
FUNCTIONS: dict[Any, Callable] = {
    LINEAR: F.linear, LAYER_NORM: F.layer_norm, RMS_NORM: F.rms_norm, ADD: torch.add, MUL: torch.mul, CAT: torch.cat,
    RESHAPE: torch.reshape, PERMUTE: torch.permute, EXPAND: Tensor.expand, ROTARY: ops.rotary, ATTENTION: ops.attention,
    CROSS_ATTENTION: ops.cross_attention, SEGMENT_ATTENTION: ops.segment_attention,
    aten.silu.default: F.silu,
}  # fmt: skip


def _routed(branch: Callable) -> Callable[[Tensor, Tensor, tuple, tuple], Tensor]:
    """Rows of x ``[B, S, D]`` through ``branch(x, *first)`` where is_first, else through ``branch(x, *second)``."""

    def run(is_first: Tensor, x: Tensor, first: tuple, second: tuple) -> Tensor:
        chosen, out = is_first.reshape(1, -1).expand(x.shape[:2]), None
        for wanted, rest in ((False, second), (True, first)):
            rows = chosen.eq(wanted).nonzero(as_tuple=True)
            if rows[0].numel():
                made = branch(x[rows], *rest)
                out = made.new_empty(*x.shape[:2], made.shape[-1]) if out is None else out
                out[rows] = made
        assert out is not None
        return out

    run.__name__ = run.__qualname__ = f"routed_{branch.__name__}"  # where generated code finds it
    return run


routed_linear, routed_rms_norm, routed_layer_norm = _routed(F.linear), _routed(F.rms_norm), _routed(F.layer_norm)
ROUTED = {LINEAR: routed_linear, RMS_NORM: routed_rms_norm, LAYER_NORM: routed_layer_norm}


def attention_in_place(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, past: int, heads: int, kv_heads: int,
    scale: float | None = None, slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`ops.cached_attention` with the caches written in place and a `past` that is the same number for all samples."""
    batch, rows, _ = q.shape
    total = past + rows
    key_cache[:, :, past:total] = k.view(batch, rows, kv_heads, -1).transpose(1, 2)
    value_cache[:, :, past:total] = v.view(batch, rows, kv_heads, -1).transpose(1, 2)
    mask = None
    if past and rows > 1:
        mask = torch.ones(rows, total, dtype=torch.bool, device=q.device).tril(past)
    if slopes is not None:
        bias = slopes[:, None, None] * torch.arange(1 - total, 1, device=q.device, dtype=q.dtype)
        seen = torch.ones(rows, total, dtype=torch.bool, device=q.device).tril(past)
        mask = bias.masked_fill(~seen, float("-inf"))[None] if rows > 1 else bias[None]
    out = F.scaled_dot_product_attention(
        q.view(batch, rows, heads, -1).transpose(1, 2), key_cache[:, :, :total], value_cache[:, :, :total],
        attn_mask=mask, is_causal=rows > 1 and not past and mask is None, scale=scale, enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return out.transpose(1, 2).reshape(batch, rows, -1)


class Shared:
    """What the modules of one model share: constants computed once, and each tensor once on the device."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.constants: dict[Node, Tensor] = {}
        self._placed: dict[int, tuple[Tensor, nn.Parameter]] = {}  # the tensor is kept too: its id must stay its own

    def parameter(self, x: Tensor) -> nn.Parameter:
        if id(x) not in self._placed:
            self._placed[id(x)] = (x, nn.Parameter(x.to(self.device), requires_grad=False))
        return self._placed[id(x)][1]


class _Writer:
    """Writes one stage as a module. `env` holds the torch value of what is known beforehand, a node for the rest."""

    def __init__(
        self, stage: Stage, weights: dict[str, Tensor], sizes: dict[str, int], past: int, leading: int, shared: Shared
    ):  # fmt: skip
        free = {d for n in stage.placeholders() for d in shape_of(n) if isinstance(d, sympy.Symbol)}
        missing = sorted(s.name for s in free if s.name not in sizes)
        if missing:
            raise ValueError(f"no number is given for the sizes {', '.join(missing)} of the stage")
        self.stage, self.weights, self.past, self.leading, self.shared = stage, weights, past, leading, shared
        self.sizes = {s: sizes[s.name] for s in free}
        self.graph, self.root = Graph(), nn.Module()
        self.env: dict[Node, Any] = {}
        self.stored: dict[int, Node] = {}

    def write(self, routing: str, last_only: bool) -> GraphModule:
        kept = self.shared.constants
        made = [name for name in self.stage.outputs if name not in self.stage.inputs]
        outputs = self.stage.output_nodes()
        heads = {outputs[n] for n in made if last_only and outputs[n].target is LINEAR}
        skipped = self.branches()
        for n in self.stage.graph.nodes:
            if n.op == "placeholder":
                self.env[n] = self.graph.placeholder(str(n.target))
            elif n.op == "get_attr":
                self.env[n] = self.weights[str(n.target)]
            elif n.op == "output":
                self.graph.output(tuple(self.argument(outputs[name]) for name in made))
            elif n in kept:
                self.env[n] = kept[n]
            elif n not in skipped:
                self.env[n] = self.node(n, routing, n in heads)
                if n.meta["const"] and any(not u.meta.get("const") for u in n.users):
                    kept[n] = self.env[n]
        return GraphModule(self.root, self.graph)

    def size(self, size: Any) -> int:
        return int(size.subs(self.sizes)) if isinstance(size, sympy.Expr) else size

    def branches(self) -> set[Node]:
        """Both sides of each selection that can run on its own rows alone."""
        found = set()
        for n in self.stage.graph.nodes:
            if n.target is WHERE and all(isinstance(a, Node) for a in n.args):
                _, a, b = n.args
                alike = a.target is b.target and a.target in ROUTED and a.args[0] is b.args[0]
                if alike and len(a.users) == len(b.users) == 1:
                    found |= {a, b}
        return found

    def argument(self, a: Any) -> Any:
        """An argument of a node of the new graph; known tensors are stored on the module."""
        if isinstance(a, Node) and a.graph is not self.graph:
            a = self.env[a]
        if isinstance(a, Tensor):
            if id(a) not in self.stored:
                name = f"constant_{len(self.stored)}"
                self.root.register_parameter(name, self.shared.parameter(a))
                self.stored[id(a)] = self.graph.get_attr(name)
            return self.stored[id(a)]
        if isinstance(a, tuple | list):
            return tuple(self.argument(x) for x in a)
        return self.size(a)

    def call(self, f: Callable, *args: Any) -> Node:
        return self.graph.call_function(f, tuple(self.argument(a) for a in args))

    def node(self, n: Node, routing: str, last_row: bool) -> Any:
        shape = None if isinstance(n.meta["dtype"], tuple) else [self.size(s) for s in shape_of(n)]
        if shape is not None and 0 in shape:
            return torch.empty(shape, dtype=n.meta["dtype"])
        if n.target is CAT:
            return self.cat(n)
        if all(isinstance(self.env.get(a), Tensor) for a in n.all_input_nodes):
            return evaluate(n, self.env, self.sizes)
        if n.target is operator.getitem:
            return self.env[n.args[0]] if n.args[1] == 0 else None  # type: ignore[index]  # caches are written in place
        if n.target is CACHED_ATTENTION:
            a = CachedAttention.of(n)._replace(past=self.past)  # a number here; nothing but causality hides a slot
            return self.call(attention_in_place, *a[:-1])
        if n.target is WHERE and n.args[1] not in self.env:
            return self.select(n, routing)
        if n.target is SLICE:
            x, dim, lo, hi = n.args
            lo, hi = self.size(lo), self.size(hi)
            whole = (lo, hi) == (0, self.size(shape_of(x)[dim]))  # type: ignore[index,arg-type]
            return self.env[x] if whole else self.call(torch.narrow, x, dim, lo, hi - lo)  # type: ignore[index]
        args = list(n.args)
        if last_row:
            x = args[0]
            args[0] = self.call(torch.narrow, x, 1, self.size(shape_of(x)[1]) - 1, 1)  # type: ignore[arg-type]
        f = FUNCTIONS.get(n.target, n.target)
        named = {}
        if f is n.target:  # keyword-only arguments stand in their place among the positional ones
            schema = n.target._schema.arguments  # type: ignore[union-attr]
            named = {a.name: self.argument(v) for a, v in zip(schema, args, strict=False) if a.kwarg_only}
        made = self.call(f, *args[: len(args) - len(named)])  # type: ignore[arg-type]
        made.kwargs = named
        return made

    def cat(self, n: Node) -> Any:
        """Without parts of no rows. With `leading`, visual and text rows stand in the order of the prompt."""
        parts, dim = list(n.args[0]), n.args[1]  # type: ignore[arg-type]
        rows = [str(shape_of(p)[dim]) for p in parts]  # type: ignore[arg-type,index]
        values = [self.env[p] for p, r in zip(parts, rows, strict=True) if self.size(shape_of(p)[dim])]  # type: ignore[arg-type,index]
        if self.leading and rows == ["nv", "nt"]:
            first, second = values
            length = self.size(shape_of(parts[1])[dim])  # type: ignore[index]
            cut = torch.narrow if isinstance(second, Tensor) else lambda *a: self.call(torch.narrow, *a)
            values = [cut(second, dim, 0, self.leading), first, cut(second, dim, self.leading, length - self.leading)]
        if all(isinstance(v, Tensor) for v in values):
            return torch.cat(values, dim)
        return values[0] if len(values) == 1 else self.call(torch.cat, values, dim)

    def select(self, n: Node, routing: str) -> Node:
        mask, first, second = n.args
        x = first.args[0]  # type: ignore[union-attr]
        branches = {True: first.args[1:], False: second.args[1:]}  # type: ignore[union-attr]
        if routing == "routed":
            return self.call(ROUTED[first.target], mask, x, branches[True], branches[False])
        f = FUNCTIONS[first.target]  # type: ignore[union-attr]
        chosen = self.env[mask].flatten().tolist()  # type: ignore[index]
        seams = [i for i in range(1, len(chosen)) if chosen[i] != chosen[i - 1]]
        if not seams:
            return self.call(f, x, *branches[chosen[0]])
        runs = zip([0, *seams], [*seams, len(chosen)], strict=True)
        parts = [self.call(f, self.call(torch.narrow, x, 1, lo, hi - lo), *branches[chosen[lo]]) for lo, hi in runs]
        return self.call(torch.cat, parts, 1)


def torch_stage(
    stage: Stage, weights: dict[str, Tensor], sizes: dict[str, int], past: int = 0, leading: int = 0,
    routing: str = "known", last_only: bool = False, shared: Shared | None = None,
) -> GraphModule:  # fmt: skip
    """A stage as a module for numbers of rows given by `sizes` on top of `past` rows in the caches.

    It takes the stage's inputs in order, writes the caches in place and returns the outputs that are not inputs too.
    `leading` rows of text stand before the visual rows; `last_only` takes the last row alone through a final
    projection. Modules made with the same `shared` hold each tensor once. ValueError names sizes without a number.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing is {routing!r}, expected one of {', '.join(ROUTINGS)}")
    return _Writer(stage, weights, sizes, past, leading, shared or Shared()).write(routing, last_only)
