"""Samples that are alike are computed once."""

from dataclasses import replace

import painting_toy as toy
import pytest
import torch
from toys import DTYPES, caught, flow, twice, unchanged

from mmopt.passes import share_samples
from mmopt.passes.share_samples import ShareSamples
from mmopt.passes.split_calls import SplitCalls
from mmopt.rewrite.contracts import compare
from mmopt.spec.schedule import Call, Cat


@pytest.fixture(scope="module")
def sampler():
    return toy.program()


def encode_calls(program, *given):
    """(samples that flow_encode runs on, pictures) of a painting."""
    seen = []

    def observe(phase, call, made, chunk):
        if call.stage == "flow_encode":
            seen.append(len(made["tokens"]))

    return seen, program.generate_images(*given, observe=observe)


def test_both_halves_read_the_same_latents(sampler, snapshot):
    after, report = ShareSamples()(sampler)
    snapshot("share_samples", f"before {toy.generation_text(sampler)}\n\nafter {toy.generation_text(after)}")
    assert report.rewrites == ["flow_encode: runs on one of 2 groups of samples that are alike"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(dtype):
    before = toy.program(dtype=dtype)
    assert compare(before, ShareSamples()(before)[0]) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_half_as_many_samples(sampler, count):
    after, _ = ShareSamples()(sampler)
    noise = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(count))
    given = [[1, 5, 7], [1, 9], [1, 6, 3, 8]][:count], noise
    before, wanted = encode_calls(sampler, *given)
    shared, made = encode_calls(after, *given)
    assert (before, shared) == ([2 * count] * 6, [count] * 6)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)


def test_behind_other_passes(sampler):
    split, _ = SplitCalls()(sampler)
    after, report = ShareSamples()(split)
    assert len(report.rewrites) == 1
    assert compare(sampler, after) is None


def test_one_shared_call_feeds_another(sampler):
    """A second call on what the first wrote for both halves is shared too."""

    def body(calls):
        again = Call("flow_encode", {"latents": Cat(0, ("latents", "latents"))}, {"skip": "other", "tokens": "unread"})
        return [*calls[:2], again, *calls[2:]]

    after, report = ShareSamples()(toy.repaint(sampler, body))
    assert len(report.rewrites) == 2
    assert compare(toy.repaint(sampler, body), after) is None


# ------------------------------------------------------------------------------------------------------- left alone
def encode(**rename):
    """flow_encode reads something else."""

    def body(calls):
        calls[1] = replace(calls[1], rename=calls[1].rename | rename)
        return calls

    return body


def decode(**rename):
    def body(calls):
        calls[3] = replace(calls[3], rename=rename)
        return calls

    return body


def time_from_both(calls):
    """The time differs from half to half: its row is one more value that the halves do not share."""
    calls[0] = replace(calls[0], rename={"time": "prompt.time"})
    return calls


def written_twice(calls):
    """The second call writes another skip, for the first half alone, where the shared one is still awaited."""
    return [*calls[:2], replace(calls[1], writes={"tokens": "unread"}), *calls[2:]]


def carried(calls):
    """The decoder reads the skip of the trip before."""
    return [calls[0], calls[3], calls[1], calls[2]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (encode(latents=Cat(0, ("latents", "others"))), "flow_encode: its samples differ"),
        (encode(time_row="prompt.time_row"), "flow_encode: its samples differ"),
        (time_from_both, "flow_encode: its samples differ"),
        (encode(latents="latents"), "painting: no call reads the same value for several groups of samples"),
        (encode(latents=Cat(1, ("latents", "latents"))), "painting: no call reads the same value for several groups"),
        (written_twice, "flow_encode: skip is written by another call of the loop too"),
        (carried, "flow_encode: skip is carried from trip to trip"),
        (decode(skip=Cat(1, ("skip", "skip"))), "flow_encode: skip is read as a part of something"),
    ],
)
def test_other_schedules(sampler, change, why):
    unchanged(toy.repaint(sampler, change), ShareSamples(), why)


def test_values_that_are_read_after_the_loop(sampler):
    after = (Call("decode_image", {"latents": "skip", "image": "other"}),)
    unchanged(toy.repaint(sampler, after=after), ShareSamples(), "flow_encode: skip is read outside the loop")


def test_a_velocity_that_both_halves_share(sampler):
    """The solver takes the halves of a velocity apart, so it needs both."""

    def body(calls):
        return [calls[0], replace(calls[1], writes={"tokens": "velocity"})]

    unchanged(toy.repaint(sampler, body), ShareSamples(), "flow_encode: velocity is read outside the loop")


def encoder(run):
    def change(m, specs):
        specs["flow_encode"] = replace(specs["flow_encode"], module=toy.Part(m, run))

    return toy.program(change=change)


def mean_over_samples(m, latents, row):
    return toy.flow_encode(m, latents - latents.mean(0, keepdim=True), row)


def next_sample(m, latents, row):
    skip, tokens = toy.flow_encode(m, latents, row)
    return skip, torch.cat([tokens[1:], tokens[:1]])


def numbered(m, latents, row):
    skip, tokens = toy.flow_encode(m, latents, row)
    return skip, tokens * torch.arange(tokens.shape[0])[:, None, None]


def folded(m, latents, row):
    """Samples become rows for a while: what is done there may mix them."""
    skip, tokens = toy.flow_encode(m, latents, row)
    flat = tokens.reshape(-1, toy.WIDTH)
    return skip, (flat + flat.softmax(0)).reshape(tokens.shape)


def norm_over_samples(m, latents, row):
    skip, tokens = toy.flow_encode(m, latents, row)
    return skip, tokens / tokens.norm(dim=(0, 1), keepdim=True)


@pytest.mark.parametrize("run", [mean_over_samples, norm_over_samples, next_sample, numbered, folded])
def test_a_stage_that_mixes_samples(run):
    unchanged(encoder(run), ShareSamples(), "flow_encode: it does not work sample by sample")


def normed(run):
    """The encoder, with more done to its channels, rows and columns [B, C, 4, 4]."""

    def encode(m, latents, row):
        skip, tokens = toy.flow_encode(m, latents, row)
        return run(skip), tokens

    return encode


@pytest.mark.parametrize(
    "run",
    [
        lambda x: torch.nn.functional.group_norm(x, 4),
        lambda x: x / (1 + x.norm(dim=(1, 2), keepdim=True).mean(-1, keepdim=True)),  # global response norm
        lambda x: x - x.mean((-1, -2), keepdim=True),
        lambda x: x + x.sum(1)[:, None],
        lambda x: x + x.amax((1, 2, 3))[:, None, None, None],
        lambda x: torch.nn.functional.pixel_shuffle(x, 2).reshape(-1, 32, 4, 4),
    ],
)
def test_each_sample_has_norms_of_its_own(run):
    before = encoder(normed(run))
    after, report = ShareSamples()(before)
    assert report.rewrites == ["flow_encode: runs on one of 2 groups of samples that are alike"]
    assert compare(before, after) is None


def test_programs_that_do_not_paint():
    after, report = ShareSamples()(flow())
    assert str(after) == str(flow())
    assert report.rewrites == []


def test_twice(sampler):
    twice(sampler, ShareSamples())


# ----------------------------------------------------------------------------------------------------------- broken
def halves_differ(calls):
    """The second half reads what is made of a first velocity in place of the latents."""
    more = [
        Call("flow_decode", {"hidden": "tokens", "velocity": "first"}),
        Call("flow_encode", {"latents": "first", "skip": "unread", "tokens": "twisted"}),
    ]
    last = Call("flow_decode", {"hidden": Cat(0, ("tokens", "twisted")), "skip": Cat(0, ("skip", "skip"))})
    return [calls[0], replace(calls[1], rename={"latents": "latents"}), *more, last]


class FirstOfAll(ShareSamples):
    """A broken pass: groups are taken for alike without a look at them."""

    def share(self, program, loop, report):
        def same(v):
            return Cat(v.dim, (v.names[0],) * len(v.names)) if isinstance(v, Cat) else v

        body = [replace(c, rename={k: same(v) for k, v in c.rename.items()}) for c in loop.body]
        report.did("all that is read for several groups")
        return replace(loop, body=tuple(body))


def test_sharing_what_differs_is_caught(sampler):
    program = toy.repaint(sampler, halves_differ)
    unchanged(program, ShareSamples(), "flow_decode: its samples differ")
    caught(program, FirstOfAll(), "flow_decode")


def test_sharing_a_stage_that_mixes_samples_is_caught(monkeypatch):
    monkeypatch.setattr(share_samples, "works_along", lambda stage, dim: True)
    caught(encoder(numbered), ShareSamples(), "flow_decode")
