"""What each kind of pass adds to those before it: one `mmopt.optimize` call, one engine for each cumulative step.

    python examples/benchmarks/compression_composition.py --out composition.json

Models of middle size with random weights. Leaving rows of images out stands first in the list of passes, so that the
exact ones work on what is left, but is added after them here. Engines of exact steps must give what that of the traced
Program gives; those with fewer rows must give what their Program gives in torch before the exact passes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compression_speed import CONFIGS, headed, inputs_of, sites_of
from rich.table import Table

import mmopt
from mmopt.ir.inspect import inspect
from mmopt.measure.head import head
from mmopt.measure.ratios import spread
from mmopt.measure.roofline import in_rounds, summary
from mmopt.measure.variants import STAGES, EngineStages
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.passes.reduce_flow_steps import ReduceFlowSteps
from mmopt.pipeline import default_passes
from mmopt.report import number
from mmopt.rewrite.contracts import ContractError, difference
from mmopt.spec.files import save_json
from mmopt.spec.flow_sampler import draw_noise, plan_of
from mmopt.spec.schema import SCHEMA

KINDS = {
    "rows": ("drop_unread_rows", "split_rows", "rejoin_rows"),
    "fusion": ("fuse_cross_attention", "fold_constants", "pack_projections"),
    "cache reuse": ("split_calls", "share_samples", "hoist_invariants", "drop_hidden_rows"),
}
NOTHING, COMPRESSION, STEPS = "nothing", "compression", "fewer flow steps"
FIRST, DECODE, PAINT = "first token", "decode", "image generation"
REPEATS = {"decode": 4}  # timed calls in a row, one before them that is not
PROMPT = 32  # ids of the text that is painted
NOTES = (
    "Each step is one call of optimize with the passes of all steps down to it, in the order of the default ones; "
    "compression goes before them, fewer flow steps after.",
    "first token: encoding an image and reading it with its text; decode: one token more; image generation: one image. "
    "FLOP: counted (`mmopt.inspect`). Times: medians; least: the minimum. x: paired, the median of the rounds' ratios, "
    "to nothing (all) and to the step above (own).",
    "Drift of fewer rows and fewer steps depends on the weights: it is measured on trained ones, not here.",
)


def steps_of(program: mmopt.Program, compression: mmopt.Pass) -> dict[str, list[mmopt.Pass]]:
    """The passes of each cumulative step."""
    made: dict[str, list[mmopt.Pass]] = {NOTHING: []}
    names: set[str] = set()
    for kind, own in KINDS.items():
        names |= set(own)
        made[kind] = [p for p in default_passes() if p.name in names]
    made[COMPRESSION] = [compression, *default_passes()]
    if program.schedules.image:
        made[STEPS] = [*made[COMPRESSION], ReduceFlowSteps()]
    return made


class Step:
    """An engine of one step; `row` is what is told of it."""

    def __init__(
        self, name: str, program: mmopt.Program, passes: Sequence[mmopt.Pass], check: bool | None, folder: Path,
        threads: int, paint: bool,
    ):  # fmt: skip
        result = mmopt.optimize(program, passes, check=check)
        self.program = result.program
        engine = mmopt.Engine(mmopt.export(self.program, folder, check=False), provider="cpu", threads=threads)
        self.stages, info = EngineStages(engine, inputs_of(engine)), engine.info
        self.calls: dict[str, Callable[[], Any]] = {s: partial(self.stages.run, s) for s in STAGES}
        self.painted = None
        counted: dict[str, Any] = {}
        if paint:
            plan, noise = plan_of(None, self.program.info), draw_noise(1, info, 0)
            ids = np.random.default_rng(0).integers(3, info.vocab_size, PROMPT).tolist()
            self.calls[PAINT] = partial(engine.generate_images, [ids], solver=plan, noise=noise)
            self.painted = torch.from_numpy(self.calls[PAINT]().latents)
            counted = {"prompt_length": PROMPT, "steps": plan.forwards // 2}
        totals = inspect(self.program, batch=1, images=1, new_tokens=1, **counted)["totals"]
        flops = {"encode": totals["encode_flops_per_image"], "prefill": totals["prefill_flops"]}
        flops |= {FIRST: sum(flops.values()), DECODE: totals["decode_flops_per_token"]}
        self.row: dict[str, Any] = {"step": name, "flops": flops | ({PAINT: totals["image_flops"]} if paint else {})}
        self.row["passes"] = [
            {"name": r.name, "contract": r.contract, "rewrites": len(r.rewrites), "checked": r.checked}
            for r in result.reports
        ]
        self.logits: list[torch.Tensor] = []
        for stage in STAGES:
            self.stages.run(stage)
            self.logits += [torch.from_numpy(self.stages.logits())] if stage != "encode" else []

    def same(self, name: str, found: Sequence[torch.Tensor | None], wanted: Sequence[torch.Tensor | None]) -> None:
        """What answers differently must not be timed."""
        for a, b in zip(wanted, found, strict=True):
            if a is not None and b is not None and (wrong := difference(a, b)):
                raise ContractError(f"step {name}: differs by {wrong[0]:.3g}, allowed {wrong[1]:.3g}", self.program)


def build(
    program: mmopt.Program, compression: mmopt.Pass, check: bool | None, folder: Path, threads: int, paint: bool,
    tell: Callable[[str], None],
) -> dict[str, Step]:  # fmt: skip
    """The engines of all steps, compared. ValueError if the site of compression saves too little."""
    fewer, report = compression(program)
    if not report.rewrites:
        raise ValueError(f"nothing is compressed: {'; '.join(report.skipped)}")
    made: dict[str, Step] = {}
    for i, (name, passes) in enumerate(steps_of(program, compression).items()):
        tell(f"building {name}")
        step = made[name] = Step(name, program, passes, check, folder / str(i), threads, paint)
        before = made[NOTHING]
        if name in (NOTHING, *KINDS):
            step.same(name, [*step.logits, step.painted], [*before.logits, before.painted])
        elif name == COMPRESSION:
            given = {"prompts": [step.stages.prompt], "pixel_values": torch.from_numpy(step.stages.inputs.pixels)}
            token = torch.tensor([[step.stages.inputs.token] * 2])
            first, second = (fewer(**given, max_new_tokens=n, forced=token)["logits"][0, -1] for n in (1, 2))
            step.same(name, [*step.logits, step.painted], [first, second, before.painted])
        else:
            step.same(name, step.logits, made[COMPRESSION].logits)
    return made


# ---------------------------------------------------------------------------------------------------------- measuring
def measure(
    config: str, compression: dict[str, Any], check: bool | None, rounds: int, paint_rounds: int, threads: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """All steps of a config. `compression`: options of the pass, its site by default a third into the tower."""
    model = mmopt.from_config(config, "float32", random=True)
    tell(f"{config}: tracing")
    program = mmopt.trace(model)
    site = list(sites_of(program))[1]
    compression = {"site": site} | compression
    used = CompressVisualTokens(**compression)
    cpu, kind = torch.device("cpu"), program.dtype
    paint = bool(program.schedules.image) and paint_rounds > 0
    with tempfile.TemporaryDirectory(prefix="mmopt-bench-") as folder:
        steps = build(program, used, check, Path(folder), threads, paint, tell)
        times, limits = {}, {}
        for stages, count in ((STAGES, rounds), ((PAINT,), paint_rounds if paint else 0)):
            calls = {(s, name): step.calls[s] for s in stages for name, step in steps.items() if count}
            made, found = in_rounds(calls, count, cpu, kind, threads, tell, lambda s: REPEATS.get(s, 1))
            times |= {key: np.array([min(r) for r in each]) for key, each in made.items()}
            limits |= {} if limits else summary(found)
    taken = {n: {FIRST: times["encode", n] + times["prefill", n], DECODE: times["decode", n]} for n in steps}
    for n in steps:
        taken[n] |= {PAINT: times[PAINT, n]} if paint else {}
    before = NOTHING
    for n, step in steps.items():
        step.row["times"] = {s: spread(x.tolist()) for s, x in ({s: times[s, n] for s in STAGES} | taken[n]).items()}
        step.row["faster"] = {
            what: {s: float(np.median(taken[other][s] / x)) for s, x in taken[n].items()}
            for what, other in (("all", NOTHING), ("own", before))
        }
        before = n
    return {
        **head("composition of passes", threads, program.info.dtype),
        "compression": {"site": used.site, "method": used.method, "keep_ratio": used.keep_ratio},
        "sizes": {
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "context": program.info.context,
            "tokens_per_image": program.info.tokens_per_image,
            "text": len(next(iter(steps.values())).stages.inputs.ids),
            "rounds": rounds,
            "image_rounds": paint_rounds if paint else 0,
        },
        "rows": [step.row for step in steps.values()],
        "limits": limits,
        "notes": list(NOTES),
    }


# ------------------------------------------------------------------------------------------------------------ results
def text(config: str, found: dict[str, Any]) -> str:
    """One config as tables: what each step adds, and what its passes did."""
    console, sizes = headed(config, found), found["sizes"]
    console.print(
        f"{sizes['parameters'] / 1e6:.1f} M parameters; compression: "
        + "{keep_ratio:.3g} of the tokens of an image at {site}, by {method}".format(**found["compression"])
        + f"; {sizes['rounds']} interleaved rounds, {sizes['image_rounds']} of image generation"
    )
    rows = found["rows"]
    kept = [s for s in (FIRST, DECODE, PAINT) if s in rows[0]["times"]]
    table = Table("passes", *(h for s in kept for h in (f"{s}: FLOP", "x", "ms", "least", "x all", "x own")))
    for i, r in enumerate(rows):
        cells = []
        for s in kept:
            t = r["times"][s]
            cells += [number(r["flops"][s]), f"{rows[0]['flops'][s] / r['flops'][s]:.2f}"]
            cells += [f"{t[k]:.0f}" if t[k] >= 1000 else f"{t[k]:.4g}" for k in ("median_ms", "min_ms")]
            cells += [f"{r['faster'][what][s]:.2f}" if i else "" for what in ("all", "own")]
        table.add_row(f"+ {r['step']}" if i else r["step"], *cells)
    console.print(table)
    for before, r in pairwise(rows):
        new = [p for p in r["passes"] if p["rewrites"] and p not in before["passes"]]
        console.print(f"+ {r['step']}: {', '.join(did(p) for p in new) or 'no pass applies'}")
        console.print(*(f"    {checked}" for checked in dict.fromkeys(p["checked"] for p in new)), sep="\n")
    for note in found["notes"]:
        console.print(f"- {note}")
    return console.file.getvalue()  # type: ignore[attr-defined]


def did(p: dict[str, Any]) -> str:
    return f"{p['name']} ({p['rewrites']} rewrites)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=CONFIGS, help=f"by default {', '.join(CONFIGS)}")
    parser.add_argument("--site", help="by default after a third of the tower")
    parser.add_argument("--method", default="merge")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--check", action="store_true", help="compare Programs after each pass even where that is long")
    parser.add_argument("--rounds", type=int, default=20, help="0: show what the file holds")
    parser.add_argument("--image-rounds", type=int, default=3)
    parser.add_argument("--no-images", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    configs = json.loads(a.out.read_text())["configs"] if a.out and a.out.exists() else {}
    options = {"method": a.method, "keep_ratio": a.keep_ratio} | ({"site": a.site} if a.site else {})
    tell, painted = partial(print, file=sys.stderr, flush=True), 0 if a.no_images else a.image_rounds
    for config in a.configs if a.rounds else ():
        with torch.no_grad():
            configs[config] = measure(config, options, a.check or None, a.rounds, painted, a.threads, tell)
        if a.out:
            save_json({"schema": SCHEMA, "kind": "composition of passes", "configs": configs}, a.out)
    for config, found in configs.items():
        print(text(config, found))


if __name__ == "__main__":
    main()
