"""The copy distribution: which token is copied, with what share, along any walk of a tree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mtad
from mtad.copy_drafter import CopyDrafter, longest_match, mixed
from mtad.logits import Columns, Logits
from mtad.pairs import ModelPair
from tests.models import tiny
from tests.tables import TableLM

WEIGHTS = (0.1, 0.5, 0.9)


def by_hand(text: list[int], tail: list[int], most: int) -> tuple[int, int | None]:
    """The longest end of `tail` that stands in `text` with a token after it; the latest place."""
    for length in range(min(most, len(tail)), 0, -1):
        for end in range(len(text) - 2, length - 2, -1):
            if text[end - length + 1 : end + 1] == tail[-length:]:
                return length, text[end + 1]
    return 0, None


def test_longest_match_against_a_search_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    found = set()
    for _ in range(300):
        size = int(torch.randint(2, 12, (), generator=generator))
        text = torch.randint(3, (size,), generator=generator)
        tails = torch.randint(3, (4, 4), generator=generator)
        tails[0, :3] = -1  # a text of one token
        lengths, copied = longest_match(text, tails)
        for row in range(4):
            tail = [token for token in tails[row].tolist() if token >= 0]
            length, token = by_hand(text.tolist(), tail, 4)
            assert int(lengths[row]) == length
            assert token is None or int(copied[row]) == token
            found.add(length)
    assert found == {0, 1, 2, 3, 4}


def test_a_copied_token_without_a_column_is_left_out() -> None:
    logits = Logits(torch.zeros(1, 3), Columns.of(torch.tensor([1, 4, 5]), 6))
    odds = torch.tensor([-math.inf, 1.0])
    for text, tail, column in (([7, 4, 7], [7], 1), ([7, 0, 7], [7], None)):
        found = mixed(logits, torch.tensor(text), torch.tensor([tail]), odds).values[0]
        assert [bool(value) for value in found] == [place == column for place in range(3)]


@torch.no_grad()
def test_any_walk_mixes_by_the_longest_match() -> None:
    """Random prompts, trees and kept paths over 4 tokens, against the formula."""
    generator = torch.Generator().manual_seed(1)

    def pick(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    matched = 0
    for seed in range(40):
        plain = TableLM(4, seed=seed)
        drafter = CopyDrafter(TableLM(4, seed=seed), WEIGHTS)
        text = [pick(4) for _ in range(pick(6))]
        drafter.prefill(torch.tensor(text, dtype=torch.int64), None)
        for _ in range(3):
            first = [pick(4) for _ in range(1 + pick(2))]
            nodes = [first[: i + 1] for i in range(len(first))]
            rows = list(drafter.next_logits(torch.tensor(first)).dense())
            parents = [pick(len(nodes)) for _ in range(3)]
            tokens = [pick(4) for _ in parents]
            rows += list(drafter.next_logits(torch.tensor(tokens), torch.tensor(parents)).dense())
            below = zip(parents, tokens, strict=True)
            nodes += [[*nodes[parent], token] for parent, token in below]
            for node, row in zip(nodes, rows, strict=True):
                expected = plain.logits_after([*text, *node]).softmax(-1)
                length, token = by_hand(text, [*text, *node], len(WEIGHTS))
                if length:
                    share = WEIGHTS[length - 1]
                    expected = expected * (1 - share)
                    expected[token] += share
                    matched += 1
                torch.testing.assert_close(row.softmax(-1), expected, atol=1e-6, rtol=1e-5)
            kept = nodes[pick(len(nodes))]
            path = [nodes.index(kept[: i + 1]) for i in range(len(kept))]
            drafter.keep(torch.tensor(path))
            text += kept
    assert matched > 200


def test_a_token_that_the_draft_cannot_propose_can_be_copied() -> None:
    class Never:
        vocab_size = 3
        target_layers = ()

        def prefill(self, token_ids: Tensor, target_hidden: Tensor | None) -> None:
            pass

        def next_logits(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor:
            return torch.tensor([[0.0, 0.0, -math.inf]]).expand(token_ids.shape[0], 3)

        def keep(self, path: Tensor | int, target_hidden: Tensor | None = None) -> None:
            pass

    drafter = CopyDrafter(Never(), WEIGHTS)
    drafter.prefill(torch.tensor([0, 1, 2, 0]), None)
    probs = drafter.next_logits(torch.tensor([1])).dense().softmax(-1)[0]
    torch.testing.assert_close(probs, torch.tensor([0.25, 0.25, 0.5]))
    unmatched = drafter.next_logits(torch.tensor([0]), torch.tensor([0])).dense().softmax(-1)[0]
    assert unmatched[2] == 0


@pytest.mark.parametrize("method", ["speculative", "specinfer"])
def test_lossless_methods_stay_lossless(method: str) -> None:
    target, draft = tiny(vocab_size=24), TableLM(24, seed=3)
    pair = ModelPair(target, CopyDrafter(draft, WEIGHTS))
    config = mtad.DecodeConfig(max_new_tokens=40, temperature=0.0)
    prompt = [1, 2, 3, 1, 2]
    ours = mtad.run(method, pair, prompt_ids=prompt, config=config)
    plain = mtad.run("autoregressive", pair, prompt_ids=prompt, config=config)
    assert ours.token_ids == plain.token_ids
    assert ours.summary.block_efficiency > 1  # a random model that repeats itself is copied
