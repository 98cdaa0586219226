"""What users have, a file of trained tensors beside a stock language model and a stock CLIP, against one state dict."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import mmopt
from mmopt.frontend.load import from_config, shipped_configs
from mmopt.models._weight_files import CheckpointError

DATA = Path(__file__).parents[1] / "data" / "flamingo" / "openflamingo"
CONFIG = json.loads((DATA / "config.json").read_text())
HF = CONFIG["model"]["lm"]["hf_config"]
BLOCKS = "lang_encoder.gpt_neox.layers."
EMBED, HEAD = "lang_encoder.gpt_neox.embed_in.weight", "lang_encoder.embed_out.weight"


@pytest.fixture(scope="module")
def full():
    return load_file(DATA / "full_state_dict.safetensors")


@pytest.fixture(scope="module")
def whole():
    return mmopt.load(DATA)


def stock(full: dict, rows: int = 320, cut: bool = False) -> dict:
    """The language model before the reference wrapped it: its own names and its own vocabulary."""
    made = {}
    for k, v in full.items():
        if k.startswith("lang_encoder.") and "gated_cross_attn_layer" not in k:
            made[k.removeprefix("lang_encoder.").replace(".decoder_layer.", ".")] = v.clone()
    g = torch.Generator().manual_seed(0)
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        old = made[name]
        made[name] = torch.randn(rows, old.shape[1], generator=g) if not cut else old[:rows].clone()
    return made


def trained(full: dict) -> dict:
    return {k: full[k].clone() for k in CONFIG["checkpoint_subset_keys"]}


def written_lm(folder: Path, tensors: dict, raw: dict | None = None, kind: str = "gpt_neox") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps((raw or HF) | {"model_type": kind}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def tower(full: dict) -> dict:
    return {k.removeprefix("vision_encoder."): v.clone() for k, v in full.items() if k.startswith("vision_encoder.")}


def written(path: Path, tensors: dict) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


@pytest.fixture
def files(tmp_path, full):
    """checkpoint.pt, language model and vision tower as the reference's users have them."""
    return {
        "path": written(tmp_path / "checkpoint.pt", trained(full)),
        "language_model": written_lm(tmp_path / "lm", stock(full)),
        "vision": written(tmp_path / "clip.pt", {f"visual.{k}": v for k, v in tower(full).items()}),
        "vision_heads": 2,  # the recorded tower has heads of 16
    }


def assert_same(made, whole):
    ours, theirs = made.module.state_dict(), whole.module.state_dict()
    assert set(ours) == set(theirs)
    for k in theirs:
        assert torch.equal(ours[k], theirs[k]), k
    assert made.config == whole.config
    assert made.family.name == whole.family.name


# ------------------------------------------------------------------------------------------------- what was trained
def test_the_bare_file(files, whole):
    made = mmopt.load(**files)
    assert_same(made, whole)
    assert made.directory is None
    assert made.arguments["language_model"] == files["language_model"]


def test_the_training_scripts_file(files, whole, full):
    state = {f"module.{k}": v for k, v in trained(full).items()}
    old = {
        f"module.{BLOCKS}{i}.decoder_layer.attention.{b}": torch.zeros(1, 1, 4, 4) > 0
        for i in range(4)
        for b in ("bias",)
    }
    old |= {f"module.{BLOCKS}{i}.decoder_layer.attention.masked_bias": torch.tensor(-1e9) for i in range(4)}
    old |= {f"module.{BLOCKS}{i}.decoder_layer.attention.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    kept = {
        "epoch": 2,
        "model_state_dict": state | old,
        "optimizer_state_dict": optimizer,
        "lr_scheduler_state_dict": {},
    }
    torch.save(kept, files["path"])
    assert_same(mmopt.load(**files), whole)


def test_second_names_of_the_same_tensors(files, whole, full):
    """The live model lists every block twice; a file may hold either name or both."""
    tensors = trained(full)
    both = dict(tensors)
    for k, v in tensors.items():
        if "gated_cross_attn_layer." in k:
            layer, rest = k.removeprefix(BLOCKS).split(".gated_cross_attn_layer.")
            both[f"lang_encoder.gated_cross_attn_layers.{layer}.{rest}"] = v
    for k, v in full.items():
        if ".decoder_layer." in k:
            layer, rest = k.removeprefix(BLOCKS).split(".decoder_layer.")
            both[f"lang_encoder.old_decoder_blocks.{layer}.{rest}"] = v
    torch.save(both, files["path"])
    assert_same(mmopt.load(**files), whole)
    torch.save({k: v for k, v in both.items() if "gated_cross_attn_layer." not in k}, files["path"])
    assert_same(mmopt.load(**files), whole)
    gate = "lang_encoder.gated_cross_attn_layers.1.attn_gate"
    torch.save(both | {gate: both[gate] + 1}, files["path"])
    with pytest.raises(CheckpointError, match=r"differs from .*layers.1.gated_cross_attn_layer.attn_gate"):
        mmopt.load(**files)


def test_a_complete_file_needs_only_the_config_of_the_language_model(files, whole, full, tmp_path):
    torch.save(full, files["path"])
    made = mmopt.load(files["path"], language_model=files["language_model"], vision_heads=2)
    assert_same(made, whole)


def test_a_directory_with_config_and_only_what_was_trained(files, whole, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = mmopt.load(tmp_path, language_model=files["language_model"], vision=files["vision"])
    assert_same(made, whole)


# ------------------------------------------------------------------------------------------------- embeddings and ids
def test_embeddings_of_the_stock_model_are_cut(files, full, tmp_path):
    """Not in the checkpoint: the stock rows serve, and there may be more of them than the vocabulary needs."""
    tensors = {k: v for k, v in trained(full).items() if k not in (EMBED, HEAD)}
    torch.save(tensors, files["path"])
    made = mmopt.load(**files, vocab_size=300)
    rows = load_file(files["language_model"] / "model.safetensors")
    assert torch.equal(made.module.state_dict()[EMBED], rows["gpt_neox.embed_in.weight"][:300])
    assert torch.equal(made.module.state_dict()[HEAD], rows["embed_out.weight"][:300])
    assert (made.config.vocab_size, made.config.eos_token_id, made.config.media_token_id) == (300, 297, 298)


def test_rows_that_nobody_holds_are_an_error(files, full, tmp_path):
    torch.save({k: v for k, v in trained(full).items() if k != HEAD}, files["path"])
    written_lm(files["language_model"], stock(full, rows=290, cut=True))
    with pytest.raises(CheckpointError, match=r"embed_out.weight: 300 rows are needed, .*model.safetensors has 290"):
        mmopt.load(**files)


def tokenizer(words: int, added: list[str]) -> str:
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    made.add_special_tokens(added)
    return made.to_str()


@pytest.mark.parametrize(
    ("words", "added", "padding", "ids"),
    [
        (297, [], False, (297, 298, 299)),
        (290, ["<pad>"], True, (291, 292, None)),
        (290, ["<PAD>", "<image>", "<|endofchunk|>"], True, (292, 291, 290)),
    ],
)
def test_special_tokens_are_the_tokenizers(files, words, added, padding, ids):
    (files["language_model"] / "tokenizer.json").write_text(tokenizer(words, added))
    if padding:
        (files["language_model"] / "special_tokens_map.json").write_text(
            json.dumps({"pad_token": {"content": "<pad>"}})
        )
    made = mmopt.load(**files)
    c = made.config
    assert (c.eos_token_id, c.media_token_id, c.pad_token_id) == ids
    assert made.image_id == c.media_token_id
    read = Tokenizer.from_str(made.tokenizer)
    assert (read.token_to_id("<|endofchunk|>"), read.token_to_id("<image>")) == ids[:2]
    told = mmopt.load(**files, media_token_id=7, eoc_token_id=8)
    assert (told.config.media_token_id, told.config.eos_token_id) == (7, 8)


def test_the_engine_gets_the_tokenizer_with_what_was_added(files, tmp_path):
    (files["language_model"] / "tokenizer.json").write_text(tokenizer(297, []))
    program = mmopt.trace(mmopt.load(**files), batch=1, images=1, context=32)
    mmopt.export(mmopt.optimize(program).program, tmp_path / "engine")
    read = Tokenizer.from_file(str(tmp_path / "engine" / "tokenizer.json"))
    assert read.token_to_id("<image>") == 298
    assert "tokenizer" not in json.loads((tmp_path / "engine" / "program.json").read_text())["info"]


def test_special_tokens_beyond_the_table_are_an_error(files):
    (files["language_model"] / "tokenizer.json").write_text(tokenizer(299, []))
    with pytest.raises(ValueError, match=r"media_token_id is 300, expected an id below 300"):
        mmopt.load(**files)


# ------------------------------------------------------------------------------------------------------ vision towers
@pytest.mark.parametrize("layout", ["visual.pt", "visual.safetensors", "bare.bin", "whole.pt", "state_dict.pt"])
def test_open_clip_files(files, whole, full, tmp_path, layout):
    tensors = tower(full)
    if not layout.startswith("bare"):
        tensors = {f"visual.{k}": v for k, v in tensors.items()}
    if layout in ("whole.pt", "state_dict.pt"):  # the text tower has names that a bare vision tower has, too
        text = {"positional_embedding": torch.zeros(77, 24), "transformer.resblocks.0.ln_1.weight": torch.zeros(24)}
        tensors |= text | {"token_embedding.weight": torch.zeros(99, 24), "logit_scale": torch.tensor(2.0)}
    if layout == "state_dict.pt":
        tensors = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}
    assert_same(mmopt.load(**files | {"vision": written(tmp_path / layout, tensors)}), whole)


def test_open_clip_directory(files, whole, full, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    written(folder / "open_clip_model.safetensors", {f"visual.{k}": v for k, v in tower(full).items()})
    told = {"quick_gelu": True, "vision_cfg": {"width": 32, "head_width": 16}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": told}))
    del files["vision_heads"]
    assert_same(mmopt.load(**files | {"vision": folder}), whole)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {}}}))
    assert mmopt.load(**files | {"vision": folder}).config.vision.act == "gelu"
    assert mmopt.load(**files, vision_act="relu").config.vision.act == "relu"


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
def test_library_clip(files, full, tmp_path, kind):
    """A random CLIP of the transformers library: its own patch rows before the last norm are the tower's."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    vision = sizes | {"image_size": 42, "patch_size": 14, "hidden_act": "gelu"}
    torch.manual_seed(0)
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(
            vision_config=vision, text_config=sizes | {"vocab_size": 50}, projection_dim=24
        )
    else:
        config = transformers.CLIPVisionConfig(**vision, projection_dim=24)
    clip = getattr(transformers, kind)(config).eval()
    for p in clip.parameters():
        p.data += 0.1 * torch.randn_like(p)
    clip.save_pretrained(tmp_path / "clip")
    del files["vision_heads"]
    pixels = torch.randn(2, 3, 42, 42)
    inner = getattr(clip, "vision_model", clip)
    expected = inner(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    for vision_path in (tmp_path / "clip", tmp_path / "clip" / "model.safetensors"):
        made = mmopt.load(**files | {"vision": vision_path})
        torch.testing.assert_close(made.module.vision_encoder(pixels), expected, atol=1e-4, rtol=1e-4)
        assert (made.config.vision.heads, made.config.vision.act) == (4, "gelu")
        normed = mmopt.load(**files | {"vision": vision_path}, ln_post=True)
        last = inner.post_layernorm(expected)
        torch.testing.assert_close(normed.module.vision_encoder(pixels), last, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------- other language models
SIZES = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = {
    "gpt_neox": SIZES | {"intermediate_size": 80, "rotary_pct": 0.5},
    "mpt": {"vocab_size": 96, "d_model": 48, "n_layers": 3, "n_heads": 6},
    "mosaic_gpt": {"vocab_size": 96, "d_model": 48, "n_layers": 3, "n_heads": 4, "mlp_ratio": 2, "attn_qk_ln": True},
    "llama": SIZES | {"intermediate_size": 80, "num_key_value_heads": 2},
    "opt": SIZES | {"ffn_dim": 80, "max_position_embeddings": 64},
}


@pytest.mark.parametrize("layout", ["single", "shards", "bin", "without head"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_language_model_in_every_layout(tmp_path, kind, layout):
    """A random model taken apart into what was trained and what is stock, and put together again."""
    raw = json.loads(json.dumps(CONFIG)) | {"gated_layer_indices": [0, 2]}
    raw["model"] |= {"lm": {"type": kind, "hf_config": KINDS[kind]}, "vocab_size_after_resize": 99}
    raw["model"] |= {"eoc_token_id": 96, "media_token_id": 97, "pad_token_id": 98}
    whole = from_config(raw, random=True)
    names = {id(p): k for k, p in whole.module.named_parameters()}  # tied: listed once
    tensors = {k: p.detach() for k, p in whole.module.named_parameters()}
    assert len(names) == len(tensors)
    lm = {k: v for k, v in tensors.items() if k.startswith("lang_encoder.") and "gated_cross" not in k}
    kept = {k: v for k, v in tensors.items() if k.startswith("perceiver.") or "gated_cross" in k}
    tables = [k for k in lm if re.search(r"(wte|embed_in|embed_out|embed_tokens|lm_head)\.weight$", k)]
    kept |= {k: lm[k] for k in tables}
    folder = tmp_path / "lm"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(KINDS[kind] | {"model_type": "mpt" if kind == "mosaic_gpt" else kind})
    )
    own = {k.removeprefix("lang_encoder.").replace(".decoder_layer.", "."): v.clone() for k, v in lm.items()}
    own |= {k: v[:96].clone() for k, v in own.items() if "lang_encoder." + k in tables}
    if layout == "without head":  # as the library saves the model below its head
        root = whole.module.lang_encoder.kind.blocks.split(".")[0] + "."
        own = {k.removeprefix(root): v for k, v in own.items() if k.startswith(root)}
    if layout == "shards":
        index = {}
        for i, part in enumerate((list(own)[::2], list(own)[1::2])):
            save_file({k: own[k] for k in part}, folder / f"model-{i}.safetensors")
            index |= dict.fromkeys(part, f"model-{i}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    elif layout == "bin":
        torch.save(own, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        save_file(own, folder / "model.safetensors")
    torch.save(kept, tmp_path / "checkpoint.pt")
    clip = {k.removeprefix("vision_encoder."): v for k, v in tensors.items() if k.startswith("vision_encoder.")}
    torch.save(clip, tmp_path / "clip.bin")
    made = mmopt.load(tmp_path / "checkpoint.pt", language_model=folder, vision=tmp_path / "clip.bin", vision_heads=2)
    assert_same(made, whole)
    assert made.config.lm.kind == kind
    if made.config.tie_word_embeddings:
        assert made.module.lang_encoder.head.weight is made.module.lang_encoder.embedding.weight
    if kind == "mpt":  # the table under the head's name, as the library's MPT has it
        wte = "lang_encoder.transformer.wte.weight"
        torch.save(
            {k: v for k, v in kept.items() if k != wte} | {"lang_encoder.lm_head.weight": kept[wte]},
            tmp_path / "checkpoint.pt",
        )
        made = mmopt.load(
            tmp_path / "checkpoint.pt", language_model=folder, vision=tmp_path / "clip.bin", vision_heads=2
        )
        assert_same(made, whole)


# -------------------------------------------------------------------------------------------------------- what is wrong
def test_mixed_dtypes_are_computed_in_float32(files, full, whole):
    torch.save({k: v.bfloat16() for k, v in trained(full).items()}, files["path"])
    made = mmopt.load(**files)
    assert {p.dtype for p in made.module.parameters()} == {torch.float32}
    assert mmopt.load(**files, dtype="bfloat16").dtype == torch.bfloat16


def test_all_that_does_not_fit_is_listed_with_its_file(files, full):
    tensors = trained(full)
    del tensors["perceiver.norm.weight"]
    tensors["perceiver.norm.bias"] = torch.zeros(5)
    tensors["surprise"] = torch.zeros(2)
    torch.save(tensors, files["path"])
    lm = stock(full)
    del lm["gpt_neox.layers.2.mlp.dense_h_to_4h.bias"]
    written_lm(files["language_model"], lm)
    with pytest.raises(CheckpointError) as e:
        mmopt.load(**files)
    message = str(e.value)
    for line in (
        f"missing perceiver.norm.weight (32,) in {files['path']}",
        f"perceiver.norm.bias in {files['path']}: expected shape (32,), found (5,)",
        f"unexpected surprise (2,) in {files['path']}",
        f"missing {BLOCKS}2.decoder_layer.mlp.dense_h_to_4h.bias (256,) in {files['language_model']}",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("language_model", "checkpoint.pt: has no config.json and so no language model; pass language_model="),
        ("vision", "checkpoint.pt: holds no vision tower; pass vision="),
    ],
)
def test_what_is_left_out_is_asked_for(files, without, message):
    del files[without]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        mmopt.load(**files)


def test_files_in_the_wrong_place(files, tmp_path):
    with pytest.raises(CheckpointError, match="no CLIP vision tower"):
        mmopt.load(**files | {"vision": files["path"]})
    torch.save({BLOCKS + "1.gated_cross_attn_layer.attn_gate": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"missing perceiver.latents"):
        mmopt.load(**files | {"path": tmp_path / "other.pt"})
    with pytest.raises(CheckpointError, match="of no family that goes without"):
        mmopt.load(files["language_model"] / "model.safetensors")
    with pytest.raises(CheckpointError, match="language_model= is a directory"):
        mmopt.load(**files | {"language_model": files["language_model"] / "model.safetensors"})
    with pytest.raises(ValueError, match="unknown options heads; expected some of ln_post"):
        mmopt.load(**files, heads=3)
    with pytest.raises(ValueError, match="of the family mplug_owl2 are complete and take no such option"):
        mmopt.load(DATA.parent.parent / "mplug_owl2", ln_post=True)


def test_torchscript_archives_are_not_run(files, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT.pt")
    with pytest.raises(CheckpointError, match=r"ViT.pt: cannot be read as weights .*save its tensors alone"):
        mmopt.load(**files | {"vision": tmp_path / "ViT.pt"})


# ------------------------------------------------------------------------------------------------------------ configs
# config -> parameters in millions of: all, language model, gated blocks, resampler
SHIPPED = {
    "openflamingo-3b": (2559, 1311, 881, 63),
    "openflamingo-4b": (4040, 2775, 898, 63),
    "openflamingo-9b": (8131, 6649, 1116, 63),
    "openflamingo-mid": (121, 64, 43, 6),
    "openflamingo-tiny": (1, 0, 0, 0),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs(name):
    assert name in shipped_configs()
    model = from_config(name)
    assert not model.has_weights
    parameters = dict(model.module.named_parameters())
    parts = [r"", r"lang_encoder\.(?!.*gated_cross)", r".*gated_cross_attn_layer", r"perceiver"]
    counts = [sum(p.numel() for k, p in parameters.items() if re.match(part, k)) for part in parts]
    assert tuple(round(n / 1e6) for n in counts) == SHIPPED[name]
    tied = model.module.lang_encoder.head.weight is model.module.lang_encoder.embedding.weight
    assert tied == (name != "openflamingo-4b")
    c = model.config
    assert len(c.gated_layers) * ({"openflamingo-4b": 2, "openflamingo-9b": 4}.get(name, 1)) == c.num_hidden_layers


def test_random_gates_are_open():
    gates = [p for k, p in from_config("openflamingo-tiny", random=True).module.named_parameters() if "_gate" in k]
    assert len(gates) == 8
    assert all(0.4 <= abs(float(p)) <= 1.3 for p in gates)


def test_configs_that_are_not_supported_are_refused():
    def changed(**changes):
        return CONFIG | {"model": CONFIG["model"] | changes}

    for change, message in (
        ({"media_token_id": 300}, "model.media_token_id is 300, expected an id below 300"),
        ({"gated_cross_attn": {"only_attend_immediate_media": False}}, "only_attend_immediate_media is False"),
        ({"perceiver": {"max_num_media": 3}}, "model.perceiver.max_num_media is 3"),
        ({"vision": {"act": "swish"}}, "model.vision.act is 'swish'"),
        ({"vision": {"image_size": 41}}, "image_size must be a multiple of patch_size"),
        ({"lm": {"type": "bloom", "hf_config": {}}}, "of type 'bloom', expected one of gpt_neox, llama"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            from_config(changed(**change))
    with pytest.raises(ValueError, match=r"gated_layer_indices is \(4,\)"):
        from_config(CONFIG | {"gated_layer_indices": [4]})
