"""The trained checkpoints as yardsticks: a Program and held-out questions whose answers depend on their pictures.

    python examples/yardsticks.py [NAME] [--limit N]

prints how many are answered right, with the pictures and with grey ones.
"""

import argparse
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import codebook
import numpy as np
import pictures
import vqa

import mmopt
from mmopt.measure.statistics import Score
from mmopt.measure.task import Sample, Task

CHECKPOINTS = Path(__file__).parent / "checkpoints"
BATCH = 16
NEW_TOKENS = 2  # an answer is one word, and right only if it ends there
SHOTS, EPISODES = 4, 2000  # of the code book


class Yardstick(NamedTuple):
    """tasks: by name, their samples in random order, as many different pictures first as there are."""

    program: mmopt.Program
    tasks: dict[str, Task]


def load(checkpoint: str, images: int, context: int) -> mmopt.Program:
    return mmopt.trace(mmopt.load(CHECKPOINTS / checkpoint, "float32"), batch=BATCH, images=images, context=context)


def mplug_owl2_vqa() -> Yardstick:
    """Questions after the colour or the shape of a picture; yes or no, as often yes as no to each wording."""
    asked: dict[bool, list[vqa.Question]] = {True: [], False: []}
    for q in vqa.questions("test"):
        asked[q.kind == "yes/no"].append(q)
    tasks = [as_task("colour or shape", asked[False]), as_task("yes or no", balanced(asked[True]))]
    return Yardstick(load("mplug-owl2-vqa", images=1, context=64), {t.name: t for t in tasks})


def flamingo_vqa() -> Yardstick:
    """Questions about one picture; names of pictures that only the shots, and the shots' pictures, give away."""
    named = [q for q in vqa.questions("test") if q.kind != "yes/no"]
    own = [q._replace(text=codebook.Chunk("", q.text, q.answer).query) for q in named]
    rng, shown = random.Random(0), codebook.pictures("test")
    episodes = [codebook.chunks_of(*codebook.episode(rng, shown, SHOTS + 1)) for _ in range(EPISODES)]
    tasks = [as_task("colour or shape", own), Task(f"code book of {SHOTS} shots", [few_shot(e) for e in episodes])]
    return Yardstick(load("flamingo-vqa", images=SHOTS + 1, context=64), {t.name: t for t in tasks})


def janusflow_digits() -> Yardstick:
    """Which digit a picture shows; the colour of the digit or of its background."""
    shown = pictures.stored()
    asked: dict[str, list[Sample]] = {"digit": [], "colours": []}
    for i, pixels in enumerate(shown.pixels):
        for part, answer in shown.words(i).items():
            sample = Sample(pictures.QUESTIONS[part], [pixels], [answer], NEW_TOKENS, f"{i} {part}")
            asked["digit" if part == "digit" else "colours"].append(sample)
    tasks = {name: Task(name, spread([str(s.id).split()[0] for s in some], some)) for name, some in asked.items()}
    return Yardstick(load("janusflow-digits", images=1, context=96), tasks)


YARDSTICKS = {
    "mplug-owl2-vqa": mplug_owl2_vqa,
    "flamingo-vqa": flamingo_vqa,
    "janusflow-digits": janusflow_digits,
}


# ------------------------------------------------------------------------------------------------------------ samples
def as_task(name: str, asked: Sequence[vqa.Question]) -> Task:
    """Questions about one picture each; an id is the name of the picture's file and the question."""
    samples = [
        Sample(q.text, [q.image], [q.answer], NEW_TOKENS, f"{Path(str(q.image)).stem} {q.text}")
        for q in spread([q.image for q in asked], asked)
    ]
    return Task(name, list({s.id: s for s in samples}.values()))  # a few are asked twice


def few_shot(chunks: Sequence[codebook.Chunk]) -> Sample:
    *shots, query = chunks
    prompt = "".join(c.shot for c in shots) + query.query
    return Sample(prompt, [c.image for c in chunks], [query.answer], NEW_TOKENS)


def balanced(asked: Sequence[vqa.Question]) -> list[vqa.Question]:
    """As many questions to be answered yes as no of each wording: wording alone gets half of them right."""
    by_text: dict[str, dict[str, list[vqa.Question]]] = defaultdict(lambda: {"yes": [], "no": []})
    for q in random.Random(0).sample(asked, len(asked)):
        by_text[q.text][q.answer].append(q)
    return [q for both in by_text.values() for pair in zip(*both.values(), strict=False) for q in pair]


def spread(keys: Sequence[Any], items: Sequence[Any]) -> list[Any]:
    """Items in random order, always the same one: one of each key, then the second ones, and so on."""
    by_key: dict[Any, list[Any]] = defaultdict(list)
    for i in random.Random(0).sample(range(len(items)), len(items)):
        by_key[keys[i]].append(items[i])
    return [x for turn in zip_longest(*by_key.values()) for x in turn if x is not None]


def blind(program: mmopt.Program, task: Task) -> Task:
    """The same questions about grey pictures: of the mean colour that the model's image processor subtracts."""
    mean = np.array(program.info.processing.image["mean"])
    grey = np.full((32, 32, 3), np.round(255 * mean), np.uint8)
    return Task(task.name, [replace(s, images=[grey] * len(s.images)) for s in task.samples], task.score)


# -------------------------------------------------------------------------------------------------------- measurement
def engine_of(program: mmopt.Program, directory: str | Path) -> mmopt.Engine:
    """Export to a directory, unchecked, and load it: for measurement, on one thread."""
    return mmopt.Engine(mmopt.export(program, directory, check=False, gate=False), provider="cpu", threads=1)


def first(task: Task, limit: int | None) -> Task:
    """The first samples of a task: those on the most pictures, see `Yardstick`. ValueError if there are to be none."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1 sample")
    return Task(task.name, task.samples[:limit], task.score)


def measure(runner: mmopt.Program | mmopt.Engine, task: Task, limit: int | None = None) -> Score:
    """Score of the first `limit` samples of a task, by way of an engine: ten times as fast as a Program on its own."""
    if isinstance(runner, mmopt.Engine):
        return mmopt.evaluate(runner, first(task, limit))
    with tempfile.TemporaryDirectory() as directory:
        return mmopt.evaluate(engine_of(runner, Path(directory, "engine")), first(task, limit))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("name", nargs="?", choices=YARDSTICKS, help="by default all of them")
    arguments.add_argument("--limit", type=int, help="questions of each task")
    args = arguments.parse_args()
    for name in [args.name] if args.name else YARDSTICKS:
        program, tasks = YARDSTICKS[name]()
        for task in tasks.values():
            for shown, asked in (("pictures", task), ("grey", blind(program, task))):
                score = measure(program, asked, args.limit)
                print(f"{name}, {shown}: {score}", flush=True)


if __name__ == "__main__":
    main()
