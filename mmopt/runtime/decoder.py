"""Runs the stages of an engine directory: images to rows, prompts into caches, one token after the other.

Prompts of a batch are prefilled one after the other, each through its own row ("lane") of the caches, so no sample is
padded and any mix of layouts is right; then all decode together, each at its own length. Caches are bound once as input
and output of the language model and written in place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmopt.runtime.cache_layout import CacheLayout
from mmopt.runtime.images import Image, SequenceImages, TileView
from mmopt.runtime.kv_cache import Cache, restore
from mmopt.runtime.prefix import Prefix
from mmopt.runtime.request import RequestState
from mmopt.runtime.session import IoBinding, Sessions
from mmopt.runtime.tensor import Tensor, from_bits
from mmopt.spec.cross_mask import CROSS_INPUTS, VisibleTiles, gather, seen_inputs, segment_inputs, segments
from mmopt.spec.errors import EngineError
from mmopt.spec.manifest import Manifest
from mmopt.spec.prompt import POSITION_DELTAS, layout_prompts, position_deltas
from mmopt.spec.schedule import Call

POOLED = 2  # caches kept for the next calls


@dataclass
class LiveSequence:
    """One sample on its way: ids still to be fed, their images and the answer.

    before: markers that are taken for read before the first id, where images lie outside the text. prefix: what the
    ids go on from.
    """

    answer: RequestState
    ids: list[int]
    images: list[Image]
    before: int = 0
    prefix: Prefix | None = None


class DecodeStep:
    """The sessions bound for one new token in each of the first lanes of a cache."""

    def __init__(self, decoder: Decoder, cache: Cache, lanes: int):
        embed, model = decoder.embed, decoder.language
        self._ids = Tensor.zeros((lanes, 1), "int64", embed.device)
        self._past = Tensor.zeros((lanes,), "int64", model.device)
        self._told = {k: Tensor.zeros((lanes,), "int64", model.device) for k in POSITION_DELTAS if k in model.inputs}
        self._text = Tensor.zeros((lanes, 1, decoder.width), decoder.dtype, model.device)
        self._embed = embed.bind({"ids": self._ids}, {"text": self._text})
        self._decoder, self._cache, self._lanes = decoder, cache, lanes
        self._bind()

    def _bind(self) -> None:
        decoder, cache, lanes = self._decoder, self._cache, self._lanes
        if decoder.cross:
            views = cache.views[:lanes]
            images = decoder.given(views, [[v.sight.now] for v in views])
        else:
            images = {"visual": Tensor.zeros((lanes, 0, decoder.row_width), decoder.dtype, decoder.language.device)}
            images |= self._told
        self._bound, self._logits = decoder.bind_language(images, self._text, self._past, cache, slice(0, lanes), 1)
        self._version = cache.version

    def run(self, ids: Sequence[int], past: np.ndarray) -> np.ndarray:
        if self._version != self._cache.version:
            self._bind()
        self._ids.write(np.array(ids, np.int64)[:, None])
        self._past.write(past)
        if self._told:
            images = self._cache.images[: self._lanes]
            values = position_deltas(images, images, self._decoder.info)
            for k, told in self._told.items():
                told.write(values[k])
        self._embed.run()
        for b in self._bound:
            b.run()
        return from_bits(self._logits.owner, self._logits.dtype)[:, 0].astype(np.float32, copy=False)


class Decoder:
    """The sessions of an engine directory; `manifest` is its program.json. Safe to use from several threads."""

    def __init__(self, directory: Path, manifest: Manifest, provider: str, threads: int):
        self.info, self.dtype = manifest.info, manifest.dtype
        self.width, self.row_width = self.info.hidden_size, self.info.image_embed_width
        schedule = manifest.schedules.text
        if schedule.prefill is None or len(schedule.prefill.body) not in (2, 3):
            raise EngineError(f"{directory}: its schedule has no loop over chunks of a text stage and a language model")
        table, model, *head = (c.stage for c in schedule.prefill.body)
        # looking up rows of a table needs no threads, and its own would spin beside the model's
        self.stages = Sessions(directory, manifest.stages, provider, threads, {table})
        self.embed, self.language = self.stages[table], self.stages[model]
        self._head = head[0] if head else None
        if not manifest.schedules.image:  # else stages wait until their task is asked for
            list(self.stages.values())
        self.cross, self.segmented = self.info.cross, self.info.cross_kv
        listed = manifest.stages
        self._look_calls, apart = schedule.sample_calls(
            {k: s.inputs for k, s in listed.items()}, {k: s.outputs for k, s in listed.items()}
        )
        self._encode_calls = tuple(c for c in schedule.encode_calls if c not in self._look_calls)
        self.pixels = next(s.inputs["pixel_values"] for s in listed.values() if "pixel_values" in s.inputs)
        self.takes_frames = self.pixels.shape[1] == "F"
        self.whole = [k for k in self.language.inputs if k in apart]  # read with all tiles of all images
        known = {
            "visual",
            "text",
            "offset",
            *POSITION_DELTAS,
            *CROSS_INPUTS,
            *self.whole,
            *(f"segment.{k}" for k in self.segmented),
        }
        unknown = {k for k in self.language.inputs if k not in known and k not in self.language.outputs}
        if unknown:
            raise EngineError(
                f"{directory}: stage {model} has inputs that this engine cannot give: {', '.join(unknown)}"
            )
        caches = {k: x for k, x in self.language.inputs.items() if k in self.language.outputs and k != "past"}
        shapes = {k: (tuple(x.shape), x.dtype) for k, x in caches.items()}
        cross = (*self.whole, *self.segmented)
        self.layout = CacheLayout(shapes, self.language.device, self.dtype, cross, self.info)
        self._pool: list[Cache] = []
        self._pool_lock = threading.Lock()

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Shape of what the image stages make of one image."""
        if self.cross:
            return self.cross.tiles, self.cross.tokens, self.cross.width
        return self.info.tokens_per_image, self.row_width

    def sees_ahead(self, ids: Sequence[int]) -> bool:
        """Whether rows of a prompt see images that come after it, so that these change them."""
        return self.cross is not None and self.cross.leading_text == "all_images" and ids[0] != self.info.image_id

    def encode(self, pixels: Any, inputs: dict[str, np.ndarray] | None = None) -> Tensor:
        """pixel_values ``[N, 3, H, W]`` -> image rows ``[N, rows, hidden]``, one image at a time.

        Where images lie outside the text the rows are ``[N, blocks, rows, width]``. `inputs`: what the image stages
        take beside the pixels, a row for each image. If they take videos, an image is ``[frames, 3, H, W]``, and each
        may have another number of frames.
        """
        rows = Tensor.zeros((len(pixels), *self.rows_shape), self.dtype, self.language.device)
        for i in range(len(pixels)):
            own = {name: np.asarray(x)[i : i + 1] for name, x in (inputs or {}).items()}
            self.image_values(np.asarray(pixels[i])[None], own, image_rows=rows[i : i + 1])
        return rows

    def image_values(self, pixels: np.ndarray, inputs: dict[str, np.ndarray], **into: Tensor) -> dict[str, Tensor]:
        """All that the image stages make of one image; what is named in `into` goes into that memory."""
        values = into | {"pixel_values": Tensor.of(pixels, self.dtype)}
        values |= {name: Tensor.of(x, "int64") for name, x in inputs.items()}
        self._run_calls(self._encode_calls, values)
        return values

    def _run_calls(self, calls: Sequence[Call], values: dict[str, Tensor]) -> None:
        """Run stages on named values; outputs go into memory that has their name already, else into new memory."""
        for call in calls:
            stage = self.stages[call.stage]
            inputs = {k: values[call.sources(k)[0]] for k in stage.inputs}
            for k, out in stage.outputs.items():
                if call.target(k) not in values:
                    values[call.target(k)] = Tensor.zeros(stage.output_shape(k, inputs), out.dtype, stage.device)
            stage.bind(inputs, {k: values[call.target(k)] for k in stage.outputs}).run()

    def image(self, rows: Tensor | Image, tiles: int | None = None) -> Image:
        """An image ready for the language model, from its rows ``[1, ...]``."""
        if isinstance(rows, Image):
            return rows
        if not self.cross:
            return Image(rows)
        values = {"media": rows}
        self._run_calls(self._look_calls, values)
        wanted = {*self.whole, *self.segmented}
        return Image(rows, {k: t.reshape(t.shape[1:]) for k, t in values.items() if k in wanted}, tiles)

    @cached_property
    def nothing(self) -> Image:
        """What a text whose markers have no image weighs: rows of zeros, as in a Program."""
        return self.image(Tensor.zeros((1, *self.rows_shape), self.dtype, self.language.device))

    def prefill(
        self, cache: Cache, lane: int, ids: Sequence[int], images: Sequence[Tensor | Image] = (), before: int = 0
    ) -> np.ndarray:
        """Feed ids and their images on top of what the lane holds; returns the last row's logits ``[V]``.

        The leading text of a chat template is the same for every prompt: an empty lane that still holds it keeps it.
        """
        ready = [self.image(i) for i in images]
        if cache.past[lane] < (cache.holds[lane].rows if cache.holds[lane] else 0):  # type: ignore[union-attr]
            cache.holds[lane] = None
        if self.cross:
            if cache.past[lane] == 0:
                cache.views[lane] = SequenceImages(self.info, ready, before)
            else:
                cache.views[lane] = cache.views[lane].copy(ready)
            cache.version += 1
            view = cache.views[lane]
            return self._feed(cache, lane, ids, self.given([view], [view.sight.read(ids)]))
        chunks = layout_prompts([ids], self.info, 1)
        if cache.past[lane] == 0:
            leading = chunks[0].ids if len(chunks) > 1 and not chunks[0].images else ()
            if leading and leading == cache.leading[lane]:
                cache.past[lane] = len(leading)
                del chunks[0]
            cache.leading[lane] = leading
        elif cache.past[lane] < len(cache.leading[lane]):
            cache.leading[lane] = ()
        for chunk in chunks:
            visual = Tensor.zeros((1, 0, self.row_width), self.dtype, self.language.device)
            if chunk.images:
                visual = _one_after_the_other([ready[i].rows for i in chunk.images])
            read = cache.images[lane : lane + 1].copy()
            cache.images[lane] += len(chunk.images)
            values = position_deltas(read, cache.images[lane : lane + 1], self.info)
            told = {k: Tensor.of(x, "int64") for k, x in values.items() if k in self.language.inputs}
            last = self._feed(cache, lane, chunk.ids, {"visual": visual} | told)
        return last

    def _feed(self, cache: Cache, lane: int, ids: Sequence[int], images: dict[str, Tensor]) -> np.ndarray:
        """One call of the language model on some rows of one lane; returns the last row's logits ``[V]``."""
        text = Tensor.zeros((1, len(ids), self.width), self.dtype, self.embed.device)
        self.embed.bind({"ids": Tensor.of(np.array([ids]), "int64")}, {"text": text}).run()
        rows = len(ids) + (images["visual"].shape[1] if "visual" in images else 0)
        past = Tensor.of(cache.past[lane : lane + 1], "int64")
        bound, logits = self.bind_language(images, text, past, cache, slice(lane, lane + 1), rows)
        for b in bound:
            b.run()
        cache.past[lane] += rows
        return logits.numpy()[0, -1].astype(np.float32, copy=False)

    def decode(self, cache: Cache, ids: Sequence[int], active: Sequence[bool]) -> np.ndarray:
        """Feed one id to each of the first ``len(ids)`` lanes; returns logits ``[lanes, V]``, good until the next step.

        A lane that is not active is computed too, but its length stays: what it writes is past its last row.
        """
        for view, token, on in zip(cache.views, ids, active, strict=False):
            before = view.sight.now
            if on and view.sight.decode(token) != before:
                cache.version += 1
        if len(ids) not in cache.steps:
            cache.steps[len(ids)] = DecodeStep(self, cache, len(ids))
        logits = cache.steps[len(ids)].run(ids, cache.past[: len(ids)])
        cache.past[: len(ids)] += np.asarray(active)
        return logits

    def run(self, cache: Cache, jobs: Sequence[LiveSequence]) -> Iterator[None]:
        """Prefill each job in its lane, then decode together; stops after each token, until all answers are finished.

        Jobs must come in descending order of their limits: then those that may have filled their lane to the last slot
        are at the end, where a step can leave them out.
        """
        for lane, job in enumerate(jobs):
            if job.prefix is not None:
                restore(cache, lane, job.prefix)
            job.answer.take(self.prefill(cache, lane, job.ids, job.images, job.before))
        yield
        while unfinished := [lane for lane, j in enumerate(jobs) if j.answer.finish is None]:
            live = jobs[: unfinished[-1] + 1]
            logits = self.decode(cache, [j.answer.fed for j in live], [j.answer.finish is None for j in live])
            for lane in unfinished:
                live[lane].answer.take(logits[lane])
            yield

    def given(self, views: Sequence[SequenceImages], rows: Sequence[Sequence[VisibleTiles]]) -> dict[str, Tensor]:
        """The inputs of a call of the language model that tell what each row of each view sees."""
        model, cross = self.language, self.info.required_cross
        counts = [len(v.images) * cross.tiles for v in views]
        most, blind = max(1, *counts), any(r == () for row in rows for r in row)
        if self.whole and len(set(counts)) > 1 and blind:
            raise EngineError(
                "a sample that sees none of its images beside samples with another number: run them apart"
            )
        images = [v.images or ([self.nothing] if blind else []) for v in views]
        made = seen_inputs(rows, most)
        for name in self.whole:
            shape = model.inputs[name].sizes(2)
            made[name] = np.zeros((len(views), most, *shape), np.float32)
            for b, own in enumerate(images):
                for i, block in zip(range(most), TileView(own, name, cross.tiles), strict=False):
                    made[name][b, i] = block
        if self.segmented:
            chosen = segments(rows, cross.tokens)
            made |= segment_inputs(chosen, cross.tokens)
            for name, kind in self.segmented.items():
                (width,) = model.inputs[f"segment.{name}"].sizes(2)
                blocks: list[Sequence[np.ndarray]] = [TileView(own, name, cross.tiles) for own in images]
                if not any(map(len, blocks)):
                    blocks[0] = [np.zeros((cross.tokens, width), np.float32)]
                made[f"segment.{name}"] = gather(chosen, blocks, kind == "key")
        return {k: Tensor.of(x, model.inputs[k].dtype, model.device) for k, x in made.items() if k in model.inputs}

    def bind_language(
        self, images: dict[str, Tensor], text: Tensor, past: Tensor, cache: Cache, lanes: slice, rows: int
    ) -> tuple[list[IoBinding], Tensor]:
        """The language model, and its head where that is a stage of its own, on some lanes of a cache: the same memory
        as input and output; and the logits that they write, of all `rows` or of the last."""
        kept = {k: t[lanes] for k, t in cache.tensors.items()}
        inputs = images | {"text": text, "past": past} | kept | self._plain(past.shape[0])
        outputs = {"past": Tensor.zeros(past.shape, "int64", past.device)} | kept
        last = self.language if self._head is None else self.stages[self._head]
        out_rows = 1 if last.outputs["logits"].shape[1] == 1 else rows
        logits = Tensor.zeros((past.shape[0], out_rows, self.info.vocab_size), self.dtype)
        if self._head is None:
            return [self.language.bind(inputs, outputs | {"logits": logits})], logits
        hidden = self.language.empty("hidden", inputs)
        bound = self.language.bind(inputs, outputs | {"hidden": hidden})
        return [bound, last.bind({"hidden": hidden}, {"logits": logits})], logits

    def _plain(self, lanes: int) -> dict[str, Tensor]:
        """Where the language model can leave slots of its cache out: texts see them all, at their own positions."""
        made = {}
        if "offset" in self.language.inputs:
            made["offset"] = Tensor.zeros((lanes,), "int64", self.language.device)
        if "seen" in self.language.inputs and not self.cross:
            (slots,) = self.language.inputs["seen"].sizes()
            made["seen"] = Tensor.of(np.ones((lanes, slots), np.bool_), "bool", self.language.device)
        return made

    @contextmanager
    def cache(self, batch: int) -> Iterator[Cache]:
        """Empty caches for `batch` samples; later calls use them again."""
        with self._pool_lock:
            cache = next((c for c in self._pool if c.batch == batch), None)
            if cache is not None:
                self._pool.remove(cache)
        cache = cache or Cache(self.layout, batch)
        cache.past[:] = cache.images[:] = 0
        sound = False  # after an error the caches may hold anything, values that are not finite too
        try:
            yield cache
            sound = True
        except GeneratorExit:  # cancelled between two steps
            sound = True
            raise
        finally:
            with self._pool_lock:
                if sound:
                    self._pool.append(cache)
                    del self._pool[:-POOLED]


def _one_after_the_other(images: Sequence[Tensor]) -> Tensor:
    """Tensors ``[1, rows, hidden]`` as ``[1, all rows, hidden]``; a copy only if they do not follow each other."""
    first = images[0]
    step = first.nbytes  # and not 0, where an image stands there twice
    shape = (1, len(images) * first.shape[1], first.shape[2])
    if any(t.owner is not first.owner or t.pointer != first.pointer + i * step for i, t in enumerate(images)):
        return Tensor.of(np.concatenate([t.numpy() for t in images], 1), first.dtype, first.device)
    return Tensor(shape, first.dtype, first.pointer, first.device, first.owner)
