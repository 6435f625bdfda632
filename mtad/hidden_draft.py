"""A draft that reads the target's hidden states: a few layers between the target's own ends.

The idea is EAGLE's (Li et al., arXiv 2401.15077 and 2503.01840). To say what follows token s,
the draft reads the embedding of token s and what the target thought while it read token s − 1;
below a token that the target has not read yet, its own last state stands in for the target's.
Embedding and head are the target's and frozen, so that neither is stored; the head is cut to
the most frequent tokens and those that stand in the text (q = 0 elsewhere), since a head over all
of them would cost more than the layers. A rare token that has come once comes again.

Pure shapes and arithmetic: files are in `mtad.draft_files`, the walk along a tree of tokens in
`mtad.draft`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtad.fields import FieldCheck, is_number, is_whole
from mtad.four_bits import GROUP
from mtad.logits import Columns

NORM_EPS = 1e-5
_MAX_WIDTH = 65_536

# Keys and values [B, key-value heads, tokens, size], a pair a layer.
Past = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class HiddenDraftConfig:
    """The shape of a draft.

    Attributes:
        hidden_size: H of the target, also the draft's width.
        target_layers: which of the target's hidden states are read, ascending; 0 is the embedding.
        num_layers: of the draft.
        num_heads: query heads, each of an even size.
        num_key_value_heads: key and value heads; divides `num_heads`.
        mlp_size: width of the gated MLP.
        rope_theta: base of the rotary positions.
        copy_weights: see `mtad.copy_drafter`; empty for a draft that copies nothing.
        weight_bits: of its matrices where they are stored: 8, or 4, see `mtad.four_bits`.

    Raises:
        ConfigError: names the field, the value and the allowed range.
    """

    hidden_size: int
    target_layers: tuple[int, ...]
    num_layers: int = 1
    num_heads: int = 9
    num_key_value_heads: int = 3
    mlp_size: int = 1536
    rope_theta: float = 10_000.0
    copy_weights: tuple[float, ...] = ()
    weight_bits: int = 8

    def __post_init__(self) -> None:
        check = FieldCheck(self)
        check.whole("hidden_size", 2, _MAX_WIDTH)
        check.whole("num_layers", 1, 16)
        check.whole("num_heads", 1, _MAX_WIDTH)
        check.whole("num_key_value_heads", 1, _MAX_WIDTH)
        check.whole("mlp_size", 1, _MAX_WIDTH)
        width, heads = self.hidden_size, self.num_heads
        if width % (2 * heads):
            allowed = f"so many that hidden_size ({width}) divides into heads of an even size"
            check.refuse("num_heads", heads, allowed)
        if heads % self.num_key_value_heads:
            allowed = f"a divisor of num_heads ({heads})"
            check.refuse("num_key_value_heads", self.num_key_value_heads, allowed)
        layers, weights, theta = self.target_layers, self.copy_weights, self.rope_theta
        fits = _is_list(layers) and 1 <= len(layers) <= 16 and all(map(is_whole, layers))
        if not fits or layers[0] < 0 or list(layers) != sorted(set(layers)):
            check.refuse("target_layers", layers, "1 to 16 ascending whole numbers from 0")
        if not is_number(theta) or not 1 <= theta <= 1e12:
            check.refuse("rope_theta", theta, "a number from 1 to 1e12")
        fits = _is_list(weights) and len(weights) <= 16
        if not fits or not all(
            isinstance(weight, (int, float)) and 0 <= weight < 1 for weight in weights
        ):
            check.refuse("copy_weights", weights, "at most 16 numbers from 0 to below 1")
        if not is_whole(self.weight_bits) or self.weight_bits not in (4, 8):
            check.refuse("weight_bits", self.weight_bits, "4 or 8")
        if self.weight_bits == 4 and (width % GROUP or self.mlp_size % GROUP):
            allowed = f"8 where hidden_size ({width}) or mlp_size ({self.mlp_size}) is no multiple"
            check.refuse("weight_bits", 4, f"{allowed} of {GROUP}")
        check.put("target_layers", tuple(layers))
        check.put("rope_theta", float(theta))
        check.put("copy_weights", tuple(float(weight) for weight in weights))


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """[..., H] scaled to a mean square of one, times [H]."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: [..., T, size] with cos and sin [T, size]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Layer(nn.Module):
    """One pre-norm layer: grouped-query attention, then a gated MLP."""

    def __init__(self, config: HiddenDraftConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.kv_heads = config.num_heads, config.num_key_value_heads
        self.size = width // config.num_heads
        self.norm = nn.Parameter(torch.ones(width))
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, width, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, T, H] → the same, and the keys and values of `past` with T new ones appended."""
        batch, length, width = x.shape
        joined = self.qkv(rms_norm(x, self.norm)).view(batch, length, -1, self.size).transpose(1, 2)
        query, key, value = joined.split([self.heads, self.kv_heads, self.kv_heads], 1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        past = key, value
        grouped = mask is None or query.device.type != "cuda"
        if not grouped:
            # With a mask, CUDA's fast attention wants as many heads of keys as of queries.
            times = self.heads // self.kv_heads
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(rms_norm(x, self.mlp_norm)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up), past


class HiddenDraft(nn.Module):
    """The trainable part: what lies between the target's hidden states and its head.

    Attributes:
        config: the shape.
        token_ids: [K] int64, ascending: the tokens that the draft can propose in any text.
    """

    token_ids: Tensor

    def __init__(self, config: HiddenDraftConfig, token_ids: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("token_ids", token_ids)
        width, count = config.hidden_size, len(config.target_layers)
        self.read_norm = nn.Parameter(torch.ones(count * width))
        self.read = nn.Linear(count * width, width, bias=False)
        self.token_norm = nn.Parameter(torch.ones(width))
        self.state_norm = nn.Parameter(torch.ones(width))
        self.join = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(width))
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # What is added to the stream of a layer begins small.
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=(0.5 if added else 1.0) * width**-0.5)

    def read_target(self, hidden: Tensor) -> Tensor:
        """The target's hidden states [..., F·H], joined into one state [..., H]."""
        joined: Tensor = self.read(self.normalised(hidden))
        return joined

    def normalised(self, hidden: Tensor) -> Tensor:
        """[..., F·H] with each of the F states scaled to a mean square of one and weighted."""
        count = len(self.config.target_layers)
        states = hidden.view(*hidden.shape[:-1], count, self.config.hidden_size)
        states = F.rms_norm(states, states.shape[-1:], eps=NORM_EPS)
        return states.view_as(hidden) * self.read_norm

    def forward(
        self,
        embedded: Tensor,  # [B, T, H]
        state: Tensor,  # [B, T, H]
        positions: Tensor,  # [T]
        mask: Tensor | None,  # [T, past + T]
        past: Past | None,
    ) -> tuple[Tensor, Past]:
        """One step of drafting for T tokens at once.

        Args:
            embedded: the target's embeddings of the tokens.
            state: what is known of the token before each: the target's hidden states through
                `read_target`, or the draft's own state.
            positions: of the tokens in the text.
            mask: additive; None if every token sees everything.
            past: keys and values of earlier calls, a pair a layer.

        Returns:
            The new states [B, T, H], and `past` with T more keys and values.
        """
        x = self.join(
            torch.cat([rms_norm(embedded, self.token_norm), rms_norm(state, self.state_norm)], -1)
        )
        cos, sin = self._rotary(positions, x.dtype)
        grown: Past = []
        for index, layer in enumerate(self.layers):
            x, seen = layer(x, cos, sin, mask, past[index] if past else None)
            grown.append(seen)
        return x, grown

    def head_input(self, state: Tensor) -> Tensor:
        """[..., H]: what the rows of the target's head are multiplied with."""
        return rms_norm(state, self.norm)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        size = self.config.hidden_size // self.config.num_heads
        powers = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles = positions.float().unsqueeze(1) / self.config.rope_theta**powers
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass(frozen=True)
class Ends:
    """The target's own embedding and head, between which a `HiddenDraft` stands.

    Attributes:
        embed: [n] token ids → [n, H].
        head: [K, H], the head's rows for the tokens that the draft can always propose.
        bias: [K], or None.
        whole: [V, H], all rows of the head, wherever the target has them.
        whole_bias: [V], or None.
    """

    embed: Callable[[Tensor], Tensor]
    head: Tensor
    bias: Tensor | None
    whole: Tensor
    whole_bias: Tensor | None

    @staticmethod
    def of(target: PreTrainedModel, token_ids: Tensor) -> Ends:
        """Takes the rows of [K] tokens from a target's head."""
        output = target.get_output_embeddings()
        bias = getattr(output, "bias", None)
        whole, whole_bias = output.weight.detach(), None if bias is None else bias.detach()
        return Ends(
            target.get_input_embeddings(),
            _picked(whole, token_ids),
            None if whole_bias is None else _picked(whole_bias, token_ids),
            whole,
            whole_bias,
        )

    def with_rows(self, token_ids: Tensor) -> Ends:
        """The same with the rows of [n] more tokens behind the K."""
        head, bias = self.rows(token_ids)
        return dataclasses.replace(
            self,
            head=torch.cat([self.head, head]),
            bias=None if self.bias is None or bias is None else torch.cat([self.bias, bias]),
        )

    def rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head's rows [n, H] of any tokens [n], and their biases [n] or None."""
        bias = None if self.whole_bias is None else _picked(self.whole_bias, token_ids)
        return _picked(self.whole, token_ids), bias


def copy_log_odds(weights: Sequence[float]) -> Tensor:
    """[n + 1] float32, by the length of a match from 0: log(share / (1 − share))."""
    odds = [math.log(weight / (1 - weight)) if weight else -math.inf for weight in weights]
    return torch.tensor([-math.inf, *odds], dtype=torch.float32)


class Proposed:
    """What a draft can propose in a text: its K tokens, and all others that have come in it.

    Attributes:
        columns: of its logits; None where the K are the whole vocabulary.
        more: [E] the tokens of the columns behind the K.
    """

    def __init__(self, token_ids: Tensor, vocab_size: int) -> None:
        self.columns = Columns.of(token_ids, vocab_size)
        self.more = token_ids[:0]
        known = torch.zeros(vocab_size, dtype=torch.uint8)
        known[token_ids.cpu()] = 1
        self._known = bytearray(known.numpy())

    def read(self, token_ids: Tensor) -> bool:
        """Takes in [n] tokens of the text; True if some of them were not known."""
        if self.columns is None:
            return False
        new = sorted({token for token in token_ids.tolist() if not self._known[token]})
        if not new:
            return False
        for token in new:
            self._known[token] = 1
        added = torch.tensor(new, dtype=torch.int64, device=self.more.device)
        self.columns = self.columns.with_tokens(added)
        self.more = torch.cat([self.more, added])
        return True


def _picked(values: Tensor, token_ids: Tensor) -> Tensor:
    """Some of the rows, on the tokens' device."""
    return values.index_select(0, token_ids.to(values.device)).to(token_ids.device)
