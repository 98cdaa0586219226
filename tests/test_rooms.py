"""The rooms of mmopt: imports run downward, no circle of files, nothing hidden inside a function."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {  # room -> the rooms it may import, besides itself
    "spec": "",
    "report": "spec",
    "processing": "spec",
    "ir": "spec report",
    "runtime": "spec processing",
    "models": "spec processing ir",
    "frontend": "spec ir models",
    "rewrite": "spec report ir",
    "pruning": "spec ir",
    "flow": "spec report processing ir",
    "passes": "spec ir rewrite pruning flow",
    "pipeline": "ir rewrite flow passes",
    "exporters": "spec processing ir rewrite",
}
BELOW["measure"] = BELOW["conformance"] = " ".join(BELOW)
BELOW["search"] = BELOW["conformance"] + " measure"
BELOW["__init__"] = BELOW["cli"] = " ".join(BELOW)

# Imports inside functions: the command line and the package itself start without torch, and a child process imports
# what it measures. Elsewhere only what is heavy and optional, or what an engine that answers in text does not need.
ANYTHING = {"mmopt/cli.py", "mmopt/__init__.py", "mmopt/measure/memory.py"}
LAZY = {
    "mmopt/report.py": {"matplotlib"},
    "mmopt/processing/sentencepiece.py": {"sentencepiece"},
    "mmopt/runtime/image_generation.py": {"rich"},
    "mmopt/runtime/prefix.py": {"safetensors"},
    "mmopt/models/_weight_files.py": {"huggingface_hub"},
    "mmopt/models/_transformers.py": {"transformers"},
    "mmopt/search/trials.py": {"optuna"},
    "exporters/tensorrt.py": {"tensorrt_rtx"},
}
BY_NAME = {"mmopt/__init__.py", "mmopt/models/__init__.py"}  # may import modules by names that stand in strings
ONLY_CLI = "only mmopt/cli.py may take names from the package itself"


def source_files(root: Path) -> dict[str, Path]:
    """Module name -> file. The top-level folders `passes` and `exporters` are installed inside mmopt."""
    found = {}
    for top in ("mmopt", "passes", "exporters"):
        for file in sorted((root / top).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            parts = parts if top == "mmopt" else ("mmopt", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(module: str, file: Path, modules: dict[str, Path]) -> Iterator[tuple[str, ast.stmt | ast.expr]]:
    """The modules that a file imports, wherever the import stands in it; those of mmopt as full names of files."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for n in ast.walk(ast.parse(file.read_text())):
        if isinstance(n, ast.Import):
            yield from ((a.name, n) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            base = n.module or ""
            if n.level:
                base = importlib.util.resolve_name("." * n.level + base, package)
            for a in n.names:
                yield (f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base), n
        elif isinstance(n, ast.Call) and getattr(n.func, "attr", getattr(n.func, "id", "")) == "import_module":
            yield "import_module", n


def violations(root: Path) -> list[str]:
    """What breaks the rules of imports, a line each."""
    modules, wrong = source_files(root), []
    graph: dict[str, set[str]] = {m: set() for m in modules}
    for module, file in modules.items():
        where = str(file.relative_to(root))
        tree = ast.parse(file.read_text())
        inside = {
            n.lineno
            for f in ast.walk(tree)
            if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for n in ast.walk(f)
            if isinstance(n, ast.Import | ast.ImportFrom)
        }
        for name, node in imports_of(module, file, modules):
            line = f"{where}:{node.lineno} -> {name}"
            if name == "import_module":
                if where not in BY_NAME:
                    wrong.append(f"{line}: names of modules must stand in import statements")
                continue
            if getattr(node, "level", 0):
                wrong.append(f"{line}: relative import")
            ours = name == "mmopt" or name.startswith("mmopt.")
            if node.lineno in inside and where not in ANYTHING and name.split(".")[0] not in LAZY.get(where, ()):
                wrong.append(f"{line}: inside a function")
            if not ours:
                continue
            if name == "mmopt":
                if where != "mmopt/cli.py":
                    wrong.append(f"{line}: {ONLY_CLI}")
                continue
            graph[module].add(name)
            room, target = room_of(module), room_of(name)
            if target != room and target not in BELOW[room].split():
                wrong.append(f"{line}: {room} may not import {target}")
    return wrong + [f"circle: {' -> '.join(c)}" for c in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules each of which leads to all others of its set."""
    reach = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for n in graph.get(todo.pop(), ()):
                if n not in seen:
                    seen.add(n)
                    todo.append(n)
        reach[start] = seen
    found = {tuple(sorted(n for n in reach[m] if m in reach.get(n, ()))) for m in graph if m in reach[m]}
    return [list(c) for c in sorted(found)]


def test_imports_run_downward_and_never_round():
    wrong = violations(ROOT)
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------------------------------- what the rules must catch
BROKEN = {  # what a file of the room `ir` says -> what must be found
    "a plain import upward": ("from mmopt.runtime.engine import Engine", "ir may not import runtime"),
    "an import in a function": ("def f():\n    from mmopt.ir import graph", "inside a function"),
    "an upward import for types": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mmopt.search.budget",
        "ir may not import search",
    ),
    "a name of the package": ("from mmopt import Engine", ONLY_CLI),
    "a module of a room, by its package": ("from mmopt.passes import split_rows", "ir may not import passes"),
    "a relative import": ("from . import graph", "relative import"),
    "a name in a string": ("import importlib\nimportlib.import_module('mmopt.cli')", "must stand in import statements"),
    "a circle in one room": ("import mmopt.ir.graph", "circle: mmopt.ir.broken -> mmopt.ir.graph"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_rules_is_found(name, tmp_path):
    said, expected = BROKEN[name]
    files = {"ir/graph.py": "import mmopt.ir.broken" if "circle" in name else "", "ir/broken.py": said}
    for rest in ("runtime/engine", "search/budget", "cli"):
        files[f"{rest}.py"] = ""
    for path, text in files.items():
        (tmp_path / "mmopt" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mmopt" / path).write_text(text)
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "split_rows.py").write_text("")
    assert any(expected in line for line in violations(tmp_path)), violations(tmp_path)


def test_a_right_tree_breaks_no_rule(tmp_path):
    (tmp_path / "mmopt" / "ir").mkdir(parents=True)
    (tmp_path / "mmopt" / "ir" / "graph.py").write_text("import mmopt.spec.prompt\nfrom mmopt.ir import ops")
    (tmp_path / "mmopt" / "ir" / "ops.py").write_text("import torch")
    assert violations(tmp_path) == []


# ---------------------------------------------------------------------------------------------------- names and folders
def test_every_folder_is_a_room_and_every_room_has_a_docstring():
    folders = {p.parent.name for p in (ROOT / "mmopt").glob("*/__init__.py")}
    assert folders | {"passes", "exporters", "report", "pipeline", "cli", "__init__"} == set(BELOW)
    for file in [*(ROOT / "mmopt").glob("*/__init__.py"), ROOT / "passes/__init__.py", ROOT / "exporters/__init__.py"]:
        said = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert "In:" in said, f"{file}: says what comes in and what goes out"
        assert "Out:" in said, f"{file}: says what comes in and what goes out"
    assert len(list((ROOT / "mmopt").glob("*.py"))) <= 5


def test_every_module_says_what_it_is():
    for name, file in source_files(ROOT).items():
        said = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert len(said) > 20, f"{name} has no docstring"


def test_no_public_name_is_that_of_a_room_or_module():
    import mmopt

    modules = {p.stem for p in (ROOT / "mmopt").glob("*.py")} | {p.parent.name for p in (ROOT / "mmopt").glob("*/*.py")}
    assert not modules & set(mmopt.__all__)
    assert not {"passes", "exporters"} & set(mmopt.__all__)
