"""Exported graphs give what the Program gives, run in ONNX Runtime with its default options on two threads."""

import json

import numpy as np
import pytest
import torch
from sessions import session

from mmopt.exporters import lower_onnxruntime
from mmopt.exporters.compare import compare_with_program
from mmopt.exporters.emit import ExportError
from mmopt.exporters.onnx import TARGETS, export
from mmopt.ir.graph import aten
from mmopt.spec.manifest import read_directory


@pytest.fixture(params=["traced", "optimized", "grouped", "narrow"])
def any_program(request):
    if request.param == "optimized":
        return request.getfixturevalue("result").program
    return request.getfixturevalue({"traced": "program"}.get(request.param, request.param))


@pytest.fixture
def engine(any_program, tmp_path):
    return export(any_program, tmp_path / "engine", check=False)


# ------------------------------------------------------------------------------------------------------------ numbers
def test_vision_stages_equal(any_program, engine):
    g = torch.Generator().manual_seed(0)
    for images in (1, 2):
        values = {"pixel_values": torch.randn(images, 3, 56, 56, generator=g)}
        for name in ("vision", "abstractor"):
            expected = any_program.stages[name].run(any_program.weights, values)
            made = session(engine / f"{name}.onnx").run(None, {k: v.numpy() for k, v in values.items()})
            for (key, want), got in zip(expected.items(), made, strict=True):
                torch.testing.assert_close(torch.from_numpy(got), want, atol=2e-5, rtol=1e-4, msg=key)
            values = expected


class Both:
    """The language model of a Program and of an engine directory, side by side; the engine's caches are one buffer."""

    def __init__(self, program, directory):
        self.program, self.stage, self.info = program, program.stages["language_model"], program.info
        self.session = session(directory / "language_model.onnx")
        self.g = torch.Generator().manual_seed(1)

    def caches(self, batch):
        shape = (batch, self.info.kv_heads, self.info.context, self.info.head_dim)
        return {k: torch.zeros(shape) for k in self.stage.inputs if "cache" in k}

    def step(self, nv, nt, past, caches):
        """One call on top of `caches`, which are written in place; compares all outputs."""
        batch, width = len(past), self.info.hidden_size
        values = {n: torch.randn(batch, r, width, generator=self.g) for n, r in (("visual", nv), ("text", nt))}
        values |= {"past": torch.tensor(past), **caches}
        expected = self.stage.run(self.program.weights, values)
        binding = self.session.io_binding()
        for name, v in values.items():
            kind = np.int64 if name == "past" else np.float32
            binding.bind_input(name, "cpu", 0, kind, tuple(v.shape), v.data_ptr())
            if "cache" in name:
                binding.bind_output(f"new_{name}", "cpu", 0, kind, tuple(v.shape), v.data_ptr())
        for name in ("logits", "new_past"):
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, new_past = (binding.get_outputs()[self.order().index(n)].numpy() for n in ("logits", "new_past"))
        torch.testing.assert_close(torch.from_numpy(logits), expected["logits"], atol=2e-5, rtol=1e-4)
        assert new_past.tolist() == expected["past"].tolist() == [p + nv + nt for p in past]
        for name in caches:
            for b, used in enumerate(new_past.tolist()):
                torch.testing.assert_close(caches[name][b, :, :used], expected[name][b, :, :used], atol=1e-5, rtol=1e-4)

    def order(self):
        """Outputs come in the order in which they were bound."""
        return [f"new_{n}" for n in self.stage.inputs if "cache" in n] + ["logits", "new_past"]


def test_language_model_equal(any_program, engine):
    both = Both(any_program, engine)
    kept, lengths = [], []
    for nv in (0, 9, 18):
        for nt in (1, 7):
            caches = both.caches(1)
            both.step(nv, nt, [0], caches)
            both.step(nv, nt, [nv + nt], caches)  # a chunk on top of a cache
            kept.append(caches)
            lengths.append(2 * (nv + nt))
    chosen = [0, 3, 4]
    caches = {k: torch.cat([kept[i][k] for i in chosen]) for k in kept[0]}
    past = [lengths[i] for i in chosen]
    for _ in range(2):  # decode: samples of unequal lengths
        both.step(0, 1, past, caches)
        past = [p + 1 for p in past]


def test_embed_equal(any_program, engine):
    ids = torch.tensor([[1, 5, 7], [2, 2, 0]])
    expected = any_program.stages["embed"].run(any_program.weights, {"ids": ids})["text"]
    (made,) = session(engine / "embed.onnx").run(["text"], {"ids": ids.numpy()})
    assert torch.equal(torch.from_numpy(made), expected)


def test_own_comparison_finds_a_wrong_graph(program, tmp_path, monkeypatch):
    assert json.loads((export(program, tmp_path / "right") / "program.json").read_text())["checked"] == {
        "onnx": "passed",
        "program": "equal",
    }

    def wrong(e, n):
        return e.op("Mul", lower_onnxruntime.linear(e, n), e.number(1.01, torch.float32))

    rules = lower_onnxruntime.RULES | {aten.linear.default: wrong}
    monkeypatch.setitem(TARGETS, "onnx", rules)
    with pytest.raises(ExportError, match=r"stage vision, output vision_rows at .*error"):
        export(program, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_checker_refusal_is_named(program, tmp_path, monkeypatch):
    rules = lower_onnxruntime.RULES | {aten.layer_norm.default: lambda e, n: e.op("NoSuchOperator", e.value(n.args[0]))}
    monkeypatch.setitem(TARGETS, "onnx", rules)
    with pytest.raises(ExportError, match=r"vision\.onnx: the ONNX checker refuses it.*NoSuchOperator"):
        export(program, tmp_path / "engine")


def test_what_does_not_run_is_named(program, tmp_path, monkeypatch):
    def wrong(e, n):
        return e.op("Reshape", lower_onnxruntime.linear(e, n), e.ints([7, 7]))

    monkeypatch.setitem(TARGETS, "onnx", lower_onnxruntime.RULES | {aten.linear.default: wrong})
    with pytest.raises(ExportError, match="stage vision: ONNX Runtime"):
        export(program, tmp_path / "engine")


def test_compare_looks_at_every_stage(result, tmp_path):
    out = export(result.program, tmp_path / "engine", check=False)
    manifest = read_directory(out)
    assert compare_with_program(out, result.program, manifest) is None
    broken = result.program.copy()
    name = "model.layers.3.mlp.down_proj.weight"
    broken.weights[name] = broken.weights[name] * 1.1
    broken.stages = {k: s.replaced(s.graph) for k, s in broken.stages.items()}  # constants of these weights
    found = compare_with_program(out, broken, manifest)
    assert found is not None
    assert found.stage == "language_model"
