"""Greedy decoding of prompts given as ids: what checks and measurements ask an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmopt.runtime.decoder import Decoder, LiveSequence
from mmopt.runtime.kv_cache import Cache
from mmopt.runtime.request import Request, RequestState
from mmopt.runtime.tensor import Tensor
from mmopt.spec.errors import EngineError, engine_errors
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.prompt import layout_prompts


@dataclass(frozen=True)
class IdsRequest:
    """What `DebugEngine.generate_ids` takes.

    prompts: ids, with the image id where an image stands; images in the order of the prompts.

    pixel_values ``[N, ...]``, or their image_embeds ``[N, tokens, hidden]`` as `Engine.encode_images` made them.
    image_inputs: what the image stages take beside pixel_values. forced ``[B, max_new_tokens]`` is fed instead of the
    likeliest ids; nothing ends early then. logits and caches: return these too. Where images lie outside the text:
    images of each prompt, if not as many as its markers; tiles of each image that count; num_previous_images: markers
    before each prompt.
    """

    prompts: Sequence[Sequence[int]]
    pixel_values: np.ndarray | None = None
    image_embeds: Tensor | np.ndarray | None = None
    max_new_tokens: int = 1
    forced: np.ndarray | None = None
    ignore_eos: bool = False
    logits: bool = False
    caches: bool = False
    images: Sequence[int] | None = None
    image_inputs: dict[str, np.ndarray] | None = None
    num_previous_images: Sequence[int] | None = None
    tiles: Sequence[int] | None = None


@dataclass(frozen=True)
class Run:
    """What `DebugEngine.generate_ids` returns; lists are by sample.

    tokens: new ids, an end id included (with `forced`: the likeliest ids, though the forced ones were fed).
    logits: ``[T, V]`` float32, a row for each of the tokens; the first is that of the prompt's last row.
    past: filled rows ``[B]``. caches: name -> ``[B, kv_heads, context, head_dim]``.
    image_embeds: ``[N, tokens, hidden]``.
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    logits: list[np.ndarray] | None
    past: np.ndarray
    caches: dict[str, np.ndarray] | None
    image_embeds: Tensor | None


@dataclass(frozen=True)
class DebugEngine:
    """See `mmopt.Engine.debug`."""

    info: ModelInfo
    decoder: Decoder
    encode: Callable[..., Tensor]

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], pixel_values: np.ndarray | None = None, **fields: Any
    ) -> Run:
        """Answer all prompts at once, greedily; `fields` are the further ones of `IdsRequest`.

        EngineError for prompts or inputs that do not fit together.
        """
        a = IdsRequest(prompts, pixel_values, **fields)
        info, decoder = self.info, self.decoder
        with engine_errors():
            layout_prompts(prompts, info, a.max_new_tokens, a.images)
        if a.forced is not None and np.shape(a.forced) != (len(prompts), a.max_new_tokens):
            raise EngineError(f"forced has shape {np.shape(a.forced)}, expected ({len(prompts)}, {a.max_new_tokens})")
        embeds = a.image_embeds
        if embeds is None and a.pixel_values is not None:
            embeds = self.encode(np.asarray(a.pixel_values), a.image_inputs)
        if embeds is not None and not isinstance(embeds, Tensor):
            embeds = Tensor.of(np.asarray(embeds), decoder.dtype, decoder.language.device)
        if embeds is not None and embeds.shape[1:] != decoder.rows_shape:
            expected = ", ".join(map(str, decoder.rows_shape))
            raise EngineError(f"image_embeds have shape {embeds.shape}, expected (N, {expected})")
        counts = [list(p).count(info.image_id) for p in prompts] if a.images is None else list(a.images)
        rest = _each(embeds)
        if sum(counts) != len(rest):
            raise EngineError(f"the prompts have places for {sum(counts)} images, but {len(rest)} were given")
        each = [decoder.image(r, a.tiles[i] if a.tiles is not None else None) for i, r in enumerate(rest)]
        eos = frozenset(() if a.ignore_eos or a.forced is not None else info.eos_ids)
        request, sequences = Request([], max_new_tokens=a.max_new_tokens), []
        for i, prompt in enumerate(prompts):
            row = None if a.forced is None else a.forced[i]
            state = RequestState(request, a.max_new_tokens, eos, forced=row, keep_logits=a.logits)
            before = a.num_previous_images[i] if a.num_previous_images is not None else 0
            sequences.append(LiveSequence(state, list(prompt), each[: counts[i]], before))
            each = each[counts[i] :]
        cache = Cache(decoder.layout, len(sequences))  # not one of the pool: the result may keep it
        for _ in decoder.run(cache, sequences):
            pass
        return Run(
            [s.answer.ids for s in sequences],
            [s.answer.finish or "" for s in sequences],
            [np.stack(s.answer.logits) for s in sequences] if a.logits else None,
            cache.past,
            {k: t.numpy() for k, t in cache.tensors.items()} if a.caches else None,
            embeds,
        )


def _each(rows: Tensor | None) -> list[Tensor]:
    return [] if rows is None else [rows[i : i + 1] for i in range(rows.shape[0])]
