"""The command line: mmopt inspect | optimize | export | run | paint | prefix | verify | bench.

Exit codes: 0 all is well, 1 a check did not hold, 2 wrong use or bad input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional, cast

import typer
from rich.console import Console

app = typer.Typer(
    help="A compiler for multimodal models: load, optimize, export, run, verify, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False)

CheckpointArgument = Annotated[
    Optional[str], typer.Argument(help="A checkpoint directory in its official layout, or a hub id.")
]
ConfigOption = Annotated[
    Optional[str],
    typer.Option(
        "--config", help="Instead of a checkpoint: a shipped config (mplug-owl2-7b, -mid, -tiny) or a config.json."
    ),
]
BatchOption = Annotated[int, typer.Option(help="Samples at once, at most.", min=1)]
ImagesOption = Annotated[int, typer.Option(help="Images of one prompt, at most.", min=0)]
ContextOption = Annotated[
    Optional[int],
    typer.Option(help="Rows of one sequence (prompt, images, answer), at most. [default: 512 or less]", min=1),
]
DtypeOption = Annotated[Optional[str], typer.Option(help="float32, float16 or bfloat16. [default: as stored]")]
ShotsOption = Annotated[
    Optional[int],
    typer.Option(help="A few-shot prompt of so many examples and a query, 20 rows of text and an image each.", min=0),
]
LanguageOption = Annotated[
    Optional[str],
    typer.Option("--language-model", help="Directory or hub id of the stock language model, if CHECKPOINT lacks it."),
]
VisionOption = Annotated[
    Optional[str],
    typer.Option("--vision", help="Directory, file or hub id of the stock vision tower, if CHECKPOINT lacks it."),
]
VaeOption = Annotated[
    Optional[str],
    typer.Option("--vae", help="Directory or hub id of the autoencoder that makes pictures, if CHECKPOINT lacks it."),
]
LnPostOption = Annotated[
    bool,
    typer.Option("--ln-post", help="The vision tower's last norm on all its rows, as newer open_clip does."),
]
SetOption = Annotated[
    Optional[list[str]],
    typer.Option("--set", metavar="NAME=VALUE", help="What the files do not tell (vision_heads=12); may be repeated."),
]
PlanOption = Annotated[
    Optional[Path],
    typer.Option("--plan", help="Apply a plan too: a file of `mmopt optimize --plan-out`, or an engine made with one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


class FailedError(Exception):
    """A check that did not hold: exit code 1."""


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal, silence elsewhere; the yielded function says what is being done now."""
    if not errors.is_terminal:
        yield lambda now: None
        return
    with errors.status(text) as status:
        yield lambda now: status.update(f"{text}: {now}")


def parts(
    language_model: str | None, vision: str | None, vae: str | None, ln_post: bool, more: list[str] | None
) -> dict[str, Any]:
    """Options of `load` that were given."""
    given = {"language_model": language_model, "vision": vision, "vae": vae, "ln_post": ln_post or None}
    for option in more or []:
        name, found, value = option.partition("=")
        if not found:
            raise ValueError(f"--set {option}: expected NAME=VALUE")
        given[name] = int(value) if value.lstrip("-").isdigit() else value  # type: ignore[assignment]
    return {k: v for k, v in given.items() if v is not None}


def get_model(
    checkpoint: str | None, config: str | None, dtype: str | None, options: dict[str, Any], random: bool = False
) -> Any:
    import mmopt

    if (checkpoint is None) == (config is None):
        raise ValueError("give either a checkpoint or --config")
    if checkpoint is not None:
        return mmopt.load(checkpoint, dtype, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: only for a checkpoint, --config needs no files")
    assert config is not None
    return mmopt.from_config(config, dtype, random=random)


def score_of(
    place: str | None,
    task: Path,
    limit: int | None,
    threads: int,
    dtype: str | None,
    context: int | None,
    options: dict[str, Any],
) -> Any:
    """How well an engine directory, or a checkpoint in plain PyTorch, does in a task."""
    import mmopt

    if place is None:
        raise ValueError("--quality needs an engine directory or a checkpoint")
    questions = mmopt.Task.load(task)
    if (Path(place) / "program.json").is_file():
        return mmopt.quality(mmopt.Engine(place, threads=threads), questions, limit, progress=errors.is_terminal)
    import torch

    torch.set_num_threads(threads)
    images = max(len(s.images) for s in questions.samples)
    program = mmopt.trace(get_model(place, None, dtype, options), 1, images, context)
    return mmopt.quality(program, questions, limit, progress=errors.is_terminal)


def show(data: dict, text: str, as_json: bool) -> None:
    print(json.dumps(data, indent=1) if as_json else text)


@app.command()
def inspect(
    checkpoint: CheckpointArgument = None,
    config: ConfigOption = None,
    optimized: Annotated[bool, typer.Option("--optimized", help="After the exact passes.")] = False,
    batch: BatchOption = 1,
    images: ImagesOption = 1,
    shots: ShotsOption = None,
    prompt_length: Annotated[
        Optional[int], typer.Option("--prompt-length", help="Ids of a prompt to paint. [default: 32]", min=2)
    ] = None,
    steps: Annotated[Optional[int], typer.Option(help="Guided steps of a painting. [default: 30]", min=1)] = None,
    context: ContextOption = None,
    dtype: DtypeOption = None,
    language_model: LanguageOption = None,
    vision: VisionOption = None,
    vae: VaeOption = None,
    ln_post: LnPostOption = False,
    more: SetOption = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="Print every node of every stage too.")] = False,
    places: Annotated[
        bool, typer.Option("--places", help="Only where rows of images can be left out, and what that would save.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the stages of a model: operators, FLOPs, weights read, the schedule. Needs no weights with --config."""
    import mmopt

    if places and (optimized or graphs or prompt_length or steps):
        raise ValueError("--places counts a model as it is traced; it takes none of the other options of what to show")

    with progress("inspecting") as now:
        now("tracing")
        if shots is not None:
            from mmopt.ir.inspect import SHOT

            images = shots + 1
            context = SHOT * images + 64 if context is None else context
        model = get_model(checkpoint, config, dtype, parts(language_model, vision, vae, ln_post, more))
        if prompt_length is not None and model.family.flow is not None and context is None:
            context = prompt_length + model.family.flow(model.config).rows
        program = mmopt.trace(model, batch, images, context)
        if places:
            from mmopt.pruning.savings import savings_text, site_savings

            now("counting")
            found = site_savings(program)
            show({"places": found}, savings_text(found), as_json)
            return
        reports: list = []
        if optimized:
            now("optimizing")
            result = mmopt.optimize(program, check=False)
            program, reports = result.program, result.reports
        sizes = {} if prompt_length is None else {"prompt_length": prompt_length}
        report = mmopt.inspect(program, reports, batch=batch, images=images, steps=steps, **sizes)
    from mmopt.ir.inspect import text

    show(report, text(report) + (f"\n\n{program}" if graphs else ""), as_json)


@app.command()
def optimize(
    checkpoint: CheckpointArgument = None,
    config: ConfigOption = None,
    batch: BatchOption = 1,
    images: ImagesOption = 1,
    context: ContextOption = None,
    dtype: DtypeOption = None,
    check: Annotated[
        Optional[bool],
        typer.Option("--check/--no-check", help="Compare before and after each pass. [default: where affordable]"),
    ] = None,
    language_model: LanguageOption = None,
    vision: VisionOption = None,
    vae: VaeOption = None,
    ln_post: LnPostOption = False,
    more: SetOption = None,
    plan: PlanOption = None,
    quality: Annotated[
        Optional[Path],
        typer.Option(help="Search for the cheapest compression that keeps the quality on a task, a JSONL file."),
    ] = None,
    drop: Annotated[
        Optional[float], typer.Option(help="How far the mean score may fall. [default: 0.01]", min=0.0, max=1.0)
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="So many of the task's samples, always the same.", min=1)] = None,
    trials: Annotated[Optional[int], typer.Option(help="Plans to measure. [default: 30]", min=1)] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of the search. [default: 0]", min=0)] = None,
    store: Annotated[Optional[Path], typer.Option(help="Keep the trials in this file, to go on from there.")] = None,
    drift: Annotated[
        Optional[float],
        typer.Option(help="Paint in the fewest steps whose latents drift by so much of their size, in the mean."),
    ] = None,
    prompts: Annotated[
        Optional[Path],
        typer.Option(help="For --drift: a text file of prompts like those to be painted, one in a line."),
    ] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw quality over cost to this PNG file.")] = None,
    plan_out: Annotated[Optional[Path], typer.Option("--plan-out", help="Write the plan found to this file.")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Write the optimized graphs as text to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the exact passes and report what each did, where, and what it left alone. `export` does this too."""
    import mmopt

    given: dict[str, Any] = {"drop": drop, "limit": limit, "trials": trials, "seed": seed, "store": store}
    given = {k: v for k, v in given.items() if v is not None}
    written = {"--plot": plot, "--plan-out": plan_out}
    alone = [f"--{k}" for k in given] + ["--plot"] * (plot is not None)
    if quality is None and alone:
        raise ValueError(f"{', '.join(alone)}: only for a search, with --quality")
    if (drift is None) != (prompts is None):
        raise ValueError("--drift and --prompts belong together: give both or neither")
    if quality is None and drift is None and plan_out is not None:
        raise ValueError("--plan-out: only for a search, with --quality or --drift")
    if plan is not None and (quality is not None or drift is not None):
        raise ValueError("--quality and --drift search for a plan and --plan gives one: give one of them")
    if plot is not None:
        from mmopt.report import png_figure

        png_figure(plot, (1, 1))  # before the search, not after it
    steps = read_steps(plan)
    if prompts is not None:
        from mmopt.flow.fit_program import read_prompts

        texts = read_prompts(prompts)
    for option, path in written.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no such directory")
    with progress("optimizing") as now:
        flow = None if drift is None else mmopt.Drift(mean=drift)
        budget: Any = flow
        if quality is not None:
            from mmopt.search.budget import Quality

            budget = Quality(mmopt.Task.load(quality), flow=flow, **given)
            images = max(images, *(len(s.images) for s in budget.task.samples))
        now("tracing")
        model = get_model(checkpoint, config, dtype, parts(language_model, vision, vae, ln_post, more))
        program = mmopt.trace(model, batch, images, context)
        options: dict[str, Any] = {"check": check, "observers": [lambda name, report: now(name)]}
        if drift is not None:
            options["prompts"] = texts
        result = optimized(program, steps, budget, **options)
    if out is not None:
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(str(result.program) + "\n")
        temporary.rename(out)
    facts: dict[str, Any] = {"reports": [vars(r) for r in result.reports]}
    text = str(result)
    if quality is not None:
        search = result.search
        facts, text = facts | {"search": search.to_json()}, f"{text}\n{search.text()}"
        if plot is not None:
            search.plot(plot)
    if plan_out is not None:
        from mmopt.search.plan import save_plan

        save_plan(result.program.info.plan, plan_out)
    show(facts, text, as_json)


def read_steps(plan: Path | None) -> dict[str, Any] | None:
    """The plan of a file, read before anything that takes long."""
    if plan is None:
        return None
    from mmopt.search.plan import read_plan

    return read_plan(plan)


def optimized(program: Any, plan: dict[str, Any] | None, budget: Any = None, **options: Any) -> Any:
    """The exact passes, with the plan of a file or with one that is searched for."""
    import mmopt

    if plan is not None:
        from mmopt.search.plan import apply_plan

        return apply_plan(program, plan, **options)
    return mmopt.optimize(program, budget=budget, **options)


@app.command()
def export(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="Directory of the engine to write.")],
    target: Annotated[str, typer.Option(help="onnx (for ONNX Runtime) or tensorrt.")] = "onnx",
    dtype: Annotated[
        Optional[str],
        typer.Option(help="Precision of the engine. [default: float32 for onnx, as stored for tensorrt]"),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="copy, or link: leave unchanged weights in the checkpoint's files.")
    ] = "copy",
    batch: BatchOption = 1,
    images: ImagesOption = 1,
    context: ContextOption = None,
    language_model: LanguageOption = None,
    vision: VisionOption = None,
    vae: VaeOption = None,
    ln_post: LnPostOption = False,
    more: SetOption = None,
    plan: PlanOption = None,
    passes: Annotated[bool, typer.Option("--optimize/--no-optimize", help="Run the exact passes first.")] = True,
    check: Annotated[
        Optional[bool],
        typer.Option("--check/--no-check", help="Compare before and after each pass. [default: where affordable]"),
    ] = None,
    fit: Annotated[
        Optional[Path],
        typer.Option(help="Fit flow plans to prompts like these, a text file with one in each line."),
    ] = None,
    fit_steps: Annotated[
        Optional[list[int]], typer.Option(help="Steps of a plan to fit; may be repeated. [default: 10 and 8]", min=1)
    ] = None,
    polish: Annotated[int, typer.Option(help="Steps of gradients after each fit, for few steps.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Optimize a checkpoint and write it as an engine directory."""
    import mmopt

    if checkpoint is None:
        raise ValueError("give a checkpoint")
    if fit is None and (fit_steps or polish):
        raise ValueError("--fit-steps and --polish: only with --fit, a file of prompts")
    steps = read_steps(plan)
    with progress("exporting") as now:
        now("tracing")
        program = mmopt.trace(
            mmopt.load(checkpoint, **parts(language_model, vision, vae, ln_post, more)), batch, images, context
        )
        reports: list = []
        if passes or steps is not None:
            options: dict[str, Any] = {"passes": None if passes else [], "check": check}
            result = optimized(program, steps, observers=[lambda name, report: now(name)], **options)
            program, reports = result.program, result.reports
        if fit is not None:
            from mmopt.search.flow_budget import keep_fits

            program, report = keep_fits(program, fit, fit_steps or [10, 8], polish, lambda n: now(f"fitting {n} steps"))
            reports = [*reports, report]
        made = mmopt.export(program, out, target=target, dtype=dtype, weights=weights, reports=reports, progress=now)
    size = sum(f.stat().st_size for f in made.iterdir())
    text = "\n".join([*map(str, reports), f"wrote {made} ({size / 1e6:.1f} MB)"])
    show({"engine": str(made), "bytes": size, "reports": [vars(r) for r in reports]}, text, as_json)


@app.command()
def run(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    prompt: Annotated[str, typer.Argument(help="The question.")],
    image: Annotated[Optional[list[str]], typer.Option(help="An image: a path or URL; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.0,
    top_k: Annotated[Optional[int], typer.Option(min=1)] = None,
    top_p: Annotated[Optional[float], typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[Optional[int], typer.Option()] = None,
    stop: Annotated[Optional[list[str]], typer.Option(help="Stop before this text; may be repeated.")] = None,
    beams: Annotated[int, typer.Option(help="Beam search with so many; at most the engine's batch.", min=1)] = 1,
    length_penalty: Annotated[float, typer.Option(help="Beams: scores are divided by length to this power.")] = 1.0,
    prefix: Annotated[
        Optional[Path], typer.Option(help="Go on from a stored beginning of the prompt (`mmopt prefix`).")
    ] = None,
    provider: Annotated[Optional[str], typer.Option(help="cpu, cuda or tensorrt.")] = None,
    threads: Annotated[Optional[int], typer.Option(min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one question about images with an exported engine."""
    from mmopt.runtime.engine import Engine

    with progress("loading"):
        loaded = Engine(engine, provider=provider, threads=threads)
    options: dict[str, Any] = {
        "images": image or [], "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "seed": seed, "stop": tuple(stop or ()), "beams": beams, "length_penalty": length_penalty,
        "prefix": None if prefix is None else loaded.load_prefix(prefix),
    }  # fmt: skip
    if as_json or beams > 1:
        made = loaded.generate(prompt, **options)
        if not as_json:
            print(cast(Any, made).text)
            return
        print(
            json.dumps(
                {k: getattr(made, k) for k in ("text", "ids", "finish_reason", "prompt_tokens", "completion_tokens")}
            )
        )
        return
    for piece in cast(Iterator[str], loaded.generate(prompt, stream=True, **options)):
        print(piece, end="", flush=True)
    print()


@app.command()
def paint(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    out: Annotated[Path, typer.Argument(help="The picture to write (.png); several get numbers.")],
    n: Annotated[int, typer.Option("-n", help="How many pictures.", min=1)] = 1,
    steps: Annotated[Optional[int], typer.Option(help="Evaluations of the model. [default: 10]", min=1)] = None,
    guidance: Annotated[Optional[float], typer.Option(help="Weight of the prompt. [default: the model's]")] = None,
    solver: Annotated[
        Optional[str], typer.Option(help="euler, midpoint, heun, ab2, ... or fitted. [default: fitted, else ab2]")
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of the noise.")] = None,
    provider: Annotated[Optional[str], typer.Option(help="cpu, cuda or tensorrt.")] = None,
    threads: Annotated[Optional[int], typer.Option(min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Paint pictures of a text with an exported engine."""
    from mmopt.runtime.engine import Engine

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"{out}: expected the name of a picture: .png, .jpg or .webp")
    with progress("loading"):
        loaded = Engine(engine, provider=provider, threads=threads)
    made = loaded.paint([prompt] * n, steps, guidance, seed, solver, progress=errors.is_terminal)
    files = [out] if n == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, n + 1)]
    for file, image in zip(files, made.images(), strict=True):
        temporary = file.with_stem(f".{file.stem}.partial")
        image.save(temporary)
        temporary.rename(file)
    facts = {"files": [str(f) for f in files], "plan": made.plan.name, "passes": made.plan.passes}
    show(facts, f"wrote {', '.join(map(str, files))} ({made.plan.name}, {made.plan.passes} passes)", as_json)


@app.command()
def prefix(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    out: Annotated[Path, typer.Argument(help="The file to write (.safetensors).")],
    text: Annotated[str, typer.Argument(help="The beginning of prompts, few-shot examples say, with image markers.")],
    image: Annotated[Optional[list[str]], typer.Option(help="An image: a path or URL; may be repeated.")] = None,
    provider: Annotated[Optional[str], typer.Option(help="cpu, cuda or tensorrt.")] = None,
    threads: Annotated[Optional[int], typer.Option(min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Read the beginning of prompts once and store it for `mmopt run --prefix`."""
    from mmopt.runtime.engine import Engine

    with progress("reading"):
        made = Engine(engine, provider=provider, threads=threads).prefix(text, image or [])
        made.save(out)
    facts: dict[str, Any] = {"file": str(out), "rows": made.rows, "images": len(made.images)}
    facts["bytes"] = out.stat().st_size
    show(facts, f"wrote {out}: {made.rows} rows, {len(made.images)} images, {facts['bytes'] / 1e6:.1f} MB", as_json)


@app.command()
def verify(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory.")],
    cases: Annotated[list[Path], typer.Argument(help="Recorded cases (.safetensors).")],
    at: Annotated[str, typer.Option(help="Points of the line, with commas.")] = "model,program,optimized,engine",
    dtype: Annotated[str, typer.Option(help="Compute in float32, float16 or bfloat16.")] = "float32",
    language_model: LanguageOption = None,
    vision: VisionOption = None,
    vae: VaeOption = None,
    ln_post: LnPostOption = False,
    more: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay recorded cases of the reference implementation; exit 1 if anything differs."""
    from mmopt.conformance.replay import passed, replay
    from mmopt.conformance.table import table

    with progress("verifying") as now:
        points = tuple(a.strip() for a in at.split(",") if a.strip())
        options = parts(language_model, vision, vae, ln_post, more)
        result = replay(checkpoint, cases, at=points, dtype=dtype, progress=now, load_options=options)
    show(result, table(result), as_json)
    if not passed(result):
        raise FailedError


@app.command()
def bench(
    checkpoint: CheckpointArgument = None,
    config: ConfigOption = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Needed with --config.")] = False,
    rounds: Annotated[Optional[int], typer.Option(help="Interleaved rounds. [default: 30, painting 5]", min=1)] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    context: Annotated[
        Optional[int], typer.Option(help="Cache capacity in rows; half of it is filled. [default: 768 or less]", min=16)
    ] = None,
    dtype: DtypeOption = None,
    shots: Annotated[
        Optional[str], typer.Option(help="Time few-shot prompts of so many examples instead, such as 1,4,32.")
    ] = None,
    paint: Annotated[bool, typer.Option("--paint", help="Time painting instead: one image, end to end.")] = False,
    prompt_lengths: Annotated[
        str, typer.Option("--prompt-lengths", help="Ids of the prompts to paint, with commas.")
    ] = "32,128",
    quality: Annotated[
        Optional[Path],
        typer.Option(help="Score answers instead: a JSONL file of images, prompt and answers; of an engine, too."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="So many of the task's samples, always the same.", min=1)] = None,
    language_model: LanguageOption = None,
    vision: VisionOption = None,
    vae: VaeOption = None,
    ln_post: LnPostOption = False,
    more: SetOption = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw the result to this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time eager, compiled, optimized and engine side by side in one process.

    Where images lie outside the text, few-shot prompts are timed instead, with the passes and without.
    """
    from mmopt.measure.bench import bench as measure
    from mmopt.measure.bench_fewshot import bench_fewshot
    from mmopt.measure.tables import bench_plot, bench_text, fewshot_text, painting_text

    if sum([paint, shots is not None, quality is not None]) > 1:
        raise ValueError("--paint, --shots and --quality measure different things: give one of them")
    if limit is not None and quality is None:
        raise ValueError("--limit is for the samples of --quality")
    if quality is not None:
        options = parts(language_model, vision, vae, ln_post, more)
        score = score_of(checkpoint, quality, limit, threads, dtype, context, options)
        show(score.to_json(), str(score), as_json)
        return
    if config is not None and not random_weights:
        raise ValueError("--config has no weights: say --random-weights to time it with random ones")
    with progress("measuring") as now:
        model = get_model(checkpoint, config, dtype, parts(language_model, vision, vae, ln_post, more), random=True)
        if paint:
            from mmopt.measure.bench_generation import bench_painting

            counts = [int(k) for k in prompt_lengths.split(",")]
            result = bench_painting(model, counts, rounds=rounds or 5, threads=threads, progress=now)
            write = painting_text
        elif shots is None and model.family.cross is None:
            result = measure(model, context=context, rounds=rounds or 30, threads=threads, progress=now)
            write = bench_text
        else:
            counts = [int(k) for k in (shots or "1,4,32").split(",")]
            result = bench_fewshot(model, counts, rounds=rounds or 30, threads=threads, progress=now)
            write = fewshot_text
    if plot is not None:
        bench_plot(result, plot)
    show(result, write(result), as_json)


def main() -> None:
    """Entry point: bad input is one clear line and exit code 2, never a traceback."""
    try:
        app(standalone_mode=True)
    except FailedError:
        sys.exit(1)
    except (ValueError, OSError, ImportError, KeyError) as e:
        errors.print(f"[bold red]error[/]: {e}", markup=True, soft_wrap=True)
        sys.exit(2)
    except RuntimeError as e:
        if type(e).__name__ != "ContractError":
            raise
        errors.print(f"[bold red]check failed[/]: {e}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
