"""A recorded case as data: its prompts, images, outputs, and what its rows see."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmopt.spec.cross_mask import CrossMask, VisibleTiles, masks
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.flow_sampler import Samples
from mmopt.spec.model_info import Cross, Flow

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
    sights: CrossMasks | None = None
    fed: Tensor | None = None  # [B, n] ids that are fed after the prompt
    run: Callable[[Any], dict[str, Tensor]] | None = None  # instead of a prompt: module -> outputs by name used here
    alone: Callable[[Any], Any] | None = None  # see `mmopt.models._family.Recording`, for this file's tensors
    generation: GenerationCase | None = None  # instead of a prompt
    settings: dict[str, Any] = field(default_factory=dict)  # what was said of it: `mmopt.models._family.Cases.about`

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
        if self.sights is None or self.greedy_ids is None or not self.sights.cross.marker_resets:
            return False
        return bool((self.greedy_ids[:, :-1] == self.sights.image_id).any())

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


@dataclass
class CrossMasks:
    """The images of each prompt and what its rows see.

    rows: for each prompt what its rows see, as follows from its ids. given: the same as the case says, where that is
    something else. after: the sights that the prompts leave. images, inputs, tiles, before: of `Program.__call__`.
    """

    cross: Cross
    image_id: int
    images: list[int]
    inputs: dict[str, Tensor]
    tiles: list[int] | None
    before: list[int]
    rows: list[list[VisibleTiles]]
    after: list[CrossMask]
    given: list[list[VisibleTiles]] | None = None

    @property
    def blocks(self) -> int:
        """Tiles of the sample with most images."""
        return max(self.images) * self.cross.tiles

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of a call of a Program."""
        made: dict[str, Any] = {"images": self.images, "num_previous_images": self.before, "tiles": self.tiles}
        return made | {"image_inputs": self.inputs or None}

    def last(self) -> list[CrossMask]:
        """Fresh sights, to go on after the prompts."""
        made = [copy.copy(s) for s in self.after]
        for sight, rows in zip(made, self.given or self.rows, strict=True):
            sight.now = rows[-1]
        return made

    def feed(self, ids: Tensor) -> list[list[VisibleTiles]]:
        """What ids ``[B, n]`` see that are fed one by one, as the reference has it.

        There a marker in one sample makes the others lose their images; in `mmopt.spec.cross_mask` they do not.
        """
        sights, rows = self.last(), [[] for _ in self.images]  # type: list[CrossMask], list[list[VisibleTiles]]
        for column in ids.T.tolist():
            if self.cross.marker_resets and self.image_id in column:
                for s in sights:
                    s.now = None
            for b, token in enumerate(column):
                rows[b].append(sights[b].decode(token))
        return rows

    def apart(self, ids: Tensor) -> bool:
        """Whether samples that are fed these ids do not touch each other."""
        alone = [[s.decode(t) for t in row] for s, row in zip(self.last(), ids.tolist(), strict=True)]
        return same(alone, self.feed(ids), self.blocks)

    def reread(self, ids: Tensor) -> list[list[VisibleTiles]]:
        """What ids ``[B, n]`` see if they are read as the end of the prompts, without a cache."""
        if not self.cross.marker_resets:  # the reference hands the last row of a mask on
            return self.feed(ids)
        return [s.read(row) for s, row in zip(self.last(), ids.tolist(), strict=True)]

    def time(self, rows: Sequence[VisibleTiles]) -> list[int]:
        """The number of the image that each row sees; 0 for none, one more than there are for a marker without."""
        blocks, beyond = self.cross.tiles, max(self.images) + 1
        return [0 if r is None else r[0] // blocks + 1 if r else beyond for r in rows]


def same(a: Sequence[Sequence[VisibleTiles]], b: Sequence[Sequence[VisibleTiles]], blocks: int) -> bool:
    pairs = zip((masks(r, blocks) for r in a), (masks(r, blocks) for r in b), strict=True)
    return all(np.array_equal(x, y) for m, n in pairs for x, y in zip(m, n, strict=True))


@dataclass
class GenerationCase:
    """What was painted. prompts: of each image, the last id gives way to the time. noise ``[G, c, h, w]``.

    plan: the reference's steps. samples: the rows as the reference lays them out. flow: see `read_generation`.
    """

    prompts: list[list[int]]
    noise: Tensor
    plan: FlowPlan
    samples: Samples
    flow: Flow

    @property
    def rows(self) -> int:
        """Rows of a sample: of the longest prompt, with the time in the place of its last id, and of the image."""
        return max(map(len, self.prompts)) + self.flow.tokens

    @property
    def seen(self) -> Tensor:
        """``[2 G, rows]``: rows that are not hidden."""
        return torch.from_numpy(self.samples.seen)[:, : self.rows]
