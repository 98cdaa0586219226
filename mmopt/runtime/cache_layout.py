"""What caches and stored prefixes have to know of an engine: names, shapes and types of its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmopt.spec.model_info import ModelInfo


@dataclass(frozen=True)
class CacheLayout:
    """caches: name -> shape ``(batch, kv_heads, capacity, head_dim)`` and dtype. dtype: of the rows of images.

    cross: names of what the language model reads of images that lie outside the text (empty: none do).
    """

    caches: dict[str, tuple[tuple[Any, ...], str]]
    device: str
    dtype: str
    cross: tuple[str, ...]
    info: ModelInfo
