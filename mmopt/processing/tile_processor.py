"""Images cut into tiles: resized to fit one of a few canvases of square tiles, padded, and cut up. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmopt.processing.image_processor import RESAMPLE_FILTERS, ImageProcessor, open_image


@dataclass(frozen=True)
class TileProcessor:
    """Turns images into the tiles of a vision model.

    size: side of a tile in pixels. mean, std: per RGB channel, for values in 0 to 1.
    ratios: canvases that an image may be put on, (tiles high, tiles wide). tiles: places for tiles that an image has.
    resample: "nearest", "bilinear", "bicubic" or "lanczos".

    The arithmetic is that of the image processor of Llama 3.2 Vision in transformers 5.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    ratios: tuple[tuple[int, int], ...]
    tiles: int
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need 3 values each, std above 0, not {self.mean} and {self.std}")
        if not self.ratios or any(h < 1 or w < 1 or h * w > self.tiles for h, w in self.ratios):
            raise ValueError(f"ratios must be pairs whose product is 1 to {self.tiles}, not {self.ratios}")
        if self.resample not in RESAMPLE_FILTERS:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLE_FILTERS)}, not {self.resample!r}")

    def __call__(self, images: Sequence) -> dict[str, np.ndarray]:
        """N images, each anything that `open_image` takes, as arrays with a row for each image.

        pixel_values ``[N, tiles, 3, size, size]`` float32, zeros where an image has no tile. aspect_ratio_ids ``[N]``:
        place of its canvas in `ratios`, counted from 1. aspect_ratio_mask ``[N, tiles]``: 1 for its tiles. tiles
        ``[N]``: how many it has. Raises ImageError for an image that cannot be read.
        """
        if isinstance(images, str | bytes | Path | Image.Image):
            raise TypeError(f"expected a list of images, not one {type(images).__name__}")
        pixels = np.zeros((len(images), self.tiles, 3, self.size, self.size), np.float32)
        ids = np.zeros(len(images), np.int64)
        counts = np.zeros(len(images), np.int64)
        for i, source in enumerate(images):
            image = open_image(source)
            high, wide = self.canvas(image.height, image.width)
            pixels[i, : high * wide] = self._cut(image, high, wide)
            ids[i], counts[i] = self.ratios.index((high, wide)) + 1, high * wide
        mask = (np.arange(self.tiles) < counts[:, None]).astype(np.int64)
        return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask, "tiles": counts}

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """The canvas for an image: one that enlarges it least, or, if all are too small, shrinks it least.

        Among equals it is the smallest.
        """
        scales = [min(h * self.size / height, w * self.size / width) for h, w in self.ratios]
        enlarging = [s for s in scales if s >= 1]
        best = min(enlarging) if enlarging else max(scales)
        return min((r for r, s in zip(self.ratios, scales, strict=True) if s == best), key=lambda r: r[0] * r[1])

    def fitted(self, height: int, width: int, high: int, wide: int) -> tuple[int, int]:
        """The size of an image on a canvas: its shape is kept, and it is not enlarged beyond a tile."""
        most_high = min(max(height, self.size), high * self.size)
        most_wide = min(max(width, self.size), wide * self.size)
        scale_high, scale_wide = most_high / height, most_wide / width
        if scale_wide < scale_high:
            return min(int(height * scale_wide) or 1, most_high), most_wide
        return most_high, min(int(width * scale_high) or 1, most_wide)

    def _cut(self, image: Image.Image, high: int, wide: int) -> np.ndarray:
        """An image on its canvas, at the upper left, as tiles ``[high * wide, 3, size, size]``, row by row."""
        height, width = self.fitted(image.height, image.width, high, wide)
        size = self.size
        canvas = np.zeros((high * size, wide * size, 3), np.uint8)
        canvas[:height, :width] = np.asarray(image.resize((width, height), RESAMPLE_FILTERS[self.resample]))
        values: np.ndarray = (canvas * (1 / 255)).astype(np.float32)
        values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        tiles = values.reshape(high, size, wide, size, 3).transpose(0, 2, 4, 1, 3)
        return tiles.reshape(high * wide, 3, size, size)

    def to_json(self) -> dict:
        """Return the settings as a dictionary of JSON values."""
        return {
            **asdict(self),
            "mean": list(self.mean),
            "std": list(self.std),
            "ratios": [list(r) for r in self.ratios],
        }

    @classmethod
    def from_json(cls, d: dict) -> TileProcessor:
        """Inverse of to_json. Raises ValueError if a setting is missing, unknown or wrong."""
        try:
            ratios = tuple((int(h), int(w)) for h, w in d["ratios"])
            return cls(**{**d, "mean": tuple(d["mean"]), "std": tuple(d["std"]), "ratios": ratios})
        except (KeyError, TypeError) as error:
            raise ValueError(f"bad tile processor settings: {error}") from error


def processor_of(settings: dict[str, Any]) -> ImageProcessor | TileProcessor:
    """The image processor that an engine's settings describe."""
    return (TileProcessor if "ratios" in settings else ImageProcessor).from_json(settings)
