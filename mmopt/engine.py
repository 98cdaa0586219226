"""Engine: runs an exported directory with ONNX Runtime. Needs no torch.

Prompts of a batch are prefilled one after the other, each through its own row ("lane") of the caches, so no sample is
padded and any mix of layouts is right; then all decode together, each at its own length. Caches are bound once as input
and output of the language model and written in place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmopt.planning import count_rows, plan
from mmopt.processing import ChatTemplate, ImageProcessor, TextProcessor
from mmopt.sampling import Answer, Completion, Request
from mmopt.session import (
    Bound,
    EngineError,
    StageSession,
    Tensor,
    choose_provider,
    default_threads,
    from_bits,
    read_directory,
)

POOLED = 2  # caches kept for the next call


@dataclass
class Job:
    """One sample on its way: the ids still to be prefilled, the rows of their images, and the answer."""

    answer: Answer
    ids: list[int]
    images: list[Tensor]


@dataclass(frozen=True)
class Run:
    """What `Engine.run_ids` returns; lists are by sample.

    tokens: new ids, an end id included (with `forced`: the likeliest ids, though the forced ones were fed).
    logits: ``[T, V]`` float32 of each step, the first one being the prompt's last row; None unless asked for.
    caches: name -> ``[B, kv_heads, context, head_dim]``; None unless asked for. past: filled rows of each sample.
    image_rows: ``[images, rows, hidden]``, None if there were none.
    """

    tokens: list[list[int]]
    finish_reasons: list[str]
    logits: list[np.ndarray] | None
    past: np.ndarray
    caches: dict[str, np.ndarray] | None
    image_rows: Tensor | None


class Cache:
    """Key and value caches of a batch. `past[lane]` rows of a lane are filled; setting it lower forgets the rows after."""

    def __init__(self, engine: Engine, batch: int):
        self.batch, self._engine = batch, engine
        model = engine.language
        self.past = np.zeros(batch, np.int64)
        self.names = [k for k in model.inputs if k in model.outputs and k != "past"]
        self.tensors = {
            k: Tensor.zeros((batch, *model.inputs[k]["shape"][1:]), model.inputs[k]["dtype"], model.device) for k in self.names
        }
        self._steps: dict[int, DecodeStep] = {}

    def lanes(self, rows: slice) -> dict[str, Tensor]:
        return {k: t[rows] for k, t in self.tensors.items()}

    def step(self, batch: int) -> DecodeStep:
        if batch not in self._steps:
            self._steps[batch] = DecodeStep(self._engine, self, batch)
        return self._steps[batch]


class DecodeStep:
    """The sessions bound for one new token in each of the first `batch` lanes."""

    def __init__(self, engine: Engine, cache: Cache, batch: int):
        embed, model = engine.embed, engine.language
        self.ids = Tensor.zeros((batch, 1), "int64", embed.device)
        self.past = Tensor.zeros((batch,), "int64", model.device)
        text = Tensor.zeros((batch, 1, engine.width), engine.dtype, model.device)
        no_visual = Tensor.zeros((batch, 0, engine.width), engine.dtype, model.device)
        self._logits = Tensor.zeros((batch, 1, engine.info["vocab_size"]), engine.dtype)
        self._embed = embed.bind({"ids": self.ids}, {"text": text})
        self._model = engine.bind_language(no_visual, text, self.past, cache, slice(0, batch), self._logits, release=False)

    def run(self, ids: Sequence[int], past: np.ndarray) -> np.ndarray:
        self.ids.write(np.array(ids, np.int64)[:, None])
        self.past.write(past)
        self._embed.run()
        self._model.run()
        return from_bits(self._logits.owner, self._logits.dtype)[:, 0]


class Engine:
    """An engine directory, loaded. Safe to use from several threads: what changes belongs to a call.

    provider: "cpu", "cuda" or "tensorrt"; by default "cuda" where there is one. threads: by default all processors that
    the process may use. verify_checksums: also read and check the weights file, not only its size.
    Raises EngineError (a ValueError) for a directory that is missing, foreign, incomplete, changed or too new, and for a
    provider that is not there.
    """

    def __init__(
        self,
        directory: str | Path,
        provider: str | None = None,
        threads: int | None = None,
        verify_checksums: bool = False,
    ):
        self.directory = Path(directory)
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}, expected at least 1")
        facts = read_directory(self.directory, verify_checksums)
        self.facts, self.dtype, self.info = facts, facts["dtype"], facts["info"]
        self.provider = choose_provider(provider, self.dtype)
        self.threads = threads or default_threads()
        self.width, self.context = self.info["hidden_size"], self.info["context"]
        chunk_loop = next((i for i in facts["schedule"] if i.get("over") == "chunks"), None)
        if chunk_loop is None or len(chunk_loop["loop"]) != 2:
            raise EngineError(f"{self.directory}: its schedule has no loop over chunks of a text stage and a language model")
        looked_up = chunk_loop["loop"][0]["call"]
        self.stages = {  # looking rows up in a table needs no threads, and theirs would spin beside the model's
            name: StageSession(name, self.directory, stage, self.provider, 1 if name == looked_up else self.threads)
            for name, stage in facts["stages"].items()
        }
        self.embed, self.language = (self.stages[c["call"]] for c in chunk_loop["loop"])
        self._encode_calls = [i for i in facts["schedule"] if "call" in i]
        processing = facts["processing"]
        self.image_processor = ImageProcessor.from_json(processing["image"])
        self.template = ChatTemplate.from_json(processing["chat"])
        self._text = self._text_processor(processing.get("tokenizer"))
        self._pool: list[Cache] = []
        self._pool_lock = threading.Lock()

    def __repr__(self) -> str:
        i = self.info
        return (
            f"Engine({str(self.directory)!r}: {i['family']}, {self.dtype}, provider {self.provider}, {self.threads} threads, "
            f"context {i['context']}, batch up to {i['batch']}, images up to {i['images']})"
        )

    # ------------------------------------------------------------------------------------------------- for everyone
    def generate(
        self, prompt: str | Sequence[dict] | Sequence[int], images: Sequence[Any] = (), *, stream: bool = False, **options: Any
    ) -> Completion | Stream:
        """Answer a question, a conversation or a list of token ids; `options` are the further fields of `Request`.

        With `stream` the result is an iterator of pieces of text; closing it cancels.
        """
        job = self._prepare(_request(prompt, images, options))
        answering = Stream(self._answer(job), job.answer)
        return answering if stream else answering.finish()

    def generate_batch(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer several requests together, at most ``info["batch"]`` at once. Each gets the answer it would get alone."""
        jobs = [self._prepare(r) for r in requests]
        most = self.info["batch"]
        for i in range(0, len(jobs), most):
            group = jobs[i : i + most]
            with self.cache(len(group)) as cache:
                for _ in self._run(cache, group):
                    pass
        return [j.answer.completion() for j in jobs]

    def chat(self) -> Chat:
        """A conversation: each image is encoded once, and earlier turns stay in the cache."""
        return Chat(self)

    def encode_images(self, images: Any) -> Tensor:
        """Images (a list of what `open_image` takes) or pixel_values ``[N, 3, H, W]`` -> image rows ``[N, rows, hidden]``."""
        pixels = images if isinstance(images, np.ndarray) and images.ndim == 4 else self.pixels(images)
        rows = Tensor.zeros((len(pixels), self.info["rows_per_image"], self.width), self.dtype, self.language.device)
        for i in range(len(pixels)):  # one at a time: working memory does not grow with their number
            values = {"pixel_values": Tensor.of(pixels[i : i + 1], self.dtype)}
            for call in self._encode_calls:
                stage, rename = self.stages[call["call"]], call["rename"]
                given = {k: values[rename.get(k, k)] for k in stage.inputs}
                made = {}
                for k, out in stage.outputs.items():
                    last = rename.get(k, k) == "image_rows"
                    made[k] = rows[i : i + 1] if last else Tensor.zeros(stage.output_shape(k, given), out["dtype"], stage.device)
                stage.bind(given, made, release=True).run()
                values |= {rename.get(k, k): v for k, v in made.items()}
        return rows

    def pixels(self, images: Sequence[Any]) -> np.ndarray:
        """Images -> pixel_values ``[N, 3, H, W]`` float32."""
        with _engine_errors():
            return self.image_processor(images)

    def text(self) -> TextProcessor:
        """The tokenizer with the model's marks. EngineError if the directory has none."""
        if self._text is None:
            raise EngineError(f"{self.directory}: has no tokenizer, so a prompt must be a list of token ids")
        return self._text

    # ------------------------------------------------------------------------------------- for checks and measurement
    def run_ids(
        self,
        prompts: Sequence[Sequence[int]],
        pixel_values: np.ndarray | None = None,
        image_rows: Tensor | np.ndarray | None = None,
        max_new_tokens: int = 1,
        forced: np.ndarray | None = None,
        ignore_eos: bool = False,
        logits: bool = False,
        caches: bool = False,
    ) -> Run:
        """Greedy decoding of prompts given as ids, the image id where an image stands, images in order over all prompts.

        `forced` ``[B, max_new_tokens]`` is fed instead of the likeliest ids; nothing ends early then.
        """
        with _engine_errors():
            plan(prompts, self.info, max_new_tokens)
            options = Request(list(prompts[0]), max_new_tokens=max_new_tokens)
        if image_rows is None and pixel_values is not None:
            image_rows = self.encode_images(np.asarray(pixel_values))
        if image_rows is not None and not isinstance(image_rows, Tensor):
            image_rows = Tensor.of(np.asarray(image_rows), self.dtype, self.language.device)
        given = _each(image_rows)
        counts = [list(p).count(self.info["image_id"]) for p in prompts]
        if sum(counts) != len(given):
            raise EngineError(f"the prompts have {sum(counts)} images, but {len(given)} were given")
        eos = frozenset() if ignore_eos or forced is not None else frozenset(self.info["eos_ids"])
        jobs = []
        for i, prompt in enumerate(prompts):
            row = None if forced is None else forced[i]
            answer = Answer(options, max_new_tokens, eos, forced=row, keep_logits=logits)
            jobs.append(Job(answer, list(prompt), given[sum(counts[:i]) : sum(counts[: i + 1])]))
        cache = Cache(self, len(jobs))  # not from the pool: the result may keep it
        for _ in self._run(cache, jobs):
            pass
        answers = [j.answer for j in jobs]
        return Run(
            [a.ids for a in answers],
            [a.finish or "" for a in answers],
            [np.stack(a.logits) for a in answers] if logits else None,
            cache.past,
            {k: t.numpy() for k, t in cache.tensors.items()} if caches else None,
            image_rows,
        )

    def prefill(self, cache: Cache, lane: int, ids: Sequence[int], images: Sequence[Tensor] = ()) -> np.ndarray:
        """Feed ids (and the rows of their images) on top of what the lane holds; returns logits ``[V]`` of the last row."""
        for chunk in plan([ids], self.info, 1):
            text = Tensor.zeros((1, len(chunk.ids), self.width), self.dtype, self.embed.device)
            self.embed.bind({"ids": Tensor.of(np.array([chunk.ids]), "int64")}, {"text": text}).run()
            visual = _joined([images[i] for i in chunk.images], self.width)
            if visual is None:
                visual = Tensor.zeros((1, 0, self.width), self.dtype, self.language.device)
            rows = visual.shape[1] + text.shape[1]
            out_rows = 1 if self.language.outputs["logits"]["shape"][1] == 1 else rows
            logits = Tensor.zeros((1, out_rows, self.info["vocab_size"]), self.dtype)
            past = Tensor.of(cache.past[lane : lane + 1], "int64")
            self.bind_language(visual, text, past, cache, slice(lane, lane + 1), logits, release=True).run()
            cache.past[lane] += rows
        return logits.numpy()[0, -1]

    def decode(self, cache: Cache, ids: Sequence[int], active: Sequence[bool]) -> np.ndarray:
        """Feed one id to each of the first ``len(ids)`` lanes; returns logits ``[lanes, V]``, valid until the next step.

        A lane that is not active is computed too, but its length stays: what it writes is past its last row.
        """
        lanes = len(ids)
        logits = cache.step(lanes).run(ids, cache.past[:lanes])
        cache.past[:lanes] += np.asarray(active)
        return logits

    def bind_language(
        self, visual: Tensor, text: Tensor, past: Tensor, cache: Cache, lanes: slice, logits: Tensor, release: bool
    ) -> Bound:
        kept = cache.lanes(lanes)
        inputs = {"visual": visual, "text": text, "past": past} | kept
        outputs = {"logits": logits, "past": Tensor.zeros(past.shape, "int64", past.device)} | kept
        return self.language.bind(inputs, outputs, release)

    @contextmanager
    def cache(self, batch: int) -> Iterator[Cache]:
        """Empty caches for `batch` samples, used again by the next call that wants as many."""
        with self._pool_lock:
            cache = next((c for c in self._pool if c.batch == batch), None)
            if cache is not None:
                self._pool.remove(cache)
        cache = cache or Cache(self, batch)
        cache.past[:] = 0
        try:
            yield cache
        except Exception:
            raise  # these caches may hold rows that are not finite: they are not used again
        except BaseException:
            self._put_back(cache)
            raise
        else:
            self._put_back(cache)

    # ------------------------------------------------------------------------------------------------------- inside
