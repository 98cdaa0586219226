"""The stages of a Program as torch modules for given inputs: eager, compiled, before and after the passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import isfunction
from typing import Any

import torch
import torch._inductor.config

from mmopt.ir.op_rules import rule_of
from mmopt.ir.program import Program
from mmopt.measure.baselines import Shared, torch_stage
from mmopt.measure.variants import STAGES, Inputs
from mmopt.spec.prompt import position_deltas


@dataclass
class Step:
    """A module, and where its inputs come from: a tensor, or the name of a value that an earlier step made."""

    stage: str
    module: Callable
    inputs: list[Any]
    outputs: list[str]
    heavy: bool

    def __getstate__(self) -> dict[str, Any]:
        """A generated module is stored as its source and its tensors."""
        code = self.module.graph.python_code("self")  # type: ignore[attr-defined]
        used = {k: f for k, f in code.globals.items() if isfunction(f)}
        imports = [f"from {f.__module__} import {f.__qualname__} as {k}" for k, f in used.items()]
        source = "\n".join(["import torch", *imports, code.src])
        return vars(self) | {"module": None, "source": source, "tensors": dict(self.module.named_parameters())}  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        names: dict[str, Any] = {}
        exec(compile(state.pop("source"), f"<{state['stage']}>", "exec"), names)
        module = type("Stage", (torch.nn.Module,), {"forward": names["forward"]})()
        for name, x in state.pop("tensors").items():
            module.register_parameter(name, x)
        vars(self).update(state, module=module)


class TorchStages:
    """A Program's stages as torch modules for given inputs.

    `routing` is None for an optimized Program, which is fed chunk by chunk as its schedule says; a Program before the
    passes is a baseline: the prompt in one call, its branches run as `routing` says (see `mmopt.measure.baselines`).
    """

    def __init__(self, program: Program, inputs: Inputs, routing: str | None, shared: Shared):
        self.device, dtype = shared.device, program.dtype
        self.values: dict[str, torch.Tensor] = {
            k: torch.zeros([1 if s == "B" else s for s in shape], dtype=kind, device=self.device)
            for k, (shape, kind) in program.state.items()
        }
        self.values["pixel_values"] = torch.from_numpy(inputs.pixels).to(self.device, dtype)
        lead = inputs.leading
        # image rows, ids, rows in the caches, ids that stand before the image
        chunks = [(0, inputs.ids[:lead], 0, 0), (inputs.image_rows, inputs.ids[lead:], lead, 0)]
        if routing is not None:
            chunks = [(inputs.image_rows, inputs.ids, 0, lead)]
        schedule = program.schedules.text
        assert schedule.prefill is not None
        encode = [c.stage for c in schedule.encode_calls]
        body = [c.stage for c in schedule.prefill.body]
        self.steps: dict[str, list[Step]] = {
            "encode": [self._step(program, s, {"N": 1}, {}, shared) for s in encode],
            "prefill": [self._chunk(program, s, c, shared, routing) for c in chunks for s in body],
            "decode": [self._chunk(program, s, (0, [inputs.token], inputs.filled, 0), shared, routing) for s in body],
        }

    def _chunk(self, program: Program, stage: str, chunk: tuple, shared: Shared, routing: str | None) -> Step:
        rows, ids, past, leading = chunk
        width, dtype = program.info.image_embed_width, program.dtype
        before, after = int(past > 0 and not rows), int(past > 0 or rows > 0)  # a prompt of one image, then a token
        told = position_deltas(before, after, program.info)
        fixed: dict[str, Any] = {
            "ids": torch.tensor([ids], device=self.device),
            "past": torch.tensor([past], device=self.device),
            **{k: torch.tensor([x], device=self.device) for k, x in told.items()},
            "visual": "image_rows" if rows else torch.zeros(1, 0, width, dtype=dtype, device=self.device),
        }
        sizes = {"B": 1, "nv": rows, "nt": len(ids)}
        options = {"past": past, "leading": leading, "routing": routing or "known", "last_only": routing == "known"}
        return self._step(program, stage, sizes, fixed, shared, **options)

    def _step(self, program: Program, name: str, sizes: dict, fixed: dict, shared: Shared, **options: Any) -> Step:
        stage = program.stages[name]
        module = torch_stage(stage, program.weights, sizes, shared=shared, **options)
        outputs = [o for o in stage.outputs if o not in stage.inputs]
        heavy = any(rule_of(n.target).heavy for n in stage.graph.nodes)
        return Step(name, module, [fixed.get(i, i) for i in stage.inputs], outputs, heavy)

    def compile(self) -> None:
        """torch.compile with freezing for every module that has a product; the first run of each stage compiles it.

        Freezing is set for the whole process: it has to hold while modules are traced, not only in the compiler.
        """
        torch._inductor.config.freezing = True
        for steps in self.steps.values():
            for s in steps:
                if s.heavy:
                    s.module = torch.compile(s.module)

    def run(self, stage: str) -> None:
        for s in self.steps[stage]:
            made = s.module(*(self.values[i] if isinstance(i, str) else i for i in s.inputs))
            self.values.update(zip(s.outputs, made, strict=True))

    def run_all(self) -> TorchStages:
        """Each stage twice: the first run compiles what has to be compiled."""
        with torch.no_grad():
            for stage in STAGES * 2:
                self.run(stage)
        return self

    def logits(self) -> torch.Tensor:
        """Those of the last row ``[V]`` of the last prefill or decode."""
        return self.values["logits"][0, -1].float().cpu().clone()
