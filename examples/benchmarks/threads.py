"""What it costs that the threads of a stage go on spinning when it ends, as ONNX Runtime has them do by default.

    python examples/benchmarks/threads.py openflamingo-mid mplug-owl2-mid --out threads.json

An engine of middle size with random weights runs in processes of its own, in turn: with threads that spin on, and with
threads that stop, as engines have them. Each process takes the least and the median of its calls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmopt.measure.head import head
from mmopt.spec.files import save_json
from mmopt.spec.schema import SCHEMA

WAYS = ("spin on", "stop")


def calls_of(directory: Path, threads: int, spin: bool) -> dict[str, Callable[[], Any]]:
    """What an engine is timed at."""
    import onnxruntime

    if spin:
        kept = onnxruntime.SessionOptions.add_session_config_entry
        onnxruntime.SessionOptions.add_session_config_entry = lambda self, key, value: (
            None if key == "session.force_spinning_stop" else kept(self, key, value)
        )
    from compression_speed import inputs_of

    import mmopt
    from mmopt.measure.variants import EngineStages

    engine = mmopt.Engine(directory, provider="cpu", threads=threads)
    stages = EngineStages(engine, inputs_of(engine))

    def first() -> None:
        stages.run("encode")
        stages.run("prefill")

    made = {"first token": first, "decode": lambda: stages.run("decode")}
    if engine.info.flow:
        ids = list(range(3, 35))
        made["image generation, 2 steps"] = lambda: engine.generate_images([ids], steps=2, seed=0)
    return made


def one(directory: Path, threads: int, spin: bool, count: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, call in calls_of(directory, threads, spin).items():
        taken = []
        for _ in range(count + 1):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
        found[name] = {"min_ms": min(taken[1:]), "median_ms": float(np.median(taken[1:]))}
    return found


def measure(config: str, threads: int, processes: int, count: int) -> dict[str, Any]:
    """Figures of each process; ratios are paired: of processes one after the other."""
    import mmopt

    program = mmopt.trace(mmopt.from_config(config, "float32", random=True))
    with tempfile.TemporaryDirectory() as folder:
        directory = mmopt.export(mmopt.optimize(program, check=False).program, Path(folder, "engine"), check=False)
        taken: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(processes):
            for way in WAYS:
                command = [sys.executable, __file__, "--engine", str(directory), "--threads", str(threads)]
                said = subprocess.run(
                    [*command, "--way", way, "--count", str(count)], check=True, capture_output=True, text=True
                )
                taken[way].append(json.loads(said.stdout))
    rows = []
    for name in taken[WAYS[0]][0]:
        own = {way: [p[name] for p in made] for way, made in taken.items()}
        ratio = [a["median_ms"] / b["median_ms"] for a, b in zip(own[WAYS[0]], own[WAYS[1]], strict=True)]
        rows.append({"what": name, "processes": own, "faster": sorted(ratio), "median": float(np.median(ratio))})
    return {**head("threads", threads, program.info.dtype), "calls": count, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--count", type=int, default=10, help="timed calls of each process")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.engine:
        print(json.dumps(one(a.engine, a.threads, a.way == WAYS[0], a.count)))
        return
    found = {}
    for config in a.configs:
        found[config] = measure(config, a.threads, a.processes, a.count)
        for row in found[config]["rows"]:
            of = {way: sorted(p["median_ms"] for p in row["processes"][way]) for way in WAYS}
            each = ", ".join(f"{way} {x[len(x) // 2]:.1f} ms ({x[0]:.1f} to {x[-1]:.1f})" for way, x in of.items())
            low, high = row["faster"][0], row["faster"][-1]
            print(f"{config}, {row['what']}: {each}; {row['median']:.2f}x ({low:.2f} to {high:.2f})", flush=True)
    if a.out:
        save_json({"schema": SCHEMA, "kind": "threads", "configs": found}, a.out)


if __name__ == "__main__":
    main()
