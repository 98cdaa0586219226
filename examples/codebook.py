"""Few-shot questions about the easy-VQA pictures whose answer only the shots give away. Needs no framework.

Each episode has a hidden code book: it names either the colour or the shape of a picture, in one of four languages.
Three of the languages use the same made-up words for different things, so a word alone does not tell which language it
is: a reader has to see the picture of the shot that the word belongs to. Now and then two languages agree, so that one
shot may leave a doubt that a second one settles.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import vqa

QUESTION = "which name fits?"
NAMES = {  # by language: the names of vqa.COLOURS and vqa.SHAPES
    "colour": (
        vqa.COLOURS,
        ("bax", "dal", "fep", "gom", "kiv", "lut", "mop", "nid"),
        ("bax", "dal", "gom", "kiv", "lut", "mop", "nid", "fep"),
        ("fep", "gom", "mop", "nid", "kiv", "lut", "bax", "dal"),
    ),
    "shape": (vqa.SHAPES, ("rus", "sov", "tef"), ("rus", "tef", "sov"), ("sov", "rus", "tef")),
}
BOOKS = tuple(itertools.product(NAMES, range(4)))  # (field, language)
Book = tuple[str, int]


class Picture(NamedTuple):
    path: str
    colour: str
    shape: str


class Chunk(NamedTuple):
    """A picture with a question and its answer: a shot, or the query."""

    image: str
    question: str
    answer: str

    @property
    def query(self) -> str:
        return f"<image>Question:{self.question} Short answer:"

    @property
    def shot(self) -> str:
        return f"{self.query}{self.answer}<|endofchunk|>"


def pictures(split: str) -> list[Picture]:
    """The pictures of a split whose colour and shape both follow from their questions."""
    known: dict[str, list[set]] = defaultdict(lambda: [set(), set()])
    for q in vqa.questions(split):
        for found, word in zip(known[str(q.image)], vqa.seen_in(q), strict=True):
            found.update({word} - {None})
    return [Picture(p, *c, *s) for p, (c, s) in sorted(known.items()) if len(c) == len(s) == 1]


def name(book: Book, picture: Picture) -> str:
    field, language = book
    if field == "colour":
        return NAMES[field][language][vqa.COLOURS.index(picture.colour)]
    return NAMES[field][language][vqa.SHAPES.index(picture.shape)]


def episode(rng: random.Random, among: Sequence[Picture], chunks: int) -> tuple[Book, list[Picture]]:
    """A code book and `chunks` pictures; the last is the query, those before it are the shots."""
    return rng.choice(BOOKS), rng.sample(among, chunks)


def chunks_of(book: Book, shown: Sequence[Picture]) -> list[Chunk]:
    return [Chunk(p.path, QUESTION, name(book, p)) for p in shown]


def best_chance(book: Book, shown: Sequence[Picture], see_shots: bool = True) -> float:
    """Chance of the best guess about the last picture for a reader who knows all books and reads the shots before it.

    Without `see_shots` the reader has the shots' words and the last picture, but not the shots' pictures.
    """
    *shots, query = shown
    if see_shots:
        fitting = [b for b in BOOKS if all(name(b, p) == name(book, p) for p in shots)]
    else:
        fitting = [(field, i) for field, i in BOOKS if {name(book, p) for p in shots} <= set(NAMES[field][i])]
    votes = [name(b, query) for b in fitting]
    return max(map(votes.count, votes)) / len(votes)


def words() -> list[str]:
    """All words that a code book may hold."""
    return sorted({w for languages in NAMES.values() for words in languages for w in words})
