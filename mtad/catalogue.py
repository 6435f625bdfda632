"""What is known of each decoding method without running it: title, source, parameters.

Imports no torch, so that a list of methods costs nothing. The decoders themselves live one
file each in `mtad.decoders` and are imported by `load_decoder` when they are run.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtad.errors import ConfigError

_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos", "stop")
_DRAFT = ("num_draft_tokens", "iteration_costs")


@dataclass(frozen=True)
class MethodInfo:
    """One decoding method.

    Attributes:
        id: the name that `mtad.run` takes.
        title: the name that people read.
        summary: one sentence that says what an iteration does.
        lossless: True if the tokens have exactly the distribution of sampling the target.
        citation: where the method comes from.
        parameters: the fields of `DecodeConfig` that it reads.
        uses_draft: False for methods that run on the target alone.
        draft_length: the value of `num_draft_tokens` where the config leaves it open.
    """

    id: str
    title: str
    summary: str
    lossless: bool
    citation: str
    parameters: tuple[str, ...]
    uses_draft: bool = True
    draft_length: int = 4


_MTAD = "Qin et al., Optimized Multi-Token Joint Decoding, ICLR 2025, arXiv 2407.09722"

_CATALOGUE = (
    MethodInfo(
        "autoregressive",
        "Single-token sampling",
        "One target pass for every token, drawn from the target's distribution.",
        True,
        "the reference that every other method is compared with",
        _SAMPLING,
        uses_draft=False,
    ),
    MethodInfo(
        "beam",
        "Beam sampling on the target",
        "Keeps the W best continuations under the target and emits the best one at the end.",
        False,
        "Graves 2012; as a baseline in " + _MTAD,
        (*_SAMPLING, "beam_width"),
        uses_draft=False,
    ),
    MethodInfo(
        "speculative",
        "Speculative decoding",
        "The draft writes γ tokens; one target pass accepts or corrects them one by one.",
        True,
        "Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318",
        (*_SAMPLING, *_DRAFT),
    ),
    MethodInfo(
        "mtjd",
        "Multi-token joint decoding",
        "Chooses γ tokens at once by their joint probability under the target.",
        False,
        _MTAD,
        (
            *_SAMPLING,
            "num_draft_tokens",
            "beam_width",
            "search",
            "joint_temperature",
            "node_budget",
        ),
        uses_draft=False,
    ),
    MethodInfo(
        "mtad",
        "Multi-token assisted decoding",
        "The draft's beam search proposes a block; one target pass keeps the longest prefix"
        " whose joint ratio p/q exceeds τ.",
        False,
        _MTAD,
        (*_SAMPLING, *_DRAFT, "beam_width", "accept_threshold"),
    ),
    MethodInfo(
        "mtad_tree",
        "Multi-candidate MTAD",
        "Verifies every beam of the draft at once as a token tree by the same joint rule.",
        False,
        _MTAD,
        (*_SAMPLING, *_DRAFT, "beam_width", "accept_threshold"),
    ),
    MethodInfo(
        "specinfer",
        "Multi-candidate speculative decoding",
        "The draft draws a tree of candidates; one rejection test for each child in turn.",
        True,
        "Miao et al. 2023 (SpecInfer), arXiv 2305.09781; Yang et al. 2024, arXiv 2401.06706",
        (*_SAMPLING, "k_config", "tree_costs", "replacement"),
    ),
    MethodInfo(
        "bild",
        "Big little decoder",
        "The draft writes until it is unsure; the target replaces its first unlikely token.",
        False,
        "Kim et al. 2023, arXiv 2302.07863",
        (*_SAMPLING, *_DRAFT, "fallback_threshold", "rollback_threshold"),
        draft_length=10,
    ),
    MethodInfo(
        "typical",
        "Typical acceptance",
        "As speculative decoding, but accepts every token that is typical for the target.",
        False,
        "Cai et al. 2024 (Medusa), arXiv 2401.10774",
        (*_SAMPLING, *_DRAFT, "typical_epsilon", "typical_delta"),
    ),
)

_BY_ID = {info.id: info for info in _CATALOGUE}


def methods() -> tuple[MethodInfo, ...]:
    """Every decoding method, in the order in which the page shows them."""
    return _CATALOGUE


def method_info(method: str) -> MethodInfo:
    """The entry of one method.

    Raises:
        ConfigError: there is no such method; the message lists those that exist.
    """
    if not isinstance(method, str) or method not in _BY_ID:
        raise ConfigError(f"There is no method {method!r}. Choose one of: {', '.join(_BY_ID)}.")
    return _BY_ID[method]
