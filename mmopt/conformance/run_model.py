"""Recorded cases of a loaded model, and runs of them on it: plain PyTorch on full sequences, hooks on its modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmopt.conformance import run_generation as repainting
from mmopt.conformance.case import Case
from mmopt.conformance.read import read_cases
from mmopt.conformance.read_cross import tensors
from mmopt.conformance.run_program import Pairs, Run, lay_beside
from mmopt.frontend.load import Model
from mmopt.models._family import Cases
from mmopt.spec.cross_mask import VisibleTiles


def cases_of(model: Model) -> Cases:
    """How the recordings of a model's family are named."""
    given = model.family.cases
    return given(model.config) if callable(given) else given


def read_model_cases(paths: Iterable[str | Path], model: Model, passed_over: list[str] | None = None) -> list[Case]:
    """`read_cases` for a loaded model."""
    cross = model.family.cross
    outside = None if cross is None else cross(model.config)
    flow = None if model.family.flow is None else (model.family.flow(model.config), model.config.vocab_size)
    stages = model.family.stages(model.module, 1)
    dims = next((len(s.inputs["pixel_values"].shape) for s in stages.values() if "pixel_values" in s.inputs), 4)  # type: ignore[union-attr]
    cases = read_cases(
        paths, model.directory, model.image_id, model.config.tokens_per_image, cases_of(model), outside, dims - 1, flow,
        passed_over,
    )  # fmt: skip
    eos = model.config.eos_token_id
    for case in cases:
        case.eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    return cases


def at_model(model: Model, case: Case, forced: bool) -> Pairs:
    """The plain model on full sequences, with hooks on the modules whose outputs were recorded.

    `forced`: what is decoded goes on from the recorded ids.
    """
    with torch.inference_mode(), Taps(model, case) as taps:
        if case.run is not None:
            made = case.run(model.module)
            return {k: (made[case.mean(k)], x) for k, x in case.outputs.items() if case.mean(k) in made}
        if case.generation is not None:
            pairs = repainting.at_model(model, case)
            return pairs | taps.pairs()
        text = Apart(model, case) if case.sights else Among(model, case)
        run = text.prompt() if case.is_prompt else None
    pairs = {}
    if run is not None:
        with torch.inference_mode():
            text.go_on(run, forced)
        pairs = lay_beside(case, run, all_rows=True)
        made = {"modality_indicators": (case.image_row >= 0).long(), "labels": case.labels, "attention_mask": case.mask}
        if isinstance(text, Among):
            made["inputs_embeds"] = text.embeds
        for name, value in made.items():
            for k, wanted in case.recorded(f"out.prepare.{name}").items():
                if value is not None:
                    pairs[k] = value, wanted
        for k, wanted in case.recorded("out.prepare.position_ids").items():
            pairs[k] = case.real(case.valid.long().cumsum(1) - 1), case.real(wanted)
    return pairs | taps.pairs()


class Among:
    """A batch whose images are rows among those of the text.

    Where the reference masks left padding, the module is told which rows are ``valid`` ``[B, n]``.
    """

    def __init__(self, model: Model, case: Case):
        self.model, self.case, self.table = model, case, table(model)
        self.image_rows = None
        if case.pixel_values is not None:
            self.image_rows = model.module.encode_images(case.pixel_values.to(model.dtype))  # type: ignore[operator]

    def prompt(self) -> Run:
        case = self.case
        embeds = self.table(case.ids)
        if self.image_rows is not None:
            visual = case.image_row >= 0
            embeds[visual] = self.image_rows.flatten(0, 1)[case.image_row[visual]]
        self.embeds = embeds * (~case.filler)[..., None]
        logits, kept = self.forward(self.embeds, case.image_row >= 0)
        return Run(case.each(self.embeds), case.each(logits), caches=split_heads(self.model, kept))

    def forward(self, embeds: Tensor, visual: Tensor) -> tuple[Tensor, list]:
        if not (self.case.left_padding and self.case.padded):
            return self.model.module(embeds, visual)
        return self.model.module(
            embeds, visual, valid=F.pad(self.case.valid, (0, embeds.shape[1] - self.case.valid.shape[1]), value=True)
        )

    def go_on(self, run: Run, forced: bool) -> None:
        """Greedy decoding without a cache: the whole sequence again for each token."""
        case, embeds, visual = self.case, self.embeds, self.case.image_row >= 0
        if not case.steps or not case.goes_on:
            return
        recorded = case.greedy_ids if forced else None
        steps, ids = [], []
        for step in range(case.steps):
            logits, kept = self.forward(embeds, visual)
            steps.append(logits[:, -1])
            ids.append(logits[:, -1].argmax(-1))
            fed = ids[-1] if recorded is None else recorded[:, step]
            embeds = torch.cat([embeds, self.table(fed[:, None])], 1)
            visual = F.pad(visual, (0, 1))
        run.steps, run.ids = torch.stack(steps, 1), torch.stack(ids, 1)
        run.final_caches = split_heads(self.model, kept)


class Apart:
    """A batch whose images lie outside the text."""

    def __init__(self, model: Model, case: Case):
        assert case.sights is not None
        self.model, self.case, self.sights, self.table = model, case, case.sights, table(model)
        language = model.family.stages(model.module, 1)["language_model"].inputs
        self.needs_sees = "sees" in language
        blocks, batch = max(1, self.sights.blocks), len(case.prompts)
        if case.pixel_values is None:
            cross = self.sights.cross
            self.media = torch.zeros(batch, blocks, cross.tokens, cross.width, dtype=model.dtype)
        else:
            inputs = {"pixel_values": case.pixel_values.to(model.dtype), **self.sights.inputs}
            rows = model.module.encode_images(**inputs)  # type: ignore[operator]
            self.media = rows.reshape(batch, blocks, *rows.shape[2:])

    def rows_of(self, more: list[list[VisibleTiles]] | None = None) -> list[list[VisibleTiles]]:
        """What the rows of the prompts see, and then `more`: by the case's own mask if it has one."""
        rows = self.sights.given or self.sights.rows
        return rows if more is None else [a + b for a, b in zip(rows, more, strict=True)]

    def run(self, fed: Tensor, rows: list[list[VisibleTiles]]) -> Tensor:
        """Logits of the prompts with the ids `fed` after them ``[B, S + n, vocab]``."""
        valid = F.pad(self.case.valid, (0, fed.shape[1]), value=True)
        seen, attends, sees = tensors(rows, valid, self.sights.blocks)
        more = {"sees": sees} if self.needs_sees else {}
        embeds = self.table(torch.cat([self.case.ids, fed], 1))
        return self.model.module(embeds, self.media, seen, attends, mask=valid, **more)

    def prompt(self) -> Run:
        return Run(logits=self.case.each(self.run(self.case.ids[:, :0], self.rows_of())))

    def go_on(self, run: Run, forced: bool) -> None:
        case, n = self.case, self.case.ids.shape[1]
        if not case.goes_on:
            return
        if case.fed is not None:
            run.fed = self.run(case.fed, self.rows_of(self.sights.feed(case.fed)))[:, n:]
        if case.steps:
            run.steps, run.ids = self.greedy(forced, self.sights.feed)
            if case.markers_made:
                run.steps_nocache, run.ids_nocache = self.greedy(forced, self.sights.reread)

    def greedy(self, forced: bool, follow: Callable[[Tensor], list[list[VisibleTiles]]]) -> tuple[Tensor, Tensor]:
        """Greedy decoding without a cache; `follow` says what the new ids see."""
        recorded = self.case.greedy_ids if forced else None
        fed, steps, ids = self.case.ids[:, :0], [], []
        for step in range(self.case.steps):
            steps.append(self.run(fed, self.rows_of(follow(fed)))[:, -1])
            ids.append(steps[-1].argmax(-1))
            fed = torch.cat([fed, (ids[-1] if recorded is None else recorded[:, step])[:, None]], 1)
        return torch.stack(steps, 1), torch.stack(ids, 1)


class Taps:
    """Forward hooks on the modules whose outputs (or first inputs) a case recorded; each keeps its first call."""

    def __init__(self, model: Model, case: Case):
        self.case, self.hooks, self.cases = case, [], cases_of(model)
        self.kept: dict[str, Tensor] = {}
        self.language: set[str] = set()
        for taps in (self.cases.vision_taps, self.cases.input_taps, self.cases.language_taps):
            for name in case.outputs:
                path = tapped(case.mean(name), taps)
                of_images = taps is not self.cases.language_taps and not case.generation
                if path is None or (of_images and case.pixel_values is None):
                    continue
                try:
                    module = model.module.get_submodule(path)
                except AttributeError as e:
                    raise ValueError(f"{case.name}: {name} was recorded, but the model has no module {path}") from e
                if taps is self.cases.language_taps:
                    self.language.add(name)
                first_input = taps is self.cases.input_taps
                self.hooks.append(module.register_forward_hook(self.keep(name, first_input)))

    def keep(self, name: str, first_input: bool) -> Callable:
        def hook(module: Any, args: tuple, output: Tensor) -> None:
            self.kept.setdefault(name, args[0] if first_input else output)

        return hook

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def pairs(self) -> Pairs:
        """Rows of the language model are compared where they are real, and not at all where the reference was misled.

        What the reference recorded before it zeroed rows that see nothing is compared in the other rows.
        """
        pairs: Pairs = {}
        for name, value in self.kept.items():
            wanted = self.case.outputs[name]
            if name not in self.language:
                pairs[name] = value, grouped(wanted, value)
            elif not self.case.misled:
                ours, theirs = self.case.real(value), self.case.real(wanted)
                if self.case.sights and is_zeroed(self.case.mean(name), self.cases.zeroed):
                    rows = self.case.sights.given or self.case.sights.rows
                    attends = torch.tensor([r is not None for sample in rows for r in sample])
                    ours, theirs = ours[attends], theirs[attends]
                pairs[name] = ours, theirs
        return pairs


def grouped(wanted: Tensor, ours: Tensor) -> Tensor:
    """A value of images, recorded ``[B, images, ...]``, as ``[N, ...]``."""
    more = wanted.dim() - ours.dim()
    return wanted.flatten(0, more) if more > 0 else wanted


def is_zeroed(name: str, templates: tuple[str, ...]) -> bool:
    return tapped(name, dict.fromkeys(templates, "")) is not None


def tapped(name: str, taps: dict[str, str]) -> str | None:
    """The module path of a recorded name: ``{}`` in a template stands for an index, ``{+1}`` for the index plus one."""
    for template, path in taps.items():
        pattern = re.escape(template).replace(r"\{\}", r"(\d+)").replace(r"\{\+1\}", r"(\d+)")
        if m := re.fullmatch(pattern, name):
            index = int(m[1]) - ("{+1}" in template) if m.groups() else 0
            if index >= 0:
                return path.format(index)
    return None


def table(model: Model) -> Any:
    """ids -> embeddings."""
    return model.family.stages(model.module, 1)["embed"].module


def split_heads(model: Model, kept: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    caches = {}
    for i, rows in enumerate(kept):
        for kind, x in zip(("key", "value"), rows, strict=True):
            caches[f"{kind}_cache.{i}"] = x.unflatten(2, (model.config.num_key_value_heads, -1)).transpose(1, 2)
    return caches
