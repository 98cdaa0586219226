"""Program.generate_images: prompts and noise to latents and images, by the schedule as traced and as optimized."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import painting_toy as toy
import pytest
import torch

from mmopt.ir import ops
from mmopt.rewrite.contracts import ContractError, compare, difference
from mmopt.rewrite.pass_base import Pass
from mmopt.search.optimize import optimize
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.flow_sampler import FlowSampler, choose_plan, lay_out, plan_of
from mmopt.spec.schedule import Call, Cat, Loop, Schedule
from mmopt.spec.solvers import make_plan

HALF = [torch.float16, torch.bfloat16]
MOST = 40 - 17  # rows of a prompt beside those of an image


@pytest.fixture(scope="module")
def plain():
    return toy.program()


@pytest.fixture(scope="module")
def optimized(plain):
    return optimize(plain, check=False).program


def noise(count, seed=0):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def prompt(rows, seed=0):
    """A prompt of which so many ids are fed."""
    return np.random.default_rng(seed + rows).integers(1, toy.VOCAB, rows + 1).tolist()


def close(made, wanted, tolerance=1e-5):
    assert made.keys() == wanted.keys() == {"latents", "trajectory", "image"}
    torch.testing.assert_close(made, wanted, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------------ the reference's loop
def by_hand(ids, z, plan):
    """One picture by the modules of the toy alone, without a cache: the two halves one after the other."""
    m = toy.model().module

    def model(prefix, row, tokens):
        """Rows behind the prompt keep their positions, whatever of it is left out."""
        x = torch.cat([m.embed_tokens(torch.tensor([prefix])), row, tokens], 1)
        places = torch.cat([torch.arange(len(prefix)), torch.arange(len(ids) - 1, len(ids) + tokens.shape[1])])
        angles = places[None, :, None] / 10.0 ** torch.arange(4)
        for layer in m.layers:
            x = layer(x, angles, lambda q, k, v: ops.attention(q, k, v, toy.HEADS, toy.HEADS, None, True))
        return m.norm(x)[:, -tokens.shape[1] :]

    with torch.inference_mode():
        start, cond, uncond, states = z, [], [], []
        for i, t in enumerate(plan.times):
            row = toy.flow_time(m, torch.tensor([t * 1000], dtype=torch.float32))
            skip, tokens = toy.flow_encode(m, z, row)
            cond.append(toy.flow_decode(m, model(ids[:-1], row, tokens), skip, row))
            uncond.append(toy.flow_decode(m, model(ids[:1], row, tokens), skip, row))
            z = plan.step(i, start, cond, uncond)
            states.append(z)
        return {"latents": z, "trajectory": torch.stack(states), "image": m.pixels(z)}


@pytest.mark.parametrize("rows", [1, 2, 7, MOST])
def test_as_the_modules_by_hand(plain, optimized, rows):
    ids, plan = prompt(rows), make_plan("euler", 3, guidance=2.5)
    wanted = by_hand(ids, noise(1), plan)
    close(plain.generate_images([ids], noise(1), plan), wanted)
    close(optimized.generate_images([ids], noise(1), plan), wanted)


BATCHES = [(1,), (1, 1), (3, 1), (1, MOST, 5), (4, 4, 4), (MOST, MOST), (6, 2, 9, 1, 3)]


@pytest.mark.parametrize("which", ["plain", "optimized"])
@pytest.mark.parametrize("rows", BATCHES)
def test_what_is_painted_beside_it_does_not_change_a_picture(request, which, rows):
    program, z = request.getfixturevalue(which), noise(len(rows))
    prompts = [prompt(n, i) for i, n in enumerate(rows)]
    plan = make_plan("ab2", 3)
    together = program.generate_images(prompts, z, plan)
    for i, ids in enumerate(prompts):
        alone = program.generate_images([ids], z[i : i + 1], plan)
        close({k: v[:, i : i + 1] if k == "trajectory" else v[i : i + 1] for k, v in together.items()}, alone)


@pytest.mark.parametrize("guidance", [1.0, 0.0, -1.0, 2.0, 7.5])
@pytest.mark.parametrize("solver", [("euler", 3), ("heun", 4), ("midpoint", 2), ("ab3", 5), ("unipc", 5)])
def test_optimized_as_plain(plain, optimized, solver, guidance):
    plan = make_plan(*solver, guidance=guidance)
    prompts = [prompt(3), prompt(8)]
    close(optimized.generate_images(prompts, noise(2), plan), plain.generate_images(prompts, noise(2), plan), 5e-5)


def mixed(guided):
    """Equal steps, some of them without the unconditional pass."""
    plan = make_plan("euler", len(guided), guidance=3.0)
    guided = np.array(guided)
    cond, uncond = plan.cond.copy(), plan.uncond * guided
    cond[:, ~guided] /= 3.0
    return dataclasses.replace(plan, cond=cond, uncond=uncond, guided=guided)


@pytest.mark.parametrize("guided", [(True, False, True), (False, True, True), (False,) * 4, (True, True, False, False)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluations_without_guidance(plain, optimized, guided, count):
    prompts, z, plan = [prompt(2 + i, i) for i in range(count)], noise(count), mixed(guided)
    wanted = plain.generate_images(prompts, z, plan)
    close(optimized.generate_images(prompts, z, plan), wanted)
    # the same, with unconditional passes made and not used
    close(plain.generate_images(prompts, z, dataclasses.replace(plan, guided=np.ones(len(guided), bool))), wanted)


@pytest.mark.parametrize("which", ["plain", "optimized"])
def test_unguided_evaluations_compute_half_the_samples(request, which):
    samples = []

    def observe(phase, call, made, chunk):
        assert phase == "paint"
        if call.stage == "flow_decode":
            samples.append(len(made["velocity"]))

    program = request.getfixturevalue(which)
    program.generate_images([prompt(2), prompt(3)], noise(2), mixed((True, False, False, True)), observe)
    assert samples == [4, 2, 2, 4]
    samples.clear()
    program.generate_images([prompt(2), prompt(3)], noise(2), make_plan("euler", 2, guidance=1.0), observe)
    assert samples == [2, 2]


def test_guidance_of_one_is_the_conditional_half(plain):
    """w v_cond - (w - 1) v_uncond is linear in w."""
    made = [
        plain.generate_images([prompt(5)], noise(1), make_plan("euler", 1, guidance=w))["latents"]
        for w in (0.0, 1.0, 4.0)
    ]
    torch.testing.assert_close(made[2], 4 * made[1] - 3 * made[0], atol=1e-5, rtol=1e-5)
    assert (made[1] - made[0]).abs().max() > 1e-3


def test_the_unconditional_half_reads_the_first_id_alone(plain, optimized):
    plan = make_plan("euler", 1, guidance=0.0)
    one, two = [3, 8, 9, 4], [3, 5, 5, 1]
    for program in (plain, optimized):
        a, b = (program.generate_images([p], noise(1), plan)["latents"] for p in (one, two))
        torch.testing.assert_close(a, b)
        other = program.generate_images([[4, *one[1:]]], noise(1), plan)["latents"]
        assert (a - other).abs().max() > 1e-4


def test_the_last_id_gives_way_to_the_time(plain, optimized):
    for program in (plain, optimized):
        a, b = (program.generate_images([[1, 7, 6, last]], noise(1))["latents"] for last in (5, 9))
        torch.testing.assert_close(a, b)


def test_the_trajectory_ends_with_the_latents(plain):
    plan = make_plan("heun", 6)
    made = plain.generate_images([prompt(2), prompt(4)], noise(2), plan)
    assert made["trajectory"].shape == (6, 2, 2, 8, 8)
    assert torch.equal(made["trajectory"][-1], made["latents"])
    assert made["image"].shape == (2, 3, 8, 8)
    assert all(v.dtype == torch.float32 for v in made.values())


def test_the_plan_by_default_is_the_reference_s(plain):
    ids, z = [prompt(2)], noise(1)
    close(plain.generate_images(ids, z), plain.generate_images(ids, z, make_plan("euler", 6, guidance=2.0)))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype):
    """The optimized program is as near to the float32 one as the traced one is."""
    exact, plain = toy.program(), toy.program(dtype=dtype)
    result = optimize(plain, check=True)
    assert {r.checked for r in result.reports} <= {"checked", "nothing to check"}
    prompts, z, plan = [prompt(9), prompt(2)], noise(2), make_plan("euler", 4)
    wanted = exact.generate_images(prompts, z, plan)["latents"]
    errors = []
    for program in (plain, result.program):
        made = program.generate_images(prompts, z, plan)
        assert made["latents"].dtype == made["image"].dtype == torch.float32
        errors.append(float((made["latents"] - wanted).square().mean().sqrt()))
    assert 0 < errors[0] < 0.05
    assert errors[1] < 2 * errors[0]


def test_without_a_decoder_of_images():
    def change(m, specs):
        del specs["decode_image"]

    before = toy.program(change=change)
    after = optimize(before, check=True).program
    for program in (before, after):
        assert program.generate_images([prompt(2)], noise(1)).keys() == {"latents", "trajectory"}


def test_text_is_answered_too(plain, optimized):
    given = {"prompts": [[5, 6, -200, 7], [9, 4]], "pixel_values": torch.randn(1, 3, 8, 8), "max_new_tokens": 4}
    assert optimized(**given)["tokens"] == plain(**given)["tokens"]


@pytest.mark.parametrize("context", [17, 18, 20])
def test_small_contexts(context):
    """A prompt of two ids and an image take 18 rows; with fewer a program still answers text, and can be optimized."""
    before = toy.program(context=context)
    after = optimize(before, check=True).program
    given = {"prompts": [[5, 6, 7]], "max_new_tokens": 3, "ignore_eos": True}
    assert after(**given)["tokens"] == before(**given)["tokens"]
    if context == 17:
        with pytest.raises(ValueError, match="takes 1 rows and an image 17, but the cache holds 17"):
            after.generate_images([[1, 2]], noise(1))
    else:
        close(after.generate_images([[1, 2]], noise(1)), before.generate_images([[1, 2]], noise(1)))


def test_checks_hold_for_all_passes(plain):
    result = optimize(plain, check=True)
    done = {r.name for r in result.reports if r.rewrites}
    assert {"split_calls", "share_samples", "hoist_invariants", "drop_hidden_rows"} <= done
    assert compare(plain, result.program) is None


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ([], "no prompt was given"),
        ([[1, 2], [1]], "prompt 1 has 1 ids, expected at least two"),
        ([[]], "prompt 0 has 0 ids"),
        ([[1, -200, 2]], r"prompt 0: token ids \[-200\] are outside the vocabulary of 40"),
        ([[1, 2], [1, 40, 99, 3]], r"prompt 1: token ids \[40, 99\] are outside"),
        ([[1] * (MOST + 2)], "prompt 0 takes 24 rows and an image 17, but the cache holds 40; trace with a larger"),
    ],
)
def test_prompts_that_cannot_be_painted(plain, optimized, prompts, why):
    for program in (plain, optimized):
        with pytest.raises(ValueError, match=why):
            program.generate_images(prompts, noise(len(prompts)))
        with pytest.raises(ValueError, match=why):
            lay_out(prompts, program.info.required_flow, program.info.context, program.info.vocab_size)


@pytest.mark.parametrize(
    "z", [noise(2), noise(1)[:, :1], noise(1)[0], noise(1).double(), noise(1).half(), torch.zeros(1, 2, 8, 8).int()]
)
def test_noise_of_another_shape_or_type(plain, z):
    with pytest.raises(ValueError, match=r"noise is torch\..* of shape .*, expected float32 of shape \(1, 2, 8, 8\)"):
        plain.generate_images([[1, 2]], z)


def test_programs_that_cannot_paint(plain, program):
    with pytest.raises(ValueError, match="mplug_owl2 generates no images"):
        program.generate_images([[1, 2]], noise(1))
    shapes = plain.copy()
    shapes.has_weights = False
    with pytest.raises(ValueError, match="shapes only, no weights"):
        shapes.generate_images([[1, 2]], noise(1))


# -------------------------------------------------------------------------------------------------------------- plans
def test_choose_plan(plain):
    info = plain.info
    chosen = choose_plan(None, None, None, info)
    assert (chosen.evaluations, chosen.guidance) == (10, 2.0)
    assert chosen == make_plan("ab2", 10, 2.0)
    assert choose_plan("euler", 4, 3.0, info) == make_plan("euler", 4, 3.0)
    own = make_plan("heun", 4)
    assert choose_plan(own, None, None, info) is own
    assert plan_of(None, info) == make_plan("euler", 6, 2.0)
    assert plan_of(own, info) is own


def fitted(steps, guidance):
    return dataclasses.replace(make_plan("ab3", steps, guidance), name=f"fitted {steps}")


def test_fitted_plans_come_first(plain):
    plans = [fitted(5, 2.0), fitted(10, 2.0), fitted(5, 4.0)]
    info = replace(plain.info, flow=replace(plain.info.flow, plans=tuple(plans)))
    assert choose_plan(None, None, None, info) == plans[1]
    assert choose_plan(None, 5, None, info) == plans[0]
    assert choose_plan("fitted", 5, 4.0, info) == plans[2]
    assert choose_plan(None, 6, None, info) == make_plan("ab2", 6, 2.0)
    assert choose_plan("ab2", 5, None, info) == make_plan("ab2", 5, 2.0)
    there = "there is 5 steps at guidance 2, 10 steps at guidance 2, 5 steps at guidance 4"
    with pytest.raises(ValueError, match=f"no plan was fitted for 7 steps at guidance 2; {there}"):
        choose_plan("fitted", 7, None, info)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((make_plan("euler", 3), 3, None), "a plan says its own steps and guidance"),
        ((make_plan("euler", 3), None, 2.0), "a plan says its own steps and guidance"),
        (("fitted", None, None), "no plan was fitted for 10 steps at guidance 2; there is none"),
        (("rk45", None, None), "solver 'rk45' is not known; there are euler"),
        (("", None, None), "solver '' is not known"),
        ((None, 0, None), "steps is 0"),
        ((None, 2.5, None), "steps is 2.5"),
        (("heun", 3, None), "expected an even number"),
        ((None, None, float("nan")), "guidance is nan, expected a finite number"),
    ],
)
def test_plans_that_cannot_be(plain, options, why):
    with pytest.raises(ValueError, match=why):
        choose_plan(*options, plain.info)


# ------------------------------------------------------------------------------------------------ schedules and sampler
def test_schedules_as_json(plain, optimized):
    for program in (plain, optimized):
        for schedule in (program.schedules.image, program.schedules.text):
            assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_a_call_says_what_it_reads_and_writes():
    call = Call("stage", {"x": Cat(0, ("a", "b")), "y": "z"}, {"y": "w"})
    assert (call.source("x"), call.source("y"), call.source("other")) == (Cat(0, ("a", "b")), "z", "other")
    assert (call.sources("x"), call.sources("y")) == (("a", "b"), ("z",))
    assert (call.target("y"), call.target("other")) == ("w", "other")
    assert str(call.source("x")) == "a | b"
    assert str(Cat(1, ("a", "b"))) == "a ; b"


class Counting(FlowSampler):
    """Stages that add numbers: the sampler alone, without a model."""

    def cat(self, parts, dim):
        return np.concatenate(parts, dim)

    def expand(self, x, samples):
        return np.broadcast_to(x, (samples, *x.shape[1:]))

    def run_stage(self, call, inputs):
        self.shapes.append({k: x.shape for k, x in inputs.items()})
        return {"velocity": sum(x.sum(-1, keepdims=True) for x in inputs.values())}


@pytest.mark.parametrize("guided", [True, False])
def test_the_painter_expands_cuts_and_puts_together(plain, guided):
    samples = lay_out([[1, 2], [1, 2, 3]], plain.info.required_flow, plain.info.context, plain.info.vocab_size)
    inputs = {"step": {"x": ("B", 3), "t": ("B", 1), "pair": ("B", "n")}}
    names = {"t": "step.time", "pair": Cat(0, ("latents", "latents")), "x": "rows"}
    body = (Call("step", names),)
    plan = make_plan("euler", 2, guidance=2.0 if guided else 1.0)
    p = Counting([Loop(body, trips="steps", update=("latents", "velocity"))], inputs, samples, plan)
    p.shapes = []
    p.values = {"steps.time": np.array([[0.0], [10.0]]), "rows": np.arange(20.0).reshape(4, 5)}
    z = np.array([[1.0], [2.0]])
    made = p.sample(z)
    lanes = 4 if guided else 2
    assert p.shapes == [{"x": (lanes, 3), "t": (lanes, 1), "pair": (lanes, 1)}] * 2
    # v = last three of a row of 0..19, the time and the latents; steps of a half
    last = np.array([[2 + 3 + 4.0], [7 + 8 + 9.0], [12 + 13 + 14.0], [17 + 18 + 19.0]])
    w = plan.guidance
    for t in (0.0, 10.0):
        v = w * (last[:2] + t + z) - (w - 1) * ((last[2:] if guided else 0) + t + z)
        z = z + v / 2
    np.testing.assert_allclose(made, z)


# -------------------------------------------------------------------------------------------------------------- broken
class Later(Pass):
    """Broken: every step but the first is made at a later time."""

    def run(self, program, report):
        made = program.copy()
        flow = made.info.required_flow
        made.info = replace(made.info, flow=replace(flow, time_scale=1.1 * flow.time_scale))
        report.did("flow_time: wrong")
        return made


class Darker(Pass):
    """Broken: an image is made of something that is like the latents."""

    def run(self, program, report):
        made = program.copy()
        made.weights = dict(made.weights, **{"pixels.weight": made.weights["pixels.weight"] * 1.1})
        *rest, last = made.schedules.image
        made.schedules = made.schedules.replaced(
            image=(*rest, dataclasses.replace(last, rename={"latents": "velocity"}))
        )
        report.did("decode_image: wrong")
        return made


@pytest.mark.parametrize(("broken", "stage"), [(Later(), "flow_decode"), (Darker(), "decode_image")])
def test_broken_passes_are_caught(plain, broken, stage):
    with pytest.raises(ContractError, match=f"{broken.name} promised to be exact: stage {stage}, "):
        optimize(plain, [broken], check=True)


def test_a_velocity_is_as_exact_as_what_it_is_made_in():
    x = torch.ones(100)
    assert difference(x, x + 1e-2) is not None
    assert difference(x, x + 1e-2, torch.bfloat16) is None
    assert difference(x, x + 1.0, torch.bfloat16) is not None


@pytest.mark.parametrize(
    "module",
    [
        "spec.schedule",
        "spec.flow_sampler",
        "runtime.image_generation",
        "spec.solvers",
        "spec.flow_plan",
        "spec.manifest",
    ],
)
def test_engines_need_no_torch(module):
    code = f"import sys, mmopt.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_plans_are_what_the_json_says():
    plan = fitted(3, 2.0)
    assert FlowPlan.from_json(plan.to_json()) == plan
