"""MTAD: multi-token assisted decoding beside all its baselines, on real models.

Importing this package, listing methods and replaying a trace load neither torch nor
transformers; the names that need them are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mtad.catalogue import MethodInfo, methods
from mtad.config import DecodeConfig
from mtad.errors import MtadError
from mtad.trace import Decision, EnergyReading, Step, Summary, Trace
from mtad.version import __version__

if TYPE_CHECKING:
    from mtad import bound, verify, whatif
    from mtad.draft import Drafter
    from mtad.draft_files import load_draft
    from mtad.hidden_draft import HiddenDraft
    from mtad.pairs import ModelPair, load_pair
    from mtad.runner import run, stream
    from mtad.session import Session

__all__ = [
    "DecodeConfig",
    "Decision",
    "Drafter",
    "EnergyReading",
    "HiddenDraft",
    "MethodInfo",
    "ModelPair",
    "MtadError",
    "Session",
    "Step",
    "Summary",
    "Trace",
    "__version__",
    "bound",
    "load_draft",
    "load_pair",
    "methods",
    "run",
    "stream",
    "verify",
    "whatif",
]

_MODULES = "bound", "verify", "whatif"
_LATE = {
    "Drafter": "mtad.draft",
    "HiddenDraft": "mtad.hidden_draft",
    "ModelPair": "mtad.pairs",
    "load_draft": "mtad.draft_files",
    "load_pair": "mtad.pairs",
    "run": "mtad.runner",
    "Session": "mtad.session",
    "stream": "mtad.runner",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mtad.{name}")
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'mtad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
