"""What the texts in an engine's caches see of images that lie outside them: images made ready, and inputs of calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.session import EngineError, Tensor
from mmopt.sight import Seen, Sight, gather, seen_inputs, segment_inputs, segments

if TYPE_CHECKING:
    from mmopt.decoding import Decoder


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


class View:
    """The images of one lane and what its rows see of them, as far as its text has been read."""

    def __init__(self, info: dict[str, Any], images: Sequence[Image] = (), before: int = 0):
        self.images = list(images)
        self.blocks = info["cross"]["blocks"]
        self.sight = Sight(info, len(self.images), self._tiles(), before)

    def _tiles(self) -> list[int]:
        return [i.tiles or self.blocks for i in self.images]

    def copy(self, images: Sequence[Image] = ()) -> View:
        """The same view, to go on with further images."""
        made = copy.copy(self)
        made.images, made.sight = [*self.images, *images], copy.copy(self.sight)
        made.sight.images, made.sight.tiles = len(made.images), made._tiles()
        return made


class Blocks(Sequence[np.ndarray]):
    """Blocks of several images ``[rows, width]``, one after the other; only those that are asked for are looked at."""

    def __init__(self, images: Sequence[Image], name: str, each: int):
        self._images, self._name, self._each = images, name, each

    def __len__(self) -> int:
        return len(self._images) * self._each

    def __getitem__(self, i: Any) -> Any:
        image, block = divmod(range(len(self))[i], self._each)
        return self._images[image].apart[self._name].numpy()[block]


def given(decoder: Decoder, views: Sequence[View], rows: Sequence[Sequence[Seen]]) -> dict[str, Tensor]:
    """The inputs of a call of the language model that tell what each row of each view sees."""
    model, cross = decoder.language, decoder.info["cross"]
    counts = [len(v.images) * cross["blocks"] for v in views]
    most, blind = max(1, *counts), any(r == () for row in rows for r in row)
    if decoder.whole and len(set(counts)) > 1 and blind:
        raise EngineError("a sample that sees none of its images beside samples with another number: run them apart")
    images = [v.images or ([decoder.nothing] if blind else []) for v in views]
    made = seen_inputs(rows, most)
    for name in decoder.whole:
        shape = model.inputs[name]["shape"][2:]
        made[name] = np.zeros((len(views), most, *shape), np.float32)
        for b, own in enumerate(images):
            for i, block in zip(range(most), Blocks(own, name, cross["blocks"]), strict=False):
                made[name][b, i] = block
    if decoder.segmented:
        chosen = segments(rows, cross["rows"])
        made |= segment_inputs(chosen, cross["rows"])
        for name, kind in decoder.segmented.items():
            width = model.inputs[f"segment.{name}"]["shape"][2]
            blocks: list[Sequence[np.ndarray]] = [Blocks(own, name, cross["blocks"]) for own in images]
            if not any(map(len, blocks)):
                blocks[0] = [np.zeros((cross["rows"], width), np.float32)]
            made[f"segment.{name}"] = gather(chosen, blocks, kind == "key")
    return {k: Tensor.of(x, model.inputs[k]["dtype"], model.device) for k, x in made.items() if k in model.inputs}
