"""Errors of engine directories and requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def engine_errors(where: str = "") -> Iterator[None]:
    """What is wrong with a request or a directory is told as EngineError."""
    try:
        yield
    except EngineError:
        raise
    except (ValueError, TypeError, KeyError, OSError) as e:
        raise EngineError(f"{where}{e}") from e


class EngineError(ValueError):
    """A directory, a request or an option that an engine cannot work with; the message names it and the reason."""
