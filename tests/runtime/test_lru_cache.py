"""What was computed before, kept under a budget of bytes."""

import threading

import pytest

from mmopt.runtime.lru_cache import Store


def kept(store, keys="abcdef"):
    """Looking changes the order: keys in the order of the last use, the least recent first."""
    return [k for k in list(store._kept) if k in keys]


def test_least_recently_used_goes_first():
    store = Store(30)
    for k in "abc":
        store.put(k, k.upper(), 10)
    assert store.get("a") == "A"
    store.put("d", "D", 10)
    assert kept(store) == ["c", "a", "d"]
    assert store.get("b") is None
    assert (store.nbytes, len(store)) == (30, 3)
    store.put("e", "E", 15)  # makes room for itself: two go
    assert kept(store) == ["d", "e"]
    assert store.nbytes == 25


def test_the_budget_may_be_filled_to_the_last_byte():
    store = Store(10)
    store.put("a", 1, 4)
    store.put("b", 2, 6)
    assert kept(store) == ["a", "b"]
    store.put("c", 3, 1)
    assert kept(store) == ["b", "c"]


def test_what_is_larger_than_the_budget_is_not_kept_and_drives_nothing_out():
    store = Store(10)
    store.put("a", 1, 10)
    store.put("b", 2, 11)
    assert (store.get("a"), store.get("b"), store.nbytes) == (1, None, 10)
    store.put("a", 3, 11)  # the old value is not what was put last
    assert (store.get("a"), store.nbytes, len(store)) == (None, 0, 0)


def test_replacing_a_key():
    store = Store(10)
    store.put("a", 1, 6)
    store.put("b", 2, 2)
    store.put("a", 3, 7)
    assert (store.get("a"), store.nbytes) == (3, 9)
    assert kept(store) == ["b", "a"]
    store.put("a", 4, 1)
    assert (store.get("a"), store.nbytes) == (4, 3)


def test_a_budget_of_nothing():
    store = Store(0)
    store.put("a", 1, 1)
    assert (store.get("a"), store.nbytes, len(store)) == (None, 0, 0)


@pytest.mark.parametrize("budget", [50, 1000])
def test_several_threads(budget):
    store, wrong = Store(budget), []

    def work(t):
        for i in range(2000):
            key = (i * (t + 3)) % 37
            value = store.get(key)
            if value is not None and value != key:
                wrong.append((key, value))
            store.put(key, key, 1 + key % 9)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert store.nbytes == sum(nbytes for _, nbytes in store._kept.values()) <= budget
