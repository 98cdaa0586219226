"""An exported engine against the transformers library's own `generate`: the same random weights, paired in one process.

    python examples/benchmarks/against_library.py CONFIG [--images N] [--text N] [--new-tokens N] [--out FILE.json]

First token: pixels and ids -> the first new id, vision included. Decode: the time of `new_tokens` further tokens, a
token. The library runs its sdpa attention with its default cache. Greedy ids must be the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import mmopt
from mmopt.measure.head import conditions_text, head
from mmopt.report import number
from mmopt.spec.cross_mask import masks, visible_tiles
from mmopt.spec.files import save_json


def library_model(model, directory: Path):
    """The library's own class, loaded from a checkpoint directory with the weights of a model of ours."""
    directory.mkdir()
    tensors = {k: x.contiguous() for k, x in model.module.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(model.raw_config))
    kind = getattr(transformers, model.raw_config["architectures"][0])
    made, found = kind.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    if found["missing_keys"] or found["unexpected_keys"]:
        raise SystemExit(f"the library misses {len(found['missing_keys'])} weights and does not know "
                         f"{len(found['unexpected_keys'])}: {sorted(found['missing_keys'])[:3]}")  # fmt: skip
    made.generation_config.eos_token_id = None
    return made.eval().requires_grad_(False)


def draw(engine, images: int, text: int):
    """(ids, what the image stages take, tiles of each image or None) of one random prompt."""
    g, info = np.random.default_rng(0), engine.info
    shape = engine.decoder.pixels.shape[1:]
    ids = g.integers(3, min(info.vocab_size, info.image_id) - 2, text).tolist()
    for i in range(images):
        ids[1 + i * (text // max(images, 1))] = info.image_id
    inputs = {"pixel_values": g.standard_normal((images, *shape), np.float32)}
    tiles = None
    if info.cross.tiles > 1:
        tiles = [1] * images
        inputs["aspect_ratio_ids"] = np.ones((images, 1), np.int64)[:, 0]
        inputs["aspect_ratio_mask"] = np.eye(1, info.cross.tiles, dtype=np.int64).repeat(images, 0)
        inputs["pixel_values"][:, 1:] = 0
    return ids, inputs, tiles


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config")
    arguments.add_argument("--images", type=int, default=1)
    arguments.add_argument("--text", type=int, default=64)
    arguments.add_argument("--new-tokens", type=int, default=32)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model = mmopt.from_config(args.config, "float32", random=True)
    context = args.text + args.new_tokens + 1
    program = mmopt.trace(model, batch=1, images=args.images, context=-(-context // 64) * 64)
    result = mmopt.optimize(program, check=False)
    with tempfile.TemporaryDirectory() as out:
        engine = mmopt.Engine(mmopt.export(result.program, Path(out) / "engine", check=False), threads=args.threads)
        theirs = library_model(model, Path(out) / "checkpoint")
        ids, inputs, tiles = draw(engine, args.images, args.text)
        seen, _, _ = masks(
            visible_tiles(ids, args.images, engine.info.required_cross, engine.info.image_id, tiles=tiles),
            args.images * engine.info.cross.tiles,
        )
        given = {k: torch.from_numpy(x)[None] for k, x in inputs.items()}
        given |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if tiles is None:
            given["image_attention_mask"] = torch.from_numpy(seen).long()[None]
        else:
            given["cross_attention_mask"] = torch.from_numpy(seen).long().view(1, len(ids), args.images, -1)
        rest = {k: x for k, x in inputs.items() if k != "pixel_values"}

        def ours(new: int) -> list[int]:
            return engine.debug.generate_ids(
                [ids], inputs["pixel_values"], image_inputs=rest, tiles=tiles, max_new_tokens=new, ignore_eos=True
            ).tokens[0]

        def library(new: int) -> list[int]:
            made = theirs.generate(**given, max_new_tokens=new, do_sample=False, pad_token_id=0)
            return made[0, len(ids) :].tolist()

        more = args.new_tokens + 1
        a, b = ours(more), library(more)
        if a != b:
            raise SystemExit(f"the ids differ: engine {a}, library {b}")
        times = {(who, n): [] for who in ("engine", "library") for n in (1, more)}
        calls = {"engine": ours, "library": library}
        for r in range(args.rounds):
            for who in list(calls)[:: 1 if r % 2 else -1]:
                for n in (1, more):
                    start = time.perf_counter()
                    calls[who](n)
                    times[who, n].append(time.perf_counter() - start)
    rows = []
    for who in calls:
        decode = [(b - a) / args.new_tokens for a, b in zip(times[who, 1], times[who, more], strict=True)]
        for stage, seconds in (("first token", times[who, 1]), ("decode, a token", decode)):
            ms = [1e3 * s for s in seconds]
            rows.append(
                {
                    "stage": stage,
                    "variant": who,
                    "min_ms": min(ms),
                    "median_ms": statistics.median(ms),
                    "max_ms": max(ms),
                }
            )
    best = {(r["stage"], r["variant"]): r["min_ms"] for r in rows}
    report = {
        **head("against the library", args.threads, "float32", packages=("torch", "onnxruntime", "transformers")),
        "config": args.config,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "sizes": {"images": args.images, "text": args.text, "new_tokens": args.new_tokens, "rounds": args.rounds},
        "rows": rows,
        "library_over_engine": {s: best[s, "library"] / best[s, "engine"] for s in ("first token", "decode, a token")},
    }
    print(f"{args.config}, {number(report['parameters'])} parameters: {conditions_text(report)}")
    for r in rows:
        times = "  ".join(f"{k} {r[f'{k}_ms']:8.2f}" for k in ("min", "median", "max"))
        print(f"  {r['stage']:<16} {r['variant']:<8} {times} ms")
    print(f"  library / engine, minimum: {report['library_over_engine']}")
    if args.out:
        save_json(report, args.out)


if __name__ == "__main__":
    main()
