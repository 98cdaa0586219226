"""What the texts in an engine's caches see of images that lie outside them: images made ready, and inputs of calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmopt.runtime.tensor import Tensor
from mmopt.spec.cross_mask import CrossMask
from mmopt.spec.model_info import ModelInfo


@dataclass(frozen=True)
class Image:
    """An image made ready. rows: ``[1, ...]`` what the image stages make of it; apart: what the language model reads of
    it that lies outside the text, ``[blocks, rows, width]`` by name; tiles: blocks that count (None: all)."""

    rows: Tensor
    apart: dict[str, Tensor] = field(default_factory=dict)
    tiles: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.rows, *self.apart.values()))


class SequenceImages:
    """The images of one lane and what its rows see of them, as far as its text has been read."""

    def __init__(self, info: ModelInfo, images: Sequence[Image] = (), before: int = 0):
        self.images = list(images)
        self.blocks = info.required_cross.tiles
        self.sight = CrossMask(info.required_cross, info.image_id, len(self.images), self._tiles(), before)

    def _tiles(self) -> list[int]:
        return [i.tiles or self.blocks for i in self.images]

    def copy(self, images: Sequence[Image] = ()) -> SequenceImages:
        """The same view, to go on with further images."""
        made = copy.copy(self)
        made.images, made.sight = [*self.images, *images], copy.copy(self.sight)
        made.sight.images, made.sight.tiles = len(made.images), made._tiles()
        return made


class TileView(Sequence[np.ndarray]):
    """Tiles of several images ``[rows, width]``, one after the other; only those that are asked for are looked at."""

    def __init__(self, images: Sequence[Image], name: str, each: int):
        self._images, self._name, self._each = images, name, each

    def __len__(self) -> int:
        return len(self._images) * self._each

    def __getitem__(self, i: Any) -> Any:
        image, block = divmod(range(len(self))[i], self._each)
        return self._images[image].apart[self._name].numpy()[block]
