"""A stage whose weights a recorded case brings along: compiled, exported and run by itself, beside the recording."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmopt.conformance.case import Case
from mmopt.conformance.run_program import Pairs, value_pairs
from mmopt.exporters.onnx import export
from mmopt.ir.capture import trace_stage
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.pipeline import run_passes
from mmopt.runtime.session import StageSession
from mmopt.runtime.tensor import Tensor as Memory
from mmopt.spec.manifest import read_directory
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.schedule import Call, Schedule, Schedules


def at_point(point: str, module: Any, info: ModelInfo, case: Case) -> Pairs:
    """The case's own stage at a point, on the inputs that its family makes of the case.

    `info`: of a Program of the model. Without such a stage there are no pairs.
    """
    found = case.alone(module) if case.alone else None
    if found is None:
        return {}
    spec, inputs = found
    weights: dict[str, Tensor] = {}
    stages: dict[str, Stage] = {"alone": trace_stage(spec, weights)}
    program = Program(stages, Schedules(Schedule([Call("alone")])), weights, {}, info)
    if point != "program":
        program = run_passes(program, check=False).program
    stage, output = program.stages["alone"], spec.outputs[0]
    if point == "engine":
        made = _in_engine(program, output, inputs)
    else:
        made = {k: stage.run(program.weights, given)[output] for k, given in inputs.items()}
    return value_pairs(case, made, {k: k for k in made})


def _in_engine(program: Program, output: str, inputs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as directory:
        out = export(program, Path(directory) / "engine")
        facts = read_directory(out).stages["alone"]
        session, made = StageSession("alone", out, facts, "cpu", torch.get_num_threads()), {}
        for k, given in inputs.items():
            memory = {name: Memory.of(x.numpy(), facts.inputs[name].dtype) for name, x in given.items()}
            result = Memory.zeros(session.output_shape(output, memory), facts.outputs[output].dtype)
            session.bind(memory, {output: result}).run()
            made[k] = torch.from_numpy(result.numpy())
    return made
