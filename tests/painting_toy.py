"""A small model that answers and paints: every part of a painting family, in as few lines as it takes."""

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mmopt.frontend.load import Model
from mmopt.frontend.trace import trace
from mmopt.ir import ops
from mmopt.ir.capture import StageSpec, TensorSpec
from mmopt.ir.printer import program_text
from mmopt.models._family import Family
from mmopt.spec.model_info import Flow

WIDTH, HEADS, VOCAB, GRID = 32, 4, 40, 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.o, self.mlp = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, angles, attend):
        y = self.norm(x)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q, k = (ops.rotary(p(y), cos, sin, HEADS) for p in (self.q, self.k))
        x = x + self.o(attend(q, k, self.v(y)))
        return x + self.mlp(torch.nn.functional.gelu(x))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.time, self.mix = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down, self.block = nn.Conv2d(2, WIDTH, 2, 2), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
        self.up = nn.Linear(2 * WIDTH, 8)
        self.pixels = nn.Conv2d(2, 3, 1)


class LanguageModel(nn.Module):
    def __init__(self, root):
        super().__init__()
        self.root = root

    def forward(self, visual, text, past, offset, seen, key_cache: list[Tensor], value_cache: list[Tensor]):
        x = torch.cat([visual, text], dim=1)
        positions = (past[:, None] + offset[:, None] + torch.arange(x.shape[1])).clamp(min=0)
        angles = positions[..., None] / 10.0 ** torch.arange(WIDTH // HEADS // 2)
        keys, values = list(key_cache), list(value_cache)
        for i, layer in enumerate(self.root.layers):

            def attend(q, k, v, i=i):
                out, keys[i], values[i] = ops.cached_attention(
                    q, k, v, keys[i], values[i], past, HEADS, HEADS, None, None, seen
                )
                return out

            x = layer(x, angles, attend)
        return self.root.norm(x), past + x.shape[1], keys, values


class Part(nn.Module):
    def __init__(self, root, run):
        super().__init__()
        self.root, self.run = root, run

    def forward(self, *args):
        return self.run(self.root, *args)


def flow_encode(m, latents, time_row):
    x = m.down(latents.to(time_row.dtype))
    scale, shift = m.mix(torch.nn.functional.silu(time_row[:, 0])).chunk(2, 1)
    x = m.block(x) * (1 + scale[..., None, None]) + shift[..., None, None]
    return x, x.flatten(2).transpose(1, 2)


def flow_decode(m, hidden, skip, time_row):
    rows = torch.cat([hidden, skip.flatten(2).transpose(1, 2)], 2)
    out = m.up(rows) * (1 + m.mix(time_row)[:, :, :8])
    return torch.nn.functional.pixel_shuffle(out.transpose(1, 2).reshape(out.shape[0], 8, GRID, GRID), 2).float()


def flow_time(m, time):
    angle = time[:, None] / 1000
    return m.time(torch.cat([angle.cos(), angle.sin()], 1).to(m.time.weight.dtype))[:, None]


def stages(m, capacity):
    f, i, full = m.norm.weight.dtype, torch.int64, torch.float32
    cache = [TensorSpec(("B", HEADS, capacity, WIDTH // HEADS), f)] * 2
    rows = {n: TensorSpec(("B", s, WIDTH), f) for n, s in (("visual", "nv"), ("text", "nt"))}
    ints = {n: TensorSpec(("B",), i) for n in ("past", "offset")}
    latents, row = TensorSpec(("B", 2, 2 * GRID, 2 * GRID), full), TensorSpec(("B", 1, WIDTH), f)
    grid, hidden = TensorSpec(("B", WIDTH, GRID, GRID), f), TensorSpec(("B", "n", WIDTH), f)
    image = TensorSpec(("B", GRID * GRID, WIDTH), f)
    return {
        "encode_vision": StageSpec(
            Part(m, lambda m, x: m.patches(x).flatten(2).transpose(1, 2)),
            {"pixel_values": TensorSpec(("N", 3, 8, 8), f)}, ["image_rows"],
        ),
        "embed": StageSpec(Part(m, lambda m, x: m.embed_tokens(x)), {"ids": TensorSpec(("B", "nt"), i)}, ["text"]),
        "language_model": StageSpec(
            LanguageModel(m),
            {**rows, **ints, "seen": TensorSpec(("B", capacity), torch.bool), "key_cache": cache, "value_cache": cache},
            ["hidden", "past", "key_cache", "value_cache"],
        ),
        "head": StageSpec(Part(m, lambda m, x: m.head(x)), {"hidden": hidden}, ["logits"]),
        "flow_time": StageSpec(
            Part(m, flow_time), {"time": TensorSpec(("B",), full)}, ["time_row"],
        ),
        "flow_encode": StageSpec(Part(m, flow_encode), {"latents": latents, "time_row": row}, ["skip", "tokens"]),
        "flow_decode": StageSpec(
            Part(m, flow_decode), {"hidden": image, "skip": grid, "time_row": row}, ["velocity"]
        ),
        "decode_image": StageSpec(Part(m, lambda m, z: m.pixels(z)), {"latents": latents}, ["image"]),
    }  # fmt: skip


CONFIG = SimpleNamespace(
    max_position_embeddings=64, eos_token_id=2, bos_token_id=1, vocab_size=VOCAB, hidden_size=WIDTH,
    num_hidden_layers=2, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, tokens_per_image=4,
)  # fmt: skip
PICTURE = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash"}
CHAT = {"user": "USER: ", "assistant": "ASSISTANT:", "separator": " ", "end": "</s>", "image": "<image>"}
FAMILY = Family(
    name="toy", architectures=(), model_types=(), parse_config=lambda raw: CONFIG, build=lambda c: Toy(), stages=stages,
    derived="$^", check_derived=lambda *a: None, image_id=-200, image_marker="<image>",
    image_processing=lambda *a: PICTURE, chat=CHAT, cases=None,
    flow=lambda c: Flow((2, 2 * GRID, 2 * GRID), GRID * GRID, 1000.0, 6, 2.0),
)  # fmt: skip


def model(dtype=torch.float32, change=None) -> Model:
    """`change` gets the module and its stages' specs by name, and may replace some."""
    torch.manual_seed(0)
    module, family = Toy().eval().to(dtype), FAMILY
    module.pixels.float()
    if change:
        family = dataclasses.replace(FAMILY, stages=lambda m, n: (lambda s: change(m, s) or s)(stages(m, n)))
    return Model(family, CONFIG, {}, module, None)


def program(batch: int = 2, context: int = 40, dtype=torch.float32, change=None):
    return trace(model(dtype, change), batch, 1, context)


def repaint(program, change=None, after=()):
    """The program with another loop (`change` gets the calls of its body) and with calls `after` it."""
    made = program.copy()
    place = next(i for i, item in enumerate(made.schedules.image) if hasattr(item, "body"))
    loop = made.schedules.image[place]
    if change:
        loop = dataclasses.replace(loop, body=tuple(change(list(loop.body))))
    made.schedules = made.schedules.replaced(
        image=(*made.schedules.image[:place], loop, *made.schedules.image[place + 1 :], *after)
    )
    return made


def generation_text(program) -> str:
    """The image schedule alone."""
    text = program_text({}, program.schedules)
    return text[text.index("painting:") :].rstrip()


def same_pictures(before, after, lengths) -> None:
    """Two programs paint the same of prompts of so many ids each."""
    prompts = [list(range(1, n + 1)) for n in lengths]
    noise = torch.randn(len(prompts), 2, 8, 8, generator=torch.Generator().manual_seed(len(lengths)))
    torch.testing.assert_close(
        after.generate_images(prompts, noise), before.generate_images(prompts, noise), atol=1e-5, rtol=1e-5
    )


def same_answers(before, after) -> None:
    """Two programs answer texts alike."""
    prompts = {"prompts": [[5, 6, 7], [9]], "max_new_tokens": 4, "ignore_eos": True}
    assert after(**prompts)["tokens"] == before(**prompts)["tokens"]
