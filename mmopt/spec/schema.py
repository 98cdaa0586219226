"""The number of everything that is written: program.json, plans, flow plans, stored prefixes, journals of a search."""

from __future__ import annotations

from typing import Any

SCHEMA = 2
"""It rises whenever a field without a default comes, or one goes or changes its meaning; nothing older is read."""


def check_schema(data: Any, what: str, fields: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless `data` is an object of this schema, with `fields` and perhaps some of `optional`.

    Without `fields` only the number is looked at.
    """
    found = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if found != SCHEMA or isinstance(found, bool):
        raise ValueError(f"not {what}: expected an object of schema {SCHEMA}, found {found!r}")
    if fields and (missing := [k for k in fields if k not in data]):
        raise ValueError(f"not {what}: lacks {', '.join(missing)}")
    if fields and (unknown := sorted(set(data) - {"schema", *fields, *optional})):
        raise ValueError(f"not {what}: unknown field {', '.join(unknown)}")
