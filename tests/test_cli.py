"""The command line: options that several commands share."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmopt.cli import app, parts

DATA = Path(__file__).parent / "data"
FLAMINGO = DATA / "flamingo" / "openflamingo"


def test_options_of_load():
    assert parts(None, None, None, False, None) == {}
    given = parts("lm", "vit.pt", "vae", True, ["vision_heads=12", "vision_act=gelu"])
    assert given == {
        "language_model": "lm", "vision": "vit.pt", "vae": "vae", "ln_post": True, "vision_heads": 12,
        "vision_act": "gelu",
    }  # fmt: skip
    with pytest.raises(ValueError, match="--set vision_heads: expected NAME=VALUE"):
        parts(None, None, None, False, ["vision_heads"])


@pytest.mark.parametrize("command", ["inspect", "optimize", "export", "verify", "bench"])
def test_every_command_that_loads_takes_parts(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for option in ("--language-model", "--vision", "--vae", "--ln-post", "--set"):
        assert option in shown


def test_parts_are_refused_where_there_is_nothing_to_complete():
    made = CliRunner().invoke(app, ["optimize", str(DATA / "mplug_owl2"), "--set", "vision_heads=2"])
    assert "take no such option" in str(made.exception)
    made = CliRunner().invoke(app, ["inspect", "--config", "openflamingo-tiny", "--language-model", "x"])
    assert "only for a checkpoint" in str(made.exception)


def test_the_norm_of_newer_vision_towers():
    """With --ln-post the rows of that norm fit, and nothing behind them does."""
    case = str(FLAMINGO / "single.safetensors")
    made = CliRunner().invoke(app, ["verify", str(FLAMINGO), case, "--at", "model", "--ln-post", "--json"])
    assert made.exit_code == 1 or type(made.exception).__name__ == "FailedError"
    import json

    rows = {r["output"]: r["ok"] for r in json.loads(made.output)["rows"]}
    assert rows["act.vit.tokens_ln_post"]
    assert not rows["logits"]
