"""Engines of families whose images lie outside the text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from toy_tokenizers import letters

from mmopt.exporters.onnx import export
from mmopt.frontend.load import load
from mmopt.frontend.trace import trace
from mmopt.runtime.decoder import Decoder
from mmopt.runtime.engine import Engine
from mmopt.runtime.request import Request
from mmopt.search.optimize import optimize
from mmopt.spec.errors import EngineError

DATA = Path(__file__).parents[1] / "data" / "flamingo"
FAMILIES = ("openflamingo", "idefics", "mllama")
CONTEXT, ATOL = 64, 2e-4
M = "<image>"  # in the prompts below


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The tiny recorded OpenFlamingo with a tokenizer."""
    path = tmp_path_factory.mktemp("flamingo")
    for name in ("config.json", "full_state_dict.safetensors"):
        shutil.copy(DATA / "openflamingo" / name, path)
    letters(300, {297: "<|endofchunk|>", 298: "<image>"}).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def programs(checkpoint):
    made = {name: checkpoint if name == "openflamingo" else DATA / name for name in FAMILIES}
    return {name: trace(load(path), batch=3, images=3, context=CONTEXT) for name, path in made.items()}


@pytest.fixture(scope="session")
def directories(programs, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("cross"), {}
    for name, program in programs.items():
        made[name, "traced"] = export(program, root / f"{name}-traced", check=False)
        fast = optimize(program, check=False).program
        made[name, "optimized"] = export(fast, root / f"{name}-optimized", check=False)
        made[name, "tensorrt"] = export(fast, root / f"{name}-tensorrt", target="tensorrt", check=False, gate=False)
    return made


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session", params=["traced", "optimized", "tensorrt"])
def any_engine(directories, family, request):
    """Passes off (all images and a mask in every call), passes on, and what is written for TensorRT."""
    return Engine(directories[family, request.param], threads=1)


@pytest.fixture(scope="session")
def engine(directories, family):
    return Engine(directories[family, "optimized"], threads=1)


@pytest.fixture(scope="session")
def flamingo(directories):
    return Engine(directories["openflamingo", "optimized"], threads=1)


def picture(seed, shape=(40, 60, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def pictures(n, seed=0):
    """Of several shapes: tiled families get unequal tiles."""
    return [picture(seed + i, [(40, 60, 3), (30, 90, 3), (50, 50, 3)][i % 3]) for i in range(n)]


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(3, 290, n).tolist()


def prompt(info, *parts):
    """Ids of parts: M for an image, a number for so many ids of text."""
    made = []
    for i, part in enumerate(parts):
        made += [info.image_id] if part == M else ids(part, i + len(parts))
    return made


PROMPTS = {
    "text": [(7,)],
    "one image": [(3, M, 6)],
    "image first": [(M, 4)],
    "a marker last": [(3, M)],
    "two apart": [(2, M, 4, M, 3)],
    "side by side": [(2, M, M, M, 5)],
    "batch of unequal counts": [(2, M, 5), (6,), (1, M, 2, M, M, 4)],
    "none in a batch": [(3,), (5,)],
}


def given(engine, n, seed=0):
    """(pixel_values, image_inputs, tiles) of n pictures, or nothing."""
    if not n:
        return None, None, None
    pixels, inputs, tiles = engine._pixels(pictures(n, seed))
    return np.stack(pixels), inputs or None, None if tiles is None else tiles.tolist()


def program_run(program, prompts, pixels, inputs, tiles, **kw):
    """The Program's tokens, and logits of each step ``[B, T, V]``."""
    first, steps = {}, []

    def observe(phase, call, made, chunk):
        if call.stage == "language_model" and phase == "prefill":
            first[chunk.sample] = made["logits"][0, -1].numpy()
        elif call.stage == "language_model":
            steps.append(made["logits"][:, -1].numpy())

    pixels = None if pixels is None else torch.from_numpy(pixels)
    inputs = None if inputs is None else {k: torch.from_numpy(x) for k, x in inputs.items()}
    made = program(prompts, pixels, observe=observe, ignore_eos=True, image_inputs=inputs, tiles=tiles, **kw)
    return made["tokens"], np.stack([np.stack([first[i] for i in range(len(prompts))]), *steps], 1)


def both_runs(engine, program, prompts, n, steps=5, **kw):
    """A run of the engine and of the program on the same; their logits must agree."""
    pixels, inputs, tiles = given(engine, n)
    forced = kw.pop("forced", None)
    more = {} if forced is None else {"forced": torch.from_numpy(forced)}
    tokens, logits = program_run(program, prompts, pixels, inputs, tiles, max_new_tokens=steps, **kw, **more)
    made = engine.debug.generate_ids(
        prompts, pixels, image_inputs=inputs, tiles=tiles, max_new_tokens=steps, ignore_eos=True, logits=True,
        forced=forced, **kw,
    )  # fmt: skip
    np.testing.assert_allclose(np.stack(made.logits), logits, atol=ATOL)
    assert made.tokens == tokens
    assert made.past.tolist() == [len(p) + steps - 1 for p in prompts]
    return made


# ------------------------------------------------------------------------------------- the same numbers as the Program
@pytest.mark.parametrize("name", PROMPTS)
def test_runs_as_the_program(any_engine, programs, family, name):
    program = programs[family]
    prompts = [prompt(program.info, *p) for p in PROMPTS[name]]
    both_runs(any_engine, program, prompts, sum(p.count(program.info.image_id) for p in prompts))


@pytest.mark.parametrize(
    ("parts", "images"),
    [((2, M, 3, M, 4), 1), ((2, M, 3), 0), ((2, M, 3), 2), ((5,), 2), ((M, M, 3), 1)],
)
def test_other_counts_than_markers(any_engine, programs, family, parts, images):
    program = programs[family]
    both_runs(any_engine, program, [prompt(program.info, *parts)], images, images=[images])


def test_markers_that_came_before(any_engine, programs, family):
    program = programs[family]
    both_runs(any_engine, program, [prompt(program.info, 4, M, 2)], 2, images=[2], num_previous_images=[1])


def test_a_marker_fed_while_decoding(any_engine, programs, family):
    program = programs[family]
    prompts = [prompt(program.info, M, 3, M, 2), prompt(program.info, M, 4), prompt(program.info, 3, M, 1)]
    forced = np.array([ids(5, 1), ids(5, 2), ids(5, 3)])
    forced[1, 1] = forced[0, 3] = program.info.image_id
    both_runs(any_engine, program, prompts, 4, forced=forced)


def test_a_sample_that_sees_none_of_its_images(directories, programs, family):
    """Beside samples with another number: segments tell them apart; a mask over all cannot, and says so."""
    program = programs[family]
    info = program.info
    prompts = [prompt(info, M, 3, M, 2), prompt(info, M, 2, M)]
    engines = {k: Engine(directories[family, k], threads=1) for k in ("traced", "optimized")}
    pixels, inputs, tiles = given(engines["traced"], 3)
    run = {"max_new_tokens": 4, "ignore_eos": True, "logits": True}

    def part(lo, hi):
        own = {k: x[lo:hi] for k, x in (inputs or {}).items()}
        return {"pixel_values": pixels[lo:hi], "image_inputs": own or None, "tiles": tiles and tiles[lo:hi], **run}

    together = engines["optimized"].debug.generate_ids(prompts, images=[1, 2], **part(0, 3))
    for b, (lo, hi) in enumerate(((0, 1), (1, 3))):
        alone = engines["traced"].debug.generate_ids(prompts[b : b + 1], images=[hi - lo], **part(lo, hi))
        assert alone.tokens == [together.tokens[b]]
        np.testing.assert_allclose(alone.logits[0], together.logits[b], atol=ATOL)
    with pytest.raises(EngineError, match="sees none of its images beside samples with another number"):
        engines["traced"].debug.generate_ids(prompts, images=[1, 2], **part(0, 3))


def test_images_are_read(any_engine, family):
    marker = any_engine.info.image_id
    one, two = (any_engine.generate([5, marker, 6], [picture(i)], max_new_tokens=2, logprobs=True) for i in (1, 2))
    assert (one.ids, one.logprobs) != (two.ids, two.logprobs)


# ------------------------------------------------------------------------------------------------------ text in and out
def test_generate(flamingo):
    done = flamingo.generate("what is it", images=[picture(1)], max_new_tokens=9, logprobs=True)
    wanted = flamingo.text.encode("<image>what is it")
    assert done.prompt_tokens == len(wanted) == 11
    run = flamingo.debug.generate_ids([wanted], flamingo.image_processor([picture(1)]), max_new_tokens=9)
    assert done.ids == run.tokens[0][: len(done.ids)]
    assert flamingo.generate(wanted, [picture(1)], max_new_tokens=9, logprobs=True) == done
    assert "".join(flamingo.generate("what is it", [picture(1)], stream=True, max_new_tokens=9)) == done.text


def test_a_batch_gives_what_each_gets_alone(engine):
    info = engine.info
    requests = [
        Request(prompt(info, 2, M, 3), pictures(1), max_new_tokens=6),
        Request(prompt(info, 9), max_new_tokens=12, temperature=1.5, seed=7),
        Request(prompt(info, 2, M, 3, M, 1), pictures(2), max_new_tokens=3),
        Request(prompt(info, M, M, M, 4), pictures(3), max_new_tokens=9, temperature=0.8, top_k=20, seed=8),
        Request(prompt(info, 5), max_new_tokens=7, logprobs=True),
        Request(prompt(info, 1, M, 5), pictures(1, 9), max_new_tokens=2),
    ]
    together = engine.generate_batch(requests)
    for r, got in zip(requests, together, strict=True):
        options = {k: getattr(r, k) for k in ("max_new_tokens", "temperature", "top_k", "seed")}
        alone = engine.generate(r.prompt, r.images, **options)
        assert (got.ids, got.finish_reason) == (alone.ids, alone.finish_reason)


def test_pooled_caches_forget_what_they_saw(engine):
    """The same cache serves requests with and without images, one after the other."""
    info = engine.info
    asked = [
        (prompt(info, 2, M, 3), pictures(1)),
        (prompt(info, 6), []),
        (prompt(info, M, 3, M), pictures(2)),
        (prompt(info, M, 4), pictures(1, 5)),
    ]
    first = [engine.generate(p, x, max_new_tokens=5, logprobs=True) for p, x in asked]
    for order in ((3, 1, 0, 2), (2, 2, 1, 3)):
        for i in order:
            again = engine.generate(*asked[i], max_new_tokens=5, logprobs=True)
            assert again.ids == first[i].ids
            assert again.logprobs == pytest.approx(first[i].logprobs, abs=1e-5)


def test_wrong_requests(flamingo):
    marker = flamingo.info.image_id
    for given_prompt, images, message in (
        ("<image>a", [], "1 image markers '<image>', but 0 images were given"),
        ([5, marker], [], "places for 1 images, but 0 were given"),
        ([5, 6], pictures(1), "places for 0 images, but 1 were given"),
        ([5] + [marker] * 4, pictures(4), "4 images, but this program was made for at most 3"),
        ([5] * (CONTEXT + 1), [], f"cache holds {CONTEXT}"),
        ([5, 300], [], "outside the vocabulary"),
    ):
        with pytest.raises(EngineError, match=message):
            flamingo.generate(given_prompt, images)
    with pytest.raises(EngineError, match="places for 1 images, but 2 were given"):
        flamingo.debug.generate_ids([[5, marker]], np.zeros((2, 3, 42, 42), np.float32))
    with pytest.raises(EngineError, match=r"expected None or 1 numbers"):
        flamingo.debug.generate_ids([[5]], images=[1, 2])


# ----------------------------------------------------------------------------------------------- images kept in a store
class Encoded:
    """Counts images that were encoded."""

    def __init__(self, monkeypatch):
        self.images = 0
        encode = Decoder.encode

        def count(decoder, pixels, *more):
            self.images += len(pixels)
            return encode(decoder, pixels, *more)

        monkeypatch.setattr(Decoder, "encode", count)


def test_a_picture_is_encoded_once(directories, family, monkeypatch):
    engine, encoded = Engine(directories[family, "optimized"], threads=1), Encoded(monkeypatch)
    info, shown = engine.info, pictures(3)
    first = engine.generate(prompt(info, M, 3, M, 2), [shown[0], shown[0]], max_new_tokens=4)
    assert encoded.images == 1
    again = engine.generate(prompt(info, M, 3, M, 2), [shown[0].copy(), shown[0]], max_new_tokens=4)
    assert (again.ids, encoded.images) == (first.ids, 1)
    engine.generate_batch([Request(prompt(info, M, 1), [shown[i % 2]], max_new_tokens=1) for i in range(5)])
    assert encoded.images == 2
    assert engine.store.nbytes == sum(n for _, n in engine.store._kept.values()) > 0


def test_a_small_budget_drives_images_out(directories, monkeypatch):
    probe = Engine(directories["openflamingo", "optimized"], threads=1)
    one, _ = probe._ready(pictures(1))
    engine = Engine(directories["openflamingo", "optimized"], threads=1, cache_bytes=2 * one[0].nbytes)
    encoded, shown, asked = Encoded(monkeypatch), pictures(3), prompt(engine.info, M, 2)
    first = [engine.generate(asked, [s], max_new_tokens=3).ids for s in shown]
    assert (encoded.images, len(engine.store)) == (3, 2)
    assert engine.generate(asked, shown[2:], max_new_tokens=3).ids == first[2]
    assert encoded.images == 3
    assert engine.generate(asked, shown[:1], max_new_tokens=3).ids == first[0]  # the oldest was driven out
    assert encoded.images == 4


def test_nothing_is_kept_without_a_budget(directories, monkeypatch):
    engine = Engine(directories["openflamingo", "optimized"], threads=1, cache_bytes=0)
    encoded, asked = Encoded(monkeypatch), prompt(engine.info, M, 2)
    answers = [engine.generate(asked, pictures(1), max_new_tokens=3).ids for _ in range(2)]
    assert answers[0] == answers[1]
    assert (encoded.images, len(engine.store)) == (2, 0)
    with pytest.raises(EngineError, match="cache_bytes is -1"):
        Engine(directories["openflamingo", "optimized"], cache_bytes=-1)


# -------------------------------------------------------------------------------------------------------------- chats
def with_tokenizer(directory, into, program):
    """An engine with a tokenizer of letters, whatever the family's marks are."""
    out = shutil.copytree(directory, into)
    facts = json.loads((out / "program.json").read_text())
    if facts["tokenizer"] is None:
        letters(program.info.vocab_size, {}).save(str(out / "tokenizer.json"))
        facts["tokenizer"] = "tokenizer.json"
        marks = {"user": "Q:", "assistant": "A:", "separator": " ", "end": ".", "image": program.info.image_marker}
        facts["info"]["processing"]["chat"] = marks
        (out / "program.json").write_text(json.dumps(facts))
    return out


@pytest.fixture
def talking(directories, programs, family, tmp_path):
    return Engine(with_tokenizer(directories[family, "optimized"], tmp_path / "e", programs[family]), threads=1)


TURNS = {
    "an image, then none": [("what", 1), ("and", 0), ("so", 0)],
    "images in later turns": [("hello", 0), ("this", 1), ("and", 1), ("so", 0)],
    "in each turn": [("a", 1), ("b", 2)],
}


@pytest.mark.parametrize("name", TURNS)
def test_chat_equals_a_fresh_run_on_the_whole_conversation(talking, name):
    chat, shown = talking.chat(), []
    for turn, (text, count) in enumerate(TURNS[name]):
        new = pictures(count, seed=7 * turn)
        said = chat.send(text, new, max_new_tokens=3, logprobs=True)
        shown += new
        fresh = talking.generate(chat.messages[:-1], shown, max_new_tokens=3, logprobs=True)
        assert said.ids == fresh.ids
        assert said.logprobs == pytest.approx(fresh.logprobs, abs=1e-4)
        assert said.prompt_tokens == fresh.prompt_tokens


def test_chats_beside_each_other(talking):
    one, two = talking.chat(), talking.chat()
    said = []
    for chat, shown in ((one, pictures(1)), (two, pictures(1, 4)), (one, []), (two, [])):
        said.append(chat.send("why", shown, max_new_tokens=4, logprobs=True))
        talking.generate("other", pictures(1, 9), max_new_tokens=2)
    for chat, shown, last in ((one, pictures(1), said[2]), (two, pictures(1, 4), said[3])):
        fresh = talking.generate(chat.messages[:-1], shown, max_new_tokens=4, logprobs=True)
        assert last.ids == fresh.ids
        assert last.logprobs == pytest.approx(fresh.logprobs, abs=1e-4)


def test_it_needs_no_torch(directories):
    import subprocess
    import sys

    code = (
        "import sys, numpy as np; from mmopt.runtime.engine import Engine;"
        f"e = Engine({str(directories['openflamingo', 'optimized'])!r}, threads=1);"
        "e.generate('a', [np.zeros((9, 9, 3), np.uint8)], max_new_tokens=2);"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ----------------------------------------------------------------------------- kinds of sight that no family has as yet
KINDS = {
    "first image again": {"reset": True},
    "tiles apart": {"blocks": 3},
    "one block, text before": {"before": "all_images"},
    "together": {"together": True},
    "tiles together, text before": {"blocks": 2, "together": True, "before": "all_images", "sees": True},
}


@pytest.fixture(scope="module", params=KINDS)
def toy(request, tmp_path_factory):
    """(program, engine of it, engine of it optimized); keys and values of images have biases."""
    program = toys.open_gates(toys.beside(toys.Cached(), **KINDS[request.param]))
    root, fast = tmp_path_factory.mktemp("toy"), optimize(program).program
    return program, *(Engine(export(p, root / n), threads=1) for n, p in (("traced", program), ("fast", fast)))


TOY_PROMPTS = {
    "unequal counts": ([[3, "M", 4, "M", 5], ["M", 6], [7, 8, 9]], None),
    "none": ([[3, 4], [5]], None),
    "side by side": ([[3, "M", "M", "M"]], None),
    "missing image": ([[3, "M", 4, "M", 5]], [1]),
    "no image for a marker": ([[3, "M", 4]], [0]),
    "no image for a marker, beside others": ([[3, "M", 4], [5, "M", 6]], [0, 0]),
    "more images": ([[3, "M", 4], [5]], [2, 2]),
}


@pytest.mark.parametrize("name", TOY_PROMPTS)
def test_other_kinds_run_as_the_program(toy, name):
    program, *engines = toy
    prompts, images = TOY_PROMPTS[name]
    prompts = [[toys.MARKER if t == "M" else t for t in p] for p in prompts]
    n = sum(p.count(toys.MARKER) for p in prompts) if images is None else sum(images)
    blocks, kw = program.info.cross.tiles, {"images": images, "max_new_tokens": 4}
    tiles = [1 + i % blocks for i in range(n)] if blocks > 1 and n else None
    pixels = np.random.default_rng(0).standard_normal((n, 3, 4, 4)).astype(np.float32) if n else None
    tokens, logits = program_run(program, prompts, pixels, None, tiles, **kw)
    for engine in engines:
        made = engine.debug.generate_ids(prompts, pixels, tiles=tiles, ignore_eos=True, logits=True, **kw)
        np.testing.assert_allclose(np.stack(made.logits), logits, atol=1e-4)
        assert made.tokens == tokens
