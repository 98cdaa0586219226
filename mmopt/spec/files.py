"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """`write` makes a file beside `path` that then takes its place: the file is there whole or not at all."""
    path = Path(path)
    partial = path.with_stem(f".{path.stem}.partial-{os.getpid()}-{threading.get_ident()}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def save_json(data: dict[str, Any], path: str | Path) -> None:
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
