"""What the tabs of the page share: models, runner, kept results, and how events are wired."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mtad.shipped import ASSETS
from mtad.trace import Step, Trace
from mtad.ui.chats import Chats
from mtad.ui.comparison import Comparisons, PairSource, Stream
from mtad.ui.limits import Limits
from mtad.ui.loading import PairLoader
from mtad.ui.recordings import Gallery
from mtad.ui.shelf import Shelf

# Names the one slot that every event that touches a model shares.
MODEL_SLOT = "model"
# For events that work behind the page: gradio shows no spinner and offers no endpoint.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def library_stream(*args: Any, **kwargs: Any) -> Iterator[Step | Trace]:
    """`mtad.runner.stream`, imported when it is first needed: the page opens without torch."""
    from mtad.runner import READER_SECONDS, stream

    return stream(*args, interval_seconds=READER_SECONDS, **kwargs)


@dataclass(frozen=True)
class Site:
    """One served page; all its visitors share it.

    Attributes:
        source: of the pair.
        stream: what runs a method; has the signature of `mtad.runner.stream`.
        comparisons: the last comparisons of all visitors.
        shelf: finished traces of all visitors, for the tabs that look at them again.
        chats: the conversations of all visitors.
        gallery: the recorded comparisons that ship with the code.
        limits: what a visitor may ask for; `stream` and the kept things above heed them.
    """

    source: PairSource = field(default_factory=PairLoader)
    stream: Stream = library_stream
    comparisons: Comparisons = field(default_factory=Comparisons)
    shelf: Shelf = field(default_factory=Shelf)
    chats: Chats = field(default_factory=Chats)
    gallery: Gallery = field(default_factory=Gallery)
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def within(cls, limits: Limits, source: PairSource, stream: Stream) -> Site:
        """A site that heeds limits wherever it runs something."""
        return cls(
            source,
            limits.guard(stream),
            Comparisons(limits=limits),
            chats=Chats(limits=limits),
            limits=limits,
        )


def script(*names: str) -> str:
    """The `js_on_load` of a component: scripts of assets behind the helpers that all share."""
    return "\n".join(_asset(name) for name in ("dom.js", *names))


def view_function(function: str, *names: str) -> str:
    """Scripts of a component as a function, so that another component can draw with them.

    It takes what gradio gives to a `js_on_load`: `(element, props, server, watch)`. Put it behind
    `script(...)`, whose helpers it uses.
    """
    body = "\n".join(_asset(name) for name in names)
    return f"\nfunction {function}(element, props, server, watch) {{\n{body}\n}}"


def stylesheet() -> str:
    """All style sheets of assets."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(ASSETS.glob("*.css")))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
