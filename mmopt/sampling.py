"""What is asked of an engine and what it answers: how a token is chosen, when an answer ends, which text is certain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.processing import TextProcessor
from mmopt.session import EngineError

if TYPE_CHECKING:
    from mmopt.prefix import Prefix


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
    beams: with more than 1, beam search as `mmopt.beams.search` has it: hypotheses end by end tokens alone, and the
        best by sum of log-probabilities / length ** `length_penalty` is the answer; `early_stopping` is True, False or
        "never". As many samples of a batch are taken as there are beams. Neither sampling nor stop strings go with it.
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
    beams: int = 1
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
        if not _is_int(self.beams) or self.beams < 1:
            raise EngineError(f"beams is {self.beams!r}, expected a number of at least 1")
        if not _is_number(self.length_penalty) or not -10 <= self.length_penalty <= 10:
            raise EngineError(f"length_penalty is {self.length_penalty!r}, expected a number from -10 to 10")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise EngineError(f"early_stopping is {self.early_stopping!r}, expected True, False or 'never'")
        if self.beams == 1:
            return
        drawn = {"temperature": self.temperature or None, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        for name, value in drawn.items():
            if value is not None:
                raise EngineError(f"{name} is {value!r}, but beams is {self.beams}: beam search draws nothing")
        if self.stop:
            raise EngineError(
                f"stop is {self.stop!r}, but beams is {self.beams}: hypotheses end by end tokens alone, cut the text "
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


class Sampler:
    """Chooses a token id from logits ``[V]``. The same seed and logits give the same ids, whatever else runs beside."""

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ):
        if not _is_number(temperature) or not 0 <= temperature < math.inf:
            raise EngineError(f"temperature is {temperature!r}, expected 0 (the likeliest token) or a positive number")
        if top_k is not None and (not _is_int(top_k) or top_k < 1):
            raise EngineError(f"top_k is {top_k!r}, expected a number of at least 1")
        if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
            raise EngineError(f"top_p is {top_p!r}, expected a number above 0 and up to 1")
        if seed is not None and (not _is_int(seed) or seed < 0):
            raise EngineError(f"seed is {seed!r}, expected a number of at least 0")
        self.temperature, self.top_k, self.top_p = temperature, top_k, 1.0 if top_p is None else top_p
        self._random = np.random.default_rng(seed) if temperature > 0 else None

    def __call__(self, logits: np.ndarray) -> int:
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            raise EngineError(f"the model's logits are not finite ({logits[best]}): its inputs or weights are broken")
        if self._random is None:
            return best
        ids, p = self.distribution(logits)
        total = np.cumsum(p)
        drawn = np.searchsorted(total, self._random.random() * total[-1], side="right")
        return int(ids[min(drawn, len(ids) - 1)])

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids that may be drawn and their probabilities (in float64). Of equal logits the lower id comes first."""
        x = (logits.astype(np.float64) - float(logits.max())) / self.temperature
        ids = np.arange(len(x))
        if self.top_k is not None and self.top_k < len(x):
            kth = np.partition(x, -self.top_k)[-self.top_k]
            ids = np.flatnonzero(x >= kth)
            ids = ids[np.argsort(-x[ids], kind="stable")[: self.top_k]]
        p = np.exp(x[ids])
        p /= p.sum()
        if self.top_p < 1:
            # Tokens below (1 - top_p) / V hold less than 1 - top_p together: never among the fewest that hold top_p.
            likely = np.flatnonzero(p >= (1 - self.top_p) / len(p))
            order = likely[np.argsort(-p[likely], kind="stable")]
            order = order[: int(np.searchsorted(np.cumsum(p[order]), self.top_p)) + 1]
            ids, p = ids[order], p[order] / p[order].sum()
        return ids, p


def log_probability(logits: np.ndarray, token: int) -> float:
    """ln softmax(logits)[token], in float64."""
    x = logits.astype(np.float64) - float(logits.max())
    return float(x[token] - np.log(np.exp(x).sum()))


class StopText:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stop: str | Sequence[str] = ()):
        self.stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) and s for s in self.stops):
            raise EngineError(f"stop is {stop!r}, expected texts that are not empty")
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take more text; returns the text that is now certain, and whether a stop string (not part of it) ended it.

        Of several stop strings the one that is complete first counts, so that the pieces do not matter.
        """
        text = self._held + piece
        ends = [(text.find(s) + len(s), text.find(s)) for s in self.stops if s in text]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        longest = max((len(s) for s in self.stops), default=1) - 1
        keep = next((n for n in range(min(longest, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _begins(self, tail: str) -> bool:
        return any(s.startswith(tail) for s in self.stops)

    def flush(self) -> str:
        """The text held back: nothing follows, so it is no stop string."""
        text, self._held = self._held, ""
        return text


@dataclass
class Answer:
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


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
