"""Counting: against published figures at the official size, closed forms, and torch's own counter on a real run."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmopt.frontend.load import from_config
from mmopt.frontend.trace import trace
from mmopt.ir import ops
from mmopt.ir.capture import StageSpec, TensorSpec, trace_stage
from mmopt.ir.cost import count_work
from mmopt.ir.inspect import inspect, text, typical_prompt
from mmopt.report import number
from mmopt.search.optimize import optimize


def stage_of(module: nn.Module, inputs: dict, outputs: list[str]):
    specs = {}
    for name, given in inputs.items():
        shape, dtype = (given[:-1], given[-1]) if isinstance(given[-1], torch.dtype) else (given, torch.float32)
        specs[name] = TensorSpec(shape, dtype)
    return trace_stage(StageSpec(module.eval().requires_grad_(False), specs, outputs), {})


@pytest.fixture(scope="module")
def official():
    """The official size in 16 bit, shapes only: before and after the passes."""
    program = trace(from_config("mplug-owl2-7b", dtype="bfloat16"), context=768)
    return program, optimize(program)


def call(report: dict, stage: str, phase: str) -> dict:
    return [c for c in report["calls"] if c["stage"] == stage and c["phase"] == phase][-1]


def test_official_size_before_the_passes(official):
    report = inspect(official[0])
    assert call(report, "vision", "encode")["flops"] == pytest.approx(724e9, rel=0.01)
    assert call(report, "abstractor", "encode")["flops"] == pytest.approx(37.9e9, rel=0.01)
    assert report["totals"]["encode_flops_per_image"] == pytest.approx(762e9, rel=0.01)
    # both branches of k and v run for every row: 2 x 32 products of 4096 x 4096 more than needed
    spare = 2 * 32 * 4096**2
    assert report["totals"]["decode_flops_per_token"] == pytest.approx(13.2e9 + 2 * spare, rel=0.01)
    assert report["totals"]["decode_bytes_per_token"] == pytest.approx(13.2e9 + 2 * spare, rel=0.01)


def test_official_size_optimized(official):
    program, result = official[1].program, official[1]
    report = inspect(program, result.reports)
    totals = report["totals"]
    assert totals["decode_flops_per_token"] == pytest.approx(13.2e9, rel=0.01)
    assert totals["decode_bytes_per_token"] == pytest.approx(13.2e9, rel=0.01)
    assert call(report, "vision", "encode")["flops"] == pytest.approx(724e9, rel=0.01)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    linear = 32 * layer + 32000 * 4096
    past = report["prompt"]["rows"]
    assert totals["decode_flops_per_token"] == 2 * linear + 32 * 4 * 4096 * (past + 1)
    assert totals["decode_attention_flops_per_token"] == 32 * 4 * 4096 * (past + 1)
    gains, angles = 65 * 4096, 2 * 64 * 4  # norms; one row of each table of angles, in float32
    assert totals["decode_bytes_per_token"] == 2 * (linear + gains + 4096) + angles
    assert totals["decode_cache_bytes_per_token"] == 2 * 32 * 4096 * (past + 1) * 2
    for stage in report["stages"].values():
        assert not {"nonzero", "gather", "scatter", "where", "index_put"} & set(stage["ops"])
    assert [r["name"] for r in report["reports"]] == [r.name for r in result.reports]


def test_products_are_those_torch_counts(model, program):
    from torch.utils.flop_counter import FlopCounterMode

    for images in (1, 2):
        work = [count_work(program.stages[s], {"N": images}) for s in ("vision", "abstractor")]
        pixels = torch.zeros(images, *program.stages["vision"].input_nodes()["pixel_values"].meta["shape"][1:])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.module.encode_images(pixels)
        products = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(k))
        assert sum(w.flops - w.attention_flops for w in work) == products
    x, rows = torch.zeros(2, 9, program.info.hidden_size), torch.zeros(2, 9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.module(x, rows)
    products = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(k))
    work = count_work(program.stages["language_model"], {"B": 2, "nv": 4, "nt": 5}, past=3)
    assert work.flops - work.attention_flops == products
    width, layers = program.info.kv_heads * program.info.head_dim, program.info.layers
    assert work.cache_bytes == 2 * layers * 2 * (3 + 9) * width * 4
    assert work.attention_flops == layers * 4 * x.shape[2] * 2 * (9 * 3 + 9 * 10 // 2)


class Attentions(nn.Module):
    def forward(self, q, k, v, mask):
        dense = ops.attention(q, k, v, 2, 2, key_mask=mask)
        return dense + ops.attention(q, k, v, 2, 2, causal=True)


def test_attention_by_pairs():
    rows = {"q": ("B", "nt", 8), "k": ("B", 6, 8), "v": ("B", 6, 8), "mask": ("B", 6, torch.bool)}
    work = count_work(stage_of(Attentions(), rows, ["y"]), {"B": 3, "nt": 4})
    seen = 3 + 4 + 5 + 6  # lower right: the first of 4 queries sees 3 of 6 keys
    assert work.flops == work.attention_flops == 4 * 3 * 8 * (4 * 6 + seen)
    assert work.weight_bytes == 0


class Mixed(nn.Module):
    """A look-up, a projection by a product of two weights, a convolution, and a branch of its own for some rows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 6)
        self.a, self.b = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(6))
        self.branch = nn.Linear(6, 5, bias=False)
        self.conv = nn.Conv2d(3, 4, 2, 2)

    def forward(self, ids, visual, pixels):
        return F.linear(self.table(ids), self.a * self.b), self.branch(visual), self.conv(pixels)


MIXED = {"ids": ("B", "nt", torch.int64), "visual": ("B", "nv", 6), "pixels": ("B", 3, 8, 8)}


def test_weights_count_where_rows_are():
    stage = stage_of(Mixed(), MIXED, ["y", "z", "c"])
    conv = 2 * 4 * 4 * 4 * 3 * 2 * 2
    work = count_work(stage, {"B": 1, "nt": 2, "nv": 0})
    assert work.flops == 2 * 2 * 5 * 6 + conv  # the product of the weights is made once, beforehand
    conv_bytes = 4 * (4 * 3 * 2 * 2 + 4)
    assert work.weight_bytes == 4 * (2 * 6 + 5 * 6) + conv_bytes  # two rows of the table, the product, no branch
    more = count_work(stage, {"B": 1, "nt": 2, "nv": 3})
    assert more.weight_bytes - work.weight_bytes == 4 * 5 * 6
    assert more.flops - work.flops == 2 * 3 * 5 * 6
    everything = count_work(stage, {"B": 1, "nt": 70, "nv": 0})
    assert everything.weight_bytes == 4 * (50 * 6 + 5 * 6) + conv_bytes  # a table is read at most once
    with pytest.raises(ValueError, match=r"no number is given for nv"):
        count_work(stage, {"B": 1, "nt": 2})


def test_fields_and_schedule(program, result):
    report = inspect(program, batch=2, images=2)
    assert json.loads(json.dumps(report)) == report
    phases = [(c["stage"], c["phase"], c["trips"]) for c in report["calls"]]
    assert phases[:2] == [("vision", "encode", 1), ("abstractor", "encode", 1)]
    assert ("language_model", "prefill", 2) in phases  # the samples one by one
    assert phases[-1][:2] == ("language_model", "decode")
    assert set(report["calls"][0]) >= {"stage", "phase", "rows", "trips", "flops", "weight_bytes"}
    rows = program.info.tokens_per_image
    assert call(report, "abstractor", "encode")["rows"] == 4 * rows
    assert call(report, "language_model", "decode")["rows"] == 2
    assert report["stages"]["language_model"]["ops"]["mmopt.cached_attention"] == program.info.layers
    assert report["schedule"].startswith("schedule:")
    assert "stage" not in report["schedule"]
    one = inspect(program, batch=1, images=2)["totals"]
    assert report["totals"]["prefill_flops"] == 2 * one["prefill_flops"]
    assert report["totals"]["decode_flops_per_token"] == one["decode_flops_per_token"]
    assert report["totals"]["decode_bytes_per_token"] == pytest.approx(one["decode_bytes_per_token"] / 2, rel=0.01)
    fewer = inspect(result.program, result.reports, batch=1, images=2)["totals"]
    assert fewer["prefill_flops"] < 0.9 * one["prefill_flops"]
    assert fewer["encode_flops_per_image"] < one["encode_flops_per_image"]


def test_without_images(program):
    report = inspect(program, images=0)
    assert not [c for c in report["calls"] if c["phase"] == "encode"]
    assert "encode_flops_per_image" not in report["totals"]
    assert "image_flops" not in report["totals"]
    assert report["prompt"]["chunks"] == program.info.batch


def test_prompt_that_does_not_fit(program):
    with pytest.raises(ValueError, match=r"9 images take 81 rows, but the context holds 64"):
        inspect(program, images=9)
    ids = typical_prompt(replace(program.info, context=20), images=2)
    assert ids == [0, program.info.image_id, program.info.image_id, 0]


def test_text(result):
    shown = text(inspect(result.program, result.reports))
    for wanted in ("loop over chunks", "language_model", "decode_flops_per_token", "pack_projections", "2 FLOPs"):
        assert wanted in shown
    assert [number(x) for x in (0, 999, 13.2e9, 1.5e12)] == ["0", "999", "13.2 G", "1.5 T"]
