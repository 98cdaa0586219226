"""Schedules: the calls and loops that run the stages of a model, over named values. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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


class Schedule(tuple[Call | Loop, ...]):
    """The calls and loops of one task, in order. What part a call or loop plays is asked here, nowhere else."""

    @property
    def encode_calls(self) -> tuple[Call, ...]:
        """Calls outside all loops: stages that images (or prompts) go through once."""
        return tuple(i for i in self if isinstance(i, Call))

    @property
    def prefill(self) -> Loop | None:
        """The loop that reads prompts, chunk by chunk."""
        return next((i for i in self if isinstance(i, Loop) and i.over == "chunks"), None)

    @property
    def decode(self) -> Loop | None:
        """The loop that makes one token after the other."""
        return next((i for i in self if isinstance(i, Loop) and i.until is not None), None)

    @property
    def steps(self) -> Loop | None:
        """The loop over the steps of a flow sampler."""
        return next((i for i in self if isinstance(i, Loop) and i.update is not None), None)

    def calls(self) -> Iterator[Call]:
        """All calls, those inside loops too."""
        return calls_of(self)

    def sample_calls(
        self, inputs: Mapping[str, Iterable[str]], outputs: Mapping[str, Iterable[str]]
    ) -> tuple[tuple[Call, ...], set[str]]:
        """Those of the calls outside loops that read all images of a sample, not one image alone; and their values.

        These are ``media``, the images of a sample, and what is made of it. inputs, outputs: names of what each stage
        reads and makes.
        """
        made, found = {"media"}, []
        for call in self.encode_calls:
            if made & {s for name in inputs[call.stage] for s in call.sources(name)}:
                made |= {call.target(name) for name in outputs[call.stage]}
                found.append(call)
        return tuple(found), made

    def to_json(self) -> list[dict[str, Any]]:
        return [_to_json(i) for i in self]

    @classmethod
    def from_json(cls, data: Any) -> Schedule:
        """What `to_json` wrote. Raises ValueError for anything else."""
        if not isinstance(data, list):
            raise ValueError(f"a schedule is a list of calls and loops, found {type(data).__name__}")
        return cls(_from_json(i) for i in data)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        source = {"anyOf": [{"type": "string"}, _object({"cat": {"type": "integer"}, "names": {"type": "array"}})]}
        call = _object({"call": {"type": "string"}}, {
            "rename": {"type": "object", "additionalProperties": source},
            "writes": {"type": "object", "additionalProperties": {"type": "string"}},
        })  # fmt: skip
        text = {"type": ["string", "null"]}
        loop = _object(
            {"loop": {"type": "array", "items": call}},
            {"over": text, "trips": text, "until": text, "update": {"type": "array", "items": {"type": "string"}}},
        )
        return {"type": "array", "items": {"anyOf": [call, loop]}}


NOTHING = Schedule()


@dataclass(frozen=True)
class Schedules:
    """text: from images and prompts to answers. image: from a prompt and noise to an image (empty: none are made)."""

    text: Schedule
    image: Schedule = NOTHING

    def replaced(self, **changes: Iterable[Call | Loop]) -> Schedules:
        """With another schedule for ``text``, ``image`` or both."""
        return replace(self, **{k: Schedule(v) for k, v in changes.items()})

    def calls(self) -> Iterator[Call]:
        yield from self.text.calls()
        yield from self.image.calls()


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _to_json(item: Call | Loop) -> dict[str, Any]:
    if isinstance(item, Loop):
        names = {k: getattr(item, k) for k in ("over", "trips", "until") if getattr(item, k) is not None}
        made: dict[str, Any] = {"loop": [_to_json(c) for c in item.body]} | names
        return made | ({"update": list(item.update)} if item.update else {})
    rename = {k: {"cat": v.dim, "names": list(v.names)} if isinstance(v, Cat) else v for k, v in item.rename.items()}
    named = {"rename": rename, "writes": dict(item.writes)}
    return {"call": item.stage} | {k: v for k, v in named.items() if v}


def _from_json(data: Any) -> Call | Loop:
    known = {"call": {"call", "rename", "writes"}, "loop": {"loop", "over", "trips", "until", "update"}}
    kind = next((k for k in known if isinstance(data, dict) and k in data), None)
    if kind is None or (unknown := sorted(set(data) - known[kind])):
        raise ValueError(
            f"expected a call or a loop, found {data!r}"
            if kind is None
            else f"{kind}: unknown field {', '.join(unknown)}"
        )
    if kind == "loop":
        body = [_from_json(c) for c in data["loop"]]
        if not all(isinstance(c, Call) for c in body):
            raise ValueError("a loop holds calls, found a loop in it")
        update = tuple(data["update"]) if "update" in data else None
        return Loop(tuple(body), data.get("over"), data.get("trips"), data.get("until"), update)  # type: ignore[arg-type]
    rename = data.get("rename", {})
    sources = {k: v if isinstance(v, str) else Cat(v["cat"], tuple(v["names"])) for k, v in rename.items()}
    return Call(data["call"], sources, data.get("writes", {}))
