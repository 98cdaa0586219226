"""Solvers on the trained painting yardstick: drift from a fine solution of the same noise, at each number of steps.

    python examples/benchmarks/flow_frontier.py examples/benchmarks/results/janusflow-digits-frontier

writes the table as JSON and as a picture. Plans are fitted to one half of the noises and measured on the other.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from digits import Prompts
from tokenizers import Tokenizer

import mmopt
from mmopt.flow.fit import fit_plan
from mmopt.flow.fit_program import drawn
from mmopt.flow.frontier import frontier, frontier_plot, frontier_text
from mmopt.flow.reference import reference
from mmopt.measure.head import head
from mmopt.spec.files import save_json
from mmopt.spec.solvers import SOLVERS

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "janusflow-digits"
STEPS = range(5, 13)


def captions(prompts: Prompts) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of half of the captions to fit to, and of the others to measure on."""
    colours = ("red", "green", "blue", "yellow")
    listed = [f"a {f} {d} on {b}" for d, f, b in product(range(10), colours, colours) if f != b]
    ids = [prompts.painting(listed[i]) for i in np.random.default_rng(0).permutation(len(listed))]
    return ids[::2], ids[1::2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="name of the files to write, without ending")
    parser.add_argument("--samples", type=int, default=64, help="noises to fit to, and as many to measure on")
    parser.add_argument("--fine", type=int, default=120, help="evaluations of the fine solution (AB2)")
    parser.add_argument("--trials", type=int, default=0, help="grids of times to try for each fit")
    a = parser.parse_args()
    torch.set_num_threads(2)
    program = mmopt.optimize(mmopt.trace(mmopt.load(CHECKPOINT)), check=False).program
    fit, held = captions(Prompts(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))))
    velocity, noise, weight = drawn(program, [fit, held], a.samples, None, 0)
    truth = reference(velocity, noise, weight, a.fine)
    results = {}
    for n in STEPS:
        results[n] = fit_plan(
            velocity, noise, n, weight, held_out=[i >= a.samples for i in range(2 * a.samples)], truth=truth,
            trials=a.trials, model="janusflow-digits", form="a {colour} {digit} on {colour}",
        )  # fmt: skip
        e = results[n].errors
        print(n, {k: {g: round(v["mean"], 4) for g, v in e[k].items()} for k in e}, results[n].reason, flush=True)
    own, fresh, _ = drawn(program, [held], a.samples, None, 1)  # noises that no fit was chosen by either
    fitted = [r.fitted for r in results.values()]
    steps = [*STEPS, 16, 20, 30]
    rows = frontier(own, fresh, list(SOLVERS), steps, reference(own, fresh, weight, a.fine), weight, fitted)
    print(frontier_text(rows))
    found = head("flow frontier", 2, program.info.dtype, packages=["torch"])
    found |= {"samples": a.samples, "fine": a.fine, "guidance": weight}
    found |= {"rows": [r.to_json() for r in rows], "fits": {n: r.to_json() for n, r in results.items()}}
    save_json(found, a.out.with_suffix(".json"))
    frontier_plot(rows, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
