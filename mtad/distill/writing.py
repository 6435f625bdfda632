"""Phase 1: the target writes the text that its draft will learn from.

Rows of a shard are written in lockstep, one token a pass, so that there is no padding and no
mask. A row is a stream of conversations: the chat template's own pieces are forced, questions
and answers are sampled, and where a conversation ends the next one begins in the same row. A
target without chat template writes plain texts one after the other. Beside each token the
target's most probable successors are kept, with the hidden states that the draft will read, so
that training needs no second pass of the target.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from mtad.distill.recipe import Writing
from mtad.distill.targets import Target
from mtad.errors import ConfigError, PairError

_ROWS_AT_ONCE = 16


class Origin(IntEnum):
    """Where a token of the corpus came from."""

    FORCED = 0
    QUESTION = 1
    ANSWER = 2


@dataclass(frozen=True)
class Template:
    """A chat template cut into the pieces between which text stands.

    Attributes:
        opening: before the first question.
        turn: between a question and its answer; its first token ends a question. Empty where
            there are no questions: an opener then begins a text.
        follow: between an answer and the next question; its first token ends an answer.
        openers: the tokens of the openers.
    """

    opening: tuple[int, ...]
    turn: tuple[int, ...]
    follow: tuple[int, ...]
    openers: tuple[tuple[int, ...], ...] = ((),)

    @staticmethod
    def of(tokenizer: Any, openers: Sequence[str] = ("",)) -> Template:
        """Reads the pieces off a rendered conversation.

        Raises:
            PairError: the template does not show what was said, in order.
        """
        said = ("\u2460", "\u2461", "\u2462")
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        pieces: list[tuple[int, ...]] = []
        for text in said:
            before, found, rendered = rendered.partition(text)
            pieces.append(_tokens(tokenizer, before))
            if not found or (len(pieces) > 1 and not pieces[-1]):
                raise PairError(
                    "The target's chat template does not render a conversation of two turns with"
                    " something between them. Take a target with another template, or with none"
                    " (it then writes plain text)."
                )
        opening, turn, follow = pieces
        return Template(opening, turn, follow, tuple(_tokens(tokenizer, text) for text in openers))

    @staticmethod
    def for_target(target: Target, writing: Writing) -> Template:
        """The target's own template, or that of plain text.

        Plain text begins with the token that begins a text, else with one that ends a text,
        else with any.

        Raises:
            PairError: as `of`.
            ConfigError: a row has no room for more than the forced pieces.
        """
        tokenizer = target.tokenizer
        if tokenizer is not None and tokenizer.chat_template is not None:
            template = Template.of(tokenizer, writing.openers)
        else:
            bos = getattr(target.model.config.get_text_config(), "bos_token_id", None)
            starts = [bos] if isinstance(bos, int) else sorted(target.ends)[:1]
            starts = starts or list(range(target.vocab_size))
            template = Template((), (), (), tuple((start,) for start in starts))
        forced = len(template.opening + template.turn) + max(map(len, template.openers))
        if forced + 2 > writing.row_tokens:
            raise ConfigError(
                f"writing.row_tokens is {writing.row_tokens}, but must be at least {forced + 2}:"
                f" {forced} tokens are the template's and the longest opener's."
            )
        return template


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


class Stream:
    """One row's conversations: says which token is forced next, or how to sample it.

    Attributes:
        origin: of the next token that is sampled.
        sampling: index into the samplings of that origin.
    """

    def __init__(
        self,
        writing: Writing,
        template: Template,
        ends: frozenset[int],
        generator: torch.Generator,
    ) -> None:
        self._writing = writing
        self._template = template
        self._ends = ends
        self._generator = generator
        self._forced: deque[int] = deque()
        self._open()

    def next(self, sampled: int) -> tuple[int, Origin]:
        """The next token of the row, given what the target would say."""
        if self._forced:
            return self._forced.popleft(), Origin.FORCED
        origin = self.origin
        self._written += 1
        ended = sampled in self._ends
        if origin is Origin.QUESTION:
            if ended or self._written >= self._writing.question_tokens:
                self._begin_answer()
                return self._force(self._template.turn), origin if ended else Origin.FORCED
        elif ended or self._written >= self._writing.answer_tokens:
            if self._turns < self._writing.turns and self._template.follow:
                self._begin_question()
                return self._force(self._template.follow), origin if ended else Origin.FORCED
            self._open()
        return sampled, origin

    def _force(self, piece: tuple[int, ...]) -> int:
        """The first token of a piece; the others follow."""
        self._forced.extend(piece[1:])
        return piece[0]

    def _open(self) -> None:
        """Begins a new conversation, or a new text."""
        template = self._template
        self._forced.extend(template.opening)
        self._forced.extend(template.openers[self._pick(len(template.openers))])
        self._turns = 0
        if template.turn:
            self._begin_question()
        else:
            self._begin_answer()

    def _begin_question(self) -> None:
        self.origin = Origin.QUESTION
        self.sampling = self._pick(len(self._writing.question_samplings))
        self._written = 0

    def _begin_answer(self) -> None:
        self.origin = Origin.ANSWER
        self.sampling = self._pick(len(self._writing.answer_samplings))
        self._written = 0
        self._turns += 1

    def _pick(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))


@dataclass(frozen=True)
class Shard:
    """Text with what the target thought of it: B rows of L tokens, as written, or a batch.

    Attributes:
        token_ids: [B, L] int32.
        origins: [B, L] uint8, an `Origin` of each token.
        top_ids: [B, L, K] int32, the target's most probable successors of each token.
        top_logprobs: [B, L, K] float16, their unwarped log-probabilities, falling.
        hidden: [B, L, F·H] bfloat16, the target's hidden states at each token, the recipe's
            layers one after the other; [B, L, 0] where they are not kept.
    """

    token_ids: Tensor
    origins: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    hidden: Tensor

    @staticmethod
    def layout(
        writing: Writing, hidden_size: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a whole shard; `hidden_size` is F·H."""
        rows = (writing.rows, writing.row_tokens)
        kept = hidden_size if writing.keep_hidden else 0
        return {
            "token_ids": (rows, torch.int32),
            "origins": (rows, torch.uint8),
            "top_ids": ((*rows, writing.top), torch.int32),
            "top_logprobs": ((*rows, writing.top), torch.float16),
            "hidden": ((*rows, kept), torch.bfloat16),
        }


def sample_top(
    logprobs: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, generator: torch.Generator
) -> Tensor:
    """Draws one of K candidates a row, each row with its own warp.

    Args:
        logprobs: [B, K], falling within a row.
        temperature: [B], greater than 0.
        top_k: [B]; a number of K or more keeps all.
        top_p: [B].
        generator: on the same device.

    Returns:
        [B] int64 indices into the K candidates.
    """
    ranks = torch.arange(logprobs.shape[1], device=logprobs.device)
    scaled = logprobs / temperature.unsqueeze(1)
    scaled = scaled.masked_fill(ranks >= top_k.unsqueeze(1), -torch.inf)
    probs = scaled.softmax(-1)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= top_p.unsqueeze(1), 0.0)
    race = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / race).argmax(-1)


def most_probable(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[B, V] → the ids [B, count] and log-probabilities of the best, falling.

    A few rows at a time, so that what is computed on the way stays in a CPU's cache.
    """
    parts = []
    size = _ROWS_AT_ONCE if logits.device.type == "cpu" else logits.shape[0]
    for rows in torch.split(logits, size):
        values, ids = rows.topk(count)
        values = (values - rows.logsumexp(-1, keepdim=True)).clamp(max=0)  # rounding
        parts.append((ids, values))
    return torch.cat([ids for ids, _ in parts]), torch.cat([values for _, values in parts])


@torch.inference_mode()
def write_shard(
    target: Target,
    template: Template,
    writing: Writing,
    target_layers: Sequence[int],
    seed: int,
    progress: Callable[[int], None] = lambda step: None,
) -> Shard:
    """One batch of rows; `progress` is called with the tokens written so far by each row."""
    device = target.device
    host = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    streams = [Stream(writing, template, target.ends, host) for _ in range(writing.rows)]
    samplings = (*writing.question_samplings, *writing.answer_samplings)
    table = torch.tensor(samplings, dtype=torch.float32, device=device)
    first = {Origin.QUESTION: 0, Origin.ANSWER: len(writing.question_samplings)}
    layers = target_layers if writing.keep_hidden else ()
    step_of = target.steps(writing.rows, writing.row_tokens, layers)
    # On the device, so that the host waits for nothing but the tokens.
    shard = Shard(
        **{
            name: torch.empty(size, dtype=kind, device=device)
            for name, (size, kind) in Shard.layout(
                writing, target.hidden_size * len(target_layers)
            ).items()
        }
    )
    sampled = [0] * writing.rows
    for step in range(writing.row_tokens):
        progress(step)
        written = [stream.next(token) for stream, token in zip(streams, sampled, strict=True)]
        tokens = torch.tensor([token for token, _ in written])
        logits, hidden = step_of(tokens)
        ids, values = most_probable(logits, writing.top)
        warp = table[[first[stream.origin] + stream.sampling for stream in streams]]
        choice = sample_top(values, warp[:, 0], warp[:, 1], warp[:, 2], generator)
        sampled = ids.gather(1, choice.unsqueeze(1)).squeeze(1).tolist()
        shard.token_ids[:, step] = tokens
        shard.origins[:, step] = torch.tensor([origin for _, origin in written])
        shard.top_ids[:, step] = ids
        shard.top_logprobs[:, step] = values
        shard.hidden[:, step] = hidden
    return Shard(**{name: tensor.cpu() for name, tensor in vars(shard).items()})
