"""What the tests of the compiler share: the tiny recorded checkpoint, traced and optimized once, and snapshots."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tensors of the tests are tiny

DATA = Path(__file__).parent / "data" / "mplug_owl2"


@pytest.fixture(scope="session")
def model():
    from mmopt.checkpoint import load

    return load(DATA)


@pytest.fixture(scope="session")
def program(model):
    """The tiny checkpoint traced for three samples of two images."""
    from mmopt.tracing import trace

    return trace(model, batch=3, images=2, context=64)


@pytest.fixture(scope="session")
def result(program):
    from mmopt.pipeline import optimize

    return optimize(program)


@pytest.fixture
def snapshot():
    """``snapshot(name, text)``: the text must be the one in ``tests/passes/snapshots/``.

    MMOPT_WRITE_SNAPSHOTS=1 writes the files anew: read their diff before you commit it.
    """
    folder = Path(__file__).parent / "passes" / "snapshots"

    def check(name: str, text: str) -> None:
        path = folder / f"{name}.txt"
        if os.environ.get("MMOPT_WRITE_SNAPSHOTS"):
            folder.mkdir(exist_ok=True)
            path.write_text(text + "\n")
        assert path.is_file(), f"{path.name} is not written yet: run with MMOPT_WRITE_SNAPSHOTS=1"
        assert text + "\n" == path.read_text()

    return check
