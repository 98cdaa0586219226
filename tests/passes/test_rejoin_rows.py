"""Parts of one operator that are ready at the same time become one operator again."""

import pytest
import torch
import torch.nn.functional as F
from toys import (
    DTYPES,
    SIZES,
    VISUAL_AND_TEXT,
    D,
    Function,
    Routed,
    before_and_after,
    caught,
    chat,
    linear,
    ops_of,
    same,
    single,
    twice,
    unchanged,
)

from mmopt.ir import ops
from mmopt.ir.graph import LINEAR, shape_of
from mmopt.passes import rejoin_rows
from mmopt.passes.rejoin_rows import RejoinRows
from mmopt.passes.split_rows import SplitRows


def split(program):
    return SplitRows()(program)[0]


def test_what_all_rows_share_is_computed_together(snapshot):
    before = split(chat(Routed()))
    after, report = RejoinRows()(before)
    snapshot("rejoin_rows", before_and_after(before, after, "language_model"))
    assert report.rewrites == ["language_model: the 4 parts of 2 products are computed together again"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(dtype):
    before = chat(Routed(), dtype=dtype)
    same(before, RejoinRows()(split(before))[0], stage="language_model")


def gated(m, v, t):
    """Work between two projections stays on all rows."""
    x = torch.cat([v, t], 1)
    return m.b(F.silu(m.a(x)) * m.c(x))


def branches_of_three(m, v, t):
    """First and last part share a branch that the middle one does not take."""
    x = torch.cat([v, t, v * 2], 1)
    parts = [torch.full((p.shape[1],), kind, dtype=torch.bool) for p, kind in ((v, True), (t, False), (v, True))]
    return m.c(torch.where(torch.cat(parts)[None, :, None], m.a(x), m.b(x)))


def residual(m, v, t):
    """One joined value meets another in parts."""
    x = torch.cat([torch.tanh(v), torch.sin(t)], 1)
    return m.b(x + m.a(x))


def narrower(m, v, t):
    """A slice along the width of joined rows is a slice of the whole."""
    y = m.a(torch.cat([v, t], 1))
    return m.b(torch.cat([torch.tanh(y[..., : D // 2]), y[..., D // 2 :]], 2))


def one_part_read_alone(m, v, t):
    y = m.a(torch.cat([v, t], 1))
    return m.b(torch.tanh(y)), y[:, v.shape[1] :] * 2


@pytest.mark.parametrize("run", [gated, branches_of_three, residual, narrower, one_part_read_alone])
def test_joined(run):
    outputs = ["y", "z"] if run is one_part_read_alone else ["y"]
    plain = single(Function(run, a=linear(), b=linear(), c=linear()), VISUAL_AND_TEXT, outputs)
    apart = split(plain)
    after, _ = RejoinRows()(apart)
    assert ops_of(after).count("linear") < ops_of(apart).count("linear")
    same(plain, after)


def test_two_projections_of_split_rows_are_two_products_again():
    plain = single(Function(gated, a=linear(), b=linear(), c=linear()), VISUAL_AND_TEXT)
    after, _ = RejoinRows()(split(plain))
    assert sorted(ops_of(after)) == sorted(ops_of(plain))


def class_row(m, x):
    """A row that is constant comes before rows that wait for a product: its own product needs no run time at all."""
    rows = torch.cat([m.first.expand(x.shape[0], -1, -1), m.b(x)], 1)
    q, k, v = m.q(rows), m.k(rows), m.v(rows)
    return ops.attention(q, k, v, 2, 2)


def constant_first():
    first = torch.nn.Parameter(torch.ones(1, 1, D))
    toy = Function(class_row, first=first, b=linear(), q=linear(), k=linear(), v=linear())
    return split(single(toy, {"x": ("B", "nt", D)}))


def test_parts_that_are_ready_before_the_others_stay_apart():
    before = constant_first()
    parts = [n for n in before.stages["toy"].graph.nodes if n.target is LINEAR and shape_of(n)[1] == 1]
    assert len(parts) == 3
    unchanged(before, RejoinRows(), "toy: the parts of linear_default_1 are not ready at the same time")


def test_nothing_was_split():
    plain = single(Function(gated, a=linear(), b=linear(), c=linear()), VISUAL_AND_TEXT)
    unchanged(plain, RejoinRows(), "toy: no operator was split into parts that are ready together")


def test_twice():
    twice(chat(Routed()), SplitRows(), RejoinRows())
    for run in (gated, branches_of_three, residual, narrower):
        plain = single(Function(run, a=linear(), b=linear(), c=linear()), VISUAL_AND_TEXT)
        once = RejoinRows()(split(plain))[0]
        assert str(RejoinRows()(split(once))[0]) == str(once)
        assert str(RejoinRows()(once)[0]) == str(once)


def test_the_input_is_not_changed():
    before = split(chat(Routed()))
    text = str(before)
    RejoinRows()(before)
    assert str(before) == text
    same(before, before, SIZES[:2], stage="language_model")


def test_parts_in_the_wrong_order_are_caught(monkeypatch):
    siblings = rejoin_rows.siblings

    def reversed_parts(graph):
        groups, reasons = siblings(graph)
        return {n: group[::-1] for n, group in groups.items()}, reasons

    monkeypatch.setattr(rejoin_rows, "siblings", reversed_parts)
    monkeypatch.setattr(rejoin_rows.Rejoin, "cat", in_any_order)
    caught(chat(Routed()), RejoinRows(), "language_model", [SplitRows()])


def in_any_order(self, values, dim):
    """A `cat` that takes all pieces of a whole for the whole, in whatever order they come."""
    wholes = {getattr(v, "whole", None) for v in values}
    return wholes.pop() if len(wholes) == 1 and None not in wholes else self.b.cat([self.node(v) for v in values], dim)
