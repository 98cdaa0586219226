"""What each pass did and what that saves: an observer of the pipeline, with a table for people and JSON."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from mmopt.ir.inspect import inspect
from mmopt.ir.program import Program
from mmopt.report import number
from mmopt.rewrite.pass_base import Report
from mmopt.spec.flow_sampler import plan_of

NEW_TOKENS = 64

DID = {  # in the words of those who do not read graphs; of other passes the first rewrite is shown
    "drop_unread_rows": "leaves out results that nothing reads",
    "split_rows": "gives each token the weights of its kind alone",
    "rejoin_rows": "joins products that use the same weights",
    "split_calls": "reads the prompt apart from the steps",
    "share_samples": "computes equal samples once",
    "hoist_invariants": "computes what never changes ahead of time",
    "drop_hidden_rows": "keeps masked tokens out of the cache",
    "fuse_cross_attention": "attends without masks, folds gates in weights",
    "fold_constants": "folds slices and norms into weights",
    "pack_projections": "packs projections of one input together",
    "compress_visual_tokens": "keeps fewer visual tokens of each image",
    "reduce_flow_steps": "generates images in fewer steps",
    "budget": "found the cheapest compression in budget",
}


@dataclass(frozen=True)
class Cost:
    """Of one answer to a typical prompt of one image, and of one generated image where a model makes them.

    flops, weight_bytes: of all calls together; weight_bytes are read, once in each call. decode_flops,
    decode_weight_bytes: of one new token. visual_tokens: that an image takes in the last layers of the language model.
    """

    flops: float
    weight_bytes: float
    decode_flops: float
    decode_weight_bytes: float
    visual_tokens: int
    counted: str = dataclasses.field(compare=False)  # what was counted, in words

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "counted"}


def count(program: Program) -> Cost:
    """Cost of a program, counted on shapes as `mmopt.inspect` does; without an image if none fits the context."""
    info = program.info
    steps = plan_of(None, info).evaluations if program.schedules.image else None
    images = min(1, info.images)
    try:
        found = inspect(program, batch=1, images=images, new_tokens=NEW_TOKENS, steps=steps)
    except ValueError:
        found = inspect(program, batch=1, images=(images := 0), new_tokens=NEW_TOKENS, steps=steps)
    calls, totals = found["calls"], found["totals"]
    flops, read = (sum(c[k] * c["trips"] for c in calls) for k in ("flops", "weight_bytes"))
    new = next(c["trips"] for c in calls if c["phase"] == "decode")
    counted = f"a prompt of {found['prompt']['rows']} tokens with {images or 'no'} image, {new} new tokens"
    if any(c["phase"] == "paint" for c in calls):
        counted += f", one generated image in {steps} steps"
    if info.cross:
        visual = info.cross.tiles * info.cross.tokens
    else:
        visual = info.tokens_per_image - info.cache_delta
    new_token = totals["decode_flops_per_token"], totals["decode_bytes_per_token"]
    return Cost(float(flops), float(read), *new_token, visual, counted)


class PassLog:
    """Give it to `mmopt.optimize` as an observer; `finish` adds what was done after the passes."""

    def __init__(self, program: Program):
        self.reports: list[Report] = []
        self.costs = [count(program)]  # before all passes, then after each

    def __call__(self, name: str, report: Report | None, program: Program) -> None:
        if report is not None:
            self.reports.append(report)
            self.costs.append(count(program) if report.rewrites else self.costs[-1])

    def finish(self, reports: Sequence[Report], program: Program) -> None:
        for report in reports:
            if not any(report is r for r in self.reports):
                self(report.name, report, program)

    def to_json(self) -> dict[str, Any]:
        """``{"passes": [{fields of a report, "did", "before", "after"}], "total": {"before", "after"}, "counted"}``."""
        costs = [c.to_json() for c in self.costs]
        passes = [
            {**vars(r), "did": did(r), "before": before, "after": after}
            for r, before, after in zip(self.reports, costs, costs[1:], strict=False)
        ]
        total = {"before": costs[0], "after": costs[-1]}
        return {"passes": passes, "total": total, "counted": self.costs[-1].counted}

    def table(self) -> str:
        """A line for each pass, one of totals, and what was counted."""
        heads = [Column(h, no_wrap=True) for h in ("FLOPs", "weights read", "visual tokens", "checked")]
        table = Table(Column("pass", no_wrap=True), "what it did", *heads)
        for report, before, after in zip(self.reports, self.costs, self.costs[1:], strict=False):
            table.add_row(report.name, did(report), *changes(before, after), checked(report))
        first, last = self.costs[0], self.costs[-1]
        console = Console(file=(file := io.StringIO()), width=140, markup=False, highlight=False)
        console.print(table)
        console.print(f"total: {totals(first, last)}", soft_wrap=True)
        console.print(f"counted for {last.counted}; blank: not changed", soft_wrap=True)
        for why in dict.fromkeys(r.checked for r in self.reports if r.checked.startswith("not checked: ")):
            console.print(why, soft_wrap=True)
        return file.getvalue().rstrip()

    def text(self, verbose: bool = False) -> str:
        """The table; then, if verbose, where each pass did something, what it refused and why."""
        return "\n".join([self.table(), *(["", *map(str, self.reports)] if verbose else [])])


def did(report: Report) -> str:
    if not report.rewrites:
        return "nothing to do"
    return DID.get(report.name) or report.rewrites[0].splitlines()[0]


def checked(report: Report) -> str:
    """In a word; the whole of it stands among the details."""
    if not report.rewrites:
        return ""
    return {"checked": "yes", "not checked": "no", "drift": "drift measured"}.get(
        report.checked.partition(":")[0], "no"
    )


def changes(before: Cost, after: Cost) -> list[str]:
    """What changed, before and after; nothing where nothing did."""
    pairs = [(a, b) for a, b in zip(_shown(before), _shown(after), strict=True)]
    return ["" if a == b else f"{a} -> {b}" for a, b in pairs]


def _shown(cost: Cost) -> list[str]:
    return [number(cost.flops), f"{number(cost.weight_bytes)}B", str(cost.visual_tokens)]


def totals(before: Cost, after: Cost) -> str:
    def change(name: str, unit: str) -> str:
        a, b = getattr(before, name), getattr(after, name)
        return f"{number(a)}{unit} -> {number(b)}{unit} (x {b / a:.3g})"

    return (
        f"{change('flops', 'FLOP')}, {change('weight_bytes', 'B')} of weights read, "
        f"{before.visual_tokens} -> {after.visual_tokens} visual tokens of an image; "
        f"a new token {change('decode_flops', 'FLOP')}, {change('decode_weight_bytes', 'B')}"
    )
