"""Figures as cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table. Raises ValueError for a row that has another number of cells."""
    made = [list(heads), ["---"] * len(heads), *map(list, rows)]
    if wrong := [r for r in made if len(r) != len(heads)]:
        raise ValueError(f"a row has {len(wrong[0])} cells, expected {len(heads)}: {wrong[0]}")
    return [f"| {' | '.join(r)} |".replace("  ", " ") for r in made] + [""]


def ms(x: float) -> str:
    """Three digits, and commas from a thousand on."""
    return f"{x:,.0f}" if x >= 99.95 else f"{x:#.3g}"


def spread(row: dict[str, Any]) -> str:
    """Minimum and, in brackets, median."""
    return f"{ms(row['min_ms'])} ({ms(row['median_ms'])})"


def ratio(x: float) -> str:
    return f"{x:.2f}x"


def percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def kept(x: float) -> str:
    """A share of tokens that are kept."""
    return f"{100 * x:g} %"


def roof(limits: Iterable[dict[str, float]]) -> str:
    """What the machine did at best in the rounds of the figures, a range over several groups of rounds."""
    found = list(limits)

    def between(key: str) -> str:
        low, high = (f"{f(x[key] for x in found):.0f}" for f in (min, max))
        return low if low == high else f"{low} to {high}"

    return f"GEMM {between('gemm_gflop_per_s')} GFLOP/s, memory {between('bandwidth_gb_per_s')} GB/s"


def gemm_share(flops: float, milliseconds: float, limits: dict[str, float]) -> str:
    """FLOPs over a time, as a share of the GEMM rate in the same rounds; nothing where that was not measured."""
    return percent(flops / (1e6 * milliseconds) / limits["gemm_gflop_per_s"]) if limits else ""
