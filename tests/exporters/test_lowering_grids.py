"""Operators on grids and norms, which painting models brought, with either lowering, in ONNX Runtime."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
import toys
from sessions import ELEMENT, in_float16, in_float32, read_by
from test_lowering_cross import TARGETS, check, exported
from torch import nn

from mmopt.exporters.emit import Emitter, ExportError
from mmopt.ir.graph import aten

HALF = ["float16", "bfloat16"]


# ---------------------------------------------------------------------------------------------------------- operators
GRIDS = [(4, 4), (5, 7)]
C = 8


def group_norms(m, x):
    y = F.group_norm(x, 4), F.group_norm(x, 2, m.norm.weight), F.group_norm(x, 8, None, m.norm.bias)
    return m.norm(x), F.group_norm(x, 1, m.norm.weight, m.norm.bias, 0.5), *y


def upsampled(m, x):
    sized = aten.upsample_nearest2d.default(x, [2 * x.shape[2], 4 * x.shape[3]])
    return F.interpolate(x, scale_factor=2.0, mode="nearest"), F.interpolate(x, scale_factor=(3.0, 1.0)), sized


def means(m, x):
    kept = [x.mean(d, keepdim=True) for d in (1, (2, 3), (0, -1))]
    return *kept, x.mean(-1), x.mean((1, 2)), x.mean((1, 2, 3))


def norms(m, x):
    y = x.permute(0, 2, 3, 1)
    every = torch.linalg.vector_norm(y.float(), dim=(1, 2), keepdim=True).to(x.dtype)
    return every, every / (every.mean(-1, keepdim=True) + 1e-6) * y, torch.linalg.vector_norm(x, dim=(-1,))


def convolutions(m, x):
    uneven = F.conv2d(x, m.uneven, None, (2, 1), (1, 2), (1, 2), 2)
    return m.depthwise(x), uneven, F.conv2d(F.silu(x), m.uneven[:, :, :1, :1], m.depthwise.bias, groups=2)


def modulated(m, x, row):
    scale, shift = m.mix(F.silu(row[:, 0]))[:, :, None, None].chunk(2, dim=1)
    return x * (1 + scale) + shift, *x.chunk(3, 1), *x.split([1, 2, 5], 1)


def pixel_norm(m, x):
    return F.rms_norm(x.permute(0, 2, 3, 1), (C,), m.norm.weight, 0.1).permute(0, 3, 1, 2)


def in_rows(m, x, past):
    """What a stage does with a number of rows that stays free."""
    at = (past[:, None] - 2 + torch.arange(x.shape[1])).clamp(min=0)
    every = F.group_norm(x.transpose(1, 2), 4, m.norm.weight, m.norm.bias), torch.linalg.vector_norm(x, dim=1)
    longer = torch.cat([m.norm.weight.expand(x.shape[0], 1, C), x], dim=1)
    placed = m.table(at.clamp(max=6)) + at[..., None] / 3.0
    return placed, longer, x.mean(1), x.clamp(-0.5, 0.25), F.gelu(x), F.silu(x), *every


GRID, ROWS = {"x": ("B", C, "h", "w")}, {"x": ("B", "nt", C)}
OPERATORS = {  # -> function, inputs ("h" and "w" are fixed), how many outputs
    "group_norm": (group_norms, GRID, 5),
    "upsample": (upsampled, GRID, 3),
    "pixel_shuffle": (lambda m, x: (F.pixel_shuffle(x, 2), F.pixel_shuffle(torch.cat([x, x[:, :1]], 1), 3)), GRID, 2),
    "mean": (means, GRID, 6),
    "vector_norm": (norms, GRID, 3),
    "activations": (lambda m, x: (F.silu(x), F.gelu(x), F.gelu(x, approximate="tanh")), GRID, 3),
    "conv2d": (convolutions, GRID, 3),
    "chunk": (modulated, GRID | {"row": ("B", 1, C)}, 7),
    "pixel_norm": (pixel_norm, GRID, 1),
    "rows": (in_rows, ROWS | {"past": (("B",), torch.int64)}, 8),
}


@cache
def operator(name, grid, dtype=torch.float32):
    run, inputs, outputs = OPERATORS[name]
    sides = dict(zip("hw", grid, strict=True))
    inputs = {k: v if k == "past" else tuple(sides.get(s, s) for s in v) for k, v in inputs.items()}
    parts = {"norm": nn.GroupNorm(4, C), "depthwise": nn.Conv2d(C, C, 7, padding=3, groups=C)}
    parts |= {"mix": nn.Linear(C, 2 * C), "table": nn.Embedding(7, C), "uneven": nn.Parameter(torch.empty(C, 4, 3, 2))}
    return toys.single(toys.Function(run, **parts), inputs, [f"y{i}" for i in range(outputs)], dtype)


def tried(program, seed=0):
    for b, nt in ((1, 4), (3, 1), (3, 6)):
        yield toys.random_values(program.stages["toy"], {"B": b, "nt": nt}, seed + b)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "grid"), [(n, g) for n in OPERATORS for g in GRIDS if n != "rows" or g == GRIDS[0]])
def test_operators(name, grid, target, tmp_path):
    program = operator(name, grid)
    path = exported(program, tmp_path / "engine", target)
    for values in tried(program):
        check(program, path, values)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("traced", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_in_half_precision(name, traced, target, tmp_path):
    program, full = operator(name, GRIDS[-1], traced), operator(name, GRIDS[-1])
    path = exported(program, tmp_path / "engine", target, dtype="float16")
    for values in tried(program):
        for got, want in zip(in_float16(path, values), in_float32(full, values), strict=True):
            assert got.dtype == torch.float16
            torch.testing.assert_close(got.float(), want, atol=1e-2, rtol=1e-2)


# Where the mean is large beside the spread, or the sum of squares beyond the range of float16 (largest value 65504).
LARGE = {"group_norm": (200, 1), "vector_norm": (3000, 300), "mean": (6e4, 1e3), "pixel_norm": (3000, 300)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("traced", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", LARGE)
def test_large_values_in_half_precision(name, traced, target, tmp_path):
    program, full = operator(name, GRIDS[-1], traced), operator(name, GRIDS[-1])
    path, (mean, spread) = exported(program, tmp_path / "engine", target, dtype="float16"), LARGE[name]
    for values in tried(program):
        values["x"] = (mean + spread * values["x"].float()).clamp(-65000, 65000)
        for got, want in zip(in_float16(path, values), in_float32(full, values), strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got.float(), want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("traced", [torch.float32, torch.float16])
def test_squares_are_summed_in_float32(traced, target, tmp_path):
    """They overflow in float16, and a strongly typed target computes in the types of the graph."""
    path = exported(operator("vector_norm", GRIDS[-1], traced), tmp_path / "engine", target, dtype="float16")
    assert read_by(path / "toy.onnx", "ReduceL2") == {ELEMENT["float32"]}


@pytest.mark.parametrize("scale", [1.5, 0.5, 2.4])
def test_only_whole_factors(scale, tmp_path):
    """A grid of two by 2.4 has four places, the first three of them from the first place."""
    program = toys.single(toys.Function(lambda m, x: F.interpolate(x, scale_factor=scale)), {"x": ("B", C, 2, 2)})
    with pytest.raises(ExportError, match=r"upsample_nearest2d.*: only whole factors are supported"):
        exported(program, tmp_path / "engine", "onnx")


BROKEN = {
    "group_norm": ("InstanceNormalization", {"epsilon": 1e-5}),
    "upsample": ("Resize", {"nearest_mode": "ceil"}),
    "pixel_shuffle": ("DepthToSpace", {"mode": "DCR"}),
    "mean": ("ReduceMean", {"keepdims": 1}),
    "vector_norm": ("ReduceL2", {"keepdims": 1}),
    "activations": ("Gelu", {"approximate": "none"}),
    "conv2d": ("Conv", {"pads": [3, 3, 3, 3]}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_spelling_is_seen(name, target, tmp_path, monkeypatch):
    op, (kind, wrong) = Emitter.op, BROKEN[name]
    monkeypatch.setattr(Emitter, "op", lambda e, k, *ins, **kw: op(e, k, *ins, **kw | (wrong if k == kind else {})))
    path = exported(operator(name, GRIDS[0]), tmp_path / "engine", target)
    with pytest.raises(AssertionError, match=r"not close|do not match"):
        check(operator(name, GRIDS[0]), path, next(tried(operator(name, GRIDS[0]))))
