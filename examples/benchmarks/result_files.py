"""The files under `results/`: read, and refused by name where they are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mmopt.measure.head import KEYS
from mmopt.spec.schema import SCHEMA

RESULTS = Path(__file__).parent / "results"


class ResultFile(NamedTuple):
    """What one file holds. name: without ending; runs: config -> result, or "" -> result where a file has one alone."""

    name: str
    kind: str
    runs: dict[str, dict[str, Any]]


def read(path: Path) -> ResultFile:
    """Raises ValueError that names the file if it is no JSON object of `SCHEMA` or a head lacks something."""
    try:
        data = json.loads(path.read_text())
    except ValueError as e:  # of JSON and of text that is none
        raise ValueError(f"{path.name}: not JSON: {e}") from e
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path.name}: expected an object of schema {SCHEMA}, found {found!r}")
    runs = data.get("configs", {"": data})
    if not isinstance(runs, dict) or not runs:
        raise ValueError(f"{path.name}: its configs are {runs!r}, expected results by name")
    for config, run in runs.items():
        missing = [k for k in KEYS if k not in run] + [k for k in ("cpu", "cores") if k not in run.get("machine", {})]
        if missing:
            raise ValueError(f"{path.name}: {config + ': ' * bool(config)}lacks {', '.join(missing)}")
        if run["kind"] != data.get("kind"):
            raise ValueError(f"{path.name}: {config}: kind {run['kind']!r} in a file of kind {data.get('kind')!r}")
    return ResultFile(path.stem, data["kind"], runs)


def read_all(folder: Path = RESULTS) -> list[ResultFile]:
    """All result files of a folder, by name."""
    return [read(path) for path in sorted(folder.glob("*.json"))]
