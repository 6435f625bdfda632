"""CachedLM: one model, one cache, three verbs.

The cache holds a committed prefix and, above it, a tree of nodes that are not decided yet.
`forward` adds nodes and returns their logits, `keep` commits one path of them and drops the
rest, `rollback` shortens the prefix. It knows token ids and nothing of text, and it keeps the
books only: an engine (`mtad.eager`, `mtad.native`) runs the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtad import tree
from mtad.eager import EagerPasses, Output, Passes, Saved

PREFILL_CHUNK_TOKENS = 512


class Clock(Protocol):
    """Marks moments without waiting for the device, and says later how far apart they were."""

    def mark(self) -> Any:
        """The present moment."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks; only called when the device has reached both."""


class WallClock:
    """For devices that compute while the host waits: the CPU."""

    def mark(self) -> float:
        """Seconds on the performance counter."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """The difference."""
        return end - start


class CudaClock:
    """CUDA events: recorded in the stream, read after the next synchronisation."""

    def mark(self) -> torch.cuda.Event:
        """An event at the present end of the stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Device seconds between two events."""
        return float(start.elapsed_time(end)) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock that tells the time of a device's own work."""
    return CudaClock() if device.type == "cuda" else WallClock()


@dataclass
class Span:
    """One stretch of work: "prefill", "draft" or "verify"."""

    name: str
    start: Any
    end: Any


class _Body:
    """What a span records; a class, since a generator's context costs more than some spans."""

    def __init__(self, name: str, clock: Clock, spans: list[Span]) -> None:
        self._name = name
        self._clock = clock
        self._spans = spans

    def __enter__(self) -> None:
        self._start = self._clock.mark()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._spans.append(Span(self._name, self._start, self._clock.mark()))


class Recorder:
    """Collects the spans of one run. `take` gives seconds by name and starts anew.

    Args:
        clock: marks the moments; the wall clock by default.
        on_decode: called once, when the prefill is over and the first pass of decoding begins.
    """

    def __init__(
        self, clock: Clock | None = None, on_decode: Callable[[], None] = lambda: None
    ) -> None:
        self.clock: Clock = clock or WallClock()
        self._spans: list[Span] = []
        self._on_decode = on_decode
        self._decoding = False

    def span(self, name: str) -> _Body:
        """Records the body as a span, unless it raises."""
        if name != "prefill" and not self._decoding:
            self._decoding = True
            self._on_decode()
        return _Body(name, self.clock, self._spans)

    def take(self) -> dict[str, float]:
        """Seconds by span name since the last call. The device must have caught up."""
        totals: dict[str, float] = {}
        for span in self._spans:
            seconds = self.clock.seconds(span.start, span.end)
            totals[span.name] = totals.get(span.name, 0.0) + seconds
        self._spans.clear()
        return totals


class Runnable(Protocol):
    """A model made ready for an engine, with weights that many runs may share."""

    def passes(self) -> Passes:
        """It with an empty cache."""


class CachedLM:
    """A decoder-only model with a cache that can roll back.

    Attributes:
        length: committed tokens.
        nodes: tokens above them that are not decided yet.
        passes: forward passes so far, prefill excluded.
        positions: rows of those passes.
        device: where token ids go in and logits come out.
        vocab_size: logits are cut to it.
    """

    def __init__(
        self,
        model: PreTrainedModel | Runnable,
        vocab_size: int | None = None,
        *,
        recorder: Recorder | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Wraps a model with an empty cache.

        Args:
            model: any decoder-only Hugging Face model, or one made ready for another engine.
            vocab_size: common vocabulary of the pair; the model's own by default.
            recorder: receives a span for every pass.
            check: called before every pass; raises to stop the run.
        """
        self._passes = EagerPasses(model) if isinstance(model, PreTrainedModel) else model.passes()
        self.vocab_size = vocab_size or self._passes.vocab_size
        self.device = self._passes.device
        self.length = 0
        self.nodes = 0
        self.passes = 0
        self.positions = 0
        self._check = check
        self._recorder = recorder or Recorder()
        self._ancestors: Tensor | None = None  # None while the undecided nodes are a chain

    def prefill(self, token_ids: Tensor, layers: Sequence[int] = ()) -> Tensor | None:
        """Commits [n] tokens without looking at their logits. Not counted as a pass.

        Args:
            token_ids: [n].
            layers: see `forward`.

        Returns:
            [n, F·H] hidden states of the F layers asked for; None if none were, or n is 0.
        """
        hidden: list[Tensor] = []
        for start in range(0, token_ids.shape[0], PREFILL_CHUNK_TOKENS):
            chunk = token_ids[start : start + PREFILL_CHUNK_TOKENS]
            self._check()
            with self._recorder.span("prefill"):
                states = self._passes.read(chunk, self.length, layers)
                if states is not None:
                    hidden.append(states)
            self.length += chunk.shape[0]
        return torch.cat(hidden) if hidden else None

    def forward(
        self,
        token_ids: Tensor,  # [n]
        parents: Tensor | None = None,  # [n]
        *,
        levels: int = 1,
        layers: Sequence[int] = (),
    ) -> Output:
        """Adds n nodes and returns what follows each of them.

        Args:
            token_ids: the tokens of the nodes.
            parents: index of each node's parent among the undecided nodes, new ones included;
                −1 for a child of the committed prefix. None for a chain below the last node.
            levels: upper bound on how many levels of the tree the new nodes span.
            layers: whose hidden states to return as well: 0 is the embedding, i what layer i
                gives, the last one after the final norm.
        """
        self._check()
        count = token_ids.shape[0]
        positions = None
        if parents is not None or self._ancestors is not None:
            positions = self._grow_tree(parents, count, levels)
        with self._recorder.span("verify"):
            output = self._passes.forward(
                token_ids, positions, self.length, self.nodes, self._ancestors, layers
            )
            logits = output.logits.to(self.device)
            if logits.shape[1] > self.vocab_size:
                logits = logits[:, : self.vocab_size]
        self.nodes += count
        self.passes += 1
        self.positions += count
        return Output(logits, output.hidden, output.search)

    def keep(self, path: Tensor | int) -> None:
        """Commits a path of undecided nodes, root to leaf, and drops all other nodes.

        Args:
            path: [k] int64 indices among the undecided nodes; an int k stands for the first k.
        """
        if isinstance(path, int):
            kept = path
            self._passes.crop(self.length + kept)
        else:
            kept = path.shape[0]
            self._passes.select(self.length, path)
        self.length += kept
        self.nodes = 0
        self._ancestors = None

    def retain(self, nodes: Sequence[int]) -> None:
        """Drops all undecided nodes but these, which stay undecided and are renumbered.

        Args:
            nodes: ascending indices, closed under parents.
        """
        index = torch.tensor(nodes, dtype=torch.int64, device=self.device)
        if self._ancestors is None:
            self._ancestors = tree.chain_ancestors(self.nodes, self.device)
        self._ancestors = self._ancestors[index][:, index]
        self._passes.select(self.length, index)
        self.nodes = len(nodes)

    def rollback(self, length: int) -> None:
        """Drops all undecided nodes and shortens the committed prefix to `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length is {length}, but must be from 0 to {self.length}")
        self._passes.crop(length)
        self.length = length
        self.nodes = 0
        self._ancestors = None

    def save(self) -> Saved:
        """What the committed prefix has left in the cache."""
        return Saved(self.length, self._passes.save(self.length))

    def load(self, saved: Saved, length: int) -> None:
        """Commits the first `length` tokens of a text that was saved; the cache must be empty."""
        if self.length or self.nodes or not 0 <= length <= saved.length:
            raise ValueError(
                f"length is {length}, but must be from 0 to {saved.length}, and the cache empty"
                f" (it holds {self.length} tokens and {self.nodes} nodes)"
            )
        if not length:
            return
        with self._recorder.span("prefill"):
            self._passes.load(saved.tensors, length)
        self.length = length

    def _grow_tree(self, parents: Tensor | None, count: int, levels: int) -> Tensor:
        """Adds nodes to the tree; returns their positions."""
        if self._ancestors is None and self.nodes:
            self._ancestors = tree.chain_ancestors(self.nodes, self.device)
        if parents is None:
            last = self.nodes - 1
            parents = torch.arange(last, last + count, device=self.device)
            levels = count
        self._ancestors, positions = self._passes.grow_tree(
            self._ancestors, parents, levels, self.length
        )
        return positions
