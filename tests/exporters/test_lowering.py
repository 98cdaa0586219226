"""Single operators, with either lowering, in ONNX Runtime."""

import os
from dataclasses import replace

import onnx
import pytest
import torch
import toys
from sessions import session
from torch import nn

from mmopt.exporters.emit import ExportError
from mmopt.exporters.onnx import export
from mmopt.ir import ops


def gated(m, x):
    return x * torch.sigmoid(1.702 * x) + torch.sigmoid(x) * x


def rows(m, visual, text):
    x = torch.cat([visual, text], 1)
    n = x.shape[1]
    kept = (torch.arange(n) >= visual.shape[1])[None, :, None]
    x = torch.where(kept, x, x.new_full((1, n, 1), 2.0)) + torch.arange(n)[None, :, None]
    x = x.reshape(x.shape[0], n, 2, -1).transpose(1, 2).reshape(x.shape[0], -1, 4)
    return x * n, x[:, -3:], (x > 0) | (x == 1) & ~(x < -1)


def masked(m, q, k, mask):
    k = torch.cat([k, k], 2)
    return ops.attention(q, k[..., :8], k[..., 4:12], 4, 2, mask, True), ops.attention(q, k, k, 4, 4, None, True, 0.5)


D = toys.D
TOYS = {
    "gates": (gated, {"x": ("B", "nt", D)}),
    "rows": (rows, {"visual": ("B", "nv", D), "text": ("B", "nt", D)}),
    "norms": (
        lambda m, x: (m.norm(x), nn.functional.layer_norm(x, (D,)), nn.functional.rms_norm(x, (D,), m.norm.weight)),
        {"x": ("B", "nt", D)},
    ),
    "masked attention": (masked, {"q": ("B", "nt", 2 * D), "k": ("B", "nv", D), "mask": (("B", "nv"), torch.bool)}),
    "grouped attention": (
        lambda m, q, k: ops.attention(q, k[..., :4], k[..., 4:], 4, 2),
        {"q": ("B", "nt", D), "k": ("B", 5, D)},
    ),
    "pointwise": (
        lambda m, x: torch.tanh(x).exp().sqrt() - x.cos() / (2 + x.sin()) + nn.functional.gelu(x) - x.abs().log(),
        {"x": ("B", "nt", D)},
    ),
    "softmax": (lambda m, x: (torch.softmax(x, -1), x.argmax(-1)), {"x": ("B", "nt", D)}),
    "convolution": (
        lambda m, x: m.conv(torch.cat([x[:, None], -x[:, None]], 1)).flatten(2).transpose(1, 2),
        {"x": ("B", 6, D)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
@pytest.mark.parametrize("name", list(TOYS))
def test_operators(name, target, tmp_path):
    run, inputs = TOYS[name]
    module = toys.Function(run, norm=nn.LayerNorm(D), conv=nn.Conv2d(2, 4, (2, 3), (1, 2), (1, 0), groups=2))
    count = {"rows": 3, "norms": 3, "masked attention": 2, "softmax": 2}.get(name, 1)
    program = toys.single(module, inputs, [f"y{i}" for i in range(count)])
    program.info = replace(program.info, batch=3, images=1, context=8)
    out = export(program, tmp_path / "engine", target=target, check=False, gate=False)
    onnx.checker.check_model(str(out / "toy.onnx"))
    run_in = session(out / "toy.onnx")
    tried = [{"B": 1, "nv": 4, "nt": 2}, {"B": 3, "nv": 3, "nt": 1}]
    for sizes in [*tried, {"B": 1, "nv": 0, "nt": 4}] if name == "rows" else tried:
        values = toys.random_values(program.stages["toy"], sizes)
        if "mask" in values:
            values["mask"][:, 0] = True
        expected = program.stages["toy"].run(program.weights, values, keep_constants=False)
        made = run_in.run(None, {k: v.numpy() for k, v in values.items()})
        for want, got in zip(expected.values(), made, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=1e-4)


def test_sigmoid_gates_are_one_operator(tmp_path):
    out = export(toys.single(toys.Function(gated), {"x": ("B", "nt", D)}), tmp_path / "engine", check=False)
    kinds = [n.op_type for n in onnx.load(out / "toy.onnx").graph.node]
    assert kinds == ["QuickGelu", "QuickGelu", "Add"]


def test_unknown_operator_is_named(tmp_path):
    program = toys.chat(toys.Function(lambda m, visual, text: torch.cumsum(torch.cat([visual, text], 1), 1)))
    (tmp_path / "engine").mkdir()
    with pytest.raises(ExportError, match=r"stage language_model, node cumsum\w*, operator cumsum: .* no ONNX"):
        export(program, tmp_path / "engine")
    assert os.listdir(tmp_path) == ["engine"]
