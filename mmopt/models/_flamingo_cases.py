"""How recorded runs of OpenFlamingo are named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmopt.ir.capture import StageSpec, TensorSpec
from mmopt.models._decoders import KINDS
from mmopt.models._family import Cases, Recording

VISION_TAPS = {
    "act.vit.block{}": "vision_encoder.transformer.resblocks.{}",
    "act.vit.tokens": "vision_encoder",
    "act.vit.tokens_ln_post": "vision_encoder.ln_post",
    "act.perceiver.layer{}.attn_out": "perceiver.layers.{}.0",
    "act.perceiver.layer{}.ff_out": "perceiver.layers.{}.1",
    "act.perceiver.out": "perceiver",
}
LANGUAGE_TAPS = {  # below `lang_encoder`
    "act.lm.embed": "{embed}",
    "act.xattn{}.attn_pregate": "{blocks}.{}.gated_cross_attn_layer.attn",
    "act.xattn{}.ff_pregate": "{blocks}.{}.gated_cross_attn_layer.ff",
    "act.xattn{}.out": "{blocks}.{}.gated_cross_attn_layer",
    "act.lm.layer{}.out": "{blocks}.{}.decoder_layer",
    "act.lm.final_norm": "{norm}",
}
FORWARD = Recording(
    {
        "vision_x": "in.pixel_values",
        "lang_x": "in.input_ids",
        "attention_mask": "in.attention_mask",
        "logits": "out.logits",
        "act.*": "act.*",
        "generated_ids_*": "out.greedy.token_ids_*",
        "gen_logits_*": "out.greedy.step_logits_*",
        "mask.text_time": "out.sight.time",
        "mask.text_to_image_mask": "out.sight.seen",
        "mask.row_without_media": "out.sight.blind",
        "mask.media_locations": "out.sight.marker",
    },
    needs=("in.input_ids",),
)
FED = Recording(  # a prompt, then ids fed on top of its cache
    {
        "vision_x": "in.pixel_values",
        "prompt_lang_x": "in.input_ids",
        "prompt_logits": "out.logits",
        "continuation_lang_x": "in.fed_ids",
        "text_only_logits_with_past_*": "out.fed.logits",
        "decode_ids": "in.fed_ids",
        "decode_logits": "out.fed.logits",
        "decode_text_time": "out.fed.time",
    },
    needs=("in.input_ids", "in.fed_ids"),
)
NO_PAST = Recording(  # the images of a prompt are there, but the text starts anew
    {
        "vision_x": "in.pixel_values",
        "prompt_lang_x": "in.before_ids",
        "continuation_lang_x": "in.input_ids",
        "text_only_logits_no_past": "out.logits",
        "use_cached_text_time": "out.sight.time",
        "no_past.*": "*",
    },
    needs=("in.before_ids", "in.input_ids"),
)
WHOLE = Recording(
    {
        "vision_x": "in.pixel_values",
        "prompt_lang_x": "in.input_ids",
        "continuation_lang_x": "in.more_ids",
        "full_sequence_logits": "out.logits",
    },
    needs=("in.input_ids", "in.more_ids"),
)


def resample_frames(module: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's resampler on several frames for each image, and a resampler that the file has the weights of."""
    frames = given["in.pixel_values"].to(module.perceiver.latents.dtype)
    rows = module.encode_frames(frames.flatten(0, 1))
    made = {"out.video.vision_rows": rows, "out.video.plain": module.resample(rows)[:, 0]}
    if found := own_resampler(module, given):
        spec, inputs = found
        made |= {k: spec.module(**x) for k, x in inputs.items()}
    return {k: x.unflatten(0, frames.shape[:2]) for k, x in made.items()}


class Alone(nn.Module):
    def __init__(self, perceiver: nn.Module):
        super().__init__()
        self.root = perceiver

    def forward(self, vision_rows: Tensor, number: Tensor) -> Tensor:
        return self.root(vision_rows.flatten(1, 2), vision_rows.shape[1], number)


def own_resampler(module: Any, given: dict[str, Tensor]) -> tuple[StageSpec, dict[str, dict[str, Tensor]]] | None:
    """The resampler of a file's own weights, with time embeddings, as a stage, and its inputs for each value.

    The file does not say how many heads there are. All numbers are tried, and the one that fits ``first_frame`` best is
    taken: so this value tells little, and ``rows`` tells all.
    """
    dtype = module.perceiver.latents.dtype
    weights = {k.removeprefix("in.weights."): x.to(dtype) for k, x in given.items() if k.startswith("in.weights.")}
    if not weights:
        return None
    frames = given["in.pixel_values"].to(dtype)
    with torch.no_grad():
        rows = module.encode_frames(frames.flatten(0, 1))
    number = torch.arange(frames.shape[1]).repeat(frames.shape[0])
    inputs = {
        "out.video.first_frame": {"vision_rows": rows[:, :1], "number": number},
        "out.video.rows": {"vision_rows": rows, "number": number},
    }
    inner, width = weights["layers.0.0.to_q.weight"].shape
    sizes = {"max_num_frames": "frame_embs", "max_num_media": "media_time_embs", "num_latents": "latents"}
    config = replace(
        module.config.perceiver,
        depth=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("layers.")),
        ff_mult=weights["layers.0.1.1.weight"].shape[0] // width,
        **{k: len(weights[name]) if name in weights else None for k, name in sizes.items()},
    )
    known, fits = next((k for k in inputs if k in given), None), []
    for heads in (h for h in range(1, inner + 1) if inner % h == 0):
        own = type(module.perceiver)(width, replace(config, heads=heads, dim_head=inner // heads)).to(dtype)
        own.load_state_dict(weights)
        alone = Alone(own.requires_grad_(False))
        off = alone(**inputs[known]).view_as(given[known]) - given[known] if known else torch.zeros(1)
        fits.append((float(off.abs().max()), heads, alone))
    shapes: dict[str, TensorSpec | list[TensorSpec]] = {
        "vision_rows": TensorSpec(("N", "F", *rows.shape[2:]), dtype),
        "number": TensorSpec(("N",), torch.int64),
    }
    return StageSpec(min(fits)[2], shapes, ["image_rows"]), inputs


VIDEO = Recording(
    {
        "frames": "in.pixel_values",
        "weights.perceiver.*": "in.weights.*",
        "vit_tokens": "out.video.vision_rows",
        "main_perceiver_out": "out.video.plain",
        "out_first_frame_only": "out.video.first_frame",
        "out": "out.video.rows",
    },
    needs=("in.pixel_values",),
    run=resample_frames,
    alone=own_resampler,
)


def cases(config: Any) -> Cases:
    kind = KINDS[config.lm.kind]

    def path(template: str) -> str:
        for part in ("embed", "blocks", "norm"):
            template = template.replace(f"{{{part}}}", getattr(kind, part))
        return f"lang_encoder.{template}"

    return Cases(
        VISION_TAPS,
        {},
        {name: path(template) for name, template in LANGUAGE_TAPS.items()},
        atol=1e-4,
        rtol=1e-4,
        recordings=(FORWARD, FED, NO_PAST, WHOLE, VIDEO),
        values={"act.vit.tokens": "vision_rows", "act.perceiver.out": "image_rows", "act.lm.embed": "text"}
        | {"out.video.vision_rows": "vision_rows", "out.video.plain": "image_rows"},
        left_padding=True,
        unread={
            "act.vit.pooled": "no one reads the class row that the vision tower would pool",
            "act.vit.tokens_ln_post": "made with the option ln_post alone",
        },
    )
