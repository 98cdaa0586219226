"""A recorded case: inputs and outputs of one run of a reference implementation, read from a safetensors file.

A family says how its recordings are named (`mmopt.family.Cases`). The names used here, for all families:

- ``in.input_ids``, ``in.attention_mask``, ``in.labels``, ``in.pixel_values``, ``in.images_list.*``, ``in.image.*``
  (what the image stages take beside the pixels), ``in.*_rgb`` (pictures for the preprocessing);
- ``in.more_ids`` (the end of the prompt), ``in.fed_ids`` (fed afterwards, one by one), ``in.before_ids`` (a text that
  was read before: its images are there), ``in.seen`` (which image blocks each row sees);
- ``out.prepare.*``, ``out.hidden.0``, ``out.logits``, ``out.loss``, ``out.kv_cache.*``; ``out.greedy.token_ids`` (also
  ``_cached``, ``_nocache``), ``out.greedy.step_logits_cached`` and ``_nocache``, ``out.greedy.final_kv_cache.*``;
- ``out.fed.logits``, ``out.fed.time``; ``out.sight.time`` (the number of the image that a row sees, 0: none),
  ``out.sight.seen``, ``out.sight.blind`` (rows that get nothing), ``out.sight.marker``;
- ``in.image_mask`` (in ids with a place for each row of an image: where), ``in.image_held`` (which images there are);
- ``in.paint.*``, ``out.paint.*``: of a painting, see `mmopt.painted`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmopt.among import read_among
from mmopt.beside import Sights, read_apart
from mmopt.family import Cases, Recording
from mmopt.painted import Painted, read_painted

KNOWN = re.compile(
    r"in\.(input_ids|more_ids|fed_ids|before_ids|attention_mask|seen|labels|pixel_values|images_list\.\d+|image\.\w+"
    r"|image_mask|image_held|paint\.(prompt|samples|seen|noise)|\w+_rgb)"
)
CHECKED = {"in.seen": "out.sight.seen", "in.paint.seen": "out.paint.seen"}  # inputs that follow from others
TOKEN_IDS = re.compile(r"out\.greedy\.token_ids(_cached|_nocache)?")
STEP_LOGITS = re.compile(r"out\.greedy\.step_logits(_cached|_nocache)")


@dataclass
class Case:
    """Recorded inputs and outputs, and the expanded batch that the prompts stand for.

    Expanded means that each image placeholder is replaced by its image's rows: ``[B, S]`` tensors, filled up on the
    right to the longest sample. ``pixel_values`` ``[N, ...]`` are all images in order. Where images lie outside the
    text, `sights` has what the rows see and the placeholders stay.
    """

    name: str
    outputs: dict[str, Tensor]  # by recorded name
    pictures: dict[str, Tensor]  # recorded preprocessing: name -> uint8 [H, W, 3]
    pixel_values: Tensor | None = None
    prompts: list[list[int]] = field(default_factory=list)  # without padding, one placeholder for each image
    used: list[int] = field(default_factory=list)  # images that stand in a prompt, in order
    ids: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))  # 0 where the row is no token
    image_row: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))  # into [N * rows], else -1
    valid: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))  # a real row, no padding
    filler: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))  # right of a sample's last id
    mask: Tensor | None = None
    labels: Tensor | None = None
    means: dict[str, str] = field(default_factory=dict)  # recorded name -> name used here
    eos_ids: tuple[int, ...] = ()
    left_padding: bool = False  # the reference masks left padding rightly
    sights: Sights | None = None
    fed: Tensor | None = None  # [B, n] ids that are fed after the prompt
    run: Callable[[Any], dict[str, Tensor]] | None = None  # instead of a prompt: module -> outputs by name used here
    alone: Callable[[Any], Any] | None = None  # see `mmopt.family.Recording`, for this file's tensors
    painting: Painted | None = None  # instead of a prompt
    settings: dict[str, Any] = field(default_factory=dict)  # what was said of it: `mmopt.family.Cases.about`

    @property
    def is_prompt(self) -> bool:
        return bool(self.prompts)

    @property
    def padded(self) -> bool:
        return not bool(self.valid.all())

    @property
    def left_padded(self) -> bool:
        return bool((self.valid[:, 1:] & ~self.valid[:, :-1]).any())

    @property
    def misled(self) -> bool:
        """The reference masked the wrong rows."""
        return self.left_padded and not self.left_padding

    @property
    def goes_on(self) -> bool:
        """What the reference decoded goes on from the last real row of each sample."""
        return bool(self.valid[:, -1:].all()) and not self.misled

    @property
    def used_pixels(self) -> Tensor | None:
        return self.pixel_values[self.used] if self.pixel_values is not None and self.used else None

    @property
    def steps(self) -> int:
        """Greedy tokens that were recorded."""
        steps = 0
        for name, x in self.outputs.items():
            if TOKEN_IDS.fullmatch(self.mean(name)) or STEP_LOGITS.fullmatch(self.mean(name)):
                steps = max(steps, x.shape[1])
            if self.mean(name).startswith("out.greedy.final_kv_cache."):
                steps = max(steps, x.shape[2] - self.ids.shape[1] + 1)
        return steps

    @property
    def greedy_ids(self) -> Tensor | None:
        """The longest of the recorded greedy ids ``[B, T]``."""
        found = [x for k, x in self.outputs.items() if TOKEN_IDS.fullmatch(self.mean(k))]
        return max(found, key=lambda x: x.shape[1], default=None)

    @property
    def markers_made(self) -> bool:
        """Greedy decoding came upon an image marker and went on, and the reference takes that for more than a word."""
        if self.sights is None or self.greedy_ids is None or not self.sights.info["cross"]["reset"]:
            return False
        return bool((self.greedy_ids[:, :-1] == self.sights.info["image_id"]).any())

    @property
    def samples_touch(self) -> bool:
        """In the reference a marker that was fed to one sample changes what the others see."""
        fed = [self.fed] if self.fed is not None else []
        fed += [self.greedy_ids[:, :-1]] if self.greedy_ids is not None else []
        return self.sights is not None and not all(self.sights.apart(x) for x in fed)

    def live(self, x: Tensor) -> Tensor:
        """The greedy steps of x ``[B, steps, ...]`` that count: a sample that ended is filled up with one id."""
        ids, ended = self.greedy_ids, torch.zeros(x.shape[:2], dtype=torch.bool)
        for b, row in enumerate([] if ids is None or len(ids) == 1 else ids.tolist()):
            end = next((i for i, t in enumerate(row) if t in self.eos_ids), len(row))
            if len(set(row[end + 1 :])) == 1:
                ended[b, end + 1 :] = True
        return x[~ended] if ended.any() else x

    def mean(self, name: str) -> str:
        """What a recorded name means, in the names used here."""
        return self.means.get(name, name)

    def recorded(self, mean: str) -> dict[str, Tensor]:
        """Recorded outputs that mean this."""
        return {k: x for k, x in self.outputs.items() if self.mean(k) == mean}

    def each(self, x: Tensor) -> list[Tensor]:
        """The real rows of x ``[B, S, ...]``, for each sample."""
        if x.shape[:2] != self.valid.shape:
            seen, wanted = tuple(x.shape[:2]), tuple(self.valid.shape)
            raise ValueError(f"{self.name}: expected {wanted} samples and rows from its inputs, found {seen}")
        return [x[b, v] for b, v in enumerate(self.valid)]

    def real(self, x: Tensor) -> Tensor:
        return torch.cat(self.each(x))


def read_cases(
    paths: Iterable[str | Path],
    checkpoint: Path | None,
    image_id: int,
    rows_per_image: int,
    layout: Cases | None = None,
    info: dict[str, Any] | None = None,
    image_dims: int = 3,
    flow: dict[str, Any] | None = None,
    passed_over: list[str] | None = None,
) -> list[Case]:
    """Read recorded cases; a file of several runs gives several, all of its name.

    `layout`: of the family, by default names as used here. `info`: of `mmopt.sight`, if images lie outside the text.
    `image_dims`: dimensions of an image. `flow`: of `mmopt.painted`, if the model paints. The checkpoint's own weights
    among the files are passed over, so that ``*.safetensors`` works, and listed in `passed_over`. Raises ValueError
    that names a file that is no case, or an input that is not known.
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
                read_painted(case, given, flow)
            elif recording.run is not None:
                case.run = _bound(recording.run, given, outputs, means)
                case.alone = _bound(recording.alone, given, outputs, means) if recording.alone else None
                if (pixels := given.get("in.pixel_values")) is not None:
                    case.pixel_values = pixels.flatten(0, -image_dims - 1)
            elif info is None:
                read_among(case, given, image_id, rows_per_image)
            else:
                read_apart(case, given, info, image_dims, layout.tiles)
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
