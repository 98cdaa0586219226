"""bench(model): eager, compiled, optimized and engine side by side, in one process and in interleaved rounds.

Everything that is compared is timed in the same rounds, with the same threads and dtype, on the same inputs: a busy
machine then hurts all alike. The minimum is the figure least disturbed by other work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from mmopt.exporters.onnx import export
from mmopt.frontend.load import Model, load
from mmopt.frontend.trace import trace
from mmopt.ir.graph import torch_dtype
from mmopt.ir.program import Program
from mmopt.measure import memory as memory_of
from mmopt.measure.baselines import ROUTINGS, Shared
from mmopt.measure.head import head
from mmopt.measure.ratios import ratios_of, rows_of, shares_of, work_of
from mmopt.measure.roofline import in_rounds, summary, timed
from mmopt.measure.torch_stages import TorchStages
from mmopt.measure.variants import STAGES, EngineStages, Inputs
from mmopt.pipeline import run_passes
from mmopt.rewrite.contracts import ContractError, difference
from mmopt.runtime.engine import Engine

REPEATS = {"encode": 1, "prefill": 1, "decode": 4}  # timed calls in a round; decode is short
CHOOSING_ROUNDS = 5
CONTEXT = 768
NOTES = (
    "eager: plain torch code, the better of the two baselines for each stage; both are static in shape and write their "
    "caches in place. routed: branches chosen by compare, nonzero, gather and scatter, as reference implementations "
    "do, head on all rows. known: each branch on its slice of the rows, head on the last row.",
    "compiled: eager through torch.compile with freezing. optimized: the optimized graphs in torch, caches in place.",
    "engine: ONNX Runtime. It and optimized run a prompt chunk by chunk (text before the image first), a baseline "
    "runs it in one call.",
    "total: encode + prefill + new_tokens x decode, added up within each round.",
    "Shares of limits count the work of the optimized program for every variant: its FLOPs, its weights read and the "
    "cache rows read. Bandwidth is the best of reading (a sum) and of copying, both directions counted; the GEMM rate "
    "is the best of torch and ONNX Runtime. Limits are measured in every round, the best round counts.",
    "Memory: peak of anonymous memory in a process of its own, above that process after its imports, weights included.",
)


def bench(
    model: Model,
    context: int | None = None,
    rounds: int = 30,
    threads: int = 2,
    device: str | None = None,
    new_tokens: int = 64,
    memory: bool = True,
    compiled: bool = True,
    limit_bytes: int = 512 << 20,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time the stages of a model with weights; the result is what ``mmopt bench --json`` prints.

    The caches hold `context` rows (by default 768, or what the config allows if that is less) and are half filled. On
    the CPU everything runs in float32; on a CUDA device (taken where there is one) in bfloat16, decode as a CUDA graph.
    `limit_bytes` is the size of the array that bandwidth is measured on. `memory` and `compiled` leave out what takes
    long. Raises ValueError for a model without weights or a context that is too small, ContractError if two variants do
    not give the same logits.
    """
    if not model.has_weights:
        raise ValueError("the model has shapes only, no weights: load a checkpoint or ask for random weights")
    tell = progress or (lambda now: None)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    context = min(CONTEXT, model.config.max_position_embeddings) if context is None else context
    model = _in_dtype(model, torch.float32 if place.type == "cpu" else torch.bfloat16)
    before, freezing = torch.get_num_threads(), torch._inductor.config.freezing
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="mmopt-bench-") as directory, torch.no_grad():
            b = _Bench(model, context, threads, place, compiled, Path(directory), tell)
            b.measure(rounds, limit_bytes, tell)
            if memory and place.type == "cpu":
                tell("measuring memory")
                b.measure_memory()
            return b.result(rounds, new_tokens)
    finally:
        torch.set_num_threads(before)
        torch._inductor.config.freezing = freezing


class _Bench:
    """The variants of one model, ready to be timed, and what was measured of them."""

    def __init__(
        self, model: Model, context: int, threads: int, device: torch.device, compiled: bool, directory: Path,
        tell: Callable[[str], None],
    ):  # fmt: skip
        self.model, self.threads, self.device, self.directory = model, threads, device, directory
        tell("tracing")
        program = trace(model, batch=1, images=1, context=context)
        tell("optimizing")
        self.optimized = run_passes(program, check=False).program
        image = next(s.input_nodes()["pixel_values"] for s in program.stages.values() if "pixel_values" in s.inputs)
        self.inputs = Inputs.draw(program.info, image.meta["shape"][1:])
        self.info = program.info
        self.variants: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.memory: dict[str, Any] = {}
        tell("choosing the better baseline")
        shared = Shared(device)
        baselines = {r: TorchStages(program, self.inputs, r, shared) for r in ROUTINGS}
        self.chosen, self.choosing = _better(baselines, device)
        self.variants["eager"] = _mixed(baselines, self.chosen)
        if compiled:
            tell("compiling")
            again = {r: TorchStages(program, self.inputs, r, shared) for r in ROUTINGS}
            self._compile(_mixed(again, self.chosen))
        self.variants["optimized"] = TorchStages(self.optimized, self.inputs, None, shared)
        tell("exporting")
        self._export()
        tell("comparing the variants' logits")
        self.agreement = agreement(self.variants, program)

    def _compile(self, variant: TorchStages) -> None:
        """Compile and run once; without a C++ compiler the variant is left out and the reason given."""
        variant.compile()
        try:
            self.variants["compiled"] = variant.run_all()
        except Exception as e:  # inductor has many error types
            self.skipped["compiled"] = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"

    def _export(self) -> None:
        path = export(self.optimized, self.directory / "engine", target="onnx", dtype=torch_dtype(self.info))
        try:
            engine = Engine(path, provider=self.device.type, threads=self.threads)
        except ValueError as e:  # this ONNX Runtime has no such provider
            self.skipped["engine"] = str(e)
        else:
            self.variants["engine"] = EngineStages(engine, self.inputs)

    def measure(self, rounds: int, limit_bytes: int, tell: Callable[[str], None]) -> None:
        """All stages of all variants, and the limits of the machine, in interleaved rounds."""
        calls = {(s, name): _call(v, s, self.device) for s in STAGES for name, v in self.variants.items()}
        self.times, limits = in_rounds(
            calls, rounds, self.device, torch_dtype(self.info), self.threads, tell, REPEATS.__getitem__, limit_bytes
        )
        self.limits = summary(limits)

    def measure_memory(self) -> None:
        """Each variant in a process of its own, which reads the stages (weights included) from a file."""
        path = self.directory / "stages.pt"
        for name in self.variants:
            if name == "engine":
                self.memory[name] = memory_of.measure(name, self.directory / "engine", self.threads)
                continue
            torch.save(self.variants["eager" if name == "compiled" else name], path)
            self.memory[name] = memory_of.measure(name, path, self.threads)
            path.unlink()

    def result(self, rounds: int, new_tokens: int) -> dict[str, Any]:
        rows = rows_of(self.times, list(self.variants), new_tokens)
        work = work_of(self.optimized, self.inputs, new_tokens)
        i = self.inputs
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            **head("stages", self.threads, self.info.dtype, gpu=gpu),
            "sizes": {
                "parameters": sum(p.numel() for p in self.model.module.parameters()),
                "context": self.info.context,
                "filled": i.filled,
                "prompt": {"leading_text": i.leading, "image": i.image_rows, "text": len(i.ids) - i.leading},
                "new_tokens": new_tokens,
                "rounds": rounds,
            },
            "rows": rows,
            "ratios": ratios_of(rows),
            "limits": self.limits,
            "work": work,
            "shares": shares_of(rows, work, self.limits),
            "memory": self.memory,
            "baselines": {"chosen": self.chosen, "min_ms": self.choosing},
            "agreement": self.agreement,
            "skipped": self.skipped,
            "notes": list(NOTES),
        }


def _in_dtype(model: Model, dtype: torch.dtype) -> Model:
    if model.dtype == dtype:
        return model
    if not model.arguments:
        raise ValueError(
            f"the model has weights of {model.dtype}, expected {dtype} on this device: make it with that dtype"
        )
    return load(**{**model.arguments, "dtype": dtype})


# ------------------------------------------------------------------------------------------------------- the variants
def _better(
    baselines: dict[str, TorchStages], device: torch.device
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """For each stage the faster baseline, by the minimum of a few interleaved rounds."""
    best: dict[str, dict[str, float]] = {s: {} for s in STAGES}
    for r in range(CHOOSING_ROUNDS + 1):
        for s in STAGES:
            for name, b in baselines.items():
                took = min(timed(lambda b=b, s=s: b.run(s), device, REPEATS[s])) * 1e3  # type: ignore[misc]
                if r:  # the first round warms up
                    best[s][name] = min(took, best[s].get(name, took))
    return {s: min(found, key=found.__getitem__) for s, found in best.items()}, best


def _mixed(baselines: dict[str, TorchStages], chosen: dict[str, str]) -> TorchStages:
    """One variant made of the chosen baseline for each stage; they share values and caches."""
    made = baselines[ROUTINGS[-1]]
    made.steps = {s: baselines[chosen[s]].steps[s] for s in STAGES}
    return made


def _call(variant: Any, stage: str, device: torch.device) -> Callable[[], Any]:
    """What is timed. On a CUDA device decode in torch is replayed as a CUDA graph, if it never waits for the host."""
    if device.type != "cuda" or stage != "decode" or not isinstance(variant, TorchStages):
        return lambda: variant.run(stage)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # lazily made workspaces must not fall into the capture
        for _ in range(3):
            variant.run(stage)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            variant.run(stage)
    except RuntimeError:  # nonzero waits for the host: the routed baseline runs without a graph
        torch.cuda.synchronize()
        return lambda: variant.run(stage)
    return graph.replay


def agreement(variants: dict[str, Any], program: Program) -> dict[str, dict[str, float]]:
    """Largest difference of each variant's last logits to eager's; what answers differently must not be timed."""
    found: dict[str, dict[str, float]] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, variant in variants.items():
        variant.run("encode")
        for stage in STAGES[1:]:
            variant.run(stage)
            value = torch.as_tensor(variant.logits())
            reference = expected.setdefault(stage, value)
            found.setdefault(name, {})[stage] = float((value - reference).abs().max())
            dtype = program.dtype
            if wrong := difference(reference.to(dtype), value.to(dtype)):
                error, allowed = wrong
                raise ContractError(
                    f"{stage}: the logits of {name} differ from eager's by {error:.3g}, allowed {allowed:.3g}", program
                )
    return found
