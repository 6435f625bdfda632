"""The certified bound of an accepted prefix, and the true gap to exact joint decoding.

`certify` is arithmetic on log-probabilities. `measure` runs both models once more at a recorded
step: the target searches for the best block y, the draft says what it thinks of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mtad.config import DecodeConfig
from mtad.decoders.exact import search_exact
from mtad.draft import Drafter
from mtad.errors import ConfigError
from mtad.lm import CachedLM
from mtad.logits import Logits
from mtad.pairs import ModelPair, as_drafter
from mtad.sampling import score
from mtad.trace import Bound, Trace
from mtad.verify import running_sums

JOINT_METHODS = ("mtad", "mtad_tree")


def certify(
    accepted_target: Sequence[float],
    accepted_draft: Sequence[float],
    best_target: Sequence[float],
    best_draft: Sequence[float],
    best_token_ids: Sequence[int],
    threshold: float,
) -> Bound:
    """The bound from conditional log-probabilities, at least one of each.

    Args:
        accepted_target: log p of each token of the accepted prefix x.
        accepted_draft: log q that the threshold was measured against, of the same length.
        best_target: log p of each token of the best block y.
        best_draft: log q of each token of y, −∞ outside the draft's support.
        best_token_ids: y.
        threshold: τ.
    """
    # The last of the running sums that the rule compared: the same bits.
    joint_target, joint_draft, best, best_by_draft = (
        float(running_sums(torch.tensor(logprobs, dtype=torch.float64))[-1])
        for logprobs in (accepted_target, accepted_draft, best_target, best_draft)
    )
    outside = best_by_draft == -math.inf
    return Bound(
        certified=joint_target - joint_draft,
        slack=-math.log(threshold),
        gap=best - joint_target,
        draft_error=None if outside else best - best_by_draft,
        search_gap=None if outside else best_by_draft - joint_draft,
        best_token_ids=tuple(best_token_ids),
        reason="no bound: y is outside the draft's support" if outside else None,
    )


@torch.inference_mode()
def measure(
    pair: ModelPair, trace: Trace, index: int, *, check: Callable[[], None] = lambda: None
) -> Bound:
    """The bound and the true gap of one step of a trace.

    The caller holds the lock of the device.

    Args:
        pair: the models that made the trace.
        trace: of `mtad` or `mtad_tree`.
        index: of the step.
        check: called before every pass of the target; raises to stop the search.

    Raises:
        ConfigError: the method has no such bound, the step does not exist or accepted nothing.
        BudgetError: the exact search does not fit into the node budget of the config.
    """
    if trace.method not in JOINT_METHODS:
        raise ConfigError(
            f"There is no bound for {trace.method}; it holds for {', '.join(JOINT_METHODS)}."
        )
    if not 0 <= index < len(trace.steps):
        raise ConfigError(f"step is {index}, but must be from 0 to {len(trace.steps) - 1}.")
    decision = trace.steps[index].decision
    length = decision.accepted_length
    if length == 0:
        raise ConfigError(f"Step {index} accepted no draft token, so there is nothing to bound.")
    before = [token for step in trace.steps[:index] for token in step.decision.emitted]
    context = [*trace.prompt_ids, *before]
    target = CachedLM(pair.engine_target, pair.vocab_size, check=check)
    eos_ids = () if trace.config.ignore_eos else pair.eos_token_ids
    eos = torch.tensor(eos_ids, dtype=torch.int64, device=target.device)
    prefix = torch.tensor(context, dtype=torch.int64, device=target.device)
    draft = as_drafter(pair)
    hidden = target.prefill(prefix[:-1], draft.target_layers)
    blocks = search_exact(
        target,
        prefix[-1:],
        length,
        trace.config,
        lambda tokens: torch.isin(tokens, eos),
    )
    best = blocks.block(int(blocks.joint.argmax()))
    return certify(
        [decision.tree.target_logprobs[node] for node in decision.path],
        decision.reference_logprobs[:length],
        best.logprobs,
        _draft_logprobs(pair, draft, hidden, prefix, best.token_ids, trace.config),
        best.token_ids,
        trace.config.accept_threshold,
    )


def _draft_logprobs(
    pair: ModelPair,
    draft: Drafter,
    hidden: torch.Tensor | None,
    prefix: torch.Tensor,
    block: Sequence[int],
    config: DecodeConfig,
) -> list[float]:
    draft.prefill(prefix[:-1], hidden)
    tokens = torch.tensor(block, dtype=torch.int64, device=prefix.device)
    logits = Logits.of(draft.next_logits(torch.cat([prefix[-1:], tokens[:-1]])))
    scored = score(logits.cut(pair.vocab_size), config)
    logprobs: list[float] = scored.logprob_of(tokens).tolist()
    return logprobs
