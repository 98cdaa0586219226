"""Decoder-only language models, named as the transformers library names their weights.

GPT-NeoX (Black et al. 2022), MPT (MosaicML 2023, in the library's layout and in that of mpt-1b's own code), LLaMA
(Touvron et al. 2023) and OPT (Zhang et al. 2022). A layer is called as ``layer(x, cos, sin, attend)``, where
``attend(q, k, v)`` is the self-attention, with or without a cache; cos and sin are None if positions are not rotary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.ir import ops
from mmopt.models._decoder_config import DecoderConfig
from mmopt.models._stages import on_caches

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


# ---------------------------------------------------------------------------------------------------------- GPT-NeoX
def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotary positions on the leading ``2 * cos.shape[-1]`` values of each head of x ``[B, n, heads * head_dim]``."""
    head_dim, turned = x.shape[2] // heads, 2 * cos.shape[2]
    if turned == head_dim:
        return ops.rotary(x, cos, sin, heads)
    x4 = x.view(*x.shape[:2], heads, head_dim)
    first = ops.rotary(x4[..., :turned].reshape(*x.shape[:2], heads * turned), cos, sin, heads)
    first = first.view(*x.shape[:2], heads, turned)
    return torch.cat([first, x4[..., turned:]], dim=3).reshape(x.shape)


class NeoXAttention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.query_key_value = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=c.attention_bias)
        self.dense = nn.Linear(c.hidden_size, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        # q, k and v of head 0, then of head 1, ...
        qkv = self.query_key_value(x).view(*x.shape[:2], self.heads, 3, x.shape[2] // self.heads)
        q, k, v = (qkv[:, :, :, i].reshape(x.shape) for i in range(3))
        q, k = (rotate_heads(y, cos, sin, self.heads) for y in (q, k))
        return self.dense(attend(q, k, v))


class NeoXMLP(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.act = ACTIVATIONS[c.activation]
        self.dense_h_to_4h = nn.Linear(c.hidden_size, c.intermediate_size)
        self.dense_4h_to_h = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class NeoXLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.parallel = c.parallel_residual
        self.input_layernorm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.attention = NeoXAttention(c)
        self.mlp = NeoXMLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        y = x + self.attention(self.input_layernorm(x), cos, sin, attend)
        return y + self.mlp(self.post_attention_layernorm(x if self.parallel else y))


# --------------------------------------------------------------------------------------------------------------- MPT
def alibi_slopes(heads: int, bias_max: float = 8.0) -> Tensor:
    """``2 ** (-bias_max * h / n)`` with n heads, a power of two; for other counts every second of the next power's."""
    n = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-torch.arange(1, n + 1, dtype=torch.float32, device="cpu") * (bias_max / n))
    return slopes if n == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


class MptAttention(nn.Module):
    def __init__(self, c: DecoderConfig, q_norm: str | None = None, k_norm: str | None = None):
        super().__init__()
        self.clip = c.clip_qkv
        self.Wqkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.norms = (q_norm, k_norm) if c.qk_ln else ()
        for name in self.norms:
            self.add_module(str(name), nn.LayerNorm(c.hidden_size, eps=c.norm_eps, bias=False))

    def forward(self, x: Tensor, attend) -> Tensor:
        qkv, d = self.Wqkv(x), x.shape[2]
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :]
        if self.norms:  # over all heads at once
            q, k = (self.get_submodule(n)(y) for n, y in zip(self.norms, (q, k), strict=True))
        return self.out_proj(attend(q, k, v))


class MptMLP(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class MptLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(c.hidden_size, eps=c.norm_eps, bias=False)
        self.attn = MptAttention(c, "q_ln", "k_ln")
        self.norm_2 = nn.LayerNorm(c.hidden_size, eps=c.norm_eps, bias=False)
        self.ffn = MptMLP(c)

    def forward(self, x: Tensor, cos: None, sin: None, attend) -> Tensor:
        x = x + self.attn(self.norm_1(x), attend)
        return x + self.ffn(self.norm_2(x))


class MosaicMLP(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.mlp_up = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.mlp_down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_down(F.gelu(self.mlp_up(x)))


class MosaicLayer(nn.Module):
    """The MPT layer as mpt-1b's own code names it."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.hidden_size, eps=c.norm_eps, bias=False)
        self.attn = MptAttention(c, "q_ln", "k_ln")
        self.ln_2 = nn.LayerNorm(c.hidden_size, eps=c.norm_eps, bias=False)
        self.mlp = MosaicMLP(c)

    def forward(self, x: Tensor, cos: None, sin: None, attend) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


# ------------------------------------------------------------------------------------------------------------- LLaMA
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LlamaAttention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        q = ops.rotary(self.q_proj(x), cos, sin, self.heads)
        k = ops.rotary(self.k_proj(x), cos, sin, self.kv_heads)
        return self.o_proj(attend(q, k, self.v_proj(x)))


class LlamaMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = LlamaAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = LlamaMLP(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


# --------------------------------------------------------------------------------------------------------------- OPT
class OptAttention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(c.hidden_size, c.hidden_size, bias=c.attention_bias) for _ in range(4)
        )

    def forward(self, x: Tensor, attend) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class OptLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.act = ACTIVATIONS[c.activation]
        self.self_attn_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.self_attn = OptAttention(c)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.attention_bias)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor, cos: None, sin: None, attend) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), attend)
        return x + self.fc2(self.act(self.fc1(self.final_layer_norm(x))))


# ------------------------------------------------------------------------------------------------- the whole decoder
@dataclass(frozen=True)
class Kind:
    """Where a library keeps the parts of a decoder, and how it tells positions apart."""

    layer: type[nn.Module]
    norm_type: Callable[[DecoderConfig], nn.Module]
    embed: str
    blocks: str
    norm: str
    head: str
    positions: str  # "rotary", "alibi" or the path of a learned table


def _layer_norm(c: DecoderConfig) -> nn.Module:
    return nn.LayerNorm(c.hidden_size, eps=c.norm_eps)


def _gain_only(c: DecoderConfig) -> nn.Module:
    return nn.LayerNorm(c.hidden_size, eps=c.norm_eps, bias=False)


def _rms_norm(c: DecoderConfig) -> nn.Module:
    return RMSNorm(c.hidden_size, c.norm_eps)


def _kind(layer, norm_type, root: str, embed: str, blocks: str, norm: str, head: str, positions: str) -> Kind:
    if positions not in ("rotary", "alibi"):
        positions = f"{root}.{positions}"
    return Kind(layer, norm_type, f"{root}.{embed}", f"{root}.{blocks}", f"{root}.{norm}", head, positions)


KINDS = {
    "gpt_neox": _kind(
        NeoXLayer, _layer_norm, "gpt_neox", "embed_in", "layers", "final_layer_norm", "embed_out", "rotary"
    ),
    "mpt": _kind(MptLayer, _gain_only, "transformer", "wte", "blocks", "norm_f", "lm_head", "alibi"),
    "mosaic_gpt": _kind(MosaicLayer, _gain_only, "transformer", "wte", "blocks", "ln_f", "lm_head", "alibi"),
    "llama": _kind(LlamaLayer, _rms_norm, "model", "embed_tokens", "layers", "norm", "lm_head", "rotary"),
    "opt": _kind(
        OptLayer,
        _layer_norm,
        "model.decoder",
        "embed_tokens",
        "layers",
        "final_layer_norm",
        "lm_head",
        "embed_positions",
    ),
}
OPT_OFFSET = 2  # OPT's table of positions starts with two rows that nothing reads


class Decoder(nn.Module):
    """A decoder whose layers are made by `wrap(i, layer)`, called as ``layer(x, cos, sin, attend, *more)``."""

    slopes: Tensor

    def __init__(self, c: DecoderConfig, wrap: Callable[[int, nn.Module], nn.Module]):
        super().__init__()
        self.config, self.kind = c, KINDS[c.kind]
        self._put(self.kind.embed, nn.Embedding(c.vocab_size, c.hidden_size))
        self._put(self.kind.blocks, nn.ModuleList(wrap(i, self.kind.layer(c)) for i in range(c.num_hidden_layers)))
        self._put(self.kind.norm, self.kind.norm_type(c))
        self._put(self.kind.head, nn.Linear(c.hidden_size, c.vocab_size, bias=False))
        if self.kind.positions == "rotary":
            powers = torch.arange(0, c.rotary_dim, 2, dtype=torch.float32, device="cpu") / c.rotary_dim
            self.register_buffer("inv_freq", c.rope_theta**-powers, persistent=False)
        elif self.kind.positions == "alibi":
            slopes = alibi_slopes(c.num_attention_heads, c.alibi_bias_max)
            self.register_buffer("slopes", slopes, persistent=False)
        else:
            self._put(self.kind.positions, nn.Embedding(c.max_position_embeddings + OPT_OFFSET, c.hidden_size))
        self.tie_weights()

    def _put(self, path: str, module: nn.Module) -> None:
        owner: nn.Module = self
        *parents, name = path.split(".")
        for p in parents:
            if not hasattr(owner, p):
                owner.add_module(p, nn.Module())
            owner = owner.get_submodule(p)
        owner.add_module(name, module)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def embedding(self) -> nn.Module:
        return self.get_submodule(self.kind.embed)

    @property
    def head(self) -> nn.Module:
        return self.get_submodule(self.kind.head)

    def decode_rows(self, x: Tensor, positions: Tensor, attends: list, *more: Tensor) -> Tensor:
        """Rows x ``[B, n, hidden]`` at ``positions`` through all layers and the head -> logits ``[B, n, vocab]``."""
        cos = sin = None
        if self.kind.positions == "rotary":
            table = torch.arange(self.config.max_position_embeddings, device=x.device)[:, None] * self.inv_freq
            cos, sin = F.embedding(positions, table.cos()), F.embedding(positions, table.sin())
        elif self.kind.positions != "alibi":
            x = x + self.get_submodule(self.kind.positions)(positions + OPT_OFFSET)
        for layer, attend in zip(self.get_submodule(self.kind.blocks), attends, strict=True):
            x = layer(x, cos, sin, attend, *more)
        return self.head(self.get_submodule(self.kind.norm)(x))

    def forward(self, x: Tensor, mask: Tensor | None, *more: Tensor) -> Tensor:
        """Full sequences x ``[B, S, hidden]``; mask ``[B, S]`` is True for real rows -> logits ``[B, S, vocab]``."""
        c = self.config
        rows = torch.arange(x.shape[1], device=x.device)
        positions = rows[None] if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)

        def attend(q, k, v):
            if self.kind.positions == "alibi":
                return biased_attention(q, k, v, c.num_attention_heads, self.slopes, mask)
            return ops.attention(q, k, v, c.num_attention_heads, c.num_key_value_heads, key_mask=mask, causal=True)

        return self.decode_rows(x, positions, [attend] * c.num_hidden_layers, *more)

    def step(self, x: Tensor, past: Tensor, keys: list[Tensor], values: list[Tensor], *more: Tensor):
        """Rows x ``[B, n, hidden]`` on top of caches -> logits, past, key caches, value caches."""
        c, keys, values = self.config, list(keys), list(values)
        slopes = self.slopes if self.kind.positions == "alibi" else None

        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        attends = on_caches(c, keys, values, past, slopes)
        return self.decode_rows(x, positions, attends, *more), past + x.shape[1], keys, values


def biased_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, slopes: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention with ALiBi (Press et al. 2022, arXiv:2108.12409), written out."""
    batch, rows, width = q.shape
    q, k, v = (x.view(batch, rows, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    places = torch.arange(rows, device=q.device)
    scores = q @ k.transpose(2, 3) * (width // heads) ** -0.5
    scores = scores + slopes.to(q.dtype)[:, None, None] * (places - places[:, None]).to(q.dtype)
    seen = places <= places[:, None]
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    weights = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(batch, rows, width)
