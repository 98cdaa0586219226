"""What painting costs, against formulas derived by hand from the toy's layers."""

import dataclasses
import json

import painting_toy as toy
import pytest
from typer.testing import CliRunner

from mmopt.cli import app
from mmopt.ir.inspect import inspect, text
from mmopt.passes.hoist_invariants import HoistInvariants
from mmopt.passes.share_samples import ShareSamples
from mmopt.passes.split_calls import SplitCalls
from mmopt.search.optimize import optimize

D, LAYERS, FED = 32, 2, 17  # width; layers; rows of an image and the one of its time
PIXELS, GRID = 64, 16  # of an image; of a grid of its latents (both as numbers of places)
CHANNELS = 2


def linear(rows, into, out):
    return 2 * rows * into * out


def layers(rows):
    """q, k, v, o and one of the MLP, of each layer."""
    return LAYERS * 5 * linear(rows, D, D)


def attention(pairs):
    """Scores and sums of values, of all heads together."""
    return LAYERS * 2 * 2 * pairs * D


def triangle(n):
    return n * (n + 1) // 2


TIME = linear(1, 2, D)
MODULATION = linear(1, D, 2 * D)  # scale and shift of the encoder
GATE = linear(1, D, 8)  # of the decoder: eight of the same rows, since the rest is not read
CONVS = 2 * GRID * D * (CHANNELS * 4) + 2 * GRID * D * 9  # down (2 x 2), then each channel by itself (3 x 3)
UP = linear(GRID, 2 * D, 8)
DECODE = 2 * PIXELS * CHANNELS * 3


@pytest.fixture(scope="module")
def plain():
    return toy.program()


@pytest.fixture(scope="module")
def optimized(plain):
    return optimize(plain, check=False).program


def painted(program, **options):
    """{(stage, trips): call} of a painting; its calls of the language model are told apart by their trips."""
    calls = [c for c in inspect(program, **options)["calls"] if c["phase"] == "paint"]
    found = {(c["stage"], c["trips"]): c for c in calls}
    assert len(found) == len(calls)
    return found


def flops(found):
    return {k: c["flops"] for k, c in found.items()}


@pytest.mark.parametrize(("length", "steps"), [(2, 1), (2, 3), (8, 4), (24, 6)])
def test_plain_computes_all_rows_of_both_halves_in_each_step(plain, length, steps):
    found = painted(plain, prompt_length=length, steps=steps)
    rows = length - 1 + FED
    once = flops(found)
    assert once.pop(("decode_image", 1)) == DECODE
    assert once.pop(("embed", 1)) == 0
    assert once.pop(("flow_time", steps)) == TIME
    assert once.pop(("flow_encode", steps)) == 2 * (CONVS + MODULATION)
    # the gate of the decoder is all 64 columns as traced, of which 8 are taken
    assert once.pop(("flow_decode", steps)) == 2 * (UP + MODULATION)
    assert once.pop(("language_model", steps)) == layers(2 * rows) + attention(2 * rows * rows)
    assert once == {}
    assert found["language_model", steps]["attention_flops"] == attention(2 * rows * rows)  # a mask: dense
    assert found["language_model", steps]["rows"] == 2 * rows


@pytest.mark.parametrize(("length", "steps"), [(2, 2), (3, 2), (8, 4), (24, 6)])
def test_optimized_computes_visible_pairs_once(optimized, length, steps):
    found = painted(optimized, prompt_length=length, steps=steps)
    prompt = length - 1
    once = flops(found)
    assert once.pop(("decode_image", 1)) == DECODE
    assert once.pop(("embed", 1)) == 0
    assert once.pop(("flow_time", 1)) == steps * TIME
    assert once.pop(("flow_encode.steps", 1)) == steps * MODULATION
    assert once.pop(("flow_decode.steps", 1)) == steps * GATE
    # conditional rows see the prompt, unconditional ones its first token
    seen = FED * (prompt + 1) + 2 * triangle(FED)
    assert once.pop(("language_model", 1)) == layers(prompt + 1) + attention(triangle(prompt) + 1)
    assert once.pop(("flow_encode", steps)) == CONVS
    assert once.pop(("language_model", steps)) == layers(2 * FED) + attention(seen)
    assert once.pop(("flow_decode", steps)) == 2 * UP
    assert once == {}
    assert found["language_model", 1]["rows"] == prompt + 1
    assert found["language_model", steps]["rows"] == 2 * FED


def test_with_the_mask_rows_of_padding_count(plain):
    """Before hidden rows are dropped, the unconditional half is as long as the other, and attention dense."""
    program = plain
    for p in (SplitCalls(), ShareSamples(), HoistInvariants()):
        program, _ = p(program)
    found = flops(painted(program, prompt_length=8, steps=3))
    assert found["language_model", 1] == layers(2 * 7) + attention(2 * 7 * 7)
    assert found["language_model", 3] == layers(2 * FED) + attention(2 * FED * (7 + FED))


def test_bytes(plain, optimized):
    """float32: weights once a call for both halves together, rows of the caches of each sample."""
    layer = 5 * (D * D + D) + 2 * D
    model = 4 * (LAYERS * layer + 2 * D) + 4 * 4  # and what the angles of rotary positions are divided by
    for program in (plain, optimized):
        found = painted(program, prompt_length=8, steps=3)
        calls = [c for (stage, _), c in found.items() if stage == "language_model"]
        assert {c["weight_bytes"] for c in calls} == {model}
        assert found["decode_image", 1]["weight_bytes"] == 4 * (CHANNELS * 3 + 3)
        assert found["flow_time", 3 if program is plain else 1]["weight_bytes"] == 4 * (2 * D + D)
    row = 2 * LAYERS * D * 4  # a key and a value of each layer
    assert painted(plain, prompt_length=8, steps=3)["language_model", 3]["cache_bytes"] == 2 * (7 + FED) * row
    found = painted(optimized, prompt_length=8, steps=3)
    assert found["language_model", 1]["cache_bytes"] == (7 + 1) * row
    assert found["language_model", 3]["cache_bytes"] == (7 + FED + 1 + FED) * row


def test_totals_are_sums_over_trips(plain, optimized):
    for program in (plain, optimized):
        report = inspect(program, prompt_length=8, steps=5)
        calls = [c for c in report["calls"] if c["phase"] == "paint"]
        assert report["totals"]["image_flops"] == sum(c["flops"] * c["trips"] for c in calls)
        assert report["totals"]["image_attention_flops"] == sum(c["attention_flops"] * c["trips"] for c in calls)
    one, two = (inspect(p, prompt_length=24)["totals"]["image_flops"] for p in (plain, optimized))
    assert two < 0.5 * one  # the prompt in each step was most of it


@pytest.mark.parametrize(("context", "length"), [(60, 32), (48, 32), (47, 31), (18, 2)])
def test_sizes_by_default(context, length):
    """A prompt of 32 ids or as many as fit; the steps are those of the family."""
    report = inspect(toy.program(context=context))
    assert report["conventions"][-1] == f"painting: one image of a prompt of {length} ids, 6 guided steps."
    assert {c["trips"] for c in report["calls"] if c["stage"] == "flow_encode"} == {6}


def test_a_context_that_holds_no_image():
    report = inspect(toy.program(context=17))
    assert report["conventions"][-1].startswith("painting: not counted, the context holds no image")
    assert not [c for c in report["calls"] if c["phase"] == "paint"]
    assert "image_flops" not in report["totals"]
    assert report["totals"]["prefill_flops"] > 0


@pytest.mark.parametrize("length", [0, 1, 25])
def test_prompts_that_cannot_be(plain, optimized, length):
    for program in (plain, optimized):
        with pytest.raises(ValueError, match=f"a prompt of {length} ids and an image of 17 rows do not fit"):
            inspect(program, prompt_length=length)
    inspect(plain, prompt_length=24)


def test_shapes_alone_are_enough(plain):
    shapes = dataclasses.replace(plain, has_weights=False)
    assert inspect(shapes, prompt_length=8)["totals"] == inspect(plain, prompt_length=8)["totals"]


def test_as_text(optimized):
    shown = text(inspect(optimized, prompt_length=8, steps=3))
    assert "image_flops" in shown
    assert "painting: one image of a prompt of 8 ids, 3 guided steps." in shown
    assert "update latents by velocity" in shown


def test_text_of_a_model_with_a_head_stage(plain):
    """The head is counted for the rows that it reads: all of them as traced."""
    calls = [c for c in inspect(plain, prompt_length=8)["calls"] if c["stage"] == "head" and c["phase"] == "decode"]
    assert [c["flops"] for c in calls] == [linear(2, D, toy.VOCAB)]


def test_on_the_command_line():
    """The prompt and the steps asked for, at a context that just holds them."""
    args = ["inspect", "--config", "janusflow-tiny", "--prompt-length", "9", "--steps", "3", "--json"]
    made = CliRunner().invoke(app, args)
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["conventions"][-1] == "painting: one image of a prompt of 9 ids, 3 guided steps."
    assert {c["trips"] for c in report["calls"] if c["phase"] == "paint"} == {1, 3}
    better = json.loads(CliRunner().invoke(app, [*args, "--optimized"]).stdout)
    assert better["totals"]["image_flops"] < report["totals"]["image_flops"]
