"""Mllama against recorded cases and the library's own model at other sizes; stages, Program and engine beside it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from library_models import CLOSE, RECORDED, case, check_stages, loaded, recorded, reference, with_hooks
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

import mmopt
from mmopt.frontend.load import from_config, load
from mmopt.models.idefics import FAKE_TOKEN
from mmopt.models.mllama import parse_config
from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.image_processor import ImageError
from mmopt.processing.tile_processor import TileProcessor, processor_of
from mmopt.processing.tokenizer import TextProcessor

CASES = recorded("mllama")
IMAGES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1000.0,
}


@pytest.fixture(scope="module")
def mllama():
    return load(RECORDED / "mllama")


@pytest.fixture(scope="module")
def result(mllama):
    return mmopt.optimize(mmopt.trace(mllama, batch=2, images=2, context=48))


def raw_config(text=None, vision=None, **changes) -> dict:
    raw = json.loads((RECORDED / "mllama/config.json").read_text()) | changes
    raw["text_config"] |= text or {}
    raw["vision_config"] |= vision or {}
    return raw


def sight(mask: torch.Tensor | None, ids: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """seen, attends and sees of a cross_attention_mask ``[B, S, images, tiles]``; None where there is no image.

    A row that sees no tile attends to everything: the reference adds the same bias, zero, to all its scores.
    """
    if mask is None:
        none = torch.zeros(ids.shape, dtype=torch.bool)
        return torch.zeros(*ids.shape, blocks, dtype=torch.bool), none, none
    seen = mask.bool().flatten(2)
    sees = seen.any(-1)
    return seen | ~sees[..., None], torch.ones_like(sees), sees


def forward(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    module, c, ids = model.module, model.config, given["input_ids"]
    if "pixel_values" in given:
        rows = module.encode_images(*(given[k].flatten(0, 1) for k in IMAGES))
        media = rows.unflatten(0, given["pixel_values"].shape[:2]).flatten(1, 2)
    else:
        media = torch.zeros(len(ids), 1, c.vision_rows, c.hidden_size)
    seen, attends, sees = sight(given.get("cross_attention_mask"), ids, media.shape[1])
    x = module.language_model.model.embed_tokens(ids)
    return module(x, media, seen, attends, given["attention_mask"].bool(), sees)


@pytest.mark.parametrize("name", CASES)
def test_recorded_values(mllama, name):
    c = case("mllama", name)
    given = {k[3:]: v for k, v in c.items() if k.startswith("in.")}
    mask = given["attention_mask"].bool()
    logits, kept = with_hooks(mllama, c, lambda: forward(mllama, given))
    torch.testing.assert_close(logits[mask], c["logits"][mask], **CLOSE)
    assert set(kept) == {k for k in c if k.startswith("act.")}
    for k, value in kept.items():
        real = mask if k.startswith("act.lm") else ...
        torch.testing.assert_close(value.reshape(c[k].shape)[real], c[k][real], **CLOSE)


SIZES = {
    "scaled positions, one key head": raw_config(
        text={"num_key_value_heads": 1, "rope_parameters": LLAMA3, "cross_attention_layers": [0, 2, 3]},
        vision={"image_size": 42, "num_global_layers": 1},
    ),
    "two tiles, one middle layer": raw_config(
        text={"num_key_value_heads": 4, "hidden_act": "gelu", "rms_norm_eps": 1e-2},
        vision={
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [1],
            "vision_output_dim": 64,
            "hidden_act": "quick_gelu",
        },
    ),
    "one tile, middle layers out of order": raw_config(
        vision={
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [2, 0],
            "attention_heads": 4,
            "patch_size": 7,
            "num_global_layers": 3,
        },
    ),
}


def random_inputs(config, batch: int = 2, images: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    v, rows = config.vision, 10
    counts = torch.randint(1, v.max_num_tiles + 1, (batch, images), generator=g)
    tiles = torch.arange(v.max_num_tiles) < counts[..., None]
    side = v.image_size
    pixels = torch.randn(batch, images, v.max_num_tiles, 3, side, side, generator=g) * tiles[..., None, None, None]
    starts = torch.tensor([[2, 6], [5, 8]])[:batch, :images]
    ends = torch.cat([starts[:, 1:], torch.full((batch, 1), rows)], 1)
    place = torch.arange(rows)[None, :, None]
    inside = (place >= starts[:, None]) & (place < ends[:, None])
    mask = torch.ones(batch, rows, dtype=torch.int64)
    mask[1:, :4] = 0
    return {
        "input_ids": torch.randint(0, config.vocab_size, (batch, rows), generator=g),
        "attention_mask": mask,
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.randint(1, len(v.supported_aspect_ratios) + 1, (batch, images), generator=g),
        "aspect_ratio_mask": tiles.long(),
        "cross_attention_mask": (inside[..., None] & tiles[:, None]).long(),
    }


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_equal_the_library(name, tmp_path):
    library = reference("MllamaForConditionalGeneration", SIZES[name])
    model = loaded(library, tmp_path)
    given = random_inputs(model.config)
    mask = given["attention_mask"].bool()
    with torch.inference_mode():
        expected, made = library(**given, use_cache=False).logits, forward(model, given)
        text = {k: given[k] for k in ("input_ids", "attention_mask")}
        text_expected, text_made = library(**text, use_cache=False).logits, forward(model, text)
    assert float(expected.std()) > 0.3
    assert float((expected - text_expected)[mask].abs().max()) > 0.1
    torch.testing.assert_close(made[mask], expected[mask], **CLOSE)
    torch.testing.assert_close(text_made[mask], text_expected[mask], **CLOSE)


@pytest.mark.parametrize("name", ["recorded", "two tiles, one middle layer"])
def test_stages_equal_the_model(mllama, name):
    model = mllama if name == "recorded" else from_config(SIZES[name], random=True)
    given = random_inputs(model.config)
    check_stages(model, {k: given[k].flatten(0, 1) for k in IMAGES})


def prompts_of(c) -> tuple[list[list[int]], dict]:
    prompts = [ids[k].tolist() for ids, k in zip(c["in.input_ids"], c["in.attention_mask"].bool(), strict=True)]
    if "in.pixel_values" not in c:
        return prompts, {}
    counts = [c["in.pixel_values"].shape[1]] * len(prompts)
    images = {k: c[f"in.{k}"].flatten(0, 1) for k in IMAGES}
    tiles = images["aspect_ratio_mask"].sum(1).tolist()
    return prompts, {
        "images": counts, "tiles": tiles, "pixel_values": images.pop("pixel_values"), "image_inputs": images
    }  # fmt: skip


@pytest.mark.parametrize("point", ["program", "optimized", "engine"])
def test_recorded_answers(mllama, result, point, tmp_path):
    if point == "engine":
        mmopt.export(result.program, tmp_path)
        engine = mmopt.Engine(tmp_path)
    program = mmopt.trace(mllama, batch=2, images=2, context=48) if point == "program" else result.program
    for name in CASES:
        c = case("mllama", name)
        prompts, images = prompts_of(c)
        if point == "engine":
            if images:
                images["pixel_values"] = images["pixel_values"].numpy()
                images["image_inputs"] = {k: v.numpy() for k, v in images["image_inputs"].items()}
            run = engine.debug.generate_ids(prompts, max_new_tokens=16, ignore_eos=True, logits=True, **images)
            np.testing.assert_allclose(np.stack(run.logits), c["gen_logits_nocache"].numpy(), atol=1e-4)
            tokens = run.tokens
        else:
            tokens = program(prompts, max_new_tokens=16, ignore_eos=True, **images)["tokens"]
        assert tokens == c["generated_ids_nocache"].tolist()


def test_an_engine_cuts_pictures(mllama, result, tmp_path):
    """Pictures given to an engine: the answer is that of the Program on the tiles of the library's processor."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    mmopt.export(result.program, tmp_path)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in ((40, 90), (30, 20))]
    marker = mllama.image_id
    prompt = [1, 7, marker, 9, 30, marker, 44, 5]
    answer = mmopt.Engine(tmp_path).generate(prompt, images=pictures, max_new_tokens=5)
    library = MllamaImageProcessorPil(size={"height": 28, "width": 28})([pictures], return_tensors="pt")
    images = {k: library[k][0] for k in IMAGES}
    tiles = library["num_tiles"][0]
    assert tiles[0] > 1
    pixels = images.pop("pixel_values")
    tokens = result.program([prompt], pixels, 5, image_inputs=images, tiles=tiles)["tokens"]
    assert tokens[0][: len(answer.ids)] == answer.ids
    assert len(answer.ids) >= 4


def test_hoisted_and_cut(result):
    """K and V of the images leave the decode loop, and no dense mask over all images is left."""
    text = str(result)
    assert "4 values that no loop changes are computed once before all of them" in text
    assert "2 cross-attentions read the keys that their rows see, without a mask" in text


def test_scaled_frequencies_are_those_of_the_library():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = from_config("mllama-11b")
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](model.config.text, "cpu")
    assert torch.equal(model.module.inv_freq, expected)
    assert model.module.rotary_scale == scale
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    assert float((model.module.inv_freq / plain).min()) == pytest.approx(1 / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": {"cross_attention_layers": [1, 9]}}, "cross_attention_layers"),
        ({"text": {"tie_word_embeddings": True}}, "text_config.tie_word_embeddings is True"),
        ({"text": {"num_key_value_heads": 3}}, "num_key_value_heads 3 groups"),
        ({"text": {"rope_parameters": LLAMA3 | {"rope_type": "dynamic"}}}, "text_config.rope_parameters"),
        ({"vision": {"vision_output_dim": 95}}, "vision_config.vision_output_dim 95 must be hidden_size 32"),
        ({"vision": {"intermediate_layers_indices": [0, 3]}}, "intermediate_layers_indices"),
        ({"vision": {"supported_aspect_ratios": [[1, 1], [5, 1]]}}, "supported_aspect_ratios"),
        ({"vision": {"image_size": 29}}, "vision_config.image_size 29"),
    ],
)
def test_refused_configs(change, said):
    with pytest.raises(ValueError, match=said):
        parse_config(raw_config(**change))


# -------------------------------------------------------------------------------------------------------------- tiles
def all_ratios(tiles: int) -> tuple[tuple[int, int], ...]:
    return tuple((h, w) for h in range(1, tiles + 1) for w in range(1, tiles + 1) if h * w <= tiles)


@pytest.mark.parametrize(("size", "tiles"), [(28, 4), (16, 6), (20, 1)])
def test_tiles_equal_the_library(size, tiles):
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    library = MllamaImageProcessorPil(size={"height": size, "width": size}, max_image_tiles=tiles)
    processor = TileProcessor(size, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), all_ratios(tiles), tiles)
    library.image_mean, library.image_std = list(processor.mean), list(processor.std)
    rng = np.random.default_rng(0)
    shapes = [(size, size), (2 * size, size), (size, 4 * size), (1, 300), (300, 1), (1, 1), (size + 1, size)]
    shapes += [tuple(rng.integers(1, 5 * size, 2)) for _ in range(60)]
    pictures = [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in shapes]
    made = processor(pictures)
    expected = library([pictures], return_tensors="np")
    for k in IMAGES:
        np.testing.assert_allclose(made[k], expected[k][0], atol=1e-6)
        assert made[k].dtype == expected[k].dtype
    assert made["tiles"].tolist() == expected["num_tiles"][0]
    assert len(set(made["aspect_ratio_ids"].tolist())) == len(all_ratios(tiles))


def test_tile_settings(mllama):
    settings = mllama.processing["image"]
    processor = processor_of(settings)
    assert isinstance(processor, TileProcessor)
    assert processor_of(json.loads(json.dumps(processor.to_json()))) == processor
    assert processor([])["pixel_values"].shape == (0, 4, 3, 28, 28)
    for change, said in (
        ({"ratios": [[1, 5]]}, "ratios"),
        ({"std": [0, 1, 1]}, "std above 0"),
        ({"resample": "box"}, "resample"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(ValueError, match=said):
            TileProcessor.from_json(settings | change)
    with pytest.raises(ImageError):
        processor([b"no picture"])
    with pytest.raises(ValueError, match="4 tiles of 28"):
        mllama.family.image_processing(mllama.config, {"size": {"height": 560, "width": 560}})


@pytest.mark.parametrize("config", ["mllama-tiny", "idefics-tiny"])
def test_special_tokens_of_a_conversation_are_tokens(config):
    """Those that the template writes are one id each, also around an image; others stay ordinary text."""
    model = from_config(config)
    template = ChatTemplate.from_json(model.processing["chat"])
    texts = " ".join(v for v in template.to_json().values() if isinstance(v, str))
    special = ["<|end|>", *dict.fromkeys(re.findall(r"<[^<>]+>", texts))]
    words = {"a": 0, "b": 1, "\n": 2, ":": 3, "User": 4, "Assistant": 5, "user": 6, "assistant": 7, "?": 8}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\n|:"), "isolated")
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    ids = {t: tokenizer.token_to_id(t) for t in special}
    text = TextProcessor(tokenizer, model.family.image_marker, 99, None, (ids["<|end|>"],), template=texts)
    made = text.encode(template.render([{"role": "user", "content": f"{template.image}a<|end|>b"}]))
    written = {ids[t] for t in special if t in texts} - {ids[model.family.image_marker]} | {99}
    assert written <= set(made)
    assert ids["<|end|>"] not in made
    around = [ids[FAKE_TOKEN]] if FAKE_TOKEN in ids else []
    image = [*around, 99, *around]
    start = made.index(image[0])
    assert made[start : start + len(image) + 1] == [*image, 0]


def test_the_library_is_imported_only_for_its_models():
    code = (
        "import sys, mmopt\nmmopt.from_config('mplug-owl2-tiny')\nassert 'transformers' not in sys.modules\n"
        "mmopt.from_config('mllama-tiny', random=True)\nassert 'transformers' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
