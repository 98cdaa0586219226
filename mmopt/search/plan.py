"""Plans as data: the approximate passes of a program with their arguments, to and from JSON, and applied again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmopt.ir.program import Program
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.passes.reduce_flow_steps import ReduceFlowSteps
from mmopt.pipeline import Observer, Result, default_passes, run_passes
from mmopt.pruning.apply import find_sites
from mmopt.pruning.methods import METHODS
from mmopt.pruning.sites import RESIZE
from mmopt.rewrite.pass_base import Pass
from mmopt.spec.files import save_json
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.schema import SCHEMA, check_schema

COMPRESS, REDUCE = "compress_visual_tokens", "reduce_flow_steps"

Plan = dict[str, Any]

"""``{"schema": SCHEMA, "passes": [{"name": ..., and its arguments}], ...}``; `budget` and `measured`, what was asked
for and what was found, may stand beside it. All of it is JSON; in ``program.info.plan`` it goes along with a Program
into its engines."""


def make_plan(passes: Sequence[dict[str, Any]], **facts: Any) -> Plan:
    return {"schema": SCHEMA, "passes": list(passes), **facts}


def compression(site: str, method: str, keep_ratio: float, position_ids: str = "keep") -> dict[str, Any]:
    """The pass compress_visual_tokens in a plan."""
    return {"name": COMPRESS, "site": site, "method": method, "keep_ratio": keep_ratio, "position_ids": position_ids}


def flow_steps(program: Program) -> dict[str, Any]:
    """The pass reduce_flow_steps in a plan, with the plans that a program paints by."""
    flow = program.info.required_flow
    assert flow.plan is not None
    return {"name": REDUCE, "plan": flow.plan.to_json(), "fitted": [p.to_json() for p in flow.plans]}


def read_plan(source: Plan | str | Path) -> Plan:
    """A plan from a dict, a file that holds one, a program.json or the engine directory that it lies in.

    Raises ValueError, which names the file, for anything else.
    """
    if not isinstance(source, dict):
        path = Path(source)
        path = path / "program.json" if path.is_dir() else path
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(given, dict) and isinstance(given.get("info"), dict):
                if "plan" not in given["info"]:
                    raise ValueError("this engine was made without a plan")
                given = given["info"]["plan"]
            check_schema(given, "a plan")
            return read_plan(given)
        except ValueError as e:  # of JSON and of text that is none, too
            raise ValueError(f"{path}: {e}") from e
    check_schema(source, "a plan", ("passes",), ("budget", "measured"))
    steps = source.get("passes")
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise ValueError(f"not a plan: its passes are {steps!r}, expected a list of objects")
    return source


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as a JSON file, whole or not at all."""
    save_json(read_plan(plan), path)


def passes_of(plan: Plan | str | Path, program: Program | None = None) -> list[Pass]:
    """The passes of a plan, as `read_plan` takes it.

    Raises ValueError that names it for a pass, a method or an argument that is not known, and, with a `program`, for a
    site that this program does not have.
    """
    made = []
    for step in read_plan(plan)["passes"]:
        arguments = {k: v for k, v in step.items() if k != "name"}
        if step.get("name") not in PASSES:
            raise ValueError(f"plan: pass {step.get('name')!r} is not known; there are {', '.join(PASSES)}")
        made.append(PASSES[step["name"]](arguments, program))
    return made


def _arguments(name: str, given: dict[str, Any], needed: Sequence[str], other: Sequence[str]) -> None:
    if missing := [k for k in needed if k not in given]:
        raise ValueError(f"plan: {name} lacks {', '.join(missing)}")
    if unknown := [k for k in given if k not in (*needed, *other)]:
        raise ValueError(f"plan: {name} takes no {', '.join(unknown)}")


def _compress(given: dict[str, Any], program: Program | None) -> Pass:
    _arguments(COMPRESS, given, ("site", "method", "keep_ratio"), ("position_ids",))
    check_methods([given["method"]])
    if program is not None:
        check_sites(program, [given["site"]])
    return CompressVisualTokens(**given)


def _reduce(given: dict[str, Any], program: Program | None) -> Pass:
    _arguments(REDUCE, given, ("plan",), ("fitted",))
    if program is not None and not program.schedules.image:
        raise ValueError(f"plan: {REDUCE} is for programs that paint; {program.info.family} generates no images")
    return ReduceFlowSteps(FlowPlan.from_json(given["plan"]), [FlowPlan.from_json(f) for f in given.get("fitted", [])])


PASSES: dict[str, Callable[[dict[str, Any], Program | None], Pass]] = {COMPRESS: _compress, REDUCE: _reduce}


def check_methods(methods: Sequence[Any]) -> None:
    for method in methods:
        if method not in (known := [*METHODS, RESIZE]):
            raise ValueError(f"method {method!r} is not known; there are {', '.join(known)}")


def check_sites(program: Program, wanted: Sequence[Any]) -> list[Any]:
    """The sites of a program where visual tokens can be compressed, or ValueError for one that is not there."""
    sites = find_sites(program)
    names = [p.name for p in sites]
    for site in wanted:
        if site not in names:
            raise ValueError(f"site {site!r} is not in this program; there are {', '.join(names) or 'none'}")
    return sites


def apply_plan(
    program: Program,
    plan: Plan | str | Path,
    passes: Sequence[Pass] | None = None,
    check: bool | None = None,
    observers: Sequence[Observer] = (),
) -> Result:
    """`mmopt.optimize` with a plan: its compression, then `passes` (by default the exact ones), then its flow steps.

    The plan is kept in ``info.plan`` of the program made.
    """
    plan = read_plan(plan)
    own = passes_of(plan, program)
    last = [p for p in own if p.name == REDUCE]
    exact = default_passes() if passes is None else list(passes)
    result = run_passes(program, [*(p for p in own if p not in last), *exact, *last], check, observers)
    return Result(with_plan(result.program, plan), result.reports)


def with_plan(program: Program, plan: Plan) -> Program:
    made = program.copy()
    made.info = replace(made.info, plan=plan)
    return made
