"""What is constant is folded into the weights, where that saves work."""

import pytest
import torch
from toys import (
    DTYPES,
    D,
    Function,
    Interleaved,
    Normed,
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

from mmopt.ir.graph import LAYER_NORM, MUL, SLICE, rebuild
from mmopt.passes.fold_constants import FoldConstants
from mmopt.rewrite import contracts
from mmopt.search.optimize import optimize

X = {"x": ("B", "nt", D)}
AT = ({"B": 1, "nt": 1}, {"B": 3, "nt": 4})


def norm(**options):
    return torch.nn.LayerNorm(D, **options)


# --------------------------------------------------------------------------------------------- norms that share rows
def test_norms_of_the_same_rows_become_one(snapshot):
    before = chat(Normed())
    after, report = FoldConstants()(before)
    snapshot("fold_norms", before_and_after(before, after, "language_model"))
    assert "language_model: 2 norms of the same rows became one; 4 projections took their gains" in report.rewrites
    assert ops_of(after, "language_model").count("layer_norm") == 1


@pytest.mark.parametrize("toy", [Normed, Interleaved])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(toy, dtype):
    before = chat(toy(), dtype=dtype)
    same(before, FoldConstants()(before)[0], stage="language_model")


@pytest.mark.parametrize("norm_options", [{}, {"bias": False}])
@pytest.mark.parametrize("bias", [True, False])
def test_with_and_without_biases(norm_options, bias):
    parts = {"m": norm(**norm_options), "n": norm(**norm_options), "a": linear(bias=bias), "b": linear(bias=bias)}
    before = single(Function(lambda m, x: m.a(m.m(x)) * m.b(m.n(x)), **parts), X)
    after, _ = FoldConstants()(before)
    assert ops_of(after).count("layer_norm") == 1
    same(before, after, AT)


def test_a_constant_of_each_row_is_added_behind_the_product():
    def run(m, x):
        return m.a(m.positions + m.m(x)) * m.b(m.n(x))

    positions = torch.nn.Parameter(torch.ones(4, D))
    before = single(Function(run, m=norm(), n=norm(), a=linear(), b=linear(), positions=positions), {"x": ("B", 4, D)})
    after, _ = FoldConstants()(before)
    assert ops_of(after) == ["layer_norm", "linear", "add", "linear", "mul"]
    same(before, after, ({"B": 1}, {"B": 3}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_a_projection_are_projections_of_slices(bias, dtype):
    def run(m, x):
        q, k, v = m.a(x).chunk(3, dim=-1)
        return q + k * torch.tanh(v)

    before = single(Function(run, a=torch.nn.Linear(D, 3 * D, bias=bias)), X, dtype=dtype)
    after, report = FoldConstants()(before)
    assert report.rewrites == ["toy: 3 slices of projections are slices of their weights"]
    assert sorted(ops_of(after)) == ["add", "linear", "linear", "linear", "mul", "tanh"]
    same(before, after, AT)
    twice(before, FoldConstants())


def test_a_projection_that_is_read_whole_too_keeps_its_weight():
    def run(m, x):
        y = m.a(x)
        return y[:, :, :D] * torch.tanh(y).sum(-1, keepdim=True)

    unchanged(single(Function(run, a=torch.nn.Linear(D, 2 * D)), X), FoldConstants(), "is read whole too")


def read_elsewhere(m, x):
    seen = m.m(x)
    return m.a(seen) * m.b(m.n(x)) + seen


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda m, x: m.a(m.m(x)), "toy: 1 norms have one gain and a fused kernel: folding it would save nothing"),
        (lambda m, x: m.a(m.m(x)) * m.b(m.n(x * 2)), "toy: 2 norms have one gain and a fused kernel"),
        (lambda m, x: m.a(m.m(x)) * m.b(m.other(x)), "toy: 2 norms have one gain and a fused kernel"),
        (read_elsewhere, "norms of the same rows are read by more than projections"),
        (lambda m, x: m.a(m.m(x)) + torch.tanh(m.n(x)), "norms of the same rows are read by more than projections"),
        (lambda m, x: m.a(m.m(x) + x) * m.b(m.n(x)), "norms of the same rows are read by more than projections"),
        (lambda m, x: m.a(m.m(x) + m.one) * m.b(m.n(x)), "norms of the same rows are read by more than projections"),
    ],
)
def test_norms_left_alone(run, why):
    parts = {"m": norm(), "n": norm(), "other": norm(eps=1e-3), "a": linear(), "b": linear()}
    one = torch.nn.Parameter(torch.ones(1))  # a constant, but not one for each column
    unchanged(single(Function(run, one=one, **parts), X), FoldConstants(), why)


# ------------------------------------------------------------------------------------------- slices of projections
def test_a_slice_of_a_projection_is_a_projection_by_a_slice(snapshot):
    before = chat(Interleaved())
    after, report = FoldConstants()(before)
    snapshot("fold_slices", before_and_after(before, after, "language_model"))
    assert report.rewrites == ["language_model: 3 slices of projections are slices of their weights"]
    assert ops_of(after, "language_model").count("linear") == 4


def thirds(m, x):
    wide = m.qkv(x)
    by_head = wide.view(*x.shape[:2], 2, 3, D // 2)
    return wide, [by_head[:, :, :, i].reshape(x.shape) for i in range(3)]


def whole_read_too(m, x):
    wide, (q, k, v) = thirds(m, x)
    return q * k + v + wide.mean()


def weight_read_too(m, x):
    _, (q, k, v) = thirds(m, x)
    return q * k + v + torch.nn.functional.linear(torch.tanh(x), m.qkv.weight).mean()


def one_slice_is_reduced(m, x):
    by_head = m.qkv(x).view(*x.shape[:2], 2, 3, D // 2)
    return by_head[:, :, :, 0].reshape(x.shape) + by_head[:, :, :, 1].mean()


@pytest.mark.parametrize("run", [whole_read_too, weight_read_too, one_slice_is_reduced])
def test_slices_left_alone(run):
    before = single(Function(run, qkv=linear(3 * D)), X)
    unchanged(before, FoldConstants(), "linear_default or its weight is read whole too: a slice would be stored twice")


def test_slices_along_the_rows_are_no_slices_of_weights():
    def run(m, x):
        return m.a(x).view(x.shape[0], 2, 2, D)[:, :, 0].reshape(x.shape[0], 2, D)

    before = single(Function(run, a=linear()), {"x": ("B", 4, D)})
    unchanged(before, FoldConstants(), "toy: no slices of projections, no norms of the same rows")


def test_strided_slices_stay():
    def run(m, x):
        return m.a(x).view(*x.shape[:2], 2, D // 2)[:, :, :, ::2].reshape(*x.shape[:2], D // 2)

    before = single(Function(run, a=linear()), X)
    unchanged(before, FoldConstants(), "toy: no slices of projections, no norms of the same rows")
    same(before, before, AT)


def test_twice():
    twice(chat(Normed()), FoldConstants())
    twice(chat(Interleaved()), FoldConstants())


# -------------------------------------------------------------------------------------------------- broken variants
class Altered(FoldConstants):
    """A broken pass: what `alter` returns stands in a node's place."""

    def __init__(self, alter):
        self.alter = alter

    def rewrite(self, graph, stage, report):
        made = super().rewrite(graph, stage, report)
        return graph if made is graph else rebuild(made, self.alter)


def forget_gain(b, n, args):
    return args[0] if n.target is MUL and n.meta["const"] else None


def square_gain(b, n, args):
    if n.target is MUL and n.meta["const"]:
        return b.copy(n, (b.copy(n, args), args[1]))


def keep_gain(b, n, args):
    """The gain is in the weight and still in the norm."""
    if n.target is LAYER_NORM and args[2] is None:
        gain = b.weight("language_model.norms.0.weight", (D,), n.meta["dtype"])
        return b.copy(n, (*args[:2], gain, None, args[4]))


def next_slice(b, n, args):
    if n.target is SLICE and n.meta["const"]:
        return b.slice(args[0], args[1], (args[2] + 1) % 3, (args[2] + 1) % 3 + 1)


@pytest.mark.parametrize(
    ("toy", "alter"),
    [(Normed, forget_gain), (Normed, square_gain), (Normed, keep_gain), (Interleaved, next_slice)],
)
def test_wrong_constants_are_caught(toy, alter):
    caught(chat(toy()), Altered(alter), "language_model")


def test_gains_of_one_do_not_hide_a_forgotten_one(monkeypatch):
    before = chat(Normed())
    for name, w in before.weights.items():
        if "norms" in name and name.endswith("weight"):
            before.weights[name] = torch.ones_like(w)
    caught(before, Altered(forget_gain), "language_model")
    monkeypatch.setattr(contracts, "drawn_weights", lambda program, seed: dict(program.weights))
    optimize(before, [Altered(forget_gain)])  # with the gains as they are nothing is noticed
