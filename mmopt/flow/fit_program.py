"""Plans fitted to a program that paints: which solver, how many steps, and what it costs in quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mmopt.flow.fit import FitResult, fit_plan, summary
from mmopt.flow.frontier import Choice, DriftBudget, Row, search
from mmopt.flow.polish import polish_plan
from mmopt.flow.reference import reference, relative_errors
from mmopt.flow.velocity import ProgramVelocity, TensorVelocity
from mmopt.ir.program import Program
from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.tokenizer import TextProcessor, image_prompt_ids
from mmopt.spec.flow_plan import FlowPlan, Velocity, solve
from mmopt.spec.flow_sampler import draw_noise
from mmopt.spec.solvers import make_plan

SAMPLES = 48  # images that a plan is fitted to, and as many again to check it on


def fit_flow_plan(
    program: Program,
    prompts: Sequence[str | Sequence[int]],
    steps: int,
    guidance: float | None = None,
    samples: int = SAMPLES,
    held_out: Sequence[str | Sequence[int]] | Mapping[str, Sequence[str | Sequence[int]]] | None = None,
    form: str = "",
    seed: int = 0,
    fine: int = 120,
    trials: int = 0,
    polish: int = 0,
    progress: Callable[[int], None] | None = None,
) -> FitResult:
    """Fit a solver of `steps` evaluations to what a program paints of prompts of one form (`mmopt.flow.fit`).

    prompts: texts, or ids with one more for the place of the picture; `samples` noises are drawn for them in turn, and
    as many again, of other noises, for `held_out` (by default the same prompts) to check the plan on. If that maps
    names of forms of prompts to prompts, each form gets as many and the plan must win on every one. guidance: by
    default the model's. fine: evaluations of the solution that plans are compared with. trials: grids of times to try.
    polish: steps of gradients through the network after the fit (`mmopt.flow.polish`), for fewer than about ten
    evaluations; a quarter of the samples choose when to stop, and the polished plan is taken if it wins on those held
    out. The result's ``plan`` is Adams-Bashforth where the fit does not win, and its ``reason`` says so; to keep it in
    the program and its engines: ``ReduceFlowSteps(result.plan, [result.plan])``. A fit is good for this form and
    guidance.
    """
    named = held_out if isinstance(held_out, Mapping) else {form: held_out or prompts}
    velocity, noise, weight = drawn(program, [prompts, *named.values()], samples, guidance, seed, progress)
    truth = reference(velocity, noise, weight, fine)
    forms = [name for name in (form, *named) for _ in range(samples)] if isinstance(held_out, Mapping) else None
    fit = fit_plan(
        velocity, noise, steps, weight, held_out=[i >= samples for i in range(len(noise))], trials=trials, truth=truth,
        forms=forms, model=str(program.info.family), form=form,
    )  # fmt: skip
    fit = dataclasses.replace(fit, evaluations=fit.evaluations + fine * len(noise))
    if not polish:
        return fit
    listed = ids_of(program, prompts)
    chosen = TensorVelocity(program, [listed[i % len(listed)] for i in range(samples)])
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
    held = np.arange(len(noise)) >= count
    errors = summary(found, {"train": ~held, "held_out": held})
    made = dataclasses.replace(fit, errors=fit.errors | {"polished": errors})
    ours, least = errors["held_out"]["mean"], min(fit.errors[k]["held_out"]["mean"] for k in ("fitted", "ab2"))
    if not ours < 0.99 * least:  # less is rounding
        return dataclasses.replace(made, reason=f"{fit.reason}; polished {ours:.4g} does not win")
    reason = f"held out: polished {ours:.4g} against {least:.4g} before"
    return dataclasses.replace(made, plan=plan, wins=True, reason=reason)


def drawn(
    program: Program,
    groups: Sequence[Sequence[str | Sequence[int]]],
    samples: int,
    guidance: float | None,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[ProgramVelocity, np.ndarray, float]:
    """The velocity of `samples` images for each group of prompts, their noise, and the guidance."""
    if samples < 1 or not all(groups):
        raise ValueError(f"samples is {samples} and {sum(map(len, groups))} prompts were given, expected at least one")
    read = [ids_of(program, g) for g in groups]
    listed = [g[i % len(g)] for g in read for i in range(samples)]
    noise = draw_noise(len(listed), program.info, seed)
    weight = program.info.required_flow.guidance if guidance is None else guidance
    return ProgramVelocity(program, listed, progress=progress), noise, weight


def read_prompts(path: Path) -> list[str]:
    """The texts of a file, one in each line. Raises ValueError that names the file."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not a readable text file: {e}") from e
    if not prompts:
        raise ValueError(f"{path}: holds no prompts, expected one in each line")
    return prompts


def ids_of(program: Program, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Prompts as ids; texts are read by the checkpoint's tokenizer.json. Raises ValueError if it has none."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one text, expected a list of prompts")
    if not any(isinstance(p, str) for p in prompts):
        return [[int(i) for i in p] for p in prompts]
    info = program.info
    path = Path(program.source.directory or "") / "tokenizer.json"
    if program.source.directory is None or not path.is_file():
        raise ValueError(f"{path}: no such file, so prompts must be lists of ids")
    chat = ChatTemplate.from_json(info.processing.chat)
    text = TextProcessor.of_model(path, info, chat)
    return [image_prompt_ids(text, chat, p) if isinstance(p, str) else [int(i) for i in p] for p in prompts]


def reduce_to_budget(
    program: Program,
    prompts: Sequence[str | Sequence[int]],
    budget: DriftBudget,
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
            yield fit_flow_plan(program, prompts, n, weight, max(8, samples), seed=seed, fine=fine).plan
            yield make_plan("ab2", n, weight)

    return search(velocity, noise, plans(), reference(velocity, noise, weight, fine), budget)
