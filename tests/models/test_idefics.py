"""Idefics against recorded cases and the library's own model at other sizes; stages, Program and engine beside it."""

import json

import numpy as np
import pytest
import torch
from library_models import CLOSE, RECORDED, case, check_stages, loaded, recorded, reference, with_hooks
from PIL import Image

import mmopt
from mmopt.frontend.load import from_config, load
from mmopt.models._weight_files import CheckpointError
from mmopt.models.idefics import parse_config
from mmopt.processing.image_processor import ImageProcessor

CASES = recorded("idefics")


@pytest.fixture(scope="module")
def idefics():
    return load(RECORDED / "idefics")


@pytest.fixture(scope="module")
def result(idefics):
    return mmopt.optimize(mmopt.trace(idefics, batch=2, images=3, context=48))


def raw_config(vision=None, perceiver=None, **changes) -> dict:
    raw = json.loads((RECORDED / "idefics/config.json").read_text()) | changes
    raw["vision_config"] |= vision or {}
    raw["perceiver_config"] |= perceiver or {}
    return raw


def forward(module, ids, pixels, seen, mask=None) -> torch.Tensor:
    rows = module.encode_images(pixels.flatten(0, 1))
    media = rows.unflatten(0, pixels.shape[:2]).flatten(1, 2)
    return module(module.model.embed_tokens(ids), media, seen, seen.any(-1), mask)


@pytest.mark.parametrize("name", CASES)
def test_recorded_values(idefics, name):
    c = case("idefics", name)
    mask, seen = c["in.attention_mask"].bool(), c["in.image_attention_mask"].bool()
    logits, kept = with_hooks(
        idefics, c, lambda: forward(idefics.module, c["in.input_ids"], c["in.pixel_values"], seen, mask)
    )
    torch.testing.assert_close(logits[mask], c["logits"][mask], **CLOSE)
    assert set(kept) == {k for k in c if k.startswith("act.")}
    for k, value in kept.items():
        # the reference sets rows without an image to zero after this value, here it is zero before
        real = mask & seen.any(-1) if k.endswith("attn_pregate") else mask
        real = real if k.startswith(("act.lm", "act.xattn")) else ...
        torch.testing.assert_close(value[real], c[k][real], **CLOSE)


SIZES = {
    "no resampler, vectors as gates": raw_config(
        use_resampler=False, alpha_type="vector", qk_layer_norms=False, cross_layer_interval=1, num_attention_heads=2
    ),
    "no resampler, gelu": raw_config(
        use_resampler=False, hidden_act="gelu", hidden_size=48, vision={"hidden_act": "quick_gelu"}
    ),
    "interval 3, plain resampler": raw_config(
        num_hidden_layers=6,
        cross_layer_interval=3,
        additional_vocab_size=5,
        perceiver={"qk_layer_norms_perceiver": False},
    ),
    "one table of words": raw_config(
        additional_vocab_size=0, perceiver={"resampler_n_latents": 3, "resampler_depth": 1}
    ),
    "other sizes": raw_config(
        vision={"image_size": 28, "patch_size": 7, "embed_dim": 48, "num_attention_heads": 4, "num_hidden_layers": 1},
        perceiver={"resampler_n_heads": 2, "resampler_head_dim": 24},
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
        rms_norm_eps=1e-2,
    ),
    "tied": raw_config(tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_equal_the_library(name, tmp_path):
    library = reference("IdeficsForVisionText2Text", SIZES[name])
    model = loaded(library, tmp_path)
    g = torch.Generator().manual_seed(2)
    side = model.config.vision.image_size
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=g)
    pixels = torch.randn(2, 2, 3, side, side, generator=g)
    seen = torch.rand(2, 9, 2, generator=g) > 0.5
    seen[0, :3] = False
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    with torch.inference_mode():
        expected = library(
            input_ids=ids, attention_mask=mask.long(), pixel_values=pixels, image_attention_mask=seen.long()
        ).logits
        made = forward(model.module, ids, pixels, seen, mask)
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(made[mask], expected[mask], **CLOSE)


@pytest.mark.parametrize("name", ["recorded", "no resampler, vectors as gates"])
def test_stages_equal_the_model(idefics, name):
    model = idefics if name == "recorded" else from_config(SIZES[name], random=True)
    side = model.config.vision.image_size
    check_stages(model, {"pixel_values": torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))})


def prompts_of(c) -> tuple[list[list[int]], dict]:
    prompts = [ids[k].tolist() for ids, k in zip(c["in.input_ids"], c["in.attention_mask"].bool(), strict=True)]
    counts = [c["in.pixel_values"].shape[1]] * len(prompts)
    return prompts, {"images": counts, "pixel_values": c["in.pixel_values"].flatten(0, 1)}


@pytest.mark.parametrize("point", ["program", "optimized", "engine"])
def test_recorded_answers(idefics, result, point, tmp_path):
    if point == "engine":
        mmopt.export(result.program, tmp_path)
        engine = mmopt.Engine(tmp_path)
    program = mmopt.trace(idefics, batch=2, images=3, context=48) if point == "program" else result.program
    for name in CASES:
        c = case("idefics", name)
        prompts, images = prompts_of(c)
        if point == "engine":
            images["pixel_values"] = images["pixel_values"].numpy()
            run = engine.debug.generate_ids(prompts, max_new_tokens=16, ignore_eos=True, logits=True, **images)
            np.testing.assert_allclose(np.stack(run.logits), c["gen_logits_nocache"].numpy(), atol=1e-4)
            tokens = run.tokens
        else:
            tokens = program(prompts, max_new_tokens=16, ignore_eos=True, **images)["tokens"]
        assert tokens == c["generated_ids_nocache"].tolist()


def test_hoisted_and_cut(result):
    """K and V of the images leave the decode loop, and no mask is left."""
    text = str(result)
    assert "4 values that no loop changes are computed once before all of them" in text
    assert "2 cross-attentions read the keys that their rows see, without a mask" in text


def test_the_image_token_is_the_second_one_added(idefics):
    assert idefics.image_id == 299
    assert parse_config(raw_config(image_token_id=7)).image_token_id == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh', only 'silu' or 'gelu' or 'relu'"),
        ({"num_attention_heads": 5}, "hidden_size 64 must divide into num_attention_heads 5"),
        ({"alpha_type": "matrix"}, "alpha_type is 'matrix'"),
        ({"num_hidden_layers": 5}, "num_hidden_layers 5 must be a multiple of cross_layer_interval 2"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ({"vision": {"image_size": 43}}, "vision_config.image_size 43"),
        ({"vision": {"num_attention_heads": 5}}, "vision_config.embed_dim 32"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_refused_configs(change, said):
    with pytest.raises(ValueError, match=said):
        parse_config(raw_config(**change))


def test_shards_and_computed_keys(tmp_path):
    """Shards are read; frequencies and positions that older files hold are not weights."""
    from safetensors.torch import load_file, save_file

    library = reference("IdeficsForVisionText2Text", raw_config())
    model = loaded(library, tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    library.save_pretrained(tmp_path / "one")
    weights = load_file(tmp_path / "one/model.safetensors")
    for name in ("layers.0.self_attn", "gated_cross_attn_layers.1.cross_attn"):
        weights[f"model.{name}.rotary_emb.inv_freq"] = torch.zeros(8)
    weights["model.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(weights, tmp_path / "one/model.safetensors")
    older = load(tmp_path / "one")
    for k, v in model.module.state_dict().items():
        assert torch.equal(v, older.module.state_dict()[k])
    weights["model.vision_model.embeddings.position_ids"] = torch.zeros(1, 10, dtype=torch.int64)
    save_file(weights, tmp_path / "one/model.safetensors")
    with pytest.raises(CheckpointError, match="position_ids: expected 0 to 9"):
        load(tmp_path / "one")


def test_half_precision_stays_near(idefics):
    c = case("idefics", "fewshot3")
    half = load(RECORDED / "idefics", dtype="bfloat16")
    seen = c["in.image_attention_mask"].bool()
    with torch.inference_mode():
        logits = forward(half.module, c["in.input_ids"], c["in.pixel_values"].bfloat16(), seen)
    assert logits.dtype == torch.bfloat16
    assert float((logits.float() - c["logits"]).abs().max()) < 0.1 * float(c["logits"].abs().max())


def test_pictures_are_squashed_as_the_library_does(idefics):
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    processor = ImageProcessor.from_json(idefics.processing["image"])
    library = IdeficsImageProcessorPil(image_size=42)
    rng = np.random.default_rng(0)
    for height, width in ((42, 42), (90, 31), (5, 200), (1, 1)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = np.asarray(library([picture], return_tensors="np"))[0]
        np.testing.assert_allclose(processor([picture])[0], expected, atol=1e-6)
