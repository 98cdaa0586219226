"""What was computed before, kept under a budget of bytes: the least recently used goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class Store:
    """Values by key, at most `budget` bytes of them. Safe to use from several threads."""

    def __init__(self, budget: int):
        self.budget, self.nbytes = budget, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Any:
        """The value, now the most recently used, or None."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value: Any, nbytes: int) -> None:
        """Keep a value; one that is larger than the whole budget is not kept."""
        with self._lock:
            self.nbytes -= self._kept.pop(key, (None, 0))[1]
            if nbytes > self.budget:
                return
            self._kept[key] = value, nbytes
            self.nbytes += nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._kept.popitem(last=False)[1][1]
