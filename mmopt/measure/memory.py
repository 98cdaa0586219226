"""Peak anonymous memory of one variant of a benchmark, in a process of its own.

Anonymous memory is what a process has made for itself; pages of files that are only mapped do not count.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Anonymous memory of this process now (Linux)."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], Any], every: float = 0.002) -> int:
    """Peak of anonymous memory while `work` runs, above what there was before, sampled `every` so many seconds."""
    gc.collect()
    before, peak, done = anonymous_bytes(), [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        kept = work()  # what the variant holds stays until the last sample
        peak[0] = max(peak[0], anonymous_bytes())
        del kept
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def measure(variant: str, path: str | Path, threads: int) -> dict[str, Any]:
    """Load a variant from `path` in a new process and run each stage twice: ``{"peak_bytes": n}``.

    "engine" loads an engine directory, other variants a file of torch modules that `mmopt.measure.bench` has written.
    Where memory cannot be read, or the process fails, the result is ``{"skipped": why}``.
    """
    if not STATUS.is_file():
        return {"skipped": f"{STATUS} is not there: anonymous memory can be read on Linux alone"}
    command = [sys.executable, "-m", "mmopt.measure.memory", variant, str(path), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"skipped": f"the process failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _engine(path: str, threads: int) -> Callable[[], Any]:
    from mmopt.measure.variants import EngineStages
    from mmopt.runtime.engine import Engine

    return lambda: EngineStages(Engine(path, provider="cpu", threads=threads)).run_all()


def _torch(path: str, threads: int, compiled: bool) -> Callable[[], Any]:
    import torch

    import mmopt.measure.baselines  # noqa: F401  what the file refers to

    torch.set_num_threads(threads)

    def work() -> Any:
        stages = torch.load(path, weights_only=False)  # written by the process that started this one
        if compiled:
            stages.compile()
        return stages.run_all()

    return work


def main() -> None:
    variant, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    work = _engine(path, threads) if variant == "engine" else _torch(path, threads, variant == "compiled")
    print(json.dumps({"peak_bytes": peak_of(work)}))


if __name__ == "__main__":
    main()
