"""What leaving out visual rows can save at each site of a program, before anything is run. Works on shapes alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mmopt.ir.program import Program
from mmopt.pruning.apply import compress, cost, find_sites
from mmopt.pruning.propagate import NotApplicable
from mmopt.pruning.sites import PIXELS, PruneSite

KEEPS = (0.5, 0.25, 0.125)


def site_savings(program: Program, keeps: Sequence[float] = KEEPS, every: bool = False) -> list[dict[str, Any]]:
    """For each site: its rows, and the share of FLOPs up to the first token that is saved by keeping `keeps` of them.

    FLOPs are those of encoding one image and of reading the typical prompt with it, as `inspect` counts them; the rows
    that stay are the first, so what a method costs comes on top. A saving is None where rows cannot be left out; "why"
    then says why. every: all sites inside stages, not only those after about each quarter of the attentions.
    """
    before, found = cost(program), []
    for site in find_sites(program) if every else quarters(find_sites(program)):
        row: dict[str, Any] = {"site": site.name, "stage": site.stage, "rows": site.rows, "grid": site.grid}
        row["kept"] = [max(1, round(k * site.rows)) for k in keeps]
        row["saved"] = [None] * len(keeps)
        for i, kept in enumerate(row["kept"]):
            try:
                made = compress(program, site, kept, "resize" if site.name == PIXELS else "first")
            except (NotApplicable, ValueError) as e:
                row["why"] = str(e)
            else:
                row["saved"][i] = 1 - cost(made, program) / before
        found.append(row)
    return found


def quarters(sites: list[PruneSite]) -> list[PruneSite]:
    """Of the sites inside a stage those after the first, a quarter, a half and three quarters of them."""
    kept = []
    for site in sites:
        inside = [p for p in sites if p.stage == site.stage and p.name.removeprefix(p.stage + ".").isdecimal()]
        chosen = {inside[len(inside) * i // 4].name for i in range(4)} if inside else set()
        if site not in inside or site.name in chosen:
            kept.append(site)
    return kept


def savings_text(rows: Sequence[dict[str, Any]], keeps: Sequence[float] = KEEPS) -> str:
    """The savings as a table for people."""
    why = ["why not"] if any("why" in r for r in rows) else []
    table = Table("site", "rows", *(f"keep {k:.4g}" for k in keeps), *why, title="FLOPs saved up to the first token")
    for r in rows:
        grid = f" ({r['grid'][0]} x {r['grid'][1]})" if r["grid"] else ""
        saved = ["" if s is None else f"{s:.1%}" for s in r["saved"]]
        table.add_row(r["site"], f"{r['rows']}{grid}", *saved, *([r.get("why", "")] if why else []))
    console = Console(file=(file := io.StringIO()), width=120, markup=False, highlight=False)
    console.print(table)
    return file.getvalue()
