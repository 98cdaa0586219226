"""bench(model): eager, compiled, optimized and engine side by side, in one process and in interleaved rounds.

Everything that is compared is timed in the same rounds, with the same threads and dtype, on the same inputs: a busy
machine then hurts all alike. The minimum is the figure least disturbed by other work.
"""

from __future__ import annotations

import gc
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from mmopt import memory as memory_of
from mmopt.baselines import ROUTINGS, Shared
from mmopt.checkpoint import Model, load
from mmopt.contracts import ContractError, difference
from mmopt.figures import ratios_of, rows_of, shares_of, work_of
from mmopt.program import Program
from mmopt.variants import STAGES, EngineStages, Inputs, TorchStages

REPEATS = {"encode": 1, "prefill": 1, "decode": 4}  # timed calls in a round; decode is short
CHOOSING_ROUNDS = 3
MATRIX = 2048
SETTLE = 0.005  # seconds before each measurement, for the threads of the one before to fall asleep
NOTES = (
    "eager: plain torch code, the better of the two baselines for each stage; both are static in shape and write their "
    "caches in place. routed: branches chosen by compare, nonzero, gather and scatter, as reference implementations "
    "do, head on all rows. known: each branch on its slice of the rows, head on the last row.",
    "compiled: eager through torch.compile with freezing. optimized: the optimized graphs in torch, caches in place.",
    "engine: ONNX Runtime. It and optimized run a prompt chunk by chunk (text before the image first), a baseline "
    "runs it in one call.",
    "total: encode + prefill + new_tokens x decode, added up within each round.",
    "Shares of limits count the work of the optimized program for every variant: its FLOPs, its weights read and the "
    "cache rows read. Bandwidth is the best of reading (a sum) and of copying, both directions counted.",
    "Memory: peak of anonymous memory in a process of its own, above that process after its imports, weights included.",
)


def bench(
    model: Model,
    context: int = 768,
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

    The caches hold `context` rows and are half filled. On the CPU everything runs in float32; on a CUDA device (taken
    where there is one) in bfloat16, decode as a CUDA graph. `limit_bytes` is the size of the array that bandwidth is
    measured on. `memory` and `compiled` leave out what takes long. Raises ValueError for a model without weights or a
    context that is too small, ContractError if two variants do not give the same logits.
    """
    if not model.has_weights:
        raise ValueError("the model has shapes only, no weights: load a checkpoint or ask for random weights")
    tell = progress or (lambda now: None)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _in_dtype(model, torch.float32 if place.type == "cpu" else torch.bfloat16)
    before, freezing = torch.get_num_threads(), torch._inductor.config.freezing
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="mmopt-bench-") as directory, torch.no_grad():
            return _bench(
                model, context, rounds, threads, place, new_tokens, memory, compiled, limit_bytes, tell, Path(directory)
            )
    finally:
        torch.set_num_threads(before)
        torch._inductor.config.freezing = freezing


def _bench(
    model: Model, context: int, rounds: int, threads: int, device: torch.device, new_tokens: int, memory: bool,
    compiled: bool, limit_bytes: int, tell: Callable[[str], None], directory: Path,
) -> dict[str, Any]:  # fmt: skip
    from mmopt.engine import Engine
    from mmopt.exporters.onnx import export
    from mmopt.pipeline import optimize
    from mmopt.tracing import trace

    tell("tracing")
    program = trace(model, batch=1, images=1, context=context)
    image = next(s.input_nodes()["pixel_values"] for s in program.stages.values() if "pixel_values" in s.inputs)
    inputs = Inputs.draw(program.info, image.meta["shape"][1:])
    tell("optimizing")
    better = optimize(program, check=False).program
    tell("exporting")
    skipped: dict[str, str] = {}
    variants: dict[str, Any] = {}
    shared = Shared(device)
    tell("choosing the better baseline")
    baselines = {r: TorchStages(program, inputs, r, shared) for r in ROUTINGS}
    chosen, choosing = _better(baselines, device)
    variants["eager"] = _mixed(baselines, chosen)
    if compiled:
        tell("compiling")
        variants["compiled"] = _mixed({r: TorchStages(program, inputs, r, shared) for r in ROUTINGS}, chosen)
        _compile(variants, skipped)
    variants["optimized"] = TorchStages(better, inputs, None, shared)
    path = export(better, directory / "engine", target="onnx", dtype=program.info["torch_dtype"])
    try:
        engine = Engine(path, provider=device.type, threads=threads)
        variants["engine"] = EngineStages(engine, inputs)
    except ValueError as e:  # this ONNX Runtime has no such provider
        skipped["engine"] = str(e)
    tell("comparing the variants' logits")
    agreement = _agree(variants, program)
    calls = {name: {s: _call(v, s, device) for s in STAGES} for name, v in variants.items()}
    limits: dict[str, list[float]] = {}
    times: dict[tuple[str, str], list[list[float]]] = {(s, v): [] for s in STAGES for v in variants}
    probes = _probes(device, program.info["torch_dtype"], limit_bytes)
    order = list(variants)
    for r in range(rounds):
        tell(f"round {r + 1} of {rounds}")
        for name, (amount, probe) in probes.items():
            limits.setdefault(name, []).append(amount / min(_time(probe, device, 1)) / 1e9)
        order = order[1:] + order[:1]  # no variant always runs after the same one
        for stage in STAGES:
            for name in order:
                times[stage, name].append(_time(calls[name][stage], device, REPEATS[stage]))
    rows = rows_of(times, list(variants), new_tokens)
    best = {k: max(v) for k, v in limits.items()}
    best["bandwidth_gb_per_s"] = max(best["read_gb_per_s"], best["copy_gb_per_s"])
    work = work_of(better, inputs, new_tokens)
    peaks: dict[str, Any] = {}
    if memory and device.type == "cpu":
        tell("measuring memory")
        del calls, probes, baselines
        peaks = _memory(variants, skipped, path, threads, directory)
    return {
        "device": _device_name(device),
        "threads": threads,
        "dtype": program.info["dtype"],
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "onnxruntime")},
        "sizes": {
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "context": context,
            "filled": inputs.filled,
            "prompt": {"leading_text": inputs.leading, "image": inputs.image_rows, "text": len(inputs.ids)},
            "new_tokens": new_tokens,
            "rounds": rounds,
        },
        "rows": rows,
        "ratios": ratios_of(rows),
        "limits": best,
        "work": work,
        "shares": shares_of(rows, work, best),
        "memory": peaks,
        "baselines": {"chosen": chosen, "min_ms": choosing},
        "agreement": agreement,
        "skipped": skipped,
        "notes": list(NOTES),
    }


def _in_dtype(model: Model, dtype: torch.dtype) -> Model:
    if model.dtype == dtype:
        return model
    if model.directory is None:
        raise ValueError(
            f"the model has weights of {model.dtype}, expected {dtype} on this device: make it with that dtype"
        )
    return load(model.directory, dtype)


# ------------------------------------------------------------------------------------------------------- the variants
def _better(
    baselines: dict[str, TorchStages], device: torch.device
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """For each stage the faster baseline, by the minimum of a few interleaved rounds."""
    best: dict[str, dict[str, float]] = {s: {} for s in STAGES}
    for r in range(CHOOSING_ROUNDS + 1):
        for s in STAGES:
            for name, b in baselines.items():
                took = min(_time(lambda b=b, s=s: b.run(s), device, REPEATS[s])) * 1e3  # type: ignore[misc]
                if r:  # the first round warms up
                    best[s][name] = min(took, best[s].get(name, took))
    return {s: min(found, key=found.__getitem__) for s, found in best.items()}, best


def _mixed(baselines: dict[str, TorchStages], chosen: dict[str, str]) -> TorchStages:
    """One variant made of the chosen baseline for each stage; they share values and caches."""
    made = baselines[ROUTINGS[-1]]
    made.steps = {s: baselines[chosen[s]].steps[s] for s in STAGES}
    return made


def _compile(variants: dict[str, Any], skipped: dict[str, str]) -> None:
    """Compile and run once; without a C++ compiler the variant is left out and the reason given."""
    variants["compiled"].compile()
    try:
        variants["compiled"].run_all()
    except Exception as e:  # inductor has many error types
        skipped["compiled"] = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
        del variants["compiled"]


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


def _agree(variants: dict[str, Any], program: Program) -> dict[str, dict[str, float]]:
    """Largest difference of each variant's last logits to eager's; what answers differently must not be timed."""
    found: dict[str, dict[str, float]] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, variant in variants.items():
        variant.run("encode")
        for stage in STAGES[1:]:
            variant.run(stage)
            value = variant.logits()
            reference = expected.setdefault(stage, value)
            found.setdefault(name, {})[stage] = float((value - reference).abs().max())
            dtype = program.info["torch_dtype"]
            if wrong := difference(reference.to(dtype), value.to(dtype)):
                error, allowed = wrong
                raise ContractError(
                    f"{stage}: the logits of {name} differ from eager's by {error:.3g}, allowed {allowed:.3g}", program
                )
    return found


# ------------------------------------------------------------------------------------------------------ measurement
def _time(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of `repeats` calls; where there are several, one goes before that is not timed."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    time.sleep(SETTLE)
    if repeats > 1:
        call()
    taken = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return taken


def _probes(device: torch.device, dtype: torch.dtype, limit_bytes: int) -> dict[str, tuple[float, Callable]]:
    """Name -> amount and call, for the limits of the machine: bytes read, bytes copied, FLOPs of a product."""
    many = torch.ones(limit_bytes // 4, dtype=torch.float32, device=device)
    other = torch.empty_like(many)
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    return {
        "read_gb_per_s": (many.nbytes, lambda: many.sum()),
        "copy_gb_per_s": (2 * many.nbytes, lambda: other.copy_(many)),
        "gemm_gflop_per_s": (2 * MATRIX**3, lambda: torch.mm(a, b)),
    }


def _memory(variants: dict, skipped: dict, engine: Path, threads: int, directory: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    eager, optimized = variants["eager"], variants["optimized"]
    for name, kept in (("eager", eager), ("compiled", eager), ("optimized", optimized)):
        if name in variants and name not in skipped:
            torch.save(kept, directory / "stages.pt")
            made[name] = memory_of.measure(name, directory / "stages.pt", threads)
            (directory / "stages.pt").unlink()
            gc.collect()
    if "engine" in variants:
        made["engine"] = memory_of.measure("engine", engine, threads)
    return made


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor() or "cpu"
    )
