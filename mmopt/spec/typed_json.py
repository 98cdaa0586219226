"""Frozen dataclasses to JSON and back, by their types: a field that is missing, unknown or of another type is named.

A class with methods `to_json`, `from_json` and `json_schema` of its own says itself how it is written.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
SIMPLE = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def to_json(value: Any) -> Any:
    """What `json.dumps` takes. Fields that hold their default are left out."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        given = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {f.name: to_json(v) for f, v in given.items() if not _is_default(f, v)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return field.default is not dataclasses.MISSING and bool(value == field.default)


def from_json(kind: type[T], data: Any, where: str = "") -> T:
    """A value of `kind` from what `to_json` made. Raises ValueError that names the field: ``info.cross.tiles: ...``."""
    return _read(kind, data, where)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _read_union(args, data, where)
    if hasattr(kind, "from_json"):
        try:
            return kind.from_json(data)
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{where}: {e}") from e
    if dataclasses.is_dataclass(kind):
        return read_dataclass(kind, data, where)
    if origin is dict:
        _expect(isinstance(data, dict), "an object", data, where)
        return {k: _read(args[1], v, f"{where}.{k}" if where else k) for k, v in data.items()}
    if origin is tuple:
        _expect(isinstance(data, list | tuple), "a list", data, where)
        kinds = [args[0]] * len(data) if args[1:] == (...,) else args
        _expect(len(kinds) == len(data), f"{len(kinds)} values", data, where)
        return tuple(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, data, strict=True)))
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    _expect(
        isinstance(data, kind) and not (kind is int and isinstance(data, bool)),
        SIMPLE.get(kind, str(kind)),
        data,
        where,
    )
    return data


def _read_union(kinds: tuple, data: Any, where: str) -> Any:
    """None, or the first of the kinds that takes the data; of one kind alone its own error is told."""
    if data is None and type(None) in kinds:
        return None
    real = [k for k in kinds if k is not type(None)]
    if len(real) == 1:
        return _read(real[0], data, where)
    for kind in real:
        try:
            return _read(kind, data, where)
        except ValueError:
            continue
    _expect(False, " or ".join(SIMPLE.get(k, getattr(k, "__name__", str(k))) for k in real), data, where)


def read_dataclass(kind: Any, data: Any, where: str) -> Any:
    """`from_json` by the fields, for a class whose own `from_json` looks at something else first."""
    _expect(isinstance(data, dict), "an object", data, where)
    fields, hints = {f.name: f for f in dataclasses.fields(kind)}, hints_of(kind)
    place = f"{where}: " if where else ""
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"{place}unknown field {', '.join(unknown)}; expected {', '.join(fields)}")
    if missing := [n for n, f in fields.items() if n not in data and _required(f)]:
        raise ValueError(f"{place}field {', '.join(missing)} is missing")
    return kind(**{k: _read(hints[k], v, f"{where}.{k}" if where else k) for k, v in data.items()})


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _expect(fine: bool, expected: str, seen: Any, where: str) -> None:
    if not fine:
        shown = repr(seen)
        raise ValueError(
            f"{where or 'value'}: expected {expected}, found {shown if len(shown) < 80 else type(seen).__name__}"
        )


def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of what `to_json` makes of a dataclass, its docstring as description."""
    definitions: dict[str, Any] = {}
    made = _schema(kind, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(a, definitions) for a in args]}
    if hasattr(kind, "json_schema"):
        return kind.json_schema()
    if dataclasses.is_dataclass(kind):
        name = kind.__name__  # type: ignore[union-attr]
        if name not in definitions:
            definitions[name] = {}  # a class may hold itself
            hints = hints_of(kind)  # type: ignore[arg-type]
            fields = dataclasses.fields(kind)
            definitions[name] = {
                "type": "object",
                "description": " ".join((kind.__doc__ or "").split()),
                "properties": {f.name: _schema(hints[f.name], definitions) for f in fields},
                "required": [f.name for f in fields if _required(f)],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    if origin is tuple:
        if args[1:] == (...,):
            return {"type": "array", "items": _schema(args[0], definitions)}
        return {
            "type": "array",
            "prefixItems": [_schema(a, definitions) for a in args],
            "minItems": len(args),
            "maxItems": len(args),
        }
    return {"type": SIMPLE[kind]}
