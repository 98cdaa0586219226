"""OpenFlamingo as its users have it: a file of the trained tensors, a stock language model and a stock CLIP.

Facts read from the reference (mlfoundations/open_flamingo): the official `checkpoint.pt` holds the resampler, the gated
blocks and, for most models, the language model's embeddings; all else is stock. The tokenizer gets ``<|endofchunk|>``,
``<image>`` and, if it has no padding token, ``<PAD>``, and the embeddings are resized to it, which may shrink them.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmopt.models._decoder_config import read_decoder_config
from mmopt.models._decoders import KINDS
from mmopt.models._weight_files import Assembled, CheckpointError, Weights, read_json
from mmopt.processing.sentencepiece import convert_sentencepiece, prove_equal

END_OF_CHUNK, IMAGE, PAD = "<|endofchunk|>", "<image>", "<PAD>"
IDS = ("eoc_token_id", "media_token_id", "pad_token_id")
DIM_HEAD = 64  # of CLIP's vision towers, of the resampler and of the gated blocks
OPTIONS = ("ln_post", "vision_heads", "vision_act", "perceiver_heads", "cross_heads", "vocab_size", *IDS)


def assemble(checkpoint: Weights, language_model: Weights | None, vision: Weights | None, options: dict) -> Assembled:
    """Files -> one config and one state dict under official names.

    What the checkpoint holds goes before what the stock models hold. Sizes are read from the tensors unless the
    checkpoint has a config.json. Options: ln_post (norm all rows of the vision tower, as newer open_clip does),
    vision_heads, perceiver_heads, cross_heads (by default heads of 64), vision_act (by default what CLIP's config says,
    or OpenAI's "quick_gelu"), vocab_size, eoc_token_id, media_token_id, pad_token_id.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown options {', '.join(unknown)}; expected some of {', '.join(OPTIONS)}")
    kind, lm = _decoder(checkpoint, language_model)
    blocks = re.escape(KINDS[kind].blocks)
    homes = {
        r"vision_encoder\.": (vision or checkpoint).path,
        rf"perceiver\.|lang_encoder\.{blocks}\.\d+\.gated_cross_attn_layer\.": checkpoint.path,
        r"lang_encoder\.": (language_model or checkpoint).path,
    }
    made = Assembled({}, {}, {}, homes)
    _add(made, checkpoint, {k: official(k, kind) for k in checkpoint.tensors})
    tables = [f"lang_encoder.{name}.weight" for name in (KINDS[kind].embed, KINDS[kind].head)]
    held = [made.tensors[t].shape[0] for t in tables if t in made.tensors]
    tokenizer = _tokenizer(checkpoint, language_model) if language_model is not None else None
    given = _model(checkpoint)
    vocab = given.get("vocab_size_after_resize") or options.get("vocab_size") or (held[0] if held else None)
    if vocab is None:
        vocab = tokenizer.get_vocab_size() if tokenizer is not None else lm.get("vocab_size", 0) + 3
    if language_model is not None:
        names = {k: language_key(k, kind) for k in language_model.tensors}
        if held and read_decoder_config(kind, lm, "language_model", vocab).tie_word_embeddings:
            names = {k: n for k, n in names.items() if n not in tables}  # one tensor: the checkpoint's
        _add(made, language_model, names)
        _resize(made, tables, vocab)
    clip: dict[str, Any] = {}
    if vision is not None:
        tower, clip = vision_tower(vision)
        _add(made, tower, {k: f"vision_encoder.{k}" for k in tower.tensors})
    if not any(k.startswith("vision_encoder.") for k in made.tensors):
        raise CheckpointError(f"{checkpoint.path}: holds no vision tower; pass vision=FILE or DIRECTORY of a CLIP")
    if checkpoint.config:
        made.config = copy.deepcopy(checkpoint.config)
    else:
        model = _sizes(made.tensors, KINDS[kind].blocks, clip, checkpoint.path)
        model |= {"lm": {"type": kind, "hf_config": lm}, "vocab_size_after_resize": vocab}
        made.config = {"model": model | _special_ids(tokenizer, language_model, vocab)}
    made.tokenizer = tokenizer.to_str() if tokenizer is not None else None
    _tell(made.config.get("model", made.config), options)
    return made


def _model(checkpoint: Weights) -> dict:
    """The model's part of a config.json of this family, {} without one."""
    config = checkpoint.config or {}
    return config.get("model", config)


def _decoder(checkpoint: Weights, language_model: Weights | None) -> tuple[str, dict]:
    """The kind of the language model and its library's config."""
    if checkpoint.config:
        lm = _model(checkpoint).get("lm") or {}
        kind, config = lm.get("type"), lm.get("hf_config") or {}
    elif language_model is None:
        raise CheckpointError(
            f"{checkpoint.path}: has no config.json and so no language model; pass language_model=DIRECTORY"
        )
    elif language_model.config is None:
        raise CheckpointError(f"{language_model.path}: no config.json; language_model= is a directory that holds one")
    else:
        config = language_model.config
        kind = config.get("model_type")
        if kind in ("mpt", "mosaic_gpt"):  # the file tells which of the two layouts it is in
            kind = "mosaic_gpt" if any(".mlp.mlp_up." in k for k in language_model.tensors) else "mpt"
    read_decoder_config(kind, config, "language_model")
    return str(kind), config


def _add(made: Assembled, weights: Weights, names: dict[str, str]) -> None:
    """Take tensors under new names. One that is there already stays; within one source both must be equal."""
    before = set(made.tensors)
    for key, name in names.items():
        value = weights.tensors[key]
        if name not in made.tensors:
            made.tensors[name], made.files[name] = value, weights.files[key]
        elif name not in before:
            held = made.tensors[name]
            same = held.shape == value.shape and (held.data_ptr() == value.data_ptr() or torch.equal(held, value))
            if not same:
                made.problems.append(f"{key} in {weights.files[key]}: differs from {name}, whose second name it is")


def official(key: str, kind: str) -> str:
    """A key of a checkpoint -> the one official name of its tensor."""
    blocks = KINDS[kind].blocks
    key = re.sub(r"^(module\.)+", "", key)
    key = re.sub(r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", rf"lang_encoder.{blocks}.\1.decoder_layer.", key)
    return re.sub(
        r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.", rf"lang_encoder.{blocks}.\1.gated_cross_attn_layer.", key
    )


def language_key(key: str, kind: str) -> str:
    """A key of a stock language model -> its official name."""
    names = KINDS[kind]
    root = names.blocks.split(".")[0] + "."
    if key == "lm_head.weight":
        key = names.head + ".weight"
    if not key.startswith((root, names.head + ".")):
        key = root + key  # saved from the library's model without a head
    return "lang_encoder." + re.sub(rf"^{re.escape(names.blocks)}\.(\d+)\.", rf"{names.blocks}.\1.decoder_layer.", key)


def _resize(made: Assembled, tables: list[str], vocab: int) -> None:
    """Cut the tables of tokens to the vocabulary. Rows that no file holds cannot be made up."""
    for name in tables:
        rows = made.tensors[name].shape[0] if name in made.tensors else vocab
        if rows < vocab:
            made.problems.append(
                f"{name}: {vocab} rows are needed, {made.files[name]} has {rows}; those of the added tokens are in no "
                "file (the reference draws them at random when it loads)"
            )
        elif rows > vocab:
            made.tensors[name] = made.tensors[name][:vocab]


# ------------------------------------------------------------------------------------------------------ vision tower
LIBRARY_NAMES = {
    r"^embeddings\.class_embedding$": "class_embedding",
    r"^embeddings\.patch_embedding\.weight$": "conv1.weight",
    r"^embeddings\.position_embedding\.weight$": "positional_embedding",
    r"^pre_layrnorm\.": "ln_pre.",  # the library's own spelling
    r"^post_layernorm\.": "ln_post.",
    r"^encoder\.layers\.(\d+)\.layer_norm(\d)\.": r"transformer.resblocks.\1.ln_\2.",
    r"^encoder\.layers\.(\d+)\.mlp\.fc1\.": r"transformer.resblocks.\1.mlp.c_fc.",
    r"^encoder\.layers\.(\d+)\.mlp\.fc2\.": r"transformer.resblocks.\1.mlp.c_proj.",
    r"^encoder\.layers\.(\d+)\.self_attn\.": r"transformer.resblocks.\1.attn.",
}


def vision_tower(weights: Weights) -> tuple[Weights, dict[str, Any]]:
    """A CLIP, whole or its vision tower alone, of open_clip or of the transformers library -> open_clip's bare keys.

    Also returns what its config says of heads, activation and epsilon.
    """
    keys = {re.sub(r"^(module\.)+", "", k): k for k in weights.tensors}
    for prefix in ("visual.", "vision_encoder.", ""):
        if prefix + "conv1.weight" in keys:
            chosen = {k[len(prefix) :]: original for k, original in keys.items() if k.startswith(prefix)}
            made = Weights(
                weights.path,
                {k: weights.tensors[original] for k, original in chosen.items()},
                {k: weights.files[original] for k, original in chosen.items()},
            )
            return made, _open_clip_config(weights.path)
    for prefix in ("vision_model.", ""):
        if prefix + "embeddings.patch_embedding.weight" in keys:
            return _library_tower(weights, keys, prefix)
    raise CheckpointError(
        f"{weights.path}: no CLIP vision tower; expected visual.conv1.weight (open_clip) or "
        "vision_model.embeddings.patch_embedding.weight (transformers)"
    )


def _open_clip_config(path: Path) -> dict[str, Any]:
    file = path / "open_clip_config.json"
    if not file.is_file():
        return {}
    model = read_json(file).get("model_cfg") or {}
    made: dict[str, Any] = {"act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    vision = model.get("vision_cfg") or {}
    if "width" in vision:
        made["heads"] = vision["width"] // vision.get("head_width", DIM_HEAD)
    return made


def _library_tower(weights: Weights, keys: dict[str, str], prefix: str) -> tuple[Weights, dict[str, Any]]:
    made = Weights(weights.path, {}, {})
    parts: dict[str, list[Tensor | None]] = {}
    for key, original in keys.items():
        value = weights.tensors[original]
        if key == "visual_projection.weight":
            name, value = "proj", value.T
        elif not key.startswith(prefix) or key.endswith("position_ids") or key.startswith("text_"):
            continue
        else:
            name = key[len(prefix) :]
            for pattern, new in LIBRARY_NAMES.items():
                name = re.sub(pattern, new, name)
        part = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", name)
        if part:
            name = f"{part[1]}in_proj_{part[3]}"
            parts.setdefault(name, [None] * 3)["qkv".index(part[2])] = value
        else:
            made.tensors[name] = value
        made.files[name] = weights.files[original]
    for name, qkv in parts.items():
        present = [x for x in qkv if x is not None]
        made.tensors[name] = torch.cat(present)
    file = weights.path.parent / "config.json" if weights.path.is_file() else weights.path / "config.json"
    config = weights.config or (read_json(file) if file.is_file() else {})
    config = config.get("vision_config") or config
    names = {"num_attention_heads": "heads", "hidden_act": "act", "layer_norm_eps": "ln_eps"}
    return made, {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


# ------------------------------------------------------------------------------------------------------------- sizes
def _sizes(tensors: dict[str, Tensor], blocks: str, clip: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the tensors tell of the vision tower, the resampler and the gated blocks."""
    gated = rf"lang_encoder\.{re.escape(blocks)}\.(\d+)\.gated_cross_attn_layer\."
    layers = sorted({int(found[1]) for k in tensors if (found := re.match(gated, k))})
    first = f"lang_encoder.{blocks}.{layers[0] if layers else 'N'}.gated_cross_attn_layer."
    needed = {
        "conv": "vision_encoder.conv1.weight",
        "places": "vision_encoder.positional_embedding",
        "fc": "vision_encoder.transformer.resblocks.0.mlp.c_fc.weight",
        "latents": "perceiver.latents",
        "q": "perceiver.layers.0.0.to_q.weight",
        "ff": "perceiver.layers.0.1.1.weight",
        "cross_q": first + "attn.to_q.weight",
        "cross_ff": first + "ff.1.weight",
    }
    absent = [k for k in needed.values() if k not in tensors]
    if absent:
        raise CheckpointError(f"{path}: missing {', '.join(absent)}, from which sizes are read")
    shape = {name: tensors[k].shape for name, k in needed.items()}
    wrong = [f"{needed[name]} {tuple(s)}" for name, s in shape.items() if len(s) != (4 if name == "conv" else 2)]
    if wrong:
        raise CheckpointError(f"{path}: {', '.join(wrong)}: expected matrices (conv1: four dimensions)")
    width, patch = shape["conv"][0], shape["conv"][2]
    vision = {
        "image_size": round((shape["places"][0] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "width": width,
        "layers": _count(tensors, r"vision_encoder\.transformer\.resblocks\.(\d+)\."),
        "heads": max(1, width // DIM_HEAD),
        "mlp_ratio": shape["fc"][0] / width,
    }
    if "vision_encoder.proj" in tensors:
        vision["output_dim"] = tensors["vision_encoder.proj"].shape[1]
    return {
        "vision": vision | clip,
        "perceiver": {
            "depth": _count(tensors, r"perceiver\.layers\.(\d+)\."),
            "num_latents": shape["latents"][0],
            "heads": max(1, shape["q"][0] // DIM_HEAD),
            "dim_head": min(DIM_HEAD, shape["q"][0]),
            "ff_mult": shape["ff"][0] // shape["ff"][1],
        },
        "gated_cross_attn": {
            "heads": max(1, shape["cross_q"][0] // DIM_HEAD),
            "dim_head": min(DIM_HEAD, shape["cross_q"][0]),
            "ff_mult": shape["cross_ff"][0] // shape["cross_ff"][1],
        },
        "gated_layer_indices": layers,
    }


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for k in tensors if (found := re.match(pattern, k)))


def _tell(model: dict, options: dict) -> None:
    """Options that change a config."""
    for option, key in (("ln_post", "ln_post"), ("vision_heads", "heads"), ("vision_act", "act")):
        if option in options:
            model.setdefault("vision", {})[key] = options[option]
    for option, section in (("perceiver_heads", "perceiver"), ("cross_heads", "gated_cross_attn")):
        if option in options:
            part = model.setdefault(section, {})
            inner = part.get("heads", 8) * part.get("dim_head", DIM_HEAD)
            part |= {"heads": options[option], "dim_head": inner // options[option]}
    model |= {k: options[k] for k in IDS if k in options}


# ------------------------------------------------------------------------------------------------------------ tokens
def _tokenizer(checkpoint: Weights, language_model: Weights | None) -> Tokenizer | None:
    """The tokenizer of the checkpoint's directory, or else of the language model's, with the tokens that are added."""
    for weights in (checkpoint, language_model):
        if weights is None or not weights.path.is_dir():
            continue
        ready, pieces = weights.path / "tokenizer.json", weights.path / "tokenizer.model"
        if ready.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(ready))
            except Exception as e:  # tokenizers raises plain Exception
                raise CheckpointError(f"{ready}: not a readable tokenizer.json: {e}") from e
        elif pieces.is_file():
            tokenizer = convert_sentencepiece(pieces)
            prove_equal(pieces, tokenizer)
        else:
            continue
        tokenizer.add_special_tokens([END_OF_CHUNK, IMAGE])
        if not _has_padding(weights.path):
            tokenizer.add_special_tokens([PAD])
        return tokenizer
    return None


def _has_padding(directory: Path) -> bool:
    files = [directory / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    return any(read_json(f).get("pad_token") is not None for f in files if f.is_file())


def _special_ids(tokenizer: Tokenizer | None, language_model: Weights | None, vocab: int) -> dict[str, int]:
    """Ids of the tokens that were added: the tokenizer's, or else the last of the vocabulary, in the official order."""
    if tokenizer is not None:
        found = {name: tokenizer.token_to_id(text) for name, text in zip(IDS, (END_OF_CHUNK, IMAGE, PAD), strict=True)}
        return {name: i for name, i in found.items() if i is not None}
    padded = language_model is not None and language_model.path.is_dir() and _has_padding(language_model.path)
    return {name: vocab - (2 if padded else 3) + i for i, name in enumerate(IDS[: 2 if padded else 3])}
