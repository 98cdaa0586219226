"""Which images each row of a text sees, where images lie outside the text; on the host, needs no torch and no model.

An image is one or more tiles, blocks of rows. Tiles of a sample are numbered through, image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmopt.spec.model_info import Cross

# Inputs of a language model that the host makes anew for each call: what the rows of this call see.
CROSS_INPUTS = ("seen", "attends", "sees", "segment_rows", "row_segments", "key_mask")
VisibleTiles = (
    tuple[int, ...] | None
)  # blocks that a row sees; () sees none and weighs all keys the same; None gets zeros


class Before(tuple):
    """All blocks of a sample, for rows before its first image that attend to everything but count as seeing nothing."""


class CrossMask:
    """What one sample's rows see, from the first row on. cross, image_id: those of a `mmopt.spec.model_info.ModelInfo`.

    images: how many the sample has, whether or not its text has as many markers. tiles: blocks of each image that count
    (by default all). before: markers that came earlier, so that the text goes on after them.
    """

    def __init__(self, cross: Cross, image_id: int, images: int, tiles: Sequence[int] | None = None, before: int = 0):
        self.cross, self.image_id, self.images = cross, image_id, images
        self.tiles = [self.cross.tiles] * images if tiles is None else list(tiles)
        if len(self.tiles) != images or any(not 1 <= t <= self.cross.tiles for t in self.tiles):
            raise ValueError(f"tiles are {self.tiles}, expected {images} numbers from 1 to {self.cross.tiles}")
        self.markers, self._after_marker = before, False
        everything = images and self.cross.leading_text == "all_images"
        self.now: VisibleTiles = Before(range(images * self.cross.tiles)) if everything else None
        if before:
            self.now = self._image(before - 1)

    def _image(self, i: int) -> VisibleTiles:
        """Tiles of image i; a marker without an image sees none."""
        first = i * self.cross.tiles
        return tuple(range(first, first + self.tiles[i])) if i < self.images else ()

    def read(self, ids: Sequence[int]) -> list[VisibleTiles]:
        """The next rows of the prompt."""
        rows: list[VisibleTiles] = []
        for token in ids:
            marker = token == self.image_id
            if marker:
                new = self._image(self.markers)
                if self._after_marker and self.cross.merge_adjacent and self.now is not None and new is not None:
                    new = self.now + new
                self.now, self.markers = new, self.markers + 1
            self._after_marker = marker
            rows.append(self.now)
        return rows

    def decode(self, token: int) -> VisibleTiles:
        """The row of a token fed while decoding: a marker shows no new image."""
        if token == self.image_id and self.cross.marker_resets:
            self.now = self._image(0)
        return self.now


def visible_tiles(
    ids: Sequence[int], images: int, cross: Cross, image_id: int, before: int = 0, tiles: Sequence[int] | None = None
) -> list[VisibleTiles]:
    """What each row of a prompt sees; see `CrossMask`."""
    return CrossMask(cross, image_id, images, tiles, before).read(ids)


def masks(rows: Sequence[VisibleTiles], blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seen ``[n, blocks]``, attends ``[n]``, sees ``[n]``): which blocks, whether at all, whether any."""
    seen = np.zeros((len(rows), blocks), np.bool_)
    for i, row in enumerate(rows):
        seen[i, list(row or ())] = True
    attends, sees = [r is not None for r in rows], [bool(r) and not isinstance(r, Before) for r in rows]
    return seen, np.array(attends, np.bool_), np.array(sees, np.bool_)


@dataclass(frozen=True)
class Segments:
    """Rows put beside what they see. `blocks`: (sample, blocks it sees) of each segment.

    segment_rows ``[S, L]`` and row_segments ``[B, n]`` are the indices of `mmopt.ir.ops.segment_attention`.
    """

    blocks: list[tuple[int, tuple[int, ...]]]
    segment_rows: np.ndarray
    row_segments: np.ndarray


def segments(samples: Sequence[Sequence[VisibleTiles]], keys: int) -> Segments:
    """Put rows that see the same together, for samples of equally many rows; `keys`: rows of a block (its cost).

    All segments take the length of the longest, so longer ones are cut where that costs less. With nothing to see there
    is one segment that nobody reads.
    """
    n = len(samples[0])
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for b, rows in enumerate(samples):
        for i, row in enumerate(rows):
            if row is not None:
                groups.setdefault((b, row), []).append(b * n + i)
    if not groups:
        return Segments([(0, ())], np.zeros((1, 1), np.int64), np.full((len(samples), n), 1, np.int64))
    lengths = [len(g) for g in groups.values()]

    def cost(length: int) -> int:
        return sum(-(-k // length) for k in lengths) * (length + keys)

    length = min(set(lengths), key=lambda k: (cost(k), k))
    pieces = [(key, group[i : i + length]) for key, group in groups.items() for i in range(0, len(group), length)]
    segment_rows = np.zeros((len(pieces), length), np.int64)
    row_segments = np.full(len(samples) * n, len(pieces) * length, np.int64)
    for s, (_, put) in enumerate(pieces):
        segment_rows[s, : len(put)] = put
        row_segments[put] = s * length + np.arange(len(put))
    return Segments([key for key, _ in pieces], segment_rows, row_segments.reshape(len(samples), n))


def seen_inputs(samples: Sequence[Sequence[VisibleTiles]], blocks: int) -> dict[str, np.ndarray]:
    """`masks` of several samples as inputs of a language model, by name, a row for each sample."""
    each = [masks(rows, blocks) for rows in samples]
    return {name: np.stack([m[i] for m in each]) for i, name in enumerate(CROSS_INPUTS[:3])}


def segment_inputs(chosen: Segments, keys: int) -> dict[str, np.ndarray]:
    """Segments as inputs of a language model, by name; K and V themselves are those of `gather`."""
    places = {"segment_rows": chosen.segment_rows, "row_segments": chosen.row_segments}
    return places | {"key_mask": key_mask(chosen, keys)}


def key_mask(chosen: Segments, keys: int) -> np.ndarray:
    """``[S, most blocks * keys]``: which keys of the blocks put side by side for each segment count."""
    most = max(1, *(len(blocks) for _, blocks in chosen.blocks))
    taken = [[i < max(1, len(blocks)) for i in range(most)] for _, blocks in chosen.blocks]
    return np.repeat(np.array(taken, np.bool_), keys, axis=1)


def gather(chosen: Segments, samples: Sequence[Sequence[np.ndarray]], is_key: bool) -> np.ndarray:
    """K or V of each sample's blocks ``[rows, width]`` -> of each segment ``[S, most blocks * rows, width]``.

    A segment that sees nothing weighs all blocks of its sample the same: keys of zero, and in every row the mean of the
    values.
    """
    most = max(1, *(len(blocks) for _, blocks in chosen.blocks))
    one = next(blocks[0] for blocks in samples if len(blocks))
    made = np.zeros((len(chosen.blocks), most, *one.shape), one.dtype)
    for s, (b, blocks) in enumerate(chosen.blocks):
        for place, i in enumerate(blocks):
            made[s, place] = samples[b][i]
        if not blocks and not is_key and len(samples[b]):
            made[s, 0] = np.mean([x.astype(np.float32).mean(0) for x in samples[b]], 0)
    return made.reshape(len(chosen.blocks), most * one.shape[0], one.shape[1])
