"""Engines of compressed programs: the Program's numbers, whatever an engine does with images, caches and prefixes."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from compressed import (
    CHOICES,
    FORCED,
    LAYOUTS,
    I,
    Images,
    compress,
    count,
    ids_of,
    inside,
    model,
    owl_images,
    pixels,
    reference,
    run,
    seen_images,
    selected,
    traced,
    whole_logits,
)  # fmt: skip
from test_engine import failing_prefill
from test_engine_cross import picture
from toy_tokenizers import letters

from mmopt.exporters.onnx import export
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.pipeline import default_passes
from mmopt.runtime.beam_search import search
from mmopt.runtime.decoder import Decoder
from mmopt.runtime.engine import Engine
from mmopt.runtime.request import Request
from mmopt.search.optimize import optimize
from mmopt.spec import prompt as planning
from mmopt.spec.errors import EngineError

ATOL = 2e-4
MADE = {  # family, site, share of the rows, method
    "owl": ("owl", "abstractor", 0.5, "first"),
    "inside": ("owl", "language_model.1", 0.5, "merge"),
    "janus": ("janus", "encode_vision", 0.25, "pool"),
    "flamingo": ("flamingo", "encode_vision.1", 0.25, "pool"),
}
OPTIONS = {"max_new_tokens": 4, "logprobs": True}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@cache
def result(kind):
    family, site, keep, method = MADE[kind]
    m = model(family)
    m.tokenizer = m.tokenizer or (letters(60, {}).to_str() if family == "owl" else None)
    program = traced(family)
    program.source = replace(program.source, tokenizer=m.tokenizer)
    return optimize(program, [CompressVisualTokens(keep, method, site), *default_passes()])


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("compressed")
    return cache(lambda kind: export(result(kind).program, root / kind))


@pytest.fixture(scope="session", params=MADE)
def kind(request):
    return request.param


@pytest.fixture
def engine(directories, kind):
    return Engine(directories(kind), threads=1)


@pytest.fixture
def janus(directories):
    return Engine(directories("janus"), threads=1)


def by_hand(kind, images):
    """Rows of images as the plain modules make them, and what else `reference` is told."""
    family = MADE[kind][0]
    if images is None:
        return torch.zeros(0, 1, 8, 24) if family == "flamingo" else Images(*[torch.zeros(0, 0, 0)] * 2, 0), {}
    if kind == "owl":
        return owl_images(images, last=CHOICES["first"]), {}
    if kind == "inside":
        return owl_images(images), {"inside": inside("owl", selected("merge", 4))}
    return seen_images(family, images, {"end" if kind == "janus" else 1: CHOICES["pool"]}), {}


def shown(kind, prompts, seed=0):
    family = MADE[kind][0]
    n = count(family, prompts)
    return pixels(family, n, 2 if family == "flamingo" else None, seed) if n else None


# ------------------------------------------------------------------------------------------------- the same numbers
def test_passes_and_exports_are_checked(directories, kind):
    """The exact passes keep what the compressed program gives, and so do the exported graphs."""
    first, *rest = result(kind).reports
    assert first.checked.startswith("drift: last logits of 4 random prompts differ by")
    assert {r.checked for r in rest} <= {"checked", "nothing to check"}
    assert sum(r.checked == "checked" for r in rest) >= 5
    facts = json.loads((directories(kind) / "program.json").read_text())
    assert facts["checked"]["program"] == "equal"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_by_hand(engine, kind, layout):
    """As the plain modules, as the Program before other passes, and again from rows of images that are given."""
    family = MADE[kind][0]
    prompts = ids_of(family, layout)
    images = shown(kind, prompts)
    forced = np.array(FORCED[: len(prompts)])
    more = {"max_new_tokens": 4, "forced": forced, "logits": True}
    found = engine.debug.generate_ids(prompts, None if images is None else images.numpy(), **more)
    logits = torch.from_numpy(np.stack(found.logits))
    made, kw = by_hand(kind, images)
    torch.testing.assert_close(logits, reference(family, prompts, FORCED, made, **kw), atol=ATOL, rtol=ATOL)
    torch.testing.assert_close(logits, run(result(kind).program, prompts, images), atol=ATOL, rtol=ATOL)
    if images is not None:
        rows = engine.encode_images(images.numpy())
        again = engine.debug.generate_ids(prompts, image_embeds=rows, **more)
        np.testing.assert_array_equal(np.stack(again.logits), np.stack(found.logits))
        again = engine.debug.generate_ids(prompts, image_embeds=rows.numpy(), **more)
        np.testing.assert_array_equal(np.stack(again.logits), np.stack(found.logits))


def test_caches_are_the_programs(engine, kind):
    family = MADE[kind][0]
    prompts = ids_of(family, "batch")
    images = shown(kind, prompts)
    made = engine.debug.generate_ids(prompts, images.numpy(), max_new_tokens=3, ignore_eos=True, caches=True)
    values = result(kind).program(prompts, images, max_new_tokens=3, ignore_eos=True)
    assert made.tokens == values["tokens"]
    assert made.past.tolist() == values["past"].tolist()
    gone = [p.count(engine.info.image_id) * engine.info.cache_delta for p in prompts]
    for key, rows in made.caches.items():
        late = key.endswith(".1")  # the second layer holds fewer rows
        for sample, past in enumerate(made.past):
            used = past - (gone[sample] if late else 0)
            np.testing.assert_allclose(rows[sample, :, :used], values[key][sample, :, :used], atol=ATOL)


# -------------------------------------------------------------------------------------- pictures, caches and prefixes
def pictures(n, seed=0):
    return [picture(seed + i) for i in range(n)]


def as_pixels(engine, shown):
    return torch.from_numpy(np.stack(engine._pixels(shown)[0])) if shown else None


def likeliest(kind, prompt, images, steps=4):
    """Greedy ids and their log-probabilities by hand."""
    ids, logprobs = [], []
    made, kw = by_hand(kind, images)
    for _ in range(steps):
        logits = reference(MADE[kind][0], [prompt], [[*ids, 0]], made, **kw)[0, -1]
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
        if ids[-1] in traced(MADE[kind][0]).info.eos_ids:
            break
    return ids, logprobs


def equal(said, wanted):
    ids, logprobs = wanted if isinstance(wanted, tuple) else (wanted.ids, wanted.logprobs)
    assert said.ids == ids
    assert said.logprobs == pytest.approx(logprobs, abs=5e-4)


def test_an_image_is_encoded_once(engine, kind, monkeypatch):
    """The same picture twice in a prompt, and again in another prompt."""
    encoded = []
    encode = Decoder.encode
    monkeypatch.setattr(Decoder, "encode", lambda *a: encoded.append(len(a[1])) or encode(*a))
    (prompt,) = ids_of(MADE[kind][0], "side by side")
    one, other = pictures(2)
    first = engine.generate(prompt, [one, one], **OPTIONS)
    assert sum(encoded) == 1
    equal(first, likeliest(kind, prompt, as_pixels(engine, [one, one])))
    second = engine.generate(prompt, [one, other], **OPTIONS)
    assert sum(encoded) == 2
    equal(second, likeliest(kind, prompt, as_pixels(engine, [one, other])))
    assert first.logprobs != second.logprobs


@pytest.mark.parametrize("begin", [(2, I, 3), (1, I, 2, I, 1), (4,)])
def test_prefixes(engine, kind, begin, tmp_path):
    """In memory, from a file, in a batch with other requests: the query sees images at the positions they had."""
    family = MADE[kind][0]
    ids, rest = ids_of(family, [begin, (2, I, 3)])
    shown = pictures(count(family, [ids, rest]))
    n = count(family, [ids])
    wanted = likeliest(kind, [*ids, *rest], as_pixels(engine, shown))
    prefix = engine.prefix(ids, shown[:n])
    equal(engine.generate(rest, shown[n:], prefix=prefix, **OPTIONS), wanted)
    loaded = engine.load_prefix(prefix.save(tmp_path / "prefix.safetensors"))
    assert loaded.rows == prefix.rows
    equal(engine.generate(rest, shown[n:], prefix=loaded, **OPTIONS), wanted)
    (other,) = ids_of(family, [(3, I, 1)])
    asked = [
        Request(rest, shown[n:], prefix=loaded, **OPTIONS),
        Request(other, pictures(1, 9), **OPTIONS),
        Request(rest[-2:], prefix=prefix, **OPTIONS),
    ]
    said = engine.generate_batch(asked)
    equal(said[0], wanted)
    equal(said[1], likeliest(kind, other, as_pixels(engine, pictures(1, 9))))
    equal(said[2], likeliest(kind, [*ids, *rest[-2:]], as_pixels(engine, shown[:n])))


def test_prefix_of_another_program_is_refused(directories, tmp_path):
    """An engine of the same model that keeps other rows would read them wrongly."""
    (ids,) = ids_of("owl", [(2, I, 3)])
    one, other = (Engine(directories(k), threads=1) for k in ("owl", "inside"))
    path = one.prefix(ids, pictures(1)).save(tmp_path / "prefix.safetensors")
    with pytest.raises(EngineError, match="made for another engine"):
        other.load_prefix(path)


@pytest.mark.parametrize("kind", ["owl", "inside", "janus"], indirect=True)
def test_beams(engine, kind):
    """Every hypothesis reads whole sequences by hand."""
    family = MADE[kind][0]
    (prompt,) = ids_of(family, [(2, I, 1, I, 3)])
    shown = pictures(2)
    made, kw = by_hand(kind, as_pixels(engine, shown))
    beams: list[list[int]] = [[]]

    def logits(ids):
        return whole_logits(family, prompt, [*ids, 0], made, **kw)[-1].numpy()

    def step(ids, parents):
        beams[:] = [[*beams[p], i] for p, i in zip(parents, ids, strict=True)]
        return np.stack([logits(b) for b in beams])

    wanted = search(logits([]), step, 3, 4, engine.info.eos_ids)
    said = engine.generate(prompt, shown, num_beams=3, **OPTIONS)
    assert [tuple(h.ids) for h in said.hypotheses] == [h.ids for h in wanted]
    assert said.score == pytest.approx(wanted[0].score, abs=5e-4)


@pytest.mark.parametrize("kind", ["owl", "inside"], indirect=True)
def test_chat(engine, kind, monkeypatch):
    """Turns with and without pictures; one that fails after it was read, and one that is taken back."""
    chat, shown = engine.chat(), pictures(4)

    def asked(images):
        ids = engine.text.encode(engine.template.render(chat.messages[:-1]))
        return likeliest(kind, ids, as_pixels(engine, images), 3)

    options = {"max_new_tokens": 3, "logprobs": True}
    equal(chat.send("ab", shown[:1], **options), asked(shown[:1]))
    before = chat.messages
    with failing_prefill(monkeypatch), pytest.raises(RuntimeError, match="memory"):
        chat.send("never", shown[3:], **options)
    assert chat.messages == before
    equal(chat.send("c", shown[1:3], **options), asked(shown[:3]))
    equal(chat.send("de", **options), asked(shown[:3]))
    chat.messages = chat.messages[:-2]
    equal(chat.send("fg", **options), asked(shown[:3]))


# -------------------------------------------------------------------------------------------------------- positions
def test_prompts_that_reach_beyond_the_table(janus):
    """The rows fit the cache, their positions not the table of the model: 90 of them."""
    assert (janus.info.positions, janus.info.context, janus.info.position_delta) == (90, 72, 12)
    program = result("janus").program
    (prompt,) = ids_of("janus", [(10, I, 10, I, 10, I, 5)])  # 50 rows, 86 positions
    images = shown("janus", [prompt])
    said = janus.debug.generate_ids([prompt], images.numpy(), max_new_tokens=5, ignore_eos=True)
    assert said.tokens == program([prompt], images, max_new_tokens=5, ignore_eos=True)["tokens"]
    with pytest.raises(EngineError, match="prompt 0 reaches position 91, rows of images that were left out counted"):
        janus.debug.generate_ids([prompt], images.numpy(), max_new_tokens=6)
    with pytest.raises(ValueError, match="prompt 0 reaches position 91"):
        program([prompt], images, max_new_tokens=6)
    with pytest.raises(EngineError, match="reaches position 91"):
        janus.generate(prompt, pictures(3), max_new_tokens=6)
    prefix = janus.prefix(prompt[:-3], pictures(3))
    janus.generate(prompt[-3:], prefix=prefix, max_new_tokens=5)
    with pytest.raises(EngineError, match=r"the prompt with its prefix reaches position 91, .* the model has 90"):
        janus.generate(prompt[-3:], prefix=prefix, max_new_tokens=6)


def test_an_answer_without_a_limit_ends_in_time(janus):
    """By default an answer may fill the cache, but not go beyond the positions."""
    (prompt,) = ids_of("janus", [(10, I, 10, I, 10, I, 5)])
    said = janus.generate(prompt, pictures(3))
    assert len(said.ids) <= 5


def test_forgotten_images_are_noticed(directories, monkeypatch):
    """A host that does not say how much was left out before gives other numbers."""
    engine = Engine(directories("janus"), threads=1)
    prompts = ids_of("janus", "apart")
    images = shown("janus", prompts)
    wanted = reference("janus", prompts, FORCED, by_hand("janus", images)[0])
    real = planning.position_deltas
    monkeypatch.setattr(
        "mmopt.runtime.decoder.position_deltas", lambda a, b, info: real(a, b, info) | {"position_delta_before": a * 0}
    )
    more = {"max_new_tokens": 4, "forced": np.array(FORCED[:1]), "logits": True}
    found = engine.debug.generate_ids(prompts, images.numpy(), **more)
    assert np.abs(np.stack(found.logits) - wanted.numpy()).max() > 1e-2


# ---------------------------------------------------------------------------------------------------- half precision
def test_half_precision(janus, tmp_path):
    """Of one program; positions are exact, so the rest is rounding."""
    half = Engine(export(result("janus").program, tmp_path / "half", dtype="float16"), threads=1)
    assert half.dtype == "float16"
    prompts = ids_of("janus", "batch")
    images = shown("janus", prompts).numpy()
    more = {"max_new_tokens": 4, "forced": np.array(FORCED), "logits": True}
    one, two = (np.stack(e.debug.generate_ids(prompts, images, **more).logits) for e in (janus, half))
    assert 0 < np.linalg.norm(one - two) < 0.01 * np.linalg.norm(one)
    renumbered, _ = compress(traced("janus"), 0.25, "pool", "encode_vision", position_ids="renumber")
    other = run(renumbered, prompts, torch.from_numpy(images)).numpy()
    assert np.linalg.norm(one - other) > 0.1 * np.linalg.norm(one)
