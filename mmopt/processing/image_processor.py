"""Images to pixel arrays, chat messages to prompts, text to token ids and back.

Everything here runs before or after a model. It needs no deep learning framework, so an engine can be used
where only the runtime is installed.
"""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

DOWNLOAD_TIMEOUT = 30  # seconds without an answer

DOWNLOAD_LIMIT = 64 * 2**20  # bytes

# A long thin image becomes a huge square (or strip) before the final resize: 2**28 pixels are 0.8 GB of RGB.
PIXEL_LIMIT = 2**28

IMAGE_MODES = ("resize", "pad", "plain", "squash", "fit")

RESAMPLE_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageError(ValueError):
    """An image that cannot be read or used. The message names the source and the reason."""


def open_image(source: Any) -> Image.Image:
    """Open an image and return it as 8-bit RGB.

    source: a path, an "http://" or "https://" URL, the bytes of an image file, a PIL image, or an array of shape
    [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] and type uint8, uint16 or float (0 to 1).

    The EXIF rotation is applied, transparent pixels are composited on white, and 16-bit values keep their upper byte.
    Raises ImageError if the source cannot be read.
    """
    if isinstance(source, Image.Image):
        name = f"PIL image of mode {source.mode}"
    elif isinstance(source, np.ndarray):
        name = f"array of shape {source.shape}"
    elif isinstance(source, bytes | bytearray | memoryview):
        name = f"bytes of length {len(source)}"
    elif isinstance(source, str | Path):
        name = str(source)
    else:
        raise ImageError(
            f"{type(source).__name__}: not an image (expected a path, a URL, bytes, a PIL image or a numpy array)"
        )
    try:
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source))
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if isinstance(source, bytes | bytearray | memoryview):
            data = bytes(source)
        elif isinstance(source, str) and source.lower().startswith(("http://", "https://")):
            data = _download(source)
        else:
            data = Path(source).read_bytes()
        if not data:
            raise ValueError("it is empty")
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except Exception as error:  # on broken files Pillow raises many types: SyntaxError, struct.error, ...
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image file of a known format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = str(error) or type(error).__name__
        raise ImageError(f"{name}: cannot read the image: {reason}") from error


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
        data: bytes = response.read(DOWNLOAD_LIMIT + 1)
    if len(data) > DOWNLOAD_LIMIT:
        raise ValueError(f"the download is larger than {DOWNLOAD_LIMIT} bytes")
    return data


def _from_array(array: np.ndarray) -> Image.Image:
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise ValueError("expected the shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not empty")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise ValueError(f"float values must lie in 0 to 1, found {low} to {high}")
        array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"expected uint8, uint16 or float values, found {array.dtype}")
    if array.ndim == 3 and channels == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # a truncated file fails here
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # I;16, I;16B and, in older Pillow, I for 16-bit files: convert() would clip at 255
        values = np.clip(np.asarray(image), 0, 65535)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageProcessor:
    """Turns images into the pixel array of a vision model.

    size: side of the square image given to the model, in pixels.
    mean, std: per RGB channel, for values in 0 to 1.
    mode: how an image that is not square is made square.
        "resize": squash to a square whose side is the longer edge.
        "pad": paste in the middle of a square whose side is the longer edge, filled with the mean colour.
        "plain": keep the middle square; the rest is cut off.
        "squash": as "resize", but straight to the size of the model.
        "fit": scale the longer edge to the size of the model, then paste as "pad" does.
    resample: "nearest", "bilinear", "bicubic" or "lanczos".
    smallest: in mode "fit" the shorter edge becomes no shorter than this.

    The arithmetic, with its rounding, is that of CLIPImageProcessor in transformers 4.31.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: str
    resample: str = "bicubic"
    smallest: int = 1

    def __post_init__(self) -> None:
        if self.smallest < 1:
            raise ValueError(f"smallest must be at least 1, not {self.smallest}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std need 3 values each, not {len(self.mean)} and {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if self.mode not in IMAGE_MODES:
            raise ValueError(f"mode must be one of {', '.join(IMAGE_MODES)}, not {self.mode!r}")
        if self.resample not in RESAMPLE_FILTERS:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLE_FILTERS)}, not {self.resample!r}")

    def __call__(self, images: Sequence) -> np.ndarray:
        """Return pixels [N, 3, size, size] float32 for N images, each anything that open_image takes.

        Raises ImageError for an image that cannot be read or is too long and thin to be processed.
        """
        if isinstance(images, str | bytes | Path | Image.Image):
            raise TypeError(f"expected a list of images, not one {type(images).__name__}")
        pixels = np.zeros((len(images), 3, self.size, self.size), np.float32)
        for i, source in enumerate(images):
            pixels[i] = self._process(open_image(source))
        return pixels

    def _process(self, image: Image.Image) -> np.ndarray:
        resample = RESAMPLE_FILTERS[self.resample]
        longest = max(image.size)
        if self.mode == "fit":
            least = min(self.smallest, self.size)
            edges = [max(int(edge / longest * self.size), least) for edge in image.size]
            image = self._paste(image.resize((edges[0], edges[1]), resample), self.size)
        elif self.mode == "resize":
            self._check_pixels(image, longest, longest)
            image = image.resize((longest, longest), resample)
        elif self.mode == "pad":
            self._check_pixels(image, longest, longest)
            image = self._paste(image, longest)
        elif self.mode == "squash":
            image = image.resize((self.size, self.size), resample)

        shortest = min(image.size)
        width = int(self.size * image.width / shortest)
        height = int(self.size * image.height / shortest)
        self._check_pixels(image, width, height)
        image = image.resize((width, height), resample)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))

        values: np.ndarray = (np.asarray(image) * (1 / 255)).astype(np.float32)
        values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return values.transpose(2, 0, 1)

    def _paste(self, image: Image.Image, side: int) -> Image.Image:
        """The image in the middle of a square of the mean colour."""
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in self.mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _check_pixels(self, image: Image.Image, width: int, height: int) -> None:
        if width * height > PIXEL_LIMIT:
            raise ImageError(
                f"image of {image.width}x{image.height} pixels: too long and thin for mode {self.mode!r}, "
                f"which needs {width}x{height} pixels (the limit is {PIXEL_LIMIT})"
            )

    def to_json(self) -> dict:
        """Return the settings as a dictionary of JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, d: dict) -> ImageProcessor:
        """Inverse of to_json. Raises ValueError if a setting is missing, unknown or wrong."""
        try:
            return cls(**{**d, "mean": tuple(d["mean"]), "std": tuple(d["std"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"bad image processor settings: {error}") from error
