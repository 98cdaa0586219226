"""A program's velocity as a function: what solvers are fitted to is what the image schedule computes."""

import dataclasses

import numpy as np
import painting_toy as toy
import pytest
import torch

from mmopt.flow.velocity import ProgramVelocity, TensorVelocity
from mmopt.search.optimize import optimize
from mmopt.spec.flow_plan import solve
from mmopt.spec.solvers import make_plan

PROMPTS = [[1, 5, 6, 7, 3], [1, 9, 3], [1, 4, 4, 3]]


@pytest.fixture(scope="module")
def programs():
    plain = toy.program()
    return {"plain": plain, "optimized": optimize(plain, check=False).program}


def noise_of(n: int) -> torch.Tensor:
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("kind", ["plain", "optimized"])
@pytest.mark.parametrize("together", [1, 2, 16])
def test_solving_with_it_is_painting(programs, kind, together):
    plan, noise = make_plan("ab2", 5, guidance=3.0), noise_of(3)
    painted = programs[kind].generate_images(PROMPTS, noise, plan)["latents"]
    velocity = ProgramVelocity(programs[kind], PROMPTS, together)
    np.testing.assert_allclose(solve(plan, velocity, noise.numpy())[-1], painted.numpy(), atol=5e-6)
    assert velocity.forwards == plan.forwards == 10


def test_without_the_unconditional_pass(programs):
    noise, told = noise_of(3).numpy(), []
    velocity = ProgramVelocity(programs["optimized"], PROMPTS, progress=told.append)
    cond, none = velocity(noise, 0.25, guided=False)
    both, uncond = velocity(noise, 0.25)
    assert none is None
    np.testing.assert_allclose(cond, both, atol=2e-6)
    assert np.abs(both - uncond).max() > 1e-3  # the prompt matters
    assert told == [1, 3]


def test_each_time_and_prompt_counts(programs):
    noise = noise_of(3).numpy()
    velocity = ProgramVelocity(programs["optimized"], PROMPTS)
    early, late = velocity(noise, 0.1)[0], velocity(noise, 0.9)[0]
    np.testing.assert_array_equal(early, velocity(noise, 0.1)[0])  # nothing is left over from the call between
    assert np.abs(early - late).max() > 1e-3
    other = ProgramVelocity(programs["optimized"], [PROMPTS[1], *PROMPTS[1:]])(noise, 0.1)[0]
    assert np.abs(other[0] - early[0]).max() > 1e-3
    np.testing.assert_allclose(other[1:], early[1:], atol=2e-6)


@pytest.mark.parametrize("kind", ["plain", "optimized"])
def test_gradients_by_latents_and_time(programs, kind):
    """Those of finite differences; the values are those of the image schedule, whose own stages stay as they are."""
    program, x = programs[kind], noise_of(3)
    ours, smooth = ProgramVelocity(program, PROMPTS), TensorVelocity(program, PROMPTS)
    before = ours(x.numpy(), 0.3)
    x.requires_grad_()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for made, wanted in zip(smooth(x, t), before, strict=True):
        np.testing.assert_allclose(made.detach().numpy(), wanted, atol=2e-6)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    def value(step: float, later: float) -> float:
        with torch.no_grad():
            cond, uncond = smooth(x + step * way, t + later)
        return float(cond.double().sum() - 3 * uncond.double().sum())

    cond, uncond = smooth(x, t)
    by_x, by_t = torch.autograd.grad(cond.double().sum() - 3 * uncond.double().sum(), [x, t])
    assert float((by_x * way).sum()) == pytest.approx((value(5e-3, 0) - value(-5e-3, 0)) / 1e-2, rel=0.02)
    assert float(by_t) == pytest.approx((value(0, 2e-3) - value(0, -2e-3)) / 4e-3, rel=0.02)
    assert smooth(x, t, guided=False)[1] is None
    np.testing.assert_array_equal(ours(x.detach().numpy(), 0.3)[0], before[0])


def test_what_cannot_be_is_refused(programs):
    program = programs["plain"]
    with pytest.raises(ValueError, match="x holds 2 latents, expected one for each of 3 prompts"):
        ProgramVelocity(programs["plain"], PROMPTS)(noise_of(2).numpy(), 0.0)
    with pytest.raises(ValueError, match="generates no images"):
        ProgramVelocity(dataclasses.replace(program, schedules=program.schedules.replaced(image=())), PROMPTS)
    with pytest.raises(ValueError, match="no weights"):
        ProgramVelocity(dataclasses.replace(programs["plain"], has_weights=False), PROMPTS)
