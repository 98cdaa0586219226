"""program.json: what an engine directory holds. The exporter writes it and the engine reads it, both through here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmopt.spec import typed_json
from mmopt.spec.errors import EngineError
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.schedule import Schedules
from mmopt.spec.schema import SCHEMA, check_schema

FILE = "program.json"


@dataclass(frozen=True)
class TensorInfo:
    """An input, an output or a carried value. shape: numbers and names of sizes that are free; onnx: its name in the
    graph, where that is another one."""

    shape: tuple[int | str, ...]
    dtype: str
    onnx: str | None = None

    def sizes(self, begin: int = 1) -> tuple[int, ...]:
        """Sizes from dimension `begin` on, where all are numbers."""
        return tuple(int(s) for s in self.shape[begin:])


@dataclass(frozen=True)
class StageInfo:
    """A graph: its file and what goes in and out. one_sample: it takes several tokens of one sample at a time."""

    file: str
    sha256: str
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    one_sample: bool = False


@dataclass(frozen=True)
class WeightFile:
    """A file of weights, its size and its checksum."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PassInfo:
    """What one pass did: the fields of a `mmopt.Report`."""

    name: str
    contract: str
    rewrites: tuple[str, ...]
    skipped: tuple[str, ...]
    checked: str
    seconds: float


@dataclass(frozen=True)
class Checked:
    """What was found when it was made: by the ONNX checker, beside the Program, by TensorRT; None if not done."""

    onnx: str | None = None
    program: str | None = None
    tensorrt: str | None = None


@dataclass(frozen=True)
class Manifest:
    """An engine directory. weights: the engine's own file, and those linked from a checkpoint.

    mmopt, versions: of what wrote it. target: "onnx" or "tensorrt". dtype: of the graphs (that of the model as it was
    loaded stands in info). state: values carried from call to call. tokenizer: a file, where there is one.
    """

    mmopt: str | None
    versions: dict[str, str | None]
    target: str
    dtype: str
    info: ModelInfo
    stages: dict[str, StageInfo]
    schedules: Schedules
    state: dict[str, TensorInfo]
    weights: tuple[WeightFile, ...]
    tokenizer: str | None = None
    reports: tuple[PassInfo, ...] = ()
    checked: Checked = field(default_factory=Checked)
    schema: int = SCHEMA

    @property
    def weight_bytes(self) -> int:
        return sum(w.bytes for w in self.weights)

    def to_json(self) -> dict[str, Any]:
        fields = {k: typed_json.to_json(v) for k, v in vars(self).items()}
        return {"schema": fields.pop("schema"), **fields}

    @staticmethod
    def from_json(data: Any) -> Manifest:
        """Raises ValueError that names a field which is missing, unknown or of another type."""
        check_schema(data, "an engine directory")
        return typed_json.read_dataclass(Manifest, data, "")

    def save(self, directory: Path) -> None:
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False)
        (directory / FILE).write_text(text, encoding="utf-8")


def read_directory(directory: Path, verify_checksums: bool = False) -> Manifest:
    """Read program.json and check that the files it lists are there and whole.

    The size of the weights and the checksums of the graphs are always checked, the checksum of the weights only with
    `verify_checksums`: it has to read them all. Raises EngineError.
    """
    if not directory.is_dir():
        raise EngineError(f"{directory}: no such directory")
    path = directory / FILE
    if not path.is_file():
        raise EngineError(f"{directory}: not an engine directory, it has no program.json (`mmopt export` makes one)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EngineError(f"{path}: cannot be read ({e})") from e
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        raise EngineError(f"{path}: not written by mmopt, it has no schema number")
    if data["schema"] < SCHEMA:
        raise EngineError(f"{path}: {_older(data, directory)}")
    if data["schema"] > SCHEMA:
        raise EngineError(
            f"{path}: has schema {data['schema']}, written by mmopt {data.get('mmopt')}; this mmopt knows schema "
            f"{SCHEMA}: upgrade it or export again"
        )
    try:
        manifest = Manifest.from_json(data)
    except ValueError as e:
        raise EngineError(f"{path}: {e}") from e
    for stage in manifest.stages.values():
        _check_file(directory / stage.file, None, stage.sha256)
    for entry in manifest.weights:
        _check_file(directory / entry.file, entry.bytes, entry.sha256 if verify_checksums else None)
    if manifest.tokenizer:
        _check_file(directory / manifest.tokenizer, None, None)
    return manifest


def _older(data: dict[str, Any], directory: Path) -> str:
    """What to do with a directory of an older schema: the line that makes it anew, with its options."""
    said = data["info"] if isinstance(data.get("info"), dict) else {}
    options = {k: data.get(k) for k in ("target", "dtype")} | {k: said.get(k) for k in ("batch", "images", "context")}
    given = " ".join(f"--{k} {v}" for k, v in options.items() if v is not None)
    return (
        f"has schema {data['schema']}, this mmopt reads schema {SCHEMA}; export it again: "
        f"mmopt export CHECKPOINT {directory} {given}".rstrip()
    )


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
