"""Beam sampling: W hypotheses that grow by one token a step.

`mtad` and `mtad_tree` run it on the draft, `beam` and `mtjd` on the target. Every hypothesis
carries its own history, so a log-probability is always read along a hypothesis' ancestry and
never by the slot in which it happens to stand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtad.config import DecodeConfig
from mtad.growth import append, grown
from mtad.histories import Histories, History
from mtad.logits import Logits, wide
from mtad.sampling import narrows, score, token_logprobs, top_alternatives

_COLUMNS = [field.name for field in dataclasses.fields(Histories)]


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
    @functools.cache
    def root(device: torch.device) -> Beams:
        """One empty hypothesis. Always the same one: nobody writes to it."""
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
        uniforms: Callable[[int], Tensor],
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
            uniforms: so many of them, for the draw.
            is_eos: which tokens end a sequence.
            record: how many alternatives to record; 0 records neither these nor raw_logprobs.
        """
        logits = Logits.of(logits)
        chance = None
        if config.temperature > 0.0:
            columns = config.top_k if narrows(logits, config) else logits.values.shape[-1]
            chance = uniforms(max(self.joint.shape[0] * columns, width))
        further = self._further(logits, width, config, chance, recorded=not record)
        token, slot = further.token_ids[:, -1], further.came_from
        beams = Beams(
            **vars(further),
            raw_logprobs=self.raw_logprobs,
            alternative_ids=self.alternative_ids,
            alternative_logprobs=self.alternative_logprobs,
        )
        beams.finished = further.finished | is_eos(token)
        if record:
            ids, logprobs = top_alternatives(logits, record)
            raw = token_logprobs(logits, token, slot)
            beams.raw_logprobs = append(self.raw_logprobs[slot], raw)
            beams.alternative_ids = _append_rows(self.alternative_ids, slot, ids)
            beams.alternative_logprobs = _append_rows(self.alternative_logprobs, slot, logprobs)
        return beams

    def _further(
        self,
        logits: Logits,
        width: int,
        config: DecodeConfig,
        chance: Tensor | None,
        *,
        recorded: bool,
    ) -> Histories:
        """`mtad.growth.grown`, in one call where the engine has one.

        A stretch belongs to one number of steps: of draft blocks there are few, and of the lengths
        of whole answers too many.
        """
        if chance is not None and narrows(logits, config):
            found = logits.search.grow(
                self, logits, config.top_k, width, config.temperature, config.top_p, chance
            )
            if found is not None:
                return found

        def compute(logits: Logits, *tensors: Tensor) -> Histories:
            old, chance = Histories(*tensors[: len(_COLUMNS)]), tensors[len(_COLUMNS) :]
            return grown(old, score(logits, config), width, *chance or (None,))

        held = [getattr(self, name) for name in _COLUMNS]
        held += [] if chance is None else [chance]
        if not recorded:
            return compute(logits, *held)
        key = "grow", width, config.temperature, config.top_k, config.top_p
        return logits.stretch(key, compute, *held)


def _append_rows(history: Tensor, slot: Tensor, latest: Tensor) -> Tensor:
    if history.shape[1] == 0:
        return latest[slot].unsqueeze(1)
    return torch.cat([history[slot], latest[slot].unsqueeze(1)], dim=1)


def grow_beams(
    next_logits: Callable[[Tensor, Tensor | None], Tensor | Logits],
    pending: Tensor,
    steps: int,
    config: DecodeConfig,
    uniforms: Callable[[int], Tensor],
    is_eos: Callable[[Tensor], Tensor],
    *,
    record: int = 0,
    floors: Sequence[float] = (),
) -> History[Beams]:
    """Grows beams for at most `steps` steps and returns them after each step.

    Args:
        next_logits: the model: (token ids, parents among its undecided nodes) → logits.
        pending: [m] tokens that the model has not read yet; they become its nodes 0 … m − 1,
            and the slots of step s its nodes m + (s − 1)·W onward. The last step's are not fed.
        steps: how many tokens each hypothesis gets; fewer only with `floors`.
        config: beam_width and the warp are read.
        uniforms: so many of them, for the draws.
        is_eos: which tokens end a sequence.
        record: see `Beams.grow`.
        floors: where the steps end early, see `mtad.pace.FloorPace`.
    """
    width, waiting = config.width, pending.shape[0]
    logits = next_logits(pending, None)[-1:]
    beams = Beams.root(pending.device).grow(logits, width, config, uniforms, is_eos, record=record)
    history = History([beams])
    for step in range(1, steps):
        if floors:
            best = beams.best()
            if beams.finished[best] or beams.joint[best] < floors[step - 1]:
                break
        if step == 1:
            parents = torch.full_like(beams.token_ids[:, 0], waiting - 1)
        else:
            parents = waiting + beams.nodes[:, -2]
        logits = next_logits(beams.token_ids[:, -1], parents)
        beams = beams.grow(logits, width, config, uniforms, is_eos, record=record)
        history.append(beams)
    return history
