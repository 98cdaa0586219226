"""Recorded cases whose images lie among the rows of the text: ids with a placeholder for an image, or for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmopt.conformance.case import Case

IGNORE = -100  # a label that does not count in the loss


def read_among(case: Case, given: dict[str, Tensor], image_id: int, tokens_per_image: int) -> None:
    """A case whose images lie among the rows of the text, or one of images alone."""
    case.pictures = {k[3 : -len("_rgb")]: v for k, v in given.items() if k.endswith("_rgb")}
    for k, v in case.pictures.items():
        if v.dtype != torch.uint8 or v.dim() != 3 or v.shape[2] != 3:
            raise ValueError(
                f"{case.name}: expected {k} to be a picture, uint8 [H, W, 3], found {v.dtype} {tuple(v.shape)}"
            )
    listed = sorted((k for k in given if k.startswith("in.images_list.")), key=lambda k: int(k.rsplit(".", 1)[1]))
    # What one placeholder stands for: one image, or in a list (or a 5-D tensor) a stack of several.
    stacks = [given[k] for k in listed]
    if (pixels := given.get("in.pixel_values")) is not None:
        if stacks or pixels.dim() not in (4, 5):
            raise ValueError(
                f"{case.name}: expected in.pixel_values of 4 or 5 dimensions or in.images_list.*, not both"
            )
        stacks = list(pixels) if pixels.dim() == 5 else [x[None] for x in pixels]
    case.pixel_values = torch.cat(stacks) if stacks else None
    if "in.input_ids" in given and "in.image_mask" in given:
        _read_rows(case, given, [len(s) for s in stacks], image_id, tokens_per_image)
    elif "in.input_ids" in given:
        _expand(case, given, [len(s) for s in stacks], image_id, tokens_per_image)
    elif not stacks and not case.pictures:
        raise ValueError(f"{case.name}: expected in.input_ids, images or in.*_rgb, found {', '.join(given)}")


def _expand(case: Case, given: dict[str, Tensor], counts: list[int], image_id: int, tokens_per_image: int) -> None:
    """Replace placeholders by image rows. `counts`: images that each slot holds; slots are used in order."""
    ids, mask, labels = given["in.input_ids"], given.get("in.attention_mask"), given.get("in.labels")
    for name, x in (("in.attention_mask", mask), ("in.labels", labels)):
        if x is not None and x.shape != ids.shape:
            raise ValueError(f"{case.name}: expected {name} of shape {tuple(ids.shape)}, found {tuple(x.shape)}")
    starts = [sum(counts[:i]) for i in range(len(counts))]
    samples: list[list[tuple[int, int, bool, int]]] = []  # rows of (id, image row, valid, label)
    slot = 0
    for b, sample in enumerate(ids.tolist()):
        rows, prompt = [], []
        for t, token in enumerate(sample):
            keep = mask is None or bool(mask[b, t])
            if token != image_id:
                rows.append((token, -1, keep, int(labels[b, t]) if labels is not None else IGNORE))
                prompt += [token] if keep else []
                continue
            if slot >= len(counts):
                raise ValueError(f"{case.name}: sample {b} needs image {slot}, but {len(counts)} were recorded")
            for image in range(starts[slot], starts[slot] + counts[slot]):
                rows += [(0, image * tokens_per_image + r, keep, IGNORE) for r in range(tokens_per_image)]
                if keep:
                    prompt.append(image_id)
                    case.used.append(image)
            slot += 1
        if image_id not in sample:
            slot += 1  # a sample of text alone in a call with images still takes one image, unseen
        samples.append(rows)
        case.prompts.append(prompt)
    length = max(map(len, samples))
    full = [rows + [(0, -1, False, IGNORE)] * (length - len(rows)) for rows in samples]
    columns = [torch.tensor(column) for column in zip(*(zip(*rows, strict=True) for rows in full), strict=True)]
    case.ids, case.image_row, valid, expanded = columns
    case.valid = valid.bool()
    case.filler = torch.arange(length) >= torch.tensor([[len(rows)] for rows in samples])
    case.labels = expanded if labels is not None else None
    if mask is not None:  # the reference adds the ones of inserted rows on the left end
        ones = [[1] * (len(rows) - ids.shape[1]) + m for rows, m in zip(samples, mask.tolist(), strict=True)]
        case.mask = torch.tensor([m + [0] * (length - len(m)) for m in ones], dtype=mask.dtype)


def _read_rows(case: Case, given: dict[str, Tensor], counts: list[int], image_id: int, tokens_per_image: int) -> None:
    """Ids that hold a place for each row of an image: a mask says where, `held` which images there are.

    `counts`: images of each sample; those that only fill a sample up are not held.
    """
    ids, visual = given["in.input_ids"], given["in.image_mask"].bool()
    mask = given.get("in.attention_mask", torch.ones_like(ids))
    for name, x in (("in.attention_mask", mask), ("in.image_mask", visual)):
        if x.shape != ids.shape:
            raise ValueError(f"{case.name}: expected {name} of shape {tuple(ids.shape)}, found {tuple(x.shape)}")
    batch, most = len(ids), max(counts, default=0)
    held = given.get("in.image_held", torch.ones(batch, most, tokens_per_image)).bool()
    held = held if counts or held.any() else held[:, :0]  # text alone
    if len(counts) not in (0, batch) or tuple(held.shape) != (batch, most, tokens_per_image):
        raise ValueError(
            f"{case.name}: expected images [{batch}, images, ...] and a mask of {tokens_per_image} rows for each, "
            f"found {len(counts)} samples of images and a mask of shape {tuple(held.shape)}"
        )
    case.valid, case.mask, case.filler = mask.bool(), mask, torch.zeros_like(visual)
    case.ids = ids.masked_fill(visual, 0)
    case.image_row = torch.full_like(ids, -1)
    for b in range(batch):
        places = visual[b].nonzero().flatten().tolist()
        images = [b * most + i for i in range(most) if held[b, i].any()]
        wanted = len(images) * tokens_per_image
        if len(places) != wanted or int(held[b].sum()) != wanted or not bool(case.valid[b, places].all()):
            raise ValueError(
                f"{case.name}: sample {b} has {len(images)} images of {tokens_per_image} rows, all read, but its "
                f"masks mark {len(places)} places in its ids and {int(held[b].sum())} rows of images"
            )
        for n, image in enumerate(images):
            own = places[n * tokens_per_image : (n + 1) * tokens_per_image]
            if own[-1] - own[0] != tokens_per_image - 1:
                raise ValueError(f"{case.name}: sample {b}: the rows of image {n} do not follow one another")
            case.image_row[b, own] = image * tokens_per_image + torch.arange(tokens_per_image)
        firsts, inside = set(places[::tokens_per_image]), set(places)
        case.used += images
        case.prompts.append(
            [image_id if t in firsts else int(ids[b, t]) for t in range(ids.shape[1])
             if bool(case.valid[b, t]) and (t in firsts or t not in inside)]
        )  # fmt: skip
