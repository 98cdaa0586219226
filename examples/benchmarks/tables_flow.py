"""Tables of flow plans: drift, pictures, block caching. Each takes the results of one file, by config."""

from __future__ import annotations

from typing import Any

from cells import table

Runs = dict[str, dict[str, Any]]


def small(x: float) -> str:
    """.0245"""
    return f"{x:.4f}".removeprefix("0")


def frontier(runs: Runs) -> list[str]:
    lines = []
    for run in runs.values():
        by = {(r["evaluations"], r["solver"]): r for r in run["rows"]}
        solvers = list(dict.fromkeys(s for _, s in by))
        rows = []
        for steps in sorted({n for n, _ in by}):
            own = [by.get((steps, s)) for s in solvers]
            least = min(r["mean"] for r in own if r)
            cells = ["" if r is None else _drift(r, r["mean"] == least) for r in own]
            rows.append([str(steps), str(max(r["forwards"] for r in own if r)), *cells])
        lines += table(["steps", "forwards", *solvers], rows)
        fits = {n: f["errors"]["fitted"] for n, f in run["fits"].items()}
        each = [f"{n} steps {small(e['train']['mean'])}, {small(e['held_out']['mean'])}" for n, e in fits.items()]
        lines += [f"Fitted plans, on what they were fitted to and on what was held out: {'; '.join(each)}.", ""]
    return lines


def _drift(row: dict[str, Any], best: bool) -> str:
    cell = f"{row['mean']:.3f} ({row['p90']:.3f})".replace("0.", ".")
    return f"**{cell}**" if best else cell


def quality(runs: Runs) -> list[str]:
    lines = []
    for run in runs.values():
        rows = []
        for r in run["rows"]:
            exact = r["drift"] == 0
            drift = "" if exact else f"{small(r['drift'])} ({small(r['p90'])})"
            found = ["" if exact else f"{r['psnr']:.1f}", f"{r['as_asked']:.2f}", f"{r['frechet']:.1f}"]
            rows.append([r["plan"], str(r["forwards"]), drift, *found])
        lines += table(["plan", "forwards", "drift (90th percentile)", "PSNR, dB", "as asked", "Fréchet"], rows)
    return lines


def block_cache(runs: Runs) -> list[str]:
    lines = []
    for run in runs.values():
        rows = []
        for r in run["rows"]:
            saving = f"{100 * r['saving']:+.0f} %" if "saving" in r else ""
            drift = f"{small(r['mean'])} ({small(r['p90'])})"
            rows.append([str(r["steps"]), str(len(r["skipped"])), str(r["layers"]), drift, saving])
        heads = ["steps", "layers left out", "layers run", "drift (90th percentile)", "work saved at equal drift"]
        lines += table(heads, rows)
    return lines
