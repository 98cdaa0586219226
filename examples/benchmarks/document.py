"""The page of benchmarks, from the files of results and what is written by hand.

python examples/benchmarks/document.py            # writes docs/benchmarks.md
python examples/benchmarks/document.py --check    # exit code 1 if that says anything else, marks apart
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from cells import roof, table
from kinds import KINDS, Kind
from result_files import RESULTS, ResultFile, read_all
from staleness import Log, git_log, mark, without_marks

from mmopt.measure.head import DIRTY, KEYS, NOT_RECORDED, ROOT, conditions_text, machine_text
from mmopt.report import number

PAGE, BY_HAND = ROOT / "docs/benchmarks.md", ROOT / "docs/_benchmarks_by_hand.md"
TOP = """\
<!-- Written by examples/benchmarks/document.py: change that, the results, or docs/_benchmarks_by_hand.md instead. -->

# Benchmarks

What was measured, by which command, on which machine, at which commit. Slow-downs stand here like gains. Times of
different sections do not compare: machines differ, and so does what else they were doing. Within a section they do:
what is compared was timed in the same interleaved rounds.

A table is **stale** if a commit since has changed what it measures (`git log COMMIT..HEAD`, for the paths that stand
with it), as of the day this page was written. **Everything measured before the source moved to rooms counts as stale**:
those files record neither date nor commit; where cores are not recorded there were 2, without a GPU; those on AMD EPYC
are of engines whose threads went on spinning (see [threads-cpu](#threads-cpu)), and engines are faster now. Their
commands are given as one types them today.

Where a file has the rates of the machine, measured in the same rounds, they stand with it, and tables give the share of
that roof beside the ratio: FLOPs over time as a share of the GEMM rate, or bytes of weights and caches over time as a
share of the memory's.

`python examples/benchmarks/document.py` writes this page. A table is made again by its own command, with `--out` or, of
`mmopt bench`, with `--json` into the file.
"""


def page(files: Sequence[ResultFile], by_hand: str, log: Log = git_log) -> str:
    """The page as text. Raises ValueError that names the file of a kind that is not known or lacks what is shown."""
    if unknown := [f for f in files if f.kind not in KINDS]:
        raise ValueError(f"{unknown[0].name}.json: kind {unknown[0].kind!r}, expected one of {', '.join(KINDS)}")
    contents, sections = [], []
    for name, kind in KINDS.items():
        own = [f for f in files if f.kind == name]
        sections += [f"## {kind.title}", "", *wrap(kind.text, 118, break_on_hyphens=False), ""] if own else []
        for file in own:
            heads = list(file.runs.values())
            state = mark((h["commit"] for h in heads), kind.paths, log)
            machine = "; ".join(once(machine_text(h["machine"]) for h in heads))
            contents.append([f"[{file.name}](#{file.name})", kind.title, machine, dates(heads), state])
            sections += [f"### {file.name}", "", *facts(file, kind, state), *shown(file, kind)]
    return "\n".join([TOP, *table(["results", "", "machine", "date", "code"], contents), *sections, by_hand])


def shown(file: ResultFile, kind: Kind) -> list[str]:
    """The tables of a file."""
    try:
        return kind.write(file.runs)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"{file.name}.json: not a result of kind {file.kind!r}: {type(e).__name__}: {e}") from e


def facts(file: ResultFile, kind: Kind, state: str) -> list[str]:
    """How a file was measured, each thing once where its runs agree."""
    heads = list(file.runs.values())
    lines = [f"- {line}" for line in once(map(conditions_text, heads))]
    made = f"date {dates(heads)}, commit {', '.join(once(commit(h['commit']) for h in heads))}"
    lines += [f"- {made}; {state}. Measures {', '.join(f'`{p}`' for p in kind.paths)}."]
    sizes = {config: sizes_of(run) for config, run in file.runs.items()}
    lines += [f"- {f'`{config}`: ' if config else ''}{found}" for config, found in sizes.items() if found]
    if limits := [x for h in heads for x in limits_of(h)]:
        lines += [f"- At best in the same rounds: {roof(limits)}."]
    links = [f"[all figures]({link(f'{file.name}.json')})"]
    for ending, what in (("", "plot"), ("-times", "plot over time")):
        if (RESULTS / f"{file.name}{ending}.png").is_file():
            links.append(f"[{what}]({link(f'{file.name}{ending}.png')})")
    return [*lines, f"- {', '.join(links)}", "", "```", *once(h["command"] for h in heads), "```", ""]


def sizes_of(run: dict[str, Any]) -> str:
    """All single figures of a run: of the model, of the prompt, how often it was timed."""
    found = {k: x for k, x in (run | run.get("sizes", {})).items() if k not in KEYS and type(x) in (int, float)}
    return ", ".join(f"{k.replace('_', ' ')} {number(x) if k == 'parameters' else f'{x:g}'}" for k, x in found.items())


def limits_of(run: dict[str, Any]) -> list[dict[str, float]]:
    """The limits of the machine in each group of rounds."""
    found = run.get("limits", {})
    return [found] if "gemm_gflop_per_s" in found else [x for x in found.values() if x]


def commit(name: str) -> str:
    if name == NOT_RECORDED:
        return name
    return f"`{name.removesuffix(DIRTY)[:12]}`" + " with changes of its own" * name.endswith(DIRTY)


def dates(heads: Sequence[dict[str, Any]]) -> str:
    return ", ".join(once(h["date"].split("T")[0] for h in heads))


def once(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def link(name: str) -> str:
    return f"../{RESULTS.relative_to(ROOT)}/{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    a = parser.parse_args()
    made = page(read_all(), BY_HAND.read_text())
    if not a.check:
        PAGE.write_text(made)
    elif without_marks(made) != without_marks(PAGE.read_text()):
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what the results say: run {Path(__file__).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
