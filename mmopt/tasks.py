"""Tasks: how many questions an engine or a program answers right, and how sure that is."""

from __future__ import annotations

import json
import math
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.engine import Engine
from mmopt.processing import ChatTemplate, TextProcessor
from mmopt.sampling import Request
from mmopt.tiling import processor_of

if TYPE_CHECKING:
    from mmopt.program import Program

Metric = Callable[[str, Sequence[str]], float]
DROPPED = ((r"(?<=\d),(?=\d)|['’]", ""), (r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_", " "), (r"\b(a|an|the)\b", " "))
TYPES = {"prompt": str, "images": list | tuple, "answers": list | tuple, "max_new_tokens": int, "id": str | int | None}


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, white space collapsed; a text of nothing else ("A") keeps it."""
    text = " ".join(text.lower().split())
    for pattern, instead in DROPPED:
        text = " ".join(re.sub(pattern, instead, text).split()) or text
    return text


METRICS: dict[str, Metric] = {  # the latter: as whole words
    "exact": lambda given, answers: normalise(given) in map(normalise, answers),
    "contains": lambda given, answers: any(f" {normalise(a)} " in f" {normalise(given)} " for a in answers),
}


@dataclass(frozen=True)
class Sample:
    """A question. images: as in `Engine.generate`; answers: each is right; id: by default its place in the task."""

    prompt: str
    images: Sequence[Any]
    answers: Sequence[str]
    max_new_tokens: int = 16
    id: str | int | None = None

    def __post_init__(self) -> None:
        for name, kind in TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, expected {getattr(kind, '__name__', kind)}")
        if not self.answers or not all(isinstance(a, str) and a.strip() for a in self.answers):
            raise ValueError(f"answers is {self.answers!r}, expected one or more texts")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")


@dataclass
class Task:
    """Questions with their answers. score: "exact", "contains" or a function (prediction, answers) -> 0 to 1."""

    name: str
    samples: Sequence[Sample]
    score: str | Metric = "exact"

    def __post_init__(self) -> None:
        if not callable(self.score) and self.score not in METRICS:
            raise ValueError(f"score is {self.score!r}, expected {', '.join(METRICS)} or a function")
        self.samples = [replace(s, id=str(i if s.id is None else s.id)) for i, s in enumerate(self.samples)]
        ids = [s.id for s in self.samples]
        if not ids:
            raise ValueError(f"{self.name}: has no samples")
        if len(set(ids)) < len(ids):
            raise ValueError(f"{self.name}: the id {next(i for i in ids if ids.count(i) > 1)!r} is there twice")

    @classmethod
    def load(cls, path: str | Path, score: str | Metric = "exact") -> Task:
        """Read a JSONL file: in each line "prompt", "answers" and, if need be, "images", "id", "max_new_tokens".

        Paths of images are relative to the file, a list of paths is a video. Raises ValueError with file and line.
        """
        path, samples = Path(path), []
        for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            try:
                if line.strip():
                    samples.append(_read(line.decode(), path.parent, number))
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: {e}") from e
        return cls(path.name, samples, score)


def _read(line: str, folder: Path, number: int) -> Sample:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg} at column {e.colno}") from e
    if not isinstance(given, dict):
        raise ValueError(f"expected a JSON object, found {type(given).__name__}")
    if missing := [k for k in ("prompt", "answers") if k not in given]:
        raise ValueError(f"{' and '.join(missing)} missing")
    if unknown := [k for k in given if k not in TYPES]:  # by "image" a question would be asked without its picture
        raise ValueError(f"unknown: {', '.join(unknown)}; expected {', '.join(TYPES)}")
    sample = Sample(**(dict[str, Any](images=[], id=number) | given))

    def place(image: Any) -> Any:
        if isinstance(image, list) and image:
            return [place(frame) for frame in image]
        if not isinstance(image, str):
            raise ValueError(f"images holds {image!r}, expected paths")
        if "://" not in image and not (folder / image).is_file():
            raise ValueError(f"image {folder / image} not found")
        return image if "://" in image else str(folder / image)

    return replace(sample, images=[place(i) for i in sample.images])


def quick(task: Task, n: int = 64, seed: int = 0) -> Task:
    """`n` samples of a task in their order, the same for each runner: enough to notice that something broke."""
    chosen = sorted(random.Random(seed).sample(range(len(task.samples)), min(max(n, 0), len(task.samples))))
    return Task(task.name, [task.samples[i] for i in chosen], task.score)


def bootstrap(values: Sequence[float], draws: int = 10000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean: where the means of samples drawn from the values, with replacement, lie."""
    x, rng = np.array(values, np.float64), np.random.default_rng(seed)
    low, high = np.quantile([x[rng.integers(0, len(x), len(x))].mean() for _ in range(draws)], [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Score:
    """What a runner answered to the samples of a task, in order, and how right each answer is, 0 to 1."""

    task: str
    metric: str
    runner: str
    seconds: float  # of answering all, images included
    ids: list[str]
    prompts: list[str]
    answers: list[list[str]]
    predictions: list[str]
    scores: list[float]

    def __post_init__(self) -> None:
        if not self.scores or len({len(getattr(self, f.name)) for f in fields(self)[4:]}) > 1:
            raise ValueError(f"{self.task}: expected one score for each sample")
        if wrong := [f"{i}: {s}" for i, s in zip(self.ids, self.scores, strict=True) if not 0 <= s <= 1]:
            raise ValueError(f"{self.task}: expected scores from 0 to 1, found that of sample {wrong[0]}")

    @property
    def mean(self) -> float:
        return math.fsum(self.scores) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: Wilson's (1927) for a share of right answers, a bootstrap of the mean where a score is not 0 or 1."""
        if not set(self.scores) <= {0, 1}:
            return bootstrap(self.scores)
        p, z2 = self.mean, 1.959963984540054**2 / len(self.scores)
        middle, half = p + z2 / 2, math.sqrt(z2 * (p * (1 - p) + z2 / 4))
        return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))

    def __str__(self) -> str:
        share = "{:.4f} (95 %: {:.3f} to {:.3f})".format(self.mean, *self.interval)
        return f"{self.task}: {share}, {self.metric}, {len(self.scores)} samples, {self.seconds:.1f} s, {self.runner}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean": self.mean, "interval": list(self.interval)}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Score:
        """What `save` or ``mmopt bench --quality --json`` wrote. Raises ValueError if it is something else."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(*(given[f.name] for f in fields(cls)))
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}: not a saved score: {e!r}") from e


@dataclass(frozen=True)
class Difference:
    """Mean score of `a` less that of `b` on the same samples; interval: 95 %, by a bootstrap of the differences.

    wins, losses: samples on which `a` is better, worse. p: McNemar's exact test, two-sided; None if not all are 0 or 1.
    """

    mean: float
    interval: tuple[float, float]
    wins: int
    losses: int
    samples: int
    p: float | None

    def __str__(self) -> str:
        mean = "{:+.4f} (95 %: {:+.3f} to {:+.3f})".format(self.mean, *self.interval)
        p = "" if self.p is None else f", McNemar p = {self.p:.3g}"
        return f"{mean}, {self.wins} wins and {self.losses} losses on {self.samples} samples{p}"


def paired(a: Score, b: Score, draws: int = 10000, seed: int = 0) -> Difference:
    """How much better `a` is than `b`. Raises ValueError unless both are of the same samples, scored alike."""
    if a.metric != b.metric:
        raise ValueError(f"scores by {a.metric} and by {b.metric} cannot be paired")
    of_a, of_b = ([*zip(s.ids, s.prompts, s.answers, strict=True)] for s in (a, b))
    if of_a != of_b:
        first = next((f"{x} and {y}" for x, y in zip(of_a, of_b, strict=False) if x != y), "one has more")
        raise ValueError(f"scores of different samples ({len(of_a)} and {len(of_b)}) cannot be paired: {first}")
    d = [x - y for x, y in zip(a.scores, b.scores, strict=True)]
    wins, losses, p = sum(x > 0 for x in d), sum(x < 0 for x in d), None
    if {*a.scores, *b.scores} <= {0, 1}:  # samples on which they differ are tosses of a fair coin, if neither is better
        p = min(1.0, 2 * sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1)) / 2 ** (wins + losses))
    return Difference(math.fsum(d) / len(d), bootstrap(d, draws, seed), wins, losses, len(d), p)


class _ProgramReader(Engine):
    """Samples read as an engine reads them, by the same tokenizer and settings, and answered by a Program."""

    def __init__(self, program: Program):
        import torch

        from mmopt.exporters.onnx import _tokenizer

        self.program, self.info, self.directory = program, program.info, Path(program.info["directory"] or "")
        self.dtype, self.provider, self.tensor = self.info["dtype"], "torch", torch.from_numpy
        self.template = ChatTemplate.from_json(self.info["processing"]["chat"])
        self.image_processor = processor_of(self.info["processing"]["image"])
        self.decoder: Any = SimpleNamespace(takes_frames=program.as_frames(torch.zeros(1, 3, 1, 1)).dim() == 5)
        with tempfile.TemporaryDirectory() as folder:
            name = _tokenizer(self.info, Path(folder))
            self._text = TextProcessor.of_model(Path(folder, name), self.info, self.template) if name else None

    def ask(self, sample: Sample) -> str:
        ids = self._render([{"role": "user", "content": self.with_markers(sample.prompt, sample.images)}])
        self._count_images(ids, len(sample.images))
        given: dict[str, Any] = {"max_new_tokens": sample.max_new_tokens}
        if sample.images:
            pixels, inputs, tiles = self._pixels(sample.images)
            given |= {"pixel_values": self.tensor(np.stack(pixels)), "tiles": tiles}
            given["image_inputs"] = {k: self.tensor(x) for k, x in inputs.items()}
        return self.text.decode(self.program([ids], **given)["tokens"][0])


def quality(
    runner: Engine | Program, task: Task, limit: int | None = None, seed: int = 0, batch: int | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> Score:  # fmt: skip
    """Ask an engine, or a program in plain PyTorch, the samples of a task (greedily) and score the answers.

    limit: so many samples, drawn by `seed` (see `quick`). batch: how many an engine answers at once, by default as many
    as it can; a program answers one by one. progress: True shows a bar, a function is told (done, of how many). Raises
    ValueError that names the samples for what cannot be asked, and for scores outside 0 to 1.
    """
    from rich.console import Console
    from rich.progress import track

    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    reader = runner if isinstance(runner, Engine) else _ProgramReader(runner)
    size = 1 if isinstance(reader, _ProgramReader) else batch or reader.info["batch"]
    samples, made = list((task if limit is None else quick(task, limit, seed)).samples), []
    begin, groups = time.perf_counter(), [samples[i : i + size] for i in range(0, len(samples), size)]
    for group in track(groups, task.name, console=Console(stderr=True), transient=True, disable=progress is not True):
        try:
            if isinstance(reader, _ProgramReader):
                made.append(reader.ask(group[0]))
            else:
                requests = [Request(s.prompt, s.images, max_new_tokens=s.max_new_tokens) for s in group]
                made += [c.text for c in reader.generate_batch(requests)]
        except ValueError as e:
            raise ValueError(f"{task.name}, sample {', '.join(str(s.id) for s in group)}: {e}") from e
        if callable(progress):
            progress(len(made), len(samples))
    seconds, rate = time.perf_counter() - begin, METRICS[task.score] if isinstance(task.score, str) else task.score
    metric = task.score if isinstance(task.score, str) else getattr(rate, "__name__", repr(rate))
    name = f"{type(runner).__name__.lower()} {reader.directory} ({reader.dtype}, {reader.provider})"
    asked = [str(s.id) for s in samples], [s.prompt for s in samples], [list(s.answers) for s in samples]
    scores = [float(rate(m, s.answers)) for m, s in zip(made, samples, strict=True)]
    return Score(task.name, metric, name, seconds, *asked, made, scores)
