"""A trained few-shot checkpoint, the whole way: load, optimize, export, answer after shots that are read only once.

python examples/demo_flamingo.py [--episodes N] [--out DIRECTORY]
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from codebook import Chunk, chunks_of
from episodes import CHUNKS, SHOTS, Checks, Prompts, logits_of, share
from tokenizers import Tokenizer

import mmopt
from mmopt.frontend.load import Model
from mmopt.runtime.request import Request

CHECKPOINT = Path(__file__).parent / "checkpoints/flamingo-vqa"
NEW_TOKENS = 2  # a word and the end of the chunk


class Reference:
    """The model as loaded, in plain PyTorch, whole prompts and no cache: what the engine has to agree with."""

    def __init__(self, model: Model):
        self.module = model.module
        self.prompts = Prompts(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), model.config)

    def ids(self, chunks: list[Chunk]) -> list[int]:
        return self.prompts.ids("".join(c.shot for c in chunks[:-1]) + chunks[-1].query)

    def answers(self, episodes: list[list[Chunk]], rows: dict[str, torch.Tensor]) -> tuple[list[str], np.ndarray]:
        """Greedy answers to the last chunks, of prompts that are equally long; and the first logits of each."""
        ids, first = torch.tensor([self.ids(e) for e in episodes]), None
        media, length = torch.stack([torch.stack([rows[c.image] for c in e]) for e in episodes]), ids.shape[1]
        for _ in range(NEW_TOKENS):
            logits = logits_of(self.module, ids, media)[:, -1]
            first = logits if first is None else first
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        new = [i[: i.index(self.prompts.end)] if self.prompts.end in i else i for i in ids[:, length:].tolist()]
        return [self.prompts.text.decode(n) for n in new], first.numpy()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--episodes", type=int, default=400, help="episodes of the code book to answer")
    arguments.add_argument("--out", type=Path, default=Path("out/flamingo-vqa"), help="engine directory")
    arguments.add_argument("--threads", type=int, default=1)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    print(f"== load, optimize and export {CHECKPOINT.name}")
    model = mmopt.load(CHECKPOINT, "float32")
    result = mmopt.optimize(mmopt.trace(model, batch=4, images=CHUNKS, context=128))
    print(result)
    mmopt.export(result.program, args.out, reports=result.reports)
    engine, reference = mmopt.Engine(args.out, threads=args.threads), Reference(model)
    print(f"   wrote {args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB")

    checks = Checks("test", args.episodes)
    rows = checks.encode(model.module)
    print("\n== shots read once, then one query after the other (pictures it has never seen)")
    *shots, _ = checks.book[0]
    field, language = checks.drawn[0][0]
    prefix = engine.prefix("".join(c.shot for c in shots), images=[c.image for c in shots])
    print(f"   shots, from language {language}, about the {field}: {', '.join(c.answer for c in shots)}")
    for query in chunks_of((field, language), random.Random(0).sample(checks.shown, 6)):
        answer = engine.generate(query.query, images=[query.image], prefix=prefix, max_new_tokens=NEW_TOKENS)
        print(f"   {Path(query.image).name:>8}  {query.question} {answer.text}   (right: {query.answer})")

    print(f"\n== accuracy, agreement and drift on {args.episodes} episodes of the code book")
    print(f"   {'shots':<7}{'model (95 % interval)':>24}{'engine':>24}   differing   drift of logits")
    differing_in_all = 0
    for n in SHOTS:
        expected, given, drift = [], [], 0.0
        episodes = [e[CHUNKS - 1 - n :] for e in checks.book]
        for part in (episodes[i : i + 4] for i in range(0, len(episodes), 4)):
            answers, logits = reference.answers(part, rows)
            expected += answers
            requests = []
            for *before, query in part:
                read = engine.prefix("".join(c.shot for c in before), [c.image for c in before]) if before else None
                options = {"images": [query.image], "prefix": read, "max_new_tokens": NEW_TOKENS}
                requests.append(Request(query.query, **options))
            made = engine.generate_batch(requests)
            given += [c.text if c.finish_reason == "stop" else "" for c in made]
            pixels = np.stack([checks.images[c.image].numpy() for e in part for c in e])
            run = engine.debug.generate_ids([reference.ids(e) for e in part], pixels, logits=True)
            drift = max(drift, float(np.abs(np.stack([steps[0] for steps in run.logits]) - logits).max()))
        wanted = [e[-1].answer for e in episodes]
        was, now = (share([a == w for a, w in zip(x, wanted, strict=True)]) for x in (expected, given))
        differing = sum(a != b for a, b in zip(expected, given, strict=True))
        differing_in_all += differing
        print(f"   {n:<7}{was:>24}{now:>24}{differing:>12}{drift:>18.2e}", flush=True)

    print(f"\n== time to the first token of a query after {CHUNKS - 1} shots, {args.threads} threads, float32")
    engine, forgetful = (mmopt.Engine(args.out, threads=args.threads, cache_bytes=n) for n in (1 << 28, 0))
    prompt, shown = "".join(c.shot for c in shots), [c.image for c in shots]
    prefix = engine.prefix(prompt, images=shown)

    def plain(query: Chunk) -> None:
        pixels = torch.stack([checks.images[p] for p in (*shown, query.image)])
        media = model.module.encode_images(pixels)[:, 0]
        logits_of(model.module, torch.tensor([reference.ids([*shots, query])]), media[None])

    ways = {
        "model (PyTorch)": plain,
        "engine": lambda q: forgetful.generate(prompt + q.query, images=[*shown, q.image], max_new_tokens=1),
        "  shots' pictures kept": lambda q: engine.generate(
            prompt + q.query, images=[*shown, q.image], max_new_tokens=1
        ),
        "  shots stored as a prefix": lambda q: engine.generate(
            q.query, images=[q.image], prefix=prefix, max_new_tokens=1
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    fresh = iter([p for p in checks.images if p not in shown])
    for _ in range(40):
        for name, run in ways.items():
            query = Chunk(next(fresh), shots[0].question, "")  # a picture that no engine has seen
            start = time.perf_counter()
            run(query)
            times[name].append((time.perf_counter() - start) * 1e3)
    for name, ms in times.items():
        print(f"   {name:<28}min {min(ms):7.2f} ms   median {statistics.median(ms):7.2f} ms")
    if differing_in_all:
        sys.exit(f"the engine's answers differ from the model's on {differing_in_all} queries")


if __name__ == "__main__":
    main()
