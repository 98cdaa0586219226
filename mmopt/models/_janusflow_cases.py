"""How recorded runs of JanusFlow are named: understanding, painting, and the preprocessing of pictures."""

from __future__ import annotations

from typing import Any

from mmopt.models._family import Cases, Recording

TOWER = "vision_und_enc_model.vision_tower"
VISION_TAPS = {
    "out.patch_embed_out": f"{TOWER}.patch_embed",
    "out.vit_block{}_out": f"{TOWER}.blocks.{{}}",
    "out.vision_features": TOWER,
    "out.aligner_out": "vision_und_enc_aligner",
}
UNDERSTANDING = Recording(
    {
        "in.input_ids": "in.input_ids",
        "in.attention_mask": "in.attention_mask",
        "in.pixel_values": "in.pixel_values",
        "in.images_seq_mask": "in.image_mask",
        "in.images_emb_mask": "in.image_held",
        "out.inputs_embeds": "out.prepare.inputs_embeds",
        "out.position_ids": "out.prepare.position_ids",
        "out.prefill_logits": "out.logits",
        "out.step_logits": "out.greedy.step_logits_cached",
        "out.generated_ids": "out.greedy.token_ids",
    },
    needs=("in.input_ids",),
)
AT_A_STEP = {
    "v_cond": "velocity.cond",
    "v_uncond": "velocity.uncond",
    "v_guided": "velocity.guided",
    "enc_out": "skip",
    "z_emb": "tokens",
    "llm_last_hidden": "hidden",
    "dec_in": "decoder_rows",
}
PAINTING = Recording(
    {
        "in.prompt_ids": "in.paint.prompt",
        "in.tokens": "in.paint.samples",
        "in.attention_mask": "in.paint.seen",
        "in.noise": "in.paint.noise",
        "in.prefix_embeds": "out.paint.prefix",
        "out.t": "out.paint.times",
        "out.dt": "out.paint.interval",
        "out.t_emb": "out.paint.time_row",
        "out.z": "out.paint.latents",
        "out.vae_input": "out.paint.decoder_latents",
        "out.image": "out.paint.image",
        "out.image_u8": "out.paint.levels",
    }
    | {f"out.{k}": f"out.paint.{v}" for k, v in AT_A_STEP.items()}
    | {f"out.{at}.{k}": f"out.paint.{at}.{v}" for k, v in AT_A_STEP.items() for at in ("first", "last")},
    needs=("in.paint.noise",),
)
PICTURES = Recording({"in.*": "in.*_rgb", "out.*": "out.*_own"}, otherwise=True)


def about(meta: dict[str, Any], name: str) -> dict[str, Any]:
    """What a meta.json says of a case: steps and guidance of a painting, mean and deviation of each picture."""
    said: dict[str, Any] = next((c for c in meta.get("gen_cases", []) if c["name"] == name), {})
    found = {ours: said[theirs] for ours, theirs in (("steps", "steps"), ("guidance", "cfg_weight")) if theirs in said}
    fields = {"image_mean": "mean", "image_std": "std", "min_size": "smallest"}
    pictures = {
        c["name"]: {ours: c[theirs] for theirs, ours in fields.items() if theirs in c}
        for c in meta.get("preprocess_cases", [])
    }
    return found | {"pictures": pictures}


def cases(config: Any) -> Cases:
    first_inputs, scales = {"out.paint.first.decoder_rows": "vision_gen_dec_model"}, {}
    if config.vae is not None:
        first = "vae.post_quant_conv" if config.vae.use_post_quant_conv else "vae.decoder"
        first_inputs["out.paint.decoder_latents"] = first
        scales["out.paint.decoder_latents"] = 1 / config.vae.scaling_factor

    def options(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """The size of what was painted, where it is not the one that the model has by default."""
        side = shapes.get("in.noise", ())[2:]
        if len(side) != 2 or side[0] != side[1]:
            return {}
        return {"latent_size": None if side[0] == config.latent_size else side[0]}

    return Cases(
        VISION_TAPS,
        first_inputs,
        {},
        atol=5e-5,  # a restructured loop measures up to 1.6e-5
        rtol=1e-6,
        recordings=(UNDERSTANDING, PAINTING, PICTURES),
        values={"out.aligner_out": ("image_rows", 1)},  # after the learned row that begins an image
        left_padding=True,
        scales=scales,
        about=about,
        options=options,
    )
