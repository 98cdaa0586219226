"""The engine directory: program.json, each weight stored once, written whole or not at all."""

import hashlib
import json
import os
import shutil

import onnx
import pytest
import torch
import toys
from safetensors.torch import load_file
from sessions import DATA
from torch import nn

from mmopt.exporters.emit import ExportError
from mmopt.exporters.onnx import export
from mmopt.exporters.weights import Weights, read_header
from mmopt.frontend.load import from_config, load
from mmopt.frontend.trace import trace
from mmopt.ir.graph import aten
from mmopt.ir.stage import live_constants
from mmopt.search.optimize import optimize


def test_program_json(result, tmp_path):
    out = export(result.program, tmp_path / "engine", reports=result.reports, check=False)
    facts = json.loads((out / "program.json").read_text())
    assert (facts["schema"], facts["target"], facts["dtype"]) == (2, "onnx", "float32")
    assert set(facts["stages"]) == {"vision", "abstractor", "embed", "language_model"}
    assert facts["info"]["context"] == 64
    assert not {"torch_dtype", "directory", "tokenizer", "source"} & set(facts["info"])
    for name, stage in facts["stages"].items():
        data = (out / stage["file"]).read_bytes()
        assert stage["sha256"] == hashlib.sha256(data).hexdigest()
        graph = onnx.load_from_string(data).graph
        assert [i.name for i in graph.input] == list(stage["inputs"])
        assert [o.name for o in graph.output] == [v.get("onnx", k) for k, v in stage["outputs"].items()]
        assert graph.name == name
    language = facts["stages"]["language_model"]
    assert language["inputs"]["visual"] == {"shape": ["B", "nv", 64], "dtype": "float32"}
    assert language["outputs"]["past"] == {"shape": ["B"], "dtype": "int64", "onnx": "new_past"}
    assert language["outputs"]["logits"] == {"shape": ["B", 1, 304], "dtype": "float32"}
    assert facts["state"]["key_cache.0"] == {"shape": ["B", 4, 64, 16], "dtype": "float32"}
    assert facts["schedules"]["text"][0] == {"call": "vision"}
    assert facts["schedules"]["text"][2]["over"] == "chunks"
    assert facts["schedules"]["text"][3]["until"] == "done"
    assert not facts["schedules"].get("image")
    weights = (out / "weights.safetensors").read_bytes()
    assert facts["weights"] == [
        {"file": "weights.safetensors", "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    ]
    assert facts["info"]["processing"]["image"]["size"] == 56
    assert facts.get("tokenizer") is None
    assert [r["name"] for r in facts["reports"]] == [r.name for r in result.reports]
    assert facts["reports"][0]["rewrites"]


def test_weights_once_under_their_names(program, tmp_path):
    out = export(program, tmp_path / "engine", check=False)
    stored, source = load_file(out / "weights.safetensors"), load_file(DATA / "model.safetensors")
    for name in set(stored) & set(source):
        assert torch.equal(stored[name], source[name]), name
    computed = set(stored) - set(source)
    assert computed == {
        "cos(model.inv_freq)",
        "sin(model.inv_freq)",
        "cat(model.visual_abstractor.query_positions, model.visual_abstractor.key_positions)",
        "model.visual_abstractor.query_positions",
    }
    start = read_header(out / "weights.safetensors")[1]
    assert start + sum(t.nbytes for t in stored.values()) == (out / "weights.safetensors").stat().st_size
    assert len({t.numpy().tobytes() for t in stored.values()}) == len(stored)
    for path in out.glob("*.onnx"):  # nothing but small constants stands in the graphs
        graph = onnx.load(path, load_external_data=False).graph
        assert all(i.data_location == i.EXTERNAL or len(i.raw_data) <= 512 for i in graph.initializer)


def test_tied_weights_are_stored_once(grouped, tmp_path):
    stored = load_file(export(grouped, tmp_path / "engine", check=False) / "weights.safetensors")
    assert len([n for n in stored if "embed_tokens" in n or "lm_head" in n]) == 1


def test_equal_constants_of_two_stages_are_one():
    table = nn.Parameter(torch.randn(4, toys.D))
    made = toys.Function(lambda m, visual, text: torch.cat([visual, text], 1) + m.t.sin()[:1], t=table)
    program = toys.chat(made)
    program.stages["again"] = program.stages["language_model"].replaced(program.stages["language_model"].graph)
    store = Weights(program, torch.float32)
    for name in ("language_model", "again"):
        for node in live_constants(program.stages[name]):
            store.add(node)
    assert len(store.constants) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(result, tmp_path, dtype):
    out = export(result.program, tmp_path / "engine", dtype=dtype)
    kind = getattr(torch, dtype)
    stored, source = load_file(out / "weights.safetensors"), load_file(DATA / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {kind}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(stored[name], source[name].to(kind))
    graph = onnx.load(out / "language_model.onnx", load_external_data=False).graph
    wanted = onnx.TensorProto.BFLOAT16 if dtype == "bfloat16" else onnx.TensorProto.FLOAT16
    assert {i.type.tensor_type.elem_type for i in graph.input} == {wanted, onnx.TensorProto.INT64}
    assert json.loads((out / "program.json").read_text())["checked"]["onnx"] == "passed"


def test_half_precision_program_as_float32(tmp_path):
    """Float32 unless asked otherwise: weights are widened, and what is computed from them is computed in float32."""
    program = optimize(trace(load(DATA, "bfloat16"), batch=2, images=2, context=64), check=False).program
    out = export(program, tmp_path / "engine")
    assert json.loads((out / "program.json").read_text())["checked"]["program"] == "equal"
    stored = load_file(out / "weights.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    store = Weights(program, torch.bfloat16)
    product = next(
        n for s in program.stages.values() for n in s.graph.nodes if n.target is aten.mul.Tensor and n.meta["const"]
    )
    a, b = (program.weights[str(x.target)] for x in product.args)
    assert torch.equal(store.value(product), a.float() * b.float())


def test_link(program, result, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(DATA, checkpoint)
    inode = (checkpoint / "model.safetensors").stat().st_ino
    changed = optimize(trace(load(checkpoint), batch=3, images=2, context=64), check=False).program
    name = "model.layers.0.self_attn.o_proj.weight"
    changed.weights[name] = changed.weights[name] * 2  # someone changed it: it must not come from the old file
    out = export(changed, tmp_path / "engine", weights="link")
    assert (out / "model.safetensors").stat().st_ino == inode
    stored = set(load_file(out / "weights.safetensors"))
    assert name in stored
    assert not {"lm_head.weight", "model.layers.1.self_attn.o_proj.weight"} & stored
    facts = json.loads((out / "program.json").read_text())
    _, linked = facts["weights"]
    assert linked["file"] == "model.safetensors"
    assert linked["sha256"] == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert facts["checked"]["program"] == "equal"
    cast = export(changed, tmp_path / "cast", weights="link", dtype="float16", check=False)
    assert not (cast / "model.safetensors").exists()


def test_link_copies_where_links_are_not_possible(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(DATA, checkpoint)
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError("another file system")))
    out = export(trace(load(checkpoint), context=32), tmp_path / "engine", weights="link", check=False)
    assert (out / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_streamed_not_held(tmp_path):
    from safetensors.torch import save_file

    from mmopt.measure.memory import peak_of

    save_file({str(i): torch.randn(1024, 1024) for i in range(24)}, tmp_path / "w.safetensors")
    layers = [nn.Linear(1, 1, bias=False) for _ in range(24)]
    for i, w in load_file(tmp_path / "w.safetensors").items():
        layers[int(i)].weight = nn.Parameter(w, requires_grad=False)

    def run(m, visual, text):
        x = torch.cat([visual, text], 1)
        for layer in m.layers:
            x = torch.nn.functional.linear(x, torch.cat([layer.weight, layer.weight[:1] * 2]))[:, :, :1024]
        return x

    program = toys.chat(toys.Function(lambda m, visual, text: visual))
    weights = {}
    inputs = {"visual": ("B", "nv", 1024), "text": ("B", "nt", 1024)}
    stage = toys.trace(toys.Function(run, layers=nn.ModuleList(layers)), inputs, ["y"], weights)
    program = program.with_stage("language_model", stage)
    program.weights |= weights
    out = tmp_path / "engine"
    export(program, out, check=False)  # what is imported and allocated for good comes with the first
    peak = peak_of(lambda: export(program, out, check=False))
    total = (out / "weights.safetensors").stat().st_size
    assert total > 100e6
    assert peak < 0.3 * total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "coreml"}, "target is 'coreml', expected one of onnx, tensorrt"),
        ({"dtype": "int8"}, "dtype is 'int8', expected float32, float16 or bfloat16"),
        ({"weights": "move"}, "weights is 'move', expected 'copy' or 'link'"),
    ],
)
def test_options_are_refused(program, tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export(program, tmp_path / "engine", **options)


def test_shapes_only_are_refused(tmp_path):
    program = trace(from_config("mplug-owl2-tiny"))
    with pytest.raises(ExportError, match="no weights"):
        export(program, tmp_path / "engine")


def test_foreign_directory_is_left_alone(program, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="not an engine directory"):
        export(program, tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="not an engine directory"):
        export(program, tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "notes.txt"]


def test_earlier_export_is_replaced_whole_or_not_at_all(program, tmp_path, monkeypatch):
    out = export(program, tmp_path / "engine", check=False)
    (out / "stale").write_text("")
    before = sorted(os.listdir(out))

    def full(self, path, *rest):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(Weights, "write", full)
        with pytest.raises(OSError, match="no space"):
            export(program, out, check=False)
    assert sorted(os.listdir(out)) == before
    export(program, out, check=False)
    assert "stale" not in os.listdir(out)
    assert os.listdir(tmp_path) == ["engine"]


def test_tokenizer_is_copied_or_converted(tmp_path):
    import io

    import sentencepiece
    from tokenizers import Tokenizer, models

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(DATA, checkpoint)
    lines = [f"the quick brown fox {i} jumps over {i * 7} lazy dogs" for i in range(200)]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, model_type="bpe", vocab_size=304, byte_fallback=True,
        normalization_rule_name="identity", hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (checkpoint / "tokenizer.model").write_bytes(made.getvalue())
    program = trace(load(checkpoint), context=32)
    out = export(program, tmp_path / "converted", check=False)
    assert json.loads((out / "program.json").read_text())["tokenizer"] == "tokenizer.json"
    expected = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue()).encode("the lazy fox")
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("the lazy fox").ids == expected
    Tokenizer(models.BPE()).save(str(checkpoint / "tokenizer.json"))
    out = export(program, tmp_path / "copied", check=False)
    assert (out / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
