"""What the tests of the compiler share: the tiny recorded checkpoint, traced and optimized once, and snapshots."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tensors of the tests are tiny

DATA = Path(__file__).parent / "data" / "mplug_owl2"


@pytest.fixture(scope="session")
def model():
    from mmopt.frontend.load import load

    return load(DATA)


@pytest.fixture(scope="session")
def program(model):
    """The tiny checkpoint traced for three samples of two images."""
    from mmopt.frontend.trace import trace

    return trace(model, batch=3, images=2, context=64)


@pytest.fixture(scope="session")
def result(program):
    from mmopt.search.optimize import optimize

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


LONG = (  # of official sizes, or the same again in other words: MMOPT_LONG_TESTS=1 runs them too
    "test_work_of_the_official_sizes[4b",
    "test_work_of_the_official_sizes[9b",
    "test_work_grows_with_the_images_before_the_passes_alone",
    "test_the_official_size_is_optimized_in_time",
    "test_shipped_configs_can_be_traced[janusflow-1.3b]",
    "test_a_changed_mask_is_not_ok[at1]",
    "test_a_changed_mask_is_not_ok[at2]",
    "test_training_depends_on_the_seed_alone",
)


def pytest_collection_modifyitems(items):
    if not os.environ.get("MMOPT_LONG_TESTS"):
        for item in items:
            if any(name in item.nodeid for name in LONG):
                item.add_marker(pytest.mark.skip(reason="takes long; MMOPT_LONG_TESTS=1 runs it"))
