"""bench --paint: what it times is the same picture, and its figures add up."""

import pytest
import torch

from mmopt.frontend.load import from_config
from mmopt.measure import bench_generation as bench
from mmopt.measure.tables import generation_text
from mmopt.rewrite.contracts import ContractError


@pytest.fixture(scope="module")
def model():
    return from_config("janusflow-tiny", random=True)


def test_variants_and_ratios(model):
    told = []
    result = bench.bench_generation(model, [4, 9], rounds=2, threads=1, progress=told.append)
    names = ["official", "prefix cached", "exact passes", "recommended", "fast", "eager"]
    assert [(r["stage"], r["variant"], r["runs"]) for r in result["rows"]] == [
        (f"image, prompt of {n} ids", v, 2) for n in (4, 9) for v in names
    ]
    assert [p["forwards"] for p in result["sizes"]["plans"].values()] == [60, 60, 60, 20, 16]
    best = {r["variant"]: r["min_ms"] for r in result["rows"] if r["stage"].endswith(" 9 ids")}
    found = result["ratios"]["image, prompt of 9 ids"]["fast over official"]
    assert found["minima"] == pytest.approx(best["official"] / best["fast"])
    assert found["paired_min"] <= found["paired_median"] <= found["paired_max"]
    work = result["work"]["9"]
    assert work["official"] > work["prefix cached"] > work["exact passes"]
    assert "round 2 of 2" in told
    text = generation_text(result)
    assert "euler" in text
    assert "ab2" in text


def test_what_paints_something_else_is_not_timed(model, monkeypatch):
    def moved(expected, found):
        return (1.0, 0.1) if not torch.equal(expected, found) else None  # rounding alone is too much

    monkeypatch.setattr(bench, "difference", moved)
    with pytest.raises(ContractError, match=r"image, prompt of 4 ids: .* differs from official"):
        bench.bench_generation(model, [4], rounds=1, threads=1, eager=False)


def test_models_that_do_not_paint_are_refused():
    with pytest.raises(ValueError, match="expected a model with weights that paints"):
        bench.bench_generation(from_config("mplug-owl2-tiny", random=True))
