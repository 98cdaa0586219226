"""optimize(): passes in order, each held to its contract; what the exact passes make of a whole model."""

import time

import pytest
import sympy
import torch
from toys import D, Routed, Rows, chat, declared, flow, random_values

from mmopt.frontend.load import from_config
from mmopt.frontend.trace import trace
from mmopt.ir.graph import CACHED_ATTENTION, CAT, EXPAND, LINEAR, RMS_NORM, SLICE, rebuild, shape_of
from mmopt.ir.printer import op_name
from mmopt.ir.stage import live_constants
from mmopt.passes.split_rows import SplitRows
from mmopt.pipeline import Result, default_passes
from mmopt.rewrite import contracts
from mmopt.rewrite.contracts import TOLERANCE, ContractError, compare, difference, drawn_weights, why_unchecked
from mmopt.rewrite.pass_base import Pass
from mmopt.search.optimize import optimize
from mmopt.spec.schedule import Call


# --------------------------------------------------------------------------------------------------------- contracts
class Scaled(Pass):
    """Not exact: the shared projection's bias is scaled."""

    name = "scaled"

    def __init__(self, factor, contract="exact"):
        self.factor, self.contract = factor, contract

    def run(self, program, report):
        made = program.copy()
        made.weights["language_model.shared.bias"] = self.factor * made.weights["language_model.shared.bias"]
        report.did("language_model: a bias")
        made.stages["language_model"] = made.stages["language_model"].replaced(renamed(made))
        made.weights["scaled"] = made.weights.pop("language_model.shared.bias")
        return made


def renamed(program):
    def swap(b, n, args):
        if n.target is LINEAR and args[2].target == "language_model.shared.bias":
            new = b.weight("scaled", shape_of(args[2]), args[2].meta["dtype"])
            return b.copy(n, (*args[:2], new))

    return rebuild(program.stages["language_model"].graph, swap)


class Fails(Pass):
    name = "fails"

    def run(self, program, report):
        raise KeyError("layer 3")


class Nothing(Pass):
    name = "nothing"

    def rewrite(self, graph, stage, report):
        report.skip(stage, "there is nothing to do")
        return graph


def test_a_broken_promise_names_pass_stage_output_node_and_error():
    program = chat(Routed())
    with pytest.raises(ContractError) as e:
        optimize(program, [SplitRows(), Scaled(1.5)])
    message = str(e.value)
    assert "pass scaled promised to be exact: stage language_model, output logits (node " in message
    assert "error " in message
    assert "allowed " in message
    assert str(e.value.program) == str(SplitRows()(program)[0])  # the last good one
    assert e.value.program([[3, 4]], max_new_tokens=2, ignore_eos=True)["tokens"]


def test_what_the_table_allows_passes():
    assert optimize(chat(Routed()), [Scaled(1 + 1e-6)]).reports[0].checked == "checked"


def test_an_approximate_pass_is_measured_not_refused():
    (report,) = optimize(chat(Routed()), [Scaled(1.5, "approximate")]).reports
    assert report.checked.startswith("drift: stage language_model, output logits")


def test_a_pass_that_fails_leaves_the_last_good_program():
    program = chat(Routed())
    with pytest.raises(ContractError, match="pass fails failed: KeyError: 'layer 3'") as e:
        optimize(program, [SplitRows(), Fails()])
    assert str(e.value.program) == str(SplitRows()(program)[0])


def test_reports_say_what_was_done_where_and_what_was_left():
    result = optimize(chat(Routed()), [SplitRows(), Nothing()])
    text = str(result)
    assert "split_rows (exact, checked): 1 rewrites" in text
    assert "  did   language_model: 7 operators run part by part, 1 selections by mask are gone" in text
    assert "nothing (exact, nothing to check): 0 rewrites" in text
    assert "  left  embed: there is nothing to do" in text
    assert all(r.seconds >= 0 for r in result.reports)


def test_observers_are_told_before_and_after_each_pass():
    """With the Program as it is then."""
    told, program = [], chat(Routed())
    result = optimize(program, [SplitRows(), Nothing()], observers=[lambda *told_now: told.append(told_now)])
    assert [name for name, _, _ in told] == ["split_rows", "split_rows", "nothing", "nothing"]
    assert [report is None for _, report, _ in told] == [True, False, True, False]
    assert told[0][2] is program
    assert [str(p) == str(program) for _, _, p in told] == [True, False, False, False]
    assert told[-1][2] is result.program


def test_checks_can_be_left_out_and_asked_for(monkeypatch):
    assert optimize(chat(Routed()), [Scaled(1.5)], check=False).reports[0].checked == "not checked: checks are off"
    monkeypatch.setattr("mmopt.rewrite.contracts.BUDGET", 1.0)
    (report,) = optimize(chat(Routed()), [Scaled(1.5)]).reports
    assert report.checked.startswith("not checked: about ")
    with pytest.raises(ContractError):
        optimize(chat(Routed()), [Scaled(1.5)], check=True)


def test_programs_without_weights_are_optimized_unchecked():
    program = trace(from_config("mplug-owl2-tiny"), context=32)
    assert why_unchecked(program) == "shapes only, no weights"
    checked = {r.checked for r in optimize(program).reports}
    assert checked <= {"not checked: shapes only, no weights", "nothing to check"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_table_of_tolerances(dtype):
    x = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    rms = float(x.double().square().mean().sqrt())
    assert difference(x, x.clone()) is None
    moved = (x.double() + 0.5 * TOLERANCE[dtype] * rms).to(dtype)
    assert difference(x, moved) is None
    assert difference(x, (x.double() + 2 * TOLERANCE[dtype] * rms).to(dtype)) is not None  # on average
    spike = x.clone()
    spike[0, 0] += 20 * TOLERANCE[dtype] * rms
    assert difference(x, spike) is not None  # at the worst element


def test_nan_shapes_and_types_are_differences():
    x = torch.ones(2, 3)
    assert difference(x, x * float("nan")) is not None
    assert difference(x, x[:1]) is not None
    assert difference(x, x.double()) is not None
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) is not None
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 2])) is None
    assert difference(x[:0], x[:0]) is None


def test_values_that_are_no_longer_made_are_a_difference():
    after = flow()
    before = after.copy()
    before.schedules = before.schedules.replaced(text=(Call("images", {"image_rows": "spare"}), *after.schedules.text))
    found = compare(before, after)
    assert found is not None
    assert (found.stage, found.output, found.node) == ("images", "image_rows", "no longer made")


def test_weights_that_would_hide_an_error_are_drawn_anew():
    program = chat(Routed())
    program.weights["language_model.shared.weight"] = torch.ones(D, D)
    program.weights["language_model.shared.bias"] = torch.zeros(D)
    drawn = drawn_weights(program, 0)
    assert float(drawn["language_model.shared.weight"].std()) > 0
    assert float(drawn["language_model.shared.bias"].std()) > 0
    same = "language_model.head.weight"
    assert drawn[same] is program.weights[same]


def test_two_sizes_and_every_mix_of_images_are_tried(program):
    prompts = [contracts.random_inputs(program, size, seed=0)["prompts"] for size in (0, 1)]
    assert [len(p) for p in prompts] == [1, 3]
    image = program.info.image_id
    assert sorted(p.count(image) for p in prompts[1]) == [0, 1, 2]
    assert len({len(p) for p in prompts[1]}) == 3


# ------------------------------------------------------------------------------------------------------ any program
@pytest.mark.parametrize("make", [lambda: chat(Rows()), flow, lambda: flow(gated=True)])
def test_toys_twice(make):
    program = make()
    text = str(program)
    once = optimize(program).program
    assert str(program) == text
    assert str(optimize(once).program) == str(once) != text


# ------------------------------------------------------------------------------------------------- the tiny checkpoint
def leaves(node):
    """Names of the weights an expression is made from."""
    if node.op == "get_attr":
        return {str(node.target)}
    return set().union(*(leaves(a) for a in node.all_input_nodes)) if node.meta["const"] else set()


def linears(stage):
    """(linear, names of its weights) of all products that run at run time."""
    return [(n, leaves(n.args[1])) for n in stage.graph.nodes if n.target is LINEAR and not n.meta["const"]]


def at(size, **sizes):
    return int(size.subs({s: sizes[str(s)] for s in size.free_symbols})) if isinstance(size, sympy.Expr) else size


def test_optimized_twice_is_optimized_once(program, result):
    again = optimize(result.program)
    assert str(again.program) == str(result.program)


def test_every_pass_was_checked_and_the_input_not_changed(program, result):
    assert [r.name for r in result.reports] == [p.name for p in default_passes()]
    idle = [r.name for r in result.reports if not r.rewrites]
    painting = ["split_calls", "share_samples", "drop_hidden_rows"]  # this model paints nothing
    assert idle == [*painting, "fuse_cross_attention"]  # and its images lie among its text
    assert all(r.checked == "checked" for r in result.reports if r.rewrites)
    assert "where(" in str(program)
    assert compare(program, result.program) is None
    assert isinstance(result, Result)


def test_no_routing_by_modality_is_left(result):
    names = {op_name(n) for s in result.program.stages.values() for n in s.graph.nodes}
    assert not {n for n in names if any(w in n for w in ("where", "nonzero", "gather", "scatter", "index", "masked"))}


def test_each_row_reads_its_own_branch_alone(result):
    stage = result.program.stages["language_model"]
    branched = [(n, w) for n, ws in linears(stage) for w in ws if "multiway" in w]
    branched += [
        (n, w) for n in stage.graph.nodes if n.target is RMS_NORM for w in leaves(n.args[2]) if "multiway" in w
    ]
    assert len(branched) == 4 * 8 - 1  # the last layer's second norm works on a text row alone
    for n, weight in branched:
        rows = at(shape_of(n)[1], nv=5, nt=3)
        assert rows in ((5,) if ".multiway.1." in weight else (3, 1)), (weight, shape_of(n))
    for n in stage.graph.nodes:
        if n.target is CACHED_ATTENTION:
            key, value = n.args[1].args[0], n.args[2]  # key: behind the rotary embedding
            for joined, kind in ((key, "k_proj"), (value, "v_proj")):
                assert joined.target is CAT
                for part, branch in zip(joined.args[0], (1, 0), strict=True):
                    product = part.args[0] if part.target is SLICE else part
                    assert any(f"{kind}.multiway.{branch}." in w for w in leaves(product.args[1]))
                    assert not any(f"multiway.{1 - branch}." in w for w in leaves(product.args[1]))


def test_a_decoded_token_costs_one_row_of_the_text_branch(result):
    info, stage = result.program.info, result.program.stages["language_model"]
    width, mlp = info.hidden_size, 176
    products = 0
    for n, _ in linears(stage):
        rows = at(shape_of(n)[1], nv=0, nt=1)
        assert rows in (0, 1)
        products += rows * shape_of(n)[2] * shape_of(n.args[0])[2]
    assert products == info.layers * (4 * width * width + 3 * width * mlp) + info.vocab_size * width


def test_the_last_layer_and_the_head_work_on_one_row(result):
    stage = result.program.stages["language_model"]
    last = f"layers.{result.program.info.layers - 1}."
    found = set()
    for n, weights in linears(stage):
        for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            if any(last + part in w for w in weights):
                assert shape_of(n)[1] == 1
                found.add(part)
        if "lm_head.weight" in weights:
            assert shape_of(n)[1] == 1
            found.add("head")
    assert len(found) == 5


def test_layer_0_of_the_abstractor_asks_constant_queries(result):
    first = next(n for n in result.program.stages["abstractor"].graph.nodes if op_name(n) == "mmopt.attention")
    assert first.args[0].target is EXPAND
    assert first.args[0].args[0].meta["const"]


def test_keys_and_values_of_all_vision_rows_are_one_product(result):
    stage = result.program.stages["abstractor"]
    rows, width = shape_of(stage.placeholders()[0])[1:]
    ((product, weights),) = [(n, w) for n, w in linears(stage) if shape_of(n)[1] == rows]
    assert shape_of(product)[2] == 3 * 2 * width  # key and value of three layers
    assert sum(".attention." in w for w in weights) == 6


def test_the_end_row_of_an_image_and_the_rotary_tables_are_constants(result):
    rows = result.program.stages["abstractor"].output_nodes()["image_rows"]
    assert rows.target is CAT
    assert leaves(rows.args[0][-1].args[0]) == {"model.visual_abstractor.vit_eos"}
    tables = [n for n in result.program.stages["language_model"].graph.nodes if op_name(n) == "embedding"]
    assert len(tables) == 2
    assert all(t.args[0].meta["const"] for t in tables)


def test_no_dead_weights_and_no_dead_nodes(program, result):
    used = set().union(*(s.weights() for s in result.program.stages.values()))
    assert set(result.program.weights) == used
    gone = set(program.weights) - used
    assert gone == {"model.layers.3.post_attention_layernorm.multiway.1.weight"}  # the last row is text
    for stage in result.program.stages.values():
        assert all(n.users for n in stage.graph.nodes if n.op not in ("output", "placeholder"))


def test_no_weight_is_stored_twice(result):
    kept = {}
    for name in ("language_model", "embed"):
        for constant in live_constants(result.program.stages[name]):
            for weight in leaves(constant) - {"model.inv_freq"}:
                kept.setdefault(weight, []).append((name, constant.name))
    assert {w: c for w, c in kept.items() if len(c) > 1} == {}


def test_shapes_and_types_are_as_declared(program, result):
    for p in (program, result.program):
        for stage in p.stages.values():
            for sizes in ({"N": 1, "B": 1, "nv": 0, "nt": 1, "n": 1}, {"N": 2, "B": 3, "nv": 9, "nt": 4, "n": 2}):
                declared(stage, p.weights, random_values(stage, sizes))


def test_half_precision(model):
    from mmopt.frontend.load import load

    for dtype in ("bfloat16", "float16"):
        half = trace(load(model.directory, dtype=dtype), batch=2, images=1, context=40)
        assert {r.checked for r in optimize(half).reports if r.rewrites} == {"checked"}


def test_the_official_size_is_optimized_in_time():
    """Shapes alone, 32 layers: the limit is two minutes."""
    start = time.perf_counter()
    program = trace(from_config("mplug-owl2-7b"))
    made = optimize(program).program
    assert time.perf_counter() - start < 120
    assert sum(n.target is CACHED_ATTENTION for n in made.stages["language_model"].graph.nodes) == 32
