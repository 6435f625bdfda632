"""Beam sampling: W hypotheses that grow by one token a step.

`mtad` and `mtad_tree` run it on the draft, `beam` and `mtjd` on the target. Every hypothesis
carries its own history, so a log-probability is always read along a hypothesis' ancestry and
never by the slot in which it happens to stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.histories import Histories
from mtad.logits import Logits
from mtad.sampling import (
    Warped,
    draw_distinct,
    narrows,
    score,
    token_logprobs,
    top_alternatives,
    uniforms,
    wide,
)


def beam_weights(joint_logprobs: Tensor) -> Tensor:
    """Joint log-probabilities → log-weights of the same ratios that sum to one.

    [W] hypotheses, or all their [W · K] continuations. The probabilities themselves are
    renormalised, which changes no ratio between them.
    """
    return joint_logprobs - joint_logprobs.logsumexp(-1)


@dataclass
class Beams(Histories):
    """The hypotheses, with what is recorded beside them.

    Attributes:
        raw_logprobs: [W, s] of the unwarped model; only with `record`.
        alternative_ids, alternative_logprobs: [W, s, 5]; only with `record`.
    """

    raw_logprobs: Tensor
    alternative_ids: Tensor
    alternative_logprobs: Tensor

    @staticmethod
    def root(device: torch.device) -> Beams:
        """One empty hypothesis."""
        ids = torch.empty(1, 0, dtype=torch.int64, device=device)
        none = torch.empty(1, 0, device=device)
        joint = wide(torch.zeros(1, device=device))
        return Beams(
            token_ids=ids,
            logprobs=none,
            nodes=ids,
            real=ids.bool(),
            joint=joint,
            finished=torch.zeros(1, dtype=torch.bool, device=device),
            came_from=torch.zeros(1, dtype=torch.int64, device=device),
            raw_logprobs=none,
            alternative_ids=ids.unsqueeze(-1),
            alternative_logprobs=none.unsqueeze(-1),
        )

    def grow(
        self,
        logits: Tensor | Logits,  # [W or 1, V]
        width: int,
        config: DecodeConfig,
        generator: torch.Generator,
        is_eos: Callable[[Tensor], Tensor],
        *,
        record: int = 0,
    ) -> Beams:
        """The next step: `width` distinct continuations of these hypotheses.

        They are drawn with probability proportional to beam weight × conditional; at
        temperature 0 the largest are taken. A finished hypothesis continues only to itself,
        with log-probability 0, and competes by its joint.

        Args:
            logits: raw logits after each hypothesis.
            width: W.
            config: how logits are warped or scored.
            generator: for the draw.
            is_eos: which tokens end a sequence.
            record: how many alternatives to record; 0 records neither these nor raw_logprobs.
        """
        logits = Logits.of(logits)
        chance, grown = None, None
        if config.temperature > 0.0:
            narrow = narrows(logits, config)
            columns = config.top_k if narrow else logits.values.shape[-1]
            chance = uniforms(generator, max(self.joint.shape[0] * columns, width))
            if narrow:
                values, token_ids = logits.best(config.top_k)
                grown = logits.search.grow(
                    self, values, token_ids, width, config.temperature, config.top_p, chance
                )
        if grown is None:
            grown = self._grown(score(logits, config), width, chance)
        token, slot = grown.token_ids[:, -1], grown.came_from
        beams = Beams(
            **vars(grown),
            raw_logprobs=self.raw_logprobs,
            alternative_ids=self.alternative_ids,
            alternative_logprobs=self.alternative_logprobs,
        )
        beams.finished = grown.finished | is_eos(token)
        if record:
            ids, logprobs = top_alternatives(logits, record)
            raw = token_logprobs(logits, token, slot)
            beams.raw_logprobs = _append(self.raw_logprobs[slot], raw)
            beams.alternative_ids = _append_rows(self.alternative_ids, slot, ids)
            beams.alternative_logprobs = _append_rows(self.alternative_logprobs, slot, logprobs)
        return beams

    def _grown(self, scored: Warped, width: int, chance: Tensor | None) -> Histories:
        """`grow` without the ends of sequences; the largest are taken without `chance`."""
        choices = self._continuations(scored)  # [W, K], log-probabilities
        candidates = (self.joint.unsqueeze(-1) + choices).flatten()
        if candidates.shape[0] < width:
            missing = width - candidates.shape[0]
            candidates = torch.nn.functional.pad(candidates, (0, missing), value=-torch.inf)
        if chance is None:
            picked = candidates.topk(width).indices
        else:
            picked = draw_distinct(beam_weights(candidates), chance, width)
        # A NaN anywhere makes every choice of this step meaningless: it must not go unseen.
        broken = candidates.isnan().any()
        joint = torch.where(broken, torch.nan, candidates.index_select(0, picked))
        picked = picked.clamp_max(choices.numel() - 1)  # padding points nowhere; its joint is −∞
        slot = picked // choices.shape[-1]
        token = scored.token_ids.flatten().index_select(0, picked)
        was_finished = self.finished.index_select(0, slot)
        token_ids = self.token_ids.index_select(0, slot)
        if self.steps:
            token = torch.where(was_finished, token_ids[:, -1], token)
        logprob = choices.flatten().index_select(0, picked).float()
        logprob = torch.where(broken, torch.nan, logprob)
        alive = joint > -torch.inf
        first_node = self.steps * width
        here = torch.arange(first_node, first_node + width, device=slot.device)
        return Histories(
            token_ids=_append(token_ids, token),
            logprobs=_append(self.logprobs.index_select(0, slot), logprob),
            nodes=_append(self.nodes.index_select(0, slot), here),
            real=_append(self.real.index_select(0, slot), alive & ~was_finished),
            joint=joint,
            finished=was_finished | ~alive,
            came_from=slot,
        )

    def _continuations(self, scored: Warped) -> Tensor:
        """[W, K] log-probabilities: a finished hypothesis has one continuation, itself."""
        first = torch.zeros_like(scored.logprobs[:, :1])
        others = torch.full_like(scored.logprobs[:, 1:], -torch.inf)
        itself = torch.cat([first, others], dim=-1)
        return torch.where(self.finished.unsqueeze(-1), itself, scored.logprobs)


def _append(history: Tensor, latest: Tensor) -> Tensor:
    return torch.cat([history, latest.unsqueeze(-1)], dim=-1)


def _append_rows(history: Tensor, slot: Tensor, latest: Tensor) -> Tensor:
    if history.shape[1] == 0:
        return latest[slot].unsqueeze(1)
    return torch.cat([history[slot], latest[slot].unsqueeze(1)], dim=1)


def grow_beams(
    next_logits: Callable[[Tensor, Tensor | None], Tensor | Logits],
    pending: Tensor,
    steps: int,
    config: DecodeConfig,
    generator: torch.Generator,
    is_eos: Callable[[Tensor], Tensor],
    *,
    record: int = 0,
) -> list[Beams]:
    """Grows beams for `steps` steps and returns them after each step.

    Args:
        next_logits: the model: (token ids, parents among its undecided nodes) → logits.
        pending: [m] tokens that the model has not read yet; they become its nodes 0 … m − 1,
            and the slots of step s its nodes m + (s − 1)·W onward. The last step's are not fed.
        steps: how many tokens each hypothesis gets.
        config: beam_width and the warp are read.
        generator: for the draws.
        is_eos: which tokens end a sequence.
        record: see `Beams.grow`.
    """
    width, waiting = config.beam_width, pending.shape[0]
    logits = next_logits(pending, None)[-1:]
    history = [
        Beams.root(pending.device).grow(logits, width, config, generator, is_eos, record=record)
    ]
    for step in range(1, steps):
        beams = history[-1]
        if step == 1:
            parents = torch.full_like(beams.token_ids[:, 0], waiting - 1)
        else:
            parents = waiting + beams.nodes[:, -2]
        logits = next_logits(beams.token_ids[:, -1], parents)
        history.append(beams.grow(logits, width, config, generator, is_eos, record=record))
    return history
