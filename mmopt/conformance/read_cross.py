"""Images outside the text in recorded cases: what their rows see, by their ids and by recorded masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmopt.conformance.case import CrossMasks, same
from mmopt.spec.cross_mask import Before, CrossMask, VisibleTiles, masks
from mmopt.spec.model_info import Cross

if TYPE_CHECKING:
    from mmopt.conformance.case import Case


def read_apart(
    case: Case, given: dict[str, Tensor], cross: Cross, image_id: int, image_dims: int, tiles: str | None
) -> None:
    """A case whose images lie outside the text: markers are rows of the text like others.

    `image_dims`: dimensions of an image. `tiles`: the image input whose ones count the blocks of an image.
    """
    if "in.input_ids" not in given:
        raise ValueError(f"{case.name}: expected ids of a prompt, found {', '.join(given) or 'no input'}")
    ids = torch.cat([given["in.input_ids"], *([given["in.more_ids"]] if "in.more_ids" in given else [])], 1)
    mask = given.get("in.attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        raise ValueError(
            f"{case.name}: expected an attention mask of shape {tuple(ids.shape)}, found {tuple(mask.shape)}"
        )
    case.valid, case.mask, case.fed = mask.bool(), mask, given.get("in.fed_ids")
    case.ids = ids * case.valid
    case.prompts = [row.tolist() for row in case.each(ids)]
    case.image_row, case.filler = torch.full_like(ids, -1), torch.zeros_like(case.valid)
    if (pixels := given.get("in.pixel_values")) is not None:
        lead = pixels.shape[: pixels.dim() - image_dims]
        if len(lead) < 2 or lead[0] != len(ids) or set(lead[2:]) - {1}:
            raise ValueError(
                f"{case.name}: expected images [{len(ids)}, images, ...], {image_dims} dimensions for each, "
                f"found {tuple(pixels.shape)}"
            )
        case.pixel_values = pixels.flatten(0, len(lead) - 1)
        case.used = list(range(len(case.pixel_values)))
    case.sights = read_sights(case, given, cross, image_id, tiles)


def read_sights(
    case: Case, given: dict[str, Tensor], cross: Cross, image_id: int, tiles_name: str | None
) -> CrossMasks:
    name, prompts, valid, pixels = case.name, case.prompts, case.valid, case.pixel_values
    batch, count = len(prompts), 0 if pixels is None else len(pixels) // len(prompts)
    inputs = {k.removeprefix("in.image."): x.flatten(0, 1) for k, x in given.items() if k.startswith("in.image.")}
    for k, x in inputs.items():
        if len(x) != batch * count:
            raise ValueError(f"{name}: expected {k} for each of {batch * count} images, found {len(x)}")
    tiles = None
    if tiles_name in inputs:
        tiles = inputs[tiles_name].sum(-1).clamp(min=1).tolist()  # an image that fills up a sample has one, unseen
    earlier = given.get("in.before_ids")
    before = [0] * batch if earlier is None else (earlier == image_id).sum(1).tolist()
    after, rows = [], []
    for b, prompt in enumerate(prompts):
        own = None if tiles is None else tiles[b * count : (b + 1) * count]
        after.append(CrossMask(cross, image_id, count, own, before[b]))
        rows.append(after[-1].read(prompt))
    sights = CrossMasks(cross, image_id, [count] * batch, inputs, tiles, before, rows, after)
    if (seen := given.get("in.seen")) is not None:
        seen = seen.flatten(2)
        if seen.shape != (*valid.shape, sights.blocks):
            wanted = (*valid.shape, sights.blocks)
            raise ValueError(f"{name}: expected a mask of images of shape {wanted}, found {tuple(seen.shape)}")
        nothing: VisibleTiles = Before(range(sights.blocks)) if cross.leading_text == "all_images" else None
        said = [[tuple(row.nonzero().flatten().tolist()) or nothing for row in seen[b, valid[b]]] for b in range(batch)]
        if not same(said, rows, sights.blocks):
            sights.given = said
    return sights


def tensors(samples: Sequence[Sequence[VisibleTiles]], valid: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """seen ``[B, S, blocks]``, attends ``[B, S]`` and sees ``[B, S]``; rows of padding (not valid) see nothing."""
    seen = torch.zeros(*valid.shape, max(1, blocks), dtype=torch.bool)
    attends, sees = torch.zeros_like(valid), torch.zeros_like(valid)
    for b, rows in enumerate(samples):
        made = [torch.from_numpy(m) for m in masks(rows, max(1, blocks))]
        seen[b, valid[b]], attends[b, valid[b]], sees[b, valid[b]] = made
    return seen, attends, sees
