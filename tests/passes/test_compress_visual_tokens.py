"""compress_visual_tokens against the plain modules called by hand: every kind of site, in three families."""

import json
import re
from dataclasses import replace

import pytest
import sympy
import torch
from compressed import (
    CHOICES,
    CLOSE,
    DATA,
    FAMILIES,
    FORCED,
    GRID,
    KEEP,
    LAYOUTS,
    PATCHES,
    QUERIES,
    I,
    Images,
    Left,
    compress,
    compressed,
    count,
    flamingo_images,
    ids_of,
    inside,
    janus_images,
    names,
    owl_images,
    picked,
    pixels,
    reference,
    run,
    seen_images,
    selected,
    traced,
)  # fmt: skip
from toys import declared, random_values, texts, toy_info

import mmopt
from mmopt.frontend.load import from_config
from mmopt.ir.capture import trace_stage
from mmopt.ir.graph import Builder
from mmopt.ir.inspect import typical_prompt
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.pruning import positions as row_positions
from mmopt.pruning import propagate
from mmopt.pruning.apply import compress as narrow
from mmopt.pruning.apply import find_sites
from mmopt.pruning.propagate import ImageRows, NotApplicable
from mmopt.rewrite.contracts import ContractError, random_inputs
from mmopt.spec import prompt as planning
from mmopt.spec.schedule import Call

TOWERS = {"owl": "vision", "janus": "encode_vision", "flamingo": "encode_vision"}
BEFORE = {"owl": "abstractor", "janus": "encode_vision"}  # where all rows leave for the language model
FAR = 1e-2  # what a mistake makes of logits near 1


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def close(found, wanted):
    torch.testing.assert_close(found, wanted, **CLOSE)


def shown(family, prompts, frames=2):
    n = count(family, prompts)
    return pixels(family, n, frames if family == "flamingo" else None) if n else None


def runs_as(family, program, cuts=None, small=None, layout="batch", **kw):
    """The Program's logits are those of whole sequences through the plain modules."""
    prompts = ids_of(family, layout)
    images = shown(family, prompts)
    close(
        run(program, prompts, images),
        reference(family, prompts, FORCED, seen_images(family, images, cuts, small), **kw),
    )


# --------------------------------------------------------------------------------------------------------------- sites
def test_sites():
    """Names, rows and grids, as the modules have them."""
    towers = {"owl": "vision", "janus": "encode_vision", "flamingo": "encode_vision"}
    after = {
        "owl": [("abstractor.2", QUERIES, None), ("abstractor", QUERIES, None), ("language_model.1", QUERIES, None)],
        "janus": [("language_model.1", PATCHES, GRID)],
        "flamingo": [("resample.2", QUERIES, None), ("resample", QUERIES, None)],
    }
    for family in FAMILIES:
        t = towers[family]
        wanted = [(k, PATCHES, GRID) for k in ("pixels", f"{t}.1", f"{t}.2", f"{t}.all", t)] + after[family]
        found = find_sites(traced(family))
        assert [(p.name, p.rows, p.grid) for p in found] == wanted
        assert [p.stage for p in found] == [t if p.name == "pixels" else p.name.split(".")[0] for p in found]
        assert [len(p.nodes) for p in found] == [2 if p.name.endswith(".all") else 1 for p in found]
    assert str(found[0]) == "pixels: 16 rows of an image (4 x 4)"
    assert str(found[-1]) == "resample: 8 rows of an image"


def test_fewer_and_fewer():
    (site,) = (p for p in find_sites(traced("owl")) if p.name == "vision.all")
    assert site.counts(4) == [10, 4]
    assert site.counts(1) == [8, 1]
    assert site.counts(16) == [16, 16]


# ------------------------------------------------------------------------------------------------ what nothing is done
def test_all_rows_stay():
    program = traced("owl")
    made, report = CompressVisualTokens(1.0)(program)
    assert not report.rewrites
    assert report.skipped == ["program: keep_ratio is 1: every row stays"]
    assert str(made) == str(program)
    assert all(made.stages[k].graph is s.graph for k, s in program.stages.items())
    assert made.info == program.info


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0, expected a share of the rows, more than 0 and at most 1"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"keep_ratio": True}, "keep_ratio is True"),
        ({"keep_ratio": "half"}, "keep_ratio is 'half'"),
        ({"method": "best"}, "method is 'best', expected resize or one of first, uniform"),
        ({"position_ids": "new"}, "position_ids is 'new', expected keep or renumber"),
    ],
)
def test_options(options, says):
    with pytest.raises(ValueError, match=says):
        CompressVisualTokens(**options)


def test_unknown_site():
    with pytest.raises(ValueError, match=r"site is 'tower', expected one of pixels, vision.1, .*, language_model.1"):
        CompressVisualTokens(site="tower")(traced("owl"))


def test_a_grid_that_is_none():
    with pytest.raises(ValueError, match="keep: 7 rows of an image are no grid within 4 x 4"):
        compress(traced("owl"), 7 / 16, "resize", "pixels")


@pytest.mark.parametrize(
    ("family", "site", "method", "says"),
    [
        ("owl", "vision", "resize", "method resize is not for this site"),
        ("owl", "pixels", "pool", "method pool is not for this site"),
        ("owl", "abstractor", "dominant", "method dominant needs keys of an attention among these rows"),
        (
            "flamingo",
            "resample",
            "pool",
            r"4 of 8 rows would save 0\.\d\d% of the FLOPs of an image and its prompt, less",
        ),
    ],
)
def test_left_alone(family, site, method, says):
    program = traced(family)
    made, report = CompressVisualTokens(0.5, method, site)(program)
    assert not report.rewrites
    assert str(made) == str(program)
    assert re.match(rf"{site}: {says}", report.skipped[0])


def test_min_saving_says_how_much():
    """The figure is that of two prompts with as much text; asked for less, the same site is taken."""
    program = traced("janus")
    made, report = CompressVisualTokens(0.25, "pool", "encode_vision")(program)
    found = [(program, 72), (made, 72 - 12)]  # as many rows of text as fit: 55 beside 17 rows, and beside 5
    found = [mmopt.inspect(p, batch=1, images=1, new_tokens=1, context=n) for p, n in found]
    assert [f["prompt"]["rows"] for f in found] == [72, 60]
    flops = [f["totals"]["encode_flops_per_image"] + f["totals"]["prefill_flops"] for f in found]
    saved = 1 - flops[1] / flops[0]
    assert f"; {saved:.0%} fewer FLOPs" in report.rewrites[0]
    refused = CompressVisualTokens(0.25, "pool", "encode_vision", min_saving=saved + 0.001)(program)[1]
    assert f"would save {saved:.2%} of" in refused.skipped[0]
    assert CompressVisualTokens(0.25, "pool", "encode_vision", min_saving=saved - 0.001)(program)[1].rewrites


def test_by_default():
    """Some rows after each attention of the tower; where there is none that is left out, where they leave it."""
    _, report = CompressVisualTokens(0.5)(traced("janus"))
    assert report.rewrites[0].startswith("encode_vision.all: 8 of 16 rows of an image stay, by dominant; ")


def test_report():
    _, report = compress(traced("owl"), 0.25, "pool", "vision")
    assert report.rewrites[0].startswith("vision: 4 of 16 rows of an image stay, by pool; ")
    assert [line.split(":")[0] for line in report.skipped] == [n for n in names(traced("owl")) if n != "vision"]


# ------------------------------------------------------------------------------------------- before the language model
def of_queries(method):
    """The same of 8 rows that are no grid: 4 runs of two."""
    if method == "uniform":
        return picked([0, 2, 4, 6])
    return lambda x, left, **_: (x.unflatten(1, (4, 2)).mean(2), Left(left.places[:, ::2]))


@pytest.mark.parametrize(("method", "positions"), [("uniform", "keep"), ("pool", "keep"), ("uniform", "renumber")])
@pytest.mark.parametrize("family", BEFORE)
def test_before_the_language_model(family, method, positions):
    program = compressed(family, BEFORE[family], 0.5 if family == "owl" else 0.25, method, position_ids=positions)
    assert program.info.tokens_per_image == 5
    for layout in LAYOUTS:
        prompts = ids_of(family, layout)
        images = shown(family, prompts)
        if images is None:
            made = Images(torch.zeros(0, 0, 0), torch.zeros(0, 0), 0)
        elif family == "owl":
            made = owl_images(images, last=of_queries(method))
        else:
            made = janus_images(images, {"end": CHOICES[method]})
        wanted = reference(family, prompts, FORCED, made, renumber=positions == "renumber")
        close(run(program, prompts, images), wanted)
        if images is not None:
            other = reference(family, prompts, FORCED, made, renumber=positions == "keep")
            assert (other - wanted).abs().max() > FAR


def test_all_stages_have_the_shapes_they_say():
    for family, site in (("owl", "abstractor"), ("janus", "language_model.1"), ("flamingo", "encode_vision")):
        program = compressed(family, site, 0.5, "pool")
        for stage in program.stages.values():
            symbols = {str(s) for n in stage.placeholders() for s in n.meta["shape"] if isinstance(s, sympy.Symbol)}
            sizes = dict.fromkeys(symbols, 2) | ({"nv": 2 * program.info.tokens_per_image} if "nv" in symbols else {})
            values = random_values(stage, sizes)
            values |= {k: torch.full_like(v, 8) for k, v in values.items() if k == "past"}
            declared(stage, program.weights, values)


def test_painting_is_as_it_was():
    """It goes on with the language model as it was; only what reads images has new inputs."""
    program, made = traced("janus"), compressed("janus", "encode_vision", 0.25, "uniform")
    flow, prompts = program.info.flow, [[3, 4, 5, 6], [7, 8]]
    noise = torch.randn(2, *flow.latents, generator=torch.Generator().manual_seed(0))
    plan = mmopt.spec.solvers.make_plan("euler", 2, guidance=3.0)
    latents = [p.generate_images(prompts, noise, plan)["latents"] for p in (program, made)]
    assert torch.equal(*latents)


# ---------------------------------------------------------------------------------------------------- inside the tower
@pytest.mark.parametrize("method", ["uniform", "pool"])
@pytest.mark.parametrize("at", [1, "end"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tower(family, at, method):
    """Later attentions and the abstractor or resampler read fewer keys, at their places, with their sizes."""
    site = TOWERS[family] if at == "end" else f"{TOWERS[family]}.{at}"
    runs_as(family, compressed(family, site, KEEP[method], method), {at: CHOICES[method]})


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_in_the_tower(family):
    """By the keys of the attention before; what is merged again in the second half has sizes already."""
    runs_as(family, compressed(family, f"{TOWERS[family]}.1", 0.5, "merge"), {1: CHOICES["merge"]})


def test_fewer_and_fewer_in_the_tower():
    cuts = {1: selected("merge", 10), 2: selected("merge", 4)}
    runs_as("flamingo", compressed("flamingo", "encode_vision.all", 0.25, "merge"), cuts)


def test_by_what_the_class_row_looks_at():
    runs_as("owl", compressed("owl", "vision", 0.25, "dominant"), {"end": CHOICES["dominant"]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_image(family):
    """Pixels and tables of positions are scaled in the same way; a row stands where the first stood that it is near."""
    prompts = ids_of(family, "batch")
    images = shown(family, prompts)
    made = seen_images(family, images, None, (2, 2))
    if family == "janus":
        made.places = torch.tensor([[0, 1, 3, 9, 11]]).expand(len(images), -1)
    program = compressed(family, "pixels", 0.25, "resize")
    close(run(program, prompts, images), reference(family, prompts, FORCED, made))


@pytest.mark.parametrize("frames", [1, 3])
def test_videos(frames):
    """Rows of each frame are merged by themselves."""
    prompts = ids_of("flamingo", "apart")
    images = shown("flamingo", prompts, frames)
    for site, cuts in (("encode_vision.1", {1: CHOICES["merge"]}), ("encode_vision", {"end": CHOICES["pool"]})):
        method = "merge" if 1 in cuts else "pool"
        wanted = reference("flamingo", prompts, FORCED, flamingo_images(images, cuts))
        close(run(compressed("flamingo", site, KEEP[method], method), prompts, images), wanted)


def test_fewer_latents():
    """Images outside the text: the language model reads fewer rows of each."""
    program = compressed("flamingo", "resample", 0.5, "uniform")
    assert program.info.cross.tokens == 4
    prompts = ids_of("flamingo", "batch")
    images = shown("flamingo", prompts)
    close(
        run(program, prompts, images),
        reference("flamingo", prompts, FORCED, flamingo_images(images)[:, :, [0, 2, 4, 6]]),
    )


# ------------------------------------------------------------------------------------------- inside the language model
@pytest.mark.parametrize(("family", "method"), [("owl", "merge"), ("owl", "uniform"), ("janus", "pool")])
def test_inside_the_language_model(family, method):
    """Later layers hold fewer rows of each image, at the positions that they had."""
    choice = {"merge": selected("merge", 4), "uniform": of_queries("uniform"), "pool": CHOICES["pool"]}[method]
    program = compressed(family, "language_model.1", 0.25 if family == "janus" else 0.5, method)
    assert program.info.tokens_per_image == (17 if family == "janus" else 9)
    for layout in LAYOUTS:
        prompts = ids_of(family, layout)
        images = shown(family, prompts)
        made = Images(*[torch.zeros(0, 0, 0)] * 2, 0) if images is None else seen_images(family, images)
        wanted = reference(family, prompts, FORCED, made, inside=inside(family, choice))
        close(run(program, prompts, images), wanted)
        if images is not None:
            assert (reference(family, prompts, FORCED, made) - wanted).abs().max() > FAR


# ------------------------------------------------------------------------------------------- a second time, and others
def refused_or_runs(program, *args, **kw):
    made, report = compress(program, *args, **kw)
    if report.rewrites:
        return made
    assert str(made) == str(program)
    return report.skipped[0]


@pytest.mark.parametrize(
    ("family", "first", "method", "site", "why"),
    [
        ("owl", "vision.1", "pool", "vision", "matmul"),
        ("owl", "abstractor", "uniform", "abstractor", "embedding"),
        ("janus", "encode_vision", "pool", "encode_vision", "matmul"),
        ("janus", "pixels", "resize", "pixels", "puts rows beside others"),
        ("janus", "language_model.1", "pool", "encode_vision", "left out inside the language model before"),
        ("flamingo", "encode_vision", "pool", "pixels", "matmul"),
    ],
)
def test_a_second_time_is_refused(family, first, method, site, why):
    keep = 0.5 if first in ("abstractor",) else 0.25
    program = compressed(family, first, keep, method)
    said = refused_or_runs(program, 0.5, "resize" if site == "pixels" else "pool", site)
    assert said.startswith(f"{site}: ")
    assert why in said


def test_at_another_site_before():
    """Rows left out behind the abstractor, then before it."""
    program = refused_or_runs(compressed("owl", "abstractor", 0.5, "uniform"), 0.25, "pool", "vision")
    prompts = ids_of("owl", "batch")
    images = shown("owl", prompts)
    made = owl_images(images, {"end": CHOICES["pool"]}, last=of_queries("uniform"))
    close(run(program, prompts, images), reference("owl", prompts, FORCED, made))


def test_scaled_down_twice():
    """The matrices of the first time are not those of the second."""
    once = compressed("owl", "pixels", 9 / 16, "resize")
    program = refused_or_runs(once, 4 / 9, "resize", "pixels")
    prompts = ids_of("owl", "one image")
    images = shown("owl", prompts)
    made = run(program, prompts, images)
    assert made.isfinite().all()
    assert (made - run(once, prompts, images)).abs().max() > FAR


def image_program(family):
    """What makes rows of images in a family of the transformers library, with few layers; and its module."""
    raw = json.loads((DATA / "flamingo" / family / "config.json").read_text())
    if family == "idefics":
        raw["vision_config"] |= {"num_hidden_layers": 1}
        raw["perceiver_config"] |= {"resampler_depth": 1}
    else:
        few = {"num_hidden_layers": 1, "num_global_layers": 1, "intermediate_layers_indices": [0]}
        raw["vision_config"] |= few | {"vision_output_dim": 64}
    model, weights = from_config(raw, "float32", random=True), {}
    specs = {k: s for k, s in model.family.stages(model.module, 16).items() if k in ("encode_vision", "resample")}
    stages = {k: trace_stage(s, weights) for k, s in specs.items()}
    cross = model.family.cross(model.config)
    return Program(stages, texts(*map(Call, stages)), weights, {}, toy_info(cross=cross)), model.module


def test_a_family_of_the_library():
    program, module = image_program("idefics")
    sites = {p.name: p for p in find_sites(program)}
    images = torch.randn(2, 3, 42, 42)
    made = narrow(program, sites["encode_vision"], 4, "uniform")
    rows = module.model.vision_model(images)[:, [0, 1, 3, 7, 9]]  # the class row, and the corners of 3 x 3
    found = made.stages["encode_vision"].run(made.weights, {"pixel_values": images})
    close(found["vision_rows"], rows)
    found = made.stages["resample"].run(made.weights, {k: found[k] for k in made.stages["resample"].inputs})
    close(found["image_rows"], module.resample(rows))
    for name, method in (("encode_vision.1", "pool"), ("pixels", "resize")):
        found = narrow(program, sites[name], 4, method).stages["encode_vision"].output_nodes()["vision_rows"]
        assert found.meta["shape"][1] == 5


def test_a_family_with_masks_of_fixed_length_says_so():
    program, _ = image_program("mllama")
    sites = find_sites(program)
    assert [p.name for p in sites] == ["pixels", "encode_vision"]
    for site, method in zip(sites, ("resize", "uniform"), strict=True):
        with pytest.raises(NotApplicable, match="what stands beside the rows"):
            narrow(program, site, 1, method)


# ---------------------------------------------------------------------------------------------------------- near misses
def janus_apart():
    prompts = ids_of("janus", "apart")
    images = shown("janus", prompts)
    return prompts, images, reference("janus", prompts, FORCED, janus_images(images, {"end": CHOICES["uniform"]}))


def test_columns_that_are_not_told_are_noticed(monkeypatch):
    prompts, images, wanted = janus_apart()
    real = row_positions._with_columns

    def empty(b, x, rows):
        made = real(b, x, rows)
        width = made.meta["shape"][2]
        kept = b.slice(made, 2, 0, width - 2)
        zeros = b.emit(
            propagate.MUL, (b.slice(made, 2, width - 2, width), 0.0), (*made.meta["shape"][:2], 2), made.meta["dtype"]
        )
        return b.cat([kept, zeros], 2)

    monkeypatch.setattr(row_positions, "_with_columns", empty)
    program, _ = compress(traced("janus"), 0.25, "uniform", "encode_vision")
    assert (run(program, prompts, images) - wanted).abs().max() > FAR


@pytest.mark.parametrize("key", ["position_delta_before", "position_delta"])
def test_a_host_that_forgets_images_is_noticed(monkeypatch, key):
    prompts, images, wanted = janus_apart()
    real = planning.position_deltas

    def forgets(before, after, info):
        made = real(before, after, info)
        return made | {key: made[key] * 0}

    monkeypatch.setattr("mmopt.ir.interpreter.position_deltas", forgets)
    program = compressed("janus", "encode_vision", 0.25, "uniform")
    assert (run(program, prompts, images) - wanted).abs().max() > FAR


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_are_dropped_are_noticed(monkeypatch, family):
    real = propagate.PrunePropagator.weight_of_sizes

    def one_each(self, keys, rows):
        logs = real(self, keys, rows)
        return self.b.emit(propagate.MUL, (logs, 0.0), logs.meta["shape"], logs.meta["dtype"])

    monkeypatch.setattr(propagate.PrunePropagator, "weight_of_sizes", one_each)
    program, _ = compress(traced(family), 6 / 16, "pool", TOWERS[family] + ".1")  # windows of 4 and of 2 rows
    prompts = ids_of(family, "batch")
    images = shown(family, prompts)
    wanted = reference(family, prompts, FORCED, seen_images(family, images, {1: selected("pool", 6)}))
    assert (run(program, prompts, images) - wanted).abs().max() > FAR


def test_keys_at_other_places_are_noticed():
    prompts = ids_of("owl", "batch")
    images = shown("owl", prompts)
    made = run(compressed("owl", "vision", 0.25, "uniform"), prompts, images)

    def first_places(x, left, **more):
        return CHOICES["uniform"](x, left, **more)[0], Left(left.places[:, :4])

    assert (made - reference("owl", prompts, FORCED, owl_images(images, {"end": first_places}))).abs().max() > FAR


# ------------------------------------------------------------------------------------------------------------ positions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_columns_hold_positions_exactly(dtype):
    """Of a row before the patches, of any of 16000 patches, and of a row behind."""
    b, count, kept = Builder(), 16000, 5
    x = b.placeholder("x", (sympy.Symbol("N"), kept + 2, 3), dtype)
    places = b.placeholder("places", (sympy.Symbol("N"), kept), torch.int64)
    b.output([row_positions._with_columns(b, x, ImageRows(1, 1, count, new=kept, places=places))])
    stage = Stage(b.graph, ["x", "places"], ["y"])
    at = torch.tensor([[0, 128, 300, 777, 15999], [3, 4, 129, 255, 8191]])
    rows = torch.randn(2, kept + 2, 3).to(dtype)
    made = stage.run({}, {"x": rows, "places": at})["y"]
    assert made.dtype == dtype
    assert torch.equal(made[..., :3], rows)
    moved = made[..., 3].double() * row_positions.BASE + made[..., 4].double()
    wanted = torch.cat([torch.zeros(2, 1), at - torch.arange(kept), torch.full((2, 1), count - kept)], 1)
    assert torch.equal(moved, wanted.double())


def test_both_columns_are_read(monkeypatch):
    """With a base of 3 these small images need both."""
    prompts, images, wanted = janus_apart()
    monkeypatch.setattr(row_positions, "BASE", 3)
    program, _ = compress(traced("janus"), 0.25, "uniform", "encode_vision")
    close(run(program, prompts, images), wanted)


def test_half_precision():
    """The same places are kept, and positions are exact; the rest is rounding."""
    prompts, images, wanted = janus_apart()
    program, _ = compress(traced("janus", "bfloat16"), 0.25, "uniform", "encode_vision")
    few = janus_images(images, {"end": CHOICES["uniform"]})
    other = reference("janus", prompts, FORCED, few, renumber=True)
    errors = [float((run(program, prompts, images) - x).norm() / x.norm()) for x in (wanted, other)]
    assert errors[0] < 0.05 < 0.1 < errors[1]


def test_prompts_that_are_made_up_stay_within_the_table():
    """Of `inspect` and of the checks of passes."""
    program = compressed("janus", "encode_vision", 0.25, "uniform")
    info = replace(program.info, positions=50)
    for images, text in ((1, 33), (2, 16)):
        prompt = typical_prompt(info, images)
        assert len(prompt) - images == text
        planning.layout_prompts([prompt], info, 1)
    with pytest.raises(ValueError, match="3 images take"):
        typical_prompt(info, 3)
    few = program.copy()
    few.info = replace(few.info, positions=30)
    prompts = random_inputs(few, 1, 0)["prompts"]
    assert [p.count(program.info.image_id) for p in prompts] == [1, 0, 1]
    planning.layout_prompts(prompts, few.info, 3)


def test_positions_beyond_the_table():
    program = compressed("janus", "encode_vision", 0.25, "uniform")
    assert program.info.positions == 90
    assert program.info.position_delta == 12
    info = replace(program.info, positions=30)
    (prompt,) = ids_of("janus", [(3, I, 4)])  # 7 ids and 17 positions
    planning.layout_prompts([prompt], info, 7)
    with pytest.raises(ValueError, match=r"prompt 0 reaches position 31, .* the model has 30; renumber positions"):
        planning.layout_prompts([prompt], info, 8)


def test_errors_name_the_pass():
    with pytest.raises(ContractError, match="pass compress_visual_tokens failed: ValueError: site is 'x'"):
        mmopt.optimize(traced("owl"), [CompressVisualTokens(site="x")])
