"""Timing of calls, and what the machine can do at best: memory bandwidth and the rate of products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

MATRIX = 2048
SETTLE = 0.1  # seconds before each measurement: threads of ONNX Runtime spin about that long after their last call


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
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


def probes(device: torch.device, dtype: torch.dtype, limit_bytes: int, threads: int) -> dict[str, tuple]:
    """Name -> amount and call, for the limits of the machine: bytes read, bytes copied, FLOPs of a square product."""
    many = torch.ones(limit_bytes // 4, dtype=torch.float32, device=device)
    other = torch.empty_like(many)
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    made: dict[str, tuple] = {
        "read_gb_per_s": (many.nbytes, lambda: many.sum()),
        "copy_gb_per_s": (2 * many.nbytes, lambda: other.copy_(many)),
        "torch_gemm_gflop_per_s": (2 * MATRIX**3, lambda: torch.mm(a, b)),
    }
    if device.type == "cpu":  # the two libraries differ by a factor on some processors: the faster one is the limit
        session, given = _onnxruntime_product(b.numpy(), threads), {"x": a.numpy()}
        made["onnxruntime_gemm_gflop_per_s"] = (2 * MATRIX**3, lambda: session.run(None, given))
    return made


def in_rounds(
    calls: dict[tuple[str, str], Callable[[], Any]],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    tell: Callable[[str], None],
    repeats: Callable[[str], int] = lambda stage: 1,
    limit_bytes: int = 512 << 20,
) -> tuple[dict[tuple[str, str], list[list[float]]], dict[str, list[float]]]:
    """Seconds of calls by (stage, variant), a list for each round, and the limits of the machine in each round.

    Each round: the limits, then stage by stage all variants, another one first each time. repeats: calls of a stage in
    a round.
    """
    times: dict[tuple[str, str], list[list[float]]] = {key: [] for key in calls}
    limits: dict[str, list[float]] = {}
    limit_calls = probes(device, dtype, limit_bytes, threads)
    for r in range(rounds):
        tell(f"round {r + 1} of {rounds}")
        for name, (amount, call) in limit_calls.items():
            limits.setdefault(name, []).append(amount / min(timed(call, device, 1)) / 1e9)
        for stage in dict.fromkeys(s for s, _ in calls):
            names = [n for s, n in calls if s == stage]
            for name in names[r % len(names) :] + names[: r % len(names)]:
                times[stage, name].append(timed(calls[stage, name], device, repeats(stage)))
    return times, limits


def _onnxruntime_product(weight: Any, threads: int) -> Any:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [MATRIX, MATRIX]) for n in "xy")
    node, w = helper.make_node("MatMul", ["x", "w"], ["y"]), numpy_helper.from_array(weight, "w")
    graph = helper.make_graph([node], "product", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # not into what is timed next
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def summary(found: dict[str, list[float]]) -> dict[str, float]:
    """The best round of each limit; ``bandwidth_gb_per_s`` and ``gemm_gflop_per_s`` are the best of their kind."""
    best = {k: max(v) for k, v in found.items()}
    best["bandwidth_gb_per_s"] = max(best["read_gb_per_s"], best["copy_gb_per_s"])
    best["gemm_gflop_per_s"] = max(v for k, v in best.items() if "gemm" in k)
    return best
