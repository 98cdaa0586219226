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
from rich.console import Console
from rich.table import Table

from mmopt.ir.cost import count_work
from mmopt.ir.graph import Sizes, is_const, shape_of
from mmopt.ir.inspect_generation import PROMPT, Count
from mmopt.ir.printer import op_name, program_text
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage, live_constants
from mmopt.report import number, pass_text
from mmopt.spec.cross_mask import CrossMask, segments
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.prompt import Chunk, layout_prompts
from mmopt.spec.schedule import Call

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


# ------------------------------------------------------------------------------------------------------- the schedule
def typical_prompt(info: ModelInfo, images: int, leading: int = LEADING, text: int = TEXT) -> list[int]:
    """Ids of a prompt: `leading` text rows, `images` images, then text; `text` rows in all, fewer in a small context.

    Where images lie outside the text each is a marker and 19 rows of text, as in few-shot prompts.
    Raises ValueError if the images do not fit into the context.
    """
    if info.cross and images:
        if SHOT * images > info.context:
            raise ValueError(f"{images} images with {SHOT} rows of text each do not fit a context of {info.context}")
        return ([info.image_id] + [0] * (SHOT - 1)) * images
    room = info.context - images * info.tokens_per_image
    if info.positions is not None:  # those of rows that were left out stay empty
        room = min(room, info.positions - images * (info.tokens_per_image + info.position_delta))
    if room < 1:
        taken = images * info.tokens_per_image
        raise ValueError(f"{images} images take {taken} rows, but the context holds {info.context}, text included")
    text = min(text, room)
    leading = min(leading, text - 1) if images else 0
    return [0] * leading + [info.image_id] * images + [0] * (text - leading)


def inspect(
    program: Program,
    reports: Sequence[Any] = (),
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
    given: dict[str, Any] = {"batch": batch, "images": images, "context": context}
    info = dataclasses.replace(program.info, **{k: v for k, v in given.items() if v is not None})
    prompt = typical_prompt(info, info.images)
    rows = len(prompt) + info.images * (info.tokens_per_image - 1)
    new_tokens = max(1, min(new_tokens, info.context - rows + 1))
    chunks = layout_prompts([prompt] * info.batch, info, new_tokens)
    calls = _calls(program, info, chunks, rows, new_tokens)
    conventions = [*CONVENTIONS, _prompt_text(info, prompt, rows)]
    room = program.info.context - info.required_flow.tokens if program.schedules.image else 0
    if program.schedules.image and prompt_length is None and room < 2:
        conventions.append("painting: not counted, the context holds no image with a prompt of two ids.")
    elif program.schedules.image:
        steps = steps or info.required_flow.steps
        prompt_length = min(PROMPT, room) if prompt_length is None else prompt_length
        calls += Count(program, prompt_length, 1, steps).run()
        conventions.append(f"painting: one image of a prompt of {prompt_length} ids, {steps} guided steps.")
    return {
        **{k: getattr(info, k) for k in ("family", "dtype", "batch", "images", "context")},
        "prompt": {"rows": rows, "text_rows": _text_rows(info, rows), "chunks": len(chunks)},
        "conventions": conventions,
        "schedule": program_text({}, program.schedules).rstrip(),
        "stages": {name: _stage(stage) for name, stage in program.stages.items()},
        "calls": calls,
        "totals": _totals(calls, info),
        "reports": [dataclasses.asdict(r) for r in reports],
    }


def _text_rows(info: ModelInfo, rows: int) -> int:
    return rows if info.cross else rows - info.images * info.tokens_per_image


def _prompt_text(info: ModelInfo, prompt: list[int], rows: int) -> str:
    leading = next((i for i, t in enumerate(prompt) if t == info.image_id), 0)
    n = info.images
    if info.cross and n:
        return (
            f"The prompt of each sample: {n} images, each with {SHOT} rows of text, its marker among them; {rows} rows."
        )
    images = f"{leading} rows of text, {n} x {info.tokens_per_image} rows of images, " if n else ""
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


def _calls(program: Program, info: ModelInfo, chunks: list[Chunk], past: int, new_tokens: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    batch, image_rows, phase = info.batch, info.tokens_per_image, "encode"
    cross = info.cross
    blocks = max(1, info.images) * cross.tiles if cross else 0

    def seen(sight: CrossMask | None, ids: Sequence[int] = ()) -> dict[str, int]:
        """Sizes of the segments of one sample's prompt, or of one further token of each sample."""
        if sight is None or cross is None:
            return {}
        rows = [sight.read(ids)] if ids else [[sight.now]] * batch
        chosen = segments(rows, cross.tokens)
        most = max(1, *(len(b) for _, b in chosen.blocks))
        return {"S": len(chosen.blocks), "L": chosen.segment_rows.shape[1], "K": most * cross.tokens, "nb": blocks}

    def add(body: Iterable[Call], trips: int, sizes: dict[str, int], rows_before: int) -> None:
        for c in body:
            work = count_work(program.stages[c.stage], sizes, rows_before)
            rows = _rows(program.stages[c.stage], sizes)
            made.append({"stage": c.stage, "phase": phase, "rows": rows, "trips": trips, **dataclasses.asdict(work)})

    for item in program.schedules.text:
        if isinstance(item, Call):
            if info.images or phase != "encode":
                add([item], 1, {"N": batch * info.images, "F": 1, "B": batch, "nb": blocks}, 0)
        elif item.over:
            phase, before = "prefill", 0
            sight = CrossMask(cross, info.image_id, info.images) if cross else None
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


def _totals(calls: list[dict[str, Any]], info: ModelInfo) -> dict[str, float]:
    def total(phase: str, field: str, trips: bool = False) -> int:
        return sum(c[field] * (c["trips"] if trips else 1) for c in calls if c["phase"] == phase)

    phases, batch, made = {c["phase"] for c in calls}, info.batch, {}
    if "decode" in phases:
        made["decode_flops_per_token"] = total("decode", "flops") / batch
        made["decode_attention_flops_per_token"] = total("decode", "attention_flops") / batch
        made["decode_bytes_per_token"] = total("decode", "weight_bytes") / batch
        made["decode_cache_bytes_per_token"] = total("decode", "cache_bytes") / batch
    if "prefill" in phases:
        made["prefill_flops"] = total("prefill", "flops", trips=True)
    if "encode" in phases:
        made["encode_flops_per_image"] = total("encode", "flops") / (batch * info.images)
    if "paint" in phases:
        made["image_flops"] = total("paint", "flops", trips=True)
        made["image_attention_flops"] = total("paint", "attention_flops", trips=True)
    return made


def text(report: dict[str, Any]) -> str:
    """What `inspect` returned, for people."""
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
    console.print(*(pass_text(**r) for r in report["reports"]), *(f"- {c}" for c in report["conventions"]), sep="\n")
    return file.getvalue()
