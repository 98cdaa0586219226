"""How the next token is chosen, and where a text stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmopt.spec.errors import EngineError


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


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
