"""Narrow logits say what the dense ones would."""

from __future__ import annotations

import pytest
import torch

from mtad.config import DecodeConfig
from mtad.logits import Columns, Logits
from mtad.sampling import score, warp

TOKENS = torch.tensor([1, 2, 5, 6, 8])
VOCABULARY = 9


def narrow(rows: int = 3) -> Logits:
    values = torch.randn(rows, 5, generator=torch.Generator().manual_seed(2))
    return Logits(values, Columns.of(TOKENS, VOCABULARY))


def test_the_whole_vocabulary_needs_no_columns() -> None:
    assert Columns.of(torch.arange(4), 4) is None


def test_a_mixture_is_the_formula() -> None:
    logits = narrow()
    tokens, shares = torch.tensor([2, 0, 3]), torch.tensor([0.25, 0.5, 0.0])
    expected = logits.dense().softmax(-1) * (1 - shares.unsqueeze(1))
    expected[torch.arange(3), tokens] += shares
    for given in (logits, Logits(logits.dense())):
        mixed = given.mixed(tokens, shares.log() - torch.log1p(-shares))
        torch.testing.assert_close(mixed.dense().softmax(-1), expected)
        torch.testing.assert_close(given.dense(), logits.dense())  # stays as it was
        for row in mixed.tokens().tolist():
            assert len(set(row)) == len(row)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 3}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0}, {"temperature": 0.0}]
)
def test_rules_see_the_same_distributions(filters: dict[str, float]) -> None:
    config = DecodeConfig(**filters)  # type: ignore[arg-type]
    mixed = narrow().mixed(torch.tensor([2, 0, 3]), torch.tensor([0.3, 0.1, -torch.inf]))
    dense = Logits(mixed.dense())
    for rule in (warp, score):
        torch.testing.assert_close(
            rule(mixed, config).dense().exp(), rule(dense, config).dense().exp()
        )
    torch.testing.assert_close(mixed.log_sums(), dense.log_sums())
    assert torch.equal(mixed.best(4)[1], dense.best(4)[1])
    assert mixed.shape == dense.shape == (3, VOCABULARY)
    assert torch.equal(mixed[1].dense(), dense[1].values)
    assert torch.equal(mixed[-1:].cut(4).values, dense[-1:].values[:, :4])
