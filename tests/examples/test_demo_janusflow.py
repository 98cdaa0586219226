"""The demo of the checkpoint that reads and paints: its figures, its contact sheet, and what it must not let pass."""

import contextlib
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmopt

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import demo_janusflow as demo
import digits
import pictures

SAMPLES, READ = 8, 6


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(out: Path, samples: int, shown: int) -> str:
    """What the demo prints."""
    command = ["--samples", str(samples), "--pictures", str(shown), "--out", str(out), "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["demo_janusflow.py", *command])
        demo.main()
    return said.getvalue()


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """Directory, model and engine of a run with few noises to fit to, and what it printed."""
    out, built, build = tmp_path_factory.mktemp("demo"), [], demo.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FIT", {"samples": 6, "fine": 24})
        patch.setattr(demo, "build", lambda *given: built.append(build(*given)) or built[0])
        said = run(out, SAMPLES, READ)
    return out, built[0], said


@pytest.fixture
def built_before(first_run, monkeypatch):
    monkeypatch.setattr(demo, "build", lambda *_: first_run[1])


def table_of(text: str) -> dict[tuple[str, int], list[float]]:
    """(who, steps) -> passes, seconds, share as asked, Fréchet distance, mean error, its 90th percentile, PSNR."""
    found = re.findall(r"^ +(before: model|after: engine) +(\d+) (?:euler|fitted)((?: +[\d.]+){7})$", text, re.M)
    return {(who, int(steps)): [float(x) for x in rest.split()] for who, steps, rest in found}


def test_figures(first_run):
    _, _, text = first_run
    rows = table_of(text)
    ways = [("before: model", 30), ("after: engine", 30), ("after: engine", 10), ("after: engine", 8)]
    assert list(rows) == ways
    assert [rows[w][0] for w in ways] == [60, 60, 20, 16]
    before, after, ten, eight = (rows[w] for w in ways)
    assert before[2:] == pytest.approx(after[2:], abs=0.11)  # as printed: PSNR has one digit, and may be rounded apart
    assert eight[1] < before[1]
    assert min(row[2] for row in rows.values()) > 0.8
    assert all(0 < mean <= p90 < 0.15 for *_, mean, p90, _ in rows.values())
    assert ten[4] < eight[4]
    assert min(row[6] for row in rows.values()) > 30
    assert re.search(r"10 steps fitted to 6 noises; held out: error 0\.\d+ against 0\.\d+ of ab2 at 20 passes", text)
    assert "only one of the two is right: 0 times" in text
    shown = pictures.stored()
    for i in range(READ):
        w = shown.words(i)
        answers = (
            f"digit? {w['digit']}   what colour is the digit? {w['fg']}   what colour is the background? {w['bg']}"
        )
        assert f"which {answers}   (right: {w['digit']}, {w['fg']}, {w['bg']})" in text


def test_errors_are_those_of_the_latents(first_run, capsys):
    """The table again, of latents whose errors are known: the fine solution scaled."""
    wanted, noise = digits.orders(4, seed=1)
    fine, scales = noise.numpy(), (1.5, 0.9, 1.1, 0.75)
    grey = np.full((4, 32, 32, 3), 100, np.uint8)
    rows = [(grey + np.uint8(10 * (i + 1)), fine * s, 0.5) for i, s in enumerate(scales)]
    demo.table([*rows, (grey, fine, 1.0)], wanted)
    found = list(table_of(capsys.readouterr().out).values())
    for i, (row, error) in enumerate(zip(found, (0.5, 0.1, 0.1, 0.25), strict=True)):
        assert (row[1], row[4], row[5]) == (0.5, error, error)
        assert row[6] == pytest.approx(20 * np.log10(255 / (10 * (i + 1))), abs=0.06)


def test_contact_sheet(first_run):
    out, (model, engine), _ = first_run
    with Image.open(out / "paintings.png") as stored:
        made = np.asarray(stored)
    side, gap = 96, 8
    assert made.shape == (demo.TOP + 4 * (side + gap) + gap, demo.LEFT + SAMPLES * (side + gap) + gap, 3)
    wanted, noise = digits.orders(SAMPLES, seed=1)
    before, _ = digits.painted(model.module, demo.PROMPTS, wanted, noise)
    (fitted,) = engine.generate_images(wanted.caption(5), steps=8, noise=noise[5:6].numpy())
    for row, column, expected in ((0, 0, before[0]), (0, 7, before[7]), (1, 3, before[3]), (3, 5, np.array(fitted))):
        y, x = demo.TOP + row * (side + gap), demo.LEFT + column * (side + gap)
        found = made[y : y + side, x : x + side]
        assert np.array_equal(found, found[::3, ::3].repeat(3, 0).repeat(3, 1))
        assert np.abs(found[::3, ::3].astype(int) - expected).max() <= 1
    text = (made < 128).all(2)  # black on white, away from each edge
    assert text[: demo.TOP, demo.LEFT :].any()
    assert not text[:4].any()
    assert not text[:, :10].any()
    assert not text[: demo.TOP, -4:].any()
    assert not text[:, demo.LEFT - 6 : demo.LEFT].any()
    for row in range(4):
        y = demo.TOP + row * (side + gap)
        assert text[y : y + side, : demo.LEFT].any()
        assert not text[y - gap : y + gap, : demo.LEFT].any()


def test_fitted_plans_go_along_with_the_engine(first_run):
    _, (_, engine), _ = first_run
    plans = engine.info.flow.plans
    assert [(p.evaluations, p.forwards, p.name) for p in plans] == [(10, 20, "fitted"), (8, 16, "fitted")]
    assert engine.info.flow.plan == plans[0]


@pytest.mark.usefixtures("built_before")
@pytest.mark.parametrize("off", [2e-3, float("nan")])
def test_wrong_latents_are_noticed(tmp_path, monkeypatch, off):
    paint = mmopt.Engine.generate_images

    def wrong(self, prompts, steps=None, **options):
        made = paint(self, prompts, steps=steps, **options)
        latents = made.latents.copy()
        latents[-1, 0, 3, 3] += off if steps == 30 else 0
        return replace(made, latents=latents)

    monkeypatch.setattr(mmopt.Engine, "generate_images", wrong)
    with pytest.raises(SystemExit, match=r"the engine differs from the model: 0 answers, latents by up to (2\.0|nan)"):
        run(tmp_path, 2, 2)


@pytest.mark.usefixtures("built_before")
def test_wrong_answers_are_noticed(tmp_path, monkeypatch):
    generate = mmopt.Engine.generate

    def wrong(self, prompt, **options):
        made = generate(self, prompt, **options)
        return replace(made, text="green") if prompt == pictures.QUESTIONS["bg"] else made

    monkeypatch.setattr(mmopt.Engine, "generate", wrong)
    apart = int((pictures.stored().bg[:2] != pictures.NAMES.index("green")).sum())
    with pytest.raises(SystemExit, match=f"the engine differs from the model: {apart} answers"):
        run(tmp_path, 2, 2)
