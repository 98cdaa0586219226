"""Fewer rows of each image: the rest of its stages, and the language model, do with `keep` of them.

Places are found by data flow (`mmopt.pruning.sites`), methods are plain functions of rows (`mmopt.pruning.methods`); what
follows from fewer rows, tables of positions and keys of attention, is worked out by `mmopt.pruning.propagate`. The number of
rows is fixed when the pass runs, so all shapes stay what they were in kind, and engines stay static.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmopt.ir.program import Program
from mmopt.pruning.apply import compress, cost, find_places
from mmopt.pruning.methods import METHODS
from mmopt.pruning.propagate import NotApplicable
from mmopt.pruning.sites import PIXELS, RESIZE, Place
from mmopt.rewrite.contracts import random_inputs
from mmopt.rewrite.pass_base import Pass, Report

POSITIONS = ("keep", "renumber")


class CompressVisualTokens(Pass):
    """keep: share of an image's rows that stay at `place`, more than 0, at most 1 (nothing is changed).

    method: one of `mmopt.pruning.methods.METHODS`, or "resize" at place "pixels". place: a name of `find_places`, by default
    all attentions of the tower, each leaving out some rows, which with this method lost least where it was measured; if
    there are none, where the last stage of the images leaves them. positions: "keep" those that rows of the language
    model had before, or "renumber" them without gaps, which destroys grounding (GAP, arXiv:2506.21873).
    least_saving: share of the FLOPs of an image and its prompt that must be saved, else the place is refused.
    """

    contract = "approximate"

    def __init__(
        self,
        keep: float = 0.25,
        method: str = "dominant",
        place: str | None = None,
        positions: str = "keep",
        least_saving: float = 0.02,
    ):
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
            raise ValueError(f"keep is {keep!r}, expected a share of the rows, more than 0 and at most 1")
        if method not in METHODS and method != RESIZE:
            raise ValueError(f"method is {method!r}, expected {RESIZE} or one of {', '.join(METHODS)}")
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}, expected {' or '.join(POSITIONS)}")
        self.keep, self.method, self.place, self.positions = keep, method, place, positions
        self.least_saving = least_saving

    def run(self, program: Program, report: Report) -> Program:
        if self.keep == 1:
            report.skip("program", "keep is 1: every row stays")
            return program
        places = {p.name: p for p in find_places(program)}
        if self.place is not None and self.place not in places:
            raise ValueError(f"place is {self.place!r}, expected one of {', '.join(places) or '(there are none)'}")
        if not places:
            report.skip("program", "no stage makes rows of an image that it could do without")
            return program
        place = places[self.place or default_place(places)]
        kept = max(1, round(self.keep * place.rows))
        if (self.method == RESIZE) != (place.name == PIXELS):
            report.skip(place.name, f"method {self.method} is not for this place")
            return program
        try:
            made = compress(program, place, kept, self.method, self.positions)
        except NotApplicable as e:
            report.skip(place.name, str(e))
            return program
        before, after = cost(program), cost(made, program)
        saved = 1 - after / before
        if saved < self.least_saving:
            report.skip(
                place.name,
                f"{kept} of {place.rows} rows would save {saved:.2%} of the FLOPs of an image and its prompt, "
                f"less than {self.least_saving:.0%}",
            )
            return program
        report.did(
            f"{place.name}: {kept} of {place.rows} rows of an image stay, by {self.method}; {saved:.0%} fewer FLOPs "
            f"up to the first token ({before / 1e9:.4g} to {after / 1e9:.4g} G)"
        )
        for other in places.values():
            if other is not place:
                report.skip(other.name, f"not asked for ({other.rows} rows)")
        return made

    def drift(self, before: Program, after: Program) -> str:
        """Of the logits after random images and prompts: what matters is measured by a task (`mmopt.quality`)."""
        errors, same = [], 0
        for size in (0, 1):
            inputs = random_inputs(before, size, 0)
            a, b = (p(**inputs)["logits"][:, -1].float() for p in (before, after))
            errors += ((a - b).norm(dim=-1) / a.norm(dim=-1)).tolist()
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
        return (
            f"last logits of {len(errors)} random prompts differ by {sum(errors) / len(errors):.3g} of their norm, the "
            f"likeliest id is the same in {same}"
        )


def default_place(places: Mapping[str, Place]) -> str:
    spread = [p.name for p in places.values() if len(p.nodes) > 1]
    return spread[0] if spread else [p.name for p in places.values() if p.name == p.stage][-1]
