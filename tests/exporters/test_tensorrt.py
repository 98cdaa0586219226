"""The TensorRT target: right numbers, operators that its parser takes, and a gate that builds every stage on a CPU."""

import json
import os
import sys
from dataclasses import replace

import onnx
import pytest
import toys
from sessions import shaped

from mmopt.exporters import lower_tensorrt, tensorrt
from mmopt.exporters import onnx as exporter
from mmopt.exporters.onnx import export
from mmopt.exporters.tensorrt import GateError, check_engine, profiles
from mmopt.frontend.trace import trace
from mmopt.ir.graph import aten
from mmopt.spec.manifest import read_directory

installed = pytest.mark.skipif(not tensorrt.available(), reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def small(model):
    """One image, one sample: quick to build."""
    return trace(model, batch=1, images=1, context=32)


@installed
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_every_stage_builds(result, tmp_path, dtype):
    facts = json.loads((export(result.program, tmp_path / "engine", "tensorrt", dtype) / "program.json").read_text())
    assert facts["dtype"] == (dtype or "float32")
    assert facts["checked"]["tensorrt"] == "parsed and built"
    if dtype is None:
        assert facts["checked"]["program"] == "equal"  # standard operators: ONNX Runtime gives the Program's numbers


@installed
def test_other_programs_build(program, grouped, tmp_path):
    for name, p in (("traced", program), ("grouped", grouped)):
        facts = json.loads((export(p, tmp_path / name, "tensorrt") / "program.json").read_text())
        assert facts["checked"] == {"onnx": "passed", "program": "equal", "tensorrt": "parsed and built"}


def test_only_standard_operators(result, tmp_path):
    out = export(result.program, tmp_path / "engine", "tensorrt", check=False, gate=False)
    assert json.loads((out / "program.json").read_text())["checked"] == {"tensorrt": "not asked for"}
    for path in out.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert [o.domain for o in model.opset_import] == [""]
        for node in model.graph.node:  # the later inputs of Attention are refused or, worse, ignored
            assert node.op_type != "Attention" or (len(node.input) <= 4 and len(node.output) == 1)


@installed
def test_parser_refusal_is_named(small, tmp_path):
    out = export(small, tmp_path / "engine", "onnx", check=False)
    assert (tmp_path / "engine" / "program.json").is_file()
    found = {f.stage: f for f in check_engine(out, build=False)}
    assert set(found) == {"vision", "abstractor", "language_model"}  # embed has no contrib operator
    assert found["vision"].operator in ("FusedMatMul", "MultiHeadAttention", "QuickGelu")
    assert "/" in found["vision"].node
    assert str(found["vision"]).startswith("stage vision, node ")


@installed
def test_gate_leaves_nothing_behind(small, tmp_path, monkeypatch):
    def wrong(e, n):
        return e.op("Cast", e.op("NonZero", e.value(n.args[0])), to=1)

    monkeypatch.setitem(lower_tensorrt.RULES, aten.silu.default, wrong)
    with pytest.raises(GateError, match=r"stage abstractor, node silu\w*/nonzero_0, operator NonZero"):
        export(small, tmp_path / "engine", "tensorrt", check=False)
    assert os.listdir(tmp_path) == []


@installed
def test_builder_refusal_is_named(small, tmp_path, monkeypatch):
    """More rows than the cache holds: known only when the engine is built."""
    out = export(small, tmp_path / "engine", "tensorrt", check=False, gate=False)
    manifest = read_directory(out)
    wrong = profiles(manifest.stages["language_model"].inputs, manifest.info)
    wrong[0]["text"] = [(1, 100, 64) if i == 1 else shape for i, shape in enumerate(wrong[0]["text"])]
    wrong[0]["text"][2] = (1, 100, 64)
    monkeypatch.setattr(tensorrt, "profiles", lambda x, info: wrong if "past" in x else profiles(x, info))
    (found,) = check_engine(out)
    assert found.stage == "language_model"
    assert "tensorscatter" in found.node
    assert "cache" in found.reason


def test_profiles():
    info = toys.toy_info(batch=4, images=2, context=64, tokens_per_image=9)
    cache = shaped(visual=("B", "nv", 8), text=("B", "nt", 8), past=("B",))
    prompt, text, decode = profiles(cache, info)
    assert prompt["visual"] == [(1, 0, 8), (1, 9, 8), (1, 18, 8)]
    assert prompt["text"] == [(1, 1, 8), (1, 46, 8), (1, 46, 8)]
    assert text["visual"] == [(1, 0, 8)] * 3
    assert text["text"][2] == (1, 64, 8)
    assert decode["past"] == [(1,), (4,), (4,)]
    assert decode["text"] == [(1, 1, 8), (4, 1, 8), (4, 1, 8)]
    (images,) = profiles(shaped(pixel_values=("N", 3, 5, 5)), info)
    assert images["pixel_values"] == [(1, 3, 5, 5), (1, 3, 5, 5), (8, 3, 5, 5)]
    (none,) = profiles(shaped(pixel_values=("N", 3, 5, 5)), replace(info, images=0))
    assert none["pixel_values"][2] == (4, 3, 5, 5)


def test_without_tensorrt(small, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "available", lambda: False)
    out = export(small, tmp_path / "engine", "tensorrt", check=False)
    said = json.loads((out / "program.json").read_text())["checked"]["tensorrt"]
    assert said.startswith("not checked")
    assert "mmopt[tensorrt]" in said
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ImportError, match=r"mmopt\[tensorrt\]"):
        check_engine(out)


def test_large_engines_are_parsed_not_built(small, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(exporter, "available", lambda: True)
    monkeypatch.setattr(exporter, "check_stages", lambda directory, manifest, build, tell: built.append(build) or [])
    export(small, tmp_path / "engine", "tensorrt", check=False)
    monkeypatch.setattr(exporter, "MOST_BYTES_TO_BUILD", 1000)
    out = export(small, tmp_path / "engine", "tensorrt", check=False)
    assert built == [True, False]
    assert "too large to build" in json.loads((out / "program.json").read_text())["checked"]["tensorrt"]
