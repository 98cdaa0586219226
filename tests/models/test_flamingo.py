"""The plain model against recorded cases of the reference implementation."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmopt
from mmopt.models._decoder_config import read_decoder_config
from mmopt.models._decoders import Decoder
from mmopt.models.flamingo import Perceiver, PerceiverConfig

DATA = Path(__file__).parents[1] / "data" / "flamingo" / "openflamingo"
CASES = ("single", "fewshot", "batch2", "edge_missing_image")


@pytest.fixture(scope="module")
def model():
    return mmopt.load(DATA)


def sight(ids: torch.Tensor, marker: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """seen ``[B, S, images]`` and attends ``[B, S]``: each row sees the image of the last marker up to it."""
    time = (ids == marker).cumsum(1)
    return time[..., None] == torch.arange(1, images + 1), time > 0


def taps(model) -> dict[str, torch.nn.Module]:
    """Recorded name -> the module whose output it is."""
    m = model.module
    named = {f"vit.block{i}": b for i, b in enumerate(m.vision_encoder.transformer.resblocks)}
    named |= {"vit.tokens": m.vision_encoder, "perceiver.out": m.perceiver}
    for i, (attention, ff) in enumerate(m.perceiver.layers):
        named |= {f"perceiver.layer{i}.attn_out": attention, f"perceiver.layer{i}.ff_out": ff}
    for i, layer in enumerate(m.lang_encoder.gpt_neox.layers):
        named[f"lm.layer{i}.out"] = layer
        if layer.gated_cross_attn_layer is not None:
            gated = layer.gated_cross_attn_layer
            named |= {f"xattn{i}.attn_pregate": gated.attn, f"xattn{i}.ff_pregate": gated.ff, f"xattn{i}.out": gated}
    return named | {
        "lm.embed": m.lang_encoder.gpt_neox.embed_in,
        "lm.final_norm": m.lang_encoder.gpt_neox.final_layer_norm,
    }


@pytest.mark.parametrize("name", CASES)
def test_plain_model_equals_reference(model, name):
    case, m = load_file(DATA / f"{name}.safetensors"), model.module
    seen_values: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _in, out, k=k: seen_values.__setitem__(k, out))
        for k, module in taps(model).items()
    ]
    ids, images, real = case["lang_x"], case["vision_x"], case["attention_mask"].bool()
    batch, count = images.shape[:2]
    media = m.encode_images(images.flatten(0, 2)).view(batch, count, -1, model.config.vision.width)
    seen, attends = sight(ids, model.config.media_token_id, count)
    assert torch.equal(seen, case["mask.text_to_image_mask"].bool()) or name == "edge_missing_image"
    logits = m(m.lang_encoder.embedding(ids), media, seen, attends, real)
    for h in hooks:
        h.remove()
    torch.testing.assert_close(logits[real], case["logits"][real], atol=1e-4, rtol=1e-4)
    recorded = {k.removeprefix("act."): v for k, v in case.items() if k.startswith("act.")}
    compared = recorded.keys() & seen_values.keys()
    assert recorded.keys() - compared <= {"vit.pooled", "vit.tokens_ln_post"}
    for k in compared:
        ours, theirs = seen_values[k], recorded[k]
        if k.startswith("vit.block"):
            ours = ours[: len(theirs)]
        if k.startswith(("lm.", "xattn")):
            ours, theirs = ours[real], theirs[real]
        torch.testing.assert_close(
            ours.view(theirs.shape), theirs, atol=1e-4, rtol=1e-4, msg=lambda s, k=k: f"{k}: {s}"
        )


def test_ln_post_is_an_option():
    case = load_file(DATA / "single.safetensors")
    model = mmopt.load(DATA, ln_post=True)
    rows = model.module.vision_encoder(case["vision_x"].flatten(0, 2))
    torch.testing.assert_close(rows, case["act.vit.tokens_ln_post"], atol=1e-4, rtol=1e-4)
    assert (rows - case["act.vit.tokens"]).abs().max() > 0.1


def test_resampler_with_frames_and_time_embeddings(model):
    case = load_file(DATA / "video_perceiver.safetensors")
    weights = {k.removeprefix("weights.perceiver."): v for k, v in case.items() if k.startswith("weights.")}
    config = PerceiverConfig(depth=1, dim_head=16, heads=4, num_latents=6, max_num_media=3, max_num_frames=4)
    perceiver = Perceiver(32, config)
    perceiver.load_state_dict(weights)
    tokens = case["vit_tokens"]  # [B, images, frames, patches, width]
    batch, images, frames = tokens.shape[:3]
    rows, number = tokens.flatten(2, 3).flatten(0, 1), torch.arange(images).repeat(batch)
    torch.testing.assert_close(perceiver(rows, frames, number).view_as(case["out"]), case["out"], atol=1e-4, rtol=1e-4)
    first = perceiver(tokens[:, :, 0].flatten(0, 1), 1, number)
    expected = case["out_first_frame_only"]
    torch.testing.assert_close(first.view_as(expected), expected, atol=1e-4, rtol=1e-4)
    ours = model.module.perceiver(rows)
    torch.testing.assert_close(
        ours.view_as(case["main_perceiver_out"]), case["main_perceiver_out"], atol=1e-4, rtol=1e-4
    )
    rows = model.module.vision_encoder(case["frames"].flatten(0, 2))
    torch.testing.assert_close(rows.view_as(tokens), tokens, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- language models
SIZES = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MPT = {"vocab_size": 90, "d_model": 48, "n_layers": 2, "max_seq_len": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LIBRARY = {
    "gpt_neox": {**SIZES, "intermediate_size": 96, "rotary_pct": 1.0, "use_parallel_residual": False},
    "gpt_neox parallel": {**SIZES, "intermediate_size": 96, "rotary_pct": 0.5, "rotary_emb_base": 500},
    "gpt_neox tied, no bias": {**SIZES, "intermediate_size": 96, "tie_word_embeddings": True, "attention_bias": False},
    "mpt": {**MPT, "n_heads": 4},
    "mpt 6 heads, clipped": {**MPT, "n_heads": 6, "attn_config": {"clip_qkv": 0.5}},
    "llama": {**SIZES, "intermediate_size": 96, "rope_theta": 500.0},
    "llama grouped": {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "opt": {**SIZES, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
}
PROGRAMS = {
    "gpt_neox": {**SIZES, "vocab_size": 300, "intermediate_size": 96, "rotary_pct": 0.5},
    "mpt": {"vocab_size": 300, "d_model": 48, "n_layers": 2, "n_heads": 6},
    "mosaic_gpt": {
        "vocab_size": 300,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "attn_qk_ln": True,
        "attn_clip_qkv": 2,
    },
    "llama": {**SIZES, "vocab_size": 300, "intermediate_size": 96, "num_key_value_heads": 2},
    "opt": {**SIZES, "vocab_size": 300, "ffn_dim": 96},
}


def library_model(kind: str, options: dict, seed: int = 0):
    """A random model of the transformers library, with gains and biases that are not 1 and 0."""
    transformers = pytest.importorskip("transformers")
    names = {"gpt_neox": "GPTNeoX", "mpt": "Mpt", "llama": "Llama", "opt": "OPT"}
    torch.manual_seed(seed)
    config = getattr(transformers, names[kind] + "Config")(**options, **TOKENS)
    model = getattr(transformers, names[kind] + "ForCausalLM")(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def decoder(kind: str, raw: dict, tensors: dict) -> Decoder:
    made = Decoder(read_decoder_config(kind, raw, "lm"), lambda i, layer: layer).eval()
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert not missing or (missing == ["lm_head.weight"] and made.config.tie_word_embeddings)
    return made


@pytest.mark.parametrize("name", LIBRARY)
def test_language_models_equal_the_library(name):
    kind = name.split()[0]
    theirs = library_model(kind, LIBRARY[name])
    tensors = theirs.state_dict()
    if kind == "gpt_neox":  # in files, and in older versions, the head has this name
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    ours = decoder(kind, json.loads(theirs.config.to_json_string()), tensors)
    g = torch.Generator().manual_seed(1)
    ids, real = torch.randint(3, 90, (2, 11), generator=g), torch.ones(2, 11, dtype=torch.bool)
    real[1, :4] = False  # left padding
    expected = theirs(ids, attention_mask=real.long()).logits
    logits = ours(ours.embedding(ids), real)
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1
    # in pieces on top of a cache, each sample at its own length
    for b, first in ((0, 0), (1, 4)):
        c, row = ours.config, ids[b : b + 1, first:]
        keys = [torch.zeros(1, c.num_key_value_heads, 16, c.head_dim) for _ in range(c.num_hidden_layers)]
        values, past, parts = list(keys), torch.zeros(1, dtype=torch.int64), []
        for piece in (row[:, :5], row[:, 5:6], row[:, 6:]):
            out, past, keys, values = ours.step(ours.embedding(piece), past, keys, values)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1)[0], expected[b, first:], atol=1e-4, rtol=1e-4)


def test_mpt_1b_layout_is_mpt_with_normed_queries_and_keys():
    """Against the library's MPT where q and k norms leave q and k alone but for their scale."""
    theirs = library_model("mpt", {**MPT, "n_heads": 4})
    names = {"norm_1": "ln_1", "norm_2": "ln_2", "ffn.up_proj": "mlp.mlp_up", "ffn.down_proj": "mlp.mlp_down"}
    tensors = {}
    for k, v in theirs.state_dict().items():
        for a, b in (names | {"norm_f": "ln_f"}).items():
            k = k.replace(a, b)
        tensors[k] = v
    raw = {"d_model": 48, "n_heads": 4, "n_layers": 2, "mlp_ratio": 4, "vocab_size": 90, "attn_qk_ln": False}
    ids = torch.arange(10)[None]
    ours = decoder("mosaic_gpt", raw, tensors)
    torch.testing.assert_close(ours(ours.embedding(ids), None), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    # and with norms over the full width, written out for the first layer's projections
    g = torch.Generator().manual_seed(0)
    for i in range(2):
        for n in ("q_ln", "k_ln"):
            tensors[f"transformer.blocks.{i}.attn.{n}.weight"] = 1 + 0.3 * torch.randn(48, generator=g)
    normed = decoder("mosaic_gpt", raw | {"attn_qk_ln": True}, tensors)
    kept = []
    block = normed.transformer.blocks[0]
    block.attn(torch.ones(1, 3, 48).cumsum(2), lambda q, k, v: kept.append((q, k, v)) or q)
    q = torch.nn.functional.linear(torch.ones(1, 3, 48).cumsum(2), block.attn.Wqkv.weight[:48])
    q = (q - q.mean(-1, keepdim=True)) / (q.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(kept[0][0], q * tensors["transformer.blocks.0.attn.q_ln.weight"], atol=1e-4, rtol=1e-4)
    assert (normed(normed.embedding(ids), None) - ours(ours.embedding(ids), None)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim is 24"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear'"),
        ("llama", {"head_dim": 8}, "head_dim is 8"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi is False"),
        ("gpt_neox", {"hidden_act": "mish"}, "activation is 'mish'"),
        ("gpt_neox", {"hidden_size": "48"}, "hidden_size is '48', expected int"),
        ("gpt_neox", {"intermediate_size": None}, "lacks intermediate_size"),
        ("bloom", {}, "type 'bloom'"),
    ],
)
def test_language_models_that_are_not_supported_are_refused(kind, change, message):
    base = LIBRARY.get(kind, SIZES)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_decoder_config(kind, base | change, "lm")


@pytest.mark.parametrize("kind", PROGRAMS)
def test_program_and_engine_equal_the_plain_model(kind, tmp_path):
    """Every language model, at two images and none: greedy steps on a cache against whole sequences."""
    raw = json.loads((DATA / "config.json").read_text())
    raw["model"]["lm"], raw["gated_layer_indices"] = {"type": kind, "hf_config": PROGRAMS[kind]}, [0, 1]
    model = mmopt.from_config(raw, random=True)
    m, marker = model.module, model.image_id
    program = mmopt.trace(model, batch=2, images=2, context=32)
    optimized = mmopt.optimize(program).program
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    prompts = [[7, marker, 4, 5, marker, 6, 8], [9, 3, 11]]
    made = program(prompts, pixels, max_new_tokens=4, ignore_eos=True)
    again = optimized(prompts, pixels, max_new_tokens=4, ignore_eos=True)
    mmopt.export(optimized, tmp_path / "engine")
    run = {"max_new_tokens": 4, "ignore_eos": True}
    engine = mmopt.Engine(tmp_path / "engine").debug.generate_ids(prompts, pixel_values=pixels.numpy(), **run)
    assert [list(t) for t in engine.tokens] == [list(t) for t in made["tokens"]]
    rows = m.encode_images(pixels)
    for b, (prompt, count) in enumerate(zip(prompts, (2, 0), strict=True)):
        ids = torch.tensor([prompt + list(made["tokens"][b][:3])])
        media = rows[:count].flatten(0, 1)[None] if count else torch.zeros(1, 1, *rows.shape[2:])
        seen, attends = sight(ids, marker, media.shape[1])
        logits = m(m.lang_encoder.embedding(ids), media, seen, attends)[0]
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == list(made["tokens"][b]) == list(again["tokens"][b])
        for run in (made, again):
            torch.testing.assert_close(run["logits"][b, -1], logits[-1], atol=1e-4, rtol=1e-4)
