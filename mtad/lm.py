"""CachedLM: one model, one cache, three verbs. The only file that calls a model.

The cache holds a committed prefix and, above it, a tree of nodes that are not decided yet.
`forward` adds nodes and returns their logits, `keep` commits one path of them and drops the
rest, `rollback` shortens the prefix. It knows token ids and nothing of text.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mtad import tree
from mtad.errors import PairError

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


@dataclass
class Span:
    """One stretch of work: "prefill", "draft" or "verify"."""

    name: str
    start: Any
    end: Any


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

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Records the body as a span."""
        if name != "prefill" and not self._decoding:
            self._decoding = True
            self._on_decode()
        start = self.clock.mark()
        yield
        self._spans.append(Span(name, start, self.clock.mark()))

    def take(self) -> dict[str, float]:
        """Seconds by span name since the last call. The device must have caught up."""
        totals: dict[str, float] = {}
        for span in self._spans:
            seconds = self.clock.seconds(span.start, span.end)
            totals[span.name] = totals.get(span.name, 0.0) + seconds
        self._spans.clear()
        return totals


class Output(NamedTuple):
    """What a pass gives for n new nodes.

    Attributes:
        logits: [n, V].
        hidden: [n, F·H], the hidden states of the F layers that were asked for, one after the
            other; None if none were.
    """

    logits: Tensor
    hidden: Tensor | None


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
        model: PreTrainedModel,
        vocab_size: int | None = None,
        *,
        recorder: Recorder | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Wraps a model with an empty cache.

        Args:
            model: any decoder-only Hugging Face model.
            vocab_size: common vocabulary of the pair; the model's own by default.
            recorder: receives a span for every pass.
            check: called before every pass; raises to stop the run.
        """
        self.model = model
        self.vocab_size = vocab_size or int(model.config.get_text_config().vocab_size)
        self.device = model.get_input_embeddings().weight.device
        self._dtype = model.dtype
        self.length = 0
        self.nodes = 0
        self.passes = 0
        self.positions = 0
        self._check = check
        self._recorder = recorder or Recorder()
        self._ancestors: Tensor | None = None  # None while the undecided nodes are a chain
        # Without its config the cache keeps everything, also in sliding-window layers, so that
        # every layer can roll back; the masks still apply the window.
        self._cache = DynamicCache()
        self._windows = _attention_windows(model)
        accepted = inspect.signature(model.forward).parameters
        self._last_logit_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

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
                output = self._call(
                    chunk,
                    None,
                    self._positions(chunk.shape[0]),
                    output_hidden_states=bool(layers),
                    **self._last_logit_only,
                )
                if layers:
                    hidden.append(self._states(output, layers))
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
        if parents is None and self._ancestors is None:
            mask, positions = None, self._positions(count)
        else:
            mask, positions = self._grow_tree(parents, count, levels)
        with self._recorder.span("verify"):
            output = self._call(token_ids, mask, positions, output_hidden_states=bool(layers))
            logits = output.logits[0, :, : self.vocab_size].to(self.device)
            states = self._states(output, layers) if layers else None
        self.nodes += count
        self.passes += 1
        self.positions += count
        return Output(logits, states)

    def keep(self, path: Tensor | int) -> None:
        """Commits a path of undecided nodes, root to leaf, and drops all other nodes.

        Args:
            path: [k] int64 indices among the undecided nodes; an int k stands for the first k.
        """
        if isinstance(path, int):
            kept = path
            self._crop(self.length + kept)
        else:
            kept = path.shape[0]
            self._select(path)
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
        self._select(index)
        self.nodes = len(nodes)

    def rollback(self, length: int) -> None:
        """Drops all undecided nodes and shortens the committed prefix to `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length is {length}, but must be from 0 to {self.length}")
        self._crop(length)
        self.length = length
        self.nodes = 0
        self._ancestors = None

    def _states(self, output: Any, layers: Sequence[int]) -> Tensor:
        return torch.cat([output.hidden_states[i][0].to(self.device) for i in layers], -1)

    def _positions(self, count: int) -> Tensor:
        start = self.length + self.nodes
        return torch.arange(start, start + count, device=self.device)

    def _grow_tree(
        self, parents: Tensor | None, count: int, levels: int
    ) -> tuple[Tensor | dict[str, Tensor], Tensor]:
        if self._ancestors is None and self.nodes:
            self._ancestors = tree.chain_ancestors(self.nodes, self.device)
        if parents is None:
            last = self.nodes - 1
            parents = torch.arange(last, last + count, device=self.device)
            levels = count
        self._ancestors = tree.extend_ancestors(self._ancestors, parents, levels)
        masks = {
            kind: tree.additive_mask(self._ancestors, self.length, count, self._dtype, window)
            for kind, window in self._windows.items()
        }
        positions = self.length + tree.node_depths(self._ancestors)[-count:]
        return (masks if len(masks) > 1 else next(iter(masks.values()))), positions

    @torch.no_grad()
    def _call(
        self,
        token_ids: Tensor,
        mask: Tensor | dict[str, Tensor] | None,
        positions: Tensor,
        **kwargs: Any,
    ) -> Any:
        return self.model(
            input_ids=token_ids.unsqueeze(0),
            attention_mask=mask,
            position_ids=positions.unsqueeze(0),
            past_key_values=self._cache,
            use_cache=True,
            **kwargs,
        )

    def _layers(self) -> Iterator[DynamicLayer]:
        for layer in self._cache.layers:
            if type(layer) is not DynamicLayer:
                raise PairError(
                    f"{type(self.model).__name__} keeps a {type(layer).__name__} in its cache,"
                    " which cannot roll back. Choose a model with plain attention layers."
                )
            if layer.is_initialized:
                yield layer

    def _crop(self, length: int) -> None:
        for layer in self._layers():
            layer.keys = layer.keys[:, :, :length]
            layer.values = layer.values[:, :, :length]

    def _select(self, nodes: Tensor) -> None:
        prefix = torch.arange(self.length, device=self.device)
        index = torch.cat([prefix, self.length + nodes])
        for layer in self._layers():
            there = index.to(layer.keys.device)
            layer.keys = layer.keys.index_select(2, there)
            layer.values = layer.values.index_select(2, there)


def _attention_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """The kinds of attention layer of a model and their sliding windows in tokens.

    A model with one kind takes one mask; a model that mixes kinds takes a mask for each.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"full_attention" if window is None else "sliding_attention"}
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise PairError(
            f"{type(model).__name__} has layers of kind {', '.join(sorted(unknown))}, whose"
            " cache cannot roll back. Choose a model with plain attention layers."
        )
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: windows[kind] for kind in sorted(kinds)}
