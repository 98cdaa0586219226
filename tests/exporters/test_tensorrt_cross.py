"""The TensorRT gate on families whose images lie outside the text: every stage is parsed and built."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import toys
from sessions import assert_builds, checked, shaped

from mmopt.exporters import tensorrt
from mmopt.exporters.onnx import export
from mmopt.exporters.tensorrt import profiles
from mmopt.frontend.load import load
from mmopt.frontend.trace import trace
from mmopt.search.optimize import optimize
from mmopt.spec.cross_mask import key_mask, segments, visible_tiles
from mmopt.spec.model_info import Cross

DATA = Path(__file__).parents[1] / "data" / "flamingo"
installed = pytest.mark.skipif(not tensorrt.available(), reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def program():
    return trace(load(DATA / "openflamingo"), batch=2, images=2, context=32)


@pytest.fixture(scope="module")
def optimized(program):
    return optimize(program, check=False).program


@installed
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_optimized_builds(optimized, tmp_path, dtype):
    assert_builds(optimized, tmp_path / "engine", dtype)


@installed
def test_traced_builds(program, tmp_path):
    assert checked(export(program, tmp_path / "engine", "tensorrt")) == {
        "onnx": "passed",
        "program": "equal",
        "tensorrt": "parsed and built",
    }
    assert checked(export(program, tmp_path / "half", "tensorrt", "float16"))["tensorrt"] == "parsed and built"


@installed
@pytest.mark.parametrize(("name", "passes"), [("idefics", True), ("mllama", True), ("mllama", False)])
def test_other_families_build(name, passes, tmp_path):
    made = trace(load(DATA / name), batch=2, images=2, context=32)
    made = optimize(made, check=False).program if passes else made
    assert checked(export(made, tmp_path / "engine", "tensorrt", check=False))["tensorrt"] == "parsed and built"


def test_only_standard_operators(optimized, program, tmp_path):
    for name, p in (("optimized", optimized), ("traced", program)):
        out = export(p, tmp_path / name, "tensorrt", check=False, gate=False)
        for path in out.glob("*.onnx"):
            model = onnx.load(path, load_external_data=False)
            assert [o.domain for o in model.opset_import] == [""]
            for node in model.graph.node:
                assert node.op_type != "Attention" or (len(node.input) <= 4 and len(node.output) == 1)


# ------------------------------------------------------------------------------------------------------------ profiles
def info(tiles=1, images=2, batch=3, context=32, tokens=8, **kind):
    cross = Cross(tiles, tokens, 6, **kind)
    return toys.toy_info(batch=batch, images=images, context=context, tokens_per_image=1, image_id=9, cross=cross)


TRACED = shaped(
    text=("B", "nt", 8),
    media=("B", "nb", 8, 6),
    seen=("B", "nt", "nb"),
    past=("B",),
)
CUT = shaped(
    text=("B", "nt", 8),
    **{"segment.k": ("S", "K", 4)},
    segment_rows=("S", "L"),
    row_segments=("B", "nt"),
    key_mask=("S", "K"),
    past=("B",),
)


def test_profiles():
    prompt, decode = profiles(TRACED, info())
    assert prompt["text"] == [(1, 1, 8), (1, 32, 8), (1, 32, 8)]
    assert prompt["seen"] == [(1, 1, 1), (1, 32, 1), (1, 32, 2)]
    assert decode["seen"] == [(1, 1, 1), (3, 1, 1), (3, 1, 2)]
    (once,) = profiles(shaped(media=("B", "nb", 8, 6)), info(tiles=4))
    assert once["media"] == [(1, 1, 8, 6), (1, 4, 8, 6), (3, 8, 8, 6)]
    (none,) = profiles(shaped(media=("B", "nb", 8, 6)), info(images=0))
    assert none["media"][2] == (3, 1, 8, 6)


def fits(least, largest, shape):
    return all(a <= n <= b for a, n, b in zip(least, shape, largest, strict=True))


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"merge_adjacent": True},
        {"tiles": 3, "merge_adjacent": True, "leading_text": "all_images"},
        {"leading_text": "all_images"},
    ],
)
def test_what_the_host_makes_fits_the_profiles(kind, rows):
    """Segments of random prompts, also of markers without images, and of steps of a batch."""
    facts, rng = info(tokens=rows, **kind), np.random.default_rng(0)
    prompt, decode = profiles(CUT, facts)

    def check(profile, rows_seen):
        made = segments(rows_seen, rows)
        keys = key_mask(made, rows).shape
        for name, shape in (("segment_rows", made.segment_rows.shape), ("key_mask", keys)):
            assert fits(profile[name][0], profile[name][2], shape), (name, shape, profile[name])
            assert fits(profile[name][0], profile[name][2], profile[name][1])

    for _ in range(200):
        n, density = int(rng.integers(1, 33)), rng.choice([0.02, 0.1, 0.4])
        ids = np.where(rng.random(n) < density, 9, 1).tolist()
        check(prompt, [visible_tiles(ids, int(rng.integers(0, 3)), facts.required_cross, facts.image_id)])
        batch = [
            visible_tiles(
                rng.choice([1, 9], 5).tolist(), int(rng.integers(0, 3)), facts.required_cross, facts.image_id
            )[-1:]
            for _ in range(3)
        ]
        check(decode, batch[: int(rng.integers(1, 4))])


def test_no_more_segments_than_rows():
    assert profiles(CUT, info(tokens=1, context=32))[0]["segment_rows"][2] == (32, 32)
