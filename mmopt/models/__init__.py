"""One file a family: its plain model code, its config, its stages and its recorded cases.

No other room knows a family's name.
In: a config.json and weights.
Out: a torch module and the stages to trace.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmopt.models._family import Family

MODULES = ("flamingo", "idefics", "janusflow", "mllama", "mplug_owl2")  # imported when a family is first looked for


def families() -> list[Family]:
    """Every family: the FAMILY, or the FAMILIES, of each module."""
    modules = [importlib.import_module(f"mmopt.models.{n}") for n in MODULES]
    return [f for m in modules for f in (getattr(m, "FAMILIES", None) or [m.FAMILY])]


def family_of(config: dict) -> Family:
    """The family that a config.json belongs to, by its architectures, else by its model_type."""
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    for f in families():
        if not architectures and model_type is None and f.recognises(config):
            return f
        if set(architectures) & set(f.architectures) or (not architectures and model_type in f.model_types):
            return f
    known = ", ".join(a for f in families() for a in f.architectures)
    raise ValueError(
        f"config.json names architectures {architectures} and model_type {model_type!r}, which no family of mmopt "
        f"handles; it knows {known}"
    )
