"""Fewer rows of each image: the rest of its stages, and the language model, do with a share of them.

Sites are found by data flow (`mmopt.pruning.sites`), methods are plain functions of rows (`mmopt.pruning.methods`);
what follows from fewer rows, tables of positions and keys of attention, is worked out by `mmopt.pruning.propagate`. The
number of rows is fixed when the pass runs, so all shapes stay what they were in kind, and engines stay static.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmopt.ir.program import Program
from mmopt.pruning.apply import compress, cost, find_sites
from mmopt.pruning.methods import METHODS
from mmopt.pruning.propagate import NotApplicable
from mmopt.pruning.sites import PIXELS, RESIZE, PruneSite
from mmopt.rewrite.contracts import random_inputs
from mmopt.rewrite.pass_base import Pass, Report

POSITION_IDS = ("keep", "renumber")


class CompressVisualTokens(Pass):
    """keep_ratio: share of an image's rows that stay at `site`, more than 0, at most 1 (nothing is changed).

    method: one of `mmopt.pruning.methods.METHODS`, or "resize" at site "pixels". site: a name of `find_sites`, by
    default all attentions of the tower, each leaving out some rows, which with this method lost least where it was
    measured; if there are none, where the last stage of the images leaves them. position_ids: "keep" those that rows of
    the language model had before, or "renumber" them without gaps, which destroys grounding (GAP, arXiv:2506.21873).
    min_saving: share of the FLOPs of an image and its prompt that must be saved, else the site is refused.
    """

    contract = "approximate"

    def __init__(
        self,
        keep_ratio: float = 0.25,
        method: str = "dominant",
        site: str | None = None,
        position_ids: str = "keep",
        min_saving: float = 0.02,
    ):
        if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, int | float) or not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio is {keep_ratio!r}, expected a share of the rows, more than 0 and at most 1")
        if method not in METHODS and method != RESIZE:
            raise ValueError(f"method is {method!r}, expected {RESIZE} or one of {', '.join(METHODS)}")
        if position_ids not in POSITION_IDS:
            raise ValueError(f"position_ids is {position_ids!r}, expected {' or '.join(POSITION_IDS)}")
        self.keep_ratio, self.method, self.site, self.position_ids = keep_ratio, method, site, position_ids
        self.min_saving = min_saving

    def run(self, program: Program, report: Report) -> Program:
        if self.keep_ratio == 1:
            report.skip("program", "keep_ratio is 1: every row stays")
            return program
        sites = {p.name: p for p in find_sites(program)}
        if self.site is not None and self.site not in sites:
            raise ValueError(f"site is {self.site!r}, expected one of {', '.join(sites) or '(there are none)'}")
        if not sites:
            report.skip("program", "no stage makes rows of an image that it could do without")
            return program
        site = sites[self.site or default_site(sites)]
        kept = max(1, round(self.keep_ratio * site.rows))
        if (self.method == RESIZE) != (site.name == PIXELS):
            report.skip(site.name, f"method {self.method} is not for this site")
            return program
        try:
            made = compress(program, site, kept, self.method, self.position_ids)
        except NotApplicable as e:
            report.skip(site.name, str(e))
            return program
        before, after = cost(program), cost(made, program)
        saved = 1 - after / before
        if saved < self.min_saving:
            report.skip(
                site.name,
                f"{kept} of {site.rows} rows would save {saved:.2%} of the FLOPs of an image and its prompt, "
                f"less than {self.min_saving:.0%}",
            )
            return program
        report.did(
            f"{site.name}: {kept} of {site.rows} rows of an image stay, by {self.method}; {saved:.0%} fewer FLOPs "
            f"up to the first token ({before / 1e9:.4g} to {after / 1e9:.4g} G)"
        )
        for other in sites.values():
            if other is not site:
                report.skip(other.name, f"not asked for ({other.rows} rows)")
        return made

    def drift(self, before: Program, after: Program) -> str:
        """Of the logits after random images and prompts: what matters is measured by a task (`mmopt.evaluate`)."""
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


def default_site(sites: Mapping[str, PruneSite]) -> str:
    spread = [p.name for p in sites.values() if len(p.nodes) > 1]
    return spread[0] if spread else [p.name for p in sites.values() if p.name == p.stage][-1]
