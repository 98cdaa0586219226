"""Program: the stages of a model as graphs, the schedule that calls them, and the weights they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmopt.ir.flow_interpreter import flow_sampler, generate_images
from mmopt.ir.graph import torch_dtype
from mmopt.ir.interpreter import Interpreter, as_frames
from mmopt.ir.printer import program_text
from mmopt.ir.stage import Stage
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.flow_sampler import FlowSampler, Samples
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.prompt import Chunk
from mmopt.spec.schedule import Call, Schedules


@dataclass(frozen=True)
class Source:
    """Where a Program came from: the checkpoint's directory, and the text of its tokenizer.json where it was made."""

    directory: str | None = None
    tokenizer: str | None = None


@dataclass
class Program:
    """See the module docstring. ``program(prompts=..., pixel_values=...)`` runs it; ``print(program)`` shows it."""

    stages: dict[str, Stage]
    schedules: Schedules
    weights: dict[str, Tensor]
    state: dict[str, tuple[tuple, torch.dtype]]  # carried values that start as zeros: shape and dtype
    info: ModelInfo
    has_weights: bool = True
    source: Source = Source()

    def copy(self) -> Program:
        """Another Program that shares weights and graphs; passes replace graphs, they never edit them."""
        return replace(self, stages=dict(self.stages), weights=dict(self.weights), state=dict(self.state))

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return torch_dtype(self.info)

    def with_stage(self, name: str, stage: Stage) -> Program:
        made = self.copy()
        made.stages[name] = stage
        return made

    def drop_unused(self) -> Program:
        """Without the weights that no stage reads."""
        made = self.copy()
        used = set().union(*(s.weights() for s in self.stages.values()))
        made.weights = {k: v for k, v in self.weights.items() if k in used}
        return made

    def calls(self) -> Iterator[Call]:
        yield from self.schedules.calls()

    def __str__(self) -> str:
        return program_text(self.stages, self.schedules)

    def __call__(
        self,
        prompts: list[list[int]],
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 1,
        forced: Tensor | None = None,
        ignore_eos: bool = False,
        observe: Callable[[str, Call, dict[str, Tensor], Chunk | None], None] | None = None,
        images: list[int] | None = None,
        image_inputs: dict[str, Tensor] | None = None,
        num_previous_images: list[int] | None = None,
        tiles: list[int] | None = None,
    ) -> dict[str, Any]:
        """Run the schedule: prompts are token ids with the image id where an image stands, images in order.

        pixel_values are images ``[N, 3, H, W]``, in families that take videos also ``[N, frames, 3, H, W]``.
        Returns the named values at the end, ``tokens`` (a list of new ids for each sample, the end id included) among
        them. `forced` ``[B, T]`` feeds these ids instead of the greedy ones. `observe` is called after each stage.
        `image_inputs`: what the image stages take beside pixel_values. Where images lie outside the text: `images` of
        each prompt, if not as many as its markers; `tiles` of each image that count; `num_previous_images`: markers
        before each prompt.
        """
        self._needs_weights()
        interpreter = Interpreter(
            self.stages, self.schedules.text, self.weights, self.state, self.info, bool(self.schedules.image)
        )
        return interpreter.run(
            prompts,
            pixel_values,
            max_new_tokens,
            forced,
            ignore_eos,
            observe,
            images,
            image_inputs,
            num_previous_images,
            tiles,
        )

    def generate_images(
        self,
        prompts: list[list[int]],
        noise: Tensor,
        plan: Any = None,
        observe: Callable[[str, Call, dict[str, Tensor], Chunk | None], None] | None = None,
    ) -> dict[str, Any]:
        """Paint an image for each prompt (ids, the last of which gives way to the time) from its own noise.

        noise ``[G, c, h, w]`` float32; plan: a `mmopt.spec.solvers.FlowPlan`, by default the reference's steps. Returns
        ``latents`` and, where the model has a decoder of images, ``image`` ``[G, 3, H, W]`` (about -1 to 1), also
        ``trajectory``: the latents after each evaluation.
        """
        if not self.schedules.image:
            raise ValueError(f"{self.info.family} generates no images")
        self._needs_weights()
        return generate_images(partial(self.flow_sampler, observe=observe), self.info, prompts, noise, plan)

    def flow_sampler(
        self, samples: Samples, plan: FlowPlan, trips: Any = None, observe: Any = None, gradients: bool = False
    ) -> FlowSampler:
        """What runs the image schedule on samples; `gradients` as in `Stage.run`, `trips` as in `FlowSampler`."""
        own = (self.stages, self.schedules.image, self.weights, self.state, self.info)
        return flow_sampler(*own, samples, plan, trips, observe, gradients)

    def as_frames(self, pixel_values: Tensor) -> Tensor:
        """Images as videos of one frame, if the image stages take videos. ValueError if there are too many frames."""
        return as_frames(self.stages, self.info, pixel_values)

    def _needs_weights(self) -> None:
        if not self.has_weights:
            raise ValueError("this Program has shapes only, no weights: it can be optimized and inspected, not run")
