"""Two drafters on the same random walk along trees of tokens: both must say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtad.draft import Drafter
from mtad.lm import CachedLM


def logq(logits: Any) -> Tensor:
    """They are defined up to a constant."""
    rows: Tensor = logits if isinstance(logits, Tensor) else logits.dense()
    return rows.float().log_softmax(-1)


@torch.no_grad()
def walk_side_by_side(
    target: PreTrainedModel,
    make: Callable[[], tuple[Drafter, Drafter]],
    device: str = "cpu",
    *,
    tokens_below: int = 5,
) -> None:
    """Random prompts, trees, kept paths and tokens accepted beyond the draft's cache.

    Of a few tokens only, so that there is something to copy. `make` gives two drafters that read
    the first hidden states of the target.
    """
    generator = torch.Generator().manual_seed(1)

    def pick(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    def given(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def hidden(text: list[int]) -> Tensor | None:
        return CachedLM(target).prefill(given(text), make()[0].target_layers) if text else None

    compared = 0
    for _ in range(12):
        text = [pick(tokens_below) for _ in range(1 + pick(9))]
        drafters = make()
        known, pending = len(text) - 1, 1
        for drafter in drafters:
            drafter.prefill(given(text[:-1]), hidden(text[:-1]))

        def both(*arguments: Any, drafters: Any = drafters) -> int:
            expected, found = (logq(drafter.next_logits(*arguments)) for drafter in drafters)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
            return int(found.shape[0])

        for _ in range(5):
            before = text[: len(text) - pending]
            compared += both(given(text[-pending:]))
            nodes = [text[len(before) : len(before) + i + 1] for i in range(pending)]
            leaves = [pending - 1]
            for _ in range(pick(4)):
                parents = [leaves[pick(len(leaves))] for _ in range(1 + pick(4))]
                tokens = [pick(tokens_below) for _ in parents]
                chain = len(nodes) == leaves[-1] + 1 == parents[0] + 1 and len(parents) == 1
                if chain and pick(2):
                    compared += both(given(tokens))
                else:
                    compared += both(given(tokens), given(parents))
                leaves = list(range(len(nodes), len(nodes) + len(tokens)))
                nodes += [[*nodes[a], token] for a, token in zip(parents, tokens, strict=True)]
            kept = nodes[pending - 1 + pick(len(nodes) - pending + 1)]
            path = [nodes.index(kept[: i + 1]) for i in range(len(kept))]
            further = [pick(tokens_below) for _ in range(pick(2))]
            text = [*before, *kept, *further]
            states = hidden(text)
            assert states is not None
            linear = path == list(range(len(path)))
            as_count = linear and pick(2)
            for drafter in drafters:
                drafter.keep(len(path) if as_count else given(path), states[known:])
            known, pending = len(text), 1 + len(further)
            text.append(pick(tokens_below))
    assert compared > 150
