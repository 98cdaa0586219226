"""A recorded case: inputs and outputs of one run of a reference implementation, read from a safetensors file.

A family says how its recordings are named (`mmopt.models._family.Cases`). The names used here, for all families:

- ``in.input_ids``, ``in.attention_mask``, ``in.labels``, ``in.pixel_values``, ``in.images_list.*``, ``in.image.*``
  (what the image stages take beside the pixels), ``in.*_rgb`` (pictures for the preprocessing);
- ``in.more_ids`` (the end of the prompt), ``in.fed_ids`` (fed afterwards, one by one), ``in.before_ids`` (a text that
  was read before: its images are there), ``in.seen`` (which image blocks each row sees);
- ``out.prepare.*``, ``out.hidden.0``, ``out.logits``, ``out.loss``, ``out.kv_cache.*``; ``out.greedy.token_ids`` (also
  ``_cached``, ``_nocache``), ``out.greedy.step_logits_cached`` and ``_nocache``, ``out.greedy.final_kv_cache.*``;
- ``out.fed.logits``, ``out.fed.time``; ``out.sight.time`` (the number of the image that a row sees, 0: none),
  ``out.sight.seen``, ``out.sight.blind`` (rows that get nothing), ``out.sight.marker``;
- ``in.image_mask`` (in ids with a place for each row of an image: where), ``in.image_held`` (which images there are);
- ``in.paint.*``, ``out.paint.*``: of a painting, see `mmopt.conformance.read_generation`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmopt.conformance.case import Case
from mmopt.conformance.read_cross import read_apart
from mmopt.conformance.read_generation import read_generation
from mmopt.conformance.read_inline import read_among
from mmopt.models._family import Cases, Recording
from mmopt.spec.model_info import Cross, Flow

KNOWN = re.compile(
    r"in\.(input_ids|more_ids|fed_ids|before_ids|attention_mask|seen|labels|pixel_values|images_list\.\d+|image\.\w+"
    r"|image_mask|image_held|paint\.(prompt|samples|seen|noise)|\w+_rgb)"
)

CHECKED = {"in.seen": "out.sight.seen", "in.paint.seen": "out.paint.seen"}  # inputs that follow from others


def read_cases(
    paths: Iterable[str | Path],
    checkpoint: Path | None,
    image_id: int,
    tokens_per_image: int,
    layout: Cases | None = None,
    cross: Cross | None = None,
    image_dims: int = 3,
    flow: tuple[Flow, int] | None = None,
    passed_over: list[str] | None = None,
) -> list[Case]:
    """Read recorded cases; a file of several runs gives several, all of its name.

    `layout`: of the family, by default names as used here. `cross`: if images lie outside the text. `image_dims`:
    dimensions of an image. `flow`: of a model that generates images, and its vocabulary's size. The checkpoint's own
    weights among the files are passed over, so that ``*.safetensors`` works, and listed in `passed_over`. Raises
    ValueError that names a file that is no case, or an input that is not known.
    """
    files, cases = [Path(p) for p in paths], []
    weights = [] if passed_over is None else passed_over
    layout = layout or Cases({}, {}, {}, 0, 0)
    for path in files:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{path}: cannot be read as a safetensors file ({e})") from e
        runs = [(r, names) for r in layout.recordings if (names := _held(r, tensors))]
        runs = [(r, names) for r, names in runs if not r.otherwise] or runs
        if not runs and checkpoint and path.parent.resolve() == checkpoint.resolve():
            weights.append(path.name)
            continue
        if not runs:
            wanted = " and ".join(layout.recordings[0].names)
            seen = ", ".join(list(tensors)[:5]) or "none"
            raise ValueError(f"{path}: not a recorded case: expected tensors named {wanted}, found {seen}")
        name = str(path) if sum(p.stem == path.stem for p in files) > 1 else path.stem
        rest = sorted(set(tensors) - {k for _, names in runs for k in names})
        runs[0][1].update({k: k for k in rest})
        for recording, names in runs:
            unknown = sorted(k for k, c in names.items() if c.startswith("in.") and not KNOWN.fullmatch(c))
            if unknown and recording.run is None:
                raise ValueError(f"{name}: unknown input {', '.join(unknown)}")
            given = {c: tensors[k] for k, c in names.items() if c.startswith("in.")}
            outputs = {k: tensors[k] for k, c in names.items() if not c.startswith("in.") or c in CHECKED}
            means = {k: CHECKED.get(c, c) for k, c in names.items() if k in outputs}
            case = Case(name, outputs, {}, means=means, left_padding=layout.left_padding)
            case.settings = _said(path, layout)
            if "in.paint.noise" in given:
                read_generation(case, given, flow)
            elif recording.run is not None:
                case.run = _bound(recording.run, given, outputs, means)
                case.alone = _bound(recording.alone, given, outputs, means) if recording.alone else None
                if (pixels := given.get("in.pixel_values")) is not None:
                    case.pixel_values = pixels.flatten(0, -image_dims - 1)
            elif cross is None:
                read_among(case, given, image_id, tokens_per_image)
            else:
                read_apart(case, given, cross, image_id, image_dims, layout.tiles)
            cases.append(case)
    if not cases:
        found = f": {', '.join(weights)} are the weights of the checkpoint" if weights else ""
        raise ValueError(f"no recorded case was given{found}")
    return cases


def options_for(paths: Iterable[str | Path], layout: Cases) -> dict[str, Any]:
    """Options of `mmopt.load` that files of cases need. Raises ValueError where two files need different ones."""
    needed: dict[str, tuple[Any, str]] = {}
    for path in paths if layout.options else ():
        try:
            with safe_open(path, "pt") as file:
                shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # `read_cases` tells what is wrong
        for option, value in layout.options(shapes).items():  # type: ignore[misc]
            before, where = needed.setdefault(option, (value, Path(path).name))
            if before != value:
                raise ValueError(f"{where} and {Path(path).name} need different {option}: verify them one by one")
    return {option: value for option, (value, _) in needed.items() if value is not None}


def _said(path: Path, layout: Cases) -> dict[str, Any]:
    """What a meta.json beside a file says of its case."""
    meta = path.parent / "meta.json"
    if layout.about is None or not meta.is_file():
        return {}
    try:
        return layout.about(json.loads(meta.read_text()), path.stem)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{meta}: what it says of {path.stem} cannot be read ({type(e).__name__}: {e})") from e


def _held(recording: Recording, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Names of a file that belong to a recording -> their meaning; empty if the file does not hold it."""
    names = {}
    for k in tensors:
        for pattern, meaning in recording.names.items():
            if m := re.fullmatch(re.escape(pattern).replace(r"\*", "(.*)"), k):
                names[k] = meaning.replace("*", m[1]) if m.groups() else meaning
                break
    held = set(names.values())
    inputs = {c for c in held if c.startswith("in.")}
    whole = set(recording.needs) <= held if recording.needs else bool(inputs)
    return names if whole and held - inputs else {}


def _bound(run: Callable, given: dict, outputs: dict, means: dict) -> Callable[[Any], Any]:
    tensors = given | {means[k]: x for k, x in outputs.items()}
    return lambda module: run(module, tensors)
