"""Runs the image schedule of a Program in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmopt.ir.graph import torch_dtype
from mmopt.ir.stage import Stage
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.flow_sampler import FlowSampler, Samples, lay_out, plan_of
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.schedule import Call, Loop, is_cache


def flow_sampler(
    stages: dict[str, Stage],
    schedule: tuple[Call | Loop, ...],
    weights: dict[str, Tensor],
    state: dict[str, tuple[tuple, torch.dtype]],
    info: ModelInfo,
    samples: Samples,
    plan: FlowPlan,
    trips: Any = None,
    observe: Any = None,
    gradients: bool = False,
) -> FlowSampler:
    """A sampler that runs the stages of a Program in plain PyTorch; with `gradients` see `Stage.run`."""

    class TorchFlowSampler(FlowSampler):
        def run_stage(self, call: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            made = stages[call.stage].run(weights, inputs, gradients=gradients)
            if observe:
                observe("paint", call, made, None)
            return made

        def cat(self, parts: list[Any], dim: int) -> Any:
            return torch.cat(parts, dim)

        def expand(self, x: Any, samples: int) -> Any:
            return x.expand(samples, *x.shape[1:])

    inputs = {k: {i: n.meta["shape"] for i, n in s.input_nodes().items()} for k, s in stages.items()}
    sampler = TorchFlowSampler(schedule, inputs, samples, plan, trips)
    sampler.values |= {k: torch.from_numpy(v) for k, v in samples.values().items()}
    sampler.values["steps.time"] = torch.tensor(plan.times * info.required_flow.time_scale, dtype=torch.float32)
    width, dtype, both = info.hidden_size, torch_dtype(info), len(samples.ids)
    sampler.values["no_rows"] = torch.zeros(both, 0, width, dtype=dtype)
    for k, (size, kind) in state.items():
        if is_cache(k):
            sampler.values[k] = torch.zeros(both, *size[1:], dtype=kind)
    return sampler


def generate_images(
    sampler: Callable[..., FlowSampler], info: ModelInfo, prompts: list[list[int]], noise: Tensor, plan: Any
) -> dict:
    """See `Program.generate_images`; `sampler` makes one of samples, a plan and what follows each evaluation."""
    shape = (len(prompts), *info.required_flow.latents)
    if tuple(noise.shape) != shape or noise.dtype != torch.float32:
        raise ValueError(f"noise is {noise.dtype} of shape {tuple(noise.shape)}, expected float32 of shape {shape}")
    plan = plan_of(plan, info)
    trajectory: list[Tensor] = []
    samples = lay_out(prompts, info.required_flow, info.context, info.vocab_size)
    made_by = sampler(samples, plan, lambda k, latents: trajectory.append(latents))
    with torch.inference_mode():
        latents = made_by.sample(noise)
    made = {"latents": latents, "trajectory": torch.stack(trajectory)}
    return made | ({"image": made_by.values["image"]} if "image" in made_by.values else {})
