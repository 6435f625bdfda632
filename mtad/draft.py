"""The seam between proposing and verifying: what a decoder needs to know of a draft.

A Hugging Face model is one implementation, layers on the target's own hidden states another
(`mtad.hidden_drafter`); a mixture with a copy distribution fits the same three verbs. All return
log q as logits, unwarped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from mtad.config import DecodeConfig
from mtad.eager import Saved
from mtad.errors import PairError
from mtad.histories import Searched
from mtad.lm import CachedLM, Recorder
from mtad.logits import Logits
from mtad.sampling import Uniforms


@runtime_checkable
class Drafter(Protocol):
    """Something that proposes next tokens along the branches of a tree.

    It holds a committed prefix and, above it, nodes that are not decided yet, numbered in the
    order in which `next_logits` added them since the last `keep`.

    Attributes:
        vocab_size: V, columns of the logits.
        target_layers: the F hidden states of the target that the draft reads, 0 the embedding;
            empty if it reads none.
    """

    vocab_size: int
    target_layers: tuple[int, ...]

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """Starts a new run with [n] tokens.

        `target_hidden` are the target's hidden states [n, F·H] at these tokens, for drafts that
        read them; None otherwise, or if n is 0.
        """

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor | Logits:
        """Adds [rows] nodes and returns [rows, V]: log q of what follows each, up to a constant.

        `Logits` for a draft that proposes from fewer tokens than the vocabulary has.

        `parents` are indices of undecided nodes, −1 for the prefix; None stands for a chain
        below the last node.
        """

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """Commits a path of nodes (an int k: the first k) and drops all others.

        `target_hidden` are the target's hidden states [m, F·H] at the next m tokens of the text,
        going on where those given before ended. They may reach further than the path, to tokens
        that the draft has yet to be given.
        """


@runtime_checkable
class Resumable(Protocol):
    """A `Drafter` that can begin a run with what another run has left in its cache.

    A drafter that cannot is simply given the whole prompt again.
    """

    def save(self) -> Saved | None:
        """What the committed text has left; None if no run could go on from there.

        A copy, or what is not written any more: the run may go on.
        """

    def resume(
        self, saved: Saved, kept: int, token_ids: Tensor, target_hidden: Tensor | None
    ) -> None:
        """Starts a new run with [n] tokens, the first `kept` of which are taken from `saved`.

        `kept` is from 1 to n and at most `saved.length`. `target_hidden` are the target's hidden
        states [n − kept + 1, F·H] from token `kept` − 1 on: the next token is read with them.
        """


@runtime_checkable
class BlockDrafter(Protocol):
    """A `Drafter` that can draft a whole block at once: what stands between its steps as well.

    Both verbs go on from logits [1, V] that it gave last, those after its last node. They leave
    behind the nodes, and give the tokens for the same uniforms, as if each step had been asked
    for; the tokens of the last step become no nodes. Both want top-k to be in force
    (`mtad.sampling.narrows`) and give None, having done nothing, where they cannot serve it.

    With `floors` there may be fewer steps, see `mtad.pace.FloorPace`. Uniforms are taken as if each
    step had been asked for: those of steps that there were not are given back.
    """

    def draft_line(
        self,
        logits: Logits,
        config: DecodeConfig,
        uniform: Tensor,
        ends: Tensor,
        floors: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Draws a token for each of [γ] uniforms, each below the one before.

        Args:
            logits: see above.
            config: the warp is read.
            uniform: see above.
            ends: [n] tokens that end a text; what is drawn goes on behind them without floors.
            floors: see above.

        Returns:
            [γ or fewer] tokens and their log-probabilities; what they were drawn from, [as many, K]
            tokens and warped log-probabilities. The caller gives back uniforms that were not used.
        """

    def draft_beams(
        self,
        logits: Logits,
        config: DecodeConfig,
        steps: int,
        chance: Uniforms,
        ends: Tensor,
        floors: Sequence[float] = (),
    ) -> Searched | None:
        """Beam sampling for some steps, see `mtad.decoders.beams.grow_beams`.

        Args:
            logits: see above.
            config: beam_width and the warp are read.
            steps: of the search.
            chance: of all draws.
            ends: [n] tokens that end a hypothesis.
            floors: see above.

        Returns:
            What a draft makes of the hypotheses; None where it cannot.
        """


class LMDrafter:
    """A causal language model as a draft."""

    def __init__(self, lm: CachedLM) -> None:
        self.lm = lm
        self.vocab_size = lm.vocab_size
        self.target_layers: tuple[int, ...] = ()

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """Empties the cache and commits [n] tokens; the hidden states are not read."""
        self.lm.rollback(0)
        self.lm.prefill(token_ids)

    def save(self) -> Saved:
        """See `Resumable.save`."""
        return self.lm.save()

    def resume(
        self, saved: Saved, kept: int, token_ids: Tensor, target_hidden: Tensor | None
    ) -> None:
        """See `Resumable.resume`; the hidden states are not read."""
        self.lm.rollback(0)
        self.lm.load(saved, kept)
        self.lm.prefill(token_ids[kept:])

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Logits:
        """One forward pass over the new nodes."""
        output = self.lm.forward(token_ids, parents)
        return Logits(output.logits, search=output.search)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `CachedLM.keep`; the hidden states are not read."""
        self.lm.keep(path)


class RecordedDrafter:
    """Any drafter, cut to the common vocabulary, recorded as "draft" spans, stoppable.

    Attributes:
        resume_from: what the prefill goes on from, and how many tokens of that; None if it
            starts with nothing.
        begun: True once the prefill is over.
    """

    def __init__(
        self,
        drafter: Drafter,
        vocab_size: int,
        recorder: Recorder,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.drafter = drafter
        self.vocab_size = vocab_size
        self.target_layers = drafter.target_layers
        self.resume_from: tuple[Saved, int] | None = None
        self.begun = False
        # Logits that were cut are not those that it would go on from.
        whole = drafter.vocab_size == vocab_size
        self._blocks = drafter if whole and isinstance(drafter, BlockDrafter) else None
        self._recorder = recorder
        self._check = check

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """Recorded as "prefill"."""
        self._check()
        with self._recorder.span("prefill"):
            if self.resume_from is None:
                self.drafter.prefill(token_ids, target_hidden)
            else:
                assert isinstance(self.drafter, Resumable)
                self.drafter.resume(*self.resume_from, token_ids, target_hidden)
        self.begun = True

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Logits:
        """Recorded as "draft"."""
        self._check()
        with self._recorder.span("draft"):
            logits = self.drafter.next_logits(token_ids, parents)
        rows = token_ids.shape[0]
        shape = tuple(getattr(logits, "shape", ()))
        if len(shape) != 2 or shape[0] != rows or shape[1] < self.vocab_size:
            raise PairError(
                f"The draft ({type(self.drafter).__name__}) gave logits of shape {shape}, but they"
                f" must be a tensor of {rows} rows and at least {self.vocab_size} columns."
            )
        return Logits.of(logits).cut(self.vocab_size)

    def draft_line(
        self,
        logits: Logits,
        config: DecodeConfig,
        uniform: Tensor,
        ends: Tensor,
        floors: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """See `BlockDrafter`; recorded as "draft"."""
        if self._blocks is None:
            return None
        self._check()
        with self._recorder.span("draft"):
            return self._blocks.draft_line(logits, config, uniform, ends, floors)

    def draft_beams(
        self,
        logits: Logits,
        config: DecodeConfig,
        steps: int,
        chance: Uniforms,
        ends: Tensor,
        floors: Sequence[float] = (),
    ) -> Searched | None:
        """See `BlockDrafter`; recorded as "draft"."""
        if self._blocks is None:
            return None
        self._check()
        with self._recorder.span("draft"):
            return self._blocks.draft_beams(logits, config, steps, chance, ends, floors)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """Recorded as "draft": it may read the target's hidden states."""
        with self._recorder.span("draft"):
            self.drafter.keep(path, target_hidden)
