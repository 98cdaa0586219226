"""The beginning of prompts, computed once: its ids, its rows in the caches, its images. Kept in memory or in a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmopt.runtime.cache_layout import CacheLayout
from mmopt.runtime.images import Image, SequenceImages
from mmopt.runtime.tensor import Tensor, to_bits
from mmopt.spec.errors import EngineError, engine_errors
from mmopt.spec.files import write_whole
from mmopt.spec.manifest import Manifest
from mmopt.spec.prompt import count_tokens
from mmopt.spec.schema import SCHEMA, check_schema


@dataclass(frozen=True, eq=False)
class Prefix:
    """What `Engine.prefix` returns. `caches`: name -> filled rows ``[kv_heads, rows, head_dim]``, as they are stored.

    made_for: the engine's fingerprint; another engine would read its rows wrongly, so it refuses them. text: what the
    ids were made from, if not ids were given.
    """

    ids: tuple[int, ...]
    rows: int
    images: list[Image]
    caches: dict[str, np.ndarray] = field(repr=False)
    view: SequenceImages | None = field(repr=False)
    made_for: str
    dtype: str
    text: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.caches.values()) + sum(i.nbytes for i in self.images)

    def save(self, path: str | Path) -> Path:
        """Write a file; it appears whole or not at all. EngineError if it cannot be written."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = Path(path)
        tensors = {f"cache.{k}": x for k, x in self.caches.items()}
        for i, image in enumerate(self.images):
            tensors |= {
                f"image.{i}.{k}": to_bits(t.numpy(), t.dtype) for k, t in {"rows": image.rows, **image.apart}.items()
            }
        said = {
            "schema": SCHEMA, "made_for": self.made_for, "ids": self.ids, "rows": self.rows, "dtype": self.dtype,
            "tiles": [i.tiles for i in self.images], "text": self.text,
        }  # fmt: skip
        arrays, metadata = {k: np.ascontiguousarray(x) for k, x in tensors.items()}, {"prefix": json.dumps(said)}
        try:
            write_whole(path, lambda partial: save_file(arrays, partial, metadata))
        except (OSError, SafetensorError) as e:
            raise EngineError(f"{path}: cannot be written ({e})") from e
        return path


def fingerprint(manifest: Manifest) -> str:
    """What makes an engine compute what it computes: graphs, weights and dtype, as program.json lists them."""
    listed = {
        "stages": {k: s.sha256 for k, s in manifest.stages.items()},
        "weights": [w.sha256 for w in manifest.weights],
        "dtype": manifest.dtype,
        "image": manifest.info.processing.image,
    }
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def read(path: str | Path, layout: CacheLayout, made_for: str) -> Prefix:
    """A file that `Prefix.save` wrote. EngineError if it cannot be read or was made for another engine."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "np") as f:
            said = json.loads((f.metadata() or {}).get("prefix", "{}"))
            with engine_errors(f"{path}: "):
                check_schema(said, "a stored prefix", ("made_for", "ids", "rows", "dtype", "tiles"), ("text",))
            if said["made_for"] != made_for:
                raise EngineError(f"{path}: made for another engine (or for this one before it was exported again)")
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  it is no dict
        return _assembled(said, tensors, layout, made_for)
    except EngineError:
        raise
    except (OSError, SafetensorError, json.JSONDecodeError) as e:
        raise EngineError(f"{path}: cannot be read as a stored prefix ({e})") from e
    except (KeyError, TypeError, ValueError) as e:
        raise EngineError(f"{path}: not of the expected form ({type(e).__name__}: {e})") from e


def _assembled(said: dict[str, Any], tensors: dict[str, np.ndarray], layout: CacheLayout, made_for: str) -> Prefix:
    """A prefix from what a file holds. ValueError or KeyError if that is not what the engine would have written."""
    dtype, rows, info = said["dtype"], said["rows"], layout.info
    if dtype != layout.dtype or rows != count_tokens(said["ids"], info):
        raise ValueError(f"{rows} rows in {dtype}, expected {count_tokens(said['ids'], info)} in {layout.dtype}")
    images = []
    for i, tiles in enumerate(said["tiles"]):
        own = {k.split(".", 2)[2]: x for k, x in tensors.items() if k.startswith(f"image.{i}.")}
        made = {k: Tensor.of(x, dtype, layout.device) for k, x in own.items()}
        images.append(Image(made.pop("rows"), {k: made[k] for k in layout.cross}, tiles))
    caches = {k: tensors[f"cache.{k}"] for k in layout.caches}
    for k, x in caches.items():
        _, heads, _, width = layout.caches[k][0]
        if x.shape != (heads, rows, width):
            raise ValueError(f"{k} has shape {x.shape}, expected {(heads, rows, width)}")
    view = SequenceImages(info, images) if info.cross else None
    if view:
        view.sight.read(said["ids"])
    return Prefix(tuple(said["ids"]), rows, images, caches, view, made_for, dtype, said.get("text"))
