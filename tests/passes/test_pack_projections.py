"""Projections of the same rows become one product."""

import pytest
import torch
import torch.nn.functional as F
from toys import (
    DTYPES,
    D,
    Function,
    Gated,
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

from mmopt.ir.graph import CAT, rebuild
from mmopt.ir.stage import live_constants
from mmopt.passes.pack_projections import PackProjections

X = {"x": ("B", "nt", D)}
AT = ({"B": 1, "nt": 1}, {"B": 3, "nt": 4})


def test_gate_and_up_are_one_product(snapshot):
    before = chat(Gated())
    after, report = PackProjections(at_least=2)(before)
    snapshot("pack_projections", before_and_after(before, after, "language_model"))
    assert report.rewrites == ["language_model: 2 projections became 1 products"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(dtype):
    before = chat(Gated(), dtype=dtype)
    same(before, PackProjections(at_least=2)(before)[0], stage="language_model")


def test_different_widths_and_no_biases():
    def run(m, x):
        return m.a(x), m.b(x), m.c(x), m.d(x)

    parts = {"a": linear(3, bias=False), "b": linear(5, bias=False), "c": linear(4), "d": linear(2)}
    before = single(Function(run, **parts), X, ["a", "b", "c", "d"])
    after, _ = PackProjections(at_least=2)(before)
    assert ops_of(after).count("linear") == 2
    same(before, after, AT)


def test_the_weights_are_stored_once():
    after, _ = PackProjections(at_least=2)(chat(Gated()))
    kept = [n for n in live_constants(after.stages["language_model"]) if "gate" in str(n.target) or n.target is CAT]
    assert len(kept) == 2  # the packed weight and the packed bias; neither projection's own


def test_weights_that_are_expressions_are_packed():
    before = single(Function(lambda m, x: F.linear(x, m.a.weight * 2) * m.b(x), a=linear(), b=linear(bias=False)), X)
    after, _ = PackProjections(at_least=2)(before)
    assert ops_of(after).count("linear") == 1
    same(before, after, AT)


def shared(m, x):
    return m.a(x) * m.b(x) + m.a(torch.tanh(x))


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (shared, "toy: the weight of linear_default is read elsewhere too"),
        (lambda m, x: m.a(x) + m.b(torch.tanh(x)), "toy: no two projections read the same rows"),
        (lambda m, x: m.a(x) + m.c(x), "toy: no two projections read the same rows"),  # one has a bias, one has none
    ],
)
def test_left_alone(run, why):
    unchanged(single(Function(run, a=linear(), b=linear(), c=linear(bias=False)), X), PackProjections(at_least=2), why)


def test_products_with_data_are_no_projections():
    toy = Function(lambda m, x, w: F.linear(x, w) * F.linear(x, w * 2))
    before = single(toy, {**X, "w": (D, D)})
    unchanged(before, PackProjections(at_least=2), "toy: no two projections read the same rows")


def test_twice():
    twice(chat(Gated()), PackProjections(at_least=2))


class Swapped(PackProjections):
    """A broken pass: each projection gets the slice of another."""

    def rewrite(self, graph, stage, report):
        made = super().rewrite(graph, stage, report)

        def visit(b, n, args):
            if n.target is CAT and n.meta["const"]:
                return b.cat(list(args[0][::-1]), args[1])

        return graph if made is graph else rebuild(made, visit)


def test_swapped_slices_are_caught():
    caught(chat(Gated()), Swapped(at_least=2), "language_model")


@pytest.mark.parametrize(("count", "packed"), [(3, False), (4, True)])
def test_few_are_left_alone_by_default(count, packed):
    names = "abcd"[:count]
    toy = Function(lambda m, x: sum(getattr(m, n)(x) for n in names), **{n: linear() for n in names})
    before = single(toy, X)
    after, report = PackProjections()(before)
    assert (str(after) != str(before)) == packed
    assert packed == (report.skipped == [])
    if not packed:
        assert report.skipped == ["toy: 3 projections of the same rows are fewer than 4"]
