"""Traces: what a run decided, what it cost, and nothing that needs a model to be read.

The same frozen dataclasses serve the live view, the replay, the export and the upload. A
decoder makes `Decision`s (ids and log-probabilities only), each written out when its `Outcome` is
asked for it; the runner adds texts, seconds and joules and makes `Step`s; a finished run is a
`Trace`. Everything here is plain Python: the module imports no torch, and a trace can be replayed
on a machine that has no model.

In JSON, −∞ is written as null where a log-probability stands, and NaN is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)

from mtad.config import DecodeConfig
from mtad.errors import TraceError

SCHEMA_VERSION: Final = 1
MAX_TRACE_BYTES = 64 * 1024 * 1024
MAX_STEPS = 131_072
MAX_NODES = 4096
MAX_PROMPT_TOKENS = 1_048_576

FinalKind = Literal["bonus", "corrected", "sampled"]
TokenKind = Literal["accepted", "bonus", "corrected", "sampled"]
StopReason = Literal["eos", "length", "context", "stop", "cancelled", "deadline"]


def _from_json_logprob(value: object) -> object:
    return -math.inf if value is None else value


def _to_json_logprob(value: float) -> float | None:
    return None if value == -math.inf else value


# allow_inf_nan is True here only so that −∞ passes; the dataclasses refuse NaN and +∞.
LogProb = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(_from_json_logprob),
    PlainSerializer(_to_json_logprob, return_type=float | None),
]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# A browser holds whole numbers exactly up to here.
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
# One mistake is enough to refuse a file; millions of them would fill the memory.
_T = TypeVar("_T")
Column = Annotated[tuple[_T, ...], FailFast()]
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_logprobs(name: str, values: tuple[float, ...]) -> None:
    if sum(values) < math.inf:  # neither NaN nor +∞ is among them
        return
    for value in values:
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"{name} holds {value}, but a log-probability is finite or -inf")


@dataclass(frozen=True)
class DraftTree:
    """The draft tokens that one iteration offered to the target, as columns over its nodes.

    A block is a tree whose every node has one child. Nodes stand in an order in which a parent
    comes before its children.

    Attributes:
        token_ids: the token of each node.
        parents: the index of each node's parent, −1 for a child of the last emitted token.
        draft_logprobs: log q(token | path to its parent), of the warped draft (nats).
        target_logprobs: log p(token | path to its parent), of the warped target (nats).
        scores: what the rule compared, where it cannot be derived from the two columns above:
            the ratio p/q of the test (`speculative`, `specinfer`; at temperature 0 the latter
            has 1 for the target's argmax and 0 otherwise), p (`typical`), log p (`bild`). None
            for a node that was not tested. Empty for the joint methods.
        thresholds: what the score was compared with: the uniform draw, min(ε, δ·exp(−H)), or
            −rollback_threshold. Accepted while score > threshold (`bild`: ≥).
    """

    __pydantic_config__ = _STRICT

    token_ids: Annotated[Column[TokenId], Field(max_length=MAX_NODES)] = ()
    parents: Column[int] = ()
    draft_logprobs: Column[LogProb] = ()
    target_logprobs: Column[LogProb] = ()
    scores: Column[float | None] = ()
    thresholds: Column[float | None] = ()

    def __post_init__(self) -> None:
        size = len(self.token_ids)
        for name in ("parents", "draft_logprobs", "target_logprobs"):
            _check(len(getattr(self, name)) == size, f"{name} must have one entry a node ({size})")
        for name in ("scores", "thresholds"):
            _check(len(getattr(self, name)) in (0, size), f"{name} must be empty or have {size}")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}, which is not before it")
        _check_logprobs("draft_logprobs", self.draft_logprobs)
        _check_logprobs("target_logprobs", self.target_logprobs)

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node, counted from 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """The length of the longest path: the number of tokens that one pass could accept."""
        return max(self.depths, default=0)

    def path_to(self, node: int) -> tuple[int, ...]:
        """The nodes from a child of the root to `node`, both included. Empty for −1."""
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return tuple(reversed(path))


@dataclass(frozen=True)
class Alternative:
    """One of the target's most probable tokens at a position, unwarped, at temperature 1."""

    __pydantic_config__ = _STRICT

    token_id: TokenId
    logprob: LogProb
    text: str = ""

    def __post_init__(self) -> None:
        _check_logprobs("logprob", (self.logprob,))


@dataclass(frozen=True)
class Decision:
    """What one iteration of a decoder decided: ids and log-probabilities, no time and no text.

    Attributes:
        tree: the draft that was offered; empty for methods without one.
        reference_logprobs: by depth, the conditional log q of the block whose joint probability
            the threshold of `mtad` and `mtad_tree` was measured against. Empty elsewhere.
        path: the accepted nodes, root to leaf; its length is the accepted length.
        emitted: the tokens that this iteration adds to the output: the accepted ones, then what
            the target added itself.
        emitted_logprobs: their log-probabilities under the unwarped target at temperature 1.
        final_kind: what the tokens after the accepted ones are; None if there are none.
        alternatives: by emitted token, the target's most probable tokens at that position.
            Empty where they were not recorded.
        target_passes: forward passes of the target that this iteration took.
        target_positions: rows of those passes.
        draft_passes: forward passes of the draft.
        provisional: True for a hypothesis that a later decision replaces (`beam` while it
            runs); such a decision is shown live and never part of a Trace.
    """

    __pydantic_config__ = _STRICT

    tree: DraftTree = DraftTree()
    reference_logprobs: Column[LogProb] = ()
    path: Column[int] = ()
    emitted: Column[TokenId] = ()
    emitted_logprobs: Column[LogProb] = ()
    final_kind: FinalKind | None = None
    alternatives: Column[Column[Alternative]] = ()
    target_passes: Count = 1
    target_positions: Count = 1
    draft_passes: Count = 0
    provisional: bool = False

    def __post_init__(self) -> None:
        parent = -1
        for node in self.path:
            _check(0 <= node < len(self.tree.token_ids), f"path names node {node}, not in the tree")
            _check(self.tree.parents[node] == parent, f"path is not connected at node {node}")
            parent = node
        _check(len(self.emitted) == len(self.emitted_logprobs), "one log-probability a token")
        _check(
            len(self.alternatives) in (0, len(self.emitted)), "alternatives for every token or none"
        )
        accepted = tuple(self.tree.token_ids[node] for node in self.path)
        _check(
            self.emitted[: len(accepted)] == accepted[: len(self.emitted)],
            "the accepted tokens must be emitted first",
        )
        _check_logprobs("emitted_logprobs", self.emitted_logprobs)
        _check_logprobs("reference_logprobs", self.reference_logprobs)

    @property
    def accepted_length(self) -> int:
        """Number of draft tokens that the rule accepted."""
        return len(self.path)

    @property
    def kinds(self) -> tuple[TokenKind, ...]:
        """Provenance of each emitted token."""
        accepted = min(len(self.path), len(self.emitted))
        last: TokenKind = self.final_kind or "sampled"
        return tuple("accepted" if i < accepted else last for i in range(len(self.emitted)))


@dataclass(frozen=True)
class Outcome:
    """What an iteration has decided, written out when somebody asks.

    Between two passes of a model time is dear: to write a decision there takes as long as to
    write several of them later, one after the other.

    Attributes:
        emitted: see `Decision`.
        write: gives the decision, its alternatives with the texts that this finds for them.
        provisional: see `Decision`.
    """

    emitted: tuple[int, ...]
    write: Callable[[Callable[[int], str]], Decision]
    provisional: bool = False

    @staticmethod
    def of(decision: Decision) -> Outcome:
        """One that is known in full."""

        def write(text_of: Callable[[int], str]) -> Decision:
            spelled = tuple(
                tuple(Alternative(a.token_id, a.logprob, text_of(a.token_id)) for a in position)
                for position in decision.alternatives
            )
            return dataclasses.replace(decision, alternatives=spelled)

        return Outcome(decision.emitted, write, decision.provisional)

    @property
    def decision(self) -> Decision:
        """The decision, without texts."""
        return self.write(lambda token_id: "")


@dataclass(frozen=True)
class EnergyReading:
    """Energy over a window, or the reason why there is none. A missing sensor is never 0 J.

    Attributes:
        joules: energy over the window; None where it was not measured.
        seconds: length of the window.
        method: "nvml-counter", "nvml-power", "rapl", "estimate", "replay" or "none".
        scope: what the figure covers, such as "NVIDIA H200 (whole board)".
        resolution_s: the sensor's refresh interval in seconds; None if unknown.
        reason: why joules is None, or what must be said beside the figure.
    """

    __pydantic_config__ = _STRICT

    joules: float | None
    seconds: float
    method: str
    scope: str
    resolution_s: float | None = None
    reason: str | None = None

    @property
    def estimated(self) -> bool:
        """True for a figure that no sensor gave: it starts with ≈ wherever it is shown."""
        return self.method == "estimate"

    @property
    def relative_error(self) -> float | None:
        """Relative uncertainty from the sensor's resolution alone; None if unknown."""
        if self.joules is None or self.resolution_s is None or self.seconds <= 0:
            return None
        return self.resolution_s / self.seconds


@dataclass(frozen=True)
class Bound:
    """How far an accepted prefix x can be, and is, from the best block y of its length.

    Acceptance says log p(x) > log q(x) + log τ, hence
    log p(y)/p(x) < log p(y)/q(y) + log q(y)/q(x) + log 1/τ. All in nats.

    Attributes:
        certified: log p(x) − log q(x), which exceeds log τ.
        slack: log 1/τ.
        gap: log p(y) − log p(x), the true gap.
        draft_error: log p(y) − log q(y); None where q(y) = 0.
        search_gap: log q(y) − log q(x); None where q(y) = 0.
        best_token_ids: y.
        reason: why there is no bound.
    """

    __pydantic_config__ = _STRICT

    certified: float
    slack: float
    gap: float
    draft_error: float | None
    search_gap: float | None
    best_token_ids: Column[TokenId]
    reason: str | None = None

    @property
    def limit(self) -> float | None:
        """The sum of the three terms; the gap is smaller. None where q(y) = 0."""
        if self.draft_error is None or self.search_gap is None:
            return None
        return self.draft_error + self.search_gap + self.slack


@dataclass(frozen=True)
class Step:
    """A decision with its texts and its price: what the page draws for one iteration.

    Attributes:
        index: number of the step in its trace, from 0.
        decision: what was decided.
        emitted_texts: text of each emitted token; joined over all steps they are the answer.
            A token that only completes a character with a later one, or is special, adds "".
        node_texts: text of each node of the draft tree.
        draft_seconds: spent in the draft model.
        verify_seconds: spent in the target model.
        seconds: since decoding began (prefill excluded), at the end of this step.
        joules: since decoding began, where the meter can say so while running; else None.
        bound: the certified bound with the true gap to exact joint decoding, where someone
            asked for it and the search fitted the node budget; else None.
    """

    __pydantic_config__ = _STRICT

    index: Count
    decision: Decision
    emitted_texts: Column[str]
    node_texts: Column[str]
    draft_seconds: float
    verify_seconds: float
    seconds: float
    joules: float | None = None
    bound: Bound | None = None

    def __post_init__(self) -> None:
        _check(len(self.emitted_texts) == len(self.decision.emitted), "one text an emitted token")
        _check(len(self.node_texts) == len(self.decision.tree.token_ids), "one text a node")

    @property
    def text(self) -> str:
        """What this step adds to the answer."""
        return "".join(self.emitted_texts)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model: enough to say in a table which one it was."""

    __pydantic_config__ = _STRICT

    name: str
    revision: str = ""
    parameters: Count = 0
    weight_bytes: Count = 0
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The measures of a run. None stands for what is not defined or was not measured.

    Attributes:
        tokens: emitted tokens.
        target_passes: forward passes of the target, prefill excluded.
        decode_seconds: wall seconds of decoding, prefill excluded.
        prefill_seconds: wall seconds of the prefill.
        time_to_first_token_seconds: from the start of the prefill to the first emitted token.
        end_to_end_seconds: prefill and decoding.
        tokens_per_second: tokens / decode_seconds.
        block_efficiency: tokens / target_passes, the bonus included.
        acceptance_rate: accepted draft tokens / offered depth.
        perplexity: of the emitted tokens under the unwarped target at temperature 1.
        distinct_4: distinct 4-grams / 4-grams of the output.
        repeated_4gram_share: share of 4-grams that had occurred before in the output.
        joules: over the same window as tokens_per_second.
        joules_per_token: joules / tokens.
        watts: joules / decode_seconds.
        end_to_end_joules: prefill included.
        weight_bytes_per_token: bytes of weights that the passes had to read, per token.
        draft_seconds: spent in the draft model.
        verify_seconds: spent in the target model.
        other_seconds: the rest of decode_seconds.
    """

    __pydantic_config__ = _STRICT

    tokens: Count
    target_passes: Count
    decode_seconds: float
    prefill_seconds: float
    time_to_first_token_seconds: float | None
    end_to_end_seconds: float
    tokens_per_second: float | None
    block_efficiency: float | None
    acceptance_rate: float | None
    perplexity: float | None
    distinct_4: float | None
    repeated_4gram_share: float | None
    joules: float | None
    joules_per_token: float | None
    watts: float | None
    end_to_end_joules: float | None
    weight_bytes_per_token: float | None
    draft_seconds: float
    verify_seconds: float
    other_seconds: float


@dataclass(frozen=True)
class Trace:
    """A finished run: header, steps, energy, summary.

    Attributes:
        method: id of the decoding method.
        config: the resolved parameters.
        target: the target model.
        draft: the draft model; None for methods without one.
        device, dtype, engine: where and how the models ran.
        versions: of the libraries and the machine, by name.
        prompt: the prompt as text, chat template applied; "" without a tokenizer.
        prompt_ids: its tokens.
        started_at: wall-clock start, ISO 8601, UTC.
        text: the answer.
        stop_reason: why the run ended.
        steps: one per iteration.
        energy: over decoding.
        end_to_end_energy: prefill included.
        summary: the measures.
        notes: what a reader must know, such as that the draft is a stand-in.
    """

    __pydantic_config__ = _STRICT

    method: str
    config: DecodeConfig
    target: ModelInfo
    draft: ModelInfo | None
    device: str
    dtype: str
    engine: str
    versions: dict[str, str]
    prompt: str
    prompt_ids: Annotated[Column[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]
    started_at: str
    text: str
    stop_reason: StopReason
    steps: Annotated[Column[Step], Field(max_length=MAX_STEPS)]
    energy: EnergyReading
    end_to_end_energy: EnergyReading
    summary: Summary
    notes: Column[str] = ()
    schema_version: Literal[1] = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for index, step in enumerate(self.steps):
            _check(step.index == index, f"step {index} has index {step.index}")
            _check(not step.decision.provisional, f"step {index} is provisional")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All emitted tokens."""
        return tuple(token for step in self.steps for token in step.decision.emitted)

    def decisions(self) -> tuple[Decision, ...]:
        """What was decided, without times, energy and texts: equal for equal seeds."""
        return tuple(step.decision for step in self.steps)

    def to_json(self, *, indent: int | None = None) -> str:
        """This trace as JSON text; `from_json` gives an equal trace back.

        Raises:
            TraceError: a figure is NaN or infinite, which JSON cannot say.
        """
        plain = _adapter().dump_python(self, mode="json")
        separators = (",", ":") if indent is None else None
        try:
            return json.dumps(
                plain, allow_nan=False, ensure_ascii=False, indent=indent, separators=separators
            )
        except ValueError as error:
            raise TraceError(f"This trace cannot be written: {error}.") from None

    @staticmethod
    def from_json(text: str | bytes) -> Trace:
        """Reads a trace that may come from anywhere.

        Raises:
            TraceError: it is too large, no JSON, no trace, of another schema version, or does
                not agree with itself.
        """
        size = len(text.encode(errors="surrogatepass")) if isinstance(text, str) else len(text)
        if size > MAX_TRACE_BYTES:
            raise TraceError(
                f"The file has {size:,} bytes; a trace may have at most {MAX_TRACE_BYTES:,}."
            )
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            raise TraceError(_explain(error)) from None


@functools.cache
def _adapter() -> TypeAdapter[Trace]:
    return TypeAdapter(Trace)


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong with a file, in one line."""
    first: Any = error.errors(include_url=False, include_context=False)[0]
    message = str(first["msg"]).removeprefix("Value error, ").removesuffix(".")
    if first["type"] == "json_invalid":
        return f"This is not a trace: {message[:200]}."
    place = ".".join(str(part) for part in first["loc"])[:120] or "the file"
    if place == "schema_version":
        shown = repr(first.get("input"))[:40]
        return (
            f"This trace has schema version {shown}, but this program reads {SCHEMA_VERSION}."
            " Make it again with this version."
        )
    return f"This is not a trace that can be read: at {place}: {message[:200]}."


def replace_emitted(decision: Decision, count: int) -> Decision:
    """`decision` cut to its first `count` emitted tokens (a stop string ends inside a block)."""
    return dataclasses.replace(
        decision,
        emitted=decision.emitted[:count],
        emitted_logprobs=decision.emitted_logprobs[:count],
        alternatives=decision.alternatives[:count],
        final_kind=decision.final_kind if count > len(decision.path) else None,
    )
