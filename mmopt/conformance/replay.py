"""Replay recorded cases at any point of the line: the loaded model, the Program, the optimized Program, the engine."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmopt.conformance import read_generation as painted
from mmopt.conformance import run_generation as repainting
from mmopt.conformance import run_stage as alone
from mmopt.conformance.case import TOKEN_IDS, Case
from mmopt.conformance.read import options_for
from mmopt.conformance.run_model import at_model, cases_of, is_zeroed, read_model_cases, tapped
from mmopt.conformance.run_program import Pairs, at_engine, at_program, preprocessed
from mmopt.conformance.table import POINTS
from mmopt.conformance.table import table as table
from mmopt.exporters.onnx import export
from mmopt.frontend.load import Model, load
from mmopt.frontend.trace import trace
from mmopt.pipeline import run_passes
from mmopt.runtime.engine import Engine
from mmopt.spec.dtypes import MODEL_DTYPES
from mmopt.spec.manifest import read_directory

# Cases are recorded in float32. In half precision each rounding is 2^-9 (bfloat16) or 2^-12 (float16) of a value and
# adds up through image stages and decoder, so the largest error is judged as a share of the largest recorded value of
# its tensor. Right models of ten layers measure up to 0.072 and 0.0064, so this is twice to three times as much; one
# wrong projection in one layer gives 0.3 or more. Greedy decoding is fed the recorded ids: its own are only reported.
HALF_TOLERANCE = {torch.bfloat16: 0.15, torch.float16: 0.02}

LEVELS_APART = 0.01  # the share of the values of a picture of 8 bits that may be one level off

NOT_COMPARED = (  # the first reason that fits stands in the report: (points, outputs, reason)
    ("model", r"", "the model made no such value from these inputs"),
    ("program optimized engine", r"out\.prepare\.(?!inputs_embeds)", "there is no such tensor: prompts are not padded"),
    ("optimized engine", r"out\.loss", "needs the logits of all rows"),
    ("engine", r"out\.(prepare\.inputs_embeds|hidden\.0)$", "no image rows in it, and an engine shows no others"),
    ("program optimized engine", r"", "an internal value, not visible at this point"),
)
RECORDED = (
    r"out\.(prepare\.(inputs_embeds|position_ids|modality_indicators|attention_mask|labels)|logits|loss|hidden\.0|kv_cache\.\d+\.(key|value)"
    r"|greedy\.(token_ids(_cached|_nocache)?|step_logits_(cached|nocache)|final_kv_cache\.\d+\.(key|value))"
    r"|fed\.(logits|time)|sight\.\w+)"
)


def verify(
    checkpoint: str | Path,
    cases: Iterable[str | Path],
    at: Sequence[str] = POINTS,
    dtype: str = "float32",
    progress: Callable[[str], None] | None = None,
    load_options: dict[str, Any] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Replay case files at the points `at`; ``progress`` is told what is going on, a line at a time.

    `load_options`: further arguments of `mmopt.load` (language_model, vision ...).

    Returns ``rows`` of ``{case, point, output, max_abs, max_rel, ids_equal, ok}`` and ``not_compared`` of ``{case,
    point, output, reason}``, all plain JSON values. max_rel is the largest error over the largest recorded value;
    ids_equal is None where the output is not token ids; numbers that are not finite are None. A run that fails gives a
    row ``output="run"`` that is not ok, with its error in ``not_compared``. ``passed_over`` are ``{file, reason}`` that
    are no cases.

    Raises ValueError for an unknown point, dtype, or input name, and for files that are not cases.
    """
    wrong = [p for p in at if p not in POINTS]
    if wrong or not at:
        raise ValueError(f"at: expected some of {', '.join(POINTS)}, found {', '.join(wrong) or 'none'}")
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(MODEL_DTYPES)}, found {dtype!r}")
    tell = progress or (lambda line: None)
    tell(f"load {checkpoint}")
    paths, options, weights = list(cases), load_options or {}, []  # type: list[str | Path], dict[str, Any], list[str]
    model = load(checkpoint, dtype=dtype, **options)
    if more := {k: v for k, v in options_for(paths, cases_of(model)).items() if k not in options}:
        tell(f"load {checkpoint} with {', '.join(f'{k} {v}' for k, v in more.items())}, as the cases have it")
        model = load(checkpoint, dtype=dtype, **options, **more)
    todo = read_model_cases(paths, model, weights)
    passed_over = [{"file": name, "reason": "weights of the checkpoint, no case"} for name in weights]
    result: dict[str, list[dict[str, Any]]] = {"rows": [], "not_compared": [], "passed_over": passed_over}
    with ExitStack() as stack:
        line = Line(model, todo, tell, stack)
        for point in (p for p in POINTS if p in at):
            for case in todo:
                tell(f"{point}: {case.name}")
                rows, skipped = _replay_one(line, point, case)
                result["rows"] += rows
                result["not_compared"] += skipped
    return result


def passed(result: dict[str, list[dict[str, Any]]]) -> bool:
    """True if every comparison is ok and every case was compared at least once."""
    compared = {r["case"] for r in result["rows"]}
    return all(r["ok"] for r in result["rows"]) and all(n["case"] in compared for n in result["not_compared"])


class Line:
    """The points, each made on first use and large enough for all cases."""

    def __init__(self, model: Model, cases: Sequence[Case], tell: Callable[[str], None], stack: ExitStack):
        self.model, self.tell, self.stack = model, tell, stack
        prompts = [c for c in cases if c.is_prompt]
        image = model.image_id
        self.batch = max((len(c.prompts) for c in prompts), default=1)
        counts = [c.sights.images if c.sights else [p.count(image) for p in c.prompts] for c in prompts]
        self.images = max((n for each in counts for n in each), default=1)
        more = [max(c.steps - 1, 0) + (0 if c.fed is None else c.fed.shape[1]) for c in prompts]
        self.context = max((int(c.valid.sum(1).max()) + n for c, n in zip(prompts, more, strict=True)), default=1)
        for painting in (c.generation for c in cases if c.generation):
            self.batch = max(self.batch, len(painting.prompts))
            self.context = max(self.context, painting.rows)
        self.made: dict[str, Any] = {}

    def point(self, name: str) -> Any:
        if name not in self.made:
            try:
                self.made[name] = getattr(self, f"_{name}")()
            except Exception as e:
                self.made[name] = e
        if isinstance(self.made[name], Exception):
            raise self.made[name]
        return self.made[name]

    def _model(self) -> Model:
        return self.model

    def _program(self) -> Any:
        self.tell(f"trace: batch {self.batch}, {self.images} images, context {self.context}")
        return trace(self.model, batch=self.batch, images=max(self.images, 1), context=max(self.context, 8))

    def _optimized(self) -> Any:
        program = self.point("program")
        self.tell("optimize")
        return run_passes(program, check=False).program  # the recorded cases are the check

    def _engine(self) -> tuple[Any, dict]:
        program = self.point("optimized")
        self.tell("export")
        out = Path(self.stack.enter_context(tempfile.TemporaryDirectory())) / "engine"
        export(program, out)
        settings = read_directory(out).info.processing.image
        return Engine(out), settings


def _replay_one(line: Line, point: str, case: Case) -> tuple[list[dict], list[dict]]:
    """The rows of one case at one point, and what was left out."""
    half = HALF_TOLERANCE.get(line.model.dtype)
    where = {"case": case.name, "point": point}
    if (why := _why_not_at(line.model, point, case, half is not None)) is not None:
        return [], [{**where, "output": name, "reason": why} for name in sorted(case.outputs)]
    try:
        pairs = _run(line, point, case, forced=half is not None)
    except Exception as e:  # one broken run must not hide the other results
        row = {**where, "output": "run", "max_abs": None, "max_rel": None, "ids_equal": None, "ok": False}
        return [row], [{**where, "output": "out.*", "reason": f"failed: {type(e).__name__}: {e}"}]
    layout = cases_of(line.model)
    rows, guided = [], painted.guided(case) if half else {}
    pairs = {k: x for k, x in pairs.items() if k not in guided}
    for k, (ours, recorded) in sorted(pairs.items()):
        mean = case.mean(k)
        more = painted.allowance(case, mean)
        atol, share = layout.atol * layout.scales.get(mean, 1.0) * more, half and half * more
        rows.append({**where, "output": k, **judge(mean, ours, recorded, atol, layout.rtol, share)})
    left_out = {k: _why_not(line.model, point, case, k) for k in sorted(case.outputs) if k not in pairs} | guided
    for k in pairs:
        if case.mean(k) == "out.logits" and point in ("optimized", "engine"):
            left_out[k] = "rows before the last one of each sample are not made"
        elif case.mean(k).startswith("out.greedy.") and case.live(case.outputs[k]) is not case.outputs[k]:
            left_out[f"{k}, after a sample's end"] = "the reference fills a sample up while others go on"
        elif is_zeroed(case.mean(k), layout.zeroed):
            left_out[f"{k}, rows that see no image"] = "they are zeros already where this value can be had"
        elif case.generation and (found := painted.left_out(case, point, k)):
            left_out[found[0]] = found[1]
    if case.padded and pairs:
        left_out["padding rows"] = "no one reads them: only real rows are compared"
    return rows, [{**where, "output": k, "reason": why} for k, why in left_out.items()]


def _why_not_at(model: Model, point: str, case: Case, half: bool) -> str | None:
    """Why nothing of a case can be compared at a point."""
    if half and point in ("optimized", "engine"):
        return f"{str(model.dtype).removeprefix('torch.')} is compared at model and program only"
    if point == "model":
        return None
    if case.sights is None and any(p[-1] == model.image_id for p in case.prompts if p):
        return "a prompt ends with an image, which a Program refuses"
    if case.sights and case.sights.given:
        return "its mask of images is not the one that follows from its ids, and a Program goes by these"
    return None


def _run(line: Line, point: str, case: Case, forced: bool) -> Pairs:
    values = cases_of(line.model).values
    if point == "model":
        return at_model(line.model, case, forced) | preprocessed(line.model.processing["image"], case)
    made = line.point(point)
    if case.generation:
        return repainting.at_point(point, made[0] if point == "engine" else made, case)
    if point == "engine":
        engine, settings = made
        pairs = at_engine(engine, case, forced, values) | preprocessed(settings, case)
        return pairs | alone.at_point(point, line.model.module, line.point("program").info, case)
    pairs = at_program(made, case, forced, all_rows=point == "program", values=values)
    pairs |= alone.at_point(point, line.model.module, made.info, case)
    return pairs | preprocessed(made.info.processing.image, case)


def judge(
    name: str, ours: Tensor, recorded: Tensor, atol: float, rtol: float, half: float | None = None
) -> dict[str, Any]:
    """One comparison: ``|ours - recorded| <= atol + rtol |recorded|`` everywhere; integers must be equal.

    With `half` (half precision) the largest error may be that share of the largest recorded value.
    """
    row: dict[str, Any] = {"max_abs": None, "max_rel": None, "ids_equal": None, "ok": False}
    is_ids = TOKEN_IDS.fullmatch(name) is not None
    if ours.shape != recorded.shape:
        return row | ({"ids_equal": False} if is_ids else {})
    if is_ids:
        equal = torch.equal(ours.long(), recorded.long())
        return row | {"ids_equal": equal, "ok": equal or half is not None}
    a, b = ours.double(), recorded.double()
    error, size = (a - b).abs(), b.abs()
    max_abs = float(error.max()) if error.numel() else 0.0
    scale = float(size.max()) if size.numel() else 0.0
    max_rel = max_abs / scale if scale else max_abs
    if name == "out.paint.levels" and half is None:  # rounded down: the least error moves some over a border
        ok = max_abs <= 1 and float(error.mean()) <= LEVELS_APART
    elif not recorded.is_floating_point() and name != "out.paint.levels":
        ok = torch.equal(a, b)
    elif half is None:
        ok = bool((error <= atol + rtol * size).all())  # false for nan
    else:
        ok = max_rel <= half
    finite = math.isfinite(max_abs)
    return row | {"max_abs": max_abs if finite else None, "max_rel": max_rel if finite else None, "ok": ok and finite}


def _why_not(model: Model, point: str, case: Case, recorded: str) -> str:
    layout, name = cases_of(model), case.mean(recorded)
    if name in layout.unread:
        return layout.unread[name]
    if case.generation:
        return painted.why_not(point, name, "decode_image" in model.family.stages(model.module, 1))
    if case.run is not None and point != "model":
        return "no Program is made of what these inputs go through"
    taps = (layout.vision_taps, layout.input_taps, layout.language_taps)
    known = re.fullmatch(RECORDED, name) or any(re.fullmatch(f"out\\.{re.escape(p)}_.*", name) for p in case.pictures)
    if not known and not any(tapped(name, t) for t in taps):
        return "not an output that this version knows"
    if case.misled and not name.startswith("out.prepare."):
        return "left padding: the reference masks the wrong rows here"
    if not case.goes_on and name.startswith(("out.greedy.", "out.fed.")):
        return "the reference goes on from padding rows here"
    if name.startswith("out.sight."):
        return "not what follows from the ids; given as it is"
    if name.endswith("_nocache") and case.markers_made:
        return "without its cache the reference takes a new marker for one more image"
    if case.samples_touch and name.startswith(("out.greedy.", "out.fed.")):
        return "a marker in one sample takes the others' images away; here samples do not touch each other"
    return next(why for points, names, why in NOT_COMPARED if point in points.split() and re.match(names or "", name))
