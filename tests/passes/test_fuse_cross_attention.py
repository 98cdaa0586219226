"""Cross-attention without masks and gates."""

import pytest
import torch
import torch.nn.functional as F
from toys import (
    CROSS_SIZES,
    DTYPES,
    MARKER,
    VOCAB,
    Beside,
    D,
    Function,
    before_and_after,
    beside,
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
from mmopt.ir.graph import MUL, SEGMENT_ATTENTION, rebuild, shape_of
from mmopt.passes.drop_unread_rows import DropUnreadRows
from mmopt.passes.fuse_cross_attention import FuseCrossAttention
from mmopt.passes.hoist_invariants import HoistInvariants
from mmopt.rewrite import contracts
from mmopt.rewrite.contracts import compare
from mmopt.search.optimize import optimize

AT = ({"B": 1, "nt": 1, "nv": 2}, {"B": 3, "nt": 4, "nv": 5})
X = {"x": ("B", "nt", D)}
Q_AND_K = {"q": ("B", "nt", D), "k": ("B", "nv", D), "v": ("B", "nv", D)}


# ------------------------------------------------------------------------------------------- attention written out
def heads(x, n):
    return x.view(*x.shape[:2], n, x.shape[2] // n).transpose(1, 2)


def flat(x):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def on_q(m, q, k, v):
    q, k, v = heads(m.a(q) * 0.5, 2), heads(k, 2), heads(v, 2)
    return m.b(flat(torch.softmax(q @ k.transpose(-1, -2), -1) @ v))


def on_heads(m, q, k, v):
    q, k, v = heads(m.a(q), 2) * 0.5, heads(k, 2), heads(v, 2)
    return m.b(flat(torch.softmax(q @ k.transpose(2, 3), -1) @ v))


def on_scores(m, q, k, v):
    q, k, v = heads(m.a(q), 2), heads(k, 2), heads(v, 2)
    return m.b(flat(torch.softmax(0.5 * (q @ k.transpose(2, 3)), 3) @ v))


def divided(m, q, k, v):
    q, k, v = heads(m.a(q), 4), heads(k, 4), heads(v, 4)
    return m.b(flat(torch.softmax(torch.matmul(q * 3, k.transpose(2, 3)) / 1.5, -1) @ v))


def one_key_head(m, q, k, v):
    """Heads that grow from one by broadcasting are grouped heads."""
    q, k, v = heads(m.a(q), 2), heads(k[..., : D // 2], 1), heads(v[..., D // 2 :], 1)
    return m.b(flat(torch.softmax(q @ k.transpose(2, 3), -1) @ v))


def turned_at_once(m, q, k, v):
    q, v = heads(m.a(q), 2), heads(v, 2)
    keys = k.view(*k.shape[:2], 2, D // 2).permute(0, 2, 3, 1)
    return m.b(flat(torch.softmax(q @ keys, -1) @ v))


WRITTEN = (on_q, on_heads, on_scores, divided, one_key_head)


@pytest.mark.parametrize("run", WRITTEN)
def test_written_out_is_one_operator(run):
    before = single(Function(run, a=linear(), b=linear()), Q_AND_K)
    after, report = FuseCrossAttention()(before)
    assert report.rewrites == ["toy: 1 attentions written out became one operator each"]
    assert ops_of(after).count("mmopt.attention") == 1
    assert not {"softmax", "matmul", "div"} & set(ops_of(after))
    same(before, after, AT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_out_same_numbers(dtype):
    before = single(Function(on_scores, a=linear(), b=linear()), Q_AND_K, dtype=dtype)
    same(before, FuseCrossAttention()(before)[0], AT)


def test_written_out_text(snapshot):
    before = single(Function(on_scores, a=linear(), b=linear()), Q_AND_K)
    snapshot("fuse_written_out", before_and_after(before, FuseCrossAttention()(before)[0]))


def test_a_mask_of_its_own_is_left():
    def run(m, q, k, v, mask):
        q, k, v = heads(m.a(q), 2), heads(k, 2), heads(v, 2)
        scores = (q @ k.transpose(2, 3)).masked_fill(~mask[:, None, None], -1e9)
        return flat(torch.softmax(scores, -1) @ v)

    before = single(Function(run, a=linear()), Q_AND_K | {"mask": (("B", "nv"), torch.bool)})
    unchanged(before, FuseCrossAttention(), "its scores have a mask of their own, which only `cross_attention`")


def values_of_more_heads(m, q, k, v):
    q, k, v = heads(m.a(q), 2), heads(k[..., : D // 2], 1), heads(v, 2)
    return flat(torch.softmax(q @ k.transpose(2, 3), -1) @ v)


def wider_values(m, q, k, v):
    q, k, v = heads(m.a(q)[..., : D // 2], 2), heads(k[..., : D // 2], 2), heads(v, 2)
    return flat(torch.softmax(q @ k.transpose(2, 3), -1) @ v)


def one_query_for_all(m, q, k, v):
    q, k, v = heads(m.queries, 2), heads(k, 2), heads(v, 2)
    return flat(torch.softmax(q @ k.transpose(2, 3), -1) @ v)


def over_the_queries(m, q, k, v):
    q, k, v = heads(m.a(q), 2), heads(k, 2), heads(v, 2)
    return flat(torch.softmax(q @ k.transpose(2, 3), 2) @ v)


def other_order(m, q, k, v):
    """Rows and heads are put back in another order than they came in."""
    q, k, v = heads(m.a(q), 2), heads(k, 2), heads(v, 2)
    return (torch.softmax(q @ k.transpose(2, 3), -1) @ v).permute(0, 2, 3, 1).reshape(q.shape[0], q.shape[2], D)


@pytest.mark.parametrize(
    "run", [values_of_more_heads, wider_values, one_query_for_all, over_the_queries, other_order, turned_at_once]
)
def test_what_only_looks_like_attention_stays_right(run):
    module = Function(run, a=linear(), b=linear(), queries=torch.nn.Parameter(torch.ones(1, 3, D)))
    before = single(module, Q_AND_K)
    after, _ = FuseCrossAttention()(before)
    same(before, after, AT)
    assert "mmopt.attention" not in ops_of(after)


def test_one_sample_of_keys_for_all_stays_right():
    def run(m, q, k, v):
        q, k, v = heads(m.a(q), 2), heads(k, 2), heads(v, 2)
        return flat(torch.softmax(q @ k.transpose(2, 3), -1) @ v)

    inputs = {"q": ("B", "nt", D), "k": (1, "nv", D), "v": (1, "nv", D)}
    before = single(Function(run, a=linear()), inputs)
    after, _ = FuseCrossAttention()(before)
    same(before, after, AT)
    assert "mmopt.attention" not in ops_of(after)


# ------------------------------------------------------------------------------------------------------------ gates
GATES = {"one": (1,), "number": (), "columns": (D,), "columns of rows": (1, 1, D)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", GATES)
def test_gates_move_into_weights(shape, bias, side, dtype):
    def run(m, x):
        return m.gate.tanh() * m.a(x) if side == "left" else m.a(x) * m.gate.tanh()

    gate = torch.nn.Parameter(torch.zeros(GATES[shape]))
    before = single(Function(run, a=linear(bias=bias), gate=gate), X, dtype=dtype)
    after, report = FuseCrossAttention()(before)
    assert report.rewrites == ["toy: 1 gates moved into the weights of their projections"]
    assert ops_of(after) == ["linear"]
    same(before, after, AT)


def test_gates_text(snapshot):
    def run(m, x):
        return x + m.a(x) * m.gate.tanh()

    before = single(Function(run, a=linear(), gate=torch.nn.Parameter(torch.zeros(1))), X)
    snapshot("fuse_gates", before_and_after(before, FuseCrossAttention()(before)[0]))


def read_without(m, x):
    y = m.a(x)
    return y * m.gate.tanh() + y


def weight_read_too(m, x):
    return m.a(x) * m.gate.tanh() + m.a(torch.tanh(x))


@pytest.mark.parametrize("run", [read_without, weight_read_too])
def test_what_is_read_without_its_gate_too_is_left(run):
    before = single(Function(run, a=linear(), gate=torch.nn.Parameter(torch.zeros(1))), X)
    unchanged(before, FuseCrossAttention(), "linear_default or its weight is read without the gate too")


NO_GATE = "toy: no attention over images outside the text, none written out, no gates"


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.a(x) * m.rows.tanh(),  # one for each row
        lambda m, x: m.a(x) * m.wide.tanh(),  # the product has a dimension more than the projection
        lambda m, x: m.a(x) * x,  # made of the rows
        lambda m, x: torch.tanh(m.a(x)) * m.gate,  # not of a projection
        lambda m, x: m.a(x) * 2.0,
        lambda m, x: (m.a(x) * m.fine.double()).float(),  # in another dtype
        lambda m, x: F.linear(x, x.mean((0, 1))[None] * m.a.weight) * m.gate,  # the weight is no constant
    ],
)
def test_what_is_no_gate_is_left(run):
    parts = {"rows": (4, 1), "wide": (1, 1, 1, D), "gate": (1,), "fine": (D,)}
    gates = {k: torch.nn.Parameter(torch.zeros(s)) for k, s in parts.items()}
    before = single(Function(run, a=linear(), **gates), {"x": ("B", 4, D)})
    unchanged(before, FuseCrossAttention(), NO_GATE)
    same(before, FuseCrossAttention()(before)[0], AT)


def test_a_gate_of_another_dtype_is_left():
    gate = torch.nn.Parameter(torch.zeros(D))
    before = single(Function(lambda m, x: m.a(x) * m.gate.float(), a=linear(), gate=gate), X, dtype=torch.bfloat16)
    unchanged(before, FuseCrossAttention(), NO_GATE)


def test_two_gates_one_after_the_other():
    def run(m, x):
        return m.a(x) * m.gate.tanh() * m.columns

    parts = {"gate": torch.nn.Parameter(torch.zeros(1)), "columns": torch.nn.Parameter(torch.zeros(D))}
    before = single(Function(run, a=linear(), **parts), X)
    after, _ = FuseCrossAttention()(before)
    same(before, after, AT)


def test_gates_of_zero_are_verified(monkeypatch):
    """With the gates as they are, zero, nothing behind them can be told from nothing."""
    before, broken = beside(), Altered(square_gate)
    assert not any(w.any() for name, w in before.weights.items() if "gates" in name)
    caught(before, broken, "language_model")
    monkeypatch.setattr(contracts, "drawn_weights", lambda program, seed: dict(program.weights))
    optimize(before, [broken])


# --------------------------------------------------------------------------------------------------------- segments
FAMILIES = {
    "blocks of one": {},
    "several blocks": {"blocks": 2, "together": True},
    "several blocks, before": {"blocks": 3, "together": True, "before": "all_images", "sees": True},
    "together": {"together": True},
    "before": {"before": "all_images"},
    "tiles apart": {"blocks": 2, "reset": True},
}


def fused(program):
    """(before, after): K and V hoisted in both, masks cut in the second."""
    hoisted, _ = HoistInvariants()(program)
    return hoisted, *FuseCrossAttention()(hoisted)


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_become_segments(name):
    before, after, report = fused(beside(**FAMILIES[name]))
    assert report.rewrites[-1] == (
        "language_model: 2 cross-attentions read the keys that their rows see, without a mask"
    )
    made = after.stages["language_model"]
    assert ops_of(after, "language_model").count("mmopt.segment_attention") == 2
    assert not {"seen", "attends", "media"} & set(made.inputs)
    assert ("key_mask" in made.inputs) == (name not in ("blocks of one",))
    assert after.info.cross_kv == {f"language_model.once.{i}": ("key", "value")[i % 2] for i in range(4)}
    assert not before.info.cross_kv
    for seed in range(3):
        assert compare(before, after, seed) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["blocks of one", "several blocks, before"])
def test_segments_same_numbers(name, dtype):
    plain = beside(dtype=dtype, **FAMILIES[name])
    assert compare(plain, fused(plain)[1]) is None


def test_segments_text(snapshot):
    before, after, _ = fused(beside(Beside(layers=1)))
    snapshot("fuse_segments", before_and_after(before, after, "language_model"))
    snapshot("fuse_segments_program", str(fused(beside(Beside(layers=1), blocks=2))[1]))


@pytest.mark.parametrize("options", [{"kv_heads": 2}, {"gate": ()}, {"gate": (D,)}, {"gate": (1, 1, D), "bias": False}])
def test_other_layers(options):
    plain = beside(Beside(**options))
    assert compare(plain, fused(plain)[1]) is None
    assert fused(plain)[2].rewrites[0] == "language_model: 4 gates moved into the weights of their projections"


def test_keys_made_in_each_call_are_left():
    before = beside()
    after, report = FuseCrossAttention()(before)
    assert report.skipped[-2:] == [
        "language_model: cross_attention_default: K and V are made in each call",
        "language_model: cross_attention_default_1: K and V are made in each call",
    ]
    assert after.info == before.info
    assert after.stages["language_model"].inputs == before.stages["language_model"].inputs


def test_a_part_of_the_rows_is_left():
    """The last layer works on the last row alone: its attention keeps the mask, the first one's is cut."""
    plain, _ = DropUnreadRows()(beside(Beside(mixed=False)))
    before, after, report = fused(plain)
    assert [w for w in report.skipped if "cross_attention" in w] == [
        "language_model: cross_attention_default_1: works on a part of the rows"
    ]
    made = ops_of(after, "language_model")
    assert (made.count("mmopt.segment_attention"), made.count("mmopt.cross_attention")) == (1, 1)
    assert {"seen", "attends"} <= set(after.stages["language_model"].inputs)
    assert after.info.cross_kv == {"language_model.once.0": "key", "language_model.once.1": "value"}
    assert compare(before, after) is None
    assert compare(beside(Beside(mixed=False)), after) is None


class Shared(Beside):
    """Keys and values of the first layer serve the second too, there the other way round."""

    def forward(self, text, media, seen, attends):
        k, v, x = self.k[0](media), self.v[0](media), text
        x = x + self.o[0](ops.cross_attention(self.q[0](x), k, v, seen, attends, 2, 1))
        x = x + ops.attention(x, x, x, 2, 2, causal=True)
        x = x + self.o[1](ops.cross_attention(self.q[1](x), v, k, seen, attends, 2, 1))
        return self.head(x + ops.attention(x, x, x, 2, 2, causal=True))


def test_keys_that_are_values_elsewhere_stay_right():
    plain = beside(Shared())
    assert compare(plain, fused(plain)[1]) is None


class VisibleTiles(Beside):
    """A row that sees nothing is told so by `seen` itself, which stays an input."""

    def forward(self, text, media, seen, attends):
        x = text + ops.cross_attention(text, self.k[0](media), self.v[0](media), seen, attends, 2, 1)
        x = x * seen.any(-1)[..., None]
        return self.head(x + ops.attention(x, x, x, 2, 2, causal=True))


def test_inputs_that_something_else_reads_stay():
    plain = beside(VisibleTiles())
    after = fused(plain)[1]
    assert "seen" in after.stages["language_model"].inputs
    assert "attends" not in after.stages["language_model"].inputs
    assert compare(plain, after) is None


def test_without_segments():
    hoisted, _ = HoistInvariants()(beside())
    after, report = FuseCrossAttention(segments=False)(hoisted)
    assert report.rewrites == ["language_model: 4 gates moved into the weights of their projections"]
    assert not after.info.cross_kv
    assert compare(hoisted, after) is None


def test_programs_without_such_images_are_left():
    unchanged(
        chat(Function(lambda m, v, t: m.a(torch.cat([v, t], 1)), a=linear(VOCAB))), FuseCrossAttention(), "no gat"
    )


def test_twice():
    twice(beside(), HoistInvariants(), FuseCrossAttention())
    twice(beside(**FAMILIES["several blocks, before"]), HoistInvariants(), FuseCrossAttention())
    twice(single(Function(on_scores, a=linear(), b=linear()), Q_AND_K), FuseCrossAttention())


def test_a_second_run_leaves_the_info():
    _, after, _ = fused(beside())
    again, report = FuseCrossAttention()(after)
    assert again.info == after.info
    assert not report.rewrites


@pytest.mark.parametrize("blocks", [1, 2])
def test_whole_programs_give_the_same_ids(blocks):
    plain = beside(blocks=blocks, together=blocks > 1)
    after = optimize(plain).program
    g = torch.Generator().manual_seed(3)
    prompts = [[3, MARKER, 4, MARKER, 5, 6], [7, 8, 9], [MARKER, 4, MARKER, MARKER, 3]]
    pixels = torch.randn(5, 3, 4, 4, generator=g)
    one, two = (p(prompts, pixels, max_new_tokens=6, ignore_eos=True) for p in (plain, after))
    assert one["tokens"] == two["tokens"]
    torch.testing.assert_close(one["logits"][:, -1:], two["logits"][:, -1:])


# --------------------------------------------------------------------------------------------------- broken variants
class Altered(FuseCrossAttention):
    """A broken pass: what `alter` returns stands in a node's place."""

    def __init__(self, alter):
        super().__init__()
        self.alter = alter

    def run(self, program, report):
        made = super().run(program, report)
        for name, stage in made.stages.items():
            made.stages[name] = stage.replaced(rebuild(stage.graph, self.alter))
        return made


def square_gate(b, n, args):
    if n.target is MUL and n.meta["const"]:
        return b.copy(n, (b.copy(n, args), args[1]))


def forget_gate(b, n, args):
    return args[0] if n.target is MUL and n.meta["const"] else None


def keep_bias(b, n, args):
    return args[0] if n.target is MUL and n.meta["const"] and len(shape_of(n)) == 1 else None


def swap_keys(b, n, args):
    return b.copy(n, (args[0], args[2], args[1], *args[3:])) if n.target is SEGMENT_ATTENTION else None


def wrong_scale(b, n, args):
    return b.copy(n, (*args[:8], 0.6)) if n.target is SEGMENT_ATTENTION else None


def wrong_heads(b, n, args):
    return b.copy(n, (*args[:5], 2, 1, *args[7:])) if n.target is SEGMENT_ATTENTION else None


def no_key_mask(b, n, args):
    return b.copy(n, (*args[:7], None, args[8])) if n.target is SEGMENT_ATTENTION else None


@pytest.mark.parametrize("alter", [square_gate, forget_gate, keep_bias, swap_keys, wrong_scale, wrong_heads])
def test_wrong_graphs_are_caught(alter):
    caught(beside(Beside(kv_heads=2)), Altered(alter), "language_model", [HoistInvariants()])


def test_keys_of_padding_are_caught():
    caught(beside(blocks=3), Altered(no_key_mask), "language_model", [HoistInvariants()])


def broken_host(monkeypatch, name, change):
    """The host makes something else of what it sees."""
    from mmopt.ir import interpreter as media

    right = getattr(media, name)
    monkeypatch.setattr(media, name, lambda *args: change(right(*args)))


def test_segment_rows_shifted_by_one_are_caught(monkeypatch):
    def shifted(chosen):
        rows = (chosen.segment_rows + 1) % (chosen.row_segments.size)
        return type(chosen)(chosen.blocks, rows, chosen.row_segments)

    broken_host(monkeypatch, "segments", shifted)
    caught(beside(), FuseCrossAttention(), "language_model", [HoistInvariants()])


def test_places_shifted_by_one_are_caught(monkeypatch):
    def shifted(chosen):
        places = (chosen.row_segments + 1) % (chosen.segment_rows.size + 1)
        return type(chosen)(chosen.blocks, chosen.segment_rows, places)

    broken_host(monkeypatch, "segments", shifted)
    caught(beside(), FuseCrossAttention(), "language_model", [HoistInvariants()])


def test_keys_of_a_wrong_image_are_caught(monkeypatch):
    def first(chosen):
        blocks = [(b, tuple(0 for _ in seen)) for b, seen in chosen.blocks]
        return type(chosen)(blocks, chosen.segment_rows, chosen.row_segments)

    broken_host(monkeypatch, "segments", first)
    caught(beside(), FuseCrossAttention(), "language_model", [HoistInvariants()])


def test_keys_of_a_wrong_sample_are_caught(monkeypatch):
    def first(chosen):
        blocks = [(max(0, b - 1), seen) for b, seen in chosen.blocks]
        return type(chosen)(blocks, chosen.segment_rows, chosen.row_segments)

    broken_host(monkeypatch, "segments", first)
    with pytest.raises(contracts.ContractError, match="checking pass fuse_cross_attention failed: IndexError"):
        optimize(beside(), [HoistInvariants(), FuseCrossAttention()])


def test_rows_that_see_nothing_of_their_images_are_caught(monkeypatch):
    """A marker without an image sees all of its sample the same: keys of zero would do, values of zero would not."""
    from mmopt.ir import interpreter as media

    right = media.gather

    def zeros(chosen, samples, is_key):
        made = right(chosen, samples, is_key)
        for s, (_, seen) in enumerate(chosen.blocks):
            made[s] *= bool(seen)
        return made

    monkeypatch.setattr(media, "gather", zeros)
    caught(beside(), FuseCrossAttention(), "language_model", [HoistInvariants()])


def test_the_stage_alone_at_many_sizes():
    """The rewritten gates of a stage with its masks, at sizes that no prompt has."""
    hoisted, _ = HoistInvariants()(beside())
    after, _ = FuseCrossAttention(segments=False)(hoisted)
    same(hoisted, after, CROSS_SIZES, "language_model")
