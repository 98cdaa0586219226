"""Masked caches and half precision of painting models, with either lowering, in ONNX Runtime."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import painting_toy
import pytest
import torch
import toys
from sessions import ELEMENT, in_float16, in_float32, read_by, session, types_of
from test_lowering_cross import CAPACITY, TARGETS, check, exported
from torch import nn

from mmopt.exporters import lower_attention
from mmopt.exporters.onnx import export
from mmopt.ir import ops
from mmopt.ir.attention_args import CachedAttention
from mmopt.runtime.engine import Engine
from mmopt.search.optimize import optimize
from mmopt.spec.solvers import make_plan

HALF = ["float16", "bfloat16"]


# ----------------------------------------------------------------------------------------- caches with slots hidden
PAST = [0, 3, 5]


def hidden(*which):
    """key_mask ``[3, CAPACITY]``, False where `which` says so of (sample, slot)."""
    b, slot = torch.tensor(PAST)[:, None], torch.arange(CAPACITY)
    return ~sum((w(b, slot) for w in which), start=torch.zeros(3, CAPACITY, dtype=torch.bool))


MASKS = {
    "in front": hidden(lambda b, s: s < b - 2),
    "in the middle": hidden(lambda b, s: (s > 0) & (s < b - 1)),
    "all old": hidden(lambda b, s: s < b),
    "odd": hidden(lambda b, s: (s + b) % 2 == 1),
    "every": hidden(lambda b, s: s >= 0),
}


@cache
def cached(heads, kv_heads, d, masked=True, sloped=False):
    def run(m, q, k, v, key_cache, value_cache, past, *mask):
        slopes = m.slopes if sloped else None
        return ops.cached_attention(
            q, k, v, key_cache, value_cache, past, heads, kv_heads, 0.4, slopes, *(mask or (None,))
        )

    cache, kv = ("B", kv_heads, CAPACITY, d), ("B", "nt", kv_heads * d)
    inputs = {"q": ("B", "nt", heads * d), "k": kv, "v": kv, "key_cache": cache, "value_cache": cache}
    inputs |= {"past": (("B",), torch.int64)} | ({"key_mask": (("B", CAPACITY), torch.bool)} if masked else {})
    module = toys.Function(run, slopes=nn.Parameter(torch.empty(heads)))
    return toys.single(module, inputs, ["y", "new_key_cache", "new_value_cache"])


def called(program, rows, mask=None, lanes=slice(None)):
    """Values of one call by samples of unequal past, the caches full of numbers."""
    values = toys.random_values(program.stages["toy"], {"B": 3, "nt": rows}, seed=rows)
    values["past"] = torch.tensor(PAST)
    if mask is not None:
        values["key_mask"] = mask
    return {k: v[lanes] for k, v in values.items()}


HEADS = [(4, 2, 8), (4, 2, 6), (2, 2, 16), (6, 2, 4)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), HEADS)
@pytest.mark.parametrize("sloped", [False, True])
def test_masked_caches(heads, kv_heads, d, sloped, target, tmp_path):
    """Any batch at once, whatever the heads: see `cached_attention` of the lowering."""
    program = cached(heads, kv_heads, d, sloped=sloped)
    path = exported(program, tmp_path / "engine", target)
    assert "one_sample" not in json.loads((path / "program.json").read_text())["stages"]["toy"]
    for mask in MASKS.values():
        for rows in (1, 4, CAPACITY - PAST[-1]):
            check(program, path, called(program, rows, mask), past=[p + rows for p in PAST])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", [8, 6])
def test_what_masks_mean(d, target, tmp_path):
    """Old rows hidden: attention among the new ones. All hidden: each row sees itself. None: as without a mask."""
    run = session(exported(cached(4, 2, d), tmp_path / "masked", target) / "toy.onnx").run
    plain = session(exported(cached(4, 2, d, masked=False), tmp_path / "plain", target) / "toy.onnx").run
    values = {k: x.numpy() for k, x in called(cached(4, 2, d), 4, MASKS["every"]).items()}
    lanes = [{k: x[b : b + 1] for k, x in values.items() if k != "key_mask"} for b in range(3)]
    q, k, v = (torch.from_numpy(values[x]) for x in "qkv")
    for mask, wanted in (
        (MASKS["all old"], ops.attention(q, k, v, 4, 2, None, True, 0.4)),
        (MASKS["every"], v.unflatten(2, (2, d)).repeat_interleave(2, 2).flatten(2)),
        (~MASKS["every"], torch.from_numpy(np.concatenate([plain(["y"], x)[0] for x in lanes]))),
    ):
        (got,) = run(["y"], values | {"key_mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), HEADS)
def test_caches_without_a_mask(heads, kv_heads, d, target, tmp_path):
    """Several rows on caches in use: sample by sample where program.json says so, else at once."""
    program = cached(heads, kv_heads, d, masked=False)
    path = exported(program, tmp_path / "engine", target)
    one = json.loads((path / "program.json").read_text())["stages"]["toy"].get("one_sample", False)
    assert one == (target == "onnx" and d % 8 == 0)
    for b in range(3) if one else ():
        check(program, path, called(program, 4, lanes=slice(b, b + 1)), past=[PAST[b] + 4])
    for rows in (1,) if one else (1, 4):
        check(program, path, called(program, rows), past=[p + rows for p in PAST])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", [8, 6])
@pytest.mark.parametrize("sloped", [False, True])
def test_masked_caches_in_half_precision(d, sloped, target, tmp_path):
    program = cached(4, 2, d, sloped=sloped)
    path = exported(program, tmp_path / "float16", target, dtype="float16")
    for mask in MASKS.values():
        for rows in (1, 4):
            values = called(program, rows, mask)
            wanted, made = next(iter(in_float32(program, values))), in_float16(path, values)
            assert {x.dtype for x in made} == {torch.float16}
            torch.testing.assert_close(made[0].float(), wanted, atol=1e-2, rtol=1e-2)
    exported(cached(4, 2, d, sloped=sloped), tmp_path / "bf16", target, dtype="bfloat16")  # not on this provider


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_forgotten_mask_is_seen(mask, target, tmp_path, monkeypatch):
    class Forgetful:
        @staticmethod
        def of(n):
            return CachedAttention.of(n)._replace(key_mask=None)

    monkeypatch.setattr(lower_attention, "CachedAttention", Forgetful)
    program = cached(4, 2, 8)
    path = exported(program, tmp_path / "engine", target)
    with pytest.raises(AssertionError, match="not close"):
        check(program, path, called(program, 4, MASKS[mask]), past=[p + 4 for p in PAST])


# ------------------------------------------------------------------------------------- whole programs, half precision
DECODED = ["decode_image latents", "decode_image image"]
KEPT = {"latents", "velocity", "time", "image"}


def wrong_types(path, kind):
    """Where an engine, made of a float32 program, breaks what is promised of types: "stage value"."""
    stages, found = json.loads((path / "program.json").read_text())["stages"], []
    for name, listed in stages.items():
        graph, types = types_of(path / listed["file"])
        full = kind == "float16" and name == "decode_image"
        said = {x.get("onnx", k): x["dtype"] for role in ("inputs", "outputs") for k, x in listed[role].items()}
        border = {x.name: "float32" if x.name in KEPT else kind for x in (*graph.input, *graph.output)}
        inner = {i.name: "float32" if full else kind for i in graph.initializer if name != "flow_time"}
        if full:  # and nothing of another type in between
            inner = dict.fromkeys(types, "float32")
        for value, wanted in (inner | border).items():
            right = types[value] == ELEMENT[wanted] and said.get(value, wanted) == wanted
            if types[value] in ELEMENT.values() and not right:
                found.append(f"{name} {value}")
    return found


def far_times(m, specs):
    """Angles up to 1000, as the time embeddings of real models have them; pixels beyond the range of float16."""
    m.pixels.weight.data *= 1e6

    def run(m, time):
        waves = torch.cat([time[:, None].cos(), time[:, None].sin()], 1)
        return m.time(waves.to(m.time.weight.dtype))[:, None]

    specs["flow_time"].module.run = run


def shared(m, specs):
    specs["decode_image"].module.run = lambda m, z: m.pixels(z) * m.up.bias


@cache
def programs(kind, dtype=torch.float32):
    if kind == "optimized":
        return optimize(programs("traced", dtype), check=False).program
    return painting_toy.program(dtype=dtype, change=far_times if kind == "traced" else shared)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("program", ["traced", "optimized"])
def test_types(program, kind, target, tmp_path):
    path = export(programs(program), tmp_path / "engine", target, kind, gate=False)
    assert wrong_types(path, kind) == []
    # else times of 0 to 1000 come in steps of 0.5, or 4
    assert read_by(path / "flow_time.onnx", "Cos") == {ELEMENT["float32"]}


@pytest.mark.parametrize(
    ("emptied", "seen"),
    [
        ("full_precision_stages", ["decode_image pixels.weight", "decode_image pixels.bias"]),
        ("full_precision_values", ["flow_time time", "flow_encode latents", "flow_decode velocity", *DECODED]),
    ],
)
def test_types_that_are_not_kept_are_seen(emptied, seen, tmp_path):
    broken = programs("traced").copy()
    broken.info = replace(broken.info, **{emptied: type(getattr(broken.info, emptied))()})
    assert set(seen) <= set(wrong_types(export(broken, tmp_path / "engine", dtype="float16"), "float16"))


PROMPTS, PLAN = [[1, 5, 6, 7], [1, 9]], make_plan("euler", 4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_half_precision_paints(dtype, target, tmp_path):
    """Of a program in any type: the float32 engine is the same as the Program, that of float16 close to it."""
    program = programs("optimized", dtype)
    noise = np.random.default_rng(0).standard_normal((2, 2, 8, 8)).astype(np.float32)
    path = export(program, tmp_path / "full", target, "float32", gate=False)
    assert json.loads((path / "program.json").read_text())["checked"]["program"] == "equal"
    half = Engine(export(program, tmp_path / "half", target, "float16", gate=False), threads=1)
    wanted, made = (e.generate_images(PROMPTS, solver=PLAN, noise=noise) for e in (Engine(path, threads=1), half))
    assert made.latents.dtype == made.pixels.dtype == np.float32
    assert np.abs(wanted.pixels).max() > 65504
    for want, got in ((wanted.latents, made.latents), (wanted.pixels, made.pixels)):
        assert 1e-6 < np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-2  # a nan or inf fails too


@pytest.mark.parametrize("target", TARGETS)
def test_times_stay_apart_in_half_precision(target, tmp_path):
    program = programs("traced")
    path = export(program, tmp_path / "engine", target, "float16", gate=False)
    time = torch.tensor([0.0, 333.3, 666.7, 999.2])
    (got,) = session(path / "flow_time.onnx").run(None, {"time": time.numpy()})
    wanted = program.stages["flow_time"].run(program.weights, {"time": time})["time_row"]
    torch.testing.assert_close(torch.from_numpy(got).float(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_two_precisions_read(target, tmp_path):
    """A stage of full precision may share a weight with another: it is stored in both types."""
    stage, weights = programs("shared").stages["decode_image"], programs("shared").weights
    path = export(programs("shared"), tmp_path / "engine", target, "float16", gate=False)
    values = {"latents": torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))}
    (got,) = session(path / "decode_image.onnx").run(None, {"latents": values["latents"].numpy()})
    torch.testing.assert_close(torch.from_numpy(got), stage.run(weights, values)["image"], atol=1e-5, rtol=1e-5)
    assert wrong_types(path, "float16") == []
