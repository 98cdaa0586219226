"""Questions, text-only tasks and scoring around the easy-VQA pictures. Needs no deep learning framework."""

import itertools
import random
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import easy_vqa

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
LETTERS = "abcdefghijkl"
VALIDATION_IMAGES = 400  # of the 4,000 training pictures


class Question(NamedTuple):
    image: str | None  # path of a picture; None for a text-only task
    text: str
    answer: str
    kind: str  # "colour", "shape" or "yes/no"; "reverse" or "facts" for a text-only task

    @property
    def content(self) -> str:
        """The user's message, the picture first."""
        return self.text if self.image is None else "<|image|>" + self.text


def questions(split: str) -> list[Question]:
    """The questions of a split, "train", "validation" or "test", ordered by picture.

    The package has only a training and a test part; "validation" is a tenth of its training pictures.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be 'train', 'validation' or 'test', not {split!r}")
    if split == "test":
        paths, made = easy_vqa.get_test_image_paths(), zip(*easy_vqa.get_test_questions(), strict=True)
    else:
        paths, made = easy_vqa.get_train_image_paths(), zip(*easy_vqa.get_train_questions(), strict=True)
        order = random.Random(0).sample(sorted(paths), len(paths))
        kept = set(order[:VALIDATION_IMAGES] if split == "validation" else order[VALIDATION_IMAGES:])
        paths = {i: path for i, path in paths.items() if i in kept}
    by_image = sorted((i, text, answer) for text, answer, i in made if i in paths)
    return [Question(paths[i], text, answer, _kind(answer)) for i, text, answer in by_image]


def _kind(answer: str) -> str:
    return "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes/no"


def seen_in(question: Question) -> tuple[str | None, str | None]:
    """The colour and the shape of the picture as far as this question and its answer give them away."""
    known = [question.answer]
    if question.kind == "yes/no":
        words = question.text.rstrip("?").split()
        negated = "not" in words or "no" in words
        known = words if (question.answer == "no") == negated else []
    elif "what is the" in question.text or question.text.startswith("what color is the"):
        known += question.text.rstrip("?").split()  # "what is the blue shape?", "what color is the circle?"
    return next((w for w in known if w in COLOURS), None), next((w for w in known if w in SHAPES), None)


def reverse_task(split: str) -> list[Question]:
    """ "reverse: a b c" -> "c b a" for all triples of 12 letters; the splits share no triple."""
    triples = list(itertools.product(LETTERS, repeat=3))
    random.Random(1).shuffle(triples)
    part = {"validation": triples[:128], "test": triples[128:384], "train": triples[384:]}[split]
    return [Question(None, "reverse: " + " ".join(t), " ".join(reversed(t)), "reverse") for t in part]


@cache
def fact_objects() -> dict[str, tuple[str, str]]:
    """64 made-up objects, each with a colour and a shape to be learned by heart."""
    rng = random.Random(2)
    names: dict[str, None] = {}
    while len(names) < 64:
        names["".join(map(rng.choice, ("bdfgklmprtvz", "aeiou", "bdfgklmprtvz", "aeiou", "kmnrxz")))] = None
    return {name: (rng.choice(COLOURS), rng.choice(SHAPES)) for name in names}


def facts_task() -> list[Question]:
    """Recall of the facts: there is nothing to hold out, the same questions serve training and test."""
    return [
        Question(None, f"what {field} is {name}?", value, "facts")
        for name, values in fact_objects().items()
        for field, value in zip(("color", "shape"), values, strict=True)
    ]


def score(pairs: Iterable[tuple[Question, str]]) -> dict[str, float]:
    """(question, the model's answer) pairs -> share of exact answers by kind and, under "all", of everything.

    Let the model write a few tokens more than an answer has: then an exact answer is also one that ended in time.
    """
    right: dict[str, list[bool]] = {}
    for question, given in pairs:
        right.setdefault(question.kind, []).append(given == question.answer)
    everything = [r for rs in right.values() for r in rs]
    return {kind: sum(rs) / len(rs) for kind, rs in sorted(right.items())} | {
        "all": sum(everything) / max(len(everything), 1)
    }
