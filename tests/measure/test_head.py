"""The head of a result: each benchmark's is the same, and it tells which code was timed."""

import subprocess
import sys

import pytest

from mmopt.measure import head as module
from mmopt.measure.head import KEYS, NOT_RECORDED, ROOT, command, commit, conditions_text, head


def git(folder, *words):
    by = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *by, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository that seems to be the one this code lies in."""
    root = tmp_path / "root"
    own, results = root / "mmopt/measure/head.py", root / "examples/benchmarks/results/a.json"
    for file in (own, results):
        file.parent.mkdir(parents=True)
        file.write_text("first")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    monkeypatch.delenv("MMOPT_COMMIT", raising=False)
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "__file__", str(own))
    return root


def test_a_head_has_all_keys():
    found = head("kind of it", 3, "float32", packages=["numpy"])
    assert tuple(found) == KEYS
    assert (found["schema"], found["kind"], found["threads"], found["dtype"]) == (2, "kind of it", 3, "float32")
    assert found["date"].endswith("+00:00")
    assert found["machine"].keys() == {"cpu", "cores"}
    assert found["versions"].keys() == {"python", "numpy"}
    assert head("k", 1, "bfloat16", gpu="a GPU")["machine"]["gpu"] == "a GPU"


def test_changed_code_makes_a_commit_dirty_and_results_do_not(checkout):
    at = git(checkout, "rev-parse", "HEAD")
    assert commit() == at
    (checkout / "examples/benchmarks/results/a.json").write_text("second")
    (checkout / "new.txt").write_text("in no commit")
    assert commit() == at
    (checkout / "mmopt/measure/head.py").write_text("second")
    assert commit() == f"{at}-dirty"


def test_no_commit_is_made_up(checkout, monkeypatch):
    """Code that is not part of the checkout around it has no commit there."""
    git(checkout, "rm", "-q", "--cached", "mmopt/measure/head.py")
    assert commit() == NOT_RECORDED
    monkeypatch.setenv("MMOPT_COMMIT", "abc-dirty")
    assert commit() == "abc-dirty"


def test_commands_can_be_typed_and_tell_of_no_folders(monkeypatch, tmp_path):
    script = str(ROOT / "examples/benchmarks/threads.py")
    monkeypatch.setattr(sys, "argv", [script, "a b", "--out", str(tmp_path / "x.json"), f"{ROOT}/docs/y.json"])
    assert command() == "python examples/benchmarks/threads.py 'a b' --out x.json docs/y.json"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mmopt", "bench", "--config", "some"])
    assert command() == "mmopt bench --config some"


def test_conditions_in_words():
    found = {"machine": {"cpu": "CPU", "cores": 2}, "threads": 1, "dtype": "float32", "versions": {"torch": "2"}}
    assert conditions_text(found) == "CPU, 2 cores, 1 thread, float32; torch 2"
    found["machine"] = {"cpu": "CPU", "cores": NOT_RECORDED, "gpu": "GPU"}
    assert conditions_text(found).startswith("GPU; CPU, cores not recorded, 1")
    found |= {"machine": {"cpu": NOT_RECORDED, "cores": NOT_RECORDED}, "dtype": NOT_RECORDED}
    assert conditions_text(found) == "machine not recorded, 1 thread, dtype not recorded; torch 2"
