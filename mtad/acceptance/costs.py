"""What the passes of a pair cost on this machine, measured in turns.

Both models are driven as a decoder drives them: prefill, steps of the draft, a verified block of
which two tokens are kept, the next steps. So a verification finds the caches as a draft leaves
them, a draft that reads accepted tokens again pays for that here, and one
whose weights come back into the processor's caches step by step gets what that saves.

A processor's clock changes from one tenth of a second to the next, and not all passes feel it
alike. So each is measured right after a one-token pass, and what counts is the median of their
ratios.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtad.acceptance.measures import ONE_TOKEN, Costs, Pass
from mtad.config import DecodeConfig
from mtad.decoders.common import Proposal, State
from mtad.draft import Drafter
from mtad.errors import Cancelled, PairError
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.pairs import ModelPair, as_drafter
from mtad.recording import synchronize
from mtad.runner import decoding, device_lock

CONTEXT_TOKENS = 200
ROUNDS = 15
_ACCEPTED = 2
_LATER_STEPS = 5  # of a block, behind its first one
_DRAFT_STEP: Pass = ("draft", 1)

# Seconds of one-token passes; of the others how many times the one-token pass before they took
Times = dict[Pass, list[float]]


def measure_costs(
    pair: ModelPair,
    passes: Collection[Pass],
    beam_width: int,
    *,
    rounds: int = ROUNDS,
    context: int = CONTEXT_TOKENS,
    cancel: threading.Event | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Costs:
    """Seconds of each kind of pass.

    Those of the one-token pass are a median, those of the others that times the median of ratios.

    Args:
        pair: the models; without a draft only the one-token pass of the target is measured.
        passes: which ones, see `needed_passes`; the one-token pass is always among them, and
            where there is a draft step, so are the first of a block and that of one row.
        beam_width: W, the number of branches of a tree.
        rounds: measurements of each.
        context: tokens in the caches in the middle of the measurement, or what there is room for.
        cancel: stops between two passes.
        progress: called with the rounds done and in all.

    Raises:
        Cancelled: it was stopped.
        PairError: the context of the pair is too short for such passes.
    """
    # A block appends the accepted tokens and the one after them; one round warms up, and each has a
    # block that is not timed.
    wanted = {ONE_TOKEN, *(passes if pair.draft is not None else ())}
    if any(kind == "draft" for kind, _ in wanted):
        wanted.add(_DRAFT_STEP)
    longest = max(rows for _, rows in wanted)
    blocks = sum(kind == "draft" for kind, _ in wanted)
    growth = (rounds + 2) * (blocks + 1) * (_ACCEPTED + 1) if blocks else 0
    room = pair.context_length - longest - growth
    if room < 2:
        raise PairError(
            f"The context of this pair holds {pair.context_length} tokens, too few to measure"
            f" passes of {longest} rows. Choose a smaller γ or beam width."
        )
    timer = _Timer(pair.device, cancel)
    with device_lock(pair.device), decoding(pair):
        begin = min(room, max(2, context - growth // 2))
        bench = _Bench(pair, begin, wanted, beam_width, timer)
        for done in range(rounds + 1):
            bench.round()
            if done == 0:
                timer.times.clear()
            progress(done, rounds)
    medians = {key: statistics.median(times) for key, times in timer.times.items()}
    one_token = medians.pop(ONE_TOKEN)
    seconds = {ONE_TOKEN: one_token} | {key: ratio * one_token for key, ratio in medians.items()}

    def of(kind: str) -> dict[int, float]:
        return {rows: found for (what, rows), found in seconds.items() if what == kind}

    return Costs(
        context=begin + growth // 2,
        rounds=rounds,
        target=of("target"),
        tree=of("tree"),
        draft=of("draft"),
        draft_first=seconds.get(("draft first", 1)),
    )


def together(parts: Sequence[Costs]) -> Costs:
    """Several measurements of the same passes, spread over a run: the median of each figure.

    Of all but the one-token pass it is the ratio to that which is looked at, as in each of them.
    """
    ones = [part.target[1] for part in parts]
    one_token = statistics.median(ones)

    def typical(figures: Iterable[float]) -> float:
        ratios = [seconds / one for seconds, one in zip(figures, ones, strict=True)]
        return one_token * statistics.median(ratios)

    def by_rows(name: str) -> dict[int, float]:
        tables = [getattr(part, name) for part in parts]
        return {rows: typical(table[rows] for table in tables) for rows in tables[0]}

    first_steps = [part.draft_first for part in parts if part.draft_first is not None]
    return Costs(
        context=parts[0].context,
        rounds=sum(part.rounds for part in parts),
        target=by_rows("target"),
        tree=by_rows("tree"),
        draft=by_rows("draft"),
        draft_first=typical(first_steps) if first_steps else None,
    )


class _Timer:
    """Seconds of a call, the device caught up before and after; see `Times`."""

    def __init__(self, device: torch.device, cancel: threading.Event | None) -> None:
        self.times: Times = {}
        self._one_token = math.nan
        self._device = device
        self._cancel = cancel

    def __call__(self, what: str, rows: int, call: Callable[[], Any], steps: int = 1) -> Any:
        """Calls it and notes what one of its `steps` steps took."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("The measurement was stopped.")
        synchronize(self._device)
        start = time.perf_counter()
        result = call()
        synchronize(self._device)
        seconds = (time.perf_counter() - start) / steps
        if (what, rows) == ONE_TOKEN:
            self._one_token = figure = seconds
        else:
            figure = seconds / self._one_token
        self.times.setdefault((what, rows), []).append(figure)
        return result


# What, of how many rows, the call, how many steps it makes → what the call returns
Timer = Callable[[str, int, Callable[[], Any], int], Any]


def _untimed(what: str, rows: int, call: Callable[[], Any], steps: int = 1) -> Any:
    return call()


class _Bench:
    """A pair in the middle of an answer, which goes on by three tokens a block."""

    def __init__(
        self, pair: ModelPair, context: int, passes: set[Pass], beam_width: int, timer: _Timer
    ) -> None:
        self._timer = timer
        self._verified = sorted(one for one in passes - {ONE_TOKEN} if one[0] != "draft")
        self._draft_rows = sorted(rows for kind, rows in passes if kind == "draft")
        self._beam_width = beam_width
        self._vocab_size = pair.vocab_size
        self._device = pair.device
        self._state = State.begin(
            CachedLM(pair.engine_target, pair.vocab_size),
            as_drafter(pair) if self._draft_rows else None,
            self._tokens(context).tolist(),
            DecodeConfig(),
            torch.Generator(pair.device),
            (),
        )
        self._settle: Callable[[], None] = lambda: None

    def _tokens(self, count: int) -> Tensor:
        """Any tokens: what a pass costs does not depend on them."""
        return torch.arange(1, count + 1, device=self._device) * 7919 % self._vocab_size

    def round(self) -> None:
        """Every pass once; the answer grows with the blocks of the draft."""
        timer, state = self._timer, self._state
        # As `autoregressive` does it: no draft asks for hidden states.
        one_token = functools.partial(state.target.forward, state.pending)

        def begin() -> None:
            """The pass with which the next one is compared."""
            one_token()  # the caches hold what the same pass has left there
            state.target.keep(0)
            timer("target", 1, one_token)
            state.target.keep(0)

        begin()
        for kind, rows in self._verified:
            proposal = self._tree(rows - 1) if kind == "tree" else self._block(rows - 1)
            self._verify(proposal, functools.partial(timer, kind, rows))
            begin()
        if state.draft is None:
            return
        if self._verified:  # a block whose accepted tokens the next one reads
            self._draft(state.draft, 1, _untimed)
        for rows in self._draft_rows:
            one_token = functools.partial(state.target.forward, state.pending)
            begin()
            self._draft(state.draft, rows, timer)

    def _verify(self, proposal: Proposal, timed: Callable[[Callable[[], Any]], Any]) -> None:
        """A pass behind a draft, which has driven some of the target out of the caches."""
        state, draft = self._state, self._state.draft
        if draft is not None:
            logits = self._first_step(draft)
            self._later_steps(draft, 1, logits)()
        timed(functools.partial(state.verify, proposal))
        state.target.keep(0)
        if draft is not None:
            hidden = None if state.hidden is None else state.hidden[:0]
            self._settle = functools.partial(draft.keep, 0, hidden)

    def _block(self, length: int) -> Proposal:
        tokens = self._tokens(length)
        return Proposal.block(tokens, torch.zeros_like(tokens).float(), length - 1)

    def _tree(self, size: int) -> Proposal:
        width = self._beam_width
        length = size // width
        tokens = self._tokens(size)
        return Proposal(
            token_ids=tokens,
            parents=torch.arange(-width, (length - 1) * width, device=self._device).clamp_min(-1),
            draft_logprobs=torch.zeros_like(tokens).float(),
            cached_depth=length - 1,
            levels=length,
            real=torch.ones_like(tokens).bool(),
        )

    def _draft(self, draft: Drafter, rows: int, timer: Timer) -> None:
        """A block of which two tokens are accepted, settled as `State` does it."""
        state = self._state
        waiting, token = state.draft_pending.shape[0], self._tokens(1)
        logits = timer("draft first", 1, functools.partial(self._first_step, draft), 1)
        timer("draft", rows, self._later_steps(draft, rows, logits), _LATER_STEPS)
        block = self._block(_ACCEPTED)
        state.verify(block)
        state.target.keep(1 + _ACCEPTED)
        # The draft has read the pending tokens and the first of the block.
        self._settle = functools.partial(draft.keep, waiting + 1, state.hidden)
        state.pending = token
        state.draft_pending = torch.cat([block.token_ids[1:], token])

    def _first_step(self, draft: Drafter) -> Logits:
        self._settle()
        return Logits.of(draft.next_logits(self._state.draft_pending))[-1:]

    def _later_steps(self, draft: Drafter, rows: int, logits: Logits) -> Callable[[], None]:
        """What comes behind the first step of a block, of so many rows each."""
        state, token, beams = self._state, self._tokens(1), self._tokens(rows)
        config = dataclasses.replace(state.config, beam_width=rows)
        waiting = state.draft_pending.shape[0]

        def beams_by_step() -> None:
            above = torch.full_like(beams, waiting - 1)
            for step in range(_LATER_STEPS):
                draft.next_logits(beams, above)
                above = torch.arange(rows, device=self._device) + waiting + step * rows

        def chain_by_step() -> None:
            for _ in range(_LATER_STEPS):
                draft.next_logits(token)

        def at_once() -> bool:
            """A draft that can do what stands between its steps is asked for all of them."""
            whole = state.block_draft
            if whole is None or rows not in (1, self._beam_width):
                return False
            steps = _LATER_STEPS + 1  # one more draw than there are steps
            if rows == 1:
                return (
                    whole.draft_line(logits, config, state.uniforms(steps), state.eos) is not None
                )
            return whole.draft_beams(logits, config, steps, state.uniforms, state.eos) is not None

        by_step = chain_by_step if rows == 1 else beams_by_step

        def steps() -> None:
            if not at_once():
                by_step()

        return steps
