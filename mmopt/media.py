"""Images that lie outside the text, in a run of a Program: their rows, sample by sample, and what the text sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmopt.planning import Chunk
from mmopt.sight import Seen, Sight, gather, seen_inputs, segment_inputs, segments

if TYPE_CHECKING:
    from mmopt.program import Program


class Media:
    """Images that lie outside the text, for one run of a Program: what each sample has, and what its rows see."""

    def __init__(self, program: Program, chunks: list[Chunk], before: list[int] | None, tiles: list[int] | None):
        self.info, self.blocks = program.info, program.info["cross"]["blocks"]
        self.of_sample = [c.images for c in chunks]
        self.sights = []
        for b, c in enumerate(chunks):
            counted = None if tiles is None else [tiles[i] for i in c.images]
            self.sights.append(Sight(self.info, len(c.images), counted, before[b] if before else 0))
        self.most = max(1, *(len(i) * self.blocks for i in self.of_sample))
        self.apart = {"media"}  # values with a row for each sample that hold its blocks, not carried by a loop
        for call in (i for i in program.schedule if not hasattr(i, "body")):
            if self.apart & {v for n in program.stages[call.stage].inputs for v in call.sources(n)}:
                self.apart |= {call.target(n) for n in program.stages[call.stage].outputs}
        looped = {c.stage for i in program.schedule if hasattr(i, "body") for c in i.body}
        self.masked = any(self.apart & set(program.stages[name].inputs) for name in looped)  # over all blocks
        self.segmented: dict[str, str] = self.info.get("segments", {})

    def lay_out(self, values: dict[str, Any]) -> None:
        """`media`: the blocks of each sample's images side by side, as soon as the images are encoded."""
        if "media" in values or ("image_rows" not in values and any(self.of_sample)):
            return
        rows: Any = values.get("image_rows")
        shape = (self.info["cross"]["rows"], self.info["cross"]["width"])
        media = torch.zeros(len(self.of_sample), self.most, *shape, dtype=self.info["torch_dtype"])
        for b, images in enumerate(self.of_sample):
            if images:
                media[b, : len(images) * self.blocks] = rows[list(images)].flatten(0, 1)
        values["media"] = media

    def of_chunk(self, chunk: Chunk, values: dict[str, Any]) -> dict[str, Any]:
        """What the rows of a prompt see, and the blocks of its sample alone."""
        b, own = chunk.sample, max(1, len(chunk.images) * self.blocks)
        local = {k: values[k][b : b + 1, :own] for k in self.apart if k in values}
        return local | self._seen([self.sights[b].read(chunk.ids)], local, [len(chunk.images) * self.blocks])

    def of_step(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the rows of one token for each sample see."""
        rows = [[s.decode(t)] for s, t in zip(self.sights, values["ids"][:, 0].tolist(), strict=True)]
        counts = [len(i) * self.blocks for i in self.of_sample]
        if self.masked and len(set(counts)) > 1 and any(r == [()] for r in rows):
            raise ValueError("a sample that sees none of its images beside samples with another number: run them apart")
        return self._seen(rows, {k: values[k] for k in self.apart if k in values}, counts)

    def _seen(self, rows: list[list[Seen]], apart: dict[str, Tensor], counts: list[int]) -> dict[str, Any]:
        given = seen_inputs(rows, apart["media"].shape[1])
        if not self.segmented:
            return {k: torch.from_numpy(x) for k, x in given.items()}
        keys = self.info["cross"]["rows"]
        chosen = segments(rows, keys)
        made = {k: torch.from_numpy(x) for k, x in (given | segment_inputs(chosen, keys)).items()}
        for k, kind in self.segmented.items():
            each = [list(x[: max(1, c)].float().numpy()) for x, c in zip(apart[k], counts, strict=True)]
            made[f"segment.{k}"] = torch.from_numpy(gather(chosen, each, kind == "key")).to(apart[k].dtype)
        return made
