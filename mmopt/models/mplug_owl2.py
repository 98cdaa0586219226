"""mPLUG-Owl2 (LLaMA-2 variant): Ye et al. 2023, arXiv:2311.04257; reference implementation X-PLUG/mPLUG-Owl.

A CLIP-like vision tower, an abstractor that turns the patch rows into a few query rows, and a LLaMA whose norms and key
and value projections exist twice: branch 0 for text rows, branch 1 for visual rows. Modules are named as the official
state dict names them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.ir import ops
from mmopt.ir.capture import StageSpec, TensorSpec
from mmopt.models._decoders import LlamaMLP, RMSNorm
from mmopt.models._family import Cases, Family, read_config
from mmopt.models._stages import Part, on_caches, only

IMAGE_ID = -200  # the reference's placeholder for one image among token ids
IMAGE_MARKER = "<|image|>"


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class AbstractorConfig:
    hidden_size: int = 1024
    encoder_hidden_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    num_learnable_queries: int = 64
    grid_size: int = 32
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class Config:
    vision: VisionConfig
    abstractor: AbstractorConfig
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    intermediate_size: int = 11008
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int = 2
    image_aspect_ratio: str = "resize"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def tokens_per_image(self) -> int:
        return self.abstractor.num_learnable_queries + 1


# Values that would change the maths and that this implementation does not know are refused by name.
FIXED: dict[str, dict] = {
    "": {
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "model_type": "mplug_owl2",
        "sliding_window": None,
    },
    "visual_config.visual_model": {
        "hidden_act": "quick_gelu",
        "use_cls_token": True,
        "use_post_layernorm": True,
        "model_type": "mplug_owl_vision_model",
    },
    "visual_config.visual_abstractor": {
        "add_v2t_pos_emb": False,
        "use_cls_token": True,
        "model_type": "mplug_owl_visual_abstract",
    },
}


def parse_config(raw: dict) -> Config:
    """config.json -> Config. ValueError names each value that is missing, inconsistent or not supported."""
    visual = raw.get("visual_config") or {}
    vision = read_config(VisionConfig, visual.get("visual_model") or {}, FIXED, "visual_config.visual_model")
    abstractor = read_config(
        AbstractorConfig, visual.get("visual_abstractor") or {}, FIXED, "visual_config.visual_abstractor"
    )
    defaults = {"num_key_value_heads": raw.get("num_attention_heads", 32)}
    c = read_config(Config, {**defaults, **raw}, FIXED, "", vision=vision, abstractor=abstractor)
    wrong = []
    if c.image_aspect_ratio not in ("resize", "pad", "plain"):
        wrong.append(f"image_aspect_ratio is {c.image_aspect_ratio!r}, expected 'resize', 'pad' or 'plain'")
    if c.hidden_size % c.num_attention_heads or c.num_attention_heads % c.num_key_value_heads or c.head_dim % 2:
        wrong.append(
            f"hidden_size {c.hidden_size} must divide into num_attention_heads {c.num_attention_heads} of even size, "
            f"and these into num_key_value_heads {c.num_key_value_heads} groups"
        )
    if vision.image_size % vision.patch_size:
        wrong.append(f"image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}")
    if abstractor.grid_size != vision.grid:
        wrong.append(f"grid_size {abstractor.grid_size} must equal image_size / patch_size = {vision.grid}")
    if not abstractor.hidden_size == abstractor.encoder_hidden_size == vision.hidden_size:
        wrong.append(
            f"abstractor hidden_size {abstractor.hidden_size}, encoder_hidden_size {abstractor.encoder_hidden_size} "
            f"and vision hidden_size {vision.hidden_size} must be equal"
        )
    if vision.hidden_size % vision.num_attention_heads or abstractor.hidden_size % abstractor.num_attention_heads:
        wrong.append("vision and abstractor hidden sizes must divide into their num_attention_heads")
    if abstractor.hidden_size % 4:
        wrong.append(f"abstractor hidden_size {abstractor.hidden_size} must be a multiple of 4 (2-D positions)")
    if wrong:
        raise ValueError("config.json: " + "; ".join(wrong))
    return c


# ---------------------------------------------------------------------------------------------------- vision tower
class VisionEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.stride = c.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(1, c.grid**2 + 1, c.hidden_size))
        self.patch_embed = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.pre_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        rows = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.pre_layernorm(rows + self.position_embedding)


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.query_key_value = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # q, k and v of head 0, then of head 1, ...: the official layout is interleaved by head
        qkv = self.query_key_value(x).view(*x.shape[:2], self.heads, 3, -1)
        q, k, v = (qkv[:, :, :, i].reshape(x.shape) for i in range(3))
        return self.dense(ops.attention(q, k, v, self.heads, self.heads))


class VisionMLP(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.fc2(y * torch.sigmoid(1.702 * y))


class VisionLayer(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.self_attn = VisionAttention(c)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionModel(nn.Module):
    """pixel_values ``[N, 3, H, W]`` -> rows ``[N, 1 + patches, width]``; all rows go on, the class row included."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embeddings(pixel_values)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


# ------------------------------------------------------------------------------------------------------ abstractor
def sincos(width: int, positions: Tensor) -> Tensor:
    """[sin(p w) | cos(p w)] with ``w_i = 10000 ** (-2i / width)`` -> ``[len(positions), width]`` in float32."""
    w = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2))
    angles = positions.double()[:, None] * w
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def abstractor_positions(c: AbstractorConfig) -> tuple[Tensor, Tensor]:
    """Fixed positions of the query rows ``[queries, D]`` and of the vision rows ``[1 + grid**2, D]`` (class row: 0)."""
    steps = torch.arange(c.grid_size, device="cpu")
    column, row = steps.repeat(c.grid_size), steps.repeat_interleave(c.grid_size)
    patches = torch.cat([sincos(c.hidden_size // 2, column), sincos(c.hidden_size // 2, row)], dim=1)
    queries = sincos(c.hidden_size, torch.arange(c.num_learnable_queries, device="cpu"))
    return queries, torch.cat([torch.zeros(1, c.hidden_size, device="cpu"), patches])


class CrossAttention(nn.Module):
    def __init__(self, c: AbstractorConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size)
        self.value = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, rows: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        q = self.query(x + query_positions)
        k = self.key(rows + torch.cat([query_positions, key_positions]))
        return ops.attention(q, k, self.value(rows), self.heads, self.heads)


class AbstractorMLP(nn.Module):
    def __init__(self, c: AbstractorConfig):
        super().__init__()
        self.w1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.w2 = nn.Linear(c.intermediate_size, c.hidden_size)
        self.w3 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.ffn_ln = nn.LayerNorm(c.intermediate_size, eps=c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))


class AbstractorOutput(nn.Module):
    def __init__(self, c: AbstractorConfig):
        super().__init__()
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.norm2 = nn.LayerNorm(c.hidden_size)
        self.mlp = AbstractorMLP(c)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out_proj(attended)
        return x + self.mlp(self.norm2(x))


class AbstractorBlock(nn.Module):
    def __init__(self, c: AbstractorConfig):
        super().__init__()
        self.attention = CrossAttention(c)
        self.norm1 = nn.LayerNorm(c.hidden_size)
        self.normk = nn.LayerNorm(c.hidden_size)
        self.output = AbstractorOutput(c)

    def forward(self, x: Tensor, features: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        x = self.norm1(x)  # the normalised rows replace the residual stream
        rows = torch.cat([x, self.normk(features)], dim=1)
        return self.output(x, self.attention(x, rows, query_positions, key_positions))


class AbstractorLayer(nn.Module):
    def __init__(self, c: AbstractorConfig):
        super().__init__()
        self.crossattention = AbstractorBlock(c)

    def forward(self, *args: Tensor) -> Tensor:
        return self.crossattention(*args)


class Abstractor(nn.Module):
    """Vision rows ``[N, 1 + patches, width]`` -> image rows ``[N, queries + 1, hidden]``; the last is `vit_eos`."""

    def __init__(self, c: AbstractorConfig, hidden_size: int):
        super().__init__()
        self.query_embeds = nn.Parameter(torch.empty(1, c.num_learnable_queries, c.hidden_size))
        self.vit_eos = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(AbstractorLayer(c) for _ in range(c.num_hidden_layers))
        self.visual_fc = nn.Linear(c.hidden_size, hidden_size)
        query_positions, key_positions = abstractor_positions(c)
        self.register_buffer("query_positions", query_positions, persistent=False)
        self.register_buffer("key_positions", key_positions, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        x = self.query_embeds.expand(features.shape[0], -1, -1)
        positions = self.query_positions.to(features.dtype), self.key_positions.to(features.dtype)
        for layer in self.encoder.layers:
            x = layer(x, features, *positions)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(x.shape[0], -1, -1)], dim=1)


# -------------------------------------------------------------------------------------------------- language model
class Multiway(nn.Module):
    """Branch 1 where a row is visual, branch 0 where it is text. This is the definition; no one should run it as is."""

    def __init__(self, make):
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor, is_visual: Tensor) -> Tensor:
        return torch.where(is_visual, self.multiway[1](x), self.multiway[0](x))


class SelfAttention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        kv_width = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = Multiway(lambda: nn.Linear(c.hidden_size, kv_width, bias=False))
        self.v_proj = Multiway(lambda: nn.Linear(c.hidden_size, kv_width, bias=False))
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, is_visual: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        q = ops.rotary(self.q_proj(x), cos, sin, self.heads)
        k = ops.rotary(self.k_proj(x, is_visual), cos, sin, self.kv_heads)
        return self.o_proj(attend(q, k, self.v_proj(x, is_visual)))


class DecoderLayer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = Multiway(lambda: RMSNorm(c.hidden_size, c.rms_norm_eps))
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = Multiway(lambda: RMSNorm(c.hidden_size, c.rms_norm_eps))
        self.mlp = LlamaMLP(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, is_visual: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, is_visual), is_visual, cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x, is_visual))


class Decoder(nn.Module):
    """The official `model.`: token table, decoder layers, final norm, vision tower and abstractor."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.vision_model = VisionModel(c.vision)
        self.visual_abstractor = Abstractor(c.abstractor, c.hidden_size)
        w = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim)
        self.register_buffer("inv_freq", w, persistent=False)


class MplugOwl2(nn.Module):
    """The whole model. `forward` is the plain definition on full sequences; the stages below are what is compiled."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.model.visual_abstractor(self.model.vision_model(pixel_values))

    def decode_rows(self, x: Tensor, is_visual: Tensor, positions: Tensor, attends: list) -> Tensor:
        """Rows x ``[B, n, hidden]`` at ``positions`` through all layers and the head -> logits ``[B, n, vocab]``."""
        table = torch.arange(self.config.max_position_embeddings, device=x.device)[:, None] * self.model.inv_freq
        cos, sin = F.embedding(positions, table.cos()), F.embedding(positions, table.sin())
        for layer, attend in zip(self.model.layers, attends, strict=True):
            x = layer(x, is_visual, cos, sin, attend)
        return self.lm_head(self.model.norm(x))

    def forward(self, x: Tensor, is_visual: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Right-padded rows x ``[B, S, hidden]``, is_visual ``[B, S]`` -> logits and each layer's (key, value) rows."""
        c, kept = self.config, []

        def attend(q, k, v):
            kept.append((k, v))
            return ops.attention(q, k, v, c.num_attention_heads, c.num_key_value_heads, causal=True)

        positions = torch.arange(x.shape[1], device=x.device)[None]
        logits = self.decode_rows(x, is_visual[..., None].bool(), positions, [attend] * c.num_hidden_layers)
        return logits, kept


# ---------------------------------------------------------------------------------------------------------- stages
class LanguageModel(nn.Module):
    """One chunk on top of a cache: rows of images first, then text rows."""

    def __init__(self, model: MplugOwl2):
        super().__init__()
        self.root = model

    def forward(self, visual: Tensor, text: Tensor, past: Tensor, key_cache: list[Tensor], value_cache: list[Tensor]):
        c = self.root.config
        x = torch.cat([visual, text], dim=1)
        ones = torch.ones(visual.shape[1], dtype=torch.bool, device=x.device)
        zeros = torch.zeros(text.shape[1], dtype=torch.bool, device=x.device)
        is_visual = torch.cat([ones, zeros])[None, :, None]
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        keys, values = list(key_cache), list(value_cache)

        logits = self.root.decode_rows(x, is_visual, positions, on_caches(c, keys, values, past))
        return logits, past + x.shape[1], keys, values


def stages(model: MplugOwl2, capacity: int) -> dict[str, StageSpec]:
    c, v = model.config, model.config.vision
    dtype = model.lm_head.weight.dtype
    cache = [TensorSpec(("B", c.num_key_value_heads, capacity, c.head_dim), dtype)] * c.num_hidden_layers
    vision_rows = TensorSpec(("N", v.grid**2 + 1, v.hidden_size), dtype)
    pixels = TensorSpec(("N", v.num_channels, v.image_size, v.image_size), dtype)
    rows = {n: TensorSpec(("B", s, c.hidden_size), dtype) for n, s in (("visual", "nv"), ("text", "nt"))}
    return {
        "vision": StageSpec(
            Part(model, lambda m, x: m.model.vision_model(x), "model.vision_model"),
            {"pixel_values": pixels},
            ["vision_rows"],
        ),
        "abstractor": StageSpec(
            Part(model, lambda m, x: m.model.visual_abstractor(x), "model.visual_abstractor"),
            {"vision_rows": vision_rows},
            ["image_rows"],
        ),
        "embed": StageSpec(
            Part(model, lambda m, x: m.model.embed_tokens(x), "model.embed_tokens", "lm_head"),
            {"ids": TensorSpec(("B", "nt"), torch.int64)},
            ["text"],
        ),
        "language_model": StageSpec(
            LanguageModel(only(model, "model.embed_tokens", "model.layers", "model.norm", "lm_head")),
            {**rows, "past": TensorSpec(("B",), torch.int64), "key_cache": cache, "value_cache": cache},
            ["logits", "past", "key_cache", "value_cache"],
        ),
    }


# ----------------------------------------------------------------------------------------------------------- cases
VISION_TAPS = {
    "out.vision.patch_embed_conv": "model.vision_model.embeddings.patch_embed",
    "out.vision.embeddings": "model.vision_model.embeddings",
    "out.vision.layers.{}.self_attn_output": "model.vision_model.encoder.layers.{}.self_attn",
    "out.vision.layers.{}.output": "model.vision_model.encoder.layers.{}",
    "out.vision.last_hidden_state": "model.vision_model.post_layernorm",
    "out.abstractor.layers.{}.norm1": "model.visual_abstractor.encoder.layers.{}.crossattention.norm1",
    "out.abstractor.layers.{}.normk": "model.visual_abstractor.encoder.layers.{}.crossattention.normk",
    "out.abstractor.layers.{}.attention_context": "model.visual_abstractor.encoder.layers.{}.crossattention.attention",
    "out.abstractor.layers.{}.mlp_output": "model.visual_abstractor.encoder.layers.{}.crossattention.output.mlp",
    "out.abstractor.layers.{}.output": "model.visual_abstractor.encoder.layers.{}.crossattention",
    "out.abstractor.visual_fc": "model.visual_abstractor.visual_fc",
    "out.abstractor.last_hidden_state": "model.visual_abstractor",
}
INPUT_TAPS = {"out.vision.embeddings_before_pre_layernorm": "model.vision_model.embeddings.pre_layernorm"}
LANGUAGE_TAPS = {
    "out.hidden.{+1}": "model.layers.{}",
    "out.layers.{}.input_layernorm": "model.layers.{}.input_layernorm",
    "out.layers.{}.q_proj_pre_rope": "model.layers.{}.self_attn.q_proj",
    "out.layers.{}.k_proj_pre_rope": "model.layers.{}.self_attn.k_proj",
    "out.layers.{}.v_proj_pre_rope": "model.layers.{}.self_attn.v_proj",
    "out.layers.{}.self_attn_output": "model.layers.{}.self_attn",
    "out.layers.{}.post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    "out.layers.{}.mlp_output": "model.layers.{}.mlp",
    "out.final_norm": "model.norm",
}


def check_derived(config: Config, name: str, value: Tensor) -> str | None:
    """Position buffers that a checkpoint may hold are recomputed; why the held one cannot be the same, or None."""
    if name.endswith("inv_freq"):
        return None  # bf16 files hold a rounded copy; config's rope_theta is the truth
    queries, keys = abstractor_positions(config.abstractor)
    expected = queries if name.endswith("q_pos_embed") else keys
    if value.shape != expected.shape:
        return f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
    error = float((value.float() - expected).abs().max())
    return None if error < 1e-2 else f"differs from the sine positions by {error:.3g}"


def image_processing(config: Config, preprocessor: dict) -> dict:
    """config.json and preprocessor_config.json (may be empty) -> the fields of `ImageProcessor`.

    Unset values are the reference's: CLIP's mean and standard deviation, and a squash to a square (quick start and
    evaluation scripts) unless config.json says ``image_aspect_ratio``.
    """
    size = config.vision.image_size
    for key in ("size", "crop_size"):
        given = preprocessor.get(key, size)
        given = given.get("height", given.get("shortest_edge")) if isinstance(given, dict) else given
        if given != size:
            raise ValueError(f"preprocessor_config.json: {key} is {given}, but the vision tower takes {size} pixels")
    if preprocessor.get("resample", 3) != 3 or not preprocessor.get("do_normalize", True):
        raise ValueError("preprocessor_config.json: only bicubic resampling (3) and do_normalize true are supported")
    return {
        "size": size,
        "mean": preprocessor.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "std": preprocessor.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
        "mode": config.image_aspect_ratio,
    }


FAMILY = Family(
    name="mplug_owl2",
    architectures=("MPLUGOwl2LlamaForCausalLM",),
    model_types=("mplug_owl2",),
    parse_config=parse_config,
    build=MplugOwl2,
    stages=stages,
    derived=r"rotary_emb\.inv_freq$|attention\.[qk]_pos_embed$",
    check_derived=check_derived,
    image_id=IMAGE_ID,
    image_marker=IMAGE_MARKER,
    image_processing=image_processing,
    chat={"user": "USER: ", "assistant": "ASSISTANT:", "separator": " ", "end": "</s>", "image": IMAGE_MARKER},
    cases=Cases(
        VISION_TAPS,
        INPUT_TAPS,
        LANGUAGE_TAPS,
        atol=2e-4,
        rtol=1e-4,
        values={
            "out.vision.last_hidden_state": "vision_rows",
            "out.abstractor.last_hidden_state": "image_rows",
        },
    ),
)
