"""bench for few-shot prompts, where images lie outside the text: with the passes and without, in the same runtime.

All variants are timed in interleaved rounds of one process, with the same threads and dtype, on the same prompts.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config as inductor

from mmopt.exporters.onnx import export
from mmopt.frontend.load import Model
from mmopt.frontend.trace import trace
from mmopt.ir.graph import torch_dtype
from mmopt.ir.inspect import SHOT, inspect
from mmopt.measure.baselines import Shared, torch_stage
from mmopt.measure.head import head
from mmopt.measure.ratios import spread
from mmopt.measure.roofline import in_rounds, summary
from mmopt.passes.fuse_cross_attention import FuseCrossAttention
from mmopt.pipeline import default_passes, run_passes
from mmopt.rewrite.contracts import ContractError, difference
from mmopt.runtime.engine import Engine
from mmopt.runtime.images import Image
from mmopt.runtime.kv_cache import Cache
from mmopt.runtime.lru_cache import Store
from mmopt.runtime.request import Request
from mmopt.spec.cross_mask import seen_inputs, visible_tiles

ENGINES = {
    "passes off": "engine of the Program as traced: K and V of all images in each call, one mask over all of them",
    "mask kept": "engine of the optimized Program, but for masks: K and V made once, one mask over all images",
    "passes on": "engine of the optimized Program: K and V made once, each row beside the keys it sees",
}
EQUAL = "decode at equal context, passes on"
DECODES = 16  # tokens timed one after the other in each round
NOTES = (
    "eager: the Program as traced, in plain PyTorch with sizes as numbers and caches written in place; K and V of all "
    "images in each call, as the reference computes them. compiled: eager through torch.compile with freezing.",
    "passes off, mask kept, passes on: ONNX Runtime. " + "; ".join(f"{k}: {v}" for k, v in ENGINES.items()) + ".",
    f"A prompt of k shots: k + 1 images, each a marker and {SHOT - 1} further rows of text. prefill: all of it, images "
    f"encoded before. decode: one token on top of it, {DECODES} in a row. At equal context the caches hold as many "
    "rows as the longest prompt has, whatever the number of images.",
    "first token: pixels and ids of a query (one image) after the shots -> logits. without prefix: shots and query in "
    "one prompt, nothing kept; images kept: the same, with the images of the shots encoded before; prefix: it goes on "
    "from a stored prefix, in memory or read from a file each time.",
)


def bench_fewshot(
    model: Model,
    shots: Sequence[int] = (1, 4, 32),
    rounds: int = 15,
    threads: int = 2,
    compiled: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time few-shot prompts of a model whose images lie outside the text (random or loaded weights, float32, CPU).

    Raises ValueError for a model without weights or of another kind, ContractError if two variants differ in logits.
    """
    if not model.has_weights or model.family.cross is None:
        raise ValueError("expected a model with weights whose images lie outside its text")
    tell = progress or (lambda now: None)
    before, freezing = torch.get_num_threads(), inductor.freezing
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="mmopt-bench-") as directory, torch.no_grad():
            return _Bench(model, sorted(shots), threads, compiled, Path(directory), tell).measure(rounds)
    finally:
        torch.set_num_threads(before)
        inductor.freezing = freezing


class _Bench:
    def __init__(
        self, model: Model, shots: list[int], threads: int, compiled: bool, directory: Path, tell: Callable
    ):  # fmt: skip
        self.model, self.shots, self.threads, self.directory, self.tell = model, shots, threads, directory, tell
        images = shots[-1] + 1
        tell("tracing")
        self.plain = trace(model, batch=1, images=images, context=-(-SHOT * images // 64) * 64 + 64)
        tell("optimizing")
        masked = [
            FuseCrossAttention(segments=False) if p.name == "fuse_cross_attention" else p for p in default_passes()
        ]
        self.programs = dict(
            zip(ENGINES, (self.plain, run_passes(self.plain, masked, check=False).program,
                          run_passes(self.plain, check=False).program), strict=True)
        )  # fmt: skip
        self.engines: dict[str, Engine] = {}
        for name, program in self.programs.items():
            tell(f"exporting, {name}")
            path = export(program, directory / name.replace(" ", "-"), check=False)
            self.engines[name] = Engine(path, provider="cpu", threads=threads, cache_bytes=4 << 30)
        self.info = self.plain.info
        random = np.random.default_rng(0)
        size = self.engines["passes on"].decoder.pixels.sizes(-2)
        self.pictures = list(random.integers(0, 256, (images, *size, 3), np.uint8))
        text = random.integers(3, min(self.info.vocab_size, self.info.image_id), SHOT * images).tolist()
        text[::SHOT] = [self.info.image_id] * images
        self.text, self.token = text, int(text[1])
        tell("encoding images")
        self.ready = {n: e._ready(self.pictures)[0] for n, e in self.engines.items()}
        self.calls: dict[tuple[str, str], Callable[[], Any]] = {}
        self.logits: dict[str, dict[str, np.ndarray]] = {}
        self.equal: dict[tuple[str, str], Callable[[], Any]] = {}
        shared = Shared()
        for k in shots:
            self.add_engines(k)
            self.add_torch(k, shared, "eager", compiled=False)
            if compiled:
                tell(f"compiling, {k} shots")
                self.add_torch(k, shared, "compiled", compiled=True)
        self.check()
        self.calls |= self.equal
        self.add_queries(shots[-1])

    # -------------------------------------------------------------------------------------------------------- variants
    def add_engines(self, k: int) -> None:
        n = SHOT * (k + 1)
        for name, engine in self.engines.items():
            cache, decoder = Cache(engine.decoder.layout, 1), engine.decoder
            images = self.ready[name][: k + 1]

            def prefill(decoder=decoder, cache=cache, images=images) -> np.ndarray:
                cache.past[:] = 0
                return decoder.prefill(cache, 0, self.text[:n], images)

            def decode(decoder=decoder, cache=cache, past=n) -> np.ndarray:
                cache.past[:] = past
                return decoder.decode(cache, [self.token], [False])[0]

            self.note(f"prefill, {k} shots", name, prefill)
            self.note(f"decode, {k} shots", name, decode)
            if name == "passes on":
                equal = partial(decode, past=SHOT * (self.shots[-1] + 1))
                self.equal[EQUAL, f"{k} shots"] = equal

    def note(self, stage: str, name: str, call: Callable[[], np.ndarray]) -> None:
        """Run once: warms up, and its logits are compared between variants."""
        self.calls[stage, name] = call
        self.logits.setdefault(stage, {})[name] = np.array(call(), np.float32).reshape(-1)

    def add_torch(self, k: int, shared: Shared, name: str, compiled: bool) -> None:
        n, info = SHOT * (k + 1), self.info
        rows = [torch.from_numpy(i.rows.numpy().copy()) for i in self.ready["passes off"][: k + 1]]
        media = torch.cat(rows).flatten(0, 1)[None]
        state = {
            x: torch.zeros([1 if s == "B" else s for s in shape], dtype=kind)
            for x, (shape, kind) in self.plain.state.items()
        }
        tiles = [i.tiles for i in self.ready["passes off"][: k + 1]]
        seen = visible_tiles(
            self.text[:n],
            k + 1,
            info.required_cross,
            info.image_id,
            tiles=None if tiles[0] is None else [int(t) for t in tiles if t],
        )  # type: ignore[arg-type]
        embed, language = self.plain.stages["embed"], self.plain.stages["language_model"]
        for stage, ids, visible_rows, past in (
            ("prefill", self.text[:n], seen, 0),
            ("decode", [self.token], seen[-1:], n),
        ):
            sizes = {"B": 1, "nt": len(ids), "nb": media.shape[1]}
            modules: list[Any] = [
                torch_stage(embed, self.plain.weights, sizes, shared=shared),
                torch_stage(language, self.plain.weights, sizes, past=past, last_only=True, shared=shared),
            ]
            if compiled:
                inductor.freezing = True
                modules[1] = torch.compile(modules[1])
            given = seen_inputs([visible_rows], media.shape[1])
            values = {x: torch.from_numpy(v) for x, v in given.items()} | {"media": media} | state
            values["past"] = torch.tensor([past])
            tokens = torch.tensor([ids])

            def call(modules=modules, tokens=tokens, values=values, names=language.inputs) -> np.ndarray:
                text = modules[0](tokens)[0]
                made = modules[1](*(text if x == "text" else values[x] for x in names))
                return made[0][0, -1].numpy()

            try:
                self.note(f"{stage}, {k} shots", name, call)
            except Exception as e:  # inductor has many error types
                if not compiled:
                    raise
                self.tell(f"{name} left out: {type(e).__name__}")
                self.calls.pop((f"{stage}, {k} shots", name), None)
                return

    def add_queries(self, k: int) -> None:
        """The first token of a query after k shots."""
        engine, cut = self.engines["passes on"], SHOT * k
        keys = engine._ready(self.pictures[:k])[1]
        prefix = engine.prefix(self.text[:cut], self.pictures[:k])
        file = prefix.save(self.directory / "prefix.safetensors")
        whole = Request(self.text, self.pictures, max_new_tokens=1)
        query = Request(self.text[cut:], self.pictures[k:], max_new_tokens=1, prefix=prefix)
        stage = f"first token of a query after {k} shots"

        def kept(images: list[Image]) -> None:
            """Only these images stay encoded: the query's own picture is new each time."""
            engine.store = Store(engine.store.budget)
            for key, image in zip(keys, images, strict=False):
                engine.store.put(("image", key), image, image.nbytes)

        def ask(request: Request, images: list[Image]) -> int:
            kept(images)
            return engine.generate_batch([request])[0].ids[0]

        def from_disk() -> int:
            kept([])
            loaded = engine.load_prefix(file)
            again = Request(self.text[cut:], self.pictures[k:], max_new_tokens=1, prefix=loaded)
            return engine.generate_batch([again])[0].ids[0]

        support = self.ready["passes on"][:k]
        self.calls |= {
            (stage, "without prefix"): lambda: ask(whole, []),
            (stage, "images kept"): lambda: ask(whole, support),
            (stage, "prefix in memory"): lambda: ask(query, []),
            (stage, "prefix from disk"): from_disk,
        }
        self.first = {name: call() for (s, name), call in self.calls.items() if s == stage}
        if len(set(self.first.values())) > 1:
            raise ContractError(f"the first tokens differ: {self.first}", self.plain)

    def check(self) -> None:
        """What answers differently must not be timed."""
        self.agreement: dict[str, dict[str, float]] = {}
        for stage, by_name in self.logits.items():
            expected = torch.from_numpy(by_name["eager"])
            for name, value in by_name.items():
                found = torch.from_numpy(value)
                self.agreement.setdefault(stage, {})[name] = float((found - expected).abs().max())
                if wrong := difference(expected, found):
                    raise ContractError(f"{stage}: {name} differs from eager by {wrong[0]:.3g}", self.plain)

    # --------------------------------------------------------------------------------------------------------- results
    def measure(self, rounds: int) -> dict[str, Any]:
        cpu = torch.device("cpu")
        dtype, stages = torch_dtype(self.info), list(dict.fromkeys(s for s, _ in self.calls))
        times, limits = in_rounds(
            self.calls, rounds, cpu, dtype, self.threads, self.tell, lambda s: DECODES if s.startswith("decode") else 1
        )
        flat = {key: [t for r in rounds_of for t in r] for key, rounds_of in times.items()}
        rows = [{"stage": s, "variant": n, **spread(flat[s, n])} for s in stages for (t, n) in self.calls if t == s]
        return {
            **head("few-shot", self.threads, self.info.dtype),
            "sizes": {
                "family": self.info.family,
                "parameters": sum(p.numel() for p in self.model.module.parameters()),
                "context": self.info.context,
                "rounds": rounds,
                "shots": self.shots,
            },
            "rows": rows,
            "ratios": self.ratios(times),
            "limits": summary(limits) | {f"{k}, median": statistics.median(v) for k, v in limits.items()},
            "work": {f"{k} shots": self.work(k) for k in self.shots},
            "agreement": self.agreement,
            "notes": list(NOTES),
        }

    def ratios(self, times: dict[tuple[str, str], list[list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
        """Time of each variant over that of "passes on" (a query: of the prefix in memory; equal context: of the fewest
        shots): of the minima, and paired, the median of the rounds' ratios and their quartiles."""
        made: dict[str, dict[str, dict[str, float]]] = {}
        for (stage, name), rounds in times.items():
            own = "prefix in memory" if stage.startswith("first token") else "passes on"
            own = f"{self.shots[0]} shots" if stage == EQUAL else own
            if name == own:
                continue
            paired = [min(a) / min(b) for a, b in zip(rounds, times[stage, own], strict=True)]
            low, middle, high = statistics.quantiles(paired, n=4, method="inclusive") if len(paired) > 1 else paired * 3
            of_minima = min(map(min, rounds)) / min(map(min, times[stage, own]))
            made.setdefault(stage, {})[f"{name} / {own}"] = {
                "minima": of_minima, "paired_median": middle, "paired_p25": low, "paired_p75": high
            }  # fmt: skip
        return made

    def work(self, k: int) -> dict[str, dict[str, float]]:
        """FLOPs and bytes of a decoded token, before and after the passes."""
        made = {}
        for name in ("passes off", "passes on"):
            totals = inspect(self.programs[name], images=k + 1)["totals"]
            made[name] = {x: totals[f"decode_{x}_per_token"] for x in ("flops", "bytes", "cache_bytes")}
        return made
