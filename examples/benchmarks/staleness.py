"""Whether a table is of today's code: what has changed in what it measures since the commit it was made at."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Sequence

from mmopt.measure.head import DIRTY, NOT_RECORDED, ROOT

Log = Callable[[str, Sequence[str]], int | None]
"""``(commit, paths)`` -> how many commits since have changed the paths, None where the history lacks the commit."""

CURRENT, STALE = "**current**", "**stale**"
MARK = re.compile(rf"(?:{re.escape(CURRENT)}|{re.escape(STALE)})(?:: [^.|\n]*[^ .|\n])?")


def git_log(commit: str, paths: Sequence[str]) -> int | None:
    """`git log COMMIT..HEAD -- PATHS`, counted."""
    command = ["git", "log", "--format=%h", f"{commit}..HEAD", "--", *paths]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if found.returncode else len(found.stdout.split())


def mark(commits: Iterable[str], paths: Sequence[str], log: Log = git_log) -> str:
    """The mark of a table whose parts were made at these commits: stale if one of them is, or is not recorded."""
    changed = 0
    for commit in dict.fromkeys(commits):
        if commit == NOT_RECORDED:
            return STALE
        since = log(commit.removesuffix(DIRTY), paths)
        if since is None:
            return f"{STALE}: its commit is not in this history"
        changed = max(changed, since)
    if not changed:
        return CURRENT
    return f"{STALE}: {changed} commit{'s' * (changed > 1)} since changed what it measures"


def without_marks(page: str) -> str:
    """A page with all marks alike: they tell of the history, not of the results."""
    return MARK.sub("**mark**", page)
