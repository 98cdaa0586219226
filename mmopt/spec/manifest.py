"""TODO."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt.spec.errors import EngineError

SCHEMA = 1  # the newest program.json that is understood


# ------------------------------------------------------------------------------------------------ engine directories
def read_directory(directory: Path, verify_checksums: bool = False) -> dict[str, Any]:
    """Read program.json and check that the files it lists are there and whole.

    The size of the weights and the checksums of the graphs are always checked, the checksum of the weights only with
    `verify_checksums`: it has to read them all. Raises EngineError.
    """
    if not directory.is_dir():
        raise EngineError(f"{directory}: no such directory")
    path = directory / "program.json"
    if not path.is_file():
        raise EngineError(f"{directory}: not an engine directory, it has no program.json (`mmopt export` makes one)")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EngineError(f"{path}: cannot be read ({e})") from e
    if not isinstance(facts, dict) or not isinstance(facts.get("schema"), int):
        raise EngineError(f"{path}: not written by mmopt, it has no schema number")
    if facts["schema"] > SCHEMA:
        raise EngineError(
            f"{path}: has schema {facts['schema']}, written by mmopt {facts.get('mmopt')}; this mmopt knows schemas up "
            f"to {SCHEMA}: upgrade it or export again"
        )
    missing = [k for k in ("dtype", "info", "stages", "schedule", "weights", "processing") if k not in facts]
    if missing:
        raise EngineError(f"{path}: lacks {', '.join(missing)}")
    try:
        for stage in facts["stages"].values():
            _check_file(directory / stage["file"], None, stage["sha256"])
        for entry in (facts["weights"], *facts["weights"].get("linked", ())):
            _check_file(directory / entry["file"], entry["bytes"], entry["sha256"] if verify_checksums else None)
        if tokenizer := facts["processing"].get("tokenizer"):
            _check_file(directory / tokenizer, None, None)
    except (AttributeError, KeyError, TypeError) as e:
        raise EngineError(f"{path}: not of the expected form ({type(e).__name__}: {e})") from e
    return facts


def _check_file(path: Path, size: int | None, digest: str | None) -> None:
    if not path.is_file():
        raise EngineError(f"{path}: listed in program.json, but not there; the directory is incomplete")
    found_size = path.stat().st_size
    if size is not None and found_size != size:
        raise EngineError(f"{path}: has {found_size} bytes, program.json says {size}; the file is truncated or foreign")
    if digest is not None:
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != digest:
            raise EngineError(f"{path}: its sha256 is {found}, program.json says {digest}; the file was changed")


@dataclass(frozen=True)
class Cross:
    """How text rows see images that lie outside the text, through cross-attention. Defaults: see `mmopt.spec.cross_mask`.

    blocks: blocks of rows that one image becomes (tiles). rows, width: shape of a block.
    before: what text before the first image gets, "nothing" (zeros) or "everything" (attention to all blocks).
    together: images whose markers follow each other directly are seen together by the text after them.
    reset: a marker that is fed while decoding makes its sample see the first image again.
    """

    blocks: int
    rows: int
    width: int
    before: str = "nothing"
    together: bool = False
    reset: bool = False


@dataclass(frozen=True)
class Flow:
    """How a rectified flow paints: noise at time 0, data at time 1, the velocity by the language model.

    latents: shape of one image's latents. rows: rows of the language model that they become, after one that tells the
    time. time_scale: times are given to the model as time * time_scale. steps, guidance: the reference's.
    """

    latents: tuple[int, int, int]
    rows: int
    time_scale: float = 1000.0
    steps: int = 30
    guidance: float = 2.0
