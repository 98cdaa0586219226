"""Answers in pieces, and conversations that keep what the model has read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

from mmopt.runtime.decoder import Decoder, LiveSequence
from mmopt.runtime.images import Image, SequenceImages
from mmopt.runtime.kv_cache import Cache
from mmopt.runtime.request import Completion, Request, Stream
from mmopt.spec.errors import EngineError
from mmopt.spec.prompt import count_tokens


class Chat:
    """A conversation with an engine; `messages` is what was said. One turn at a time."""

    def __init__(
        self,
        decoder: Decoder,
        with_markers: Callable[[str, Sequence[Any]], str],
        prepare: Callable[[Request, Sequence[Image]], LiveSequence],
    ):
        self.messages: list[dict] = []
        self._decoder, self._with_markers, self._prepare = decoder, with_markers, prepare
        self._cache: Cache | None = None
        self._fed: list[int] = []  # the ids whose rows the cache holds
        self._images: list[Image] = []
        self._lock = threading.Lock()

    def send(self, text: str, images: Sequence[Any] = (), stream: bool = False, **options: Any) -> Completion | Stream:
        """Say something and get the answer, as `Engine.generate`; the whole conversation must fit the engine's limits.

        A turn that fails leaves the conversation as it was; of one that is cancelled the part that was answered stays.
        """
        content = self._with_markers(text, images)
        messages = [*self.messages, {"role": "user", "content": content}]
        request = Request(messages, images, **options)
        if request.num_beams > 1:
            raise EngineError(
                f"num_beams is {request.num_beams}, but a conversation goes on from its one sequence in the cache"
            )
        job = self._prepare(request, self._images)
        answering = Stream(self._turn(self.messages, messages, job), job.answer)
        return answering if stream else answering.finish()

    def _turn(self, before: list[dict], messages: list[dict], job: LiveSequence) -> Generator[str]:
        if not self._lock.acquire(blocking=False):
            raise EngineError("this chat is still answering; a chat takes one turn at a time")
        try:
            if self.messages is not before:
                raise EngineError("another turn of this chat was answered since this one was asked")
            decoder, ids, answer = self._decoder, job.ids, job.answer
            self._cache = self._cache or Cache(decoder.layout, 1)
            kept = _common(self._fed, ids[:-1])  # at least one row must be fed, to get logits
            used = ids[:kept].count(decoder.info.image_id)
            if used < len(job.images) and decoder.sees_ahead(ids):  # the new images change rows that were read before
                kept = used = 0
            self._fed = ids[:kept]
            self._cache.past[0] = count_tokens(self._fed, decoder.info)
            self._cache.images[0] = used
            if decoder.cross:
                self._cache.views[0] = SequenceImages(decoder.info, job.images[:used])
                self._cache.views[0].sight.read(self._fed)
            try:
                for _ in decoder.run(self._cache, [LiveSequence(answer, ids[kept:], job.images[used:])]):
                    if answer.piece:
                        yield answer.piece
            finally:
                if answer.ids:
                    self._fed = ids + answer.ids[:-1]  # the last token was not fed
                    said = {"role": "assistant", "content": answer.completion().text.strip()}
                    self.messages, self._images = [*messages, said], job.images
        finally:
            self._lock.release()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids a and b have in common at the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
