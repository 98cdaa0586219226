"""What does not change from step to step of a painting is computed before it."""

from dataclasses import replace

import painting_toy as toy
import pytest
import torch
from toys import DTYPES, before_and_after, caught, ops_of, twice

from mmopt.passes import hoist_invariants
from mmopt.passes.hoist_invariants import HoistInvariants
from mmopt.passes.share_samples import ShareSamples
from mmopt.passes.split_calls import SplitCalls
from mmopt.rewrite.contracts import compare
from mmopt.spec.schedule import Call, Cat, Loop
from mmopt.spec.solvers import make_plan


def ready(**options):
    """The toy as the pass gets it: the prompt in a call of its own, one encoder for both halves."""
    return ShareSamples()(SplitCalls()(toy.program(**options))[0])[0]


@pytest.fixture(scope="module")
def sampler():
    return ready()


def count_calls(program, steps=5):
    made: dict[str, list[int]] = {}

    def observe(phase, call, values, chunk):
        made.setdefault(call.stage, []).append(len(next(iter(values.values()))))

    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    program.generate_images([[1, 5, 6], [1, 9]], noise, make_plan("euler", steps), observe)
    return made


def test_calls_and_parts_of_stages_leave_the_loop(sampler, snapshot):
    after, report = HoistInvariants()(sampler)
    parts = before_and_after(sampler, after, "flow_encode")
    snapshot("hoist_steps", f"{toy.generation_text(sampler)}\n\n{toy.generation_text(after)}\n\nflow_encode\n{parts}")
    assert report.rewrites == [
        "flow_time: called once for all trips, before the loop; the loop reads a table",
        "flow_encode: 2 values that depend on the trip alone become tables",
        "language_model: called once before the loop, which changes nothing of what this call reads",
        "flow_decode: 1 values that depend on the trip alone become tables",
    ]
    assert ops_of(after, "flow_encode.steps").count("linear") == 1
    assert "linear" not in ops_of(after, "flow_encode")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_numbers(dtype):
    before = ready(dtype=dtype)
    assert compare(before, HoistInvariants()(before)[0]) is None


@pytest.mark.parametrize("solver", [("euler", 1), ("ab2", 4), ("heun", 4), ("midpoint", 6)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_same_pictures(sampler, solver, count):
    """A table of four trips and a batch of four samples must not be taken for each other."""
    after, _ = HoistInvariants()(sampler)
    prompts = [[1, 5, 6], [1, 9], [1, 4, 4, 4, 4], [1, 2]][:count]
    noise = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(count))
    plan = make_plan(*solver, guidance=3.0)
    made, wanted = after.generate_images(prompts, noise, plan), sampler.generate_images(prompts, noise, plan)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)


def test_they_are_called_once(sampler):
    after, _ = HoistInvariants()(sampler)
    before = count_calls(sampler)
    assert before["flow_time"] == [1] * 5
    assert before["language_model"] == [4] * 10
    made = count_calls(after)
    assert made["flow_time"] == made["flow_encode.steps"] == made["flow_decode.steps"] == [5]  # a row for each trip
    assert made["language_model"] == [4] * 6


def test_text_is_answered_as_before(sampler):
    after, _ = HoistInvariants()(sampler)
    prompts = {"prompts": [[5, 6, 7], [9]], "max_new_tokens": 4, "ignore_eos": True}
    assert after(**prompts)["tokens"] == sampler(**prompts)["tokens"]


def test_no_weight_is_stored_twice(sampler):
    after, _ = HoistInvariants()(sampler)
    assert after.weights.keys() <= sampler.weights.keys()
    for part in ("flow_encode", "flow_decode"):
        step, once = after.stages[part].weights(), after.stages[f"{part}.steps"].weights()
        assert not {w for w in step & once if w.endswith("weight")}


# ------------------------------------------------------------------------------------------------------- left alone
def stays(program, stage, why):
    """The calls of a stage in the loop stay as they are, and the report says why; pictures stay the same."""
    after, report = HoistInvariants()(program)
    assert f"{stage}: {why}" in report.skipped
    loop = next(i for i in after.schedules.image if isinstance(i, Loop))
    kept = [c for c in loop.body if c.stage == stage]
    assert len(kept) == sum(c.stage == stage for i in program.schedules.image if isinstance(i, Loop) for c in i.body)
    assert f"{stage}.steps" not in after.stages
    return after


def test_rows_of_the_prompt_that_change_stay():
    """Before its calls are split the language model reads what the loop changes."""
    after = stays(toy.program(), "language_model", "every product in it depends on what the loop changes")
    assert compare(toy.program(), after) is None


def changed(stage, run):
    def change(m, specs):
        specs[stage] = replace(specs[stage], module=toy.Part(m, run))

    return ready(change=change)


def test_times_that_are_weighed_against_each_other_stay():
    """One row for each trip would be made of the times of all trips."""

    def run(m, time):
        return toy.flow_time(m, time) + time.mean()[None, None, None]

    before = changed("flow_time", run)
    after = stays(before, "flow_time", "what depends on the trip alone is not made sample by sample")
    assert compare(before, after) is None


def test_parts_that_mix_trips_stay():
    def run(m, latents, row):
        return toy.flow_encode(m, latents, row + row.mean(0, keepdim=True))

    before = changed("flow_encode", run)
    after = stays(before, "flow_encode", "what depends on the trip alone is not made sample by sample")
    assert compare(before, after) is None


def test_stages_that_are_called_elsewhere_stay_whole(sampler):
    twice = toy.repaint(sampler, lambda calls: [*calls, replace(calls[1], writes={"skip": "a", "tokens": "b"})])
    stays(twice, "flow_encode", "called elsewhere too: a second copy would hold its weights twice")


def test_values_that_two_calls_write_stay(sampler):
    """The second call of flow_time takes the place of the first one's row, in the middle of the trip."""

    def body(calls):
        again = Call("flow_time", {"time": "later.time"})
        return [*calls[:-1], again, calls[-1]]

    stays(toy.repaint(sampler, body), "flow_time", "time_row is written by another call of the loop too")


def test_values_that_are_carried_stay(sampler):
    """The encoder reads the time of the trip before."""

    def body(calls):
        return [calls[1], calls[0], *calls[2:]]

    stays(toy.repaint(sampler, body), "flow_time", "time_row is carried from trip to trip")


def test_values_that_are_read_after_the_loop_stay(sampler):
    after = (Call("flow_decode", {"hidden": "tokens", "velocity": "last"}),)
    stays(toy.repaint(sampler, after=after), "flow_time", "time_row is read outside the loop")


def test_times_of_several_groups_are_no_row_of_a_table():
    def body(calls):
        return [replace(calls[0], rename={"time": Cat(0, ("step.time", "step.time"))}), *calls[1:]]

    before = toy.repaint(SplitCalls()(toy.program())[0], body)
    after = stays(before, "flow_time", "every product in it depends on what the loop changes")
    noise = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    given = [[1, 5, 6]], noise
    torch.testing.assert_close(after.generate_images(*given), before.generate_images(*given), atol=1e-5, rtol=1e-5)


def test_what_the_solver_changes_stays(sampler):
    """A call on the latents alone is no invariant, though no call of the loop writes them."""

    def body(calls):
        seen = Call("decode_image", {}, {"image": "preview"})
        return [*calls, seen]

    stays(toy.repaint(sampler, body), "decode_image", "every product in it depends on what the loop changes")


def test_twice(sampler):
    twice(sampler, HoistInvariants())


# ----------------------------------------------------------------------------------------------------------- broken
class Broken(HoistInvariants):
    """A broken pass: something is done to the image schedule behind it."""

    def __init__(self, change):
        self.change = change

    def run(self, program, report):
        made = super().run(program, report)
        made.schedules = made.schedules.replaced(image=tuple(self.change(list(made.schedules.image))))
        return made


def swapped(items):
    """The two tables of the encoder, scale and shift, one in the other's place."""
    names = ["step.flow_encode.steps.0", "step.flow_encode.steps.1"]
    loop = items[-2]
    rename = dict(loop.body[0].rename)
    keys = [k for k, v in rename.items() if v in names]
    rename |= dict(zip(keys, [rename[k] for k in reversed(keys)], strict=True))
    items[-2] = replace(loop, body=(replace(loop.body[0], rename=rename), *loop.body[1:]))
    return items


@pytest.mark.parametrize("change", [swapped])
def test_wrong_tables_are_caught(sampler, change):
    caught(sampler, Broken(change), "flow_decode")


def test_a_table_that_is_off_by_one_is_caught(sampler):
    """Each row is that of the trip after, of the three equal steps of a check."""

    def change(m, specs):
        specs["flow_time"] = replace(
            specs["flow_time"], module=toy.Part(m, lambda m, time: toy.flow_time(m, time + 1000 / 3))
        )

    late = toy.program(change=change).stages["flow_time"]

    class Late(HoistInvariants):
        def run(self, program, report):
            made = super().run(program, report)
            made.stages["flow_time"] = late
            return made

    caught(sampler, Late(), "flow_decode")


def test_trips_mixed_in_a_table_are_caught(monkeypatch):
    def run(m, time):
        return toy.flow_time(m, time) + time.mean()[None, None, None] / 1000

    before = changed("flow_time", run)
    monkeypatch.setattr(hoist_invariants, "works_along", lambda stage, dim: True)
    caught(before, HoistInvariants(), "flow_decode")
