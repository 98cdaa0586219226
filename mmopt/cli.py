"""The command line: mmopt inspect | optimize | export | verify | run | generate-image | prefix | bench.

Exit codes: 0 all is well, 1 a check did not hold, 2 wrong use or bad input. Results go to stdout; what is being done,
and what is wrong, to stderr.
"""

import dataclasses
import functools
import inspect as python
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer
from rich.console import Console
from rich.markup import escape

from mmopt.spec.files import write_whole

MADE: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(help="A compiler for multimodal models: load, optimize, export, run, verify, measure.", **MADE)
bench = typer.Typer(help="Measure speed, few-shot prompts, image generation or the quality of answers.", **MADE)
app.add_typer(bench, name="bench")
errors = Console(stderr=True, highlight=False)

COUNTER, EVERY = re.compile(r"\d+ of \d+"), 10.0  # a counter that runs is shown again after so many seconds


class FailedError(Exception):
    """A check that did not hold: exit code 1."""


# -------------------------------------------------------------------------------------------- how commands take options
def option(help: str, default: Any = None, *names: str, **more: Any) -> Any:
    """An option: a field of a dataclass, or the default of a command's parameter."""
    return field(default=default, metadata={"made": functools.partial(typer.Option, *names, help=help, **more)})


def argument(help: str, default: Any = dataclasses.MISSING, **more: Any) -> Any:
    return field(default=default, metadata={"made": functools.partial(typer.Argument, help=help, **more)})


def parameter(name: str, kind: Any, given: Any, panel: str | None = None) -> python.Parameter:
    """An `option` or `argument` as Typer reads it, in a panel of the help."""
    made, empty = given.metadata["made"], python.Parameter.empty
    flag = [f"--{name.replace('_', '-')}"] if given.default is False and not made.args else []  # no --no-NAME
    info = made(*flag, **{"rich_help_panel": panel} | made.keywords)
    default = empty if given.default is dataclasses.MISSING else given.default
    return python.Parameter(name, python.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def command(group: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command; a parameter that is a dataclass stands for one option for each of its fields."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters: list[python.Parameter] = []
        grouped: dict[str, tuple[Callable[..., Any], list[str]]] = {}
        for p in python.signature(function).parameters.values():
            if dataclasses.is_dataclass(p.annotation):
                fields = [f for f in dataclasses.fields(p.annotation) if "made" in f.metadata]
                grouped[p.name] = cast(Any, p.annotation), [f.name for f in fields]
                parameters += [parameter(f.name, f.type, f, cast(Any, p.annotation).panel) for f in fields]
            else:
                parameters.append(parameter(p.name, p.annotation, p.default))

        def run(**given: Any) -> None:
            for key, (kind, names) in grouped.items():
                given[key] = kind(**{n: given.pop(n) for n in names})
            function(**given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = python.Signature(parameters)  # type: ignore[attr-defined]
        group.command(name)(run)
        return function

    return register


@dataclass
class Output:
    panel: ClassVar = "Output"
    as_json: bool = option("Print JSON, and nothing else, on stdout.", False, "--json")
    quiet: bool = option("Print no progress.", False, "--quiet", "-q")
    counter: tuple[str, float] = ("", 0.0)  # the one shown last, and when

    def progress(self, text: str) -> None:
        """A line on stderr for each stage of the work; for a counter ("round 3 of 30") one in ten seconds."""
        kind, now = COUNTER.sub("", text), time.monotonic()
        if self.quiet or (kind != text and kind == self.counter[0] and now - self.counter[1] < EVERY):
            return
        self.counter = kind, now
        errors.print(text, style="dim", markup=False, soft_wrap=True)

    def count(self, what: str) -> Callable[[int, int], None]:
        """Progress for those who tell how many of how many are done."""
        return lambda done, of: self.progress(f"{what} {done} of {of}")

    def show(self, data: dict[str, Any], text: str) -> None:
        print(json.dumps(data, indent=1) if self.as_json else text)


@dataclass
class PassOutput(Output):
    verbose: bool = option("Show where each pass applied, what it refused and why.", False, "--verbose", "-v")


@dataclass
class Parts:
    """What `mmopt.load` takes beside a checkpoint, where this does not hold all of a model."""

    panel: ClassVar = "Model"
    language_model: str | None = option("Directory or hub id of the language model, if CHECKPOINT lacks it.")
    vision: str | None = option("Directory, file or hub id of the vision tower, if CHECKPOINT lacks it.")
    vae: str | None = option("Directory or hub id of the decoder of generated images, if CHECKPOINT lacks it.")
    ln_post: bool = option("The vision tower's last norm is applied to all tokens, as in newer open_clip.", False)
    settings: list[str] | None = option(
        "What the files do not say (vision_heads=12); repeatable.", None, "--set", metavar="NAME=VALUE"
    )

    def load_options(self) -> dict[str, Any]:
        options = {k: getattr(self, k) for k in ("language_model", "vision", "vae") if getattr(self, k) is not None}
        options |= {"ln_post": True} if self.ln_post else {}
        for setting in self.settings or []:
            name, found, value = setting.partition("=")
            if not found:
                raise ValueError(f"--set: expected NAME=VALUE, seen {setting!r}")
            options[name] = int(value) if value.lstrip("-").isdigit() else value
        return options


@dataclass
class Source:
    checkpoint: str | None = argument("A checkpoint directory in its official layout, or a hub id.", None)
    config: str | None = option("Instead of CHECKPOINT: a config.json, or a shipped one (mplug-owl2-7b, -mid, -tiny).")
    random_weights: bool = option("Give --config random weights; without, it has shapes only.", False)
    dtype: str | None = option("float32, float16 or bfloat16. (default: as stored)")


@dataclass
class ModelOptions(Parts, Source):
    def load(self, output: Output, weights: bool = False) -> Any:
        """The model. weights: shapes alone will not do."""
        import mmopt

        options, given = self.load_options(), [x for x in (self.checkpoint, self.config) if x is not None]
        if len(given) != 1:
            raise ValueError(f"CHECKPOINT, --config: expected one of them, seen {' and '.join(given) or 'neither'}")
        if self.checkpoint is not None and self.random_weights:
            raise ValueError("--random-weights: expected with --config, seen with a checkpoint")
        if self.config is not None and options:
            names = ", ".join(option_names([k]) if hasattr(self, k) else f"--set {k}" for k in options)
            raise ValueError(f"{names}: expected with a checkpoint, seen with --config")
        if self.config is not None and weights and not self.random_weights:
            raise ValueError("--config: expected with --random-weights, as shapes cannot be timed, seen without")
        output.progress(f"load {given[0]}")
        if self.config is not None:
            return mmopt.from_config(self.config, self.dtype, random=self.random_weights)
        return mmopt.load(given[0], self.dtype, **options)


@dataclass
class Sizes:
    """What a model is traced for."""

    panel: ClassVar = "Sizes"
    batch: int = option("Samples at once, at most.", 1, min=1)
    images: int = option("Images of one prompt, at most.", 1, min=0)
    context: int | None = option("Tokens of prompt, images and answer together, at most. (default: 512)", min=1)

    def trace(self, model: Any, output: Output) -> Any:
        import mmopt

        return mmopt.trace(model, self.batch, self.images, self.context, progress=output.progress)


@dataclass
class PassOptions:
    panel: ClassVar = "Passes"
    plan: Path | None = option(
        "Apply a plan too: a file of `optimize --plan-out`, or an engine that has one.", exists=True
    )
    check: bool | None = option("Compare before and after. (default: if affordable)", None, "--check/--no-check")

    def read_plan(self) -> dict[str, Any] | None:
        """Before anything that takes long."""
        if self.plan is None:
            return None
        from mmopt.search.plan import read_plan

        return read_plan(self.plan)

    def run(self, program: Any, plan: dict[str, Any] | None, output: Output, **options: Any) -> tuple[Any, Any]:
        """The result of the passes, and the log of what each did."""
        import mmopt
        from mmopt.measure.pass_log import PassLog
        from mmopt.search.plan import apply_plan

        def progress(name: str, report: Any, now: Any) -> None:
            if report is None:  # a search tells in a sentence what it measures
                output.progress(f"pass {name}" if name.isidentifier() else f"search: {name}")

        log = PassLog(program)
        options |= {"check": self.check, "observers": [progress, log]}
        result = mmopt.optimize(program, **options) if plan is None else apply_plan(program, plan, **options)
        log.finish(result.reports, result.program)
        return result, log


@dataclass
class SearchOptions:
    """Budgets, and what a search for the cheapest plan that keeps them takes."""

    panel: ClassVar = "Search"
    quality: Path | None = option(
        "Find the cheapest compression that keeps the score on this task, a JSONL file.", exists=True
    )
    max_drop: float | None = option("How far the score may fall. (default: 0.01)", min=0.0, max=1.0)
    limit: int | None = option("Ask so many of the task's samples, always the same.", min=1)
    trials: int | None = option("Plans to measure. (default: 30)", min=1)
    seed: int | None = option("Of the search. (default: 0)", min=0)
    store: Path | None = option("Keep the trials in this file, to go on from there.")
    drift: float | None = option("Generate images in the fewest steps that change the latents by at most this share.")
    prompts: Path | None = option("For --drift: a text file of typical prompts, one in each line.", exists=True)
    plot: Path | None = option("Draw quality over cost to this PNG file.")
    plan_out: Path | None = option("Write the plan found to this file.")

    def check(self, plan: Path | None) -> None:
        """All that can be known before a model is loaded."""
        budgets = self.given("quality", "drift")
        alone = self.given("max_drop", "limit", "trials", "seed", "store", "plot")
        if alone and self.quality is None:
            raise ValueError(f"{alone}: expected with --quality, seen without")
        if (self.drift is None) != (self.prompts is None):
            raise ValueError("--drift, --prompts: expected both or neither, seen one of them")
        if self.plan_out is not None and not budgets:
            raise ValueError("--plan-out: expected with --quality or --drift, seen without")
        if plan is not None and budgets:
            raise ValueError(f"--plan: expected without a search for a plan, seen with {budgets}")
        check_plot(self.plot)
        for name, path in (("--plot", self.plot), ("--plan-out", self.plan_out)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"{name}: expected a file in a directory that exists, seen {path}")

    def given(self, *names: str) -> str:
        return option_names(k for k in names if getattr(self, k) is not None)

    def read(self) -> dict[str, Any]:
        """`budget` and `prompts` of `mmopt.optimize`."""
        import mmopt

        budget: Any = None
        options: dict[str, Any] = {}
        if self.prompts is not None:
            from mmopt.flow.fit_program import read_prompts

            options, budget = {"prompts": read_prompts(self.prompts)}, mmopt.DriftBudget(mean=self.drift)
        if self.quality is not None:
            fields = {**{k: getattr(self, k) for k in ("max_drop", "limit", "trials", "seed", "store")}}
            fields = {k: v for k, v in fields.items() if v is not None}
            budget = mmopt.QualityBudget(mmopt.Task.load(self.quality), flow=budget, **fields)
        return options if budget is None else options | {"budget": budget}

    def write(self, result: Any) -> None:
        if self.plot is not None:
            result.search.plot(self.plot)
        if self.plan_out is not None:
            from mmopt.search.plan import save_plan

            save_plan(result.program.info.plan, self.plan_out)


@dataclass
class EngineOptions:
    panel: ClassVar = "Engine"
    provider: str | None = option("cpu, cuda or tensorrt. (default: cuda where there is one, else cpu)")
    threads: int | None = option("CPU threads. (default: all)", min=1)

    def open(self, directory: Path, output: Output) -> Any:
        from mmopt.runtime.engine import Engine

        output.progress(f"load {directory}")
        return Engine(directory, provider=self.provider, threads=self.threads)


@dataclass
class Timing:
    panel: ClassVar = "Measurement"
    threads: int = option("CPU threads.", 2, min=1)
    plot: Path | None = option("Draw the result to this PNG file.")

    def run(self, model: ModelOptions, output: Output, measure: Callable[..., dict[str, Any]], text: Callable) -> None:
        from mmopt.measure.tables import bench_plot

        check_plot(self.plot)
        result = measure(model.load(output, weights=True), threads=self.threads, progress=output.progress)
        if self.plot is not None:
            bench_plot(result, self.plot)
        output.show(result, text(result))


ENGINE = argument("An engine directory.")
CHECKPOINT = argument("A checkpoint directory in its official layout, or a hub id.")
PICTURES = option("An image: a path or URL; repeatable.")


def option_names(names: Any) -> str:
    return ", ".join(f"--{n.replace('_', '-')}" for n in names)


def check_plot(path: Path | None) -> None:
    """Before anything is measured."""
    if path is not None:
        from mmopt.report import png_figure

        png_figure(path, (1, 1))


def numbers(name: str, text: str) -> list[int]:
    parts = [t.strip() for t in text.split(",")]
    if not all(p.isdigit() and int(p) for p in parts):
        raise ValueError(f"{name}: expected whole numbers above 0 with commas, such as 1,4,32, seen {text!r}")
    return [int(p) for p in parts]


# --------------------------------------------------------------------------------------------------------- the compiler
@command(app)
def inspect(
    model: ModelOptions,
    sizes: Sizes,
    output: Output,
    optimized: bool = option("After the exact passes.", False),
    shots: int | None = option("A prompt of so many examples and a query, each an image and 20 tokens of text.", min=0),
    prompt_length: int | None = option("Tokens of the prompt of a generated image. (default: 32)", min=2),
    steps: int | None = option("Steps of a generated image. (default: as many as the reference makes)", min=1),
    graphs: bool = option("Print every operator of every stage too.", False),
    prune_sites: bool = option("List where visual tokens can be pruned too, and what that would save.", False),
) -> None:
    """Show the stages of a model: operators, FLOPs, weights read, the schedule. With --config it needs no weights."""
    import mmopt
    from mmopt.ir.inspect import SHOT, text

    if shots is not None:
        sizes.images = shots + 1
        sizes.context = sizes.context or SHOT * sizes.images + 64
    loaded = model.load(output)
    if prompt_length is not None and loaded.family.flow is not None and sizes.context is None:
        sizes.context = prompt_length + loaded.family.flow(loaded.config).tokens
    program = traced = sizes.trace(loaded, output)
    reports: list[Any] = []
    if optimized:
        output.progress("optimize")
        result = mmopt.optimize(traced, check=False)
        program, reports = result.program, result.reports
    output.progress("count")
    work: dict[str, Any] = {
        "batch": sizes.batch,
        "images": sizes.images,
        "prompt_length": prompt_length,
        "steps": steps,
    }
    report = mmopt.inspect(program, reports, **work)
    shown = text(report) + (f"\n\n{program}" if graphs else "")
    if prune_sites:
        from mmopt.pruning.savings import savings_text, site_savings

        output.progress("count what each site saves")
        report["prune_sites"] = site_savings(traced)
        shown += "\n\n" + savings_text(report["prune_sites"])
    output.show(report, shown)


@command(app)
def optimize(
    model: ModelOptions,
    sizes: Sizes,
    passes: PassOptions,
    search: SearchOptions,
    output: PassOutput,
    out: Path | None = option("Write the optimized graphs as text to this file.", rich_help_panel="Output"),
) -> None:
    """Run the exact passes and show what each did and what that saves. `mmopt export` does this too."""
    search.check(passes.plan)
    plan, options = passes.read_plan(), search.read()
    if search.quality is not None:
        sizes.images = max(sizes.images, *(len(s.images) for s in options["budget"].task.samples))
    program = sizes.trace(model.load(output), output)
    result, log = passes.run(program, plan, output, **options)
    if out is not None:
        write_whole(out, lambda path: path.write_text(f"{result.program}\n"))
    search.write(result)
    facts, text = log.to_json(), log.text(output.verbose)
    if search.quality is not None:
        facts, text = facts | {"search": result.search.to_json()}, f"{text}\n{result.search.text()}"
    output.show(facts, text)


@command(app)
def export(
    parts: Parts,
    sizes: Sizes,
    passes: PassOptions,
    output: PassOutput,
    checkpoint: str = CHECKPOINT,
    out: Path = argument("Directory of the engine to write."),
    target: str = option("onnx (for ONNX Runtime) or tensorrt.", "onnx"),
    dtype: str | None = option("Precision of the engine. (default: float32 for onnx, as stored for tensorrt)"),
    weights: str = option("copy, or link: leave unchanged weights in the checkpoint's files.", "copy"),
    exact: bool = option("Run the exact passes first.", True, "--optimize/--no-optimize"),
    fit: Path | None = option(
        "Fit few steps of image generation to typical prompts: a text file, one in each line.", exists=True
    ),
    fit_steps: list[int] | None = option("Steps to fit; repeatable. (default: 10 and 8)", min=1),
    polish: int = option("Gradient steps after each fit, for few steps.", 0, min=0),
) -> None:
    """Optimize a checkpoint and write it as an engine directory."""
    import mmopt
    from mmopt.measure.pass_log import PassLog

    if fit is None and (fit_steps or polish):
        given = option_names(k for k, v in (("fit_steps", fit_steps), ("polish", polish)) if v)
        raise ValueError(f"{given}: expected with --fit, seen without")
    plan, model = passes.read_plan(), ModelOptions(checkpoint=checkpoint, **vars(parts))
    program = sizes.trace(model.load(output), output)
    if exact or plan is not None:
        result, log = passes.run(program, plan, output, passes=None if exact else [])
        program = result.program
    else:
        log = PassLog(program)
    if fit is not None:
        from mmopt.search.flow_budget import keep_fits

        steps = fit_steps or [10, 8]
        program, report = keep_fits(program, fit, steps, polish, lambda n: output.progress(f"fit {n} steps"))
        log.finish([report], program)
    options = {"target": target, "dtype": dtype, "weights": weights}
    engine = mmopt.export(program, out, **options, reports=log.reports, progress=output.progress)
    size = sum(f.stat().st_size for f in engine.iterdir())
    table = f"{log.text(output.verbose)}\n" if log.reports else ""
    output.show({"engine": str(engine), "bytes": size, **log.to_json()}, f"{table}wrote {engine} ({size / 1e6:.1f} MB)")


@command(app)
def verify(
    parts: Parts,
    output: Output,
    checkpoint: str = CHECKPOINT,
    cases: list[Path] = argument("Recorded cases (.safetensors).", exists=True),
    levels: str = option("What to compare with them, with commas.", "model,program,optimized,engine"),
    dtype: str = option("Compute in float32, float16 or bfloat16.", "float32"),
) -> None:
    """Replay recorded cases of the reference implementation; exit code 1 if anything differs."""
    from mmopt.conformance.replay import passed, verify
    from mmopt.conformance.table import POINTS, table

    at = [level.strip() for level in levels.split(",") if level.strip()]
    if not at or not set(at) <= set(POINTS):
        raise ValueError(f"--levels: expected some of {','.join(POINTS)}, seen {levels!r}")
    options = parts.load_options()
    result = verify(checkpoint, cases, at=at, dtype=dtype, progress=output.progress, load_options=options)
    output.show(result, table(result))
    if not passed(result):
        raise FailedError


# ----------------------------------------------------------------------------------------------------------- the engine
@command(app)
def run(
    options: EngineOptions,
    output: Output,
    engine: Path = ENGINE,
    prompt: str = argument("The question."),
    image: list[str] | None = PICTURES,
    max_new_tokens: int = option("Tokens of the answer, at most.", 64, min=1),
    temperature: float = option("0 takes the likeliest token.", 0.0, min=0.0),
    top_k: int | None = option("Choose among so many of the likeliest tokens.", min=1),
    top_p: float | None = option("Choose among the likeliest tokens that have this share together.", min=0.0, max=1.0),
    seed: int | None = option("Of the choices."),
    stop: list[str] | None = option("Stop before this text; repeatable."),
    num_beams: int = option("Beam search with so many; at most the engine's batch.", 1, min=1),
    length_penalty: float = option("Beams: scores are divided by length to this power.", 1.0),
    prefix: Path | None = option("Go on from a stored beginning of the prompt (`mmopt prefix`).", exists=True),
) -> None:
    """Answer one question about images with an exported engine."""
    loaded = options.open(engine, output)
    request: dict[str, Any] = {
        "images": image or [], "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "seed": seed, "stop": tuple(stop or ()), "num_beams": num_beams,
        "length_penalty": length_penalty,
        "prefix": None if prefix is None else loaded.load_prefix(prefix),
    }  # fmt: skip
    output.progress("answer")
    if output.as_json or num_beams > 1:  # which beam is best is known at the end
        made = loaded.generate(prompt, **request)
        keys = ("text", "ids", "finish_reason", "prompt_tokens", "completion_tokens")
        output.show({k: getattr(made, k) for k in keys}, made.text)
        return
    for piece in loaded.generate(prompt, stream=True, **request):
        print(piece, end="", flush=True)
    print()


@command(app, "generate-image")
def generate_images(
    options: EngineOptions,
    output: Output,
    engine: Path = ENGINE,
    prompt: str = argument("What the image shows."),
    out: Path = argument("The file to write (.png, .jpg or .webp); several get numbers."),
    n: int = option("How many images.", 1, "-n", min=1),
    steps: int | None = option("Steps of the solver. (default: 10)", min=1),
    guidance: float | None = option("Weight of the prompt. (default: the model's)"),
    solver: str | None = option("euler, midpoint, heun, ab2, ... or fitted. (default: fitted, else ab2)"),
    seed: int | None = option("Of the noise."),
) -> None:
    """Generate images of a text with an exported engine."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"OUT: expected the name of an image, .png, .jpg or .webp, seen {out}")
    loaded = options.open(engine, output)
    made = loaded.generate_images(prompt, n, steps, guidance, seed, solver, progress=output.count("step"))
    files = [out] if n == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, n + 1)]
    for file, image in zip(files, made.pictures, strict=True):
        write_whole(file, image.save)
    name, nfe, forwards = made.plan.name, made.plan.evaluations, made.plan.forwards
    facts = {"files": [str(f) for f in files], "plan": name, "nfe": nfe, "forwards": forwards}
    output.show(facts, f"wrote {', '.join(map(str, files))} ({name}, {nfe} steps, {forwards} forwards)")


@command(app)
def prefix(
    options: EngineOptions,
    output: Output,
    engine: Path = ENGINE,
    out: Path = argument("The file to write (.safetensors)."),
    text: str = argument("The beginning of prompts, such as few-shot examples, with a marker for each image."),
    image: list[str] | None = PICTURES,
) -> None:
    """Read the beginning of prompts once and store it for `mmopt run --prefix`."""
    loaded = options.open(engine, output)
    output.progress("read the prefix")
    made = loaded.prefix(text, image or [])
    made.save(out)
    tokens, images, size = made.rows, len(made.images), out.stat().st_size
    facts = {"file": str(out), "tokens": tokens, "images": images, "bytes": size}
    output.show(facts, f"wrote {out}: {tokens} tokens, {images} images, {size / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------------------- measurement
@command(bench, "speed")
def bench_speed(
    model: ModelOptions,
    timing: Timing,
    output: Output,
    rounds: int = option("Interleaved rounds.", 30, min=1),
    context: int | None = option("Tokens that a cache holds; half are filled. (default: 768 or less)", min=16),
) -> None:
    """Time eager, compiled, optimized and exported stages side by side in one process."""
    from mmopt.measure.bench import bench
    from mmopt.measure.tables import bench_text

    def measure(loaded: Any, **options: Any) -> dict[str, Any]:
        if loaded.family.cross is not None:
            name = loaded.family.name
            raise ValueError(f"bench speed: expected images among the text, seen {name}: use `mmopt bench fewshot`")
        return bench(loaded, context=context, rounds=rounds, **options)

    timing.run(model, output, measure, bench_text)


@command(bench, "fewshot")
def bench_fewshot(
    model: ModelOptions,
    timing: Timing,
    output: Output,
    rounds: int = option("Interleaved rounds.", 30, min=1),
    shots: str = option("Examples of a prompt, with commas.", "1,4,32"),
) -> None:
    """Time few-shot prompts with the passes and without, where a model reads images by cross-attention."""
    from mmopt.measure.bench_fewshot import bench_fewshot as measure
    from mmopt.measure.tables import fewshot_text

    counts = numbers("--shots", shots)
    timing.run(model, output, functools.partial(measure, rounds=rounds, shots=counts), fewshot_text)


@command(bench, "images")
def bench_images(
    model: ModelOptions,
    timing: Timing,
    output: Output,
    rounds: int = option("Interleaved rounds.", 5, min=1),
    prompt_lengths: str = option("Tokens of the prompts, with commas.", "32,128"),
) -> None:
    """Time the generation of one image, from prompt to pixels."""
    from mmopt.measure.bench_generation import bench_generation as measure
    from mmopt.measure.tables import generation_text

    lengths = numbers("--prompt-lengths", prompt_lengths)
    timing.run(model, output, functools.partial(measure, rounds=rounds, lengths=lengths), generation_text)


@command(bench, "quality")
def bench_quality(
    parts: Parts,
    output: Output,
    model: str = argument("An engine directory, or a checkpoint, which then runs in PyTorch."),
    task: Path = argument("A JSONL file of images, prompts and answers.", exists=True),
    limit: int | None = option("Ask so many of the task's samples, always the same.", min=1),
    threads: int = option("CPU threads.", 2, min=1),
    dtype: str | None = option("Of a checkpoint: float32, float16 or bfloat16. (default: as stored)"),
    context: int | None = option("Of a checkpoint: tokens of a sequence, at most. (default: 512 or less)", min=1),
) -> None:
    """Ask the questions of a task and score the answers."""
    import mmopt

    questions = mmopt.Task.load(task)
    runner: Any
    if (Path(model) / "program.json").is_file():
        runner = EngineOptions(threads=threads).open(Path(model), output)
    else:
        import torch

        torch.set_num_threads(threads)
        loaded = ModelOptions(checkpoint=model, dtype=dtype, **vars(parts)).load(output)
        runner = Sizes(1, max(len(s.images) for s in questions.samples), context).trace(loaded, output)
    score = mmopt.evaluate(runner, questions, limit, progress=output.count("sample"))
    output.show(score.to_json(), str(score))


def main() -> None:
    """Entry point: bad input is one clear line and exit code 2, never a traceback."""
    try:
        code = app(standalone_mode=False) or 0
    except FailedError:
        code = 1
    except (ValueError, OSError, ImportError, KeyError) as e:
        code = complain("error", str(e))
    except Exception as e:
        if type(e).__name__ == "ContractError":
            code = complain("check failed", str(e), 1)
        elif type(e).__name__ == "NoArgsIsHelpError":
            code = cast(Any, e).show() or 2
        elif hasattr(e, "format_message"):
            code = complain("error", wrong_use(e))
        else:
            raise
    sys.exit(code)


def complain(what: str, why: str, code: int = 2) -> int:
    errors.print(f"[bold red]{what}[/]: {escape(why)}", soft_wrap=True)
    return code


def wrong_use(error: Any) -> str:
    """Typer's words, and the value that they are about."""
    words, seen = [w for a in sys.argv[1:] for w in (a.split("=", 1) if a.startswith("--") else [a])], ""
    for name in getattr(getattr(error, "param", None), "opts", ()):
        if name in words[:-1]:
            seen = f", seen {words[words.index(name) + 1]!r}"
    return error.format_message() + seen


if __name__ == "__main__":
    main()
