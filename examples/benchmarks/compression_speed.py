"""Time to first token with fewer visual tokens, at each site where that may pay, beside all of them.

    python examples/benchmarks/compression_speed.py --out speed.json --plot speed.png

Exported engines of middle size with random weights. Every site has a group of its own: the engine with all rows and
those with fewer take turns, so that times are paired. An engine whose logits are not those of its Program before the
exact passes, run in torch, is not timed. Results of other configs that the file has already stay in it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import mmopt
from mmopt.ir.inspect import inspect, typical_prompt
from mmopt.measure.head import conditions_text, head
from mmopt.measure.ratios import spread
from mmopt.measure.roofline import in_rounds, summary
from mmopt.measure.variants import EngineStages, Inputs
from mmopt.passes.compress_visual_tokens import CompressVisualTokens
from mmopt.pruning.apply import find_sites
from mmopt.pruning.sites import PIXELS, PruneSite, image_stages
from mmopt.report import number, png_figure, save_png
from mmopt.rewrite.contracts import difference
from mmopt.spec.files import save_json
from mmopt.spec.schema import SCHEMA

CONFIGS = ("mplug-owl2-mid", "openflamingo-mid", "janusflow-mid")
KEEP_RATIOS = (0.5, 0.25, 0.125)
REPEATS = 2  # timed calls in a row, after one that is not; the better one counts
FULL, RESIZE = "full", "resize"
FIRST, LANGUAGE = "first token", "language"
NOTES = (
    "One image and the text that follows it. encode: the stages of the image. prefill: the language model on the whole "
    "prompt, nothing kept from an earlier one. first token: both, added up within a round.",
    "language: prefill, and choosing the rows. Where that is the last thing that the stages of the image do, it takes "
    "what they take longer than with all rows: the median of the rounds' differences, at least 0.",
    "x: times of the engine with all rows over times; paired: of each round, median (quartiles); minima: of the least "
    "times; FLOPs: counted (`mmopt.inspect`), with those of choosing.",
)


class Way(NamedTuple):
    """How tokens are left out at a site. keep_ratio: the share that stays."""

    method: str
    keep_ratio: float


# ------------------------------------------------------------------------------------------------------- what is timed
def sites_of(program: mmopt.Program) -> dict[str, tuple[str, ...]]:
    """The sites to be timed and the methods at each: pixels, after a third of the tower, all through it, where rows
    leave each stage of the image, after a sixth of the language model if images lie among its rows."""
    found, stages = find_sites(program), image_stages(program)
    tower = next(p.stage for p in found if p.name == PIXELS)
    apart = [p.stage for p in found if p.stage not in stages]
    chosen = {PIXELS: (RESIZE,), early(found, tower, 1 / 3): ("merge", "pool")}
    chosen |= {p.name: ("dominant",) for p in found if p.name == f"{tower}.all"}
    chosen |= {p.name: ("pool", "diverse") for p in found if p.name == p.stage}
    return chosen | {early(found, s, 1 / 6): ("pool", "diverse") for s in dict.fromkeys(apart)}


def early(sites: Sequence[PruneSite], stage: str, share: float) -> str:
    """The site after such a share of a stage's attentions, at least one."""
    inside = [p.name for p in sites if p.stage == stage and p.name.removeprefix(f"{stage}.").isdecimal()]
    return inside[max(0, round(share * len(inside)) - 1)]


def inputs_of(engine: mmopt.Engine) -> Inputs:
    """A random image, the random text of the typical prompt after it, and one more token."""
    info, random = engine.info, np.random.default_rng(0)
    most = info.image_id if 0 < info.image_id < info.vocab_size else info.vocab_size
    ids = random.integers(3, most, len(typical_prompt(info, 1, 0))).tolist()
    pixels = random.standard_normal((1, *engine.decoder.pixels.sizes(-3)), np.float32)
    pixels = pixels[:, None] if engine.decoder.takes_frames else pixels
    return Inputs(pixels, ids[:-1], 0, info.tokens_per_image, ids[-1])


def build(
    program: mmopt.Program, site: str, way: Way, folder: Path, threads: int
) -> tuple[EngineStages | None, dict[str, Any]]:
    """An engine, and the counted FLOPs; no engine if the pass refuses or the engine answers something else."""
    rows = {p.name: p.rows for p in find_sites(program)}[site]
    facts: dict[str, Any] = {
        "site": site,
        **way._asdict(),
        "tokens": rows,
        "kept": max(1, round(way.keep_ratio * rows)),
    }
    fewer = program
    if way.method != FULL:
        result = mmopt.optimize(program, [CompressVisualTokens(way.keep_ratio, way.method, site)], check=False)
        if not result.reports[0].rewrites:
            return None, facts | {"refused": "; ".join(result.reports[0].skipped)}
        fewer = result.program
    made = mmopt.optimize(fewer, check=False).program
    totals = inspect(made, batch=1, images=1, new_tokens=1)["totals"]
    facts["flops"] = {"encode": totals["encode_flops_per_image"], "prefill": totals["prefill_flops"]}
    engine = mmopt.Engine(mmopt.export(made, folder, check=False), provider="cpu", threads=threads)
    stages = EngineStages(engine, inputs_of(engine))
    for stage in ("encode", "prefill"):
        stages.run(stage)
    wanted = fewer(prompts=[stages.prompt], pixel_values=torch.from_numpy(stages.inputs.pixels))["logits"][0, -1]
    if wrong := difference(wanted, torch.from_numpy(stages.logits())):
        return None, facts | {"failed": f"logits differ from those in torch by {wrong[0]:.3g}, allowed {wrong[1]:.3g}"}
    return stages, facts


# ---------------------------------------------------------------------------------------------------------- measuring
def measure(
    config: str, keeps: Sequence[float], sites: Sequence[str], rounds: int, threads: int, tell: Callable[..., None]
) -> dict[str, Any]:
    """All sites of a config, or those named. ValueError for a site that it does not have."""
    model = mmopt.from_config(config, "float32", random=True)
    tell(f"{config}: tracing")
    program = mmopt.trace(model)
    there = sites_of(program)
    if wrong := [p for p in sites if p not in there]:
        raise ValueError(f"--sites: expected some of {', '.join(there)}, found {', '.join(wrong)}")
    rows, limits = [], {}
    for site in sites or there:
        tell(f"{config}: building {site}")
        ways = [Way(FULL, 1.0), *(Way(m, k) for m in there[site] for k in keeps)]
        made, limits[site] = group(program, site, ways, rounds, threads, tell)
        rows += made
    return {
        **head("compression speed", threads, program.info.dtype),
        "sizes": {
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "context": program.info.context,
            "tokens_per_image": program.info.tokens_per_image,
            "text": len(typical_prompt(program.info, 1, 0)) - 1,
            "rounds": rounds,
        },
        "rows": rows,
        "limits": limits,
        "notes": list(NOTES),
    }


def group(
    program: mmopt.Program, site: str, ways: Sequence[Way], rounds: int, threads: int, tell: Callable[..., None]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of results of one site, that with all rows of the image first, and the limits of the machine."""
    last = image_stages(program)[-1]
    with tempfile.TemporaryDirectory(prefix="mmopt-bench-") as folder:
        built = {w: build(program, site, w, Path(folder, str(i)), threads) for i, w in enumerate(ways)}
        stages = {w: s for w, (s, _) in built.items() if s is not None}
        if ways[0] not in stages:
            raise ValueError(f"{site}: the engine with all rows: {built[ways[0]][1]['failed']}")
        if len(stages) == 1:
            return [facts for w, (_, facts) in built.items() if w not in stages], {}
        calls: dict[tuple[str, Any], Callable[[], Any]] = {
            (name, w): partial(s.run, name) for name in ("encode", "prefill") for w, s in stages.items()
        }
        cpu, kind = torch.device("cpu"), program.dtype
        times, limits = in_rounds(calls, rounds, cpu, kind, threads, partial(tell, f"{site}:"), lambda _: REPEATS)
    taken = {w: [np.array([min(r) for r in times[name, w]]) for name in ("encode", "prefill")] for w in stages}
    base, counted = taken[ways[0]], [*built[ways[0]][1]["flops"].values()]
    language = site == last or site.split(".")[0] not in (PIXELS, *image_stages(program))
    for w, own in taken.items():
        facts, flops = built[w][1], [*built[w][1]["flops"].values()]
        choosing = [0.0, 0.0]  # seconds, FLOPs; within the language model they are in prefill
        if site == last:
            choosing = [max(0.0, float(np.median(own[0] - base[0]))), max(0.0, flops[0] - counted[0])]
            facts["choosing_ms"] = 1e3 * choosing[0]
        took, work = sums(*own, choosing[0], language), sums(*flops, choosing[1], language)
        whole, all_work = sums(*base, 0.0, language), sums(*counted, 0.0, language)
        facts["times"] = {k: spread(x.tolist()) for k, x in took.items()}
        facts["faster"] = {k: faster(whole[k], x) | {"flops": all_work[k] / work[k]} for k, x in took.items()}
    return [facts for _, facts in built.values()], summary(limits)


def sums(encode: Any, prefill: Any, choosing: float, language: bool) -> dict[str, Any]:
    """What is looked at, of times or of FLOPs. language: rows are chosen right before the language model or in it."""
    made = {"encode": encode, "prefill": prefill, FIRST: encode + prefill}
    return made | {LANGUAGE: prefill + choosing} if language else made


def faster(base: np.ndarray, own: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(base / own, [0.25, 0.5, 0.75]).tolist()
    minima = float(base.min() / own.min())
    return {"minima": minima, "paired_p25": low, "paired_median": middle, "paired_p75": high}


# ------------------------------------------------------------------------------------------------------------ results
def headed(config: str, found: dict[str, Any]) -> Console:
    """A console that writes to a text, which begins with what a figure is worth nothing without."""
    console = Console(file=io.StringIO(), width=200, markup=False, highlight=False)
    console.print(f"{config}: {conditions_text(found)}")
    return console


def text(config: str, found: dict[str, Any]) -> str:
    """One config as a table."""
    console, sizes = headed(config, found), found["sizes"]
    console.print(
        f"{sizes['parameters'] / 1e6:.1f} M parameters; {sizes['tokens_per_image']} tokens of the image among the text "
        f"or its marker, {sizes['text']} of text; {sizes['rounds']} interleaved rounds; ms"
    )
    heads = ("site", "method", "tokens", "FLOP", "encode", "prefill", FIRST, "least", "x paired", "minima", "FLOPs")
    table = Table(*heads, "choosing", LANGUAGE, "x paired", "minima", "FLOPs")
    for r, after in zip(found["rows"], [*found["rows"][1:], {"site": None}], strict=True):
        if "times" not in r:
            continue
        ms = {k: f"{t['median_ms']:.1f}" for k, t in r["times"].items()}
        wide = "{median_ms:.1f} ({p25_ms:.1f}-{p75_ms:.1f})".format(**r["times"][FIRST])
        cells = [number(sum(r["flops"].values())), ms["encode"], ms["prefill"], wide]
        cells += [f"{r['times'][FIRST]['min_ms']:.1f}", *ratios(r, FIRST)]
        cells += [f"{r['choosing_ms']:.1f}" if "choosing_ms" in r else "", ms.get(LANGUAGE, ""), *ratios(r, LANGUAGE)]
        own = [r["site"], r["method"], f"{r['kept']}/{r['tokens']}"]
        table.add_row(*own, *cells, end_section=after["site"] != r["site"])
    console.print(table)
    for r in found["rows"]:
        for kind in ("refused", "failed"):
            if kind in r:
                console.print(
                    f"{kind}: {r['method']} {r['keep_ratio']:g} at {r[kind] if kind == 'refused' else r['site']}"
                )
    rate = max((x["gemm_gflop_per_s"] for x in found["limits"].values() if x), default=0.0)
    console.print(f"products of matrices in the same rounds: {rate:.0f} GFLOP/s at best")
    for note in found["notes"]:
        console.print(f"- {note}")
    return console.file.getvalue()  # type: ignore[attr-defined]


def ratios(row: dict[str, Any], name: str) -> tuple[str, str, str]:
    x = row["faster"].get(name)
    if x is None or row["method"] == FULL:
        return "", "", ""
    paired = "{paired_median:.2f} ({paired_p25:.2f}-{paired_p75:.2f})".format(**x)
    return paired, f"{x['minima']:.2f}", f"{x['flops']:.2f}"


def plot(configs: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Time to first token over the share of rows kept, median and quartiles, an axis for each config; a PNG file.

    Raises ImportError without matplotlib, ValueError for a name that does not end in .png.
    """
    figure = png_figure(path, (5.2 * len(configs), 4))
    for axes, (config, found) in zip(figure.subplots(1, len(configs), squeeze=False)[0], configs.items(), strict=True):
        rows = [r for r in found["rows"] if "times" in r]
        lines = list(dict.fromkeys((r["site"], r["method"]) for r in rows if r["method"] != FULL))
        sites = list(dict.fromkeys(site for site, _ in lines))
        for i, (site, method) in enumerate(lines):
            here = [r for r in rows if r["site"] == site and r["method"] in (FULL, method)]
            own = [(r["keep_ratio"], r["times"][FIRST]) for r in sorted(here, key=lambda r: r["keep_ratio"])]
            middle = [t["median_ms"] for _, t in own]
            bars = [[abs(t[q] - t["median_ms"]) for _, t in own] for q in ("p25_ms", "p75_ms")]
            style = {"color": f"C{sites.index(site)}", "linestyle": "--" if i and lines[i - 1][0] == site else "-"}
            name = f"{site}, {method}"
            axes.errorbar([k for k, _ in own], middle, bars, label=name, marker="o", markersize=3, capsize=2, **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({r["keep_ratio"] for r in rows})
        axes.set_xticks(ticks, [f"{k:.3g}" for k in ticks])
        axes.set_ylim(bottom=0)
        axes.set_title(config, fontsize="medium")
        axes.set_xlabel("share of tokens kept")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.axes[0].set_ylabel("ms to first token")
    save_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=CONFIGS, help=f"by default {', '.join(CONFIGS)}")
    parser.add_argument("--keep-ratios", default=",".join(map(str, KEEP_RATIOS)))
    parser.add_argument("--sites", default="", help="names, by default all that may pay")
    parser.add_argument("--rounds", type=int, default=20, help="0: show what the file holds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    configs = json.loads(a.out.read_text())["configs"] if a.out and a.out.exists() else {}
    keeps, sites = [float(k) for k in a.keep_ratios.split(",")], [p for p in a.sites.split(",") if p]
    tell = partial(print, file=sys.stderr, flush=True)
    for config in a.configs if a.rounds else ():
        with torch.no_grad():
            configs[config] = measure(config, keeps, sites, a.rounds, a.threads, tell)
        if a.out:
            save_json({"schema": SCHEMA, "kind": "compression speed", "configs": configs}, a.out)
    for config, found in configs.items():
        print(text(config, found))
    if a.plot and configs:
        plot(configs, a.plot)
    if failed := [r for found in configs.values() for r in found["rows"] if "failed" in r]:
        sys.exit(f"{len(failed)} engines answer something else than their Programs, for example {failed[0]}")


if __name__ == "__main__":
    main()
