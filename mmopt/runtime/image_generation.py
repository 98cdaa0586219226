"""Paints with an engine: the image schedule on ONNX Runtime sessions, latents and solver in numpy on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from mmopt.runtime.decoder import Decoder
from mmopt.runtime.session import StageSession
from mmopt.runtime.tensor import Tensor, from_bits
from mmopt.spec.errors import EngineError
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.flow_sampler import FlowSampler, Samples, lay_out, levels, plan_of
from mmopt.spec.manifest import Manifest
from mmopt.spec.schedule import is_cache


@dataclass(frozen=True, eq=False)
class GeneratedImages(Sequence[Image.Image]):
    """What an engine generated: a sequence of pictures of 8 bits, and the numbers they are made from.

    latents ``[G, c, h, w]`` float32; pixels ``[G, 3, H, W]`` float32, about -1 to 1, not clipped (None without a
    decoder of images); trajectory: the latents after each evaluation, where asked for.
    """

    latents: np.ndarray
    pixels: np.ndarray | None
    plan: FlowPlan
    trajectory: list[np.ndarray] | None = None

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """See `mmopt.spec.flow_sampler.levels`. EngineError if the engine has no decoder of images."""
        if self.pixels is None:
            raise EngineError("this engine has no decoder of images: export it from a checkpoint with its VAE")
        return [Image.fromarray(np.ascontiguousarray(x)) for x in levels(self.pixels)]

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, i: Any) -> Any:
        return self.pictures[i]


class EngineFlowSampler(FlowSampler):
    """Values are numpy arrays as they are stored (bfloat16 as its bits); caches stay in the memory of the device."""

    def __init__(
        self,
        decoder: Decoder,
        manifest: Manifest,
        samples: Samples,
        plan: FlowPlan,
        trips: Any = None,
        observe: Any = None,
    ):
        listed = manifest.stages
        inputs = {k: {i: x.shape for i, x in s.inputs.items()} for k, s in listed.items()}
        super().__init__(manifest.schedules.image, inputs, samples, plan, trips)
        self.observe = observe
        self.decoder, self.one_sample = decoder, {k for k, s in listed.items() if s.one_sample}
        self.info, both = manifest.info, 2 * self.count
        model = decoder.language
        self.cached = [k for k in model.inputs if is_cache(k)]
        self.caches = {
            k: Tensor.zeros((both, *model.inputs[k].sizes()), model.inputs[k].dtype, model.device) for k in self.cached
        }
        self.values |= samples.values()
        times = np.asarray(plan.times * self.info.required_flow.time_scale, np.float32)
        bits = Tensor.zeros((both, 0, self.info.hidden_size), decoder.dtype).owner
        self.values |= {"steps.time": times, "no_rows": bits}

    def cat(self, parts: list[np.ndarray], dim: int) -> np.ndarray:
        return np.concatenate(parts, dim)

    def expand(self, x: np.ndarray, samples: int) -> np.ndarray:
        return np.broadcast_to(x, (samples, *x.shape[1:]))

    def _read(self, source: Any) -> Any:
        if isinstance(source, str) and is_cache(name := ".".join(source.split(".")[-2:])):
            return self.caches[name][: self.lanes]  # one memory, whatever the value is called before that
        return super()._read(source)

    def run_stage(self, call: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        made = self._run(call, inputs)
        if self.observe:
            self.observe("paint", call, made, None)
        return made

    def _run(self, call: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        stage = self.decoder.stages[call.stage]
        given = {k: _memory(stage, k, x) for k, x in inputs.items()}
        if not any(k in self.cached for k in stage.inputs):
            made = {k: stage.empty(k, given) for k in stage.outputs}
            stage.bind(given, made).run()
            return {k: _stored(t) for k, t in made.items()}
        made = {k: given[k] if k in self.cached else stage.empty(k, given) for k in stage.outputs}
        if call.stage not in self.one_sample or self.lanes == 1:
            stage.bind(given, made).run()
        else:
            self._lane_by_lane(call, stage, given, made)
        return {k: _stored(t) for k, t in made.items() if k not in self.cached}

    def _lane_by_lane(self, call: Any, stage: StageSession, given: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        """Each sample through its own lane of the caches. Rows of padding after a prompt are not fed, and a prompt that
        an earlier lane holds is copied from there."""
        prompt = "prompt.text" in call.sources("text") and self.info.required_flow.compact
        held: dict[bytes, int] = {}
        for b in range(given["past"].shape[0]):
            own = {k: t[b : b + 1] for k, t in given.items()}
            out = {k: t[b : b + 1] for k, t in made.items()}
            if prompt:
                rows = int(self.samples.end[b])
                key = self.samples.ids[b, :rows].tobytes()
                if (first := held.setdefault(key, b)) != b and stage.device == "cpu":
                    for t in self.caches.values():
                        t.owner[b, :, :rows] = t.owner[first, :, :rows]
                    continue
                own["text"] = Tensor((1, rows, own["text"].shape[2]), *_place(own["text"]))
                out["hidden"] = stage.empty("hidden", own)
            stage.bind(own, out).run()


def _place(t: Tensor) -> tuple[str, int, str, Any]:
    return t.dtype, t.pointer, t.device, t.owner


def _memory(stage: StageSession, name: str, x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor.of(x, stage.inputs[name].dtype, stage.device)


def _stored(t: Tensor) -> np.ndarray:
    return t.owner if isinstance(t.owner, np.ndarray) else t.owner.numpy()


@contextmanager
def shown(progress: bool | Callable[[int, int], None], total: int) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr for True, else the given function or nothing."""
    if progress is not True:
        yield progress or None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("painting", total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def generate_images(
    decoder: Decoder,
    manifest: Manifest,
    prompts: Sequence[Sequence[int]],
    noise: np.ndarray,
    plan: FlowPlan | None = None,
    trajectory: bool = False,
    progress: Callable[[int, int], None] | None = None,
    observe: Callable[[str, Any, dict[str, Any], None], None] | None = None,
) -> GeneratedImages:
    """Paint an image for each prompt of ids from its own noise ``[G, c, h, w]``, ``info.batch`` at once.

    `progress` is told how many evaluations are done, and of how many. `observe` is called after each stage, as that of
    `Program.generate_images`, with arrays. Raises EngineError for a wrong prompt or noise.
    """
    info = manifest.info
    assert info.flow is not None
    latents = tuple(info.flow.latents)
    if not isinstance(noise, np.ndarray):
        raise EngineError(f"noise is {type(noise).__name__}, expected an array of numpy")
    if noise.shape != (len(prompts), *latents) or noise.dtype != np.float32:
        raise EngineError(
            f"noise is {noise.dtype} of shape {noise.shape}, expected float32 of shape {(len(prompts), *latents)}"
        )
    try:
        lay_out(prompts, info.required_flow, info.context, info.vocab_size)
    except ValueError as e:
        raise EngineError(str(e)) from e
    plan, size = plan_of(plan, info), info.batch
    groups = range(0, len(prompts), size)
    kept: list[list[np.ndarray]] = [[] for _ in groups]
    latents_made, pixels_made = [], []
    for i, first in enumerate(groups):
        part = slice(first, first + size)

        def after(trip: int, z: np.ndarray, i: int = i) -> None:
            if trajectory:
                kept[i].append(z)
            if progress:
                progress(i * plan.evaluations + trip + 1, len(groups) * plan.evaluations)

        sampler = EngineFlowSampler(
            decoder,
            manifest,
            lay_out(prompts[part], info.required_flow, info.context, info.vocab_size),
            plan,
            after,
            observe,
        )
        latents_made.append(sampler.sample(noise[part]))
        if "image" in sampler.values:
            dtype = manifest.stages["decode_image"].outputs["image"].dtype
            pixels_made.append(from_bits(sampler.values["image"], dtype))
    return GeneratedImages(
        np.concatenate(latents_made),
        np.concatenate(pixels_made) if pixels_made else None,
        plan,
        [np.concatenate(z) for z in zip(*kept, strict=True)] if trajectory else None,
    )
