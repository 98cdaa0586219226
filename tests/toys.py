"""Small torch modules, unrelated to any family, to try passes on; how to trace them and to compare what they give."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmopt.frontend.trace import NextToken
from mmopt.ir import ops
from mmopt.ir.capture import StageSpec, TensorSpec, trace_stage
from mmopt.ir.graph import shape_of
from mmopt.ir.printer import op_name, stage_text
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage, evaluate
from mmopt.rewrite import contracts
from mmopt.rewrite.contracts import ContractError
from mmopt.rewrite.pass_base import Pass
from mmopt.search.optimize import optimize
from mmopt.spec.model_info import Cross, ModelInfo, Processing
from mmopt.spec.schedule import Call, Loop, Schedule, Schedules

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

D, VOCAB, ROWS, PIXELS = 8, 13, 3, 4  # width, vocabulary, rows of an image, side of an image
VISUAL_AND_TEXT = {"visual": ("B", "nv", D), "text": ("B", "nt", D)}
SIZES = ({"B": 1, "nv": 0, "nt": 1}, {"B": 1, "nv": 4, "nt": 3}, {"B": 3, "nv": 0, "nt": 5}, {"B": 3, "nv": 2, "nt": 1})


def draw(module: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Every parameter drawn, so that no gain is one and no bias zero; those named gate stay as they are."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if "gate" not in name:
            p.data = torch.randn(p.shape, generator=g) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return module.to(dtype).eval().requires_grad_(False)


def trace(
    module: nn.Module,
    inputs: dict[str, tuple | torch.dtype],
    outputs: list[str],
    weights: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """A module as a stage. An input is a shape, or (shape, dtype) where it is not of the module's own dtype."""
    specs = {}
    for name, given in inputs.items():
        shape, kind = given if isinstance(given[-1], torch.dtype) else (given, dtype)
        specs[name] = TensorSpec(tuple(shape), kind)
    return trace_stage(StageSpec(module, specs, outputs), weights)


def single(
    module: nn.Module, inputs: dict, outputs: list[str] | None = None, dtype: torch.dtype = torch.float32
) -> Program:
    """A Program of one stage called ``toy``, for a pass to be run on; the pipeline cannot run it."""
    weights: dict[str, Tensor] = {}
    stage = trace(draw(module, dtype), inputs, outputs or ["y"], weights, dtype)
    return Program({"toy": stage}, texts(Call("toy")), weights, {}, toy_info(dtype=dtype)).drop_unused()


def random_values(stage: Stage, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, node in stage.input_nodes().items():
        shape = [sizes[str(s)] if isinstance(s, sympy.Expr) else s for s in shape_of(node)]
        kind = node.meta["dtype"]
        if kind == torch.bool:
            values[name] = torch.rand(shape, generator=g) > 0.5
        elif kind.is_floating_point:
            values[name] = torch.randn(shape, generator=g).to(kind)
        else:
            values[name] = torch.randint(0, 3, shape, generator=g)
    return values


def same(before: Program, after: Program, sizes: tuple = SIZES, stage: str = "toy") -> None:
    """Both programs give the same, within the table of contracts, at every size; all-zero weights are drawn anew."""
    weights = contracts.drawn_weights(before, 0)
    for i, size in enumerate(sizes):
        one, two = before.stages[stage], after.stages[stage]
        values = random_values(one, size, seed=i)
        expected = one.run(weights, values, keep_constants=False)
        declared(two, weights, values)
        for name, value in two.replaced(two.graph).run(weights, values).items():
            wanted = expected[name]
            if value.dim() > 1 and value.shape[1] < wanted.shape[1]:
                wanted = wanted[:, -value.shape[1] :]
            assert contracts.difference(wanted, value) is None, (size, name)


def declared(stage: Stage, weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Every node has the shape and dtype that its graph says it has: passes and exporters believe them."""
    env = {node: values[name] for name, node in stage.input_nodes().items()}
    sizes = {s: d for node, x in env.items() for s, d in zip(shape_of(node), x.shape, strict=True)}
    for n in stage.graph.nodes:
        if n.op in ("placeholder", "output"):
            continue
        env[n] = weights[str(n.target)] if n.op == "get_attr" else evaluate(n, env, sizes)
        if isinstance(env[n], Tensor):
            said = tuple(int(s.subs(sizes)) if isinstance(s, sympy.Expr) else s for s in shape_of(n))
            assert (tuple(env[n].shape), env[n].dtype) == (said, n.meta["dtype"]), n.format_node()


def ops_of(program: Program, stage: str = "toy") -> list[str]:
    """The operators of a stage in order, those on constants left out."""
    return [op_name(n) for n in program.stages[stage].graph.nodes if n.op == "call_function" and not n.meta["const"]]


def before_and_after(before: Program, after: Program, stage: str = "toy") -> str:
    return f"before{stage_text(before.stages[stage])}\n\nafter{stage_text(after.stages[stage])}"


def twice(program: Program, *passes: Pass) -> None:
    """A second run of the passes changes nothing, and neither run changes the program given."""
    text, once = str(program), program
    for p in passes:
        once, _ = p(once)
    again = once
    for p in passes:
        again, _ = p(again)
    assert str(program) == text != str(once)
    assert str(again) == str(once)


def unchanged(program: Program, p: Pass, why: str) -> None:
    """The pass leaves the program alone and says why."""
    after, report = p(program)
    assert str(after) == str(program)
    assert not report.rewrites
    assert any(why in line for line in report.skipped), report.skipped


def caught(program: Program, broken: Pass, stage: str, others: Sequence[Pass] = ()) -> None:
    """The pipeline refuses a broken pass, names the stage and hands back the last good program."""
    with pytest.raises(ContractError, match=rf"{broken.name} promised to be exact: stage {stage}, ") as e:
        optimize(program, [*others, broken])
    good = program
    for p in others:
        good, _ = p(good)
    assert str(e.value.program) == str(good)


# --------------------------------------------------------------------------------------- a whole program to hold toys
class Images(nn.Module):
    """pixel_values ``[N, 3, 4, 4]`` -> image_rows ``[N, ROWS, D]``"""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3 * PIXELS * PIXELS, ROWS * D)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.project(pixel_values.flatten(1)).view(-1, ROWS, D)


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def toy_info(dtype: torch.dtype = torch.float32, **given) -> ModelInfo:
    """Facts of a toy; `given` are fields of `ModelInfo`."""
    sizes = {"tokens_per_image": ROWS, "hidden_size": D, "image_embed_width": D, "vocab_size": VOCAB, "eos_ids": (2,)}
    made = {"family": "toy", "image_id": -200, "batch": 3, "images": 2, "context": 64, **sizes, **given}
    return ModelInfo(dtype=str(dtype).removeprefix("torch."), **made)


def texts(*items: Call | Loop) -> Schedules:
    """The schedules of a toy that answers in text alone."""
    return Schedules(Schedule(items))


def chat(
    language: nn.Module,
    inputs: dict | None = None,
    outputs: list[str] | None = None,
    step: tuple[nn.Module, dict] | None = None,
    last: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """A Program that the pipeline can check: images, embed, a toy ``language_model`` over chunks, a decode loop.

    ``step`` (module, inputs) takes the language model's place in the loop. What a toy names like one of its inputs is
    carried; ``last`` reads the logits (by default the greedy choice after the last row).
    """
    weights: dict[str, Tensor] = {}

    def named(name: str, module: nn.Module, *args) -> Stage:
        holder = Holder(name, draw(module, dtype, seed=len(weights)))
        return trace(holder, *args, weights, dtype)

    inputs = VISUAL_AND_TEXT if inputs is None else inputs
    outputs = ["logits"] if outputs is None else outputs
    stages = {
        "images": named("images", Images(), {"pixel_values": ("N", 3, PIXELS, PIXELS)}, ["image_rows"]),
        "embed": named("embed", Embed(), {"ids": (("B", "nt"), torch.int64)}, ["text"]),
        "language_model": named("language_model", language, inputs, outputs),
    }
    loop = (Call("next_token"), Call("embed"), Call("language_model", {"visual": "no_visual"}))
    if step is not None:
        module, wanted = step
        stages["step"] = named("step", module, wanted, ["logits"])
        loop = (Call("next_token"), Call("step"))
    rows = 1 if step is not None else "n"
    stages["next_token"] = trace(
        last or NextToken([2]), {"logits": ("B", rows, VOCAB)}, ["ids", "done"], weights, dtype
    )
    state = {"logits": (("B", 1, VOCAB), dtype)}
    for s in stages.values():
        for name, node in s.input_nodes().items():
            if name in outputs and name not in state:
                state[name] = (tuple(str(d) if isinstance(d, sympy.Expr) else d for d in shape_of(node)), dtype)
    schedule = texts(
        Call("images"),
        Loop((Call("embed", {"ids": "chunk.ids"}), Call("language_model", {"visual": "chunk.visual"})), over="chunks"),
        Loop(loop, trips="max_new_tokens", until="done"),
    )
    return Program(stages, schedule, weights, state, toy_info(dtype)).drop_unused()


class Holder(nn.Module):
    """Puts a module under a name of its own, so that stages do not share the names of their weights."""

    def __init__(self, name: str, module: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, module)

    def forward(self, *args: Tensor):
        return getattr(self, self.name)(*args)


# ------------------------------------------------------------------------------------------------------------- modules
class Function(nn.Module):
    """A function of tensors, with the parts it needs as keyword arguments: ``Function(lambda m, x: m.a(x), a=...)``."""

    def __init__(self, run, **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor):
        return self.run(self, *args)


def linear(out: int = D, bias: bool = True) -> nn.Linear:
    return nn.Linear(D, out, bias=bias)


class Routed(nn.Module):
    """Each row through its own branch, then one projection and head for all: routing by modality in the small."""

    def __init__(self):
        super().__init__()
        self.for_visual, self.for_text = linear(), linear()
        self.shared, self.head = linear(), linear(VOCAB)

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([visual, text], dim=1)
        ones, zeros = (torch.full((p.shape[1],), v, dtype=torch.bool) for p, v in ((visual, True), (text, False)))
        is_visual = torch.cat([ones, zeros])[None, :, None]
        x = torch.where(is_visual, self.for_visual(x), self.for_text(x))
        return self.head(F.silu(self.shared(x)))


class Rows(nn.Module):
    """Work row by row but for one attention over all rows, then a head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear() for _ in range(4))
        self.norm, self.up, self.head = nn.LayerNorm(D), linear(), linear(VOCAB)

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([visual, text], dim=1)
        x = x + self.o(ops.attention(self.q(x), self.k(x), self.v(x), 2, 2))
        return self.head(x + F.silu(self.up(self.norm(x))))


class Normed(nn.Module):
    """Two layers look at the same rows through norms that differ in gain and shift alone, positions added to keys."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.k, self.v = (nn.ModuleList(linear() for _ in range(2)) for _ in range(2))
        self.queries, self.positions = nn.Parameter(torch.empty(1, 3, D)), nn.Parameter(torch.empty(3, D))
        self.head = linear(VOCAB)

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        rows = torch.tanh(text[:, -1:] + self.queries)
        x = text
        for norm, k, v in zip(self.norms, self.k, self.v, strict=True):
            seen = norm(rows)
            x = x + ops.attention(x, k(seen + self.positions), v(seen), 2, 2)
        return self.head(x)


class Interleaved(nn.Module):
    """One projection makes query, key and value of head 0, then of head 1; then attention over the text."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = linear(3 * D), linear(VOCAB)

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        qkv = self.qkv(text).view(*text.shape[:2], 2, 3, D // 2)
        q, k, v = (qkv[:, :, :, i].reshape(text.shape) for i in range(3))
        return self.head(text + ops.attention(q, k, v, 2, 2))


class Gated(nn.Module):
    """Gate and up projections of the same rows."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down, self.head = linear(), linear(), linear(), linear(VOCAB)

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        return self.head(text + self.down(F.silu(self.gate(text)) * self.up(text)))


class Prefix(nn.Module):
    """The prompt as three rows that a loop reads but does not change, and the state it starts from."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, 3, D))
        self.head = linear(VOCAB)

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([visual, text], dim=1)
        prefix = ops.attention(self.queries.expand(x.shape[0], -1, -1), x, x, 2, 2)
        return self.head(x[:, -1:]), prefix


class Velocity(nn.Module):
    """One step of a flow: the state attends to a prefix that stays the same from step to step."""

    def __init__(self, layers: int = 2, gated: bool = False):
        super().__init__()
        self.into, self.out = nn.Linear(VOCAB, D), linear(VOCAB)
        self.q, self.k, self.v = (nn.ModuleList(linear() for _ in range(layers)) for _ in range(3))
        self.gates = nn.ParameterList(torch.zeros(1) for _ in range(layers)) if gated else None

    def forward(self, state: Tensor, prefix: Tensor) -> Tensor:
        x = self.into(state)
        for i, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True)):
            attended = ops.attention(q(x), k(prefix), v(prefix), 2, 2)
            x = x + (attended if self.gates is None else torch.tanh(self.gates[i]) * attended)
        return state + self.out(x)


def flow(gated: bool = False, dtype: torch.dtype = torch.float32) -> Program:
    """A program whose loop changes a state and reads a prefix."""
    return chat(
        Prefix(),
        outputs=["logits", "prefix"],
        step=(Velocity(gated=gated), {"logits": ("B", 1, VOCAB), "prefix": ("B", 3, D)}),
        dtype=dtype,
    )


# ---------------------------------------------------------------------------------- images that lie outside the text
MEDIA, MARKER = 6, 12  # width of the rows of such an image; its marker is an id of the vocabulary
CROSS_SIZES = tuple(
    {"B": b, "nt": nt, "nb": nb} for b, nt, nb in ((1, 1, 1), (1, 5, 2), (3, 1, 3), (3, 4, 1))
)  # fmt: skip


class Blocks(nn.Module):
    """pixel_values ``[N, 3, 4, 4]`` -> image_rows ``[N, blocks, ROWS, MEDIA]``"""

    def __init__(self, blocks: int):
        super().__init__()
        self.blocks, self.project = blocks, nn.Linear(3 * PIXELS * PIXELS, blocks * ROWS * MEDIA)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.project(pixel_values.flatten(1)).view(-1, self.blocks, ROWS, MEDIA)


class Beside(nn.Module):
    """Layers of gated attention to images outside the text, each before causal attention among the rows of the text.

    Two query heads read each of `kv_heads` key heads. `mixed` False: nothing follows the last attention to images.
    """

    def __init__(
        self, layers: int = 2, gate: tuple[int, ...] = (1,), kv_heads: int = 1, bias: bool = True, mixed: bool = True
    ):
        super().__init__()
        self.heads, self.kv_heads, self.mixed = 2 * kv_heads, kv_heads, mixed
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(layers))
        self.q, self.o, self.mlp = (nn.ModuleList(linear(bias=bias) for _ in range(layers)) for _ in range(3))
        self.k, self.v = (nn.ModuleList(nn.Linear(MEDIA, D // 2, bias) for _ in range(layers)) for _ in range(2))
        self.gates = nn.ParameterList(torch.zeros(gate) for _ in range(2 * layers))
        self.head = linear(VOCAB)

    def forward(self, text: Tensor, media: Tensor, seen: Tensor, attends: Tensor, *sees: Tensor) -> Tensor:
        x = text
        for i, (norm, q, k, v, o) in enumerate(zip(self.norms, self.q, self.k, self.v, self.o, strict=True)):
            kv = (k(media), v(media))
            rows = ops.cross_attention(q(norm(x)), *kv, seen, attends, self.heads, self.kv_heads)
            x = x + o(rows) * self.gates[2 * i].tanh()
            more = self.mlp[i](F.silu(x))
            x = x + self.gates[2 * i + 1].tanh() * (more * sees[0][..., None] if sees else more)
            if self.mixed or i + 1 < len(self.q):
                x = x + ops.attention(x, x, x, 2, 2, causal=True)
        return self.head(x)


class Cached(Beside):
    """The same on top of a cache, as an engine wants it."""

    def forward(self, text: Tensor, media: Tensor, seen: Tensor, attends: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *_, past, keys, values = rest
        x = text
        for i, (norm, q, k, v, o) in enumerate(zip(self.norms, self.q, self.k, self.v, self.o, strict=True)):
            kv = (k(media), v(media))
            rows = ops.cross_attention(q(norm(x)), *kv, seen, attends, self.heads, self.kv_heads)
            x = x + o(rows) * self.gates[2 * i].tanh()
        out, keys, values = ops.cached_attention(x, self.mlp[0](x), self.mlp[1](x), keys, values, past, 1, 1)
        return self.head(x + out), past + text.shape[1], keys, values


def beside(
    language: nn.Module | None = None,
    blocks: int = 1,
    together: bool = False,
    before: str = "nothing",
    reset: bool = False,
    sees: bool = False,
    images: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """A Program that the pipeline can check, of images that lie outside the text (by default beside a `Beside`)."""
    weights: dict[str, Tensor] = {}

    def named(name: str, module: nn.Module, *args) -> Stage:
        return trace(Holder(name, draw(module, dtype, seed=len(weights))), *args, weights, dtype)

    inputs: dict = {
        "text": ("B", "nt", D),
        "media": ("B", "nb", ROWS, MEDIA),
        "seen": (("B", "nt", "nb"), torch.bool),
        "attends": (("B", "nt"), torch.bool),
    }
    if sees:
        inputs["sees"] = (("B", "nt"), torch.bool)
    state: dict = {"logits": (("B", 1, VOCAB), dtype)}
    if isinstance(language, Cached):
        state |= {"past": (("B",), torch.int64), **dict.fromkeys(("keys", "values"), (("B", 1, 64, D), dtype))}
        inputs |= {"past": (("B",), torch.int64), **dict.fromkeys(("keys", "values"), ("B", 1, 64, D))}
    outputs = list(state)
    stages = {
        "images": named("images", Blocks(blocks), {"pixel_values": ("N", 3, PIXELS, PIXELS)}, ["image_rows"]),
        "embed": named("embed", Embed(), {"ids": (("B", "nt"), torch.int64)}, ["text"]),
        "language_model": named("language_model", language or Beside(), inputs, outputs),
        "next_token": trace(NextToken([2]), {"logits": ("B", "n", VOCAB)}, ["ids", "done"], weights, dtype),
    }
    schedule = texts(
        Call("images"),
        Loop((Call("embed", {"ids": "chunk.ids"}), Call("language_model")), over="chunks"),
        Loop((Call("next_token"), Call("embed"), Call("language_model")), trips="max_new_tokens", until="done"),
    )
    cross = Cross(blocks, ROWS, MEDIA, before, together, reset)
    processing = Processing(
        image={"size": PIXELS, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash"},
        chat={"user": "", "assistant": "", "separator": "", "end": "", "image": "<image>"},
    )
    info = toy_info(dtype, image_id=MARKER, tokens_per_image=1, images=images, cross=cross, processing=processing)
    return Program(stages, schedule, weights, state, info).drop_unused()


def open_gates(program: Program) -> Program:
    """Gates as after training: images count."""
    program.weights |= {k: torch.full_like(w, 0.7) for k, w in program.weights.items() if "gates" in k}
    return program
