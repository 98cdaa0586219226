"""Polishes the table of a flow solver by gradients through the network: for fewer than about ten evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmopt.spec.flow_plan import FlowPlan, from_velocity_table


@dataclass(frozen=True)
class Polished:
    """plan: the better one by the mean relative error of the samples held out. before, after: (train, held out)."""

    plan: FlowPlan
    before: tuple[float, float]
    after: tuple[float, float]


def polish_plan(
    velocity: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]],
    plan: FlowPlan,
    noises: Tensor,
    targets: Tensor,
    held_out: Sequence[bool] | np.ndarray,
    iterations: int = 100,
    rate: float = 2e-3,
    recompute: bool = False,
) -> Polished:
    """Adam on a plan's coefficients and times, to the least mean logarithm of squared relative errors.

    velocity: as in `mmopt.flow.fit`, with tensors, the time of no dimensions; differentiable in both. noises,
    targets ``[n, ...]`` float32: what the fine solution makes of them. held_out ``[n]``: samples that only choose,
    every tenth iteration, which table is kept; a further check needs others still. recompute: do each evaluation twice
    and hold less memory. Raises ValueError for a plan that leaves unconditional passes out.
    """
    if plan.guidance != 1 and not plan.guided.all():
        raise ValueError(
            f"plan {plan.name!r} leaves unconditional passes out: only plans with all of them are polished"
        )
    held = torch.as_tensor(np.asarray(held_out, bool))
    if held.shape != (len(noises),) or held.all() or not held.any():
        raise ValueError(f"held_out has {int(held.sum())} of {held.numel()} samples, expected some of {len(noises)}")
    w, n, guided = plan.guidance, plan.evaluations, bool(plan.guided.any())
    gaps = torch.from_numpy(np.diff([*plan.times, 1.0]))
    if (gaps <= 0).any():
        raise ValueError(
            f"plan {plan.name!r} asks twice at one time: only plans with rising times below 1 are polished"
        )
    first = float(plan.times[0])
    a = torch.from_numpy(plan.a.copy()).requires_grad_()
    b = torch.from_numpy(plan.cond + plan.uncond).requires_grad_()
    logits = gaps.log().requires_grad_()
    shape = (-1, *[1] * noises.ndim)

    def times() -> Tensor:
        return first + (1 - first) * torch.cat([torch.zeros(1, dtype=b.dtype), logits.softmax(0).cumsum(0)[:-1]])

    def ask(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = velocity(x, t, guided)
        return cond if uncond is None or not guided else w * cond - (w - 1) * uncond

    def errors(chosen: Tensor) -> Tensor:
        """Squared relative errors of some samples; the rest are kept out of the gradient."""
        x, t, seen = noises, times().to(noises.dtype), []
        weights, lead = b.to(noises.dtype), a.to(noises.dtype)
        for i in range(n):
            seen.append(checkpoint(ask, x, t[i], use_reentrant=False) if recompute else ask(x, t[i]))
            x = lead[i] * noises + (weights[i, : i + 1].reshape(shape) * torch.stack(seen)).sum(0)
        square = ((x - targets) ** 2).flatten(1).sum(1) / (targets**2).flatten(1).sum(1)
        return square[chosen]

    def score() -> tuple[float, float]:
        with torch.no_grad():
            found = errors(torch.ones_like(held)).sqrt()
        return float(found[~held].mean()), float(found[held].mean())

    before = best = score()
    kept = (a.detach().clone(), b.detach().clone(), times().detach())
    optimizer = torch.optim.Adam([a, b, logits], lr=rate)
    for k in range(iterations):
        optimizer.zero_grad()
        (errors(~held) + 1e-12).log().mean().backward()
        optimizer.step()
        if k % 10 == 9 or k == iterations - 1:
            if (found := score())[1] < best[1]:
                best, kept = found, (a.detach().clone(), b.detach().clone(), times().detach())
    if best is before:
        return Polished(plan, before, before)
    lead, table, when = (x.numpy() for x in kept)
    name = f"{plan.name}, polished"
    return Polished(from_velocity_table(name, when, lead, np.tril(table), w), before, best)
