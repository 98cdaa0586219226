"""The head of a result: what a figure is worth nothing without. Every benchmark writes this one."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmopt.spec.schema import SCHEMA

NOT_RECORDED = "not recorded"
KEYS = ("schema", "kind", "date", "commit", "machine", "threads", "dtype", "versions", "command")
DIRTY = "-dirty"
ROOT = Path(__file__).resolve().parents[2]
WRITTEN = ("examples/benchmarks/results", "docs")  # by benchmarks: that these differ makes no tree dirty


def head(
    kind: str, threads: int, dtype: str, gpu: str | None = None, packages: Sequence[str] = ("torch", "onnxruntime")
) -> dict[str, Any]:
    """What a result begins with, under `KEYS`.

    kind: of the result, which tells its other keys. gpu: its name, where one is timed. date: of now, UTC. machine:
    ``{"cpu", "cores"}`` and ``"gpu"``. versions: of Python and of these packages.
    """
    machine: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count()}
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine | ({"gpu": gpu} if gpu else {}),
        "threads": threads,
        "dtype": dtype,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "command": command(),
    }


def commit() -> str:
    """`git rev-parse HEAD` of the checkout that this file belongs to, with `DIRTY` behind it if tracked files differ.

    Where there is no checkout: what MMOPT_COMMIT says, for copies of one on other machines, else `NOT_RECORDED`.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))  # not that of a project around this one
        outputs = [f":(top,exclude){w}" for w in WRITTEN]
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *outputs)
        return git("rev-parse", "HEAD") + DIRTY * bool(dirty)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MMOPT_COMMIT", NOT_RECORDED)


def command() -> str:
    """The command line of this process as one would type it at the root of the checkout."""
    program, words = Path(sys.argv[0]), sys.argv[1:]
    start = ["python", _shown(str(program.resolve()))] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *map(_shown, words)])


def _shown(word: str) -> str:
    """Absolute paths as those of the checkout, or as names: where things lie on a machine is nobody's business."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def cpu_name() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor() or "cpu"
    )


def conditions_text(found: dict[str, Any]) -> str:
    """Machine, threads, dtype and versions of a head, in one line."""
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
    return f"{machine_text(found['machine'])}, {threads}, {_or_said('dtype', found['dtype'])}; {versions}"


def machine_text(machine: dict[str, Any]) -> str:
    cores = machine["cores"]
    found = [
        _or_said("machine", machine["cpu"]),
        _or_said("cores", cores) if cores == NOT_RECORDED else f"{cores} cores",
    ]
    cpu = ", ".join(found[: 1 if machine["cpu"] == cores == NOT_RECORDED else 2])
    return f"{machine['gpu']}; {cpu}" if "gpu" in machine else cpu


def _or_said(what: str, value: str) -> str:
    return f"{what} {value}" if value == NOT_RECORDED else value
