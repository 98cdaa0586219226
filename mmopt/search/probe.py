"""What a search asks of one program: FLOPs, answers by an engine, time to the first token, and which program it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmopt.exporters.onnx import export
from mmopt.ir.program import Program
from mmopt.measure.quality import _ProgramReader
from mmopt.measure.statistics import Score
from mmopt.measure.task import Sample, Task
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.pruning.apply import cost
from mmopt.runtime.engine import Engine
from mmopt.runtime.lru_cache import Store
from mmopt.search.result import Candidate
from mmopt.spec.schema import SCHEMA

ROUNDS = 9  # in which the time to the first token is measured, of several in turn
Runner = Callable[[Program], Engine | Program]
LISTS = ("ids", "prompts", "answers", "predictions", "scores")


def chosen(score: Score, ids: Sequence[str]) -> Score:
    """A score of some of its samples."""
    at = {name: i for i, name in enumerate(score.ids)}
    lists: dict[str, Any] = {k: [getattr(score, k)[at[i]] for i in ids] for k in LISTS}
    return dataclasses.replace(score, **lists)


def flops(program: Program, beside: Program | None = None) -> float:
    """`cost` with as many images as the program was made for."""
    return cost(program, beside, program.info.images)


def compressed(program: Program, candidate: Candidate) -> Program | str:
    """The program with a plan, or why that cannot be."""
    _, method, keep_ratio, position_ids = candidate
    try:
        made, report = CompressVisualTokens(keep_ratio, method, candidate.site, position_ids)(program)
    except ValueError as e:
        return str(e)
    own = [s for s in report.skipped if s.partition(":")[0] in (candidate.site, "program")]
    return made if report.rewrites else "; ".join(own or report.skipped)


@contextmanager
def exported(program: Program) -> Iterator[Engine]:
    """The program as an engine of ONNX Runtime in a temporary directory, which is gone afterwards.

    It answers as many samples at once as the program was traced for; a program in plain PyTorch answers one by one.
    """
    with tempfile.TemporaryDirectory(prefix="mmopt-search-") as folder:
        yield Engine(export(program, Path(folder, "engine"), check=False, gate=False))


def first_token(sample: Sample, *runners: Engine | Program) -> list[list[float]]:
    """Seconds to the first token of one sample, by each in turn; nothing is kept from one run to the next."""
    asking, times = [_asking(r) for r in runners], [[] for _ in runners]  # type: ignore[var-annotated]
    for turn in range(ROUNDS + 1):
        for ask, taken in zip(asking, times, strict=True):
            begin = time.perf_counter()
            ask(dataclasses.replace(sample, max_new_tokens=1))
            if turn:  # the first one warms up
                taken.append(time.perf_counter() - begin)
    return times


@contextmanager
def answering(program: Program, runner: Runner | None) -> Iterator[Engine | Program]:
    if runner is not None:
        yield runner(program)
    else:
        with exported(program) as engine:
            yield engine


def _asking(runner: Engine | Program) -> Callable[[Sample], Any]:
    if not isinstance(runner, Engine):
        return _ProgramReader(runner).ask

    def ask(sample: Sample) -> None:
        kept, runner.store = runner.store, Store(0)
        try:
            runner.generate(sample.prompt, sample.images, max_new_tokens=1)
        finally:
            runner.store = kept

    return ask


# ------------------------------------------------------------------------------------- what the trials in a file are of
def identity(program: Program, task: Task, settings: Any) -> dict[str, str]:
    """Digests of the program, its weights among it, of the samples with their images, and of the settings."""
    score = getattr(task.score, "__qualname__", task.score)
    return {
        "schema": str(SCHEMA),
        "program": digest(str(program), program.info.context, *sampled(program)),
        "task": digest(score, *(x for s in task.samples for x in content_of(s))),
        "settings": digest(settings),
    }


def digest(*parts: Any) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part if isinstance(part, bytes) else json.dumps(part).encode())
        made.update(b"\0")
    return made.hexdigest()


def sampled(program: Program, most: int = 64) -> Iterator[Any]:
    """Names, shapes and some values of all weights."""
    for name, w in sorted(program.weights.items()):
        flat = w.detach().reshape(-1)
        yield from (name, list(w.shape), flat[:: max(1, len(flat) // most)].double().numpy().tobytes())


def content_of(sample: Sample) -> Iterator[Any]:
    yield from (sample.id, sample.prompt, list(sample.answers), sample.max_new_tokens)

    def content(image: Any) -> Iterator[Any]:
        if isinstance(image, list | tuple):
            for frame in image:
                yield from content(frame)
        elif isinstance(image, str | Path):
            yield Path(image).read_bytes() if Path(image).is_file() else str(image)
        else:
            pixels = np.asarray(image)
            yield from (list(pixels.shape), pixels.tobytes())

    yield from content(sample.images)
