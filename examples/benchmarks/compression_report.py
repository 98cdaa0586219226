"""The results of `compression_quality.py` as a table and as a picture."""

from __future__ import annotations

import io
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmopt.measure.head import conditions_text
from mmopt.report import png_figure, save_png

FULL, BLIND, PIXELS, RESIZE = "full", "blind", "pixels", "resize"
TOGETHER = "all questions"
BASELINES = (FULL, "random", "pool", RESIZE)  # what each score is compared with, all but the first at the same ratio
COLOURS = [*(f"C{i}" for i in range(10)), "navy", "gold"]  # of methods
NOTES = (
    "right: share of right answers, with the 95 % interval; blind: the same questions about grey pictures.",
    "minus full: paired difference to all rows. minus random, pool: to rows drawn at random, to averaged rows, as many "
    "at the same site. minus resize: to a smaller image, as large a share. *: the 95 % interval leaves out 0.",
    "first token: ms of encoding the images of a sample and reading its prompt, of 16 samples in a row, median "
    "and quartiles of rounds in which all engines take turns; x full: median of the speed-up over all rows in a round.",
    "best: no other has more right answers in no more time, or takes less for no fewer.",
)


def kept(row: dict[str, Any], found: dict[str, Any]) -> int:
    """Rows of an image that stay."""
    return max(1, round(row["keep_ratio"] * found["sizes"]["sites"][row["site"]]))


def text(found: dict[str, Any]) -> str:
    """A table for each task, what was refused and why, what the columns mean."""
    console = Console(file=(file := io.StringIO()), width=170, markup=False, highlight=False)
    console.print(f"{found['checkpoint']}: {conditions_text(found)}")
    order = ["", *found["sizes"]["sites"]]
    rows = sorted(found["rows"], key=lambda r: (order.index(r["site"]), -r["keep_ratio"]))
    for task in dict.fromkeys(name for r in rows for name in r.get("tasks", {})):
        own = [r for r in rows if task in r.get("tasks", {})]
        best = {id(r) for r in frontier(own, task)}
        heads = [*("site", "method", "tokens", "right"), *(f"minus {b}" for b in BASELINES), "first token", "x full"]
        count = len(own[0]["tasks"][task]["right"])
        table = Table(*heads, "best", title=f"{task}: {count} samples", title_justify="left")
        for _, group in groupby(own, key=lambda r: (r["site"], r["keep_ratio"])):
            for r in group:
                score = r["tasks"][task]
                share = f"{kept(r, found)}/{found['sizes']['sites'][r['site']]}" if r["site"] else ""
                right = "{:.3f} ({:.3f}-{:.3f})".format(score["mean"], *score["interval"])
                differences = [_difference(score["over"].get(b)) for b in BASELINES]
                table.add_row(
                    r["site"], r["method"], share, right, *differences, *_times(r, task), "*" * (id(r) in best)
                )
            table.add_section()
        console.print(table)
    for kind in ("refused", "failed"):
        alike: dict[tuple[str, str], list[dict]] = {}
        for r in (r for r in rows if kind in r):
            alike.setdefault((r["site"], re.sub(r"[-\d.]+", "", r[kind])), []).append(r)
        for some in alike.values():
            which = ", ".join(f"{r['method']} {r['keep_ratio']:g}" for r in some)
            more = f" (and so on, {len(some)} alike)" if len(some) > 1 else ""
            console.print(f"{kind}: {some[0]['site']}, {which}: {some[0][kind]}{more}")
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
    """Share of right answers over the share of rows kept, for each task (down) and site (across), as a PNG file.

    Raises ImportError without matplotlib, ValueError for a name that does not end in .png or results without scores.
    """
    rows = [r for r in found["rows"] if "tasks" in r]
    there = {r["site"] for r in rows}
    sites = [p for p in found["sizes"]["sites"] if p in there and p != PIXELS] or [PIXELS] * (PIXELS in there)
    if not sites:
        raise ValueError("there are no scores of fewer rows to plot")
    tasks = [*found["samples"]]
    figure = png_figure(path, (4.2 * len(sites) + 1.5, 3.4 * len(tasks)))
    grid = figure.subplots(len(tasks), len(sites), squeeze=False, sharex=True, sharey="row")
    keeps = sorted({r["keep_ratio"] for r in rows if r["site"]})
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] not in (FULL, BLIND)))
    for line, task in zip(grid, tasks, strict=True):
        for axes, site in zip(line, sites, strict=True):
            for i, method in enumerate(methods):
                own = [r for r in rows if r["method"] == method and r["site"] in (site, PIXELS)]
                _line(
                    axes, sorted(own, key=lambda r: r["keep_ratio"]), task, method, i / len(methods) - 0.5, COLOURS[i]
                )
            for r in (r for r in rows if not r["site"]):
                low, high = r["tasks"][task]["interval"]
                label, style = ("all rows", "-") if r["method"] == FULL else ("grey pictures", ":")
                axes.axhline(r["tasks"][task]["mean"], label=label, linewidth=1, color="black", linestyle=style)
                axes.axhspan(low, high, color="black", alpha=0.08)
            axes.set_xscale("log", base=2)
            axes.set_xticks(keeps, [f"{k:.3g}" for k in keeps])
            axes.set_title(f"{task}; {site}", fontsize="medium")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("right answers")
    for axes in grid[-1]:
        axes.set_xlabel("share of tokens kept")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_png(figure, path)


def _line(axes: Any, rows: list[dict[str, Any]], task: str, method: str, shift: float, colour: str) -> None:
    """A method's scores with their intervals, a little to the side of those of other methods."""
    means = [r["tasks"][task]["mean"] for r in rows]
    low, high = zip(*(r["tasks"][task]["interval"] for r in rows), strict=True) if rows else ((), ())
    bars = [[m - a for m, a in zip(means, low, strict=True)], [b - m for m, b in zip(means, high, strict=True)]]
    dashed = "--" if method in BASELINES else "-"
    shares = [r["keep_ratio"] * 2 ** (0.15 * shift) for r in rows]
    axes.errorbar(
        shares, means, [[max(0.0, x) for x in side] for side in bars],
        label=method, color=colour, linestyle=dashed, marker="o", markersize=3, capsize=2, linewidth=1.2,
    )  # fmt: skip


def plot_times(found: dict[str, Any], path: str | Path) -> None:
    """Share of right answers over the time to the first token, relative to all rows, for each task, as a PNG file.

    A colour for each method, a marker for each site, larger where more rows stay; the line is what no other beats.
    Raises ImportError without matplotlib, ValueError for a name that does not end in .png or results without times.
    """
    timed = [r for r in found["rows"] if "times" in r]
    if not timed:
        raise ValueError("there are no times to plot")
    tasks = [*found["samples"]]
    sites = {
        p: m
        for p, m in zip(found["sizes"]["sites"], "sov^D<>PX*hp", strict=False)
        if any(r["site"] == p for r in timed)
    }
    methods = list(dict.fromkeys(r["method"] for r in timed if r["method"] != FULL))
    figure = png_figure(path, (6.4 * len(tasks) + 1.8, 5))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [r for r in timed if task in r["times"]]
        for r in own:
            at = 1 / r["times"][task]["faster"]["median"], r["tasks"][task]["mean"]
            if r["method"] == FULL:
                axes.axhline(at[1], linewidth=1, color="black")
                axes.axvline(at[0], linewidth=1, color="black")
                continue
            style = {"color": COLOURS[methods.index(r["method"])], "marker": sites[r["site"]]}
            axes.scatter(*at, 160 * r["keep_ratio"], alpha=0.8, linewidths=0, **style)
        best = [(1 / r["times"][task]["faster"]["median"], r["tasks"][task]["mean"]) for r in frontier(own, task)]
        axes.plot(*zip(*best, strict=True), color="0.75", linewidth=5, zorder=0)
        axes.set_title(task, fontsize="medium")
        axes.set_xlabel("time to the first token, relative to all rows")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("right answers")
    for i, method in enumerate(methods):
        figure.axes[-1].scatter([], [], color=COLOURS[i], label=method)
    for site, marker in sites.items():
        figure.axes[-1].scatter([], [], color="0.4", marker=marker, label=site)
    figure.legend(loc="outside right upper", fontsize="small")
    save_png(figure, path)
