"""JanusFlow against the recorded reference, its stages, and what must not change its numbers."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmopt
from mmopt.frontend.load import from_config
from mmopt.frontend.trace import trace
from mmopt.ir.capture import trace_stage
from mmopt.models._janusflow_config import parse_config
from mmopt.models.janusflow import IMAGE_ID
from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.image_processor import ImageProcessor
from mmopt.processing.tokenizer import TextProcessor
from mmopt.spec.solvers import make_plan

DATA = Path(__file__).parents[1] / "data" / "janusflow"
META = json.loads((DATA / "meta.json").read_text())
LOGITS = {"atol": 1e-4, "rtol": 0}
VELOCITY = {"atol": 1e-4, "rtol": 0}
IMAGE = {"atol": 2e-4, "rtol": 0}


@pytest.fixture(scope="module")
def janus():
    return mmopt.load(DATA)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def case(name):
    return load_file(DATA / f"{name}.safetensors")


def raw(changes=None, **top):
    """config.json with changes given as ``{"language_config/vocab_size": 30}``."""
    made = json.loads((DATA / "config.json").read_text()) | top
    for path, value in (changes or {}).items():
        part = made
        *folders, last = path.split("/")
        for folder in folders:
            part = part[folder]
        part[last] = value
    return made


def other(changes=None, **top):
    """A model of other sizes, with random weights."""
    vae = json.loads((DATA / "vae" / "config.json").read_text())
    return from_config(raw(changes, vae=vae) | top, "float32", random=True)


# ------------------------------------------------------------------------------------------------------- the reference
@pytest.mark.parametrize("name", ["und_single", "und_padded"])
def test_recorded_understanding(janus, name):
    c, m = case(name), janus.module
    tower = m.vision_und_enc_model.vision_tower
    pixels = c["in.pixel_values"].flatten(0, 1)
    torch.testing.assert_close(tower(pixels), c["out.vision_features"], **LOGITS)
    rows = m.encode_images(pixels)
    torch.testing.assert_close(rows[:, 1:], c["out.aligner_out"], **LOGITS)
    x = m.embed(c["in.input_ids"]).clone()
    x[c["in.images_seq_mask"].bool()] = rows.flatten(0, 1)[c["in.images_emb_mask"].bool().flatten()]
    torch.testing.assert_close(x, c["out.inputs_embeds"], **LOGITS)
    valid = c["in.attention_mask"].bool()
    logits, kept = m(x, valid=valid)
    torch.testing.assert_close(logits[valid], c["out.prefill_logits"][valid], **LOGITS)
    assert len(kept) == janus.config.num_hidden_layers
    for step in range(c["out.generated_ids"].shape[1]):
        last = m(x, valid=valid)[0][:, -1]
        torch.testing.assert_close(last, c["out.step_logits"][:, step], **LOGITS)
        assert torch.equal(last.argmax(-1), c["out.generated_ids"][:, step])
        x = torch.cat([x, m.embed(last.argmax(-1)[:, None])], 1)
        valid = torch.cat([valid, torch.ones(len(x), 1, dtype=torch.bool)], 1)


@pytest.mark.parametrize("told", [c for c in META["gen_cases"] if c["name"] != "gen_s4"], ids=lambda c: c["name"])
def test_recorded_painting(janus, told):
    c, seen = case(told["name"]), []
    assert c["in.prompt_ids"].tolist() == told["prompt_ids"]
    prompts = [told["prompt_ids"]] * told["num_images"]
    z = janus.module.generate_images(
        prompts, c["in.noise"], told["steps"], told["cfg_weight"], lambda step, made: seen.append(made)
    )
    assert len(seen) == told["steps"]
    assert torch.equal(torch.cat([made["time"] for made in seen]), c["out.t"])
    torch.testing.assert_close(torch.stack([made["time_row"][0, 0] for made in seen]), c["out.t_emb"], **VELOCITY)
    torch.testing.assert_close(torch.stack([made["latents"] for made in seen]), c["out.z"], **VELOCITY)
    rows = seen[0]["tokens"].shape[1]
    for at, made in (("first", seen[0]), ("last", seen[-1])):
        for name, value in (("v_cond", "cond"), ("v_uncond", "uncond"), ("v_guided", "velocity")):
            torch.testing.assert_close(made[value], c[f"out.{at}.{name}"], **VELOCITY)
    torch.testing.assert_close(seen[0]["skip"], c["out.first.enc_out"], **VELOCITY)
    torch.testing.assert_close(seen[0]["tokens"], c["out.first.z_emb"], **VELOCITY)
    last = slice(-rows - 1, None)
    torch.testing.assert_close(seen[0]["hidden"][:, last], c["out.first.llm_last_hidden"][:, last], **VELOCITY)
    image = janus.module.decode_image(z)
    torch.testing.assert_close(image, c["out.image"], **IMAGE)
    levels = ((image.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert int((levels.int() - c["out.image_u8"].int()).abs().max()) <= 1


@pytest.mark.parametrize("told", META["preprocess_cases"], ids=lambda c: c["name"])
def test_recorded_preprocessing(janus, told):
    c, said = case("preprocess"), {"image_mean": told["image_mean"], "image_std": told["image_std"]}
    settings = janus.family.image_processing(janus.config, said | {"min_size": told["min_size"]})
    made = ImageProcessor.from_json(settings)([c[f"in.{told['name']}"].numpy()])[0]
    assert torch.equal(torch.from_numpy(made), c[f"out.{told['name']}"])


def test_preprocessing_settings(janus):
    said = {"image_size": 48, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "min_size": 5, "do_normalize": True}
    made = janus.family.image_processing(janus.config, said)
    assert made == {"size": 48, "mean": [0.1] * 3, "std": [0.2] * 3, "mode": "fit", "smallest": 5}
    assert janus.processing["image"]["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="image_size is 64, but the vision tower takes 48"):
        janus.family.image_processing(janus.config, {"image_size": 64})
    with pytest.raises(ValueError, match="only do_normalize true"):
        janus.family.image_processing(janus.config, {"do_normalize": False})


def test_an_image_too_thin_keeps_some_pixels():
    one = ImageProcessor(48, (0.5,) * 3, (0.5,) * 3, "fit", smallest=14)
    white = torch.full((10, 400, 3), 255, dtype=torch.uint8).numpy()
    inside = one([white])[0][0] > 0.9
    assert inside.sum() == 14 * 48
    assert inside[17:31].all()


# ------------------------------------------------------------------------------------------------------------- prompts
def test_recorded_prompts(janus):
    template = ChatTemplate.from_json(json.loads(json.dumps(janus.processing["chat"])))
    roles = {"User": "user", "Assistant": "assistant"}
    for told in META["prompt_examples"]:
        messages = [{"role": roles[m["role"]], "content": m["content"]} for m in told["conversation"][:-1]]
        made = template.render(messages, painting=told["kind"] == "generation")
        wanted = told["text"].removesuffix("<｜begin▁of▁generation｜>")  # the place of the row that tells the time
        assert made.replace("<end_of_image>", "") == wanted
        assert made.count("<image_placeholder><end_of_image>") == told["text"].count("<image_placeholder>")


def test_ids_of_a_prompt(janus):
    """The marks of the template are one id each; the row that begins an image comes with the image."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"U": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<｜end▁of▁sentence｜>"])
    chat = janus.processing["chat"]
    written = " ".join(map(str, chat.values()))
    text = TextProcessor(tokenizer, janus.family.image_marker, IMAGE_ID, 0, (5,), template=written)
    content = "<image_placeholder> a <image_placeholder>"
    ids = text.encode(ChatTemplate(**chat).render([{"role": "user", "content": content}]))
    assert ids[0] == 0
    assert ids.count(IMAGE_ID) == 2
    assert [ids[i + 1] for i, t in enumerate(ids) if t == IMAGE_ID] == [4, 4]
    assert 2 not in ids


def test_a_prefix_and_the_rest_make_the_whole_prompt(janus):
    template = ChatTemplate(**janus.processing["chat"])
    begin, rest = " <image_placeholder>\nOne. ", "Two? "
    whole = template.render([{"role": "user", "content": begin + rest}])
    assert template.begin(begin) + template.go_on(rest) == whole


# -------------------------------------------------------------------------------------------------------------- stages
def test_every_stage_makes_what_the_module_makes(janus):
    m, c, weights = janus.module, case("gen_s4_cfg5"), {}
    specs = janus.family.stages(m, 24)
    traced = {k: trace_stage(s, weights) for k, s in specs.items()}
    assert list(traced) == [
        "encode_vision", "embed", "language_model", "head", "flow_time", "flow_encode", "flow_decode", "decode_image"
    ]  # fmt: skip
    assert all(weights[k] is x or torch.equal(weights[k], x) for k, x in m.state_dict().items() if k in weights)

    def run(stage, **inputs):
        return traced[stage].run(weights, inputs)

    g = torch.Generator().manual_seed(0)
    pixels, z = torch.randn(3, 3, 48, 48, generator=g), c["in.noise"]
    made = run("encode_vision", pixel_values=pixels)["image_rows"]
    torch.testing.assert_close(made, m.encode_images(pixels), **LOGITS)
    ids = torch.randint(300, (2, 5), generator=g)
    assert torch.equal(run("embed", ids=ids)["text"], m.embed(ids))
    times = torch.tensor([0.0, 750.0])
    row = run("flow_time", time=times)["time_row"]
    torch.testing.assert_close(row, m.flow_time(times), **LOGITS)
    made, (skip, tokens) = run("flow_encode", latents=z, time_row=row), m.flow_encode(z, row)
    torch.testing.assert_close(made["skip"], skip, **LOGITS)
    torch.testing.assert_close(made["tokens"], tokens, **LOGITS)
    hidden = torch.randn(2, 64, 64, generator=g)
    velocity = run("flow_decode", hidden=hidden, skip=skip, time_row=row)["velocity"]
    torch.testing.assert_close(velocity, m.flow_decode(hidden, skip, row), **VELOCITY)
    assert torch.equal(run("head", hidden=hidden)["logits"], m.language_model.lm_head(hidden))
    torch.testing.assert_close(run("decode_image", latents=z)["image"], m.decode_image(z), **IMAGE)


def test_the_language_model_on_a_cache_is_the_plain_one(janus):
    """Rows in two calls, one sample padded on the left: `offset` and `seen` make it what it is alone."""
    m, weights = janus.module, {}
    stage = trace_stage(janus.family.stages(m, 24)["language_model"], weights)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 64, generator=g)
    seen, pads = torch.ones(2, 24, dtype=torch.bool), torch.tensor([0, 3])
    seen[1, :3] = False
    cache = {f"{k}_cache.{i}": torch.zeros(2, 4, 24, 16) for k in ("key", "value") for i in range(4)}
    common = {"offset": -pads, "seen": seen}
    none = torch.zeros(2, dtype=torch.int64)
    first = stage.run(weights, {"visual": x[:, :4], "text": x[:, 4:7], "past": none, **common, **cache})
    assert first["past"].tolist() == [7, 7]
    cache = {k: first[k] for k in cache}
    then = stage.run(weights, {"visual": x[:, :0], "text": x[:, 7:], "past": first["past"], **common, **cache})
    made = torch.cat([first["hidden"], then["hidden"]], 1)
    torch.testing.assert_close(made[:1], m.read(x[:1])[0], **LOGITS)
    torch.testing.assert_close(made[1:, 3:], m.read(x[1:, 3:])[0], **LOGITS)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_program_reads_any_number_of_images(janus, images):
    m = janus.module
    program = trace(janus, batch=1, images=3, context=64)
    g = torch.Generator().manual_seed(images)
    pixels = torch.randn(images, 3, 48, 48, generator=g) if images else None
    ids, rows = [1, 40, 41], [m.embed(torch.tensor([[1, 40, 41]]))]
    for i in range(images):
        ids += [IMAGE_ID, 6, 50 + i]
        rows += [m.encode_images(pixels[i : i + 1]), m.embed(torch.tensor([[6, 50 + i]]))]
    wanted = m(torch.cat(rows, 1))[0][:, -1].argmax(-1)
    made = program(prompts=[ids], pixel_values=pixels, max_new_tokens=1)
    assert made["tokens"] == [[int(wanted)]]


# --------------------------------------------------------------------------------------------- what must make no change
def test_a_batch_paints_what_each_prompt_paints_alone(janus):
    prompts = [[1, 40, 185, 288, 85, 7], [1, 9, 7], [1, 120, 121, 122, 123, 124, 125, 126, 7]]
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    together = janus.module.generate_images(prompts, noise, 3, 4.0)
    for i, prompt in enumerate(prompts):
        alone = janus.module.generate_images([prompt], noise[i : i + 1], 3, 4.0)
        torch.testing.assert_close(together[i : i + 1], alone, **VELOCITY)
    program = trace(janus, batch=3, context=80)
    made = program.generate_images(prompts, noise, make_plan("euler", 3, guidance=4.0))
    torch.testing.assert_close(made["latents"], together, **VELOCITY)


def test_what_the_two_halves_of_the_guidance_see(janus):
    """The unconditional half depends on the first id and the length of the prompt alone, and the last id counts not."""

    def halves(prompt):
        seen = []
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        janus.module.generate_images([prompt], noise, 1, 2.0, lambda step, made: seen.append(made))
        return seen[0]["cond"], seen[0]["uncond"]

    cond, uncond = halves([1, 40, 41, 42, 7])
    other_cond, other_uncond = halves([1, 50, 51, 52, 7])
    torch.testing.assert_close(uncond, other_uncond, **VELOCITY)
    assert float((cond - other_cond).abs().max()) > 1e-2
    last_cond, last_uncond = halves([1, 40, 41, 42, 200])
    assert torch.equal(cond, last_cond)
    assert torch.equal(uncond, last_uncond)
    longer = halves([1, 40, 41, 42, 43, 44, 7])[1]
    assert float((uncond - longer).abs().max()) > 1e-2  # the place of the image counts


def test_grouped_heads_are_repeated_heads():
    grouped = other({"language_config/num_key_value_heads": 2})
    plain = other()
    weights = grouped.module.state_dict()
    for name, w in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = w.view(2, 1, -1, w.shape[1]).expand(2, 2, -1, w.shape[1]).reshape(-1, w.shape[1])
    plain.module.load_state_dict(weights)
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(grouped.module(x)[0], plain.module(x)[0], **LOGITS)
    prompts, noise = [[1, 5, 7], [1, 5, 6, 7]], torch.randn(2, 4, 16, 16)
    painted = grouped.module.generate_images(prompts, noise, 2)
    torch.testing.assert_close(painted, plain.module.generate_images(prompts, noise, 2), **VELOCITY)
    made = trace(grouped, batch=2, context=80).generate_images(prompts, noise, make_plan("euler", 2, guidance=2.0))
    torch.testing.assert_close(made["latents"], painted, **VELOCITY)


@pytest.mark.parametrize(("select", "blocks"), [(-1, 3), (-2, 2), (-3, 1), (0, 3), (1, 1), (2, 2), (9, 3)])
def test_blocks_that_are_kept(select, blocks):
    config = parse_config(raw({"vision_und_enc_config/params/select_layer": select}))
    assert config.tower.blocks == blocks


def test_a_tower_with_fewer_blocks_still_has_its_last_norm():
    whole = other()
    fewer = other({"vision_und_enc_config/params/select_layer": -2})
    weights = whole.module.state_dict()
    fewer.module.load_state_dict({k: x for k, x in weights.items() if ".blocks.2." not in k})
    pixels, kept = torch.randn(2, 3, 48, 48), []
    tower = whole.module.vision_und_enc_model.vision_tower
    hook = tower.blocks[1].register_forward_hook(lambda module, args, out: kept.append(out))
    tower(pixels)
    hook.remove()
    torch.testing.assert_close(fewer.module.vision_und_enc_model.vision_tower(pixels), tower.norm(kept[0]), **LOGITS)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_gen_enc_config/params/layers_in_middle": 1, "vision_gen_dec_config/params/layers_in_middle": 3},
        {f"vision_gen_{part}_config/params/block_out_channels": [20] for part in ("enc", "dec")},
        {"vision_gen_dec_config/params/in_channels": 28},
        {
            "vision_gen_enc_config/params/kernel_size": 4,
            "vision_gen_enc_config/params/padding": 1,
            "vision_gen_enc_config/params/norm_eps": 1e-3,
        },
        {"language_config/rope_theta": 500.0, "language_config/rms_norm_eps": 1e-3},
        {"language_config/tie_word_embeddings": True},
        {"vision_und_enc_config/params/image_size": 64, "vision_und_enc_config/params/mlp_ratio": 2.5},
    ],
)
def test_other_sizes(changes):
    model = other(changes)
    noise = torch.randn(2, 4, 16, 16)
    prompts = [[1, 5, 6, 7], [1, 7]]
    painted = model.module.generate_images(prompts, noise, 2, 3.0)
    assert painted.isfinite().all()
    made = trace(model, batch=2, context=96).generate_images(prompts, noise, make_plan("euler", 2, guidance=3.0))
    torch.testing.assert_close(made["latents"], painted, **VELOCITY)
    size = model.config.tower.image_size
    rows = model.module.encode_images(torch.randn(1, 3, size, size))
    assert rows.shape == (1, model.config.tokens_per_image, 64) == (1, 1 + (size // 16) ** 2, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"language_config/rope_theta": 500.0},
        {"language_config/rms_norm_eps": 1e-2},
        {"vision_gen_enc_config/params/norm_eps": 1e-2},
        {"vision_gen_dec_config/params/norm_eps": 1e-2},
    ],
)
def test_values_that_have_no_weights_count(change):
    plain, changed = other(), other(change)
    changed.module.load_state_dict(plain.module.state_dict())
    prompts, noise = [[1, 5, 6, 7]], torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    difference = plain.module.generate_images(prompts, noise, 2) - changed.module.generate_images(prompts, noise, 2)
    assert float(difference.abs().max()) > 1e-3


def test_another_autoencoder():
    """Of three levels: a picture has a quarter of the pixels, so as many latents for its size as before."""
    vae = json.loads((DATA / "vae" / "config.json").read_text())
    vae |= {"block_out_channels": [8, 12, 16], "sample_size": 64, "shift_factor": 0.1}
    vae |= {k: vae[k][:3] for k in ("down_block_types", "up_block_types")}
    model = other(vae=vae)
    assert model.config.flow.latents == (4, 16, 16)
    z = torch.randn(1, 4, 16, 16)
    image = model.module.decode_image(z)
    assert image.shape == (1, 3, 64, 64)
    torch.testing.assert_close(image, model.module.vae.decode(z / 0.13025 + 0.1), **IMAGE)


def test_bfloat16_is_close(janus):
    half, c = mmopt.load(DATA, dtype="bfloat16"), case("gen_s4_cfg5")
    seen = []
    z = half.module.generate_images(
        [c["in.prompt_ids"].tolist()] * 2, c["in.noise"], 4, 5.0, lambda step, made: seen.append(made)
    )
    assert z.dtype == seen[0]["cond"].dtype == torch.float32
    assert seen[0]["time_row"].dtype == seen[0]["skip"].dtype == seen[0]["tokens"].dtype == torch.bfloat16
    first = seen[0]["cond"], c["out.first.v_cond"]
    assert torch.nn.functional.cosine_similarity(*(x.flatten() for x in first), dim=0) > 0.999
    assert torch.nn.functional.cosine_similarity(z.flatten(), c["out.z"][-1].flatten(), dim=0) > 0.99
    assert half.module.decode_image(z).dtype == torch.float32


def test_response_norm_does_not_overflow_in_float16():
    from mmopt.models._janusflow_flow import ResponseNorm

    norm = ResponseNorm(4)
    norm.weight.fill_(1.0)
    norm.bias.fill_(0.0)
    x = 100 * torch.randn(1, 24, 24, 4)
    torch.testing.assert_close(norm.half()(x.half()).float(), norm.float()(x), atol=0.5, rtol=1e-2)


# --------------------------------------------------------------------------------------------------------------- sizes
def test_the_published_sizes():
    model = from_config("janusflow-1.3b")
    count = {"vae": 0, "model": 0}
    for name, p in model.module.named_parameters():
        count["vae" if name.startswith("vae.") else "model"] += p.numel()
    head = 12_596_224  # of the tower's pooling head, which nothing reads
    assert round((count["model"] + head) / 1e6, 2) == 2046.37
    assert round(count["vae"] / 1e6, 2) == 83.65
    assert model.dtype == torch.bfloat16
    flow = model.config.flow
    assert (flow.latents, flow.tokens, flow.steps, flow.guidance) == ((4, 48, 48), 576, 30, 2.0)
    assert model.config.tokens_per_image == 577
    assert model.config.tower.blocks == 24


@pytest.mark.parametrize("name", ["janusflow-1.3b", "janusflow-mid", "janusflow-tiny"])
def test_shipped_configs_can_be_traced(name):
    program = trace(from_config(name), context=700 if name != "janusflow-tiny" else 96)
    assert program.schedules.image
    assert program.info.flow.tokens == (64 if name == "janusflow-tiny" else 576)


def test_the_tiny_config_paints():
    model = from_config("janusflow-tiny", random=True)
    z = model.module.generate_images([[1, 5, 7]], torch.randn(1, 4, 16, 16), 2)
    assert model.module.decode_image(z).isfinite().all()


def test_towers_known_by_name():
    params = {"model_name": "siglip_so400m_patch14_384", "image_size": 384, "select_layer": -1}
    config = parse_config(raw({"vision_und_enc_config/params": params}))
    assert (config.tower.width, config.tower.layers, config.tower.intermediate_size) == (1152, 27, 4304)
    assert config.tokens_per_image == 1 + 27**2
    config = parse_config(raw({"vision_und_enc_config/params": params | {"layers": 5, "heads": 8}}))
    assert (config.tower.layers, config.tower.heads, config.tower.width) == (5, 8, 1152)


def test_the_size_of_a_picture():
    """384 pixels as published, what the autoencoder was trained on if that is less, or what the config says."""
    vae = json.loads((DATA / "vae" / "config.json").read_text())
    assert parse_config(raw()).latent_size == 48
    assert parse_config(raw(vae=vae)).latent_size == 16
    assert parse_config(raw(vae=vae | {"sample_size": 1024})).latent_size == 48
    assert parse_config(raw(vae=vae, latent_size=20)).flow.tokens == 100


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_gen_enc_config/cls": "VQ-16"}, "cls is 'VQ-16', only 'ShallowUViTEncoder' is supported"),
        ({"vision_und_enc_config/cls": "Sam"}, "vision_und_enc_config.cls is 'Sam', only 'CLIPVisionTower'"),
        ({"language_config/model_type": "qwen2"}, "language_config.model_type is 'qwen2', only 'llama'"),
        ({"language_config/rope_scaling": {"type": "linear"}}, "language_config.rope_scaling is"),
        ({"language_config/attention_bias": True}, "language_config.attention_bias is True"),
        ({"language_config/num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"language_config/eos_token_id": "x"}, "language_config.eos_token_id is 'x'"),
        ({"vision_und_enc_config/params": {"model_name": "siglip_huge"}}, "must give width, layers, heads, patch_size"),
        ({"vision_und_enc_config/params/select_layer": -4}, "select_layer -4 leaves none of the tower's 3 blocks"),
        ({"vision_und_enc_config/params/select_layer": "x"}, "select_layer is 'x', expected a whole number"),
        ({"vision_und_enc_config/params/pixel_mean": [0.5]}, "pixel_mean is [0.5]"),
        ({"vision_und_enc_config/params/heads": 5}, "width 48 must divide into 5 heads"),
        ({"vision_gen_enc_config/params/use_mid_block": False}, "use_mid_block is False, only True"),
        ({"vision_gen_enc_config/params/hidden_size": 32}, "hidden_size 32 must be the language model's"),
        ({"vision_gen_enc_config/params/block_out_channels": [8, 8]}, "block_out_channels is [8, 8], expected one"),
        ({"vision_gen_enc_config/params/block_out_channels": [16]}, "of encoder and decoder must be equal"),
        ({"vision_gen_enc_config/params/input_channels": 8}, "input_channels 8 and out_channels 4 must be equal"),
        ({"vision_gen_enc_config/params/padding": -1}, "padding is -1"),
        ({"vision_gen_enc_config/params/stride": 4}, "latent_size 48 would become 24"),
        ({"vision_gen_dec_config/params/upsamples": 2}, "upsamples is 2, only 1 is supported"),
        ({"latent_size": 0}, "latent_size is 0, expected a positive number"),
        ({"vae": {"latent_channels": 16}}, "latent_channels 16 of the autoencoder must be 4"),
    ],
)
def test_configs_that_are_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_config(raw(changes))


def test_its_relatives_are_named():
    with pytest.raises(ValueError, match="this is Janus or Janus-Pro"):
        from_config(raw({"vision_gen_enc_config/cls": "vision_head"}))


def test_without_an_autoencoder():
    bare = from_config(raw(latent_size=16), "float32", random=True)
    assert "decode_image" not in bare.family.stages(bare.module, 24)
    noise = torch.randn(1, 4, 16, 16)
    z = bare.module.generate_images([[1, 5, 7]], noise, 2)
    painted = trace(bare, context=80).generate_images([[1, 5, 7]], noise, make_plan("euler", 2, guidance=2.0))
    torch.testing.assert_close(painted["latents"], z, **VELOCITY)
    assert "image" not in painted
    with pytest.raises(ValueError, match=r"has no autoencoder.*--vae"):
        bare.module.decode_image(z)
