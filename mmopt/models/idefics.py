"""Idefics: Laurençon et al. 2023, arXiv:2306.16527; reference implementation IdeficsForVisionText2Text of transformers.

A CLIP-like vision tower, a perceiver resampler (optional) and a LLaMA with a gated cross-attention block before every
`cross_layer_interval`-th layer, the first included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.ir import ops
from mmopt.ir.capture import StageSpec, TensorSpec
from mmopt.models._family import Cases, Family, Recording
from mmopt.models._stages import Part, only
from mmopt.models._transformers import (
    RECORDED,
    Adopted,
    CrossAttention,
    CrossModel,
    DecoderLayer,
    Inputs,
    VisionAttention,
    check,
    check_language,
    library,
    library_config,
    per_head,
    refuse,
    text_stages,
    with_plain_norms,
)
from mmopt.spec.model_info import Cross

IMAGE_MARKER = "<image>"
FAKE_TOKEN = "<fake_token_around_image>"


class Config:
    """The library's config, and what mmopt asks a config for."""

    tokens_per_image = 1  # the image marker is a token like others; images lie outside the text

    def __init__(self, library_config: Any, image_token_id: int | None = None):
        c = self.library = library_config
        self.vision, self.perceiver = c.vision_config, c.perceiver_config
        self.hidden_size, self.num_hidden_layers = c.hidden_size, c.num_hidden_layers
        self.num_attention_heads = self.num_key_value_heads = c.num_attention_heads
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.vocab_size = c.vocab_size + c.additional_vocab_size
        self.max_position_embeddings = c.max_position_embeddings
        self.tie_word_embeddings = c.tie_word_embeddings
        self.bos_token_id, self.eos_token_id = c.bos_token_id, c.eos_token_id
        # the tokenizer adds <fake_token_around_image>, then <image>, after the words of the text model
        self.image_token_id = c.vocab_size + 1 if image_token_id is None else image_token_id

    @property
    def vision_rows(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2 + 1

    @property
    def cross(self) -> Cross:
        rows = self.perceiver.resampler_n_latents if self.library.use_resampler else self.vision_rows
        return Cross(tiles=1, tokens=rows, width=self.vision.embed_dim)


def parse_config(raw: dict) -> Config:
    """config.json -> Config. ValueError names each value that is inconsistent or not supported."""
    c = library_config("IdeficsConfig", raw)
    v = c.vision_config
    wrong = check(c, "", {"alpha_type": ("float", "vector"), "alpha_initializer": ("zeros", "ones", "normal")})
    wrong += check_language(c, "", c.num_attention_heads)
    wrong += check(v, "vision_config.", {"hidden_act": ("gelu", "quick_gelu", "relu")})
    if not isinstance(v.image_size, int) or not isinstance(v.patch_size, int) or v.image_size % v.patch_size:
        wrong.append(f"vision_config.image_size {v.image_size} must be a multiple of patch_size {v.patch_size}")
    if v.embed_dim % v.num_attention_heads:
        wrong.append(f"vision_config.embed_dim {v.embed_dim} must divide into {v.num_attention_heads} heads")
    if -(-c.num_hidden_layers // c.cross_layer_interval) != c.num_hidden_layers // c.cross_layer_interval:
        wrong.append(
            f"num_hidden_layers {c.num_hidden_layers} must be a multiple of cross_layer_interval "
            f"{c.cross_layer_interval}: the reference makes no gated block for the rest"
        )
    refuse(wrong)
    return Config(c, raw.get("image_token_id"))


# -------------------------------------------------------------------------------------------------------------- images
class VisionModel(Adopted):
    """pixel_values ``[N, 3, H, W]`` -> rows ``[N, 1 + patches, width]``, the class row included, no last norm."""

    def __init__(self, source: Any, heads: int):
        super().__init__(source)
        self.embeddings.position_ids = torch.arange(self.embeddings.num_positions, device="cpu")[None]
        for layer in self.encoder.layers:
            layer.self_attn = VisionAttention(layer.self_attn, heads, "out_proj")

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers:
            x = layer(x, None)
        return x


class PerceiverAttention(Adopted):
    def __init__(self, source: Any):
        super().__init__(source)
        self.heads, self.qk_layer_norms = source.n_heads, source.qk_layer_norms

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        latents = self.latents_layer_norm(latents)
        rows = torch.cat([self.context_layer_norm(context), latents], dim=1)
        q, k, v = self.q_proj(latents), self.k_proj(rows), self.v_proj(rows)
        if self.qk_layer_norms:
            q, k = per_head(self.q_layer_norm, q, self.heads), per_head(self.k_layer_norm, k, self.heads)
        return self.output_proj(ops.attention(q, k, v, self.heads, self.heads))


class Resampler(Adopted):
    """Vision rows ``[N, rows, width]`` -> latents ``[N, latents, width]``."""

    def __init__(self, source: Any):
        super().__init__(source)
        for block in self.blocks:
            block[0] = PerceiverAttention(block[0])

    def forward(self, context: Tensor) -> Tensor:
        x = self.latents.expand(context.shape[0], -1, -1)
        for attention, mlp in self.blocks:
            x = attention(context, x) + x
            x = mlp(x) + x
        return self.layer_norm(x)


# ------------------------------------------------------------------------------------------------------ language model
class Embedding(Adopted):
    """Ids from `words` on belong to a second table."""

    def __init__(self, source: Any):
        super().__init__(source)
        self.words, self.more = source.num_embeddings, source.num_additional_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        if not self.more:
            return F.embedding(ids, self.weight)
        added = ids >= self.words
        word = F.embedding(ids * ~added, self.weight)
        return torch.where(added[..., None], self.additional_embedding((ids - self.words) * added), word)


class GatedCrossAttentionLayer(Adopted):
    def __init__(self, source: Any, heads: int, norms: bool):
        super().__init__(source)
        names = ("q_layer_norm", "k_layer_norm") if norms else None
        self.cross_attn = CrossAttention(source.cross_attn, heads, heads, names)

    def forward(self, x: Tensor, media: Tensor, seen: Tensor, attends: Tensor) -> Tensor:
        attended = self.cross_attn(self.input_layernorm(x), media, seen, attends)
        x = x + self.alpha_cross_attn.tanh() * attended
        return x + self.alpha_dense.tanh() * self.mlp(self.post_attention_layernorm(x))


class Idefics(CrossModel):
    def __init__(self, config: Config):
        super().__init__(config)
        c, heads = config.library, config.num_attention_heads
        whole = with_plain_norms(library().IdeficsForVisionText2Text(c))
        self.take_frequencies(type(whole.model.layers[0].self_attn.rotary_emb), c)
        self.model, self.lm_head = Adopted(whole.model), whole.lm_head
        m = self.model
        m.vision_model = VisionModel(m.vision_model, config.vision.num_attention_heads)
        if c.use_resampler:
            m.perceiver_resampler = Resampler(m.perceiver_resampler)
        m.embed_tokens = Embedding(m.embed_tokens)
        m.layers = nn.ModuleList(DecoderLayer(x, heads, heads) for x in m.layers)
        m.gated_cross_attn_layers = nn.ModuleList(
            GatedCrossAttentionLayer(x, heads, c.qk_layer_norms) for x in m.gated_cross_attn_layers
        )
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            if self.config.library.additional_vocab_size:
                self.lm_head.additional_fc.weight = self.model.embed_tokens.additional_embedding.weight

    def resample(self, vision_rows: Tensor) -> Tensor:
        rows = self.model.perceiver_resampler(vision_rows) if self.config.library.use_resampler else vision_rows
        return rows[:, None]

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.resample(self.model.vision_model(pixel_values))

    def decode_rows(self, x, angles, media, sight, attends):
        seen, attends_rows, _ = sight
        every = self.config.library.cross_layer_interval
        for i, (layer, attend) in enumerate(zip(self.model.layers, attends, strict=True)):
            if i % every == 0:
                x = self.model.gated_cross_attn_layers[i // every](x, media, seen, attends_rows)
            x = layer(x, *angles, attend)
        return self.lm_head(self.model.norm(x))


# -------------------------------------------------------------------------------------------------------------- stages
def stages(model: Idefics, capacity: int) -> dict[str, StageSpec]:
    c, v = model.config, model.config.vision
    dtype = model.lm_head.weight.dtype
    pixels: Inputs = {"pixel_values": TensorSpec(("N", v.num_channels, v.image_size, v.image_size), dtype)}
    if c.library.use_resampler:
        rows: Inputs = {"vision_rows": TensorSpec(("N", c.vision_rows, v.embed_dim), dtype)}
        encode = {
            "encode_vision": StageSpec(
                Part(model, lambda m, x: m.model.vision_model(x), "model.vision_model"), pixels, ["vision_rows"]
            ),
            "resample": StageSpec(
                Part(model, lambda m, x: m.resample(x), "model.perceiver_resampler"), rows, ["image_rows"]
            ),
        }
    else:
        encode = {
            "encode_vision": StageSpec(
                Part(model, lambda m, x: m.encode_images(x), "model.vision_model"), pixels, ["image_rows"]
            )
        }
    text = only(model, "model.embed_tokens", "model.layers", "model.gated_cross_attn_layers", "model.norm", "lm_head")
    return encode | text_stages(text, lambda m, ids: m.model.embed_tokens(ids), c.cross, capacity, dtype)


VISION_TAPS = {"act.vision.out": "model.vision_model", "act.perceiver.out": "model.perceiver_resampler"}
LANGUAGE_TAPS = {
    "act.lm.embed": "model.embed_tokens",
    "act.xattn{}.attn_pregate": "model.gated_cross_attn_layers.{}.cross_attn",
    "act.xattn{}.mlp_pregate": "model.gated_cross_attn_layers.{}.mlp",
    "act.xattn{}.out": "model.gated_cross_attn_layers.{}",
    "act.lm.layer{}.out": "model.layers.{}",
    "act.lm.final_norm": "model.norm",
}


def cases(config: Config) -> Cases:
    made = {"act.vision.out": "vision_rows", "act.perceiver.out": "image_rows", "act.lm.embed": "text"}
    return Cases(
        VISION_TAPS,
        {},
        LANGUAGE_TAPS,
        atol=1e-4,
        rtol=1e-4,
        recordings=(Recording(RECORDED | {"in.image_attention_mask": "in.seen"}, needs=("in.input_ids",)),),
        values=made if config.library.use_resampler else made | {"act.vision.out": "image_rows"},
        zeroed=("act.xattn{}.attn_pregate",),
        left_padding=True,
    )


def check_derived(config: Config, name: str, value: Tensor) -> str | None:
    if name.endswith("inv_freq"):
        return None  # half-precision files hold a rounded copy; the config is the truth
    expected = torch.arange(config.vision_rows)
    return None if torch.equal(value.flatten().cpu(), expected) else f"expected 0 to {config.vision_rows - 1}"


def image_processing(config: Config, preprocessor: dict) -> dict:
    """config.json and preprocessor_config.json (may be empty) -> the fields of `ImageProcessor`."""
    size = config.vision.image_size
    for key in ("size", "image_size"):
        given = preprocessor.get(key, size)
        given = given.get("height") if isinstance(given, dict) else given
        if given != size:
            raise ValueError(f"preprocessor_config.json: {key} is {given}, but the vision tower takes {size} pixels")
    return {
        "size": size,
        "mean": preprocessor.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "std": preprocessor.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
        "mode": "squash",
    }


FAMILY = Family(
    name="idefics",
    architectures=("IdeficsForVisionText2Text",),
    model_types=("idefics",),
    parse_config=parse_config,
    build=Idefics,
    stages=stages,
    derived=r"rotary_emb\.inv_freq$|embeddings\.position_ids$",
    check_derived=check_derived,
    image_id=lambda config: config.image_token_id,
    image_marker=IMAGE_MARKER,
    image_processing=image_processing,
    chat={
        "user": "User:",
        "assistant": "Assistant:",
        "separator": "\n",
        "end": "\n",
        "image": FAKE_TOKEN + IMAGE_MARKER + FAKE_TOKEN,
    },
    cases=cases,
    cross=lambda config: config.cross,
)
