"""W (g * n(x) + b + c) = (W g) n(x) + W (b + c): what is constant is folded into the weights, where that saves work.

- A slice of a projection is a projection by a slice of the weight: interleaved heads are put in order at compile time.
- Several norms of one value that differ in gain and bias alone become one norm; gains, biases and added constants move
  into the projections that read them. A norm with a single reader is left alone: its kernel applies the gain for free.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from mmopt.ir.graph import ADD, LAYER_NORM, LINEAR, MUL, RESHAPE, SLICE, Builder, rebuild, shape_of
from mmopt.rewrite.pass_base import Pass, Report


class FoldConstants(Pass):
    def rewrite(self, graph: Graph, stage: str, report: Report) -> Graph:
        made = self.share_norms(self.slice_weights(graph, stage, report), stage, report)
        if made is graph:
            report.skip(stage, "no slices of projections, no norms of the same rows")
        return made

    def slice_weights(self, graph: Graph, stage: str, report: Report) -> Graph:
        """slice(W x, i) = W[i] x; reshape(slice(reshape(W x, [.., a, s, c]), i), [.., a c]) = W[:, i] x"""
        slices = {n: linear for n in graph.nodes if (linear := sliced_projection(n)) is not None}
        apart = {linear for linear in slices.values() if read_in_slices(linear, slices)}
        for linear in dict.fromkeys(slices.values()):
            others = [u for u in linear.args[1].users if not u.meta.get("const") and u not in apart]
            if linear not in apart or others:
                report.skip(stage, f"{linear.name} or its weight is read whole too: a slice would be stored twice")
                slices = {n: found for n, found in slices.items() if found is not linear}
        count = 0

        def visit(b: Builder, n: Node, args: tuple) -> Node | None:
            nonlocal count
            if n not in slices:
                return None
            wide, dim, lo, hi = args if n.target is SLICE else args[0].args
            linear = wide if n.target is SLICE else wide.args[0]
            x, w, bias = (*linear.args, None)[:3]
            r = len(shape_of(x)) - 1
            inner = tuple(shape_of(wide)[r:])

            def ordered(weight: Node) -> Node:
                tail = shape_of(weight)[1:]
                part = b.slice(b.reshape(weight, (*inner, *tail)), dim - r, lo, hi)
                return b.reshape(part, (shape_of(n)[-1], *tail))

            count += 1
            new = (x, ordered(w)) if bias is None else (x, ordered(w), ordered(bias))
            return b.emit(LINEAR, new, shape_of(n), n.meta["dtype"])

        made = rebuild(graph, visit)
        if count:
            report.did(f"{stage}: {count} slices of projections are slices of their weights")
        return made if count else graph

    def share_norms(self, graph: Graph, stage: str, report: Report) -> Graph:
        norms: dict[tuple, list[Node]] = {}
        for n in graph.nodes:
            if n.target is LAYER_NORM and not n.meta["const"] and len(n.args) > 2 and n.args[2] is not None:
                norms.setdefault((n.args[0], n.args[1], n.args[4]), []).append(n)
        shared = set()
        for group in norms.values():
            free = [n for n in group if all(map(foldable, n.users))]
            if len(free) > 1:
                shared.update(free)
            elif len(group) > 1:
                report.skip(stage, f"{group[0].name} and norms of the same rows are read by more than projections")
        single = sum(len(group) == 1 for group in norms.values())
        if single:
            report.skip(stage, f"{single} norms have one gain and a fused kernel: folding it would save nothing")
        if not shared:
            return graph
        count = 0

        def visit(b: Builder, n: Node, args: tuple) -> Node | None:
            nonlocal count
            if n.target is not LINEAR:
                return None
            norm, added = as_norm(n.args[0])
            if norm is None or norm not in shared:
                return None
            seen = args[0]
            constant: Any = None
            if added is not None:
                new_norm, constant = seen.args if seen.args[0].target is LAYER_NORM else reversed(seen.args)
            else:
                new_norm = seen
            x, size, gain, shift, eps = (*new_norm.args, None, None)[:5]
            plain = b.emit(LAYER_NORM, (x, size, None, None, eps), shape_of(norm), norm.meta["dtype"])
            w, bias = args[1], (*args, None)[2]
            scaled = b.emit(MUL, (w, gain), shape_of(w), w.meta["dtype"])
            added_up: list[Any] = [t for t in (constant, shift) if t is not None]
            total = added_up[0] if added_up else None
            if len(added_up) == 2:
                total = b.emit(ADD, tuple(added_up), shape_of(added_up[0]), added_up[0].meta["dtype"])
            count += 1

            def project(x: Node, weight: Node, bias: Node | None) -> Node:
                new = (x, weight) if bias is None else (x, weight, bias)
                return b.emit(LINEAR, new, (*shape_of(x)[:-1], shape_of(w)[0]), n.meta["dtype"])

            if total is None:
                return project(plain, scaled, bias)
            if len(shape_of(total)) == 1:
                return project(plain, scaled, project(total, w, bias))
            # a constant for each row is added behind the product, the bias stays in it: packed with others it is free
            return b.emit(ADD, (project(plain, scaled, bias), project(total, w, None)), shape_of(n), n.meta["dtype"])

        made = rebuild(graph, visit)
        report.did(f"{stage}: {len(shared)} norms of the same rows became one; {count} projections took their gains")
        return made


def sliced_projection(n: Node) -> Node | None:
    """The projection of which `n` is a slice: slice(projection) or reshape(slice(reshape(projection)))."""
    if n.target is SLICE and len(n.args) == 4 and n.args[0].target is LINEAR:
        return n.args[0] if n.args[1] == len(shape_of(n)) - 1 and not n.meta["const"] else None
    if n.target is not RESHAPE or n.args[0].target is not SLICE or len(n.args[0].args) != 4:
        return None
    wide, dim, _, _ = n.args[0].args
    if wide.target is not RESHAPE or wide.args[0].target is not LINEAR:
        return None
    rows = shape_of(wide.args[0].args[0])[:-1]
    r = len(rows)
    if shape_of(wide)[:r] != rows or dim < r or shape_of(n)[:r] != rows or len(shape_of(n)) != r + 1:
        return None
    return wide.args[0]


def read_in_slices(linear: Node, slices: dict[Node, Node]) -> bool:
    return all(
        wide in slices
        or (
            wide.target is RESHAPE
            and all(cut.target is SLICE and all(n in slices for n in cut.users) for cut in wide.users)
        )
        for wide in linear.users
    )


def as_norm(x: Node) -> tuple[Node | None, Node | None]:
    """(norm, constant) if x is norm or norm + constant."""
    if x.target is LAYER_NORM:
        return x, None
    if x.target is ADD and len(x.args) == 2:
        for norm, c in (x.args, reversed(x.args)):
            if isinstance(norm, Node) and norm.target is LAYER_NORM and as_wide(c, norm):
                return norm, c
    return None, None


def as_wide(c: Any, node: Node) -> bool:
    """True for a constant that holds a value for each column of `node`."""
    return isinstance(c, Node) and c.meta["const"] and shape_of(c)[-1:] == shape_of(node)[-1:]


def foldable(user: Node) -> bool:
    """True for a projection, and for the sum with a constant that projections alone read."""
    if user.target is LINEAR:
        return True
    return (
        user.target is ADD and any(as_wide(a, user) for a in user.args) and all(u.target is LINEAR for u in user.users)
    )
