"""Rows of an image followed through graphs: where they can be left out, what follows, and what refuses."""

from functools import cache

import pytest
import torch
from compressed import attend
from torch import nn
from toys import Function, declared, draw, trace

from mmopt.ir import ops
from mmopt.ir.graph import CONV2D, RESHAPE
from mmopt.ir.stage import Stage
from mmopt.pruning.propagate import NotApplicable, PrunePropagator
from mmopt.pruning.prune import choose

D, N, KEPT = 8, 6, 4  # width; rows of an image, a grid of 2 x 3, and how many of them stay
PLACES = [0, 1, 3, 4]  # these


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


# ------------------------------------------------------------------------------------------------------ graphs of toys
def parts():
    made = {"conv": nn.Conv2d(3, D, 2, 2), "a": nn.Linear(D, D), "b": nn.Linear(D, D), "norm": nn.LayerNorm(D)}
    tables = {"table": (N, D), "tall": (1, N + 1, D), "head": (1, 1, D), "asks": (1, 3, D), "scale": (N, 1)}
    return made | {k: nn.Parameter(torch.empty(shape)) for k, shape in tables.items()}


def all_of(x):
    return x


def some_of(x, dim=-2):
    return x.index_select(dim, torch.tensor(PLACES))


def after_head(m, x, take):
    rows = torch.cat([m.head.expand(x.shape[0], -1, -1), x], 1)
    return rows + torch.cat([m.tall[:, :1], take(m.tall[:, 1:])], 1)


def of_two_kinds(m, x, take):
    """Queries that see the rows and themselves, positions added to keys alone."""
    asks = m.asks.expand(x.shape[0], -1, -1)
    keys = torch.cat([asks, x + take(m.table)], 1)
    return ops.attention(asks, m.a(keys), m.b(torch.cat([asks, x], 1)), 2, 2)


FOLLOWED = {
    "row by row": lambda m, x, take: m.b(torch.relu(m.norm(m.a(x)))) + x,
    "a table": lambda m, x, take: x + take(m.table),
    "a table that is made": lambda m, x, take: x * take(torch.arange(N)[:, None].cos()),
    "a table of one column": lambda m, x, take: x * take(m.scale),
    "a table before": lambda m, x, take: take(m.table) - x,
    "a table behind other rows": after_head,
    "rows behind others": lambda m, x, take: torch.cat([m.head.expand(x.shape[0], -1, -1), x], 1),
    "others cut off again": lambda m, x, take: torch.cat([m.head.expand(x.shape[0], -1, -1), m.a(x)], 1)[:, 1:],
    "turned": lambda m, x, take: (m.a(x).transpose(1, 2) * 2).transpose(1, 2) + x,
    "heads": lambda m, x, take: x.view(x.shape[0], -1, 2, D // 2).transpose(1, 2) * 2,
    "a choice": lambda m, x, take: torch.where(take(m.scale) > 0, x, m.a(x)),
    "ones": lambda m, x, take: x + take(torch.ones(N, D)),
    "attention": lambda m, x, take: x + ops.attention(m.a(x), m.b(x), x, 2, 2),
    "causal attention": lambda m, x, take: x + ops.attention(m.a(x), m.b(x), x, 2, 2, causal=True),
    "queries": of_two_kinds,
    "rows beside rows": lambda m, x, take: torch.cat([x, m.a(x)], 2),
}
REFUSED = {
    "a table on its side": (lambda m, x, take: x.transpose(1, 2) + m.table.T, "what stands beside the rows .* differs"),
    "a sum of rows": (lambda m, x, take: x.sum(1), "sum.* does not work row by row"),
    "a part": (lambda m, x, take: x[:, 2:], "slice.* takes a part of the image's rows"),
    "rows as numbers": (lambda m, x, take: x.flatten(1), "does not work row by row"),
    "products of rows": (lambda m, x, take: x @ x.transpose(1, 2), "matmul.* does not work row by row"),
    "a mask of its own": (
        lambda m, x, take: ops.attention(x, x, x, 2, 2, key_mask=(m.scale[:, 0] > 0).expand(x.shape[0], -1)),
        "attention.* has a mask of its own over these rows",
    ),
    "the image twice": (lambda m, x, take: torch.cat([x, m.a(x)], 1), "puts rows of two images after each other"),
    "keys alone": (
        lambda m, x, take: ops.attention(x, x, m.table.expand(x.shape[0], -1, -1), 2, 2),
        "its keys and values are other rows",
    ),
    "causal, by queries that are no rows": (
        lambda m, x, take: ops.attention(m.asks.expand(x.shape[0], -1, -1), x, x, 2, 2, causal=True),
        "has a mask of its own over these rows",
    ),
}


def toy(rest, take=all_of):
    """pixels -> rows -> y by ``rest(m, rows, take)``, with `take` on tables and on the rows."""

    def run(m, pixels):
        rows = m.conv(pixels).flatten(2).transpose(1, 2)
        return rest(m, rows if take is all_of else take(rows), take)

    return draw(Function(run, **parts()))


@cache
def as_traced(rest):
    weights: dict[str, torch.Tensor] = {}
    return trace(toy(rest), {"pixels": ("N", 3, 4, 6)}, ["y"], weights), weights


def narrowed(rest, keep=KEPT, method="random"):
    """The toy's graph with fewer rows from where they leave the convolution."""
    stage, weights = as_traced(rest)
    weights = dict(weights)
    before = next(n for n in stage.graph.nodes if n.target is RESHAPE and n.args[0].target is CONV2D)
    (at,) = before.users  # the rows' own dimension
    run = PrunePropagator(stage.graph, cuts={at: choose(keep, method, weights)})
    run.b.output(run.run())
    made = Stage(run.b.graph, stage.inputs, stage.outputs)
    declared(made, weights, {"pixels": picture()})
    return made, weights, run


def picture():
    return torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def the_same_rows(monkeypatch):
    """The method that draws rows draws those of this test."""
    from mmopt.pruning import methods as selection
    from mmopt.pruning.methods import Method

    drawn = Method(lambda g: (torch.tensor([PLACES]), None), False, False, "")
    monkeypatch.setitem(selection.METHODS, "random", drawn)


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name):
    rest = FOLLOWED[name]
    stage, weights, _ = narrowed(rest)
    found, wanted = stage.run(weights, {"pixels": picture()})["y"], toy(rest, some_of)(picture())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    whole = toy(rest)(picture())
    assert whole.shape != found.shape or name == "queries"
    if name == "queries":
        assert (whole - found).abs().max() > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    rest, why = REFUSED[name]
    with pytest.raises(NotApplicable, match=why):
        narrowed(rest)


@pytest.mark.parametrize("name", [*FOLLOWED, *REFUSED])
def test_without_a_cut_nothing_changes(name):
    """Rows are followed as far as they go; what they cannot be followed through is no error."""
    rest = FOLLOWED[name] if name in FOLLOWED else REFUSED[name][0]
    stage, weights = as_traced(rest)
    run = PrunePropagator(stage.graph)
    run.b.output(run.run())
    found = Stage(run.b.graph, stage.inputs, stage.outputs).run(weights, {"pixels": picture()})
    assert torch.equal(found["y"], stage.run(weights, {"pixels": picture()})["y"])


WEIGHTS = [4.0, 2.0]  # two windows of the grid of 2 x 3: columns 0 and 1, column 2


def pooled(x):
    """Their means."""
    grid = x.view(-1, 2, 3, D)
    return torch.stack([grid[:, :, :2].mean((1, 2)), grid[:, :, 2].mean(1)], 1)


@pytest.mark.parametrize("asked", [False, True])
def test_means_weigh_as_much_as_their_rows(asked):
    """Among themselves, and before queries that count once."""

    def asks_and_keys(m, x):
        asks = m.asks.expand(x.shape[0], -1, -1)
        return (asks, torch.cat([asks, x], 1)) if asked else (x, x)

    def rest(m, x, take):
        asks, keys = asks_and_keys(m, x)
        return ops.attention(asks, m.a(keys), m.b(keys), 2, 2)

    stage, weights, _ = narrowed(rest, 2, "pool")
    m = toy(rest)
    asks, keys = asks_and_keys(m, pooled(m.conv(picture()).flatten(2).transpose(1, 2)))
    logs = torch.tensor([[*([1.0] * 3 if asked else []), *WEIGHTS]]).log()
    found = stage.run(weights, {"pixels": picture()})["y"]
    torch.testing.assert_close(found, attend(asks, m.a(keys), m.b(keys), 2, logs), atol=1e-5, rtol=1e-5)
    assert (found - attend(asks, m.a(keys), m.b(keys), 2)).abs().max() > 1e-2  # without the sizes


def framed(rest):
    """A graph of videos ``[N, F, 3, 4, 6]`` with means of the rows of each frame, and its module."""

    def run(m, pixels):
        rows = m.conv(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)
        return rest(m, rows.reshape(*pixels.shape[:2], *rows.shape[1:]))

    weights: dict[str, torch.Tensor] = {}
    module = draw(Function(run, **parts()))
    stage = trace(module, {"pixels": ("N", "F", 3, 4, 6)}, ["y"], weights)
    before = next(n for n in stage.graph.nodes if n.target is RESHAPE and n.args[0].target is CONV2D)
    (at,) = before.users
    run_ = PrunePropagator(stage.graph, cuts={at: choose(2, "pool", weights)})
    run_.b.output(run_.run())
    return Stage(run_.b.graph, stage.inputs, stage.outputs), weights, module


def test_rows_of_frames_lie_after_each_other():
    """Rows of a video's frames are keys together, with their sizes; what tells frames apart stays as it is."""
    video = torch.randn(2, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0))

    def rest(m, rows):
        keys = torch.cat([(rows + m.table[0]).flatten(1, 2), m.asks.expand(rows.shape[0], -1, -1)], 1)
        return ops.attention(m.asks.expand(rows.shape[0], -1, -1), m.a(keys), keys, 2, 2)

    stage, weights, m = framed(rest)
    declared(stage, weights, {"pixels": video})
    x = pooled(m.conv(video.flatten(0, 1)).flatten(2).transpose(1, 2)).view(2, 3, 2, D) + m.table[0]
    keys = torch.cat([x.flatten(1, 2), m.asks.expand(2, -1, -1)], 1)
    asks, logs = m.asks.expand(2, -1, -1), torch.tensor([[*WEIGHTS * 3, 1.0, 1.0, 1.0]]).log()
    found = stage.run(weights, {"pixels": video})["y"]
    torch.testing.assert_close(found, attend(asks, m.a(keys), keys, 2, logs), atol=1e-5, rtol=1e-5)
    assert (found - attend(asks, m.a(keys), keys, 2)).abs().max() > 1e-2


def test_tables_of_rows_of_all_frames_are_refused():
    """Places that were kept differ from frame to frame, and after the frames lie behind each other they are lost."""
    with pytest.raises(NotApplicable, match=r"does not work row by row|cannot be told apart by their places"):
        framed(lambda m, rows: rows.flatten(1, 2) * torch.arange(rows.shape[1] * N)[:, None].cos())


def test_no_keys_before():
    with pytest.raises(NotApplicable, match="method dominant needs keys of an attention among these rows"):
        narrowed(FOLLOWED["a table"], method="dominant")


def test_places_and_sizes_are_told():
    _, _, run = narrowed(FOLLOWED["row by row"], 2, "pool")
    (out,) = (n.args[0][0] for n in run.graph.nodes if n.op == "output")
    rows = run.rows[out]
    assert (rows.dim, rows.lo, rows.count, rows.new, rows.size, rows.grid) == (1, 0, N, 2, 2, (2, 3))
    assert rows.places.meta["shape"][1:] == rows.sizes.meta["shape"][1:] == (2,)
