"""How many questions of a task an engine or a Program answers right."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from mmopt.measure.statistics import Score
from mmopt.measure.task import METRICS, Sample, Task, quick
from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.tile_processor import processor_of
from mmopt.processing.tokenizer import TextProcessor, write_tokenizer
from mmopt.runtime.engine import Engine
from mmopt.runtime.request import Request

if TYPE_CHECKING:
    from mmopt.ir.program import Program


class _ProgramReader(Engine):
    """Samples read as an engine reads them, by the same tokenizer and settings, and answered by a Program."""

    def __init__(self, program: Program):
        self.program, self.info, self.directory = program, program.info, Path(program.source.directory or "")
        self.dtype, self.provider, self.tensor = self.info.dtype, "torch", torch.from_numpy
        self.template = ChatTemplate.from_json(self.info.processing.chat)
        self.image_processor = processor_of(self.info.processing.image)
        self.decoder: Any = SimpleNamespace(takes_frames=program.as_frames(torch.zeros(1, 3, 1, 1)).dim() == 5)
        with tempfile.TemporaryDirectory() as folder:
            name = write_tokenizer(program.source.directory, program.source.tokenizer, Path(folder))
            self._text = TextProcessor.of_model(Path(folder, name), self.info, self.template) if name else None

    def ask(self, sample: Sample) -> str:
        ids = self._render([{"role": "user", "content": self._with_markers(sample.prompt, sample.images)}])
        self._count_images(ids, len(sample.images))
        given: dict[str, Any] = {"max_new_tokens": sample.max_new_tokens}
        if sample.images:
            pixels, inputs, tiles = self._pixels(sample.images)
            given |= {"pixel_values": self.tensor(np.stack(pixels)), "tiles": tiles}
            given["image_inputs"] = {k: self.tensor(x) for k, x in inputs.items()}
        return self.text.decode(self.program([ids], **given)["tokens"][0])


def evaluate(
    runner: Engine | Program, task: Task, limit: int | None = None, seed: int = 0, batch: int | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> Score:  # fmt: skip
    """Ask an engine, or a program in plain PyTorch, the samples of a task (greedily) and score the answers.

    limit: so many samples, drawn by `seed` (see `quick`). batch: how many an engine answers at once, by default as many
    as it can; a program answers one by one. progress: True shows a bar, a function is told (done, of how many). Raises
    ValueError that names the samples for what cannot be asked, and for scores outside 0 to 1.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    reader = runner if isinstance(runner, Engine) else _ProgramReader(runner)
    size = 1 if isinstance(reader, _ProgramReader) else batch or reader.info.batch
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
