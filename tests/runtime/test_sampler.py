import itertools
import math

import numpy as np
import pytest

from mmopt.runtime.request import Request, RequestState
from mmopt.runtime.sampler import Sampler, StopText, log_probability
from mmopt.spec.errors import EngineError

LOGITS = np.array([0.5, 2.0, -1.0, 2.0, 1.0, -3.0], np.float32)


def softmax(x):
    p = np.exp(np.asarray(x, np.float64) - np.max(x))
    return p / p.sum()


def possible(**options):
    ids, p = Sampler(**options).distribution(LOGITS)
    return ids.tolist(), p


# Choosing a token


def test_greedy_takes_the_first_of_the_likeliest():
    assert Sampler()(LOGITS) == 1


def test_plain_sampling_is_the_softmax():
    ids, p = possible(temperature=0.7)
    assert ids == list(range(6))
    np.testing.assert_allclose(p, softmax(LOGITS / 0.7), rtol=1e-6)


def test_top_k_keeps_k_even_among_equals():
    assert sorted(possible(temperature=1, top_k=1)[0]) == [1]
    assert sorted(possible(temperature=1, top_k=3)[0]) == [1, 3, 4]
    ids, p = possible(temperature=2, top_k=3)
    np.testing.assert_allclose(p, softmax(LOGITS[ids] / 2), rtol=1e-6)
    assert sorted(possible(temperature=1, top_k=100)[0]) == list(range(6))


def test_top_p_keeps_the_fewest_that_hold_it():
    p = softmax(LOGITS)
    order = sorted(range(6), key=lambda i: (-p[i], i))
    for top_p in (1e-9, p[1] * 0.999, p[1] * 1.001, 0.8, 0.9, 0.99, 0.9999, 1):
        fewest = next((n for n in range(1, 7) if p[order[:n]].sum() >= top_p), 6)
        ids, q = possible(temperature=1, top_p=top_p)
        assert sorted(ids) == sorted(order[:fewest]), top_p
        assert math.isclose(q.sum(), 1)


def test_top_p_on_a_large_vocabulary_agrees_with_a_plain_sort():
    logits = np.random.default_rng(0).normal(0, 3, 5000).astype(np.float32)
    for top_p in (0.1, 0.5, 0.95):
        p = softmax(logits)
        order = np.argsort(-p, kind="stable")
        fewest = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
        assert Sampler(temperature=1, top_p=top_p).distribution(logits)[0].tolist() == order[:fewest].tolist()


def test_top_k_comes_before_top_p():
    ids, _ = possible(temperature=1, top_k=3, top_p=0.7)  # of what top_k left, not of all
    assert ids == [1, 3]


def test_draws_follow_the_distribution():
    sampler = Sampler(temperature=1.3, top_k=4, seed=0)
    ids, p = sampler.distribution(LOGITS)
    drawn = np.bincount([sampler(LOGITS) for _ in range(20_000)], minlength=6) / 20_000
    np.testing.assert_allclose(drawn[ids], p, atol=0.015)
    assert drawn.sum() == pytest.approx(drawn[ids].sum())


def test_a_seed_fixes_the_draws():
    def draws(seed):
        sampler = Sampler(temperature=1, seed=seed)
        return [sampler(LOGITS) for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_extreme_temperatures():
    assert {Sampler(temperature=1e-300, top_k=1, seed=i)(LOGITS) for i in range(5)} == {1}
    assert {Sampler(temperature=1e-300, seed=i)(LOGITS) for i in range(30)} == {1, 3}  # equal logits stay equal
    np.testing.assert_allclose(possible(temperature=1e9)[1], 1 / 6, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(EngineError, match="not finite"):
        Sampler()(np.array([0, bad, 1], np.float32))


def test_masked_logits_are_never_drawn():
    logits = np.array([-np.inf, 0, 1, -np.inf], np.float32)
    assert {Sampler(temperature=5, seed=i)(logits) for i in range(50)} == {1, 2}


def test_log_probability():
    for token in range(6):
        assert log_probability(LOGITS, token) == pytest.approx(math.log(softmax(LOGITS)[token]))
    assert log_probability(LOGITS * 1000, 2) == pytest.approx(-3000 - math.log(2))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", x) for x in (-1, math.inf, math.nan, "hot", None, True)),
        *(("top_k", x) for x in (0, -1, 1.5)),
        *(("top_p", x) for x in (0, -0.1, 1.01, math.nan)),
        *(("seed", x) for x in (-1, 0.5)),
        *(("max_new_tokens", x) for x in (0, -5, 1.0, True)),
        *(("stop", x) for x in ("a", ["a", ""], [""], [3]) if x != "a"),
        ("images", "cat.png"),
    ],
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(EngineError, match=option):
        Request("hello", **{option: value})


# Stop strings


def run(stops, pieces):
    """Everything given out, piece by piece, and whether a stop string ended it."""
    text = StopText(stops)
    given = []
    for piece in pieces:
        out, met = text.push(piece)
        given.append(out)
        if met:
            return given, True
    return [*given, text.flush()], False


def splits(text):
    """All ways to cut a text into pieces."""
    for cuts in itertools.product([False, True], repeat=max(len(text) - 1, 0)):
        pieces, last = [], 0
        for i, cut in enumerate(cuts, 1):
            if cut:
                pieces.append(text[last:i])
                last = i
        yield [*pieces, text[last:]]


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "hello", None),
        (["lo"], "hello", "hel"),
        (["hello"], "hello", ""),
        (["hellos"], "hello", None),
        (["aab"], "aaab", "a"),  # a beginning that turns out to be none must not hide the next one
        (["abab"], "aababab", "a"),
        (["x", "ll"], "hello", "he"),
        (["abcd", "bc"], "abcde", "a"),  # the one that is complete first counts
        (["bc", "abc"], "abcde", ""),  # of two complete at once the longer
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["é"], "caféx", "caf"),
    ],
)
def test_stop_strings_however_the_text_is_cut(stops, text, expected):
    for pieces in splits(text):
        given, met = run(stops, pieces)
        assert met == (expected is not None)
        assert "".join(given) == (text if expected is None else expected)


def test_no_part_of_a_stop_string_is_given_out():
    given, met = run(["STOP"], ["one S", "TO", "two ST", "O", "P three"])
    assert met
    assert given == ["one ", "", "STOtwo ", "", ""]


def test_text_that_cannot_be_a_stop_string_is_not_held_back():
    assert StopText(["xyz"]).push("hello") == ("hello", False)
    assert StopText().push("hello") == ("hello", False)


def test_a_single_stop_string_needs_no_list():
    assert run("lo", ["hello"]) == (["hel"], True)


# An answer


class Letters:
    """Stands for a tokenizer: id i is the i-th letter, `slow` ids are only certain at the end."""

    def __init__(self, slow=()):
        self.slow, self.held = slow, ""

    def stream(self):
        return self

    def push(self, token):
        self.held += chr(ord("a") + token)
        return "" if token in self.slow else self.flush()

    def flush(self):
        text, self.held = self.held, ""
        return text


def answer(ids, slow=(), eos=(), limit=100, **options):
    made = RequestState(Request("", **options), limit, frozenset(eos), Letters(slow))
    pieces = []
    for token in ids:
        assert made.finish is None
        made.take(np.eye(26, dtype=np.float32)[token] * 9)
        pieces.append(made.piece)
    completion = made.completion()
    assert "".join(pieces) == completion.text
    return completion


def test_answer_finish_reasons():
    assert answer([0, 1, 2], limit=3).finish_reason == "length"
    assert answer([0, 1, 25], eos=[25]).finish_reason == "stop"
    done = answer([0, 1, 2, 3], stop=["cd"])
    assert (done.finish_reason, done.text, done.ids) == ("stop_string", "ab", [0, 1, 2, 3])
    assert done.completion_tokens == 4
    # the end token wins over the limit that it reaches too, a stop string over both
    assert answer([0, 25], eos=[25], limit=2).finish_reason == "stop"
    assert answer([0, 1], eos=[1], limit=2, stop=["b"]).finish_reason == "stop_string"


def test_text_held_back_is_given_at_the_end():
    assert answer([0, 1, 2], limit=3, stop=["cd"]).text == "abc"
    assert answer([0, 1, 2], slow=[2], limit=3).text == "abc"
    done = answer([0, 1, 2, 3], slow=[2, 3], limit=4, stop=["cd"])
    assert (done.text, done.finish_reason) == ("ab", "stop_string")


def test_cancelled_answer():
    made = RequestState(Request("", stop=["bc"]), 10, text=Letters())
    for token in (0, 1):
        made.take(np.eye(26, dtype=np.float32)[token])
    made.cancel()
    assert (made.completion().finish_reason, made.completion().text) == ("cancelled", "a")
    made.take(np.eye(26, dtype=np.float32)[4])
    assert made.finish == "cancelled"


def test_log_probabilities_only_if_asked_for():
    assert answer([1], limit=1).logprobs is None
    (got,) = answer([1], limit=1, logprobs=True).logprobs
    assert got == pytest.approx(9 - math.log(math.exp(9) + 25))


def test_forced_ids_are_fed_and_the_chosen_ones_kept():
    made = RequestState(Request(""), 2, forced=[7, 8])
    made.take(np.eye(26, dtype=np.float32)[3])
    assert (made.ids, made.fed) == ([3], 7)
