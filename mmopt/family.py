"""What one file in `mmopt/models/` tells the rest of mmopt about its family."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a stage input: a number or the name of a symbol for each dimension."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StageSpec:
    """A module to trace. Inputs and outputs that are lists are flattened to ``name.0``, ``name.1``, ..."""

    module: torch.nn.Module
    inputs: dict[str, TensorSpec | list[TensorSpec]]
    outputs: list[str]


@dataclass(frozen=True)
class Cross:
    """How text rows see images that lie outside the text, through cross-attention. Defaults: see `mmopt.sight`.

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


@dataclass(frozen=True)
class Recording:
    """One run of a reference implementation, as a file of recorded tensors may hold it.

    names: recorded name -> what `mmopt.recorded` calls it; ``*`` is any text, the same on both sides. Taps look for the
    latter. A file holds this run if it has all of `needs`, or any input if that is empty; with `otherwise` only if it
    holds no other. run: instead of a prompt, a function of the module and the file's tensors by their new names -> our
    own values by the same names. alone: from the same a stage that the file has the weights of, and for each value that
    it makes its inputs (or None).
    """

    names: dict[str, str]
    needs: tuple[str, ...] = ()
    otherwise: bool = False
    run: Callable[[Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    alone: Callable[[Any, dict[str, torch.Tensor]], tuple[StageSpec, dict[str, dict]] | None] | None = None


@dataclass(frozen=True)
class Cases:
    """Names of recorded tensors -> the modules whose output (or first input) they are; ``{}`` stands for an index.

    recordings: runs that a file may hold. values: recorded name -> the value of a Program that it is, or that value and
    from which of its rows on. zeroed: taps that the reference recorded before it zeroed rows that see nothing. tiles:
    the image input whose ones count the blocks of an image. left_padding: the reference masks left padding rightly.
    unread: names that no module makes -> why. scales: name -> a number that its values are those of others times, and
    so are their errors. about: what a meta.json beside the files says of a case, by its name: "guidance", "steps",
    "pictures" (picture -> fields of ImageProcessor). options: names and shapes of a file's tensors
    -> options of `mmopt.load` without which the model is not the one that was recorded (None: it is as it is).
    """

    vision_taps: dict[str, str]
    input_taps: dict[str, str]
    language_taps: dict[str, str]
    atol: float
    rtol: float
    recordings: tuple[Recording, ...] = (Recording({"in.*": "in.*", "out.*": "out.*"}),)
    values: Mapping[str, str | tuple[str, int]] = field(default_factory=dict)
    zeroed: tuple[str, ...] = ()
    tiles: str | None = None
    left_padding: bool = False
    unread: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    about: Callable[[dict[str, Any], str], dict[str, Any]] | None = None
    options: Callable[[dict[str, tuple[int, ...]]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Family:
    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    parse_config: Callable[[dict], Any]
    build: Callable[[Any], torch.nn.Module]
    stages: Callable[[Any, int], dict[str, StageSpec]]
    derived: str  # regular expression: keys a checkpoint may hold or lack, since they are computed
    check_derived: Callable[[Any, str, torch.Tensor], str | None]
    image_id: int | Callable[[Any], int]  # or found in the config; `Model.image_id` is the number
    image_marker: str
    image_processing: Callable[[Any, dict], dict]  # config, preprocessor_config.json -> fields of ImageProcessor
    chat: dict[str, Any]  # fields of ChatTemplate
    cases: Cases | Callable[[Any], Cases]  # or made for a config
    cross: Callable[[Any], Cross] | None = None  # None: images lie among the rows of the text
    flow: Callable[[Any], Flow] | None = None  # None: the family paints no images
    recognises: Callable[[dict], bool] = lambda raw: False  # a config.json that names no architecture
    full_precision: str | None = None  # regular expression: keys of weights that are never float16
    weight_key: str | None = None  # regular expression: a key of weights that come without a config.json
    # checkpoint, language model and vision tower as they lie on disk, options of load -> mmopt.files.Assembled
    assemble: Callable[[Any, Any, Any, dict], Any] | None = None


def families() -> list[Family]:
    """Every family: the FAMILY, or the FAMILIES, of each module in `mmopt.models`."""
    import mmopt.models

    names = sorted(m.name for m in pkgutil.iter_modules(mmopt.models.__path__) if not m.name.startswith("_"))
    modules = [importlib.import_module(f"mmopt.models.{n}") for n in names]
    return [f for m in modules for f in (getattr(m, "FAMILIES", None) or [m.FAMILY])]


def family_of(config: dict) -> Family:
    """The family that a config.json belongs to, by its architectures, else by its model_type."""
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    for f in families():
        if not architectures and model_type is None and f.recognises(config):
            return f
        if set(architectures) & set(f.architectures) or (not architectures and model_type in f.model_types):
            return f
    known = ", ".join(a for f in families() for a in f.architectures)
    raise ValueError(
        f"config.json names architectures {architectures} and model_type {model_type!r}, which no family of mmopt "
        f"handles; it knows {known}"
    )


def read_config(kind: type, raw: dict, fixed: dict[str, dict], where: str, **given) -> Any:
    """Fill the dataclass `kind` from a dict. Values of `fixed[where]` must be as given there or absent.

    Raises ValueError that names each value which is of the wrong type or would change the maths in an unknown way.
    """
    prefix, wrong, values = f"{where}." if where else "", [], dict(given)
    for name, expected in fixed[where].items():
        if name in raw and raw[name] != expected:
            wrong.append(f"{prefix}{name} is {raw[name]!r}, only {expected!r} is supported")
    for f in fields(kind):
        if f.name in given or f.name not in raw:
            continue
        value = raw[f.name]
        if value is None and f.name in ("image_aspect_ratio", "num_key_value_heads"):
            continue
        kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
        kinds |= {"int | None": (int, type(None)), "float | None": (int, float, type(None))}
        expected_type: Any = kinds[f.type] if isinstance(f.type, str) else f.type
        if not isinstance(value, expected_type) or (f.type != "bool" and isinstance(value, bool)):
            wrong.append(f"{prefix}{f.name} is {value!r}, expected {f.type}")
        elif f.type == "int" and value <= 0 and not f.name.endswith("token_id"):
            wrong.append(f"{prefix}{f.name} is {value}, expected a positive number")
        else:
            values[f.name] = value
    if wrong:
        raise ValueError("config.json: " + "; ".join(wrong))
    return kind(**values)
