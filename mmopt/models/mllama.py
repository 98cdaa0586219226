"""Llama 3.2 Vision: Grattafiori et al. 2024, arXiv:2407.21783; reference implementation MllamaForConditionalGeneration
of transformers.

An image is cut into tiles that a two-stage vision tower reads together. Some layers of the LLaMA have gated
cross-attention to the rows of all tiles in the place of self-attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    refuse,
    text_stages,
    with_plain_norms,
)
from mmopt.spec.model_info import Cross

IMAGE_MARKER = "<|image|>"


class Config:
    """The library's config, and what mmopt asks a config for."""

    tokens_per_image = 1  # the image marker is a token like others; images lie outside the text
    tie_word_embeddings = False  # the embedding has 8 rows more than the head

    def __init__(self, library_config: Any):
        self.library, self.vision = library_config, library_config.vision_config
        c = self.text = library_config.text_config
        self.cross_layers = sorted(c.cross_attention_layers)
        self.hidden_size = c.hidden_size
        self.num_hidden_layers = c.num_hidden_layers - len(self.cross_layers)  # those with a KV cache
        self.num_attention_heads, self.num_key_value_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.vocab_size, self.max_position_embeddings = c.vocab_size, c.max_position_embeddings
        self.bos_token_id, self.eos_token_id = c.bos_token_id, c.eos_token_id
        self.image_token_id = library_config.image_token_index

    @property
    def vision_rows(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2 + 1

    @property
    def cross(self) -> Cross:
        return Cross(
            self.vision.max_num_tiles,
            self.vision_rows,
            self.hidden_size,
            leading_text="all_images",
            merge_adjacent=True,
        )


def parse_config(raw: dict) -> Config:
    """config.json -> Config. ValueError names each value that is inconsistent or not supported."""
    c = library_config("MllamaConfig", raw)
    v, t = c.vision_config, c.text_config
    wrong = check_language(t, "text_config.", t.num_key_value_heads)
    wrong += check(t, "text_config.", {"tie_word_embeddings": False})
    wrong += check(v, "vision_config.", {"hidden_act": ("gelu", "quick_gelu", "relu")})
    layers, cross = range(t.num_hidden_layers), t.cross_attention_layers
    if len(set(cross)) != len(cross) or not set(cross) < set(layers):
        wrong.append(f"text_config.cross_attention_layers {cross} must be some of the {len(layers)} layers")
    if not isinstance(v.image_size, int) or not isinstance(v.patch_size, int) or v.image_size % v.patch_size:
        wrong.append(f"vision_config.image_size {v.image_size} must be a multiple of patch_size {v.patch_size}")
    if v.hidden_size % v.attention_heads:
        wrong.append(f"vision_config.hidden_size {v.hidden_size} must divide into {v.attention_heads} attention_heads")
    if any(h * w > v.max_num_tiles for h, w in v.supported_aspect_ratios):
        wrong.append(
            f"vision_config.supported_aspect_ratios {v.supported_aspect_ratios} must have at most max_num_tiles "
            f"{v.max_num_tiles} tiles each"
        )
    chosen = v.intermediate_layers_indices
    if v.vision_output_dim != v.hidden_size * (1 + len(chosen)):
        wrong.append(
            f"vision_config.vision_output_dim {v.vision_output_dim} must be hidden_size {v.hidden_size} times one more "
            f"than the {len(chosen)} intermediate_layers_indices"
        )
    if not set(chosen) <= set(range(v.num_hidden_layers)):
        wrong.append(f"vision_config.intermediate_layers_indices {chosen} must be below {v.num_hidden_layers}")
    refuse(wrong)
    return Config(c)


# -------------------------------------------------------------------------------------------------------------- images
class VisionModel(Adopted):
    """Tiles ``[N, tiles, 3, H, W]`` -> rows ``[N, tiles, 1 + patches, output width]``.

    The rows of each tile are filled up to a multiple of 8. Real rows see those as well, as the reference has it: only
    what is filled up, tiles that an image does not have included, does not see itself.
    """

    def __init__(self, source: Any, config: Any):
        super().__init__(source)
        self.chosen = config.intermediate_layers_indices
        for encoder in (self.transformer, self.global_transformer):
            for layer in encoder.layers:
                layer.self_attn = VisionAttention(layer.self_attn, config.attention_heads, "o_proj")

    def forward(self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor) -> Tensor:
        n, tiles = pixel_values.shape[:2]
        patches = self.patch_embedding
        x = F.conv2d(pixel_values.flatten(0, 1), patches.weight, stride=patches.stride).flatten(2).transpose(1, 2)
        x = x.view(n, tiles, x.shape[1], x.shape[2])
        x = self.pre_tile_positional_embedding(x, aspect_ratio_ids)
        x = torch.cat([self.class_embedding.expand(n, tiles, 1, -1), x], dim=2)
        x = self.layernorm_pre(self.gated_positional_embedding(x, aspect_ratio_ids))
        real, width = x.shape[2], x.shape[3]
        rows = -(-real // 8) * 8
        x = torch.cat([x, x.new_zeros(n, tiles, rows - real, width)], dim=2)
        there = (aspect_ratio_mask > 0) | (torch.arange(tiles, device=x.device) < 1)  # every image has a first tile
        counts = (there[:, :, None] & (torch.arange(rows, device=x.device) < real)).flatten(1)
        mask = counts[:, :, None] | counts[:, None, :]

        x, kept = x.flatten(1, 2), []
        for i, layer in enumerate(self.transformer.layers):
            x = layer(x, mask)
            kept += [x] if i in self.chosen else []
        x = self.layernorm_post(x).view(n, tiles, rows, width)
        x = self.post_tile_positional_embedding(x, aspect_ratio_ids).flatten(1, 2)
        for layer in self.global_transformer.layers:
            x = layer(x, mask)
        # feature by feature, and for each feature layer by layer
        middle = torch.cat([kept[sorted(self.chosen).index(i)][..., None] for i in self.chosen], dim=-1).flatten(2)
        return torch.cat([y.view(n, tiles, rows, y.shape[2])[:, :, :real] for y in (x, middle)], dim=-1)


# ------------------------------------------------------------------------------------------------------ language model
class CrossLayer(Adopted):
    """Rows that see no tile get the attention all the same, but no MLP; rows that do not attend stay as they are."""

    def __init__(self, source: Any, heads: int, kv_heads: int):
        super().__init__(source)
        self.cross_attn = CrossAttention(source.cross_attn, heads, kv_heads, ("q_norm", "k_norm"))

    def forward(self, x: Tensor, media: Tensor, seen: Tensor, attends: Tensor, sees: Tensor) -> Tensor:
        attended = self.cross_attn(self.input_layernorm(x), media, seen, attends)
        x = x + self.cross_attn_attn_gate.tanh() * attended
        made = self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))
        return x + made * sees[..., None]


class Mllama(CrossModel):
    def __init__(self, config: Config):
        super().__init__(config)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        whole = with_plain_norms(library().MllamaForConditionalGeneration(config.library))
        text = whole.model.language_model
        self.take_frequencies(type(text.rotary_emb), config.text)
        self.vision_model = VisionModel(whole.model.vision_model, config.vision)
        self.multi_modal_projector = whole.model.multi_modal_projector
        self.language_model = nn.Module()  # named as in the published files
        self.language_model.model = Adopted(text, leave=("rotary_emb",))
        self.language_model.lm_head = whole.lm_head
        self.language_model.model.layers = nn.ModuleList(
            (CrossLayer if i in config.cross_layers else DecoderLayer)(x, heads, kv_heads)
            for i, x in enumerate(text.layers)
        )

    def encode_images(self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor) -> Tensor:
        return self.multi_modal_projector(self.vision_model(pixel_values, aspect_ratio_ids, aspect_ratio_mask))

    def decode_rows(self, x, angles, media, sight, attends):
        attend = iter(attends)
        for layer in self.language_model.model.layers:
            x = layer(x, media, *sight) if isinstance(layer, CrossLayer) else layer(x, *angles, next(attend))
        return self.language_model.lm_head(self.language_model.model.norm(x))


# -------------------------------------------------------------------------------------------------------------- stages
def stages(model: Mllama, capacity: int) -> dict[str, StageSpec]:
    c, v = model.config, model.config.vision
    tiles, dtype = v.max_num_tiles, model.multi_modal_projector.weight.dtype
    images: Inputs = {
        "pixel_values": TensorSpec(("N", tiles, v.num_channels, v.image_size, v.image_size), dtype),
        "aspect_ratio_ids": TensorSpec(("N",), torch.int64),
        "aspect_ratio_mask": TensorSpec(("N", tiles), torch.int64),
    }
    rows: Inputs = {"vision_rows": TensorSpec(("N", tiles, c.vision_rows, v.vision_output_dim), dtype)}
    return {
        "encode_vision": StageSpec(
            Part(model, lambda m, *x: m.vision_model(*x), "vision_model"), images, ["vision_rows"]
        ),
        "resample": StageSpec(
            Part(model, lambda m, x: m.multi_modal_projector(x), "multi_modal_projector"), rows, ["image_rows"]
        ),
        **text_stages(
            only(model, "language_model"),
            lambda m, ids: m.language_model.model.embed_tokens(ids),
            c.cross,
            capacity,
            dtype,
            sees=True,
        ),
    }


VISION_TAPS = {"act.vision.out": "vision_model", "act.projector.out": "multi_modal_projector"}
LANGUAGE_TAPS = {
    "act.lm.embed": "language_model.model.embed_tokens",
    "act.lm.layer{}.xattn_pregate": "language_model.model.layers.{}.cross_attn",
    "act.lm.layer{}.mlp_pregate_premask": "language_model.model.layers.{}.mlp",
    "act.lm.layer{}.out": "language_model.model.layers.{}",
    "act.lm.final_norm": "language_model.model.norm",
}


def image_processing(config: Config, preprocessor: dict) -> dict:
    """config.json and preprocessor_config.json (may be empty) -> the fields of `TileProcessor`."""
    size, tiles = config.vision.image_size, config.vision.max_num_tiles
    given = preprocessor.get("size", size)
    given = given.get("height") if isinstance(given, dict) else given
    if given != size or preprocessor.get("max_image_tiles", tiles) != tiles:
        raise ValueError(
            f"preprocessor_config.json: size is {given} and max_image_tiles "
            f"{preprocessor.get('max_image_tiles', tiles)}, but the vision tower takes {tiles} tiles of {size} pixels"
        )
    return {
        "size": size,
        "mean": preprocessor.get("image_mean", [0.5, 0.5, 0.5]),
        "std": preprocessor.get("image_std", [0.5, 0.5, 0.5]),
        "ratios": [list(r) for r in config.vision.supported_aspect_ratios],
        "tiles": tiles,
        "resample": {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[preprocessor.get("resample", 2)],
    }


FAMILY = Family(
    name="mllama",
    architectures=("MllamaForConditionalGeneration",),
    model_types=("mllama",),
    parse_config=parse_config,
    build=Mllama,
    stages=stages,
    derived=r"rotary_emb\.inv_freq$",
    check_derived=lambda config, name, value: None,  # half-precision files hold a rounded copy
    image_id=lambda config: config.image_token_id,
    image_marker=IMAGE_MARKER,
    image_processing=image_processing,
    chat={
        "user": "<|start_header_id|>user<|end_header_id|>\n\n",
        "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "separator": "<|eot_id|>",
        "end": "<|eot_id|>",
        "image": IMAGE_MARKER,
    },
    cases=Cases(
        VISION_TAPS,
        {},
        LANGUAGE_TAPS,
        atol=1e-4,
        rtol=1e-4,
        recordings=(
            Recording(
                RECORDED | {"in.cross_attention_mask": "in.seen", "in.aspect_ratio_*": "in.image.aspect_ratio_*"},
                needs=("in.input_ids",),
            ),
        ),
        values={"act.vision.out": "vision_rows", "act.projector.out": "image_rows", "act.lm.embed": "text"},
        tiles="aspect_ratio_mask",
        left_padding=True,
    ),
    cross=lambda config: config.cross,
)
