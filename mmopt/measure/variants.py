"""What a benchmark times: the stages of an engine on given inputs. No torch: see `torch_stages.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmopt.runtime.engine import Engine
from mmopt.runtime.kv_cache import Cache
from mmopt.spec.model_info import ModelInfo

VARIANTS = ("eager", "compiled", "optimized", "engine")  # from the slowest on
STAGES = ("encode", "prefill", "decode")
LEADING = 8  # rows of text before the image


@dataclass(frozen=True)
class Inputs:
    """One image, a prompt that fills half of the caches (`leading` ids stand before the image), one further token."""

    pixels: np.ndarray
    ids: list[int]
    leading: int
    image_rows: int
    token: int

    @classmethod
    def draw(cls, info: ModelInfo, image: tuple[int, ...], seed: int = 0) -> Inputs:
        """Random ones for an image of shape ``(channels, height, width)``. ValueError if the context is too small."""
        filled, image_rows = info.context // 2, info.tokens_per_image
        text = filled - image_rows
        if text < 2:
            least = 2 * (image_rows + 2)
            raise ValueError(f"context is {info.context}, expected at least {least}: half of it, one image and text")
        random = np.random.default_rng(seed)
        ids = random.integers(3, info.vocab_size, text + 1).tolist()
        pixels = random.standard_normal((1, *image), np.float32)
        return cls(pixels, ids[:-1], min(LEADING, text - 1), image_rows, ids[-1])

    @property
    def filled(self) -> int:
        """Rows of the prompt; as many lie in the caches at decode."""
        return len(self.ids) + self.image_rows

    def prompt(self, image_id: int) -> list[int]:
        return [*self.ids[: self.leading], image_id, *self.ids[self.leading :]]


# ------------------------------------------------------------------------------------------------------- in an engine
class EngineStages:
    """The stages of a loaded engine on the same inputs."""

    def __init__(self, engine: Engine, inputs: Inputs | None = None):
        self.engine, self.decoder = engine, engine.decoder
        size = engine.image_processor.size
        self.inputs = inputs or Inputs.draw(engine.info, (3, size, size))
        self.prompt = self.inputs.prompt(engine.info.image_id)
        self.cache = Cache(self.decoder.layout, 1)
        self.rows: Any = None
        self.last: Any = None

    def run(self, stage: str) -> None:
        if stage == "encode":
            self.rows = self.decoder.encode(self.inputs.pixels)
        elif stage == "prefill":
            self.cache.past[:] = self.cache.images[:] = 0
            self.last = self.decoder.prefill(self.cache, 0, self.prompt, [self.rows])
        else:  # a lane that is not active is computed, but its length stays
            self.last = self.decoder.decode(self.cache, [self.inputs.token], [False])[0]

    def run_all(self) -> EngineStages:
        for stage in STAGES * 2:
            self.run(stage)
        return self

    def logits(self) -> np.ndarray:
        """Those of the last row ``[V]`` of the last prefill or decode."""
        return np.array(self.last, np.float32)
