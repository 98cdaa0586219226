"""Programs whose images lie outside the text: batches of unequal image counts, before and after the passes."""

import pytest
import torch
from toys import MARKER, Beside, beside, open_gates

from mmopt.search.optimize import optimize

KINDS = {
    "one block": {},
    "first image again": {"reset": True},
    "tiles": {"blocks": 3},
    "tiles together": {"blocks": 2, "together": True, "before": "all_images", "sees": True},
    "text before": {"before": "all_images"},
}
PROMPTS = {
    "single": [[3, MARKER, 4, 5]],
    "unequal counts": [[3, MARKER, 4, MARKER, 5], [MARKER, 6], [7, 8, 9, MARKER, MARKER, MARKER]],
    "one without images": [[3, 4], [5, MARKER, 6, 7, 8], [MARKER, 3]],
    "none at all": [[3, 4, 5], [6]],
    "a marker alone": [[MARKER]],
    "side by side": [[3, MARKER, MARKER, MARKER, 4], [MARKER, MARKER, 5]],
}


@pytest.fixture(scope="module", params=KINDS)
def programs(request):
    """(as traced, optimized), with open gates."""
    plain = open_gates(beside(Beside(kv_heads=2), **KINDS[request.param]))
    return plain, optimize(plain).program


def pixels(n, seed=0):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) if n else None


def run(program, prompts, pictures=None, n=6, **kw):
    """(tokens, logits of every row that the language model gave last, by call)."""
    logits = []

    def observe(phase, call, made, chunk):
        if call.stage == "language_model":
            logits.append(made["logits"][:, -1:].clone())

    made = program(prompts, pictures, max_new_tokens=n, ignore_eos=True, observe=observe, **kw)
    return made["tokens"], logits


def equal(one, two):
    assert one[0] == two[0]
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def tiles_of(program, n):
    blocks = program.info.cross.tiles
    return [1 + i % blocks for i in range(n)] if blocks > 1 else None


@pytest.mark.parametrize("name", PROMPTS)
def test_optimized_equals_plain(programs, name):
    plain, fast = programs
    prompts = PROMPTS[name]
    n = sum(p.count(MARKER) for p in prompts)
    equal(*(run(p, prompts, pixels(n), tiles=tiles_of(plain, n)) for p in (plain, fast)))


@pytest.mark.parametrize("name", PROMPTS)
def test_a_sample_gets_what_it_gets_alone(programs, name):
    images, tiles, prompts = pixels(9), tiles_of(programs[0], 9), PROMPTS[name]
    for program in programs:
        n = sum(p.count(MARKER) for p in prompts)
        together, logits = run(program, prompts, images[:n], tiles=tiles and tiles[:n])
        used = 0
        for b, prompt in enumerate(prompts):
            own = slice(used, used := used + prompt.count(MARKER))
            alone, own_logits = run(program, [prompt], images[own], tiles=tiles and tiles[own])
            assert alone == [together[b]]
            for i, step in enumerate(own_logits[1:]):
                torch.testing.assert_close(logits[len(prompts) + i][b : b + 1], step, atol=1e-5, rtol=1e-4)


def test_images_matter(programs):
    for program in programs:
        _, one = run(program, [[3, MARKER, 4]], pixels(1))
        _, two = run(program, [[3, MARKER, 4]], pixels(1, seed=1))
        assert (one[0] - two[0]).abs().max() > 1e-3
        assert (one[-1] - two[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["one block", "tiles"])
def test_an_image_that_no_row_sees_changes_nothing(kind):
    """Text goes on from the last of several images."""
    plain = open_gates(beside(**KINDS[kind]))
    for program in (plain, optimize(plain).program):
        a, b = (torch.cat([pixels(1, seed), pixels(1, 9)]) for seed in (0, 1))
        _, one = run(program, [[MARKER, MARKER, 4]], a)
        _, two = run(program, [[MARKER, MARKER, 4]], b)
        torch.testing.assert_close(one[-1], two[-1])


@pytest.mark.parametrize(
    ("prompts", "images"),
    [
        ([[3, MARKER, 4, MARKER, 5]], [1]),  # fewer than markers
        ([[3, MARKER, 4]], [0]),
        ([[3, MARKER, 4]], [3]),  # more than markers
        ([[3, 4]], [2]),
        ([[3, MARKER, 4, MARKER, 5], [MARKER, 4]], [1, 1]),
        ([[3, MARKER, 4], [4, 5]], [2, 2]),
    ],
)
def test_other_counts_than_markers(programs, prompts, images):
    plain, fast = programs
    n = sum(images)
    equal(*(run(p, prompts, pixels(n), images=images, tiles=tiles_of(plain, n)) for p in (plain, fast)))


def test_a_row_that_sees_none_weighs_all_of_its_own_sample(programs):
    """Beside samples with other counts a mask over all cannot do that: refused. Segments can."""
    plain, fast = programs
    prompts, images, tiles = [[MARKER, 4, MARKER, 5], [MARKER, 3, MARKER]], [1, 2], tiles_of(plain, 3)
    with pytest.raises(ValueError, match="sees none of its images beside samples with another number: run them apart"):
        run(plain, prompts, pixels(3), images=images, tiles=tiles)
    together = run(fast, prompts, pixels(3), images=images, tiles=tiles)
    for b, own in enumerate((slice(0, 1), slice(1, 3))):
        alone = run(plain, prompts[b : b + 1], pixels(3)[own], images=images[b : b + 1], tiles=tiles and tiles[own])
        assert alone[0] == [together[0][b]]
        for i, step in enumerate(alone[1][1:]):
            torch.testing.assert_close(together[1][2 + i][b : b + 1], step, atol=1e-5, rtol=1e-4)


def test_a_prompt_weighs_its_own_images_alone(programs):
    """Each prompt is read by itself, so there a mask does, too."""
    prompts, images, tiles = [[MARKER, 4, MARKER, 5], [MARKER, 3, MARKER, MARKER, 6]], [1, 2], tiles_of(programs[0], 3)
    for program in programs:
        _, together = run(program, prompts, pixels(3), n=1, images=images, tiles=tiles)
        for b, own in enumerate((slice(0, 1), slice(1, 3))):
            one = run(program, [prompts[b]], pixels(3)[own], n=1, images=[images[b]], tiles=tiles and tiles[own])
            torch.testing.assert_close(one[1][0], together[b], atol=1e-5, rtol=1e-4)


def test_a_layer_that_keeps_its_mask_cannot_do_that():
    """The last layer works on the last row alone, so it still reads all blocks with a mask."""
    fast = optimize(open_gates(beside(Beside(mixed=False)))).program
    assert "seen" in fast.stages["language_model"].inputs
    assert fast.info.cross_kv
    with pytest.raises(ValueError, match="sees none of its images beside samples with another number: run them apart"):
        run(fast, [[MARKER, 4, MARKER, 5], [MARKER, 3, MARKER]], pixels(3), images=[1, 2])
    run(fast, [[MARKER, 4, MARKER, 5], [MARKER, 3, MARKER]], pixels(2), images=[1, 1])


@pytest.mark.parametrize("before", [[1], [2], [3]])
def test_markers_that_came_before(programs, before):
    plain, fast = programs
    options = {"images": [2], "num_previous_images": before, "tiles": tiles_of(plain, 2)}
    made = [run(p, [[4, 5, MARKER, 6]], pixels(2), **options) for p in (plain, fast)]
    equal(*made)
    if before == [1]:
        again = run(plain, [[4, 5, MARKER, 6]], pixels(2), images=[2], tiles=tiles_of(plain, 2))
        assert (again[1][0] - made[0][1][0]).abs().max() > 1e-3


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_marker_fed_while_decoding(programs, at):
    plain, fast = programs
    forced = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    forced[0, at] = MARKER
    prompts, tiles = [[MARKER, 3, MARKER, 4], [MARKER, 5]], tiles_of(plain, 3)
    kw = {"n": 5, "forced": forced, "tiles": tiles}
    equal(*(run(p, prompts, pixels(3), **kw) for p in (plain, fast)))
    alone = run(plain, prompts[1:], pixels(3)[2:], n=5, forced=forced[1:], tiles=tiles and tiles[2:])
    together = run(fast, prompts, pixels(3), **kw)
    assert alone[0] == [together[0][1]]  # the other sample goes on as it was


def test_first_image_again():
    plain = open_gates(beside(reset=True))
    forced, prompt = torch.tensor([[5, MARKER, 6, 7]]), [[MARKER, 3, MARKER, 4]]
    for program in (plain, optimize(plain).program):
        _, one = run(program, prompt, pixels(2), n=4, forced=forced)
        _, two = run(program, prompt, torch.cat([pixels(1, 7), pixels(2)[1:]]), n=4, forced=forced)
        torch.testing.assert_close(one[1], two[1])  # before the marker it sees the last image
        assert (one[2] - two[2]).abs().max() > 1e-3
        assert (one[3] - two[3]).abs().max() > 1e-3


def test_pixels_that_nobody_asked_for(programs):
    for program in programs:
        equal(run(program, [[3, 4]]), run(program, [[3, 4]], pixels(2)))


def test_wrong_calls(programs):
    for program in programs:
        with pytest.raises(ValueError, match="2 image markers, but pixel_values holds 1"):
            run(program, [[MARKER, 3, MARKER, 4]], pixels(1))
        with pytest.raises(ValueError, match="4 images, but this program was made for at most 3"):
            run(program, [[MARKER] * 4], pixels(4))
        with pytest.raises(ValueError, match=r"images is \[1\], expected None or 2 numbers"):
            run(program, [[3], [4]], pixels(1), images=[1])
        with pytest.raises(ValueError, match="tiles are"):
            run(program, [[MARKER]], pixels(1), tiles=[program.info.cross.tiles + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    plain = open_gates(beside(blocks=2, together=True, before="all_images", sees=True, dtype=dtype))
    fast = optimize(plain).program
    forced = torch.tensor([[5, 6, 7], [8, 9, 3]])
    made = [run(p, PROMPTS["side by side"], pixels(5), n=3, forced=forced)[1] for p in (plain, fast)]
    for a, b in zip(*made, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=0.1 if dtype == torch.bfloat16 else 0.02, rtol=0.1)
