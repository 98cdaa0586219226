"""Load a checkpoint: a directory in the official layout (or a hub id) -> the family's model, weights memory-mapped."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmopt.family import Family, family_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONFIGS = Path(__file__).parent / "configs"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and what was expected."""


@dataclass
class Model:
    """A loaded checkpoint. ``directory`` is None for a shipped config; ``has_weights`` False if it is shapes only."""

    family: Family
    config: Any
    raw_config: dict
    module: nn.Module
    directory: Path | None
    has_weights: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def image_id(self) -> int:
        """The id that stands for an image in a prompt."""
        given = self.family.image_id
        return given(self.config) if callable(given) else given

    @property
    def processing(self) -> dict[str, Any]:
        """Image and chat settings of the checkpoint, as an engine stores them."""
        path = self.directory / "preprocessor_config.json" if self.directory else None
        preprocessor = _read_json(path) if path is not None and path.is_file() else {}
        return {"image": self.family.image_processing(self.config, preprocessor), "chat": self.family.chat}

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def load(path: str | Path, dtype: str | torch.dtype | None = None) -> Model:
    """Load a directory with ``config.json`` and safetensors (single or sharded) or ``pytorch_model*.bin`` files.

    A name that is no directory is taken as a Hugging Face hub id. `dtype` converts the weights (a copy); by default
    they stay as stored, mapped from the files. Raises CheckpointError (missing or foreign files; missing, unexpected or
    mis-shaped keys, all listed) or ValueError (a config value that is not supported).
    """
    directory = Path(path)
    if not directory.is_dir():
        directory = _download(str(path))
    raw = _read_json(directory / "config.json")
    family = family_of(raw)
    config = family.parse_config(raw)
    with torch.device("meta"):
        module = family.build(config)
    _assign(family, config, module, _read_weights(directory), directory)
    module.eval().requires_grad_(False)
    if dtype is not None:
        _convert(module, _dtype(dtype))
    return Model(family, config, raw, module, directory)


def from_config(
    name: str | Path | dict, dtype: str | torch.dtype | None = None, random: bool = False, seed: int = 0
) -> Model:
    """A model of a shipped config (``mplug-owl2-7b`` ...), a config.json file or a dict.

    `dtype` is by default the config's torch_dtype, or float32. Without `random` the weights are shapes only: they can
    be traced, optimized and inspected, not run.
    """
    raw = name if isinstance(name, dict) else _read_json(_config_file(name))
    family = family_of(raw)
    config = family.parse_config(raw)
    kind = _dtype(raw.get("torch_dtype") or "float32" if dtype is None else dtype)
    with torch.device("meta"):
        module = family.build(config)
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, p in list(owner._parameters.items()):
            if p is None:
                continue
            if id(p) not in made:
                value = (
                    _random(key, p.shape, kind, generator) if random else torch.zeros((), dtype=kind).expand(p.shape)
                )
                made[id(p)] = nn.Parameter(value, requires_grad=False)
            owner._parameters[key] = made[id(p)]
    module.eval()
    return Model(family, config, raw, module, None, has_weights=random)


def shipped_configs() -> list[str]:
    return sorted(p.stem for p in CONFIGS.glob("*.json"))


def _config_file(name: str | Path) -> Path:
    shipped = CONFIGS / f"{name}.json"
    if shipped.is_file() or not Path(name).exists():
        if not shipped.is_file():
            raise CheckpointError(f"no config {str(name)!r}: neither a file nor one of {', '.join(shipped_configs())}")
        return shipped
    path = Path(name)
    return path / "config.json" if path.is_dir() else path


def _random(key: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Weights of plausible size: activations stay near 1, gains near 1, nothing exactly 0 or 1."""
    if len(shape) == 1:
        centre = 1.0 if key == "weight" else 0.0
        return (centre + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    scale = 1.0 if len(shape) == 3 else shape[1:].numel() ** -0.5
    return torch.empty(shape, dtype=dtype).normal_(generator=generator).mul_(scale)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, expected float32, float16 or bfloat16")
    return kind


def _download(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise CheckpointError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer.model"]
    try:
        directory = Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise CheckpointError(f"{name}: no such directory, and it cannot be had from the hub: {e}") from e
    return directory


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; a checkpoint directory holds config.json and its weights")
    try:
        read = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(read, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(read).__name__}")
    return read


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the directory by key. Nothing is read until it is used: the files are memory-mapped."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (directory / index).is_file():
            weight_map = _read_json(directory / index).get("weight_map") or {}
            files = sorted(set(weight_map.values()))
            missing = [f for f in files if not (directory / f).is_file()]
            if missing or not files:
                raise CheckpointError(f"{directory / index}: names shards that are not there: {', '.join(missing)}")
            tensors: dict[str, torch.Tensor] = {}
            for f in files:
                tensors |= _read_file(directory / f)
            absent = sorted(set(weight_map) - set(tensors))
            if absent:
                raise CheckpointError(f"{directory / index}: its shards lack {', '.join(absent)}")
            return tensors
        if (directory / single).is_file():
            return _read_file(directory / single)
    for single in ("full_state_dict.safetensors", "checkpoint.pt"):
        if (directory / single).is_file():
            return _read_file(directory / single)
    raise CheckpointError(
        f"{directory}: no weights; expected model.safetensors, pytorch_model.bin, an index file of shards, "
        "full_state_dict.safetensors or checkpoint.pt"
    )


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        read = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # each reader has its own error types; the file's name must be in the message
        raise CheckpointError(f"{path}: cannot be read as weights ({type(e).__name__}: {e})") from e
    if not isinstance(read, dict) or not all(isinstance(v, torch.Tensor) for v in read.values()):
        raise CheckpointError(f"{path}: expected tensors by name, as a state dict is saved, found other values")
    return read


def _assign(family: Family, config: Any, module: nn.Module, tensors: dict, directory: Path) -> None:
    expected = dict(module.state_dict())
    derived = {k: tensors.pop(k) for k in list(tensors) if k not in expected and re.search(family.derived, k)}
    problems = [f"derived {k}: {why}" for k, v in derived.items() if (why := family.check_derived(config, k, v))]
    tied = _tied(module)
    for k, names in tied.items():  # one tensor under several names: any of them will do
        given = next((tensors[n] for n in names if n in tensors), None)
        if k not in tensors and given is not None:
            tensors[k] = given
    problems += [f"missing {k} {tuple(v.shape)}" for k, v in expected.items() if k not in tensors]
    problems += [f"unexpected {k} {tuple(v.shape)}" for k, v in tensors.items() if k not in expected]
    for k, v in tensors.items():
        if k in expected and v.shape != expected[k].shape:
            problems.append(f"{k}: expected shape {tuple(expected[k].shape)}, found {tuple(v.shape)}")
        elif not v.is_floating_point():
            problems.append(f"{k}: expected float32, float16 or bfloat16, found {v.dtype}")
    if problems:
        shown = "\n  ".join(problems[:200]) + (f"\n  and {len(problems) - 200} more" if len(problems) > 200 else "")
        raise CheckpointError(f"{directory}: the weights do not fit config.json:\n  {shown}")
    kinds = {v.dtype for v in tensors.values()}
    if len(kinds) > 1:  # mixed files (norms kept in float32, say): compute in the widest, as promotion would
        wide = torch.float32 if torch.float32 in kinds or len(kinds) > 1 else kinds.pop()
        tensors = {k: v.to(wide) for k, v in tensors.items()}
    module.load_state_dict(tensors, strict=False, assign=True)
    if tied:
        module.tie_weights()


def _tied(module: nn.Module) -> dict[str, list[str]]:
    """Each key whose parameter has several -> all keys of that parameter."""
    groups: dict[int, list[str]] = {}
    for k, p in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(p), []).append(k)
    return {k: names for names in groups.values() if len(names) > 1 for k in names}


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to dtype; computed buffers (positions, frequencies) stay float32."""
    done: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, p in list(owner._parameters.items()):
            if p is not None:
                if id(p) not in done:
                    done[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
                owner._parameters[key] = done[id(p)]
