"""Measuring how well engines and programs answer: tasks from files, scores, their intervals, paired differences."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from toy_tokenizers import letters

import mmopt
from mmopt import cli
from mmopt.exporters.onnx import export
from mmopt.measure.quality import evaluate
from mmopt.measure.statistics import Score, compare_scores
from mmopt.measure.task import Sample, Task, normalise, quick
from mmopt.runtime.engine import Engine

EXAMPLES, DATA = Path(__file__).parents[2] / "examples", Path(__file__).parents[1] / "data"
WORDS = {"answers": ["blue", "dark blue"]}


def made_up(scores, metric="exact", **changes):
    """A score of samples that nobody was asked."""
    names = [str(i) for i in range(len(scores))]
    given = Score("made up", metric, "nobody", 1.0, names, names, [[n] for n in names], names, list(map(float, scores)))
    return dataclasses.replace(given, **changes)


# ----------------------------------------------------------------------------------------- a model that has learned it
@pytest.fixture(scope="module")
def program():
    return mmopt.trace(mmopt.load(EXAMPLES / "checkpoints/mplug-owl2-vqa", "float32"), batch=4, images=1, context=64)


def exported(program, path):
    return Engine(export(mmopt.optimize(program, check=False).program, path, check=False), threads=1)


@pytest.fixture(scope="module")
def engine(program, tmp_path_factory):
    return exported(program, tmp_path_factory.mktemp("quality") / "engine")


@pytest.fixture(scope="module")
def asked():
    """Questions about pictures that the checkpoint has never seen."""
    pytest.importorskip("easy_vqa")
    sys.path.insert(0, str(EXAMPLES))
    import vqa

    return vqa.questions("test")[::40]


@pytest.fixture(scope="module")
def task(asked):
    return Task("easy-VQA", [Sample(q.text, [q.image], [q.answer], 4) for q in asked])


@pytest.fixture(scope="module")
def good(engine, task):
    return evaluate(engine, task)


def broken(program):
    """One stage with other weights: pictures are seen through a turned projection."""
    made = program.copy()
    name = next(n for n, s in program.stages.items() if "image_rows" in s.outputs)
    last = max(k for k in program.stages[name].weights() if program.weights[k].dim() == 2)
    made.weights[last] = program.weights[last].flip(0)
    return made.with_stage(name, made.stages[name].replaced(made.stages[name].graph))  # nothing computed before is kept


def test_an_engine_answers_as_well_as_the_readme_says(good, task):
    assert good.mean >= 0.98
    assert good.interval[0] < 0.9992 < good.interval[1] + 1e-9
    assert good.ids == [str(i) for i in range(len(task.samples))]
    assert (good.metric, good.answers) == ("exact", [list(s.answers) for s in task.samples])
    assert good.seconds > 0


def test_a_program_answers_as_its_engine_does(program, engine, good, task):
    mine = evaluate(program, task, limit=12)
    its = evaluate(engine, task, limit=12, batch=1)
    assert mine.predictions == its.predictions
    assert mine.ids == its.ids
    assert mine.predictions == [good.predictions[int(i)] for i in mine.ids]  # whatever is asked beside it
    assert mine.mean >= 11 / 12
    assert len(set(mine.predictions)) > 3
    assert str(compare_scores(mine, its)).startswith(
        "+0.0000 (95 %: +0.000 to +0.000), 0 wins and 0 losses on 12 samples"
    )


def test_what_is_broken_scores_low(program, good, task, tmp_path):
    wrong = broken(program)
    for runner, n in ((wrong, 48), (exported(wrong, tmp_path / "engine"), None)):
        found = evaluate(runner, task, limit=n)
        assert found.mean < 0.65
    low = compare_scores(found, good)
    assert low.interval[1] < -0.2
    assert low.losses > 5 * low.wins
    assert low.p < 1e-6


def test_other_answers_and_blank_pictures_score_low(engine, good, asked, task):
    answers = [s.answers for s in task.samples]
    shifted = [dataclasses.replace(s, answers=a) for s, a in zip(task.samples, answers[1:] + answers[:1], strict=True)]
    found = evaluate(engine, Task("shifted", shifted))
    assert found.predictions == good.predictions
    assert found.mean < 0.5
    with pytest.raises(ValueError, match="different samples"):
        compare_scores(found, good)
    blank = np.full((64, 64, 3), 255, np.uint8)
    unseen = evaluate(engine, Task("blank", [dataclasses.replace(s, images=[blank]) for s in task.samples]))
    assert compare_scores(good, unseen).interval[0] > 0.2


def test_pictures_may_be_paths_arrays_or_pil_images(engine, program, task):
    shown = PIL.Image.open(task.samples[0].images[0])
    given = [[str(task.samples[0].images[0])], (np.asarray(shown.convert("RGB")),), [shown]]
    same = Task("same", [dataclasses.replace(task.samples[0], images=i, id=None) for i in given])
    for runner in (engine, program):
        assert evaluate(runner, same).predictions == [task.samples[0].answers[0]] * 3


def test_a_limit_takes_the_same_samples_for_each_runner(engine, program, task):
    a, b = evaluate(engine, task, limit=3, seed=5), evaluate(program, task, limit=3, seed=5)
    assert a.ids == b.ids == [s.id for s in quick(task, 3, seed=5).samples]
    assert len(a.ids) == 3
    assert a.ids == sorted(a.ids, key=int)
    assert a.ids != [s.id for s in quick(task, 3, seed=6).samples]
    assert len(quick(task).samples) == 64
    assert quick(task, 10**6).samples == task.samples
    with pytest.raises(ValueError, match="no samples"):
        quick(task, 0)


def test_progress_and_batch(engine, task):
    told = []
    evaluate(engine, task, limit=5, batch=2, progress=lambda *now: told.append(now))
    assert told == [(2, 5), (4, 5), (5, 5)]
    with pytest.raises(ValueError, match="batch is -1"):
        evaluate(engine, task, batch=-1)


def test_what_cannot_be_asked_names_the_sample(engine, program, task):
    two = Task("vqa", [task.samples[0], Sample("what is it?", task.samples[0].images * 2, ["x"], id="both")])
    for runner in (engine, program):
        with pytest.raises(ValueError, match=r"vqa, sample .*both: .* 2 images, .* at most 1"):
            evaluate(runner, two)
        marked = Task("vqa", [Sample("<|image|> and <|image|>?", task.samples[0].images, ["x"])])
        with pytest.raises(ValueError, match="2 image markers"):
            evaluate(runner, marked)
    without = mmopt.trace(mmopt.load(DATA / "mplug_owl2"))
    with pytest.raises(ValueError, match="tokenizer"):
        evaluate(without, task, limit=1)


# ------------------------------------------------------------------------------------- images that lie outside the text
@pytest.mark.parametrize("family", ["openflamingo", "mllama"])
def test_families_whose_images_lie_outside_the_text(family, tmp_path):
    """Of several images each, of unequal shape (tiles) or videos: untrained models answer alike, token for token."""
    program = mmopt.trace(mmopt.load(DATA / "flamingo" / family), batch=3, images=2, context=128)
    program.source = replace(program.source, tokenizer=letters(program.info.vocab_size, {}).to_str())
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 256, shape, np.uint8) for shape in ((40, 60, 3), (28, 84, 3), (20, 20, 3)))
    images = [[a], [b, c], [], [c, a]] + [[[a, b], [b, c]], [np.stack([a, a, a])]] * (family == "openflamingo")
    task = Task(family, [Sample(f"ask {'abcdef'[i]}", x, ["x"], 6 + i) for i, x in enumerate(images)])
    ours, theirs = evaluate(program, task), evaluate(exported(program, tmp_path / "engine"), task)
    assert ours.predictions == theirs.predictions
    assert len(set(ours.predictions)) > 2
    swapped = Task(family, [dataclasses.replace(task.samples[0], images=[c])])
    assert evaluate(program, swapped).predictions != ours.predictions[:1]


# ---------------------------------------------------------------------------------------------------------- task files
def written(folder, *lines):
    path = folder / "colours.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_a_task_is_a_file_of_lines(tmp_path, monkeypatch):
    (tmp_path / "shown").mkdir()
    for name in ("a.png", "shown/b.png"):
        (tmp_path / name).touch()
    video = ["a.png", str(tmp_path / "a.png")]
    path = written(
        tmp_path,
        "\ufeff" + json.dumps({"images": ["a.png"], "prompt": "What colour is it?", **WORDS}),
        " ",
        {
            "images": [video, "shown/b.png", "https://e.org/c.png"],
            "prompt": "?",
            **WORDS,
            "max_new_tokens": 3,
            "id": "x",
        },
        {"prompt": "line\u2028separator", "answers": ["yes"], "id": 7},
    )
    a, b = str(tmp_path / "a.png"), str(tmp_path / "shown/b.png")
    expected = [
        Sample("What colour is it?", [a], ["blue", "dark blue"], 16, "1"),
        Sample("?", [[a, a], b, "https://e.org/c.png"], ["blue", "dark blue"], 3, "x"),
        Sample("line\u2028separator", [], ["yes"], 16, "7"),
    ]
    assert Task.load(path) == Task("colours.jsonl", expected)
    assert Task.load(path, "contains").score == "contains"
    monkeypatch.chdir(tmp_path)
    assert Task.load("colours.jsonl").samples[1].images == [["a.png", a], "shown/b.png", "https://e.org/c.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "?" "answers"', "not JSON: Expecting ',' delimiter at column 16"),
        ("[1]", "expected a JSON object, found list"),
        ({"images": []}, "prompt and answers missing"),
        ({"prompt": "?"}, "answers missing"),
        ({"prompt": "?", **WORDS, "image": ["a.png"]}, "unknown: image; expected prompt, images, answers"),
        ({"prompt": 5, **WORDS}, "prompt is 5, expected str"),
        ({"prompt": "?", "answers": "blue"}, "answers is 'blue', expected list"),
        ({"prompt": "?", "answers": ["blue", 5]}, r"answers is \['blue', 5\], expected one or more texts"),
        ({"prompt": "?", "answers": []}, r"answers is \[\], expected one or more texts"),
        ({"prompt": "?", **WORDS, "images": "a.png"}, "images is 'a.png', expected list"),
        ({"prompt": "?", **WORDS, "images": [5]}, "images holds 5, expected paths"),
        ({"prompt": "?", **WORDS, "images": [[]]}, r"images holds \[\], expected paths"),
        ({"prompt": "?", **WORDS, "images": ["b.png"]}, r"image .*/b.png not found"),
        ({"prompt": "?", **WORDS, "images": ["/b.png"]}, r"image /b.png not found"),
        ({"prompt": "?", **WORDS, "images": [["a.png", "b.png"]]}, r"image .*/b.png not found"),
        ({"prompt": "?", **WORDS, "max_new_tokens": True}, "max_new_tokens is True, expected int"),
        ({"prompt": "?", **WORDS, "max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"prompt": "?", **WORDS, "id": []}, r"id is \[\], expected str"),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path, line, message):
    (tmp_path / "a.png").touch()
    path = written(tmp_path, {"prompt": "?", "images": ["a.png"], **WORDS}, "", line)
    with pytest.raises(ValueError, match=f"^{path}, line 3: {message}"):
        Task.load(path)


def test_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"colours.jsonl: has no samples"):
        Task.load(written(tmp_path, ""))
    with pytest.raises(ValueError, match=r"colours.jsonl: the id '2' is there twice"):
        Task.load(written(tmp_path, {"prompt": "?", **WORDS, "id": 2}, {"prompt": "?", **WORDS}))
    with pytest.raises(ValueError, match="score is 'close', expected exact, contains or a function"):
        Task.load(written(tmp_path, {"prompt": "?", **WORDS}), "close")
    (tmp_path / "colours.jsonl").write_bytes(b'{"prompt": "\xff", "answers": ["x"]}')
    with pytest.raises(ValueError, match=r"colours.jsonl, line 1: .*utf-8"):
        Task.load(tmp_path / "colours.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none.jsonl"):
        Task.load(tmp_path / "none.jsonl")


# -------------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" The  Dark-Blue\tone. ", "dark blue one"), ("a cat, an owl & the bat!", "cat owl bat"), ("A.", "a"),
        ("It's 1,000", "its 1000"), ("3.5 m.", "3.5 m"), ("theatre", "theatre"), ("the", "the"), ("?", "?"),
        ("Müller", "müller"), ("", ""),
    ],
)  # fmt: skip
def test_normalised(text, plain):
    assert normalise(text) == plain


def test_scored_exactly_by_containing_or_by_a_function(engine, task):
    said = task.samples[0].answers[0]
    sample = dataclasses.replace(task.samples[0], answers=["none", f"The {said.upper()}!"])

    def length(prediction, answers):
        return len(prediction) / 100

    for how, right in (("exact", 1.0), ("contains", 1.0), (length, len(said) / 100)):
        assert evaluate(engine, Task("t", [sample], how)).scores == [right]
    assert evaluate(engine, Task("t", [sample], length)).metric == "length"
    with pytest.raises(ValueError, match="t: expected scores from 0 to 1, found that of sample 0: 2"):
        evaluate(engine, Task("t", [sample], lambda prediction, answers: 2))
    contains, exact = (mmopt.measure.task.METRICS[m] for m in ("contains", "exact"))
    assert [contains(x, ["dark blue"]) for x in ("It is dark, blue.", "dark blues", "blue")] == [True, False, False]
    assert not exact("it is dark blue", ["dark blue"])


@pytest.mark.parametrize(
    ("right", "of", "interval"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (81, 263, (0.2553, 0.3662))],
)
def test_wilson_intervals_as_published(right, of, interval):
    found = made_up([1] * right + [0] * (of - right))
    assert found.interval == pytest.approx(interval, abs=1e-4)
    assert found.mean == right / of
    assert f"made up: {right / of:.4f} (95 %: {found.interval[0]:.3f} to {found.interval[1]:.3f}), exact" in str(found)


def test_intervals_of_other_scores_and_of_differences_by_all_possible_draws():
    """Of few samples all draws can be listed: the bootstrap must come to the same quantiles."""
    a, b = [0.913, 0.357, 0.6, 0.112, 0.728, 0.481], [0.204, 0.33, 0.651, 0.57, 0.0, 0.4]

    def listed(values):
        return np.quantile([np.mean(x) for x in itertools.product(values, repeat=6)], [0.025, 0.975])

    assert made_up(a).interval == pytest.approx(listed(a), abs=0.01)
    found = compare_scores(made_up(a), made_up(b), draws=40000)
    assert found.interval == pytest.approx(listed(np.subtract(a, b)), abs=0.01)
    assert (found.mean, found.wins, found.losses, found.p) == (pytest.approx(np.mean(a) - np.mean(b)), 4, 2, None)
    apart = np.diff(made_up(a).interval)[0] + np.diff(made_up(b).interval)[0]
    assert found.interval != compare_scores(made_up(a), made_up(b), draws=40000, seed=1).interval
    assert found == compare_scores(made_up(a), made_up(b), draws=40000)
    assert np.diff(found.interval)[0] < apart


def test_paired_interval_of_many_samples_is_that_of_a_t_test():
    rng = np.random.default_rng(0)
    b = (rng.random(900) < 0.6) * 1.0
    a = np.where(rng.random(900) < 0.1, 1.0, b)  # better on a tenth of what b has wrong
    d = a - b
    found = compare_scores(made_up(a), made_up(b))
    half = 1.96 * d.std(ddof=1) / math.sqrt(len(d))
    assert found.interval == pytest.approx((d.mean() - half, d.mean() + half), abs=0.1 * half)
    assert (found.wins, found.losses, found.samples) == (int(d.sum()), 0, 900)
    assert found.p == pytest.approx(2 / 2**found.wins)
    back = compare_scores(made_up(b), made_up(a))
    assert (back.mean, back.wins, back.losses, back.p) == (-found.mean, 0, found.wins, found.p)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 1), (9, 1), (3, 4), (0, 7), (8, 4)])
def test_mcnemar_by_all_tosses(wins, losses):
    n = wins + losses
    uneven = [abs(2 * sum(x) - n) >= abs(wins - losses) for x in itertools.product((0, 1), repeat=n)]
    a, b = [1] * wins + [0] * losses + [1, 0], [0] * wins + [1] * losses + [1, 0]
    assert compare_scores(made_up(a), made_up(b), draws=10).p == pytest.approx(np.mean(uneven))


def test_only_scores_of_the_same_samples_are_paired():
    a = made_up([1, 0, 1])
    with pytest.raises(ValueError, match=r"different samples \(3 and 2\)"):
        compare_scores(a, made_up([1, 0]))
    for wrong in ({"ids": ["0", "1", "5"]}, {"prompts": ["0", "1", "5"]}, {"answers": [["0"], ["1"], ["5"]]}):
        with pytest.raises(ValueError, match=r"different samples \(3 and 3\) cannot be paired: \('2'.* and .*'5'"):
            compare_scores(a, made_up([1, 0, 1], **wrong))
    with pytest.raises(ValueError, match="scores by exact and by contains cannot be paired"):
        compare_scores(a, made_up([1, 0, 1], "contains"))


def test_scores_are_kept_in_files(good, tmp_path):
    good.save(tmp_path / "score.json")
    assert Score.load(tmp_path / "score.json") == good
    assert compare_scores(Score.load(tmp_path / "score.json"), good).mean == 0
    facts = json.loads((tmp_path / "score.json").read_text())
    assert (facts["mean"], facts["interval"]) == (good.mean, list(good.interval))
    for wrong in ("", "[]", "{}", json.dumps(facts | {"scores": [1]}), json.dumps(facts | {"scores": []})):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"wrong.json: not a saved score"):
            Score.load(tmp_path / "wrong.json")


def test_needs_no_torch():
    code = "import sys, mmopt; from mmopt.measure.task import Task; assert 'torch' not in sys.modules; mmopt.evaluate()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TypeError: evaluate() missing 2 required" in done.stderr


def test_on_the_command_line(engine, tmp_path, capsys):
    """An engine and a checkpoint, the same samples; and a task that is not there."""
    for i, colour in enumerate(("red", "blue")):
        PIL.Image.new("RGB", (64, 64), colour).save(tmp_path / f"{i}.png")
    lines = [{"images": [f"{i}.png"], "prompt": "what color is it?", "answers": ["red"]} for i in (0, 1)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = []
    for place in (engine.directory, EXAMPLES / "checkpoints/mplug-owl2-vqa"):
        main = ["bench", "quality", str(place), str(tmp_path / "task.jsonl"), "--threads", "1", "--context", "64"]
        assert run_cli([*main, "--json"], capsys)[0] == 0
        found.append(json.loads(run_cli([*main, "--json", "--limit", "1"], capsys)[1]))
        assert "task.jsonl: " in run_cli(main, capsys)[1]
    assert found[0]["predictions"] == found[1]["predictions"]
    assert len(found[0]["ids"]) == 1
    code, _, err = run_cli(["bench", "quality", str(engine.directory), str(tmp_path / "none.jsonl")], capsys)
    assert (code, "none.jsonl" in err) == (2, True)


def run_cli(arguments, capsys):
    """Exit code, what was printed, and what was complained about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mmopt", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err
