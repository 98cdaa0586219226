"""Host-side planning of prompts; needs neither torch nor a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmopt.spec.model_info import ModelInfo

POSITION_DELTAS = ("position_delta_before", "position_delta", "cache_delta")  # what `position_deltas` tells


@dataclass(frozen=True)
class Chunk:
    """Rows that go through the language model in one call: images first (indices into all images), then text."""

    sample: int
    images: tuple[int, ...]
    ids: tuple[int, ...]


def count_tokens(prompt: Sequence[int], info: ModelInfo) -> int:
    """Rows a prompt takes in the cache: one for each token, `tokens_per_image` for each image."""
    images = sum(1 for t in prompt if t == info.image_id)
    return len(prompt) + images * (info.tokens_per_image - 1)


def empty_positions(prompt: Sequence[int], info: ModelInfo) -> int:
    """Rows of a prompt's images that were left out of the cache, at whose positions nothing stands."""
    return info.position_delta * sum(1 for t in prompt if t == info.image_id)


def position_deltas(before: Any, after: Any, info: ModelInfo) -> dict[str, Any]:
    """What the language model is told of rows that were left out: of so many images before a call and after it.

    left_out: rows whose positions stay empty; cache_delta: rows that its later layers do not hold.
    """
    every, late = info.position_delta, info.cache_delta
    return dict(zip(POSITION_DELTAS, (before * every, after * every, before * late), strict=True))


def layout_prompts(
    prompts: Sequence[Sequence[int]], info: ModelInfo, new_tokens: int, images: Sequence[int] | None = None
) -> list[Chunk]:
    """Prompts (ids with ``info.image_id`` where an image stands) -> chunks, sample by sample, in order.

    Where images lie outside the text (``info.cross``) a prompt is one chunk, and `images` may say how many images
    each prompt has, if that is not the number of its markers.

    Raises ValueError for an empty prompt, one that ends with an image whose rows lie in the text, one that is too long
    for the cache with `new_tokens` more, ids outside the vocabulary, and for more samples or images than planned for.
    """
    apart = info.cross is not None
    if images is not None and (not apart or len(images) != len(prompts)):
        raise ValueError(f"images is {images!r}, expected None" + (f" or {len(prompts)} numbers" if apart else ""))
    if not prompts:
        raise ValueError("no prompt was given")
    if len(prompts) > info.batch:
        raise ValueError(f"{len(prompts)} prompts at once, but this program was made for at most {info.batch}")
    chunks, image = [], 0
    for sample, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {sample} is empty")
        if prompt[-1] == info.image_id and not apart:
            raise ValueError(
                f"prompt {sample} ends with an image: text must follow (an answer is asked for after text)"
            )
        wrong = [t for t in prompt if t != info.image_id and not 0 <= t < info.vocab_size]
        if wrong:
            raise ValueError(f"prompt {sample}: token ids {wrong[:5]} are outside the vocabulary of {info.vocab_size}")
        count = sum(1 for t in prompt if t == info.image_id) if images is None else images[sample]
        if count > info.images:
            raise ValueError(f"prompt {sample} has {count} images, but this program was made for at most {info.images}")
        rows = count_tokens(prompt, info)
        if rows + new_tokens - 1 > info.context:
            raise ValueError(
                f"prompt {sample} takes {rows} rows and {new_tokens} new tokens are asked for, but the cache holds "
                f"{info.context}; trace with a larger context or ask for fewer tokens"
            )
        reach = rows + empty_positions(prompt, info) + new_tokens - 1
        if info.positions is not None and reach > info.positions:
            raise ValueError(
                f"prompt {sample} reaches position {reach}, rows of images that were left out counted, but the model "
                f"has {info.positions}; renumber positions, ask for fewer tokens or give fewer images"
            )
        if apart:
            chunks.append(Chunk(sample, tuple(range(image, image + count)), tuple(map(int, prompt))))
            image += count
            continue
        begun: list[int] = []
        ids: list[int] = []
        for token in prompt:
            if token == info.image_id:
                if ids:  # a chunk begins with its images, so text before an image ends a chunk
                    chunks.append(Chunk(sample, tuple(begun), tuple(ids)))
                    begun, ids = [], []
                begun.append(image)
                image += 1
            else:
                ids.append(int(token))
        chunks.append(Chunk(sample, tuple(begun), tuple(ids)))
    return chunks


LATE = "cache_delta"
