"""A traced model: the recorded answers, any mix of prompts, what is refused, and its text."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file
from toys import toy_info

from mmopt.frontend.load import from_config
from mmopt.frontend.trace import trace
from mmopt.ir import stage as stage_module
from mmopt.search.optimize import optimize
from mmopt.spec.prompt import Chunk, count_tokens, layout_prompts

CASES = ("mm_single", "mm_two_images", "text_only")


def case(name):
    return load_file(DATA / f"{name}.safetensors")


@pytest.fixture(scope="module")
def small():
    """One layer of everything, random weights."""
    raw = json.loads((DATA / "config.json").read_text())
    raw = raw | {"num_hidden_layers": 1, "num_key_value_heads": 2, "max_position_embeddings": 48}
    for part in raw["visual_config"].values():
        part["num_hidden_layers"] = 1
    return from_config(raw, dtype="float32", random=True)


@pytest.fixture(scope="module")
def small_program(small):
    return trace(small, batch=2, images=2, context=48)


# ----------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optimized", [False, True])
def test_recorded_greedy_ids(program, result, name, optimized):
    c = case(name)
    run = result.program if optimized else program
    made = run(c["in.input_ids"].tolist(), c.get("in.pixel_values"), max_new_tokens=16, ignore_eos=True)
    assert made["tokens"] == c["out.greedy.token_ids"].tolist()


def test_a_batch_of_any_mix_equals_single_runs(result):
    cases = [case(name) for name in CASES]
    pixels = torch.cat([c["in.pixel_values"] for c in cases if "in.pixel_values" in c])
    prompts = [c["in.input_ids"][0].tolist() for c in cases]
    made = result.program(prompts, pixels, max_new_tokens=16, ignore_eos=True)
    assert made["tokens"] == [c["out.greedy.token_ids"][0].tolist() for c in cases]


def test_rows_are_counted_in_the_cache(program):
    c = case("mm_single")
    prompt = c["in.input_ids"].tolist()
    made = program(prompt, c["in.pixel_values"], max_new_tokens=3, ignore_eos=True)
    assert int(made["past"]) == count_tokens(prompt[0], program.info) + 2  # the last token is not fed back
    key = made["key_cache.0"][:, :, :24]
    torch.testing.assert_close(key, c["out.kv_cache.0.key"], atol=2e-4, rtol=1e-4)


def test_generation_stops_after_the_end_id(model):
    c, other = case("mm_single"), case("text_only")
    ids = c["out.greedy.token_ids"][0].tolist()
    stop = next(t for t in ids[3:] if t not in other["out.greedy.token_ids"])
    length = ids.index(stop) + 1
    stopping = trace(replace(model, config=replace(model.config, eos_token_id=stop)), batch=2, images=1, context=48)
    prompts, pixels = c["in.input_ids"].tolist(), c["in.pixel_values"]
    assert stopping(prompts, pixels, max_new_tokens=16)["tokens"] == [ids[:length]]
    assert stopping(prompts, pixels, max_new_tokens=16, ignore_eos=True)["tokens"] == [ids]
    both = stopping(prompts + other["in.input_ids"].tolist(), pixels, max_new_tokens=16)["tokens"]
    assert both == [ids[:length], other["out.greedy.token_ids"][0].tolist()]


def test_forced_ids_are_fed_instead_of_the_likeliest(small_program):
    logits = []

    def observe(phase, call, made, chunk):
        if phase == "decode" and call.stage == "language_model":
            logits.append(made["logits"])

    small_program([[3, 4, 5]], max_new_tokens=3, forced=torch.tensor([[7, 8, 9]]), ignore_eos=True, observe=observe)
    whole = small_program([[3, 4, 5, 7, 8]], max_new_tokens=1, ignore_eos=True)["logits"]
    torch.testing.assert_close(logits[-1], whole, atol=1e-5, rtol=1e-5)


def test_the_cache_may_be_filled_to_its_last_row(small, small_program):
    info = small_program.info
    prompt = [3, 4, info.image_id, 5, 6, 7]
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    fits = info.context - count_tokens(prompt, info) + 1
    made = small_program([prompt], pixels, max_new_tokens=fits, ignore_eos=True)
    assert int(made["past"]) == info.context == small.config.max_position_embeddings
    with pytest.raises(ValueError, match="trace with a larger context"):
        small_program([prompt], pixels, max_new_tokens=fits + 1)
    # the last token from a cache filled row by row is the one that a single prefill gives
    tokens = made["tokens"][0]
    again = small_program([prompt + tokens[:-1]], pixels, max_new_tokens=1, ignore_eos=True)
    assert again["tokens"][0] == tokens[-1:]


def test_no_new_tokens(small_program):
    assert small_program([[3, 4]], max_new_tokens=0)["tokens"] == [[]]


# ------------------------------------------------------------------------------------------------------------ plans
INFO = toy_info(image_id=-200, tokens_per_image=9, batch=2, images=2, context=30, vocab_size=100)


def test_chunks_begin_with_their_images():
    i = INFO.image_id
    assert layout_prompts([[1, 2]], INFO, 1) == [Chunk(0, (), (1, 2))]
    assert layout_prompts([[1, i, 2, 3]], INFO, 1) == [Chunk(0, (), (1,)), Chunk(0, (0,), (2, 3))]
    assert layout_prompts([[i, i, 2]], INFO, 1) == [Chunk(0, (0, 1), (2,))]
    assert layout_prompts([[i, 1, i, 2], [i, 3]], INFO, 1) == [
        Chunk(0, (0,), (1,)),
        Chunk(0, (1,), (2,)),
        Chunk(1, (2,), (3,)),
    ]
    assert count_tokens([1, i, 2, i, 3], INFO) == 3 + 2 * 9


@pytest.mark.parametrize(
    ("prompts", "new", "why"),
    [
        ([], 1, "no prompt was given"),
        ([[]], 1, "prompt 0 is empty"),
        ([[1], [2], [3]], 1, "3 prompts at once, but this program was made for at most 2"),
        ([[1], [2, -200]], 1, "prompt 1 ends with an image"),
        ([[-200] * 3 + [1]], 1, "prompt 0 has 3 images, but this program was made for at most 2"),
        ([[1, 100, -1]], 1, r"token ids \[100, -1\] are outside the vocabulary of 100"),
        ([[1] * 31], 1, "takes 31 rows and 1 new tokens are asked for, but the cache holds 30"),
        ([[-200, -200] + [1] * 5], 9, "takes 23 rows and 9 new tokens are asked for, but the cache holds 30"),
    ],
)
def test_refused_prompts(prompts, new, why):
    with pytest.raises(ValueError, match=why):
        layout_prompts(prompts, INFO, new)


def test_images_must_be_as_many_as_markers(small_program):
    prompt = [-200, 4]
    with pytest.raises(ValueError, match="the prompts have 1 image markers, but pixel_values holds 0 images"):
        small_program([prompt])
    with pytest.raises(ValueError, match="the prompts have 2 image markers, but pixel_values holds 1 images"):
        small_program([prompt, prompt], torch.zeros(1, 3, 56, 56))


# ---------------------------------------------------------------------------------------------------------- tracing
@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"batch": 0}, "batch is 0, expected a positive number"),
        ({"images": -1}, "images is -1, expected a positive number"),
        ({"context": 0}, "context is 0, expected a positive number"),
        ({"context": 49}, "context 49 is longer than the model's max_position_embeddings 48"),
    ],
)
def test_refused_limits(small, limits, why):
    with pytest.raises(ValueError, match=why):
        trace(small, **limits)


def test_the_default_context_is_what_the_model_allows(small):
    assert trace(small).info.context == 48


def test_stages_refuse_wrong_inputs(small_program):
    embed = small_program.stages["embed"]
    with pytest.raises(KeyError, match="input 'ids' is missing"):
        embed.run(small_program.weights, {})
    with pytest.raises(ValueError, match="input ids: expected shape"):
        embed.run(small_program.weights, {"ids": torch.zeros(3, dtype=torch.int64)})
    language = small_program.stages["language_model"]
    values = {n: torch.zeros(1) for n in language.inputs}
    values |= {"visual": torch.zeros(1, 0, 64), "text": torch.zeros(2, 3, 64)}  # a batch of one and of two
    with pytest.raises(ValueError, match="input text: expected shape"):
        language.run(small_program.weights, values)


def test_constants_are_computed_once(result, monkeypatch):
    stage = result.program.stages["abstractor"]
    stage = stage.replaced(stage.graph)
    evaluated = []
    evaluate = stage_module.evaluate
    monkeypatch.setattr(stage_module, "evaluate", lambda n, *a, **kw: evaluated.append(n) or evaluate(n, *a, **kw))
    values = {"vision_rows": torch.zeros(1, 17, 48)}
    first = stage.run(result.program.weights, values)["image_rows"]
    assert any(n.meta["const"] for n in evaluated)
    evaluated.clear()
    second = stage.run(result.program.weights, values)["image_rows"]
    assert not any(n.meta["const"] for n in evaluated)
    assert torch.equal(first, second)


def test_a_program_of_shapes_cannot_run(small_program):
    with pytest.raises(ValueError, match="shapes only, no weights"):
        replace(small_program, has_weights=False)([[1, 2]])


def test_tied_embeddings_are_stored_once(small):
    program = trace(from_config(small.raw_config | {"tie_word_embeddings": True}, dtype="float32", random=True))
    stored = [w.data_ptr() for w in program.weights.values()]
    assert len(set(stored)) == len(stored)
    (table,) = program.stages["embed"].weights()
    assert table in program.stages["language_model"].weights()


# -------------------------------------------------------------------------------------------------------------- text
def test_text(small_program, snapshot):
    snapshot("program", str(small_program))


def test_text_of_the_optimized_program(small_program, snapshot):
    snapshot("program_optimized", str(optimize(small_program).program))


def test_text_is_stable(small, small_program):
    assert str(trace(small, batch=2, images=2, context=48)) == str(small_program)
