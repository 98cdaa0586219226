"""Key and value caches of a batch, and how stored prefixes are taken from them and put back."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmopt.runtime.cache_layout import CacheLayout
from mmopt.runtime.images import Image, SequenceImages
from mmopt.runtime.prefix import Prefix
from mmopt.runtime.tensor import Tensor
from mmopt.spec.dtypes import DTYPES


class Cache:
    """Key and value caches of a batch. `past[lane]` rows of a lane are filled; lowering it forgets those after it."""

    def __init__(self, layout: CacheLayout, batch: int):
        self.batch, self.layout = batch, layout
        self.past = np.zeros(batch, np.int64)
        self.images = np.zeros(batch, np.int64)  # among the text of each lane
        self.leading: list[tuple[int, ...]] = [()] * batch  # text before the first image that each lane begins with
        # Where images lie outside the text: what each lane sees, and a number that changes whenever that does.
        self.views = [SequenceImages(layout.info) for _ in range(batch)] if layout.info.cross else []
        self.version = 0
        self.holds: list[Prefix | None] = [None] * batch  # the stored prefix whose rows each lane begins with
        self.tensors = {
            k: Tensor.zeros((batch, *shape[1:]), dtype, layout.device) for k, (shape, dtype) in layout.caches.items()
        }
        self.steps: dict[int, Any] = {}  # what a decoder has bound to this memory, by the number of lanes


def take(
    cache: Cache, lane: int, ids: tuple[int, ...], images: list[Image], made_for: str, dtype: str, text: str | None
) -> Prefix:
    """What lies in a lane, as a prefix of its own."""
    rows = int(cache.past[lane])
    caches: dict[str, np.ndarray] = {}
    for name, t in cache.tensors.items():
        whole = t.owner if isinstance(t.owner, np.ndarray) else t.owner.numpy()
        caches[name] = whole[lane, :, :rows].astype(DTYPES[t.dtype].numpy, copy=True)
    view = cache.views[lane].copy() if cache.views else None
    return Prefix(ids, rows, images, caches, view, made_for, dtype, text)


def restore(cache: Cache, lane: int, prefix: Prefix) -> None:
    """Put a prefix into a lane; a lane that still holds its rows keeps them."""
    if cache.holds[lane] is not prefix:
        for name, t in cache.tensors.items():
            if isinstance(t.owner, np.ndarray):
                t.owner[lane, :, : prefix.rows] = prefix.caches[name]
            else:  # memory of a device is written whole
                whole = t.owner.numpy()
                whole[lane, :, : prefix.rows] = prefix.caches[name]
                t.owner.update_inplace(whole)
        cache.holds[lane], cache.leading[lane] = prefix, ()
    cache.past[lane], cache.images[lane] = prefix.rows, prefix.ids.count(cache.layout.info.image_id)
    if prefix.view is not None:
        cache.views[lane] = prefix.view.copy()
        cache.version += 1
