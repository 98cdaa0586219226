"""Beam search against the transformers library's own, and engines against models that recompute everything."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA
from typer.testing import CliRunner

from mmopt.exporters.onnx import export
from mmopt.frontend.load import load
from mmopt.frontend.trace import trace
from mmopt.runtime.beam_search import search
from mmopt.runtime.engine import Engine
from mmopt.runtime.request import Request
from mmopt.search.optimize import optimize
from mmopt.spec.errors import EngineError

transformers = pytest.importorskip("transformers")

LIMIT = 8
VARIANTS = list(itertools.product((-2.0, 0.0, 1.0), (False, True, "never")))  # length_penalty, early_stopping


# ------------------------------------------------------------------------------------------------- the search alone
class Table(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A model for the library's `generate` whose logits are any function of whole sequences."""

    config_class = transformers.PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, logits):
        super().__init__(transformers.PretrainedConfig(is_encoder_decoder=False))
        self.logits, self.nothing = logits, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **_):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.logits(input_ids))

    def prepare_inputs_for_generation(self, input_ids, **_):
        return {"input_ids": input_ids}


def library(model, prompt, beams, limit, eos_ids, length_penalty, early_stopping):
    """[(ids, score)] of all hypotheses, by the library."""
    made = model.generate(
        torch.tensor([prompt]), num_beams=beams, num_return_sequences=beams, do_sample=False, max_new_tokens=limit,
        eos_token_id=list(eos_ids), pad_token_id=min(eos_ids), length_penalty=length_penalty,
        early_stopping=early_stopping,
        return_dict_in_generate=True, output_scores=True, use_cache=False,
    )  # fmt: skip
    each = []
    for row in made.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, t in enumerate(row) if t in eos_ids), limit)
        each.append(tuple(row[:end]))
    scores = made.sequences_scores.tolist() if beams > 1 else [0.0]
    return list(zip(each, scores, strict=True))


def searched(logits, prompt, *options):
    """Hypotheses by `search`, whose beams are whole sequences here."""
    rows = [list(prompt)]

    def step(ids, parents):
        rows[:] = [[*rows[p], t] for t, p in zip(ids, parents, strict=True)]
        return logits(torch.tensor(rows))[:, -1].numpy()

    return search(logits(torch.tensor(rows))[0, -1].numpy(), step, *options)


def tiny(kind, seed, scale):
    torch.manual_seed(seed)
    options = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(**options, num_attention_heads=4, max_position_embeddings=64)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in model.parameters():
        p.data *= scale if p.ndim > 1 else 1  # else all ids are about as likely
    return model


def likely(logits, prompt, n, skip=1):
    """Ids that soon compete: those of greedy decoding, after the first few."""
    rows = list(prompt)
    for _ in range(LIMIT):
        rows.append(int(logits(torch.tensor([rows]))[0, -1].argmax()))
    return list(dict.fromkeys(rows[len(prompt) + skip :]))[:n]


SEEDS = [("Llama", 0, 5), ("Llama", 1, 3), ("Llama", 1, 5), ("GPTNeoX", 0, 3), ("GPTNeoX", 2, 2)]


@pytest.mark.parametrize(("kind", "seed", "scale"), SEEDS)
@torch.no_grad()
def test_search_equals_the_library(kind, seed, scale):
    model, prompt = tiny(kind, seed, scale), [1, 5, 7, seed + 3]
    lengths, outcomes = set(), set()

    def logits(ids):
        return model(ids, use_cache=False).logits

    ends = likely(logits, prompt, 2)
    for i, (beams, (penalty, early)) in enumerate(itertools.product(range(1, 6), VARIANTS)):
        options = (beams, LIMIT, ends[: 1 + i % 2], penalty, early)
        expected, found = library(model, prompt, *options), searched(logits, prompt, *options)
        assert [h.ids for h in found] == [ids for ids, _ in expected], options
        if beams > 1:
            np.testing.assert_allclose([h.score for h in found], [s for _, s in expected], rtol=1e-4)
        for h in found:
            assert h.total == pytest.approx(sum(h.logprobs), rel=1e-5)
        lengths |= {len(h.ids) for h in found}
        outcomes.add((beams, tuple(h.ids for h in found)))
    assert len(lengths) > 3, f"hypotheses have lengths {lengths}: end ids hardly occur"
    assert len(outcomes) >= 10, "the options hardly matter"


@pytest.mark.parametrize(("scale", "likelier", "penalty"), [(1, 1, 1.0), (4, 2, -2.0)])
def test_many_end_ids(scale, likelier, penalty):
    """Random tables of bigrams, with four end ids that are likelier than the others."""
    ends = (0, 1, 2, 3)
    for seed, beams, early in itertools.product(range(12), (2, 3), (False, True, "never")):
        torch.manual_seed(seed)
        table = scale * torch.randn(20, 20)
        table[:, ends] += likelier
        options = (beams, 6, ends, penalty, early)
        expected = library(Table(lambda ids, table=table: table[ids]), [9], *options)
        assert [h.ids for h in searched(lambda ids, table=table: table[ids], [9], *options)] == [i for i, _ in expected]


def test_of_equal_candidates_the_lower_comes_first():
    def step(ids, parents):
        return np.zeros((len(ids), 6), np.float32)

    found = search(np.zeros(6, np.float32), step, 2, 2, [5])
    assert [h.ids for h in found] == [(0, 0), (0, 1)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad):
    with pytest.raises(EngineError, match="not finite"):
        search(np.array([0, bad, 0], np.float32), lambda ids, parents: None, 2, 2, [1])


# ----------------------------------------------------------------------------------------------------- with an engine
FLAMINGO = Path(__file__).parents[1] / "data" / "flamingo" / "openflamingo"
END, IMAGE = 297, 298
PROMPT = [IMAGE, 11, 25, 7, END, IMAGE, 30, 41, 5]  # an example and a query, an image each


@pytest.fixture(scope="module")
def flamingo():
    """The recorded checkpoint, but its end id and its image id are as likely as two that it likes."""
    model = load(FLAMINGO)
    head = model.module.lang_encoder.embed_out.weight.data
    head[[END, IMAGE, 225, 267]] = head[[225, 267, END, IMAGE]]
    return model


@pytest.fixture(scope="module")
def engine(flamingo, tmp_path_factory):
    program = optimize(trace(flamingo, batch=5, images=2, context=20), check=False).program
    return Engine(export(program, tmp_path_factory.mktemp("engines") / "flamingo"), threads=1)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3)).astype(np.uint8)


PICTURES = [picture(0), picture(1)]


def recomputed(model, pixels, prompt):
    """Logits of the plain module on whole sequences. A new row sees the last image; from a new marker on, the first."""
    media = model.module.encode_images(torch.from_numpy(pixels)).flatten(0, 1)
    count = len(media)

    def logits(ids):
        time = (ids == IMAGE).cumsum(1)
        new = time[:, len(prompt) :]
        new[:] = torch.where(new > count, 1, count)
        seen = time[..., None] == torch.arange(1, count + 1)
        text = model.module.lang_encoder.embedding(ids)
        return model.module(text, media.expand(len(ids), *media.shape), seen, time > 0)

    return logits


@torch.no_grad()
def test_engine_equals_the_library_on_the_plain_model(engine, flamingo):
    logits = recomputed(flamingo, engine.image_processor(PICTURES), PROMPT)
    reset, lengths = False, set()
    for beams, (penalty, early) in itertools.product((2, 3, 5), VARIANTS):
        expected = library(Table(logits), PROMPT, beams, LIMIT, (END,), penalty, early)
        options = {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
        made = engine.generate(PROMPT, PICTURES, max_new_tokens=LIMIT, logprobs=True, **options)
        assert [tuple(h.ids) for h in made.hypotheses] == [ids for ids, _ in expected], options
        np.testing.assert_allclose([h.score for h in made.hypotheses], [s for _, s in expected], rtol=1e-4)
        assert (made.ids, made.score) == (made.hypotheses[0].ids, made.hypotheses[0].score)
        assert made.finish_reason == ("stop" if made.ids[-1] == END else "length")
        assert made.score == pytest.approx(sum(made.logprobs) / len(made.ids) ** penalty, rel=1e-5)
        lengths |= {len(h.ids) for h in made.hypotheses}
        reset |= len({IMAGE in h.ids for h in made.hypotheses}) == 2
    assert len(lengths) > 3, "the end id hardly occurs"
    assert reset, "no beam shows an image anew"


def test_one_beam_is_greedy(engine):
    made = engine.generate(PROMPT, PICTURES, max_new_tokens=LIMIT, num_beams=1, length_penalty=-2.0)
    assert made == engine.generate(PROMPT, PICTURES, max_new_tokens=LIMIT)
    assert (made.score, made.hypotheses) == (None, [])


def test_after_a_prefix(engine):
    options = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": LIMIT}
    alone = engine.generate(PROMPT, PICTURES, **options)
    prefix = engine.prefix(PROMPT[:5], PICTURES[:1])
    for _ in range(2):  # the second time in lanes that held beams
        assert engine.generate(PROMPT[5:], PICTURES[1:], prefix=prefix, **options) == alone
    assert engine.generate(PROMPT, PICTURES, **options) == alone


def test_in_a_batch(engine):
    beams = [Request(PROMPT, PICTURES, LIMIT, num_beams=n, length_penalty=-2.0) for n in (3, 5)]
    plain = [Request(PROMPT[5:], PICTURES[1:], n) for n in (LIMIT, 3, 12)]
    asked = [plain[0], beams[0], *plain[1:], beams[1]]
    together = engine.generate_batch(asked)
    assert together == [engine.generate_batch([r])[0] for r in asked]
    assert together[1] == engine.generate(PROMPT, PICTURES, max_new_tokens=LIMIT, num_beams=3, length_penalty=-2.0)


def test_to_exactly_the_last_slot(engine):
    made = engine.generate(PROMPT, PICTURES, num_beams=5, length_penalty=1.0)
    assert max(len(h.ids) for h in made.hypotheses) == 20 - len(PROMPT) + 1
    short = engine.generate(PROMPT, PICTURES, max_new_tokens=1, num_beams=5)
    assert [len(h.ids) for h in short.hypotheses] == [1] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 6}, "num_beams is 6, .* at most 5 samples at once"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2.0}, "num_beams is 2.0"),
        ({"length_penalty": "long"}, "length_penalty is 'long'"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature is 0.5, but num_beams is 2"),
        ({"num_beams": 2, "top_k": 4}, "top_k is 4, but num_beams is 2"),
        ({"num_beams": 2, "top_p": 0.9}, "top_p is 0.9, but num_beams is 2"),
        ({"num_beams": 2, "seed": 0}, "seed is 0, but num_beams is 2"),
        ({"num_beams": 2, "stop": "."}, "stop is '.', but num_beams is 2"),
        ({"num_beams": 2, "stream": True}, "cannot be streamed"),
    ],
)
def test_refused(engine, options, message):
    with pytest.raises(EngineError, match=message):
        engine.generate(PROMPT, PICTURES, max_new_tokens=2, **options)


def test_a_conversation_has_no_beams(engine):
    with pytest.raises(EngineError, match="num_beams is 2, but a conversation"):
        engine.chat().send("a", num_beams=2)


# ----------------------------------------------------------------------------------------- images in the text, words
@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """An engine with a tokenizer, whose images lie among the rows of the text."""
    from toy_tokenizers import small_tokenizer

    folder = tmp_path_factory.mktemp("words")
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(DATA / name)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    program = optimize(trace(load(folder), batch=4, images=2, context=64), check=False).program
    return Engine(export(program, folder / "engine"), threads=1)


def test_images_in_the_text(words, monkeypatch):
    prompt, pixels = [1, 7, -200, 9, 11, -200, 20, 21], words.image_processor(PICTURES)

    def logits(ids):  # each sequence alone, fed as if it had been chosen
        new = ids[:, len(prompt) :]
        steps = new.shape[1] + 1
        forced = np.pad(new.numpy(), ((0, 0), (0, 1)))
        runs = [
            words.debug.generate_ids([prompt], pixels, max_new_tokens=steps, forced=f[None], logits=True)
            for f in forced
        ]
        return torch.from_numpy(np.stack([r.logits[0] for r in runs]))

    monkeypatch.setattr(words, "info", replace(words.info, eos_ids=tuple(likely(logits, prompt, 1, skip=2))))
    for beams, penalty in itertools.product((2, 4), (-2.0, 0.0, 1.0)):
        expected = searched(logits, prompt, beams, LIMIT, words.info.eos_ids, penalty)
        made = words.generate(
            prompt, PICTURES, max_new_tokens=LIMIT, num_beams=beams, length_penalty=penalty, logprobs=True
        )
        assert [tuple(h.ids) for h in made.hypotheses] == [h.ids for h in expected]
        np.testing.assert_allclose(made.logprobs, expected[0].logprobs, atol=1e-4)


def test_text_and_command_line(words):
    from mmopt.cli import app

    made = words.generate("what is it", num_beams=3, length_penalty=0.0, max_new_tokens=6)
    for h in made.hypotheses:
        assert h.text == words.text.decode(h.ids).strip()
    run = [
        "run",
        str(words.directory),
        "what is it",
        "--num-beams",
        "3",
        "--length-penalty",
        "0",
        "--max-new-tokens",
        "6",
    ]
    said = CliRunner().invoke(app, run)
    assert (said.exit_code, said.stdout) == (0, made.text + "\n"), said
