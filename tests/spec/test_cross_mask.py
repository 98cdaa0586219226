"""Which images each row of a text sees, and attention in segments against attention with a mask."""

import numpy as np
import pytest
import torch

from mmopt.ir import ops
from mmopt.spec.cross_mask import Before, CrossMask, Segments, gather, key_mask, masks, segments, visible_tiles
from mmopt.spec.model_info import Cross

IMG = 9


def info(blocks=1, before="nothing", together=False, reset=False):
    return Cross(blocks, 1, 1, before, together, reset), IMG


def seen_by(ids, images, **kw):
    more = {k: kw.pop(k) for k in ("before_markers", "tiles") if k in kw}
    return visible_tiles(ids, images, *info(**kw), more.get("before_markers", 0), more.get("tiles"))


# ------------------------------------------------------------------------------------------------- what each row sees
def test_a_marker_and_what_follows_see_its_image():
    assert seen_by([1, IMG, 2, 3, IMG, 4], 2) == [None, (0,), (0,), (0,), (1,), (1,)]


def test_text_without_images():
    assert seen_by([1, 2], 0) == [None, None]
    assert seen_by([1, 2], 2) == [None, None]


def test_text_before_the_first_image():
    rows = seen_by([1, IMG, 2], 2, blocks=2, before="all_images")
    assert rows == [(0, 1, 2, 3), (0, 1), (0, 1)]
    assert [isinstance(r, Before) for r in rows] == [True, False, False]
    assert seen_by([1, 2], 0, before="all_images") == [None, None]


def test_more_markers_than_images_see_none():
    assert seen_by([IMG, 1, IMG, 2, IMG], 1) == [(0,), (0,), (), (), ()]
    assert seen_by([1, IMG, 2], 0) == [None, (), ()]


def test_fewer_markers_than_images():
    assert seen_by([IMG, 1], 3) == [(0,), (0,)]


def test_markers_side_by_side():
    ids = [IMG, IMG, 1, IMG, 2, IMG, IMG, IMG, 3]
    assert seen_by(ids, 6) == [(0,), (1,), (1,), (2,), (2,), (3,), (4,), (5,), (5,)]
    together = [(0,), (0, 1), (0, 1), (2,), (2,), (3,), (3, 4), (3, 4, 5), (3, 4, 5)]
    assert seen_by(ids, 6, together=True) == together
    assert seen_by([1, IMG, IMG, 2], 2, together=True, before="all_images") == [(0, 1), (0,), (0, 1), (0, 1)]


def test_side_by_side_beyond_the_images():
    assert seen_by([IMG, IMG, 1], 1, together=True) == [(0,), (0,), (0,)]
    assert seen_by([IMG, IMG, 1], 0, together=True) == [(), (), ()]


def test_tiles():
    assert seen_by([IMG, 1, IMG], 2, blocks=3, tiles=[1, 2]) == [(0,), (0,), (3, 4)]
    assert seen_by([IMG, IMG], 2, blocks=3, together=True, tiles=[2, 3]) == [(0, 1), (0, 1, 3, 4, 5)]
    assert seen_by([1, IMG], 1, blocks=3, before="all_images", tiles=[2])[0] == (0, 1, 2)  # padding tiles too
    for wrong in ([1], [1, 4], [0, 1], [1, 1, 1]):
        with pytest.raises(ValueError, match=r"tiles are .*, expected 2 numbers from 1 to 3"):
            seen_by([IMG, IMG], 2, blocks=3, tiles=wrong)


def test_markers_that_came_before():
    assert seen_by([1, 2, IMG, 3], 3, before_markers=2) == [(1,), (1,), (2,), (2,)]
    assert seen_by([1], 1, before_markers=1) == [(0,)]
    assert seen_by([1, IMG], 1, before_markers=2) == [(), ()]
    assert seen_by([1], 2, before_markers=2, blocks=2, tiles=[2, 1]) == [(2,)]


def test_in_pieces_as_at_once():
    rng = np.random.default_rng(0)
    for kind in range(40):
        options = {
            "blocks": 1 + kind % 3,
            "together": bool(kind & 1),
            "before": ("nothing", "all_images")[kind % 4 > 1],
        }
        ids = rng.choice([1, 2, IMG], 12, p=[0.3, 0.3, 0.4]).tolist()
        whole, cut = seen_by(ids, 4, **options), int(rng.integers(1, 12))
        sight = CrossMask(*info(**options), 4)
        assert sight.read(ids[:cut]) + sight.read(ids[cut:]) == whole


def test_decoding_shows_no_new_image():
    sight = CrossMask(*info(), 3)
    sight.read([IMG, 1, IMG, 2])
    assert [sight.decode(t) for t in (5, IMG, 6)] == [(1,), (1,), (1,)]


def test_decoding_a_marker_shows_the_first_image_again():
    sight = CrossMask(*info(reset=True, blocks=2), 3, [1, 2, 2])
    sight.read([IMG, 1, IMG, 2])
    assert [sight.decode(t) for t in (5, IMG, 6)] == [(2, 3), (0,), (0,)]
    none = CrossMask(*info(reset=True), 0)
    assert [none.decode(t) for t in (5, IMG)] == [None, ()]


def test_masks():
    seen, attends, sees = masks([None, (1, 2), (), Before((0, 1, 2))], 3)
    assert seen.tolist() == [[False] * 3, [False, True, True], [False] * 3, [True] * 3]
    assert attends.tolist() == [False, True, True, True]
    assert sees.tolist() == [False, True, False, False]


# -------------------------------------------------------------------------------------------------------- segments
def test_rows_that_see_the_same_are_one_segment():
    made = segments([[None, (0,), (0,), (1,)]], keys=64)
    assert made.blocks == [(0, (0,)), (0, (1,))]
    assert made.segment_rows.tolist() == [[1, 2], [3, 0]]
    assert made.row_segments.tolist() == [[4, 0, 1, 2]]


def test_long_segments_are_cut_where_that_costs_less():
    rows = [(0,)] * 40 + [(i,) for i in range(1, 6)]
    assert segments([rows], keys=1).segment_rows.shape == (45, 1)
    assert segments([rows], keys=400).segment_rows.shape == (6, 40)  # here more keys cost more than empty places
    assert segments([[(0,)] * 5], keys=1).segment_rows.shape == (1, 5)
    both = segments([[(0,)] * 6 + [(1,)] * 3], keys=2)
    assert both.blocks == [(0, (0,)), (0, (0,)), (0, (1,))]


def test_nothing_to_see():
    made = segments([[None, None], [None, None]], keys=3)
    assert made.blocks == [(0, ())]
    assert made.segment_rows.tolist() == [[0]]
    assert made.row_segments.tolist() == [[1, 1], [1, 1]]
    assert key_mask(made, 3).tolist() == [[True] * 3]
    zeros = gather(made, [[np.zeros((3, 4), np.float32)], []], is_key=True)
    assert zeros.shape == (1, 3, 4)


def test_key_mask():
    made = Segments([(0, (1, 2)), (0, ()), (1, (0,))], np.zeros((3, 1), np.int64), np.zeros((2, 1), np.int64))
    assert key_mask(made, 2).tolist() == [[True] * 4, [True, True, False, False], [True, True, False, False]]


def random_layout(rng, samples, n, blocks, dense):
    """Rows of each sample: runs that see nothing, none of the images, one block, or several."""
    made = []
    for b in range(samples):
        rows, kinds = [], ["zeros"]
        if blocks[b]:
            kinds = ["zeros", "none", "one", "several", "all"] if dense else ["zeros", "one"]
        while len(rows) < n:
            kind = rng.choice(kinds)
            some = int(rng.integers(blocks[b])) + 1 if blocks[b] else 0
            count = {"one": 1, "several": some, "all": blocks[b]}.get(kind, 0)
            see = tuple(sorted(rng.choice(blocks[b], count, replace=False).tolist())) if count else ()
            rows += [None if kind == "zeros" else Before(see) if kind == "all" else see] * int(rng.integers(1, 6))
        made.append(rows[:n])
    return made


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_segments_equal_a_mask(seed, dense):
    """Random layouts, samples of unequal image counts, grouped heads: the same rows as with the dense mask."""
    rng = np.random.default_rng(seed)
    samples, n, keys = int(rng.integers(1, 4)), int(rng.integers(1, 30)), int(rng.integers(1, 5))
    heads, kv_heads, d = 4, int(rng.choice([1, 2, 4])), 3
    blocks = rng.integers(0, 4, samples).tolist()
    layout = random_layout(rng, samples, n, blocks, dense)
    made = segments(layout, keys)
    count, length = made.segment_rows.shape
    assert len(made.blocks) == count
    assert 0 <= made.segment_rows.min() <= made.segment_rows.max() < samples * n
    assert 0 <= made.row_segments.min() <= made.row_segments.max() <= count * length
    for b, rows in enumerate(layout):  # each row lies in a segment of what it sees
        for i, row in enumerate(rows):
            place = int(made.row_segments[b, i])
            if row is None:
                assert place == count * length
            else:
                assert made.segment_rows.reshape(-1)[place] == b * n + i
                assert made.blocks[place // length] == (b, tuple(row))
    q = torch.from_numpy(rng.standard_normal((samples, n, heads * d)).astype(np.float32))
    k, v = ([rng.standard_normal((count, keys, kv_heads * d)).astype(np.float32) for count in blocks] for _ in range(2))
    expected = torch.zeros_like(q)
    for b, rows in enumerate(layout):
        if blocks[b]:
            seen, attends, _ = (torch.from_numpy(m)[None] for m in masks(rows, blocks[b]))
            both = (torch.from_numpy(x[b])[None] for x in (k, v))
            expected[b] = ops.cross_attention(q[b : b + 1], *both, seen, attends, heads, kv_heads, 0.7)[0]
    if not any(blocks):
        k[0] = v[0] = np.zeros((1, keys, kv_heads * d), np.float32)
    chosen = (torch.from_numpy(gather(made, x, is_key)) for x, is_key in ((k, True), (v, False)))
    places = (torch.from_numpy(made.segment_rows), torch.from_numpy(made.row_segments))
    mask = torch.from_numpy(key_mask(made, keys)) if dense else None
    out = ops.segment_attention(q, *chosen, *places, heads, kv_heads, mask, 0.7)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_cost_is_no_more_than_that_of_other_lengths():
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths, keys = rng.integers(1, 40, int(rng.integers(1, 8))).tolist(), int(rng.integers(1, 80))
        rows = [(i,) for i, length in enumerate(lengths) for _ in range(length)]
        count, length = segments([rows], keys).segment_rows.shape
        for other in lengths:
            assert count * (length + keys) <= sum(-(-x // other) for x in lengths) * (other + keys)


# -------------------------------------------------------------------------------------------------------- operators
def attention_by_loop(q, k, v, seen, attends, heads, kv_heads, scale):
    """The definition of `cross_attention`, row by row."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out, d = np.zeros_like(q), q.shape[2] // heads
    for b in range(q.shape[0]):
        keys, values = k[b].reshape(-1, kv_heads, d), v[b].reshape(-1, kv_heads, d)
        which = np.repeat(np.arange(k.shape[1]), k.shape[2])
        for i in range(q.shape[1]):
            for h in range(heads):
                scores = keys[:, h * kv_heads // heads] @ q[b, i, h * d : (h + 1) * d] * scale
                scores = np.where(seen[b, i].numpy()[which], scores, -np.inf if seen[b, i].any() else 0)
                p = np.exp(scores - scores.max())
                if attends[b, i]:
                    out[b, i, h * d : (h + 1) * d] = (p / p.sum()) @ values[:, h * kv_heads // heads]
    return torch.from_numpy(out)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_attention_is_its_definition(heads, kv_heads, dtype):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, heads * 4, generator=g).to(dtype)
    k, v = (torch.randn(2, 3, 2, kv_heads * 4, generator=g).to(dtype) for _ in range(2))
    seen, attends = torch.rand(2, 5, 3, generator=g) > 0.5, torch.rand(2, 5, generator=g) > 0.3
    seen[0, :2] = False
    seen[1, 2] = True
    attends[0, 0] = True
    out = ops.cross_attention(q, k, v, seen, attends, heads, kv_heads, 0.4)
    wanted = attention_by_loop(q, k, v, seen, attends, heads, kv_heads, 0.4)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-4)
    assert not out[~attends].any()


def alibi(q, k, v, slopes, heads, kv_heads):
    """Causal attention with ALiBi, plainly: slope times distance on the scores."""
    q, k, v = (x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    rows = torch.arange(q.shape[2])
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + slopes[:, None, None] * (rows[None] - rows[:, None])
    scores = scores.masked_fill(rows[None] > rows[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_slopes_equal_alibi_on_whole_sequences(heads, kv_heads):
    g = torch.Generator().manual_seed(0)
    total, d, slopes = 11, 4, torch.tensor([0.5, 0.25, 1.3, 0.01])
    q = torch.randn(3, total, heads * d, generator=g)
    k, v = (torch.randn(3, total, kv_heads * d, generator=g) for _ in range(2))
    wanted = alibi(q, k, v, slopes, heads, kv_heads)
    caches = [torch.full((3, kv_heads, 16, d), 9.0) for _ in range(2)]
    past, made = torch.zeros(3, dtype=torch.int64), []
    for lo, hi in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 11)):
        out, *caches = ops.cached_attention(
            q[:, lo:hi], k[:, lo:hi], v[:, lo:hi], *caches, past, heads, kv_heads, slopes=slopes
        )
        made.append(out)
        past = past + hi - lo
    torch.testing.assert_close(torch.cat(made, 1), wanted, atol=1e-5, rtol=1e-4)


def test_slopes_with_unequal_past():
    """Each sample gets what it gets alone."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 1, 8, generator=g) for _ in range(3))
    caches = [torch.randn(3, 2, 12, 4, generator=g) for _ in range(2)]
    past, slopes = torch.tensor([0, 7, 11]), torch.tensor([0.5, 2.0])
    out, keys, _ = ops.cached_attention(q, k, v, *caches, past, 2, 2, slopes=slopes)
    for b in range(3):
        one = slice(b, b + 1)
        alone = ops.cached_attention(q[one], k[one], v[one], *(c[one] for c in caches), past[one], 2, 2, slopes=slopes)
        torch.testing.assert_close(out[one], alone[0])
        torch.testing.assert_close(keys[one], alone[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slopes_do_not_lose_near_keys_in_half_precision(dtype):
    """Far into a text, and for each of several rows, near keys keep their order: the bias is small where it counts."""
    g = torch.Generator().manual_seed(0)
    total, slopes = 600, torch.tensor([0.5, 0.9])
    q, k, v = (torch.randn(1, total, 8, generator=g).to(dtype) for _ in range(3))
    caches = [torch.zeros(1, 2, total, 4, dtype=dtype) for _ in range(2)]
    out = ops.cached_attention(q, k, v, *caches, torch.zeros(1, dtype=torch.int64), 2, 2, slopes=slopes)[0]
    wanted = alibi(*(x.float() for x in (q, k, v)), slopes, 2, 2)
    assert (out.float() - wanted).abs().max() < (0.005 if dtype == torch.float16 else 0.05)
