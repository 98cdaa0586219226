"""What replayed cases gave, as text."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console
from rich.table import Table

POINTS = ("model", "program", "optimized", "engine")


def table(result: dict[str, list[dict[str, Any]]], width: int = 120) -> str:
    """The result as text: outputs of a case that differ by an index share a line with their largest error."""
    points = [p for p in POINTS if any(p == r["point"] for r in result["rows"] + result["not_compared"])]
    cells: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for r in result["rows"]:
        cells.setdefault((r["case"], _family_of_outputs(r["output"])), {}).setdefault(r["point"], []).append(r)
    shown = Table(title="largest error", title_justify="left")
    for column in ("case", "output"):
        shown.add_column(column, overflow="fold")
    for point in points:
        shown.add_column(point, justify="right")
    last = None
    for (case, output), by_point in sorted(cells.items()):
        shown.add_row("" if case == last else case, output, *(_cell(by_point.get(p, [])) for p in points))
        last = case
    reasons: dict[tuple[str, str], tuple[dict, dict]] = {}  # point, reason -> outputs and cases (as ordered sets)
    for n in result["not_compared"]:
        outputs, cases = reasons.setdefault((n["point"], n["reason"]), ({}, {}))
        outputs[_family_of_outputs(n["output"])] = cases[n["case"]] = True
    bad = sum(not r["ok"] for r in result["rows"])
    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False, markup=False)
    console.print(shown)
    for n in result.get("passed_over", []):
        console.print(f"passed over: {n['file']}: {n['reason']}")
    if reasons:
        console.print("not compared:")
    for (point, reason), (outputs, cases) in reasons.items():
        console.print(f"  {point}: {reason}: {', '.join(sorted(outputs))} ({', '.join(cases)})")
    console.print(f"{len(result['rows'])} comparisons, {bad} not ok" if result["rows"] else "nothing was compared")
    return console.file.getvalue()  # type: ignore[attr-defined]


def _family_of_outputs(name: str) -> str:
    return re.sub(r"\.\d+", ".*", name)


def _cell(rows: list[dict]) -> str:
    if not rows:
        return "-"
    bad = [r for r in rows if not r["ok"]]
    if any(r["ids_equal"] is not None for r in rows):
        text = "equal" if all(r["ids_equal"] for r in rows) else "not equal"
    else:
        errors = [r["max_abs"] for r in bad or rows]
        text = "failed" if None in errors else f"{max(errors):.1e}"
    return text if not bad else f"{text} NOT OK" + (f" ({len(bad)} of {len(rows)})" if len(rows) > 1 else "")
