"""An operator of our own is three entries: `ir/ops.py`, `ir/op_rules.py`, and a lowering; what is missing is named."""

import onnxruntime
import pytest
import torch
import toys

from mmopt.exporters import lower_onnxruntime, lower_tensorrt
from mmopt.exporters.emit import ExportError
from mmopt.exporters.onnx import export
from mmopt.ir import ops
from mmopt.ir.cost import count_work
from mmopt.ir.graph import shape_of
from mmopt.ir.op_rules import RULES, OpRule, along, product_flops, rule_of
from mmopt.passes.split_rows import SplitRows

D = toys.D


def _tanh_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """tanh(x weight), x ``[B, n, d]``, weight ``[d, e]``."""
    return torch.tanh(x @ weight)


def lowered(e, n):
    return e.op("Tanh", e.op("MatMul", e.operand(n.args[0], e.dtype(n)), e.operand(n.args[1], e.dtype(n))))


# 1. What it computes, in ops.py.
ops.define(_tanh_product, lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[1]))
OP = torch.ops.mmopt.tanh_product.default
# 2. Along which dimensions it works row by row, and its FLOPs, in op_rules.py.
RULE = OpRule(along(-1, 1), product_flops, heavy=True)


@pytest.fixture
def operator(monkeypatch):
    monkeypatch.setitem(ops.PLAIN, OP, _tanh_product)
    monkeypatch.setitem(RULES, OP, RULE)
    for lowering in (lower_onnxruntime, lower_tensorrt):  # 3. Its spelling in ONNX: once for both, in lower.py.
        monkeypatch.setitem(lowering.RULES, OP, lowered)


@pytest.fixture(autouse=True, scope="module")
def _forgotten():
    yield
    del ops.PLAIN[OP]


def run(m, visual, text):
    return torch.ops.mmopt.tanh_product(torch.cat([visual, text], 1), m.a.weight)


def program():
    return toys.single(toys.Function(run, a=toys.linear()), toys.VISUAL_AND_TEXT)


def calls(made):
    return [n for n in made.stages["toy"].graph.nodes if n.target is OP]


@pytest.mark.usefixtures("operator")
def test_it_is_traced_counted_and_split():
    before = program()
    assert len(calls(before)) == 1
    work = count_work(before.stages["toy"], {"B": 2, "nv": 3, "nt": 4})
    assert (work.flops, work.attention_flops) == (2 * 2 * (3 + 4) * D * D, 0)
    after, report = SplitRows()(before)
    assert report.rewrites == ["toy: 1 operators run part by part, 0 selections by mask are gone"]
    assert [str(shape_of(n)[1]) for n in calls(after)] == ["nv", "nt"]
    toys.same(before, after)


@pytest.mark.usefixtures("operator")
def test_gradients_go_through_its_plain_definition():
    made = program()
    values = toys.random_values(made.stages["toy"], {"B": 1, "nv": 1, "nt": 2})
    values["text"].requires_grad_(True)
    (y,) = made.stages["toy"].run(made.weights, values, keep_constants=False, gradients=True).values()
    y.sum().backward()
    assert values["text"].grad.abs().min() > 0


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_it_is_exported(tmp_path, target):
    made = program()
    out = export(made, tmp_path / "engine", target=target, check=False, gate=False)
    values = toys.random_values(made.stages["toy"], {"B": 2, "nv": 3, "nt": 1})
    (expected,) = made.stages["toy"].run(made.weights, values).values()
    session = onnxruntime.InferenceSession(out / "toy.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {k: v.numpy() for k, v in values.items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def without(monkeypatch, table):
    monkeypatch.delitem(table, OP)


@pytest.mark.usefixtures("operator")
def test_one_that_is_not_defined_here_is_named(monkeypatch):
    without(monkeypatch, ops.PLAIN)
    with pytest.raises(ValueError, match=r"operator mmopt\.tanh_product\.default is not defined in mmopt/ir/ops\.py"):
        program()


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("use", [SplitRows(), lambda p: count_work(p.stages["toy"], {"B": 1, "nv": 1, "nt": 1})])
def test_one_without_rules_is_named(monkeypatch, use):
    made = program()
    without(monkeypatch, RULES)
    with pytest.raises(LookupError, match=r"mmopt\.tanh_product\.default has no entry in RULES of mmopt/ir/op_rules"):
        use(made)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(("target", "lowering"), [("onnx", lower_onnxruntime), ("tensorrt", lower_tensorrt)])
def test_one_without_a_lowering_is_named(monkeypatch, tmp_path, target, lowering):
    without(monkeypatch, lowering.RULES)
    with pytest.raises(ExportError, match=r"operator mmopt\.tanh_product.*exporters/lower\.py"):
        export(program(), tmp_path / "engine", target=target, check=False, gate=False)


def test_every_operator_of_ours_has_its_entries():
    own = set(ops.PLAIN) - {OP}
    assert len(own) == 5
    assert own <= set(RULES)
    assert own <= set(lower_onnxruntime.RULES)
    assert own <= set(lower_tensorrt.RULES)


def test_operators_of_others_need_no_entry():
    assert rule_of(torch.ops.aten.cumsum.default) == OpRule()
    assert rule_of(torch.ops.aten.exp.default).dims is not OpRule().dims
