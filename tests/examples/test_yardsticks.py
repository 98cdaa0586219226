"""Tasks on the trained checkpoints, and the benchmark of what fewer visual tokens cost on them."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import mmopt
from mmopt.measure.head import KEYS
from mmopt.processing.image_processor import open_image
from mmopt.processing.tile_processor import processor_of

ROOT = Path(__file__).parents[2]
pytest.importorskip("easy_vqa")
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples/benchmarks")]
import compression_quality as quality  # noqa: E402
import compression_report as report  # noqa: E402
import document  # noqa: E402
import yardsticks  # noqa: E402
from compression_quality import Results, Way  # noqa: E402
from result_files import read  # noqa: E402

FACTS = {"checkpoint": "c", "position_ids": "keep", "dtype": "float32", "threads": 1, "versions": {}}
FACTS |= {"machine": {"cpu": "c", "cores": 2}, "date": "now", "commit": "new"}
FACTS |= {"sizes": {"sites": {"pixels": 16, "vision": 16}}}
FULL, RANDOM, POOL = Way("", "full", 1.0), Way("vision", "random", 0.5), Way("vision", "pool", 0.5)


@pytest.fixture(scope="module")
def yard():
    return yardsticks.mplug_owl2_vqa()


@pytest.fixture(scope="module")
def few(yard):
    return {name: yardsticks.first(task, 12) for name, task in yard.tasks.items()}


def results(few, path=None, **facts):
    return Results(FACTS | facts, few, path)


# ------------------------------------------------------------------------------------------------------------- tasks
@pytest.fixture(scope="module")
def asked():
    """Tasks of all yardsticks, by checkpoint and name; nothing is traced for them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(yardsticks, "load", lambda *_, **__: None)
    made = {(name, task): t for name, y in yardsticks.YARDSTICKS.items() for task, t in y().tasks.items()}
    patch.undo()
    return made


def test_first_samples_lie_on_as_many_pictures(asked):
    for task in asked.values():
        shown = [s.images[-1] if isinstance(s.images[-1], str) else s.images[-1].tobytes() for s in task.samples]
        assert len(set(shown[:300])) >= (200 if "book" in task.name else 300), task.name
    ids = [s.id for s in asked["janusflow-digits", "colours"].samples]
    assert len({i.split()[0] for i in ids[:400]}) == 400
    assert ids[:10] != sorted(ids[:10], key=lambda i: int(i.split()[0]))


def test_wording_alone_gets_half_of_yes_and_no(asked):
    answers: dict[str, Counter] = {}
    for s in asked["mplug-owl2-vqa", "yes or no"].samples:
        answers.setdefault(s.prompt, Counter())[s.answers[0]] += 1
    assert all(c["yes"] == c["no"] for c in answers.values())
    assert len(answers) > 50


def test_shots_are_part_of_the_prompt(asked):
    sample = asked["flamingo-vqa", "code book of 4 shots"].samples[0]
    assert sample.prompt.count("<image>") == len(sample.images) == 5
    assert (sample.prompt.count("<|endofchunk|>"), sample.prompt.endswith("Short answer:")) == (4, True)
    assert not sample.prompt.endswith(sample.answers[0])


def test_blind_pictures_are_nothing_but_the_mean(yard):
    task = yardsticks.blind(yard.program, yard.tasks["colour or shape"])
    original = yard.tasks["colour or shape"].samples[3]
    assert (task.samples[3].id, task.samples[3].answers) == (original.id, original.answers)
    pixels = processor_of(yard.program.info.processing.image)([open_image(task.samples[3].images[0])])
    assert np.abs(pixels).max() < 0.01


def test_measure_agrees_with_a_program_and_needs_the_pictures(yard):
    task = yard.tasks["colour or shape"]
    slow, fast = mmopt.evaluate(yard.program, yardsticks.first(task, 4)), yardsticks.measure(yard.program, task, 4)
    assert (slow.predictions, slow.ids) == (fast.predictions, fast.ids)
    assert yardsticks.measure(yard.program, task, 60).mean > 0.9
    assert yardsticks.measure(yard.program, yardsticks.blind(yard.program, task), 60).mean < 0.35
    with pytest.raises(ValueError, match="limit is 0, expected at least 1"):
        yardsticks.first(task, 0)


# --------------------------------------------------------------------------------------------------------- benchmark
def test_baselines_come_first_and_images_are_scaled_at_the_pixels_alone():
    listed = quality.ways(["pixels", "vision"], [], ["diverse", "pool", "resize", "random"], [0.5, 0.25])
    assert [(w.site, w.method) for w in listed[::2]] == [
        ("pixels", "resize"), ("vision", "random"), ("vision", "pool"), ("vision", "diverse")
    ]  # fmt: skip
    assert [w.keep_ratio for w in listed[:2]] == [0.5, 0.25]
    with pytest.raises(ValueError, match="--sites: expected some of pixels, vision, found visoin"):
        quality.ways(["pixels", "vision"], ["visoin"], [], [0.5])
    with pytest.raises(ValueError, match=r"--methods: expected some of .*resize, found best"):
        quality.ways(["pixels", "vision"], [], ["best"], [0.5])


def program_without_eyes(program):
    """As a method that leaves nothing of an image: all weights of its tower are zeros."""
    made = program.copy()
    made.weights = {k: w * 0 if "vision_model" in k else w for k, w in made.weights.items()}
    return made


def test_rows_are_measured_once_refused_with_a_reason_and_tried_again_if_they_failed(yard, few, tmp_path, monkeypatch):
    calls = []

    def stub(program, way, positions):
        calls.append(way)
        if way == POOL:
            raise RuntimeError("no such weight")
        if way == RANDOM._replace(keep_ratio=0.9):
            return None, "vision: saves too little"
        return (program if way.method in ("full", "blind") else program_without_eyes(program)), "did it"

    monkeypatch.setattr(quality, "program_of", stub)
    path = tmp_path / "results.json"
    listed = [RANDOM, POOL, RANDOM._replace(keep_ratio=0.9)]
    first = results(few, path)
    quality.measure_all(yard.program, first, listed, "keep", 2)
    rows = json.loads(path.read_text())["rows"]
    assert [r["method"] for r in rows] == ["full", "blind", "random", "pool", "random"]
    assert (rows[3]["failed"], rows[4]["refused"]) == ("RuntimeError: no such weight", "vision: saves too little")
    full, own = rows[0]["tasks"]["colour or shape"], rows[2]["tasks"]["colour or shape"]
    assert own["mean"] < 0.5 < full["mean"] == full["right"].count("1") / 12
    d = own["over"]["full"]
    assert d["mean"] == pytest.approx(own["mean"] - full["mean"])
    assert d["wins"] + full["right"].count("1") - own["right"].count("1") == d["losses"]
    assert d["interval"][0] <= d["mean"] <= d["interval"][1]
    assert own["over"].keys() == {"full"}
    assert rows[0]["times"]["colour or shape"]["faster"]["median"] == 1
    assert 0 < rows[2]["times"]["colour or shape"]["ms"]["p25"] <= rows[2]["times"]["colour or shape"]["ms"]["p75"]
    assert "times" not in rows[1]

    calls.clear()
    again = results(few, path)
    quality.measure_all(yard.program, again, listed, "keep", 2)
    assert calls == [POOL]
    calls.clear()
    quality.measure_all(yard.program, again, [Way("vision", "diverse", 0.5)], "keep", 1)
    assert calls == [Way("vision", "diverse", 0.5), FULL, RANDOM]  # a new row; all others are timed beside it
    assert again.row(Way("vision", "diverse", 0.5))["tasks"]["colour or shape"]["over"]["random"]["mean"] == 0

    told = report.text(again.found)
    assert "refused: vision, random 0.9: vision: saves too little" in told
    assert "failed: vision, pool 0.5: RuntimeError: no such weight" in told
    report.plot(again.found, tmp_path / "plot.png")
    report.plot_times(again.found, tmp_path / "times.png")
    for name in ("plot.png", "times.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="there are no times to plot"):
        report.plot_times(again.found | {"rows": []}, tmp_path / "none.png")


def test_a_file_of_other_questions_is_refused(few, tmp_path):
    path = tmp_path / "results.json"
    results(few, path).save()
    again = results(few, path, sizes={"sites": {"vision.2": 9}})
    assert again.found["sizes"]["sites"] == {"pixels": 16, "vision": 16, "vision.2": 9}
    with pytest.raises(ValueError, match="results of other samples: name another file"):
        results({k: yardsticks.first(t, 11) for k, t in few.items()}, path)
    with pytest.raises(ValueError, match="results of other position_ids"):
        results(few, path, position_ids="renumber")


def test_differences_are_those_of_the_same_place_and_share(few):
    made = results(few)

    def put(way, right):
        own = {"mean": right.count("1") / 12, "interval": [0, 1], "right": right, "over": {}}
        made.put(way, {"tasks": {"colour or shape": own}})

    put(Way("vision", "diverse", 0.5), "1" * 9 + "000")
    put(RANDOM._replace(keep_ratio=0.25), "0" * 12)
    put(RANDOM._replace(site="vision.1"), "0" * 12)
    over = made.row(Way("vision", "diverse", 0.5))["tasks"]["colour or shape"]["over"]
    assert over == {}
    put(RANDOM, "1" * 6 + "000001")
    put(Way("pixels", "resize", 0.5), "1" * 12)
    assert {k: (d["wins"], d["losses"]) for k, d in over.items()} == {"random": (3, 1), "resize": (0, 3)}


def test_questions_of_all_tasks_are_compared_together(few):
    made = results(few)

    def put(way, *rights):
        own = [{"mean": r.count("1") / 12, "interval": [0, 1], "seconds": 1, "right": r, "over": {}} for r in rights]
        made.put(way, {"tasks": dict(zip(few, own, strict=True))})

    put(RANDOM, "1" * 12, "0" * 12)
    put(Way("vision", "diverse", 0.5), "1" * 11 + "0", "1" * 6 + "0" * 6)
    own = made.row(Way("vision", "diverse", 0.5))["tasks"][report.TOGETHER]
    assert (own["mean"], own["seconds"]) == (17 / 24, 2)
    assert own["over"]["random"]["mean"] == pytest.approx(5 / 24)
    assert (own["over"]["random"]["wins"], own["over"]["random"]["losses"]) == (6, 1)
    assert made.found["samples"].keys() == few.keys()
    assert f"{report.TOGETHER}: 24 samples" in report.text(made.found)


def test_best_are_right_more_often_or_faster():
    made = {"slow": (1.0, 0.9), "beaten": (1.1, 0.8), "as fast": (1.5, 0.7), "fast": (1.5, 0.85), "alike": (1.5, 0.85)}
    rows = [
        {"method": k, "times": {"t": {"faster": {"median": x}}}, "tasks": {"t": {"mean": y}}}
        for k, (x, y) in made.items()
    ]
    assert [r["method"] for r in report.frontier([*rows, {"tasks": {"t": {"mean": 1}}}], "t")] == [
        "slow",
        "fast",
        "alike",
    ]


def test_turns_are_paired_and_the_first_call_changes():
    calls: list[int] = []
    taken = quality.in_turns([lambda i=i: calls.append(i) for i in range(3)], 2)
    assert taken.shape == (2, 3)
    assert calls[:: quality.REPEATS] == [0, 1, 2, 1, 2, 0]


def test_samples_are_read_together_as_alone(yard, few, tmp_path):
    engine = yardsticks.engine_of(yard.program, tmp_path / "engine")
    samples = [s for task in few.values() for s in task.samples[:2]]
    together = quality.FirstToken(engine, samples)()
    alone = [quality.FirstToken(engine, [s])()[0] for s in samples]
    assert len(together) == 4
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_command(yard, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(quality.YARDSTICKS, "mplug-owl2-vqa", lambda: yard)
    out, png = tmp_path / "r.json", tmp_path / "r.png"
    ways = ["--keep-ratios", "0.25", "--methods", "random,resize", "--sites", "pixels,vision"]
    options = ["--limit", "4", "--rounds", "1", *ways, "--out", str(out), "--plot", str(png), "--tasks", "yes or no"]
    command = [quality.__file__, "mplug-owl2-vqa", *options]
    monkeypatch.setattr(sys, "argv", command)
    quality.main()
    found = json.loads(out.read_text())
    assert found["threads"] == 1
    assert set(KEYS) <= set(found)
    assert found["command"].startswith("python examples/benchmarks/compression_quality.py mplug-owl2-vqa --limit 4")
    assert [r["method"] for r in found["rows"]] == ["full", "blind", "resize", "random"]
    shown = document.page([read(out)], "")
    assert "**yes or no**, 4 samples: all tokens 1.000" in shown
    assert "| `vision` | 16/64 |" in shown
    assert png.is_file()
    assert "minus random" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command[:-1], "yes"])
    with pytest.raises(SystemExit):
        quality.main()
