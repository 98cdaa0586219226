import math
from dataclasses import replace

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
import toys

from mmopt.exporters.onnx import export
from mmopt.exporters.tensorrt import available, check_engine
from mmopt.pruning import scores as row_scores
from mmopt.pruning.methods import METHODS, Reduced, reduce_rows
from mmopt.pruning.scores import grid_of, rows_at, window_matrix

D, HEADS, WIDTH = 24, 4, 5  # of rows; of keys, and of each head


def given(n, batch=2, d=D, seed=0, dtype=torch.float32):
    """Rows, a query and keys; the keys belong to the rows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, d, generator=g)
    keys = x @ torch.randn(d, HEADS * WIDTH, generator=g) / d**0.5 + 0.1
    query = torch.randn(batch, HEADS * WIDTH, generator=g)
    return x.to(dtype), query.to(dtype), keys.to(dtype)


def reduced(x, keep, method, grid=None, query=None, keys=None, **kw) -> Reduced:
    return reduce_rows(x, keep, method, grid, query, keys, HEADS, **kw)


def picture(seed, side=12, d=64):
    """Rows of a smooth picture with a few objects on it, ``[1, side * side, d]``."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.randn(1, d, 4, 4, generator=g), (side, side), mode="bicubic")[0].permute(1, 2, 0)
    for _ in range(3):
        r, c = torch.randint(1, side - 3, (2,), generator=g).tolist()
        x[r : r + 3, c : c + 3] = torch.randn(d, generator=g) + 0.3 * torch.randn(3, 3, d, generator=g)
    return (x + 0.15 * torch.randn(x.shape, generator=g) + 0.5).reshape(1, -1, d)


def saliency(query, keys):
    """One attention row, by the library's own attention on values that tell the keys apart; the mean over heads."""
    q = query.unflatten(-1, (HEADS, 1, -1))
    k = keys.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    values = torch.eye(keys.shape[1]).expand(len(keys), HEADS, -1, -1)
    return F.scaled_dot_product_attention(q, k, values).mean(1)[:, 0]


# ---------------------------------------------------------------------------------------------------- for all methods
GRIDS = {"17 rows": (17, None), "4 x 4": (16, (4, 4)), "8 x 8": (64, (8, 8)), "5 x 7": (35, (5, 7))}


@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_shapes(method, case):
    n, grid = GRIDS[case]
    x, query, keys = given(n)
    for keep in (1, 2, n // 4, n // 2, n - 1, n):
        rows, places, sizes = reduced(x, keep, method, grid, query, keys)
        assert (rows.shape, rows.dtype) == ((2, keep, D), torch.float32)
        assert (places.shape, places.dtype) == ((2, keep), torch.int64)
        assert places.min() >= 0
        assert places.max() < n
        assert (places.diff() > 0).all()
        if sizes is None:
            assert torch.equal(rows, x[torch.arange(2)[:, None], places])
        else:
            assert sizes.shape == (2, keep)
            assert sizes.dtype == torch.float32
            assert sizes.min() >= 1
            assert torch.equal(sizes.sum(1), torch.full((2,), float(n)))
        assert (sizes is None) or METHODS[method].merges
    assert rows is x
    assert sizes is None


@pytest.mark.parametrize("method", METHODS)
def test_images_do_not_change_each_other(method):
    x, query, keys = given(64, batch=3)
    together = reduced(x, 16, method, (8, 8), query, keys)
    again = reduced(x, 16, method, (8, 8), query, keys)
    for i in range(3):
        alone = reduced(x[i : i + 1], 16, method, (8, 8), query[i : i + 1], keys[i : i + 1])
        assert torch.equal(together.places[i], alone.places[0])
        torch.testing.assert_close(together.rows[i], alone.rows[0])
    assert torch.equal(together.rows, again.rows)
    assert torch.equal(together.places, again.places)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_chooses_the_same(method, dtype):
    x, query, keys = given(64, dtype=dtype)
    half = reduced(x, 16, method, (8, 8), query, keys)
    full = reduced(x.float(), 16, method, (8, 8), query.float(), keys.float())
    assert torch.equal(half.places, full.places)
    assert half.rows.dtype == dtype
    assert torch.equal(half.rows, full.rows.to(dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["equal", "zero", "few", "large"])
def test_rows_without_differences(method, kind):
    """Ties go to the first row; nothing is divided by zero."""
    base = {
        "equal": torch.ones(1, 1, D),
        "zero": torch.zeros(1, 1, D),
        "few": given(4)[0][:1],
        "large": given(4)[0][:1],
    }
    x = base[kind].repeat(1, 64 // base[kind].shape[1], 1) * (1e4 if kind == "large" else 1)
    keys = x[..., : HEADS * WIDTH]
    for keep in (3, 16, 40):
        made = reduced(x, keep, method, (8, 8), torch.ones(1, HEADS * WIDTH), keys)
        assert made.rows.isfinite().all()
        assert (made.places.diff() > 0).all()
    if kind == "equal" and method in ("diverse", "dpp", "pivots"):
        assert made.places.tolist() == [list(range(40))]


def test_the_first_of_equal_rows_is_the_better():
    score = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert row_scores.rank(score).tolist() == [[5, 0, 2, 1, 3, 4]]
    assert row_scores.places_of(row_scores.best(score, 4), 4).tolist() == [[1, 2, 3, 4]]
    assert row_scores.nearest(score[:, None]).tolist() == [[1]]


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].merges])
def test_merging_keeps_the_mean(method):
    x, query, keys = given(64)
    sizes = torch.randint(1, 5, (2, 64), generator=torch.Generator().manual_seed(1)).float()
    for before in (None, sizes):
        rows, _, after = reduced(x, 10, method, (8, 8), query, keys, sizes=before)
        weights = torch.ones(2, 64) if before is None else before
        assert torch.equal(after.sum(1), weights.sum(1))
        total = (after[:, :, None] * rows).sum(1)
        torch.testing.assert_close(total, (weights[:, :, None] * x).sum(1), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(rows.sum(1) * weights.sum(1, keepdim=True) / 10, total, atol=1e-2)  # sizes matter


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].merges])
def test_sizes_of_chosen_rows(method):
    x, query, keys = given(16)
    sizes = torch.arange(32.0).reshape(2, 16) + 1
    made = reduced(x, 5, method, (4, 4), query, keys, sizes=sizes)
    assert torch.equal(made.sizes, sizes.gather(1, made.places))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "best"}, r"method is 'best', expected one of first, uniform, .*pivots"),
        ({"keep": 0}, "keep is 0, expected a whole number of rows from 1 to 16"),
        ({"keep": 17}, "keep is 17, expected"),
        ({"keep": 0.25}, r"keep is 0\.25, expected"),
        ({"keep": True}, "keep is True, expected"),
        ({"grid": (4, 5)}, r"grid is \(4, 5\), expected \(height, width\) of 16 rows"),
        ({"grid": (-4, -4)}, r"grid is \(-4, -4\), expected"),
        ({"keys": None}, "query is 20 wide, expected keys of the same width, found no keys"),
        ({"keys": None, "query": None, "method": "dominant"}, "method 'dominant' needs query and keys"),
        ({"keys": torch.ones(2, 15, 20)}, r"keys are \[2, 15, 20\], expected \[N, 16, a multiple of the 4 heads\]"),
        ({"heads": 3}, r"keys are \[2, 16, 20\], expected \[N, 16, a multiple of the 3 heads\]"),
        ({"query": torch.ones(2, 16)}, "query is 16 wide, expected keys of the same width, found keys 20 wide"),
        ({"sizes": torch.ones(2, 15)}, r"sizes are \[2, 15\], expected \[N, 16\]"),
    ],
)
def test_errors(change, message):
    x, query, keys = given(16)
    right = {"keep": 4, "method": "first", "grid": (4, 4), "query": query, "keys": keys, "heads": HEADS}
    reduce_rows(x, **right)
    with pytest.raises(ValueError, match=message):
        reduce_rows(x, **(right | change))


# ------------------------------------------------------------------------------------------------ windows and controls
@pytest.mark.parametrize(
    ("k", "grid", "coarse"),
    [
        (144, (24, 24), (12, 12)), (64, (24, 24), (8, 8)), (128, (24, 24), (8, 16)), (32, (8, 8), (4, 8)),
        (6, (4, 9), (2, 3)), (9, (1, 20), (1, 9)), (7, (24, 24), None), (30, (3, 12), (3, 10)), (1, (5, 7), (1, 1)),
        (13, (24, 24), None), (4, None, None), (50, (7, 7), None),
    ],
)  # fmt: skip
def test_grid_of(k, grid, coarse):
    assert grid_of(k, grid) == coarse


@pytest.mark.parametrize("coarse", [(4, 4), (2, 4), (8, 4), (1, 1), (8, 8)])
def test_pool_is_adaptive_average_pooling(coarse):
    x = given(64)[0]
    image = x.transpose(1, 2).unflatten(2, (8, 8))
    wanted = F.adaptive_avg_pool2d(image, coarse).flatten(2).transpose(1, 2)
    matrix, places = window_matrix((8, 8), coarse[0] * coarse[1])
    if coarse != (8, 4):  # either way is as near the shape of the grid
        torch.testing.assert_close(matrix @ x, wanted)
        if coarse != (8, 8):
            torch.testing.assert_close(reduced(x, len(places), "pool", (8, 8)).rows, wanted)
    else:
        assert not torch.allclose(matrix @ x, wanted)
    assert torch.equal(matrix.argmax(0)[places], torch.arange(len(places)))  # each place lies in its own window


def test_windows_of_a_sequence():
    matrix, places = window_matrix((1, 17), 5)
    assert (matrix > 0).sum(1).tolist() == [4, 3, 4, 3, 3]
    assert places.tolist() == [1, 5, 8, 12, 15]
    assert reduced(given(17)[0], 5, "uniform").places[0].tolist() == places.tolist()


def test_controls():
    x = given(64)[0]
    assert reduced(x, 3, "first", (8, 8)).places.tolist() == [[0, 1, 2]] * 2
    wanted = [8 * r + c for r in (0, 2, 4, 6) for c in (0, 2, 4, 6)]
    assert reduced(x, 16, "uniform", (8, 8)).places[0].tolist() == wanted
    drawn = reduced(x, 16, "random", (8, 8)).places
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, reduced(x + 1, 16, "random", (8, 8)).places)
    assert drawn[0].tolist() not in (wanted, list(range(16)))


# ------------------------------------------------------------------------------------- methods, written out as loops
def test_window_takes_the_best_of_each():
    x, query, keys = given(64)
    inside = window_matrix((8, 8), 16)[0] > 0
    looked, near = (
        saliency(query, keys),
        -(x - (inside / inside.sum(1, keepdim=True)).T @ (inside.float() @ x)).norm(dim=2),
    )
    for score, more in ((looked, (query, keys)), (near, ())):
        made = reduced(x, 16, "window", (8, 8), *more).places
        for places, s in zip(made, score, strict=True):
            wanted = sorted(max(w.nonzero()[:, 0].tolist(), key=lambda i, s=s: s[i]) for w in inside)
            assert places.tolist() == wanted
    assert not torch.equal(made, reduced(x, 16, "window", (8, 8), query, keys).places)


def test_dominant():
    x, query, keys = given(64)
    made, seen = reduced(x, 32, "dominant", (8, 8), query, keys), saliency(query, keys)
    by = F.normalize(keys.unflatten(2, (HEADS, -1)).mean(2), dim=2)
    for b in range(2):
        looked = seen[b].topk(27).indices.tolist()
        rest = [i for i in range(64) if i not in looked]
        centres = [rest[i] for i in (3, 11, 18, 26, 33)]  # amid five runs of 37
        members = {i: [i] for i in [*looked, *centres]}
        for i in rest:
            if i not in centres:
                members[max(centres, key=lambda c, i=i, b=b: by[b, i] @ by[b, c])].append(i)
        assert made.places[b].tolist() == sorted(members)
        for row, size, i in zip(made.rows[b], made.sizes[b], sorted(members), strict=True):
            assert size == len(members[i])
            torch.testing.assert_close(row, x[b, members[i]].mean(0))


@pytest.mark.parametrize("by_keys", [True, False])
def test_merge(by_keys):
    """Three rounds by hand: 21 rows -> 11 -> 6 -> 5."""
    x, _, keys = given(21)
    made = reduced(x, 5, "merge", None, None, keys if by_keys else None)
    for b in range(2):
        metric = keys[b].unflatten(1, (HEADS, -1)).mean(1) if by_keys else x[b]
        groups = [[i] for i in range(21)]
        at = list(range(21))
        for left in (11, 6, 5):
            u = F.normalize(torch.stack([metric[g].mean(0) for g in groups]), dim=1)
            pairs = [
                max(((u[i] @ u[j]).item(), i, j) for j in range(1, len(groups), 2)) for i in range(0, len(groups), 2)
            ]
            for _, i, j in sorted(pairs, reverse=True)[: len(groups) - left]:
                groups[j] = groups[j] + groups[i]
                groups[i] = []
            at = [a for a, g in zip(at, groups, strict=True) if g]
            groups = [g for g in groups if g]
        assert made.places[b].tolist() == at
        assert made.sizes[b].tolist() == [len(g) for g in groups]
        torch.testing.assert_close(made.rows[b], torch.stack([x[b, g].mean(0) for g in groups]))


def test_pivots():
    x, query, keys = given(64)
    made = reduced(x, 16, "pivots", (8, 8), query, keys)
    for b in range(2):
        u = F.normalize(keys[b], dim=1)
        few = keys[b].abs().sum(1).topk(4).indices.tolist()
        kept = list(few)
        for p in few:
            rest = [i for i in range(64) if i not in kept]
            kept += sorted(rest, key=lambda i, p=p, u=u: (u[i] @ u[p]).item())[:3]
        assert made.places[b].tolist() == sorted(kept)
    assert not torch.equal(made.places, reduced(x, 16, "pivots", (8, 8)).places)  # by rows, not keys


# --------------------------------------------------------------------------- rounds, against one row after the other
def chosen_one_by_one(x, k):
    """max-min: the first by its mean distance, then always the farthest from those chosen."""
    u = F.normalize(x, dim=1)
    apart = 1 - u @ u.T
    kept = [int(apart.mean(1).argmax())]
    while len(kept) < k:
        kept.append(int(apart[:, kept].amin(1).index_fill(0, torch.tensor(kept), -1).argmax()))
    return kept


def farthest(x, kept):
    """Cosine distance of the two nearest that are kept, and of the row farthest from all that are kept."""
    u = F.normalize(x, dim=1)
    among = 1 - u[kept] @ u[kept].T + 9 * torch.eye(len(kept))
    return among.min().item(), (1 - u @ u[kept].T).amin(1).max().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [64, 320])  # the second by a projection
def test_diverse_is_nearly_max_min(seed, d):
    x = picture(seed, d=d)
    (apart, covered), (apart_at_best, best) = (
        farthest(x[0], kept)
        for kept in (reduced(x, 36, "diverse", (12, 12)).places[0].tolist(), chosen_one_by_one(x[0], 36))
    )
    assert apart > 0.75 * apart_at_best
    assert covered < 1.25 * best
    for control in ("uniform", "random", "window"):
        assert farthest(x[0], reduced(x, 36, control, (12, 12)).places[0].tolist())[0] < 0.6 * apart_at_best


def log_det(kernel, kept):
    return torch.logdet(kernel[kept][:, kept]).item()


def determinant_one_by_one(kernel, k):
    kept = []
    for _ in range(k):
        rest = [i for i in range(len(kernel)) if i not in kept]
        if kept:
            part = kernel[kept][:, rest]
            left = kernel.diagonal()[rest] - (part * torch.linalg.solve(kernel[kept][:, kept], part)).sum(0)
        else:
            left = kernel.diagonal()[rest]
        kept.append(rest[int(left.argmax())])
    return kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("looked_at", [False, True])
def test_dpp_has_a_large_determinant(seed, looked_at, monkeypatch):
    x = picture(seed)
    u, more = F.normalize(x[0].double(), dim=1), ()
    if looked_at:
        query, keys = given(144, d=64, seed=seed)[1][:1] * 3, x[..., : HEADS * WIDTH]
        more, seen = (query, keys), saliency(query, keys)[0].double()
        u = u * (0.1 + 0.9 * (seen - seen.min()) / (seen.max() - seen.min()))[:, None]
    kernel = u @ u.T + 1e-3 * torch.eye(144)
    best = log_det(kernel, determinant_one_by_one(kernel, 36))
    made = log_det(kernel, reduced(x, 36, "dpp", (12, 12), *more).places[0].tolist())
    control = log_det(kernel, reduced(x, 36, "random", (12, 12)).places[0].tolist())
    assert best - made < 0.1 * (best - control)
    if looked_at:  # without looking it is another set
        blind = log_det(kernel, reduced(x, 36, "dpp", (12, 12)).places[0].tolist())
        assert best - blind > 0.12 * (best - control)
    monkeypatch.setattr("mmopt.pruning.methods.given_rows", lambda kernel, left, places: (kernel, left))
    broken = log_det(kernel, reduced(x, 36, "dpp", (12, 12), *more).places[0].tolist())
    assert best - broken > 0.2 * (best - control)


# ------------------------------------------------------------------------------------------------ in graphs, exported
def program(method, n, keep, grid, dtype=torch.float32, sized=False):
    """One stage: what a method gives, of rows, a query, keys and perhaps sizes."""

    def run(m, x, query, keys, *sizes):
        made = reduced(x, keep, method, grid, query, keys, sizes=sizes[0] if sizes else None)
        return tuple(v for v in made if v is not None)

    shapes = {"x": ("N", n, D), "query": ("N", HEADS * WIDTH), "keys": ("N", n, HEADS * WIDTH)}
    shapes |= {"sizes": (("N", n), torch.float32)} if sized else {}
    names = ["rows", "places", *(["counts"] if sized or METHODS[method].merges else [])]
    made = toys.single(toys.Function(run), shapes, names, dtype)
    made.info = replace(made.info, batch=3, images=1, context=8, tokens_per_image=1)
    return made, run


def values_of(n, batch, dtype=torch.float32, sized=False):
    values = dict(zip(("x", "query", "keys"), given(n, batch, seed=batch, dtype=dtype), strict=True))
    return values | ({"sizes": torch.arange(1.0, 1 + batch * n).reshape(batch, n)} if sized else {})


def in_onnxruntime(path, values):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path / "toy.onnx", options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(v) for v in session.run(None, {k: v.numpy() for k, v in values.items()})]


def takes(path):
    """TensorRT parses and builds the stage."""
    if available():
        assert check_engine(path) == []


ROUNDS = {"dpp": 2, "diverse": 3}  # as many as rows are kept; tracing takes long
SIZED = [("first", True), ("pool", True), ("merge", True)]


@pytest.mark.parametrize(("method", "sized"), [*((m, False) for m in METHODS), *SIZED])
def test_traced_and_exported(method, sized, tmp_path):
    n, keep, grid = (21, 12, None) if sized else (16, ROUNDS.get(method, 4), (4, 4))
    made, run = program(method, n, keep, grid, sized=sized)
    paths = [export(made, tmp_path / t, t, check=False, gate=False) for t in ("onnx", "tensorrt")]
    for path in paths:
        onnx.checker.check_model(str(path / "toy.onnx"))
    takes(paths[1])
    for batch in (1, 3):
        values = values_of(n, batch, sized=sized)
        eager, stage = run(None, *values.values()), made.stages["toy"]
        toys.declared(stage, made.weights, values)
        traced = stage.run(made.weights, values, keep_constants=False).values()
        for got in (traced, *(in_onnxruntime(path, values) for path in paths)):
            assert torch.equal([*got][1], eager[1])  # places
            for a, b in zip(got, eager, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["pool", "dominant"])
def test_half_precision_exported(method, tmp_path):
    """Of a float16 program: scores stay in float32, so the places are the same."""
    made, run = program(method, 16, 3, (4, 4), torch.float16)
    values = values_of(16, 2, torch.float16)
    wanted = run(None, *values.values())
    path = export(made, tmp_path / "engine", "tensorrt", check=False, gate=False)
    takes(path)
    rows, places, *_ = in_onnxruntime(path, values)
    assert rows.dtype == torch.float16
    assert torch.equal(places, wanted[1])
    torch.testing.assert_close(rows, wanted[0], atol=2e-3, rtol=2e-3)


def test_lowered_operators(tmp_path):
    """What the methods need of operators, in the forms that they do not use."""

    def run(m, x):
        least = x.topk(2, dim=1, largest=False)
        return (
            least.values, least.indices, torch.bmm(x, x.transpose(1, 2)), torch.maximum(x, -x),
            x.sum((0, 2), keepdim=True), (x > 0).sum(1), x.amin((1, 2)), torch.rsub(x, 2.0), 3 - (x > 0).sum(1),
            torch.where(x > 0, 1.0, x), torch.matmul(x, x[0].transpose(0, 1)),
        )  # fmt: skip

    made = toys.single(toys.Function(run), {"x": ("B", 4, 6)}, [f"y{i}" for i in range(11)])
    made.info = replace(made.info, batch=3, images=1, context=8)
    path = export(made, tmp_path / "engine", check=False, gate=False)
    onnx.checker.check_model(str(path / "toy.onnx"))
    values = {"x": torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))}
    wanted = made.stages["toy"].run(made.weights, values, keep_constants=False).values()
    for a, b in zip(in_onnxruntime(path, values), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_at():
    x, places = given(7)[0], torch.tensor([[6, 0, 0], [1, 2, 3]])
    assert torch.equal(rows_at(x, places), x.gather(1, places[:, :, None].expand(-1, -1, D)))
    assert rows_at(torch.arange(14).reshape(2, 7, 1), places)[:, :, 0].tolist() == [[6, 0, 0], [8, 9, 10]]
    assert math.prod(rows_at(x, places[:, :1]).shape) == 2 * D
