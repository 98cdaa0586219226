"""What torch.export traces becomes canonical form: the same numbers, one spelling, sizes as expressions."""

import pytest
import torch
import torch.nn.functional as F
from toys import (
    D,
    Function,
    Holder,
    declared,
    draw,
    linear,
    ops_of,
    random_values,
    single,
    trace,
)

from mmopt.ir import ops
from mmopt.ir.graph import shape_of, simplify, symbol
from mmopt.ir.printer import stage_text
from mmopt.rewrite.contracts import difference

X = {"x": ("B", "nt", D)}
SIZES = ({"B": 1, "nt": 1, "nv": 0}, {"B": 3, "nt": 4, "nv": 2})


def lifted(run, inputs=X, **parts):
    """The stage of a function; it gives what the function gives, at every size."""
    module = Function(run, **parts)
    program = single(module, inputs)
    stage = program.stages["toy"]
    for size in SIZES:
        values = random_values(stage, size)
        expected = module(*[v.clone() for v in values.values()])
        assert difference(expected, stage.run(program.weights, values, keep_constants=False)["y"]) is None
        declared(stage, program.weights, values)
    return program


def heads(x, n=2):
    return x.view(*x.shape[:2], n, -1).transpose(1, 2)


def rows(x):
    return x.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda m, x: torch.cat([c * 2 for c in x.chunk(2, -1)], -1), ["slice", "slice", "mul", "mul", "cat"]),
        (lambda m, x: torch.cat(x.split(3, -1)[::-1], -1), ["slice"] * 3 + ["cat"]),
        (lambda m, x: torch.cat(x.split([3, 5], -1)[::-1], -1), ["slice"] * 2 + ["cat"]),
        (lambda m, x: x.view(*x.shape[:2], 2, 4).unbind(2)[1], ["reshape", "slice", "reshape"]),
        (lambda m, x: x[..., -1], ["slice", "reshape"]),
        (lambda m, x: x[:, 0], ["slice", "reshape"]),
        (lambda m, x: x.select(2, 3), ["slice", "reshape"]),
        (lambda m, x: x.narrow(-1, 2, 3), ["slice"]),
        (lambda m, x: x.narrow(-1, -3, 3), ["slice"]),
        (lambda m, x: x[:, -1:], ["slice"]),
        (lambda m, x: x[..., 2:][..., 1:3], ["slice"]),  # a slice of a slice
        (lambda m, x: x[..., :] + x[:, 0:], ["add"]),  # a slice that takes all
        (lambda m, x: torch.cat([x, x * 2], 2)[..., D:], ["mul"]),  # a slice that is one part
        (lambda m, x: x.view(x.shape[0], -1).view(*x.shape[:2], 2, 4).flatten(2) * 2, ["mul"]),
        (
            lambda m, x: x.unsqueeze(1).squeeze(1).reshape_as(x).view_as(x).unflatten(2, (2, 4)).sum(2),
            ["reshape", "sum"],
        ),
        (lambda m, x: x.transpose(1, 2).permute(0, 2, 1), ["permute", "permute"]),
        (lambda m, x: m.w.expand(x.shape[0], 1, D) + x, ["expand", "add"]),
        (lambda m, x: m.w.expand_as(x) + x, ["expand", "add"]),
        (lambda m, x: x + torch.zeros_like(x) + torch.ones(D), ["full", "add", "add"]),
        (lambda m, x: x * torch.full((x.shape[1], 1), 2.0), ["full", "mul"]),
        (lambda m, x: x + x.new_zeros(x.shape) + x.new_full((x.shape[1], 1), 3.0), ["full", "add", "full", "add"]),
        (lambda m, x: x * torch.arange(x.shape[1])[:, None], ["arange", "reshape", "mul"]),
        (lambda m, x: x * torch.arange(1, x.shape[1] + 1)[:, None], ["arange", "reshape", "mul"]),
        (lambda m, x: F.dropout(x, 0.5, False).contiguous().clone().detach() * 1, ["mul"]),
        (lambda m, x: x.to(torch.float32).float().type_as(x) * 1, ["mul"]),
        (lambda m, x: x.half().float(), ["to", "to"]),
        (lambda m, x: F.linear(x, m.w[0, 0].expand(D, D).t()), ["linear"]),
        (lambda m, x: torch.sin(x) + torch.sin(x), ["sin", "add"]),  # computed once
    ],
)
def test_rules(run, expected):
    program = lifted(run, w=torch.nn.Parameter(torch.ones(1, 1, D)))
    assert ops_of(program) == expected


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: F.gelu(x) + F.gelu(x, approximate="tanh"),
        lambda m, x: torch.add(x, torch.sin(x), alpha=2) - torch.sub(x, torch.cos(x), alpha=3),
        lambda m, x: torch.div(x, 0.3, rounding_mode="floor"),
        lambda m, x: x.var(2, correction=0) + x.mean(2) + x.amax(2) + torch.softmax(x, 2)[..., 0],
        lambda m, x: x.gather(2, torch.zeros_like(x, dtype=torch.int64)),
    ],
)
def test_arguments_by_keyword(run):
    lifted(run)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: x[..., ::2],
        lambda m, x: x[..., 0:8:2],
        lambda m, x: x[..., 1::2][..., 1:3],
        lambda m, x: x[..., -5::3],
    ],
)
def test_strided_slices_keep_their_stride(run):
    lifted(run)


@pytest.mark.parametrize("module", [torch.nn.LayerNorm(D), torch.nn.LayerNorm(D, bias=False), torch.nn.RMSNorm(D)])
def test_norms_are_one_node(module):
    (only,) = ops_of(lifted(lambda m, x: m.norm(x), norm=module))
    assert only in ("layer_norm", "rms_norm")


def test_sizes_are_expressions():
    program = lifted(
        lambda m, v, t: torch.cat([v, t], 1)[:, v.shape[1] :].reshape(t.shape[0] * t.shape[1], D),
        {"visual": ("B", "nv", D), "text": ("B", "nt", D)},
    )
    b, nv, nt = (symbol(s) for s in ("B", "nv", "nt"))
    assert [shape_of(n) for n in program.stages["toy"].input_nodes().values()] == [(b, nv, D), (b, nt, D)]
    joined = single(Function(lambda m, v, t: torch.cat([v, t], 1) * 2), {"v": ("B", "nv", D), "t": ("B", "nt", D)})
    assert shape_of(joined.stages["toy"].output_nodes()["y"]) == (b, simplify(nv + nt), D)
    assert shape_of(program.stages["toy"].output_nodes()["y"]) == (simplify(b * nt), D)


def test_a_size_may_be_a_factor():
    lifted(lambda m, x: x.sum(1) / x.shape[1] + x.shape[0])


# -------------------------------------------------------------------------------------------------------- attention
def test_attention_is_one_node_on_flat_rows():
    program = lifted(lambda m, x: rows(F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(x)), heads(x))),
                     a=linear(), b=linear())  # fmt: skip
    assert ops_of(program).count("mmopt.attention") == 1
    assert "scaled_dot_product_attention" not in ops_of(program)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 2.0}])
def test_attention_with_options(options):
    program = lifted(lambda m, x: rows(F.scaled_dot_product_attention(heads(x), heads(x), heads(x), **options)))
    assert "mmopt.attention" in ops_of(program)


def test_grouped_heads():
    def run(m, x):
        k = heads(x[..., :4], 2)
        return rows(F.scaled_dot_product_attention(heads(x, 4), k, k, enable_gqa=True))

    assert "mmopt.attention" in ops_of(lifted(run))


def test_cross_attention():
    def run(m, x, y):
        return rows(F.scaled_dot_product_attention(heads(x), heads(y), heads(y)))

    assert "mmopt.attention" in ops_of(lifted(run, {**X, "y": ("B", 5, D)}))


def masked(m, x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return rows(F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=mask))


def masked_groups(m, x):
    k = heads(x[..., :4], 2)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return rows(F.scaled_dot_product_attention(heads(x, 4), k, k, attn_mask=mask, enable_gqa=True))


@pytest.mark.parametrize("run", [masked, masked_groups])
def test_attention_with_a_mask_stays_as_traced(run):
    assert "scaled_dot_product_attention" in ops_of(lifted(run))


def test_upper_left_causality_stays_as_traced():
    """Torch aligns causal attention of unequal lengths upper left, the canonical operator lower right."""

    def run(m, x, y):
        return rows(F.scaled_dot_product_attention(heads(x), heads(y), heads(y), is_causal=True))

    assert "scaled_dot_product_attention" in ops_of(lifted(run, {**X, "y": ("B", 5, D)}))


def test_canonical_operators_stay_one_node():
    def run(m, x, past, keys, values):
        x = ops.rotary(x, x[..., :2], x[..., 2:4], 2)
        return ops.cached_attention(x, x, x, keys, values, past, 2, 2)[0]

    cache = ("B", 2, 8, D // 2)
    program = lifted(run, {**X, "past": (("B",), torch.int64), "keys": cache, "values": cache})
    assert ops_of(program)[-2:] == ["mmopt.cached_attention", "getitem"]
    assert "mmopt.rotary" in ops_of(program)


# ---------------------------------------------------------------------------------------------------------- weights
def test_parameters_keep_their_names():
    program = lifted(lambda m, x: m.first(m.second(x)), first=linear(), second=linear(bias=False))
    assert set(program.weights) == {"first.weight", "first.bias", "second.weight"}
    assert program.weights["first.weight"].data_ptr() != 0


def test_constants_of_two_stages_do_not_take_each_others_place():
    weights = {}
    stages = [
        trace(draw(Function(lambda m, x, i=i: x * torch.tensor([1.0, 2.0 + i]).repeat(4))), X, ["y"], weights)
        for i in range(2)
    ]
    values = {"x": torch.ones(1, 1, D)}
    assert [float(s.run(weights, values)["y"][0, 0, 1]) for s in stages] == [2.0, 3.0]


def test_equal_constants_of_two_stages_are_stored_once():
    weights = {}
    for _ in range(2):
        trace(draw(Function(lambda m, x: x * torch.tensor([1.0, 2.0]).repeat(4))), X, ["y"], weights)
    assert len(weights) == 1


def test_the_text_does_not_depend_on_the_run():
    texts = {stage_text(lifted(masked).stages["toy"]) for _ in range(2)}
    assert len(texts) == 1


# ---------------------------------------------------------------------------------------------------------- refused
def add_in_place(m, x):
    y = x * 2
    y += 1
    return y


def write_through_a_view(m, x):
    y = torch.zeros_like(x)
    y[..., :4] = x[..., :4]
    return y


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (add_in_place, "add_: .* writes in place"),
        (write_through_a_view, "copy_: .* writes in place"),
        (lambda m, x: F.relu(x * 2, inplace=True), "relu_: .* writes in place"),
        (lambda m, x: x + torch.rand(D), "rand: .* draws at random"),
        (lambda m, x: F.dropout(x, 0.5, True) + torch.randn_like(x), "randn_like: .* draws at random"),
        (lambda m, x: x * x.shape[1] ** -0.5, "a size is used as a real number"),
        (lambda m, x: x[x > 0], "size u0 depends on data"),
        (lambda m, x: x * torch.arange(0, 2 * D, 2), "arange with a step is not supported"),
        (lambda m, x: x.view(x.shape[0], 7, D), "nt"),  # torch's own error: the size is fixed to that of the example
        (lambda m, x: x * 2 if x.shape[1] > 4 else x, "nt"),
    ],
)
def test_refused(run, why):
    with pytest.raises(Exception, match=why):
        single(Function(run), X)


def test_a_holder_names_the_weights():
    program = single(Holder("language", Function(lambda m, x: m.a(x), a=linear())), X)
    assert set(program.weights) == {"language.a.weight", "language.a.bias"}
