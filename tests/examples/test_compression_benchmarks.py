"""The benchmarks of speed and of composition: which passes and sites they take, what they refuse to time."""

import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressed import compressed, traced

import mmopt
from mmopt.ir.graph import CACHED_ATTENTION
from mmopt.measure.head import KEYS
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.pipeline import default_passes
from mmopt.rewrite.contracts import ContractError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/benchmarks"))
import compression_composition as composition
import compression_speed as speed
import tables_tokens
import threads

FULL, POOL, DIVERSE = speed.Way("full", 1.0), speed.Way("pool", 0.25), speed.Way("diverse", 0.5)


@pytest.fixture(scope="module")
def program():
    """Rows of images among the text: a tower and a language model of two layers each."""
    return traced("owl")


# --------------------------------------------------------------------------------------------------------------- speed
def test_sites(program):
    """After a third of the tower, all through it, where rows leave a stage, after a sixth of the language model."""
    made = speed.sites_of(program)
    assert list(made) == ["pixels", "vision.1", "vision.all", "vision", "abstractor", "language_model.1"]
    assert made["pixels"] == ("resize",)


def test_early():
    sites = [speed.PruneSite(f"tower.{i}", "tower", 9, None, ()) for i in range(1, 13)]
    sites += [speed.PruneSite("tower.all", "tower", 9, None, ()), speed.PruneSite("other.1", "other", 9, None, ())]
    assert [speed.early(sites, "tower", x) for x in (1 / 3, 1 / 6, 0.01, 1)] == [
        "tower.4", "tower.2", "tower.1", "tower.12",
    ]  # fmt: skip


def test_group(program, monkeypatch, tmp_path):
    """Engines right before the language model: what choosing takes counts, a refusal stays in the results."""
    monkeypatch.setattr(speed, "in_rounds", partial(speed.in_rounds, limit_bytes=1 << 20))
    rows, limits = speed.group(program, "abstractor", [FULL, POOL, DIVERSE], 1, 1, lambda *now: None)
    assert [(r["method"], r["kept"]) for r in rows] == [("full", 8), ("pool", 2), ("diverse", 4)]
    assert limits["gemm_gflop_per_s"] > 0
    for r in rows:
        assert set(r["times"]) == {"encode", "prefill", "first token", "language"}
        assert r["times"]["language"]["min_ms"] >= r["times"]["prefill"]["min_ms"]
    assert rows[0]["faster"]["first token"]["paired_median"] == 1
    assert rows[1]["flops"]["prefill"] < rows[2]["flops"]["prefill"] < rows[0]["flops"]["prefill"]
    more = rows[2]["flops"]["encode"] - rows[0]["flops"]["encode"]  # of choosing
    assert more > 0
    counted = rows[0]["flops"]["prefill"] / (rows[2]["flops"]["prefill"] + more)
    assert rows[2]["faster"]["language"]["flops"] == pytest.approx(counted)
    stages, refused = speed.build(program, "vision", POOL, tmp_path, 1)
    assert stages is None
    assert "would save" in refused["refused"]
    found = {"machine": {"cpu": "d", "cores": 2}, "threads": 1, "dtype": "float32", "versions": {"torch": "2"}}
    found["limits"] = {"abstractor": limits}
    sizes = {"parameters": 1e6, "tokens_per_image": 9, "text": 63, "rounds": 1}
    found |= {"sizes": sizes, "rows": [*rows, refused], "notes": ["a note"]}
    shown = speed.text("tiny", json.loads(json.dumps(found)))
    assert shown.count("pool") == 2  # one row of the table, one refusal
    assert "diverse" in shown
    table = tables_tokens.speed({"tiny": found})
    assert [line.split(" |")[0] for line in table if "`abstractor`" in line][:2] == [
        "| `abstractor`, pool", "| `abstractor`, diverse"
    ]  # fmt: skip
    assert "`vision`." in table[-2]  # refused
    speed.plot({"tiny": found}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_other_answers_are_not_timed(program, monkeypatch, tmp_path):
    stages, facts = speed.build(program, "language_model.1", POOL, tmp_path / "right", 1)
    assert stages is not None
    assert "failed" not in facts
    real = mmopt.export

    def spoiled(p, *args, **options):
        p = p.copy()
        p.weights = {k: w * 1.001 if w.is_floating_point() else w for k, w in p.weights.items()}
        return real(p, *args, **options)

    monkeypatch.setattr(mmopt, "export", spoiled, raising=False)
    stages, facts = speed.build(program, "language_model.1", POOL, tmp_path / "wrong", 1)
    assert stages is None
    assert "logits differ" in facts["failed"]
    with pytest.raises(ValueError, match="the engine with all rows: logits differ"):
        speed.group(program, "language_model.1", [FULL, POOL], 1, 1, lambda *now: None)


def test_faster():
    """Each round is compared with its own: a round in which all are slow changes nothing."""
    base, own = np.array([2.0, 20.0, 2.2]), np.array([1.0, 10.0, 1.0])
    found = speed.faster(base, own)
    assert found["paired_median"] == 2
    assert found["minima"] == 2
    assert speed.sums(1.0, 2.0, 0.5, True) == {"encode": 1, "prefill": 2, "first token": 3, "language": 2.5}
    assert "language" not in speed.sums(1.0, 2.0, 0.0, False)


def test_unknown_site(monkeypatch, program):
    monkeypatch.setattr(mmopt, "trace", lambda model: program, raising=False)
    with pytest.raises(ValueError, match=r"--sites: expected some of pixels, .*found tower"):
        speed.measure("mplug-owl2-tiny", [0.5], ["tower"], 1, 1, lambda *now: None)


# ------------------------------------------------------------------------------------------------------------- threads
def test_threads_are_timed_in_processes_of_their_own(program, monkeypatch, tmp_path):
    engine = mmopt.export(program, tmp_path / "engine", check=False)
    found = threads.one(engine, 1, False, 2)
    assert found.keys() == {"first token", "decode"}
    assert all(0 < f["min_ms"] <= f["median_ms"] for f in found.values())
    asked = []

    def run(command, **options):
        asked.append(command[command.index("--way") + 1])
        took = {"spin on": 30.0, "stop": 10.0}[asked[-1]]
        return SimpleNamespace(stdout=json.dumps({"decode": {"min_ms": took, "median_ms": took}}))

    monkeypatch.setattr(threads, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(mmopt, "trace", lambda model: program, raising=False)
    found = threads.measure("mplug-owl2-tiny", 1, 2, 2)
    assert set(KEYS) <= set(found)
    (row,) = found["rows"]
    assert asked == ["spin on", "stop"] * 2
    assert row["median"] == 3


# --------------------------------------------------------------------------------------------------------- composition
def test_steps_are_cumulative():
    names = [p.name for p in default_passes()]
    assert sorted(n for own in composition.KINDS.values() for n in own) == sorted(names)
    steps = composition.steps_of(traced("janus"), CompressVisualTokens())
    listed = {k: [p.name for p in passes] for k, passes in steps.items()}
    assert list(listed) == ["nothing", "rows", "fusion", "cache reuse", "compression", "fewer flow steps"]
    assert listed["cache reuse"] == names
    assert listed["fewer flow steps"] == ["compress_visual_tokens", *names, "reduce_flow_steps"]
    for before, after in pairwise(list(listed.values())[:4]):
        assert [n for n in after if n in before] == before  # the order of the default ones
    assert "fewer flow steps" not in composition.steps_of(traced("owl"), CompressVisualTokens())


def test_composition(program, tmp_path):
    p = CompressVisualTokens(0.25, "merge", "vision.1")
    made = composition.build(program, p, False, tmp_path, 1, False, lambda *now: None)
    flops = [s.row["flops"] for s in made.values()]
    assert [f["first token"] for f in flops] == sorted((f["first token"] for f in flops), reverse=True)
    assert flops[-1]["first token"] < flops[-2]["first token"]
    step, wanted = made["rows"], made["nothing"].logits
    step.same("rows", step.logits, wanted)
    with pytest.raises(ContractError, match="step rows: differs by"):
        step.same("rows", [step.logits[0], step.logits[1] + 0.01 * step.logits[1].std()], wanted)
    p = CompressVisualTokens(0.25, "pool", "vision")
    with pytest.raises(ValueError, match=r"nothing is compressed: vision: .* would save"):
        composition.build(program, p, False, tmp_path / "again", 1, False, lambda *now: None)


def test_compressed_programs_paint_and_lose_masks(tmp_path):
    """The exact passes work on a language model that reads fewer rows, and on that which paints, as on one alone."""
    made = mmopt.optimize(compressed("janus", "encode_vision", 0.25, "pool"), check=True).program
    assert "language_model.paint" in made.stages
    masked = {
        name
        for name, stage in made.stages.items()
        for n in stage.graph.nodes
        if n.target is CACHED_ATTENTION and len(n.args) > 10 and n.args[10] is not None
    }
    assert not masked
    engine = mmopt.Engine(mmopt.export(made, tmp_path / "engine", check=False), provider="cpu", threads=1)
    prompts, noise = [[3, 4, 5, 6], [7, 8]], mmopt.spec.flow_sampler.draw_noise(2, made.info, 0)
    plan = mmopt.spec.solvers.make_plan("euler", 2, guidance=3.0)
    wanted = traced("janus").generate_images(prompts, torch.from_numpy(noise), plan)["latents"]
    found = engine.generate_images(prompts, solver=plan, noise=noise).latents
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-3, rtol=1e-3)
