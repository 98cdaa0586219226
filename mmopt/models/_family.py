"""What one file in `mmopt/models/` tells the rest of mmopt about its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from mmopt.ir.capture import StageSpec
from mmopt.spec.model_info import Cross, Flow


@dataclass(frozen=True)
class Recording:
    """One run of a reference implementation, as a file of recorded tensors may hold it.

    names: recorded name -> what `mmopt.conformance.read` calls it; ``*`` is any text, the same on both sides. Taps look
    for the latter. A file holds this run if it has all of `needs`, or any input if that is empty; with `otherwise` only
    if it holds no other. run: instead of a prompt, a function of the module and the file's tensors by their new names
    -> our own values by the same names. alone: from the same a stage that the file has the weights of, and for each value that
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
    flow: Callable[[Any], Flow] | None = None  # None: the family generates no images
    recognises: Callable[[dict], bool] = lambda raw: False  # a config.json that names no architecture
    full_precision: str | None = None  # regular expression: keys of weights that are never float16
    weight_key: str | None = None  # regular expression: a key of weights that come without a config.json
    # checkpoint, language model and vision tower as they lie on disk, options of load -> _weight_files.Assembled
    assemble: Callable[[Any, Any, Any, dict], Any] | None = None


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
