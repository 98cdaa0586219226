"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752) with the state dict of diffusers.

Images ``[B, 3, H, W]`` in -1 to 1 <-> latents ``[B, c, H / f, W / f]``, f = 2 ** (levels - 1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.ir import ops
from mmopt.models._weight_files import CheckpointError, Weights, read_file, read_json

EPS = 1e-6  # of every norm; no config says it
FILES = tuple(
    f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "fp16.safetensors", "bin", "fp16.bin")
)  # in the order in which they are looked for
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of the attention's parts
FIXED = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3, "latents_mean": None,
    "latents_std": None,
}  # fmt: skip


@dataclass(frozen=True)
class AutoencoderConfig:
    """config.json of diffusers. A latent of the sampler is ``(encoded - shift_factor) * scaling_factor``.

    sample_size: pixels along each side of the images that it was trained on; any other will do.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int | None = None

    @property
    def factor(self) -> int:
        """Pixels of an image to one of its latents, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


def parse_autoencoder(raw: dict, where: str = "vae") -> AutoencoderConfig:
    """config.json of an AutoencoderKL -> its config. ValueError names each value that is wrong or not supported."""
    wrong = [f"{k} is {raw[k]!r}, only {v!r} is supported" for k, v in FIXED.items() if raw.get(k, v) != v]
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        other = sorted({str(x) for x in raw.get(key) or () if x != kind})
        if other:
            wrong.append(f"{key} holds {', '.join(other)}, only {kind} is supported")
    given = {f.name: raw[f.name] for f in fields(AutoencoderConfig) if raw.get(f.name) is not None}
    widths = given.get("block_out_channels", AutoencoderConfig.block_out_channels)
    if not isinstance(widths, list | tuple) or not widths or not all(type(n) is int and n > 0 for n in widths):
        wrong.append(f"block_out_channels is {widths!r}, expected positive numbers")
        given.pop("block_out_channels", None)
    else:
        given["block_out_channels"] = tuple(widths)
    for key, value in list(given.items()):
        wanted: type = int if key == "sample_size" else type(getattr(AutoencoderConfig, key))
        if wanted is tuple:
            continue
        right = type(value) is wanted or (wanted is float and type(value) is int)
        if not right or (key != "shift_factor" and wanted is not bool and value <= 0):
            wrong.append(f"{key} is {value!r}, expected {'a' if wanted is bool else 'a positive'} {wanted.__name__}")
            del given[key]
    c = AutoencoderConfig(**given)
    uneven = [n for n in c.block_out_channels if n % c.norm_num_groups]
    if uneven:
        wrong.append(f"block_out_channels {uneven} are no multiples of norm_num_groups {c.norm_num_groups}")
    if wrong:
        raise ValueError(f"config.json of {where}: " + "; ".join(wrong))
    return c


def norm(c: AutoencoderConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(c.norm_num_groups, channels, EPS)


class ResnetBlock(nn.Module):
    def __init__(self, c: AutoencoderConfig, inner: int, outer: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = norm(c, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class Attention(nn.Module):
    """One head as wide as the channels, over all places of the grid."""

    def __init__(self, c: AutoencoderConfig, channels: int):
        super().__init__()
        self.group_norm = norm(c, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group_norm(x).flatten(2).transpose(1, 2)
        y = self.to_out[0](ops.attention(self.to_q(rows), self.to_k(rows), self.to_v(rows), 1, 1))
        return x + y.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, c: AutoencoderConfig, channels: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(c, channels)] if c.mid_block_add_attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(c, channels, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Resnet blocks at one size, and a change of size after them (none at the last level)."""

    def __init__(self, c: AutoencoderConfig, inner: int, outer: int, count: int, resize: str, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, inner if i == 0 else outer, outer) for i in range(count))
        self.resize = None if last else resize
        if not last:
            kind = Downsample if resize == "downsamplers" else Upsample
            self.add_module(resize, nn.ModuleList([kind(outer)]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.resize is None else self.get_submodule(self.resize)[0](x)  # type: ignore[index]


class Encoder(nn.Module):
    def __init__(self, c: AutoencoderConfig):
        super().__init__()
        widths, n = c.block_out_channels, len(c.block_out_channels)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(c, widths[max(i - 1, 0)], widths[i], c.layers_per_block, "downsamplers", i == n - 1) for i in range(n)
        )
        self.mid_block = MidBlock(c, widths[-1])
        self.conv_norm_out = norm(c, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c: AutoencoderConfig):
        super().__init__()
        widths, n = c.block_out_channels[::-1], len(c.block_out_channels)
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(c, widths[0])
        self.up_blocks = nn.ModuleList(
            Level(c, widths[max(i - 1, 0)], widths[i], c.layers_per_block + 1, "upsamplers", i == n - 1)
            for i in range(n)
        )
        self.conv_norm_out = norm(c, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder. What the sampler works on is scaled: `latents_of` and `image_of` go from and to that."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        c = self.config = config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1) if c.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1) if c.use_post_quant_conv else None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, H, W]`` in -1 to 1 -> mean and log variance ``[B, c, H / f, W / f]`` (limited as usual)."""
        moments = self.encoder(x)
        mean, logvar = (moments if self.quant_conv is None else self.quant_conv(moments)).chunk(2, 1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents ``[B, c, h, w]`` -> images ``[B, 3, f h, f w]``, not clipped to -1 to 1."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def latents_of(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images in -1 to 1 -> latents as a sampler makes them: the mean, or with `noise` (N(0, 1)) a draw."""
        mean, logvar = self.encode(x)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def image_of(self, latents: Tensor) -> Tensor:
        """Latents as a sampler makes them, float32 -> images, float32, not clipped. Computed in the weights' type."""
        z = latents / self.config.scaling_factor
        if self.config.shift_factor:
            z = z + self.config.shift_factor
        return self.decode(z.to(self.decoder.conv_in.weight.dtype)).float()


def read_autoencoder(path: Path) -> Weights:
    """A directory of an AutoencoderKL in the layout of diffusers -> its tensors by today's names and its config.json.

    Raises CheckpointError if there is no config.json or none of `FILES`, or a file cannot be read.
    """
    config = read_json(path / "config.json")
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{path}: no weights of an autoencoder; expected {', '.join(FILES)}")
    tensors = {today(key): x for key, x in read_file(file).items()}
    return Weights(path, tensors, dict.fromkeys(tensors, file), config)


def today(key: str) -> str:
    """Older files name the parts of the attention otherwise."""
    m = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    return f"{m[1]}.{OLDER[m[2]]}.{m[3]}" if m else key


def load_autoencoder(path: str | Path, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """The autoencoder of a directory by itself, for training on its latents.

    Raises CheckpointError (files, keys or shapes that do not fit) or ValueError (its config.json).
    """
    read = read_autoencoder(Path(path))
    with torch.device("meta"):
        made = AutoencoderKL(parse_autoencoder(read.config or {}, str(path)))
    expected = {k: v.shape for k, v in made.state_dict().items()}
    problems = [f"missing {k} {tuple(s)}" for k, s in expected.items() if k not in read.tensors]
    problems += [f"unexpected {k} {tuple(v.shape)}" for k, v in read.tensors.items() if k not in expected]
    problems += [
        f"{k}: expected shape {tuple(expected[k])}, found {tuple(v.shape)}"
        for k, v in read.tensors.items()
        if k in expected and v.shape != expected[k]
    ]
    if problems:
        raise CheckpointError(f"{path}: the weights do not fit config.json:\n  " + "\n  ".join(problems[:200]))
    tensors = read.tensors if dtype is None else {k: v.to(dtype) for k, v in read.tensors.items()}
    made.load_state_dict(tensors, assign=True)
    return made.eval().requires_grad_(False)
