"""The TensorRT gate on programs whose images have fewer rows: every stage is parsed and built."""

from functools import cache

import onnx
import pytest
from compressed import traced
from sessions import assert_builds, shaped

from mmopt.exporters import tensorrt
from mmopt.exporters.onnx import export
from mmopt.exporters.tensorrt import profiles
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.pipeline import default_passes
from mmopt.search.optimize import optimize

installed = pytest.mark.skipif(not tensorrt.available(), reason="TensorRT for RTX is not installed")
MADE = {  # family, site, method
    "before": ("janus", "encode_vision", "uniform"),
    "inside": ("janus", "language_model.1", "pool"),
    "tower": ("flamingo", "encode_vision.1", "merge"),
}


@cache
def program(kind):
    family, site, method = MADE[kind]
    passes = [CompressVisualTokens(0.5, method, site), *default_passes()]
    made = optimize(traced(family), passes, check=False)
    assert made.reports[0].rewrites
    return made.program


@installed
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("before", None), ("inside", None), ("tower", None), ("before", "float16"), ("tower", "float16")],
)
def test_builds(kind, dtype, tmp_path):
    assert_builds(program(kind), tmp_path / "engine", dtype)


@pytest.mark.parametrize("kind", MADE)
def test_only_standard_operators(kind, tmp_path):
    out = export(program(kind), tmp_path / "engine", "tensorrt", check=False, gate=False)
    for path in out.glob("*.onnx"):
        assert [o.domain for o in onnx.load(path, load_external_data=False).opset_import] == [""]


def test_profiles_have_what_is_told_of_images():
    """Rows of images carry two columns; a number for each sample says how many were left out."""
    made = program("before")
    shapes = {}
    for name, node in made.stages["language_model"].input_nodes().items():
        shapes[name] = tuple(s if isinstance(s, int) else str(s) for s in node.meta["shape"])
    prompt, text, decode = profiles(shaped(**shapes), made.info)[:3]
    assert prompt["visual"] == [(1, 0, 34), (1, 9, 34), (1, 27, 34)]
    assert text["visual"] == [(1, 0, 34)] * 3
    for key in ("position_delta_before", "position_delta"):
        assert prompt[key] == [(1,)] * 3
        assert decode[key] == [(1,), (3,), (3,)]
