"""The TensorRT gate on language models whose later layers hold fewer rows of images, cut after several layers."""

import json
from dataclasses import replace
from functools import cache

import onnx
import pytest
from compressed import CONFIGS

import mmopt
from mmopt.exporters import lower, lower_tensorrt, tensorrt
from mmopt.exporters.onnx import export
from mmopt.exporters.tensorrt import check_stages, profiles
from mmopt.frontend.load import from_config
from mmopt.ir.graph import ROTARY
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.pipeline import default_passes
from mmopt.search.optimize import optimize
from mmopt.spec.manifest import read_directory

LAYERS = 3
installed = pytest.mark.skipif(not tensorrt.available(), reason="TensorRT for RTX is not installed")


@cache
def traced(family):
    config = CONFIGS[family]()
    if family == "owl":
        config["num_hidden_layers"] = LAYERS
        for part in config["visual_config"].values():
            part["num_hidden_layers"] = 1
    else:
        config["language_config"]["num_hidden_layers"] = LAYERS
        config["vision_und_enc_config"]["params"]["layers"] = 1
    return mmopt.trace(from_config(config, "float32", random=True), batch=2, images=2, context=64)


def written(family, out, after, dtype="float32", exact=True, check=False):
    """The directory of an engine whose rows are cut after so many layers of the language model (0: nowhere)."""
    passes = [CompressVisualTokens(0.5, "uniform", f"language_model.{after}", min_saving=-1)] if after else []
    made = optimize(traced(family), [*passes, *(default_passes() if exact else [])], check=False)
    assert not after or made.reports[0].rewrites
    return export(made.program, out, "tensorrt", dtype, check=check, gate=False)


def tables(out):
    """The operators that make cosines and sines of each rotation, in order."""
    graph = onnx.load(out / "language_model.onnx", load_external_data=False).graph
    made = {o: n.op_type for n in graph.node for o in n.output}
    return [tuple(made[i] for i in n.input[1:]) for n in graph.node if n.op_type == "RotaryEmbedding"]


@installed
@pytest.mark.parametrize(
    ("family", "dtype", "exact"),
    [("janus", "float32", True), ("owl", "float32", False), ("owl", "float16", True)],
)
def test_builds(family, dtype, exact, tmp_path, monkeypatch):
    """With the profile of decode, in which no image has a row; with rows of images the builder is not at fault."""
    monkeypatch.setattr(tensorrt, "profiles", lambda *given: profiles(*given)[-1:])
    out = written(family, tmp_path / "engine", 2, dtype, exact)
    manifest = read_directory(out)
    stages = {"language_model": manifest.stages["language_model"]}
    assert check_stages(out, replace(manifest, stages=stages)) == []


def test_numbers(tmp_path):
    out = written("owl", tmp_path / "engine", 2, check=True)
    assert json.loads((out / "program.json").read_text())["checked"]["program"] == "equal"


def test_tables_of_fewer_rows_stand_apart(tmp_path, monkeypatch):
    whole, apart = ("Gather", "Gather"), ("Max", "Max")
    assert tables(written("owl", tmp_path / "whole", 0)) == [whole] * 2 * LAYERS
    assert tables(written("owl", tmp_path / "cut", 2)) == [whole] * 4 + [apart] * 2
    monkeypatch.setitem(lower_tensorrt.RULES, ROTARY, lower.rotary)
    assert tables(written("owl", tmp_path / "plain", 2)) == [whole] * 4 + [("Concat", "Concat")] * 2
