"""Whether it pays to keep what a layer adds from one step of the flow to the next, on the trained painting yardstick.

    python examples/benchmarks/flow_block_cache.py examples/benchmarks/results/janusflow-digits-block-cache.json

A static plan says which layers of the language model are left out at which steps: there the layer adds what it added at
the step before (block caching, as in DeepCache and FORA). The layers whose absence costs least, one by one, are left
out together, the solver is fitted to the model with these left out, and its drift is set against that of the solver
fitted to the whole model: the saving is of the work that the whole model needs for the same drift.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from flow_frontier import CHECKPOINT, captions
from tokenizers import Tokenizer
from torch import Tensor

from digits import Prompts  # isort: skip

import mmopt
from mmopt.flow.fit import fit_plan
from mmopt.flow.reference import reference, relative_errors
from mmopt.measure.head import head
from mmopt.spec.files import save_json
from mmopt.spec.flow_plan import FlowPlan, solve
from mmopt.spec.flow_sampler import draw_noise

Skips = frozenset[tuple[int, int]]  # (step, layer)


class CachedVelocity:
    """The model's velocity of prompts of equal length; what a skipped layer adds is what it added one step before."""

    def __init__(self, module: torch.nn.Module, prompts: list[list[int]]):
        self.module, self.ids = module, torch.tensor([p[:-1] for p in prompts])
        self.step, self.skips, self.added = -1, Skips(), {}
        for i, layer in enumerate(module.language_model.model.layers):
            layer.forward = self.wrapped(i, layer.forward)

    def wrapped(self, i: int, forward):
        def run(x: Tensor, *rest) -> Tensor:
            if (self.step, i) not in self.skips:
                self.added[i] = forward(x, *rest) - x
            return x + self.added[i]

        return run

    @torch.inference_mode()
    def __call__(self, x: np.ndarray, t: float, guided: bool) -> tuple[np.ndarray, np.ndarray]:
        self.step = 0 if t == 0 else self.step + 1
        m, n, width = self.module, len(x), self.ids.shape[1]
        z = torch.from_numpy(x)
        row = m.flow_time(torch.tensor([1000.0 * t])).expand(2 * n, -1, -1)
        skip, tokens = m.flow_encode(torch.cat([z, z]), row)
        rows = torch.cat([m.embed(torch.cat([self.ids, self.ids])), row, tokens], 1)
        valid = torch.ones(rows.shape[:2], dtype=torch.bool)
        valid[n:, 1:width] = False
        positions = torch.arange(rows.shape[1]).expand(2 * n, -1)
        hidden, _ = m.read(rows, valid, positions)
        cond, uncond = m.flow_decode(hidden[:, -tokens.shape[1] :], skip, row).chunk(2)
        return cond.numpy(), uncond.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=24, help="noises to fit to, and as many to measure on")
    parser.add_argument("--fine", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = mmopt.load(CHECKPOINT)
    fit, held = captions(Prompts(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))))
    ids = [group[i % len(group)] for group in (fit, held) for i in range(a.samples)]
    velocity, noise = CachedVelocity(model.module, ids), draw_noise(2 * a.samples, {"flow": {"latents": (4, 8, 8)}}, 3)
    truth, layers = reference(velocity, noise, 2.0, a.fine), len(model.module.language_model.model.layers)
    split = [i >= a.samples for i in range(2 * a.samples)]

    def fitted(steps: int, skips: Skips) -> tuple[FlowPlan, dict]:
        velocity.skips = skips
        found = fit_plan(velocity, noise, steps, 2.0, held_out=split, truth=truth)
        work = steps * layers - len(skips)
        row = {"steps": steps, "skipped": sorted(skips), "layers": work, **found.errors["fitted"]["held_out"]}
        print(row, flush=True)
        return found.fitted, row

    whole = {n: fitted(n, Skips()) for n in (6, 7, 8, 9, 10)}
    rows = [row for _, row in whole.values()]
    for steps in (8, 10):
        plan, cost = whole[steps][0], {}
        for place in [(s, i) for s in range(1, steps) for i in range(layers)]:
            velocity.skips = Skips([place])
            cost[place] = float(relative_errors(solve(plan, velocity, noise)[-1], truth.result)[: a.samples].mean())
        ranked = sorted(cost, key=cost.__getitem__)
        for count in (2, 4, 6):
            row = fitted(steps, Skips(ranked[:count]))[1]
            rows.append(row | {"saving": saving(row, [r for _, r in whole.values()])})
            print(f"saving {rows[-1]['saving']:.1%}", flush=True)
    facts = head("flow block cache", a.threads, str(model.dtype).removeprefix("torch."), packages=["torch"])
    save_json(facts | {"samples": a.samples, "fine": a.fine, "guidance": 2.0, "rows": rows}, a.out)


def saving(row: dict, whole: list[dict]) -> float:
    """Of the layers' work that the whole model needs for the same mean drift (logarithms interpolated linearly)."""
    errors, work = [math.log(r["mean"]) for r in whole], [math.log(r["layers"]) for r in whole]
    needed = math.exp(np.interp(-math.log(row["mean"]), [-e for e in errors], work))
    return 1 - row["layers"] / needed


if __name__ == "__main__":
    main()
