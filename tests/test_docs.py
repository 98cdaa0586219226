"""README and docs: every block that can run is run, page by page, and prints what the page says that it prints.

```sh and ```console are commands, ```python is Python; blocks that cannot run here have another info string (```text).
A Python block whose first line is a file name in a comment is saved as that file. What a page promises is checked:
``# -> text`` after a Python statement, and the lines below a ``$ command`` of a console block.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmopt
import mmopt.models
from mmopt.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("[!_]*.md"))]
LEAST = {  # blocks that a page must run; the others explain
    "README.md": 4,
    "add_a_family.md": 3,
    "add_a_pass.md": 4,
    "add_a_target.md": 3,
    "engine.md": 6,
    "image_generation.md": 4,
    "passes.md": 2,
    "verification.md": 4,
    "visual_tokens.md": 4,
}
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(info string, text, line) of each block that is run."""
    text = page.read_text(encoding="utf-8")
    found = [(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in FENCE.finditer(text)]
    return [b for b in found if b[0] in ("sh", "bash", "console", "python")]


# ------------------------------------------------------------------------------------------------------ shared work
class Shared:
    """`load`, `trace`, `optimize` and `export` with the same arguments are done once, however many pages ask for it."""

    def __init__(self, folder: Path):
        self.folder, self.done = folder, {}
        self.load, self.trace, self.optimize, self.export = mmopt.load, mmopt.trace, mmopt.optimize, mmopt.export

    def once(self, name, args, options, key=None):
        key = (name, *map(str, args), *sorted(options.items())) if key is None else key
        if key not in self.done:
            self.done[key] = getattr(self, name)(*args, **options), args  # args too: an id() stands in the key
        return self.done[key][0]

    def once_load(self, path, dtype=None, **options):
        if not str(path).startswith("examples"):  # what a page wrote may change
            return self.load(path, dtype, **options)
        return self.once("load", (path, dtype), options)

    def once_trace(self, model, batch=1, images=1, context=None, progress=None):
        return self.once("trace", (model, batch, images, context), {}, ("trace", id(model), batch, images, context))

    def once_optimize(self, program, passes=None, check=None, observers=(), budget=None, prompts=()):
        if passes is not None or budget is not None or observers:
            return self.optimize(program, passes, check, observers, budget, prompts)
        return self.once("optimize", (program,), {"check": check}, ("optimize", id(program), check))

    def once_export(self, program, out, target="onnx", dtype=None, weights="copy", reports=(), **options):
        if target != "onnx":  # its rules may be other ones by now
            return self.export(program, out, target, dtype, weights, reports, **options)
        key = ("export", id(program), str(dtype), weights)
        if key not in self.done:
            kept = self.folder / f"engine-{len(self.done)}"
            self.done[key] = self.export(program, kept, target, dtype, weights, reports, **options), program
        shutil.copytree(self.done[key][0], out, dirs_exist_ok=True)
        return Path(out)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def folder(tmp_path, monkeypatch, shared):
    """An empty folder with `examples` and `tests/data` of the repository in it, as the working directory."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/data").symlink_to(ROOT / "tests/data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    for name in ("MODULES", "__path__"):  # a page adds to them
        monkeypatch.setattr(mmopt.models, name, list(getattr(mmopt.models, name)))
    for name in ("load", "trace", "optimize", "export"):
        monkeypatch.setattr(mmopt, name, getattr(shared, f"once_{name}"))
    return tmp_path


# -------------------------------------------------------------------------------------------------------- the blocks
def promised(printed: str, expected: list[str], where: str) -> None:
    """Each expected line was printed, in this order."""
    lines = iter(printed.splitlines())
    for line in expected:
        if line.strip() not in ("", "..."):
            assert any(line.strip() in p for p in lines), (
                f"{where}: {line!r} was not printed (then); it printed\n{printed}"
            )


def command(line: str, where: str) -> str:
    """Run one command, ours in this process."""
    words = shlex.split(line, comments=True)
    if words[0] != "mmopt" or any(w in ("|", ">", "&&", ";") for w in words):
        done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True)
        assert done.returncode == 0, f"{where}: {line}\n{done.stdout}{done.stderr}"
        return done.stdout
    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, None
    sys.argv = words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = before
    assert not code, f"{where}: {line} ends with {code}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def run_commands(text: str, where: str, console: bool) -> None:
    text, printed, expected = text.replace("\\\n", " "), "", []
    for line in [*text.splitlines(), "$ true" if console else ""]:
        if console and not line.startswith("$ "):
            expected.append(line)
            continue
        promised(printed, expected, where)
        printed, expected = "", []
        if shlex.split(line.removeprefix("$ "), comments=True):
            printed = command(line.removeprefix("$ "), where)


def run_python(text: str, where: str, line: int, names: dict, folder: Path) -> None:
    if file := re.match(r"# ([\w/]+\.py)\n", text):
        path = folder / file[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        return
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * line + text, where, "exec"), names)
    promised(out.getvalue(), re.findall(r"# -> (.*)", text), where)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_runs(page, folder):
    found, names, modules = blocks(page), {"__name__": "page"}, set(sys.modules)
    assert len(found) >= LEAST.get(page.name, 0), f"{page.name} runs {len(found)} blocks"
    try:
        for kind, text, line in found:
            where = f"{page.name}:{line}"
            if kind == "python":
                run_python(text, where, line, names, folder)
            else:
                run_commands(text, where, kind == "console")
    finally:
        for name in set(sys.modules) - modules:  # those that the page wrote
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    missing = [t for t in links if t and not (page.parent / t).exists()]
    assert not missing, f"{page.name}: {missing}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_a_broken_promise_is_noticed(folder):
    for run in (
        lambda: run_python("print(2)  # -> 3\n", "here", 0, {}, folder),
        lambda: run_commands("$ echo 2\n3\n", "here", console=True),
        lambda: run_commands("mmopt inspect --config nothing\n", "here", console=False),
    ):
        with pytest.raises(AssertionError, match="here"):
            run()
