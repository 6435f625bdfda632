"""The last things of all visitors, found by their ids. Knows no gradio."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Keeps so many things, the newest ones; from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, key: str, item: T) -> list[T]:
        """Keeps an item; returns those that are forgotten for it, the oldest first."""
        gone = []
        with self._lock:
            self._kept[key] = item
            while len(self._kept) > self._limit:
                gone.append(self._kept.popitem(last=False)[1])
        return gone

    def get(self, key: object) -> T | None:
        """The item of a key; None if it is unknown or forgotten."""
        with self._lock:
            return self._kept.get(key) if isinstance(key, str) else None
