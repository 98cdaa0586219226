"""Tables of what was timed on models of middle size. Each takes the results of one file, by config."""

from __future__ import annotations

import statistics
from typing import Any

from cells import gemm_share, kept, ms, percent, ratio, spread, table

Runs = dict[str, dict[str, Any]]


def stages(runs: Runs) -> list[str]:
    lines = []
    for run in runs.values():
        times = {(r["stage"], r["variant"]): r for r in run["rows"]}
        names = list(dict.fromkeys(v for _, v in times))
        rows = []
        for stage in dict.fromkeys(s for s, _ in times):
            faster = [run["ratios"][stage].get(f"engine_over_{b}") for b in ("eager", "compiled")]
            over = " / ".join(ratio(x) for x in faster if x)
            rows.append([stage, *(spread(times[stage, v]) for v in names), over, _share(run["shares"][stage])])
        heads = ["stage, ms", *names, "engine over eager / compiled", "share of the roof"]
        lines += table(heads, rows)
        peaks = [f"{k} {m['peak_bytes'] / 1e6:,.0f} MB" for k, m in run["memory"].items() if "peak_bytes" in m]
        lines += [f"Peak anonymous memory above the imports: {', '.join(peaks)}.", ""] if peaks else []
        lines += [f"`{name}` was left out: {why}." for name, why in run["skipped"].items()]
    return lines


def _share(found: dict[str, dict[str, float]]) -> str:
    """Of the limit that the last variant comes nearer to, from eager on."""
    last = list(found.values())[-1]
    key, what = max((("gemm_share", "GEMM"), ("bandwidth_share", "memory")), key=lambda k: last[k[0]])
    return f"{what}: " + " to ".join(percent(x[key]) for x in (found["eager"], last))


def fewshot(runs: Runs) -> list[str]:
    lines = []
    for run in runs.values():
        times = {(r["stage"], r["variant"]): r for r in run["rows"]}
        names = ["eager", "compiled", "passes off", "mask kept", "passes on"]
        names = [n for n in names if any(v == n for _, v in times)]
        rows, rest = [], {}
        for stage in dict.fromkeys(s for s, _ in times):
            own = {v: r for (s, v), r in times.items() if s == stage}
            if "passes off" not in own:
                rest[stage] = own
                continue
            off = run["ratios"][stage]["passes off / passes on"]
            gain = f"{ratio(off['minima'])}, {ratio(off['paired_median'])}"
            work = run["work"][stage.split(", ")[1]] if stage.startswith("decode") else {}
            shares = [_memory(work[v], own[v], run["limits"]) for v in work]
            rows.append([stage, *(spread(own[v]) if v in own else "" for v in names), gain, " to ".join(shares)])
        lines += table(["ms", *names, "off over on", "of memory rate, off to on"], rows)
        for stage, own in rest.items():
            lines += [f"{stage[0].upper() + stage[1:]}, ms:", "", *table(list(own), [list(map(spread, own.values()))])]
    return lines


def _memory(work: dict[str, float], row: dict[str, Any], limits: dict[str, float]) -> str:
    """Weights and caches over the least time, as a share of the memory's rate."""
    return percent((work["bytes"] + work["cache_bytes"]) / (1e6 * row["min_ms"]) / limits["bandwidth_gb_per_s"])


def off_and_on(runs: Runs) -> list[str]:
    lines = []
    for run in runs.values():
        rows = []
        for shots, ratios in run["ratios"].items():
            each = [[statistics.median(r[shots][name]) for r in run["runs"]] for name in ("off", "on")]
            taken = [f"{ms(statistics.median(x))} ({ms(min(x))} to {ms(max(x))})" for x in each]
            faster = f"{ratio(statistics.median(ratios))} ({ratio(min(ratios))} to {ratio(max(ratios))})"
            rows.append([f"{shots} shot{'s' * (shots != '1')}", *taken, faster])
        lines += table(["decode one token, ms", "passes off", "passes on", "off over on"], rows)
    return lines


def against_library(runs: Runs) -> list[str]:
    lines = []
    for run in runs.values():
        times = {(r["stage"], r["variant"]): r for r in run["rows"]}
        over = run["library_over_engine"]
        rows = [[s, spread(times[s, "library"]), spread(times[s, "engine"]), ratio(over[s])] for s in over]
        lines += table(["ms", "library", "engine", "library over engine"], rows)
    return lines


def image_generation(runs: Runs) -> list[str]:
    lines = []
    for run in runs.values():
        rows = []
        for r in run["rows"]:
            plan = run["sizes"]["plans"].get(r["variant"], run["sizes"]["plans"]["official"])
            found = [run["ratios"][r["stage"]][f"{r['variant']} over {b}"] for b in ("official", "prefix cached")]
            over = [f"{ratio(f['minima'])}, {ratio(f['paired_median'])}" for f in found]
            flops = run["work"][r["stage"].split()[-2]].get(r["variant"])
            share = gemm_share(flops, r["min_ms"], run["limits"]) if flops else ""
            prompt = r["stage"].removeprefix("image, ")
            seconds = f"{r['min_ms'] / 1e3:.1f} ({r['median_ms'] / 1e3:.1f})"
            rows.append([prompt, r["variant"], f"{plan['name']}, {plan['forwards']}", seconds, *over, share])
        heads = ["", "engine", "solver, forwards", "s", "times as fast as official", "as prefix cached"]
        lines += table([*heads, "of GEMM rate"], rows)
    return lines


def threads(runs: Runs) -> list[str]:
    rows = []
    for config, run in runs.items():
        for r in run["rows"]:
            taken = [ms(statistics.median(p["median_ms"] for p in own)) for own in r["processes"].values()]
            low, high = min(r["faster"]), max(r["faster"])
            rows.append([f"`{config}`", r["what"], *taken, f"{ratio(r['median'])} ({low:.2f} to {high:.2f})"])
    return table(["", "ms", "threads that spin on", "threads that stop", "times as fast"], rows)


def composition(runs: Runs) -> list[str]:
    lines = []
    for config, run in runs.items():
        first, used = run["rows"][0], run["compression"]
        named = {r["step"]: f"+ {r['step']}" if i else r["step"] for i, r in enumerate(run["rows"])}
        rows = [[named[r["step"]], *_gain(run, r, "first token")] for r in run["rows"]]
        for cells, r in zip(rows, run["rows"], strict=True):
            cells += [spread(r["times"]["decode"]), "" if r is first else ratio(r["faster"]["all"]["decode"])]
        lines += [
            f"**`{config}`**: compression keeps {kept(used['keep_ratio'])} at `{used['site']}`, {used['method']}.",
            "",
        ]
        lines += table(["first token", *GAIN, "decode, ms", "x"], rows)
        if "image generation" in first["times"]:
            rows = [[named[r["step"]], *_gain(run, r, "image generation")] for r in run["rows"]]
            lines += table(["image generation", *GAIN], rows)
    return lines


GAIN = ("fewer FLOPs", "ms", "x", "x own", "of GEMM rate")


def _gain(run: dict[str, Any], row: dict[str, Any], what: str) -> list[str]:
    first = run["rows"][0]
    flops, times = row["flops"][what], row["times"][what]
    faster = ["" if row is first else ratio(row["faster"][k][what]) for k in ("all", "own")]
    return [
        ratio(first["flops"][what] / flops),
        spread(times),
        *faster,
        gemm_share(flops, times["min_ms"], run["limits"]),
    ]
