"""Sizes and options of a decoder-only language model, read from the config.json that its library writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmopt.models._family import read_config


@dataclass(frozen=True)
class DecoderConfig:
    """One set of names for what each library names in its own way; `kind` is the library's model_type."""

    kind: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-5
    activation: str = "gelu"
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    rope_theta: float = 10000.0
    rotary_pct: float = 1.0
    parallel_residual: bool = False
    attention_bias: bool = True
    alibi_bias_max: float = 8.0
    clip_qkv: float | None = None
    qk_ln: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)


# What each library calls a field of DecoderConfig, where it has another name.
NAMES: dict[str, dict[str, str]] = {
    "gpt_neox": {
        "layer_norm_eps": "norm_eps",
        "hidden_act": "activation",
        "rotary_emb_base": "rope_theta",
        "partial_rotary_factor": "rotary_pct",
        "use_parallel_residual": "parallel_residual",
    },
    "mpt": {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
        "layer_norm_epsilon": "norm_eps",
    },
    "llama": {"rms_norm_eps": "norm_eps", "hidden_act": "activation"},
    "opt": {"ffn_dim": "intermediate_size", "activation_function": "activation", "enable_bias": "attention_bias"},
}
NAMES["mosaic_gpt"] = NAMES["mpt"] | {"attn_qk_ln": "qk_ln", "attn_clip_qkv": "clip_qkv"}

# The library's defaults where they are not those of DecoderConfig.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"rotary_pct": 0.25, "parallel_residual": True},
    "mpt": {"tie_word_embeddings": True},
    "mosaic_gpt": {"tie_word_embeddings": True},
    "llama": {"norm_eps": 1e-6, "activation": "silu"},
    "opt": {"activation": "relu", "tie_word_embeddings": True},
}

# Values that would change the maths and that this implementation does not know are refused by name.
_MPT = {"alibi": True, "no_bias": True, "softmax_scale": None, "logit_scale": None, "prefix_lm": False}
FIXED: dict[str, dict[str, Any]] = {
    "gpt_neox": {"rope_type": "default", "rope_scaling": None},
    "mpt": {**_MPT, "attn_type": "multihead_attention"},
    "mosaic_gpt": _MPT,
    "llama": {
        "rope_type": "default",
        "rope_scaling": None,
        "mlp_bias": False,
        "attention_bias": False,
        "activation": "silu",
    },
    "opt": {
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


def read_decoder_config(kind: Any, raw: dict, where: str, vocab_size: int | None = None) -> DecoderConfig:
    """config.json of a library's language model -> DecoderConfig; `vocab_size`: rows of the table, if it was resized.

    ValueError names each value, as ``where.name``, that is missing, of the wrong type or not supported.
    """
    if kind not in NAMES:
        raise ValueError(f"config.json: {where} is of type {kind!r}, expected one of {', '.join(sorted(NAMES))}")
    flat = {k: v for k, v in raw.items() if k not in ("attn_config", "rope_parameters")}
    for nested in ("attn_config", "rope_parameters"):  # the first is MPT's, the second is where newer libraries put it
        flat |= raw.get(nested) or {}
    values = {"kind": kind} | DEFAULTS[kind] | {NAMES[kind].get(k, k): v for k, v in flat.items() if v is not None}
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    if kind in ("mpt", "mosaic_gpt") and "hidden_size" in values:
        values["intermediate_size"] = values.get("expansion_ratio", values.get("mlp_ratio", 4)) * values["hidden_size"]
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    absent = [k for k in needed if k not in values]
    if absent:
        raise ValueError(f"config.json: {where} of type {kind!r} lacks {', '.join(absent)}")
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if kind not in ("llama", "opt"):
        values["bos_token_id"] = None  # these tokenizers put nothing in front of a text
    c = read_config(DecoderConfig, values, {where: FIXED[kind]}, where)
    wrong = []
    if c.hidden_size % c.num_attention_heads or c.num_attention_heads % c.num_key_value_heads or c.rotary_dim % 2:
        wrong.append(
            f"hidden_size {c.hidden_size} must divide into num_attention_heads {c.num_attention_heads} whose rotary "
            f"part {c.rotary_dim} is even, and these into num_key_value_heads {c.num_key_value_heads} groups"
        )
    for name, expected in (("head_dim", c.head_dim), ("word_embed_proj_dim", c.hidden_size)):
        if values.get(name, expected) != expected:
            wrong.append(f"{name} is {values[name]}, only {expected} is supported")
    if c.activation not in ACTIVATIONS:
        wrong.append(f"activation is {c.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if wrong:
        raise ValueError("config.json: " + "; ".join(f"{where}: {w}" for w in wrong))
    return c
