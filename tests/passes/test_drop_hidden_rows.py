"""Rows of a prompt that nobody sees are left out of the cache."""

from dataclasses import replace

import painting_toy as toy
import pytest
import torch
from toys import DTYPES, before_and_after, caught, flow, twice, unchanged

from mmopt.ir.graph import CACHED_ATTENTION
from mmopt.passes.drop_hidden_rows import DropHiddenRows
from mmopt.passes.split_calls import SplitCalls
from mmopt.rewrite.contracts import compare
from mmopt.search.optimize import optimize
from mmopt.spec.flow_sampler import lay_out
from mmopt.spec.schedule import Cat


def split(**options):
    return SplitCalls()(toy.program(**options))[0]


@pytest.fixture(scope="module")
def sampler():
    return split()


def masks(program):
    graph = program.stages["language_model"].graph
    return sum(n.target is CACHED_ATTENTION and len(n.args) > 10 and n.args[10] is not None for n in graph.nodes)


def test_attention_loses_its_mask(sampler, snapshot):
    after, report = DropHiddenRows()(sampler)
    text = before_and_after(sampler, after, "language_model")
    snapshot("drop_hidden_rows", f"{toy.generation_text(sampler)}\n\n{toy.generation_text(after)}\n\n{text}")
    assert report.rewrites == ["language_model: 2 attentions lose a mask; rows hidden by it are left out of the cache"]
    assert (masks(sampler), masks(after)) == (2, 0)
    assert "seen" not in after.stages["language_model"].inputs
    assert after.info.flow.compact
    assert not sampler.info.flow.compact  # the program given stays as it is


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(dtype):
    before = split(dtype=dtype)
    assert compare(before, DropHiddenRows()(before)[0]) is None


@pytest.mark.parametrize("lengths", [(2,), (24,), (2, 24), (7, 2, 3), (5, 5)])
def test_same_pictures(sampler, lengths):
    toy.same_pictures(sampler, DropHiddenRows()(sampler)[0], lengths)


def test_text_is_answered_as_before(sampler):
    toy.same_answers(sampler, DropHiddenRows()(sampler)[0])


def test_where_rows_stand(sampler):
    """By hand: prompts of 4 and 2 ids, of which 3 and 1 are fed."""
    info, prompts = sampler.info, [[1, 7, 8, 9], [1, 9]]
    padded = lay_out(prompts, info.required_flow, info.context, info.vocab_size)
    assert padded.ids.tolist() == [[1, 7, 8], [0, 0, 1], [1, 0, 0], [0, 0, 1]]
    hidden = [[j for j, sees in enumerate(row) if not sees] for row in padded.seen.tolist()]
    assert hidden == [[], [0, 1], [1, 2], [0, 1]]
    assert (padded.begin.tolist(), padded.end.tolist()) == ([0] * 4, [3] * 4)
    assert padded.offset.tolist() == padded.image_offset.tolist() == [0, -2, 0, -2]
    compact = lay_out(prompts, replace(info.required_flow, compact=True), info.context, info.vocab_size)
    assert compact.ids.tolist() == [[1, 7, 8], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert (compact.begin.tolist(), compact.end.tolist()) == ([0] * 4, [3, 1, 1, 1])
    assert compact.offset.tolist() == [0] * 4
    assert compact.image_offset.tolist() == [0, 0, 2, 0]
    for s in (padded, compact):  # the row of the time stands at the same position either way
        assert (s.end + s.image_offset).tolist() == [3, 1, 3, 1]


# ------------------------------------------------------------------------------------------------------- left alone
def recall(place, **rename):
    """Call number `place` of the split loop reads something else."""

    def body(calls):
        calls[place] = replace(calls[place], rename=calls[place].rename | rename)
        return calls

    return body


ONE_CALL = "language_model: rows that are hidden are fed in one call with others, at places that all samples share"
NOT_ITS = "language_model: its mask or its positions are not those of the prompt"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda calls: [*calls[:2], *calls[3:]], ONE_CALL),  # the prompt is fed elsewhere
        (recall(2, text=Cat(1, ("prompt.text", "prompt.text"))), ONE_CALL),
        (recall(2, text="tokens"), ONE_CALL),
        (recall(3, past="image.past"), ONE_CALL),
        (recall(2, seen="other.seen"), NOT_ITS),
        (recall(3, seen="other.seen"), NOT_ITS),
        (recall(3, offset="image.offset"), NOT_ITS),
        (recall(4, hidden="prompt.hidden"), "language_model: flow_decode reads hidden of the rows of the prompt"),
        (recall(4, hidden=Cat(1, ("prompt.hidden", "hidden"))), "flow_decode reads hidden of the rows of the prompt"),
    ],
)
def test_other_schedules(sampler, change, why):
    unchanged(toy.repaint(sampler, change), DropHiddenRows(), why)


def test_before_calls_are_split():
    unchanged(toy.program(), DropHiddenRows(), ONE_CALL)


class Reads(toy.LanguageModel):
    """Something but attention reads the mask."""

    def forward(self, visual, text, past, offset, seen, key_cache: list[torch.Tensor], value_cache: list[torch.Tensor]):
        x, *rest = super().forward(visual, text, past, offset, seen, key_cache, value_cache)
        return x * seen[:, :1, None], *rest


class Turned(toy.LanguageModel):
    """Attention reads something that is made of the mask."""

    def forward(self, visual, text, past, offset, seen, key_cache: list[torch.Tensor], value_cache: list[torch.Tensor]):
        return super().forward(visual, text, past, offset, seen & seen.flip(1), key_cache, value_cache)


@pytest.mark.parametrize("module", [Reads, Turned])
def test_masks_that_are_not_for_attention_alone(module):
    def change(m, specs):
        specs["language_model"] = replace(specs["language_model"], module=module(m))

    unchanged(split(change=change), DropHiddenRows(), "language_model: its mask is not one input that attention alone")


def test_programs_without_a_mask():
    unchanged(flow(), DropHiddenRows(), "program: no attention on a cache has a mask")


def test_twice(sampler):
    twice(sampler, DropHiddenRows())


def test_all_passes_twice():
    once = optimize(toy.program(), check=False).program
    again = optimize(once, check=False).program
    assert toy.generation_text(again) == toy.generation_text(once)
    assert again.stages.keys() == once.stages.keys()
    assert compare(once, again) is None


# ----------------------------------------------------------------------------------------------------------- broken
class Broken(DropHiddenRows):
    """A broken pass: calls after the prompt read something else."""

    def __init__(self, **wrong):
        self.wrong = wrong

    def compact(self, item, stage, mask):
        made = super().compact(item, stage, mask)
        if hasattr(made, "body") or made.source("past") != "prompt.end":
            return made
        return replace(made, rename=made.rename | self.wrong)


class KeepsPadding(DropHiddenRows):
    """A broken pass: the mask goes, hidden rows stay."""

    def run(self, program, report):
        made = super().run(program, report)
        made.info = replace(made.info, flow=replace(made.info.flow, compact=False))
        return made


@pytest.mark.parametrize(
    "broken",
    [
        Broken(offset="prompt.offset"),  # the time stands right behind the rows that are left
        Broken(offset="prompt.end"),
        Broken(past="prompt.past"),  # behind the padding
        Broken(past="prompt.begin"),  # over the rows of the prompt
        KeepsPadding(),
    ],
)
def test_wrong_places_are_caught(sampler, broken):
    caught(sampler, broken, "flow_decode")
