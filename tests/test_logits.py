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
    tokens, shares = torch.tensor([2, 8, 3]), torch.tensor([0.25, 0.5, 0.0])
    expected = logits.dense().softmax(-1) * (1 - shares.unsqueeze(1))
    expected[torch.arange(3), tokens] += shares
    for given in (logits, Logits(logits.dense())):
        mixed = given.mixed(tokens, shares.log() - torch.log1p(-shares))
        torch.testing.assert_close(mixed.dense().softmax(-1), expected)
        torch.testing.assert_close(given.dense(), logits.dense())  # stays as it was
        for row in mixed.tokens().tolist():
            assert len(set(row)) == len(row)


def test_a_token_without_a_column_is_not_mixed_in() -> None:
    logits = narrow()
    mixed = logits.mixed(torch.tensor([0, 1, 7]), torch.zeros(3))
    assert torch.equal(mixed.values[::2], logits.values[::2])
    assert (mixed.values[1] > logits.values[1]).tolist() == [True, False, False, False, False]


def test_columns_of_probability_0_may_name_a_token_again() -> None:
    """As those of a text in which it stands twice."""
    values = torch.tensor([[0.5, -torch.inf, 1.5, -torch.inf]])
    places = torch.tensor([0, 99, 2, 99])
    logits = Logits(values, Columns(torch.tensor([0, 2, 2, 0]), places))
    expected = torch.tensor([[0.5, -torch.inf, 1.5, -torch.inf]])
    assert torch.equal(logits.dense(), expected)
    for config in (DecodeConfig(top_k=0, top_p=1.0), DecodeConfig(top_k=0, top_p=0.9)):
        torch.testing.assert_close(warp(logits, config).dense(), warp(expected, config).dense())


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
