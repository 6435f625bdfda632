"""DecodeConfig: every knob of every method, frozen, validated once when it is made.

A method reads the fields that `mtad.methods()` lists for it and ignores the rest, so one
config can be handed to several methods of a comparison.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

from mtad.errors import ConfigError
from mtad.fields import is_number, is_text, is_whole, refuse

MAX_NEW_TOKENS = 131_072
# The CPU's generator reads the lowest 32 bits only: beyond them seeds would repeat.
MAX_SEED = 2**32 - 1
MAX_STOP_STRINGS = 16
DEFAULT_WIDTH = 4


@dataclass(frozen=True)
class DecodeConfig:
    """Parameters of a decoding run.

    Passing None for a field means its default; for `num_draft_tokens` that is the method's own
    (10 for `bild`, 4 elsewhere), which the runner writes into the trace.

    Attributes:
        max_new_tokens: most tokens that are emitted.
        num_draft_tokens: the draft length, γ in papers, `num_assistant_tokens` in transformers,
            `num_speculative_tokens` in vLLM. "auto" chooses the length of every draft by what
            iterations cost on this machine, what was accepted so far and, on a CPU, how sure the
            draft is of its block, see `mtad.pace`; `mtjd`, which has no draft, stays at 4.
        iteration_costs: cost of an iteration with 0, 1, 2, … draft tokens, relative to the first;
            read with num_draft_tokens="auto" only. With beam_width="auto" a row of them for each
            of `mtad.pace.AUTO_WIDTHS`. None has the runner measure it once a pair
            and write it into the trace: with it the same seed gives the same decisions again.
        beam_width: W, beams of the draft (`mtad`, `mtad_tree`) or of the target (`beam`, `mtjd`).
            "auto", which goes with num_draft_tokens="auto", takes the widest search of the draft
            that costs next to no speed, see `mtad.pace`; on the target it stays at 4.
        accept_threshold: τ; a prefix passes while joint p / joint q > τ. Finite and > 0. The
            authors take 0.5; at 0.3 the embedded pair accepts more and gains as much (docs/log.md).
        temperature: divides the logits of both models. 0 chooses by maximum.
        top_k: keeps the k most probable tokens; 0 keeps all.
        top_p: keeps the smallest set whose mass reaches top_p; 1.0 keeps all.
        seed: of the one generator that makes every random choice of the run.
        k_config: `specinfer`: children of a node, by depth of the tree. "auto" chooses among
            `mtad.pace.AUTO_TREES` as num_draft_tokens="auto" chooses γ.
        tree_costs: the same as iteration_costs for k_config="auto": cost of an iteration without a
            draft, then with each of `mtad.pace.AUTO_TREES`.
        replacement: `specinfer`: children are drawn with replacement.
        fallback_threshold: `bild`: the draft stops where its largest probability is under this.
        rollback_threshold: `bild`: a draft token is replaced where −log p exceeds this (nats).
        typical_epsilon: `typical`: ε, the ceiling of the acceptance threshold.
        typical_delta: `typical`: δ, the factor of exp(−entropy) in the acceptance threshold.
        search: `mtjd`: "beam" for beam sampling on the target, "exact" for the whole tree.
        joint_temperature: `mtjd` exact: a block is drawn with probability ∝ p(block)^(1/T_J);
            0 takes the most probable block.
        node_budget: `mtjd` exact: most tree nodes that one iteration may forward.
        ignore_eos: go on after an end-of-sequence token, for benchmarks of a fixed length.
        stop: strings that end the text; the text is cut before the first one that appears.

    Raises:
        ConfigError: names the field, the value and the allowed range.
    """

    max_new_tokens: int = 128
    num_draft_tokens: int | Literal["auto"] | None = None
    beam_width: int | Literal["auto"] = DEFAULT_WIDTH
    accept_threshold: float = 0.3
    temperature: float = 1.0
    top_k: int = 10
    top_p: float = 0.9
    seed: int = 0
    k_config: tuple[int, ...] | Literal["auto"] = (4, 2, 2)
    replacement: bool = True
    fallback_threshold: float = 0.6
    rollback_threshold: float = 5.0
    typical_epsilon: float = 0.09
    typical_delta: float = 0.3
    search: Literal["beam", "exact"] = "beam"
    joint_temperature: float = 1.0
    node_budget: int = 4096
    iteration_costs: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None
    tree_costs: tuple[float, ...] | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.default is not None:
                object.__setattr__(self, field.name, field.default)
        self._int("max_new_tokens", 1, MAX_NEW_TOKENS)
        if self.num_draft_tokens not in (None, "auto"):
            self._int("num_draft_tokens", 1, 64, ' or "auto"')
        if self.beam_width != "auto":
            self._int("beam_width", 1, 64, ' or "auto"')
        elif self.num_draft_tokens != "auto":
            raise ConfigError(
                'beam_width is "auto", but num_draft_tokens is'
                f" {self.num_draft_tokens or 'the default'}. W is chosen together with γ: give"
                ' num_draft_tokens="auto" as well, or a beam_width from 1 to 64.'
            )
        self._float("accept_threshold", 0.0, math.inf, above=True)
        self._float("temperature", 0.001, 100.0, or_zero=True)
        self._int("top_k", 0, 2**31 - 1)
        self._float("top_p", 0.0, 1.0, above=True)
        self._int("seed", 0, MAX_SEED)
        self._k_config()
        self._bool("replacement")
        self._float("fallback_threshold", 0.0, 1.0)
        self._float("rollback_threshold", 0.0, math.inf)
        self._float("typical_epsilon", 0.0, 1.0, above=True)
        self._float("typical_delta", 0.0, 1.0, above=True)
        if self.search not in ("beam", "exact"):
            refuse("search", self.search, '"beam" or "exact"')
        self._float("joint_temperature", 0.001, 100.0, or_zero=True)
        self._int("node_budget", 1, 65_536)
        self._costs("iteration_costs", rows=self.beam_width == "auto")
        self._costs("tree_costs")
        self._bool("ignore_eos")
        self._stop()

    @property
    def width(self) -> int:
        """W; the default where it is chosen as the text goes."""
        return self.beam_width if isinstance(self.beam_width, int) else DEFAULT_WIDTH

    def with_draft_length(self, default: int) -> DecodeConfig:
        """This config with `num_draft_tokens` set to `default` where it was left to the method."""
        if self.num_draft_tokens is not None:
            return self
        return dataclasses.replace(self, num_draft_tokens=default)

    # Not `FieldCheck`, which knows what JSON holds: here numpy's and torch's numbers come in too,
    # and are made plain ones.
    def _int(self, name: str, low: int, high: int, extra: str = "") -> None:
        value: Any = getattr(self, name)
        allowed = f"a whole number from {low} to {high}{extra}"
        try:
            number = low - 1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = low - 1
        if not low <= number <= high:
            refuse(name, value, allowed)
        object.__setattr__(self, name, number)

    def _float(
        self, name: str, low: float, high: float, *, above: bool = False, or_zero: bool = False
    ) -> None:
        value: Any = getattr(self, name)
        start = f"greater than {low:g}" if above else f"at least {low:g}"
        end = "finite" if high == math.inf else f"at most {high:g}"
        allowed = ("0, or " if or_zero else "") + f"a number {start} and {end}"
        try:
            number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        inside = (low < number if above else low <= number) or (or_zero and number == 0.0)
        if not (math.isfinite(number) and inside and number <= high):
            refuse(name, value, allowed)
        object.__setattr__(self, name, number)

    def _bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            refuse(name, getattr(self, name), "True or False")

    def _k_config(self) -> None:
        value: Any = self.k_config
        if isinstance(value, str) and value == "auto":
            return
        allowed = (
            "1 to 8 whole numbers from 1 to 16, such as (4, 2, 2), with at most 1024 nodes,"
            ' or "auto"'
        )
        if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= 8:
            refuse("k_config", value, allowed)
        if not all(is_whole(k) and 1 <= k <= 16 for k in value):
            refuse("k_config", value, allowed)
        nodes = sum(itertools.accumulate(value, operator.mul))
        if nodes > 1024:
            refuse("k_config", value, allowed)
        object.__setattr__(self, "k_config", tuple(value))

    def _costs(self, name: str, *, rows: bool = False) -> None:
        value: Any = getattr(self, name)
        if value is None:
            return
        allowed = "2 to 65 numbers greater than 0 and at most 1e6"
        if rows:
            allowed += ", or 1 to 16 rows of them"

        def row(costs: Any) -> tuple[float, ...]:
            if not isinstance(costs, (tuple, list)) or not 2 <= len(costs) <= 65:
                refuse(name, value, allowed)
            if not all(is_number(cost) and 0 < cost <= 1e6 for cost in costs):
                refuse(name, value, allowed)
            return tuple(float(cost) for cost in costs)

        several = rows and isinstance(value, (tuple, list)) and value
        if several and isinstance(value[0], (tuple, list)) and len(value) <= 16:
            costs: Any = tuple(row(costs) for costs in value)
        else:
            costs = row(value)
        object.__setattr__(self, name, costs)

    def _stop(self) -> None:
        value: Any = self.stop
        if isinstance(value, str):
            value = (value,)
        allowed = f"at most {MAX_STOP_STRINGS} non-empty strings"
        if not isinstance(value, (tuple, list)) or len(value) > MAX_STOP_STRINGS:
            refuse("stop", value, allowed)
        if any(not isinstance(text, str) or not text for text in value):
            refuse("stop", value, allowed)
        if not all(is_text(text) for text in value):
            refuse("stop", value, f"{allowed} of whole characters (no lone surrogates)")
        object.__setattr__(self, "stop", tuple(value))
