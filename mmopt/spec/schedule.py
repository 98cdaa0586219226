"""Schedules: the calls and loops that run the stages of a model, over named values. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cat:
    """Values one after the other along a dimension: samples (0) or rows (1). A call may read it as one value."""

    dim: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return (" ; " if self.dim else " | ").join(self.names)


@dataclass(frozen=True)
class Call:
    """Run a stage. It reads and writes the values of the names it was traced with, unless `rename` maps a name.

    `writes` maps a name for outputs alone: what is read under it stays as it is.
    """

    stage: str
    rename: dict[str, str | Cat] = field(default_factory=dict)
    writes: dict[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str | Cat:
        """What input `name` is read from."""
        return self.rename.get(name, name)

    def target(self, name: str) -> str:
        """What output `name` is written to."""
        found = self.writes.get(name, self.rename.get(name, name))
        assert isinstance(found, str)
        return found

    def sources(self, name: str) -> tuple[str, ...]:
        """The names of the values that input `name` is read from."""
        found = self.source(name)
        return found.names if isinstance(found, Cat) else (found,)


@dataclass(frozen=True)
class Loop:
    """Run `body` once for each element of `over`, or `trips` times or until value `until` is true for all samples.

    A value that the body both reads and writes is carried. The elements of ``chunks`` each belong to one sample, so
    carried values are narrowed to that sample's row of the batch. A loop over ``steps`` has tables: ``steps.x`` holds a
    row for each trip, which the body reads as ``step.x``. update: (latents, velocity); the first becomes, after each
    trip, what the coefficients of that trip make of its first value and of all velocities so far.
    """

    body: tuple[Call, ...]
    over: str | None = None
    trips: str | None = None
    until: str | None = None
    update: tuple[str, str] | None = None


def calls_of(items: Iterable[Call | Loop]) -> Iterator[Call]:
    """All calls of a schedule, in order."""
    for item in items:
        yield from item.body if isinstance(item, Loop) else (item,)


def table_of(step: str) -> str:
    """The table ``steps.x`` whose row of this trip is read as ``step.x``."""
    return "steps." + step.removeprefix("step.")


def is_cache(name: str) -> bool:
    """Whether an input or output of a language model is one of its caches."""
    return name.partition(".")[0] in ("key_cache", "value_cache")


def to_json(item: Call | Loop) -> dict[str, Any]:
    """A part of a schedule as program.json holds it."""
    if isinstance(item, Loop):
        made = {"loop": [to_json(c) for c in item.body], "over": item.over, "trips": item.trips, "until": item.until}
        return made | ({"update": list(item.update)} if item.update else {})
    rename = {k: {"cat": v.dim, "names": list(v.names)} if isinstance(v, Cat) else v for k, v in item.rename.items()}
    return {"call": item.stage, "rename": rename} | ({"writes": dict(item.writes)} if item.writes else {})


def from_json(facts: dict[str, Any]) -> Call | Loop:
    if "loop" in facts:
        body = tuple(from_json(c) for c in facts["loop"])
        update = tuple(facts["update"]) if "update" in facts else None
        return Loop(body, facts["over"], facts["trips"], facts["until"], update)  # type: ignore[arg-type]
    rename = {k: v if isinstance(v, str) else Cat(v["cat"], tuple(v["names"])) for k, v in facts["rename"].items()}
    return Call(facts["call"], rename, facts.get("writes", {}))
