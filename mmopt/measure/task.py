"""Tasks: how many questions an engine or a program answers right, and how sure that is."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
