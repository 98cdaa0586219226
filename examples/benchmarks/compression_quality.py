"""What fewer visual tokens cost in right answers, and what they save, on the trained yardsticks.

    python examples/benchmarks/compression_quality.py mplug-owl2-vqa --limit 1000 --out results.json --plot results.png

Each site, method and share of rows kept answers the same questions. Beside each score stand paired differences to all
rows and to what a method has to beat: rows drawn at random, rows averaged, a smaller image. Results are written after
each row, and what the file has already is not measured again. Times are those of one process: the engines of all rows
of the table take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from compression_report import BASELINES, BLIND, FULL, PIXELS, RESIZE, TOGETHER, plot, plot_times, text
from yardsticks import BATCH, YARDSTICKS, blind, engine_of, first

import mmopt
from mmopt.measure.head import head
from mmopt.measure.statistics import Score
from mmopt.measure.task import Sample, Task
from mmopt.pipeline import default_passes
from mmopt.spec.files import save_json

THREADS = 1
REPEATS = 2  # of what is timed, in a row, the better one counts


class Way(NamedTuple):
    """How tokens are left out. site: its name, "" for all tokens of the program; keep_ratio: the share that stays."""

    site: str
    method: str
    keep_ratio: float


def ways(there: Sequence[str], sites: Sequence[str], methods: Sequence[str], keeps: Sequence[float]) -> list[Way]:
    """All ways to be measured, baselines first. ValueError for a site or a method that does not exist."""
    from mmopt.pruning.methods import METHODS

    known = {"sites": (sites, there), "methods": (methods, [*METHODS, RESIZE])}
    for what, (given, names) in known.items():
        if wrong := [g for g in given if g not in names]:
            raise ValueError(f"--{what}: expected some of {', '.join(names)}, found {', '.join(wrong)}")
    order = sorted(methods or known["methods"][1], key=lambda m: BASELINES.index(m) if m in BASELINES else 9)
    every = product(sorted(sites or there, key=lambda p: p != PIXELS), order, keeps)
    return [Way(*w) for w in every if (w[0] == PIXELS) == (w[1] == RESIZE)]


def program_of(program: mmopt.Program, way: Way, positions: str) -> tuple[mmopt.Program | None, str]:
    """(The optimized Program, what was done), or (None, why the pass refused)."""
    if way.method in (FULL, BLIND):
        return mmopt.optimize(program, check=False).program, ""
    from mmopt.passes.compress_visual_tokens import CompressVisualTokens

    p = CompressVisualTokens(keep_ratio=way.keep_ratio, method=way.method, site=way.site, position_ids=positions)
    result = mmopt.optimize(program, [p, *default_passes()], check=False)
    report = result.reports[0]
    return (result.program, report.rewrites[0]) if report.rewrites else (None, "; ".join(report.skipped))


# -------------------------------------------------------------------------------------------------------- the results
class Results:
    """What was measured, in memory and in a file. ValueError if the file holds answers to other questions."""

    def __init__(self, facts: dict[str, Any], tasks: Mapping[str, Task], path: Path | None):
        self.path, self.tasks = path, dict(tasks)
        if len(tasks) > 1:
            self.tasks[TOGETHER] = Task(TOGETHER, [s for t in tasks.values() for s in t.samples])
        self.found: dict[str, Any] = facts | {"samples": {n: digest(t) for n, t in tasks.items()}, "rows": []}
        if path and path.exists():
            old = json.loads(path.read_text())
            if wrong := [k for k in ("checkpoint", "position_ids", "dtype", "samples") if old.get(k) != self.found[k]]:
                raise ValueError(f"{path}: holds results of other {' and '.join(wrong)}: name another file")
            self.found["rows"] = old["rows"]
            self.found["sizes"] = facts["sizes"] | {"sites": old["sizes"]["sites"] | facts["sizes"]["sites"]}
            self.found |= (
                {k: old[k] for k in ("date", "commit")} if old["rows"] else {}
            )  # the answers of the oldest rows are of then
            if any(old[k] != facts[k] for k in ("machine", "versions")):
                for row in old["rows"]:
                    row.pop("times", None)

    def row(self, way: Way) -> dict[str, Any] | None:
        return next((r for r in self.found["rows"] if Way(r["site"], r["method"], r["keep_ratio"]) == way), None)

    def put(self, way: Way, row: dict[str, Any]) -> None:
        """Add a row, in place of the same one before, and write the file."""
        self.found["rows"] = [r for r in self.found["rows"] if r is not self.row(way)] + [way._asdict() | row]
        self.save()

    def save(self) -> None:
        for row in self.found["rows"]:
            self.sum_up(row)
        for row in self.found["rows"]:
            self.compare(row)
        if self.path:
            save_json(self.found, self.path)

    def sum_up(self, row: dict[str, Any]) -> None:
        """Add the questions of all tasks as one, where a row has them all."""
        own = [row.get("tasks", {}).get(name) for name in self.tasks if name != TOGETHER]
        if TOGETHER in self.tasks and all(own) and TOGETHER not in row["tasks"]:
            right = "".join(o["right"] for o in own)
            s = self.score(TOGETHER, right)
            seconds = sum(o["seconds"] for o in own)
            row["tasks"][TOGETHER] = {
                "mean": s.mean,
                "interval": s.interval,
                "seconds": seconds,
                "right": right,
                "over": {},
            }

    def compare(self, row: dict[str, Any]) -> None:
        """Add the paired differences to those baselines that are there by now."""
        for baseline, (name, own) in product(BASELINES, row.get("tasks", {}).items()):
            site = {FULL: "", RESIZE: PIXELS}.get(baseline, row["site"])
            other = self.row(Way(site, baseline, 1.0 if baseline == FULL else row["keep_ratio"])) or row
            if other is row or name not in other.get("tasks", {}) or baseline in own["over"] or row["method"] == BLIND:
                continue
            d = mmopt.compare_scores(self.score(name, own["right"]), self.score(name, other["tasks"][name]["right"]))
            own["over"][baseline] = vars(d) | {"interval": list(d.interval)}

    def score(self, task: str, right: str) -> Score:
        """A Score from a row; what was answered is not kept there."""
        s = self.tasks[task].samples
        asked = [str(x.id) for x in s], [x.prompt for x in s], [list(x.answers) for x in s]
        return Score(task, "exact", "", 0.0, *asked, [""] * len(s), [float(c) for c in right])


def digest(task: Task) -> str:
    asked = json.dumps([[s.id, s.prompt, *s.answers] for s in task.samples])
    return f"{len(task.samples)} samples, sha256 {hashlib.sha256(asked.encode()).hexdigest()}"


def scored(engine: mmopt.Engine, tasks: Mapping[str, Task], grey: Callable[[Task], Task] = lambda t: t) -> dict:
    """What a row holds of each task; right: a 1 or a 0 for each sample."""
    made = {}
    for name, task in tasks.items():
        s = mmopt.evaluate(engine, grey(task))
        right = "".join(f"{x:.0f}" for x in s.scores)
        made[name] = {"mean": s.mean, "interval": s.interval, "seconds": s.seconds, "right": right, "over": {}}
    return made


# ------------------------------------------------------------------------------------------------ time to first token
class FirstToken:
    """Encoding the images of some samples, then reading their prompts, one by one, in an engine.

    Pixels and ids are made beforehand; the text that every prompt begins with is in the cache already, as in an engine
    that runs.
    """

    def __init__(self, engine: mmopt.Engine, samples: Sequence[Sample]):
        self.decoder = engine.decoder
        made = engine.image_processor([i for s in samples for i in s.images])
        self.pixels = made["pixel_values"] if isinstance(made, dict) else made
        if self.decoder.takes_frames:
            self.pixels = self.pixels[:, None]
        self.counts = [len(s.images) for s in samples]
        asked = [[{"role": "user", "content": engine._with_markers(s.prompt, s.images)}] for s in samples]
        self.ids = [engine.text.encode(engine.template.render(a)) for a in asked]

    def __call__(self) -> list[np.ndarray]:
        rows, made, at = self.decoder.encode(self.pixels), [], 0
        for ids, count in zip(self.ids, self.counts, strict=True):
            with self.decoder.cache(1) as cache:
                made.append(self.decoder.prefill(cache, 0, ids, [rows[i : i + 1] for i in range(at, at + count)]))
            at += count
        return made


def in_turns(calls: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Milliseconds ``[rounds, calls]``, the best of `REPEATS`; in each round all calls, another one first each time."""
    best = np.zeros((rounds, len(calls)))
    for r in range(rounds):
        for i in np.roll(np.arange(len(calls)), -r).tolist():
            taken = []
            for _ in range(REPEATS):  # the first also brings back what others drove from the processor's caches
                start = time.perf_counter()
                calls[i]()
                taken.append(time.perf_counter() - start)
            best[r, i] = 1e3 * min(taken)
    return best


def quartiles(x: np.ndarray) -> dict[str, float]:
    return dict(zip(("p25", "median", "p75"), np.quantile(x, [0.25, 0.5, 0.75]).tolist(), strict=True))


def add_times(rows: Sequence[dict], engines: Sequence[mmopt.Engine], tasks: Mapping[str, Task], rounds: int) -> None:
    """Time the first samples of each task in all engines, milliseconds of each sample; faster: the first engine's time
    over it, in the same round."""
    for name, task in tasks.items():
        samples = task.samples[:BATCH]
        taken = in_turns([FirstToken(e, samples) for e in engines], rounds) / len(samples)
        for row, own, faster in zip(rows, taken.T, (taken[:, :1] / taken).T, strict=True):
            row.setdefault("times", {})[name] = {"ms": quartiles(own), "faster": quartiles(faster)}


# ----------------------------------------------------------------------------------------------------------- all of it
def measure_all(program: mmopt.Program, results: Results, listed: Sequence[Way], positions: str, rounds: int) -> None:
    """Measure what the file does not have; engines of all of its rows are timed anew if one has no times."""

    def engine(way: Way) -> tuple[mmopt.Engine | None, str]:
        made, told = program_of(program, way, positions)
        return (None if made is None else engine_of(made, Path(folder, str(len(engines))))), told

    tasks = {name: t for name, t in results.tasks.items() if name != TOGETHER}
    engines: dict[Way, mmopt.Engine] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in [Way("", FULL, 1.0), Way("", BLIND, 1.0), *listed]:
            if (old := results.row(way)) and "failed" not in old:
                continue
            try:
                made, told = engine(way)
                if made is None:
                    row: dict[str, Any] = {"refused": told}
                else:
                    grey = (lambda t: blind(program, t)) if way.method == BLIND else (lambda t: t)
                    engines[way], row = made, {"did": told, "tasks": scored(made, tasks, grey)}
            except Exception as e:  # the other rows are to be measured
                row = {"failed": f"{type(e).__name__}: {e}"}
            results.put(way, row)
            outcome = row.get("refused") or row.get("failed") or {n: t["mean"] for n, t in row["tasks"].items()}
            print(f"{way.site} {way.method} {way.keep_ratio:g}: {outcome}", file=sys.stderr, flush=True)
        timed = [r for r in results.found["rows"] if "tasks" in r and r["method"] != BLIND]
        timed.sort(key=lambda r: r["method"] != FULL)
        if rounds and any("times" not in r for r in timed):
            print(f"timing {len(timed)} engines", file=sys.stderr, flush=True)
            for way in [Way(r["site"], r["method"], r["keep_ratio"]) for r in timed]:
                if way not in engines:
                    made, told = engine(way)
                    if made is None:
                        raise ValueError(f"{results.path}: has {way}, now refused ({told}): name another file")
                    engines[way] = made
            ordered = [engines[Way(r["site"], r["method"], r["keep_ratio"])] for r in timed]
            add_times(timed, ordered, tasks, rounds)
            results.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", choices=YARDSTICKS)
    parser.add_argument("--limit", type=int, help="questions of each task, by default all")
    parser.add_argument("--tasks", default="", help="names, by default all")
    parser.add_argument("--keep-ratios", default="0.5,0.25,0.125")
    parser.add_argument("--methods", default="", help="names, by default all")
    parser.add_argument("--sites", default="", help="names, by default all")
    parser.add_argument("--position-ids", default="keep", help="keep or renumber")
    parser.add_argument("--rounds", type=int, default=10, help="of timing; 0: leave it out")
    parser.add_argument("--out", type=Path, help="JSON file, gone on with if it is there")
    parser.add_argument("--plot", type=Path, help="PNG file: right answers over rows kept")
    parser.add_argument("--plot-times", type=Path, help="PNG file: right answers over time")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    from mmopt.pruning.apply import find_sites

    program, tasks = YARDSTICKS[args.checkpoint]()
    sites, methods, names = ([x for x in v.split(",") if x] for v in (args.sites, args.methods, args.tasks))
    if wrong := [n for n in names if n not in tasks]:
        parser.error(f"--tasks: expected some of {', '.join(tasks)}, found {', '.join(wrong)}")
    there = {p.name: p.rows for p in find_sites(program)}
    listed = ways([*there], sites, methods, [float(k) for k in args.keep_ratios.split(",")])
    chosen = {n: first(t, args.limit) for n, t in tasks.items() if n in (names or tasks)}
    sizes = {"parameters": sum(w.numel() for w in program.weights.values()), "sites": there}
    sizes |= {"tokens_per_image": program.info.tokens_per_image}
    sizes |= {k: getattr(program.info, k) for k in ("context", "batch", "images")}
    facts = head("compression quality", THREADS, program.info.dtype)
    facts |= {"checkpoint": args.checkpoint, "limit": args.limit}
    facts |= {"position_ids": args.position_ids, "rounds": args.rounds, "sizes": sizes}
    results = Results(facts, chosen, args.out)
    measure_all(program, results, listed, args.position_ids, args.rounds)
    print(text(results.found))
    if args.plot:
        plot(results.found, args.plot)
    if args.plot_times:
        plot_times(results.found, args.plot_times)
    if failed := [r for r in results.found["rows"] if "failed" in r]:
        sys.exit(f"{len(failed)} rows failed, for example {failed[0]}")


if __name__ == "__main__":
    main()
