"""A recorded case: a safetensors file of ``in.*`` and ``out.*`` tensors, made by running a reference implementation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

IGNORE = -100  # a label that does not count in the loss
KNOWN = r"in\.(input_ids|attention_mask|labels|pixel_values|images_list\.\d+|\w+_rgb)"


@dataclass
class Case:
    """Recorded inputs and outputs, and the expanded batch that the prompts stand for.

    Expanded means that each image placeholder is replaced by its image's rows: ``[B, S]`` tensors, filled up on the
    right to the longest sample. ``pixel_values`` ``[N, 3, H, W]`` are all images in order.
    """

    name: str
    outputs: dict[str, Tensor]
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
    def used_pixels(self) -> Tensor | None:
        return self.pixel_values[self.used] if self.pixel_values is not None and self.used else None

    @property
    def steps(self) -> int:
        """Greedy tokens that were recorded."""
        for name, x in self.outputs.items():
            if name == "out.greedy.token_ids" or name.startswith("out.greedy.step_logits_"):
                return x.shape[1]
            if name.startswith("out.greedy.final_kv_cache."):
                return x.shape[2] - self.ids.shape[1] + 1
        return 0

    def each(self, x: Tensor) -> list[Tensor]:
        """The real rows of x ``[B, S, ...]``, for each sample."""
        if x.shape[:2] != self.valid.shape:
            seen, wanted = tuple(x.shape[:2]), tuple(self.valid.shape)
            raise ValueError(f"{self.name}: expected {wanted} samples and rows from its inputs, found {seen}")
        return [x[b, v] for b, v in enumerate(self.valid)]

    def real(self, x: Tensor) -> Tensor:
        return torch.cat(self.each(x))


def read_cases(paths: Iterable[str | Path], checkpoint: Path | None, image_id: int, rows_per_image: int) -> list[Case]:
    """Read recorded cases. The checkpoint's own weights among them are passed over, so that ``*.safetensors`` works.

    Raises ValueError that names a file that is no case, or an input that is not known.
    """
    files = [Path(p) for p in paths]
    cases = []
    for path in files:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{path}: cannot be read as a safetensors file ({e})") from e
        foreign = [k for k in tensors if not k.startswith(("in.", "out."))]
        if checkpoint and len(foreign) == len(tensors) and path.parent.resolve() == checkpoint.resolve():
            continue
        if foreign or not any(k.startswith("out.") for k in tensors):
            seen = ", ".join(foreign[:5]) or "no out.*"
            raise ValueError(f"{path}: not a recorded case: expected tensors named in.* and out.*, found {seen}")
        same = sum(p.stem == path.stem for p in files) > 1
        cases.append(_case(str(path) if same else path.stem, tensors, image_id, rows_per_image))
    if not cases:
        raise ValueError("no recorded case was given")
    return cases


def _case(name: str, tensors: dict[str, Tensor], image_id: int, rows_per_image: int) -> Case:
    given = {k: v for k, v in tensors.items() if k.startswith("in.")}
    unknown = sorted(k for k in given if not re.fullmatch(KNOWN, k))
    if unknown:
        raise ValueError(f"{name}: unknown input {', '.join(unknown)}")
    outputs = {k: v for k, v in tensors.items() if k.startswith("out.")}
    pictures = {k[3 : -len("_rgb")]: v for k, v in given.items() if k.endswith("_rgb")}
    listed = sorted((k for k in given if k.startswith("in.images_list.")), key=lambda k: int(k.rsplit(".", 1)[1]))
    # What one placeholder stands for: one image, or in a list (or a 5-D tensor) a stack of several.
    stacks = [given[k] for k in listed]
    if (pixels := given.get("in.pixel_values")) is not None:
        if stacks or pixels.dim() not in (4, 5):
            raise ValueError(f"{name}: expected in.pixel_values of 4 or 5 dimensions or in.images_list.*, not both")
        stacks = list(pixels) if pixels.dim() == 5 else [x[None] for x in pixels]
    case = Case(name, outputs, pictures, torch.cat(stacks) if stacks else None)
    if "in.input_ids" in given:
        _expand(case, given, [len(s) for s in stacks], image_id, rows_per_image)
    elif not stacks and not pictures:
        raise ValueError(f"{name}: expected in.input_ids, images or in.*_rgb, found {', '.join(given) or 'no in.*'}")
    return case


def _expand(case: Case, given: dict[str, Tensor], counts: list[int], image_id: int, rows_per_image: int) -> None:
    """Replace placeholders by image rows. `counts`: images that each slot holds; slots are used in order."""
    ids, mask, labels = given["in.input_ids"], given.get("in.attention_mask"), given.get("in.labels")
    for name, x in (("in.attention_mask", mask), ("in.labels", labels)):
        if x is not None and x.shape != ids.shape:
            raise ValueError(f"{case.name}: expected {name} of shape {tuple(ids.shape)}, found {tuple(x.shape)}")
    starts = [sum(counts[:i]) for i in range(len(counts))]
    samples: list[list[tuple[int, int, bool, int]]] = []  # rows of (id, image row, valid, label)
    slot = 0
    for b, sample in enumerate(ids.tolist()):
        rows, prompt = [], []
        for t, token in enumerate(sample):
            keep = mask is None or bool(mask[b, t])
            if token != image_id:
                rows.append((token, -1, keep, int(labels[b, t]) if labels is not None else IGNORE))
                prompt += [token] if keep else []
                continue
            if slot >= len(counts):
                raise ValueError(f"{case.name}: sample {b} needs image {slot}, but {len(counts)} were recorded")
            for image in range(starts[slot], starts[slot] + counts[slot]):
                rows += [(0, image * rows_per_image + r, keep, IGNORE) for r in range(rows_per_image)]
                if keep:
                    prompt.append(image_id)
                    case.used.append(image)
            slot += 1
        if image_id not in sample:
            slot += 1  # a sample of text alone in a call with images still takes one image, unseen
        samples.append(rows)
        case.prompts.append(prompt)
    length = max(map(len, samples))
    full = [rows + [(0, -1, False, IGNORE)] * (length - len(rows)) for rows in samples]
    columns = [torch.tensor(column) for column in zip(*(zip(*rows, strict=True) for rows in full), strict=True)]
    case.ids, case.image_row, valid, expanded = columns
    case.valid = valid.bool()
    case.filler = torch.arange(length) >= torch.tensor([[len(rows)] for rows in samples])
    case.labels = expanded if labels is not None else None
    if mask is not None:  # the reference adds the ones of inserted rows on the left end
        ones = [[1] * (len(rows) - ids.shape[1]) + m for rows, m in zip(samples, mask.tolist(), strict=True)]
        case.mask = torch.tensor([m + [0] * (length - len(m)) for m in ones], dtype=mask.dtype)
