"""Replaying recorded paintings, preprocessing and left padded prompts with images: the recorded cases at every point,
cases of other sizes, and changed or broken recordings that must be seen."""

import json
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mmopt.conformance import replay as cases
from mmopt.conformance.replay import passed, verify
from mmopt.conformance.run_model import read_model_cases
from mmopt.conformance.table import table
from mmopt.frontend.load import from_config, load

RECORDED = Path(__file__).parents[1] / "data" / "janusflow"
FILES = sorted(RECORDED.glob("*.safetensors"))  # the weights among them are passed over
COUNTS = {"model": 63, "program": 51, "optimized": 49, "engine": 49}
torch.set_num_threads(1)  # tiny matrices: a second thread only waits


@pytest.fixture(scope="module", autouse=True)
def made_once():
    """Most tests change a recording alone: Programs and engines of the checkpoint are made once for each size."""
    made = {}

    def once(name, real):
        def of(line):
            if line.model.directory is None or Path(line.model.directory) != RECORDED:
                return real(line)
            line.stack = stack  # directories of engines stay until the last test
            key = name, line.model.dtype, line.batch, line.images, line.context
            made[key] = made[key] if key in made else real(line)
            return made[key]

        return of

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in ("_program", "_optimized", "_engine"):
            patch.setattr(cases.Line, name, once(name, getattr(cases.Line, name)))
        yield


@pytest.fixture(scope="module")
def result(made_once):
    return verify(RECORDED, FILES)


def compared(result, case, point):
    return {r["output"] for r in result["rows"] if (r["case"], r["point"]) == (case, point)}


def bad(result):
    return {(r["point"], r["output"]) for r in result["rows"] if not r["ok"]}


def changed(directory, name, change, meta=True):
    """A copy of a recorded case with some tensors changed, beside it what is said of it."""
    tensors = load_file(RECORDED / f"{name}.safetensors")
    change(tensors)
    path = directory / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    if meta:
        shutil.copy(RECORDED / "meta.json", directory)
    return path


# ------------------------------------------------------------------------------------------------- the recorded cases
def test_recorded_cases_at_every_point(result):
    assert bad(result) == set(), table(result)
    assert passed(result)
    assert Counter(r["point"] for r in result["rows"]) == COUNTS
    assert all(r["ids_equal"] for r in result["rows"] if r["output"] == "out.generated_ids")
    json.dumps(result, allow_nan=False)


def test_nothing_is_lost(result):
    """Each recorded output, and each input that follows from others, is compared or listed with a reason."""
    for path in FILES:
        if path.stem == "model":
            continue
        recorded = {k for k in load_file(path) if k.startswith("out.")}
        if path.stem.startswith("gen_"):
            recorded |= {"in.attention_mask", "in.prefix_embeds"}
        for point in cases.POINTS:
            listed = {n["output"]: n["reason"] for n in result["not_compared"] if n["point"] == point}
            assert all(listed.values())
            assert recorded <= compared(result, path.stem, point) | set(listed), (path.stem, point)
        assert recorded == compared(result, path.stem, "model")


def test_what_is_compared_where(result):
    everywhere = {"out.z", "out.image", "out.image_u8", "out.t", "out.dt", "out.t_emb", "in.prefix_embeds"}
    everywhere |= {f"out.{at}.v_{kind}" for at in ("first", "last") for kind in ("cond", "uncond", "guided")}
    everywhere |= {"out.first.enc_out", "out.first.z_emb", "out.first.llm_last_hidden"}
    inner = {"out.first.dec_in", "out.vae_input"}
    assert compared(result, "gen_s30", "model") == everywhere | inner | {"in.attention_mask"}
    assert compared(result, "gen_s30", "program") == everywhere | {"in.attention_mask"}
    for point in ("optimized", "engine"):
        assert compared(result, "gen_s30", point) == everywhere
    prompt = {"out.aligner_out", "out.inputs_embeds", "out.prefill_logits", "out.step_logits", "out.generated_ids"}
    for point in ("program", "optimized", "engine"):
        assert compared(result, "und_padded", point) == prompt
        assert len(compared(result, "preprocess", point)) == 4


def test_errors_are_those_of_rounding(result):
    for r in result["rows"]:
        if r["output"] in ("out.z", "out.image"):
            assert r["max_abs"] < 4e-5, r
        if r["output"] == "out.image_u8":
            assert r["max_abs"] <= 1


def test_the_weights_are_named_as_no_case(result):
    assert [n["file"] for n in result["passed_over"]] == ["model.safetensors"]
    assert "passed over: model.safetensors: weights of the checkpoint, no case" in table(result)
    with pytest.raises(ValueError, match=r"no recorded case was given: model.safetensors"):
        verify(RECORDED, [RECORDED / "model.safetensors"])


def test_half_precision():
    files = [RECORDED / f"{name}.safetensors" for name in ("gen_s4_cfg5", "und_padded")]
    found = verify(RECORDED, files, dtype="bfloat16", at=("model", "program", "engine"))
    assert passed(found), table(found)
    assert {r["point"] for r in found["rows"]} == {"model", "program"}
    assert max(r["max_rel"] for r in found["rows"] if r["output"] == "out.z") > 1e-3  # it did run in half precision
    assert any(n["output"] == "out.v_guided" and "multiplies" in n["reason"] for n in found["not_compared"])


def test_a_decoder_of_images_from_elsewhere_or_none_at_all(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(RECORDED / name, tmp_path)
    file = RECORDED / "gen_s4_cfg5.safetensors"
    found = verify(tmp_path, [file], at=("model",), load_options={"vae": RECORDED / "vae"})
    assert passed(found)
    assert {"out.image", "out.vae_input"} <= compared(found, "gen_s4_cfg5", "model")
    found = verify(tmp_path, [file], at=("model", "optimized"))
    assert passed(found)
    without = {n["output"] for n in found["not_compared"] if n["reason"] == "this model has no decoder of images"}
    assert without == {"out.image", "out.image_u8", "out.vae_input"}
    assert "out.z" in compared(found, "gen_s4_cfg5", "optimized")


# ---------------------------------------------------------------------------------------- every check can fail
def test_a_changed_painting_is_not_ok(tmp_path):
    def change(t):
        t["out.z"][2, 1, 3, 5, 5] += 1e-3
        t["out.image"][0, 1, 40, 7] -= 1e-3
        t["out.image_u8"][1, 4, 4, 0] ^= 2
        t["out.v_uncond"][3, 0, 0, 0, 0] += 1e-3
        t["out.last.v_cond"][1, 2, 3, 4] += 1e-3
        t["out.first.v_guided"][1, 2, 3, 4] = float("nan")
        t["out.t"][1] += 0.5
        t["out.t_emb"][2, 9] += 1e-3
        t["out.first.enc_out"][3, 1, 2, 2] += 1e-3
        t["out.first.llm_last_hidden"][3, -1, 0] += 1e-3
        t["in.prefix_embeds"][3, 0, 1] += 1e-3

    found = verify(RECORDED, [changed(tmp_path, "gen_s4_cfg5", change)])
    outputs = {"out.z", "out.image", "out.image_u8", "out.v_uncond", "out.last.v_cond", "out.first.v_guided", "out.t"}
    outputs |= {"out.t_emb", "out.first.enc_out", "out.first.llm_last_hidden", "in.prefix_embeds"}
    assert bad(found) == {(p, o) for p in cases.POINTS for o in outputs}
    assert not passed(found)
    row = next(r for r in found["rows"] if r["output"] == "out.z")
    assert row["max_abs"] == pytest.approx(1e-3, rel=0.1)


def test_what_no_one_reads_is_not_compared(tmp_path):
    def change(t):
        t["out.first.llm_last_hidden"][2, 3] += 5.0  # a hidden row of an unconditional prompt
        t["in.prefix_embeds"][3, 2] += 5.0
        t["out.image_u8"][0, 0, 0, 0] ^= 1  # rounded down: one level off is the least error

    assert passed(verify(RECORDED, [changed(tmp_path, "gen_s4_cfg5", change)], at=("model", "program")))


def test_many_levels_off_by_one_are_not_ok(tmp_path):
    def change(t):
        t["out.image_u8"][0] ^= 1

    found = verify(RECORDED, [changed(tmp_path, "gen_s4_cfg5", change)], at=("model",))
    assert bad(found) == {("model", "out.image_u8")}


@pytest.mark.parametrize("at", [(3, 2), (0, 1), (1, -1)])
def test_a_changed_mask_is_not_ok(tmp_path, at):
    def change(t):
        t["in.attention_mask"][at] = 1 - t["in.attention_mask"][at]

    found = verify(RECORDED, [changed(tmp_path, "gen_s4_cfg5", change)], at=("model", "program"))
    assert {("model", "in.attention_mask"), ("program", "in.attention_mask")} <= bad(found)


def test_wrong_guidance_is_not_ok(tmp_path):
    path = changed(tmp_path, "gen_s4_cfg5", lambda t: None)
    meta = json.loads((tmp_path / "meta.json").read_text())
    next(c for c in meta["gen_cases"] if c["name"] == "gen_s4_cfg5")["cfg_weight"] = 4.5
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    found = verify(RECORDED, [path], at=("model", "optimized"))
    assert {(p, o) for p in ("model", "optimized") for o in ("out.z", "out.image", "out.first.v_guided")} <= bad(found)
    assert ("model", "out.first.v_cond") not in bad(found)


@pytest.mark.parametrize(("name", "weight"), [("gen_s30", 2.0), ("gen_s4_cfg5", 5.0)])
def test_guidance_is_found_in_the_velocities(tmp_path, name, weight):
    def change(t):
        t["out.first.v_guided"][0, 0, 0, 0] += 1.0

    path = changed(tmp_path, name, change, meta=False)
    case = read_model_cases([path], load(RECORDED))[0]
    assert case.generation.plan.guidance == weight
    assert case.generation.plan.evaluations == len(case.outputs["out.z"])
    assert bad(verify(RECORDED, [path], at=("model",))) == {("model", "out.first.v_guided")}


def test_a_changed_prompt_with_images_is_not_ok(tmp_path):
    def change(t):
        t["out.aligner_out"][1, 8, 0] += 1e-3
        t["out.prefill_logits"][1, -1, 3] += 1e-3
        t["out.prefill_logits"][t["in.attention_mask"] == 0] += 9.0  # padding
        t["out.step_logits"][0, 5, 1] += 1e-3
        t["out.generated_ids"][1, 15] += 1
        t["out.position_ids"][1, -1] += 1
        t["out.vit_block0_out"][0, 0, 0] += 1e-3

    found = verify(RECORDED, [changed(tmp_path, "und_padded", change)])
    seen = {"out.aligner_out", "out.prefill_logits", "out.step_logits", "out.generated_ids"}
    inner = {("model", "out.position_ids"), ("model", "out.vit_block0_out")}
    assert bad(found) == {(p, o) for p in cases.POINTS for o in seen} | inner


def test_pictures_by_their_own_mean(tmp_path):
    def change(t):
        t["out.portrait"][2, 3, 3] += 1e-3

    outputs = {"out.portrait"}
    assert bad(verify(RECORDED, [changed(tmp_path, "preprocess", change)], at=("model",))) == {
        ("model", o) for o in outputs
    }
    (tmp_path / "meta.json").unlink()  # nothing says that one picture has another mean than the checkpoint's
    found = verify(RECORDED, [tmp_path / "preprocess.safetensors"], at=("model",))
    assert bad(found) == {("model", o) for o in outputs | {"out.clipstats"}}


# ------------------------------------------------------------------------------------------------------ broken cases
def drop(*names):
    def change(t):
        for name in names:
            del t[name]

    return change


def put(name, value):
    def change(t):
        t[name] = value(t[name])

    return change


def other_prompt(t):
    t["in.prompt_ids"][2] += 1


def other_begin(t):
    t["in.tokens"][3, 0] = 9


def beyond(t):
    t["in.tokens"][:2, 3] = 300
    t["in.prompt_ids"][3] = 300


def two_sizes(t):
    t["in.images_seq_mask"][0, -1] = 1


BROKEN = {
    "no noise": ("gen_s4_cfg5", drop("in.noise"), r"gen_s4_cfg5: expected \w+ to be a picture"),
    "noise of other channels": (
        "gen_s4_cfg5",
        put("in.noise", lambda x: x[:, :3]),
        r"noise of shape \(images, 4, 16, 16\)",
    ),
    "noise of fewer images": (
        "gen_s4_cfg5",
        put("in.noise", lambda x: x[:1]),
        "expected ids of 2 samples for 1 images",
    ),
    "no prompt": ("gen_s4_cfg5", drop("in.tokens", "in.prompt_ids"), "expected the ids of a prompt"),
    "two prompts": ("gen_s4_cfg5", other_prompt, "are not the same"),
    "another first token": ("gen_s4_cfg5", other_begin, "to begin as its prompt does, with id 1, found 9"),
    "no such token": ("gen_s4_cfg5", beyond, r"token ids \[300\] are outside the vocabulary"),
    "a short mask": ("gen_s4_cfg5", put("in.attention_mask", lambda x: x[:, :5]), "expected a mask of 4 samples"),
    "an unknown input": ("gen_s4_cfg5", lambda t: t.update({"in.more": torch.ones(1)}), "unknown input in.more"),
    "no times": (
        "gen_s4_cfg5",
        drop("out.t", "out.z", "out.t_emb", "out.v_cond", "out.v_uncond", "out.v_guided"),
        "expected times or latents of each step",
    ),
    "no guidance": (
        "gen_s30",
        drop(*(f"out.{at}.v_guided" for at in ("first", "last"))),
        "expected a meta.json that tells its guidance, or velocities",
    ),
    "a place too many": ("und_padded", two_sizes, "sample 0 has 1 images of 10 rows.*mark 11 places"),
    "an image too few": ("und_padded", put("in.images_emb_mask", lambda x: 0 * x), "sample 0 has 0 images"),
    "a mask of other rows": (
        "und_single",
        put("in.images_seq_mask", lambda x: x[:, 1:]),
        "expected in.image_mask of shape",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_cases_are_named(tmp_path, kind):
    name, change, message = BROKEN[kind]
    path = changed(tmp_path, name, change, meta=False)
    with pytest.raises(ValueError, match=message) as e:
        verify(RECORDED, [path], at=("model",))
    assert name in str(e.value)


def test_a_broken_meta_json_is_named(tmp_path):
    path = changed(tmp_path, "gen_s4_cfg5", lambda t: None, meta=False)
    (tmp_path / "meta.json").write_text('{"gen_cases": [{"steps": 4}]}')
    with pytest.raises(ValueError, match=r"meta.json: what it says of gen_s4_cfg5 cannot be read"):
        verify(RECORDED, [path], at=("model",))


# ------------------------------------------------------------------------------------- other sizes, prompts and steps
def variant(directory, **change):
    """A random checkpoint of another size, in one directory."""
    raw = json.loads((RECORDED / "config.json").read_text())
    raw["vae"] = json.loads((RECORDED / "vae" / "config.json").read_text())
    for path, value in change.items():
        *where, key = path.split("__")
        part = raw
        for name in where:
            part = part[name]
        part[key] = value
    model = from_config(raw, random=True, seed=3)
    (directory / "config.json").write_text(json.dumps(model.raw_config))
    save_file({k: v.contiguous() for k, v in model.module.state_dict().items()}, directory / "model.safetensors")
    return load(directory)


@torch.inference_mode()
def record_painting(model, prompts, steps, guidance, side, seed=0):
    """The plain loop, written as a file: shorter prompts are padded on the left."""
    flow = model.family.flow(model.config)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), flow.latents[0], side, side, generator=g)
    length, count = max(map(len, prompts)), len(prompts)
    tokens = torch.full((2 * count, length), 3)
    mask = torch.ones(2 * count, length + flow.tokens, dtype=torch.int32)
    for b, prompt in enumerate(prompts):
        lead = length - len(prompt)
        tokens[b, lead:], tokens[count + b, lead] = torch.tensor(prompt), prompt[0]
        mask[[b, count + b], :lead] = 0
        mask[count + b, lead + 1 : length - 1] = 0
    seen = []
    z = model.module.generate_images(prompts, noise, steps, guidance, lambda step, made: seen.append(made))
    image = model.module.decode_image(z)
    tensors = {"in.noise": noise, "in.tokens": tokens, "in.attention_mask": mask, "out.image": image}
    tensors["out.z"] = torch.stack([s["latents"] for s in seen])
    for name, ours in (("v_cond", "cond"), ("v_uncond", "uncond"), ("v_guided", "velocity")):
        tensors[f"out.{name}"] = torch.stack([s[ours] for s in seen])
    tensors["out.first.enc_out"], tensors["out.first.llm_last_hidden"] = seen[0]["skip"], seen[0]["hidden"]
    tensors["out.image_u8"] = ((image.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)
    return tensors


@torch.inference_mode()
def record_prompt(model, samples, steps):
    """Left padded prompts as the reference's processor makes them: "I" is an image."""
    begin, place, end, pad = 5, 4, 6, 3
    rows, most = model.config.tokens_per_image, max(s.count("I") for s in samples)
    size = model.config.tower.image_size
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(samples), most, 3, size, size, generator=g)
    texts = []
    for sample in samples:
        ids = [1]
        for c in sample:
            ids += [begin, *[place] * (rows - 1), end] if c == "I" else [20 + ord(c) % 100]
        texts.append(ids)
    length = max(map(len, texts))
    ids = torch.tensor([[pad] * (length - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (length - len(t)) + [1] * len(t) for t in texts])
    visual = (ids == begin) | (ids == place)
    held = torch.zeros(len(samples), most, rows, dtype=torch.bool)
    for b, sample in enumerate(samples):
        held[b, : sample.count("I")] = True
    embeds = model.module.embed(ids * ~visual)
    made = model.module.encode_images(pixels.flatten(0, 1))
    embeds[visual] = made.view(len(samples), most, rows, model.config.hidden_size)[held]
    inputs, logits, chosen = embeds, [], []
    for _ in range(steps):
        made, _ = model.module(embeds, None, F.pad(mask, (0, embeds.shape[1] - length), value=1))
        logits.append(made)
        chosen.append(made[:, -1].argmax(-1))
        embeds = torch.cat([embeds, model.module.embed(chosen[-1][:, None])], 1)
    return {
        "in.input_ids": ids,
        "in.attention_mask": mask,
        "in.images_seq_mask": visual.to(torch.uint8),
        "in.images_emb_mask": held.to(torch.uint8),
        "in.pixel_values": pixels,
        "out.inputs_embeds": inputs,
        "out.prefill_logits": logits[0],
        "out.step_logits": torch.stack([x[:, -1] for x in logits], 1),
        "out.generated_ids": torch.stack(chosen, 1),
    }


VARIANTS = {
    "grouped heads, fewer blocks": {
        "language_config__num_key_value_heads": 2,
        "language_config__num_hidden_layers": 2,
        "language_config__rope_theta": 5000.0,
        "vision_und_enc_config__params__select_layer": -2,
        "vision_gen_enc_config__params__layers_in_middle": 1,
        "latent_size": 8,
    },
    "another decoder of images": {
        "vae__block_out_channels": [8, 16],
        "vae__down_block_types": ["DownEncoderBlock2D"] * 2,
        "vae__up_block_types": ["UpDecoderBlock2D"] * 2,
        "vae__layers_per_block": 1,
        "vae__scaling_factor": 0.5,
        "vae__use_post_quant_conv": False,
        "vae__use_quant_conv": False,
        "latent_size": 8,
    },
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_other_sizes_at_every_point(tmp_path, kind):
    model = variant(tmp_path, **VARIANTS[kind])
    first = [1, 40, 41, 42, 43, 44, 7]
    paintings = {
        "three_prompts": record_painting(model, [first, [1, 9, 7], [1, 7]], 3, 7.5, 8),
        "one": record_painting(model, [first], 5, 1.0, 8, seed=1),
    }
    prompts = {
        "prompts": record_prompt(model, ["ab", "Icd", "aIIb"], 6),
        "words": record_prompt(model, ["a", "abc"], 3),
    }
    files = []
    for name, tensors in (paintings | prompts).items():
        files.append(tmp_path / f"{name}.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items() if v.numel()}, files[-1])
    found = verify(tmp_path, files)
    assert bad(found) == set(), table(found)
    assert passed(found)
    assert {r["point"] for r in found["rows"]} == set(cases.POINTS)
    for point in cases.POINTS:
        assert {"out.z", "out.image", "out.v_uncond"} <= compared(found, "three_prompts", point)
        assert {"out.generated_ids", "out.prefill_logits"} <= compared(found, "prompts", point)


def test_a_painting_of_another_size_than_the_model_paints_by_default(tmp_path):
    model = variant(tmp_path, latent_size=8)
    for side in (8, 12):
        tensors = record_painting(load(tmp_path, latent_size=side), [[1, 30, 7]], 2, 3.0, side)
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"side_{side}.safetensors")
    assert model.config.latent_size == 8
    found = verify(tmp_path, [tmp_path / "side_12.safetensors"], at=("model", "optimized"))
    assert passed(found), table(found)
    with pytest.raises(ValueError, match=r"side_8.safetensors and side_12.safetensors need different latent_size"):
        verify(tmp_path, [tmp_path / "side_8.safetensors", tmp_path / "side_12.safetensors"], at=("model",))
