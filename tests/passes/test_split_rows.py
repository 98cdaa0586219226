"""Rows that are computed together need not be."""

import pytest
import torch
import torch.nn.functional as F
from toys import (
    DTYPES,
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
from mmopt.ir.graph import shape_of
from mmopt.passes.rejoin_rows import RejoinRows
from mmopt.passes.split_rows import SplitRows
from mmopt.rewrite import row_parts as rows


def two_parts(run, **parts):
    """A function of cat(visual, text) and of its visual part's number of rows."""
    toy = Function(lambda m, v, t: run(m, torch.cat([v, t], 1), v.shape[1]), **parts)
    return single(toy, VISUAL_AND_TEXT)


def mask(*parts):
    """True or False for all rows of each part: ``mask((x, True), (y, False))``"""
    return torch.cat([torch.full((p.shape[1],), v, dtype=torch.bool) for p, v in parts])[None, :, None]


def test_each_row_goes_through_its_own_branch(snapshot):
    before = chat(Routed())
    after, report = SplitRows()(before)
    snapshot("split_rows", before_and_after(before, after, "language_model"))
    assert report.rewrites == ["language_model: 7 operators run part by part, 1 selections by mask are gone"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(dtype):
    before = chat(Routed(), dtype=dtype)
    same(before, SplitRows()(before)[0], stage="language_model")


def sandwich(m, v, t):
    """Three parts, the first and last of one kind."""
    x = torch.cat([v, t, v], 1)
    return torch.where(mask((v, True), (t, False), (v, True)), m.a(x), m.b(x))


def features(m, v, t):
    """Parts along the width: pointwise work splits, a projection reads them all."""
    return m.a(torch.tanh(torch.cat([t, 2 * t], 2)))


def heads(m, v, t):
    """The seam moves with a transpose."""
    x = torch.cat([v, t], 1)
    return torch.tanh(m.a(x).view(x.shape[0], x.shape[1], 2, D // 2).transpose(1, 2)) * 2


def chosen_part(m, v, t):
    return m.a(torch.cat([v, t], 1))[:, v.shape[1] :]


def across_the_seam(m, v, t):
    return torch.tanh(torch.cat([v, t, t], 1))[:, v.shape[1] :]


def one_choice_for_all(m, v, t):
    x = torch.cat([v, t], 1)
    return torch.where(torch.full((1, 1, 1), True), m.a(x), m.b(x))


def norms_and_positions(m, v, t):
    x = F.layer_norm(torch.cat([m.p.expand(t.shape[0], -1, -1), t[:, :1]], 1) + m.q, (D,), m.p[0, 0], m.q[0])
    return torch.cat([x, v], 1)


@pytest.mark.parametrize(
    ("run", "parts", "left", "gone"),
    [
        (sandwich, {"a": linear(), "b": linear()}, {"linear", "cat"}, {"where"}),
        (features, {"a": torch.nn.Linear(2 * D, D)}, {"tanh", "cat", "linear", "mul"}, set()),
        (heads, {"a": linear()}, {"linear", "tanh", "mul", "reshape", "permute", "cat"}, set()),
        (chosen_part, {"a": linear()}, {"linear"}, {"cat", "slice"}),
        (across_the_seam, {}, {"cat", "tanh"}, {"slice"}),
        (one_choice_for_all, {"a": linear(), "b": linear()}, {"linear", "cat"}, {"where"}),
        (
            norms_and_positions,
            {"p": torch.nn.Parameter(torch.ones(1, 1, D)), "q": torch.nn.Parameter(torch.ones(2, D))},
            {"layer_norm", "cat", "add"},
            {"where"},
        ),
    ],
)
def test_what_splits(run, parts, left, gone):
    before = single(Function(run, **parts), VISUAL_AND_TEXT)
    after, report = SplitRows()(before)
    assert report.rewrites
    assert left <= set(ops_of(after))
    assert not gone & set(ops_of(after))
    same(before, after)


def test_only_the_part_that_is_read_is_computed():
    after, _ = SplitRows()(single(Function(chosen_part, a=linear()), VISUAL_AND_TEXT))
    (only,) = (n for n in after.stages["toy"].graph.nodes if n.op == "call_function")
    assert only.all_input_nodes[0].name == "text"


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda m, x, n: torch.softmax(x, 1), "aten.softmax.int does not work row by row along it"),
        (lambda m, x, n: m.a(x.cumsum(1)), "aten.cumsum.default does not work row by row along it"),
        (
            lambda m, x, n: ops.attention(x, x, x, 2, 2, None, True),
            "mmopt.attention.default does not work row by row along it",
        ),
        (lambda m, x, n: ops.attention(x, x, x, 2, 2), "a part may have no rows, which kernels refuse"),
    ],
)
def test_left_alone(run, why):
    before = two_parts(run, a=linear())
    unchanged(before, SplitRows(), f"joins its parts: {why}")
    unchanged(before, SplitRows(), "no operator reads a concatenation row by row")


def test_attention_of_parts_that_surely_have_rows_splits():
    before = single(
        Function(lambda m, t: ops.attention(torch.cat([m.q.expand(t.shape[0], -1, -1), t], 1), t, t, 2, 2),
                 q=torch.nn.Parameter(torch.ones(1, 3, D))), {"text": ("B", "nt", D)}
    )  # fmt: skip
    after, _ = SplitRows()(before)
    assert ops_of(after).count("mmopt.attention") == 2
    same(before, after)


def test_a_mask_made_of_data_stays():
    before = two_parts(lambda m, x, n: torch.where(x.sum(-1, keepdim=True) > 0, m.a(x), m.b(x)), a=linear(), b=linear())
    after, report = SplitRows()(before)
    assert "where" in ops_of(after)
    assert "toy: 2 selections stay: their mask is not known at trace time" in report.skipped  # one for each part
    same(before, after)


def test_a_mask_that_differs_within_a_part_stays():
    def run(m, x, n):
        return torch.where((torch.arange(x.shape[1]) > 2)[None, :, None], m.a(x), m.b(x))

    before = two_parts(run, a=linear(), b=linear())
    after, report = SplitRows()(before)
    assert "where" in ops_of(after)
    assert any("an argument is one whole that would have to be cut" in line for line in report.skipped)
    same(before, after)


def test_a_mask_of_other_parts_stays():
    """Cut elsewhere than the rows are: one row further on."""

    def run(m, v, t):
        x = torch.cat([v, t, t], 1)
        return torch.where(mask((t, True), (v, False), (t, True)), m.a(x), m.b(x))

    before = single(Function(run, a=linear(), b=linear()), VISUAL_AND_TEXT)
    after, report = SplitRows()(before)
    assert "where" in ops_of(after)
    assert any("its arguments are cut at different places" in line for line in report.skipped)
    same(before, after)


def test_twice():
    twice(chat(Routed()), SplitRows(), RejoinRows())
    twice(single(Function(sandwich, a=linear(), b=linear()), VISUAL_AND_TEXT), SplitRows())


def test_the_wrong_branch_is_caught(monkeypatch):
    uniform = rows.uniform
    monkeypatch.setattr(rows, "uniform", lambda node: None if uniform(node) is None else not uniform(node))
    caught(chat(Routed()), SplitRows(), "language_model")


def test_parts_without_rows_keep_their_shape():
    before = chat(Routed())
    after, _ = SplitRows()(before)
    values = {"visual": torch.zeros(2, 0, D), "text": torch.zeros(2, 3, D)}
    made = after.stages["language_model"].run(after.weights, values)["logits"]
    node = after.stages["language_model"].output_nodes()["logits"]
    assert made.shape[0] == 2
    assert made.shape[1:] == (3, shape_of(node)[2])
