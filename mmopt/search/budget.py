"""Quality as a budget: a search for the cheapest compression of visual tokens whose answers are nearly as good.

Candidates are site x method x share of rows kept (`mmopt.passes.compress_visual_tokens`). Their order is chosen by
Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) after a few that come first. Each is asked a few
questions first and given up if it surely lies below the budget (intervals: `mmopt.search.result.compared`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt.flow.frontier import DriftBudget
from mmopt.ir.program import Program
from mmopt.measure.quality import evaluate
from mmopt.measure.statistics import Score
from mmopt.measure.task import Task, quick
from mmopt.pipeline import Observer, Result, default_passes, run_passes
from mmopt.pruning.methods import METHODS
from mmopt.pruning.sites import PIXELS, RESIZE
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.runtime.engine import Engine
from mmopt.search import plan as plans
from mmopt.search.flow_budget import within
from mmopt.search.plan import check_methods, check_sites, compression, flow_steps, make_plan, passes_of
from mmopt.search.probe import LISTS, Runner, answering, chosen, compressed, first_token, flops, identity
from mmopt.search.result import MET, NOT_MET, Candidate, Row, Search, compared, verdict
from mmopt.search.trials import Trials


@dataclass(frozen=True)
class QualityBudget:
    """A budget: the mean score on `task` falls by at most `max_drop` from that of the uncompressed program.

    limit: so many of the task's samples, drawn by `seed`; quick: so many of these are asked first, 0 for none. trials:
    plans to measure. keep_ratios, methods, position_ids, sites: what plans are made of, by default every method at
    every site. store: a file of the trials, from which a search that was stopped goes on (one process at a time).
    flow: a budget of drift for programs that paint, kept after the compression. runner: what answers for a program, by
    default an engine exported to a temporary directory (`mmopt.search.probe.exported`).

    The cost is FLOPs of encoding and reading a typical prompt, and the same seed gives the same trials. They are known
    before anything is asked, so plans that cost no less than one that keeps the budget are passed over; frontier: they
    are measured too, to see all of quality over cost. timed: the cost is the time to the first token instead, measured
    beside the uncompressed program in turn; fewer FLOPs need not take less time, and a busy machine cannot tell.

    Means are compared, on the same samples; the verdict says whether their 95 % interval is certain of it, too. Of many
    plans measured on the same samples the best looks a little better than it is. Raises ValueError that names a field.
    """

    task: Task
    max_drop: float = 0.01
    limit: int | None = None
    quick: int = 64
    trials: int = 30
    seed: int = 0
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.125)
    methods: Sequence[str] | None = None
    position_ids: Sequence[str] = ("keep",)
    sites: Sequence[str] | None = None
    store: str | Path | None = None
    flow: DriftBudget | None = None
    timed: bool = False
    frontier: bool = False
    runner: Runner | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise ValueError(f"task is {self.task!r}, expected a mmopt.Task")
        if not _number(self.max_drop) or not 0 <= self.max_drop < 1:
            raise ValueError(f"max_drop is {self.max_drop!r}, expected a share from 0 to 1, such as 0.01")
        least = {"limit": 1, "quick": 0, "trials": 1, "seed": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name == "limit":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least {lowest}")
        for name in ("keep_ratios", "methods", "position_ids", "sites"):
            value = getattr(self, name)
            if value is None and name in ("methods", "sites"):
                continue
            if isinstance(value, str) or not isinstance(value, Sequence) or not value:
                raise ValueError(f"{name} is {value!r}, expected a list that is not empty")
            object.__setattr__(self, name, tuple(dict.fromkeys(value)))
        for keep in self.keep_ratios:
            if not _number(keep) or not 0 < keep < 1:
                raise ValueError(f"keep_ratios holds {keep!r}, expected shares between 0 and 1")
        for position_ids in self.position_ids:
            if position_ids not in ("keep", "renumber"):
                raise ValueError(f"position_ids holds {position_ids!r}, expected keep or renumber")
        if self.flow is not None and not isinstance(self.flow, DriftBudget):
            raise ValueError(f"flow is {self.flow!r}, expected a mmopt.DriftBudget")

    def __str__(self) -> str:
        return f"a drop of at most {self.max_drop:g}"

    @property
    def asked(self) -> Task:
        """The samples that plans are measured on."""
        return self.task if self.limit is None else quick(self.task, self.limit, self.seed)

    def to_json(self) -> dict[str, Any]:
        """What decides which trials are made and how they come out."""
        names = (
            "max_drop", "limit", "quick", "seed", "keep_ratios", "methods", "position_ids", "sites", "timed", "frontier"
        )  # fmt: skip
        made = {k: getattr(self, k) for k in names} | {"task": self.task.name}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in made.items()}


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


@dataclass
class SearchResult(Result):
    """The optimized Program, what each pass did, and what the search measured."""

    search: Search | None = None


def search_quality(
    program: Program,
    budget: QualityBudget,
    passes: Sequence[Pass] | None = None,
    check: bool | None = None,
    observers: Sequence[Observer] = (),
    prompts: Sequence[str | Sequence[int]] = (),
) -> SearchResult:
    """The program with the cheapest compression that keeps a budget of quality, then `passes` (by default the exact).

    If no plan keeps the budget nothing is compressed, and the report says so. observers are told what is measured.
    prompts: for a budget of drift, as in `mmopt.optimize`. The plan stands in ``info.plan`` of the program made, see
    `mmopt.search.plan`. Raises ValueError for programs without weights or sites, and for a store of another search.
    """
    exact = default_passes() if passes is None else list(passes)
    if budget.flow is not None and not program.schedules.image:
        raise ValueError(f"a budget of drift is for programs that paint; {program.info.family} generates no images")
    if budget.flow is not None and not prompts:
        raise ValueError("a budget of drift needs prompts of the form that will be painted, found none")

    def tell(text: str) -> None:
        for observer in observers:
            observer(text, None, program)

    with ExitStack() as stack:
        found = _Measuring(program, budget, exact, stack).run(tell)
    best = found.best
    steps = [compression(*best.plan)] if best is not None and best.plan is not None else []
    made = run_passes(program, [*passes_of(make_plan(steps), program), *exact], check, observers)
    report = Report("budget", "approximate", checked=f"quality of {found.task}")
    if best is None:
        report.skip("program", found.reason)
    else:
        report.did(found.reason)
    made.reports.append(report)
    measured = found.measured()
    if budget.flow is not None:
        made = within(made, budget.flow, prompts)
        steps.append(flow_steps(made.program))
        measured["flow"] = {"budget": str(budget.flow), "drift": made.reports[-1].checked}
    plan = make_plan(steps, budget=budget.to_json(), measured=measured)
    return SearchResult(plans.with_plan(made.program, plan), made.reports, found)


def candidates(budget: QualityBudget, sites: Sequence[str]) -> tuple[list[Candidate], list[list[Candidate]]]:
    """All that can be tried; and for each of the first trials what it can be, in order: the baselines that are hard to
    beat, pooling as late as it saves anything and smaller images. Raises ValueError for a method that is not known.
    """
    check_methods(budget.methods or ())
    methods = budget.methods or (*METHODS, RESIZE)
    made = [
        Candidate(site, method, keep, position_ids)
        for site in (p for p in sites if p in (budget.sites or sites))
        for method in methods
        if (method == RESIZE) == (site == PIXELS)
        for keep in budget.keep_ratios
        for position_ids in budget.position_ids
    ]
    first = [
        [
            c
            for c in reversed(made)
            if (c.method, c.keep_ratio, c.position_ids) == (method, keep, budget.position_ids[0])
        ]
        for method in ("pool", RESIZE)
        for keep in budget.keep_ratios
    ]
    return made, [f for f in first if f]


class _Measuring:
    """A search as it goes on: the uncompressed program and its score, and what is measured against them."""

    def __init__(self, program: Program, budget: QualityBudget, exact: Sequence[Pass], stack: ExitStack):
        if not program.has_weights:
            raise ValueError("this program has shapes only, no weights: its quality cannot be measured")
        self.program, self.budget, self.exact, self.stack = program, budget, exact, stack
        self.sites = {p.name: p for p in check_sites(program, budget.sites or ())}
        self.task = budget.asked
        self.few = quick(self.task, budget.quick, budget.seed) if 0 < budget.quick < len(self.task.samples) else None
        self.shown = next((s for s in self.task.samples if s.images), self.task.samples[0])
        space, first = candidates(budget, list(self.sites))
        if not space:
            raise ValueError(f"{program.info.family}: there is no site where visual tokens can be compressed so")
        facts = identity(program, self.task, [importlib.metadata.version("mmopt"), budget.to_json(), space])
        self.trials = Trials(space, first, budget.seed, budget.store, facts)

    def run(self, tell: Callable[[str], None]) -> Search:
        budget, left, costs = self.budget, dict[str, str](), dict[Candidate, float]()
        tell("nothing compressed")
        self._ask_uncompressed()
        while (n := len(self.trials.rows)) < budget.trials:
            bar = self._bar()
            for candidate in self.trials.upcoming():
                if costs.get(candidate, 0.0) >= bar:
                    continue
                made = compressed(self.program, candidate)
                if isinstance(made, str):
                    left[str(candidate)], costs[candidate] = made, math.inf
                    continue
                made = run_passes(made, self.exact, check=False).program
                costs[candidate] = flops(made, self.program) / self.flops
                if costs[candidate] < bar:
                    break
            else:
                break  # everything that could be chosen was tried
            tell(f"plan {n + 1} of {budget.trials}: {candidate}")
            row = self._measure(candidate, made)
            value = row.cost if row.verdict != NOT_MET else 10 - row.difference  # any that keeps the budget is better
            self.trials.add(candidate, row.to_json(), value, row.pruned)
        rows = [Row.from_json(r) for r in self.trials.rows]
        cost = "time to the first token" if budget.timed else "FLOPs up to the first token"
        return Search(self.task.name, budget.max_drop, str(budget), cost, self.full, rows, left)

    def _bar(self) -> float:
        """The cost from which on a plan cannot be chosen any more."""
        if self.budget.timed or self.budget.frontier:
            return math.inf
        rows = map(Row.from_json, self.trials.rows)
        return min([1.0, *(r.cost for r in rows if r.verdict != NOT_MET)])

    def _ask_uncompressed(self) -> None:
        program = run_passes(self.program, self.exact, check=False).program
        self.flops = flops(program)
        known = self.trials.recall("uncompressed")
        if known is None or self.budget.timed:
            self.runner = self.stack.enter_context(answering(program, self.budget.runner))
        if known is None:
            known = {"score": dataclasses.asdict(evaluate(self.runner, self.task)), "seconds": None}
            if self.budget.timed:
                known["seconds"] = statistics.median(first_token(self.shown, self.runner)[0])
            self.trials.remember("uncompressed", known)
        self.score = score = Score(**known["score"])
        self.full = Row(
            None, None, None, self.flops, 1.0, score.mean, score.interval, 0.0, (0.0, 0.0), 0, 0, len(score.ids), MET,
            seconds=known["seconds"],
        )  # fmt: skip

    def _measure(self, candidate: Candidate, program: Program) -> Row:
        budget, count = self.budget, flops(program, self.program)
        with answering(program, budget.runner) as runner:
            score, pruned = self._score(runner)
            times = first_token(self.shown, self.runner, runner) if budget.timed else ()
        found, interval = compared(score, chosen(self.score, score.ids))
        told = NOT_MET if pruned else verdict(found.mean, interval, budget.max_drop)
        of = self.sites[candidate.site].rows
        seconds = statistics.median(times[1]) if times else None
        cost = statistics.median(b / a for a, b in zip(*times, strict=True)) if times else count / self.flops
        return Row(
            candidate, max(1, round(candidate.keep_ratio * of)), of, count, cost, score.mean, score.interval,
            found.mean, interval, found.wins, found.losses, found.samples, told, pruned, seconds,
        )  # fmt: skip

    def _score(self, runner: Engine | Program) -> tuple[Score, bool]:
        """Answers to all samples, or to a few if these are enough to tell that the budget is not kept."""
        if self.few is None:
            return evaluate(runner, self.task), False
        score = evaluate(runner, self.few)
        _, (_, high) = compared(score, chosen(self.score, score.ids))
        if high < -self.budget.max_drop:
            return score, True
        rest = [s for s in self.task.samples if s.id not in score.ids]
        more = evaluate(runner, dataclasses.replace(self.task, samples=rest))
        both = {k: getattr(score, k) + getattr(more, k) for k in LISTS} | {"seconds": score.seconds + more.seconds}
        return chosen(dataclasses.replace(score, **both), self.score.ids), False
