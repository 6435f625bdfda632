"""Many clients at once, some of whom go away: is everyone served, and is anything left behind?

    python -m tests.load --seconds 120 --clients 20

Serves `app.py` with the real pair. Prints a table; exits with 1 if somebody was neither served,
refused with a reason nor cancelled, or if the server has kept threads, files, memory or the
device.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradio_client import Client

from tests.browser import server

PROMPTS = ("Why is the sky blue?", "Name three rivers.", "Write a short story.", "12 + 30 = ?")
METHODS = ("autoregressive", "speculative", "mtad", "mtad_tree", "typical", "bild", "specinfer")
CANCELLED_SHARE = 0.35
SETTLE_SECONDS = 30.0


@dataclass
class Kept:
    """What a process holds.

    Attributes:
        threads: running.
        files: open, sockets among them.
        megabytes: resident.
    """

    threads: int
    files: int
    megabytes: float

    @staticmethod
    def of(pid: int) -> Kept:
        """Read from /proc."""
        folder = Path(f"/proc/{pid}")
        status = dict(
            line.split(":", 1)
            for line in (folder / "status").read_text().splitlines()
            if ":" in line
        )
        return Kept(
            threads=int(status["Threads"]),
            files=len(list((folder / "fd").iterdir())),
            megabytes=int(status["VmRSS"].split()[0]) / 1024,
        )


@dataclass
class Outcome:
    """What became of the requests.

    Attributes:
        counts: by what happened: "served", "cancelled", "refused".
        waits: seconds from each request to its first answer.
        places: how often a client was told its place in the queue.
        errors: whatever should not have happened.
        before: of the server, after a warm-up.
        after: of the server, when everybody has gone.
        free_seconds: until a last request was served.
    """

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    waits: list[float] = field(default_factory=list)
    places: int = 0
    errors: list[str] = field(default_factory=list)
    before: Kept | None = None
    after: Kept | None = None
    free_seconds: float = 0.0


def pid_of(port: int) -> int:
    """The process that listens on a port of this machine."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and int(parts[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{parts[9]}]")
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if any(link.readlink().name in inodes for link in (folder / "fd").iterdir()):
                    return int(folder.name)
    raise SystemExit(f"nothing listens on port {port}")


def request(client: Client, chance: random.Random) -> Any:
    """One of the endpoints, with its own wishes."""
    prompt, tokens = chance.choice(PROMPTS), chance.choice((4, 16, 48))
    kind = chance.random()
    if kind < 0.1:
        return client.submit(api_name="/methods")
    if kind < 0.55:
        return client.submit(
            prompt,
            method=chance.choice(METHODS),
            max_new_tokens=tokens,
            seed=chance.randrange(100),
            api_name="/generate",
        )
    return client.submit(
        prompt, chance.sample(METHODS, 2), tokens, seed=chance.randrange(100), api_name="/compare"
    )


def visit(address: str, seed: int, until: float, outcome: Outcome, lock: threading.Lock) -> None:
    """A client that asks, waits or goes away, and asks again."""
    chance = random.Random(seed)
    client = Client(address, verbose=False)
    while time.monotonic() < until:
        begun = time.monotonic()
        job = request(client, chance)
        leaves = begun + chance.uniform(0.05, 6.0) if chance.random() < CANCELLED_SHARE else None
        first, placed = None, False
        while not job.done():
            status = job.status()
            placed |= status.rank is not None
            if first is None and job.outputs():
                first = time.monotonic() - begun
            if leaves is not None and time.monotonic() > leaves:
                job.cancel()
                break
            time.sleep(0.05)
        with lock:
            outcome.places += placed
            if leaves is not None and not job.done():
                outcome.counts["cancelled"] += 1
                continue
            error = None if job.cancelled() else job.exception(timeout=30)
            if isinstance(error, CancelledError):
                outcome.counts["cancelled"] += 1
                continue
            if error is not None:
                outcome.errors.append(f"{type(error).__name__}: {error}"[:200])
            outcome.counts["refused" if error else "served"] += 1
            outcome.waits.append(first if first is not None else time.monotonic() - begun)


def settled(pid: int, before: Kept) -> Kept:
    """What is still held when everybody has gone; what goes by itself is waited for."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        kept = Kept.of(pid)
        if kept.threads <= before.threads and kept.files <= before.files + 2:
            return kept
        if time.monotonic() > deadline:
            return kept
        time.sleep(0.5)


def warm_up(address: str, pid: int, clients: int) -> Kept:
    """Everything that is made once is made: threads of the server, engines, allocations."""
    all_of_them = [Client(address, verbose=False) for _ in range(clients)]
    for method in METHODS:
        all_of_them[0].predict("Hello.", method=method, max_new_tokens=8, api_name="/generate")
    jobs = [
        one.submit("Hello.", ["mtad", "mtad_tree"], 48, api_name="/compare") for one in all_of_them
    ]
    for job in jobs:
        job.result(timeout=300)
    time.sleep(2.0)
    return Kept.of(pid)


def load(address: str, seconds: float, clients: int, seed: int = 0) -> Outcome:
    """The whole of it against a running page of this machine."""
    pid = pid_of(int(address.rstrip("/").rpartition(":")[2]))
    outcome, lock = Outcome(), threading.Lock()
    outcome.before = warm_up(address, pid, clients)
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=visit, args=(address, seed + k, until, outcome, lock), daemon=True)
        for k in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 300)
        if thread.is_alive():
            outcome.errors.append("a client is still waiting")
    begun = time.monotonic()
    Client(address, verbose=False).predict(
        "Hello.", method="autoregressive", max_new_tokens=4, api_name="/generate"
    )
    outcome.free_seconds = time.monotonic() - begun
    outcome.after = settled(pid, outcome.before)
    return outcome


def report(outcome: Outcome) -> Iterator[str]:
    """Lines for people."""
    before, after = outcome.before, outcome.after
    assert before is not None and after is not None
    waits = sorted(outcome.waits) or [0.0]
    yield ", ".join(f"{count} {what}" for what, count in sorted(outcome.counts.items()))
    yield f"told a place in the queue: {outcome.places}"
    yield f"first answer after: median {waits[len(waits) // 2]:.1f} s, longest {waits[-1]:.1f} s"
    yield f"a request after all had gone: {outcome.free_seconds:.2f} s"
    yield f"threads {before.threads} -> {after.threads}, open files {before.files} -> {after.files}"
    growth = 100 * (after.megabytes / before.megabytes - 1)
    yield f"memory {before.megabytes:.0f} -> {after.megabytes:.0f} MB ({growth:+.1f} %)"
    yield from sorted(set(outcome.errors))


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=20)
    chosen = parser.parse_args()
    with server("app.py") as address:
        outcome = load(address, chosen.seconds, chosen.clients)
    print("\n".join(report(outcome)))
    before, after = outcome.before, outcome.after
    assert before is not None and after is not None
    kept = after.threads > before.threads or after.megabytes > 1.05 * before.megabytes
    sys.exit(1 if outcome.errors or kept else 0)


if __name__ == "__main__":
    main()
