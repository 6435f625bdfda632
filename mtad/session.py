"""Sessions: what a conversation keeps in its caches from one run to the next.

The prompts of a conversation begin alike: each repeats the last prompt and the last answer. A
session holds copies of what both models had in their caches when a run ended, with the token ids
that it stands for. The next run takes the longest common beginning from there and reads only
the rest; whatever does not fit is read as if there were no session, so that a session changes
seconds and never the text. (Sums of another order apart: with 8-bit weights see docs/decisions.)

Copies, and not the caches themselves: a run that fails leaves a session as it was, and an engine
may lend its buffers to the next run of someone else.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtad.draft import RecordedDrafter, Resumable
from mtad.eager import Saved
from mtad.lm import CachedLM
from mtad.pairs import ModelPair

MAX_SESSIONS = 16
MAX_BYTES = 1024**3


@dataclass(frozen=True)
class _Kept:
    """A saved cache and the text that stands in it."""

    token_ids: tuple[int, ...]
    saved: Saved

    @staticmethod
    def of(text: Sequence[int], saved: Saved) -> _Kept:
        # After a stop string the text is shorter than what was decoded.
        length = min(saved.length, len(text))
        return _Kept(tuple(text[:length]), dataclasses.replace(saved, length=length))

    def shared(self, token_ids: Sequence[int]) -> int:
        """How many tokens it has in common with the beginning of another text."""
        for index, (ours, theirs) in enumerate(zip(self.token_ids, token_ids, strict=False)):
            if ours != theirs:
                return index
        return min(len(self.token_ids), len(token_ids))


class Session:
    """The caches of one conversation. Hand it to every run of it: `mtad.stream(..., session=…)`.

    Runs of one session follow each other, as all runs of a device do. It may be closed at any
    time, from any thread.

    Args:
        changed: called after a run has left something here.

    Attributes:
        reused_tokens: of the last run's prompt, so many tokens were not read by the target.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.reused_tokens = 0
        self._changed = changed
        self._lock = threading.Lock()
        self._closed = False
        self._pair: ModelPair | None = None
        self._target: _Kept | None = None
        self._draft: _Kept | None = None

    @property
    def size_bytes(self) -> int:
        """Memory that the copies take, on the device of the pair."""
        with self._lock:
            return sum(kept.saved.size_bytes for kept in (self._target, self._draft) if kept)

    def close(self) -> None:
        """Drops everything, also what a run that still goes on would leave."""
        with self._lock:
            self._closed = True
            self._pair = self._target = self._draft = None

    def begin(
        self,
        pair: ModelPair,
        prompt_ids: Sequence[int],
        target: CachedLM,
        drafter: RecordedDrafter | None,
    ) -> None:
        """Fills the empty cache of a run's target, and tells its drafter where to go on from."""
        with self._lock:
            same = self._pair is pair
            kept_target = self._target if same else None
            kept_draft = self._draft if same else None
        prefix = prompt_ids[:-1]  # the last token is not prefilled
        length = kept_target.shared(prefix) if kept_target else 0
        if drafter is not None:
            can = kept_draft is not None and isinstance(drafter.drafter, Resumable)
            drafted = kept_draft.shared(prefix) if kept_draft and can else 0
            if drafter.target_layers:
                # It goes on with the target's state at its own last token and at all tokens after
                # that: states are not kept, so the target reads those again.
                drafted = min(drafted, length + 1)
                length = max(0, drafted - 1)
            if kept_draft and drafted:
                drafter.resume_from = kept_draft.saved, drafted
        if kept_target:
            target.load(kept_target.saved, length)
        self.reused_tokens = length

    def end(
        self,
        pair: ModelPair,
        text_ids: Sequence[int],
        target: CachedLM,
        drafter: RecordedDrafter | None,
    ) -> None:
        """Keeps what a run has left.

        Args:
            pair: of the run.
            text_ids: prompt and answer. Both caches hold a beginning of it: decoders commit
                what they emit, all but the last token.
            target: of the run.
            drafter: of the run; None if it had none.
        """
        kept_target = _Kept.of(text_ids, target.save())
        saved = None
        if drafter is not None and drafter.begun and isinstance(drafter.drafter, Resumable):
            saved = drafter.drafter.save()
        with self._lock:
            if self._closed:
                return
            if self._pair is not pair:
                self._draft = None
            self._pair = pair
            self._target = kept_target
            # After a run without a draft, the draft's cache of an earlier one is still of use.
            self._draft = _Kept.of(text_ids, saved) if saved else self._draft
        self._changed()


class Sessions:
    """Sessions by name, bounded over all of them: the one used longest ago goes first.

    Args:
        most: sessions at a time.
        max_bytes: that all of them together may take. A session that needs more alone is not
            kept: its next run starts anew.
    """

    def __init__(self, most: int = MAX_SESSIONS, max_bytes: int = MAX_BYTES) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        """Of all sessions."""
        with self._lock:
            return sum(session.size_bytes for session in self._kept.values())

    def get(self, name: str) -> Session:
        """The session of that name, now the one used last; a new one where there is none."""
        with self._lock:
            session = self._kept.get(name)
            if session is None:
                session = self._kept[name] = Session(self._trim)
            self._kept.move_to_end(name)
        self._trim()
        return session

    def drop(self, name: str) -> None:
        """Closes the session of that name, if there is one."""
        with self._lock:
            session = self._kept.pop(name, None)
        if session is not None:
            session.close()

    def _trim(self) -> None:
        with self._lock:
            sizes = {name: session.size_bytes for name, session in self._kept.items()}
            total = sum(sizes.values())
            gone = []
            for name, size in sizes.items():
                if len(self._kept) <= self._most and total <= self._max_bytes:
                    break
                gone.append(self._kept.pop(name))
                total -= size
        for session in gone:
            session.close()
