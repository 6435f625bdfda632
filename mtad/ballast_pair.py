"""A pair whose target has ballast: the draft reads the small target's part of its states."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from mtad import inspection
from mtad.ballast import BallastShape, ballast, find_shape, title
from mtad.config import DecodeConfig
from mtad.draft import BlockDrafter, Drafter, Resumable
from mtad.eager import Saved
from mtad.hidden_draft import Ends, HiddenDraft
from mtad.histories import Searched
from mtad.logits import Logits
from mtad.pairs import EAGER, NATIVE, ModelPair, check_engine, hidden_drafter, ready_draft
from mtad.sampling import Uniforms
from mtad.trace import ModelInfo
from mtad.wheel import Progress


class NarrowDrafter:
    """A drafter that reads a small target's states, given those of the target with ballast.

    Attributes:
        target_layers: the same layers, by their numbers in the large target: its layers beyond
            the small one's come last, so that only the number of the very last state differs.
        context_length: most tokens that the drafter can hold; None for any number.
        info: name and sizes, for traces; None if they are not known.
    """

    def __init__(
        self, drafter: Drafter, small: Any, large: Any, info: ModelInfo | None = None
    ) -> None:
        """Wraps a drafter.

        Args:
            drafter: reads states of the small target.
            small: that target's configuration.
            large: the configuration of the target with ballast.
            info: name and sizes of the drafter.
        """
        last = {small.num_hidden_layers: large.num_hidden_layers}
        self.vocab_size = drafter.vocab_size
        self.target_layers = tuple(last.get(layer, layer) for layer in drafter.target_layers)
        self.context_length: int | None = getattr(drafter, "context_length", None)
        self.info = info
        self._drafter = drafter
        self._width = int(small.hidden_size)

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """See `Drafter.prefill`."""
        self._drafter.prefill(token_ids, self._narrow(target_hidden))

    def save(self) -> Saved | None:
        """See `Resumable.save`: what the drafter says."""
        return self._drafter.save() if isinstance(self._drafter, Resumable) else None

    def resume(
        self, saved: Saved, kept: int, token_ids: Tensor, target_hidden: Tensor | None
    ) -> None:
        """See `Resumable.resume`."""
        assert isinstance(self._drafter, Resumable)
        self._drafter.resume(saved, kept, token_ids, self._narrow(target_hidden))

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor | Logits:
        """See `Drafter.next_logits`."""
        return self._drafter.next_logits(token_ids, parents)

    def draft_line(
        self,
        logits: Logits,
        config: DecodeConfig,
        uniform: Tensor,
        ends: Tensor,
        floors: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """See `BlockDrafter`: what the drafter says."""
        if not isinstance(self._drafter, BlockDrafter):
            return None
        return self._drafter.draft_line(logits, config, uniform, ends, floors)

    def draft_beams(
        self,
        logits: Logits,
        config: DecodeConfig,
        steps: int,
        chance: Uniforms,
        ends: Tensor,
        floors: Sequence[float] = (),
    ) -> Searched | None:
        """See `BlockDrafter`: what the drafter says."""
        if not isinstance(self._drafter, BlockDrafter):
            return None
        return self._drafter.draft_beams(logits, config, steps, chance, ends, floors)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `Drafter.keep`."""
        self._drafter.keep(path, self._narrow(target_hidden))

    def _narrow(self, hidden: Tensor | None) -> Tensor | None:
        """[n, F·H] → the first columns of each state, [n, F·width]."""
        if hidden is None:
            return None
        rows, count = hidden.shape[0], len(self.target_layers)
        states = hidden.view(rows, count, hidden.shape[1] // count)
        return states[:, :, : self._width].reshape(rows, count * self._width)


def with_ballast(
    pair: ModelPair,
    shape: str | BallastShape,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    engine: str = EAGER,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelPair:
    """A pair whose target has the price of a large model; draft and tokenizer stay.

    A draft on the target's hidden states reads their first columns and keeps its own small size
    and price; one made for a real target of this shape would be as wide as that target. It is
    one object with a state, so that runs of this pair must follow each other, as they do in
    `mtad.run`.

    Args:
        pair: its target is a Llama. It stays as it is.
        shape: see `ballast`.
        device: where both models go; None for where the target stands. A `Drafter` of one's own
            stays where it is.
        dtype: of the target and the draft; None for what they have.
        engine: of the new pair, whatever that of `pair` is. The native ones hold a copy of the
            weights of their own, and "native" rounds them to 8 bits, so that the function is no
            longer quite that of the small target. "cuda" holds none.
        seed: see `ballast`.
        progress: see `ballast`.

    Raises:
        ConfigError, PairError: see `ballast`; or the engine cannot run this pair.
    """
    chosen = find_shape(shape)
    behind = title(chosen)
    check_engine(engine)
    model = ballast(pair.target, chosen, device=device, dtype=dtype, seed=seed, progress=progress)
    name, size = pair.target_info.name, inspection.model_info(model).parameters / 1e9
    notes = (
        f"Ballast: writes what {name} writes, at the price of a model of {size:.3g} billion"
        " parameters.",
        "Rounded to 8 bits a weight, so that it may differ in a word." if engine == NATIVE else "",
        pair.target_note,
    )
    return dataclasses.replace(
        pair,
        target=model,
        draft=_draft(pair, model, None if dtype is None else model.dtype, engine),
        name=f"{pair.name} {behind}",
        engine=engine,
        target_name=f"{name} {behind}",
        target_revision=pair.target_info.revision,
        target_note=" ".join(filter(None, notes)),
    )


def _draft(
    pair: ModelPair, model: LlamaForCausalLM, dtype: torch.dtype | None, engine: str
) -> PreTrainedModel | Drafter | None:
    """The pair's draft, for the target with ballast; moved to a dtype if one is given."""
    draft, small, large = pair.draft, pair.target.config, model.config
    there = inspection.device_of(model)
    if isinstance(draft, PreTrainedModel):
        return _moved(draft, there, dtype or draft.dtype)
    if not isinstance(draft, HiddenDraft):
        if draft is None or not draft.target_layers:
            return draft
        return NarrowDrafter(draft, small, large, pair.draft_info)
    draft = _moved(draft, there, model.dtype)
    wide, width = Ends.of(model, draft.token_ids), small.hidden_size
    ends = Ends(
        lambda token_ids: wide.embed(token_ids)[..., :width],
        wide.head[:, :width].contiguous(),
        wide.bias,
        wide.whole[:, :width],
        wide.whole_bias,
    )
    runnable = ready_draft(draft, ends, inspection.context_length(model), engine)
    drafter = hidden_drafter(runnable, pair.vocab_size)
    info = pair.draft_info
    assert info is not None
    note = f"{info.note} Keeps its own size beside a target with ballast.".strip()
    info = dataclasses.replace(info, weight_bytes=runnable.weight_bytes, note=note)
    return NarrowDrafter(drafter, small, large, info)


def _moved(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The module itself if it is there already, else a copy: the pair given stays usable."""
    first = next(module.parameters())
    if first.device == device and first.dtype == dtype:
        return module
    return copy.deepcopy(module).to(device, dtype)
