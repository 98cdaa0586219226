"""bench for painting: the reference's sampler, the exact passes and fewer steps, end to end in the same runtime.

All variants are timed in interleaved rounds of one process, on the same prompts and noise, with the same threads and
dtype; the decoder of images is included.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmopt.exporters.onnx import export
from mmopt.frontend.load import Model
from mmopt.frontend.trace import trace
from mmopt.ir.graph import torch_dtype
from mmopt.ir.inspect import inspect
from mmopt.measure.head import head
from mmopt.measure.ratios import spread
from mmopt.measure.roofline import in_rounds, summary
from mmopt.passes.hoist_invariants import HoistInvariants
from mmopt.passes.split_calls import SplitCalls
from mmopt.pipeline import run_passes
from mmopt.rewrite.contracts import ContractError, difference
from mmopt.runtime.engine import Engine
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.flow_sampler import choose_plan, draw_noise
from mmopt.spec.solvers import make_plan

ENGINES = {
    "official": "engine of the Program as traced: each step reads the prompt again, both halves of the guidance do all",
    "prefix cached": "the prompt is read once (split_calls and hoist_invariants alone), all else as official",
    "exact passes": "engine of the optimized Program: the same steps and, up to rounding, the same image",
}
FEWER = {"recommended": 10, "fast": 8}
NOTES = (
    "One image of one prompt from given noise, decoded to pixels. All in ONNX Runtime. "
    + "; ".join(f"{k}: {v}" for k, v in ENGINES.items()) + ".",
    "official, prefix cached and exact passes take the reference's Euler steps; recommended and fast are exact passes "
    "with fewer evaluations: the plan fitted to the model where there is one, else AB2. Their drift depends on the "
    "weights: it is measured on trained ones, not here.",
    "eager: the Program as traced, in plain PyTorch.",
)  # fmt: skip


def bench_generation(
    model: Model,
    lengths: Sequence[int] = (32, 128),
    rounds: int = 5,
    threads: int = 2,
    eager: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time one image of prompts of so many ids each (random or loaded weights, float32, CPU).

    Raises ValueError for a model without weights or one that does not paint, ContractError if variants that must be
    equal are not.
    """
    if not model.has_weights or model.family.flow is None:
        raise ValueError("expected a model with weights that paints")
    tell = progress or (lambda now: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="mmopt-bench-") as directory:
            return _Bench(model, sorted(lengths), threads, eager, Path(directory), tell).measure(rounds)
    finally:
        torch.set_num_threads(before)


class _Bench:
    def __init__(
        self, model: Model, lengths: list[int], threads: int, eager: bool, directory: Path, tell: Callable[[str], None]
    ):
        self.model, self.lengths, self.threads, self.tell = model, lengths, threads, tell
        tell("tracing")
        flow = model.family.flow(model.config)  # type: ignore[misc]
        plain = trace(model, batch=1, images=1, context=lengths[-1] + flow.tokens)
        tell("optimizing")
        cached = run_passes(plain, [SplitCalls(), HoistInvariants()], check=False).program
        self.programs = dict(zip(ENGINES, (plain, cached, run_passes(plain, check=False).program), strict=True))
        engines: dict[str, Engine] = {}
        for name, program in self.programs.items():
            tell(f"exporting, {name}")
            path = export(program, directory / name.replace(" ", "-"), check=False)
            engines[name] = Engine(path, provider="cpu", threads=threads)
        self.info, random = plain.info, np.random.default_rng(0)
        noise = draw_noise(1, self.info, 0)
        euler = make_plan("euler", flow.steps, guidance=flow.guidance)
        self.plans: dict[str, FlowPlan] = dict.fromkeys(ENGINES, euler)
        fitted = self.programs["exact passes"].info
        self.plans |= {name: choose_plan(None, steps, flow.guidance, fitted) for name, steps in FEWER.items()}
        self.calls: dict[tuple[str, str], Callable[[], Any]] = {}
        self.agreement: dict[str, dict[str, float]] = {}
        for length in lengths:
            prompt = random.integers(3, self.info.vocab_size, length).tolist()
            stage, made = f"image, prompt of {length} ids", {}
            for name, plan in self.plans.items():
                tell(f"{stage}: {name}")
                engine = engines.get(name, engines["exact passes"])
                call = partial(engine.generate_images, [prompt], solver=plan, noise=noise)
                self.calls[stage, name] = call
                made[name] = call().latents
            if eager:
                tell(f"{stage}: eager")
                again = partial(plain.generate_images, [prompt], torch.from_numpy(noise), euler)
                self.calls[stage, "eager"] = again
                made["eager"] = again()["latents"].numpy()
            self.compare(stage, made)

    def compare(self, stage: str, made: dict[str, np.ndarray]) -> None:
        """What paints something else must not be timed."""
        expected = torch.from_numpy(made["official"])
        for name, latents in made.items():
            found = torch.from_numpy(latents)
            self.agreement.setdefault(stage, {})[name] = float((found - expected).abs().max())
            if name not in FEWER and (wrong := difference(expected, found)):
                raise ContractError(
                    f"{stage}: {name} differs from official by {wrong[0]:.3g}", self.programs["official"]
                )

    def measure(self, rounds: int) -> dict[str, Any]:
        cpu = torch.device("cpu")
        by_round, limits = in_rounds(self.calls, rounds, cpu, torch_dtype(self.info), self.threads, self.tell)
        times = {key: [seconds for (seconds,) in each] for key, each in by_round.items()}
        return {
            **head("image generation", self.threads, self.info.dtype),
            "sizes": {
                "family": self.info.family,
                "parameters": sum(p.numel() for p in self.model.module.parameters()),
                "tokens_per_image": self.info.required_flow.tokens,
                "rounds": rounds,
                "plans": {k: {"name": p.name, "forwards": p.forwards} for k, p in self.plans.items()},
            },
            "rows": [{"stage": s, "variant": n, **spread(t)} for (s, n), t in times.items()],
            "ratios": self.ratios(times),
            "limits": summary(limits) | {f"{k}, median": statistics.median(v) for k, v in limits.items()},
            "work": {str(n): self.work(n) for n in self.lengths},
            "agreement": self.agreement,
            "notes": list(NOTES),
        }

    def ratios(self, times: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, dict[str, float]]]:
        """How many times faster than two baselines: of the minima, and the median of the rounds' own ratios."""
        made: dict[str, dict[str, dict[str, float]]] = {}
        for (stage, name), own in times.items():
            for baseline in ("official", "prefix cached"):
                paired = [a / b for a, b in zip(times[stage, baseline], own, strict=True)]
                found = {"minima": min(times[stage, baseline]) / min(own), "paired_median": statistics.median(paired)}
                found |= {"paired_min": min(paired), "paired_max": max(paired)}
                made.setdefault(stage, {})[f"{name} over {baseline}"] = found
        return made

    def work(self, length: int) -> dict[str, float]:
        """FLOPs of one image by the reference's steps."""
        return {
            k: inspect(p, images=1, prompt_length=length)["totals"]["image_flops"] for k, p in self.programs.items()
        }
