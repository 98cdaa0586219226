"""Run a recorded case on a Program or on an engine, and lay what comes out of a run beside the recording."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmopt.conformance.case import Case
from mmopt.conformance.read_cross import tensors
from mmopt.conformance.read_inline import IGNORE
from mmopt.ir.program import Program
from mmopt.processing.image_processor import IMAGE_MODES, ImageProcessor
from mmopt.spec.schedule import Call

Pairs = dict[str, tuple[Tensor, Tensor]]  # output name -> (ours, recorded), of equal shape if all is well
Values = Mapping[str, str | tuple[str, int]]
CACHE = re.compile(r"out\.(greedy\.final_)?kv_cache\.(\d+)\.(key|value)")


@dataclass
class Run:
    """What one run made. Rows are real rows in order of the samples; caches are ``[B, kv_heads, slots, head_dim]``."""

    embeds: list[Tensor] = field(default_factory=list)  # for each sample [rows, hidden]
    logits: list[Tensor] = field(default_factory=list)  # for each sample [rows, vocab], or the last row alone
    steps: Tensor | None = None  # [B, steps, vocab]: the logits that chose each new token
    ids: Tensor | None = None  # [B, steps]
    steps_nocache: Tensor | None = None  # the same without a cache, where that makes a difference
    ids_nocache: Tensor | None = None
    fed: Tensor | None = None  # [B, n, vocab]: logits of the ids that are fed after the prompt
    caches: dict[str, Tensor] = field(default_factory=dict)
    final_caches: dict[str, Tensor] = field(default_factory=dict)
    image_rows: Tensor | None = None  # [used images, rows, hidden]
    values: dict[str, Tensor] = field(default_factory=dict)  # of image stages, and the embedded rows of the text


# ------------------------------------------------------------------------------------------------------- the points
def at_program(program: Program, case: Case, forced: bool, all_rows: bool, values: Values) -> Pairs:
    """A Program on the prompts. `all_rows`: its logits hold all rows; after passes they hold the last one.

    values: recorded name -> value of a Program, see `mmopt.models._family.Cases`.
    """
    if not case.is_prompt:
        return value_pairs(case, encode(program, case.pixel_values), values)
    run, embeds, logits, steps = Run(), defaultdict(list), defaultdict(list), []

    def observe(phase: str, call: Call, made: dict[str, Tensor], chunk: Any) -> None:
        if not phase:
            run.values.update(made)
        if "image_rows" in made:
            run.image_rows = made["image_rows"]
        if chunk is not None and "text" in made:
            if chunk.images and not case.sights:
                assert run.image_rows is not None
                embeds[chunk.sample].append(run.image_rows[list(chunk.images)].flatten(0, 1))
            embeds[chunk.sample].append(made["text"][0])
        if "logits" in made and chunk is not None:
            logits[chunk.sample].append(made["logits"][0])
        elif "logits" in made:
            steps.append(made["logits"][:, -1])

    trips, ids = to_feed(case, forced)
    made = program(
        prompts=case.prompts,
        pixel_values=case.used_pixels,
        max_new_tokens=trips,
        forced=ids,
        ignore_eos=True,
        observe=observe,
        **(case.sights.call if case.sights else {}),
    )
    samples = range(len(case.prompts))
    run.embeds = [torch.cat(embeds[b]) for b in samples]
    run.logits = [torch.cat(logits[b])[None if all_rows else -1 :] for b in samples]
    run.caches = run.final_caches = {k: v for k, v in made.items() if "_cache." in k}
    if case.sights:
        run.values["text"] = torch.cat(run.embeds)
    if trips:
        keep_steps(case, run, torch.stack([torch.stack([x[-1] for x in run.logits]), *steps], 1), made["tokens"])
    return lay_beside(case, run, all_rows) | value_pairs(case, run.values, values)


def at_engine(engine: Any, case: Case, forced: bool, values: Values) -> Pairs:
    """An `Engine` on the prompts. Of its embeddings only the image rows can be seen."""
    seen = image_values(engine, case, {value_of(values, k) for k in values})
    if not case.is_prompt:
        return value_pairs(case, seen, values)
    trips, ids = to_feed(case, forced)
    call = dict(case.sights.call) if case.sights else {}
    if case.sights:
        call["image_inputs"] = {k: x.numpy() for k, x in case.sights.inputs.items()}
    made = engine.debug.generate_ids(
        case.prompts,
        None if case.used_pixels is None else case.used_pixels.numpy(),
        max_new_tokens=max(trips, 1),
        forced=None if ids is None else ids.numpy(),
        ignore_eos=True,
        logits=True,
        caches=True,
        **call,
    )
    run = Run(logits=[torch.from_numpy(x[:1]) for x in made.logits])
    run.image_rows = None if made.image_embeds is None else torch.from_numpy(made.image_embeds.numpy())
    run.caches = run.final_caches = {k: torch.from_numpy(v) for k, v in made.caches.items()}
    if trips:
        keep_steps(case, run, torch.from_numpy(np.stack(made.logits)), made.tokens)
    return lay_beside(case, run, all_rows=False) | value_pairs(case, seen, values)


def image_values(engine: Any, case: Case, names: set[str]) -> dict[str, Tensor]:
    """What an engine's image stages make of all images of a case, by name."""
    made: dict[str, list[np.ndarray]] = defaultdict(list)
    for i, pixels in enumerate([] if case.pixel_values is None else case.pixel_values.split(1)):
        inputs = {k: x[i : i + 1].numpy() for k, x in case.sights.inputs.items()} if case.sights else {}
        for k, x in engine.decoder.image_values(pixels.numpy(), inputs).items():
            if k in names:
                made[k].append(x.numpy())
    return {k: torch.from_numpy(np.concatenate(x)) for k, x in made.items()}


def to_feed(case: Case, forced: bool) -> tuple[int, Tensor | None]:
    """How many tokens to decode, and the ids to feed in the place of the likeliest ones."""
    if not case.goes_on or case.samples_touch:
        return 0, None
    if case.fed is not None:  # the last one is not fed back
        return case.fed.shape[1] + 1, F.pad(case.fed, (0, 1))
    return case.steps, case.greedy_ids if forced and case.steps else None


def keep_steps(case: Case, run: Run, steps: Tensor, tokens: list[list[int]]) -> None:
    if case.fed is not None:
        run.fed = steps[:, 1:]
    else:
        run.steps, run.ids = steps, torch.tensor(tokens)


def preprocessed(settings: dict, case: Case) -> Pairs:
    """Recorded preprocessing: ``in.NAME_rgb`` -> ``out.NAME_MODE``, or ``out.NAME_own`` in the checkpoint's own mode.

    Mean and deviation are the checkpoint's, or what was said of the picture.
    """
    pairs: Pairs = {}
    for name, pixels in case.pictures.items():
        processor = ImageProcessor.from_json(settings | case.settings.get("pictures", {}).get(name, {}))
        for mode in (*IMAGE_MODES, "own"):
            for k, wanted in case.recorded(f"out.{name}_{mode}").items():
                own = processor.mode if mode == "own" else mode
                made = replace(processor, size=wanted.shape[-1], mode=own)([pixels.numpy()])[0]
                pairs[k] = torch.from_numpy(made), wanted
    return pairs


# ------------------------------------------------------------------------------------------------- laying side by side
def lay_beside(case: Case, run: Run, all_rows: bool) -> Pairs:
    """Pair a run with the recording: real rows only, and nothing that padding made meaningless in the recording."""
    pairs: Pairs = {}
    for mean in ("out.prepare.inputs_embeds", "out.hidden.0"):
        for name, wanted in case.recorded(mean).items():
            if run.embeds:
                pairs[name] = torch.cat(run.embeds), case.real(wanted)
            elif run.image_rows is not None:
                pairs[name] = run.image_rows.flatten(0, 1), wanted[case.valid & (case.image_row >= 0)]
    if case.misled:
        return pairs
    for name, wanted in case.recorded("out.logits").items():
        rows = case.each(wanted)
        pairs[name] = torch.cat(run.logits), torch.cat(rows if all_rows else [r[-1:] for r in rows])
    countable = case.labels is not None and bool((case.labels[~case.valid] == IGNORE).all())  # no padding in the loss
    for name, wanted in case.recorded("out.loss").items() if all_rows and countable else ():
        targets = torch.cat([t[1:] for t in case.each(case.labels)])  # type: ignore[arg-type]
        loss = F.cross_entropy(torch.cat([x[:-1] for x in run.logits]).float(), targets, ignore_index=IGNORE)
        pairs[name] = loss.reshape(wanted.shape), wanted
    for name, wanted in case.outputs.items():
        mean = case.mean(name)
        if m := CACHE.fullmatch(mean):
            if not m[1] or run.steps is not None:
                pairs[name] = cache_pair(case, run, name, bool(m[1]), f"{m[3]}_cache.{m[2]}")
        elif mean.startswith("out.greedy."):
            value = of_steps(case, run, mean)
            if value is not None:
                pairs[name] = case.live(value[:, : wanted.shape[1]]), case.live(wanted)
        elif mean == "out.fed.logits" and run.fed is not None:
            pairs[name] = run.fed, wanted
        elif case.sights and mean.startswith(("out.sight.", "out.fed.time")) and not case.sights.given:
            pairs[name] = sight_pair(case, mean, wanted)
    return pairs


def of_steps(case: Case, run: Run, mean: str) -> Tensor | None:
    """The greedy ids or logits of that meaning. Without a cache the reference may read a new marker otherwise."""
    ids, steps = (run.ids, run.steps)
    if mean.endswith("_nocache") and case.markers_made:
        ids, steps = (run.ids_nocache, run.steps_nocache)
    return ids if "token_ids" in mean else steps


def cache_pair(case: Case, run: Run, name: str, final: bool, key: str) -> tuple[Tensor, Tensor]:
    cache = (run.final_caches if final else run.caches).get(key)
    if cache is None:
        raise ValueError(f"{case.name}: {name} was recorded, but the model has no layer {key.split('.')[1]}")
    lengths = [n + (case.steps - 1 if final else 0) for n in case.valid.sum(1).tolist()]
    theirs = case.outputs[name].transpose(1, 2)
    ours = torch.cat([cache[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])
    return ours, theirs.flatten(0, 1) if final else case.real(theirs)


def sight_pair(case: Case, mean: str, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """What the rows see by their ids, beside what was recorded."""
    sights = case.sights
    assert sights is not None
    beyond = max(sights.images) + 1
    if mean == "out.fed.time":
        assert case.fed is not None
        return torch.tensor([sights.time(r) for r in sights.feed(case.fed)]), wanted.clamp(max=beyond)
    seen, attends, sees = (case.real(x) for x in tensors(sights.rows, case.valid, sights.blocks))
    ours = {
        "out.sight.time": torch.tensor([t for r in sights.rows for t in sights.time(r)]),
        "out.sight.seen": (seen & sees[:, None]).long(),
        "out.sight.blind": (~attends).long(),
        "out.sight.marker": torch.tensor([int(t == sights.image_id) for p in case.prompts for t in p]),
    }[mean]
    theirs = case.real(wanted)
    return ours, theirs.clamp(max=beyond) if mean == "out.sight.time" else theirs.reshape(ours.shape)


def value_of(values: Values, mean: str) -> str:
    """The name of the value of a Program that a recorded name is."""
    given = values.get(mean, "")
    return given if isinstance(given, str) else given[0]


def value_pairs(case: Case, made: dict[str, Tensor], values: Values) -> Pairs:
    """Values of a Program whose names are given, beside what was recorded of them."""
    pairs: Pairs = {}
    for name, wanted in case.outputs.items():
        mean = case.mean(name)
        value = made.get(value_of(values, mean))
        if value is not None and mean in values:
            given = values[mean]
            value = value if isinstance(given, str) else value[:, given[1] :]
            rows = case.real(wanted) if given == "text" else wanted
            pairs[name] = value.reshape(rows.shape) if value.numel() == rows.numel() else value, rows
    return pairs


def encode(program: Program, pixel_values: Tensor | None) -> dict[str, Tensor]:
    """The stages before the prompt, on images alone."""
    values = {}
    if pixel_values is not None:
        values["pixel_values"] = program.as_frames(pixel_values.to(program.dtype))
    for call in program.schedules.text:
        if isinstance(call, Call) and all(call.source(n) in values for n in program.stages[call.stage].inputs):
            stage = program.stages[call.stage]
            made = stage.run(program.weights, {n: values[str(call.source(n))] for n in stage.inputs})
            values |= {call.target(n): v for n, v in made.items()}
    return values
