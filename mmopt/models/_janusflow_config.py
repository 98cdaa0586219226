"""The sizes of JanusFlow, read from its config.json (see `mmopt.models.janusflow`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmopt.models._autoencoder import AutoencoderConfig, parse_autoencoder
from mmopt.models._decoder_config import DecoderConfig, read_decoder_config
from mmopt.models._family import read_config
from mmopt.spec.model_info import Flow

# The towers that a published config.json gives by name alone.
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4.0},
    "siglip_so400m_patch14_384": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
}
PAINTED = 384  # pixels along each side of a picture that the published models were trained to paint


@dataclass(frozen=True)
class TowerConfig:
    """The understanding tower. select_layer says how many blocks are kept: see `blocks`."""

    width: int
    layers: int
    heads: int
    patch_size: int
    image_size: int
    mlp_ratio: float = 4.0
    select_layer: int = -2

    @property
    def blocks(self) -> int:
        """A number above 0 counts blocks from the first; -1 keeps all of them, -2 all but the last, 0 all as well."""
        n = self.select_layer
        return min(self.layers, n if n > 0 else self.layers + n + 1)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def intermediate_size(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class EncoderConfig:
    """The generation encoder: latents to a grid. cond: width of the vector that tells the time."""

    width: int
    cond: int
    input_channels: int = 4
    kernel_size: int = 2
    stride: int = 2
    padding: int = 0
    layers_in_middle: int = 2
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class DecoderGridConfig:
    """The generation decoder: rows of the language model beside the encoder's grid to a velocity."""

    in_channels: int
    width: int
    cond: int
    out_channels: int = 4
    layers_in_middle: int = 2
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Config:
    tower: TowerConfig
    encoder: EncoderConfig
    decoder: DecoderGridConfig
    language: DecoderConfig
    vae: AutoencoderConfig | None
    latent_size: int
    eos_token_id: int | tuple[int, ...] = 2

    hidden_size = property(lambda c: c.language.hidden_size)
    num_hidden_layers = property(lambda c: c.language.num_hidden_layers)
    num_attention_heads = property(lambda c: c.language.num_attention_heads)
    num_key_value_heads = property(lambda c: c.language.num_key_value_heads)
    head_dim = property(lambda c: c.language.head_dim)
    intermediate_size = property(lambda c: c.language.intermediate_size)
    vocab_size = property(lambda c: c.language.vocab_size)
    max_position_embeddings = property(lambda c: c.language.max_position_embeddings)
    rms_norm_eps = property(lambda c: c.language.norm_eps)
    rope_theta = property(lambda c: c.language.rope_theta)
    tie_word_embeddings = property(lambda c: c.language.tie_word_embeddings)
    bos_token_id = property(lambda c: 1 if c.language.bos_token_id is None else c.language.bos_token_id)

    @property
    def tokens_per_image(self) -> int:
        """A learned row, then the patches."""
        return 1 + self.tower.patches

    @property
    def grid(self) -> int:
        """Rows of the language model along each side of a painted picture."""
        e = self.encoder
        return (self.latent_size + 2 * e.padding - e.kernel_size) // e.stride + 1

    @property
    def flow(self) -> Flow:
        """Steps and guidance are those of the reference's example."""
        latents = (self.encoder.input_channels, self.latent_size, self.latent_size)
        return Flow(latents, self.grid**2, time_scale=1000.0, steps=30, guidance=2.0)


# Values that would change the maths and that this implementation does not know are refused by name.
_UVIT = {"elementwise_affine": True, "use_bias": True, "use_mid_block": True}
FIXED: dict[str, dict[str, Any]] = {
    "vision_und_enc_config.params": {"select_layers": None, "pixel_mean": None, "pixel_std": None},
    "vision_gen_enc_config.params": _UVIT,
    "vision_gen_dec_config.params": {**_UVIT, "upsamples": 1},
}
CLASSES = {
    "vision_und_enc_config": "CLIPVisionTower",
    "vision_gen_enc_config": "ShallowUViTEncoder",
    "vision_gen_dec_config": "ShallowUViTDecoder",
}


def parse_config(raw: dict) -> Config:
    """config.json -> Config. ValueError names each value that is missing, inconsistent or not supported.

    Beside what a published file holds, it may have ``vae`` (config.json of the autoencoder) and ``latent_size``
    (latents along each side of a painted picture; by default those of 384 pixels, or of the autoencoder's
    ``sample_size`` if that is less).
    """
    for key, wanted in CLASSES.items():
        cls = (raw.get(key) or {}).get("cls")
        if cls != wanted:
            other = "; this is Janus or Janus-Pro" if key == "vision_gen_enc_config" and cls else ""
            raise ValueError(
                f"config.json: {key}.cls is {cls!r}, only {wanted!r} is supported: of the models of this architecture "
                f"only JanusFlow{other}"
            )
    language = _language(raw.get("language_config") or {})
    tower = _tower(raw["vision_und_enc_config"].get("params") or {})
    given = {key: raw[key].get("params") or {} for key in list(CLASSES)[1:]}
    grids = {}
    for key, kind in (("vision_gen_enc_config", EncoderConfig), ("vision_gen_dec_config", DecoderGridConfig)):
        params, where = given[key], f"{key}.params"
        widths = params.get("block_out_channels", [768])
        if not isinstance(widths, list | tuple) or len(widths) != 1 or type(widths[0]) is not int or widths[0] < 1:
            raise ValueError(f"config.json: {where}.block_out_channels is {widths!r}, expected one positive number")
        padding = params.get("padding", 0)
        if type(padding) is not int or padding < 0:
            raise ValueError(f"config.json: {where}.padding is {padding!r}, expected a number that is not negative")
        params = {"in_channels": 768, **{k: v for k, v in params.items() if k != "padding"}, "width": widths[0]}
        params["cond"] = params.pop("hidden_size", 2048)
        more = {"padding": padding} if kind is EncoderConfig else {}
        grids[kind] = read_config(kind, params, FIXED, where, **more)
    encoder, decoder = grids[EncoderConfig], grids[DecoderGridConfig]
    vae = parse_autoencoder(raw["vae"]) if raw.get("vae") else None
    factor = 8 if vae is None else vae.factor
    pixels = min(PAINTED, (vae.sample_size if vae else None) or PAINTED)
    size = raw.get("latent_size", pixels // factor)
    eos = (raw.get("language_config") or {}).get("eos_token_id", 2)
    eos = tuple(eos) if isinstance(eos, list) else eos
    wrong = _check(tower, encoder, decoder, language, vae, size)
    if not all(type(e) is int for e in (eos if isinstance(eos, tuple) else (eos,))) or eos == ():
        wrong.append(f"language_config.eos_token_id is {eos!r}, expected a number or numbers")
    if wrong:
        raise ValueError("config.json: " + "; ".join(wrong))
    return Config(tower, encoder, decoder, language, vae, size, eos)


def _language(raw: dict) -> DecoderConfig:
    kind = raw.get("model_type", "llama")
    if kind != "llama":
        raise ValueError(f"config.json: language_config.model_type is {kind!r}, only 'llama' is supported")
    return read_decoder_config(kind, raw, "language_config")


def _tower(params: dict) -> TowerConfig:
    where, name = "vision_und_enc_config.params", params.get("model_name", "siglip_large_patch16_384")
    known = TOWERS.get(name, {})
    needed = [k for k in ("width", "layers", "heads", "patch_size") if k not in known and k not in params]
    if needed:
        raise ValueError(
            f"config.json: {where}.model_name is {name!r}, known are {', '.join(TOWERS)}; "
            f"for another one params must give {', '.join(needed)}"
        )
    values = {"image_size": 384, **known, **params}
    select = values.pop("select_layer", -2)
    if type(select) is not int:
        raise ValueError(f"config.json: {where}.select_layer is {select!r}, expected a whole number")
    return read_config(TowerConfig, values, FIXED, where, select_layer=select)


def _check(
    tower: TowerConfig,
    encoder: EncoderConfig,
    decoder: DecoderGridConfig,
    language: DecoderConfig,
    vae: AutoencoderConfig | None,
    size: Any,
) -> list[str]:
    """What does not fit together."""
    wrong = []
    if tower.image_size < tower.patch_size:
        wrong.append(f"image_size {tower.image_size} is less than patch_size {tower.patch_size}")
    if tower.width % tower.heads:
        wrong.append(f"the tower's width {tower.width} must divide into {tower.heads} heads")
    if tower.blocks < 1:
        wrong.append(f"select_layer {tower.select_layer} leaves none of the tower's {tower.layers} blocks")
    for name, part in (("enc", encoder), ("dec", decoder)):
        if part.cond != language.hidden_size:
            wrong.append(
                f"vision_gen_{name}_config.params.hidden_size {part.cond} must be the language model's hidden_size "
                f"{language.hidden_size}"
            )
    if encoder.width != decoder.width:
        wrong.append(f"block_out_channels {encoder.width} and {decoder.width} of encoder and decoder must be equal")
    if encoder.width % 2:
        wrong.append(f"block_out_channels {encoder.width} must be even (cosine and sine of the time)")
    if encoder.input_channels != decoder.out_channels:
        wrong.append(f"input_channels {encoder.input_channels} and out_channels {decoder.out_channels} must be equal")
    if vae is not None and vae.latent_channels != encoder.input_channels:
        wrong.append(f"latent_channels {vae.latent_channels} of the autoencoder must be {encoder.input_channels}")
    if type(size) is not int or size < 1:
        wrong.append(f"latent_size is {size!r}, expected a positive number")
    else:
        made = ((size + 2 * encoder.padding - encoder.kernel_size) // encoder.stride + 1) * 2
        if made != size:
            wrong.append(
                f"latent_size {size} would become {made}: kernel_size {encoder.kernel_size}, stride {encoder.stride}, "
                f"padding {encoder.padding} must halve it, for the decoder doubles it"
            )
    return wrong
