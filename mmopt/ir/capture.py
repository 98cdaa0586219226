"""From a module to a stage: torch.export at example sizes, lifted to canonical operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from mmopt.ir.graph import symbol
from mmopt.ir.lift import Lift
from mmopt.ir.stage import Stage


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a stage input: a number or the name of a symbol for each dimension."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StageSpec:
    """A module to trace. Inputs and outputs that are lists are flattened to ``name.0``, ``name.1``, ..."""

    module: torch.nn.Module
    inputs: dict[str, TensorSpec | list[TensorSpec]]
    outputs: list[str]


# Sizes to trace at: at least 2 (1 would be taken for a constant) and all different (equal ones would be tied together).
EXAMPLE = {"B": 3, "N": 2, "F": 6, "nv": 5, "nt": 7, "nb": 4}


def trace_stage(spec: StageSpec, weights: dict[str, torch.Tensor]) -> Stage:
    """One module -> Stage; its parameters and buffers are added to `weights` under their checkpoint names."""
    dims = {s: Dim(s, min=0 if s == "nv" else 1) for s in EXAMPLE} | {"n": Dim("n", min=1)}
    examples = EXAMPLE | {"n": 7}

    def example(t: TensorSpec) -> torch.Tensor:
        shape = [examples[s] if isinstance(s, str) else s for s in t.shape]
        return torch.zeros((), dtype=t.dtype).expand(shape)  # takes no memory: caches of a large model are gigabytes

    def free(t: TensorSpec) -> dict[int, Any]:
        return {i: dims[s] for i, s in enumerate(t.shape) if isinstance(s, str)}

    args, shapes, named = [], [], []
    for name, t in spec.inputs.items():
        many = isinstance(t, list)
        ts: list[Any] = t if isinstance(t, list) else [t]
        args.append([example(x) for x in ts] if many else example(ts[0]))
        shapes.append([free(x) for x in ts] if many else free(ts[0]))
        for i, x in enumerate(ts):
            shape = tuple(symbol(s) if isinstance(s, str) else s for s in x.shape)
            named.append((f"{name}.{i}" if many else name, shape))
    varargs = not isinstance(spec.module, nn.Module) or spec.module.forward.__code__.co_flags & 0x04
    dynamic = (tuple(shapes),) if varargs else tuple(shapes)
    exported = torch.export.export(spec.module, tuple(args), dynamic_shapes=dynamic, strict=False)
    lift = Lift(exported, named, root="root.", taken=weights)
    graph = lift.run()
    weights.update(lift.constants)
    out = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    listed = [s for s in spec.outputs if isinstance(spec.inputs.get(s), list)]
    each = (len(out) - (len(spec.outputs) - len(listed))) // len(listed) if listed else 0
    outputs = []
    for s in spec.outputs:
        outputs += [f"{s}.{i}" for i in range(each)] if s in listed else [s]
    return Stage(graph, [n for n, _ in named], outputs)
