"""Figures of a benchmark: how times spread, who is faster than whom, and what share of the machine's limits is used."""

from __future__ import annotations

import statistics
from typing import Any

from mmopt.ir.cost import count_work
from mmopt.ir.program import Program
from mmopt.measure.variants import STAGES, VARIANTS, Inputs


def rows_of(times: dict, variants: list[str], new_tokens: int) -> list[dict[str, Any]]:
    rows = []
    for name in variants:
        per_round = zip(*(times[s, name] for s in STAGES), strict=True)
        total = [sum(map(min, (e, p))) + new_tokens * statistics.median(d) for e, p, d in per_round]
        taken = {s: [t for r in times[s, name] for t in r] for s in STAGES} | {"total": total}
        rows += [{"stage": s, "variant": name, **spread(t)} for s, t in taken.items()]
    order = [*STAGES, "total"]
    return sorted(rows, key=lambda r: order.index(r["stage"]))


def spread(seconds: list[float]) -> dict[str, Any]:
    ms = sorted(1e3 * s for s in seconds)
    low, middle, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
    return {"min_ms": ms[0], "p25_ms": low, "median_ms": middle, "p75_ms": high, "runs": len(ms)}


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time of the baseline / time of the variant, by the minimum: above 1 the variant is faster."""
    best = {(r["stage"], r["variant"]): r["min_ms"] for r in rows}
    made: dict[str, dict[str, float]] = {}
    for (stage, name), own in best.items():
        for baseline in VARIANTS[: VARIANTS.index(name)]:
            if (stage, baseline) in best:
                made.setdefault(stage, {})[f"{name}_over_{baseline}"] = best[stage, baseline] / own
    return made


def work_of(program: Program, inputs: Inputs, new_tokens: int) -> dict[str, dict[str, int]]:
    """FLOPs, bytes of weights and of cache rows read in one run of each stage of an optimized Program."""
    lead, text = inputs.leading, len(inputs.ids)
    schedule = program.schedules.text
    assert schedule.prefill is not None
    calls = [c.stage for c in schedule.encode_calls]
    body = [c.stage for c in schedule.prefill.body]
    chunks = [(0, lead, 0), (inputs.image_rows, text - lead, lead)]

    def language(nv: int, nt: int, past: int) -> list:
        return [count_work(program.stages[s], {"B": 1, "nv": nv, "nt": nt}, past) for s in body]

    parts = {
        "encode": [count_work(program.stages[s], {"N": 1, "B": 1}) for s in calls],
        "prefill": [w for c in chunks for w in language(*c)],
        "decode": language(0, 1, inputs.filled),
    }
    fields = ("flops", "weight_bytes", "cache_bytes")
    made = {s: {f: sum(getattr(w, f) for w in works) for f in fields} for s, works in parts.items()}
    made["total"] = {f: made["encode"][f] + made["prefill"][f] + new_tokens * made["decode"][f] for f in fields}
    return made


def shares_of(rows: list[dict], work: dict, limits: dict[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """Share of the machine's limits that the work done in the minimum time amounts to."""
    made: dict[str, dict[str, dict[str, float]]] = {}
    for r in rows:
        w, seconds = work[r["stage"]], r["min_ms"] / 1e3
        moved = w["weight_bytes"] + w["cache_bytes"]
        made.setdefault(r["stage"], {})[r["variant"]] = {
            "gflop_per_s": w["flops"] / seconds / 1e9,
            "gemm_share": w["flops"] / seconds / 1e9 / limits["gemm_gflop_per_s"],
            "gb_per_s": moved / seconds / 1e9,
            "bandwidth_share": moved / seconds / 1e9 / limits["bandwidth_gb_per_s"],
            "weights_bandwidth_share": w["weight_bytes"] / seconds / 1e9 / limits["bandwidth_gb_per_s"],
        }
    return made
