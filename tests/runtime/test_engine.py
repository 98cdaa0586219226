import json
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from toy_tokenizers import small_tokenizer

from mmopt.exporters.onnx import export
from mmopt.frontend.load import from_config, load
from mmopt.frontend.trace import trace
from mmopt.runtime.decoder import Decoder
from mmopt.runtime.engine import Engine
from mmopt.runtime.request import Completion, Request
from mmopt.runtime.sampler import Sampler
from mmopt.search.optimize import optimize
from mmopt.spec.errors import EngineError

DATA = Path(__file__).parents[1] / "data" / "mplug_owl2"
IMAGE, ROWS, CONTEXT = -200, 9, 64
ATOL = 1e-4


@pytest.fixture(scope="session")
def traced(tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DATA / name, checkpoint)
    small_tokenizer().save(str(checkpoint / "tokenizer.json"))
    return trace(load(checkpoint), batch=4, images=3, context=CONTEXT)


@pytest.fixture(scope="session")
def directories(traced, tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    optimized = optimize(traced, check=False).program
    return {
        "traced": export(traced, root / "traced"),
        "optimized": export(optimized, root / "optimized"),
        "tensorrt": export(optimized, root / "tensorrt", target="tensorrt"),
    }


@pytest.fixture(scope="session", params=["traced", "optimized", "tensorrt"])
def each(directories, request):
    """Engines of the Program as traced (logits of all rows) and optimized (of the last row), in both targets.

    ONNX Runtime runs what is written for TensorRT too."""
    return Engine(directories[request.param], threads=1)


@pytest.fixture(scope="session")
def engine(directories):
    return Engine(directories["optimized"], threads=1)


@pytest.fixture
def directory(directories, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(directories["optimized"], tmp_path / "engine")


def pixels(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 3, 56, 56)).astype(np.float32)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(3, 304, n).tolist()


PROMPTS = {
    "text": [[1, *ids(9)]],
    "one image": [[1, *ids(3), IMAGE, *ids(6, 1)]],
    "image first": [[IMAGE, *ids(4)]],
    "two images side by side": [[1, IMAGE, IMAGE, *ids(5)]],
    "two images apart": [[1, IMAGE, *ids(4), IMAGE, *ids(2, 1)]],
    "chunks": [[1, *ids(2), IMAGE, *ids(1), IMAGE, IMAGE, *ids(3), *ids(2, 2)]],
    "one id": [[5]],
    "ragged": [[1, *ids(7)], [1, *ids(2), IMAGE, *ids(12, 1)], [IMAGE, IMAGE, *ids(1)], [1, IMAGE, *ids(3), IMAGE, 7]],
}


def images_of(prompts):
    n = sum(p.count(IMAGE) for p in prompts)
    return pixels(n) if n else None


def program_run(program, prompts, images, **kw):
    """The Program's tokens, and logits of each step ``[B, T, V]``."""
    steps = []

    def observe(phase, call, made, chunk):
        if call.stage == "language_model" and phase == "decode":
            steps.append(made["logits"][:, -1].numpy())

    first = {}

    def observe_all(phase, call, made, chunk):
        if call.stage == "language_model" and phase == "prefill":
            first[chunk.sample] = made["logits"][0, -1].numpy()
        observe(phase, call, made, chunk)

    given = None if images is None else torch.from_numpy(images)
    values = program(prompts=prompts, pixel_values=given, observe=observe_all, **kw)
    return values, np.stack([np.stack([first[i] for i in range(len(prompts))]), *steps], 1)


# The same numbers as the Program


@pytest.mark.parametrize("name", PROMPTS)
def test_runs_as_the_program(each, traced, name):
    prompts, images, steps = PROMPTS[name], images_of(PROMPTS[name]), 6
    values, logits = program_run(traced, prompts, images, max_new_tokens=steps, ignore_eos=True)
    run = each.debug.generate_ids(prompts, images, max_new_tokens=steps, ignore_eos=True, logits=True, caches=True)
    assert run.tokens == values["tokens"]
    np.testing.assert_allclose(np.stack(run.logits), logits, atol=ATOL)
    assert run.past.tolist() == values["past"].tolist()
    for key, cache in run.caches.items():
        for sample, rows in enumerate(run.past):
            np.testing.assert_allclose(cache[sample, :, :rows], values[key][sample, :, :rows], atol=ATOL)
            assert not cache[sample, :, rows:].any()
    if images is not None:
        np.testing.assert_allclose(run.image_embeds.numpy(), values["image_rows"], atol=ATOL)


def test_threads_of_a_stage_do_not_spin_while_another_runs(engine):
    for stage in engine.decoder.stages.values():
        options = stage.session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_runs_as_the_recorded_reference(each):
    from safetensors.numpy import load_file

    case = load_file(DATA / "mm_two_images.safetensors")
    run = each.debug.generate_ids(
        case["in.input_ids"].tolist(), case["in.pixel_values"], max_new_tokens=16, ignore_eos=True, logits=True
    )
    assert run.tokens == case["out.greedy.token_ids"].tolist()
    np.testing.assert_allclose(np.stack(run.logits), case["out.greedy.step_logits_cached"], atol=2e-4)


def test_grouped_heads(tmp_path):
    raw = json.loads((DATA / "config.json").read_text()) | {"num_key_value_heads": 2, "num_hidden_layers": 2}
    program = trace(from_config(raw, random=True), batch=3, images=2, context=CONTEXT)
    made = Engine(export(optimize(program, check=False).program, tmp_path / "gqa"), threads=1)
    prompts = PROMPTS["ragged"][:3]
    values, logits = program_run(program, prompts, images_of(prompts), max_new_tokens=5, ignore_eos=True)
    run = made.debug.generate_ids(
        prompts, images_of(prompts), max_new_tokens=5, ignore_eos=True, logits=True, caches=True
    )
    assert run.caches["key_cache.0"].shape == (3, 2, CONTEXT, 16)
    assert run.tokens == values["tokens"]
    np.testing.assert_allclose(np.stack(run.logits), logits, atol=ATOL)


def test_forced_ids(engine, traced):
    forced = np.array([ids(4, 5), ids(4, 6)])
    prompts = PROMPTS["ragged"][:2]
    _, logits = program_run(
        traced, prompts, images_of(prompts), max_new_tokens=4, forced=torch.from_numpy(forced), ignore_eos=True
    )
    run = engine.debug.generate_ids(prompts, images_of(prompts), max_new_tokens=4, forced=forced, logits=True)
    np.testing.assert_allclose(np.stack(run.logits), logits, atol=ATOL)
    assert run.tokens == logits.argmax(-1).tolist()
    with pytest.raises(EngineError, match="forced"):
        engine.debug.generate_ids(prompts, images_of(prompts), max_new_tokens=3, forced=forced)


def test_end_of_sequence_stops_a_sample_but_not_its_batch(engine, traced, monkeypatch):
    prompts, images = PROMPTS["ragged"], images_of(PROMPTS["ragged"])
    free = engine.debug.generate_ids(prompts, images, max_new_tokens=8, ignore_eos=True, caches=True)
    end = free.tokens[1][2]
    monkeypatch.setattr(engine, "info", replace(engine.info, eos_ids=tuple([end])))
    run = engine.debug.generate_ids(prompts, images, max_new_tokens=8, caches=True)
    for sample, (got, all_tokens) in enumerate(zip(run.tokens, free.tokens, strict=True)):
        cut = all_tokens[: all_tokens.index(end) + 1] if end in all_tokens else all_tokens
        assert got == cut
        assert run.finish_reasons[sample] == ("stop" if end in all_tokens else "length")
        rows = run.past[sample]
        for key in run.caches:  # a finished sample was computed on, but kept its rows
            np.testing.assert_array_equal(run.caches[key][sample, :, :rows], free.caches[key][sample, :, :rows])
    assert len(run.tokens[1]) < 8
    assert "length" in run.finish_reasons


@pytest.mark.parametrize("name", ["text", "chunks"])
def test_to_exactly_the_last_slot(each, traced, name):
    prompts, images = PROMPTS[name], images_of(PROMPTS[name])
    rows = len(prompts[0]) + prompts[0].count(IMAGE) * (ROWS - 1)
    new = CONTEXT - rows + 1
    values, logits = program_run(traced, prompts, images, max_new_tokens=new, ignore_eos=True)
    run = each.debug.generate_ids(prompts, images, max_new_tokens=new, ignore_eos=True, logits=True)
    assert run.tokens == values["tokens"]
    assert run.past.tolist() == [CONTEXT]
    np.testing.assert_allclose(np.stack(run.logits), logits, atol=ATOL)
    with pytest.raises(EngineError, match=f"{rows} rows and {new + 1} new tokens .* holds {CONTEXT}"):
        each.debug.generate_ids(prompts, images, max_new_tokens=new + 1)


def test_a_full_sample_beside_one_that_goes_on(engine, monkeypatch):
    """The first two fill their lanes to the last slot and end long before the third."""
    monkeypatch.setattr(engine, "info", replace(engine.info, eos_ids=tuple([])))
    requests = [
        Request([1, *ids(CONTEXT - 3)], max_new_tokens=3),
        Request([1, *ids(CONTEXT - 1, 1)], max_new_tokens=1),
        Request([1, *ids(4, 2)], max_new_tokens=30),
        Request([1, *ids(5, 2)], max_new_tokens=10),
    ]
    together = engine.generate_batch(requests)
    assert [c.completion_tokens for c in together] == [3, 1, 30, 10]
    for request, completion in zip(requests, together, strict=True):
        assert (
            completion.ids
            == engine.debug.generate_ids([request.prompt], max_new_tokens=request.max_new_tokens).tokens[0]
        )


def test_prefill_of_one_lane_leaves_the_others(engine):
    with engine.decoder.cache(3) as cache:
        for tensor in cache.tensors.values():
            tensor.numpy()[...] = 7
        engine.decoder.prefill(cache, 1, [1, *ids(5)])
        for tensor in cache.tensors.values():
            assert (tensor.numpy()[[0, 2]] == 7).all()
            assert (tensor.numpy()[1, :, 6:] == 7).all()
            assert (tensor.numpy()[1, :, :6] != 7).all()
            tensor.numpy()[...] = 0
        assert cache.past.tolist() == [0, 6, 0]


# Text in, text out


def test_generate(engine):
    done = engine.generate("what is it", images=[picture(1)], max_new_tokens=12, logprobs=True)
    prompt = engine.text.encode("USER: <|image|>what is it ASSISTANT:")
    run = engine.debug.generate_ids([prompt], engine.image_processor([picture(1)]), max_new_tokens=12, logits=True)
    assert isinstance(done, Completion)
    assert done.ids == run.tokens[0]
    assert done.text == engine.text.decode(done.ids)
    assert (done.prompt_tokens, done.completion_tokens) == (len(prompt) - 1 + ROWS, 12)
    logits = run.logits[0].astype(np.float64)
    wanted = logits[range(12), done.ids] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(done.logprobs, wanted, atol=1e-5)


def test_prompt_forms(engine):
    text = "USER: <|image|>what ASSISTANT:"
    forms = ["what", "<|image|>what", [{"role": "user", "content": "<|image|>what"}], engine.text.encode(text)]
    forms.append(np.array(engine.text.encode(text)))
    answers = [engine.generate(f, images=[picture(2)], max_new_tokens=5).ids for f in forms]
    assert all(a == answers[0] for a in answers)
    assert engine.generate("what", max_new_tokens=5).ids != answers[0]
    later = "what <|image|> or <|image|>"
    assert engine.generate(later, images=[picture(2), picture(3)], max_new_tokens=1).prompt_tokens > 2 * ROWS


def test_without_a_limit_the_cache_is_filled(engine, monkeypatch):
    monkeypatch.setattr(engine, "info", replace(engine.info, eos_ids=tuple([])))
    done = engine.generate([1, *ids(9)])
    assert (done.completion_tokens, done.finish_reason) == (CONTEXT - 10 + 1, "length")


def test_streaming(engine):
    whole = engine.generate("what is it", max_new_tokens=20)
    stream = engine.generate("what is it", max_new_tokens=20, stream=True)
    pieces = list(stream)
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == whole.text
    assert stream.completion == whole


def test_stop_strings(engine):
    whole = engine.generate("what is it", max_new_tokens=20).text
    stop = whole[5:8]
    cut = whole.find(stop)
    stream = engine.generate("what is it", max_new_tokens=20, stop=[stop, "never"], stream=True)
    assert "".join(stream) == whole[:cut]
    assert stream.completion.finish_reason == "stop_string"
    assert stream.completion.text == whole[:cut]
    assert stream.completion.completion_tokens < 20


def test_end_of_sequence(engine, monkeypatch):
    free = engine.generate("what is it", max_new_tokens=10)
    monkeypatch.setattr(engine, "info", replace(engine.info, eos_ids=tuple([free.ids[4]])))
    done = engine.generate("what is it", max_new_tokens=10)
    assert done.finish_reason == "stop"
    assert done.ids == free.ids[: free.ids.index(free.ids[4]) + 1]


def test_a_batch_gives_what_each_gets_alone(engine):
    requests = [
        Request("what", [picture(1)], max_new_tokens=6),
        Request("tell me more", max_new_tokens=12, temperature=1.5, seed=7),
        Request("what", [picture(1)], max_new_tokens=9, temperature=0.8, top_k=20, seed=8),
        Request([{"role": "user", "content": "<|image|>a<|image|>b"}], [picture(2), picture(3)], max_new_tokens=3),
        Request("one more than fits at once", max_new_tokens=7, temperature=1.0, top_p=0.9, seed=9, logprobs=True),
    ]
    together = engine.generate_batch(requests)
    for r, got in zip(requests, together, strict=True):
        with engine.decoder.cache(1):
            options = {k: getattr(r, k) for k in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
            alone = engine.generate(r.prompt, r.images, **options)
        assert (got.ids, got.text, got.finish_reason) == (alone.ids, alone.text, alone.finish_reason)
    assert together[1].ids != engine.generate("tell me more", max_new_tokens=12, temperature=1.5, seed=6).ids
    assert engine.generate_batch([]) == []


def test_caches_are_used_again(directories):
    engine = Engine(directories["optimized"], threads=1)
    first = engine.generate("what is it", images=[picture(1)], max_new_tokens=8)
    (cache,) = engine.decoder._pool
    assert engine.generate("long before " * 2, max_new_tokens=4).ids
    assert engine.generate("what is it", images=[picture(1)], max_new_tokens=8) == first
    assert engine.decoder._pool == [cache]


def test_leading_text_is_read_once(directories, monkeypatch):
    engine = Engine(directories["optimized"], threads=1)
    calls = []
    bind = Decoder.bind_language

    def spy(self, images, text, *rest):
        calls.append((images["visual"].shape[1], text.shape[1]))
        return bind(self, images, text, *rest)

    monkeypatch.setattr(Decoder, "bind_language", spy)
    first = engine.generate("what", images=[picture(1)], max_new_tokens=1, logprobs=True)
    leading = len(engine.text.encode("USER: "))
    assert [c for c in calls if c[0] == 0] == [(0, leading)]
    calls.clear()
    assert engine.generate("what", images=[picture(1)], max_new_tokens=1, logprobs=True) == first
    assert [c[0] for c in calls] == [ROWS]
    engine.generate("what", max_new_tokens=1)  # no image: other rows lie where the leading text lay
    calls.clear()
    assert engine.generate("what", images=[picture(1)], max_new_tokens=1, logprobs=True) == first
    assert calls[0] == (0, leading)


def test_leading_text_that_was_written_over_is_read_again(engine):
    prompt, image = [1, 7, 8, IMAGE, 5], engine.encode_images(pixels(1))
    with engine.decoder.cache(2) as cache:
        first = engine.decoder.prefill(cache, 1, prompt, [image]).copy()
        cache.past[1] = 1
        engine.decoder.prefill(cache, 1, [9, 9])
        cache.past[1] = 0
        np.testing.assert_array_equal(engine.decoder.prefill(cache, 1, prompt, [image]), first)


def test_caches_that_may_be_broken_are_not_used_again(directories, monkeypatch):
    engine = Engine(directories["optimized"], threads=1)
    with pytest.raises(EngineError, match="not finite"):
        engine.debug.generate_ids([[IMAGE, 5]], np.full((1, 3, 56, 56), np.nan, np.float32))
    engine.generate([1, 5], max_new_tokens=2)
    assert len(engine.decoder._pool) == 1
    monkeypatch.setattr(Decoder, "prefill", lambda *_: np.full(304, np.nan, np.float32))
    with pytest.raises(EngineError, match="not finite"):
        engine.generate([1, 5])
    assert engine.decoder._pool == []


def test_a_few_caches_are_kept(directories):
    engine = Engine(directories["optimized"], threads=1)
    for n in (1, 2, 3, 4, 1):
        engine.generate_batch([Request([1, 5], max_new_tokens=2)] * n)
    assert [c.batch for c in engine.decoder._pool] == [4, 1]


# Cancelling


def test_cancelled_stream(engine):
    whole = engine.generate("what is it", max_new_tokens=20)
    stream = engine.generate("what is it", max_new_tokens=20, stream=True)
    got = next(stream) + next(stream)
    stream.close()
    done = stream.completion
    assert done.finish_reason == "cancelled"
    assert done.text == got
    assert whole.text.startswith(got)
    assert 2 <= done.completion_tokens < 20
    assert list(stream) == []
    assert engine.generate("what is it", max_new_tokens=20) == whole


def test_cancelled_before_it_began(engine):
    stream = engine.generate("what is it", stream=True)
    stream.close()
    assert (stream.completion.finish_reason, stream.completion.ids, list(stream)) == ("cancelled", [], [])


def test_cancelled_from_another_thread(engine):
    stream = engine.generate("what is it", max_new_tokens=30, stream=True)
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"


def test_a_cancelled_stream_gives_its_cache_back(directories):
    engine = Engine(directories["optimized"], threads=1)
    stream = engine.generate("what is it", stream=True)
    next(stream)
    assert engine.decoder._pool == []
    stream.close()
    assert len(engine.decoder._pool) == 1


# Threads


def test_several_threads(engine):
    questions = [(f"{c} question", [picture(i)] if i % 2 else []) for i, c in enumerate("abcdef")]
    alone = [engine.generate(q, i, max_new_tokens=10) for q, i in questions]
    got = {}

    def ask(k):
        for _ in range(3):
            got.setdefault(k, []).append(engine.generate(questions[k][0], questions[k][1], max_new_tokens=10))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(questions))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {k: [c.ids for c in v] for k, v in got.items()} == {k: [a.ids] * 3 for k, a in enumerate(alone)}


# Chat


class Fed:
    """Counts rows fed to the language model and images encoded."""

    def __init__(self, monkeypatch):
        self.rows, self.images = 0, 0
        bind, encode = Decoder.bind_language, Decoder.encode

        def count_rows(decoder, images, text, *rest):
            self.rows += images["visual"].shape[1] + text.shape[1]
            return bind(decoder, images, text, *rest)

        def count_images(decoder, pixel_values, *more):
            self.images += len(pixel_values)
            return encode(decoder, pixel_values, *more)

        monkeypatch.setattr(Decoder, "bind_language", count_rows)
        monkeypatch.setattr(Decoder, "encode", count_images)


def wide(directories, traced, tmp_path):
    """An engine with room for several turns."""
    program = trace(load(traced.source.directory), batch=1, images=4, context=256)
    return Engine(export(optimize(program, check=False).program, tmp_path / "wide"), threads=1)


def test_chat_equals_a_fresh_run_on_the_whole_conversation(directories, traced, tmp_path, monkeypatch):
    engine = wide(directories, traced, tmp_path)
    fed = Fed(monkeypatch)
    chat = engine.chat()
    turns = [("what", [picture(1)]), ("and", []), ("these", [picture(2), picture(3)]), ("so", [])]
    shown = []
    for turn, (text, images) in enumerate(turns):
        before = fed.rows
        said = chat.send(text, images, max_new_tokens=6)
        shown += images
        assert fed.images == len(shown)  # each once
        if turn:
            assert fed.rows - before < said.prompt_tokens - 20  # what the earlier turns fed stays
        assert chat.messages[-1] == {"role": "assistant", "content": said.text.strip()}
    fresh = engine.generate(chat.messages[:-1], shown, max_new_tokens=6)
    assert fresh.ids == said.ids
    assert fresh.prompt_tokens == said.prompt_tokens


def test_a_chat_keeps_the_rows_of_its_answers(engine, monkeypatch):
    chat, fed = engine.chat(), Fed(monkeypatch)
    answer = iter(engine.text.encode("nine")[1:])
    with monkeypatch.context() as m:
        m.setattr(Sampler, "__call__", lambda *_: next(answer))
        said = chat.send("a", max_new_tokens=5)
    assert (said.text, len(said.ids)) == ("nine", 5)
    before = fed.rows
    said = chat.send("b", max_new_tokens=1, logprobs=True)
    assert (
        fed.rows - before == len(engine.text.encode("e</s>USER: b ASSISTANT:")) - 2
    )  # no start token, no leading space
    fresh = engine.generate(chat.messages[:-1], max_new_tokens=1, logprobs=True)
    assert said.ids == fresh.ids
    assert said.logprobs == pytest.approx(fresh.logprobs, abs=1e-5)


def test_streaming_and_cancelling_in_a_chat(directories, traced, tmp_path):
    engine = wide(directories, traced, tmp_path)
    chat = engine.chat()
    stream = chat.send("what", [picture(1)], max_new_tokens=20, stream=True)
    assert chat.messages == []
    got = next(stream)
    with pytest.raises(EngineError, match="one turn at a time"):
        chat.send("me too")
    got += next(stream)
    stream.close()
    assert chat.messages[1] == {"role": "assistant", "content": got.strip()}
    unstarted = chat.send("never asked", stream=True)
    unstarted.close()
    said = chat.send("go on", max_new_tokens=5)
    assert said.ids == engine.generate(chat.messages[:-1], [picture(1)], max_new_tokens=5).ids
    stale = chat.send("late", stream=True, max_new_tokens=2)
    chat.send("first", max_new_tokens=2)
    with pytest.raises(EngineError, match="another turn"):
        list(stale)


@contextmanager
def failing_prefill(monkeypatch):
    """A prompt is read into the caches, and then memory is out."""
    prefill = Decoder.prefill

    def fail(*args):
        prefill(*args)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(Decoder, "prefill", fail)
        yield


def test_a_failing_turn_leaves_the_chat_as_it_was(engine, monkeypatch):
    chat = engine.chat()
    chat.send("a", max_new_tokens=3)
    before = list(chat.messages)
    with pytest.raises(EngineError, match="cache holds"):
        chat.send("far too long " * 20)
    with pytest.raises(EngineError, match=r"no/such.png"):
        chat.send("a", ["no/such.png"])
    with failing_prefill(monkeypatch), pytest.raises(RuntimeError, match="memory"):
        chat.send("bb", max_new_tokens=3)
    assert chat.messages == before
    said = chat.send("c", max_new_tokens=3)
    assert said.ids == engine.generate(chat.messages[:-1], max_new_tokens=3).ids


# Errors


def set_fact(directory, **facts):
    path = directory / "program.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def cut(path, keep=None):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if keep is None else keep])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


BREAKS = {
    "missing directory": (lambda d: shutil.rmtree(d), "engine: no such directory"),
    "foreign directory": (lambda d: (d / "program.json").unlink(), "not an engine directory"),
    "truncated program.json": (lambda d: cut(d / "program.json"), "program.json: cannot be read"),
    "foreign program.json": (lambda d: (d / "program.json").write_text("[1]"), "not written by mmopt"),
    "incomplete program.json": (
        lambda d: (d / "program.json").write_text('{"schema": 2}'),
        "field mmopt, versions, target, dtype, info, stages, schedules, state, weights is missing",
    ),
    "odd program.json": (lambda d: set_fact(d, weights={}), "program.json: weights: expected a list"),
    "newer schema": (lambda d: set_fact(d, schema=3), "schema 3, .* knows schema 2: upgrade"),
    "missing stage": (lambda d: (d / "embed.onnx").unlink(), "embed.onnx: listed in program.json, but not there"),
    "truncated stage": (lambda d: cut(d / "vision.onnx"), "vision.onnx: its sha256 is"),
    "changed stage": (lambda d: flip(d / "language_model.onnx"), "language_model.onnx: its sha256 is"),
    "missing weights": (lambda d: (d / "weights.safetensors").unlink(), "weights.safetensors: listed"),
    "truncated weights": (lambda d: cut(d / "weights.safetensors"), "weights.safetensors: has .* truncated"),
    "missing tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: listed"),
    "broken tokenizer": (lambda d: cut(d / "tokenizer.json"), "tokenizer.json: not a readable"),
    "bfloat16 on the CPU": (lambda d: set_fact(d, dtype="bfloat16"), "bfloat16, which ONNX Runtime cannot"),
    "no loop": (lambda d: set_fact(d, schedules={"text": []}), "no loop over chunks"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_directories(directory, name):
    assert Engine(directory, provider="cpu", threads=1)
    damage, message = BREAKS[name]
    damage(directory)
    with pytest.raises(EngineError, match=message):
        Engine(directory, provider="cpu", threads=1)


def test_checksum_of_the_weights_on_demand(directory):
    Engine(directory, threads=1, verify_checksums=True)
    flip(directory / "weights.safetensors")
    Engine(directory, threads=1)
    with pytest.raises(EngineError, match=r"weights.safetensors: its sha256 is"):
        Engine(directory, threads=1, verify_checksums=True)


def test_a_graph_that_does_not_load(directory):
    import hashlib

    (directory / "vision.onnx").write_bytes(b"no graph")
    stages = json.loads((directory / "program.json").read_text())["stages"]
    stages["vision"]["sha256"] = hashlib.sha256(b"no graph").hexdigest()
    set_fact(directory, stages=stages)
    with pytest.raises(EngineError, match=r"vision.onnx: ONNX Runtime cannot load stage vision"):
        Engine(directory, threads=1)


def test_providers(directory, monkeypatch):
    with pytest.raises(EngineError, match="provider is 'gpu', expected one of cpu"):
        Engine(directory, provider="gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"'cuda' is not available: .* has cpu; `pip install mmopt\[gpu\]`"):
        Engine(directory, provider="cuda")
    with pytest.raises(EngineError, match="threads is 0"):
        Engine(directory, threads=0)
    assert "provider cpu, 1 threads, context 64, batch up to 4" in repr(Engine(directory, threads=1))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("far too long " * 20, {}, "cache holds 64"),
        ("a", {"max_new_tokens": 100}, "100 new tokens are asked for"),
        ("a", {"images": ["no/such.png"]}, "no/such.png: cannot read the image"),
        ("a", {"images": [b"no image"]}, "bytes of length 8: cannot read the image"),
        ("a", {"images": [3]}, "int: not an image"),
        ("a", {"images": [picture(i) for i in range(4)]}, "4 images, but this program was made for at most 3"),
        ("<|image|>a", {}, "1 image markers '<|image|>', but 0 images"),
        ("<|image|>a", {"images": [picture(0)] * 2}, "1 image markers '<|image|>', but 2 images"),
        ([{"role": "user", "content": "a"}], {"images": [picture(0)]}, "places for 0 images, but 1 were given"),
        ([{"role": "assistant", "content": "a"}], {}, "expected the role 'user'"),
        ([1, IMAGE, 5], {}, "places for 1 images, but 0 were given"),
        ([1, 304], {}, "ids \\[304\\] are outside the vocabulary"),
        ([], {}, "is empty"),
        ([1, IMAGE], {"images": [picture(0)]}, "ends with an image"),
        ([1, None], {}, "neither text nor messages nor token ids"),
    ],
)
def test_wrong_requests(engine, prompt, options, message):
    message = message.replace("<|", "<\\|").replace("|>", "\\|>")
    for stream in (False, True):  # a stream that cannot be is refused at once, not when it is read
        with pytest.raises(EngineError, match=message):
            engine.generate(prompt, stream=stream, **options)


def test_wrong_runs_of_ids(engine):
    with pytest.raises(EngineError, match=r"5 prompts at once, .* at most 4"):
        engine.debug.generate_ids([[1]] * 5)
    with pytest.raises(EngineError, match="places for 1 images, but 0"):
        engine.debug.generate_ids([[IMAGE, 1]])
    with pytest.raises(EngineError, match="places for 1 images, but 2"):
        engine.debug.generate_ids([[IMAGE, 1]], pixels(2))
    with pytest.raises(EngineError, match=r"shape \(1, 3, 28, 28\), expected \(N, 3, 56, 56\)"):
        engine.debug.generate_ids([[IMAGE, 1]], np.zeros((1, 3, 28, 28), np.float32))
    with pytest.raises(EngineError, match="max_new_tokens"):
        engine.debug.generate_ids([[1]], max_new_tokens=0)


def test_a_directory_without_tokenizer(directory):
    set_fact(directory, tokenizer=None)
    engine = Engine(directory, threads=1)
    assert engine.generate([1, 5, 6], max_new_tokens=3).text == ""
    for call in (
        lambda: engine.generate("what"),
        lambda: engine.generate([1, 5], stop="a"),
        lambda: engine.chat().send("what"),
    ):
        with pytest.raises(EngineError, match="engine: has no tokenizer"):
            call()


# What it needs


def test_it_imports_no_torch():
    bad = "{'torch', 'onnx', 'safetensors'} & set(sys.modules)"
    code = f"import mmopt.runtime.engine, sys; assert not {bad}, {bad}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="the installed ONNX Runtime has no CUDAExecutionProvider",
)
@pytest.mark.parametrize("name", PROMPTS)
def test_cuda(directories, engine, name):
    prompts, images = PROMPTS[name], images_of(PROMPTS[name])
    options = {"max_new_tokens": 6, "ignore_eos": True, "logits": True, "caches": True}
    on_device = Engine(directories["optimized"], provider="cuda").debug.generate_ids(prompts, images, **options)
    on_host = engine.debug.generate_ids(prompts, images, **options)
    assert on_device.tokens == on_host.tokens
    np.testing.assert_allclose(np.stack(on_device.logits), np.stack(on_host.logits), atol=1e-2)
    assert on_device.past.tolist() == on_host.past.tolist()
