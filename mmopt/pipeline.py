"""run_passes(program): run passes in order and hold each to its contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mmopt.ir.program import Program
from mmopt.passes.drop_hidden_rows import DropHiddenRows
from mmopt.passes.drop_unread_rows import DropUnreadRows
from mmopt.passes.fold_constants import FoldConstants
from mmopt.passes.fuse_cross_attention import FuseCrossAttention
from mmopt.passes.hoist_invariants import HoistInvariants
from mmopt.passes.pack_projections import PackProjections
from mmopt.passes.rejoin_rows import RejoinRows
from mmopt.passes.share_samples import ShareSamples
from mmopt.passes.split_calls import SplitCalls
from mmopt.passes.split_rows import SplitRows
from mmopt.rewrite.contracts import ContractError, compare, why_unchecked
from mmopt.rewrite.pass_base import Pass, Report

Observer = Callable[[str, Report | None, Program], None]
"""``(pass, None, the Program before it)``, then ``(pass, its report, the Program after it)``."""


def default_passes() -> list[Pass]:
    """The exact passes, in order."""
    return [
        DropUnreadRows(),
        SplitRows(),
        RejoinRows(),
        SplitCalls(),
        ShareSamples(),
        HoistInvariants(),
        DropHiddenRows(),
        FuseCrossAttention(),
        FoldConstants(),
        PackProjections(),
    ]


@dataclass
class Result:
    """An optimized Program and what each pass did; ``print(result)`` shows it."""

    program: Program
    reports: list[Report] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(str(r) for r in self.reports)


def run_passes(
    program: Program,
    passes: Sequence[Pass] | None = None,
    check: bool | None = None,
    observers: Sequence[Observer] = (),
) -> Result:
    """Run `passes` (by default the exact ones), each checked against its contract; see `mmopt.optimize`."""
    result = Result(program)
    unchecked = why_unchecked(program) if check is None else (None if check else "checks are off")
    for p in default_passes() if passes is None else passes:
        for tell in observers:
            tell(p.name, None, result.program)
        start = time.perf_counter()
        try:
            made, report = p(result.program)
        except ContractError:
            raise
        except Exception as e:
            raise ContractError(f"pass {p.name} failed: {type(e).__name__}: {e}", result.program) from e
        report.seconds = time.perf_counter() - start
        report.checked = _check(p, report, result.program, made, unchecked)
        result = Result(made, [*result.reports, report])
        for tell in observers:
            tell(p.name, report, result.program)
    return result


def _check(p: Pass, report: Report, before: Program, after: Program, unchecked: str | None) -> str:
    """What checking a pass found, in words. Raises ContractError, with the Program before it, for a broken promise."""
    if not report.rewrites:
        return "nothing to check"
    if unchecked:
        return f"not checked: {unchecked}"
    try:
        drift = p.drift(before, after) if p.contract == "approximate" else None
        found = None if drift else compare(before, after)
    except Exception as e:
        raise ContractError(f"checking pass {p.name} failed: {type(e).__name__}: {e}", before) from e
    if p.contract == "approximate":
        return f"drift: {drift or found or 'none found'}"
    if found is not None:
        raise ContractError(f"pass {p.name} promised to be exact: {found}", before)
    return "checked"
