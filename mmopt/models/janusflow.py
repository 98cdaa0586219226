"""JanusFlow: Ma et al. 2024, arXiv:2411.07975; reference implementation deepseek-ai/Janus (janus.janusflow).

One LLaMA reads images and text, and paints: it makes the velocity of a rectified flow from latents. Images are
understood through a SigLIP tower; latents go in and velocities come out through small convolutional stacks, and the
autoencoder of SDXL makes a picture of the last latents. Modules are named as the official state dict names them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.ir import ops
from mmopt.ir.capture import StageSpec, TensorSpec
from mmopt.models._autoencoder import AutoencoderKL
from mmopt.models._decoders import LlamaLayer, RMSNorm
from mmopt.models._family import Family
from mmopt.models._janusflow_cases import cases
from mmopt.models._janusflow_config import Config, TowerConfig, parse_config
from mmopt.models._janusflow_flow import FlowDecoder, FlowEncoder
from mmopt.models._janusflow_loading import assemble
from mmopt.models._stages import Part, on_caches, only

IMAGE_ID = -200  # stands for one image among token ids; the published tokenizer's <image_placeholder> is written there
IMAGE_MARKER, END_OF_IMAGE = "<image_placeholder>", "<end_of_image>"
END = "<｜end▁of▁sentence｜>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


# ---------------------------------------------------------------------------------------------------- vision tower
class TowerAttention(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.heads = c.heads
        self.qkv, self.proj = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(ops.attention(q, k, v, self.heads, self.heads))


class TowerMLP(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.width, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TowerBlock(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.width, eps=1e-6), TowerAttention(c)
        self.norm2, self.mlp = nn.LayerNorm(c.width, eps=1e-6), TowerMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class Tower(nn.Module):
    """pixel_values ``[N, 3, S, S]`` -> ``[N, patches, width]``; its pooling head is never used, nor built."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Parameter(torch.empty(1, c.patches, c.width))
        self.blocks = nn.ModuleList(TowerBlock(c) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# -------------------------------------------------------------------------------------------------- language model
class Llama(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(c.language) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        w = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim)
        self.register_buffer("inv_freq", w, persistent=False)


# ------------------------------------------------------------------------------------------------------------ model
class JanusFlow(nn.Module):
    """The whole model. `forward` and `paint` are the plain definition; the stages below are what is compiled."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.language_model = nn.Module()
        self.language_model.model = Llama(c)
        self.language_model.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.vision_und_enc_model = nn.Module()
        self.vision_und_enc_model.vision_tower = Tower(c.tower)
        self.vision_und_enc_aligner = nn.Linear(c.tower.width, c.hidden_size)
        self.beg_of_und_embed = nn.Parameter(torch.empty(1, c.hidden_size))
        self.vision_gen_enc_model = FlowEncoder(c.encoder)
        self.vision_gen_enc_aligner = nn.Linear(c.encoder.width, c.hidden_size)
        self.vision_gen_dec_aligner_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.vision_gen_dec_aligner = nn.Linear(c.hidden_size, c.decoder.in_channels)
        self.vision_gen_dec_model = FlowDecoder(c.decoder)
        self.vae = None if c.vae is None else AutoencoderKL(c.vae)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.language_model.model.embed_tokens(ids)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Pixels ``[N, 3, S, S]`` -> rows ``[N, 1 + patches, hidden]``: where an image begins, then its patches."""
        patches = self.vision_und_enc_aligner(self.vision_und_enc_model.vision_tower(pixel_values))
        return torch.cat([self.beg_of_und_embed.expand(patches.shape[0], 1, -1), patches], dim=1)

    def decode_rows(self, x: Tensor, positions: Tensor, attends: list) -> Tensor:
        """Rows x ``[B, n, hidden]`` at ``positions`` through all layers -> ``[B, n, hidden]``, after the last norm."""
        model = self.language_model.model
        table = torch.arange(self.config.max_position_embeddings, device=x.device)[:, None] * model.inv_freq
        cos, sin = F.embedding(positions, table.cos()), F.embedding(positions, table.sin())
        for layer, attend in zip(model.layers, attends, strict=True):
            x = layer(x, cos, sin, attend)
        return model.norm(x)

    def read(self, x: Tensor, valid: Tensor | None = None, positions: Tensor | None = None) -> tuple[Tensor, list]:
        """Rows x ``[B, n, hidden]``, one after the other -> hidden rows, and each layer's (key, value) rows.

        valid ``[B, n]``: rows that others may see (default: all). positions ``[B, n]``: by default the rows that are
        valid are counted.
        """
        c, kept = self.config, []
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid.bool()
        if positions is None:
            positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        cache = x.new_zeros(x.shape[0], c.num_key_value_heads, x.shape[1], c.head_dim)
        past = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.append((k, v))
            heads = c.num_attention_heads, c.num_key_value_heads
            return ops.cached_attention(q, k, v, cache, cache, past, *heads, None, None, valid)[0]

        return self.decode_rows(x, positions, [attend] * c.num_hidden_layers), kept

    def forward(self, x: Tensor, is_visual: Tensor | None = None, valid: Tensor | None = None) -> tuple[Tensor, list]:
        """Rows x ``[B, n, hidden]`` -> logits ``[B, n, vocab]`` and each layer's (key, value) rows; see `read`.

        It makes no difference which rows are visual.
        """
        hidden, kept = self.read(x, valid)
        return self.language_model.lm_head(hidden), kept

    # --------------------------------------------------------------------------------------------------- painting
    def flow_time(self, time: Tensor) -> Tensor:
        """Times ``[B]`` (0: noise, 1000: data) -> the row that tells the time ``[B, 1, hidden]``."""
        return self.vision_gen_enc_model.time_embed(time)[:, None]

    def flow_encode(self, latents: Tensor, time_row: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[B, c, H, W]`` -> the grid that the decoder reads too, and its rows ``[B, h w, hidden]``."""
        dtype = self.vision_gen_enc_aligner.weight.dtype
        skip = self.vision_gen_enc_model(latents.to(dtype), time_row[:, 0])
        return skip, self.vision_gen_enc_aligner(skip.flatten(2).transpose(1, 2))

    def flow_decode(self, hidden: Tensor, skip: Tensor, time_row: Tensor) -> Tensor:
        """The rows of the latents as the language model left them -> velocity ``[B, c, H, W]``, float32."""
        rows = self.vision_gen_dec_aligner(self.vision_gen_dec_aligner_norm(hidden))
        grid = rows.transpose(1, 2).reshape(rows.shape[0], rows.shape[2], *skip.shape[2:])
        return self.vision_gen_dec_model(grid, skip, time_row[:, 0]).float()

    def decode_image(self, latents: Tensor) -> Tensor:
        """Latents ``[B, c, H, W]`` -> pictures ``[B, 3, 8 H, 8 W]`` in -1 to 1, not clipped, float32."""
        if self.vae is None:
            raise ValueError(NO_VAE)
        return self.vae.image_of(latents)

    def generate_images(
        self,
        prompts: list[list[int]],
        noise: Tensor,
        steps: int = 30,
        guidance: float = 2.0,
        observe: Callable[[int, dict[str, Tensor]], None] | None = None,
    ) -> Tensor:
        """The official sampler: noise ``[G, c, H, W]`` -> latents, by Euler steps along the guided velocity.

        prompts: the ids of each picture, from the first token to one more than the text: the last id gives way to the
        row that tells the time. The unconditional half of the batch sees the first token alone, at the same positions.
        Each picture comes out as if it were painted by itself: shorter prompts are padded on the left. `observe` gets
        the number of each step and its values by name.
        """
        count, width = len(prompts), max(map(len, prompts)) - 1
        ids, pads = torch.zeros(2 * count, width, dtype=torch.int64), torch.zeros(2 * count, 1, dtype=torch.int64)
        seen = torch.zeros(2 * count, width, dtype=torch.bool)
        for b, prompt in enumerate(prompts):
            lead = width - len(prompt) + 1
            pads[[b, count + b]] = lead
            ids[b, lead:], seen[b, lead:] = torch.tensor(prompt[:-1]), True
            ids[count + b, lead], seen[count + b, lead] = prompt[0], True
        prefix, z = self.embed(ids), noise.float()
        for step in range(steps):
            time = torch.full((1,), 1000.0 * step / steps)
            time_row = self.flow_time(time).expand(2 * count, -1, -1)
            skip, tokens = self.flow_encode(torch.cat([z, z]), time_row)
            x = torch.cat([prefix, time_row, tokens], dim=1)
            valid = F.pad(seen, (0, x.shape[1] - width), value=True)
            positions = (torch.arange(x.shape[1]) - pads).clamp(min=0)
            hidden, _ = self.read(x, valid, positions)
            cond, uncond = self.flow_decode(hidden[:, -tokens.shape[1] :], skip, time_row).chunk(2)
            velocity = guidance * cond - (guidance - 1) * uncond
            z = z + velocity / steps
            if observe is not None:
                made = {"time": time, "time_row": time_row, "skip": skip, "tokens": tokens, "hidden": hidden}
                observe(step, {**made, "cond": cond, "uncond": uncond, "velocity": velocity, "latents": z})
        return z


NO_VAE = (
    "this model has no autoencoder, so latents cannot become a picture: put stabilityai/sdxl-vae in the checkpoint's "
    "folder vae, or load it with vae=DIRECTORY (--vae on the command line)"
)


# ---------------------------------------------------------------------------------------------------------- stages
class LanguageModel(nn.Module):
    """Rows on top of a cache: those of images first, then text rows."""

    def __init__(self, model: JanusFlow):
        super().__init__()
        self.root = model

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        past: Tensor,
        offset: Tensor,
        seen: Tensor,
        key_cache: list[Tensor],
        value_cache: list[Tensor],
    ):
        c = self.root.config
        x = torch.cat([visual, text], dim=1)
        # rows of padding on the left would have positions below 0
        positions = (past[:, None] + offset[:, None] + torch.arange(x.shape[1], device=x.device)).clamp(min=0)
        keys, values = list(key_cache), list(value_cache)

        hidden = self.root.decode_rows(x, positions, on_caches(c, keys, values, past, seen=seen))
        return hidden, past + x.shape[1], keys, values


def stages(model: JanusFlow, capacity: int) -> dict[str, StageSpec]:
    c, flow, side = model.config, model.config.flow, model.config.grid
    dtype = model.language_model.lm_head.weight.dtype
    rows = {n: TensorSpec(("B", s, c.hidden_size), dtype) for n, s in (("visual", "nv"), ("text", "nt"))}
    ints = {n: TensorSpec(("B",), torch.int64) for n in ("past", "offset")}
    seen = TensorSpec(("B", capacity), torch.bool)
    cache = [TensorSpec(("B", c.num_key_value_heads, capacity, c.head_dim), dtype)] * c.num_hidden_layers
    pixels = TensorSpec(("N", 3, c.tower.image_size, c.tower.image_size), dtype)
    latents, time = TensorSpec(("B", *flow.latents), torch.float32), TensorSpec(("B",), torch.float32)
    time_row = TensorSpec(("B", 1, c.hidden_size), dtype)
    image = TensorSpec(("B", flow.tokens, c.hidden_size), dtype)
    skip = TensorSpec(("B", c.encoder.width, side, side), dtype)
    made = {
        "encode_vision": StageSpec(
            Part(model, lambda m, x: m.encode_images(x), "vision_und_enc_model", "vision_und_enc_aligner"),
            {"pixel_values": pixels},
            ["image_rows"],
        ),
        "embed": StageSpec(
            Part(model, lambda m, x: m.embed(x), "language_model.model.embed_tokens", "language_model.lm_head"),
            {"ids": TensorSpec(("B", "nt"), torch.int64)},
            ["text"],
        ),
        "language_model": StageSpec(
            LanguageModel(only(model, "language_model.model")),
            {**rows, **ints, "seen": seen, "key_cache": cache, "value_cache": cache},
            ["hidden", "past", "key_cache", "value_cache"],
        ),
        "head": StageSpec(
            Part(model, lambda m, x: m.language_model.lm_head(x), "language_model"),
            {"hidden": TensorSpec(("B", "n", c.hidden_size), dtype)},
            ["logits"],
        ),
        "flow_time": StageSpec(
            Part(model, lambda m, t: m.flow_time(t), "vision_gen_enc_model"), {"time": time}, ["time_row"]
        ),
        "flow_encode": StageSpec(
            Part(model, lambda m, *x: m.flow_encode(*x), "vision_gen_enc_model", "vision_gen_enc_aligner"),
            {"latents": latents, "time_row": time_row},
            ["skip", "tokens"],
        ),
        "flow_decode": StageSpec(
            Part(
                model,
                lambda m, *x: m.flow_decode(*x),
                "vision_gen_dec_aligner_norm",
                "vision_gen_dec_aligner",
                "vision_gen_dec_model",
            ),
            {"hidden": image, "skip": skip, "time_row": time_row},
            ["velocity"],
        ),
    }
    if model.vae is not None:
        made["decode_image"] = StageSpec(
            Part(model, lambda m, z: m.decode_image(z), "vae"), {"latents": latents}, ["image"]
        )
    return made


def image_processing(config: Config, preprocessor: dict) -> dict:
    """config.json and preprocessor_config.json (may be empty) -> the fields of `ImageProcessor`.

    Unset mean and standard deviation are those of SigLIP, 0.5.
    """
    size = preprocessor.get("image_size", config.tower.image_size)
    if size != config.tower.image_size:
        raise ValueError(
            f"preprocessor_config.json: image_size is {size}, but the vision tower takes {config.tower.image_size}"
        )
    if not preprocessor.get("do_normalize", True) or abs(preprocessor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError("preprocessor_config.json: only do_normalize true and rescale_factor 1 / 255 are supported")
    return {
        "size": size,
        "mean": preprocessor.get("image_mean", [0.5, 0.5, 0.5]),
        "std": preprocessor.get("image_std", [0.5, 0.5, 0.5]),
        "mode": "fit",
        "smallest": preprocessor.get("min_size", 14),
    }


FAMILY = Family(
    name="janusflow",
    architectures=("MultiModalityCausalLM",),
    model_types=("multi_modality",),
    parse_config=parse_config,
    build=JanusFlow,
    stages=stages,
    derived=r"rotary_emb\.inv_freq$|vision_tower\.attn_pool\.",  # of the tower's pooling head nothing is ever read
    check_derived=lambda config, name, value: None,
    image_id=IMAGE_ID,
    image_marker=IMAGE_MARKER,
    image_processing=image_processing,
    chat={
        "user": "User: ",
        "assistant": "Assistant:",
        "separator": "\n\n",
        "end": END,
        "image": IMAGE_MARKER,
        "image_end": END_OF_IMAGE,
        "system": SYSTEM + "\n\n",
        "strip": True,
    },
    cases=cases,
    flow=lambda config: config.flow,
    assemble=assemble,
    full_precision=r"vae\.",
)
