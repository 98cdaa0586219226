"""What the page of benchmarks says of each kind of result: what it is, what it measures, how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tables_flow
import tables_speed
import tables_tokens

ENGINE = ("exporters", "mmopt/ir", "mmopt/models", "mmopt/rewrite", "mmopt/runtime", "passes")
TOKENS = (*ENGINE, "mmopt/pruning")
BASELINES = ("mmopt/measure/baselines.py", "mmopt/measure/torch_stages.py")
GENERATION = ("mmopt/spec/flow_plan.py", "mmopt/spec/flow_sampler.py", "mmopt/spec/solvers.py")
FLOW = (*GENERATION, "examples/checkpoints", "mmopt/flow", "mmopt/models")


@dataclass(frozen=True)
class Kind:
    """title and text: of its section. paths: of the code it measures. write: results by config -> lines of Markdown."""

    title: str
    paths: tuple[str, ...]
    write: Callable[[dict[str, dict[str, Any]]], list[str]]
    text: str


KINDS = {
    "stages": Kind(
        "Stages of a model", (*ENGINE, *BASELINES), tables_speed.stages,
        "Eager, compiled, optimized and engine in interleaved rounds of one process; "
        "minimum and, in brackets, median. `eager` is the better of two plain PyTorch baselines (routing as the "
        "reference does; branches on known rows), both with caches written in place; `compiled` is that one through "
        "`torch.compile` with freezing; `optimized` are the optimized graphs in PyTorch. Ratios are of the minima: "
        "PyTorch suffers most from a busy machine.",
    ),
    "few-shot": Kind(
        "Few-shot prompts", (*ENGINE, *BASELINES), tables_speed.fewshot,
        "Interleaved rounds of one process, decode 16 tokens in a row; minimum and, in "
        "brackets, median. `passes off` is the Program as traced, in the same runtime; `mask kept` has one mask "
        "over all images in place of a segment for each; a prompt of k shots has k + 1 images and 20 tokens of text "
        "for each. Off over on: of the minima, and the median of the rounds. Decode reads weights, so it goes with "
        "the memory.",
    ),
    "passes off and on": Kind(
        "Passes off and on, as deployed", ENGINE, tables_speed.off_and_on,
        "Decode of few-shot prompts by engines in processes that hold nothing else, several processes one after the "
        "other, in each of which the two engines take turns: median of the processes, and from the least to the "
        "largest.",
    ),
    "against the library": Kind(
        "Against the transformers library's own `generate`", ENGINE, tables_speed.against_library,
        "The same weights and the same ids, paired rounds in one process; the library runs its sdpa attention with "
        "its default cache. Minimum and, in brackets, median; the ratio is of the minima.",
    ),
    "image generation": Kind(
        "Image generation", (*ENGINE, *GENERATION), tables_speed.image_generation,
        "One image end to end in ONNX Runtime, its VAE included; minimum and, in brackets, median. `official` is "
        "the Program as traced: each step reads the prompt again, as the reference does (its cache is never "
        "filled); `prefix cached` reads it once. Forwards: passes of the network, two for a guided step. "
        "Times as fast: of the minima, and the median of the rounds. Exact passes give the same image up to "
        "rounding; fewer steps drift, see below.",
    ),
    "threads": Kind(
        "Threads that stop", ENGINE, tables_speed.threads,
        "Each stage has threads of its own, which ONNX Runtime lets spin on for a while after a call, where the "
        "next stage needs the cores. Engines tell them to stop. Processes take turns; medians, and the ratios of "
        "processes one after the other, from the least to the largest.",
    ),
    "composition of passes": Kind(
        "All passes in one call", TOKENS, tables_speed.composition,
        "What each kind of pass adds to those before it: a row is one `mmopt.optimize` call and one exported "
        "engine. Random weights, interleaved rounds; minimum and, in brackets, median; x: times as "
        "fast as nothing, x own: as the row above, medians of the paired rounds. Engines of exact passes gave the "
        "logits and images of the first row, those with fewer tokens the logits of their Program in PyTorch, or "
        "they would not have been timed.",
    ),
    "compression speed": Kind(
        "Fewer visual tokens: time to the first token", TOKENS, tables_tokens.speed,
        "Random weights, exported engines; times as fast as with all tokens, median of the paired "
        "rounds (by minima), what choosing costs included. Sites: `pixels` is a smaller image, `vision.4` lies "
        "after the fourth attention of a stage `vision`, `vision.all` after each of them in turn, `vision` where "
        "tokens leave the stage.",
    ),
    "compression quality": Kind(
        "Fewer visual tokens: right answers, and time for them",
        (*TOKENS, "examples/checkpoints"), tables_tokens.quality,
        "Trained checkpoints, held-out pictures, exported engines: the share of right answers by site, tokens kept "
        r"and method; \* where the 95 % interval of the paired difference to all tokens excludes zero. Times: the "
        "same engines on 16 samples in a row, median of rounds in which all take turns, quartiles in brackets; "
        "shown is what no other beats (more right in no more time, or less time for no fewer), the default and the "
        "smaller image. The models are so small that choosing costs about what it saves; what larger ones gain "
        "stands in the section above.",
    ),
    "flow frontier": Kind(
        "Fewer flow steps: drift", FLOW, tables_flow.frontier,
        "A trained checkpoint: distance of the latents from a fine solution of the same noise, relative to their "
        "size; mean and, in brackets, 90th percentile over noises and captions that no fit has seen. Bold is the "
        "least at so many steps.",
    ),
    "flow quality": Kind(
        "Fewer flow steps: pictures", FLOW, tables_flow.quality,
        "The same checkpoint: drift as above, PSNR of the pictures to those of the fine solution, the share that an "
        "independent judge finds to be as asked, and the Fréchet distance in its features to real pictures (biased "
        "upwards for few pictures, the same for each row).",
    ),
    "flow block cache": Kind(
        "Fewer flow steps: keeping what a layer adds", FLOW, tables_flow.block_cache,
        "Layers left out where it costs least, with the plan fitted to that model; the saving is of the work that "
        "plans for the whole model need for the same drift, below zero where they need less. It is not built in.",
    ),
}  # fmt: skip
