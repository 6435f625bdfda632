"""All visitors' conversations, and the generator that makes an answer. Knows no gradio.

`answering` is behind Send and Retry. As in `mtad.ui.comparison`, the decoding happens in the
worker thread of `mtad.runner.stream`; this side drains it and sends a message at most every
`INTERVAL_SECONDS`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from typing import Any

from mtad.errors import Cancelled, DeadlineExceeded, MtadError
from mtad.trace import Trace
from mtad.ui.board import encode
from mtad.ui.comparison import (
    DEADLINE_SECONDS,
    INTERVAL_SECONDS,
    PairSource,
    Stream,
    wait_for_models,
)
from mtad.ui.conversation import Answer, Conversation
from mtad.ui.limits import Limits

MAX_CHATS = 128
_log = logging.getLogger(__name__)


class Chats:
    """The last conversations of all visitors, and the caches of the latest of them.

    A visit has one conversation at a time. Caches are bounded apart from texts: they are large
    and only save time, see `mtad.session`.
    """

    def __init__(self, limit: int = MAX_CHATS, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._limit = limit
        self._by_visit: OrderedDict[str, Conversation] = OrderedDict()
        self._sessions: Any = None
        self._lock = threading.Lock()

    def of(self, visit: str) -> Conversation:
        """The conversation of a visit; a new one where there is none."""
        with self._lock:
            found = self._by_visit.get(visit)
            if found is None:
                found = self._by_visit[visit] = Conversation()
            self._by_visit.move_to_end(visit)
            gone = []
            while len(self._by_visit) > self._limit:
                gone.append(self._by_visit.popitem(last=False)[1])
        for conversation in gone:
            self._end(conversation)
        return found

    def find(self, chat_id: object) -> Conversation | None:
        """The conversation of that id; None if it is unknown, cleared or forgotten."""
        with self._lock:
            known = self._by_visit.values()
            return next((each for each in known if each.chat_id == chat_id), None)

    def clear(self, visit: str) -> Conversation:
        """Ends the conversation of a visit and its run; returns an empty one."""
        old = self.of(visit)
        with self._lock:
            fresh = self._by_visit[visit] = Conversation(old.generation + 1)
        self._end(old)
        return fresh

    def leave(self, browser: str) -> None:
        """A page was closed: the caches go; texts stay for a page that was only cut off."""
        with self._lock:
            left = [each for each in self._by_visit.values() if each.browser == browser]
        for conversation in left:
            conversation.cancel.set()
            if self._sessions is not None:
                self._sessions.drop(conversation.chat_id)

    def session(self, conversation: Conversation) -> Any:
        """The caches of a conversation, for `mtad.stream`; torch is imported by the first call."""
        from mtad.session import Sessions

        with self._lock:
            if self._sessions is None:
                self._sessions = Sessions()
        return self._sessions.get(conversation.chat_id)

    def _end(self, conversation: Conversation) -> None:
        conversation.close()
        if self._sessions is not None:
            self._sessions.drop(conversation.chat_id)


class _Sender:
    """Encodes messages that hold only what has not been sent yet, not too often."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._have: tuple[int, int, int] | None = None
        self._sent_at = 0.0

    def due(self) -> bool:
        return time.monotonic() - self._sent_at >= INTERVAL_SECONDS

    def send(self) -> str:
        message = self._conversation.message(self._have)
        self._have = self._conversation.position()
        self._sent_at = time.monotonic()
        return encode(message)


def answering(
    conversation: Conversation, source: PairSource, stream: Stream, chats: Chats
) -> Generator[str, None, Trace | None]:
    """Makes the answer that `conversation` waits for; yields messages, returns its trace.

    Closing the generator (a closed tab) or setting `conversation.cancel` (Stop, Clear) stops the
    decoding within one target pass; what was decoded stays in the conversation.
    """
    answer, cancel = conversation.current, conversation.cancel
    sender = _Sender(conversation)
    trace = None
    if answer is None:
        return None
    try:
        pair = yield from _wait_for_pair(conversation, answer, source, sender)
        if pair is not None:
            conversation.start(answer)
            yield sender.send()
            settings = answer.settings
            room = chats.limits.max_prompt_characters
            conversation.fit(pair, settings.config.max_new_tokens, room)
            session = chats.session(conversation)
            events = stream(
                settings.info.id,
                pair,
                messages=conversation.messages(),
                config=settings.config,
                cancel=cancel,
                deadline_seconds=DEADLINE_SECONDS,
                session=session,
            )
            with contextlib.closing(events):  # type: ignore[type-var]
                for event in events:
                    if isinstance(event, Trace):
                        trace = event
                        reused = session.reused_tokens
                        cached = (reused, len(event.prompt_ids)) if reused else None
                        conversation.finish(answer, event, cached)
                        break
                    conversation.add(answer, event)
                    if sender.due() and not conversation.closed:
                        yield sender.send()
    except Cancelled as error:
        # While another run held the device: there is no trace to show.
        late = isinstance(error, DeadlineExceeded)
        conversation.fail(answer, str(error) if late else "stopped before it began", aloud=late)
    except MtadError as error:
        conversation.fail(answer, str(error))
    except GeneratorExit:
        conversation.fail(answer, "stopped: the page was closed", aloud=False)
        raise
    except Exception as error:
        _log.exception("an answer by %s failed", answer.settings.info.id)
        conversation.fail(answer, f"failed ({type(error).__name__}); the server's log says more")
    finally:
        cancel.set()
    if not conversation.closed:
        yield sender.send()
    return trace


def _wait_for_pair(
    conversation: Conversation, answer: Answer, source: PairSource, sender: _Sender
) -> Generator[str, None, Any]:
    """Returns the pair; None where there is none and the answer has failed."""
    cancel = conversation.cancel

    def waiting(line: str) -> str:
        conversation.status(f"Waiting for the models: {line}")
        return sender.send()

    yield from wait_for_models(source, cancel, waiting)
    if cancel.is_set():
        conversation.fail(answer, "stopped before it began", aloud=False)
    elif source.pair is None:
        conversation.fail(answer, source.status().text)
    return None if cancel.is_set() else source.pair
