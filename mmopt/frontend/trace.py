"""trace(model) -> Program: each stage through torch.export, then lifted to canonical form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmopt.frontend.load import Model
from mmopt.ir.capture import StageSpec, TensorSpec, trace_stage
from mmopt.ir.program import Program, Source
from mmopt.ir.stage import Stage
from mmopt.spec.cross_mask import CROSS_INPUTS
from mmopt.spec.model_info import ModelInfo, Processing
from mmopt.spec.schedule import Call, Cat, Loop, Schedule, Schedules

# What the host makes for each call of the language model, or once for all of them (media); all else is carried.
GIVEN = {"visual", "text", "media", "offset", *CROSS_INPUTS}

PAINTING = ("flow_time", "flow_encode", "flow_decode", "decode_image")  # stages that text does not need

# What is not computed in these types: pictures leave the range of float16; angles of up to 1000 need finer steps.
FULL_PRECISION = {"float16": ("flow_time", "decode_image"), "bfloat16": ("flow_time",)}


class NextToken(nn.Module):
    """Greedy choice: the likeliest id after the last row, and whether it ends the sample."""

    def __init__(self, eos_ids: list[int]):
        super().__init__()
        self.eos_ids = eos_ids

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = logits[:, -1:].argmax(-1)
        done = ids == self.eos_ids[0]
        for e in self.eos_ids[1:]:
            done = done | (ids == e)
        return ids, done


def trace(
    model: Model,
    batch: int = 1,
    images: int = 1,
    context: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Program:
    """Trace a loaded model (or one of shapes only) for at most `batch` samples of `images` images each.

    `context` is the capacity of the KV caches in rows: prompt, images and new tokens together (by default 512, or what
    the config allows if that is less). Batch and prompt length stay free in the graphs. `progress` is told which stage
    is being traced. Raises ValueError if the config does not allow that many rows.
    """
    c = model.config
    flow = None if model.family.flow is None else model.family.flow(c)
    context = min(512 + (flow.tokens if flow else 0), c.max_position_embeddings) if context is None else context
    for name, value in (("batch", batch), ("images", images), ("context", context)):
        if value < (0 if name == "images" else 1):
            raise ValueError(f"{name} is {value}, expected a positive number")
    if context > c.max_position_embeddings:
        raise ValueError(
            f"context {context} is longer than the model's max_position_embeddings {c.max_position_embeddings}"
        )
    specs = model.family.stages(model.module, context)
    eos = [c.eos_token_id] if isinstance(c.eos_token_id, int) else list(c.eos_token_id)
    logits = TensorSpec(("B", "n", c.vocab_size), model.dtype)
    specs["next_token"] = StageSpec(NextToken(eos), {"logits": logits}, ["ids", "done"])
    weights: dict[str, torch.Tensor] = {}
    traced = {}
    for name, described in specs.items():
        progress(f"trace: stage {name}")
        traced[name] = trace_stage(described, weights)
    language = specs["language_model"].inputs
    state: dict[str, tuple[tuple, torch.dtype]] = {"logits": (("B", 1, c.vocab_size), model.dtype)}
    for name in traced["language_model"].inputs:
        if name not in GIVEN:
            spec: Any = language[name.split(".")[0]]
            spec = spec[int(name.split(".")[1])] if isinstance(spec, list) else spec
            state[name] = (spec.shape, spec.dtype)
    among = model.family.cross is None  # images lie among the rows of the text
    apart = ("embed", "language_model", "head", "next_token", *PAINTING)
    head = (Call("head"),) if "head" in specs else ()
    schedule = Schedule(
        (
            *(Call(name) for name in specs if name not in apart),
            Loop(
                (
                    Call("embed", {"ids": "chunk.ids"}),
                    Call("language_model", {"visual": "chunk.visual"} if among else {}),
                    *head,
                ),
                over="chunks",
            ),
            Loop(
                (
                    Call("next_token"),
                    Call("embed"),
                    Call("language_model", {"visual": "no_visual"} if among else {}),
                    *head,
                ),
                trips="max_new_tokens",
                until="done",
            ),
        )
    )
    info = ModelInfo(
        family=model.family.name,
        dtype=str(model.dtype).removeprefix("torch."),
        image_id=model.image_id,
        image_marker=model.family.image_marker,
        tokens_per_image=c.tokens_per_image,
        image_embed_width=c.hidden_size,
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        layers=c.num_hidden_layers,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        bos_id=c.bos_token_id,
        eos_ids=tuple(eos),
        batch=batch,
        images=images,
        context=context,
        max_frames=getattr(c, "max_frames", None),
        cross=None if model.family.cross is None else model.family.cross(c),
        flow=flow,
        full_precision_stages=FULL_PRECISION if flow else {},
        full_precision_values=("latents", "time", "velocity", "image") if flow else (),
        processing=Processing(**model.processing),
    )
    source = Source(str(model.directory) if model.directory else None, model.tokenizer)
    schedules = Schedules(schedule, generation_of(traced) if flow else Schedule())
    return Program(traced, schedules, weights, state, info, model.has_weights, source).drop_unused()


def generation_of(stages: dict[str, Stage]) -> Schedule:
    """The reference's sampler: each step reads the prompt again, both halves of the guidance do everything apart."""
    caches = {o: f"image.{o}" for o in stages["language_model"].outputs if o != "hidden"}
    rows: dict[str, str | Cat] = {"visual": Cat(1, ("prompt.text", "time_row")), "text": "tokens"}
    host: dict[str, str | Cat] = {"past": "prompt.begin", "offset": "prompt.offset", "seen": "prompt.seen"}
    step = (
        Call("flow_time", {"time": "step.time"}),
        Call("flow_encode", {"latents": Cat(0, ("latents", "latents"))}),
        Call("language_model", rows | host, caches),
        Call("flow_decode"),
    )
    items: list[Call | Loop] = [Call("embed", {"ids": "prompt.ids", "text": "prompt.text"})]
    items.append(Loop(step, trips="steps", update=("latents", "velocity")))
    return Schedule([*items, Call("decode_image")] if "decode_image" in stages else items)
