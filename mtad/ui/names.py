"""Short names of the methods, for chips and charts where the title does not fit."""

from __future__ import annotations

from mtad.catalogue import method_info

_SHORT = {
    "autoregressive": "Single-token",
    "beam": "Beam",
    "speculative": "Speculative",
    "mtjd": "MTJD",
    "mtad": "MTAD",
    "mtad_tree": "MTAD tree",
    "specinfer": "SpecInfer",
    "bild": "BiLD",
    "typical": "Typical",
}


def short_name(method: str) -> str:
    """The short name, or the title where there is none."""
    return _SHORT.get(method) or method_info(method).title
