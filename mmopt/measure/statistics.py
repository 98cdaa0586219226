"""Scores of a task with their intervals, and the paired comparison of two."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np


def bootstrap(values: Sequence[float], draws: int = 10000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean: where the means of samples drawn from the values, with replacement, lie."""
    x, rng = np.array(values, np.float64), np.random.default_rng(seed)
    low, high = np.quantile([x[rng.integers(0, len(x), len(x))].mean() for _ in range(draws)], [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Score:
    """What a runner answered to the samples of a task, in order, and how right each answer is, 0 to 1."""

    task: str
    metric: str
    runner: str
    seconds: float  # of answering all, images included
    ids: list[str]
    prompts: list[str]
    answers: list[list[str]]
    predictions: list[str]
    scores: list[float]

    def __post_init__(self) -> None:
        if not self.scores or len({len(getattr(self, f.name)) for f in fields(self)[4:]}) > 1:
            raise ValueError(f"{self.task}: expected one score for each sample")
        if wrong := [f"{i}: {s}" for i, s in zip(self.ids, self.scores, strict=True) if not 0 <= s <= 1]:
            raise ValueError(f"{self.task}: expected scores from 0 to 1, found that of sample {wrong[0]}")

    @property
    def mean(self) -> float:
        return math.fsum(self.scores) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: Wilson's (1927) for a share of right answers, a bootstrap of the mean where a score is not 0 or 1."""
        if not set(self.scores) <= {0, 1}:
            return bootstrap(self.scores)
        p, z2 = self.mean, 1.959963984540054**2 / len(self.scores)
        middle, half = p + z2 / 2, math.sqrt(z2 * (p * (1 - p) + z2 / 4))
        return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))

    def __str__(self) -> str:
        share = "{:.4f} (95 %: {:.3f} to {:.3f})".format(self.mean, *self.interval)
        return f"{self.task}: {share}, {self.metric}, {len(self.scores)} samples, {self.seconds:.1f} s, {self.runner}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean": self.mean, "interval": list(self.interval)}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Score:
        """What `save` or ``mmopt bench quality --json`` wrote. Raises ValueError if it is something else."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(*(given[f.name] for f in fields(cls)))
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}: not a saved score: {e!r}") from e


@dataclass(frozen=True)
class Difference:
    """Mean score of `a` less that of `b` on the same samples; interval: 95 %, by a bootstrap of the differences.

    wins, losses: samples on which `a` is better, worse. p: McNemar's exact test, two-sided; None if not all are 0 or 1.
    """

    mean: float
    interval: tuple[float, float]
    wins: int
    losses: int
    samples: int
    p: float | None

    def __str__(self) -> str:
        mean = "{:+.4f} (95 %: {:+.3f} to {:+.3f})".format(self.mean, *self.interval)
        p = "" if self.p is None else f", McNemar p = {self.p:.3g}"
        return f"{mean}, {self.wins} wins and {self.losses} losses on {self.samples} samples{p}"


def compare_scores(a: Score, b: Score, draws: int = 10000, seed: int = 0) -> Difference:
    """How much better `a` is than `b`. Raises ValueError unless both are of the same samples, scored alike."""
    if a.metric != b.metric:
        raise ValueError(f"scores by {a.metric} and by {b.metric} cannot be paired")
    of_a, of_b = ([*zip(s.ids, s.prompts, s.answers, strict=True)] for s in (a, b))
    if of_a != of_b:
        first = next((f"{x} and {y}" for x, y in zip(of_a, of_b, strict=False) if x != y), "one has more")
        raise ValueError(f"scores of different samples ({len(of_a)} and {len(of_b)}) cannot be paired: {first}")
    d = [x - y for x, y in zip(a.scores, b.scores, strict=True)]
    wins, losses, p = sum(x > 0 for x in d), sum(x < 0 for x in d), None
    if {*a.scores, *b.scores} <= {0, 1}:  # samples on which they differ are tosses of a fair coin, if neither is better
        p = min(1.0, 2 * sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1)) / 2 ** (wins + losses))
    return Difference(math.fsum(d) / len(d), bootstrap(d, draws, seed), wins, losses, len(d), p)
