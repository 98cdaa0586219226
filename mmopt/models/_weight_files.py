"""Weights as users have them on disk: one file or a directory of them, memory-mapped, never unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and what was expected."""


@dataclass
class Weights:
    """Tensors by key, the file that each lies in, and the config.json beside them (None: there is none)."""

    path: Path
    tensors: dict[str, Tensor]
    files: dict[str, Path]
    config: dict | None = None


@dataclass
class Assembled:
    """A model put together from several files: its config.json as one, official keys, and where each came from.

    homes: prefix of official keys -> where such a key is expected to lie, the first that fits. tokenizer: the text of a
    tokenizer.json with all tokens the model needs, if it was not in the checkpoint's own directory.
    """

    config: dict
    tensors: dict[str, Tensor]
    files: dict[str, Path]
    homes: dict[str, Path]
    tokenizer: str | None = None
    problems: list[str] = field(default_factory=list)


SINGLE = (  # in the order in which they are looked for; the first two may come in shards
    "model.safetensors",
    "pytorch_model.bin",
    "full_state_dict.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "checkpoint.pt",
)
NESTED = ("model_state_dict", "state_dict")  # a training script's file holds the weights under such a key


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; a checkpoint directory holds config.json and its weights")
    try:
        read = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(read, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(read).__name__}")
    return read


HUB_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "open_clip_*", "checkpoint.pt", "tokenizer.model")


def place(name: str, wanted: Sequence[str] = HUB_FILES) -> Path:
    """A file or directory; of a name that is neither, the `wanted` files (patterns) are downloaded from the hub."""
    if Path(name).exists():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise CheckpointError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(name, allow_patterns=list(wanted)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise CheckpointError(f"{name}: no such directory, and it cannot be had from the hub: {e}") from e
    return directory


def read_weights(path: Path) -> Weights:
    """All tensors of a file or directory by key. Nothing is read until it is used: the files are memory-mapped."""
    if path.is_file():
        tensors = read_file(path)
        return Weights(path, tensors, dict.fromkeys(tensors, path))
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    for single in SINGLE:
        index = path / f"{single}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map") or {}
            shards = sorted(set(weight_map.values()))
            missing = [f for f in shards if not (path / f).is_file()]
            if missing or not shards:
                raise CheckpointError(f"{index}: names shards that are not there: {', '.join(missing)}")
            found = Weights(path, {}, {}, config)
            for f in shards:
                part = read_file(path / f)
                found.tensors |= part
                found.files |= dict.fromkeys(part, path / f)
            absent = sorted(set(weight_map) - set(found.tensors))
            if absent:
                raise CheckpointError(f"{index}: its shards lack {', '.join(absent)}")
            return found
        if (path / single).is_file():
            tensors = read_file(path / single)
            return Weights(path, tensors, dict.fromkeys(tensors, path / single), config)
    if config is None:
        read_json(path / "config.json")
    raise CheckpointError(f"{path}: no weights; expected {', '.join(SINGLE)} or an index file of shards")


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        read = _unzip(path)
    except Exception as e:  # each reader has its own error types; the file's name must be in the message
        hint = ""
        if "TorchScript" in str(e):
            hint = "; save its tensors alone: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), OTHER)"
        raise CheckpointError(f"{path}: cannot be read as weights ({type(e).__name__}: {e}){hint}") from e
    if isinstance(read, dict) and path.suffix == ".pt":
        read = next((read[k] for k in NESTED if isinstance(read.get(k), dict)), read)
    if not isinstance(read, dict) or not all(isinstance(v, Tensor) for v in read.values()):
        raise CheckpointError(f"{path}: expected tensors by name, as a state dict is saved, found other values")
    return dict(read)


def _unzip(path: Path) -> object:
    """What torch.save wrote, tensors and plain values only."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as e:
        if "mmap can only be used with files saved with" not in str(e):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
