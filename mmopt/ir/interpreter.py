"""Runs a Program in plain PyTorch: the reference that passes, engines and benchmarks are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmopt.ir.graph import shape_of, torch_dtype
from mmopt.ir.stage import Stage
from mmopt.spec.cross_mask import CrossMask, VisibleTiles, gather, seen_inputs, segment_inputs, segments
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.prompt import Chunk, layout_prompts, position_deltas
from mmopt.spec.schedule import Call, Loop, Schedule

Observer = Callable[[str, Call, dict[str, Tensor], Chunk | None], None]


@dataclass
class Interpreter:
    """Follows the schedule of a Program that answers, stage by stage; the fields are those of the Program."""

    stages: dict[str, Stage]
    schedule: Schedule
    weights: dict[str, Tensor]
    state: dict[str, tuple[tuple, torch.dtype]]
    info: ModelInfo
    slots: bool  # the language model may be told to leave slots of its cache out

    def run(
        self,
        prompts: list[list[int]],
        pixel_values: Tensor | None,
        max_new_tokens: int,
        forced: Tensor | None,
        ignore_eos: bool,
        observe: Observer | None,
        images: list[int] | None,
        image_inputs: dict[str, Tensor] | None,
        before: list[int] | None,
        tiles: list[int] | None,
    ) -> dict[str, Any]:
        """See `Program.__call__`."""
        chunks = layout_prompts(prompts, self.info, max_new_tokens, images)
        wanted = sum(len(c.images) for c in chunks)
        given = 0 if pixel_values is None else len(pixel_values)
        if wanted > given:
            raise ValueError(f"the prompts have {wanted} image markers, but pixel_values holds {given} images")
        sizes = {"B": len(prompts)}
        values: dict[str, Any] = {
            k: torch.zeros([sizes.get(s, s) if isinstance(s, str) else s for s in shape], dtype=dtype)
            for k, (shape, dtype) in self.state.items()
        }
        values |= self._seen(len(prompts))
        values["images_read"] = torch.zeros(len(prompts), dtype=torch.int64)
        if pixel_values is not None:
            values["pixel_values"] = as_frames(self.stages, self.info, pixel_values.to(torch_dtype(self.info)))
            values |= image_inputs or {}
        media = None if self.info.cross is None else Media(self.stages, self.schedule, self.info, chunks, before, tiles)
        tokens: list[Tensor] = []
        for item in self.schedule:
            if media:
                media.lay_out(values)
            if isinstance(item, Call):
                if all(n in values for n in self.stages[item.stage].inputs):
                    self._call(item, values, "", observe, None)
            elif item.over == "chunks":
                for chunk in chunks:
                    self._chunk(item, chunk, values, observe, media)
            else:
                self._decode(item, values, tokens, max_new_tokens, forced, ignore_eos, observe, media)
        values["tokens"] = self._until_end(tokens, len(prompts), ignore_eos)
        return values

    def _seen(self, batch: int) -> dict[str, Tensor]:
        """Where the language model can leave slots of its cache out: it sees them all here, at their own positions."""
        slots = self.stages["language_model"].input_nodes() if self.slots else {}
        made = {"offset": torch.zeros(batch, dtype=torch.int64)} if "offset" in slots else {}
        if "seen" in slots:
            made["seen"] = torch.ones(batch, shape_of(slots["seen"])[1], dtype=torch.bool)
        return made

    def _call(self, call: Call, values: dict, phase: str, observe, chunk: Chunk | None) -> None:
        stage = self.stages[call.stage]
        given = {n: values[call.source(n)] for n in stage.inputs}  # type: ignore[index]
        made = stage.run(self.weights, given)
        values.update({call.target(n): v for n, v in made.items()})
        if observe:
            observe(phase, call, made, chunk)

    def _chunk(self, loop: Loop, chunk: Chunk, values: dict, observe, media: Media | None) -> None:
        """One chunk of one sample: carried values are that sample's row of the batch, put back afterwards."""
        lane = slice(chunk.sample, chunk.sample + 1)
        local = {k: v[lane] if k in self.state else v for k, v in values.items()}
        width = self.info.image_embed_width
        before = values["images_read"][lane].clone()
        values["images_read"][lane] += len(chunk.images)
        told = position_deltas(before, values["images_read"][lane].clone(), self.info)
        local |= {f"chunk.{k}": v for k, v in told.items()}
        if media:
            local |= media.of_chunk(chunk, values)
            visual = None
        elif chunk.images:
            if values["image_rows"].shape[1:] != (self.info.tokens_per_image, width):
                raise ValueError(
                    f"image_rows have shape {tuple(values['image_rows'].shape)}, expected (N, "
                    f"{self.info.tokens_per_image}, {width})"
                )
            visual = values["image_rows"][list(chunk.images)].reshape(1, -1, width)
        else:
            visual = torch.zeros(1, 0, width, dtype=torch_dtype(self.info))
        local |= {"chunk.ids": torch.tensor([chunk.ids]), "chunk.visual": visual} | self._seen(1)
        for call in loop.body:
            self._call(call, local, "prefill", observe, chunk)
        for k in self.state:
            if local[k].shape[1:] != values[k].shape[1:]:  # logits: of as many rows as the chunk has; keep the last
                values[k][lane] = local[k][:, -1:]
            else:
                values[k] = values[k].clone()
                values[k][lane] = local[k]

    def _decode(
        self, loop: Loop, values: dict, tokens: list, trips: int, forced, ignore_eos: bool, observe, media: Media | None
    ) -> None:
        width = self.info.image_embed_width
        values |= position_deltas(values["images_read"], values["images_read"], self.info)
        batch = values["logits"].shape[0]
        values["no_visual"] = torch.zeros(batch, 0, width, dtype=torch_dtype(self.info))
        ended = torch.zeros(batch, 1, dtype=torch.bool)
        for trip in range(trips):
            for call in loop.body:
                if call.stage != loop.body[0].stage and (trip == trips - 1):
                    continue  # the last token is not fed back
                self._call(call, values, "decode", observe, None)
                if call.stage == loop.body[0].stage:
                    tokens.append(values["ids"])
                    ended = ended | values[loop.until]
                    if forced is not None:
                        values["ids"] = forced[:, trip : trip + 1]
                    if media and trip < trips - 1:
                        values |= media.of_step(values)
            if bool(ended.all()) and not ignore_eos and forced is None:
                break

    def _until_end(self, tokens: list[Tensor], batch: int, ignore_eos: bool) -> list[list[int]]:
        rows = torch.cat(tokens, 1).tolist() if tokens else [[] for _ in range(batch)]
        for row in rows if not ignore_eos else []:
            end = next((i for i, t in enumerate(row) if t in self.info.eos_ids), None)
            if end is not None:
                del row[end + 1 :]
        return rows


def as_frames(stages: dict[str, Stage], info: ModelInfo, pixel_values: Tensor) -> Tensor:
    """Images as videos of one frame, if the image stages take videos. ValueError if there are too many frames."""
    nodes = (s.input_nodes().get("pixel_values") for s in stages.values())
    wanted = next((shape_of(n) for n in nodes if n is not None), ())
    if len(wanted) < 2 or str(wanted[1]) != "F":
        return pixel_values
    if pixel_values.dim() == len(wanted) - 1:
        pixel_values = pixel_values[:, None]
    most = info.max_frames
    if most is not None and pixel_values.shape[1] > most:
        raise ValueError(f"pixel_values have {pixel_values.shape[1]} frames, the model takes at most {most}")
    return pixel_values


class Media:
    """Images that lie outside the text, for one run of a Program: what each sample has, and what its rows see."""

    def __init__(
        self,
        stages: dict[str, Stage],
        schedule: Schedule,
        info: ModelInfo,
        chunks: list[Chunk],
        before: list[int] | None,
        tiles: list[int] | None,
    ):
        self.info, self.blocks = info, info.required_cross.tiles
        self.of_sample = [c.images for c in chunks]
        self.sights = []
        for b, c in enumerate(chunks):
            counted = None if tiles is None else [tiles[i] for i in c.images]
            self.sights.append(
                CrossMask(
                    self.info.required_cross, self.info.image_id, len(c.images), counted, before[b] if before else 0
                )
            )
        self.most = max(1, *(len(i) * self.blocks for i in self.of_sample))
        # values with a row for each sample that hold its blocks, not carried by a loop
        _, self.apart = schedule.sample_calls(
            {k: s.inputs for k, s in stages.items()}, {k: s.outputs for k, s in stages.items()}
        )
        looped = {c.stage for i in schedule if isinstance(i, Loop) for c in i.body}
        self.masked = any(self.apart & set(stages[name].inputs) for name in looped)  # over all blocks
        self.segmented: dict[str, str] = self.info.cross_kv

    def lay_out(self, values: dict[str, Any]) -> None:
        """`media`: the blocks of each sample's images side by side, as soon as the images are encoded."""
        if "media" in values or ("image_rows" not in values and any(self.of_sample)):
            return
        rows: Any = values.get("image_rows")
        shape = (self.info.required_cross.tokens, self.info.required_cross.width)
        media = torch.zeros(len(self.of_sample), self.most, *shape, dtype=torch_dtype(self.info))
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

    def _seen(self, rows: list[list[VisibleTiles]], apart: dict[str, Tensor], counts: list[int]) -> dict[str, Any]:
        given = seen_inputs(rows, apart["media"].shape[1])
        if not self.segmented:
            return {k: torch.from_numpy(x) for k, x in given.items()}
        keys = self.info.required_cross.tokens
        chosen = segments(rows, keys)
        made = {k: torch.from_numpy(x) for k, x in (given | segment_inputs(chosen, keys)).items()}
        for k, kind in self.segmented.items():
            each = [list(x[: max(1, c)].float().numpy()) for x, c in zip(apart[k], counts, strict=True)]
            made[f"segment.{k}"] = torch.from_numpy(gather(chosen, each, kind == "key")).to(apart[k].dtype)
        return made
