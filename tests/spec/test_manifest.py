"""program.json and its types: what is written is read back, what is missing, unknown or wrong is named."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import toys

from mmopt.spec import typed_json
from mmopt.spec.errors import EngineError
from mmopt.spec.manifest import SCHEMA, Checked, Manifest, PassInfo, StageInfo, TensorInfo, WeightFile, read_directory
from mmopt.spec.model_info import Cross, Flow, ModelInfo
from mmopt.spec.schedule import Call, Cat, Loop, Schedule, Schedules
from mmopt.spec.solvers import make_plan

LOOP = Loop((Call("step", {"x": Cat(1, ("a", "b"))}, {"y": "z"}),), trips="steps", update=("latents", "velocity"))
FLOW = Flow((4, 8, 8), 16, plan=make_plan("ab2", 4, guidance=2.0), plans=(make_plan("euler", 3),))
MANIFEST = Manifest(
    mmopt="0.1.0",
    versions={"torch": "2.13.0", "onnx": None},
    target="onnx",
    dtype="float32",
    info=toys.toy_info(cross=Cross(2, 3, 4, leading_text="all_images"), flow=FLOW, cross_kv={"media": "key"}),
    stages={
        "toy": StageInfo("toy.onnx", "ab", {"x": TensorInfo(("B", 3), "int64")}, {"y": TensorInfo((1,), "bool", "y1")})
    },
    schedules=Schedules(Schedule([Call("toy")]), Schedule([Call("embed"), LOOP])),
    state={"past": TensorInfo(("B",), "int64")},
    weights=(WeightFile("weights.safetensors", 10, "cd"),),
    reports=(PassInfo("split_rows", "exact", ("a",), (), "checked", 0.5),),
    checked=Checked(onnx="passed"),
)


def changed(**fields):
    data = json.loads(json.dumps(MANIFEST.to_json()))
    return data | fields


def test_what_is_written_is_read_back():
    again = Manifest.from_json(changed())
    assert again == MANIFEST
    assert again.info.flow.plan == FLOW.plan
    assert again.schedules.image.steps == LOOP


def test_defaults_are_left_out():
    data = changed()
    assert "one_sample" not in data["stages"]["toy"]
    assert data["checked"] == {"onnx": "passed"}
    assert "max_frames" not in data["info"]
    assert data["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("info", "image_id"), "five", "info.image_id: expected integer, found 'five'"),
        (("info", "image_id"), True, "info.image_id: expected integer, found True"),
        (("info", "cross", "tiles"), None, "info.cross.tiles: expected integer, found None"),
        (("info", "eos_ids"), [2, "x"], r"info.eos_ids\[1\]: expected integer, found 'x'"),
        (("info", "flow", "latents"), [4, 8], "info.flow.latents: expected 3 values, found"),
        (("info", "flow", "plan", "name"), 3, "info.flow.plan: not a flow plan: its name is 3"),
        (("info", "colour"), 3, "info: unknown field colour"),
        (("stages", "toy", "inputs", "x", "dtype"), 7, "stages.toy.inputs.x.dtype: expected string, found 7"),
        (("weights",), {}, "weights: expected a list, found"),
        (("schedules", "text"), [{"call": "toy", "of": 1}], "schedules.text: call: unknown field of"),
        (("schedules", "text"), [{}], "schedules.text: expected a call or a loop"),
        (("facts",), 1, "unknown field facts"),
    ],
)
def test_what_is_wrong_is_named(path, value, why):
    data = changed()
    place = data
    for k in path[:-1]:
        place = place[k]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=why):
        Manifest.from_json(data)


@pytest.mark.parametrize(
    ("path", "why"), [(("dtype",), "field dtype is missing"), (("info", "batch"), "info: field batch")]
)
def test_what_is_missing_is_named(path, why):
    data = changed()
    place = data
    for k in path[:-1]:
        place = place[k]
    del place[path[-1]]
    with pytest.raises(ValueError, match=why):
        Manifest.from_json(data)


def test_a_directory_of_the_first_schema_says_how_it_is_made_anew(tmp_path):
    old = {"schema": 1, "mmopt": "0.1.0", "target": "tensorrt", "dtype": "float16"}
    old["info"] = {"batch": 2, "images": 3, "context": 96}
    (tmp_path / "program.json").write_text(json.dumps(old))
    line = f"mmopt export CHECKPOINT {tmp_path} --target tensorrt --dtype float16 --batch 2 --images 3 --context 96"
    with pytest.raises(EngineError, match="has schema 1, this mmopt reads schema 2; export it again: " + line):
        read_directory(tmp_path)


def test_a_newer_directory_is_refused(tmp_path):
    (tmp_path / "program.json").write_text(json.dumps(changed(schema=3)))
    with pytest.raises(EngineError, match=r"has schema 3, written by mmopt 0.1.0; this mmopt knows schema 2"):
        read_directory(tmp_path)


def test_info_is_never_edited():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MANIFEST.info.batch = 4  # type: ignore[misc]
    assert dataclasses.replace(MANIFEST.info, batch=4).batch == 4
    assert MANIFEST.info.batch == 3


def test_what_a_model_does_not_do_is_said():
    with pytest.raises(ValueError, match="toy generates no images"):
        _ = toys.toy_info().required_flow
    assert toys.toy_info().image_fusion == "inline"
    assert MANIFEST.info.image_fusion == "cross_attention"


def test_the_schema_names_every_field():
    schema = typed_json.json_schema(Manifest)
    assert set(schema["$defs"]["ModelInfo"]["properties"]) == {f.name for f in dataclasses.fields(ModelInfo)}
    assert schema["$defs"]["ModelInfo"]["additionalProperties"] is False
    assert "info" in schema["$defs"]["Manifest"]["required"]
    assert schema["$ref"] == "#/$defs/Manifest"
    json.dumps(schema)


def test_the_published_schema_is_that_of_the_types():
    """MMOPT_WRITE_SNAPSHOTS=1 writes it anew: read the diff before you commit it."""
    path = Path(__file__).parents[2] / "docs" / "program.schema.json"
    made = json.dumps(typed_json.json_schema(Manifest), indent=1) + "\n"
    if os.environ.get("MMOPT_WRITE_SNAPSHOTS"):
        path.write_text(made)
    assert path.read_text() == made
