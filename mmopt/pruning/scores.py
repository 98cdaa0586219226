"""What the methods of `mmopt.pruning.methods` are made of: windows of a grid, and scores of rows that are compared."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WIDE, SHORT = 256, 128  # wider rows are compared after a random projection to SHORT


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """x ``[N, n, d]``, places ``[N, k]`` int64 -> the rows there ``[N, k, d]``."""
    batch, n = x.shape[0], x.shape[1]
    return F.embedding(places + n * torch.arange(batch)[:, None], x.reshape(batch * n, x.shape[2]))


# ------------------------------------------------------------------------------------------------------------- windows
def grid_of(k: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """(a, b) with a * b = k, a <= height, b <= width and the shape nearest to that of `grid`.

    None if there is none, or if it would be more than 4 times as narrow: k rows spread over a sequence are better then.
    """
    if grid is None:
        return None
    pairs = [(a, k // a) for a in range(1, grid[0] + 1) if k % a == 0 and k // a <= grid[1]]
    off = {(a, b): abs(math.log(a * grid[1] / (b * grid[0]))) for a, b in pairs}
    best_pair = min(off, key=lambda p: off[p], default=None)
    return best_pair if best_pair and off[best_pair] <= math.log(4) + 1e-9 else None


def window_matrix(grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """What averages the rows of `grid` over k windows, ``[k, n]`` float32, and the rows amid them, ``[k]`` int64.

    Windows do not overlap and are the cells of a coarser grid, see `grid_of`; or, without one, runs of rows.
    """
    window, places = windows(grid, k)
    inside = np.arange(k)[:, None] == window
    matrix = inside / inside.sum(1, keepdims=True)
    return torch.from_numpy(matrix.astype(np.float32)), torch.from_numpy(places)


def windows(grid: tuple[int, int], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The window that each row lies in, ``[n]``, and the row amid each window, ``[k]``."""

    def cut(n: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        edges = -(-np.arange(parts + 1) * n // parts)
        return np.arange(n) * parts // n, (edges[:-1] + edges[1:] - 1) // 2

    coarse = grid_of(k, grid)
    if coarse is None:
        return cut(grid[0] * grid[1], k)
    (row, mid_row), (column, mid_column) = cut(grid[0], coarse[0]), cut(grid[1], coarse[1])
    window = row[:, None] * coarse[1] + column
    return window.reshape(-1), (mid_row[:, None] * grid[1] + mid_column).reshape(-1)


# -------------------------------------------------------------------------------------------------------------- scores
def better(score: Tensor) -> Tensor:
    """score ``[N, n]`` -> ``[N, i, j]``: row j is better than row i. Of equal ones the first is."""
    i = torch.arange(score.shape[1])
    own, other = score[:, :, None], score[:, None, :]
    return (other > own) | ((other == own) & (i[None, :] < i[:, None]))


def rank(score: Tensor) -> Tensor:
    """How many rows are better, ``[N, n]`` float32."""
    return marks(better(score)).sum(-1)


def best(score: Tensor, k: int) -> Tensor:
    """Marks the k best rows."""
    return rank(score) < k


def places_of(chosen: Tensor, k: int) -> Tensor:
    """Marks of k rows in ``[N, n]`` -> their places ``[N, k]``, ascending."""
    n = chosen.shape[1]
    i = torch.arange(n)
    return torch.where(chosen, n - i, -i).topk(k).indices


def nearest(like: Tensor) -> Tensor:
    """like ``[N, n, m]`` -> which of the m is most like each row, ``[N, n]`` int64; of equal ones the first."""
    m = like.shape[2]
    top = like.amax(-1, keepdim=True)
    return torch.where(like >= top, torch.arange(m), torch.full((m,), m - 1)).amin(-1)


def marks(true: Tensor) -> Tensor:
    """Truth values as 0 and 1: products with them are several times as fast as `where` in ONNX Runtime."""
    return true.to(torch.float32)


def identity(n: int) -> Tensor:
    i = torch.arange(n)
    return marks(i[:, None] == i)


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6)


def short(x: Tensor) -> Tensor:
    """Wide rows by a fixed random projection, which keeps angles to about 1 / sqrt(SHORT)."""
    if x.shape[2] <= WIDE:
        return x
    drawn = np.random.default_rng(0).standard_normal((x.shape[2], SHORT)) / math.sqrt(SHORT)
    return x @ torch.from_numpy(drawn.astype(np.float32))


def blocks(k: int, parts: int) -> list[int]:
    """k in at most `parts` nearly equal parts."""
    parts = min(parts, k)
    return [k // parts + (i < k % parts) for i in range(parts)]
