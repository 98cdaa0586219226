"""Engine: text and images in, text out, from an exported directory. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.tile_processor import processor_of
from mmopt.processing.tokenizer import TextProcessor, image_prompt_ids
from mmopt.runtime import beam_search as beams
from mmopt.runtime.chat import Chat
from mmopt.runtime.debug import DebugEngine
from mmopt.runtime.decoder import Decoder, LiveSequence
from mmopt.runtime.image_generation import GeneratedImages, generate_images, shown
from mmopt.runtime.images import Image
from mmopt.runtime.kv_cache import Cache, take
from mmopt.runtime.lru_cache import Store
from mmopt.runtime.prefix import Prefix, fingerprint, read
from mmopt.runtime.request import Completion, Request, RequestState, Stream
from mmopt.runtime.session import available_providers, choose_provider, default_threads
from mmopt.runtime.tensor import Tensor
from mmopt.spec.errors import EngineError, engine_errors
from mmopt.spec.flow_plan import FlowPlan
from mmopt.spec.flow_sampler import choose_plan, draw_noise
from mmopt.spec.manifest import read_directory
from mmopt.spec.prompt import count_tokens, empty_positions, layout_prompts

__all__ = ["Chat", "Completion", "Engine", "EngineError", "Request", "Stream", "available_providers"]


class Engine:
    """An engine directory, loaded. Safe to use from several threads.

    provider: "cpu", "cuda" or "tensorrt"; by default "cuda" where there is one (`available_providers` lists them).
    threads: by default all processors that the process may use. verify_checksums: check the contents of the weights,
    not only their size. cache_bytes: how much of encoded images and of prefixes is kept for later requests, the least
    recently used going first. Raises EngineError (a ValueError) for a directory that is missing, foreign, incomplete,
    changed or too new, and for a provider that is not there.
    """

    def __init__(
        self,
        directory: str | Path,
        provider: str | None = None,
        threads: int | None = None,
        verify_checksums: bool = False,
        cache_bytes: int = 256 << 20,
    ):
        self.directory = Path(directory)
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}, expected at least 1")
        if cache_bytes < 0:
            raise EngineError(f"cache_bytes is {cache_bytes}, expected 0 (nothing is kept) or more")
        self.manifest = manifest = read_directory(self.directory, verify_checksums)
        self.dtype, self.info, self.target = manifest.dtype, manifest.info, manifest.target
        self.provider = choose_provider(provider, self.dtype)
        self.threads = threads or default_threads()
        with engine_errors(f"{self.directory / 'program.json'}: "):
            self.image_processor = processor_of(self.info.processing.image)
            self.template = ChatTemplate.from_json(self.info.processing.chat)
        self._text = self._read_tokenizer(manifest.tokenizer)
        self.decoder = Decoder(self.directory, manifest, self.provider, self.threads)
        self.fingerprint, self.store = fingerprint(manifest), Store(cache_bytes)

    @property
    def debug(self) -> DebugEngine:
        """Greedy decoding of ids, with logits and caches: for checks and measurement."""
        return DebugEngine(self.info, self.decoder, self.encode_images)

    def __repr__(self) -> str:
        i = self.info
        return (
            f"Engine({str(self.directory)!r}: {i.family}, {self.dtype}, provider {self.provider}, "
            f"{self.threads} threads, context {i.context}, batch up to {i.batch}, images up to {i.images})"
        )

    @property
    def text(self) -> TextProcessor:
        """The tokenizer with the model's marks. EngineError if the directory has none."""
        if self._text is None:
            raise EngineError(f"{self.directory}: has no tokenizer, so a prompt must be a list of token ids")
        return self._text

    # ------------------------------------------------------------------------------------------------------ answers
    def generate(
        self,
        prompt: str | Sequence[dict] | Sequence[int],
        images: Sequence[Any] = (),
        stream: bool = False,
        **options: Any,
    ) -> Completion | Stream:
        """Answer a question, a conversation or a list of token ids. `options` are the further fields of `Request`.

        With `stream` the result is an iterator over pieces of text; closing it cancels.
        """
        job = self._prepare(Request(prompt, images, **options))
        if job.answer.request.num_beams > 1:
            if stream:
                raise EngineError("an answer with beams cannot be streamed: which one is best is known at the end")
            return beams.answer(self.decoder, job)
        answering = Stream(self._answer(job), job.answer)
        return answering if stream else answering.finish()

    def generate_batch(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer requests together, ``info.batch`` at once; what is asked beside it does not change an answer.

        Those with beams take the lanes of a batch for themselves, one after the other.
        """
        jobs, most = [self._prepare(r) for r in requests], self.info.batch
        together = [j for j in jobs if j.answer.request.num_beams == 1]
        for i in range(0, len(together), most):
            group = sorted(together[i : i + most], key=lambda j: -j.answer.limit)
            with self.decoder.cache(len(group)) as cache:
                for _ in self.decoder.run(cache, group):
                    pass
        return [
            beams.answer(self.decoder, j) if j.answer.request.num_beams > 1 else j.answer.completion() for j in jobs
        ]

    def chat(self) -> Chat:
        """A conversation: each image is encoded once, and earlier turns stay in the cache."""
        return Chat(self.decoder, self._with_markers, self._prepare)

    def generate_images(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        n: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        solver: str | FlowPlan | None = None,
        noise: np.ndarray | None = None,
        progress: bool | Callable[[int, int], None] = False,
        trajectory: bool = False,
        observe: Callable[[str, Any, dict[str, Any], None], None] | None = None,
    ) -> GeneratedImages:
        """`n` images of each prompt: a text, ids that end with the token that stands for the image, or a list.

        ``info.batch`` images are made at once; what is made beside it does not change an image. The result is a
        sequence of PIL images, and holds latents and pixels as numbers.

        steps: evaluations of the model (by default `mmopt.spec.flow_sampler.STEPS`); guidance: weight of the prompt (by
        default the model's). solver: one of `mmopt.spec.solvers.SOLVERS`, "fitted" or a plan; by default the plan that
        was fitted for so many steps and this guidance where the engine has one, else AB2. seed: of the noise; noise:
        instead of it, ``[images, c, h, w]`` float32. progress: True shows a bar, a function is told (done, of how
        many). `trajectory` keeps the latents after each evaluation. `observe` is called after each stage, as that of
        `Program.generate_images`. Raises EngineError for a model that generates none, and for wrong prompts or options.
        """
        if not self.manifest.schedules.image:
            raise EngineError(f"{self.directory}: {self.info.family} generates no images")
        if not len(prompt):
            raise EngineError("no prompt was given")
        if n < 1:
            raise EngineError(f"n is {n}, expected at least 1")
        single = isinstance(prompt, str) or isinstance(prompt[0], int | np.integer)
        prompts: Sequence[Any] = [prompt] if single else prompt  # type: ignore[assignment,list-item]
        with engine_errors():
            ids = [self._image_prompt_ids(p) for p in prompts for _ in range(n)]
            plan = choose_plan(solver, steps, guidance, self.info)
            if noise is None:
                noise = draw_noise(len(ids), self.info, seed)
        with shown(progress, plan.evaluations * -(-len(ids) // self.info.batch)) as tell:
            return generate_images(self.decoder, self.manifest, ids, noise, plan, trajectory, tell, observe)

    def _image_prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt with one more, whose place the picture takes."""
        if not isinstance(prompt, str):
            return [int(t) for t in prompt]
        return image_prompt_ids(self.text, self.template, prompt)

    def prefix(self, prompt: str | Sequence[int], images: Sequence[Any] = ()) -> Prefix:
        """Read the beginning of prompts once: few-shot examples, say, with their images.

        ``generate(query, prefix=...)`` then goes on from it; any number of queries may share it, in a batch too. A text
        is the beginning of the user's message, with a marker for each image; the query is the rest of it. It is kept
        (`cache_bytes`), so that the same prefix is read once; `Prefix.save` and `load_prefix` keep it in a file.
        """
        with engine_errors("the prefix is neither text nor token ids: "):
            text = self.template.begin(self._with_markers(prompt, images)) if isinstance(prompt, str) else None
            ids = [int(t) for t in prompt] if text is None else self.text.encode(text)
        self._count_images(ids, len(images))
        with engine_errors():
            layout_prompts([ids], self.info, 1)
        ready, keys = self._ready(images)
        key = ("prefix", tuple(ids), tuple(keys), text)
        made = self.store.get(key)
        if made is None:
            cache = Cache(self.decoder.layout, 1)
            self.decoder.prefill(cache, 0, ids, ready)
            made = take(cache, 0, tuple(ids), ready, self.fingerprint, self.dtype, text)
            self.store.put(key, made, made.nbytes)
        return made

    def load_prefix(self, path: str | Path) -> Prefix:
        """A prefix from a file. EngineError if it cannot be read or was made for another engine."""
        return read(path, self.decoder.layout, self.fingerprint)

    def encode_images(self, images: Any, inputs: dict[str, np.ndarray] | None = None) -> Tensor:
        """Image rows ``[N, rows, hidden]`` of a list of images or of pixel_values ``[N, 3, H, W]`` (floats).

        Where images lie outside the text they are ``[N, blocks, rows, width]``. `inputs`: what the image stages take
        beside pixel_values. In families that take videos an item of the list may be a list of frames, and pixel_values
        may be ``[N, frames, 3, H, W]``.
        """
        if not (isinstance(images, np.ndarray) and images.ndim >= 4 and images.dtype != np.uint8):
            pixels, inputs, _ = self._pixels(images)
            return self.decoder.encode(pixels, inputs)
        shape, expected = images.shape, list(self.decoder.pixels.shape[1:])
        if self.decoder.takes_frames and images.ndim == 4:
            images = images[:, None]
        if images.ndim == len(expected) + 1 and expected[0] == "F":
            self._check_frames(images.shape[1], "a video of pixel_values")
            expected = [images.shape[1], *expected[1:]]
        if list(images.shape[1:]) != expected:
            expected = list(self.decoder.pixels.shape[1:])
            raise EngineError(f"pixel_values have shape {shape}, expected (N, {', '.join(map(str, expected))})")
        return self.decoder.encode(images, inputs)

    def _pixels(self, images: Sequence[Any]) -> tuple[list[np.ndarray], dict[str, np.ndarray], Any]:
        """(pixels of each image, what the image stages take beside them, tiles of each image that count or None)."""
        listed = list(images) if isinstance(images, list | tuple) else []
        counts = [len(x) if _is_video(x) else 1 for x in listed]
        for i, x in enumerate(listed):
            if _is_video(x):
                self._check_frames(len(x), f"image {i}")
        flat = [frame for x in listed for frame in (x if _is_video(x) else [x])]
        with engine_errors():
            made = self.image_processor(flat if listed else images)
        inputs = dict(made) if isinstance(made, dict) else {"pixel_values": made}
        tiles, pixels = inputs.pop("tiles", None), inputs.pop("pixel_values")
        if not self.decoder.takes_frames:
            return list(pixels), inputs, tiles
        return np.split(pixels, np.cumsum(counts)[:-1]) if counts else list(pixels[:, None]), inputs, tiles

    def _check_frames(self, frames: int, what: str) -> None:
        if not self.decoder.takes_frames:
            raise EngineError(f"{what} is a list of frames, but {self.info.family} takes single images, no videos")
        most = self.info.max_frames
        if frames < 1 or (most is not None and frames > most):
            limit = "at least 1" if most is None else f"1 to {most}"
            raise EngineError(f"{what} has {frames} frames, expected {limit}")

    # ------------------------------------------------------------------------------------------------------- inside
    def _prepare(self, request: Request, earlier: Sequence[Image] = ()) -> LiveSequence:
        """Check a request and encode its text and images. `earlier`: the first images of the prompt, made ready."""
        start = request.prefix
        if start is not None and start.made_for != self.fingerprint:
            raise EngineError("the prefix was made for another engine")
        if start is not None:
            ids = self._rest_of_message(request, start)
        elif isinstance(request.prompt, str):
            content = self._with_markers(request.prompt, request.images)
            ids = self._render([{"role": "user", "content": content}])
        elif len(request.prompt) and isinstance(request.prompt[0], dict):
            ids = self._render(request.prompt)
        else:
            with engine_errors("the prompt is neither text nor messages nor token ids: "):
                ids = [int(t) for t in request.prompt]  # type: ignore[arg-type]
        if request.num_beams > self.info.batch:
            raise EngineError(
                f"num_beams is {request.num_beams}, but this engine was made for at most {self.info.batch} samples at "
                f"once, and each beam takes the place of one: export it with batch {request.num_beams} or more"
            )
        if request.stop and self._text is None:
            raise EngineError(f"{self.directory}: has no tokenizer, so no stop strings can be found")
        rows = count_tokens(ids, self.info) + (start.rows if start else 0)
        gone = empty_positions(ids, self.info) + (empty_positions(start.ids, self.info) if start else 0)
        most = self.info.context if self.info.positions is None else self.info.positions - gone  # tokens with positions
        limit = request.max_new_tokens or max(1, min(self.info.context, most) - rows + 1)
        with engine_errors():
            layout_prompts([ids], self.info, limit)
        if self.info.positions is not None and rows + limit - 1 > most:
            raise EngineError(
                f"the prompt with its prefix reaches position {rows + limit - 1 + gone}, rows of images that were left "
                f"out counted, but the model has {self.info.positions}"
            )
        if start and rows + limit - 1 > self.info.context:
            raise EngineError(
                f"the prefix takes {start.rows} rows, the prompt {rows - start.rows}, and {limit} new tokens are asked "
                f"for, but the cache holds {self.info.context}"
            )
        self._count_images(ids, len(earlier) + len(request.images))
        if start and request.images and self.decoder.sees_ahead(start.ids):
            raise EngineError(
                f"{self.info.family}: text before the first image sees all images, so images after a prefix would "
                "change its rows; let the prefix begin with an image, or give the images without a prefix"
            )
        new, _ = self._ready(request.images)
        answer = RequestState(request, limit, frozenset(self.info.eos_ids), self._text, prompt_rows=rows)
        return LiveSequence(answer, ids, [*earlier, *new], prefix=start)

    def _rest_of_message(self, request: Request, start: Prefix) -> list[int]:
        """Ids of a prompt that goes on from a prefix: text is the rest of the user's message.

        It is encoded behind the text of the prefix, as in one go, unless that would change the last ids of the prefix.
        """
        if not isinstance(request.prompt, str):
            with engine_errors("after a prefix the prompt must be text or token ids: "):
                return [int(t) for t in request.prompt]  # type: ignore[arg-type]
        rest = self.template.go_on(self._with_markers(request.prompt, request.images))
        with engine_errors():
            if start.text is not None:
                whole = self.text.encode(start.text + rest)
                if whole[: len(start.ids)] == list(start.ids):
                    return whole[len(start.ids) :]
            ids = self.text.encode(rest)
        return ids if self.text.bos_id is None else ids[1:]

    def _ready(self, images: Sequence[Any]) -> tuple[list[Image], list[str]]:
        """Images made ready for the language model, and the hashes of their pixels; what was encoded before is kept."""
        if not len(images):
            return [], []
        pixels, inputs, tiles = self._pixels(images)
        each = [{k: x[i : i + 1] for k, x in inputs.items()} for i in range(len(pixels))]
        made, keys = [], [_digest(pixels[i], *own.values()) for i, own in enumerate(each)]
        for i, (key, own) in enumerate(zip(keys, each, strict=True)):
            image = self.store.get(("image", key))
            if image is None:
                rows = self.decoder.encode(pixels[i : i + 1], own)
                image = self.decoder.image(rows, int(tiles[i]) if tiles is not None else None)
                self.store.put(("image", key), image, image.nbytes)
            made.append(image)
        return made, keys

    def _with_markers(self, text: str, images: Sequence[Any]) -> str:
        """A question with one marker for each image: put in front unless the question has them."""
        marker = self.template.image
        found = text.count(marker)
        if found and found != len(images):
            raise EngineError(f"the prompt has {found} image markers {marker!r}, but {len(images)} images were given")
        return text if found else marker * len(images) + text

    def _render(self, messages: Any) -> list[int]:
        with engine_errors():
            return self.text.encode(self.template.render(messages))

    def _count_images(self, ids: Sequence[int], given: int) -> None:
        wanted = sum(1 for t in ids if t == self.info.image_id)
        if wanted != given:
            raise EngineError(f"the prompt has places for {wanted} images, but {given} were given")

    def _answer(self, job: LiveSequence) -> Generator[str]:
        with self.decoder.cache(1) as cache:
            for _ in self.decoder.run(cache, [job]):
                if job.answer.piece:
                    yield job.answer.piece

    def _read_tokenizer(self, name: str | None) -> TextProcessor | None:
        if name is None:
            return None
        with engine_errors():
            return TextProcessor.of_model(self.directory / name, self.info, self.template)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for x in arrays:
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()


def _is_video(image: Any) -> bool:
    return isinstance(image, list | tuple) or (isinstance(image, np.ndarray) and image.ndim == 4)
