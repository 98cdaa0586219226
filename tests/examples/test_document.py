"""docs/benchmarks.md is what the files of results say; tables of code that has changed since are marked."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmopt.measure.head import NOT_RECORDED, ROOT, head

sys.path.insert(0, str(ROOT / "examples/benchmarks"))
import cells
import document
import staleness
import tables_flow
import tables_speed
import tables_tokens
from kinds import KINDS, Kind
from result_files import RESULTS, ResultFile, read, read_all
from staleness import mark, without_marks

BY_HAND = "## By hand\n"


def result(**more):
    """A result as a benchmark writes it today."""
    ratios = {"32": [2.0, 4.0, 3.0]}
    runs = [{"32": {"off": [2.0, 3.0], "on": [1.0, 1.0]}}, {"32": {"off": [4.0, 4.0], "on": [1.5, 1.5]}}]
    found = head("passes off and on", 2, "float32", packages=["numpy"])
    return found | {"date": "2026-05-04T03:02:01+00:00", "rounds": 9, "ratios": ratios, "runs": runs} | more


def write(path: Path, data) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def page(*files: Path, log=lambda commit, paths: 0) -> str:
    return document.page([read(f) for f in files], BY_HAND, log)


# ------------------------------------------------------------------------------------------------------------ the page
def test_the_committed_page_is_what_the_results_say():
    made = document.page(read_all(), document.BY_HAND.read_text(), log=lambda commit, paths: 0)
    wrong = "docs/benchmarks.md is old: run python examples/benchmarks/document.py"
    assert without_marks(made) == without_marks(document.PAGE.read_text()), wrong


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", document.PAGE.read_text())
    assert len(links) > len(list(RESULTS.glob("*.json")))
    assert not [x for x in links if not (document.PAGE.parent / x).is_file()]


def test_every_kind_names_paths_that_exist():
    assert not [p for kind in KINDS.values() for p in kind.paths if not (ROOT / p).exists()]


def test_a_new_result_has_its_date_commit_machine_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mmopt", "bench", "--json"])
    commit = "0123456789abcdef" + "0" * 24
    made = page(write(tmp_path / "new.json", result(commit=commit, machine={"cpu": "CPU", "cores": 4})))
    assert "- CPU, 4 cores, 2 threads, float32; python" in made
    assert "- date 2026-05-04, commit `0123456789ab`; **current**. Measures `exporters`" in made
    assert "```\nmmopt bench --json\n```" in made
    assert "| [new](#new) | Passes off and on, as deployed | CPU, 4 cores | 2026-05-04 | **current** |" in made
    assert made.endswith(BY_HAND)
    assert "with changes of its own; **current**" in page(write(tmp_path / "new.json", result(commit="abc-dirty")))


def test_runs_of_one_file_share_what_they_have_alike(tmp_path):
    runs = {"first": result(commit="a" * 40), "second": result(commit="b" * 40, rounds=7)}
    made = page(
        write(tmp_path / "two.json", {"schema": 2, "kind": "passes off and on", "configs": runs}),
        log=lambda commit, paths: int(commit == "b" * 40),
    )
    assert f"commit `{'a' * 12}`, `{'b' * 12}`; **stale**: 1 commit since changed what it measures" in made
    assert made.count("2 threads, float32") == 1
    assert "- `second`: rounds 7" in made


def test_check_tells_of_an_old_page(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "PAGE", ROOT / "docs" / "none.md")
    monkeypatch.setattr(document, "read_all", lambda: [])
    monkeypatch.setattr(sys, "argv", ["document.py", "--check"])
    monkeypatch.setattr(Path, "read_text", lambda self: "# Benchmarks, long ago\n")
    with pytest.raises(SystemExit, match=r"docs/none.md is not what the results say: run examples/benchmarks/document"):
        document.main()


# ----------------------------------------------------------------------------------------------------------- the marks
def test_marks():
    asked = []

    def log(commit, paths):
        asked.append((commit, paths))
        return {"old": 3, "new": 0}.get(commit)

    assert mark(["new"], ["a"], log) == "**current**"
    assert mark(["new-dirty"], ["a"], log) == "**current**"
    assert mark(["new", "old"], ["a"], log) == "**stale**: 3 commits since changed what it measures"
    assert mark(["other"], ["a"], log) == "**stale**: its commit is not in this history"
    assert mark([NOT_RECORDED], ["a"], None) == "**stale**"
    assert asked == [("new", ["a"]), ("new", ["a"]), ("new", ["a"]), ("old", ["a"]), ("other", ["a"])]


def test_marks_alone_make_no_page_another(tmp_path):
    file = write(tmp_path / "new.json", result())
    pages = [page(file, log=lambda commit, paths, n=n: n) for n in (0, 2, None)]
    assert len(set(pages)) == 3
    assert len(set(map(without_marks, pages))) == 1
    write(file, result(rounds=8))
    assert without_marks(page(file)) != without_marks(pages[0])


def test_commits_since_are_those_that_change_the_paths(tmp_path, monkeypatch):
    def git(*words):
        by = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *by, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "timed").mkdir()
    commits = []
    for name in ("timed/a.py", "notes.md", "timed/b.py"):
        write(tmp_path / name, name)
        git("add", ".")
        git("commit", "-qm", name)
        commits.append(git("rev-parse", "HEAD"))
    monkeypatch.setattr(staleness, "ROOT", tmp_path)
    assert [staleness.git_log(c, ["timed"]) for c in [*commits, "0" * 40]] == [1, 1, 0, None]


# ------------------------------------------------------------------------------------------------------- broken files
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "not JSON"),
        ([], "expected an object of schema 2, found 'list'"),
        ({"kind": "stages"}, "expected an object of schema 2, found None"),
        (result(schema=1), "expected an object of schema 2, found 1"),
        ({k: v for k, v in result().items() if k not in ("date", "commit")}, "lacks date, commit"),
        (result(machine={"cpu": "c"}), "lacks cores"),
        ({"schema": 2, "kind": "threads", "configs": {}}, "its configs are {}"),
        ({"schema": 2, "kind": "threads", "configs": {"a": result()}}, "kind 'passes off and on' in a file of kind"),
        (result(kind="weather"), "kind 'weather', expected one of stages"),
        (
            {k: v for k, v in result().items() if k != "runs"},
            "not a result of kind 'passes off and on': KeyError: 'runs'",
        ),
        (result(ratios=[1]), "not a result of kind 'passes off and on': AttributeError"),
    ],
)
def test_a_broken_file_is_refused_by_name(data, said, tmp_path):
    with pytest.raises(ValueError, match=rf"broken\.json: .*{re.escape(said)}"):
        page(write(tmp_path / "broken.json", data))


# ---------------------------------------------------------------------------------------------------------- the tables
def test_cells():
    assert [cells.ms(x) for x in (1234.4, 100, 99.96, 7.0, 0.5)] == ["1,234", "100", "100", "7.00", "0.500"]
    assert cells.table(["a", "b"], [["1", ""]]) == ["| a | b |", "| --- | --- |", "| 1 | |", ""]
    with pytest.raises(ValueError, match="a row has 1 cells, expected 2"):
        cells.table(["a", "b"], [["1"]])
    limits = [{"gemm_gflop_per_s": x, "bandwidth_gb_per_s": 20.0} for x in (100.0, 200.0)]
    assert cells.roof(limits) == "GEMM 100 to 200 GFLOP/s, memory 20 GB/s"
    assert cells.gemm_share(1e9, 20.0, limits[0]) == "50 %"
    assert cells.gemm_share(1e9, 20.0, {}) == ""


def test_passes_off_and_on():
    (_, _, row, _) = tables_speed.off_and_on({"": result()})
    assert row == "| 32 shots | 3.25 (2.50 to 4.00) | 1.25 (1.00 to 1.50) | 3.00x (2.00x to 4.00x) |"


def test_composition_tells_of_flops_times_and_the_roof():
    def step(name, flops, took):
        times = {s: {"min_ms": took, "median_ms": 2 * took} for s in ("first token", "decode")}
        faster = {"all": {"first token": 8 / took, "decode": 1.5}, "own": {"first token": 2.5}}
        return {"step": name, "flops": {"first token": flops}, "times": times, "faster": faster}

    run = {"rows": [step("nothing", 4e9, 80.0), step("rows", 1e9, 40.0)], "limits": {"gemm_gflop_per_s": 100.0}}
    run["compression"] = {"keep_ratio": 0.125, "site": "vision.1", "method": "merge"}
    lines = tables_speed.composition({"tiny": run})
    assert lines[0] == "**`tiny`**: compression keeps 12.5 % at `vision.1`, merge."
    assert lines[4] == "| nothing | 1.00x | 80.0 (160) | | | 50 % | 80.0 (160) | |"
    assert lines[5] == "| + rows | 4.00x | 40.0 (80.0) | 0.20x | 2.50x | 25 % | 40.0 (80.0) | 1.50x |"


def test_right_answers_have_a_star_where_the_difference_is_sure():
    def row(method, site, keep, mean, low, high, faster):
        over = {} if method in ("full", "blind") else {"full": {"interval": [low, high]}}
        task = {"mean": mean, "interval": [mean, mean], "right": "1" * 20, "over": over}
        q = {"p25": faster, "median": faster, "p75": faster}
        return {
            "method": method,
            "site": site,
            "keep_ratio": keep,
            "tasks": {"t": task},
            "times": {"t": {"ms": q, "faster": q}},
        }

    rows = [row("full", "", 1.0, 1.0, 0, 0, 1.0), row("blind", "", 1.0, 0.2, 0, 0, 1.0)]
    rows += [
        row("pool", "vision.all", 0.25, 0.9, -0.2, -0.01, 1.5),
        row("dominant", "vision.all", 0.25, 0.95, -0.1, 0.01, 1.4),
    ]
    rows += [
        row("resize", "pixels", 0.25, 0.8, -0.3, -0.1, 1.2),
        row("random", "vision.all", 0.25, 0.7, -0.4, -0.2, 1.1),
    ]
    del rows[1]["times"]
    lines = tables_tokens.quality({"": {"rows": rows, "sizes": {"sites": {"pixels": 64, "vision.all": 64}}}})
    assert lines[0] == "**t**, 20 samples: all tokens 1.000 (1.000 to 1.000), with grey pictures 0.200"
    assert r"| `vision.all` | 16/64 | 0.900\* | 0.950 | 0.700\* |" in lines
    assert r"A smaller image: 0.800\* at 25 %." in lines
    assert "| `vision.all`, pool, 25 % | 0.900 | 1.50 | 1.50x (1.50 to 1.50) | yes |" in lines
    assert "| `pixels`, resize, 25 % | 0.800 | 1.20 | 1.20x (1.20 to 1.20) | |" in lines
    assert not [x for x in lines if "random, 25 %" in x]


def test_the_least_drift_is_bold():
    rows = [{"solver": s, "evaluations": 8, "forwards": 16, "mean": m, "p90": 0.5} for s, m in (("a", 0.2), ("b", 0.1))]
    assert "| 8 | 16 | .200 (.500) | **.100 (.500)** |" in tables_flow.frontier({"": {"rows": rows, "fits": {}}})


def test_files_are_read_by_name(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.json", result())
    assert [f.name for f in read_all(tmp_path)] == ["a", "b"]
    assert isinstance(read(tmp_path / "a.json"), ResultFile)
    assert all(isinstance(k, Kind) for k in KINDS.values())
