"""A trained checkpoint that reads and paints, the whole way: load, optimize, fit fewer steps, export, before and after.

python examples/demo_janusflow.py [--samples N] [--pictures N] [--out DIRECTORY]
"""

import argparse
import sys
import time
from pathlib import Path

import digits
import numpy as np
import pictures
import torch
from judge import frechet, judge, normalised
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from train_autoencoder import psnr

import mmopt
from mmopt.flow.reference import relative_errors
from mmopt.frontend.load import Model
from mmopt.passes.reduce_flow_steps import ReduceFlowSteps
from mmopt.spec.flow_sampler import levels

CHECKPOINT = Path(__file__).parent / "checkpoints/janusflow-digits"
WAYS = [("before: model", 30, "euler"), ("after: engine", 30, "euler")]  # who paints, steps, solver
WAYS += [("after: engine", 10, "fitted"), ("after: engine", 8, "fitted"), ("fine solution", 100, "ab2")]
BATCH, FIT = 8, {"samples": 12, "fine": 60}  # images at once; noises to fit to (as many are held out)
PROMPTS = digits.Prompts(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
Painted = tuple[np.ndarray, np.ndarray, float]  # pixels [n, 32, 32, 3] uint8, latents [n, 4, 8, 8], seconds of one
COLUMNS, CELL, GAP, LEFT, TOP = 12, 3 * pictures.SIZE, 8, 132, 52  # of the contact sheet; all but the first in pixels


def part_of(some: pictures.Pictures, part: slice) -> pictures.Pictures:
    return pictures.Pictures(*(x[part] for x in some))


def build(out: Path, threads: int) -> tuple[Model, mmopt.Engine]:
    print(f"== load, optimize, fit and export {CHECKPOINT.name}")
    model = mmopt.load(CHECKPOINT, "float32")
    result = mmopt.optimize(mmopt.trace(model, batch=BATCH, images=1, context=96))
    print(result)
    wanted, _ = digits.orders(2 * FIT["samples"], seed=5)
    ids = [PROMPTS.painting(wanted.caption(i)) for i in range(2 * FIT["samples"])]
    fits = [mmopt.fit_flow_plan(result.program, ids[::2], n, held_out=ids[1::2], **FIT) for _, n, _ in WAYS[2:4]]
    for fit in fits:
        print(f"   {fit.plan.evaluations} steps fitted to {FIT['samples']} noises; {fit.reason}")
    program, report = ReduceFlowSteps(fitted=[fit.plan for fit in fits])(result.program)
    mmopt.export(program, out, reports=[*result.reports, report])
    print(f"   wrote {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB")
    return model, mmopt.Engine(out, threads=threads)


def read(model: Model, engine: mmopt.Engine, count: int) -> int:
    """Ask both about pictures, one by one; returns how often only one of the two was right."""
    shown = part_of(pictures.stored(), slice(count))
    print("\n== the engine answers questions about pictures it has never seen")
    hits: dict[str, list[tuple[bool, bool]]] = {part: [] for part in pictures.QUESTIONS}
    for i in range(len(shown.pixels)):
        right, told = shown.words(i), ""
        for part, share in digits.answers(model.module, PROMPTS, part_of(shown, slice(i, i + 1))).items():
            answer = engine.generate(pictures.QUESTIONS[part], images=[shown.pixels[i]], max_new_tokens=2)
            hits[part].append((share == 1, answer.text == right[part] and answer.finish_reason == "stop"))
            told += f"{pictures.QUESTIONS[part]} {answer.text}   "
        if i < 6:
            print(f"   {told}(right: {', '.join(right.values())})", flush=True)
    print(f"\n== accuracy on {len(shown.pixels)} pictures\n   {'question':<32}{'model':>8}{'engine':>8}")
    for part, pairs in hits.items():
        print("   {:<32}{:>8.3f}{:>8.3f}".format(pictures.QUESTIONS[part], *np.mean(pairs, axis=0)))
    return sum(a != b for pairs in hits.values() for a, b in pairs)


def paint(model: Model, engine: mmopt.Engine, wanted: pictures.Pictures, noise: torch.Tensor) -> list[Painted]:
    """The same captions and noises in all WAYS, interleaved."""
    made: list[list[Painted]] = [[] for _ in WAYS]
    for start in range(0, len(noise), BATCH):
        part = slice(start, start + BATCH)
        captions = [wanted.caption(i) for i in range(len(noise))[part]]
        for (who, steps, solver), kept in zip(WAYS, made, strict=True):
            begin = time.perf_counter()
            if who == "before: model":
                pixels, latents = digits.painted(model.module, PROMPTS, part_of(wanted, part), noise[part], steps)
            else:
                painting = engine.generate_images(captions, steps=steps, solver=solver, noise=noise[part].numpy())
                pixels, latents = levels(painting.pixels), painting.latents
            kept.append((pixels, np.asarray(latents), (time.perf_counter() - begin) / len(captions)))
    return [(np.concatenate(p), np.concatenate(z), np.median(t)) for p, z, t in (zip(*m, strict=True) for m in made)]


def table(painted: list[Painted], wanted: pictures.Pictures) -> None:
    fine_pixels, fine_latents, _ = painted[-1]
    real = part_of(pictures.stored(), slice(len(fine_pixels)))
    seen = judge(real.pixels)
    print(f"   {'':<15}  steps          passes  s/image  as asked  Fréchet   error     p90   PSNR")
    print(f"   {'real pictures':<15}{'':>32}{seen.right(real)['all']:>10.3f}{frechet(seen.features):>9.1f}")
    for (who, steps, solver), (pixels, latents, seconds) in zip(WAYS[:-1], painted[:-1], strict=True):
        seen, errors = judge(pixels), relative_errors(latents, fine_latents)
        quality = psnr(normalised(pixels), normalised(fine_pixels)).mean()
        print(f"   {who:<15}{steps:>7} {solver:<8}{2 * steps:>8}{seconds:>9.4f}", end="")
        print(f"{seen.right(wanted)['all']:>10.3f}{frechet(seen.features):>9.1f}", end="")
        print(f"{errors.mean():>8.4f}{np.quantile(errors, 0.9):>8.4f}{quality:>7.1f}")


def sheet(painted: list[Painted], captions: list[str], path: Path) -> None:
    """Write one row for each way but the fine solution, one column for each caption."""
    step, font, rows = CELL + GAP, ImageFont.load_default(14), len(painted) - 1
    made = Image.new("RGB", (LEFT + step * len(captions) + GAP, TOP + step * rows + GAP), "white")
    draw = ImageDraw.Draw(made)
    for x, caption in enumerate(captions):
        draw.multiline_text((LEFT + x * step + CELL // 2, TOP // 2 + 2), caption, "black", font, "mm", align="center")
    for y, ((who, steps, solver), (pixels, *_)) in enumerate(zip(WAYS[:-1], painted[:-1], strict=True)):
        label = f"{who}\n{steps} steps, {solver}\n{2 * steps} passes"
        draw.multiline_text((2 * GAP, TOP + y * step + CELL // 2), label, "black", font, "lm", spacing=6)
        for x in range(len(captions)):
            made.paste(Image.fromarray(pixels[x].repeat(3, 0).repeat(3, 1)), (LEFT + x * step, TOP + y * step))
    made.save(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--samples", type=int, default=80, help="paintings for the figures, at least 2")
    arguments.add_argument("--pictures", type=int, default=100, help="pictures to read, 1 to 400")
    arguments.add_argument("--out", type=Path, default=Path("out/janusflow-digits"), help="engine directory")
    arguments.add_argument("--threads", type=int, default=1)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    model, engine = build(args.out, args.threads)
    differing = read(model, engine, args.pictures)
    print(f"   only one of the two is right: {differing} times")
    print(f"\n== {args.samples} paintings, the same captions and noises each way, {args.threads} threads, float32")
    wanted, noise = digits.orders(args.samples, seed=1)
    painted = paint(model, engine, wanted, noise)
    table(painted, wanted)
    print(
        f"   (s/image: {BATCH} at once. as asked, Fréchet: by an independent judge; distance to 10,000 real pictures,"
    )
    print("   biased upwards for so few, most for varied ones. error, PSNR: from a fine solution of the same noise.)")
    drift = float(np.abs(painted[1][1] - painted[0][1]).max())
    print(f"   engine and model, {WAYS[0][1]} Euler steps: largest difference of latents {drift:.2e}")
    path = args.out / "paintings.png"
    sheet(painted, [wanted.caption(i).replace(" on ", "\non ") for i in range(min(COLUMNS, args.samples))], path)
    print(f"   wrote {path}")
    if differing or not drift < 1e-3:
        sys.exit(f"the engine differs from the model: {differing} answers, latents by up to {drift:.2e}")


if __name__ == "__main__":
    main()
