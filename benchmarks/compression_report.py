"""The results of `compression_quality.py` as a table and as a picture."""

from __future__ import annotations

import io
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmopt.report import png_figure, save_png

FULL, BLIND, PIXELS, RESIZE = "full", "blind", "pixels", "resize"
TOGETHER = "all questions"
BASELINES = (FULL, "random", "pool", RESIZE)  # what each score is compared with, all but the first at the same keep
NOTES = (
    "right: share of right answers, with the 95 % interval; blind: the same questions about grey pictures.",
    "minus full: paired difference to all rows. minus random, pool: to rows drawn at random, to averaged rows, as many "
    "at the same place. minus resize: to a smaller image, as large a share. *: the 95 % interval leaves out 0.",
    "first token: ms of encoding the images of a sample and reading its prompt, median and quartiles of rounds in "
    "which all rows take turns, each the best of a few calls; x full: median of the speed-up over all rows in a round.",
    "best: no other has more right answers in no more time, or takes less for no fewer.",
)


def kept(row: dict[str, Any], found: dict[str, Any]) -> int:
    """Rows of an image that stay."""
    return max(1, round(row["keep"] * found["sizes"]["places"][row["place"]]))


def text(found: dict[str, Any]) -> str:
    """A table for each task, what was refused and why, what the columns mean."""
    console = Console(file=(file := io.StringIO()), width=170, markup=False, highlight=False)
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    console.print(f"{found['checkpoint']}: {found['device']}, {found['threads']} threads, {found['dtype']}; {versions}")
    order = ["", *found["sizes"]["places"]]
    rows = sorted(found["rows"], key=lambda r: (order.index(r["place"]), -r["keep"]))
    for task in dict.fromkeys(name for r in rows for name in r.get("tasks", {})):
        own = [r for r in rows if task in r.get("tasks", {})]
        best = {id(r) for r in frontier(own, task)}
        heads = [*("place", "method", "rows", "right"), *(f"minus {b}" for b in BASELINES), "first token", "x full"]
        count = len(own[0]["tasks"][task]["right"])
        table = Table(*heads, "best", title=f"{task}: {count} samples", title_justify="left")
        for _, group in groupby(own, key=lambda r: (r["place"], r["keep"])):
            for r in group:
                score = r["tasks"][task]
                share = f"{kept(r, found)}/{found['sizes']['places'][r['place']]}" if r["place"] else ""
                right = "{:.3f} ({:.3f}-{:.3f})".format(score["mean"], *score["interval"])
                differences = [_difference(score["over"].get(b)) for b in BASELINES]
                table.add_row(
                    r["place"], r["method"], share, right, *differences, *_times(r, task), "*" * (id(r) in best)
                )
            table.add_section()
        console.print(table)
    for kind in ("refused", "failed"):
        alike: dict[tuple[str, str], list[dict]] = {}
        for r in (r for r in rows if kind in r):
            alike.setdefault((r["place"], re.sub(r"[-\d.]+", "", r[kind])), []).append(r)
        for some in alike.values():
            which = ", ".join(f"{r['method']} {r['keep']:g}" for r in some)
            more = f" (and so on, {len(some)} alike)" if len(some) > 1 else ""
            console.print(f"{kind}: {some[0]['place']}, {which}: {some[0][kind]}{more}")
    for note in NOTES:
        console.print(f"- {note}")
    return file.getvalue()


def _difference(d: dict[str, Any] | None) -> str:
    if d is None:
        return ""
    low, high = d["interval"]
    return f"{d['mean']:+.3f}{'*' if low > 0 or high < 0 else ' '}"


def _times(row: dict[str, Any], task: str) -> tuple[str, str]:
    if task not in (found := row.get("times", {})):
        return "", ""
    ms, faster = found[task]["ms"], found[task]["faster"]
    return f"{ms['median']:.2f} ({ms['p25']:.2f}-{ms['p75']:.2f})", f"{faster['median']:.2f}"


def frontier(rows: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """The timed rows that no other beats: more right answers in no more time, or as many in less; slowest first."""

    def point(r: dict[str, Any]) -> tuple[float, float]:
        return r["times"][task]["faster"]["median"], r["tasks"][task]["mean"]

    timed = sorted((r for r in rows if task in r.get("times", {})), key=point)
    beaten = [
        any(x >= point(r)[0] and y >= point(r)[1] and (x, y) != point(r) for x, y in map(point, timed)) for r in timed
    ]
    return [r for r, worse in zip(timed, beaten, strict=True) if not worse]


def plot(found: dict[str, Any], path: str | Path) -> None:
    """Share of right answers over the share of rows kept, for each task (down) and place (across), as a PNG file.

    Where times were measured, the last column has right answers over the time to the first token, at all places.

    Raises ImportError without matplotlib, ValueError for a name that does not end in .png or results without scores.
    """
    rows = [r for r in found["rows"] if "tasks" in r]
    there = {r["place"] for r in rows}
    places = [p for p in found["sizes"]["places"] if p in there and p != PIXELS] or [PIXELS] * (PIXELS in there)
    if not places:
        raise ValueError("there are no scores of fewer rows to plot")
    tasks = [*found["samples"]]
    timed = any("times" in r for r in rows)
    figure = png_figure(path, (3.0 * (len(places) + 2 * timed) + 1.5, 3.4 * len(tasks)))
    wide = [1.0] * len(places) + [2.0] * timed
    grid = figure.subplots(len(tasks), len(wide), squeeze=False, sharey="row", width_ratios=wide)
    keeps = sorted({r["keep"] for r in rows if r["place"]})
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] not in (FULL, BLIND)))
    for line, task in zip(grid, tasks, strict=True):
        if timed:
            _over_time(line[-1], rows, task, methods, places)
        for axes, place in zip(line, places, strict=False):
            for i, method in enumerate(methods):
                own = [r for r in rows if r["method"] == method and r["place"] in (place, PIXELS)]
                _line(axes, sorted(own, key=lambda r: r["keep"]), task, method, i / len(methods) - 0.5, f"C{i}")
            for r in (r for r in rows if not r["place"]):
                low, high = r["tasks"][task]["interval"]
                label, style = ("all rows", "-") if r["method"] == FULL else ("grey pictures", ":")
                axes.axhline(r["tasks"][task]["mean"], label=label, linewidth=1, color="black", linestyle=style)
                axes.axhspan(low, high, color="black", alpha=0.08)
            axes.set_xscale("log", base=2)
            axes.set_xticks(keeps, [f"{k:.3g}" for k in keeps])
            axes.set_title(f"{task}; {place}", fontsize="medium")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("right answers")
    for axes in grid[-1][: len(places)]:
        axes.set_xlabel("share of rows kept")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_png(figure, path)


def _line(axes: Any, rows: list[dict[str, Any]], task: str, method: str, shift: float, colour: str) -> None:
    """A method's scores with their intervals, a little to the side of those of other methods."""
    means = [r["tasks"][task]["mean"] for r in rows]
    low, high = zip(*(r["tasks"][task]["interval"] for r in rows), strict=True) if rows else ((), ())
    bars = [[m - a for m, a in zip(means, low, strict=True)], [b - m for m, b in zip(means, high, strict=True)]]
    dashed = "--" if method in BASELINES else "-"
    shares = [r["keep"] * 2 ** (0.15 * shift) for r in rows]
    axes.errorbar(
        shares, means, [[max(0.0, x) for x in side] for side in bars],
        label=method, color=colour, linestyle=dashed, marker="o", markersize=3, capsize=2, linewidth=1.2,
    )  # fmt: skip


def _over_time(axes: Any, rows: list[dict[str, Any]], task: str, methods: list[str], places: list[str]) -> None:
    """Right answers over time: a colour for each method, as in the other pictures, a marker for each place."""
    markers = dict(zip([PIXELS, *(p for p in places if p != PIXELS)], "sov^D<>PX*hp", strict=False))
    own = [r for r in rows if task in r.get("times", {}) and r["method"] in methods]
    for r in own:
        at = r["times"][task]["ms"]["median"], r["tasks"][task]["mean"]
        size = 70 * r["keep"] ** 0.5
        axes.scatter(
            *at, size, color=f"C{methods.index(r['method'])}", marker=markers[r["place"]], alpha=0.8, linewidths=0
        )
    full = [r for r in rows if r["method"] == FULL and task in r.get("times", {})]
    best = frontier([*full, *own], task)
    points = [(r["times"][task]["ms"]["median"], r["tasks"][task]["mean"]) for r in best]
    axes.plot(*zip(*points, strict=True), color="0.7", linewidth=4, zorder=0)
    for r in full:
        axes.axvline(r["times"][task]["ms"]["median"], linewidth=1, color="black", linestyle="--")
    for place in dict.fromkeys(r["place"] for r in own):
        axes.scatter([], [], color="0.3", marker=markers[place], label=place)
    axes.set_title(f"{task}; all places, larger: more rows", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", title="grey: best; dashed: all rows", title_fontsize="x-small")
    axes.set_xlabel("ms to the first token")
