"""Engines that paint, against the Program; and text by an engine whose head is a stage of its own."""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import painting_toy as toy
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from typer.testing import CliRunner

from mmopt.cli import app
from mmopt.exporters.onnx import export
from mmopt.passes.hoist_invariants import HoistInvariants
from mmopt.passes.share_samples import ShareSamples
from mmopt.passes.split_calls import SplitCalls
from mmopt.runtime import session
from mmopt.runtime.engine import Engine
from mmopt.runtime.image_generation import GeneratedImages
from mmopt.runtime.request import Request
from mmopt.search.optimize import optimize
from mmopt.spec.errors import EngineError
from mmopt.spec.flow_sampler import draw_noise
from mmopt.spec.solvers import make_plan

IMAGE, CONTEXT = -200, 64
MOST = CONTEXT - 17  # rows of a prompt beside those of an image


def ids(n):
    return [1, *(3 + i % 37 for i in range(n - 1))]


PROMPTS = [[1, 5, 6, 7], [1, 9], ids(MOST + 1), [1, 5, 6, 8], [1, 12, 13]]


def small_tokenizer() -> str:
    """One piece a letter, spaces as in sentencepiece; as many as the toy has ids."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"USERAITN:abcdefghijklmnopqrstuvwxyz"]
    pieces += [chr(0x4E00 + i) for i in range(toy.VOCAB - len(pieces))]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in pieces[:3]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def plain():
    made = toy.program(context=CONTEXT)
    made.source = replace(made.source, tokenizer=small_tokenizer())
    return made


@pytest.fixture(scope="module")
def directories(plain, tmp_path_factory):
    """As traced; with rows hidden by a mask still in the caches; as optimized, for both targets."""
    root, masked = tmp_path_factory.mktemp("engines"), plain
    for p in (SplitCalls(), ShareSamples(), HoistInvariants()):
        masked, _ = p(masked)
    optimized = optimize(plain, check=False).program
    return {
        "traced": export(plain, root / "traced"),
        "masked": export(masked, root / "masked"),
        "optimized": export(optimized, root / "optimized"),
        "tensorrt": export(optimized, root / "tensorrt", target="tensorrt"),
        "tensorrt traced": export(plain, root / "tensorrt-traced", target="tensorrt"),
    }


@pytest.fixture(scope="module", params=["traced", "masked", "optimized", "tensorrt", "tensorrt traced"])
def each(directories, request):
    return Engine(directories[request.param], threads=1)


@pytest.fixture(scope="module")
def engine(directories):
    return Engine(directories["optimized"], threads=1)


def noise(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 2, 8, 8)).astype(np.float32)


def same(made: GeneratedImages, wanted, rows=slice(None), atol=2e-5):
    np.testing.assert_allclose(made.latents, wanted["latents"][rows], atol=atol)
    np.testing.assert_allclose(made.pixels, wanted["image"][rows], atol=atol)
    if made.trajectory is not None:
        np.testing.assert_allclose(np.stack(made.trajectory), wanted["trajectory"][:, rows], atol=atol)


# --------------------------------------------------------------------------------------------- as the Program paints
@pytest.mark.parametrize("plan", [make_plan("euler", 3), make_plan("heun", 4, 3.0), make_plan("ab3", 4, 1.0)])
@pytest.mark.parametrize("count", [1, 2])
def test_as_the_program(each, plain, plan, count):
    prompts, z = PROMPTS[:count], noise(count)
    made = each.generate_images(prompts, solver=plan, noise=z, trajectory=True)
    same(made, plain.generate_images(prompts, torch.from_numpy(z), plan))
    assert made.plan is plan
    assert made.latents.dtype == made.pixels.dtype == np.float32


def test_evaluations_without_guidance(each, plain):
    plan = make_plan("euler", 4, 2.0)
    guided = np.array([True, False, True, False])
    plan = type(plan)("mixed", plan.times, plan.a, plan.cond, plan.uncond * guided, guided, 2.0)
    made = each.generate_images(PROMPTS[:2], solver=plan, noise=noise(2), trajectory=True)
    same(made, plain.generate_images(PROMPTS[:2], torch.from_numpy(noise(2)), plan))


def test_more_prompts_than_the_batch(each, plain):
    """In groups of two: the longest prompt, alike ones and an odd one at the end."""
    plan, told = make_plan("euler", 2), []
    z = noise(5)
    made = each.generate_images(
        PROMPTS, solver=plan, noise=z, trajectory=True, progress=lambda done, of: told.append((done, of))
    )
    same(made, plain.generate_images(PROMPTS, torch.from_numpy(z), plan))
    assert told == [(i, 6) for i in range(1, 7)]
    assert len(made.trajectory) == 2


def test_prompts_that_are_alike(each, plain):
    """Rows of a prompt that another sample has too are read once; pictures differ by their noise."""
    prompts, z, plan = [PROMPTS[0]] * 2, noise(2), make_plan("euler", 3)
    same(each.generate_images(prompts, solver=plan, noise=z), plain.generate_images(prompts, torch.from_numpy(z), plan))
    alone = [[7, 3], [7, 9]]  # of two ids: the conditional half is the unconditional one
    same(each.generate_images(alone, solver=plan, noise=z), plain.generate_images(alone, torch.from_numpy(z), plan))


def test_what_is_painted_beside_it_does_not_change_a_picture(engine):
    together = engine.generate_images(PROMPTS[:2], steps=3, noise=noise(2))
    for i in range(2):
        alone = engine.generate_images(PROMPTS[i : i + 1], steps=3, noise=noise(2)[i : i + 1])
        np.testing.assert_allclose(alone.latents, together.latents[i : i + 1], atol=1e-5)


def test_from_several_threads(engine):
    """Each painting has caches of its own; text may be answered meanwhile."""
    wanted = [engine.generate_images([p], steps=3, noise=noise(1)).latents for p in PROMPTS[:3]]
    answer = engine.generate([5, 6, 7], max_new_tokens=4).ids
    found, answers = [None] * 3, []

    def run(i):
        found[i] = [engine.generate_images([PROMPTS[i]], steps=3, noise=noise(1)).latents for _ in range(3)]
        answers.append(engine.generate([5, 6, 7], max_new_tokens=4).ids)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(3):
        for latents in found[i]:
            np.testing.assert_allclose(latents, wanted[i], atol=1e-6)
    assert answers == [answer] * 3


def test_observed_as_the_program(engine, plain):
    stages = [[], []]
    plan = make_plan("euler", 2)
    optimized = optimize(plain, check=False).program
    given = PROMPTS[:2], torch.from_numpy(noise(2)), plan
    optimized.generate_images(*given, observe=lambda phase, call, made, chunk: stages[0].append((phase, call.stage)))
    engine.generate_images(
        PROMPTS[:2], solver=plan, noise=noise(2),
        observe=lambda phase, call, made, chunk: stages[1].append((phase, call.stage)),
    )  # fmt: skip
    assert stages[0] == stages[1]


def test_without_a_decoder_of_images(tmp_path):
    def change(m, specs):
        del specs["decode_image"]

    program = toy.program(change=change)
    made = Engine(export(program, tmp_path / "engine"), threads=1).generate_images([[1, 2, 3]], steps=2, noise=noise(1))
    wanted = program.generate_images([[1, 2, 3]], torch.from_numpy(noise(1)), made.plan)["latents"]
    np.testing.assert_allclose(made.latents, wanted, atol=2e-5)
    assert made.pixels is None
    with pytest.raises(EngineError, match="no decoder of images: export it from a checkpoint with its VAE"):
        list(made)


# --------------------------------------------------------------------------------------------------------- the pictures
def test_pictures_of_8_bits():
    """Rounded down, clipped at both ends, channels last."""
    levels = np.array([-9.0, -1.0, -0.9961, 0.0, 0.9999, 1.0, 3.0, -1 + 2.02 / 255], np.float32)
    pixels = np.stack([levels.reshape(2, 4), -levels.reshape(2, 4), np.zeros((2, 4), np.float32)])[None]
    (image,) = GeneratedImages(np.zeros(1), pixels, make_plan("euler", 1))
    assert (image.size, image.mode) == ((4, 2), "RGB")
    array = np.asarray(image)
    assert array[..., 0].reshape(-1).tolist() == [0, 0, 0, 127, 254, 255, 255, 1]
    assert array[..., 1].reshape(-1).tolist() == [255, 255, 254, 127, 0, 0, 0, 253]
    assert (array[..., 2] == 127).all()


def test_generate_image(engine):
    images = engine.generate_images([1, 5, 6, 7], n=3, steps=2, seed=5)
    wanted = engine.generate_images([[1, 5, 6, 7]] * 3, steps=2, seed=5)
    assert [np.asarray(i).tolist() for i in images] == [np.asarray(i).tolist() for i in wanted]
    levels = ((np.clip(wanted.pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(images[1]), levels[1].transpose(1, 2, 0))


def test_prompts_as_text(engine):
    prompt = engine.text.encode(engine.template.render([{"role": "user", "content": "a tree"}], painting=True))
    assert len(prompt) > 6
    by_text = engine.generate_images(["a tree", [*prompt, 3]], steps=2, noise=np.concatenate([noise(1)] * 2))
    np.testing.assert_allclose(by_text.latents[0], by_text.latents[1], atol=1e-6)


def test_seeds(engine):
    one = engine.generate_images([PROMPTS[0]], steps=1, seed=3).latents
    np.testing.assert_array_equal(one, engine.generate_images([PROMPTS[0]], steps=1, seed=3).latents)
    assert np.abs(one - engine.generate_images([PROMPTS[0]], steps=1, seed=4).latents).max() > 0.1
    unseeded = [engine.generate_images([PROMPTS[0]], steps=1).latents for _ in range(2)]
    assert np.abs(unseeded[0] - unseeded[1]).max() > 0.1
    # the first picture of a seed does not depend on how many there are
    np.testing.assert_allclose(engine.generate_images([PROMPTS[0]] * 3, steps=1, seed=3).latents[:1], one, atol=1e-5)


def test_noise_of_a_seed(engine):
    many, few = (draw_noise(n, engine.info, 7) for n in (4, 2))
    assert (many.shape, many.dtype) == ((4, 2, 8, 8), np.float32)
    np.testing.assert_array_equal(many[:2], few)
    assert len({x.tobytes() for x in many}) == 4
    assert abs(draw_noise(64, engine.info, 0).std() - 1) < 0.02
    given = engine.generate_images([PROMPTS[0]] * 2, steps=2, noise=few).latents
    np.testing.assert_array_equal(given, engine.generate_images([PROMPTS[0]] * 2, steps=2, seed=7).latents)


def test_the_plan(engine):
    def plan(**options):
        return engine.generate_images([PROMPTS[0]], noise=noise(1), **options).plan

    assert plan() == make_plan("ab2", 10, 2.0)
    assert plan(steps=4, guidance=3.5, solver="heun") == make_plan("heun", 4, 3.5)
    own = make_plan("euler", 2)
    assert plan(solver=own) is own


def test_fitted_plans_of_an_engine(plain, tmp_path):
    """A plan that was fitted to the model lies in the directory, and is the one to take for so many steps."""
    optimized = optimize(plain, check=False).program
    own = make_plan("ab3", 3, 2.0)
    own = type(own)("fitted 3", own.times, own.a, own.cond, own.uncond, own.guided, own.guidance)
    optimized.info = replace(optimized.info, flow=replace(optimized.info.flow, plans=(own,)))
    made = Engine(export(optimized, tmp_path / "engine"), threads=1)
    assert made.generate_images([PROMPTS[0]], steps=3, noise=noise(1)).plan == own
    assert made.generate_images([PROMPTS[0]], steps=3, solver="fitted", noise=noise(1)).plan.name == "fitted 3"
    assert made.generate_images([PROMPTS[0]], steps=4, noise=noise(1)).plan == make_plan("ab2", 4, 2.0)
    with pytest.raises(EngineError, match="no plan was fitted for 4 steps at guidance 2; there is 3 steps"):
        made.generate_images([PROMPTS[0]], steps=4, solver="fitted", noise=noise(1))


def test_a_bar(engine, capfd):
    engine.generate_images(PROMPTS[0], steps=2, seed=0, progress=True)
    assert capfd.readouterr().out == ""  # a bar is for people: stdout is for results


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("prompts", "options", "why"),
    [
        ([], {}, "no prompt was given"),
        ([[1]], {}, "prompt 0 has 1 ids, expected at least two"),
        ([[1, 2], [1, IMAGE, 3]], {}, r"prompt 1: token ids \[-200\] are outside the vocabulary of 40"),
        ([[1] * (MOST + 2)], {}, "prompt 0 takes 48 rows and an image 17, but the cache holds 64"),
        ([[1, "x"]], {}, "invalid literal"),
        ([None], {}, "not iterable"),
        ([[1, 2]], {"noise": noise(2)}, r"noise is float32 of shape \(2, 2, 8, 8\), expected .* \(1, 2, 8, 8\)"),
        ([[1, 2]], {"noise": noise(1).astype(np.float64)}, "noise is float64"),
        ([[1, 2]], {"noise": noise(1).tolist()}, "noise is list"),
        ([[1, 2]], {"steps": 0}, "steps is 0"),
        ([[1, 2]], {"steps": 3, "solver": "heun"}, "even number"),
        ([[1, 2]], {"solver": "rk4"}, "solver 'rk4' is not known"),
        ([[1, 2]], {"solver": "fitted"}, "no plan was fitted for 10 steps at guidance 2; there is none"),
        ([[1, 2]], {"solver": make_plan("euler", 2), "steps": 2}, "a plan says its own steps"),
        ([[1, 2]], {"guidance": float("inf")}, "guidance is inf"),
        ([[1, 2]], {"seed": -1}, "seed is -1"),
        ([[1, 2]], {"seed": "x"}, "seed is 'x'"),
        ("", {}, "no prompt was given"),
    ],
)  # fmt: skip
def test_errors(engine, prompts, options, why):
    with pytest.raises(EngineError, match=why):
        engine.generate_images(prompts, **options)


@pytest.mark.parametrize("n", [0, -1])
def test_no_pictures(engine, n):
    with pytest.raises(EngineError, match=f"n is {n}, expected at least 1"):
        engine.generate_images([1, 2], n=n)


def test_text_needs_a_tokenizer(tmp_path):
    made = Engine(export(optimize(toy.program(), check=False).program, tmp_path / "engine"), threads=1)
    with pytest.raises(EngineError, match="has no tokenizer, so a prompt must be a list of token ids"):
        made.generate_images("a tree")
    assert len(made.generate_images([1, 2, 3], steps=1)) == 1


def test_engines_that_do_not_paint(result, tmp_path):
    made = Engine(export(result.program, tmp_path / "engine"), threads=1)
    with pytest.raises(EngineError, match="mplug_owl2 generates no images"):
        made.generate_images([1, 2, 3])


# --------------------------------------------------------------------------------------- stages of the task asked for
@pytest.fixture
def loaded(monkeypatch):
    """Names of the stages that are loaded from here on."""
    names, init = [], session.StageSession.__init__

    def note(self, name, *args):
        names.append(name)
        init(self, name, *args)

    monkeypatch.setattr(session.StageSession, "__init__", note)
    return names


def test_stages_are_loaded_for_their_task(directories, loaded):
    made = Engine(directories["optimized"], threads=1)
    assert sorted(loaded) == ["embed", "language_model"]
    made.generate([5, 6, 7], max_new_tokens=2)
    assert sorted(loaded) == ["embed", "head", "language_model"]
    made.generate([5, 6, IMAGE, 7], [Image.new("RGB", (9, 9))], max_new_tokens=2)
    assert sorted(loaded) == ["embed", "encode_vision", "head", "language_model"]
    made.generate_images([[1, 2, 3]], steps=1)
    assert len(loaded) == len(set(loaded))  # each once
    assert set(loaded) == set(json.loads((directories["optimized"] / "program.json").read_text())["stages"])


def test_painting_loads_nothing_of_images_that_are_read(directories, loaded):
    Engine(directories["optimized"], threads=1).generate_images([[1, 2, 3]], steps=1)
    assert not {"encode_vision", "head"} & set(loaded)


def test_models_that_do_not_paint_are_loaded_at_once(result, tmp_path, loaded):
    directory = export(result.program, tmp_path / "engine")
    loaded.clear()
    Engine(directory, threads=1)
    assert set(loaded) == set(json.loads((directory / "program.json").read_text())["stages"])


def test_painting_needs_no_torch(directories):
    code = (
        "import sys\nfrom mmopt.runtime.engine import Engine\n"
        f"made = Engine({str(directories['optimized'])!r}, threads=1).generate_images([1, 2, 3], steps=1)\n"
        "sys.exit('torch' in sys.modules or made[0].size != (8, 8))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# ------------------------------------------------------------------------------------------ text through a head stage
TEXTS = [[[5, 6, 7]], [[1, 4, IMAGE, 8, 9]], [[IMAGE, 3], [1, 9, 8, 7, 6, 5]]]


@pytest.mark.parametrize("prompts", TEXTS)
def test_text_as_the_program(each, plain, prompts):
    count = sum(p.count(IMAGE) for p in prompts)
    pixels = np.random.default_rng(2).standard_normal((count, 3, 8, 8)).astype(np.float32) if count else None
    given = None if pixels is None else torch.from_numpy(pixels)
    wanted = plain(prompts=prompts, pixel_values=given, max_new_tokens=5, ignore_eos=True)
    run = each.debug.generate_ids(prompts, pixels, max_new_tokens=5, ignore_eos=True, logits=True, caches=True)
    assert run.tokens == wanted["tokens"]
    assert run.past.tolist() == wanted["past"].tolist()
    last = np.stack([x[-1] for x in run.logits])
    np.testing.assert_allclose(last, wanted["logits"][:, -1], atol=1e-4)
    for key, cache in run.caches.items():
        for b, rows in enumerate(run.past):
            np.testing.assert_allclose(cache[b, :, :rows], wanted[key][b, :, :rows], atol=1e-4)


def test_forced_ids(each, plain):
    forced = np.array([[3, 4, 5], [9, 8, 7]])
    seen = []

    def observe(phase, call, made, chunk):
        if call.stage == "head" and phase == "decode":
            seen.append(made["logits"][:, -1].numpy())

    prompts = [[5, 6, 7], [1, 9]]
    plain(prompts=prompts, max_new_tokens=3, forced=torch.from_numpy(forced), ignore_eos=True, observe=observe)
    run = each.debug.generate_ids(prompts, max_new_tokens=3, forced=forced, logits=True)
    np.testing.assert_allclose(np.stack(run.logits)[:, 1:], np.stack(seen, 1), atol=1e-4)


def test_generate(engine, plain):
    made = engine.generate([5, 6, 7], max_new_tokens=6).ids
    wanted = plain(prompts=[[5, 6, 7]], max_new_tokens=6)["tokens"][0]
    assert made == [t for t in wanted if t != 2]
    requests = [Request([5, 6, 7], max_new_tokens=6), Request([1, 9], max_new_tokens=3)]
    batch = engine.generate_batch(requests)
    assert batch[0].ids == made
    assert batch[1].ids == engine.generate([1, 9], max_new_tokens=3).ids
    assert "".join(engine.generate([5, 6, 7], max_new_tokens=6, stream=True)) == batch[0].text


def test_chat(engine):
    """The second turn goes on from the cache of the first, and answers as one prompt of both would be answered."""
    chat, image = engine.chat(), Image.new("RGB", (8, 8), (200, 30, 90))
    first = chat.send("it", [image], max_new_tokens=2)
    second = chat.send("so", max_new_tokens=2)
    question = {"role": "user", "content": "<image>it"}
    messages = [question, {"role": "assistant", "content": first.text}, {"role": "user", "content": "so"}]
    assert first.ids == engine.generate([question], [image], max_new_tokens=2).ids
    whole = engine.generate(messages, [image], max_new_tokens=2)
    assert second.text == whole.text


def test_prefix(engine):
    start = engine.prefix([1, 5, 6, 7])
    assert engine.generate([8, 9], prefix=start, max_new_tokens=4).ids == (
        engine.generate([1, 5, 6, 7, 8, 9], max_new_tokens=4).ids
    )


def test_text_to_exactly_the_last_slot(each, plain):
    prompts = [ids(CONTEXT - 9)]
    run = each.debug.generate_ids(prompts, max_new_tokens=10, ignore_eos=True)
    assert run.tokens == plain(prompts=prompts, max_new_tokens=10, ignore_eos=True)["tokens"]
    assert run.past.tolist() == [CONTEXT]


# --------------------------------------------------------------------------------------------------- the command line
def command(*args):
    return CliRunner().invoke(app, ["generate-image", *map(str, args)])


def test_images_on_the_command_line(directories, engine, tmp_path):
    out = tmp_path / "tree.png"
    made = command(directories["optimized"], "a tree", out, "--steps", 2, "--seed", 4, "--threads", 1)
    assert made.exit_code == 0, made.output
    assert "ab2" in made.stdout
    assert "2 steps, 4 forwards" in made.stdout
    (wanted,) = engine.generate_images("a tree", steps=2, seed=4)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(wanted))
    assert [f.name for f in tmp_path.iterdir()] == ["tree.png"]  # nothing half-written stays


def test_several_pictures_get_numbers(directories, tmp_path):
    out = tmp_path / "tree.webp"
    given = ["--steps", 2, "--solver", "heun", "--guidance", 1, "--seed", 1, "-n", 3, "--json"]
    made = command(directories["optimized"], "a tree", out, *given)
    facts = json.loads(made.stdout)
    assert facts["files"] == [str(tmp_path / f"tree-{i}.webp") for i in (1, 2, 3)]
    assert (facts["plan"], facts["nfe"], facts["forwards"]) == ("heun", 2, 2)
    assert all(Image.open(f).size == (8, 8) for f in facts["files"])


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["tree.txt"], "OUT: expected the name of an image, .png, .jpg or .webp, seen tree.txt"),
        (["tree"], "expected the name of an image"),
        (["tree.png", "--solver", "rk4"], "solver 'rk4' is not known"),
        (["tree.png", "--solver", "heun", "--steps", "3"], "even number"),
        (["tree.png", "--provider", "tpu"], "provider is 'tpu'"),
    ],
)
def test_wrong_use_of_the_command(directories, tmp_path, monkeypatch, args, why):
    monkeypatch.chdir(tmp_path)
    made = command(directories["optimized"], "a tree", *args)
    assert isinstance(made.exception, ValueError)
    assert why in str(made.exception)
    assert list(tmp_path.iterdir()) == []
