"""Load a checkpoint: a directory in the official layout (or a hub id) -> the family's model, weights memory-mapped."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmopt.models import families, family_of
from mmopt.models._family import Family
from mmopt.models._weight_files import Assembled, CheckpointError, Weights, place, read_json, read_weights
from mmopt.spec.dtypes import MODEL_DTYPES

CONFIGS = Path(str(importlib.resources.files("mmopt") / "configs"))


@dataclass
class Model:
    """A loaded checkpoint.

    directory: None for a shipped config, and for a model put together from several places. has_weights: False if it is
    shapes only. tokenizer: the text of a tokenizer.json, where `directory` does not hold it. arguments: those of `load`
    that gave this model.
    """

    family: Family
    config: Any
    raw_config: dict
    module: nn.Module
    directory: Path | None
    has_weights: bool = True
    tokenizer: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

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
        preprocessor = read_json(path) if path is not None and path.is_file() else {}
        return {"image": self.family.image_processing(self.config, preprocessor), "chat": self.family.chat}

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    language_model: str | Path | None = None,
    vision: str | Path | None = None,
    **options: Any,
) -> Model:
    """Load a directory with ``config.json`` and safetensors (single or sharded) or ``pytorch_model*.bin`` files.

    A name that is neither file nor directory is taken as a Hugging Face hub id. `dtype` converts the weights (a copy);
    by default they stay as stored, mapped from the files. Where a checkpoint holds only what was trained, it may be a
    file or a directory without config.json, and `language_model` and `vision` are where the rest lies: directories (or
    hub ids) with config.json and weights; `vision` may be a file. Further options belong to the family.

    Raises CheckpointError (missing or foreign files; missing, unexpected or mis-shaped keys, all listed) or ValueError
    (a config value or an option that is not supported).
    """
    arguments = {"path": path, "dtype": dtype, "language_model": language_model, "vision": vision, **options}
    found = {
        name: read_weights(place(str(where)))
        for name, where in (("checkpoint", path), ("language_model", language_model), ("vision", vision))
        if where is not None
    }
    checkpoint = found["checkpoint"]
    family = family_of(checkpoint.config) if checkpoint.config else _family_by_keys(checkpoint)
    parts = (found.get("language_model"), found.get("vision"))
    if family.assemble is not None:
        given = family.assemble(checkpoint, *parts, options)
    elif options or any(parts):
        wrong = ", ".join([n for n in found if n != "checkpoint"] + sorted(options))
        raise ValueError(f"{wrong}: checkpoints of the family {family.name} are complete and take no such option")
    else:
        given = Assembled(checkpoint.config or {}, checkpoint.tensors, checkpoint.files, {"": checkpoint.path})
    config = family.parse_config(given.config)
    with torch.device("meta"):
        module = family.build(config)
    _assign(family, config, module, given, checkpoint.path, None if dtype is None else _dtype(dtype))
    module.eval().requires_grad_(False)
    directory = checkpoint.path if checkpoint.config else None
    return Model(family, config, given.config, module, directory, tokenizer=given.tokenizer, arguments=arguments)


def _family_by_keys(weights: Weights) -> Family:
    """The family of weights that have no config.json beside them."""
    for f in families():
        if f.weight_key is not None and any(re.search(f.weight_key, k) for k in weights.tensors):
            return f
    where = weights.path / "config.json" if weights.path.is_dir() else weights.path
    raise CheckpointError(f"{where}: not found, and the keys of the weights are of no family that goes without it")


def from_config(
    name: str | Path | dict, dtype: str | torch.dtype | None = None, random: bool = False, seed: int = 0
) -> Model:
    """A model of a shipped config (``mplug-owl2-7b`` ...), a config.json file or a dict.

    `dtype` is by default the config's torch_dtype, or float32. Without `random` the weights are shapes only: they can
    be traced, optimized and inspected, not run.
    """
    raw = name if isinstance(name, dict) else read_json(_config_file(name))
    family = family_of(raw)
    config = family.parse_config(raw)
    kind = _dtype(raw.get("torch_dtype") or "float32" if dtype is None else dtype)
    with torch.device("meta"):
        module = family.build(config)
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, nn.Parameter] = {}
    for prefix, owner in module.named_modules():
        for key, p in list(owner._parameters.items()):
            if p is None:
                continue
            if id(p) not in made:
                full = kind == torch.float16 and re.match(family.full_precision or "$^", f"{prefix}.{key}")
                own = torch.float32 if full else kind
                value = _random(key, p.shape, own, generator) if random else torch.zeros((), dtype=own).expand(p.shape)
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
    if shape.numel() == 1:  # a gate: open, or what it guards would go unseen
        value = torch.rand(shape, generator=generator) * 1.8 - 0.9
        return (value + 0.4 * value.sign()).to(dtype)
    if len(shape) == 1:
        centre = 1.0 if key == "weight" else 0.0
        return (centre + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    scale = 1.0 if len(shape) == 3 else shape[1:].numel() ** -0.5
    return torch.empty(shape, dtype=dtype).normal_(generator=generator).mul_(scale)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = MODEL_DTYPES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise ValueError(f"dtype is {dtype!r}, expected float32, float16 or bfloat16")
    return getattr(torch, name)


def _assign(
    family: Family, config: Any, module: nn.Module, given: Assembled, path: Path, dtype: torch.dtype | None
) -> None:
    tensors = dict(given.tensors)

    def where(key: str) -> str:
        if len(given.homes) == 1:
            return ""
        home = next((p for prefix, p in given.homes.items() if re.match(prefix, key)), path)
        return f" in {given.files.get(key, home)}"

    expected = dict(module.state_dict())
    derived = {k: tensors.pop(k) for k in list(tensors) if k not in expected and re.search(family.derived, k)}
    problems = list(given.problems)
    problems += [f"derived {k}: {why}" for k, v in derived.items() if (why := family.check_derived(config, k, v))]
    tied = _tied(module)
    for k, names in tied.items():  # one tensor under several names: any of them will do
        held = next((tensors[n] for n in names if n in tensors), None)
        if k not in tensors and held is not None:
            tensors[k] = held
    problems += [f"missing {k} {tuple(v.shape)}{where(k)}" for k, v in expected.items() if k not in tensors]
    problems += [f"unexpected {k} {tuple(v.shape)}{where(k)}" for k, v in tensors.items() if k not in expected]
    for k, v in tensors.items():
        if k in expected and v.shape != expected[k].shape:
            problems.append(f"{k}{where(k)}: expected shape {tuple(expected[k].shape)}, found {tuple(v.shape)}")
        elif not v.is_floating_point():
            problems.append(f"{k}{where(k)}: expected float32, float16 or bfloat16, found {v.dtype}")
    if problems:
        shown = "\n  ".join(problems[:200]) + (f"\n  and {len(problems) - 200} more" if len(problems) > 200 else "")
        raise CheckpointError(f"{path}: the weights do not fit config.json:\n  {shown}")
    full = {k for k in tensors if family.full_precision is not None and re.match(family.full_precision, k)}
    for part in (full, set(tensors) - full):
        kind, stored = dtype, {tensors[k].dtype for k in part}
        if kind is None and len(stored) > 1:
            kind = torch.float32  # mixed files (norms kept in float32, say): compute in float32, as promotion would
        if part is full and torch.float16 in ({kind} if kind else stored):
            kind = torch.float32
        if kind is not None:  # computed buffers (positions, frequencies) stay float32
            tensors |= {k: tensors[k].to(kind) for k in part}
    module.load_state_dict(tensors, strict=False, assign=True)
    if tied:
        module.tie_weights()


def _tied(module: nn.Module) -> dict[str, list[str]]:
    """Each key whose parameter has several -> all keys of that parameter."""
    groups: dict[int, list[str]] = {}
    for k, p in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(p), []).append(k)
    return {k: names for names in groups.values() if len(names) > 1 for k in names}
