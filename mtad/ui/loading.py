"""Loads the pair of the page in a background thread and says how far it is.

The page opens at once; whoever presses Run before the pair is ready waits here. Knows no
gradio; torch is imported by the thread, not by the page.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mtad.errors import MtadError

_STAGES = {
    "wait": "waiting for another process that is fetching the weights",
    "download": "fetching weights",
    "verify": "checking weights",
    "convert": "converting weights, half a minute",
    "load": "loading the models",
    "warmup": "warming up",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadStatus:
    """How far the loading is.

    Attributes:
        state: idle before `start`, then loading, then ready or failed.
        text: what is going on, or the message of the failure.
        fraction: of the current stage, 0 to 1; None where it is unknown.
    """

    state: Literal["idle", "loading", "ready", "failed"]
    text: str
    fraction: float | None = None

    @property
    def line(self) -> str:
        """The text with the share that is done."""
        return self.text if self.fraction is None else f"{self.text} {100 * self.fraction:.0f} %"


class PairLoader:
    """The one pair of the page.

    Args:
        load: called in a thread as `load(progress=...)`, progress being called with a stage, the
            amount done and the amount in all. Default: `mtad.pairs.load_pair` of `name`.
        name: of the preset.
    """

    def __init__(self, name: str = "smollm2", load: Callable[..., Any] | None = None) -> None:
        self.name = name
        self._load = load or self._load_preset
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._status = LoadStatus("idle", "not loaded yet")
        self._pair: Any = None

    def start(self) -> None:
        """Begins to load, also again after a failure; does nothing while it loads or is ready."""
        with self._lock:
            if self._status.state in ("loading", "ready"):
                return
            self._settled.clear()
            self._status = LoadStatus("loading", "starting")
        threading.Thread(target=self._work, name="mtad-load-pair", daemon=True).start()

    def status(self) -> LoadStatus:
        """How far it is, now."""
        with self._lock:
            return self._status

    def wait(self, seconds: float) -> bool:
        """Waits for the end of the loading, good or bad; True if it has come."""
        return self._settled.wait(seconds)

    @property
    def pair(self) -> Any:
        """The pair; None until it is ready."""
        with self._lock:
            return self._pair

    def _work(self) -> None:
        try:
            pair = self._load(progress=self._progress)
        except MtadError as error:
            self._settle(LoadStatus("failed", str(error)))
        except Exception as error:
            _log.exception("loading the pair %s failed", self.name)
            name = type(error).__name__
            text = f"Loading the pair {self.name} failed ({name}); the server's log says more."
            self._settle(LoadStatus("failed", text))
        else:
            self._settle(LoadStatus("ready", "ready"), pair)

    def _settle(self, status: LoadStatus, pair: Any = None) -> None:
        with self._lock:
            self._status = status
            self._pair = pair
        self._settled.set()

    def _progress(self, stage: str, done: int = 0, total: int = 0) -> None:
        fraction = min(1.0, done / total) if total > 0 and stage != "convert" else None
        with self._lock:
            self._status = LoadStatus("loading", _STAGES.get(stage, stage), fraction)

    def _load_preset(self, progress: Callable[..., None]) -> Any:
        from mtad.pairs import load_pair

        progress("load")
        return load_pair(self.name, progress=progress)


def header_view(loader: PairLoader, note: str = "") -> dict[str, Any]:
    """The pair and its device as the header shows them, and what else is to be known there."""
    status = loader.status()
    view: dict[str, Any] = {
        "state": status.state,
        "text": status.line,
        "fraction": status.fraction,
        "pair": loader.name,
        "models": "",
        "device": "",
        "notes": [],
    }
    if note:
        view["notes"] = [note]
    pair = loader.pair
    if status.state == "ready" and pair is not None:
        view["pair"] = pair.name
        draft = pair.draft_info
        view["models"] = _short(pair.target_info)
        if draft is not None:
            view["models"] += f", draft {_short(draft)}"
        view["device"] = f"{str(pair.device).upper()}, {pair.weights}, {pair.engine} engine"
        view["notes"] += pair.notes
    return view


def _short(info: Any) -> str:
    """A model's name and size."""
    if not info.parameters:
        return str(info.name)
    millions = info.parameters / 1e6
    size = f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.0f}M"
    return f"{info.name} ({size} parameters)"
