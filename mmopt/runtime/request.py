"""What is asked of an engine and what it answers: how a token is chosen, when an answer ends, which text is certain."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmopt.processing.tokenizer import TextProcessor
from mmopt.runtime.prefix import Prefix
from mmopt.runtime.sampler import Sampler, StopText, _is_int, _is_number, log_probability
from mmopt.spec.errors import EngineError


@dataclass(frozen=True)
class Request:
    """One answer to be generated.

    prompt: a question, a conversation ``[{"role": "user" | "assistant", "content": str}, ...]``, or token ids.
    images: one for each image marker (or image id) of the prompt, in order; before a question that has no marker they
        are put in front. Each is a path, URL, bytes, PIL image or array, or a list of these: the frames of a video.
    max_new_tokens: by default as many as the cache has room for.
    temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature), of which `top_k`
        keeps the k likeliest and then `top_p` the fewest that hold this share of the rest. `seed` fixes the draws.
    stop: texts that end the answer; they are not part of it.
    logprobs: also return the log-probability of each token.
    prefix: what `Engine.prefix` returned; the prompt (text or token ids) goes on from there.
    num_beams: with more than 1, beam search (`mmopt.runtime.beam_search.search`): hypotheses end by end tokens alone,
        and the best by sum of log-probabilities / length ** `length_penalty` is the answer; `early_stopping` is True,
        False or "never". As many samples of a batch are taken as there are beams. Neither sampling nor stop strings go
        with it.
    """

    prompt: str | Sequence[dict] | Sequence[int]
    images: Sequence[Any] = ()
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: bool = False
    prefix: Prefix | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        if not isinstance(self.images, list | tuple):
            raise EngineError(f"images is one {type(self.images).__name__}, expected a list of images")
        if self.max_new_tokens is not None and (not _is_int(self.max_new_tokens) or self.max_new_tokens < 1):
            raise EngineError(f"max_new_tokens is {self.max_new_tokens!r}, expected a number of at least 1")
        Sampler(self.temperature, self.top_k, self.top_p, self.seed)
        StopText(self.stop)
        self._check_beams()

    def _check_beams(self) -> None:
        if not _is_int(self.num_beams) or self.num_beams < 1:
            raise EngineError(f"num_beams is {self.num_beams!r}, expected a number of at least 1")
        if not _is_number(self.length_penalty) or not -10 <= self.length_penalty <= 10:
            raise EngineError(f"length_penalty is {self.length_penalty!r}, expected a number from -10 to 10")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise EngineError(f"early_stopping is {self.early_stopping!r}, expected True, False or 'never'")
        if self.num_beams == 1:
            return
        drawn = {"temperature": self.temperature or None, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        for name, value in drawn.items():
            if value is not None:
                raise EngineError(f"{name} is {value!r}, but num_beams is {self.num_beams}: beam search draws nothing")
        if self.stop:
            raise EngineError(
                f"stop is {self.stop!r}, but num_beams is {self.num_beams}: hypotheses end by end tokens alone, cut "
                "afterwards"
            )


@dataclass(frozen=True)
class Completion:
    """An answer. `ids` are all new tokens, an end token included; `text` is cut before a stop string.

    finish_reason: "stop" (an end token), "stop_string", "length" or "cancelled".
    prompt_tokens: rows that the prompt takes in the cache, those of images included.
    logprobs: of each of `ids`, natural logarithm, by the model's own distribution (temperature 1, nothing cut off).
    score, hypotheses: with beams, what the search ranks by, and all that it ended with; this one is the first.
    """

    text: str
    ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[float] | None = None
    score: float | None = None
    hypotheses: list[Completion] = field(default_factory=list, repr=False)


@dataclass
class RequestState:
    """One sample while its tokens come in. `finish` is None until it ends; `piece` is the text of its last token.

    limit: tokens at most. eos_ids: tokens that end it. text: decodes ids (None: there is no text, only ids).
    forced: fed back instead of the tokens chosen. keep_logits: keep a copy of the logits of each step.
    """

    request: Request
    limit: int
    eos_ids: frozenset[int] = frozenset()
    text: TextProcessor | None = None
    forced: Sequence[int] | None = None
    keep_logits: bool = False
    prompt_rows: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    finish: str | None = None
    piece: str = ""

    def __post_init__(self) -> None:
        r = self.request
        self._sampler = Sampler(r.temperature, r.top_k, r.top_p, r.seed)
        self._stop = StopText(r.stop)
        self._stream = self.text.stream() if self.text else None
        self._pieces: list[str] = []

    @property
    def fed(self) -> int:
        """The token to feed to the model next."""
        return self.ids[-1] if self.forced is None else int(self.forced[len(self.ids) - 1])

    def take(self, logits: np.ndarray) -> None:
        """Choose the next token from logits ``[V]``."""
        token = self._sampler(logits)
        if self.keep_logits:
            self.logits.append(np.array(logits))
        self.add(token, log_probability(logits, token) if self.request.logprobs else None)

    def add(self, token: int, logprob: float | None = None) -> None:
        """Take a token that was chosen."""
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        ended = "stop" if token in self.eos_ids else "length" if len(self.ids) >= self.limit else None
        self.piece = ""
        if self._stream is not None:
            self.piece, stopped = self._stop.push(self._stream.push(token))
            if ended and not stopped:
                rest, stopped = self._stop.push(self._stream.flush())
                self.piece += rest
                self.piece += "" if stopped else self._stop.flush()
            ended = "stop_string" if stopped else ended
            self._pieces.append(self.piece)
        self.finish = self.finish or ended  # it may have been cancelled meanwhile

    def cancel(self) -> None:
        self.finish = self.finish or "cancelled"

    def completion(self) -> Completion:
        return Completion(
            text="".join(self._pieces),
            ids=list(self.ids),
            finish_reason=self.finish or "cancelled",
            prompt_tokens=self.prompt_rows,
            completion_tokens=len(self.ids),
            logprobs=list(self.logprobs) if self.request.logprobs else None,
        )


class Stream:
    """Pieces of an answer as they come; joined they are its text. `close` cancels, also from another thread."""

    def __init__(self, pieces: Generator[str], answer: RequestState):
        self._pieces, self._answer = pieces, answer

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._answer.cancel()
        with contextlib.suppress(ValueError):  # another thread is in it: it ends after the token it is at
            self._pieces.close()

    @property
    def completion(self) -> Completion:
        """The answer, as far as it has come."""
        return self._answer.completion()

    def finish(self) -> Completion:
        """Run to the end."""
        for _ in self:
            pass
        return self.completion
