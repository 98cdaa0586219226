"""The benchmark: its rivals compute what the model computes, and its figures are what they say."""

import copy
import json
import sys
import time
import types

import numpy as np
import pytest
import torch

from mmopt.frontend.load import CONFIGS, from_config
from mmopt.frontend.trace import trace
from mmopt.ir.cost import count_work
from mmopt.measure import memory
from mmopt.measure.baselines import ROUTINGS, Shared, torch_stage
from mmopt.measure.bench import agreement, bench
from mmopt.measure.ratios import ratios_of, rows_of
from mmopt.measure.tables import bench_plot, bench_text
from mmopt.measure.torch_stages import TorchStages
from mmopt.measure.variants import Inputs
from mmopt.rewrite.contracts import ContractError
from mmopt.search.optimize import optimize


@pytest.fixture(scope="module")
def grouped():
    """Two layers with two heads for each key head, random weights: the model, traced and optimized."""
    raw = json.loads((CONFIGS / "mplug-owl2-tiny.json").read_text())
    raw |= {"num_hidden_layers": 2, "num_key_value_heads": 2}
    raw["visual_config"]["visual_model"]["num_hidden_layers"] = 1
    model = from_config(raw, random=True)
    program = trace(model, context=64)
    return model, program, optimize(program).program


@pytest.fixture(scope="module")
def inputs(grouped):
    return Inputs.draw(grouped[1].info, (3, 56, 56))


def reference(program, inputs: Inputs):
    """Prefill logits, decode logits and caches of the Program's own run."""
    seen = []
    program(
        [inputs.prompt(program.info.image_id)],
        torch.from_numpy(inputs.pixels),
        max_new_tokens=2,
        forced=torch.tensor([[inputs.token, 0]]),
        observe=lambda phase, call, made, chunk: seen.append(made) if "logits" in made else None,
    )
    return seen[-2]["logits"][0, -1], seen[-1]["logits"][0, -1], seen[-1]


def outputs(stages: TorchStages):
    with torch.no_grad():
        found = []
        for stage in ("encode", "prefill", "decode"):
            stages.run(stage)
            if stage != "encode":
                found.append(stages.logits())
    return found


@pytest.mark.parametrize("routing", [*ROUTINGS, None])
def test_torch_stages_compute_what_the_program_computes(grouped, inputs, routing):
    _, program, optimized = grouped
    prefill, decode, state = reference(program, inputs)
    stages = TorchStages(optimized if routing is None else program, inputs, routing, Shared())
    found = outputs(stages)
    torch.testing.assert_close(found[0], prefill, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], decode, atol=2e-4, rtol=1e-4)
    for name in program.state:
        if "cache" in name:
            torch.testing.assert_close(stages.values[name], state[name], atol=2e-4, rtol=1e-4)
            assert not stages.values[name][:, :, inputs.filled + 1 :].any()


def test_order_of_the_rows_matters(grouped, inputs):
    """The comparison above would notice a baseline that reads the prompt in another order."""
    _, program, _ = grouped
    moved = Inputs(inputs.pixels, inputs.ids, inputs.leading - 1, inputs.image_rows, inputs.token)
    found = outputs(TorchStages(program, moved, "known", Shared()))[0]
    assert (found - reference(program, inputs)[0]).abs().max() > 1e-2


def test_baselines_are_what_they_are_called(grouped, inputs):
    _, program, _ = grouped
    model, size = program.stages["language_model"], {"B": 1, "nv": inputs.image_rows, "nt": len(inputs.ids)}
    routed = torch_stage(model, program.weights, size, leading=inputs.leading, routing="routed").code
    assert routed.count("routed_linear(") == 4  # k and v of both layers
    assert routed.count("routed_rms_norm(") == 4
    known = torch_stage(model, program.weights, {"B": 1, "nv": 0, "nt": 1}, past=30).code
    assert known.count("linear(") == 2 * 7 + 1  # plain decode: q, k, v, o, gate, up, down and the head
    assert "routed" not in known
    assert "narrow" not in known
    for code in (routed, known):
        assert "where" not in code
        assert "cos" not in code.replace("const", "")
    with pytest.raises(ValueError, match="expected one of routed, known"):
        torch_stage(model, program.weights, size, routing="fast")
    with pytest.raises(ValueError, match="no number is given for the sizes nt"):
        torch_stage(model, program.weights, {"B": 1, "nv": 0})


def test_weights_are_shared_and_caches_are_written_in_place(grouped, inputs):
    _, program, _ = grouped
    shared = Shared()
    stages = [TorchStages(program, inputs, r, shared) for r in ROUTINGS]
    modules = [s.module for v in stages for name in ("prefill", "decode") for s in v.steps[name]]
    held = {p.data_ptr() for m in modules for p in m.parameters() if p.numel() >= 64 * 64}
    assert held == {w.data_ptr() for w in program.weights.values() if w.numel() >= 64 * 64} & held
    cache = stages[0].values["key_cache.0"]
    outputs(stages[0])
    assert stages[0].values["key_cache.0"] is cache
    assert cache.any()


def test_decode_goes_on_token_by_token(grouped, inputs):
    """A prompt fed row by row on top of the caches ends like the prompt fed at once."""
    _, program, _ = grouped
    info, stage = program.info, program.stages["language_model"]
    shape = (1, info.kv_heads, info.context, info.head_dim)
    table = program.weights["model.embed_tokens.weight"]
    ids, made = inputs.ids[:5], []
    for steps in ([5], [1] * 5, [2, 3]):
        caches, past = [torch.zeros(shape) for _ in range(2 * info.layers)], 0
        for n in steps:
            module = torch_stage(stage, program.weights, {"B": 1, "nv": 0, "nt": n}, past=past)
            text = table[torch.tensor([ids[past : past + n]])]
            with torch.no_grad():
                (logits,) = module(torch.zeros(1, 0, info.hidden_size), text, torch.tensor([past]), *caches)
            past += n
        made.append(logits[0, -1])
    torch.testing.assert_close(made[1], made[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made[2], made[0], atol=1e-4, rtol=1e-4)


def test_compiled_decode_agrees(grouped, inputs):
    from torch._inductor import config

    _, program, _ = grouped
    stages = TorchStages(program, inputs, "known", Shared())
    expected = outputs(stages)[1]
    stages.steps = {"decode": stages.steps["decode"]}
    with torch.no_grad(), config.patch(freezing=False):  # put back at the end: compile() sets it
        stages.compile()
        assert config.freezing
        stages.values["logits"].zero_()
        stages.run("decode")
    torch.testing.assert_close(stages.logits(), expected, atol=2e-4, rtol=1e-4)


def test_stages_survive_a_file(grouped, inputs, tmp_path):
    _, program, _ = grouped
    for routing in ROUTINGS:
        stages = TorchStages(program, inputs, routing, Shared())
        expected = outputs(stages)
        torch.save(stages, tmp_path / "stages.pt")
        found = outputs(torch.load(tmp_path / "stages.pt", weights_only=False))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------- the whole bench
@pytest.fixture(scope="module")
def result(grouped):
    told = []
    options = {"context": 64, "rounds": 3, "threads": 1, "limit_bytes": 1 << 20}
    made = bench(grouped[0], **options, compiled=False, memory=False, progress=told.append)
    assert "round 3 of 3" in told
    return made


def test_result(grouped, inputs, result):
    assert json.loads(json.dumps(result)) == result
    stages, variants = ("encode", "prefill", "decode", "total"), ("eager", "optimized", "engine")
    assert {(r["stage"], r["variant"]) for r in result["rows"]} == {(s, v) for s in stages for v in variants}
    for r in result["rows"]:
        assert 0 < r["min_ms"] <= r["p25_ms"] <= r["median_ms"] <= r["p75_ms"]
        assert r["runs"] == (12 if r["stage"] == "decode" else 3)
    best = {(r["stage"], r["variant"]): r["min_ms"] for r in result["rows"]}
    for s in stages:
        expected = best[s, "eager"] / best[s, "engine"]
        assert result["ratios"][s]["engine_over_eager"] == pytest.approx(expected)
        assert result["ratios"][s]["optimized_over_eager"] == pytest.approx(best[s, "eager"] / best[s, "optimized"])
    work = count_work(grouped[2].stages["language_model"], {"B": 1, "nv": 0, "nt": 1}, past=32)
    decode = result["work"]["decode"]
    assert (decode["flops"], decode["cache_bytes"]) == (work.flops, work.cache_bytes)
    share, limit = result["shares"]["decode"]["engine"], result["limits"]["bandwidth_gb_per_s"]
    moved = (decode["weight_bytes"] + decode["cache_bytes"]) / best["decode", "engine"] / 1e6
    assert share["bandwidth_share"] == pytest.approx(moved / limit)
    assert limit == max(result["limits"]["read_gb_per_s"], result["limits"]["copy_gb_per_s"])
    assert result["sizes"]["filled"] == result["sizes"]["context"] // 2 == inputs.filled
    assert sum(result["sizes"]["prompt"].values()) == inputs.filled
    assert max(v for found in result["agreement"].values() for v in found.values()) < 1e-3
    assert result["skipped"] == {}


def test_text_and_plot(result, tmp_path, monkeypatch):
    shown = bench_text(result)
    for wanted in ("prefill", "engine", "GB/s", "better baseline", "64 rows"):
        assert wanted in shown
    with pytest.raises(ValueError, match="PNG"):
        bench_plot(result, tmp_path / "bench.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mmopt\[plot\]"):
        bench_plot(result, tmp_path / "bench.png")


def test_plot_is_drawn(result, tmp_path):
    pytest.importorskip("matplotlib")
    bench_plot(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_total_is_added_up_within_rounds():
    eager = {"encode": [[1.0], [2.0]], "prefill": [[3.0], [1.0]], "decode": [[0.1, 0.3, 0.2], [0.4, 0.4, 0.4]]}
    times = {(s, "eager"): t for s, t in eager.items()}
    times |= {(s, "engine"): [[x / 2 for x in r] for r in t] for s, t in eager.items()}
    rows = rows_of(times, ["eager", "engine"], new_tokens=10)
    total = next(r for r in rows if r["stage"] == "total" and r["variant"] == "eager")
    assert total["min_ms"] == pytest.approx(6000)  # 1 + 3 + 10 x 0.2; the other round: 2 + 1 + 10 x 0.4
    assert total["p75_ms"] == pytest.approx(6750)
    assert ratios_of(rows)["total"]["engine_over_eager"] == pytest.approx(2)


def test_what_answers_differently_is_not_timed(grouped, inputs):
    _, program, _ = grouped
    variants = {r: TorchStages(program, inputs, r, Shared()) for r in ROUTINGS}
    with torch.no_grad():
        assert agreement(variants, program)["known"]["decode"] < 1e-4
        wrong = copy.copy(variants["known"])
        wrong.logits = types.MethodType(lambda self: TorchStages.logits(self) * 1.5, wrong)
        with pytest.raises(ContractError, match=r"prefill: the logits of wrong differ from eager's by"):
            agreement({"routed": variants["routed"], "wrong": wrong}, program)


def test_bad_input(grouped):
    with pytest.raises(ValueError, match="shapes only"):
        bench(from_config("mplug-owl2-tiny"))
    with pytest.raises(ValueError, match="context is 16, expected at least 22"):
        bench(grouped[0], context=16)
    half = from_config("mplug-owl2-tiny", dtype="bfloat16", random=True)
    with pytest.raises(ValueError, match=r"weights of torch.bfloat16, expected torch.float32"):
        bench(half, device="cpu")


# -------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.skipif(not memory.STATUS.is_file(), reason="anonymous memory can be read on Linux alone")
def test_peak_memory_counts_what_is_made_and_freed():
    def work():
        big = np.ones(64 << 20, np.uint8)
        time.sleep(0.05)
        return big[: 1 << 10].copy()

    assert 60 << 20 < memory.peak_of(work) < 100 << 20
    assert memory.peak_of(lambda: None) < 10 << 20


@pytest.mark.skipif(not memory.STATUS.is_file(), reason="anonymous memory can be read on Linux alone")
def test_memory_of_a_variant_in_its_own_process(grouped, inputs, tmp_path):
    _, program, _ = grouped
    torch.save(TorchStages(program, inputs, "known", Shared()), tmp_path / "stages.pt")
    found = memory.measure("eager", tmp_path / "stages.pt", threads=1)
    weights = sum(w.nbytes for w in program.weights.values())
    assert weights < found["peak_bytes"] < 200 << 20
    assert "No such file" in memory.measure("eager", tmp_path / "absent.pt", threads=1)["skipped"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(grouped):
    model = from_config(grouped[0].raw_config, dtype="bfloat16", random=True)
    found = bench(model, context=64, rounds=3, compiled=False, limit_bytes=1 << 26)
    assert found["dtype"] == "bfloat16"
    assert {r["variant"] for r in found["rows"]} >= {"eager", "optimized"}
