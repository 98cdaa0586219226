"""Results of benchmarks as text and as pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmopt.measure.head import conditions_text
from mmopt.report import png_figure, save_png


def bench_text(result: dict[str, Any]) -> str:
    """What `mmopt.bench` returned, for people."""
    sizes, limits = result["sizes"], result["limits"]
    console, file = _begin(result)
    prompt = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in sizes["prompt"].items())
    console.print(
        f"{sizes['parameters'] / 1e6:.1f} M parameters; caches of {sizes['context']} rows, {sizes['filled']} filled; "
        f"prompt rows: {prompt}; {sizes['rounds']} interleaved rounds"
    )
    times = Table("stage", "variant", "min ms", "p25", "median", "p75", "x eager", "x compiled", "GEMM", "bandwidth")
    for r in result["rows"]:
        ratios = result["ratios"].get(r["stage"], {})
        faster = [_ratio(ratios.get(f"{r['variant']}_over_{b}")) for b in ("eager", "compiled")]
        share = result["shares"][r["stage"]][r["variant"]]
        spread = [f"{r[k]:.2f}" for k in ("min_ms", "p25_ms", "median_ms", "p75_ms")]
        limited = [f"{share[k]:.0%}" for k in ("gemm_share", "bandwidth_share")]
        times.add_row(r["stage"], r["variant"], *spread, *faster, *limited, end_section=r["variant"] == "engine")
    console.print(times)
    console.print(
        f"limits of the machine in the same rounds: {limits['bandwidth_gb_per_s']:.1f} GB/s, "
        f"{limits['gemm_gflop_per_s']:.0f} GFLOP/s"
    )
    for name, found in result["memory"].items():
        peak = f"{found['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in found else found["skipped"]
        console.print(f"peak anonymous memory, {name}: {peak}")
    chosen = ", ".join(f"{s}: {b}" for s, b in result["baselines"]["chosen"].items())
    console.print(f"better baseline: {chosen}")
    for name, why in result["skipped"].items():
        console.print(f"{name} was left out: {why}")
    for note in result["notes"]:
        console.print(f"- {note}")
    return file.getvalue()


def fewshot_text(result: dict[str, Any]) -> str:
    """What `mmopt.measure.bench_fewshot.bench_fewshot` returned, for people."""
    sizes = result["sizes"]
    console, file = _begin(result)
    console.print(
        f"{sizes['family']}, {sizes['parameters'] / 1e6:.1f} M parameters; caches of {sizes['context']} rows; "
        f"{sizes['rounds']} interleaved rounds"
    )
    times = Table("stage", "variant", "min ms", "p25", "median", "p75", "ratio", "paired")
    rows = result["rows"]
    for r, after in zip(rows, [*rows[1:], {"stage": None}], strict=True):
        found = result["ratios"].get(r["stage"], {})
        ratio: dict[str, float] = next((v for k, v in found.items() if k.startswith(f"{r['variant']} /")), {})
        spread = [f"{r[k]:.2f}" for k in ("min_ms", "p25_ms", "median_ms", "p75_ms")]
        ratios = [_ratio(ratio.get(k)) for k in ("minima", "paired_median")]
        times.add_row(r["stage"], r["variant"], *spread, *ratios, end_section=after["stage"] != r["stage"])
    console.print(times)
    console.print(
        "ratio: the time over that of passes on (queries: the prefix in memory; equal context: the fewest shots), "
        "minima; paired: the median of the ratios within a round"
    )
    limits = result["limits"]
    console.print(
        f"limits of the machine in the same rounds: {limits['bandwidth_gb_per_s']:.1f} GB/s at best, "
        f"{limits['read_gb_per_s, median']:.1f} in the median; {limits['gemm_gflop_per_s']:.0f} GFLOP/s at best"
    )
    for shots, work in result["work"].items():
        for name, w in work.items():
            console.print(
                f"{shots}, {name}: {w['flops'] / 1e9:.3f} GFLOP, {w['bytes'] / 1e6:.1f} MB of weights and "
                f"{w['cache_bytes'] / 1e6:.1f} MB of caches for a token"
            )
    for note in result["notes"]:
        console.print(f"- {note}")
    return file.getvalue()


def generation_text(result: dict[str, Any]) -> str:
    """What `mmopt.measure.bench_generation.bench_generation` returned, for people."""
    sizes, limits = result["sizes"], result["limits"]
    console, file = _begin(result)
    console.print(
        f"{sizes['family']}, {sizes['parameters'] / 1e6:.1f} M parameters; {sizes['tokens_per_image']} tokens an image"
        f"; {sizes['rounds']} interleaved rounds"
    )
    baselines = ("official", "prefix cached")
    heads = [f"x {b}{what}" for b in baselines for what in ("", ", paired")]
    times = Table("stage", "variant", "plan", "NFE", "min ms", "median", "p75", *heads)
    rows = result["rows"]
    for r, after in zip(rows, [*rows[1:], {"stage": None}], strict=True):
        plan = sizes["plans"].get(r["variant"], sizes["plans"]["official"])
        found = [result["ratios"][r["stage"]][f"{r['variant']} over {b}"] for b in baselines]
        ratios = [_ratio(f[k]) for f in found for k in ("minima", "paired_median")]
        spread = [f"{r[k]:.0f}" for k in ("min_ms", "median_ms", "p75_ms")]
        cells = [r["stage"], r["variant"], plan["name"], str(plan["forwards"]), *spread, *ratios]
        times.add_row(*cells, end_section=after["stage"] != r["stage"])
    console.print(times)
    console.print(
        f"limits of the machine in the same rounds: {limits['bandwidth_gb_per_s']:.1f} GB/s, "
        f"{limits['gemm_gflop_per_s']:.0f} GFLOP/s at best"
    )
    for length, work in result["work"].items():
        flops = ", ".join(f"{name} {f / 1e12:.3f} TFLOP" for name, f in work.items())
        console.print(f"a prompt of {length} ids: {flops}")
    for note in result["notes"]:
        console.print(f"- {note}")
    return file.getvalue()


def _begin(result: dict[str, Any]) -> tuple[Console, io.StringIO]:
    """A console that writes to a text, which begins with the conditions of a benchmark."""
    console = Console(file=(file := io.StringIO()), width=120, markup=False, highlight=False)
    console.print(conditions_text(result))
    return console, file


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def bench_plot(result: dict[str, Any], path: str | Path) -> None:
    """A bar for each stage and variant (minimum, with a line up to the third quartile), written to a PNG file.

    Raises ImportError without matplotlib, ValueError for a name that does not end in .png.
    """
    stages = list(dict.fromkeys(r["stage"] for r in result["rows"]))
    columns = min(len(stages), 4)
    lines = -(-len(stages) // columns)
    figure = png_figure(path, (3 * columns, 3.2 * lines))
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in places[len(stages) :]:
        axes.remove()
    for axes, stage in zip(places, stages, strict=False):
        rows = [r for r in result["rows"] if r["stage"] == stage]
        heights = [r["min_ms"] for r in rows]
        above = [r["p75_ms"] - r["min_ms"] for r in rows]
        axes.bar([r["variant"] for r in rows], heights, yerr=[[0] * len(rows), above], capsize=3, color="tab:blue")
        axes.set_title(stage, fontsize="medium", wrap=True)
        axes.set_ylabel("ms")
        axes.tick_params(axis="x", rotation=45)
    save_png(figure, path)
