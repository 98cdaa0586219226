"""The beginning of prompts, computed once: its ids, its rows in the caches, its images. Kept in memory or in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.planning import count_rows
from mmopt.session import DTYPES, EngineError, Tensor, to_bits
from mmopt.view import Image, View

if TYPE_CHECKING:
    from mmopt.decoding import Cache, Decoder

SCHEMA = 1


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
    view: View | None = field(repr=False)
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
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{threading.get_ident()}")
        try:
            save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, partial, {"prefix": json.dumps(said)})
            partial.replace(path)
        except (OSError, SafetensorError) as e:
            raise EngineError(f"{path}: cannot be written ({e})") from e
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return path


def fingerprint(facts: dict[str, Any]) -> str:
    """What makes an engine compute what it computes: graphs, weights and dtype, as program.json lists them."""
    listed = {
        "stages": {k: s["sha256"] for k, s in facts["stages"].items()},
        "weights": [f["sha256"] for f in (facts["weights"], *facts["weights"].get("linked", ()))],
        "dtype": facts["dtype"],
        "image": facts["processing"]["image"],
    }
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def read(path: str | Path, decoder: Decoder, made_for: str) -> Prefix:
    """A file that `Prefix.save` wrote. EngineError if it cannot be read or was made for another engine."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "np") as f:
            said = json.loads((f.metadata() or {}).get("prefix", "{}"))
            schema = said.get("schema") if isinstance(said, dict) else None
            if schema != SCHEMA:
                raise EngineError(f"{path}: not a prefix of schema {SCHEMA}, found {schema}")
            if said["made_for"] != made_for:
                raise EngineError(f"{path}: made for another engine (or for this one before it was exported again)")
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  it is no dict
        return _assembled(said, tensors, decoder, made_for)
    except EngineError:
        raise
    except (OSError, SafetensorError, json.JSONDecodeError) as e:
        raise EngineError(f"{path}: cannot be read as a stored prefix ({e})") from e
    except (KeyError, TypeError, ValueError) as e:
        raise EngineError(f"{path}: not of the expected form ({type(e).__name__}: {e})") from e


def _assembled(said: dict[str, Any], tensors: dict[str, np.ndarray], decoder: Decoder, made_for: str) -> Prefix:
    """A prefix from what a file holds. ValueError or KeyError if that is not what the engine would have written."""
    dtype, rows, device, model = said["dtype"], said["rows"], decoder.language.device, decoder.language
    if dtype != decoder.dtype or rows != count_rows(said["ids"], decoder.info):
        raise ValueError(f"{rows} rows in {dtype}, expected {count_rows(said['ids'], decoder.info)} in {decoder.dtype}")
    images = []
    for i, tiles in enumerate(said["tiles"]):
        own = {k.split(".", 2)[2]: x for k, x in tensors.items() if k.startswith(f"image.{i}.")}
        made = {k: Tensor.of(x, dtype, device) for k, x in own.items()}
        images.append(Image(made.pop("rows"), {k: made[k] for k in (*decoder.whole, *decoder.segmented)}, tiles))
    caches = {k: tensors[f"cache.{k}"] for k in model.inputs if k in model.outputs and k != "past"}
    for k, x in caches.items():
        _, heads, _, width = model.inputs[k]["shape"]
        if x.shape != (heads, rows, width):
            raise ValueError(f"{k} has shape {x.shape}, expected {(heads, rows, width)}")
    view = View(decoder.info, images) if decoder.cross else None
    if view:
        view.sight.read(said["ids"])
    return Prefix(tuple(said["ids"]), rows, images, caches, view, made_for, dtype, said.get("text"))


def take(
    cache: Cache, lane: int, ids: tuple[int, ...], images: list[Image], made_for: str, dtype: str, text: str | None
) -> Prefix:
    """What lies in a lane, as a prefix of its own."""
    rows = int(cache.past[lane])
    caches: dict[str, np.ndarray] = {}
    for name, t in cache.tensors.items():
        whole = t.owner if isinstance(t.owner, np.ndarray) else t.owner.numpy()
        caches[name] = whole[lane, :, :rows].astype(DTYPES[t.dtype][0], copy=True)
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
    cache.past[lane], cache.images[lane] = prefix.rows, prefix.ids.count(cache.decoder.info["image_id"])
    if prefix.view is not None:
        cache.views[lane] = prefix.view.copy()
        cache.version += 1
