"""The threads that the kernels run on: a context for each thread that calls them."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mtad.errors import PairError
from mtad.native import library


class Context:
    """The threads of one caller and their scratch memory. One call at a time."""

    def __init__(self, threads: int, loaded: ctypes.CDLL | None = None) -> None:
        self.library = loaded or library.load()
        self.threads = threads
        self.process = os.getpid()
        self.pointer = self.library.mtad_open(threads)
        if not self.pointer:
            raise PairError(f"This machine would not start {threads} threads. Set fewer.")

    def __del__(self) -> None:
        # In a forked process the threads are not there to be ended.
        if getattr(self, "pointer", None) and os.getpid() == self.process:
            self.library.mtad_close(self.pointer)


_of_thread = threading.local()


def context() -> Context:
    """The calling thread's own context, with as many threads as torch would use.

    It ends with the thread.
    """
    found: Context | None = getattr(_of_thread, "context", None)
    threads: int = getattr(_of_thread, "lent", 0) or torch.get_num_threads()
    if found is None or found.threads != threads or found.process != os.getpid():
        found = _of_thread.context = Context(threads)
    return found


@contextmanager
def lent_threads() -> Iterator[None]:
    """Torch's threads go to the kernels for a while: between two passes it computes on one.

    What torch does there is too small for two threads, and its second one would spin on the
    processor that the kernels' own is waiting on. Holds for the calling thread alone.
    """
    threads = torch.get_num_threads()
    _of_thread.lent = threads
    _set_own_threads(1)
    try:
        yield
    finally:
        _of_thread.lent = 0
        _set_own_threads(threads)


def _set_own_threads(count: int) -> None:
    """How many threads torch uses for the calling one.

    Torch also makes this the number of all threads that are still to come, so another thread
    sets that back to what it was.
    """
    common: list[int] = []
    _in_another_thread(lambda: common.append(torch.get_num_threads()))
    torch.set_num_threads(count)
    _in_another_thread(lambda: torch.set_num_threads(common[0]))


def _in_another_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
