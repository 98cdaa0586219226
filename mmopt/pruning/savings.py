"""What leaving out visual rows can save at each place of a program, before anything is run. Works on shapes alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mmopt.ir.program import Program
from mmopt.pruning.apply import compress, cost, find_places
from mmopt.pruning.propagate import NotApplicable
from mmopt.pruning.sites import PIXELS, Place

KEEPS = (0.5, 0.25, 0.125)


def place_savings(program: Program, keeps: Sequence[float] = KEEPS, every: bool = False) -> list[dict[str, Any]]:
    """For each place: its rows, and the share of FLOPs up to the first token that is saved by keeping `keeps` of them.

    FLOPs are those of encoding one image and of reading the typical prompt with it, as `inspect` counts them; the rows
    that stay are the first, so what a method costs comes on top. A saving is None where rows cannot be left out; "why"
    then says why. every: all places inside stages, not only those after about each quarter of the attentions.
    """
    before, found = cost(program), []
    for place in find_places(program) if every else quarters(find_places(program)):
        row: dict[str, Any] = {"place": place.name, "stage": place.stage, "rows": place.rows, "grid": place.grid}
        row["kept"] = [max(1, round(k * place.rows)) for k in keeps]
        row["saved"] = [None] * len(keeps)
        for i, kept in enumerate(row["kept"]):
            try:
                made = compress(program, place, kept, "resize" if place.name == PIXELS else "first")
            except (NotApplicable, ValueError) as e:
                row["why"] = str(e)
            else:
                row["saved"][i] = 1 - cost(made, program) / before
        found.append(row)
    return found


def quarters(places: list[Place]) -> list[Place]:
    """Of the places inside a stage those after the first, a quarter, a half and three quarters of them."""
    kept = []
    for place in places:
        inside = [p for p in places if p.stage == place.stage and p.name.removeprefix(p.stage + ".").isdecimal()]
        chosen = {inside[len(inside) * i // 4].name for i in range(4)} if inside else set()
        if place not in inside or place.name in chosen:
            kept.append(place)
    return kept


def savings_text(rows: Sequence[dict[str, Any]], keeps: Sequence[float] = KEEPS) -> str:
    """The savings as a table for people."""
    why = ["why not"] if any("why" in r for r in rows) else []
    table = Table("place", "rows", *(f"keep {k:.4g}" for k in keeps), *why, title="FLOPs saved up to the first token")
    for r in rows:
        grid = f" ({r['grid'][0]} x {r['grid'][1]})" if r["grid"] else ""
        saved = ["" if s is None else f"{s:.1%}" for s in r["saved"]]
        table.add_row(r["place"], f"{r['rows']}{grid}", *saved, *([r.get("why", "")] if why else []))
    console = Console(file=(file := io.StringIO()), width=120, markup=False, highlight=False)
    console.print(table)
    return file.getvalue()
