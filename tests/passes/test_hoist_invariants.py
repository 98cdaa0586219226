"""Nothing that a loop does not change is computed in the loop."""

from dataclasses import replace

import pytest
import torch
from toys import (
    DTYPES,
    MARKER,
    VOCAB,
    Beside,
    D,
    Function,
    Prefix,
    Rows,
    before_and_after,
    beside,
    caught,
    chat,
    flow,
    linear,
    ops_of,
    same,
    single,
    twice,
    unchanged,
)

from mmopt.ir import ops
from mmopt.passes import hoist_invariants
from mmopt.passes.hoist_invariants import HoistInvariants
from mmopt.rewrite import contracts
from mmopt.rewrite.contracts import compare
from mmopt.search.optimize import optimize
from mmopt.spec.schedule import Call

X = {"x": ("N", 4, D)}


# ---------------------------------------------------------------------------------------------- out of a loop
def test_keys_and_values_of_a_prefix_leave_the_loop(snapshot):
    before = flow()
    after, report = HoistInvariants()(before)
    snapshot("hoist_invariants", str(before) + "\n\n" + str(after))
    assert report.rewrites == ["step: 4 values that the loop does not change are computed once before it"]
    assert ops_of(after, "step.once") == ["linear"] * 4
    assert not any("step.k" in w or "step.v" in w for w in after.stages["step"].weights())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(gated, dtype):
    before = flow(gated, dtype)
    assert compare(before, HoistInvariants()(before)[0]) is None


def test_it_is_computed_once():
    after, _ = HoistInvariants()(flow())
    calls = []
    prompts = [[3, 4, 5], [6]]
    made = after(prompts, max_new_tokens=4, ignore_eos=True, observe=lambda phase, call, *_: calls.append(call.stage))
    assert calls.count("step.once") == 1
    assert calls.count("step") == 3
    assert made["tokens"] == flow()(prompts, max_new_tokens=4, ignore_eos=True)["tokens"]


def changes_everything():
    """A step that reads nothing but what the loop changes."""
    step = Function(lambda m, x: x + m.a(x), a=linear(VOCAB, bias=False))
    step.a = torch.nn.Linear(VOCAB, VOCAB)
    return chat(Prefix(), outputs=["logits", "prefix"], step=(step, {"logits": ("B", 1, VOCAB)}))


def cheap():
    """What could move is no product: storing it would cost more than it saves."""
    step = Function(lambda m, x, p: x + m.a(x) * torch.tanh(p).mean())
    step.a = torch.nn.Linear(VOCAB, VOCAB)
    inputs = {"logits": ("B", 1, VOCAB), "prefix": ("B", 3, D)}
    return chat(Prefix(), outputs=["logits", "prefix"], step=(step, inputs))


def called_outside_too():
    """The same stage makes the state that the loop starts from."""
    program = flow()
    program.schedules = program.schedules.replaced(
        text=(*program.schedules.text[:-1], Call("step"), program.schedules.text[-1])
    )
    return program


def called_twice_in_the_loop():
    """Once for each of two prefixes: what is computed for one must not serve the other."""
    program = flow()
    loop = program.schedules.text[-1]
    program.schedules = program.schedules.replaced(
        text=(*program.schedules.text[:-1], replace(loop, body=(*loop.body, Call("step", {"prefix": "other"}))))
    )
    return program


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (changes_everything, "step: every product in it depends on what the loop changes"),
        (cheap, "step: every product in it depends on what the loop changes"),
        (called_outside_too, "step: called elsewhere too: a second copy would hold its weights twice"),
        (called_twice_in_the_loop, "step: called elsewhere too: a second copy would hold its weights twice"),
        (lambda: chat(Rows()), "language_model: every product in it depends on what the loop changes"),
    ],
)
def test_left_in_the_loop(program, why):
    unchanged(program(), HoistInvariants(), why)


def test_a_value_that_the_loop_writes_under_another_name_stays():
    program = flow()
    loop = program.schedules.text[-1]
    step, write = Call("step", {"prefix": "newest"}), Call("language_model", {"prefix": "newest"})
    program.schedules = program.schedules.replaced(
        text=(*program.schedules.text[:-1], replace(loop, body=(loop.body[0], step, write)))
    )
    unchanged(program, HoistInvariants(), "step: every product in it depends on what the loop changes")


def test_twice():
    twice(flow(), HoistInvariants())
    twice(flow(gated=True), HoistInvariants())


def depends_on_the_loop(monkeypatch):
    """A broken pass: it takes the state for a value that the loop does not change."""
    split = hoist_invariants.split_stage
    monkeypatch.setattr(
        hoist_invariants, "split_stage", lambda stage, fixed, *names: split(stage, fixed | {"logits"}, *names)
    )
    return HoistInvariants()


def test_a_value_that_depends_on_the_loop_is_caught(monkeypatch):
    caught(flow(), depends_on_the_loop(monkeypatch), "step")


# A gate that starts at zero multiplies all attention away: nothing behind it can be told from nothing.
class ForgetsAttention(HoistInvariants):
    """A broken pass: the keys and values of the prefix are negated on their way out of the loop."""

    def hoist(self, program, loop, report):
        before, loop = super().hoist(program, loop, report)
        if "step.once" in program.stages:
            program.stages["step.once"] = negated(program.stages["step.once"])
        return before, loop


def negated(stage):
    from mmopt.ir.graph import LINEAR, MUL, rebuild, shape_of

    def visit(b, n, args):
        if n.target is LINEAR:
            return b.emit(MUL, (b.copy(n, args), -1.0), shape_of(n), n.meta["dtype"])

    return stage.replaced(rebuild(stage.graph, visit))


def test_what_stands_behind_a_gate_of_zero_is_checked(monkeypatch):
    gated = flow(gated=True)
    assert not any(w.any() for name, w in gated.weights.items() if "gates" in name)
    caught(gated, ForgetsAttention(), "step")
    monkeypatch.setattr(contracts, "drawn_weights", lambda program, seed: dict(program.weights))
    optimize(gated, [ForgetsAttention()])  # with the gates as they are nothing is noticed


# ------------------------------------------------------------------------------------------ to compile time
def with_queries(run, **parts):
    return single(Function(run, queries=torch.nn.Parameter(torch.ones(1, 3, D)), **parts), X)


def learned_rows(m, x):
    """Projections of learned rows that are broadcast along the batch depend on weights alone."""
    q = torch.tanh(m.a(m.queries.expand(x.shape[0], -1, -1)))
    return torch.cat([m.b(q), m.b(x)], 1)


def test_what_depends_on_weights_alone_is_a_constant(snapshot):
    before = with_queries(learned_rows, a=linear(), b=linear())
    after, report = HoistInvariants()(before)
    snapshot("hoist_constants", before_and_after(before, after))
    assert report.rewrites == ["toy: 3 operators depend on weights alone and are computed at compile time"]
    same(before, after, ({"N": 1}, {"N": 3}))


def test_a_constant_that_meets_data_goes_no_further():
    before = with_queries(lambda m, x: m.a(m.queries.expand(x.shape[0], -1, -1) + x[:, :3]), a=linear())
    unchanged(before, HoistInvariants(), "toy: no operator depends on weights alone")


def test_constants_broadcast_along_other_dimensions_stay():
    toy = Function(lambda m, x: m.a(m.queries[:, :1].expand(1, x.shape[1], D)) + x, a=linear())
    toy.queries = torch.nn.Parameter(torch.ones(1, 3, D))
    unchanged(single(toy, {"x": ("B", "nt", D)}), HoistInvariants(), "toy: no operator depends on weights alone")


def test_constants_twice():
    twice(with_queries(learned_rows, a=linear(), b=linear()), HoistInvariants())


# --------------------------------------------------------------------------------------- out of several loops at once
def test_keys_and_values_of_images_leave_both_loops(snapshot):
    before = beside(Beside(layers=1))
    after, report = HoistInvariants()(before)
    snapshot("hoist_shared", str(before) + "\n\n" + str(after))
    assert report.rewrites == ["language_model: 2 values that no loop changes are computed once before all of them"]
    assert ops_of(after, "language_model.once") == ["linear"] * 2
    assert "media" not in after.stages["language_model"].inputs
    assert not any(".k." in w or ".v." in w for w in after.stages["language_model"].weights())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [{}, {"blocks": 2, "together": True, "before": "all_images", "sees": True}])
def test_shared_same_numbers(kind, dtype):
    before = beside(dtype=dtype, **kind)
    assert compare(before, HoistInvariants()(before)[0]) is None


def test_shared_is_computed_once():
    before, calls = beside(), []
    after, _ = HoistInvariants()(before)
    prompts, pixels = [[3, MARKER, 4, 5], [6, 7], [MARKER, 4, MARKER, 3]], torch.randn(3, 3, 4, 4)
    options = {"max_new_tokens": 4, "ignore_eos": True}
    made = after(prompts, pixels, observe=lambda phase, call, *_: calls.append(call.stage), **options)
    assert calls.count("language_model.once") == 1
    assert calls.count("language_model") == 3 + 3
    assert made["tokens"] == before(prompts, pixels, **options)["tokens"]


def test_shared_without_any_image():
    before = beside()
    after, _ = HoistInvariants()(before)
    made = [p([[3, 4, 5], [6]], max_new_tokens=4, ignore_eos=True) for p in (before, after)]
    assert made[0]["tokens"] == made[1]["tokens"]
    assert not made[1]["language_model.once.0"][:, 1:].numel()  # one block of zeros for each sample


def changed(kind):
    """A program of images outside the text, but something that its language model reads is not what it was."""
    program = beside()
    chunks, steps = program.schedules.text[1:]
    model = chunks.body[1]
    if kind == "read under two names":
        chunks, model = replace(chunks, body=(chunks.body[0], replace(model, rename={"media": "others"}))), None
    elif kind == "written in a loop":
        stage = program.stages["images"]
        program.stages["again"] = stage.replaced(stage.graph)
        chunks = replace(chunks, body=(Call("again", {"image_rows": "media"}), *chunks.body))
    elif kind == "made for each chunk":
        chunks, steps = (
            replace(lp, body=tuple(replace(c, rename=c.rename | {"media": "chunk.media"}) for c in lp.body))
            for lp in (chunks, steps)
        )
    program.schedules = program.schedules.replaced(text=(program.schedules.text[0], chunks, steps))
    return program


@pytest.mark.parametrize("kind", ["read under two names", "written in a loop", "made for each chunk"])
def test_what_a_loop_may_change_stays_in_both(kind):
    after, report = HoistInvariants()(changed(kind))
    assert "language_model.once" not in after.stages
    assert not report.rewrites


class SeenProjected(Beside):
    """A product with what the host makes anew for each call."""

    def forward(self, text, media, seen, attends):
        return self.head(text + self.mlp[0](attends[..., None].float().expand(text.shape)))


def test_what_the_host_makes_for_each_call_stays():
    program = beside(SeenProjected())
    unchanged(program, HoistInvariants(), "language_model: every product in it depends on what the loop changes")


class OwnAttention(Beside):
    """Attention written out, with a mask of its own: keys of all images are laid side by side, behind the heads."""

    def forward(self, text, media, seen, attends):
        (batch, rows), (blocks, keys) = text.shape[:2], media.shape[1:3]
        q = self.q[0](text).view(batch, rows, 2, 4).transpose(1, 2)
        k, v = (x(media).view(batch, blocks * keys, 1, 4).transpose(1, 2) for x in (self.k[0], self.v[0]))
        hidden = ~seen[:, None, :, :, None].expand(batch, 1, rows, blocks, keys).reshape(batch, 1, rows, -1)
        scores = (q @ k.transpose(2, 3)).masked_fill(hidden, -1e9)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(text.shape) * attends[..., None]
        x = text + self.o[0](out)
        return self.head(x + ops.attention(x, x, x, 2, 2, causal=True))


class Mixed(Beside):
    """Keys of a block depend on the other blocks: the image before it in the prompt would change what is kept of it."""

    def forward(self, text, media, seen, attends):
        media = media + media.mean(1, keepdim=True)
        return super().forward(text, media, seen, attends)


@pytest.mark.parametrize("language", [OwnAttention, Mixed])
def test_what_is_not_made_image_by_image_stays(language):
    why = "language_model: what no loop changes is not made image by image, each block by itself"
    unchanged(beside(language()), HoistInvariants(), why)
    assert compare(beside(language()), optimize(beside(language())).program) is None


def test_shared_twice():
    twice(beside(), HoistInvariants())


class Negated(HoistInvariants):
    """A broken pass: keys and values of images are negated on their way out of the loops."""

    def hoist_shared(self, program, report):
        schedule = super().hoist_shared(program, report)
        program.stages["language_model.once"] = negated(program.stages["language_model.once"])
        return schedule


def test_wrong_keys_of_images_are_caught(monkeypatch):
    caught(beside(), Negated(), "language_model")
    monkeypatch.setattr(contracts, "drawn_weights", lambda program, seed: dict(program.weights))
    optimize(beside(), [Negated()])  # gates of zero: nothing is noticed with the weights as they are
