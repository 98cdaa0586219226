"""Stored beginnings of prompts: the same answers as without them, in memory and from files."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_engine import DATA, IMAGE
from test_engine_cross import CONTEXT, FAMILIES, M, checkpoint, directories, ids, picture, pictures, programs, prompt
from toy_tokenizers import small_tokenizer

from mmopt.exporters.onnx import export
from mmopt.frontend.load import load
from mmopt.frontend.trace import trace
from mmopt.runtime.decoder import Decoder
from mmopt.runtime.engine import Engine
from mmopt.runtime.prefix import Prefix
from mmopt.runtime.request import Request
from mmopt.search.optimize import optimize
from mmopt.spec.errors import EngineError

__all__ = ["checkpoint", "directories", "programs"]  # fixtures that are shared
KINDS = ("traced", "optimized")


@pytest.fixture(scope="session")
def owl(tmp_path_factory):
    """An engine of a family whose images lie among the rows of the text."""
    root = tmp_path_factory.mktemp("owl")
    checkpoint = root / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(DATA / name, checkpoint / name)
    small_tokenizer().save(str(checkpoint / "tokenizer.json"))
    program = trace(load(checkpoint), batch=3, images=3, context=CONTEXT)
    return export(optimize(program, check=False).program, root / "engine", check=False)


@pytest.fixture(scope="session", params=[*((f, k) for f in FAMILIES for k in KINDS), "owl"], ids=str)
def directory(request):
    if request.param == "owl":
        return request.getfixturevalue("owl")
    return request.getfixturevalue("directories")[request.param]


@pytest.fixture
def engine(directory):
    return Engine(directory, threads=1)


@pytest.fixture
def flamingo(directories):
    return Engine(directories["openflamingo", "optimized"], threads=1)


def marker(engine):
    return engine.info.image_id


def ahead(engine):
    """Text before the first image sees all images, so a prefix must begin with an image or hold all of them."""
    return bool(engine.decoder.cross) and engine.decoder.cross.leading_text == "all_images"


def same(one, two):
    assert one.ids == two.ids
    assert one.prompt_tokens == two.prompt_tokens
    assert one.logprobs == pytest.approx(two.logprobs, abs=2e-4)


def parts(engine, *given):
    return prompt(engine.info, *given)


BEGINNINGS = {
    "text": ((6,), 0),
    "an image first": ((M, 4), 1),
    "text and images": ((2, M, 3, M, 2), 2),
    "side by side": ((M, M, 3), 2),
}
QUERIES = {"text": ((4,), 0), "an image": ((2, M, 3), 1), "image first": ((M, 2), 1), "one id": ((1,), 0)}
OPTIONS = {"max_new_tokens": 4, "logprobs": True}


# ---------------------------------------------------------------------------------------- the same answers as without
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_same_as_without(engine, beginning, query):
    (begin, n), (rest, m) = BEGINNINGS[beginning], QUERIES[query]
    begin, rest, shown = parts(engine, *begin), parts(engine, *rest), pictures(n + m)
    if m and ahead(engine) and begin[0] != marker(engine):
        prefix = engine.prefix(begin, shown[:n])
        with pytest.raises(EngineError, match="text before the first image sees all images"):
            engine.generate(rest, shown[n:], prefix=prefix)
        return
    whole = engine.generate(begin + rest, shown, **OPTIONS)
    prefix = engine.prefix(begin, shown[:n])
    assert prefix.rows == whole.prompt_tokens - len(rest) - m * (engine.info.tokens_per_image - 1)
    for _ in range(2):
        same(engine.generate(rest, shown[n:], prefix=prefix, **OPTIONS), whole)


def test_a_query_without_an_image_sees_the_last_of_the_prefix(engine):
    begin, rest = parts(engine, M, 2, M, 2), parts(engine, 3)
    answers = []
    for seed in (0, 5):
        shown = [picture(1), picture(2 + seed)]
        answers.append(engine.generate(rest, prefix=engine.prefix(begin, shown), **OPTIONS))
        same(answers[-1], engine.generate(begin + rest, shown, **OPTIONS))
    assert answers[0].logprobs != answers[1].logprobs


def test_queries_of_a_batch_share_it(engine):
    begin, shown = parts(engine, M, 3, M, 2), pictures(2)
    prefix, other = engine.prefix(begin, shown), engine.prefix(parts(engine, M, 2), pictures(1, 7))
    asked = [
        Request(parts(engine, 2, M, 1), pictures(1, 3), prefix=prefix, max_new_tokens=3),
        Request(parts(engine, 4), prefix=prefix, max_new_tokens=6),
        Request(parts(engine, 5), prefix=other, max_new_tokens=4),
        Request(parts(engine, 3, M, 4), pictures(1, 5), max_new_tokens=5),  # none
        Request(parts(engine, 2), prefix=prefix, max_new_tokens=5, temperature=0.9, seed=3),
        Request(parts(engine, 2), prefix=prefix, max_new_tokens=2),
    ]
    for _ in range(2):
        together = engine.generate_batch(asked)
        for r, got in zip(asked, together, strict=True):
            start, images = ([], []) if r.prefix is None else (list(r.prefix.ids), list(shown))
            images = pictures(1, 7) if r.prefix is other else images
            options = {k: getattr(r, k) for k in ("max_new_tokens", "temperature", "seed")}
            assert got.ids == engine.generate(start + list(r.prompt), [*images, *r.images], **options).ids


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_lane_is_only_used_again_with_its_rows(engine, first):
    """Restoring skips what a lane still holds; whatever ran in it before, the answer stays the same."""
    begin, shown, rest = parts(engine, M, 4, M, 2), pictures(2), parts(engine, 3)
    whole = engine.generate(begin + rest, shown, **OPTIONS)
    prefix, other = engine.prefix(begin, shown), engine.prefix(parts(engine, M, 5), pictures(1, 8))

    def short():
        engine.generate(parts(engine, 2), max_new_tokens=2)

    def long():
        engine.generate(parts(engine, 9, M, 20), pictures(1, 6), max_new_tokens=9)

    def another_prefix():
        engine.generate(parts(engine, 6), prefix=other, max_new_tokens=3)

    def in_a_batch():
        engine.generate_batch([Request(parts(engine, 4), max_new_tokens=n) for n in (5, 2)])

    def shared_in_a_batch():
        engine.generate_batch([Request(parts(engine, n), prefix=prefix, max_new_tokens=n) for n in (5, 2)])

    def cancelled():
        stream = engine.generate(parts(engine, 5), stream=True, max_new_tokens=9)
        next(stream, None)
        stream.close()

    def beams():
        engine.generate(parts(engine, 3), num_beams=2, max_new_tokens=3)
        engine.generate(parts(engine, 3), prefix=prefix, num_beams=2, max_new_tokens=3)

    between = [short, long, another_prefix, in_a_batch, shared_in_a_batch, cancelled, beams]
    for act in between[first:] + between[:first]:
        same(engine.generate(rest, prefix=prefix, **OPTIONS), whole)
        act()
        same(engine.generate(rest, prefix=prefix, **OPTIONS), whole)
        same(engine.generate(begin + rest, shown, **OPTIONS), whole)


def test_rows_that_are_there_are_not_copied(engine, monkeypatch):
    prefix = engine.prefix(parts(engine, M, 5), pictures(1))
    first = engine.generate(parts(engine, 3), prefix=prefix, **OPTIONS)
    (cache,) = engine.decoder._pool
    assert cache.holds == [prefix]
    for rows in prefix.caches.values():
        rows[...] = np.nan if rows.dtype == np.float32 else 0  # read again, it would be noticed
    same(engine.generate(parts(engine, 3), prefix=prefix, **OPTIONS), first)
    engine.generate(parts(engine, 3), max_new_tokens=1)
    assert cache.holds == [None]
    with pytest.raises(EngineError, match="not finite"):
        engine.generate(parts(engine, 3), prefix=prefix, **OPTIONS)


def test_a_failure_leaves_no_lane_that_seems_to_hold_it(engine, monkeypatch):
    prefix, rest = engine.prefix(parts(engine, M, 5), pictures(1)), parts(engine, 3)
    first = engine.generate(rest, prefix=prefix, **OPTIONS)
    prefill = Decoder.prefill

    def fail(self, cache, lane, *args):
        prefill(self, cache, lane, *args)
        for t in cache.tensors.values():
            t.numpy()[...] = 9
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(Decoder, "prefill", fail)
        with pytest.raises(RuntimeError, match="memory"):
            engine.generate(rest, prefix=prefix)
    same(engine.generate(rest, prefix=prefix, **OPTIONS), first)


def test_a_query_leaves_the_prefix_as_it_was(engine):
    prefix = engine.prefix(parts(engine, M, 5), pictures(1))
    before = {k: x.copy() for k, x in prefix.caches.items()}
    engine.generate(
        parts(engine, 3, M, 2) if not ahead(engine) else parts(engine, 3), pictures(not ahead(engine)), prefix=prefix
    )
    assert len(prefix.images) == 1
    assert all((prefix.caches[k] == x).all() for k, x in before.items())
    if prefix.view is not None:
        assert (len(prefix.view.images), prefix.view.sight.markers) == (1, 1)


def test_several_threads_share_it(engine):
    prefix = engine.prefix(parts(engine, M, 5), pictures(1))
    asked = [parts(engine, n) for n in (1, 2, 3, 4)]
    alone = [engine.generate(a, prefix=prefix, max_new_tokens=6).ids for a in asked]
    got = {}

    def ask(i):
        got[i] = [engine.generate(asked[i], prefix=prefix, max_new_tokens=6).ids for _ in range(4)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == {i: [a] * 4 for i, a in enumerate(alone)}


def test_beams_go_on_from_it(engine):
    begin, shown, rest = parts(engine, M, 4), pictures(1), parts(engine, 3)
    whole = engine.generate(begin + rest, shown, num_beams=3, max_new_tokens=4)
    got = engine.generate(rest, prefix=engine.prefix(begin, shown), num_beams=3, max_new_tokens=4)
    assert [h.ids for h in got.hypotheses] == [h.ids for h in whole.hypotheses]
    assert got.score == pytest.approx(whole.score, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ kept in memory
def test_the_same_prefix_is_read_once(engine, monkeypatch):
    begin, fed = parts(engine, M, 5), []
    bind = Decoder.bind_language
    monkeypatch.setattr(Decoder, "bind_language", lambda self, *a: fed.append(1) or bind(self, *a))
    one = engine.prefix(begin, pictures(1))
    calls = len(fed)
    assert engine.prefix(list(begin), [p.copy() for p in pictures(1)]) is one
    assert len(fed) == calls
    assert engine.prefix(begin, pictures(1, 4)) is not one
    assert engine.prefix(begin[:-1], pictures(1)) is not one
    assert one.nbytes == sum(x.nbytes for x in one.caches.values()) + sum(i.nbytes for i in one.images)


def test_without_a_budget_it_is_read_each_time(directory):
    engine = Engine(directory, threads=1, cache_bytes=0)
    begin, rest = parts(engine, M, 5), parts(engine, 2)
    one, two = (engine.prefix(begin, pictures(1)) for _ in range(2))
    assert one is not two
    same(*(engine.generate(rest, prefix=p, **OPTIONS) for p in (one, two)))


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_from_a_file(engine, directory, tmp_path, beginning):
    begin, n = BEGINNINGS[beginning]
    begin, shown = parts(engine, *begin), pictures(n)
    prefix = engine.prefix(begin, shown)
    path = prefix.save(tmp_path / "shots.prefix")
    assert os.listdir(tmp_path) == ["shots.prefix"]
    rests = [(parts(engine, 4), [])]
    if not (ahead(engine) and begin[0] != marker(engine)):
        rests.append((parts(engine, 2, M, 3), pictures(1, 6)))
    other = Engine(directory, threads=1)  # a new process, as it were
    loaded = other.load_prefix(path)
    assert (loaded.ids, loaded.rows, len(loaded.images)) == (tuple(begin), prefix.rows, n)
    assert loaded.nbytes == prefix.nbytes
    for rest, more in rests:
        whole = engine.generate(begin + rest, [*shown, *more], **OPTIONS)
        same(other.generate(rest, more, prefix=loaded, **OPTIONS), whole)
        same(engine.generate(rest, more, prefix=loaded, **OPTIONS), whole)
        assert [c.ids for c in other.generate_batch([Request(rest, more, prefix=loaded, max_new_tokens=4)] * 2)] == [
            whole.ids
        ] * 2


def test_saved_again_it_is_the_same(engine, tmp_path):
    prefix = engine.prefix(parts(engine, M, 3), pictures(1))
    path = prefix.save(tmp_path / "one")
    again = engine.load_prefix(path).save(tmp_path / "two")
    one, two = load_file(path), load_file(again)
    assert one.keys() == two.keys()
    assert all((one[k] == two[k]).all() for k in one)
    prefix.save(path)  # over an older one
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_bfloat16_bits_survive(flamingo, tmp_path):
    """Stored as they are, for engines that compute in it (not on this provider)."""
    from mmopt.runtime.images import Image
    from mmopt.runtime.tensor import Tensor

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 15, (1, 2, 3), dtype=np.uint16)
    one = Image(Tensor.of(bits, "bfloat16"), {"media": Tensor.of(bits, "bfloat16")}, 1)
    made = Prefix((5,), 1, [one], {"key_cache.0": bits}, None, flamingo.fingerprint, "bfloat16")
    stored = load_file(made.save(tmp_path / "p"))
    assert all(x.dtype == np.uint16 and (x == bits).all() for x in stored.values())
    assert stored.keys() == {"cache.key_cache.0", "image.0.rows", "image.0.media"}
    with pytest.raises(EngineError, match="1 rows in bfloat16, expected 1 in float32"):
        flamingo.load_prefix(tmp_path / "p")


def test_a_file_for_another_engine_is_refused(flamingo, directories, owl, tmp_path):
    path = flamingo.prefix(ids(4)).save(tmp_path / "p")
    for other in (directories["openflamingo", "traced"], directories["idefics", "optimized"], owl):
        with pytest.raises(EngineError, match="p: made for another engine"):
            Engine(other, threads=1).load_prefix(path)
        with pytest.raises(EngineError, match="the prefix was made for another engine"):
            Engine(other, threads=1).generate([5], prefix=flamingo.load_prefix(path))


def test_exported_again_from_the_same_it_fits(flamingo, directories, programs, tmp_path):
    again = export(optimize(programs["openflamingo"], check=False).program, tmp_path / "again", check=False)
    engine, begin = Engine(again, threads=1), prompt(flamingo.info, M, 3)
    prefix = flamingo.prefix(begin, pictures(1))
    loaded = engine.load_prefix(prefix.save(tmp_path / "p"))
    same(engine.generate(ids(3), prefix=loaded, **OPTIONS), flamingo.generate(ids(3), prefix=prefix, **OPTIONS))


def with_metadata(path, **said):
    from safetensors import safe_open

    with safe_open(path, "np") as f:
        old = json.loads(f.metadata()["prefix"])
    new = {k: v for k, v in (old | said).items() if v is not None}
    save_file(load_file(path), path, {"prefix": json.dumps(new)})


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def without(path, name):
    from safetensors import safe_open

    with safe_open(path, "np") as f:
        said = f.metadata()
    save_file({k: x for k, x in load_file(path).items() if name not in k}, path, said)


def shorter(path):
    from safetensors import safe_open

    with safe_open(path, "np") as f:
        said = f.metadata()
    tensors = load_file(path)
    save_file({k: np.ascontiguousarray(x[:, :2]) if "cache" in k else x for k, x in tensors.items()}, path, said)


BREAKS = {
    "missing": (lambda p: p.unlink(), "cannot be read as a stored prefix"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read as a stored prefix"),
    "truncated": (lambda p: cut(p, 2000), "cannot be read as a stored prefix"),
    "header only": (lambda p: cut(p, 300), "cannot be read as a stored prefix"),
    "text": (lambda p: p.write_text("hello, this is no prefix"), "cannot be read as a stored prefix"),
    "a directory": (lambda p: (p.unlink(), p.mkdir()), "cannot be read as a stored prefix"),
    "weights": (
        lambda p: save_file({"w": np.zeros(3)}, p),
        "not a stored prefix: expected an object of schema 2, found None",
    ),
    "odd metadata": (
        lambda p: save_file({"w": np.zeros(3)}, p, {"prefix": "[1]"}),
        "not a stored prefix: expected an object of schema 2, found 'list'",
    ),
    "no json": (lambda p: save_file({"w": np.zeros(3)}, p, {"prefix": "{"}), "cannot be read as a stored prefix"),
    "newer": (lambda p: with_metadata(p, schema=3), "not a stored prefix: expected an object of schema 2, found 3"),
    "no ids": (lambda p: with_metadata(p, ids=None), "not a stored prefix: lacks ids"),
    "no tiles": (lambda p: with_metadata(p, tiles=None), "not a stored prefix: lacks tiles"),
    "no rows": (lambda p: with_metadata(p, rows=None), "not a stored prefix: lacks rows"),
    "unknown dtype": (lambda p: with_metadata(p, dtype="int4"), "not of the expected form"),
    "no image": (lambda p: without(p, "image.0.rows"), "not of the expected form"),
    "a cache less": (lambda p: without(p, "cache.key_cache.1"), "not of the expected form"),
    "shorter caches": (shorter, "not of the expected form"),
    "more rows than caches": (lambda p: with_metadata(p, rows=40), "not of the expected form"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_files(flamingo, tmp_path, name):
    path = flamingo.prefix(prompt(flamingo.info, M, 4), pictures(1)).save(tmp_path / "p")
    assert flamingo.load_prefix(path)
    damage, message = BREAKS[name]
    damage(path)
    with pytest.raises(EngineError, match=f"p: .*{message}"):
        flamingo.load_prefix(path)


def test_nothing_half_written_is_left(flamingo, tmp_path, monkeypatch):
    import safetensors.numpy

    prefix = flamingo.prefix(ids(4))
    path = tmp_path / "p"
    path.write_bytes(b"older")

    def full(tensors, partial, metadata):
        Path(partial).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(EngineError, match=r"p: cannot be written .*no space left"):
            prefix.save(path)
    assert os.listdir(tmp_path) == ["p"]
    assert path.read_bytes() == b"older"
    with pytest.raises(EngineError, match="cannot be written"):
        prefix.save(tmp_path / "nowhere" / "p")
    with pytest.raises(EngineError, match="cannot be written"):
        prefix.save(path / "p")  # under a file
    (tmp_path / "folder").mkdir()
    with pytest.raises(EngineError, match="cannot be written"):
        prefix.save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "p"]
    assert flamingo.load_prefix(prefix.save(path)).ids == prefix.ids


def test_several_threads_write_one_file(flamingo, tmp_path):
    prefix, wrong = flamingo.prefix(prompt(flamingo.info, M, 4), pictures(1)), []

    def write():
        try:
            for _ in range(10):
                prefix.save(tmp_path / "p")
        except EngineError as e:
            wrong.append(e)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert os.listdir(tmp_path) == ["p"]
    assert flamingo.load_prefix(tmp_path / "p").ids == prefix.ids


# --------------------------------------------------------------------------------------------------------------- errors
def test_too_long(engine):
    begin = parts(engine, M, 8)
    prefix = engine.prefix(begin, pictures(1))
    room = CONTEXT - prefix.rows
    with pytest.raises(EngineError, match=rf"the prefix takes {prefix.rows} rows, the prompt 4, and {room} new tokens"):
        engine.generate(parts(engine, 4), prefix=prefix, max_new_tokens=room)
    with pytest.raises(EngineError, match=f"the cache holds {CONTEXT}"):
        engine.generate(parts(engine, room + 1), prefix=prefix)
    full = engine.generate(parts(engine, room), prefix=prefix, max_new_tokens=1)
    assert full.prompt_tokens == CONTEXT
    with pytest.raises(EngineError, match=f"cache holds {CONTEXT}"):
        engine.prefix(parts(engine, CONTEXT + 1))


def test_it_fills_the_cache_by_default(engine, monkeypatch):
    monkeypatch.setattr(engine, "info", replace(engine.info, eos_ids=tuple([])))
    prefix = engine.prefix(parts(engine, M, 8), pictures(1))
    done = engine.generate(parts(engine, 5), prefix=prefix)
    assert done.completion_tokens == CONTEXT - prefix.rows - 5 + 1


def test_wrong_prefixes(engine):
    with pytest.raises(EngineError, match="places for 1 images, but 0"):
        engine.prefix(parts(engine, M, 3))
    with pytest.raises(EngineError, match="places for 0 images, but 1"):
        engine.prefix(parts(engine, 3), pictures(1))
    with pytest.raises(EngineError, match="is empty"):
        engine.prefix([])
    with pytest.raises(EngineError, match="neither text nor token ids"):
        engine.prefix([None])
    with pytest.raises(EngineError, match="outside the vocabulary"):
        engine.prefix([5, 9999])
    prefix = engine.prefix(parts(engine, 3))
    with pytest.raises(EngineError, match="is empty"):
        engine.generate([], prefix=prefix)
    with pytest.raises(EngineError, match="after a prefix the prompt must be text or token ids"):
        engine.generate([{"role": "user", "content": "a"}], prefix=prefix)
    if engine.decoder.cross is None:
        with pytest.raises(EngineError, match="ends with an image"):
            engine.prefix(parts(engine, 3, M), pictures(1))


# ----------------------------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize(
    ("begin", "n", "rest", "m"),
    [
        ("<image>a cat.<|endofchunk|>", 1, "<image>a", 1),
        ("<image>a cat.<|endofchunk|><image>a dog.<|endofchunk|>", 2, "<image>an", 1),
        ("<image>a cat.<|endofchunk|>", 1, "and ", 0),
        ("Q:what A:", 0, "<image>this", 1),
        ("a cat", 2, "a dog", 0),  # markers are put in front
    ],
)
def test_text(flamingo, begin, n, rest, m):
    shown = pictures(n + m)
    prefix = flamingo.prefix(begin, shown[:n])
    whole = flamingo.generate(flamingo.text.encode(flamingo._with_markers(begin, shown[:n]) + rest), shown, **OPTIONS)
    same(flamingo.generate(rest, shown[n:], prefix=prefix, **OPTIONS), whole)


@pytest.mark.parametrize(
    ("begin", "n", "rest", "m"),
    [
        ("what is", 0, " this", 0),
        ("what is", 0, "n't this", 0),
        ("<|image|>what is", 1, " this", 0),
        ("<|image|>what is", 1, " this <|image|> then", 1),
        ("", 0, "what", 0),
    ],
)
def test_text_among_rows(owl, tmp_path, begin, n, rest, m):
    """The tokenizer puts a space before each text of its own: a query goes on where the prefix ends."""
    engine, shown = Engine(owl, threads=1), pictures(n + m)
    whole = engine.generate(begin + rest, shown, **OPTIONS)
    prefix = engine.prefix(begin, shown[:n])
    same(engine.generate(rest, shown[n:], prefix=prefix, **OPTIONS), whole)
    loaded = engine.load_prefix(prefix.save(tmp_path / "p"))
    same(engine.generate(rest, shown[n:], prefix=loaded, **OPTIONS), whole)


def test_text_after_a_prefix_of_ids(owl):
    engine = Engine(owl, threads=1)
    prefix = engine.prefix(engine.text.encode("USER: what is"))
    begun = engine.text.encode("USER: what is") + engine.text.encode("this ASSISTANT:")[1:]
    same(engine.generate("this", prefix=prefix, **OPTIONS), engine.generate(begun, **OPTIONS))


def test_a_text_that_would_change_the_end_of_the_prefix(flamingo, monkeypatch):
    """Then the ids of the prefix stay as they are, and the rest is encoded by itself."""
    encode = type(flamingo.text).encode
    monkeypatch.setattr(type(flamingo.text), "encode", lambda self, text: encode(self, text.replace("ab", "z")))
    prefix = flamingo.prefix("xa")
    assert len(prefix.ids) == 2
    begun = [*prefix.ids, *flamingo.text.encode("bc")]
    same(flamingo.generate("bc", prefix=prefix, **OPTIONS), flamingo.generate(begun, **OPTIONS))


def test_ids_among_rows_are_the_recorded_marker(owl):
    assert Engine(owl, threads=1).info.image_id == IMAGE
