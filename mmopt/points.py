"""Run a recorded case on the loaded model, on a Program or on an engine; lay what comes out beside the recording."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmopt.checkpoint import Model
from mmopt.processing import IMAGE_MODES, ImageProcessor
from mmopt.program import Call, Program
from mmopt.recorded import IGNORE, Case

Pairs = dict[str, tuple[Tensor, Tensor]]  # output name -> (ours, recorded), of equal shape if all is well
CACHE = re.compile(r"out\.(greedy\.final_)?kv_cache\.(\d+)\.(key|value)")
# Recorded results of the image stages -> the Program's value of the same meaning.
IMAGE_VALUES = {"out.vision.last_hidden_state": "vision_rows", "out.abstractor.last_hidden_state": "image_rows"}


@dataclass
class Run:
    """What one run made. Rows are real rows in order of the samples; caches are ``[B, kv_heads, slots, head_dim]``."""

    embeds: list[Tensor] = field(default_factory=list)  # for each sample [rows, hidden]
    logits: list[Tensor] = field(default_factory=list)  # for each sample [rows, vocab], or the last row alone
    steps: Tensor | None = None  # [B, steps, vocab]: the logits that chose each new token
    ids: Tensor | None = None  # [B, steps]
    caches: dict[str, Tensor] = field(default_factory=dict)
    final_caches: dict[str, Tensor] = field(default_factory=dict)
    image_rows: Tensor | None = None  # [used images, rows, hidden]


# ------------------------------------------------------------------------------------------------------- the points
def at_model(model: Model, case: Case, forced: bool) -> Pairs:
    """The plain model on full sequences, with hooks on the modules whose outputs were recorded."""
    pairs: Pairs = {}
    with torch.inference_mode(), Taps(model, case) as taps:
        if case.pixel_values is not None:
            image_rows = model.module.encode_images(case.pixel_values.to(model.dtype))  # type: ignore[operator]
        else:
            image_rows = None
        if case.is_prompt:
            embeds = embed(model, case, image_rows)
            logits, kept = model.module(embeds, case.image_row >= 0)
    with torch.inference_mode():
        if case.is_prompt:
            run = Run(embeds=case.each(embeds), logits=case.each(logits), caches=split_heads(model, kept))
            if case.steps and not case.padded:
                decode(model, case, embeds, run, forced)
            pairs = lay_beside(case, run, all_rows=True)
            made = {"inputs_embeds": embeds, "modality_indicators": (case.image_row >= 0).long(), "labels": case.labels}
            for name, value in {**made, "attention_mask": case.mask}.items():
                if (wanted := case.outputs.get(f"out.prepare.{name}")) is not None and value is not None:
                    pairs[f"out.prepare.{name}"] = value, wanted
    return pairs | taps.pairs()


def at_program(program: Program, case: Case, forced: bool, all_rows: bool) -> Pairs:
    """A Program on the prompts. `all_rows`: its logits hold all rows; after passes they hold the last one."""
    if not case.is_prompt:
        return image_pairs(case, encode(program, case.pixel_values))
    run, embeds, logits, steps = Run(), defaultdict(list), defaultdict(list), []

    def observe(phase: str, call: Call, made: dict[str, Tensor], chunk: Any) -> None:
        if "image_rows" in made:
            run.image_rows = made["image_rows"]
        if chunk is not None and "text" in made:
            if chunk.images:
                assert run.image_rows is not None
                embeds[chunk.sample].append(run.image_rows[list(chunk.images)].flatten(0, 1))
            embeds[chunk.sample].append(made["text"][0])
        if "logits" in made and chunk is not None:
            logits[chunk.sample].append(made["logits"][0])
        elif "logits" in made:
            steps.append(made["logits"][:, -1])

    trips = 0 if case.padded else case.steps
    values = program(
        prompts=case.prompts,
        pixel_values=case.used_pixels,
        max_new_tokens=trips,
        forced=case.outputs.get("out.greedy.token_ids") if forced and trips else None,
        ignore_eos=True,
        observe=observe,
    )
    samples = range(len(case.prompts))
    run.embeds = [torch.cat(embeds[b]) for b in samples]
    run.logits = [torch.cat(logits[b])[None if all_rows else -1 :] for b in samples]
    run.caches = run.final_caches = {k: v for k, v in values.items() if "_cache." in k}
    if trips:
        run.steps = torch.stack([torch.stack([x[-1] for x in run.logits]), *steps], 1)
        run.ids = torch.tensor(values["tokens"])
    return lay_beside(case, run, all_rows)


def at_engine(engine: Any, case: Case) -> Pairs:
    """An `Engine` on the prompts. Of its embeddings only the image rows can be seen."""
    pixels = case.used_pixels if case.is_prompt else case.pixel_values
    image_rows = None if pixels is None else engine.encode_images(pixels.numpy())
    seen = None if image_rows is None else torch.from_numpy(image_rows.numpy())
    if not case.is_prompt:
        return image_pairs(case, {} if seen is None else {"image_rows": seen})
    trips = 0 if case.padded else case.steps
    made = engine.run_ids(
        case.prompts, image_rows=image_rows, max_new_tokens=max(trips, 1), ignore_eos=True, logits=True, caches=True
    )
    run = Run(image_rows=seen, logits=[torch.from_numpy(x[:1]) for x in made.logits])
    run.caches = run.final_caches = {k: torch.from_numpy(v) for k, v in made.caches.items()}
    if trips:
        run.steps = torch.stack([torch.from_numpy(x) for x in made.logits])
        run.ids = torch.tensor(made.tokens)
    return lay_beside(case, run, all_rows=False)


def preprocessed(settings: dict, case: Case) -> Pairs:
    """Recorded preprocessing: ``in.NAME_rgb`` -> ``out.NAME_MODE``, with the checkpoint's mean and deviation."""
    pairs: Pairs = {}
    processor = ImageProcessor.from_json(settings)
    for name, pixels in case.pictures.items():
        for mode in IMAGE_MODES:
            wanted = case.outputs.get(f"out.{name}_{mode}")
            if wanted is not None:
                made = replace(processor, size=wanted.shape[-1], mode=mode)([pixels.numpy()])[0]
                pairs[f"out.{name}_{mode}"] = torch.from_numpy(made), wanted
    return pairs


# ------------------------------------------------------------------------------------------------- laying side by side
def lay_beside(case: Case, run: Run, all_rows: bool) -> Pairs:
    """Pair a run with the recording: real rows only, and nothing that padding made meaningless in the recording."""
    pairs: Pairs = {}
    wanted = case.outputs
    for name in ("out.prepare.inputs_embeds", "out.hidden.0"):
        if name in wanted and run.embeds:
            pairs[name] = torch.cat(run.embeds), case.real(wanted[name])
        elif name in wanted and run.image_rows is not None:
            pairs[name] = run.image_rows.flatten(0, 1), wanted[name][case.valid & (case.image_row >= 0)]
    if case.left_padded:
        return pairs
    if "out.logits" in wanted:
        rows = case.each(wanted["out.logits"])
        pairs["out.logits"] = torch.cat(run.logits), torch.cat(rows if all_rows else [r[-1:] for r in rows])
    countable = case.labels is not None and bool((case.labels[~case.valid] == IGNORE).all())  # no padding in the loss
    if "out.loss" in wanted and all_rows and countable:
        targets = torch.cat([t[1:] for t in case.each(case.labels)])
        loss = F.cross_entropy(torch.cat([x[:-1] for x in run.logits]).float(), targets, ignore_index=IGNORE)
        pairs["out.loss"] = loss.reshape(wanted["out.loss"].shape), wanted["out.loss"]
    for name, value in (("token_ids", run.ids), ("step_logits_cached", run.steps), ("step_logits_nocache", run.steps)):
        if f"out.greedy.{name}" in wanted and value is not None:
            pairs[f"out.greedy.{name}"] = value, wanted[f"out.greedy.{name}"]
    for name, recorded in wanted.items():
        if not (m := CACHE.fullmatch(name)) or (m[1] and run.steps is None):
            continue
        cache = (run.final_caches if m[1] else run.caches).get(f"{m[3]}_cache.{m[2]}")
        if cache is None:
            raise ValueError(f"{case.name}: {name} was recorded, but the model has no layer {m[2]}")
        lengths = [n + (case.steps - 1 if m[1] else 0) for n in case.valid.sum(1).tolist()]
        theirs = recorded.transpose(1, 2)
        ours = torch.cat([cache[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])
        pairs[name] = ours, theirs.flatten(0, 1) if m[1] else case.real(theirs)
    return pairs


def image_pairs(case: Case, values: dict[str, Tensor]) -> Pairs:
    return {k: (values[v], case.outputs[k]) for k, v in IMAGE_VALUES.items() if k in case.outputs and v in values}


# ------------------------------------------------------------------------------------------------------- model pieces
class Taps:
    """Forward hooks on the modules whose outputs (or first inputs) a case recorded; each keeps its first call."""

    def __init__(self, model: Model, case: Case):
        self.case, self.hooks = case, []
        self.kept: dict[str, Tensor] = {}
        cases = model.family.cases
        self.language: set[str] = set()
        for taps in (cases.vision_taps, cases.input_taps, cases.language_taps):
            for name in case.outputs:
                path = tapped(name, taps)
                if path is None or (taps is not cases.language_taps and case.pixel_values is None):
                    continue
                try:
                    module = model.module.get_submodule(path)
                except AttributeError as e:
                    raise ValueError(f"{case.name}: {name} was recorded, but the model has no module {path}") from e
                if taps is cases.language_taps:
                    self.language.add(name)
                self.hooks.append(module.register_forward_hook(self.keep(name, first_input=taps is cases.input_taps)))

    def keep(self, name: str, first_input: bool) -> Callable:
        def hook(module, args, output):
            self.kept.setdefault(name, args[0] if first_input else output)

        return hook

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def pairs(self) -> Pairs:
        """Rows of the language model are compared where they are real, and not at all under left padding."""
        pairs: Pairs = {}
        for name, value in self.kept.items():
            wanted = self.case.outputs[name]
            if name not in self.language:
                pairs[name] = value, wanted
            elif not self.case.left_padded:
                pairs[name] = self.case.real(value), self.case.real(wanted)
        return pairs


def tapped(name: str, taps: dict[str, str]) -> str | None:
    """The module path of a recorded name: ``{}`` in a template stands for an index, ``{+1}`` for the index plus one."""
    for template, path in taps.items():
        pattern = re.escape(template).replace(r"\{\}", r"(\d+)").replace(r"\{\+1\}", r"(\d+)")
        if m := re.fullmatch(pattern, name):
            index = int(m[1]) - ("{+1}" in template) if m.groups() else 0
            if index >= 0:
                return path.format(index)
    return None


def embed(model: Model, case: Case, image_rows: Tensor | None) -> Tensor:
    """The expanded batch ``[B, S, hidden]``: token rows, image rows, and zeros right of each sample's end."""
    table = model.family.stages(model.module, 1)["embed"].module
    embeds = table(case.ids)
    if image_rows is not None:
        visual = case.image_row >= 0
        embeds[visual] = image_rows.flatten(0, 1)[case.image_row[visual]]
    return embeds * (~case.filler)[..., None]


def split_heads(model: Model, kept: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    caches = {}
    for i, rows in enumerate(kept):
        for kind, x in zip(("key", "value"), rows, strict=True):
            caches[f"{kind}_cache.{i}"] = x.unflatten(2, (model.config.num_key_value_heads, -1)).transpose(1, 2)
    return caches


def decode(model: Model, case: Case, embeds: Tensor, run: Run, forced: bool) -> None:
    """Greedy decoding without a cache: the whole sequence again for each token."""
    table = model.family.stages(model.module, 1)["embed"].module
    recorded = case.outputs.get("out.greedy.token_ids") if forced else None
    visual = case.image_row >= 0
    steps, ids = [], []
    for step in range(case.steps):
        logits, kept = model.module(embeds, visual)
        steps.append(logits[:, -1])
        ids.append(logits[:, -1].argmax(-1))
        fed = ids[-1] if recorded is None else recorded[:, step]
        embeds = torch.cat([embeds, table(fed[:, None])], 1)
        visual = F.pad(visual, (0, 1))
    run.steps, run.ids, run.final_caches = torch.stack(steps, 1), torch.stack(ids, 1), split_heads(model, kept)


def encode(program: Program, pixel_values: Tensor | None) -> dict[str, Tensor]:
    """The stages before the prompt, on images alone."""
    values = {} if pixel_values is None else {"pixel_values": pixel_values.to(program.info["torch_dtype"])}
    for call in program.schedule:
        if isinstance(call, Call) and all(call.rename.get(n, n) in values for n in program.stages[call.stage].inputs):
            stage = program.stages[call.stage]
            made = stage.run(program.weights, {n: values[call.rename.get(n, n)] for n in stage.inputs})
            values |= {call.rename.get(n, n): v for n, v in made.items()}
    return values
