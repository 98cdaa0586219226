"""The two ends of JanusFlow's rectified flow: latents to rows of the language model, and its rows to a velocity.

Both are a few ConvNeXt V2 blocks (Woo et al. 2023, arXiv:2301.00808), modulated by a vector that tells the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.models._decoders import RMSNorm
from mmopt.models._janusflow_config import DecoderGridConfig, EncoderConfig


class PixelNorm(RMSNorm):
    """RMSNorm over the channels of ``[B, C, h, w]``, pixel by pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Global response normalisation of ``[B, h, w, C]``: each channel by its L2 norm over the whole image."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.empty(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True).to(x.dtype)  # squares overflow in float16
        return self.bias + (1 + self.weight * (norms / (norms.mean(-1, keepdim=True) + 1e-6))) * x


class Block(nn.Module):
    """x ``[B, C, h, w]``, cond ``[B, D]`` -> ``[B, C, h, w]``; the modulation comes after the residual sum."""

    def __init__(self, channels: int, cond: int, eps: float):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = RMSNorm(channels, eps)
        self.channelwise_linear_1 = nn.Linear(channels, 4 * channels)
        self.channelwise_norm = ResponseNorm(4 * channels)
        self.channelwise_linear_2 = nn.Linear(4 * channels, channels)
        self.cond_embeds_mapper = nn.Linear(cond, 2 * channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.channelwise_linear_2(self.channelwise_norm(F.gelu(self.channelwise_linear_1(y))))
        scale, shift = self.cond_embeds_mapper(F.silu(cond))[:, :, None, None].chunk(2, dim=1)
        return (x + y.permute(0, 3, 1, 2)) * (1 + scale) + shift


class Blocks(nn.Module):
    def __init__(self, count: int, channels: int, cond: int, eps: float):
        super().__init__()
        self.res_blocks = nn.ModuleList(Block(channels, cond, eps) for _ in range(count))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x, cond)
        return x


class TimeEmbedding(nn.Module):
    """Times ``[B]`` in 0 to 1000, float32 -> ``[B, cond]`` in the type of the weights."""

    def __init__(self, width: int, cond: int):
        super().__init__()
        half = width // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device="cpu") / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear_1, self.linear_2 = nn.Linear(width, cond), nn.Linear(cond, cond)

    def forward(self, time: Tensor) -> Tensor:
        angles = time.float()[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class FlowEncoder(nn.Module):
    """Latents ``[B, c, H, W]``, cond ``[B, D]`` -> a grid ``[B, width, h, w]`` of half the size."""

    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.time_embed = TimeEmbedding(c.width, c.cond)
        self.in_conv = nn.Conv2d(c.input_channels, c.width, c.kernel_size, c.stride, c.padding)
        self.mid_block = Blocks(c.layers_in_middle, c.width, c.cond, c.norm_eps)

    def forward(self, latents: Tensor, cond: Tensor) -> Tensor:
        return self.mid_block(self.in_conv(latents), cond)


class Unpatchify(nn.Module):
    def __init__(self, channels: int, out: int, eps: float):
        super().__init__()
        self.norm = PixelNorm(channels, eps)
        self.unpatch_conv = nn.Conv2d(channels, 4 * out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.unpatch_conv(self.norm(x)), 2)


class FlowDecoder(nn.Module):
    """x ``[B, in_channels, h, w]``, skip (the encoder's grid), cond ``[B, D]`` -> velocity ``[B, c, 2 h, 2 w]``."""

    def __init__(self, c: DecoderGridConfig):
        super().__init__()
        channels = c.in_channels + c.width
        self.input_norm = PixelNorm(c.in_channels, c.norm_eps)
        self.mid_block = Blocks(c.layers_in_middle, channels, c.cond, c.norm_eps)
        self.out_convs = nn.ModuleList([Unpatchify(channels, c.out_channels, c.norm_eps)])

    def forward(self, x: Tensor, skip: Tensor, cond: Tensor) -> Tensor:
        return self.out_convs[0](self.mid_block(torch.cat([self.input_norm(x), skip], dim=1), cond))
