"""The TensorRT gate on a family that paints: every stage is parsed and built, and what is fed fits the profiles."""

from dataclasses import replace
from pathlib import Path

import onnx
import painting_toy as toy
import pytest
import toys
from sessions import assert_builds, checked, shaped

from mmopt.exporters import tensorrt
from mmopt.exporters.onnx import export
from mmopt.exporters.tensorrt import profiles
from mmopt.frontend.load import load
from mmopt.frontend.trace import trace
from mmopt.runtime.engine import Engine
from mmopt.runtime.image_generation import EngineFlowSampler
from mmopt.search.optimize import optimize
from mmopt.spec.manifest import read_directory
from mmopt.spec.model_info import Flow

DATA = Path(__file__).parents[1] / "data" / "janusflow"
installed = pytest.mark.skipif(not tensorrt.available(), reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def program():
    return trace(load(DATA), batch=2, images=1, context=96)


@pytest.fixture(scope="module")
def optimized(program):
    return optimize(program, check=False).program


@installed
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_optimized_builds(optimized, tmp_path, dtype):
    assert_builds(optimized, tmp_path / "engine", dtype)


@installed
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_traced_builds(program, tmp_path, dtype):
    assert checked(export(program, tmp_path / "engine", "tensorrt", dtype))["tensorrt"] == "parsed and built"


def test_only_standard_operators(optimized, program, tmp_path):
    for name, p in (("optimized", optimized), ("traced", program)):
        out = export(p, tmp_path / name, "tensorrt", check=False, gate=False)
        for path in out.glob("*.onnx"):
            assert [o.domain for o in onnx.load(path, load_external_data=False).opset_import] == [""]


@installed
def test_a_stage_that_does_not_convert_is_named(optimized, tmp_path, monkeypatch):
    """Rows of an image that do not fit the cache: the gate looks at the profiles of painting, too."""
    right = tensorrt.profiles

    def too_long(inputs, info):
        flow = replace(info.required_flow, tokens=info.context)
        return right(inputs, replace(info, flow=flow, context=info.context + 2))

    monkeypatch.setattr(tensorrt, "profiles", too_long)
    with pytest.raises(tensorrt.GateError, match="stage language_model"):
        export(optimized, tmp_path / "engine", "tensorrt", check=False)
    assert not (tmp_path / "engine").exists()


# ------------------------------------------------------------------------------------------------------------ profiles
@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize(("lengths", "steps"), [([9], 30), ([3, 12], 1), ([2, 2, 7], 100)])
def test_what_is_fed_fits_the_profiles(passes, lengths, steps, tmp_path, monkeypatch):
    p = toy.program(batch=2)
    p = optimize(p, check=False).program if passes else p
    out = export(p, tmp_path / "engine", "tensorrt", check=False, gate=False)
    manifest, seen = read_directory(out), []
    run = EngineFlowSampler.run_stage

    def spy(self, call, inputs):
        seen.append((call.stage, {k: tuple(x.shape) for k, x in inputs.items()}))
        return run(self, call, inputs)

    monkeypatch.setattr(EngineFlowSampler, "run_stage", spy)
    Engine(out).generate_images([list(range(1, n + 1)) for n in lengths], steps=steps, seed=0)
    assert {"language_model", "flow_encode", "flow_decode", "decode_image", "embed"} <= {name for name, _ in seen}
    for name, shapes in seen:
        listed = profiles(manifest.stages[name].inputs, manifest.info)
        assert any(all(fits(r[k][0], r[k][2], shape) for k, shape in shapes.items()) for r in listed), (name, shapes)


def fits(least, largest, shape):
    return all(a <= n <= b for a, n, b in zip(least, shape, largest, strict=True))


def test_profiles():
    language = shaped(visual=("B", "nv", 8), text=("B", "nt", 8), past=("B",))
    flow = Flow((4, 8, 8), tokens=16, steps=30)
    info = toys.toy_info(batch=3, images=1, context=40, tokens_per_image=4, flow=flow)
    prompt, step, *reading = profiles(language, info)
    assert (prompt["visual"][2], prompt["text"][0], prompt["text"][2]) == ((6, 0, 8), (1, 1, 8), (6, 23, 8))
    assert (step["visual"][0], step["visual"][2], step["text"][0]) == ((1, 1, 8), (6, 24, 8), (1, 16, 8))
    assert reading == profiles(language, replace(info, flow=None))
    assert profiles(language, replace(info, context=17))[0]["text"][2] != (6, 16, 8)  # no image fits: no such profile
    (table,) = profiles(shaped(time=("B",)), info)
    assert table["time"][2] == (100,)
    (latents,) = profiles(shaped(latents=("B", 4, 8, 8)), info)
    assert latents["latents"][2] == (6, 4, 8, 8)
