"""Plans fitted to a program that paints: which solver, how many steps, and what it costs in quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from mmopt.flow_fitting import FitResult, fit_plan
from mmopt.flow_frontier import Choice, Drift, Row, search
from mmopt.flow_plan import FlowPlan, Velocity, solve
from mmopt.flow_polish import polish_plan
from mmopt.flow_reference import reference, relative_errors
from mmopt.painting import draw_noise
from mmopt.program import Program
from mmopt.solvers import make_plan
from mmopt.velocity import ProgramVelocity, TensorVelocity

SAMPLES = 48  # images that a plan is fitted to, and as many again to check it on


def fit_flow_schedule(
    program: Program,
    prompts: Sequence[Sequence[int]],
    nfe: int,
    guidance: float | None = None,
    samples: int = SAMPLES,
    held_out: Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[int]]] | None = None,
    form: str = "",
    seed: int = 0,
    fine: int = 120,
    trials: int = 0,
    polish: int = 0,
    progress: Callable[[int], None] | None = None,
) -> FitResult:
    """Fit a solver of `nfe` evaluations to what a program paints of prompts of one form (`mmopt.flow_fitting`).

    prompts: ids, each with one more for the place of the picture; `samples` noises are drawn for them in turn, and as
    many again, of other noises, for `held_out` (by default the same prompts) to check the plan on; for names of forms
    of prompts with the prompts of each, as many for each form, and the plan must win on every one. guidance: by default
    the model's. fine: evaluations of the solution that plans are compared with. trials: grids of times to try. polish:
    steps of gradients through the network after the fit (`mmopt.flow_polish`), for fewer than about ten evaluations;
    a quarter of the samples choose when to stop, and the polished plan is taken if it wins on those held out. The
    result's ``plan`` is Adams-Bashforth where the fit does not win, and its ``reason`` says so; to keep it in the
    program and its engines: ``ReduceFlowSteps(result.plan, [result.plan])``. A fit is good for this form and guidance.
    """
    named = held_out if isinstance(held_out, Mapping) else {form: held_out or prompts}
    velocity, noise, weight = drawn(program, [prompts, *named.values()], samples, guidance, seed, progress)
    truth = reference(velocity, noise, weight, fine)
    forms = [name for name in (form, *named) for _ in range(samples)] if isinstance(held_out, Mapping) else None
    fit = fit_plan(
        velocity, noise, nfe, weight, held_out=[i >= samples for i in range(len(noise))], trials=trials, truth=truth,
        forms=forms, model=str(program.info["family"]), form=form,
    )  # fmt: skip
    fit = dataclasses.replace(fit, evaluations=fit.evaluations + fine * len(noise))
    if not polish:
        return fit
    chosen = TensorVelocity(program, [prompts[i % len(prompts)] for i in range(samples)])
    return polished(fit, velocity, chosen, samples, noise, truth.result, polish)


def polished(
    fit: FitResult,
    velocity: Velocity,
    chosen: TensorVelocity,
    count: int,
    noise: np.ndarray,
    truth: np.ndarray,
    iterations: int,
) -> FitResult:
    """The fit with its plan polished on the first `count` noises, if that wins on the others.

    chosen: the velocity of the first `count` alone, differentiable.
    """
    stop = np.arange(count) >= count - max(1, count // 4)
    start, end = (torch.from_numpy(np.ascontiguousarray(x[:count])) for x in (noise, truth))
    plan = polish_plan(chosen, fit.fitted, start, end, stop, iterations).plan
    found = relative_errors(solve(plan, velocity, noise)[-1], truth)
    errors = {"train": found[:count], "held_out": found[count:]}
    summary = {k: {"mean": float(e.mean()), "p90": float(np.quantile(e, 0.9))} for k, e in errors.items()}
    made = dataclasses.replace(fit, errors=fit.errors | {"polished": summary})
    ours, least = summary["held_out"]["mean"], min(fit.errors[k]["held_out"]["mean"] for k in ("fitted", "ab2"))
    if not ours < 0.99 * least:  # less is rounding
        return dataclasses.replace(made, reason=f"{fit.reason}; polished {ours:.4g} does not win")
    reason = f"held out: polished {ours:.4g} against {least:.4g} before"
    return dataclasses.replace(made, plan=plan, wins=True, reason=reason)


def drawn(
    program: Program,
    groups: Sequence[Sequence[Sequence[int]]],
    samples: int,
    guidance: float | None,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[ProgramVelocity, np.ndarray, float]:
    """The velocity of `samples` images for each group of prompts, their noise, and the guidance."""
    if samples < 1 or not all(groups):
        raise ValueError(f"samples is {samples} and {sum(map(len, groups))} prompts were given, expected at least one")
    listed = [g[i % len(g)] for g in groups for i in range(samples)]
    noise = draw_noise(len(listed), program.info, seed)
    weight = program.info["flow"]["guidance"] if guidance is None else guidance
    return ProgramVelocity(program, listed, progress=progress), noise, weight


def reduce_to_budget(
    program: Program,
    prompts: Sequence[Sequence[int]],
    budget: Drift,
    steps: Sequence[int] = (5, 6, 7, 8, 9, 10, 12, 16, 20, 30),
    guidance: float | None = None,
    samples: int = 16,
    seed: int = 0,
    fine: int = 120,
) -> tuple[Choice, list[Row]]:
    """The plan of fewest passes whose drift keeps a budget, and all that were measured on the way there.

    At each number of steps a plan is fitted and AB2 is tried too; both are measured on noises that no fit has seen. If
    no plan keeps the budget the best one is chosen, and the choice says so.
    """
    velocity, noise, weight = drawn(program, [prompts], samples, guidance, seed + 1)

    def plans() -> Iterator[FlowPlan]:
        for n in sorted(steps):
            yield fit_flow_schedule(program, prompts, n, weight, max(8, samples), seed=seed, fine=fine).plan
            yield make_plan("ab2", n, weight)

    return search(velocity, noise, plans(), reference(velocity, noise, weight, fine), budget)
