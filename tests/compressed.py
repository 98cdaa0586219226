"""Small models of three families, and what they give when rows of their images are left out: by hand, from their plain
modules, with attention written out. Nothing here reads a graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmopt
from mmopt.frontend.load import Model, from_config
from mmopt.ir import ops
from mmopt.ir.program import Program
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.pruning.apply import find_sites
from mmopt.pruning.methods import reduce_rows
from mmopt.rewrite.pass_base import Report

DATA = Path(__file__).parent / "data"
GRID, PATCHES, QUERIES = (4, 4), 16, 8
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
FAMILIES = ("owl", "janus", "flamingo")
FORCED = [[11, 25, 7, 40], [9, 9, 31, 12], [50, 6, 17, 8]]  # fed instead of the likeliest ids


# -------------------------------------------------------------------------------------------------------------- models
def owl_config() -> dict:
    raw = json.loads((DATA / "mplug_owl2/config.json").read_text())
    raw |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 60, "torch_dtype": None}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    small = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40}
    raw["visual_config"]["visual_model"] |= small
    raw["visual_config"]["visual_abstractor"] |= small | {"encoder_hidden_size": 24}
    return raw


def janus_config() -> dict:
    raw = json.loads((DATA / "janusflow/config.json").read_text())
    raw["language_config"] |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 60}
    raw["language_config"] |= {"num_key_value_heads": 2, "max_position_embeddings": 90}
    raw["vision_und_enc_config"]["params"] |= {"layers": 2, "image_size": 64, "width": 24, "heads": 2}
    raw["latent_size"] = 8  # painted images take 16 rows
    for part in ("gen_enc", "gen_dec"):
        raw[f"vision_{part}_config"]["params"] |= {"layers_in_middle": 1, "hidden_size": 32}
    return raw


def flamingo_config() -> dict:
    raw = json.loads((DATA / "flamingo/openflamingo/config.json").read_text())
    raw.pop("gated_layer_indices")
    m = raw["model"]
    m["vision"] |= {"layers": 2, "image_size": 56, "width": 24}
    m["lm"]["hf_config"] |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    m["perceiver"] |= {"dim_head": 12, "heads": 2, "max_num_frames": 4}
    m["gated_cross_attn"] |= {"dim_head": 12, "heads": 2}
    m |= {"vocab_size_after_resize": 60, "eoc_token_id": 57, "media_token_id": 58, "pad_token_id": 59}
    return raw


CONFIGS = {"owl": owl_config, "janus": janus_config, "flamingo": flamingo_config}


@cache
def model(family: str, dtype: str = "float32") -> Model:
    """Random weights, the same for each dtype but for rounding."""
    made = from_config(CONFIGS[family](), "float32", random=True)
    if dtype == "float32":
        return made
    rounded = from_config(CONFIGS[family](), dtype, random=True)
    for p, q in zip(rounded.module.parameters(), made.module.parameters(), strict=True):
        p.data = q.to(p.dtype)
    return rounded


@cache
def traced(family: str, dtype: str = "float32") -> Program:
    return mmopt.trace(model(family, dtype), batch=3, images=3, context=200 if family == "owl" else 72)


@cache
def compressed(family: str, site: str, keep: float, method: str, **options: Any) -> Program:
    made, report = CompressVisualTokens(keep, method, site, min_saving=-1, **options)(traced(family))
    assert report.rewrites, report
    return made


def compress(program: Program, *args: Any, min_saving: float = -1, **kw: Any) -> tuple[Program, Report]:
    return CompressVisualTokens(*args, min_saving=min_saving, **kw)(program)


def names(program: Program) -> list[str]:
    return [p.name for p in find_sites(program)]


def pixels(family: str, n: int, frames: int | None = None, seed: int = 0) -> Tensor:
    side = 64 if family == "janus" else 56
    shape = (n, *([] if frames is None else [frames]), 3, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- choosing by hand
@dataclass
class Left:
    """Rows of an image that are left, where they stood, and how many each stands for (None: one)."""

    places: Tensor
    sizes: Tensor | None = None

    def logs(self, before: int = 0, after: int = 0) -> Tensor | None:
        """log(sizes) as a bias of keys, 0 for the keys around them."""
        return None if self.sizes is None else F.pad(self.sizes.log(), (before, after))


Choice = Callable[..., tuple[Tensor, Left]]  # of x [N, n, d], what was left before, and q, k, heads, summary
AMID = torch.tensor([0, 2, 8, 10])  # of the four windows of a grid of 4 x 4, the row amid each


def picked(places: Sequence[int]) -> Choice:
    """The rows at these places."""

    def choice(x: Tensor, left: Left, **_: Any) -> tuple[Tensor, Left]:
        at = torch.as_tensor(places)
        return x[:, at], Left(left.places[:, at], None if left.sizes is None else left.sizes[:, at])

    return choice


def pooled(x: Tensor, left: Left, **_: Any) -> tuple[Tensor, Left]:
    """Means of 2 x 2 rows of the grid."""
    grid = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *GRID)
    rows = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    return rows, Left(left.places[:, AMID], torch.full((x.shape[0], 4), 4.0))


def selected(method: str, keep: int) -> Choice:
    """What `mmopt.pruning.methods`, which has tests of its own, makes of rows, keys and the query that sums them up."""

    def choice(x: Tensor, left: Left, q=None, k=None, heads: int = 1, summary=None) -> tuple[Tensor, Left]:
        given = {} if k is None else {"keys": k, "query": q.mean(1) if summary is None else summary, "heads": heads}
        grid = GRID if x.shape[1] == PATCHES else None
        made = reduce_rows(x, keep, method, grid, sizes=left.sizes, **given)
        return made.rows, Left(left.places.gather(1, made.places), made.sizes)

    return choice


CHOICES: dict[str, Choice] = {
    "uniform": picked([0, 2, 8, 10]),
    "first": picked(range(4)),
    "pool": pooled,
    "merge": selected("merge", 8),
    "dominant": selected("dominant", 4),
}
KEEP = {method: 0.5 if method == "merge" else 0.25 for method in CHOICES}  # shares of the 16 rows


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, logs: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + logs) v"""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    if logs is not None:
        scores = scores + logs[:, None, None, :]
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def shrunk(x: Tensor, small: tuple[int, int]) -> Tensor:
    return F.interpolate(x, small, mode="bicubic", antialias=True, align_corners=False)


def smaller_table(table: Tensor, small: tuple[int, int] | None) -> Tensor:
    """Positions ``[... + 16, d]``: those of the grid scaled like the image, what stands before them as it is."""
    if small is None:
        return table
    lead, grid = table[:-PATCHES], table[-PATCHES:]
    grid = shrunk(grid.T.reshape(1, -1, *GRID), small).flatten(2)[0].T
    return torch.cat([lead, grid])


# -------------------------------------------------------------------------------------------------------------- towers
@dataclass
class Tower:
    """begin(pixels, positions' size or None) -> rows, `lead` of which are no patches. blocks: (q, k, v of rows; rows
    plus what attention gave; rows plus the MLP). end: after the last block."""

    heads: int
    lead: int
    patch: int
    begin: Callable
    blocks: list[tuple[Callable, Callable, Callable]]
    end: Callable

    def run(
        self, images: Tensor, cuts: dict[int | str, Choice] | None = None, small: tuple[int, int] | None = None
    ) -> tuple[Tensor, Left]:
        """cuts: after attention 1, 2, ... or at the "end". small: the grid of a smaller image."""
        cuts = cuts or {}
        if small:
            images = shrunk(images, (small[0] * self.patch, small[1] * self.patch))
        x, lead = self.begin(images, small), self.lead
        left = Left(torch.arange(x.shape[1] - lead).expand(x.shape[0], -1))
        q = k = None
        for i, (qkv, join, mlp) in enumerate(self.blocks, 1):
            q, k, v = qkv(x)
            x = join(x, attend(q, k, v, self.heads, left.logs(lead)))
            if i in cuts:
                x, left = self.cut(cuts[i], x, left, q, k, lead)
            x = mlp(x)
        x, dropped = self.end(x), lead
        if x.shape[1] == left.places.shape[1]:  # the end dropped what stood before the patches
            dropped = 0
        if "end" in cuts:
            x, left = self.cut(cuts["end"], x, left, q, k, dropped)
        return x, left

    def cut(self, choice: Choice, x: Tensor, left: Left, q, k, lead: int) -> tuple[Tensor, Left]:
        more = {"q": q[:, self.lead :], "k": k[:, self.lead :], "heads": self.heads}
        if self.lead:
            more["summary"] = q[:, 0]
        rows, left = choice(x[:, lead:], left, **more)
        return torch.cat([x[:, :lead], rows], 1), left


def owl_tower(module: nn.Module) -> Tower:
    v = module.model.vision_model
    e = v.embeddings

    def begin(images: Tensor, small) -> Tensor:
        patches = e.patch_embed(images).flatten(2).transpose(1, 2)
        rows = torch.cat([e.cls_token.expand(len(patches), -1, -1), patches], 1)
        return e.pre_layernorm(rows + smaller_table(e.position_embedding[0], small))

    def block(layer):
        a = layer.self_attn

        def qkv(x):
            made = a.query_key_value(layer.input_layernorm(x)).unflatten(2, (a.heads, 3, -1))
            return [y.flatten(2) for y in made.unbind(3)]

        return qkv, lambda x, y: x + a.dense(y), lambda x: x + layer.mlp(layer.post_attention_layernorm(x))

    return Tower(2, 1, 14, begin, [block(layer) for layer in v.encoder.layers], v.post_layernorm)


def janus_tower(module: nn.Module) -> Tower:
    t = module.vision_und_enc_model.vision_tower

    def begin(images: Tensor, small) -> Tensor:
        return t.patch_embed(images) + smaller_table(t.pos_embed[0], small)

    def block(b):
        return (
            lambda x: b.attn.qkv(b.norm1(x)).chunk(3, -1),
            lambda x, y: x + b.attn.proj(y),
            lambda x: x + b.mlp(b.norm2(x)),
        )

    def end(x: Tensor) -> Tensor:
        return module.vision_und_enc_aligner(t.norm(x))

    return Tower(2, 0, 16, begin, [block(b) for b in t.blocks], end)


def flamingo_tower(module: nn.Module) -> Tower:
    t = module.vision_encoder

    def begin(images: Tensor, small) -> Tensor:
        patches = t.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([t.class_embedding.expand(len(patches), 1, -1), patches], 1)
        return t.ln_pre(x + smaller_table(t.positional_embedding, small))

    def block(b):
        a = b.attn
        return (
            lambda x: F.linear(b.ln_1(x), a.in_proj_weight, a.in_proj_bias).chunk(3, -1),
            lambda x, y: x + a.out_proj(y),
            lambda x: x + b.mlp(b.ln_2(x)),
        )

    return Tower(2, 1, 14, begin, [block(b) for b in t.transformer.resblocks], lambda x: x[:, 1:])


def owl_abstractor(module: nn.Module, features: Tensor, left: Left, small: tuple[int, int] | None = None) -> Tensor:
    """Features ``[N, 1 + k, d]`` of which k rows are left -> queries ``[N, 8, hidden]``, no row behind them."""
    a, x = module.model.visual_abstractor, module.model.visual_abstractor.query_embeds
    table = smaller_table(a.key_positions, small)
    if small is None:  # row 0 is the class row's
        at = torch.cat([torch.zeros(len(features), 1, dtype=torch.int64), left.places + 1], 1)
        keys = table[at]
    else:
        keys = table.expand(len(features), -1, -1)
    x, asks = x.expand(len(features), -1, -1), a.query_positions
    for layer in a.encoder.layers:
        b = layer.crossattention
        x = b.norm1(x)
        rows = torch.cat([x, b.normk(features)], 1)
        k = b.attention.key(rows + torch.cat([asks.expand(len(x), -1, -1), keys], 1))
        y = attend(b.attention.query(x + asks), k, b.attention.value(rows), b.attention.heads, left.logs(QUERIES + 1))
        x = b.output(x, y)
    return a.visual_fc(x)


def flamingo_resampler(module: nn.Module, rows: Tensor, left: Left, frames: int) -> Tensor:
    """Rows ``[N * frames, k, d]`` -> latents ``[N, latents, d]``."""
    p = module.perceiver
    rows = rows.unflatten(0, (-1, frames)) + p.frame_embs[:frames, None]
    logs = None if left.sizes is None else left.sizes.log().unflatten(0, (-1, frames)).flatten(1)
    rows, x = rows.flatten(1, 2), p.latents.expand(len(rows), -1, -1)
    for attention, ff in p.layers:
        latents = attention.norm_latents(x)
        k, v = attention.to_kv(torch.cat([attention.norm_media(rows), latents], 1)).chunk(2, -1)
        bias = None if logs is None else F.pad(logs, (0, x.shape[1]))
        x = x + attention.to_out(attend(attention.to_q(latents), k, v, attention.heads, bias))
        x = x + ff(x)
    return p.norm(x)


# ------------------------------------------------------------------------------------------------- images by hand
@dataclass
class Images:
    """Rows of each image ``[N, k, d]``; where they stand among the `total` positions of an image ``[N, k]``."""

    rows: Tensor
    places: Tensor
    total: int


def owl_images(
    images: Tensor, cuts: dict | None = None, small=None, last: Choice | None = None, of: nn.Module | None = None
) -> Images:
    """last: what is left of the queries before the language model."""
    module = of or model("owl").module
    queries = owl_abstractor(module, *owl_tower(module).run(images, cuts, small), small)
    left = Left(torch.arange(QUERIES).expand(len(images), -1))
    if last is not None:
        queries, left = last(queries, left)
    rows = torch.cat([queries, module.model.visual_abstractor.vit_eos.expand(len(images), -1, -1)], 1)
    return Images(rows, F.pad(left.places, (0, 1), value=QUERIES), QUERIES + 1)


def janus_images(images: Tensor, cuts: dict | None = None, small=None, of: nn.Module | None = None) -> Images:
    module = of or model("janus").module
    rows, left = janus_tower(module).run(images, cuts, small)
    rows = torch.cat([module.beg_of_und_embed.expand(len(rows), 1, -1), rows], 1)
    return Images(rows, F.pad(left.places + 1, (1, 0)), PATCHES + 1)


def flamingo_images(images: Tensor, cuts: dict | None = None, small=None) -> Tensor:
    """``[N, 1, latents, d]`` of images ``[N, frames, 3, H, W]``"""
    module, frames = model("flamingo").module, images.shape[1]
    rows, left = flamingo_tower(module).run(images.flatten(0, 1), cuts, small)
    return flamingo_resampler(module, rows, left, frames)[:, None]


def seen_images(family: str, images: Tensor, cuts: dict | None = None, small=None) -> Images | Tensor:
    made = {"owl": owl_images, "janus": janus_images, "flamingo": flamingo_images}
    return made[family](images, cuts, small)


# ------------------------------------------------------------------------------------------------ language models
def whole_logits(family: str, prompt: list[int], forced: list[int], images: Images, renumber: bool = False, **kw):
    """Logits ``[T, V]`` of a prompt and of each forced id but the last, in one go without caches.

    images: those of this prompt, in order. Each row stands where it stood when no row was left out, or, renumbered, in
    the next position.
    """
    m = model(family)
    module, marker, given = m.module, m.image_id, iter(zip(images.rows, images.places, strict=True))
    table = module.model.embed_tokens if family == "owl" else module.language_model.model.embed_tokens
    rows, at, visual, position = [], [], [], 0
    for token in [*prompt, *forced[:-1]]:
        if token == marker:
            own, where = next(given)
            rows.append(own)
            at += [position + i for i in (range(len(own)) if renumber else where.tolist())]
            visual += [True] * len(own)
            position += len(own) if renumber else images.total
        else:
            rows.append(table(torch.tensor([token])))
            at.append(position)
            visual.append(False)
            position += 1
    made = layers(family, torch.cat(rows)[None], torch.tensor([at]), torch.tensor([visual]), **kw)
    return made[0, -len(forced) :]


def layers(family: str, x: Tensor, at: Tensor, visual: Tensor, inside: Callable | None = None) -> Tensor:
    """Rows ``[1, n, d]`` at positions through the language model -> logits ``[1, n, V]``.

    inside(x, at, visual, q, k): what becomes of rows after the attention of the first layer.
    """
    module, c = model(family).module, model(family).config
    body = module.model if family == "owl" else module.language_model.model
    head = module.lm_head if family == "owl" else module.language_model.lm_head
    inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
    for i, layer in enumerate(body.layers):
        angle, kept = at[..., None] * inverse, {}

        def attention(q, k, v, kept=kept):
            kept |= {"q": q, "k": k}
            return ops.attention(q, k, v, c.num_attention_heads, c.num_key_value_heads, causal=True)

        cos, sin, which = angle.cos(), angle.sin(), [visual[..., None]] if family == "owl" else []
        x = x + layer.self_attn(layer.input_layernorm(x, *which), *which, cos, sin, attention)
        if inside is not None and i == 0:
            x, at, visual = inside(x, at, visual, **kept)
            which = [visual[..., None]] if family == "owl" else []
        x = x + layer.mlp(layer.post_attention_layernorm(x, *which))
    return head(body.norm(x))


def flamingo_logits(prompt: list[int], forced: list[int], media: Tensor) -> Tensor:
    """Logits ``[T, V]`` beside media ``[images, 1, latents, d]``."""
    m = model("flamingo")
    ids = torch.tensor([[*prompt, *forced[:-1]]])
    time = (ids == m.image_id).cumsum(1)
    seen = time[..., None] == torch.arange(1, len(media) + 1)
    x = m.module.lang_encoder.embedding(ids)
    return m.module(x, media.flatten(0, 1)[None], seen, time > 0)[0, -len(forced) :]


def inside(family: str, choice: Choice) -> Callable:
    """What `layers` takes: `choice` among the rows of each image; those that are no patches stay."""
    count, lead = (QUERIES, 0) if family == "owl" else (PATCHES, 1)

    def run(x: Tensor, at: Tensor, visual: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, positions, kinds, i = [], [], [], 0
        while i < x.shape[1]:
            if not visual[0, i]:
                own, where, n = x[:, i : i + 1], at[:, i : i + 1], 1
            else:  # its patches, and what stands before or behind them
                n = count + 1
                part = slice(i + lead, i + lead + count)
                more = {"q": q[:, part], "k": k[:, part], "heads": 4} if family == "owl" else {}
                few, left = choice(x[:, part], Left(at[:, part]), **more)
                other = i if lead else i + count
                own, where = [few, x[:, [other]]], [left.places, at[:, [other]]]
                own, where = (torch.cat(v[:: -1 if lead else 1], 1) for v in (own, where))
            rows.append(own)
            positions.append(where)
            kinds.append(torch.full(where.shape, bool(visual[0, i])))
            i += n
        return torch.cat(rows, 1), torch.cat(positions, 1), torch.cat(kinds, 1)

    return run


def reference(family: str, prompts: list[list[int]], forced: list[list[int]], images: Any, **kw: Any) -> Tensor:
    """Logits ``[B, T, V]`` of several prompts; images: those of all of them (`Images`, or Flamingo's media)."""
    made, done = [], 0
    for prompt, ids in zip(prompts, forced, strict=False):
        n = prompt.count(model(family).image_id)
        part = slice(done, done + n)
        if family == "flamingo":
            made.append(flamingo_logits(prompt, ids, images[part]))
        else:
            own = Images(images.rows[part], images.places[part], images.total)
            made.append(whole_logits(family, prompt, ids, own, **kw))
        done += n
    return torch.stack(made)


def run(program: Program, prompts: list[list[int]], images: Tensor | None, forced: list[list[int]] = FORCED) -> Tensor:
    """Logits ``[B, T, V]`` of a Program: of the last row of each prompt, then of each forced id but the last."""
    first: dict[int, Tensor] = {}
    steps: list[Tensor] = []

    def observe(phase, call, made, chunk):
        if "logits" in made and phase == "prefill":
            first[chunk.sample] = made["logits"][0, -1].float()
        elif "logits" in made:
            steps.append(made["logits"][:, -1].float())

    given = torch.tensor(forced[: len(prompts)])
    program(prompts, images, max_new_tokens=given.shape[1], forced=given, observe=observe)
    return torch.stack([torch.stack([first[i] for i in range(len(prompts))]), *steps], 1)


I = "image"  # in the prompts below  # noqa: E741
LAYOUTS = {
    "text": [(6,)],
    "one image": [(3, I, 4)],
    "image first": [(I, 2)],
    "side by side": [(2, I, I, 5)],
    "apart": [(1, I, 3, I, 1, I, 2)],
    "batch": [(2, I, 3), (7,), (1, I, I, 4)],
}


def ids_of(family: str, layout: str | Sequence[tuple]) -> list[list[int]]:
    """Prompts of parts: I for an image, a number for so many ids."""
    g, made = torch.Generator().manual_seed(3), []
    for parts in LAYOUTS[layout] if isinstance(layout, str) else layout:
        made.append([])
        for part in parts:
            made[-1] += [model(family).image_id] if part == I else torch.randint(3, 55, (part,), generator=g).tolist()
    return made


def count(family: str, prompts: list[list[int]]) -> int:
    return sum(p.count(model(family).image_id) for p in prompts)
