"""What is installed: all packages in the wheel, the runtime without torch, no family's name outside its file."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests/data/mplug_owl2"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that no build folder is left in the repository."""
    import shutil

    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("mmopt", "passes", "exporters", "pyproject.toml", "README.md", "LICENSE"):
        origin = ROOT / name
        shutil.copytree(origin, source / name) if origin.is_dir() else shutil.copy(origin, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def site_without_compiler(site: Path) -> None:
    """A folder that holds just what the base install asks for: links to the packages found here."""
    wanted, seen = ["mmopt"], set()
    while wanted:
        name = wanted.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        seen.add(key)
        dist = importlib.metadata.distribution(name)
        needed = [Requirement(r) for r in dist.requires or []]
        wanted += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
        if key == "mmopt":
            continue
        for top in {Path(str(f)).parts[0] for f in dist.files or [] if not str(f).startswith("..")}:
            origin, link = Path(str(dist.locate_file(top))), site / top
            if origin.exists() and not link.exists():
                link.symlink_to(origin)


def run_isolated(site: Path, code: str, cwd: Path) -> str:
    start = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", start + code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_runs_an_engine_without_torch(wheel, tmp_path):
    import mmopt

    program = mmopt.trace(mmopt.load(CHECKPOINT), batch=1, images=1, context=64)
    mmopt.export(mmopt.optimize(program).program, tmp_path / "engine")
    site = tmp_path / "site"
    site.mkdir()
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
    site_without_compiler(site)
    assert not (site / "torch").exists()
    code = """
import json, mmopt, numpy as np
engine = mmopt.Engine("engine")
pixels = np.linspace(-1, 1, 3 * 56 * 56, dtype=np.float32).reshape(1, 3, 56, 56)
made = engine.debug.generate_ids([[1, 5, -200, 7, 8]], pixel_values=pixels, max_new_tokens=4)
assert "torch" not in sys.modules and "onnx" not in sys.modules
try:
    mmopt.load("x")
except ImportError as e:
    assert "mmopt[compile]" in str(e), e
else:
    raise AssertionError("the compiler cannot be there")
print(json.dumps([list(map(int, t)) for t in made.tokens]))
"""
    tokens = json.loads(run_isolated(site, code, tmp_path))
    import numpy as np
    import torch

    pixels = np.linspace(-1, 1, 3 * 56 * 56, dtype=np.float32).reshape(1, 3, 56, 56)
    expected = program([[1, 5, -200, 7, 8]], torch.from_numpy(pixels), max_new_tokens=4)["tokens"]
    assert tokens == expected


def test_wheel_holds_every_package_and_config(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder, package in (("passes", "mmopt/passes"), ("exporters", "mmopt/exporters"), ("mmopt", "mmopt")):
        for f in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{f.relative_to(ROOT / folder)}" in names
    for f in (ROOT / "mmopt/configs").glob("*.json"):
        assert f"mmopt/configs/{f.name}" in names
    assert not any(n.startswith(("passes", "exporters", "tests")) for n in names)


def test_wheel_imports_passes_and_exporters(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path)
    code = "import mmopt, mmopt.passes, mmopt.exporters; print(mmopt.passes.__file__, mmopt.exporters.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert out == [str(tmp_path / "mmopt/passes/__init__.py"), str(tmp_path / "mmopt/exporters/__init__.py")]


def test_editable_install_imports_passes_and_exporters(tmp_path):
    code = "import mmopt.passes.split_rows, mmopt.exporters.onnx"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_listed_packages_are_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"mmopt"} | {f"mmopt.{p.parent.name}" for p in (ROOT / "mmopt").glob("*/__init__.py")}
    for top in ("passes", "exporters"):
        found.add(f"mmopt.{top}")
        assert not list((ROOT / top).glob("*/__init__.py")), "keep these folders flat"
    assert set(listed) == found


def test_importing_mmopt_does_not_import_torch():
    code = "import sys, mmopt, mmopt.cli; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_families_are_named_in_their_own_file_only():
    names = [p.stem for p in (ROOT / "mmopt/models").glob("*.py") if not p.stem.startswith("_")]
    words = re.compile("|".join(n.replace("_", "[-_ ]?") for n in names), re.IGNORECASE)
    for folder in ("mmopt", "passes", "exporters"):
        for f in (ROOT / folder).rglob("*.py"):
            if (ROOT / "mmopt/models") in f.parents:
                continue
            # the help of --config lists the shipped configs, which bear the names of their families
            found = [line for line in f.read_text().splitlines() if words.search(line) and "mplug-owl2-7b" not in line]
            assert not found, f"{f}: {found}"
