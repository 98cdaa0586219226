"""Few-shot prompts: their work, counted, and their time, measured."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mmopt import from_config
from mmopt.cli import app
from mmopt.measure import baselines
from mmopt.measure.bench_fewshot import ENGINES, EQUAL, bench_fewshot
from mmopt.measure.tables import bench_plot, fewshot_text
from mmopt.rewrite.contracts import ContractError

DATA = Path(__file__).parents[1] / "data"


def inspected(*options: str) -> dict:
    made = CliRunner().invoke(app, ["inspect", *options, "--json"])
    assert made.exit_code == 0, made.output
    return json.loads(made.stdout)


# GFLOP of a decoded token of the published sizes, as the reference computes it and with K and V hoisted and sliced
@pytest.mark.parametrize(
    ("config", "shots", "plain", "optimized"), [("3b", 32, 110.9, 4.47), ("4b", 4, 17.8, 7.09), ("9b", 1, 17.7, 15.5)]
)
def test_work_of_the_official_sizes(config, shots, plain, optimized):
    for wanted, options in ((plain, []), (optimized, ["--optimized"])):
        report = inspected("--config", f"openflamingo-{config}", "--shots", str(shots), *options)
        assert report["totals"]["decode_flops_per_token"] / 1e9 == pytest.approx(wanted, rel=0.01)
    assert report["prompt"] == {"rows": 20 * (shots + 1), "text_rows": 20 * (shots + 1), "chunks": 1}
    assert f"{shots + 1} images, each with 20 rows of text" in report["conventions"][-1]


def test_work_grows_with_the_images_before_the_passes_alone():
    def decoded(shots: int, *options: str) -> dict:
        report = inspected("--config", "openflamingo-tiny", "--context", "128", "--shots", str(shots), *options)
        return report["totals"]

    few, many = decoded(1), decoded(4)
    assert many["decode_flops_per_token"] > 1.5 * few["decode_flops_per_token"]
    few, many = decoded(1, "--optimized"), decoded(4, "--optimized")
    attention = many["decode_attention_flops_per_token"] - few["decode_attention_flops_per_token"]
    assert many["decode_flops_per_token"] - few["decode_flops_per_token"] == attention  # of the text alone
    assert few["decode_bytes_per_token"] == many["decode_bytes_per_token"]


def test_too_many_images_for_the_context():
    made = CliRunner().invoke(app, ["inspect", "--config", "openflamingo-tiny", "--images", "9", "--context", "64"])
    assert isinstance(made.exception, ValueError)
    assert "9 images with 20 rows of text each do not fit a context of 64" in str(made.exception)


@pytest.fixture(scope="module")
def measured():
    return bench_fewshot(from_config("openflamingo-tiny", "float32", random=True), (1, 2), rounds=2, compiled=False)


def test_every_variant_is_timed_and_agrees(measured):
    timed = {(r["stage"], r["variant"]) for r in measured["rows"]}
    for k in (1, 2):
        for stage in (f"prefill, {k} shots", f"decode, {k} shots"):
            assert {v for s, v in timed if s == stage} == {*ENGINES, "eager"}
            assert set(measured["agreement"][stage]) == {*ENGINES, "eager"}
        assert (EQUAL, f"{k} shots") in timed
    queries = {v for s, v in timed if s == "first token of a query after 2 shots"}
    assert queries == {"without prefix", "images kept", "prefix in memory", "prefix from disk"}
    assert all(0 < r["min_ms"] <= r["median_ms"] for r in measured["rows"])
    assert measured["work"]["2 shots"]["passes off"]["flops"] > measured["work"]["2 shots"]["passes on"]["flops"]
    assert json.loads(json.dumps(measured)) == measured


def test_ratios_are_those_of_the_rows(measured):
    best = {(r["stage"], r["variant"]): r["min_ms"] for r in measured["rows"]}
    found = measured["ratios"]["decode, 2 shots"]["passes off / passes on"]
    assert found["minima"] == pytest.approx(
        best["decode, 2 shots", "passes off"] / best["decode, 2 shots", "passes on"]
    )
    assert found["paired_p25"] <= found["paired_median"] <= found["paired_p75"]
    assert set(measured["ratios"][EQUAL]) == {"2 shots / 1 shots"}


def test_as_text_and_as_a_picture(measured, tmp_path):
    text = fewshot_text(measured)
    assert "passes off" in text
    assert "2 shots, passes on:" in text
    bench_plot(measured, tmp_path / "made.png")
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


def test_variants_that_differ_are_not_timed(monkeypatch):
    import mmopt.ir.ops

    plain = mmopt.ir.ops._cross_attention
    monkeypatch.setitem(baselines.FUNCTIONS, torch.ops.mmopt.cross_attention.default, lambda *a: 2 * plain(*a))
    with pytest.raises(ContractError, match="differs from eager"):
        bench_fewshot(from_config("openflamingo-tiny", "float32", random=True), (1,), rounds=1, compiled=False)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="images lie outside"):
        bench_fewshot(from_config("mplug-owl2-tiny", "float32", random=True))
    with pytest.raises(ValueError, match="with weights"):
        bench_fewshot(from_config("openflamingo-tiny"))
