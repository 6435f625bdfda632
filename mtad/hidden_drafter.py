"""Walks a `HiddenDraft` along a tree of tokens: the `Drafter` that reads the target's states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mtad import tree
from mtad.errors import PairError
from mtad.hidden_draft import HiddenDraft, Past
from mtad.lm import PREFILL_CHUNK_TOKENS


@dataclass(frozen=True)
class Ends:
    """The target's own embedding and head, between which a `HiddenDraft` stands.

    Attributes:
        embed: [n] token ids → [n, H].
        head: [K, H], the head's rows for the tokens that the draft can propose.
        bias: [K], or None.
    """

    embed: Callable[[Tensor], Tensor]
    head: Tensor
    bias: Tensor | None

    @staticmethod
    def of(target: PreTrainedModel, token_ids: Tensor) -> Ends:
        """Takes the rows of [K] tokens from a target's head."""
        output = target.get_output_embeddings()
        bias = getattr(output, "bias", None)
        return Ends(
            target.get_input_embeddings(),
            output.weight.detach()[token_ids.to(output.weight.device)].to(token_ids.device),
            None if bias is None else bias.detach()[token_ids.to(bias.device)].to(token_ids.device),
        )


class HiddenDrafter:
    """Drafting from the target's hidden states.

    Token s is read together with a state: the target's own, of token s − 1, where the target has
    been; below that, the draft's. So a token that was drafted and accepted is read a second time,
    now with the target's state, in the same pass as the next token that comes in.

    Parents are nodes of earlier calls, and a kept path begins with the chain that was given
    first, as the decoders do it.
    """

    def __init__(self, draft: HiddenDraft, ends: Ends, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.target_layers = draft.config.target_layers
        self._draft = draft
        self._ends = ends
        self._like = draft.norm  # the dtype and the device of everything

    def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
        """Reads [n] tokens, each with the target's state [n, F·H] of the token before it."""
        count = token_ids.shape[0]
        self._past: Past | None = None
        self._cached = 0  # committed tokens in `_past`
        self._length = min(count, 1)  # committed tokens
        # Committed tokens that are not yet in `_past`: the last ones of the text.
        self._unread = token_ids[:0]
        # The target's states from the token before `_unread` on, as far as they are known. There
        # is none before the first token of a text, so that token is not read; as the first
        # token of an empty prefix it is, with zeros.
        self._states = self._like.new_zeros(1 - self._length, self._like.shape[0])
        self._drop_nodes()
        if count == 0:
            return
        self._take(target_hidden)
        for start in range(1, count, PREFILL_CHUNK_TOKENS):
            chunk = token_ids[start : start + PREFILL_CHUNK_TOKENS]
            self._length += chunk.shape[0]
            self._unread = chunk
            self._read(chunk[:0], None)

    def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """See `Drafter.next_logits`; tokens that the draft cannot propose get −∞."""
        if parents is not None:
            states = self._read(token_ids, parents)
        else:
            # A chain is read at once as far as the target's states reach, then one by one.
            known = 0 if self._nodes else self._states.shape[0] - self._unread.shape[0]
            parts = [token_ids[:known], *token_ids[known:].unsqueeze(1)]
            states = torch.cat([self._read(part, None) for part in parts if part.shape[0]])
        logits = F.linear(self._draft.head_input(states), self._ends.head, self._ends.bias)
        dense = logits.new_full((states.shape[0], self.vocab_size), -torch.inf)
        return dense.index_copy_(1, self._draft.token_ids, logits)

    def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
        """See `Drafter.keep`."""
        self._take(target_hidden)
        nodes = torch.arange(path, device=self._like.device) if isinstance(path, int) else path
        # What was read with the target's states stays; the rest of the path is read again.
        stay = min(nodes.shape[0], self._exact)
        if self._past is not None:
            index = torch.arange(self._cached + stay, device=nodes.device)
            index[self._cached :] += nodes[:stay] - torch.arange(stay, device=nodes.device)
            self._past = [
                (keys.index_select(2, index), values.index_select(2, index))
                for keys, values in self._past
            ]
        self._cached += stay
        self._length += nodes.shape[0]
        self._states = self._states[stay:]
        self._unread = torch.cat([self._unread, self._tokens[nodes[stay:]]])
        self._drop_nodes()

    def _take(self, target_hidden: Tensor | None) -> None:
        if target_hidden is None:
            raise PairError(
                "This draft reads the target's hidden states, and was given none. Hand the states"
                " of its target_layers to prefill and keep."
            )
        states = self._draft.read_target(target_hidden.to(self._like))
        self._states = torch.cat([self._states, states])

    def _drop_nodes(self) -> None:
        self._nodes = 0
        self._exact = 0  # so many of the first nodes were read with the target's states
        self._tokens = self._unread[:0]
        # What a child of each node is read with.
        self._node_states = self._states[:0]
        self._ancestors: Tensor | None = None

    def _read(self, token_ids: Tensor, parents: Tensor | None) -> Tensor:
        """One pass over the unread tokens and n new nodes → the states [n, H] after the nodes."""
        count, unread, old = token_ids.shape[0], self._unread.shape[0], self._nodes
        states = self._states[unread:]
        known = states[:0]
        levels = 1
        if parents is not None:
            above = torch.cat([states[:1], self._node_states])[parents + 1]
        else:
            above = self._node_states[-1:] if old else states[:count]
            parents = torch.arange(old - 1, old - 1 + count, device=token_ids.device)
            levels = count
            if not old:
                self._exact = count
                known = states[1 : 1 + count]
        self._ancestors = tree.extend_ancestors(self._ancestors, parents, levels)
        depths = tree.node_depths(self._ancestors)[old:]
        before = torch.arange(self._length - unread, self._length, device=token_ids.device)
        output, self._past = self._draft(
            self._ends.embed(torch.cat([self._unread, token_ids])).to(self._like).unsqueeze(0),
            torch.cat([self._states[:unread], above]).unsqueeze(0),
            torch.cat([before, self._length + depths]),
            self._mask(unread, count),
            self._past,
        )
        found: Tensor = output[0, unread:]
        self._cached += unread
        self._states, self._unread = states, self._unread[:0]
        self._nodes += count
        self._tokens = torch.cat([self._tokens, token_ids])
        self._node_states = torch.cat([self._node_states, known, found[known.shape[0] :]])
        return found

    def _mask(self, unread: int, count: int) -> Tensor:
        """Additive [unread + count, cached + unread + nodes]: a text, and a tree below it."""
        assert self._ancestors is not None
        kind, text = self._like.dtype, self._cached + unread
        masks = []
        if unread:
            chain = tree.chain_ancestors(unread, self._like.device)
            mask = tree.additive_mask(chain, self._cached, unread, kind)[0, 0]
            masks.append(F.pad(mask, (0, self._nodes + count), value=torch.finfo(kind).min))
        if count:
            masks.append(tree.additive_mask(self._ancestors, text, count, kind)[0, 0])
        return torch.cat(masks)
