"""What a Program does, counted without running it: operators, FLOPs, weight bytes read. Works on shapes alone."""

from __future__ import annotations

import dataclasses
import io
import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
from torch.fx import Node

from mmopt.graph import (
    ATTENTION,
    CACHED_ATTENTION,
    CONV2D,
    CROSS_ATTENTION,
    EMBEDDING,
    LINEAR,
    SEGMENT_ATTENTION,
    SLICE,
    aten,
    is_const,
    several,
    shape_of,
)  # fmt: skip
from mmopt.inspect_painting import PROMPT, Count
from mmopt.planning import Chunk, plan
from mmopt.program import Call, Program, Stage, live_constants
from mmopt.rewriting import Report
from mmopt.sight import Sight, segments
from mmopt.text import op_name, program_text

MATMULS = {aten.matmul.default, aten.mm.default, aten.bmm.default}
LEADING, TEXT = 8, 63  # text rows of the typical prompt before its images, and in all
SHOT = 20  # text rows of each image, its marker among them, where images lie outside the text

CONVENTIONS = (
    "A multiply-add is 2 FLOPs; linear, convolution and attention products are counted, nothing else.",
    "The head is counted (tied too); embedding look-ups cost 0 FLOPs and read the rows looked up.",
    "Attention is counted dense where a dense mask runs, by visible pairs where causality is known.",
    "A weight is read once in a call in which its node has rows; branches that a selection discards run, and count.",
    "What depends on weights alone is computed before run time: 0 FLOPs, and the bytes of the result that is read.",
    "flops, weight_bytes and cache_bytes are those of one trip of a call; totals per token are those of the first new "
    "token, right after the prompt, for one sample of the batch.",
    "Rows of images outside the text are read whole where a mask chooses among them, else only by those that see them; "
    "they are counted as cache rows.",
    "decode_bytes_per_token are weights alone; cache rows read stand in decode_cache_bytes_per_token.",
)


@dataclasses.dataclass
class Work:
    """What one call of a stage costs. `flops` include `attention_flops`; `cache_bytes` are cache rows read."""

    flops: int = 0
    attention_flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0


class Sizes:
    """Puts numbers in for the symbols of shapes."""

    def __init__(self, values: dict[str, int]):
        self.values, self.known = values, {}  # type: ignore[var-annotated]

    def __call__(self, size: Any) -> int:
        if not isinstance(size, sympy.Expr):
            return int(size)
        if size not in self.known:
            if missing := {s.name for s in size.free_symbols} - set(self.values):  # type: ignore[attr-defined]
                raise ValueError(f"size {size}: no number is given for {', '.join(sorted(missing))}")
            self.known[size] = int(size.subs({s: self.values[s.name] for s in size.free_symbols}))  # type: ignore[attr-defined]
        return self.known[size]

    def shape(self, n: Node) -> tuple[int, ...]:
        """Shape of a node; of the first output if it has several."""
        shape = shape_of(n)
        return tuple(self(s) for s in (shape[0] if several(n.meta["dtype"]) else shape))  # type: ignore[union-attr]

    def count(self, n: Node) -> int:
        return math.prod(self.shape(n))


def count_work(stage: Stage, sizes: dict[str, int], past: int = 0) -> Work:
    """Cost of one call with numbers for the symbols (``{"B": 1, "nv": 0, "nt": 1}``) and `past` rows in the caches.

    Raises ValueError if a symbol of the stage has no number.
    """
    of, work = Sizes(sizes), Work()
    for n in stage.graph.nodes:
        if n.op != "call_function" or n.meta["const"]:
            continue
        flops = _flops(n, of, past)
        work.flops += flops
        if "attention" in op_name(n):
            work.attention_flops += flops
        if n.target is SEGMENT_ATTENTION or (n.target is CROSS_ATTENTION and n.args[1].op == "placeholder"):  # type: ignore[union-attr]
            work.cache_bytes += sum(of.count(x) * x.meta["dtype"].itemsize for x in n.args[1:3])  # type: ignore[union-attr,misc,arg-type]
        if n.target is CACHED_ATTENTION:
            batch, kv_heads, _, head_dim = of.shape(n.args[3])  # type: ignore[arg-type]
            seen = past + of.shape(n.args[0])[1]  # type: ignore[arg-type]
            work.cache_bytes += 2 * batch * kv_heads * seen * head_dim * n.args[3].meta["dtype"].itemsize  # type: ignore[union-attr]
    work.weight_bytes = sum(_bytes_read(c, of) for c in live_constants(stage))
    return work


def _flops(n: Node, of: Sizes, past: int) -> int:
    op, args = n.target, n.args
    if op is LINEAR or op in MATMULS:
        return 2 * of.count(n) * of.shape(args[0])[-1]  # type: ignore[arg-type]
    if op is CONV2D or op_name(n) in ("conv1d", "conv3d"):
        return 2 * of.count(n) * math.prod(of.shape(args[1])[1:])  # type: ignore[arg-type]
    if op_name(n).startswith("conv_transpose"):
        return 2 * of.count(args[0]) * math.prod(of.shape(args[1])[1:])  # type: ignore[arg-type]
    if op is CACHED_ATTENTION:
        batch, rows, width = of.shape(args[0])  # type: ignore[arg-type]
        if len(args) > 10 and args[10] is not None:  # a mask that is not known
            return 4 * batch * width * rows * (past + rows)
        return 4 * batch * width * (rows * past + rows * (rows + 1) // 2)
    if op is CROSS_ATTENTION:
        (batch, rows, width), (_, blocks, keys, _) = of.shape(args[0]), of.shape(args[1])  # type: ignore[arg-type]
        return 4 * batch * width * rows * blocks * keys
    if op is SEGMENT_ATTENTION:
        (count, keys, _), length = of.shape(args[1]), of.shape(args[3])[1]  # type: ignore[arg-type]
        return 4 * count * length * keys * of.shape(args[0])[2]  # type: ignore[arg-type]
    if op is ATTENTION:
        (batch, rows, width), keys = of.shape(args[0]), of.shape(args[1])[1]  # type: ignore[arg-type]
        causal = len(args) > 6 and args[6]
        pairs = rows * (keys - rows) + rows * (rows + 1) // 2 if causal else rows * keys
        return 4 * batch * width * pairs
    if "scaled_dot_product" in op_name(n):  # left as traced, so it has a mask of its own: dense
        return 2 * (of.count(args[0]) + of.count(n)) * of.shape(args[1])[-2]  # type: ignore[arg-type]
    return 0


def _bytes_read(constant: Node, of: Sizes) -> int:
    """Bytes of a live constant that one call reads: look-ups and slices read their rows, other nodes all of it."""
    whole, most = of.count(constant), 0
    for user in constant.users:
        if user.op == "output":
            most = whole
        elif not user.meta["const"] and of.count(user):
            few = user.target in (EMBEDDING, SLICE) and user.args[0] is constant
            most = max(most, min(whole, of.count(user)) if few else whole)
    return most * constant.meta["dtype"].itemsize


# ------------------------------------------------------------------------------------------------------- the schedule
def typical_prompt(info: dict[str, Any], images: int, leading: int = LEADING, text: int = TEXT) -> list[int]:
    """Ids of a prompt: `leading` text rows, `images` images, then text; `text` rows in all, fewer in a small context.

    Where images lie outside the text each is a marker and 19 rows of text, as in few-shot prompts.
    Raises ValueError if the images do not fit into the context.
    """
    if info.get("cross") and images:
        if SHOT * images > info["context"]:
            raise ValueError(f"{images} images with {SHOT} rows of text each do not fit a context of {info['context']}")
        return ([info["image_id"]] + [0] * (SHOT - 1)) * images
    room = info["context"] - images * info["rows_per_image"]
    if "positions" in info:  # those of rows that were left out stay empty
        room = min(room, info["positions"] - images * (info["rows_per_image"] + info["rows_left_out"]))
    if room < 1:
        taken = images * info["rows_per_image"]
        raise ValueError(f"{images} images take {taken} rows, but the context holds {info['context']}, text included")
    text = min(text, room)
    leading = min(leading, text - 1) if images else 0
    return [0] * leading + [info["image_id"]] * images + [0] * (text - leading)


def inspect(
    program: Program,
    reports: Sequence[Report] = (),
    batch: int | None = None,
    images: int | None = None,
    context: int | None = None,
    new_tokens: int = 64,
    prompt_length: int | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Count a Program: what ``mmopt inspect --json`` prints.

    The schedule is followed for `batch` samples with the typical prompt of `images` images each (by default as many as
    the program was traced for) and up to `new_tokens` tokens; where a model paints, also for one image of a prompt of
    `prompt_length` ids (by default 32, or as many as fit) and `steps` guided steps (by default the reference's). Raises
    ValueError if the images or the prompt do not fit the context.
    """
    given = {"batch": batch, "images": images, "context": context}
    info = program.info | {k: v for k, v in given.items() if v is not None}
    prompt = typical_prompt(info, info["images"])
    rows = len(prompt) + info["images"] * (info["rows_per_image"] - 1)
    new_tokens = max(1, min(new_tokens, info["context"] - rows + 1))
    chunks = plan([prompt] * info["batch"], info, new_tokens)
    calls = _calls(program, info, chunks, rows, new_tokens)
    conventions = [*CONVENTIONS, _prompt_text(info, prompt, rows)]
    room = program.info["context"] - info["flow"]["rows"] if program.painting else 0
    if program.painting and prompt_length is None and room < 2:
        conventions.append("painting: not counted, the context holds no image with a prompt of two ids.")
    elif program.painting:
        steps = steps or info["flow"]["steps"]
        prompt_length = min(PROMPT, room) if prompt_length is None else prompt_length
        calls += Count(program, prompt_length, 1, steps).run()
        conventions.append(f"painting: one image of a prompt of {prompt_length} ids, {steps} guided steps.")
    return {
        **{k: info[k] for k in ("family", "dtype", "batch", "images", "context")},
        "prompt": {"rows": rows, "text_rows": _text_rows(info, rows), "chunks": len(chunks)},
        "conventions": conventions,
        "schedule": program_text(dataclasses.replace(program, stages={})).rstrip(),
        "stages": {name: _stage(stage) for name, stage in program.stages.items()},
        "calls": calls,
        "totals": _totals(calls, info),
        "reports": [dataclasses.asdict(r) for r in reports],
    }


def _text_rows(info: dict[str, Any], rows: int) -> int:
    return rows if info.get("cross") else rows - info["images"] * info["rows_per_image"]


def _prompt_text(info: dict[str, Any], prompt: list[int], rows: int) -> str:
    leading = next((i for i, t in enumerate(prompt) if t == info["image_id"]), 0)
    n = info["images"]
    if info.get("cross") and n:
        return (
            f"The prompt of each sample: {n} images, each with {SHOT} rows of text, its marker among them; {rows} rows."
        )
    images = f"{leading} rows of text, {n} x {info['rows_per_image']} rows of images, " if n else ""
    return f"The prompt of each sample: {images}{len(prompt) - leading - n} rows of text; {rows} rows in all."


def _stage(stage: Stage) -> dict[str, Any]:
    made = [n for n in stage.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    size = {n: math.prod(shape_of(n)) * n.meta["dtype"].itemsize for n in live_constants(stage)}  # type: ignore[arg-type,type-var]
    return {
        "ops": _sorted(op_name(n) for n in made if not is_const(n)),
        "constant_ops": _sorted(op_name(n) for n in made if is_const(n)),
        "inputs": stage.inputs,
        "outputs": stage.outputs,
        "weight_bytes": int(sum(size.values())),
    }


def _sorted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _calls(program: Program, info: dict, chunks: list[Chunk], past: int, new_tokens: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    batch, image_rows, phase = info["batch"], info["rows_per_image"], "encode"
    cross = info.get("cross")
    blocks = max(1, info["images"]) * cross["blocks"] if cross else 0

    def seen(sight: Sight | None, ids: Sequence[int] = ()) -> dict[str, int]:
        """Sizes of the segments of one sample's prompt, or of one further token of each sample."""
        if sight is None or cross is None:
            return {}
        rows = [sight.read(ids)] if ids else [[sight.now]] * batch
        chosen = segments(rows, cross["rows"])
        most = max(1, *(len(b) for _, b in chosen.blocks))
        return {"S": len(chosen.blocks), "L": chosen.segment_rows.shape[1], "K": most * cross["rows"], "nb": blocks}

    def add(body: Iterable[Call], trips: int, sizes: dict[str, int], rows_before: int) -> None:
        for c in body:
            work = count_work(program.stages[c.stage], sizes, rows_before)
            rows = _rows(program.stages[c.stage], sizes)
            made.append({"stage": c.stage, "phase": phase, "rows": rows, "trips": trips, **dataclasses.asdict(work)})

    for item in program.schedule:
        if isinstance(item, Call):
            if info["images"] or phase != "encode":
                add([item], 1, {"N": batch * info["images"], "F": 1, "B": batch, "nb": blocks}, 0)
        elif item.over:
            phase, before = "prefill", 0
            sight = Sight(info, info["images"]) if cross else None
            for c in (c for c in chunks if c.sample == 0):
                sizes = {"B": 1, "nv": 0 if cross else len(c.images) * image_rows, "nt": len(c.ids), "n": 1}
                sizes |= seen(sight, c.ids) | {"n": sizes["nv"] + sizes["nt"]}
                add(item.body, batch, sizes, before)  # the samples are prefilled one by one
                before += sizes["nv"] + sizes["nt"]
        else:
            phase = "decode"
            add(item.body, new_tokens, {"B": batch, "nv": 0, "nt": 1, "n": 1, **seen(sight)}, past)
    return made


def _rows(stage: Stage, sizes: dict[str, int]) -> int:
    """Rows of a call: those that go in where their number is free, else those of the first output (of an image)."""
    symbols = {d.name for n in stage.placeholders() for d in n.meta["shape"] if isinstance(d, sympy.Symbol)}
    free = symbols & {"nv", "nt", "n"}
    if free:
        return sizes["B"] * sum(sizes[name] for name in free)
    return math.prod(Sizes(sizes).shape(next(iter(stage.output_nodes().values())))[:-1])


def _totals(calls: list[dict[str, Any]], info: dict) -> dict[str, float]:
    def total(phase: str, field: str, trips: bool = False) -> int:
        return sum(c[field] * (c["trips"] if trips else 1) for c in calls if c["phase"] == phase)

    phases, batch, made = {c["phase"] for c in calls}, info["batch"], {}
    if "decode" in phases:
        made["decode_flops_per_token"] = total("decode", "flops") / batch
        made["decode_attention_flops_per_token"] = total("decode", "attention_flops") / batch
        made["decode_bytes_per_token"] = total("decode", "weight_bytes") / batch
        made["decode_cache_bytes_per_token"] = total("decode", "cache_bytes") / batch
    if "prefill" in phases:
        made["prefill_flops"] = total("prefill", "flops", trips=True)
    if "encode" in phases:
        made["encode_flops_per_image"] = total("encode", "flops") / (batch * info["images"])
    if "paint" in phases:
        made["image_flops"] = total("paint", "flops", trips=True)
        made["image_attention_flops"] = total("paint", "attention_flops", trips=True)
    return made


# ------------------------------------------------------------------------------------------------------------- as text
def number(x: float) -> str:
    """1.32e10 as ``13.2 G``."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.4g} {prefix}"
    return f"{x:.4g}"


def text(report: dict[str, Any]) -> str:
    """What `inspect` returned, for people."""
    from rich.console import Console
    from rich.table import Table

    calls = Table("stage", "phase", "rows", "trips", "FLOP", "weight bytes", "cache bytes", title="calls (one trip)")
    for c in report["calls"]:
        counts = [number(c[k]) for k in ("flops", "weight_bytes", "cache_bytes")]
        calls.add_row(c["stage"], c["phase"], str(c["rows"]), str(c["trips"]), *counts)
    totals = Table("total", "")
    for name, value in report["totals"].items():
        totals.add_row(name, number(value) + ("B" if "bytes" in name else "FLOP"))
    console = Console(file=(file := io.StringIO()), width=120, markup=False, highlight=False)
    console.print(f"{report['family']}, {report['dtype']}, batch {report['batch']}, context {report['context']}")
    console.print(report["schedule"], end="\n\n")
    for name, stage in report["stages"].items():
        ops = ", ".join(f"{count} {op}" for op, count in stage["ops"].items())
        console.print(f"{name} ({number(stage['weight_bytes'])}B of weights): {ops}")
    console.print(calls, totals)
    console.print(*(str(Report(**r)) for r in report["reports"]), *(f"- {c}" for c in report["conventions"]), sep="\n")
    return file.getvalue()
