"""Which tests `make check` runs."""

import pytest
from changed import tests_of as chosen


@pytest.mark.parametrize(
    ("files", "runs", "runs_not"),
    [
        (["mmopt/search/budget.py"], {"search", "test_cli.py"}, {"ir", "runtime", "passes"}),
        (["mmopt/spec/prompt.py"], {"spec", "ir", "runtime", "passes", "exporters", "search"}, set()),
        (["passes/split_rows.py"], {"passes", "test_pipeline.py", "measure"}, {"ir", "pruning", "exporters"}),
        (["tests/measure/test_task.py"], {"measure", "search"}, {"ir"}),
        (["docs/passes.md", "README.md"], {"test_rooms.py"}, {"ir", "runtime"}),
        (["tests/test_pipeline.py"], {"test_pipeline.py"}, {"passes"}),
    ],
)
def test_rooms_that_may_import_what_changed(files, runs, runs_not):
    found = set(chosen(files))
    assert runs <= found
    assert not runs_not & found


@pytest.mark.parametrize("file", ["pyproject.toml", "tests/toys.py", "tests/conftest.py", "tests/data/x.json"])
def test_what_belongs_to_no_room_changes_everything(file):
    assert chosen([file]) == ["."]
