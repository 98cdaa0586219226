"""What fewer steps and fewer guidance passes cost in pictures, on the trained painting yardstick.

    python examples/benchmarks/flow_quality.py examples/benchmarks/results/janusflow-digits-quality.json

Plans are those that `examples/benchmarks/flow_frontier.py` fitted, one of them polished by gradients, and ways to leave
unconditional passes out. Each paints the same noises: drift of latents and PSNR of pictures are those to a fine
solution, the shares of pictures that show what was asked and the Fréchet distance are those of an independent judge.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flow_frontier import CHECKPOINT, captions  # puts examples/ on the path
from tokenizers import Tokenizer

from digits import Prompts, orders  # isort: skip
from judge import as_uint8, frechet, judge, normalised  # isort: skip
from train_autoencoder import psnr  # isort: skip

import mmopt
from mmopt.flow.fit import fit_plan
from mmopt.flow.fit_program import drawn
from mmopt.flow.polish import polish_plan
from mmopt.flow.reference import reference, relative_errors
from mmopt.flow.velocity import ProgramVelocity, TensorVelocity
from mmopt.measure.head import head
from mmopt.spec.files import save_json
from mmopt.spec.flow_plan import FlowPlan, reduce_guidance, solve
from mmopt.spec.solvers import make_plan

FITS = Path(__file__).parent / "results" / "janusflow-digits-frontier.json"
EVERY_OTHER = [True, False] * 4


def own_plans(
    program: mmopt.Program, prompts: Prompts, samples: int, fine: int, polish: int, count: int
) -> list[FlowPlan]:
    """Fitted to half of the captions: with every other unconditional pass, and the plan of 8 steps polished."""
    fit, held = captions(prompts)
    velocity, noise, weight = drawn(program, [fit, held], samples, None, 0)
    truth = reference(velocity, noise, weight, fine)
    fitted = FlowPlan.from_json(json.loads(FITS.read_text())["fits"]["8"]["fitted"])
    split = [i >= samples for i in range(2 * samples)]
    aware = fit_plan(velocity, noise, 8, weight, held_out=split, truth=truth, unconditional=EVERY_OTHER).fitted
    own = TensorVelocity(program, [fit[i % len(fit)] for i in range(count)])
    start, parts = time.monotonic(), [torch.from_numpy(x[:count].copy()) for x in (noise, truth.result)]
    stop = np.arange(count) >= count * 3 // 4
    made = polish_plan(own, fitted, *parts, stop, polish)
    print(f"polish, {polish} iterations in {time.monotonic() - start:.0f} s: {made.before} -> {made.after}", flush=True)
    return [made.plan, FlowPlan(**{**vars(aware), "name": "fitted, guided 4 of 8"})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--samples", type=int, default=48, help="noises to fit to, and as many to check on")
    parser.add_argument("--fine", type=int, default=100, help="evaluations of the fine solution (AB2)")
    parser.add_argument("--polish", type=int, default=100, help="iterations of gradients")
    parser.add_argument("--polish-samples", type=int, default=48, help="noises to polish on")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = mmopt.load(CHECKPOINT)
    program = mmopt.optimize(mmopt.trace(model, context=64), check=False).program
    prompts = Prompts(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    fits = {n: FlowPlan.from_json(f["fitted"]) for n, f in json.loads(FITS.read_text())["fits"].items()}
    fitted, ab2 = fits["8"], make_plan("ab2", 8)
    plans = {
        "Euler, 30 steps": make_plan("euler", 30), "Euler, 10 steps": make_plan("euler", 10),
        "AB2, 10 steps": make_plan("ab2", 10), "fitted, 10 steps (recommended)": fits["10"],
        "AB2, 8 steps": ab2, "fitted, 8 steps (fast)": fitted,
    }  # fmt: skip
    polished, aware = own_plans(program, prompts, a.samples, a.fine, a.polish, a.polish_samples)
    plans |= {"fitted, 8 steps, polished": polished, "fitted, 6 steps": fits["6"]}
    plans |= {"fitted, 8 steps, 4 of them guided": aware}
    plans |= {"AB2, 8 steps, difference of guidance kept every other": reduce_guidance(ab2, EVERY_OTHER)}
    plans |= {"fitted, 8 steps, guided in the first half": reduce_guidance(fitted, np.arange(8) < 4, reuse=False)}
    plans |= {"fitted, 8 steps, guided in the second half": reduce_guidance(fitted, np.arange(8) >= 4, reuse=False)}

    wanted, noise = orders(a.pictures, seed=11)
    velocity = ProgramVelocity(program, [prompts.painting(wanted.caption(i)) for i in range(len(noise))], together=100)
    truth = reference(velocity, noise.numpy(), 2.0, a.fine).result
    rows, shown = [], shown_by(model.module)
    real = shown(truth)
    for name, plan in {"fine solution": None, **plans}.items():
        latents = truth if plan is None else solve(plan, velocity, noise.numpy())[-1]
        pictures, errors = shown(latents), relative_errors(latents, truth)
        verdict = judge(pictures)
        row = {"plan": name, "forwards": 2 * a.fine if plan is None else plan.forwards}
        row |= {"drift": float(errors.mean()), "p90": float(np.quantile(errors, 0.9))}
        decibels = psnr(normalised(pictures), normalised(real)).clamp(max=99)  # infinite for equal pictures
        row |= {"psnr": float(decibels.mean()), "frechet": frechet(verdict.features)}
        rows.append(row | {"as_asked": verdict.right(wanted)["all"]})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    found = head("flow quality", a.threads, program.info.dtype, packages=["torch"])
    found |= {k: v for k, v in vars(a).items() if k not in ("out", "threads")} | {"guidance": 2.0}
    save_json(found | {"rows": rows, "polished": polished.to_json()}, a.out)


def shown_by(module: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Latents ``[n, 4, 8, 8]`` -> pictures ``[n, 32, 32, 3]`` of 8 bits."""

    @torch.inference_mode()
    def shown(latents: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(latents).split(200)
        return as_uint8(torch.cat([module.decode_image(part) for part in parts]))

    return shown


if __name__ == "__main__":
    main()
