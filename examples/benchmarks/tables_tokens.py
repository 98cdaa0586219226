"""Tables of fewer visual tokens: time to the first token, right answers. Each takes a file's results by config."""

from __future__ import annotations

from typing import Any

from cells import gemm_share, kept, ms, ratio, table
from compression_report import BLIND, FULL, PIXELS, RESIZE, TOGETHER, frontier
from compression_report import kept as tokens_kept

Runs = dict[str, dict[str, Any]]
FIRST, LANGUAGE = "first token", "language"
DEFAULT = "dominant"  # the method that is taken where none is said


# ---------------------------------------------------------------------------------------------------------------- time
def speed(runs: Runs) -> list[str]:
    lines = []
    for config, run in runs.items():
        lines += [f"**`{config}`**:", "", *_faster(run, FIRST)]
        if any(LANGUAGE in r.get("faster", {}) for r in run["rows"]):
            lines += ["The language model alone, the choice of its tokens included:", "", *_faster(run, LANGUAGE)]
        lines += _refused(run, "Refused at some ratio or at all, since it would save too little")
    return lines


def _faster(run: dict[str, Any], what: str) -> list[str]:
    """How much faster, by site and method, at each share that is kept."""
    timed = [r for r in run["rows"] if what in r.get("faster", {})]
    ratios = sorted({r["keep_ratio"] for r in timed if r["method"] != FULL}, reverse=True)
    middle = 0.25 if 0.25 in ratios else ratios[-1]
    rows = []
    for site, method in dict.fromkeys((r["site"], r["method"]) for r in timed if r["method"] != FULL):
        own = {r["keep_ratio"]: r for r in timed if (r["site"], r["method"]) == (site, method)}
        full = next(r for r in timed if (r["site"], r["method"]) == (site, FULL))
        cells = [f"`{site}`, {method}", ms(full["times"][what]["median_ms"])]
        for k in ratios:
            x = own[k]["faster"][what] if k in own else None
            cells.append(f"{ratio(x['paired_median'])} ({x['minima']:.2f})" if x else "")
        some = own.get(middle)
        cells.append(ratio(some["faster"][what]["flops"]) if some else "")
        rows.append([*cells, _share(run, some) if some else ""] if what == FIRST else cells)
    heads = ["site, method", "all tokens, ms", *map(kept, ratios), f"fewer FLOPs at {kept(middle)}"]
    return table(heads + [f"of GEMM rate at {kept(middle)}"] * (what == FIRST), rows)


def _share(run: dict[str, Any], row: dict[str, Any]) -> str:
    return gemm_share(sum(row["flops"].values()), row["times"][FIRST]["min_ms"], run["limits"][row["site"]])


def _refused(run: dict[str, Any], why: str) -> list[str]:
    sites = dict.fromkeys(f"`{r['site']}`" for r in run["rows"] if "refused" in r)
    return [f"{why}: {', '.join(sites)}.", ""] if sites else []


# ------------------------------------------------------------------------------------------------------- right answers
def quality(runs: Runs) -> list[str]:
    """All questions together for all to see, those of each task to be unfolded; times of each task."""
    lines = []
    for run in runs.values():
        scored = [r for r in run["rows"] if "tasks" in r]
        tasks = list(dict.fromkeys(name for r in scored for name in r["tasks"]))
        shown = TOGETHER if TOGETHER in tasks else tasks[0]
        lines += [_title(scored, shown), "", *_scores(run, scored, shown)]
        for task in tasks:
            if task != shown:
                title = f"<details><summary>{_title(scored, task).replace('**', '')}</summary>"
                lines += [title, "", *_scores(run, scored, task), "</details>", ""]
        for task in tasks:
            lines += _times(scored, task)
        lines += _refused(run, "Refused, since it would save too little, at some ratio by some methods")
    return lines


def _title(rows: list[dict[str, Any]], task: str) -> str:
    full, blind = (next((r["tasks"][task] for r in rows if r["method"] == m), None) for m in (FULL, BLIND))
    seen = f", with grey pictures {blind['mean']:.3f}" if blind else ""
    low, high = full["interval"]
    return f"**{task}**, {len(full['right']):,} samples: all tokens {full['mean']:.3f} ({low:.3f} to {high:.3f}){seen}"


def _scores(run: dict[str, Any], rows: list[dict[str, Any]], task: str) -> list[str]:
    """Right answers of all methods, a line for each site and share."""
    by = {(r["site"], r["method"], r["keep_ratio"]): r["tasks"][task] for r in rows if task in r["tasks"]}
    methods = list(dict.fromkeys(m for s, m, _ in by if s not in ("", PIXELS)))
    made = []
    for site, tokens in run["sizes"]["sites"].items():
        for k in sorted({k for s, _, k in by if s == site != PIXELS}, reverse=True):
            share = f"{tokens_kept({'site': site, 'keep_ratio': k}, run)}/{tokens}"
            made.append([f"`{site}`", share, *(_score(by.get((site, m, k))) for m in methods)])
    smaller = ", ".join(f"{_score(x)} at {kept(k)}" for (s, m, k), x in by.items() if (s, m) == (PIXELS, RESIZE))
    return table(["site", "kept", *methods], made) + ([f"A smaller image: {smaller}.", ""] if smaller else [])


def _score(found: dict[str, Any] | None) -> str:
    """With a star where the interval of the difference to all tokens leaves out 0."""
    if found is None:
        return ""
    low, high = found["over"][FULL]["interval"] if FULL in found["over"] else (0, 0)
    return f"{found['mean']:.3f}" + r"\*" * (low > 0 or high < 0)


def _times(rows: list[dict[str, Any]], task: str) -> list[str]:
    """What no other beats in right answers over time, and what that is measured against."""
    timed = [r for r in rows if task in r.get("times", {})]
    best = {id(r) for r in frontier(timed, task)}
    shown = [r for r in timed if id(r) in best or r["method"] in (FULL, RESIZE) or _is_default(r)]
    made = []
    for r in sorted(shown, key=lambda r: r["times"][task]["faster"]["median"]):
        t = r["times"][task]
        faster = f"{ratio(t['faster']['median'])} ({t['faster']['p25']:.2f} to {t['faster']['p75']:.2f})"
        name = f"`{r['site']}`, {r['method']}, {kept(r['keep_ratio'])}"
        all_ = r["method"] == FULL
        cells = ["all tokens" if all_ else name, f"{r['tasks'][task]['mean']:.3f}", ms(t["ms"]["median"])]
        made.append([*cells, "" if all_ else faster, "yes" if id(r) in best else ""])
    heads = [f"{task}: time to the first token", "right", "ms a sample", "times as fast", "no other beats it"]
    return table(heads, made) if made else []


def _is_default(row: dict[str, Any]) -> bool:
    return row["method"] == DEFAULT and row["site"].endswith(".all")
