"""Attention to images outside the text and attention with ALiBi, with either lowering, in ONNX Runtime."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import toys
from sessions import session
from torch import nn

from mmopt.exporters import onnx as exporting
from mmopt.exporters.compare import random_values, sizes_of
from mmopt.exporters.emit import ExportError
from mmopt.exporters.onnx import export
from mmopt.ir import ops
from mmopt.search.optimize import optimize

TARGETS = ["onnx", "tensorrt"]
CAPACITY = 12


def exported(program, out, target, **kw):
    program.info = replace(program.info, batch=3, images=1, context=CAPACITY, dtype="float32")
    path = export(program, out, target=target, check=False, gate=False, **kw)
    onnx.checker.check_model(str(path / "toy.onnx"))
    return path


def check(program, path, values, atol=1e-5, past=None):
    """What ONNX Runtime gives is what the stage gives; of caches the rows in use."""
    stage = program.stages["toy"]
    expected = stage.run(program.weights, values, keep_constants=False)
    made = session(path / "toy.onnx").run(None, {k: v.numpy() for k, v in values.items()})
    for (name, want), got in zip(expected.items(), made, strict=True):
        got = torch.from_numpy(got)
        if "cache" in name:
            for b, used in enumerate(past):
                torch.testing.assert_close(got[b, :, :used], want[b, :, :used], atol=atol, rtol=1e-4)
        else:
            torch.testing.assert_close(got, want, atol=atol, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ ALiBi
def cached(heads, kv_heads, d, capacity=CAPACITY):
    """Attention with ALiBi on a cache, as a Program of one stage; slopes of other sizes than one would think of."""

    def run(m, q, k, v, key_cache, value_cache, past):
        slopes = m.slopes * 2  # an expression of weights
        return ops.cached_attention(q, k, v, key_cache, value_cache, past, heads, kv_heads, None, slopes)

    cache = ("B", kv_heads, capacity, d)
    rows = {"q": ("B", "nt", heads * d), "k": ("B", "nt", kv_heads * d), "v": ("B", "nt", kv_heads * d)}
    inputs = rows | {"key_cache": cache, "value_cache": cache, "past": (("B",), torch.int64)}
    module = toys.Function(run, slopes=nn.Parameter(torch.ones(heads)))
    program = toys.single(module, inputs, ["y", "new_key_cache", "new_value_cache"])
    program.weights["slopes"] = torch.tensor([0.5, 0.3, 0.0625, 1.0, 0.7, 0.2])[:heads]
    return program


CALLS = {
    "prefill": [0],
    "several rows on a cache": [3],
    "decode": [4],
    "decode of a batch": [0, 7, 11],
    "batch of empty caches": [0, 0, 0],
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(2, 2, 8), (4, 2, 16), (2, 2, 6), (6, 3, 12), (2, 1, 4)])
def test_alibi(heads, kv_heads, d, target, tmp_path):
    program = cached(heads, kv_heads, d)
    path = exported(program, tmp_path / "engine", target)
    kinds = {n.op_type for n in onnx.load(path / "toy.onnx").graph.node}
    assert ("GroupQueryAttention" in kinds) == (target == "onnx" and d % 8 == 0)
    for name, past in CALLS.items():
        rows = 5 if name in ("prefill", "several rows on a cache", "batch of empty caches") else 1
        values = toys.random_values(program.stages["toy"], {"B": len(past), "nt": rows}, seed=len(past))
        values["past"] = torch.tensor(past)
        check(program, path, values, past=[p + rows for p in past])


@pytest.mark.parametrize("target", TARGETS)
def test_alibi_to_the_last_slot(target, tmp_path):
    program = cached(2, 2, 8)
    path = exported(program, tmp_path / "engine", target)
    for past, rows in (([0], CAPACITY), ([CAPACITY - 3], 3), ([CAPACITY - 1, 0], 1)):
        values = toys.random_values(program.stages["toy"], {"B": len(past), "nt": rows})
        values["past"] = torch.tensor(past)
        check(program, path, values, past=[p + rows for p in past])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", [8, 6])
def test_alibi_in_half_precision(d, target, tmp_path):
    program = cached(2, 2, d)
    path = exported(program, tmp_path / "engine", target, dtype="float16")
    run = session(path / "toy.onnx")
    values = toys.random_values(program.stages["toy"], {"B": 1, "nt": 4})
    values["past"] = torch.tensor([3])
    expected = program.stages["toy"].run(program.weights, values, keep_constants=False)["y"]
    given = {k: v.numpy() if k == "past" else v.half().numpy() for k, v in values.items()}
    got = torch.from_numpy(run.run(None, given)[0])
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, atol=1e-2, rtol=1e-2)
    exported(cached(2, 2, d), tmp_path / "bf16", target, dtype="bfloat16")  # checked, not run: not on this provider


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", [8, 6])
def test_near_keys_keep_their_order_far_into_a_text(d, target, tmp_path):
    """In half precision a bias by place alone would be too large to tell them apart."""
    program = cached(2, 2, d, capacity=1200)
    run = session(exported(program, tmp_path / "engine", target, dtype="float16") / "toy.onnx")
    values = toys.random_values(program.stages["toy"], {"B": 1, "nt": 40})
    values["past"] = torch.tensor([1100])
    values = {k: v if k == "past" else v.half().float() for k, v in values.items()}
    expected = program.stages["toy"].run(program.weights, values, keep_constants=False)["y"]
    (got,) = run.run(["y"], {k: v.numpy() if k == "past" else v.half().numpy() for k, v in values.items()})
    torch.testing.assert_close(torch.from_numpy(got).float(), expected, atol=5e-3, rtol=5e-3)


# ------------------------------------------------------------------------------------------- images outside the text
KEYS = 3


def masked(heads, kv_heads, d, scale):
    def run(m, q, k, v, seen, attends):
        return ops.cross_attention(q, k, v, seen, attends, heads, kv_heads, scale)

    kv = ("B", "nb", KEYS, kv_heads * d)
    inputs = {"q": ("B", "nt", heads * d), "k": kv, "v": kv}
    inputs |= {"seen": (("B", "nt", "nb"), torch.bool), "attends": (("B", "nt"), torch.bool)}
    return toys.single(toys.Function(run), inputs)


def in_segments(heads, kv_heads, d, scale, several):
    def run(m, q, k, v, segment_rows, row_segments, *mask):
        return ops.segment_attention(q, k, v, segment_rows, row_segments, heads, kv_heads, *(mask or (None,)), scale)

    kv = ("S", "K" if several else KEYS, kv_heads * d)
    inputs = {"q": ("B", "nt", heads * d), "k": kv, "v": kv}
    inputs |= {"segment_rows": (("S", "L"), torch.int64), "row_segments": (("B", "nt"), torch.int64)}
    if several:
        inputs["key_mask"] = (("S", "K"), torch.bool)
    return toys.single(toys.Function(run), inputs)


HEADS = [(2, 2, 4, None), (4, 2, 8, 0.3), (3, 1, 6, None)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "kv_heads", "d", "scale"), HEADS)
def test_masked(heads, kv_heads, d, scale, target, tmp_path):
    program = masked(heads, kv_heads, d, scale)
    path = exported(program, tmp_path / "engine", target)
    for seed, sizes in enumerate(({"B": 1, "nt": 1, "nb": 1}, {"B": 3, "nt": 4, "nb": 2}, {"B": 1, "nt": 6, "nb": 3})):
        values = toys.random_values(program.stages["toy"], sizes, seed)
        values["seen"][:, 0] = False  # sees none: all keys weigh the same
        values["attends"][:, 0] = True
        check(program, path, values)
        values["attends"][:] = False
        check(program, path, values)


@pytest.fixture
def sizes_of_segments(monkeypatch):
    """A trace has no sizes for segments: they come from rewriting a graph."""
    from mmopt.ir import capture

    monkeypatch.setattr(capture, "EXAMPLE", capture.EXAMPLE | {"S": 6, "L": 8, "K": 9})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "d", "scale"), HEADS)
def test_segments(heads, kv_heads, d, scale, several, target, tmp_path, sizes_of_segments):
    program = in_segments(heads, kv_heads, d, scale, several)
    path = exported(program, tmp_path / "engine", target)
    g = torch.Generator().manual_seed(0)
    for b, nt, s, length, keys in ((1, 1, 1, 1, 3), (2, 4, 3, 5, 7), (3, 1, 3, 1, 3), (1, 6, 1, 1, 4)):
        sizes = {"B": b, "nt": nt, "S": s, "L": length, "K": keys}
        values = toys.random_values(program.stages["toy"], sizes, seed=s)
        values["segment_rows"] = torch.randint(0, b * nt, (s, length), generator=g)
        values["row_segments"] = torch.randint(0, s * length + 1, (b, nt), generator=g)
        values["row_segments"][0, 0] = s * length  # gets zeros
        if several:
            values["key_mask"][:, 0] = True
        check(program, path, values)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("several", [False, True])
def test_half_precision(several, target, tmp_path, sizes_of_segments):
    program = in_segments(4, 2, 8, None, several)
    path = exported(program, tmp_path / "float16", target, dtype="float16")
    assert session(path / "toy.onnx")
    exported(in_segments(4, 2, 8, None, several), tmp_path / "bf16", target, dtype="bfloat16")
    assert session(exported(masked(4, 2, 8, None), tmp_path / "mask", target, dtype="float16") / "toy.onnx")


# ---------------------------------------------------------------------------------------------------- whole programs
KINDS = {
    "one block": {},
    "tiles": {"blocks": 2, "together": True},
    "text before": {"blocks": 2, "together": True, "before": "all_images", "sees": True},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimized", [False, True])
def test_programs(kind, optimized, target, tmp_path):
    program = toys.open_gates(toys.beside(toys.Beside(kv_heads=2), **KINDS[kind]))
    program = optimize(program, check=False).program if optimized else program
    program.info = replace(program.info, layers=2, kv_heads=1, head_dim=4, family="toy", dtype="float32", bos_id=None)
    out = export(program, tmp_path / "engine", target=target, gate=False)
    assert json.loads((out / "program.json").read_text())["checked"]["program"] == "equal"


def test_comparison_reaches_wrong_segments(tmp_path, monkeypatch):
    """The exporter's own comparison finds a graph that reads keys without their mask, or puts rows in wrong places."""
    from mmopt.exporters import lower_onnxruntime
    from mmopt.exporters.lower_attention import segment_attention
    from mmopt.ir.graph import SEGMENT_ATTENTION

    program = toys.open_gates(toys.beside(blocks=2, together=True))
    program = optimize(program, check=False).program

    def without_mask(e, q, k, v, heads, kv_heads, mask, *rest):
        return lower_onnxruntime.attend(e, q, k, v, heads, kv_heads, None, *rest)

    for broken in (without_mask, lambda e, q, k, v, *rest: lower_onnxruntime.attend(e, q, v, k, *rest)):
        rules = lower_onnxruntime.RULES | {SEGMENT_ATTENTION: segment_attention(broken)}
        with monkeypatch.context() as m:
            m.setitem(exporting.TARGETS, "onnx", rules)
            with pytest.raises(ExportError, match="stage language_model, output logits at"):
                export(program, tmp_path / "engine")


def test_random_indices_are_in_range():
    """Segments of the exporter's comparison point at rows and places that exist, and reach the row of zeros."""
    program = optimize(toys.beside(blocks=2, together=True), check=False).program
    stage, zeros = program.stages["language_model"], 0
    for sizes in sizes_of(stage, program.info):
        for seed in range(8):
            values = random_values(stage, sizes, program.info, seed)
            assert values["segment_rows"].max() < sizes["B"] * sizes["nt"]
            assert values["row_segments"].max() <= sizes["S"] * sizes["L"]
            assert values["key_mask"].any(1).all()
            zeros += int((values["row_segments"] == sizes["S"] * sizes["L"]).sum())
    assert zeros


def test_a_row_of_zeros_takes_the_graphs_dtype(tmp_path):
    program = optimize(toys.beside(), check=False).program
    out = export(program, tmp_path / "engine", dtype="float16", check=False)
    graph = onnx.load(out / "language_model.onnx", load_external_data=False).graph
    kinds = {i.data_type for i in graph.initializer if list(i.dims) == [1, toys.D]}
    assert kinds == {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(np.float16))}
