"""Prints the tests of rooms that were changed, and of rooms that may import them: ``python tests/changed.py [COMMIT]``.

Changed is what differs from a commit (by default where the branch left main) or is not committed yet. A file that
belongs to no room changes everything.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from test_rooms import BELOW

ROOT = Path(__file__).parents[1]
MODULES = {"report": "ir", "pipeline": "test_pipeline.py", "cli": "test_cli.py", "__init__": "test_layout.py"}
ALWAYS = ("test_rooms.py", "test_words.py", "test_layout.py")
QUIET = ("docs/", "examples/benchmarks/results/", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")


def git(*words: str) -> list[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


def rooms_of(files: Iterable[str]) -> set[str] | None:
    """Rooms that files belong to; None if one belongs to none (a helper of the tests, the build)."""
    found = set()
    for file in files:
        top, _, rest = file.partition("/")
        room = top if top in ("passes", "exporters", "examples") else rest.partition("/")[0].removesuffix(".py")
        if file.startswith(QUIET):
            continue
        if top not in ("mmopt", "passes", "exporters", "examples", "tests") or room not in {*BELOW, "examples"}:
            if top == "tests" and (ROOT / file).name.startswith("test_") and "/" not in rest:
                continue  # it runs itself, see `tests_of`
            return None
        found.add(room)
    return found


def tests_of(files: list[str]) -> list[str]:
    """Paths below tests/ to run for changed files."""
    rooms = rooms_of(files)
    if rooms is None:
        return ["."]
    above = {r for r, below in BELOW.items() if rooms & set(below.split())} | rooms
    paths = {MODULES.get(r, r) for r in above} | set(ALWAYS)
    paths |= {f.removeprefix("tests/") for f in files if f.startswith("tests/test_")}
    return sorted(p for p in paths if (ROOT / "tests" / p).exists())


def main() -> None:
    since = sys.argv[1] if len(sys.argv) > 1 else (git("merge-base", "HEAD", "origin/main") or ["HEAD"])[0]
    files = {*git("diff", "--name-only", since), *git("ls-files", "--others", "--exclude-standard")}
    print(*(f"tests/{p}" for p in tests_of(sorted(files))))


if __name__ == "__main__":
    main()
