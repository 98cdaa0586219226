"""What the families that come from the transformers library share.

Their parameters, and the modules that hold them, are the library's own, made from config.json: names and shapes are
those of its checkpoints. What stands here is the plain order in which the parts are called, with the operators of
`mmopt.ir.ops`. The library is imported only when such a config is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.ir import ops
from mmopt.ir.capture import StageSpec, TensorSpec
from mmopt.models._stages import Part, on_caches
from mmopt.spec.model_info import Cross

Inputs = dict[str, TensorSpec | list[TensorSpec]]
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the length of a text


def library() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as e:
        raise ImportError("this config belongs to the transformers library: pip install 'mmopt[compile]'") from e
    return transformers


def library_config(name: str, raw: dict) -> Any:
    """config.json -> the library's config of class `name`. Raises ValueError that says which value is wrong."""
    try:
        return getattr(library(), name).from_dict(raw)
    except ImportError:
        raise
    except Exception as e:  # the library's checks raise types of their own
        raise ValueError(f"config.json: not a config of {name}: {e}") from e


def check(config: Any, where: str, expected: dict[str, Any]) -> list[str]:
    """What is wrong with values that must be as expected, or one of a tuple."""
    wrong = []
    for name, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        seen = getattr(config, name, allowed[0])
        if seen not in allowed:
            wrong.append(f"{where}{name} is {seen!r}, only {' or '.join(map(repr, allowed))} is supported")
    return wrong


def check_language(config: Any, where: str, kv_heads: int) -> list[str]:
    """What is wrong with the sizes and the rotary positions of a language model's config."""
    heads, rope = config.num_attention_heads, config.rope_parameters or {}
    wrong = check(config, where, {"hidden_act": ("silu", "gelu", "relu")})
    if config.hidden_size % heads or heads % kv_heads or config.hidden_size // heads % 2:
        wrong.append(
            f"{where}hidden_size {config.hidden_size} must divide into num_attention_heads {heads} of even size, "
            f"and these into num_key_value_heads {kv_heads} groups"
        )
    if rope.get("rope_type", "default") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append(f"{where}rope_parameters is {rope!r}, only whole heads and {', '.join(ROPE_TYPES)} are supported")
    return wrong


def refuse(wrong: list[str]) -> None:
    if wrong:
        raise ValueError("config.json: " + "; ".join(wrong))


# ------------------------------------------------------------------------------------------------------------ modules
class Adopted(nn.Module):
    """Takes over the parameters and submodules of a module of the library, under their names."""

    def __init__(self, source: nn.Module, leave: tuple[str, ...] = ()):
        super().__init__()
        self._parameters.update(source._parameters)
        self._modules.update({k: m for k, m in source._modules.items() if k not in leave})


class RMSNorm(Adopted):
    def __init__(self, source: Any):
        super().__init__(source)
        self.eps = source.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def with_plain_norms(module: nn.Module) -> nn.Module:
    """The library writes RMS norm out in small operators: here it is one."""
    for owner in module.modules():
        for name, child in owner.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                owner.add_module(name, RMSNorm(child))
    return module


def per_head(norm: nn.Module, x: Tensor, heads: int) -> Tensor:
    """A norm over each head of rows ``[..., heads * d]``."""
    return norm(x.unflatten(-1, (heads, x.shape[-1] // heads))).flatten(-2)


class VisionAttention(Adopted):
    """Attention of a vision tower, called as the library calls it. mask ``[N, rows, rows]`` is True where q sees k."""

    def __init__(self, source: nn.Module, heads: int, out: str):
        super().__init__(source)
        self.heads, self.out = heads, out

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        x, heads = hidden_states, self.heads
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if attention_mask is None:
            attended = ops.attention(q, k, v, heads, heads)
        else:
            q, k, v = (y.unflatten(-1, (heads, y.shape[-1] // heads)).transpose(1, 2) for y in (q, k, v))
            mask = attention_mask[:, None]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return getattr(self, self.out)(attended), None


class SelfAttention(Adopted):
    """`attend(q, k, v)` is attention on whole sequences or on top of a cache."""

    def __init__(self, source: nn.Module, heads: int, kv_heads: int):
        super().__init__(source, leave=("rotary_emb",))
        self.heads, self.kv_heads = heads, kv_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        q = ops.rotary(self.q_proj(x), cos, sin, self.heads)
        k = ops.rotary(self.k_proj(x), cos, sin, self.kv_heads)
        return self.o_proj(attend(q, k, self.v_proj(x)))


class DecoderLayer(Adopted):
    def __init__(self, source: Any, heads: int, kv_heads: int):
        super().__init__(source)
        self.self_attn = SelfAttention(source.self_attn, heads, kv_heads)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class CrossAttention(Adopted):
    """Text rows x ``[B, n, hidden]`` over media ``[B, blocks, rows, width]``; K and V of all media in each call."""

    def __init__(self, source: nn.Module, heads: int, kv_heads: int, norms: tuple[str, str] | None):
        super().__init__(source, leave=("rotary_emb",))
        self.heads, self.kv_heads, self.norms = heads, kv_heads, norms

    def forward(self, x: Tensor, media: Tensor, seen: Tensor, attends: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(media), self.v_proj(media)
        if self.norms:
            q_norm, k_norm = (getattr(self, name) for name in self.norms)
            q, k = per_head(q_norm, q, self.heads), per_head(k_norm, k, self.kv_heads)
        return self.o_proj(ops.cross_attention(q, k, v, seen, attends, self.heads, self.kv_heads))


class CrossModel(nn.Module):
    """A whole model whose images lie outside the text. A family adds `encode_images` and `decode_rows`."""

    inv_freq: Tensor

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def take_frequencies(self, rotary: type, config: Any) -> None:
        """Rotary frequencies as the library computes them, also while the rest of the model is built without memory."""
        with torch.device("cpu"):
            made = rotary(config)
        self.register_buffer("inv_freq", made.inv_freq.float(), persistent=False)
        self.rotary_scale = float(made.attention_scaling)

    def angles(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin at positions ``[B, n]``, all below `length`."""
        table = torch.arange(length, device=positions.device)[:, None] * self.inv_freq
        cos, sin = table.cos() * self.rotary_scale, table.sin() * self.rotary_scale
        return F.embedding(positions, cos), F.embedding(positions, sin)

    def decode_rows(
        self, x: Tensor, angles: tuple[Tensor, Tensor], media: Tensor, sight: tuple, attends: list[Callable]
    ) -> Tensor:
        """Rows x ``[B, n, hidden]`` through all layers and the head -> logits. sight: seen, attends, sees."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        seen: Tensor,
        attends: Tensor,
        mask: Tensor | None = None,
        sees: Tensor | None = None,
    ) -> Tensor:
        """The plain definition on whole sequences: embedded rows x ``[B, S, hidden]`` -> logits ``[B, S, vocab]``.

        media ``[B, blocks, rows, width]``; seen ``[B, S, blocks]``, attends ``[B, S]`` and sees ``[B, S]``: see
        `mmopt.spec.cross_mask`. mask ``[B, S]`` is True for real rows; what comes out of the others has no meaning.
        """
        c = self.config

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(q, k, v, c.num_attention_heads, c.num_key_value_heads, key_mask=mask, causal=True)

        positions = torch.arange(x.shape[1], device=x.device)[None]
        angles = self.angles(positions, x.shape[1])
        sees = seen.any(-1) if sees is None else sees
        return self.decode_rows(x, angles, media, (seen, attends, sees), [attend] * c.num_hidden_layers)


RECORDED = {  # names of recorded runs: keyword arguments of the library's forward, and what came out
    "in.input_ids": "in.input_ids",
    "in.attention_mask": "in.attention_mask",
    "in.pixel_values": "in.pixel_values",
    "logits": "out.logits",
    "act.*": "act.*",
    "generated_ids_*": "out.greedy.token_ids_*",
    "gen_logits_*": "out.greedy.step_logits_*",
}


# ------------------------------------------------------------------------------------------------------------- stages
class LanguageModel(nn.Module):
    """Rows of text on top of a cache, and what they see."""

    def __init__(self, model: CrossModel, capacity: int):
        super().__init__()
        self.root, self.capacity = model, capacity

    def run(
        self,
        text: Tensor,
        media: Tensor,
        sight: tuple,
        past: Tensor,
        key_cache: list[Tensor],
        value_cache: list[Tensor],
    ) -> tuple:
        c = self.root.config
        keys, values = list(key_cache), list(value_cache)
        positions = past[:, None] + torch.arange(text.shape[1], device=text.device)

        logits = self.root.decode_rows(
            text,
            self.root.angles(positions, self.capacity),
            media,
            sight,
            on_caches(c, keys, values, past),
        )
        return logits, past + text.shape[1], keys, values


class WithMask(LanguageModel):
    def forward(self, text, media, seen, attends, past, key_cache, value_cache):
        return self.run(text, media, (seen, attends, None), past, key_cache, value_cache)


class WithSees(LanguageModel):
    """One that also has to know which rows see any image."""

    def forward(self, text, media, seen, attends, sees, past, key_cache, value_cache):
        return self.run(text, media, (seen, attends, sees), past, key_cache, value_cache)


def text_stages(
    model: CrossModel, embed: Callable, cross: Cross, capacity: int, dtype: torch.dtype, sees: bool = False
) -> dict[str, StageSpec]:
    """The stages from token ids on: the same for all families of images outside the text."""
    c = model.config
    cache = [TensorSpec(("B", c.num_key_value_heads, capacity, c.head_dim), dtype)] * c.num_hidden_layers
    inputs: Inputs = {
        "text": TensorSpec(("B", "nt", c.hidden_size), dtype),
        "media": TensorSpec(("B", "nb", cross.tokens, cross.width), dtype),
        "seen": TensorSpec(("B", "nt", "nb"), torch.bool),
        "attends": TensorSpec(("B", "nt"), torch.bool),
    }
    if sees:
        inputs["sees"] = TensorSpec(("B", "nt"), torch.bool)
    inputs |= {"past": TensorSpec(("B",), torch.int64), "key_cache": cache, "value_cache": cache}
    ids: Inputs = {"ids": TensorSpec(("B", "nt"), torch.int64)}
    outputs = ["logits", "past", "key_cache", "value_cache"]
    return {
        "embed": StageSpec(Part(model, embed, *dict(model.named_children())), ids, ["text"]),
        "language_model": StageSpec((WithSees if sees else WithMask)(model, capacity), inputs, outputs),
    }
