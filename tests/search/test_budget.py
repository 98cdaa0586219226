"""The search for compression under a budget of quality: what is tried, chosen, written, and taken up again."""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import PIL.Image
import pytest
from optuna.storages.journal import JournalFileBackend
from toys import texts, toy_info

import mmopt
from mmopt import cli
from mmopt.exporters.onnx import export
from mmopt.flow.frontier import DriftBudget
from mmopt.ir.program import Program
from mmopt.measure.statistics import Score
from mmopt.measure.task import Sample, Task
from mmopt.pipeline import Result
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.search import budget as searching
from mmopt.search.budget import QualityBudget, search_quality
from mmopt.search.plan import apply_plan, compression, flow_steps, make_plan, passes_of, read_plan, save_plan
from mmopt.search.probe import exported, first_token
from mmopt.search.result import MET, NOT_MET, UNSURE, Candidate, Row, Search, compared, verdict
from mmopt.search.trials import Trials
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.model_info import Flow, ModelInfo
from mmopt.spec.schedule import Call
from mmopt.spec.solvers import make_plan as make_flow_plan

EXAMPLES = Path(__file__).parents[2] / "examples"
PLACES = {"pixels": 64, "vision.1": 64, "vision": 64, "resampler": 16}
KEEPS = (0.5, 0.25, 0.125)
METHODS = ("first", "pool", "merge")
TASK = Task("letters", [Sample(f"letter {i}", [], ["x"]) for i in range(400)])


def score_of(values, ids=None):
    ids = [str(i) for i in range(len(values))] if ids is None else list(ids)
    answers = [["x"]] * len(ids)
    return Score("letters", "exact", "toy", 1.0, ids, ids, answers, ["x"] * len(ids), list(map(float, values)))


# ------------------------------------------------------------------- a world in which all costs and qualities are known
def known_cost(site, method, keep):
    """The earlier and the fewer, the cheaper; merging costs a little."""
    early = {"pixels": 0.8, "vision.1": 0.7, "vision": 0.5, "resampler": 0.01}[site]
    return 1 - early * (1 - keep) + 0.01 * (method == "merge")


def known_losses(site, method, keep):
    """Of 400 samples, so many are answered wrong: merging is good, early is bad, one row in eight is too few."""
    worst = {0.5: 0, 0.25: 8, 0.125: 40}[keep]
    return (
        worst
        + {"pixels": 20, "vision.1": 4, "vision": 0, "resampler": 0}[site]
        + {"merge": -6, "first": 90}.get(method, 0)
    )


@dataclasses.dataclass(frozen=True)
class ToyInfo(ModelInfo):
    asked: tuple | None = None  # what the pass below was asked for


class Toy(Pass):
    """Stands for compress_visual_tokens: notes what was asked for."""

    contract = "approximate"

    def __init__(self, keep_ratio=0.25, method="pool", site=None, position_ids="keep"):
        self.asked = site, method, keep_ratio

    @property
    def name(self):
        return "compress_visual_tokens"

    def run(self, program, report):
        if self.asked[0] == "resampler":
            report.skip("resampler", "it would save 1% of the FLOPs")
            return program
        if self.asked[:2] == ("vision", "merge") and self.asked[2] == 0.125:
            raise ValueError("8 rows cannot be merged")
        made = program.copy()
        made.info = replace(made.info, asked=self.asked)
        report.did("rows are left out")
        return made


class World:
    """What stands in for passes, costs and answers; `asked` counts the samples that were answered, by plan."""

    def __init__(self, patch):
        self.asked, self.made = {}, []
        names = [SimpleNamespace(name=k, rows=n) for k, n in PLACES.items()]
        for module in ("mmopt.search.plan", "mmopt.search.probe"):
            patch.setattr(f"{module}.CompressVisualTokens", Toy)
        patch.setattr("mmopt.search.plan.find_sites", lambda program: names)
        for module in ("mmopt.search.plan", "mmopt.search.budget"):
            patch.setattr(f"{module}.METHODS", dict.fromkeys(METHODS))
        asked = lambda p: known_cost(*p.info.asked) if p.info.asked else 1  # noqa: E731
        patch.setattr(searching, "flops", lambda p, beside=None: 1e6 * asked(p))
        patch.setattr(searching, "evaluate", self.quality)
        patch.setattr("mmopt.search.result.compare_scores", lambda a, b: mmopt.compare_scores(a, b, draws=300))  # quick
        patch.setattr("mmopt.pipeline.why_unchecked", lambda program: "a toy")
        self.program = Program({}, texts(), {}, {}, ToyInfo(**vars(toy_info(context=9))))

    def quality(self, runner, task):
        plan = runner.info.asked
        wrong = max(0, known_losses(*plan)) if plan else 0
        self.asked[plan] = self.asked.get(plan, 0) + len(task.samples)
        lost = [int(s.id) * 7 % 400 < wrong for s in task.samples]
        return score_of([not x for x in lost], [s.id for s in task.samples])

    def budget(self, **changes):
        given = {"max_drop": 0.01, "trials": 12, "keep_ratios": KEEPS, "seed": 1, "frontier": True}
        given |= {"runner": lambda p: p} | changes
        return QualityBudget(changes.pop("task", TASK), **{k: v for k, v in given.items() if k != "task"})

    def search(self, told=None, **changes):
        observers = [] if told is None else [lambda text, report, program: told(text)]
        return search_quality(self.program, self.budget(**changes), [], observers=observers)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def plans(result):
    return [r.plan for r in result.search.rows]


def best_of_all(drop):
    every = [(p, m, k) for p in ("vision.1", "vision") for m in METHODS for k in KEEPS]
    every = [e for e in every if e != ("vision", "merge", 0.125)] + [("pixels", "resize", k) for k in KEEPS]
    return min((e for e in every if known_losses(*e) <= 400 * drop), key=lambda e: known_cost(*e))


# ---------------------------------------------------------------------------------------------------------- the search
@pytest.mark.parametrize("drop", [0.005, 0.01, 0.2])
def test_the_cheapest_plan_that_keeps_the_budget_is_chosen(world, drop):
    result = world.search(max_drop=drop, trials=99)
    best = result.search.best
    assert tuple(best.plan)[:3] == best_of_all(drop)
    assert (best.cost, best.verdict != NOT_MET) == (pytest.approx(known_cost(*best_of_all(drop))), True)
    assert result.program.info.asked == best_of_all(drop)
    assert world.program.info == ToyInfo(**vars(toy_info(context=9)))


@pytest.mark.parametrize("drop", [0.0, 0.01, 0.06])
def test_plans_that_cannot_be_chosen_are_passed_over(world, drop):
    """The choice is that of measuring everything, with fewer questions; each plan measured could have been chosen."""
    whole = world.search(max_drop=drop, trials=99).search
    short = world.search(max_drop=drop, trials=99, frontier=False).search
    assert short.best.plan == whole.best.plan
    assert len(short.rows) < len(whole.rows)
    least = 1.0
    for r in short.rows:
        assert r.cost < least
        least = min(least, r.cost) if r.verdict != NOT_MET else least


def test_what_saves_little_is_measured_while_nothing_keeps_the_budget(world, monkeypatch):
    monkeypatch.setitem(known_cost.__globals__, "known_cost", lambda site, method, keep: 1.0 if keep < 0.5 else 0.97)
    search = world.search(frontier=False, trials=99, keep_ratios=(0.25, 0.125, 0.5)).search
    assert {r.plan.keep_ratio for r in search.rows} == {0.5}  # the others save nothing at all
    assert search.best.cost == 0.97


def test_the_estimator_learns_from_what_trials_cost():
    """Of ten methods one is cheap and good: it is suggested far more often than one time in ten."""
    space = [Candidate("vision", f"m{i}", k) for i in range(10) for k in KEEPS]
    good = [("m3", 0.1), ("m4", 11.0)]
    shares = {}
    for name, value in good:
        trials = Trials(space, [], 0, None, {})
        for c in space:
            trials.add(c, {"plan": list(c)}, value if c.method == name else 10.0, pruned=False)
        made = [trials._suggest(seed).method for seed in range(60)]
        shares[name] = made.count(name) / len(made)
    assert shares["m3"] > 0.2
    assert shares["m4"] < 0.1  # the dearest one


def test_a_plan_that_keeps_the_budget_is_a_better_trial_than_any_that_does_not(world, tmp_path):
    search = world.search(store=tmp_path / "trials.log", trials=99).search
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "trials.log")))
    done = optuna.load_study(study_name="mmopt", storage=storage).trials
    assert len(done) == len(search.rows)
    value = {Candidate(*t.user_attrs["candidate"]): t.value for t in done if t.value is not None}
    met = [value[r.plan] for r in search.rows if r.verdict != NOT_MET]
    missed = [value[r.plan] for r in search.rows if r.verdict == NOT_MET and not r.pruned]
    assert max(met) < min(missed)
    assert min(value, key=value.get) == search.best.plan
    assert {t.state.name for t in done} == {"COMPLETE", "PRUNED"}


def test_pooling_and_smaller_images_are_tried_first_as_late_as_they_save_anything(world):
    first = plans(world.search(trials=6))
    assert first[:3] == [Candidate("vision", "pool", k) for k in KEEPS]
    assert first[3:] == [Candidate("pixels", "resize", k) for k in KEEPS]


def test_the_same_seed_gives_the_same_trials_and_none_twice(world):
    found = plans(world.search())
    assert plans(world.search()) == found
    assert len(set(found)) == len(found) == 12
    assert plans(world.search(seed=2)) != found
    assert plans(world.search(trials=8)) == found[:8]
    everything = world.search(trials=99)
    assert len(set(plans(everything))) == len(plans(everything)) == 3 + 2 * 9 - 1
    left = everything.search.left
    assert left["merge at vision, keep 0.125"] == "8 rows cannot be merged"
    assert left["pool at resampler, keep 0.5"] == "resampler: it would save 1% of the FLOPs"
    assert "not tried: pool at resampler" in everything.search.text()


def test_what_surely_fails_is_given_up_after_a_few_samples(world):
    search = world.search(trials=99, quick=50).search
    rows = {tuple(r.plan)[:3]: r for r in search.rows}
    assert {r.samples for r in search.rows} == {50, 400}
    for plan, row in rows.items():
        assert row.pruned == (row.samples == 50)
        assert world.asked[plan] == row.samples  # the first few are not asked again
        assert not row.pruned or known_losses(*plan) > 4
    assert rows["vision.1", "first", 0.5].pruned
    assert not rows["vision.1", "pool", 0.25].pruned  # 12 of 400: too near to tell by 50
    assert rows["vision.1", "pool", 0.25].verdict == NOT_MET
    assert world.asked[None] == 400
    whole = world.search(trials=99, quick=0).search
    assert {r.samples for r in whole.rows} == {400}
    assert whole.best.plan == search.best.plan
    assert {r.samples for r in world.search(trials=2, quick=400).search.rows} == {400}


def test_a_limit_and_places_methods_and_keeps_that_are_asked_for(world):
    search = world.search(
        limit=80, quick=20, sites=["vision"], methods=["pool", "first"], keep_ratios=[0.5, 0.25]
    ).search
    assert {(r.plan.site, r.plan.method, r.plan.keep_ratio) for r in search.rows} == {
        ("vision", m, k) for m in ("pool", "first") for k in (0.5, 0.25)
    }
    assert {r.samples for r in search.rows} <= {20, 80}
    assert search.full.samples == 80
    both = world.search(
        trials=4, sites=["vision"], methods=["pool"], keep_ratios=[0.5, 0.25], position_ids=["keep", "renumber"]
    )
    assert {(r.plan.keep_ratio, r.plan.position_ids) for r in both.search.rows} == {
        (k, p) for k in (0.5, 0.25) for p in ("keep", "renumber")
    }
    with pytest.raises(ValueError, match=r"site 'attic' is not in this program; there are pixels, vision.1"):
        world.search(sites=["attic"])
    with pytest.raises(ValueError, match="method 'magic' is not known; there are first, pool, merge, resize"):
        world.search(methods=["magic"])
    with pytest.raises(ValueError, match="toy: there is no site"):
        world.search(sites=["pixels"], methods=["pool"])


def test_if_nothing_keeps_the_budget_nothing_is_compressed_and_the_report_says_so(world):
    result = world.search(sites=["pixels"], max_drop=0.01)
    assert result.search.best is None
    assert result.program.info.asked is None
    assert result.program.info.plan["passes"] == []
    report = result.reports[-1]
    assert (report.name, report.rewrites) == ("budget", [])
    assert "none of 3 plans keeps a drop of at most 0.01 and saves anything, so nothing is compressed" in str(report)
    assert "the nearest is resize at pixels, keep 0.5" in str(report)
    assert passes_of(result.program.info.plan) == []


def test_observers_are_told_and_the_report_names_the_choice(world):
    told = []
    result = world.search(told.append)
    assert told[0] == "nothing compressed"
    assert [t for t in told if t.startswith("plan ")][-1].startswith("plan 12 of 12: ")
    assert str(result.search.best.plan) in str(result)
    assert result.reports[0].name == "compress_visual_tokens"


def test_measured_time_is_a_cost(world, monkeypatch):
    """Merging is slow here, though it saves FLOPs; plans that take longer than none are not chosen."""
    ask = iter(range(10**6))

    def clocked(sample, *runners):
        drift = 1 + next(ask)  # the machine becomes slower and slower: only what is timed in turn can be compared
        times = []
        for r in runners:
            plan = r.info.asked
            slow = 1.0 if plan is None else 2.0 if plan[1] == "merge" else 0.1 + plan[2]
            times.append([drift * slow, drift * slow, 99.0 if r is runners[-1] else drift])
        return times

    monkeypatch.setattr(searching, "first_token", clocked)
    search = world.search(trials=99, max_drop=0.01, timed=True).search
    rows = {tuple(r.plan)[:3]: r for r in search.rows}
    assert rows["vision", "merge", 0.5].cost == pytest.approx(2)
    assert rows["vision", "pool", 0.25].cost == pytest.approx(0.35)
    assert rows["vision", "merge", 0.5].verdict != NOT_MET
    assert search.best.plan == Candidate("vision", "pool", 0.5)
    assert search.cost == "time to the first token"
    assert search.text().count(" ms") == len(search.rows) + 1
    assert search.full.seconds == 1
    quicker = world.search(trials=99, max_drop=0.01, timed=True, frontier=False).search
    assert {r.plan for r in quicker.rows} == {r.plan for r in search.rows}  # FLOPs say nothing of what takes less time


# ------------------------------------------------------------------------------------------------------ taken up again
class StoppedError(Exception):
    pass


def stop_at(number):
    def told(text):
        if text.startswith(f"plan {number} of"):
            raise StoppedError

    return told


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(world, tmp_path):
    store = tmp_path / "trials.log"
    whole = world.search()
    asked = dict(world.asked)
    for n in (2, 5, 9):
        with pytest.raises(StoppedError):
            world.search(stop_at(n), store=store)
        with store.open("ab") as f:
            f.write(b'{"op_code":4,"worker_id":"')  # cut off while it was being written
    world.asked.clear()
    again = world.search(store=store)
    assert again.search.rows == whole.search.rows
    assert again.search.full == whole.search.full
    assert None not in world.asked  # what was answered is not asked again
    assert {*world.asked} == {tuple(p)[:3] for p in plans(whole)[8:]} != {*asked}
    world.asked.clear()
    more = world.search(store=store, trials=14)
    assert more.search.rows[:12] == whole.search.rows
    assert (len(more.search.rows), len(world.asked)) == (14, 2)
    assert plans(world.search(trials=14)) == plans(more)


def test_trials_of_another_search_are_refused(world, tmp_path):
    store = tmp_path / "trials.log"
    world.search(store=store, trials=2)
    before = store.read_bytes()
    for changes, differs in (
        ({"max_drop": 0.02}, "settings"),
        ({"keep_ratios": (0.5,)}, "settings"),
        ({"seed": 5}, "settings"),
        ({"task": Task("letters", [*TASK.samples[:-1], Sample("other", [], ["x"])])}, "task"),
        ({"task": dataclasses.replace(TASK, score="contains")}, "task"),
        ({"limit": 100}, "task and settings"),
    ):
        with pytest.raises(ValueError, match=f"trials.log: its trials are of another search, with other {differs}$"):
            world.search(store=store, **changes)
    world.program = dataclasses.replace(world.program, info=replace(world.program.info, context=10))
    with pytest.raises(ValueError, match=r"with other program$"):
        world.search(store=store)
    assert store.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(world, tmp_path):
    (tmp_path / "notes.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"notes.txt: exists and holds no trials"):
        world.search(store=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "dear diary"


def test_images_and_weights_of_other_content_are_another_search(world, tmp_path, monkeypatch):
    import torch

    def asking(pixel, weight):
        PIL.Image.new("RGB", (2, 2), (pixel, 0, 0)).save(tmp_path / "a.png")
        program = dataclasses.replace(world.program, weights={"w": torch.full((3,), weight)})
        task = Task("pictures", [Sample("?", [str(tmp_path / "a.png")], ["x"], id=str(i)) for i in range(4)])
        return search_quality(program, world.budget(store=tmp_path / "trials.log", trials=1, task=task), [])

    asking(1, 1.0)
    asking(1, 1.0)
    with pytest.raises(ValueError, match=r"other task$"):
        asking(2, 1.0)
    with pytest.raises(ValueError, match=r"other program$"):
        asking(1, 2.0)


def test_without_optuna_the_error_says_what_to_install(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"mmopt\[search\]"):
        world.search()


# ------------------------------------------------------------------------------------------------------------- verdicts
def test_few_samples_without_a_loss_are_not_certain():
    for n, told in ((12, UNSURE), (100, UNSURE), (1000, MET)):
        found, interval = compared(score_of([1] * n), score_of([1] * n))
        assert found.interval == (0, 0)  # what the bootstrap alone would say
        assert interval[0] < 0 < interval[1]
        assert verdict(found.mean, interval, 0.01) == told
    found, interval = compared(score_of([1, 0] * 300), score_of([1] * 600))
    assert interval[0] <= found.interval[0] <= found.interval[1] <= interval[1] < -0.4


def test_the_added_interval_is_that_of_agresti_and_min():
    """Their formula for 2 x 2 tables: half a sample added to each of the four cells."""
    b, c, n = 3, 9, 40
    a = score_of([1] * b + [0] * c + [1] * (n - b - c))
    other = score_of([0] * b + [1] * c + [1] * (n - b - c))
    mean = (b - c) / (n + 2)
    half = 1.959964 * (((b + c + 1) - (b - c) ** 2 / (n + 2)) ** 0.5) / (n + 2)
    _, (low, high) = compared(a, other)
    assert low <= mean - half + 1e-6
    assert high >= mean + half - 1e-6
    assert min(abs(low - mean + half), abs(high - mean - half)) < 1e-6


def test_a_fall_of_just_the_budget_keeps_it():
    assert verdict(-0.01, (-0.02, 0.0), 0.01) == UNSURE
    assert verdict(-0.01, (-0.01, 0.0), 0.01) == MET
    assert verdict(-0.0101, (-0.02, 0.0), 0.01) == NOT_MET
    assert verdict(0.05, (0.0, 0.1), 0.0) == MET


# -------------------------------------------------------------------------------------------------------------- results
POOL = Candidate("vision", "pool", 0.5)


def row(cost, quality, plan=POOL, told=MET, pruned=False):
    measured = quality, (quality - 0.02, 1.0), quality - 0.9, (-0.1, 0.1), 1, 2, 9
    return Row(plan, 32, 64, 1e6 * cost, cost, *measured, told, pruned)


@pytest.fixture
def found():
    full = row(1.0, 0.9, None)
    rows = [
        row(0.5, 0.89), row(0.6, 0.88), row(0.4, 0.5, told=NOT_MET), row(0.3, 0.95, told=NOT_MET, pruned=True),
        row(1.2, 0.95), row(0.5, 0.895, told=UNSURE, plan=Candidate("pixels", "resize", 0.25, "renumber")),
    ]  # fmt: skip
    return Search("letters", 0.01, "a drop of at most 0.01", "FLOPs up to the first token", full, rows)


def test_the_choice_and_the_frontier(found):
    assert found.best is found.rows[5]
    dear = dataclasses.replace(found, rows=[found.rows[4], row(1.0, 0.95)])
    assert dear.best is None  # better than nothing compressed, but not cheaper
    assert "none of 2 plans keeps" in dear.reason
    assert found.frontier() == [found.rows[4], found.full, found.rows[5], found.rows[2]]
    assert found.reason.startswith("resize at pixels, keep 0.25, renumbered: FLOPs up to the first token x 0.500; ")
    assert found.reason.endswith("a drop of at most 0.01: met, but not certain")


def test_what_is_written(found, tmp_path):
    text = found.text()
    assert (text.count("->"), text.count("*")) == (1, 3)
    assert "given up" in text
    found.save(tmp_path / "search.json")
    data = json.loads((tmp_path / "search.json").read_text())
    assert [r["chosen"] for r in data["rows"]] == [False] * 5 + [True]
    assert data["rows"][5]["plan"] == compression("pixels", "resize", 0.25, "renumber")
    back = [{k: v for k, v in r.items() if k not in ("chosen", "frontier")} for r in data["rows"]]
    assert [Row.from_json(r) for r in back] == found.rows
    with pytest.raises(ValueError, match="PNG"):
        found.plot(tmp_path / "search.svg")
    broken = dataclasses.replace(found, full=dataclasses.replace(found.full, quality=float("nan")))
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path / "search.json")
    assert json.loads((tmp_path / "search.json").read_text()) == data
    assert [p.name for p in tmp_path.iterdir()] == ["search.json"]


def test_a_picture_is_drawn(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "search.png")
    dataclasses.replace(found, rows=[]).plot(tmp_path / "none.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none.png", "search.png"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "t.jsonl"}, "task is 't.jsonl', expected a mmopt.Task"),
        ({"max_drop": -0.1}, "max_drop is -0.1"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"max_drop": True}, "max_drop is True"),
        ({"limit": 0}, "limit is 0, expected a whole number of at least 1"),
        ({"quick": -1}, "quick is -1"),
        ({"trials": 0}, "trials is 0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"keep_ratios": ()}, r"keep_ratios is \(\), expected a list that is not empty"),
        ({"keep_ratios": (0.5, 1)}, "keep_ratios holds 1, expected shares between 0 and 1"),
        ({"methods": "pool"}, "methods is 'pool', expected a list"),
        ({"position_ids": ["shuffle"]}, "position_ids holds 'shuffle', expected keep or renumber"),
        ({"flow": 0.1}, "flow is 0.1, expected a mmopt.DriftBudget"),
    ],
)
def test_a_budget_that_is_none_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        QualityBudget(**({"task": TASK} | given))


# ------------------------------------------------------------------------------------------------------- plans as data
FLOW = make_flow_plan("ab2", 4, 2.0).to_json()


def generating(program):
    """The program, as if it generated images by the plan FLOW."""
    plan = FlowPlan.from_json(FLOW)
    flow = Flow((1, 2, 2), 4, plan=plan, plans=(plan,))
    schedules = program.schedules.replaced(image=[Call("decode_image")])
    return dataclasses.replace(program, schedules=schedules, info=replace(program.info, flow=flow))


def test_plans_go_to_json_and_back(world, tmp_path):
    painting = generating(world.program)
    plan = make_plan([compression("vision", "pool", 0.5), flow_steps(painting)], budget={"drop": 0.01})
    save_plan(plan, tmp_path / "plan.json")
    (tmp_path / "program.json").write_text(json.dumps({"info": {"plan": plan}}))
    for source in (plan, tmp_path / "plan.json", str(tmp_path / "program.json"), tmp_path):
        assert read_plan(source) == plan
        compress, reduce = passes_of(source, painting)
        assert compress.asked == ("vision", "pool", 0.5)
        assert (reduce.plan.to_json(), [f.to_json() for f in reduce.fitted]) == (FLOW, [FLOW])
    with pytest.raises(ValueError, match="reduce_flow_steps is for programs that paint; toy generates no images"):
        passes_of(plan, world.program)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "quantise"}, "pass 'quantise' is not known; there are compress_visual_tokens, reduce_flow_steps"),
        ({}, "pass None is not known"),
        (compression("vision", "magic", 0.5), "method 'magic' is not known; there are first, pool, merge, resize"),
        (compression("attic", "pool", 0.5), "site 'attic' is not in this program; there are pixels, vision.1"),
        (compression("vision", "pool", 0.5) | {"speed": 3}, "compress_visual_tokens takes no speed"),
        ({"name": "compress_visual_tokens", "site": "vision"}, "compress_visual_tokens lacks method, keep_ratio"),
        ({"name": "reduce_flow_steps", "plan": {}}, "not a flow plan"),
    ],
)
def test_steps_of_a_plan_that_are_not_known(world, step, message):
    painting = generating(world.program)
    with pytest.raises(ValueError, match=message):
        passes_of(make_plan([step]), painting)


def test_files_that_hold_no_plan(world, tmp_path):
    for text, message in (
        ("{", "Expecting"),
        ("[1]", "not a plan: expected an object of schema 2, found 'list'"),
        ("{}", "found None"),
        ('{"schema": 2, "passes": 3}', "its passes are 3, expected a list"),
        ('{"info": {}}', "this engine was made without a plan"),
        ('{"info": {"plan": 3}}', "found 'int'"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{tmp_path / 'x.json'}: .*{message}"):
            passes_of(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        passes_of(tmp_path / "none.json")


def test_a_program_that_paints_gets_both_parts_of_the_plan(world, monkeypatch):
    def within(result, budget, prompts):
        made = result.program.copy()
        made.info = replace(made.info, flow=replace(made.info.flow, plan=FlowPlan.from_json(FLOW)))
        report = Report("reduce_flow_steps", "approximate", [f"for {prompts}"], checked="drift: mean 0.02")
        return Result(made, [*result.reports, report])

    monkeypatch.setattr(searching, "within", within)
    drift = DriftBudget(mean=0.1)
    with pytest.raises(ValueError, match="a budget of drift is for programs that paint; toy generates no images"):
        world.search(flow=drift)
    world.program = generating(world.program)
    with pytest.raises(ValueError, match="a budget of drift needs prompts"):
        world.search(flow=drift)
    result = search_quality(world.program, world.budget(flow=drift, trials=3), [], prompts=["a cat"])
    plan = json.loads(json.dumps(result.program.info.plan))
    assert [s["name"] for s in plan["passes"]] == ["compress_visual_tokens", "reduce_flow_steps"]
    assert plan["passes"][1]["plan"] == FLOW
    assert plan["measured"]["flow"] == {"budget": "mean 0.1", "drift": "drift: mean 0.02"}
    assert [r.name for r in result.reports] == ["compress_visual_tokens", "budget", "reduce_flow_steps"]
    assert [p.name for p in passes_of(plan)] == ["compress_visual_tokens", "reduce_flow_steps"]


# ------------------------------------------------------------------------------------------ a model that has learned it
COLOURS = ("red", "blue", "green", "yellow", "black", "gray")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("task"), []
    for i, colour in enumerate(COLOURS):
        PIL.Image.new("RGB", (64, 64), colour).save(folder / f"{i}.png")
        lines.append({"images": [f"{i}.png"], "prompt": "what color is it?", "answers": [colour], "max_new_tokens": 4})
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "task.jsonl"


@pytest.fixture(scope="module")
def program():
    return mmopt.trace(mmopt.load(EXAMPLES / "checkpoints/mplug-owl2-vqa", "float32"), batch=4, images=1, context=64)


@pytest.fixture(scope="module")
def searched(program, task):
    given = {"keep_ratios": [0.25], "methods": ["pool", "resize"], "sites": ["vision.1", "pixels"]}
    budget = QualityBudget(Task.load(task), 0.5, quick=3, trials=2, **given)
    return search_quality(program, budget, check=False)


def test_on_a_trained_model_the_plan_goes_along_into_the_engine(program, searched, tmp_path):
    search = searched.search
    assert len(search.rows) == 2
    assert search.best is not None
    assert all(0 < r.flops < search.full.flops for r in search.rows)
    assert searched.reports[0].name == "compress_visual_tokens"
    made = export(searched.program, tmp_path / "engine", check=False)
    assert json.loads((made / "program.json").read_text())["info"]["plan"] == searched.program.info.plan
    again = apply_plan(program, made, check=False)
    assert str(again.program) == str(searched.program)
    assert again.program.info == searched.program.info


def test_the_first_token_is_timed_without_what_was_kept_before(program, task):
    sample = Task.load(task).samples[0]
    with exported(program) as engine:
        engine.generate(sample.prompt, sample.images, max_new_tokens=1)
        store, encoded = engine.store, []
        encode = engine.decoder.encode
        engine.decoder.encode = lambda *given: encoded.append(1) or encode(*given)
        times = first_token(sample, engine, engine)
        assert [len(t) for t in times] == [9, 9]
        assert len(encoded) == 20
        assert engine.store is store
        folder = engine.directory
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------------- the command line
def run_cli(arguments, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mmopt", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_on_the_command_line(program, task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mmopt, "trace", lambda model, *sizes, **options: program)  # quick
    plan = Candidate("vision.1", "pool", 0.5)
    monkeypatch.setattr(searching, "candidates", lambda budget, sites: ([plan], []))
    checkpoint = EXAMPLES / "checkpoints/mplug-owl2-vqa"
    given = ["optimize", checkpoint, "--dtype", "float32", "--context", "64", "--no-check"]
    asked = [*given, "--quality", task, "--max-drop", "0.5", "--trials", "1", "--store", tmp_path / "trials.log"]
    code, out, err = run_cli([*asked, "--plan-out", tmp_path / "plan.json"], capsys)
    assert code == 0
    assert "search: plan 1 of 1: pool at vision.1, keep 0.5" in err
    assert "found the cheapest compression in budget" in out
    assert "budget: a drop of at most 0.5" in out
    (step,) = read_plan(tmp_path / "plan.json")["passes"]
    assert step["method"] == "pool"
    code, out, _ = run_cli([*given, "--plan", tmp_path / "plan.json", "--json"], capsys)
    assert code == 0
    assert json.loads(out)["passes"][0]["name"] == "compress_visual_tokens"
    wanted = ["export", checkpoint, tmp_path / "engine", "--no-check", "--no-optimize"]
    assert run_cli([*wanted, "--plan", tmp_path / "plan.json"], capsys)[0] == 0
    assert read_plan(tmp_path / "engine") == read_plan(tmp_path / "plan.json")


def test_wrong_use_of_the_command_line(task, tmp_path, capsys):
    given = ["optimize", EXAMPLES / "checkpoints/mplug-owl2-vqa"]
    for arguments, message in (
        (["--max-drop", "0.1", "--plot", "a.png"], "--max-drop, --plot: expected with --quality, seen without"),
        (["--quality", task, "--plan", task], "--plan: expected without a search for a plan, seen with --quality"),
        (["--drift", "0.1"], "--drift, --prompts: expected both or neither, seen one of them"),
        (["--prompts", task, "--quality", task], "--drift, --prompts: expected both or neither, seen one of them"),
        (["--drift", "0.1", "--prompts", tmp_path / "none.txt"], "none.txt' does not exist"),
        (["--drift", "0", "--prompts", task], "drift mean is 0.0, expected a finite number above 0"),
        (["--plan-out", "x"], "--plan-out: expected with --quality or --drift, seen without"),
        (["--quality", task, "--plot", "a.jpg"], "expected the name of a PNG file"),
        (
            ["--quality", task, "--plan-out", tmp_path / "none" / "x"],
            "--plan-out: expected a file in a directory that exists",
        ),
        (["--plan", tmp_path / "none.json"], "none.json"),
    ):
        code, _, err = run_cli([*given, *arguments], capsys)
        assert code == 2
        assert message in err
    code, _, err = run_cli(["export", given[1], tmp_path / "engine", "--polish", "3"], capsys)
    assert (code, "--polish: expected with --fit, seen without" in err) == (2, True)
