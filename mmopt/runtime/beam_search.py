"""Beam search, with the scores and the end of `generate(num_beams=...)` of the transformers library (5.x).

`search` needs no model, only a callback that feeds ids; `answer` gives it the lanes of one cache: the prompt is read
once, and a beam that goes on from another one copies that one's rows after the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmopt.runtime.decoder import Decoder, LiveSequence
from mmopt.runtime.kv_cache import Cache, restore
from mmopt.runtime.request import Completion, RequestState
from mmopt.spec.errors import EngineError
from mmopt.spec.prompt import position_deltas

Step = Callable[[Sequence[int], Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Hypothesis:
    """New tokens and their log-probabilities. total: their sum. score: total / length ** length_penalty, once ended."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    score: float = 0.0


def search(
    first: np.ndarray,
    step: Step,
    beams: int,
    limit: int,
    eos_ids: Collection[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> list[Hypothesis]:
    """The best hypotheses after a prompt, the best first; as many as there are beams.

    first: logits ``[V]`` of the prompt's last row. step(ids, parents): beam i now is a copy of the beam parents[i] with
    ids[i] behind it; returns logits ``[beams, V]``. limit: new tokens at most. Hypotheses end with one of `eos_ids`
    (which counts in their length) or at the limit, and compete by sum of logprobs / length ** length_penalty.

    As soon as `beams` have ended, early_stopping True ends the search; False ends it if the best beam, as it is now,
    scores no better than the worst that ended; "never" lets it hope for the length that suits it best. Of equal
    candidates the one of the better beam and with the lower id comes first. One beam is greedy decoding.
    """
    # Each beam may end with each of the end ids: with so many candidates there always are `beams` that go on.
    keep = beams * max(2, 1 + len(eos_ids))
    running, ended, logits = [Hypothesis()], [], first[None]
    for length in range(1, limit + 1):
        logprobs = log_softmax(logits)
        totals = logprobs + np.array([h.total for h in running], np.float32)[:, None]
        going: list[tuple[int, Hypothesis]] = []
        for rank, i in enumerate(largest(totals.ravel(), keep)):
            parent, token = divmod(int(i), totals.shape[1])
            old, total = running[parent], float(totals[parent, token])
            new = Hypothesis((*old.ids, token), (*old.logprobs, float(logprobs[parent, token])), total)
            if token not in eos_ids and length < limit:
                going.append((parent, new))
            elif rank < beams:  # the candidates behind are there only to go on
                ended.append(replace(new, score=scored(total, length, length_penalty)))
        ended = sorted(ended, key=lambda h: -h.score)[:beams]
        if not going:
            break
        if len(ended) == beams:
            hoped = limit if early_stopping == "never" and length_penalty > 0 else length
            best = scored(going[0][1].total, hoped, length_penalty)
            if beams == 1 or early_stopping is True or best <= ended[-1].score:
                break
        parents, running = [p for p, _ in going[:beams]], [h for _, h in going[:beams]]
        logits = step([h.ids[-1] for h in running], parents)
    return ended


def scored(total: float, length: int, length_penalty: float) -> float:
    """What hypotheses compete by, rounded as the library rounds it."""
    with np.errstate(over="ignore", divide="ignore"):  # then it is 0 or -inf
        return float(np.float32(total) / np.float32(length**length_penalty))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln softmax of each row, in float32. EngineError for logits that are not finite."""
    most = logits.max(1, keepdims=True)
    if not np.isfinite(most).all():
        raise EngineError(f"the model's logits are not finite ({most.ravel()}): its inputs or weights are broken")
    x = logits.astype(np.float32) - most
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest values in descending order; of equal values the lower index comes first."""
    k = min(k, len(x))
    places = np.flatnonzero(x >= np.partition(x, -k)[-k])
    return places[np.argsort(-x[places], kind="stable")[:k]]


# ---------------------------------------------------------------------------------------------------- with an engine
def answer(decoder: Decoder, job: LiveSequence) -> Completion:
    """The best answer to a request with beams; `Completion.hypotheses` are all of them."""
    asked, r = job.answer, job.answer.request
    with decoder.cache(r.num_beams) as cache:
        if job.prefix is not None:
            restore(cache, 0, job.prefix)
        first = decoder.prefill(cache, 0, job.ids, job.images, job.before)
        late = position_deltas(cache.images[0], cache.images[0], decoder.info)["cache_delta"]
        prompt = int(cache.past[0] - late)  # from there on at least one layer holds more than the prompt
        follow(cache, [0] * r.num_beams, 0)

        def step(ids: Sequence[int], parents: Sequence[int]) -> np.ndarray:
            follow(cache, parents, prompt)
            return decoder.decode(cache, ids, [True] * len(ids))

        found = search(first, step, r.num_beams, asked.limit, asked.eos_ids, r.length_penalty, r.early_stopping)
    made = []
    for h in found:
        one = RequestState(r, asked.limit, asked.eos_ids, asked.text, prompt_rows=asked.prompt_rows)
        for token, logprob in zip(h.ids, h.logprobs, strict=True):
            one.add(token, logprob)
        made.append(replace(one.completion(), score=h.score))
    return replace(made[0], hypotheses=made)


def follow(cache: Cache, parents: Sequence[int], start: int) -> None:
    """Each lane goes on from what the lane parents[lane] holds; rows before `start` are the same in both already."""
    lanes = [lane for lane, parent in enumerate(parents) if parent != lane]
    if not lanes:
        return
    sources, end = [parents[lane] for lane in lanes], int(cache.past[list(parents)].max())
    for t in cache.tensors.values():
        if isinstance(t.owner, np.ndarray):
            t.owner[lanes, :, start:end] = t.owner[sources, :, start:end]
        else:  # memory of a device is written whole
            whole = t.owner.numpy()
            whole[lanes, :, start:end] = whole[sources, :, start:end]
            t.owner.update_inplace(whole)
    cache.past[lanes], cache.images[lanes] = cache.past[sources], cache.images[sources]
    held, leading = [cache.holds[s] for s in sources], [cache.leading[s] for s in sources]
    views = [cache.views[s].copy() for s in sources] if cache.views else []
    for i, lane in enumerate(lanes):
        cache.holds[lane], cache.leading[lane] = held[i], leading[i]
        if views:
            cache.version += start == 0 or views[i].sight.now != cache.views[lane].sight.now
            cache.views[lane] = views[i]
