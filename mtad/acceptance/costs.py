"""What the passes of a pair cost on this machine, measured in turns.

The draft is driven as a decoder drives it: prefill, steps, a verified block of which two tokens
are kept, the next steps. So a draft that reads accepted tokens again pays for that here.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtad.acceptance.measures import Costs
from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State
from mtad.draft import Drafter
from mtad.errors import Cancelled, PairError
from mtad.lm import CachedLM
from mtad.pairs import ModelPair, as_drafter
from mtad.recording import synchronize
from mtad.runner import device_lock

CONTEXT_TOKENS = 200
ROUNDS = 15
_ACCEPTED = 2

# (what, rows) → seconds of each round
Times = dict[tuple[str, int], list[float]]


def measure_costs(
    pair: ModelPair,
    draft_lengths: Sequence[int],
    beam_width: int,
    *,
    rounds: int = ROUNDS,
    cancel: threading.Event | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Costs:
    """Median seconds of each kind of pass at a context of about 200 tokens.

    Args:
        pair: the models; without a draft only the target is measured.
        draft_lengths: γs, for the rows of the target's passes: γ + 1, and γ · W + 1 for a tree.
        beam_width: W, rows of a draft step of `mtad`.
        rounds: measurements of each.
        cancel: stops between two passes.
        progress: called with the rounds done and in all.

    Raises:
        Cancelled: it was stopped.
        PairError: the context of the pair is too short for such passes.
    """
    # A round appends the accepted tokens and the one after them; one round warms up.
    longest = max([1, *(1 + gamma * beam_width for gamma in draft_lengths)])
    room = pair.context_length - longest - (rounds + 2) * (_ACCEPTED + 1)
    context = min(CONTEXT_TOKENS, room)
    if context < 2:
        raise PairError(
            f"The context of this pair holds {pair.context_length} tokens, too few to measure"
            f" passes of {longest} rows. Choose a smaller γ or beam width."
        )
    timer = _Timer(pair.device, cancel)
    with device_lock(pair.device), torch.inference_mode():
        bench = _Bench(pair, context, timer)
        for done in range(rounds + 1):
            bench.round(draft_lengths, beam_width)
            if done == 0:
                timer.times.clear()
            progress(done, rounds)
    medians = {key: statistics.median(times) for key, times in timer.times.items()}

    def of(kind: str) -> dict[int, float]:
        return {rows: seconds for (what, rows), seconds in medians.items() if what == kind}

    return Costs(
        context=context,
        rounds=rounds,
        target=of("target"),
        tree=of("tree"),
        draft=of("draft"),
        draft_first=medians.get(("draft first", 1)),
    )


class _Timer:
    """Seconds of a call, the device caught up before and after."""

    def __init__(self, device: torch.device, cancel: threading.Event | None) -> None:
        self.times: Times = {}
        self._device = device
        self._cancel = cancel

    def __call__(self, what: str, rows: int, call: Callable[[], Any]) -> Any:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("The measurement was stopped.")
        synchronize(self._device)
        start = time.perf_counter()
        result = call()
        synchronize(self._device)
        self.times.setdefault((what, rows), []).append(time.perf_counter() - start)
        return result


class _Bench:
    """A pair in the middle of an answer, which goes on by three tokens a round."""

    def __init__(self, pair: ModelPair, context: int, timer: _Timer) -> None:
        self._timer = timer
        self._vocab_size = pair.vocab_size
        self._device = pair.device
        self._state = State.begin(
            CachedLM(pair.target, pair.vocab_size),
            as_drafter(pair) if pair.draft is not None else None,
            self._tokens(context).tolist(),
            DecodeConfig(),
            torch.Generator(pair.device),
            (),
        )
        self._settle: Callable[[], None] = lambda: None

    def _tokens(self, count: int) -> Tensor:
        """Any tokens: what a pass costs does not depend on them."""
        return torch.arange(1, count + 1, device=self._device) * 7919 % self._vocab_size

    def round(self, draft_lengths: Sequence[int], beam_width: int) -> None:
        """Every pass once, then the answer grows."""
        timer, state = self._timer, self._state
        # As `autoregressive` does it, which no draft asks for hidden states.
        timer("target", 1, functools.partial(state.target.forward, state.pending))
        state.target.keep(0)
        for gamma, tree in itertools.product(sorted(set(draft_lengths)), (False, True)):
            proposal = self._tree(gamma, beam_width) if tree else self._block(gamma)
            rows = 1 + proposal.token_ids.shape[0]
            timer("tree" if tree else "target", rows, functools.partial(state.verify, proposal))
            state.target.keep(0)
        if state.draft is not None:
            self._draft(state.draft, beam_width)

    def _block(self, length: int) -> Proposal:
        tokens = self._tokens(length)
        return Proposal.block(tokens, torch.zeros_like(tokens).float(), length - 1)

    def _tree(self, length: int, width: int) -> Proposal:
        tokens = self._tokens(length * width)
        return Proposal(
            token_ids=tokens,
            parents=torch.arange(-width, (length - 1) * width, device=self._device).clamp_min(-1),
            draft_logprobs=torch.zeros_like(tokens).float(),
            cached_depth=length - 1,
            levels=length,
            real=torch.ones_like(tokens).bool(),
            chain=False,
        )

    def _draft(self, draft: Drafter, beam_width: int) -> None:
        """A block of which two tokens are accepted, settled as `State` does it."""
        timer, state = self._timer, self._state
        waiting = state.draft_pending.shape[0]

        def first_step() -> None:
            self._settle()
            draft.next_logits(state.draft_pending)

        timer("draft first", 1, first_step)
        token = self._tokens(1)
        timer("draft", 1, functools.partial(draft.next_logits, token))
        if beam_width > 1:
            beams = self._tokens(beam_width)
            above = torch.full_like(beams, waiting - 1)
            timer("draft", beam_width, functools.partial(draft.next_logits, beams, above))
        block = self._block(_ACCEPTED)
        state.verify(block)
        state.target.keep(1 + _ACCEPTED)
        # The draft has read the pending tokens and the first of the block.
        self._settle = functools.partial(draft.keep, waiting + 1, state.hidden)
        state.pending = token
        state.draft_pending = torch.cat([block.token_ids[1:], token])
