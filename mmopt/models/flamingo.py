"""Flamingo: Alayrac et al. 2022, arXiv:2204.14198; reference implementation OpenFlamingo (mlfoundations/open_flamingo).

A CLIP vision tower, a perceiver resampler that turns the patch rows of each image into a few latent rows, and a
language model with gated cross-attention to those rows before some of its layers. A video is an image of several
frames, whose patch rows the resampler reads together. Modules are named as the official state dict names them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.ir import ops
from mmopt.ir.capture import StageSpec, TensorSpec
from mmopt.models._decoder_config import DecoderConfig, read_decoder_config
from mmopt.models._decoders import ACTIVATIONS, Decoder
from mmopt.models._family import Family, read_config
from mmopt.models._flamingo_cases import cases
from mmopt.models._openflamingo import END_OF_CHUNK, IMAGE, assemble
from mmopt.models._stages import Part, only
from mmopt.spec.model_info import Cross


@dataclass(frozen=True)
class VisionConfig:
    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    output_dim: int | None = None  # columns of `proj`, which nothing here reads; None: the checkpoint has none
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    ln_post: bool = False  # newer open_clip (3.x) norms all rows before they are handed out; official numbers do not

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class PerceiverConfig:
    depth: int = 6
    dim_head: int = 64
    heads: int = 8
    num_latents: int = 64
    ff_mult: int = 4
    max_num_media: int | None = None
    max_num_frames: int | None = None


@dataclass(frozen=True)
class GateConfig:
    dim_head: int = 64
    heads: int = 8
    ff_mult: int = 4


@dataclass(frozen=True)
class Config:
    vision: VisionConfig
    perceiver: PerceiverConfig
    gated: GateConfig
    lm: DecoderConfig
    gated_layers: tuple[int, ...]
    eos_token_id: int
    media_token_id: int
    pad_token_id: int | None = None

    hidden_size = property(lambda self: self.lm.hidden_size)
    vocab_size = property(lambda self: self.lm.vocab_size)
    num_hidden_layers = property(lambda self: self.lm.num_hidden_layers)
    num_key_value_heads = property(lambda self: self.lm.num_key_value_heads)
    head_dim = property(lambda self: self.lm.head_dim)
    max_position_embeddings = property(lambda self: self.lm.max_position_embeddings)
    bos_token_id = property(lambda self: self.lm.bos_token_id)
    tie_word_embeddings = property(lambda self: self.lm.tie_word_embeddings)
    tokens_per_image = property(lambda self: 1)  # the marker's own row: images lie outside the text
    max_frames = property(lambda self: self.perceiver.max_num_frames)  # None: any number


# Values that would change the maths and that this implementation does not know are refused by name.
FIXED: dict[str, dict] = {
    "model.vision": {},
    "model.perceiver": {},
    "model.gated_cross_attn": {"only_attend_immediate_media": True},
}


def parse_config(raw: dict) -> Config:
    """config.json -> Config. ValueError names each value that is missing, inconsistent or not supported."""
    m = raw.get("model", raw)
    vision = read_config(VisionConfig, m.get("vision") or {}, FIXED, "model.vision")
    perceiver = read_config(PerceiverConfig, m.get("perceiver") or {}, FIXED, "model.perceiver")
    gated = read_config(GateConfig, m.get("gated_cross_attn") or {}, FIXED, "model.gated_cross_attn")
    lm = m.get("lm") or {}
    decoder = read_decoder_config(
        lm.get("type"), lm.get("hf_config") or {}, "model.lm.hf_config", m.get("vocab_size_after_resize")
    )
    wrong = []
    if vision.image_size % vision.patch_size or vision.width % vision.heads:
        wrong.append("model.vision: image_size must be a multiple of patch_size, and width of heads")
    if perceiver.max_num_media is not None:
        wrong.append(
            f"model.perceiver.max_num_media is {perceiver.max_num_media}, only None is supported: with media time "
            "embeddings an image's rows depend on its place in the prompt, and here each image is encoded by itself"
        )
    if vision.act not in ACTIVATIONS:
        wrong.append(f"model.vision.act is {vision.act!r}, expected one of {', '.join(ACTIVATIONS)}")
    n, every = decoder.num_hidden_layers, m.get("cross_attn_every_n_layers", 1)
    layers = tuple(raw.get("gated_layer_indices") or m.get("gated_layer_indices") or range(every - 1, n, every))
    if not layers or not all(0 <= i < decoder.num_hidden_layers for i in layers):
        wrong.append(f"gated_layer_indices is {layers}, expected some of 0 to {decoder.num_hidden_layers - 1}")
    for name in ("eoc_token_id", "media_token_id"):
        if not isinstance(m.get(name), int) or not 0 <= m[name] < decoder.vocab_size:
            wrong.append(f"model.{name} is {m.get(name)!r}, expected an id below {decoder.vocab_size}")
    if wrong:
        raise ValueError("config.json: " + "; ".join(wrong))
    ids = m["eoc_token_id"], m["media_token_id"], m.get("pad_token_id")
    return Config(vision, perceiver, gated, decoder, layers, *ids)


# ------------------------------------------------------------------------------------------------------ vision tower
class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * c.width, c.width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * c.width))
        self.out_proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv, d = F.linear(x, self.in_proj_weight, self.in_proj_bias), x.shape[2]
        q, k, v = qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :]
        return self.out_proj(ops.attention(q, k, v, self.heads, self.heads))


class VisionMLP(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.act = ACTIVATIONS[c.act]
        self.c_fc = nn.Linear(c.width, int(c.width * c.mlp_ratio))
        self.c_proj = nn.Linear(int(c.width * c.mlp_ratio), c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.width, eps=c.ln_eps)
        self.attn = VisionAttention(c)
        self.ln_2 = nn.LayerNorm(c.width, eps=c.ln_eps)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """CLIP's `visual`: pixel_values ``[N, 3, H, W]`` -> patch rows ``[N, patches, width]``, without the class row.

    `ln_post` and `proj` belong to the checkpoint; the model reads neither, or `ln_post` alone if the config says so.
    """

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm_rows = c.ln_post
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(c.width))
        self.positional_embedding = nn.Parameter(torch.empty(c.grid**2 + 1, c.width))
        self.ln_pre = nn.LayerNorm(c.width, eps=c.ln_eps)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(VisionBlock(c) for _ in range(c.layers))
        self.ln_post = nn.LayerNorm(c.width, eps=c.ln_eps)
        if c.output_dim is not None:
            self.proj = nn.Parameter(torch.empty(c.width, c.output_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        x = x[:, 1:]
        return self.ln_post(x) if self.norm_rows else x


# --------------------------------------------------------------------------------------------------------- resampler
def feed_forward(width: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, mult * width, bias=False),
        nn.GELU(),
        nn.Linear(mult * width, width, bias=False),
    )


class PerceiverAttention(nn.Module):
    def __init__(self, width: int, c: PerceiverConfig):
        super().__init__()
        self.heads, self.inner = c.heads, c.heads * c.dim_head
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, self.inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * self.inner, bias=False)
        self.to_out = nn.Linear(self.inner, width, bias=False)

    def forward(self, rows: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        kv = self.to_kv(torch.cat([self.norm_media(rows), latents], dim=1))
        k, v = kv[..., : self.inner], kv[..., self.inner :]
        return self.to_out(ops.attention(self.to_q(latents), k, v, self.heads, self.heads))


class Perceiver(nn.Module):
    """Vision rows ``[N, frames * patches, width]`` -> latent rows ``[N, num_latents, width]``.

    Frames and their patches lie one after another. media ``[N]``: the number of each image within its sample, read only
    by a resampler with media time embeddings.
    """

    def __init__(self, width: int, c: PerceiverConfig):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(c.num_latents, width))
        if c.max_num_frames is not None:
            self.frame_embs = nn.Parameter(torch.empty(c.max_num_frames, width))
        if c.max_num_media is not None:
            self.media_time_embs = nn.Parameter(torch.empty(c.max_num_media, 1, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, c), feed_forward(width, c.ff_mult)]) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, rows: Tensor, frames: int = 1, media: Tensor | None = None) -> Tensor:
        if hasattr(self, "frame_embs"):
            times = F.embedding(torch.arange(frames, device=rows.device), self.frame_embs)
            rows = (rows.unflatten(1, (frames, -1)) + times[:, None]).flatten(1, 2)
        if hasattr(self, "media_time_embs"):
            assert media is not None
            rows = rows + F.embedding(media, self.media_time_embs[:, 0])[:, None]
        x = self.latents.expand(rows.shape[0], -1, -1)
        for attention, ff in self.layers:
            x = x + attention(rows, x)
            x = x + ff(x)
        return self.norm(x)


# --------------------------------------------------------------------------------------------- gated cross-attention
class GatedAttention(nn.Module):
    def __init__(self, width: int, media_width: int, c: GateConfig):
        super().__init__()
        self.heads, self.inner = c.heads, c.heads * c.dim_head
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, self.inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * self.inner, bias=False)
        self.to_out = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor, media: Tensor, seen: Tensor, attends: Tensor) -> Tensor:
        kv = self.to_kv(media)
        k, v = kv[..., : self.inner], kv[..., self.inner :]
        return self.to_out(ops.cross_attention(self.to_q(self.norm(x)), k, v, seen, attends, self.heads, self.heads))


class GatedBlock(nn.Module):
    def __init__(self, width: int, media_width: int, c: GateConfig):
        super().__init__()
        self.attn = GatedAttention(width, media_width, c)
        self.attn_gate = nn.Parameter(torch.empty(1))
        self.ff = feed_forward(width, c.ff_mult)
        self.ff_gate = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, media: Tensor, seen: Tensor, attends: Tensor) -> Tensor:
        x = x + self.attn(x, media, seen, attends) * self.attn_gate.tanh()
        return x + self.ff(x) * self.ff_gate.tanh()


class FlamingoLayer(nn.Module):
    def __init__(self, decoder_layer: nn.Module, gated: GatedBlock | None):
        super().__init__()
        self.gated_cross_attn_layer = gated
        self.decoder_layer = decoder_layer

    def forward(self, x: Tensor, cos, sin, attend, media: Tensor, seen: Tensor, attends: Tensor) -> Tensor:
        if self.gated_cross_attn_layer is not None:
            x = self.gated_cross_attn_layer(x, media, seen, attends)
        return self.decoder_layer(x, cos, sin, attend)


class Flamingo(nn.Module):
    """The whole model. `forward` is the plain definition on full sequences; the stages below are what is compiled."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, media_width = config.lm.hidden_size, config.vision.width
        self.vision_encoder = VisionTower(config.vision)
        self.perceiver = Perceiver(media_width, config.perceiver)

        def wrap(i: int, layer: nn.Module) -> nn.Module:
            gated = GatedBlock(width, media_width, config.gated) if i in config.gated_layers else None
            return FlamingoLayer(layer, gated)

        self.lang_encoder = Decoder(config.lm, wrap)

    def tie_weights(self) -> None:
        self.lang_encoder.tie_weights()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` or videos ``[N, frames, 3, H, W]`` -> one block of latent rows each
        ``[N, 1, num_latents, width]``."""
        return self.resample(self.encode_frames(pixel_values if pixel_values.dim() == 5 else pixel_values[:, None]))

    def encode_frames(self, pixel_values: Tensor) -> Tensor:
        """``[N, frames, 3, H, W]`` -> patch rows ``[N, frames, patches, width]``"""
        rows = self.vision_encoder(pixel_values.flatten(0, 1))
        return rows.reshape(*pixel_values.shape[:2], *rows.shape[1:])

    def resample(self, rows: Tensor) -> Tensor:
        """``[N, frames, patches, width]`` -> ``[N, 1, num_latents, width]``"""
        return self.perceiver(rows.flatten(1, 2), rows.shape[1]).unsqueeze(1)

    def forward(self, x: Tensor, media: Tensor, seen: Tensor, attends: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text rows x ``[B, S, hidden]`` beside media ``[B, blocks, num_latents, width]`` -> logits ``[B, S, vocab]``.

        seen ``[B, S, blocks]``, attends ``[B, S]``: see `ops.cross_attention`. mask ``[B, S]`` is True for real rows.
        """
        return self.lang_encoder(x, mask, media, seen, attends)


# ------------------------------------------------------------------------------------------------------------ stages
class LanguageModel(nn.Module):
    """Some text rows on top of a cache, beside all images of the sample."""

    def __init__(self, model: Flamingo):
        super().__init__()
        self.root = model

    def forward(
        self,
        text: Tensor,
        media: Tensor,
        seen: Tensor,
        attends: Tensor,
        past: Tensor,
        key_cache: list[Tensor],
        value_cache: list[Tensor],
    ):
        return self.root.lang_encoder.step(text, past, key_cache, value_cache, media, seen, attends)


def stages(model: Flamingo, capacity: int) -> dict[str, StageSpec]:
    c, v, n = model.config, model.config.vision, model.config.perceiver.num_latents
    dtype = model.perceiver.latents.dtype
    cache = [TensorSpec(("B", c.num_key_value_heads, capacity, c.head_dim), dtype)] * c.num_hidden_layers
    pixels = TensorSpec(("N", "F", 3, v.image_size, v.image_size), dtype)
    vision_rows = TensorSpec(("N", "F", v.grid**2, v.width), dtype)
    return {
        "encode_vision": StageSpec(
            Part(model, lambda m, x: m.encode_frames(x), "vision_encoder"), {"pixel_values": pixels}, ["vision_rows"]
        ),
        "resample": StageSpec(
            Part(model, lambda m, x: m.resample(x), "perceiver"), {"vision_rows": vision_rows}, ["image_rows"]
        ),
        "embed": StageSpec(
            Part(model, lambda m, x: m.lang_encoder.embedding(x), "lang_encoder"),
            {"ids": TensorSpec(("B", "nt"), torch.int64)},
            ["text"],
        ),
        "language_model": StageSpec(
            LanguageModel(only(model, "lang_encoder")),
            {
                "text": TensorSpec(("B", "nt", c.hidden_size), dtype),
                "media": TensorSpec(("B", "nb", n, v.width), dtype),
                "seen": TensorSpec(("B", "nt", "nb"), torch.bool),
                "attends": TensorSpec(("B", "nt"), torch.bool),
                "past": TensorSpec(("B",), torch.int64),
                "key_cache": cache,
                "value_cache": cache,
            },
            ["logits", "past", "key_cache", "value_cache"],
        ),
    }


def image_processing(config: Config, preprocessor: dict) -> dict:
    """OpenAI CLIP's: shorter side bicubic, centre crop, CLIP's mean and standard deviation."""
    return {
        "size": config.vision.image_size,
        "mean": preprocessor.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "std": preprocessor.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
        "mode": "plain",
    }


FAMILY = Family(
    name="flamingo",
    architectures=("Flamingo",),
    model_types=("open_flamingo",),
    parse_config=parse_config,
    build=Flamingo,
    stages=stages,
    derived=r"attention\.bias$|attention\.masked_bias$|rotary_emb\.inv_freq$|decoder\.version$|vision_encoder\.proj$",
    check_derived=lambda config, name, value: None,
    image_id=lambda config: config.media_token_id,
    image_marker=IMAGE,
    image_processing=image_processing,
    chat={"user": "", "assistant": "", "separator": "", "end": END_OF_CHUNK, "image": IMAGE},
    cases=cases,
    cross=lambda c: Cross(tiles=1, tokens=c.perceiver.num_latents, width=c.vision.width, marker_resets=True),
    recognises=lambda raw: isinstance(raw.get("model"), dict) and "perceiver" in raw["model"],
    weight_key=r"^(module\.)*(perceiver\.latents$|lang_encoder\..*gated_cross_attn_layer)",
    assemble=assemble,
)
