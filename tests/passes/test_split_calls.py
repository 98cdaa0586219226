"""Rows that stay the same from trip to trip are fed by a call of their own."""

from dataclasses import replace

import painting_toy as toy
import pytest
import torch
from toys import DTYPES, caught, chat, flow, twice, unchanged

from mmopt.ir.graph import CACHED_ATTENTION
from mmopt.passes.split_calls import SplitCalls
from mmopt.rewrite.contracts import compare
from mmopt.spec.schedule import Call, Cat, Loop


@pytest.fixture(scope="module")
def sampler():
    return toy.program()


def test_the_prompt_gets_a_call_of_its_own(sampler, snapshot):
    after, report = SplitCalls()(sampler)
    snapshot("split_calls", f"before {toy.generation_text(sampler)}\n\nafter {toy.generation_text(after)}")
    assert report.rewrites == ["language_model: rows of prompt.text are fed by a call of their own, before the others"]
    assert after.stages.keys() == sampler.stages.keys()  # both calls run the same stage: no weight is stored twice


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(dtype):
    before = toy.program(dtype=dtype)
    assert compare(before, SplitCalls()(before)[0]) is None


@pytest.mark.parametrize("lengths", [(2,), (9,), (2, 9, 5), (24, 2)])
def test_same_pictures(sampler, lengths):
    toy.same_pictures(sampler, SplitCalls()(sampler)[0], lengths)


def test_text_is_answered_as_before(sampler):
    toy.same_answers(sampler, SplitCalls()(sampler)[0])


def test_several_values_before_the_first_that_changes(sampler):
    def body(calls):
        rows = {"visual": Cat(1, ("prompt.text", "prompt.text", "time_row"))}
        calls[2] = replace(calls[2], rename=calls[2].rename | rows)
        return calls

    before = toy.repaint(sampler, body)
    after, _ = SplitCalls()(before)
    first, second = (c for c in after.schedules.image[1].body if c.stage == "language_model")
    assert first.source("text") == Cat(1, ("prompt.text", "prompt.text"))
    assert second.source("visual") == "time_row"
    assert second.source("past") == "prompt.past"
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    given = [[1, 4, 6], [1, 5, 7]], noise
    torch.testing.assert_close(after.generate_images(*given), before.generate_images(*given), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- left alone
def rows(**rename):
    """The language model reads other rows."""

    def body(calls):
        calls[2] = replace(calls[2], rename=calls[2].rename | rename)
        return calls

    return body


def carries_its_caches(calls):
    """Each trip goes on from the rows of the trip before."""
    calls[2] = replace(calls[2], writes={})
    return calls


def another_stage(calls):
    """A stage without a cache reads rows of the prompt before those of the trip."""
    calls = rows(visual="time_row")(calls)
    return [*calls[:3], replace(calls[3], rename={"hidden": Cat(1, ("prompt.text", "hidden"))})]


CHANGES = "language_model: its first rows change from trip to trip"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (rows(visual=Cat(1, ("time_row", "prompt.text"))), CHANGES),
        (rows(visual=Cat(1, ("step.row", "prompt.text"))), CHANGES),
        (rows(visual=Cat(1, ("tokens", "time_row"))), CHANGES),
        (carries_its_caches, CHANGES),
        (rows(visual="time_row"), "painting: no call in a loop begins with rows that the loop does not change"),
        (another_stage, "flow_decode: it keeps no rows in a cache"),
    ],
)  # fmt: skip
def test_other_schedules(sampler, change, why):
    unchanged(toy.repaint(sampler, change), SplitCalls(), why)


class Other(toy.LanguageModel):
    """Something else is done to the rows before the model, or after it."""

    def __init__(self, root, before=lambda m, visual, text: (visual, text), after=lambda m, x, v, t: x):
        super().__init__(root)
        self.before, self.after = before, after

    def forward(self, visual, text, past, offset, seen, key_cache: list[torch.Tensor], value_cache: list[torch.Tensor]):
        visual, text = self.before(self.root, visual, text)
        x, *rest = super().forward(visual, text, past, offset, seen, key_cache, value_cache)
        return self.after(self.root, x, visual, text), *rest


def other(**how):
    def change(m, specs):
        specs["language_model"] = replace(specs["language_model"], module=Other(m, **how))

    return toy.program(change=change)


def reads_all(m, specs):
    """The velocity depends on the rows of the prompt too."""

    def run(m, hidden, skip, row):
        return toy.flow_decode(m, hidden.mean(1, keepdim=True).expand(-1, 16, -1), skip, row)

    inputs = specs["flow_decode"].inputs | {"hidden": toy.TensorSpec(("B", "n", toy.WIDTH), torch.float32)}
    specs["flow_decode"] = toy.StageSpec(toy.Part(m, run), inputs, ["velocity"])


class Keeps(toy.LanguageModel):
    """The values of earlier rows are not handed on."""

    def forward(self, visual, text, past, offset, seen, key_cache: list[torch.Tensor], value_cache: list[torch.Tensor]):
        return super().forward(visual, text, past, offset, seen, key_cache, value_cache)[:3]


def keeps(m, specs):
    specs["language_model"] = replace(specs["language_model"], module=Keeps(m), outputs=["hidden", "past", "key_cache"])


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"after": lambda m, x, v, t: x + x.mean(1, keepdim=True)}, "mixes rows"),
        ({"after": lambda m, x, v, t: x + x.cumsum(1)}, "mixes rows"),
        ({"after": lambda m, x, v, t: x + x.flip(1)}, "mixes rows"),
        ({"after": lambda m, x, v, t: x * x.softmax(1)}, "mixes rows"),
        ({"after": lambda m, x, v, t: x + torch.cat([m.norm(v), t], 1)}, "the rows of visual and text differently"),
        ({"after": lambda m, x, v, t: x + torch.cat([t, v], 1)}, "the rows of visual and text differently"),
        ({"after": lambda m, x, v, t: x + t.mean(1, keepdim=True)}, "mixes rows"),
        ({"before": lambda m, v, t: (m.norm(v), t)}, "its rows are not two inputs"),
    ],
)  # fmt: skip
def test_rows_that_are_not_apart(how, why):
    unchanged(other(**how), SplitCalls(), why)


def test_readers_of_all_rows():
    unchanged(toy.program(change=reads_all), SplitCalls(), "language_model: flow_decode reads all rows of hidden")


def test_caches_that_are_not_carried():
    unchanged(toy.program(change=keeps), SplitCalls(), "language_model: not all of its caches are carried")


def test_other_programs():
    for program in (flow(), chat(toy.nn.Identity(), {"text": ("B", "nt", 13)}, ["logits"])):
        unchanged(program, SplitCalls(), "painting: no call in a loop begins with rows")


def test_twice(sampler):
    twice(sampler, SplitCalls())


# ----------------------------------------------------------------------------------------------------------- broken
class Broken(SplitCalls):
    """A broken pass: something is changed about the second call."""

    def __init__(self, **wrong):
        self.wrong = wrong

    def split(self, *args):
        made = super().split(*args)
        return [made[0], replace(made[1], rename=made[1].rename | self.wrong)] if len(made) == 2 else made


@pytest.mark.parametrize(
    "wrong",
    [
        {"past": "prompt.begin"},  # over the rows of the prompt
        {"key_cache.1": "key_cache.1"},  # on an empty cache
        {"visual": "no_rows"},  # without the time
        {"offset": "prompt.past"},  # at other positions
        {"text": Cat(1, ("prompt.text", "tokens"))},  # with the prompt once more
    ],
)
def test_wrong_calls_are_caught(sampler, wrong):
    caught(sampler, Broken(**wrong), "flow_decode")


def test_the_toy_has_what_the_pass_looks_for(sampler):
    graph = sampler.stages["language_model"].graph
    assert sum(n.target is CACHED_ATTENTION for n in graph.nodes) == 2
    assert isinstance(sampler.schedules.image[1], Loop)
    assert sampler.schedules.image[1].body[2] == Call(
        "language_model",
        {"visual": Cat(1, ("prompt.text", "time_row")), "text": "tokens", "past": "prompt.begin",
         "offset": "prompt.offset", "seen": "prompt.seen"},
        {k: f"image.{k}" for k in sampler.stages["language_model"].outputs if k != "hidden"},
    )  # fmt: skip
