"""What the exporters' tests share: recorded data, how a graph is loaded, and what its values are."""

import json
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto

from mmopt.exporters.onnx import export
from mmopt.spec.manifest import TensorInfo

ELEMENT = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
DATA = Path(__file__).parents[1] / "data" / "mplug_owl2"


def session(path) -> ort.InferenceSession:
    """Default options but for two threads and fewer messages."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def types_of(path):
    """Element types of the values of a graph by name, initializers included."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True).graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return graph, values | {i.name: i.data_type for i in graph.initializer}


def read_by(path, kind):
    """Element types that the operators of a kind read first."""
    graph, types = types_of(path)
    return {types[n.input[0]] for n in graph.node if n.op_type == kind}


def in_float32(program, values):
    """What the stage gives of weights and values that are rounded to float16, computed in float32."""
    weights = {k: w.half().float() if w.is_floating_point() else w for k, w in program.weights.items()}
    values = {k: v.half().float() if v.is_floating_point() else v for k, v in values.items()}
    return program.stages["toy"].run(weights, values, keep_constants=False).values()


def in_float16(path, values):
    given = {k: v.half().numpy() if v.is_floating_point() else v.numpy() for k, v in values.items()}
    return [torch.from_numpy(x) for x in session(path / "toy.onnx").run(None, given)]


def shaped(**shapes):
    """Inputs of a stage as an engine directory lists them, by name."""
    return {name: TensorInfo(shape, "float32") for name, shape in shapes.items()}


def checked(out):
    """What the exporter says it checked of an engine directory."""
    return json.loads((out / "program.json").read_text())["checked"]


def assert_builds(program, out, dtype):
    """TensorRT takes every stage; in the Program's own precision the graphs also give what it gives."""
    found = checked(export(program, out, "tensorrt", dtype))
    assert found["tensorrt"] == "parsed and built"
    if dtype is None:
        assert found["program"] == "equal"
