"""The trained few-shot checkpoint and the example programs around it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import mmopt

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "checkpoints/flamingo-vqa"
pytest.importorskip("easy_vqa")
sys.path.insert(0, str(EXAMPLES))
import codebook  # noqa: E402
import episodes  # noqa: E402
import train_flamingo  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return mmopt.load(CHECKPOINT, "float32")


@pytest.fixture(scope="module")
def prompts(model):
    return episodes.Prompts(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), model.config)


@pytest.fixture(scope="module")
def checks():
    return episodes.Checks("test", 300)


# --------------------------------------------------------------------------------------------------------- code book
def test_words_alone_do_not_tell_the_language():
    for languages in codebook.NAMES.values():
        english, *made_up = languages
        assert all(sorted(m) == sorted(made_up[0]) and not set(m) & set(english) for m in made_up)
        for a in range(3):
            for b in range(a):
                agree = sum(x == y for x, y in zip(made_up[a], made_up[b], strict=True))
                assert agree <= 2, "languages that agree on most things would make the pictures of shots idle"


def test_best_chances():
    black, gray, teal = (codebook.Picture(c, c, "circle") for c in ("black", "gray", "teal"))
    assert codebook.best_chance(("colour", 1), [gray]) == 2 / 8  # "rus" in two of eight books
    assert codebook.best_chance(("colour", 1), [gray, gray]) == 1
    assert codebook.best_chance(("colour", 1), [gray, teal]) == 1  # a name that only language 1 gives to gray
    assert codebook.best_chance(("colour", 1), [black, gray]) == 1 / 2  # languages 1 and 2 agree on black
    assert codebook.best_chance(("colour", 1), [gray, teal], see_shots=False) == 1 / 3


def test_splits_share_no_picture_and_draws_depend_on_the_seed_alone():
    shown = {split: codebook.pictures(split) for split in ("train", "validation", "test")}
    paths = [p.path for part in shown.values() for p in part]
    assert len(paths) == len(set(paths))
    assert len(shown["test"]) == 880
    draws = [[codebook.episode(random.Random(seed), shown["test"], 5) for _ in range(3)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


# -------------------------------------------------------------------------------------------------------- checkpoint
def test_files_are_in_the_official_layout(model, prompts):
    c, raw = model.config, json.loads((CHECKPOINT / "config.json").read_text())["model"]
    words = raw["lm"]["hf_config"]["vocab_size"]
    assert (c.eos_token_id, c.media_token_id, c.pad_token_id) == (words, words + 1, words + 2)
    ids = prompts.ids(codebook.Chunk("", codebook.QUESTION, "bax").shot)
    assert (ids[0], ids[-1], len(ids)) == (c.media_token_id, c.eos_token_id, 10)
    unknown = prompts.text.tokenizer.token_to_id("<unk>")
    assert unknown not in ids
    assert prompts.text.decode(ids) == "question: which name fits ? short answer: bax"
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 8e6


def test_gates_are_open(model):
    gates = {k: v.tanh().abs().item() for k, v in model.module.named_parameters() if k.endswith("gate")}
    assert len(gates) == 8
    assert min(gates.values()) > 0.01, gates


def test_vision_tower_is_the_first_yardsticks():
    first = mmopt.load(EXAMPLES / "checkpoints/mplug-owl2-vqa", "float32").module.model.vision_model
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = first.embeddings(pixels)
    for layer in first.encoder.layers:
        rows = layer(rows)
    tower = mmopt.load(CHECKPOINT, "float32").module.vision_encoder
    tower.load_state_dict(train_flamingo.vision_weights(4))
    torch.testing.assert_close(tower(pixels), rows[:, 1:], atol=1e-3, rtol=1e-3)
    assert (tower(pixels.flip(3)) - rows[:, 1:]).abs().max() > 0.1


def test_shots_matter_and_so_do_their_pictures(model, prompts, checks):
    rows = checks.encode(model.module)
    right = checks.right(model.module, prompts, rows, checks.book).float().mean(0).tolist()
    assert right[0] < 0.35
    assert (right[1] > 0.8, right[2] > 0.9, right[4] > 0.95) == (True, True, True), right
    rng = random.Random(0)
    exchanged = [[*rng.sample(sorted(rows), 4), e[-1].image] for e in checks.book]
    assert checks.right(model.module, prompts, rows, checks.book, exchanged)[:, -1].float().mean() < 0.75
    blind = [[None] * 5 for _ in checks.book]
    assert checks.right(model.module, prompts, rows, checks.book, blind).float().mean() < 0.35
    asked = checks.right(model.module, prompts, rows, checks.vqa).float().mean()
    assert asked > 0.85 > checks.right(model.module, prompts, rows, checks.vqa, blind).float().mean() + 0.1


def test_checkpoint_split_as_the_official_ones_are(model, tmp_path):
    """The trained tensors in checkpoint.pt, the rest in a stock language model and a stock CLIP."""
    raw = json.loads((CHECKPOINT / "config.json").read_text())["model"]
    words, tensors = raw["lm"]["hf_config"]["vocab_size"], load_file(CHECKPOINT / "model.safetensors")
    language, vision, official = {}, {}, {}
    for k, v in tensors.items():
        kind, name = k.split(".", 1)
        if kind == "vision_encoder":
            vision[f"visual.{name}"] = v.clone()
        elif kind == "perceiver" or "gated_cross_attn_layer" in name:
            official[k] = v.clone()
        else:
            language[name.replace("decoder_layer.", "")] = v.clone()
            if ".embed_" in k:
                official[k] = v.clone()
                language[name] = v[:words].clone() + 1  # what the checkpoint holds goes before what is stock
    assert len(official) + len(vision) + len(language) == len(tensors) + 2
    torch.save(official, tmp_path / "checkpoint.pt")
    save_file(vision, tmp_path / "vision.safetensors")
    stock = tmp_path / "language_model"
    stock.mkdir()
    save_file(language, stock / "model.safetensors")
    (stock / "config.json").write_text(json.dumps(raw["lm"]["hf_config"] | {"model_type": "gpt_neox"}))
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < words]
    (stock / "tokenizer.json").write_text(json.dumps(tokenizer))
    heads = {"vision_heads": 4, "perceiver_heads": 4, "cross_heads": 4}
    parts = {"language_model": stock, "vision": tmp_path / "vision.safetensors"}
    put_together = mmopt.load(tmp_path / "checkpoint.pt", "float32", **parts, **heads)
    assert put_together.config == model.config
    for k, v in model.module.state_dict().items():
        assert torch.equal(put_together.module.state_dict()[k], v), k


# ---------------------------------------------------------------------------------------------------------- programs
def test_training_depends_on_the_seed_alone(tmp_path, monkeypatch):
    shown = codebook.pictures("validation")
    asked = train_flamingo.vqa.questions("validation")
    monkeypatch.setattr(train_flamingo.codebook, "pictures", lambda split: shown)
    monkeypatch.setattr(train_flamingo.vqa, "questions", lambda split: asked)
    monkeypatch.setattr(train_flamingo, "evaluate", lambda *_: None)
    monkeypatch.setattr(train_flamingo, "IMAGES", 12)
    monkeypatch.setattr(train_flamingo, "EPISODES", 6)
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = ["--out", str(tmp_path / name), "--state", str(tmp_path / f"{name}.pt"), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["train_flamingo.py", *out, "--steps", "2", "--seed", str(seed)])
        train_flamingo.main()
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert raw == json.loads((CHECKPOINT / "config.json").read_text())
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (CHECKPOINT / "tokenizer.json").read_text()


def test_demo(tmp_path):
    command = [sys.executable, EXAMPLES / "demo_flamingo.py", "--episodes", "8", "--out", tmp_path, "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "shots stored as a prefix" in done.stdout
