"""Fewer visual rows: which k of the n rows of an image stand for all of them, or are averaged into k.

The functions are traced into graphs, so shapes are fixed and operators few. A method marks rows, ``[N, n]`` of truth
values, by comparing scores with each other; indices appear only when the rows are taken, in raster order. Scores are in
float32 whatever the rows are in, and of equal scores the first row's is the better: so runtimes agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmopt.pruning.scores import best, better, blocks, identity, marks, nearest, places_of, rank, short, unit, windows
from mmopt.pruning.scores import grid_of as grid_of
from mmopt.pruning.scores import rows_at as rows_at
from mmopt.pruning.scores import window_matrix as window_matrix

ROUNDS = 8  # rows chosen one after the other would be as many steps of a graph: this many steps choose as well
RIDGE = 1e-3  # of the kernel's diagonal, which is at most 1: residuals below it are rounding
FLOOR = 0.1  # least relevance of a row: one that nobody looks at can still differ from all others
INVERSE_STEPS = 6  # enough for rows of a round: they explain little of each other
PIVOTS = 4
DOMINANT = 54 / 64  # share of the rows that are kept as they are, as published


class Reduced(NamedTuple):
    """rows ``[N, k, d]`` of the input's dtype; places ``[N, k]`` int64, ascending: which of the n rows each stands for.

    sizes ``[N, k]`` float32: how many rows each is the mean of, n in all; None: one each. Attention with log(sizes)
    added to the scores of its keys gives a mean the weight that its rows had together, or less where they were unlike.
    """

    rows: Tensor
    places: Tensor
    sizes: Tensor | None


@dataclass(frozen=True)
class Given:
    """What a method is given: the arguments of `reduce_rows`."""

    x: Tensor
    keep: int
    grid: tuple[int, int]
    query: Tensor | None
    keys: Tensor | None
    heads: int
    sizes: Tensor | None

    @property
    def n(self) -> int:
        return self.x.shape[1]

    def saliency(self) -> Tensor | None:
        """``[N, n]``: softmax(query keys^T / sqrt(width of a head)), the mean over heads. None without these."""
        if self.query is None or self.keys is None:
            return None
        batch, width = self.keys.shape[0], self.keys.shape[2] // self.heads
        q = self.query.float().reshape(batch, self.heads, 1, width)
        k = self.keys.float().reshape(batch, self.n, self.heads, width).permute(0, 2, 3, 1)
        return torch.softmax(q @ k * width**-0.5, -1).mean(1).reshape(batch, self.n)

    def alike_by(self) -> Tensor:
        """``[N, n, .]``: what says how alike rows are: the mean of their keys over heads, else the rows themselves."""
        if self.keys is None:
            return short(self.x.float())
        return self.keys.float().reshape(-1, self.n, self.heads, self.keys.shape[2] // self.heads).mean(2)


Chosen = tuple[Tensor, Tensor | None]  # places [N or 1, k], and what is averaged: 0 or 1 in [N or 1, k, n]


@dataclass(frozen=True)
class Method:
    """needs_keys: refuses to work without query and keys. merges: rows are averaged, so sizes come with them."""

    function: Callable[[Given], Chosen]
    needs_keys: bool
    merges: bool
    about: str


def reduce_rows(
    x: Tensor,
    keep: int,
    method: str,
    grid: tuple[int, int] | None = None,
    query: Tensor | None = None,
    keys: Tensor | None = None,
    heads: int = 1,
    sizes: Tensor | None = None,
) -> Reduced:
    """x ``[N, n, d]`` -> `keep` rows of each image by one of `METHODS`; all n rows are returned as they are.

    grid: (height, width) of the rows in raster order; None: they are a sequence. keys ``[N, n, heads * width]`` of the
    rows in the attention nearest before, and query ``[N, heads * width]`` of what sums the image up there: they say how
    much each row is looked at, where a method asks for it. sizes ``[N, n]``: how many rows each stands for already.
    Raises ValueError for an unknown method, a number of rows that is not 1..n, a grid of another number of rows, other
    shapes than these, and for a method without the keys that it needs.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    n = x.shape[1]
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= n:
        raise ValueError(f"keep is {keep!r}, expected a whole number of rows from 1 to {n}")
    if grid is not None and (len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != n):
        raise ValueError(f"grid is {tuple(grid)}, expected (height, width) of {n} rows")
    if METHODS[method].needs_keys and (query is None or keys is None):
        raise ValueError(f"method {method!r} needs query and keys of an attention before, found none")
    if keys is not None and (keys.dim() != 3 or keys.shape[1] != n or keys.shape[2] % heads):
        raise ValueError(f"keys are {list(keys.shape)}, expected [N, {n}, a multiple of the {heads} heads]")
    if query is not None and (keys is None or query.shape[-1] != keys.shape[2]):
        width = "no keys" if keys is None else f"keys {keys.shape[2]} wide"
        raise ValueError(f"query is {query.shape[-1]} wide, expected keys of the same width, found {width}")
    if sizes is not None and (sizes.dim() != 2 or sizes.shape[1] != n):
        raise ValueError(f"sizes are {list(sizes.shape)}, expected [N, {n}]")
    if keep == n:
        return Reduced(x, torch.arange(n).expand(x.shape[0], n), sizes)
    given = Given(x, keep, grid or (1, n), query, keys, heads, sizes)
    places, matrix = METHODS[method].function(given)
    places = places.expand(x.shape[0], keep)
    if matrix is None:
        left = None if sizes is None else rows_at(sizes[:, :, None], places)[:, :, 0]
        return Reduced(rows_at(x, places), places, left)
    weights = matrix if sizes is None else matrix * sizes[:, None, :]
    total = weights.sum(-1)
    rows = (weights / total[:, :, None]) @ x.float()
    return Reduced(rows.to(x.dtype), places, total.expand(x.shape[0], keep))


# ------------------------------------------------------------------------------------------------------------- methods
def first(g: Given) -> Chosen:
    return torch.arange(g.keep)[None], None


def uniform(g: Given) -> Chosen:
    return torch.from_numpy(windows(g.grid, g.keep)[1])[None], None


def random(g: Given) -> Chosen:
    drawn = np.random.default_rng(0).permutation(g.n)[: g.keep]
    return torch.from_numpy(np.sort(drawn))[None], None


def pool(g: Given) -> Chosen:
    matrix, places = window_matrix(g.grid, g.keep)
    return places[None], marks(matrix > 0)[None]


def window(g: Given) -> Chosen:
    """In each window the row that is looked at most; without keys the one nearest to the window's mean."""
    inside = torch.from_numpy(windows(g.grid, g.keep)[0])
    same = inside[:, None] == inside
    score = g.saliency()
    if score is None:
        matrix = marks(same)
        x = g.x.float()
        score = -torch.linalg.vector_norm(x - (matrix / matrix.sum(1, keepdim=True)) @ x, dim=-1)
    beaten = marks(better(score) & same).amax(-1)
    return places_of(beaten < 1, g.keep), None


def diverse(g: Given) -> Chosen:
    """The row farthest from those chosen, again and again; a round takes several that are also far from each other."""
    u = unit(short(g.x.float()))
    close = (1 + u @ u.transpose(1, 2)).clamp(0, 2)  # 2 - distance
    score, far = 2 - close.mean(-1), torch.full((1, g.n), 2.0)  # far: distance to the nearest that is chosen
    for count in blocks(g.keep, ROUNDS):
        # score <- min(score, distance to a better row): of rows that are near each other the best one stays in front
        score = torch.minimum(score, 2 - (close * marks(better(score))).amax(-1))
        chosen = best(score, count)
        far = torch.minimum(far, 2 - (close * marks(chosen)[:, None]).amax(-1))
        score = far = torch.where(chosen, -1.0, far)
    return places_of(far < 0, g.keep), None


def dpp(g: Given) -> Chosen:
    """Rows whose kernel K_ij = r_i r_j cos(x_i, x_j) has a large determinant, r the relevance (saliency from 0 to 1).

    A round takes the largest variances that are left, less those that a better row of the round explains, then
    conditions on them: K <- K - K_J^T K_JJ^-1 K_J.
    """
    u, seen = unit(g.x.float()), g.saliency()
    if seen is not None:
        least = seen.amin(-1, keepdim=True)
        seen = (seen - least) / (seen.amax(-1, keepdim=True) - least).clamp(min=1e-12)
        u = u * (FLOOR + (1 - FLOOR) * seen)[:, :, None]
    left = (u * u).sum(-1) + RIDGE  # the diagonal
    kernel = u @ u.transpose(1, 2) + identity(g.n) * RIDGE
    taken = left < 0
    for count in blocks(g.keep, ROUNDS):
        score = torch.where(taken, -1.0, left)
        # how much of the variance of row i a better row j explains: K_ij^2 / K_jj
        explained = (kernel * kernel * (marks(better(score)) / left[:, None])).amax(-1)
        chosen = best(torch.where(taken, -1.0, (left - explained).clamp(min=0)), count)
        taken = taken | chosen
        kernel, left = given_rows(kernel, left, places_of(chosen, count))
    return places_of(taken, g.keep), None


def given_rows(kernel: Tensor, left: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel ``[N, n, n]`` and its diagonal, conditioned on the rows at `places`."""
    scale = rows_at(left[:, :, None], places).sqrt()
    cross = rows_at(kernel, places) / scale  # [N, k, n]
    among = rows_at(cross.transpose(1, 2), places) / scale
    by = inverse(among) @ cross
    left = (left - (cross * by).sum(1)).clamp(min=RIDGE / 10)
    return kernel - cross.transpose(1, 2) @ by, left


def inverse(m: Tensor) -> Tensor:
    """Of positive definite ``[N, k, k]``, by Newton's iteration, which is products only; from below."""
    z = identity(m.shape[1]) / m.abs().sum(-1).amax(-1)[:, None, None]
    for _ in range(INVERSE_STEPS):
        z = 2 * z - z @ m @ z
    return z


def merge(g: Given) -> Chosen:
    """Every other row looks for the most alike of the rest; the most alike pairs become their mean, until k are left.

    A round merges at most half of the rows. A pair is where its second row was.
    """
    like, places, matrix = g.alike_by(), None, None
    count = torch.ones(1, g.n) if g.sizes is None else g.sizes.float()
    while (n := like.shape[1]) > g.keep:
        gone, i, u = min(n - g.keep, n // 2), torch.arange(n), unit(like)
        pair = torch.from_numpy(np.arange(n)[:, None] % 2 < np.arange(n) % 2)  # from an even row to an odd one
        alike = torch.where(pair, u @ u.transpose(1, 2), -2.0)
        merged = best(alike.amax(-1), gone)
        into, kept = torch.where(merged, nearest(alike), i), places_of(~merged, n - gone)
        joined = marks(kept[:, :, None] == into[:, None, :])  # [N, rows after, rows before]
        total = (joined @ count[:, :, None])[:, :, 0]
        like, count = joined @ (like * count[:, :, None]) / total[:, :, None], total
        places = kept if places is None else rows_at(places[:, :, None], kept)[:, :, 0]
        matrix = joined if matrix is None else joined @ matrix
    assert places is not None
    return places, matrix


def dominant(g: Given) -> Chosen:
    """Most are the rows that are looked at most; each other is the mean of a row and of what is most like it by keys.

    These others are evenly spaced among the rows that were not looked at.
    """
    seen = g.saliency()
    assert seen is not None
    n, count = g.n, max(1, min(g.keep - 1, round(g.keep * DOMINANT)))
    looked = best(seen, count)
    if count == g.keep:
        return places_of(looked, count), None
    rest = places_of(~looked, n - count)
    at = torch.from_numpy(windows((1, n - count), g.keep - count)[1])
    centres = rows_at(rest[:, :, None], at.expand(rest.shape[0], g.keep - count))[:, :, 0]
    is_centre = marks(centres[:, :, None] == torch.arange(n)).amax(1) > 0
    u = unit(g.alike_by())
    into = rows_at(centres[:, :, None], nearest(u @ rows_at(u, centres).transpose(1, 2)))[:, :, 0]
    kept = looked | is_centre
    into, places = torch.where(kept, torch.arange(n), into), places_of(kept, g.keep)
    return places, marks(places[:, :, None] == into[:, None, :])


def pivots(g: Given) -> Chosen:
    """A few rows with the largest key (its L1 norm), and for each of them the rows that are least like it."""
    keys = (g.x if g.keys is None else g.keys).float()
    u, few = unit(keys), min(PIVOTS, g.keep)
    order = rank(keys.abs().sum(-1))
    taken = order < few
    for p, count in enumerate(blocks(g.keep - few, few)):
        pivot = marks(order == p)[:, None] @ u  # [N, 1, d]
        unlike = 1 - (u @ pivot.transpose(1, 2))[:, :, 0]
        taken = taken | best(torch.where(taken, -1.0, unlike), count)
    return places_of(taken, g.keep), None


METHODS = {
    "first": Method(first, False, False, "the first rows; a control"),
    "uniform": Method(uniform, False, False, "rows evenly spaced over the grid; a control"),
    "random": Method(random, False, False, "the same rows of every image, drawn once; a control (arXiv:2502.11501)"),
    "pool": Method(pool, False, True, "means of windows; a control that is hard to beat (arXiv:2502.11501)"),
    "window": Method(window, False, False, "the row of each window that is looked at most (VScan, arXiv:2505.22654)"),
    "diverse": Method(diverse, False, False, "rows as far from each other as can be (DivPrune, arXiv:2503.02175)"),
    "dpp": Method(dpp, False, False, "diverse and looked at: a determinantal process (CDPruner, arXiv:2506.10967)"),
    "merge": Method(merge, False, True, "the most alike rows become their mean (ToMe, arXiv:2210.09461)"),
    "dominant": Method(dominant, True, True, "most looked at, means of the rest (VisionZip, arXiv:2412.04467)"),
    "pivots": Method(pivots, False, False, "unlike a few rows with large keys (DART, arXiv:2502.11494)"),
}
