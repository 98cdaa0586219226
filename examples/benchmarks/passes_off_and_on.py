"""Decode of few-shot prompts with the passes and without, as deployed: engines in processes that hold nothing else.

python examples/benchmarks/passes_off_and_on.py [CONFIG] [--shots 1,4,32] [--processes N] [--rounds N] [--out FILE.json]

A process may get slower memory than the next, so several are started, one after the other; in each the two engines take
turns, 12 tokens at a time. The ratio of a process is the median of its rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmopt.measure.head import head
from mmopt.runtime.engine import Engine
from mmopt.runtime.kv_cache import Cache
from mmopt.spec.files import save_json

SHOT, TOKENS, SETTLE = 20, 12, 0.1
NAMES = ("off", "on")


def measure(directory: Path, shots: list[int], rounds: int, threads: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a token in each round (the fastest and the middle one), by number of shots and engine."""
    engines = {n: Engine(directory / n, provider="cpu", threads=threads) for n in NAMES}
    random, made = np.random.default_rng(0), {}
    pixels = random.standard_normal((1, *engines["on"].decoder.pixels.sizes(2)), np.float32)
    images = {n: e.decoder.image(e.encode_images(pixels)) for n, e in engines.items()}
    for k in shots:
        n = SHOT * (k + 1)
        ids = random.integers(3, engines["on"].info.image_id, n).tolist()
        ids[::SHOT] = [engines["on"].info.image_id] * (k + 1)
        caches = {name: Cache(e.decoder.layout, 1) for name, e in engines.items()}
        for name, e in engines.items():
            e.decoder.prefill(caches[name], 0, ids, [images[name]] * (k + 1))
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for r in range(rounds):
            for name in NAMES[:: 1 if r % 2 else -1]:
                time.sleep(SETTLE)
                taken = []
                for _ in range(TOKENS + 1):
                    caches[name].past[:] = n
                    start = time.perf_counter()
                    engines[name].decoder.decode(caches[name], [5], [False])
                    taken.append(1e3 * (time.perf_counter() - start))
                times[name].append(statistics.median(taken[1:]))
        made[str(k)] = times
    return made


def export(config: str, images: int, directory: Path) -> None:
    import mmopt

    model = mmopt.from_config(config, "float32", random=True)
    program = mmopt.trace(model, batch=1, images=images, context=-(-SHOT * images // 64) * 64 + 64)
    mmopt.export(program, directory / "off", check=False)
    mmopt.export(mmopt.optimize(program, check=False).program, directory / "on", check=False)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", nargs="?", default="openflamingo-mid")
    arguments.add_argument("--shots", default="1,4,32")
    arguments.add_argument("--processes", type=int, default=5)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--export-to", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    shots = [int(k) for k in args.shots.split(",")]
    if args.export_to:
        return export(args.config, max(shots) + 1, args.export_to)
    if args.in_process:
        made = measure(args.in_process, shots, args.rounds, args.threads)
        print(json.dumps(made | {"torch": "torch" in sys.modules}))
        return None
    with tempfile.TemporaryDirectory() as directory:
        again = [sys.executable, *sys.argv]
        subprocess.run([*again, "--export-to", directory], check=True)
        runs = []
        for i in range(args.processes):
            print(f"process {i + 1} of {args.processes}", file=sys.stderr)
            found = subprocess.run([*again, "--in-process", directory], check=True, stdout=subprocess.PIPE)
            runs.append(json.loads(found.stdout))
    ratios: dict[str, list[float]] = {}
    for k in map(str, shots):
        pairs = [list(zip(r[k]["off"], r[k]["on"], strict=True)) for r in runs]
        ratios[k] = [statistics.median(a / b for a, b in p) for p in pairs]
        for name in NAMES:
            each = [statistics.median(r[k][name]) for r in runs]
            print(f"{k:>3} shots, passes {name:<3}  " + "  ".join(f"{t:6.2f}" for t in each) + " ms")
        print(f"{k:>3} shots, off over on  " + "  ".join(f"{x:6.2f}" for x in ratios[k]))
    if args.out:
        facts = head("passes off and on", args.threads, "float32", packages=("onnxruntime",))
        facts |= {"config": args.config, "rounds": args.rounds, "tokens": TOKENS, "ratios": ratios, "runs": runs}
        save_json(facts, args.out)
    return None


if __name__ == "__main__":
    main()
