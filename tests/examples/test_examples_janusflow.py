"""The trained checkpoint that reads and paints coloured digits, its judge, and the programs that made them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import mmopt
from mmopt.models._autoencoder import load_autoencoder
from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.image_processor import ImageProcessor
from mmopt.processing.tokenizer import TextProcessor

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "checkpoints/janusflow-digits"
sys.path.insert(0, str(EXAMPLES))
import digits  # noqa: E402
import judge  # noqa: E402
import pictures  # noqa: E402
import train_autoencoder  # noqa: E402
import train_janusflow  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return mmopt.load(CHECKPOINT, "float32")


@pytest.fixture(scope="module")
def prompts():
    return digits.Prompts(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))


@pytest.fixture(scope="module")
def shown():
    return pictures.Pictures(*(x[:200] for x in pictures.stored()))


@pytest.fixture
def few_digits(monkeypatch):
    with np.load(pictures.STORED) as kept:
        part = kept["digits"], kept["labels"].astype(np.int64)
    monkeypatch.setattr(pictures, "mnist", lambda archive, split: part)


# ---------------------------------------------------------------------------------------------------------- pictures
def test_pictures_show_what_they_say(shown):
    assert (shown.pixels.shape, shown.pixels.dtype) == ((200, 32, 32, 3), np.uint8)
    assert np.array_equal(shown.pixels, pictures.stored().pixels[:200])
    assert not np.any(shown.fg == shown.bg)
    palette = np.array(list(pictures.COLOURS.values()))
    corner, stroke = shown.pixels[:, 0, 0], []
    with np.load(pictures.STORED) as kept:
        for picture, alpha in zip(shown.pixels, pictures.strokes(kept["digits"][:200]), strict=True):
            stroke.append(picture[alpha == alpha.max()][0])
    assert np.abs(corner - palette[shown.bg]).max() <= 13
    assert np.abs(np.array(stroke, float) - palette[shown.fg]).max() <= 14
    words = shown.words(0)
    assert shown.caption(0) == f"a {words['fg']} {words['digit']} on {words['bg']}"
    assert sum(pictures.CAPTIONS.values()) == pytest.approx(1)


def test_judge(shown):
    verdict = judge.judge(shown.pixels)
    assert verdict.right(shown)["all"] >= 0.98
    other = pictures.Pictures(shown.pixels, *(np.roll(x, 1) for x in shown[1:]))
    assert verdict.right(other)["all"] < 0.1
    blank = shown.pixels.copy()
    blank[:] = blank[:, :1, :1]  # no digits
    assert judge.judge(blank).right(shown)["digit"] < 0.3
    assert judge.judge(blank).right(shown)["bg"] > 0.9
    assert judge.frechet(judge.judge(blank).features) > 10 * judge.frechet(verdict.features)


def test_frechet_distance_of_normal_distributions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    assert judge.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert judge.frechet(x, x + np.array([3, 0, 0, 4, 0, 0])) == pytest.approx(25)
    spread = x - x.mean(0)
    assert judge.frechet(spread, 3 * spread) == pytest.approx(4 * np.cov(spread, rowvar=False).trace())


# -------------------------------------------------------------------------------------------------------- checkpoint
def test_files_are_in_the_official_layout(model, prompts):
    c = model.config
    assert (c.flow.latents, c.flow.tokens, c.tokens_per_image) == ((4, 8, 8), 16, 17)
    assert (c.bos_token_id, c.eos_token_id) == (digits.BOS_ID, digits.EOS_ID)
    assert prompts.tokenizer.to_str() == digits.make_tokenizer().to_str()
    assert prompts.tokenizer.encode("a red 7").ids[0] == digits.BOS_ID
    tensors = load_file(CHECKPOINT / "model.safetensors")
    assert {str(v.dtype) for v in tensors.values()} == {"torch.float16"}
    assert not any(k.startswith("vae.") for k in tensors)
    files = [f for f in CHECKPOINT.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 10e6


def test_prompts_are_those_of_the_chat_template(model, prompts):
    template, family = ChatTemplate(**model.family.chat), model.family
    text = TextProcessor(
        Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")),
        family.image_marker,
        family.image_id,
        digits.BOS_ID,
        (digits.EOS_ID,),
        template="".join(map(str, family.chat.values())),
    )
    for part, question in pictures.QUESTIONS.items():
        rendered = template.render([{"role": "user", "content": family.image_marker + question}])
        ids = text.encode(rendered)
        assert ids == prompts.question(part)
        assert 0 not in ids, "an unknown word"
    for form in pictures.CAPTIONS:
        ids = prompts.painting(form.format(digit="3", fg="green", bg="yellow"))
        assert ids[0] == digits.BOS_ID
        assert 0 not in ids


def test_pixels_are_those_of_the_image_processor(model, shown):
    made = ImageProcessor.from_json(model.processing["image"])(list(shown.pixels[:4]))
    torch.testing.assert_close(torch.from_numpy(made), judge.normalised(shown.pixels[:4]), atol=1e-6, rtol=0)


def test_autoencoder_keeps_digit_and_colours(shown):
    vae, x = load_autoencoder(CHECKPOINT / "vae", torch.float32), judge.normalised(shown.pixels)
    latents = vae.latents_of(x)
    made = vae.image_of(latents)
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert train_autoencoder.psnr(made.clamp(-1, 1), x).mean() > 30
    assert judge.judge(judge.as_uint8(made)).right(shown)["all"] > 0.97


def test_reads_what_is_there(model, prompts, shown):
    found = digits.answers(model.module, prompts, shown)
    assert found["digit"] > 0.95, found
    assert min(found["fg"], found["bg"]) > 0.99, found
    for blind in ("grey", "another"):
        found = digits.answers(model.module, prompts, shown, blind)
        assert found["digit"] < 0.25, found
        assert max(found.values()) < 0.45, found


def test_paints_what_is_asked(model, prompts):
    wanted, noise = digits.orders(40, seed=7)
    pixels, latents = digits.painted(model.module, prompts, wanted, noise, steps=8)
    verdict = judge.judge(pixels)
    assert verdict.right(wanted)["all"] >= 0.95, verdict.right(wanted)
    assert 0.9 < latents.std() < 1.4
    pixels, _ = digits.painted(model.module, prompts, wanted, noise, steps=8, guidance=0.0)  # the caption has no weight
    assert judge.judge(pixels).right(wanted)["all"] < 0.2


def test_optimized_program_paints_the_same(model, prompts):
    wanted, noise = digits.orders(2, seed=3)
    program = mmopt.optimize(mmopt.trace(model, batch=2, images=1, context=96)).program
    made = program.generate_images([prompts.painting(wanted.caption(i)) for i in range(2)], noise)
    pixels, latents = digits.painted(model.module, prompts, wanted, noise)
    torch.testing.assert_close(made["latents"], latents, atol=1e-4, rtol=1e-4)
    assert np.abs(judge.as_uint8(made["image"]).astype(int) - pixels).max() <= 1


# ---------------------------------------------------------------------------------------------------------- programs
@pytest.mark.parametrize("system", [True, False])
def test_questions_side_by_side_are_questions_alone(model, prompts, shown, system):
    two = pictures.Pictures(*(x[:2] for x in shown))
    rng, module = np.random.default_rng(0), model.module
    rows = module.encode_images(judge.normalised(two.pixels))
    made = digits.reading_batch(prompts, two, rows.shape[1], rng, system, turns=False)
    ids, positions, mask, wanted = made
    hidden = train_janusflow.hidden_rows(module, digits.insert(module, ids, rows), positions, mask)
    logits = module.language_model.lm_head(hidden)
    order = np.random.default_rng(0).permutation(list(pictures.QUESTIONS))
    at = len(prompts.before([digits.IMAGE_ID] * rows.shape[1], system))
    for part in order:
        alone = torch.tensor([prompts.question(part, system)])
        expected = module(digits.insert(module, alone, rows[:1]))[0][0, -1]
        at += len(prompts.ids(f"{pictures.QUESTIONS[part]}\n\nAssistant:"))
        torch.testing.assert_close(logits[0, at - 1], expected, atol=1e-4, rtol=1e-4)
        assert wanted[0, at - 1] == prompts.answer(two.words(0)[part])[0]
        at += 2


def test_hidden_captions_are_not_seen(model, prompts, monkeypatch):
    """A painting without its caption sees the first token alone, as in the sampler."""
    monkeypatch.setattr(train_janusflow, "UNCONDITIONAL", 1.0)
    mean, deviation = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    losses = []
    for caption in ("a red 7 on blue", "a blue 2 on green", "the digit 7 in red on a blue background"):
        ids, generator = torch.tensor([prompts.painting(caption)]), torch.Generator().manual_seed(0)
        losses.append(train_janusflow.painting_loss(model.module, ids, mean, deviation, generator).item())
    assert losses[0] == losses[1] != losses[2]  # it knows how long the caption is
    monkeypatch.setattr(train_janusflow, "UNCONDITIONAL", 0.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([prompts.painting("a red 7 on blue")])
    assert train_janusflow.painting_loss(model.module, ids, mean, deviation, generator).item() != losses[0]


def test_training_depends_on_the_seed_alone(tmp_path, monkeypatch, few_digits):
    monkeypatch.setattr(train_janusflow, "evaluate", lambda *_: None)
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda work, args, _: work(0, *args))
    monkeypatch.setattr(train_janusflow, "READ_EVERY", 2)
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / name
        shutil.copytree(CHECKPOINT / "vae", out / "vae")
        command = ["train_janusflow.py", "-", "--out", str(out), "--work", str(tmp_path / f"{name}.work")]
        command += ["--steps", "3", "--tower-steps", "2", "--workers", "1", "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", command)
        train_janusflow.main()
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "a" / name).read_text()) == json.loads((CHECKPOINT / name).read_text())
    assert mmopt.load(tmp_path / "a").config == mmopt.load(CHECKPOINT).config


def test_autoencoder_training(tmp_path, monkeypatch, few_digits):
    monkeypatch.setattr(train_autoencoder, "evaluate", lambda *_: None)
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        command = ["train_autoencoder.py", "-", "--out", str(tmp_path / name), "--steps", "2", "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", command)
        train_autoencoder.main()
        made.append((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    load_autoencoder(tmp_path / "a", torch.float32)
    configs = [json.loads((d / "config.json").read_text()) for d in (tmp_path / "a", CHECKPOINT / "vae")]
    assert configs[0] | {"scaling_factor": 0} == configs[1] | {"scaling_factor": 0}
