"""What each pass did and what that saves: the table and the JSON."""

import pytest

from mmopt.frontend.load import from_config
from mmopt.frontend.trace import trace
from mmopt.ir.inspect import inspect
from mmopt.measure.pass_log import DID, PassLog, checked, count
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.passes.reduce_flow_steps import ReduceFlowSteps
from mmopt.pipeline import default_passes, run_passes
from mmopt.rewrite.pass_base import Report
from mmopt.spec.solvers import make_plan


@pytest.fixture(scope="module")
def logged(program):
    """The passes on the tiny checkpoint, with one that compresses before and one of another author after them."""
    log = PassLog(program)
    passes = [CompressVisualTokens(0.5, "pool", "abstractor"), *default_passes()]
    result = run_passes(program, passes, check=False, observers=[log])
    log.finish([*result.reports, Report("mine", rewrites=["head: half as large"])], result.program)
    return result, log


def test_every_pass_is_told_in_words(logged):
    assert {p.name for p in default_passes()} < set(DID)
    lines = logged[1].table().splitlines()
    for said in ("keeps fewer visual tokens of each image", "packs projections of one input", "head: half as large"):
        assert any(said in line for line in lines)
    assert sum("nothing to do" in line for line in lines) == sum(not r.rewrites for r in logged[1].reports)


def test_costs_are_those_of_the_program_after_each_pass(program, logged):
    result, log = logged
    assert log.costs[0] == count(program)
    assert log.costs[-1] == count(result.program)
    found = inspect(result.program, batch=1, images=1)
    assert log.costs[-1].flops == sum(c["flops"] * c["trips"] for c in found["calls"])
    assert log.costs[-1].decode_weight_bytes == found["totals"]["decode_bytes_per_token"]
    before, after = log.costs[0], log.costs[-1]
    assert after.flops < before.flops
    assert (before.visual_tokens, after.visual_tokens) == (9, 5)


def test_tokens_left_out_inside_the_language_model_count(program):
    made, _ = CompressVisualTokens(0.5, "pool", "language_model.1")(program)
    assert count(made).visual_tokens == 5


def test_reports_are_there_once_and_whole(logged):
    result, log = logged
    assert [p["name"] for p in log.to_json()["passes"]] == [*(r.name for r in result.reports), "mine"]
    first = log.to_json()["passes"][0]
    assert first["skipped"] == result.reports[0].skipped
    assert first["before"] != first["after"]
    assert "  left  " not in log.text()
    assert str(result.reports[0]) in log.text(verbose=True)


def test_what_was_checked_in_a_word():
    for said, shown in (
        ("checked", "yes"), ("not checked: checks are off", "no"), ("drift: mean 0.1", "drift measured")
    ):  # fmt: skip
        assert checked(Report("a", rewrites=["x"], checked=said)) == shown
    assert checked(Report("a", checked="nothing to check")) == ""


def test_images_outside_the_text_and_contexts_without_room():
    model = from_config("openflamingo-tiny")
    assert count(trace(model, context=64)).visual_tokens == 8
    assert "with no image" in count(trace(model, context=16)).counted


def test_fewer_steps_of_image_generation_cost_less():
    program = trace(from_config("janusflow-tiny"))
    log = PassLog(program)
    run_passes(program, [ReduceFlowSteps(make_plan("ab2", 6, guidance=2.0))], check=False, observers=[log])
    before, after = log.costs
    assert "one generated image in 30 steps" in before.counted
    assert "one generated image in 6 steps" in after.counted
    assert after.flops < before.flops
