"""What a search for compression under a budget of quality found: rows, the choice, a table, JSON and a picture."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from mmopt.measure.statistics import Difference, Score, compare_scores
from mmopt.report import grouped, number, png_figure, save_png
from mmopt.search.plan import compression
from mmopt.spec.files import save_json

MET, UNSURE, NOT_MET = "met", "met, but not certain", "not met"
Interval = tuple[float, float]


class Candidate(NamedTuple):
    """Arguments of compress_visual_tokens: where, how, which share of the rows stays, and at which positions."""

    site: str
    method: str
    keep_ratio: float
    position_ids: str = "keep"

    def __str__(self) -> str:
        return f"{self.method} at {self.site}, keep {self.keep_ratio:g}" + ", renumbered" * (
            self.position_ids == "renumber"
        )


@dataclass(frozen=True)
class Row:
    """A plan, measured. `plan` None: nothing is compressed.

    kept, of: rows of an image at the site, with the plan and before it. flops: of encoding the images and reading the
    prompt. cost: flops, or time where `seconds` (median time to the first token) is there, relative to the program that
    is not compressed. quality: mean score on `samples` and its 95 % interval; difference: to the uncompressed program,
    paired, and its interval. pruned: given up after a few samples.
    """

    plan: Candidate | None
    kept: int | None
    of: int | None
    flops: float
    cost: float
    quality: float
    interval: Interval
    difference: float
    difference_interval: Interval
    wins: int
    losses: int
    samples: int
    verdict: str
    pruned: bool = False
    seconds: float | None = None

    def __str__(self) -> str:
        return "nothing compressed" if self.plan is None else str(self.plan)

    def to_json(self) -> dict[str, Any]:
        made = dataclasses.asdict(self) | {k: list(getattr(self, k)) for k in ("interval", "difference_interval")}
        return made | {"plan": None if self.plan is None else compression(*self.plan)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Row:
        plan = data["plan"] and Candidate(*(data["plan"][k] for k in Candidate._fields))
        intervals = {k: tuple(data[k]) for k in ("interval", "difference_interval")}
        return Row(**(data | intervals | {"plan": plan}))


def compared(a: Score, b: Score) -> tuple[Difference, Interval]:
    """`mmopt.compare_scores`, and an interval that few samples cannot make too narrow.

    A bootstrap of samples that all came out alike is a point, however few they are. The interval returned covers it and
    that of Agresti and Min (2005, Statistics in Medicine 24): two samples are added, half of one won and half of one
    lost, and the errors taken as normal.
    """
    found = compare_scores(a, b)
    d = [x - y for x, y in zip(a.scores, b.scores, strict=True)]
    n = len(d) + 2
    mean, square = sum(d) / n, (sum(x * x for x in d) + 1) / n
    half = 1.959963984540054 * ((square - mean * mean) / n) ** 0.5
    low, high = found.interval
    return found, (max(-1.0, min(low, mean - half)), min(1.0, max(high, mean + half)))


def verdict(difference: float, interval: Interval, drop: float) -> str:
    """Whether quality fell by at most `drop`, and whether a larger fall lies outside the interval."""
    room = drop + 1e-9  # a fall of just as much, but for rounding, keeps the budget
    return NOT_MET if difference < -room else MET if interval[0] >= -room else UNSURE


@dataclass
class Search:
    """The plans that were measured, in order. `full`: nothing compressed; `best`: the plan chosen, None if no plan that
    saves anything keeps the budget; `left`: what could not be tried, and why; `budget` and `cost`: in words."""

    task: str
    drop: float
    budget: str
    cost: str
    full: Row
    rows: list[Row]
    left: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Row | None:
        """The plan of least cost, then of highest quality, that keeps the budget and costs less than none."""
        kept = [r for r in self.rows if r.verdict != NOT_MET and r.cost < 1]
        return min(kept, key=lambda r: (r.cost, -r.quality), default=None)

    def frontier(self) -> list[Row]:
        """Rows of which no other has higher quality at no more cost, or less cost at no less quality, dearest first."""
        rows = [self.full, *(r for r in self.rows if not r.pruned)]

        def beaten(r: Row) -> bool:
            return any(
                o.cost <= r.cost and o.quality >= r.quality and (o.cost, o.quality) != (r.cost, r.quality) for o in rows
            )

        return sorted((r for r in rows if not beaten(r)), key=lambda r: -r.cost)

    @property
    def reason(self) -> str:
        """The choice in a sentence."""
        if (best := self.best) is not None:
            return f"{best}: {self.cost} x {best.cost:.3f}; {_words(best)}; {self.budget}: {best.verdict}"
        tried = [r for r in self.rows if not r.pruned] or self.rows
        why = f"none of {len(self.rows)} plans keeps {self.budget} and saves anything, so nothing is compressed"
        if not tried:
            return f"{why}: no plan could be tried"
        near = max(tried, key=lambda r: (r.difference, -r.cost))
        return f"{why}; the nearest is {near}: {self.cost} x {near.cost:.3f}; {_words(near)}"

    def measured(self) -> dict[str, Any]:
        """The row chosen and the one without compression, for the plan that goes along with the program."""
        best = self.best
        return {"reason": self.reason, "full": self.full.to_json(), "best": None if best is None else best.to_json()}

    def text(self) -> str:
        """The rows as a table for people; a star marks those that no other beats, an arrow the choice."""
        console = Console(file=(file := io.StringIO()), width=160, markup=False, highlight=False)
        best, chosen, timed = {id(r) for r in self.frontier()}, self.best, self.full.seconds is not None
        heads = ["method", "keep", "rows", "FLOP", *(["first token"] if timed else []), "cost"]
        whole = [Column(name, no_wrap=True) for name in ("site", "95 %", "budget")]  # other columns wrap first
        table = Table(whole[0], *heads, "quality", "difference", whole[1], "samples", whole[2], "best")
        for r in [self.full, *self.rows]:
            site, method, keep_ratio, position_ids = r.plan or ("", "", 1.0, "keep")
            seconds = [] if not timed else ["" if r.seconds is None else f"{1e3 * r.seconds:.3g} ms"]
            told = "" if r.plan is None else "given up" if r.pruned else r.verdict
            difference = ["", ""] if r.plan is None else [f"{r.difference:+.4f}", _range(r.difference_interval, "+")]
            table.add_row(
                site, method, f"{keep_ratio:g}" + " renumbered" * (position_ids == "renumber"),
                "" if r.kept is None else f"{r.kept} of {r.of}", number(r.flops), *seconds, f"{r.cost:.3f}",
                f"{r.quality:.4f}", *difference, str(r.samples), told,
                "->" if r is chosen else "*" if id(r) in best else "",
            )  # fmt: skip
        console.print(table)
        console.print(f"{self.task}; budget: {self.budget}; cost: {self.cost}, relative to no compression")
        console.print("difference: to no compression, on the same samples; the best of many looks better than it is")
        for line in grouped([f"not tried: {name}: {why}" for name, why in self.left.items()], 3):
            console.print(line)
        return file.getvalue()

    def to_json(self) -> dict[str, Any]:
        names = ("task", "drop", "budget", "cost", "reason", "left")
        best, chosen = {id(r) for r in self.frontier()}, self.best
        rows = [r.to_json() | {"frontier": id(r) in best, "chosen": r is chosen} for r in self.rows]
        full = self.full.to_json() | {"frontier": id(self.full) in best}
        return {k: getattr(self, k) for k in names} | {"full": full, "rows": rows}

    def save(self, path: str | Path) -> None:
        """Write everything as a JSON file, whole or not at all."""
        save_json(self.to_json(), path)

    def plot(self, path: str | Path) -> None:
        """Quality over cost, with intervals, the frontier and the budget, as a PNG file.

        Raises ImportError without matplotlib, ValueError for a name that does not end in .png.
        """
        figure = png_figure(path, (6.4, 4.4))
        axes = figure.subplots()
        whole = [r for r in self.rows if not r.pruned]
        for method in dict.fromkeys(r.plan.method for r in whole if r.plan):
            _points(axes, [r for r in whole if r.plan and r.plan.method == method], "o", method)
        _points(axes, [r for r in self.rows if r.pruned], "x", "given up early", color="0.7")
        _points(axes, [self.full], "s", "nothing compressed", color="black")
        if self.best is not None:
            at = [self.best.cost], [self.best.quality]
            axes.scatter(*at, s=160, facecolors="none", edgecolors="black", label="chosen")
        line = self.frontier()
        axes.plot([r.cost for r in line], [r.quality for r in line], color="0.7", linewidth=4, zorder=0, label="best")
        axes.axhline(self.full.quality - self.drop, color="tab:red", linewidth=1, linestyle=":", label="budget")
        axes.set(xlabel=f"{self.cost}, relative to no compression", ylabel=f"quality, {self.task}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        save_png(figure, path)


def _points(axes: Any, rows: Sequence[Row], marker: str, label: str, **options: Any) -> None:
    if rows:
        x, y = [r.cost for r in rows], [r.quality for r in rows]
        spread = [[max(0.0, s * (r.quality - r.interval[i])) for r in rows] for i, s in ((0, 1), (1, -1))]
        axes.errorbar(x, y, spread, fmt=marker, markersize=4, linewidth=0.6, label=label, **options)


def _range(interval: Interval, sign: str = "") -> str:
    return " to ".join(f"{x:{sign}.3f}" for x in interval)


def _words(row: Row) -> str:
    return (
        f"quality {row.quality:.4f}, {row.difference:+.4f} (95 %: {_range(row.difference_interval, '+')}) on "
        f"{row.samples} samples"
    )
