"""The pairs that the header offers, and the one that the page runs. Knows no gradio.

A page has one pair at a time for all its visitors. Another one is loaded beside it in the
background and takes its place when it is ready: a run that goes on holds its own pair to its end,
and a failed load changes nothing. Only names of presets choose a pair.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mtad.errors import MtadError, PairError
from mtad.presets import find_preset, presets
from mtad.ui.loading import LoadStatus, PairLoader

_UNKNOWN = "Known when the first pair is loaded"


def machine_reasons() -> dict[str, str]:
    """By preset, why this machine cannot hold it; what fits is not in it. Imports torch."""
    from mtad.pairs import unavailable_reason

    found = {preset.id: unavailable_reason(preset) for preset in presets()}
    return {name: reason for name, reason in found.items() if reason}


class PairMenu:
    """A `PairSource` whose pair can be exchanged. May be used from several threads.

    Args:
        name: of the preset that the page begins with.
        loader: makes the loader of a preset.
        reasons: says of which presets there is no room, and why; called once for every pair that
            was loaded, since that changes what is free.
    """

    def __init__(
        self,
        name: str = "smollm2",
        loader: Callable[[str], PairLoader] = PairLoader,
        reasons: Callable[[], dict[str, str]] = machine_reasons,
    ) -> None:
        self._make = loader
        self._reasons_now = reasons
        self._loader = loader(name)
        self._next: PairLoader | None = None
        self._reasons: dict[str, str] | None = None
        self._failure = ""
        self._lock = threading.RLock()

    # ------------------------------------------------------------------ the pair that runs

    @property
    def name(self) -> str:
        """Of the pair that runs."""
        return self._current().name

    @property
    def pair(self) -> Any:
        """The pair; None until the first one is ready."""
        return self._current().pair

    def start(self) -> None:
        """Begins to load the first pair, also again after a failure."""
        self._current().start()

    def status(self) -> LoadStatus:
        """How far the pair is that runs next."""
        return self._current().status()

    def wait(self, seconds: float) -> bool:
        """Waits for the end of its loading, good or bad; True if it has come."""
        return self._current().wait(seconds)

    # ------------------------------------------------------------------ the menu

    def choose(self, name: object) -> None:
        """Loads the preset of that name in the background; it takes over when it is ready.

        Raises:
            PairError: there is none, it does not fit, or another one is being loaded.
        """
        preset = find_preset(name if isinstance(name, str) else str(name)[:60])
        with self._lock:
            current = self._current()
            waiting = self._next or (current if current.status().state == "loading" else None)
            if waiting is not None:
                if waiting.name == preset.id:
                    return
                raise PairError(
                    f'The pair "{waiting.name}" is being loaded. Wait until it is there, then'
                    " choose again."
                )
            self._failure = ""
            if preset.id == current.name and current.pair is not None:
                return
            reason = self._unavailable().get(preset.id)
            if reason:
                raise PairError(f"{reason}. Choose a smaller pair.")
            fresh = self._make(preset.id)
            if current.pair is None:
                self._loader = fresh
            else:
                self._next = fresh
            fresh.start()

    def loading(self) -> PairLoader | None:
        """The pair that is being loaded beside the one that runs."""
        with self._lock:
            self._current()
            return self._next

    def failure(self) -> str:
        """Why the last choice could not be loaded; "" if it could."""
        with self._lock:
            self._current()
            return self._failure

    def entries(self) -> list[dict[str, Any]]:
        """[id, title, reason why not] of all presets, and which one is chosen."""
        with self._lock:
            current = self._current()
            chosen = (self._next or current).name
            known = current.status().state == "ready"
            reasons = self._unavailable() if known else {}
            return [
                {
                    "id": preset.id,
                    "title": preset.title,
                    "why_not": self._why_not(preset.id, current.name, reasons, known),
                    "chosen": preset.id == chosen,
                }
                for preset in presets()
            ]

    def _why_not(self, name: str, current: str, reasons: dict[str, str], known: bool) -> str:
        if name == current:
            return ""
        return reasons.get(name, "") if known else _UNKNOWN

    def _unavailable(self) -> dict[str, str]:
        if self._reasons is None:
            try:
                self._reasons = self._reasons_now()
            except MtadError:
                self._reasons = {}
        return self._reasons

    def _current(self) -> PairLoader:
        """The loader of the pair that runs, after a finished one has taken its place."""
        with self._lock:
            following = self._next
            if following is not None and following.wait(0):
                self._next = None
                if following.pair is not None:
                    self._loader, self._reasons = following, None
                else:
                    self._failure = following.status().text
            return self._loader


def menu_view(menu: PairMenu) -> dict[str, Any]:
    """What the header shows of the menu beside `mtad.ui.loading.header_view`."""
    view: dict[str, Any] = {"menu": menu.entries()}
    following = menu.loading()
    if following is not None:
        status = following.status()
        view["next"] = {
            "text": f"Loading {following.name}: {status.line}. Until it is there, the pair above"
            " runs on.",
            "fraction": status.fraction,
        }
    elif menu.failure():
        view["next"] = {"text": menu.failure(), "fraction": None, "failed": True}
    return view
