"""The command line: options, progress, tables, exit codes."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmopt import cli
from mmopt.cli import ModelOptions, Output, Parts, app, numbers

DATA = Path(__file__).parent / "data"
TINY = ["--config", "mplug-owl2-tiny", "--context", "64"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def main(arguments, capsys):
    """Exit code, stdout and stderr of the entry point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mmopt", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


# -------------------------------------------------------------------------------------------------------------- options
def test_options_of_load():
    assert Parts().load_options() == {}
    given = Parts("lm", "vit.pt", "vae", True, ["vision_heads=12", "vision_act=gelu"]).load_options()
    assert given == {
        "language_model": "lm", "vision": "vit.pt", "vae": "vae", "ln_post": True, "vision_heads": 12,
        "vision_act": "gelu",
    }  # fmt: skip
    with pytest.raises(ValueError, match="--set: expected NAME=VALUE, seen 'vision_heads'"):
        Parts(settings=["vision_heads"]).load_options()


def test_where_the_model_comes_from():
    for options, why in (
        ({}, "CHECKPOINT, --config: expected one of them, seen neither"),
        ({"checkpoint": "a", "config": "b"}, "expected one of them, seen a and b"),
        ({"checkpoint": "a", "random_weights": True}, "--random-weights: expected with --config, seen with a checkpo"),
        (
            {"config": "b", "vae": "x", "settings": ["y=1"]},
            "--vae, --set y: expected with a checkpoint, seen with --co",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            ModelOptions(**options).load(Output(quiet=True))
    tiny = ModelOptions(config="mplug-owl2-tiny")
    assert not tiny.load(Output(quiet=True)).has_weights
    with pytest.raises(ValueError, match="--config: expected with --random-weights"):
        tiny.load(Output(quiet=True), weights=True)
    assert (
        ModelOptions(config="mplug-owl2-tiny", random_weights=True).load(Output(quiet=True), weights=True).has_weights
    )


def test_lists_of_numbers():
    assert numbers("--shots", "1, 4,32") == [1, 4, 32]
    for text in ("", "1,,2", "0", "-1", "a"):
        with pytest.raises(ValueError, match="--shots: expected whole numbers above 0 with commas"):
            numbers("--shots", text)


@pytest.mark.parametrize(
    "command",
    ["inspect", "optimize", "export", "verify", "bench speed", "bench fewshot", "bench images", "bench quality"],
)
def test_every_command_that_loads_takes_parts(command):
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"}).output
    for option in ("--language-model", "--vision", "--vae", "--ln-post", "--set"):
        assert option in shown


def test_parts_are_refused_where_there_is_nothing_to_complete():
    made = run("optimize", DATA / "mplug_owl2", "--set", "vision_heads=2")
    assert "take no such option" in str(made.exception)


def test_the_norm_of_newer_vision_towers():
    """With --ln-post the tokens of that norm fit, and nothing behind them does."""
    where = DATA / "flamingo" / "openflamingo"
    made = run("verify", where, where / "single.safetensors", "--levels", "model", "--ln-post", "--json")
    assert type(made.exception).__name__ == "FailedError"
    rows = {r["output"]: r["ok"] for r in json.loads(made.stdout)["rows"]}
    assert rows["act.vit.tokens_ln_post"]
    assert not rows["logits"]


# ----------------------------------------------------------------------------------------------------------- exit codes
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    for arguments, why in (
        (["inspect"], "CHECKPOINT, --config: expected one of them, seen neither"),
        (["inspect", "--batch", "0", *TINY], "'--batch': Input should be greater than or equal to 1, seen '0'"),
        (["inspect", "--batch=x", *TINY], "'--batch': Input should be a valid integer"),
        (["inspect", "--nonsense", *TINY], "No such option: --nonsense"),
        (["inspect", tmp_path / "none"], "none"),
        (["run"], "Missing argument 'engine'"),
        (["optimize", *TINY, "--plan", "none.json"], "'--plan': path 'none.json' does not exist"),
        (
            ["verify", "x", __file__, "--levels", "[engin]"],
            "--levels: expected some of model,program,optimized,engine, seen '[",
        ),
        (["bench", "speed", *TINY], "--config: expected with --random-weights"),
        (["bench", "fewshot", "--config", "openflamingo-tiny", "--shots", "a"], "--shots: expected whole numbers"),
        (["bench", "speed", "--config", "openflamingo-tiny", "--random-weights"], "use `mmopt bench fewshot`"),
    ):
        code, out, err = main(arguments, capsys)
        assert (code, out) == (2, ""), arguments
        said = [line for line in err.splitlines() if not line.startswith("load ")]
        assert len(said) == 1, err
        assert said[0].startswith("error: ")
        assert why in said[0]


def test_a_check_that_does_not_hold_is_exit_code_1(capsys):
    where = DATA / "flamingo" / "openflamingo"
    code, out, _ = main(["verify", where, where / "single.safetensors", "--levels", "model", "--ln-post"], capsys)
    assert code == 1
    assert "NOT OK" in out


def test_help_is_exit_code_0_and_no_command_is_2(capsys):
    assert main(["bench", "--help"], capsys)[0] == 0
    code, out, err = main(["bench"], capsys)
    assert (code, "fewshot" in out + err) == (2, True)


# ------------------------------------------------------------------------------------------------------------- progress
@pytest.fixture(scope="module")
def optimized():
    return run("optimize", *TINY, "--json")


def test_stages_are_told_on_stderr(optimized):
    told = optimized.stderr.splitlines()
    assert told[0] == "load mplug-owl2-tiny"
    assert "trace: stage language_model" in told
    passes = [p["name"] for p in json.loads(optimized.stdout)["passes"]]
    assert [t.removeprefix("pass ") for t in told if t.startswith("pass ")] == passes


def test_a_counter_is_shown_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 3.0, 13.5, 14.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    output = Output()
    for text in ("round 1 of 9", "round 2 of 9", "check", "round 3 of 9", "round 4 of 9", "round 5 of 9"):
        output.progress(text)
    assert capsys.readouterr().err.splitlines() == ["round 1 of 9", "check", "round 3 of 9", "round 4 of 9"]


# ---------------------------------------------------------------------------------------------------- tables of passes
def test_optimize_shows_a_table_and_reasons_when_asked(tmp_path):
    made = run("optimize", *TINY, "-v", "--quiet", "--out", tmp_path / "graphs.txt")
    assert made.stderr == ""
    assert "leaves out results that nothing reads" in made.stdout
    assert "total: " in made.stdout
    assert "not checked: shapes only, no weights" in made.stdout
    assert "  left  embed: no operator depends on weights alone" in made.stdout
    assert "language_model" in (tmp_path / "graphs.txt").read_text()
    assert [f.name for f in tmp_path.iterdir()] == ["graphs.txt"]


def test_optimize_as_json_holds_costs_and_refusals(optimized):
    facts = json.loads(optimized.stdout)
    first, last = facts["passes"][0], facts["passes"][-1]
    assert first["name"] == "drop_unread_rows"
    assert any(p["skipped"] for p in facts["passes"])
    assert facts["total"] == {"before": first["before"], "after": last["after"]}
    assert first["after"]["flops"] < first["before"]["flops"]
    assert facts["total"]["after"]["weight_bytes"] < facts["total"]["before"]["weight_bytes"]


def test_inspect_lists_prune_sites():
    made = run("inspect", *TINY, "--prune-sites", "--json")
    report = json.loads(made.stdout)
    assert {"pixels", "vision"} <= {s["site"] for s in report["prune_sites"]}
    assert report["totals"]["prefill_flops"] > 0


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "engine"
    made = run("export", DATA / "mplug_owl2", out, "--context", "64")
    assert made.exit_code == 0, made.output
    return out, made


def test_export_shows_passes_and_stages(engine):
    out, made = engine
    assert "graph of language_model" in made.stderr
    assert "packs projections of one input together" in made.stdout
    assert "  left  " not in made.stdout
    assert f"wrote {out}" in made.stdout
    stored = json.loads((out / "program.json").read_text())["reports"]
    assert stored[0]["name"] == "drop_unread_rows"


def test_export_of_the_program_as_traced(tmp_path):
    made = run("export", DATA / "mplug_owl2", tmp_path / "engine", "--context", "64", "--no-optimize", "--json")
    facts = json.loads(made.stdout)
    assert facts["passes"] == []
    assert facts["total"]["before"] == facts["total"]["after"]
    assert facts["engine"] == str(tmp_path / "engine")
